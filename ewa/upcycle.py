"""From a dense host to a MoE model: which FFNs become MoE layers, and the first weights of their experts.

Axis legend: `E` experts, `H` hidden width, `D` width.
"""
import math
import re
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from types import MethodType
from typing import Any, Dict, List, Sequence, Union

import torch
from timm.models import register_notrace_module, split_model_name_tag
from torch import nn

from .ffn import build_ffn, find_ffns, read_ffn
from .gathering import FFNWeights, take
from .moe import RandomPartitionMoE, TopKMoE, moe_layers

# arguments of `to_moe` that an architecture is described by (the rest only sets first weights)
MOE_ARGS = ('num_experts', 'layers', 'router', 'top_k', 'num_shared', 'expert_ratio', 'renormalise')
# entries of a `pretrained_cfg` that speak of somebody's weights rather than of the model's input
WEIGHT_CFG = (
    'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load', 'license',
    'description', 'origin_url', 'paper_name', 'paper_ids', 'notes',
)

for _layer in (RandomPartitionMoE, TopKMoE):
    register_notrace_module(_layer)  # leaves of FX graphs: their forward depends on data and on train() / eval()


def block_of(name: str) -> str:
    """The transformer block an FFN belongs to: `layers.0.blocks.1.mlp` -> `layers.0.blocks.1`, `blocks.0.2.mlp`
    (Twins, which nests lists) -> `blocks.0.2`."""
    match = re.match(r'(.*\bblocks(?:\.\d+)+)(\.|$)', name)
    return match.group(1) if match else ''


def select_ffns(model: nn.Module, layers: Union[str, Sequence[int]]) -> List[str]:
    """Names of the FFNs that `layers` chooses.

    Args:
        model: A model with dense FFNs.
        layers: `'every:K'` (blocks K-1, 2K-1, ... counted from 0), `'last:K'`, `'all'`, a list of block indices, or a
            regular expression that is searched for in the names of FFNs.

    Raises:
        ValueError: No FFN at all, an index out of range, a pattern that matches nothing, an unknown form.
    """
    names = list(find_ffns(model))
    if not names:
        raise ValueError(
            f'{type(model).__name__} has no FFN to convert (linear layers fc1 and fc2 and no other parameters).')
    blocks = list(dict.fromkeys(block_of(name) for name in names if block_of(name)))
    if isinstance(layers, str) and not re.fullmatch(r'all|(every|last):.*', layers):
        try:
            chosen = [name for name in names if layers and re.search(layers, name)]
        except re.error as e:
            raise ValueError(
                f'layers={layers!r} is neither every:K, last:K, all nor a regular expression ({e}).') from e
        if not chosen:
            raise ValueError(f'layers={layers!r} matches no FFN. There are: {", ".join(names)}.')
        return chosen

    if not blocks:
        raise ValueError(
            f'{type(model).__name__} has FFNs but no numbered blocks, so layers={layers!r} can\'t count them; give a '
            f'regular expression. There are: {", ".join(names)}.')
    if isinstance(layers, str):
        kind, _, count = layers.partition(':')
        if kind != 'all' and not (count.isdigit() and 1 <= int(count) <= len(blocks)):
            raise ValueError(f'layers={layers!r}: K must be between 1 and the number of blocks {len(blocks)}.')
        if kind == 'every':
            indices = range(int(count) - 1, len(blocks), int(count))
        else:
            indices = range(len(blocks) - int(count) if kind == 'last' else 0, len(blocks))
    else:
        if not isinstance(layers, Sequence):
            raise ValueError(f'layers={layers!r} is neither every:K, last:K, all, a list of indices nor a pattern.')
        indices = list(layers)
        bad = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(blocks)]
        if bad or not indices:
            raise ValueError(
                f'layers={indices}: {bad[0] if bad else "an empty list"} is not a block index between 0 and '
                f'{len(blocks) - 1}.')
    chosen = {blocks[i] for i in indices}
    return [name for name in names if block_of(name) in chosen]


def is_untrained(model: nn.Module) -> bool:
    """Whether the weights look freshly initialised: every norm scale of the model is still one constant.

    Training or loading weights moves them apart. A model without norm scales counts as trained, so that nothing of
    value is thrown away.
    """
    scales = [p for name, p in model.named_parameters() if p.ndim == 1 and re.search(r'norm\w*\.weight$', name)]
    return bool(scales) and all(bool((p == p.flatten()[0]).all()) for p in scales)


