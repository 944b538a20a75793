"""Folders out: what `timm.create_model('local-dir:DIR', pretrained=True)` loads, and transformers."""
import copy
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Union

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import get_model_input_config, save_for_hf
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import version
from .foreign import Unfilled, foreign
from .identity import WEIGHT_CFG, plain_forward
from .model_card import CARD, OURS, model_card
from .moe import evaluating, moe_layers

PathLike = Union[str, os.PathLike]
_DATA_CONFIG = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
_LEFT = re.compile(r'\.(.+)\.(old|new)-[a-z0-9_]{8}')  # names by tempfile.mkdtemp
# what belongs to the model in a folder (the third is of timm's own writer)
FILES = ('config.json', 'model.safetensors', 'pytorch_model.bin', 'ema.safetensors', 'model.onnx')


class NotVerified(RuntimeError):
    """What was written does not load to the same weights and outputs, and was taken back."""


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_folder(new: Path, final: Path, ours: Optional[Sequence[str]] = None) -> None:
    """Give a complete folder its final name; what was there before stays until the new one is safely on disk.

    With `ours`, names of files, all others in the folder that is replaced move to the new one, and so does a model card
    that is not as `export` wrote it.
    """
    for path in [*new.iterdir(), new]:
        _fsync(path)
    old = None
    if final.exists() or final.is_symlink():
        old = Path(tempfile.mkdtemp(prefix=f'.{final.name}.old-', dir=final.parent))
        if _exchange(new, final):
            try:
                os.rename(new, old / final.name)
            except OSError:
                _exchange(new, final)
                old.rmdir()
                raise
        else:
            os.rename(final, old / final.name)
    if new.exists():
        try:
            os.rename(new, final)
        except OSError:
            if old is not None:
                os.rename(old / final.name, final)
                old.rmdir()
            raise
    _fsync(final.parent)
    if old is not None:
        replaced = old / final.name
        if replaced.is_symlink():
            replaced.unlink()
        elif ours is not None:
            _keep_others(replaced, final, ours)
        shutil.rmtree(old)


def _keep_others(replaced: Path, final: Path, ours: Sequence[str]) -> None:
    """Move what is not ours from a folder that was replaced into the one that replaced it."""
    for path in replaced.iterdir():
        if path.name not in ours and not (path.name == CARD and OURS in path.read_text(errors='replace')):
            os.rename(path, final / path.name)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change names in one step, so that at no moment there is none; False where the system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def clean_up(directory: Path) -> None:
    """Remove what killed writers of model folders left in a directory; bring back what they had moved aside.

    A folder that was replaced may still hold files of others; these go to the one that replaced it.
    """
    for left in directory.iterdir():
        match = _LEFT.fullmatch(left.name)
        if match is None or not left.is_dir() or left.is_symlink():
            continue
        final = directory / match[1]
        replaced = left / match[1] if match[2] == 'old' else left
        if match[2] == 'old' and replaced.exists() and not final.exists():
            os.rename(replaced, final)
        elif (replaced / 'config.json').is_file() and (final / 'config.json').is_file():
            _keep_others(replaced, final, FILES)
        shutil.rmtree(left)


