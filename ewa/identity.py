"""What a timm model says of itself (`pretrained_cfg`, `_model_args`), and what is written there when it becomes a MoE
or dense, so that timm itself can save it and build it again.
"""
import warnings
from types import MethodType
from typing import Any, Dict, Iterable, Mapping

import torch
from timm.models import create_model, is_model, split_model_name_tag
from torch import nn

from .ffn import block_of, find_ffns, layout_of
from .moe import MoELayer, layer_pieces, moe_layers, pulled

# entries of a `pretrained_cfg` that speak of somebody's weights rather than of the model's input
WEIGHT_CFG = (
    'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load', 'license',
    'description', 'origin_url', 'paper_name', 'paper_ids', 'notes',
)


def architecture(model: nn.Module) -> str:
    """The name that timm knows a model's architecture by; empty if it does not say."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or ''


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers saves a model with, in the place of its own method while the model has MoE layers.

    Named as that method, so that a pickled model finds it.
    """
    warnings.warn(
        f'{type(model).__name__} has MoE layers, but its folder carries the name of the dense architecture: '
        f'from_pretrained would leave its FFNs random. Read model.safetensors with load_state_dict after ewa.to_moe, '
        f'and ship ewa.export(ewa.to_dense(model), DIRECTORY).', stacklevel=2)
    # the names of parameters as they are, not those of older releases: as load_state_dict and Trainer read them
    return type(model).save_pretrained(model, *args, **{'save_original_format': False, **kwargs})


def describe_moe(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Make a timm model say that it was converted by `to_moe(model, **arguments)`: `vit_ewa` with its host.

    A model of transformers has no way to say it, so it warns when it is saved.
    """
    for part in model.modules():
        if hasattr(type(part), 'save_pretrained') and next(moe_layers(part), None) is not None:
            part.save_pretrained = MethodType(save_pretrained, part)
    host = architecture(model)
    if not host:
        return
    model._model_args = dict(getattr(model, '_model_args', {}), host=host, **arguments)
    model.pretrained_cfg = model.default_cfg = dict(
        {k: v for k, v in model.pretrained_cfg.items() if k not in WEIGHT_CFG}, architecture='vit_ewa')


def describe_dense(model: nn.Module, arguments: Iterable[str]) -> None:
    """Undo `describe_moe`, whose arguments have these names, for a model and those inside it."""
    names = set(arguments)
    for part in model.modules():
        part.__dict__.pop('save_pretrained', None)
        args = part.__dict__.get('_model_args') or {}
        if 'host' in args:
            part._model_args = {k: v for k, v in args.items() if k not in names and k != 'host'}
            part.pretrained_cfg = part.default_cfg = dict(
                part.pretrained_cfg, architecture=split_model_name_tag(args['host'])[0])


def describe_width(dense: nn.Module, layers: Dict[str, MoELayer]) -> None:
    """Where the hidden width of a timm model is not the vanilla one, make the model say so by `mlp_ratio`.

    Args:
        dense: A converted model.
        layers: The MoE layers that its FFNs were made of, by name.

    Raises:
        ValueError: The architecture has no name for these widths.
    """
    name_of_timm = architecture(dense)
    changed = [
        name for name, layer in layers.items() if (made := layout_of(dense.get_submodule(name))) is not None and any(
            made.hidden != layer_pieces(layer) * layout.hidden
            for layout in map(layout_of, pulled(layer)) if layout is not None)]
    if not changed or not name_of_timm or not is_model(name_of_timm):
        return
    layouts = {
        name: layout for name, ffn in find_ffns(dense).items()
        if (block_of(name) or name in changed) and (layout := layout_of(ffn)) is not None}
    ratios = {name: layout.hidden / layout.width for name, layout in layouts.items()}
    ratio = ratios[changed[0]]
    other = next((name for name in ratios if ratios[name] != ratio), None)
    if other is not None:
        raise ValueError(
            f'{changed[0]} would get another hidden width than {other}, and no timm architecture has FFNs of two '
            'widths. Convert a model with layers="all", or leave k out to keep the vanilla width (if the shared '
            'experts alone do not fill it).')
    shapes = {key: value.shape for key, value in dense.state_dict().items()}
    for factor in (1, 2):  # where a GLU packs its two input matrices, some hosts count both in mlp_ratio
        args = dict(getattr(dense, '_model_args', {}), mlp_ratio=factor * ratio)
        try:
            with torch.device('meta'):
                vanilla = create_model(name_of_timm, **{**args, 'num_classes': dense.num_classes})
        except (TypeError, ValueError, AssertionError):
            continue
        if {key: value.shape for key, value in vanilla.state_dict().items()} == shapes:
            dense._model_args = args
            return
    raise ValueError(
        f'{changed[0]} would have {layouts[changed[0]].hidden} hidden units, and {name_of_timm} '
        f'has no mlp_ratio for that. Leave k out to keep the vanilla width.')


def plain_forward(model: nn.Module) -> None:
    """Take the `forward` for mixed precision off a copy of a model that `accelerator.prepare` put on the original."""
    original = model.__dict__.pop('_original_forward', None)
    if original is not None:
        model.forward = MethodType(original.__func__, model) if hasattr(original, '__func__') else original
    if getattr(model.__dict__.get('forward'), '__func__', None) is type(model).forward:
        del model.forward