def _shuffled(weights: FFNWeights) -> FFNWeights:
    # entries of a fresh matrix are independent and identically distributed, so a random permutation of them is
    # another draw from the host's own initialisation, whatever that is
    def shuffle(groups):
        if groups is None:
            return None
        flat = groups.reshape(len(groups), -1)
        return torch.stack([row[torch.randperm(row.numel(), device=row.device)] for row in flat]).view_as(groups)

    return replace(
        weights,
        up=shuffle(weights.up),
        down=shuffle(weights.down[None])[0],
        up_bias=shuffle(weights.up_bias),
        down_bias=None if weights.down_bias is None else shuffle(weights.down_bias[None])[0],
        norm=shuffle(weights.norm),
    )


def _first_experts(ffn: nn.Module, count: int, pieces: int, init: str) -> List[nn.Module]:
    """`count` FFNs of hidden width `H / pieces` made from a dense one, which is reused as the first if it fits."""
    experts = []
    dense = read_ffn(ffn)
    for i in range(count):
        weights = dense
        if pieces > 1:
            hidden = dense.hidden // pieces
            start = i % pieces * hidden
            weights = take(dense, torch.arange(start, start + hidden, device=dense.down.device))
            if weights.down_bias is not None:
                # so that the `pieces` slices of the dense FFN add up to it
                weights = replace(weights, down_bias=weights.down_bias / pieces)
        if init == 'independent' and i > 0:
            weights = _shuffled(weights)
        if i == 0 and pieces == 1:
            experts.append(ffn)
        else:
            experts.append(deepcopy(ffn) if weights is dense else build_ffn(ffn, weights))
    return experts


def _pieces(expert_ratio: float) -> int:
    pieces = round(1 / expert_ratio) if 0 < expert_ratio <= 1 else 0
    if not pieces or not math.isclose(pieces * expert_ratio, 1, rel_tol=1e-3):
        raise ValueError(f'expert_ratio must be 1/m for a whole number m >= 1, got {expert_ratio}.')
    return pieces


