"""Folders out: what `timm.create_model('local-dir:DIR', pretrained=True)` loads."""
import copy
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import get_model_input_config, save_for_hf
from torch import Tensor, nn

from .foreign import foreign
from .identity import WEIGHT_CFG, plain_forward
from .moe import evaluating, moe_layers
from .version import __version__

PathLike = Union[str, os.PathLike]
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

    With `ours`, names of files, all others in the folder that is replaced move to the new one.
    """
    for path in [*new.iterdir(), new]:
        _fsync(path)
    old = None
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=f'.{final.name}.old-', dir=final.parent))
        os.rename(final, old / final.name)
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
        if ours is not None and not replaced.is_symlink():
            for path in replaced.iterdir():
                if path.name not in ours:
                    os.rename(path, final / path.name)
        shutil.rmtree(old)


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
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f'{len(class_names)} class names were given for a model of {model.num_classes} classes.')
    if directory.exists() and not overwrite:
        raise FileExistsError(f'{directory} exists; give another folder or ask to overwrite it.')
    if directory.exists() and not (directory / 'config.json').is_file() and (
            not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f'{directory} is not a model folder, so it is not replaced.')

    model = copy.copy(model)  # shallow: only what is replaced here
    plain_forward(model)
    if not all(value.is_contiguous() for value in model.state_dict().values()):  # channels_last
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    model.pretrained_cfg = dict({k: v for k, v in cfg.items() if k not in WEIGHT_CFG}, tag='', license='')
    extra: Dict[str, Any] = {'ewa': {**(provenance or {}), 'versions': versions()}}
    if class_names is not None:
        extra['label_names'] = list(class_names)
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.new-', dir=directory.parent))
    try:
        with foreign(f'{directory} can\'t be written', TypeError, RuntimeError, SafetensorError):
            save_for_hf(model, str(new), model_config=extra, safe_serialization=True, data_config=data_config)
        if ema is not None:
            safetensors.torch.save_file({k: v.contiguous() for k, v in ema.items()}, new / 'ema.safetensors')
        if verify:
            _verify(model, new)
        if onnx:
            _write_onnx(model, new / 'model.onnx')
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)  # mkdtemp and safetensors make private ones
        for path in new.iterdir():
            path.chmod(0o666 & ~umask)
        replace_folder(new, directory, ours=FILES)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@torch.no_grad()
def _verify(model: nn.Module, directory: Path) -> None:
    reference = next(model.parameters())
    with foreign('The exported folder can\'t be loaded again'):
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
        raise ValueError(f'ONNX needs a package that is not installed ({e.name}): pip install -e ".[onnx]".') from e


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
    return {'ewa': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}


def export(
        model: nn.Module,
        directory: PathLike,
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        provenance: Optional[Dict[str, Any]] = None,
        overwrite: bool = False,
        onnx: bool = False,
) -> None:
    """Write a dense timm model as a vanilla folder, which never needs this package to be loaded.

    Afterwards `timm.create_model('local-dir:DIRECTORY', pretrained=True)` builds it. (Without `pretrained=True`, timm
    silently leaves the weights random.) The folder is loaded strictly and its output compared, bit for bit, before it
    appears under its final name. It claims nobody's pretrained tag and no licence.

    Args:
        model: A dense model, as `ewa.to_dense` returns it.
        directory, class_names, data_config, provenance, overwrite, onnx: See `write_folder`.

    Raises:
        ValueError: The model has MoE layers, or timm can't build it by a name.
        FileExistsError: The folder exists and `overwrite` is not set.
        NotVerified: What was written does not load to the same outputs.
    """
    names = [name for name, _ in moe_layers(model)]
    if names:
        raise ValueError(f'The model has MoE layers ({", ".join(names)}); export ewa.to_dense(model) instead.')
    provenance = {**getattr(model, 'conversion', {}), **(provenance or {})}
    write_folder(model, directory, class_names, data_config, provenance, overwrite=overwrite, onnx=onnx)
