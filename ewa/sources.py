"""Models from where they lie: by name and flags, a model folder, a checkpoint folder, a bare file, a teacher.

Whatever timm or a reader of files has to say of a wrong name, argument or file comes out as a `ValueError` of one line.
"""
import argparse
import difflib
import json
import math
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import get_model_input_config, load_state_dict
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .checkpoint import load_ema, read_state
from .distillation import forward_flops
from .foreign import Unfilled, foreign
from .options import moe_arguments
from .released import has_tanh_head, load_released
from .stacked import unstack
from .vision_transformer import HOSTS, has_experts

PathLike = Union[str, os.PathLike]


def read_config(directory: Path) -> Dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        ValueError: It is damaged.
    """
    path = directory / 'config.json'
    try:
        config = json.loads(path.read_text())
    except ValueError as e:  # UnicodeDecodeError among them
        raise ValueError(f'{path} is damaged, it is not JSON: {e}') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise ValueError(f'{path} names no architecture: it is damaged or not of timm.')
    for key, kind in (('model_args', dict), ('pretrained_cfg', dict), ('ewa', dict), ('label_names', list)):
        if not isinstance(config.get(key) or kind(), kind):
            raise ValueError(f'{path} is damaged: its entry {key} is {str(config[key])[:80]!r}.')
    for key in ('mean', 'std'):
        pixel = (config.get('pretrained_cfg') or {}).get(key)
        if pixel is not None and not (isinstance(pixel, list) and all(isinstance(x, (int, float)) for x in pixel)):
            raise ValueError(f'{path} is damaged: its entry pretrained_cfg.{key} is {str(pixel)[:80]!r}.')
    others = [name for name in config.get('label_names') or () if not isinstance(name, str)]
    if others:
        raise ValueError(f'{path} is damaged: an entry of label_names is {str(others[0])[:80]!r}.')
    return config


# arguments of which a model makes as many parts, each with tensors of its own; and others that are whole numbers
_PARTS = ('depth', 'depths', 'num_experts', 'num_shared')
_SIZES = ('patch_size', 'img_size', 'embed_dim', 'num_heads', 'in_chans', 'num_classes', 'top_k')


def check_counts(arguments: Mapping[str, Any], weights: Path, where: Path) -> None:
    """Refuse counts of parts that the weights of a model do not have: it would be built without end.

    Args:
        arguments: Of the model.
        weights: Its file.
        where: File that the arguments are from.

    Raises:
        ValueError: There is such a count, or one that is no number.
    """
    with suppress(OSError, SafetensorError):  # said by who reads them
        with safe_open(weights, 'pt') as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118  no dictionary
        for key in {*_PARTS, *_SIZES} & arguments.keys():
            limit = len(shapes) if key in _PARTS else sum(map(math.prod, shapes))
            for number in tree_leaves(arguments[key]):
                if isinstance(number, bool) or (isinstance(number, int) and not 0 <= number <= limit):
                    raise ValueError(
                        f'{where} is damaged: its {key} is {number}, and {weights.name} has {len(shapes)} tensors.')


def check_folder(directory: Path) -> Dict[str, Any]:
    """The `config.json` of a model folder, which may be true of the weights beside it.

    Raises:
        ValueError: It is not, or it is damaged.
    """
    config = read_config(directory)
    arguments = {key: config[key] for key in ('num_classes',) if key in config}
    arguments.update(config.get('model_args') or {})
    check_counts(arguments, directory / 'model.safetensors', directory / 'config.json')
    return config


def _check_name(name: str) -> None:
    """`check_folder` for a name that is a folder's, if there is one: else timm says what is missing."""
    source, _, folder = name.partition(':')
    if source == 'local-dir' and (Path(folder) / 'config.json').is_file():
        check_folder(Path(folder))