def to_moe(
        model: nn.Module,
        num_experts: int = 4,
        layers: Union[str, Sequence[int]] = 'every:2',
        router: str = 'random',
        init: str = 'auto',
        top_k: int = 2,
        num_shared: int = 0,
        expert_ratio: float = 1.0,
        renormalise: bool = True,
) -> nn.Module:
    """Replace FFNs of a model by MoE layers, in place. Call it before the optimizer is made.

    State-dict keys are the dense ones with `experts.<i>.` inserted after the FFN's name:
    `blocks.1.mlp.fc1.weight` -> `blocks.1.mlp.experts.0.fc1.weight`.

    Args:
        model: Any model with FFNs made of `fc1` and `fc2`: timm's ViT, DeiT, DeiT-3, EVA, BEiT, Swin, ...
        num_experts: `E >= 2`.
        layers: Which FFNs: `'every:K'` (blocks K-1, 2K-1, ... counted from 0), `'last:K'`, `'all'`, a list of block
            indices, or a regular expression over FFN names.
        router: `'random'` (random uniform partition, for EWA: arXiv 2308.06093) or `'topk'` (gated).
        init: `'copy'`: experts start as the dense FFN. `'independent'`: each expert beyond the first is a further draw
            from the host's initialisation. `'auto'`: independent if the model looks untrained, else copy.
        top_k: Gated only: experts a token, 1 to `E`.
        num_shared: Gated only: further experts that every token passes through.
        expert_ratio: Gated only: `1/m` makes all experts of hidden width `H/m`. They start as consecutive slices of
            the dense FFN's hidden units, cyclically, the routed ones first; each slice carries `1/m` of the output
            bias, so that `m` slices add up to the dense FFN.
        renormalise: Gated only: gates of a token sum to 1.

    Returns:
        The same model.

    Raises:
        ValueError: Any argument out of its range, a model without FFNs or with MoE layers; the model is untouched.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 2:
        raise ValueError(f'num_experts must be a whole number of at least 2, got {num_experts!r}.')
    if router not in ('random', 'topk'):
        raise ValueError(f"router must be 'random' or 'topk', got {router!r}.")
    if init not in ('auto', 'copy', 'independent'):
        raise ValueError(f"init must be 'auto', 'copy' or 'independent', got {init!r}.")
    if num_shared < 0:
        raise ValueError(f'num_shared must be at least 0, got {num_shared}.')
    pieces = _pieces(expert_ratio)
    if router == 'random' and (num_shared or pieces > 1):
        raise ValueError(
            f"router='random' has neither shared nor fine-grained experts (num_shared={num_shared}, "
            f"expert_ratio={expert_ratio}): the mean of its experts must be the dense FFN. Use router='topk'.")
    if router == 'topk' and not 1 <= top_k <= num_experts:
        raise ValueError(f'top_k must be between 1 and num_experts={num_experts}, got {top_k}.')
    converted = [name for name, _ in moe_layers(model)]
    if converted:
        raise ValueError(f'The model already has MoE layers: {", ".join(converted)}. Convert a dense model.')
    names = select_ffns(model, layers)
    for name in names:
        ffn = model.get_submodule(name)
        hidden = ffn.fc2.in_features
        if hidden % pieces:
            raise ValueError(f'expert_ratio=1/{pieces} does not divide the hidden width {hidden} of {name}.')
        if pieces > 1 and read_ffn(ffn).norm is not None:
            raise ValueError(f'{name} has a norm over its hidden units and can\'t be cut: use expert_ratio=1.')
    holders = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name in names:
        if holders[id(model.get_submodule(name))] > 1:
            raise ValueError(f'{name} is used in several places of the model, so it can\'t become a MoE: leave it out.')
    _warn(model, names, router, top_k, num_shared, pieces, renormalise)
    if init == 'auto':
        init = 'independent' if is_untrained(model) else 'copy'

    for name in names:
        ffn = model.get_submodule(name)
        if router == 'random':
            layer = RandomPartitionMoE(_first_experts(ffn, num_experts, 1, init))
        else:
            experts = _first_experts(ffn, num_experts + num_shared, pieces, init)
            layer = TopKMoE(
                experts[:num_experts], ffn.fc2.out_features, top_k, renormalise, shared=experts[num_experts:])
            layer.expert_ratio = expert_ratio
        model.set_submodule(name, layer)

    args: Dict[str, Any] = dict(num_experts=num_experts, layers=layers if isinstance(layers, str) else list(layers))
    args['router'] = router
    if router == 'topk':
        args.update(top_k=top_k, num_shared=num_shared, expert_ratio=expert_ratio, renormalise=renormalise)
    _describe(model, args)
    return model


def _warn(
        model: nn.Module,
        names: List[str],
        router: str,
        top_k: int,
        num_shared: int,
        pieces: int,
        renormalise: bool,
) -> None:
    if router == 'topk' and top_k == 1 and renormalise:
        warnings.warn(
            'top_k=1 with renormalise=True makes every gate 1, so the task does not train the router: use '
            'renormalise=False (train.py: --model-kwargs renormalise=False).', stacklevel=3)
    normed = next((name for name in names if read_ffn(model.get_submodule(name)).norm is not None), None)
    if num_shared and normed:
        warnings.warn(
            f'{normed} has a norm over its hidden units, so shared and routed experts can\'t become one FFN: this MoE '
            f'can\'t be converted to a dense model. Use num_shared=0.', stacklevel=3)
    elif num_shared >= pieces and getattr(model, 'pretrained_cfg', None) and any(
            block_of(name) and name not in names for name in find_ffns(model)):
        warnings.warn(
            f'{num_shared} shared expert(s) of 1/{pieces} of the hidden width leave no room for routed ones in a dense '
            f'FFN of the width that the other blocks have: this MoE can\'t be converted to a dense model. Use '
            f'expert_ratio=1/m with m > num_shared, or layers="all".', stacklevel=3)


def _describe(model: nn.Module, args: Dict[str, Any]) -> None:
    """Make a timm model say what it is now, so that timm itself can save it and build it again."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not cfg or not cfg.get('architecture'):
        return
    model._model_args = dict(getattr(model, '_model_args', {}), host=cfg['architecture'], **args)
    model.pretrained_cfg = model.default_cfg = dict(
        {k: v for k, v in cfg.items() if k not in WEIGHT_CFG}, architecture='vit_ewa')


def describe_dense(model: nn.Module) -> None:
    """Undo what `to_moe` wrote into the description of a timm model."""
    args = dict(getattr(model, '_model_args', {}))
    host = args.pop('host', None)
    if host is None:
        return
    model._model_args = {k: v for k, v in args.items() if k not in MOE_ARGS and k != 'init'}
    model.pretrained_cfg = model.default_cfg = dict(
        model.pretrained_cfg, architecture=split_model_name_tag(host)[0])


def plain_forward(model: nn.Module) -> None:
    """Take the `forward` for mixed precision off a copy of a model that `accelerator.prepare` put on the original."""
    original = model.__dict__.pop('_original_forward', None)
    if original is not None:
        model.forward = MethodType(original.__func__, model) if hasattr(original, '__func__') else original
    if getattr(model.__dict__.get('forward'), '__func__', None) is type(model).forward:
        del model.forward