@contextmanager
def _new_folder(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which gets its final name if nothing is raised.

    Raises:
        FileExistsError: The final one exists and `overwrite` is not set, or it is no model folder.
    """
    if directory.exists() and not overwrite:
        raise FileExistsError(f'{directory} exists; give another folder, or overwrite=True.')
    if directory.exists() and not (directory / 'config.json').is_file() and (
            not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f'{directory} is not a model folder, so it is not replaced.')
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.new-', dir=directory.parent))
    try:
        yield new
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)  # mkdtemp and safetensors make private ones
        for path in new.iterdir():
            path.chmod(0o666 & ~umask)
        replace_folder(new, directory, ours=FILES)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _untied(model: nn.Module) -> nn.Module:
    """A copy in which a module that stands in several places (CoaT) is several: safetensors holds no tensor twice."""
    model = copy.deepcopy(model)
    seen = set()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in seen:
                parent._modules[name] = copy.deepcopy(child)
            elif child is not None:
                seen.add(child)
    return model


def write_folder(
        model: nn.Module,
        directory: PathLike,
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        provenance: Optional[Dict[str, Any]] = None,
        ema: Optional[Dict[str, Tensor]] = None,
        overwrite: bool = False,
        verify: bool = True,
        onnx: bool = False,
        card: bool = False,
) -> None:
    """Write a timm model, dense or MoE, as a folder that appears whole or not at all.

    Args:
        model: A model that timm built (its weights and what it says of itself are written; it is not changed).
        directory: Folder to make.
        class_names: Name of each class, in order.
        data_config: Preprocessing the weights were trained with: input_size, interpolation, mean, std, crop_pct,
            crop_mode, as by `timm.data.resolve_data_config`. Default: what the model says.
        provenance: Written under the key `ewa` of config.json; timm ignores it.
        ema: A second set of weights, written beside the first as `ema.safetensors`.
        overwrite: Replace an existing model folder; what others put into it stays.
        verify: Load the folder strictly and compare outputs before it gets its final name.
        onnx: Also write `model.onnx` and compare what onnxruntime computes with it.
        card: Also write a model card, `README.md`.

    Raises:
        FileExistsError: The folder exists and `overwrite` is not set.
        ValueError: timm can't build this model by a name or write its arguments, class names are not as many as
            classes, or ONNX can't be written.
        NotVerified: What was written does not load to the same outputs; the folder is not made.
    """
    directory = Path(directory)
    cfg = getattr(model, 'pretrained_cfg', None)
    if not cfg or not timm.is_model(cfg.get('architecture') or ''):
        raise ValueError(
            f'{type(model).__name__} does not carry the name of a timm architecture (model.pretrained_cfg), so no '
            f'folder of it could be loaded again. Create the model with timm.create_model.')
    if not hasattr(model, 'num_classes'):
        raise ValueError(
            f'{type(model).__name__} was created with features_only=True and is no whole {cfg["architecture"]}: export '
            f'the model created without it; timm makes features of its folder.')
    if verify and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ValueError(
            f'{type(model).__name__} has weights in float64, but timm loads float32: export model.float().')
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f'{len(class_names)} class names were given for a model of {model.num_classes} classes.')
    model = copy.copy(model)  # shallow: only what is replaced here
    plain_forward(model)
    if not all(value.is_contiguous() for value in model.state_dict().values()):  # channels_last
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    if len({id(value) for value in model.state_dict(keep_vars=True).values()}) < len(model.state_dict()):
        model = _untied(model)
    model.pretrained_cfg = dict({k: v for k, v in cfg.items() if k not in WEIGHT_CFG}, tag='', license='')
    extra: Dict[str, Any] = {'ewa': {**(provenance or {}), 'versions': versions()}}
    if class_names is not None:
        extra['label_names'] = list(class_names)
    with _new_folder(directory, overwrite) as new:
        with foreign(f'{directory} can\'t be written', TypeError, RuntimeError, SafetensorError):
            save_for_hf(model, str(new), model_config=extra, safe_serialization=True, data_config=data_config)
        config = json.loads((new / 'config.json').read_text())
        # it stands at the top too, where timm and transformers look; transformers would be given it twice
        config.get('model_args', {}).pop('num_classes', None)
        (new / 'config.json').write_text(json.dumps(config, indent=2))
        if ema is not None:
            with foreign(f'{directory} can\'t be written', RuntimeError, SafetensorError):
                safetensors.torch.save_file({k: v.contiguous() for k, v in ema.items()}, new / 'ema.safetensors')
        if verify:
            _verify(model, new)
        if onnx:
            _write_onnx(model, new / 'model.onnx')
        if card:
            (new / CARD).write_text(model_card(
                directory.name, 'timm', config['architecture'], _size(model), config['ewa'],
                num_classes=config['num_classes'], class_names=config.get('label_names'),
                data_config=config['pretrained_cfg']))


@torch.no_grad()
def _verify(model: nn.Module, directory: Path) -> None:
    reference = next(model.parameters())
    with foreign('The exported folder can\'t be loaded again'), Unfilled():
        loaded = timm.create_model(f'local-dir:{directory}', pretrained=True)
    loaded = loaded.to(device=reference.device, dtype=reference.dtype).eval()
    written, read = model.state_dict(), loaded.state_dict()
    if list(written) != list(read) or not all(torch.equal(written[key], read[key]) for key in written):
        raise NotVerified('The exported folder does not load to the weights that were written.')
    image = _image(model).to(reference)
    with evaluating(model):
        if not torch.equal(model(image), loaded(image)):
            raise NotVerified('The exported folder does not compute the outputs of the model that was written.')


def _image(model: nn.Module) -> Tensor:
    # a generator of its own: an export in the middle of a training run must not change what the run draws
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *get_model_input_config(model)['input_size'], generator=generator)


def require_onnx() -> None:
    """Raise a ValueError that says what to install where ONNX can't be written and checked."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  what torch.onnx exports with
    except ImportError as e:
        raise ValueError(
            f'ONNX needs a package that is not installed ({e.name}): pip install onnx onnxruntime onnxscript') from e


@torch.no_grad()
def _write_onnx(model: nn.Module, path: Path) -> None:
    require_onnx()
    import onnxruntime

    model = copy.deepcopy(model).cpu().float().eval()
    image = _image(model)
    with warnings.catch_warnings(), foreign('torch can\'t export this model to ONNX, leave --onnx out'):
        warnings.simplefilter('ignore')  # the exporter warns about its own internals
        torch.onnx.export(
            model, (image,), str(path), dynamo=True, external_data=False, verbose=False, input_names=['image'],
            output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    with foreign('onnxruntime can\'t read what torch exported, leave --onnx out'):
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for batch in (image, image[:1]):
        expected = model(batch)
        difference = (torch.from_numpy(session.run(None, {'image': batch.numpy()})[0]) - expected).abs().max().item()
        if not difference <= 1e-3 * max(expected.abs().max().item(), 1):
            raise NotVerified(f'onnxruntime\'s logits differ from the model\'s by {difference:.3g}.')


def versions() -> Dict[str, str]:
    """Versions of this package and of what wrote the weights."""
    return {'ewa': version.__version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers: of DDP and `torch.compile`, transformers' TimmWrapper, a LightningModule.

    Raises:
        ValueError: A LightningModule has weights in more than one of its parts.
    """
    while True:
        inner = next((getattr(model, n) for n in ('module', '_orig_mod', 'timm_model') if hasattr(model, n)), None)
        if not isinstance(inner, nn.Module):
            if not any(c.__name__ == 'LightningModule' for c in type(model).__mro__):
                return model
            parts = {name: part for name, part in model.named_children() if next(part.parameters(), None) is not None}
            if len(parts) != 1 or any(p is not None for p in model._parameters.values()):
                raise ValueError(
                    f'{type(model).__name__} has weights in {" and ".join(parts) or "itself"}: export the part that is '
                    f'to be loaded again.')
            inner = next(iter(parts.values()))
        model = inner


def _is_of_transformers(model: nn.Module) -> bool:
    names = [f'{c.__module__}.{c.__name__}' for c in type(model).__mro__]
    return 'transformers.modeling_utils.PreTrainedModel' in names


def _class_names(model: Any) -> Optional[Sequence[str]]:
    """Those that a transformers model was given."""
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return None if names == [f'LABEL_{i}' for i in range(len(names))] else names


def _write_transformers(
        model: Any, directory: Path, class_names: Optional[Sequence[str]], provenance: Dict[str, Any], overwrite: bool,
) -> None:
    model = copy.copy(model)  # shallow: only what is replaced here
    plain_forward(model)
    model.config = copy.deepcopy(model.config)
    if class_names is not None:
        if len(class_names) != model.config.num_labels:
            raise ValueError(
                f'{len(class_names)} class names were given for a model of {model.config.num_labels} classes.')
        model.config.id2label = dict(enumerate(class_names))
        model.config.label2id = {name: i for i, name in enumerate(class_names)}
    name = type(model).__name__
    classifies = name.endswith('ForImageClassification')
    with _new_folder(directory, overwrite) as new:
        with foreign(f'{directory} can\'t be written', TypeError, ValueError, RuntimeError, SafetensorError):
            model.save_pretrained(new)
        _verify_transformers(model, new)
        (new / CARD).write_text(model_card(
            directory.name, 'transformers', model.config.model_type, _size(model),
            {**provenance, 'versions': {**versions(), 'transformers': sys.modules['transformers'].__version__}}, name,
            model.config.num_labels if classifies else None, _class_names(model) if classifies else None))


@torch.no_grad()
def _verify_transformers(model: Any, directory: Path) -> None:
    reference = next(model.parameters())
    with foreign('The exported folder can\'t be loaded again'):
        loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    loaded = loaded.to(device=reference.device, dtype=reference.dtype).eval()
    written, read = model.state_dict(), loaded.state_dict()
    if any(info.values()) or list(written) != list(read) or not all(torch.equal(written[k], read[k]) for k in written):
        raise NotVerified('The exported folder does not load to the weights that were written.')
    inputs = {key: value.to(reference.device) for key, value in _inputs(model).items()}
    if inputs:
        with evaluating(model):
            outputs = []
            for m in (model, loaded):
                with torch.random.fork_rng():  # MAE masks at random
                    torch.manual_seed(0)
                    outputs.append(tree_leaves(tuple(m(**inputs).values())))
        if not all(torch.equal(a, b) for a, b in zip(*outputs) if isinstance(a, Tensor)):
            raise NotVerified('The exported folder does not compute the outputs of the model that was written.')


def _inputs(model: Any) -> Dict[str, Tensor]:
    """Random inputs of a transformers model of images or of text; empty for others."""
    generator = torch.Generator().manual_seed(0)
    config = getattr(model.config, 'vision_config', model.config)
    if model.main_input_name == 'pixel_values' and hasattr(config, 'image_size'):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(2, getattr(config, 'num_channels', 3), height, width, generator=generator)
        return dict(pixel_values=images.to(model.dtype))
    if model.main_input_name == 'input_ids' and hasattr(config, 'vocab_size'):
        return dict(input_ids=torch.randint(config.vocab_size, (2, 8), generator=generator))
    return {}


def _write_state_dict(model: nn.Module, directory: Path, provenance: Dict[str, Any], overwrite: bool) -> None:
    name = type(model).__name__
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    config: Dict[str, Any] = dict(library='torchvision', model_class=f'{type(model).__module__}.{name}',
                  ewa={**provenance, 'versions': versions()})
    with _new_folder(directory, overwrite) as new:
        with foreign(f'{directory} can\'t be written', RuntimeError, SafetensorError):
            safetensors.torch.save_file(weights, new / 'model.safetensors')
        read = safetensors.torch.load_file(new / 'model.safetensors')
        if read.keys() != weights.keys() or not all(torch.equal(read[k].to(v.device), v) for k, v in weights.items()):
            raise NotVerified('The exported file does not hold the weights that were written.')
        (new / 'config.json').write_text(json.dumps(config, indent=2))
        (new / CARD).write_text(model_card(directory.name, 'torchvision', name, _size(model), config['ewa']))


def export(
        model: nn.Module,
        directory: PathLike,
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        provenance: Optional[Dict[str, Any]] = None,
        overwrite: bool = False,
        onnx: bool = False,
) -> None:
    """Write a dense model as a vanilla folder with a model card, which never needs this package to be loaded.

    A timm model is afterwards built by `timm.create_model('local-dir:DIRECTORY', pretrained=True)` (without
    `pretrained=True`, timm silently leaves the weights random), and by transformers'
    `AutoModelForImageClassification.from_pretrained(DIRECTORY)`. A transformers model is written by its own
    `save_pretrained`. Either folder is loaded strictly and its output compared, bit for bit, before it appears under
    its final name. Of a torchvision model the state dict is written, `model.safetensors`. No folder claims a pretrained
    tag or a licence.

    Args:
        model: A dense model, as `ewa.to_dense` returns it; wrappers (DDP, `torch.compile`, a LightningModule,
            transformers' TimmWrapper) are taken off.
        directory, class_names, overwrite: See `write_folder`.
        data_config, onnx: Likewise, of timm models only. (An image processor of transformers is saved by itself.)
        provenance: Further entries beside what `to_dense` noted, see `write_folder`.

    Raises:
        ValueError: The model has MoE layers, or it is of none of the three libraries.
        FileExistsError: The folder exists and `overwrite` is not set.
        NotVerified: What was written does not load to the same outputs.
    """
    names = [name for name, _ in moe_layers(model)]
    if names:
        raise ValueError(f'The model has MoE layers ({", ".join(names)}); export ewa.to_dense(model) instead.')
    provenance = {**getattr(model, 'conversion', {}), **(provenance or {})}
    if hasattr(model, 'timm_model'):  # transformers' wrapper knows what images its weights want
        cfg = getattr(getattr(model, 'config', None), 'pretrained_cfg', None) or {}
        data_config = data_config or {key: cfg[key] for key in _DATA_CONFIG if key in cfg} or None
        class_names = class_names or _class_names(model)
    model = unwrap(model)
    of_torchvision = type(model).__module__.startswith('torchvision.')
    if not (of_torchvision or _is_of_transformers(model)):
        write_folder(
            model, directory, class_names, data_config, provenance, overwrite=overwrite, onnx=onnx, card=True)
    elif data_config or onnx or (of_torchvision and class_names):
        raise ValueError(
            f'{type(model).__name__} is not of timm: leave data_config and onnx out, and class_names of torchvision.')
    elif of_torchvision:
        _write_state_dict(model, Path(directory), provenance, overwrite)
    else:
        _write_transformers(model, Path(directory), class_names, provenance, overwrite)