def load(directory: PathLike, ema: bool = False, layout: Optional[str] = None, **kwargs) -> nn.Module:
    """The model of a folder, dense or MoE, with its weights.

    Args:
        directory: A folder by `ewa.export`, `last/` or `best/` of a training run, or one of its `checkpoints/`. With a
            `layout`, the released files of somebody else's MoE model.
        ema: Take the EMA weights that lie beside the others.
        layout: `'swin_moe'` or `'v_moe'`, see `ewa.released` and docs/owners.md.
        **kwargs: For `timm.create_model`, e.g. `num_classes` or `img_size`; with a `layout`, for
            `ewa.released.load_released`: `top_k`, `renormalise`, `num_classes`.

    Raises:
        FileNotFoundError: No model folder there.
        ValueError: What is there is damaged, or the arguments do not fit.
    """
    directory = Path(directory)
    if layout is not None:
        if ema:
            raise ValueError(f'ema=True: files of layout {layout} have no EMA weights.')
        return load_released(directory, layout, **kwargs)
    if directory.is_file() and (directory.parent / 'config.json').is_file():
        raise ValueError(f'{directory} is a file of a model folder: load {directory.parent}.')
    if not (directory / 'config.json').is_file() and (directory / 'state.json').is_file():
        return _load_checkpoint_folder(directory, ema, kwargs)
    for name in ('config.json', 'ema.safetensors' if ema else 'model.safetensors'):
        if not (directory / name).is_file():
            kind = 'has no EMA weights' if name == 'ema.safetensors' else 'is not a model folder'
            raise FileNotFoundError(f'{directory} {kind}: it has no {name}.')
    config = check_folder(directory)
    # as it was saved it is loaded strictly, so that nothing is left as it was made
    whole = not kwargs and (config.get('model_args') or {}).get('num_classes') in (None, config.get('num_classes'))
    if ema:
        kwargs['pretrained_cfg_overlay'] = dict(source='', file='', state_dict=load_ema(directory))
    with foreign(f'{directory} can\'t be loaded' + f' with {kwargs}' * bool(kwargs and not ema)), (
            Unfilled() if whole else nullcontext()):
        return timm.create_model(f'local-dir:{directory}', pretrained=True, **kwargs)


def _load_checkpoint_folder(directory: Path, ema: bool, kwargs: Dict[str, Any]) -> nn.Module:
    state = read_state(directory)
    if not ema and not (directory / 'model.safetensors').is_file():  # lost, or in shards
        raise ValueError(f'{directory} has no model.safetensors: give the model folder of its run, last/ or best/.')
    check_counts(state.model, directory / f'{"ema" if ema else "model"}.safetensors', directory / 'state.json')
    weights = load_ema(directory) if ema else read_weights(directory / 'model.safetensors')
    args = dict(state.model)
    architecture = args.pop('architecture')
    overlay = dict(state_dict=weights, num_classes=args.get('num_classes'), **state.data_config)
    with foreign(f'{directory} can\'t be loaded'), nullcontext() if kwargs else Unfilled():
        return timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay=overlay, **{**args, **kwargs})


def read_weights(path: Path, ema: bool = False) -> Dict[str, Tensor]:
    """The tensors of a file, of timm's training script or bare; a pickle's code is never run.

    Raises:
        ValueError: It holds something else.
    """
    with foreign(f'{path} can\'t be read as tensors'):
        return load_state_dict(str(path), use_ema=ema)


def load_source(
        source: PathLike,
        ema: bool = False,
        model: Optional[str] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
        img_size: Optional[int] = None,
        in_chans: Optional[int] = None,
        layout: Optional[str] = None,
) -> Tuple[nn.Module, Dict[str, Any]]:
    """The MoE model of `convert.py`'s SRC and what is known of its training.

    Args:
        source: Model folder, checkpoint folder, a bare file of weights, or released files.
        ema: Take the EMA weights.
        model: Architecture of a bare file.
        model_kwargs: Its arguments; the number of classes is found from the weights.
        img_size: Of a bare file, if it is not the architecture's.
        in_chans: Likewise.
        layout: Of released files; `model_kwargs` then are arguments of `load_released`.

    Returns:
        The model, and `class_names` and `provenance` as far as they are known.

    Raises:
        ValueError, FileNotFoundError: There is no model, or not such a model.
    """
    source = Path(source)
    if layout is not None:
        return _load_released_source(source, layout, ema, model, model_kwargs or {}, img_size), dict(
            provenance=dict(layout=layout))
    if source.is_dir() and (model or model_kwargs):
        raise ValueError(
            f'--model{"-kwargs" * (not model)} is for a bare file of weights; {source} is a folder and says what its '
            f'model is: leave it out.')
    if (source / 'config.json').is_file():
        config = read_config(source)
        return load(source, ema), dict(class_names=config.get('label_names'), provenance=config.get('ewa', {}))
    if (source / 'state.json').is_file():
        state = read_state(source)
        return load(source, ema), dict(class_names=state.class_names, provenance=state.provenance)
    if source.is_dir():
        inside = [name for name in ('best', 'last') if (source / name / 'config.json').is_file()]
        raise ValueError(f'{source} is neither a model folder nor a checkpoint folder'
                         + (f'; did you mean {source / inside[0]}?' if inside else
                            ': it has no config.json or state.json.'))
    if not source.is_file():
        raise ValueError(f'{source} does not exist.')
    if not model:
        raise ValueError(
            f'{source} is a bare file of weights: name their architecture with --model, e.g. vit_small_ewa.')
    sizes = {key: value for key, value in (('img_size', img_size), ('in_chans', in_chans)) if value is not None}
    return _load_bare_file(source, ema, model, {**sizes, **(model_kwargs or {})}), {}


def _load_released_source(
        path: Path,
        layout: str,
        ema: bool,
        name: Optional[str],
        kwargs: Dict[str, Any],
        img_size: Optional[int],
) -> nn.Module:
    if name or ema:
        raise ValueError(f'--from {layout} finds the architecture from the files, which have no EMA weights: leave '
                         '--model and --use-ema out.')
    unknown = [key for key in kwargs if key not in ('top_k', 'renormalise', 'num_classes')]
    if unknown:
        raise ValueError(f'--model-kwargs {unknown[0]} is found from the files of --from {layout}; it takes top_k, '
                         'renormalise and num_classes.')
    model = load_released(path, layout, **kwargs)
    size = get_model_input_config(model)['input_size'][-1]
    if img_size not in (None, size):
        raise ValueError(f'--img-size {img_size}: {path} is for {size} pixels; timm can give the exported one another '
                         'size when it is loaded.')
    if has_tanh_head(model):
        raise ValueError(
            f'{path} has a tanh layer before its classifier (pre_logits), and no timm architecture has one. Give '
            '--model-kwargs num_classes=0 for the features below it, or num_classes=N for a new classifier to '
            'fine-tune. (ewa.load builds the model whole, to distil from in a loop of your own.)')
    return model


def _load_bare_file(path: Path, ema: bool, name: str, kwargs: Dict[str, Any]) -> nn.Module:
    if not timm.is_model(name.split('.', maxsplit=1)[0]):
        raise ValueError(f'--model {name} is not a model.')
    try:
        weights = unstack(read_weights(path, ema))
        raw = unstack(read_weights(path)) if ema else {}
    except ValueError as e:
        raise ValueError(str(e) if str(path) in str(e) else f'{path}: {e}') from e
    if ema and all(torch.equal(raw[key], value) for key, value in weights.items()):
        raise ValueError(f'{path} has no EMA weights.')
    if not has_experts(weights):
        raise ValueError(f'{path} has no experts: these are the weights of a dense model.')
    given = dict(kwargs)
    cfg = timm.models.get_pretrained_cfg(kwargs.get('host') or name.split('.', maxsplit=1)[0])
    classifier = getattr(cfg, 'classifier', None) or ''
    classifier = weights.get(f'{classifier if isinstance(classifier, str) else classifier[0]}.weight')
    if classifier is not None:
        kwargs.setdefault('num_classes', len(classifier))
    overlay = dict(state_dict=weights, num_classes=kwargs.get('num_classes'))
    try:
        with foreign('timm can\'t make it'):
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except ValueError as e:
        raise ValueError(f'{path} can\'t be loaded into {name} with {given}: {str(e)[:300]}') from e


def load_teacher(name: str, num_classes: int, image_shape: Sequence[int]) -> Tuple[nn.Module, int]:
    """A teacher in `eval()` without gradients.

    Args:
        name: `local-dir:DIR` of a folder by `train.py` or `ewa.export`, or a timm name with pretrained weights.
        num_classes: Classes of the student.
        image_shape: `(C, H, W)` of the student's images.

    Returns:
        The model and the floating-point operations of its forward pass for one image.

    Raises:
        ValueError: There is no such model, or it has other classes or takes other images than the student.
    """
    try:
        _check_name(name)
        with foreign('timm can\'t make it'):
            teacher = timm.create_model(name, pretrained=True)
    except ValueError as e:
        raise ValueError(
            f'--teacher {name} can\'t be loaded: {e}. Give local-dir:DIR or a pretrained timm name.') from e
    if teacher.num_classes != num_classes:
        raise ValueError(f'--teacher {name} has {teacher.num_classes} classes, the student {num_classes}.')
    if getattr(teacher, 'in_chans', image_shape[0]) != image_shape[0]:
        raise ValueError(f'--teacher {name} has {teacher.in_chans} input channels, the student {image_shape[0]}.')
    try:
        flops = forward_flops(teacher, image_shape)
    except ValueError as e:
        raise ValueError(f'--teacher {name} can\'t take the images of the student: {e}') from e
    return teacher.eval().requires_grad_(False), flops


def _given_weights(path: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """What a `pretrained_cfg` is overlaid with, so that timm starts from a file or folder."""
    if not path.exists():
        raise ValueError(f'{path} does not exist.')
    # the classifier is part of an initial checkpoint; of pretrained weights it is replaced, as by timm
    overlay: Dict[str, Any] = dict(file=str(path), num_classes=args.num_classes if args.initial_checkpoint else -1)
    if path.is_dir():
        with foreign(f'{path} is not a model folder'):
            overlay.update(source='local-dir', input_size=load_model_config_from_path(path)[0]['input_size'])
    return overlay


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model of `--model` and the expert flags, with the weights that were asked for.

    A dense name with `--num-experts` becomes the generic entry `vit_ewa(host=NAME)`.

    Raises:
        ValueError: Unknown name or argument, weights of another model, or images of other channels than `--in-chans`.
    """
    name, kwargs = args.model, dict(args.model_kwargs)
    experts = moe_arguments(args)
    source = name.split(':')[0] if ':' in name else None
    architecture, _, tag = ('', '', '') if source else name.partition('.')
    if not source and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.)
        raise ValueError(f'--model {name} is not a model; the nearest are {", ".join(close)}.')
    is_entry = architecture in HOSTS
    if experts and not is_entry and not source:
        if 'num_experts' not in experts:
            raise ValueError(f'--model {name} is dense; give --num-experts N to train it as a mixture of experts.')
        kwargs.update(host=architecture)
        name = f'vit_ewa.{tag}' if tag else 'vit_ewa'
    elif is_entry and architecture != 'vit_ewa' and 'host' in kwargs:
        raise ValueError(f'--model {name} has the host {HOSTS[architecture]}; for host={kwargs["host"]} give --model '
                         'vit_ewa.')
    kwargs.update(experts)

    host = kwargs.get('host') or HOSTS.get(architecture) or architecture
    if not source and not timm.is_model(host):
        raise ValueError(f'host={host!r} is not a model that timm knows.')
    if args.img_size is not None and (source or timm.get_pretrained_cfg_value(host, 'fixed_input_size')):
        kwargs.setdefault('img_size', args.img_size)
    kwargs.update({k: v for k, v in dict(
        in_chans=args.in_chans, num_classes=args.num_classes, global_pool=args.gp, drop_rate=args.drop,
        drop_path_rate=args.drop_path).items() if v is not None})

    _check_name(name)
    given = args.initial_checkpoint or args.pretrained_path
    problem = f'{name} can\'t be made with {kwargs}' + (
        ' and --pretrained (without a network give its file or folder by --pretrained-path)' * args.pretrained)
    if given:
        kwargs['pretrained_cfg_overlay'] = _given_weights(Path(given), args)
        problem = f'{given} can\'t be loaded into {name} with {kwargs}'
    with foreign(problem):
        model = timm.create_model(name, pretrained=bool(args.pretrained or given or source), **kwargs)
    channels = get_model_input_config(model)['input_size'][0]
    if channels != (args.in_chans or 3):
        raise ValueError(f'--model {args.model} takes images of {channels} channels: give --in-chans {channels}.')
    return model
