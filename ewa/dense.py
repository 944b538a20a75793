"""From a MoE model to a dense one: walk the model, gather the experts of each MoE layer into one FFN.

Axis legend: `E` routed experts, `S` shared experts, `k` routed experts (or groups of them) that are kept, `H` hidden
width of the dense FFN, `h` of an expert.
"""
from copy import deepcopy
from typing import Any, Dict, Iterable, List, Optional, Sequence

import numpy as np
import torch
from timm.models import create_model, is_model
from timm.utils import unwrap_model
from torch import nn

from . import gathering
from .ffn import build_ffn, find_ffns, is_ffn, read_ffn
from .gathering import FFNWeights
from .moe import fuse_experts, moe_layers
from .upcycle import _pieces, block_of, describe_dense, plain_forward
from .usage import LayerUsage, is_gated, measure_usage, renormalises

# method -> the options it takes beside k
METHODS: Dict[str, Sequence[str]] = {
    'average': (),
    'sum': ('rescale',),
    'top_kg': ('rescale',),
    'svd_kg': ('rescale',),
    'usage': (),
    'aligned': ('reference',),
    'prune': ('score',),
    'do_acp': ('lam',),
}
NEEDS_DATA = ('usage', 'prune', 'do_acp')


def to_dense(
        model: nn.Module,
        method: str = 'average',
        batches: Optional[Iterable] = None,
        k: Optional[int] = None,
        **options,
) -> nn.Module:
    """A new dense model in which each MoE layer is one FFN; the input stays as it was.

    A layer of `E` experts as wide as the dense FFN becomes one FFN by the method. A layer with shared or fine-grained
    experts becomes its shared experts, whole and unscaled, beside `k` routed ones that are scaled by the gates' mass:
    selected by `'prune'` and `'do_acp'`, else each merged by the method from a group of similar experts.

    For random-partition models use `'average'`: the result then computes, bit for bit, what the model computes in
    `eval()`. A gated model routes in `eval()`, so its outputs change; `ewa.diagnose` says by how much.

    Args:
        model: A MoE model: of `ewa.to_moe`, or any whose MoE layers have `experts` (and `router`, `shared`).
        method: `'average'`, `'sum'`, `'top_kg'`, `'svd_kg'` (OneS, arXiv 2201.10890), `'usage'` (average weighted by
            tokens), `'aligned'` (hidden units permuted to match, then average), `'prune'` (the best expert), `'do_acp'`
            (arXiv 2605.28207). See `ewa.gathering`.
        batches: Calibration images for usage, prune and do_acp: batches of images, or tuples that start with one.
        k: Routed experts kept. Default: as many as make the vanilla hidden width, `H/h - S`. Another width is
            possible where all blocks have MoE layers, and becomes the host's `mlp_ratio`.
        **options: sum, top_kg, svd_kg: `rescale` (see `ewa.gathering`). aligned: `reference`, index of an expert.
            prune: `score`, `'usage'` (tokens) or `'norm'` (mean of gate times output norm). do_acp: `lam`.

    Returns:
        A model on the device of the input; `conversion` on it records what was done.

    Raises:
        ValueError: Unknown method or option, no MoE layer, missing calibration images, experts with NaN or unequal
            widths, a width that the architecture has no name for. The message names the layer.
    """
    model = unwrap_model(model)
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method!r}.')
    unknown = [name for name in options if name not in METHODS[method]]
    if unknown:
        raise ValueError(f'{method} has no option {unknown[0]!r}; it has: {", ".join((*METHODS[method], "k"))}.')
    layers = dict(moe_layers(model))
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MoE layer: it is dense already.')
    gated = {name: layer for name, layer in layers.items() if is_gated(layer)}
    if len(gated) < len(layers) and method not in ('average', 'aligned', 'sum', 'top_kg', 'svd_kg'):
        raise ValueError(
            f'{method} chooses experts by how they are used, and a random partition uses all alike: use average.')
    for name, layer in layers.items():
        _check_finite(name, layer)
    needs_data = method in NEEDS_DATA or any(
        not renormalises(layer) and (k or getattr(layer, 'shared', None) or _cut(layer) > 1)
        for layer in gated.values())
    if needs_data and batches is None:
        raise ValueError(f'{method} needs calibration images for this model: give batches (convert.py: --data-dir).')
    usage = measure_usage(model, batches) if needs_data else {}

    ffns = {}
    for name, layer in layers.items():
        try:
            ffns[name] = _gather(layer, method, usage.get(name), k, options)
        except ValueError as e:
            raise ValueError(f'{name}: {e}') from e
    # with the FFNs in the memo, deepcopy takes them where it would copy a layer
    dense = deepcopy(model, {id(layer): ffns[name] for name, layer in layers.items()})
    plain_forward(dense)
    describe_dense(dense)
    _describe_width(dense, layers)
    first = next(iter(layers.values()))
    dense.conversion = dict(
        method=method, **options, num_experts=len(first.experts), layers=list(layers),
        router='topk' if gated else 'random')
    if k is not None:
        dense.conversion['k'] = k
    if usage:
        dense.conversion['calibration_tokens'] = max(entry.tokens for entry in usage.values())
    return dense


def _gather(
        layer: nn.Module,
        method: str,
        usage: Optional[LayerUsage],
        k: Optional[int],
        options: Dict[str, Any],
) -> nn.Module:
    shared = list(getattr(layer, 'shared', None) or [])
    pieces = _cut(layer)
    single = pieces == 1 and not shared and k is None
    if single and method == 'average':
        return fuse_experts(layer.experts)
    if not all(is_ffn(expert) for expert in [*layer.experts, *shared]):
        raise ValueError(f'{method} can\'t read experts of type {type(layer.experts[0]).__name__}; use average.')
    experts = [read_ffn(expert) for expert in layer.experts]
    template = layer.experts[0]
    if single and method == 'prune':
        return build_ffn(template, gathering.prune(experts, _scores(usage, options)))
    if single and method != 'do_acp':
        return build_ffn(template, _merge(experts, method, usage and usage.counts, options))

    if k is None:
        k = pieces - len(shared)
    if not 1 <= k <= len(experts):
        raise ValueError(
            f'{k} routed experts can\'t be kept of {len(experts)}, beside {len(shared)} shared ones at 1/{pieces} of '
            f'the hidden width: give k between 1 and {len(experts)} (where all blocks have MoE layers).')
    mass = 1. if renormalises(layer) else usage.mass
    if method == 'prune':
        groups = [[i] for i in gathering.select(_scores(usage, options), k)]
    elif method == 'do_acp':
        acp = gathering.average_contribution(usage.probability, usage.second_moment)
        groups = [[i] for i in gathering.do_acp_select(acp, usage.second_moment, k, **options)]
    else:
        groups = group_similar(experts, k)
    if method in ('prune', 'do_acp'):
        scales = [mass / k] * k
        parts = [experts[i] for i, in groups]
    else:
        counts = usage.counts if method == 'usage' else torch.ones(len(experts))
        share = counts / counts.sum()
        scales = [mass * float(share[group].sum()) for group in groups]
        parts = [
            _merge([experts[i] for i in group], method, usage and usage.counts[group], options) for group in groups]
    return build_ffn(template, gathering.combine(parts, scales, [read_ffn(expert) for expert in shared]))


def _merge(experts: List[FFNWeights], method: str, counts, options: Dict[str, Any]) -> FFNWeights:
    if method == 'usage':
        # a group that no calibration token was sent to has no usage to weigh by, and no share in the output
        return gathering.usage(experts, counts) if counts.sum() > 0 else gathering.average(experts)
    functions = dict(
        average=gathering.average, sum=gathering.total, top_kg=gathering.top_kg, svd_kg=gathering.svd_kg,
        aligned=gathering.aligned)
    return functions[method](experts, **options)


def _scores(usage: LayerUsage, options: Dict[str, Any]):
    score = options.get('score', 'usage')
    if score not in ('usage', 'norm'):
        raise ValueError(f"score must be 'usage' or 'norm', got {score!r}.")
    return usage.counts if score == 'usage' else usage.contribution


def group_similar(experts: Sequence[FFNWeights], k: int) -> List[List[int]]:
    """Split experts into `k` groups of similar weights: average-linkage clustering by the cosine of their weights.

    Args:
        experts: `E` experts of equal shapes.
        k: Number of groups, 1 to `E`.

    Returns:
        `k` lists of indices, each ascending, ordered by their first.

    Raises:
        ValueError: Experts of unequal hidden widths.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    hidden = [expert.hidden for expert in experts]
    if len(set(hidden)) > 1:
        raise ValueError(
            f'Experts must have equal hidden widths here, got {hidden}; prune and do_acp take unequal ones.')
    if len(experts) == 1:
        return [[0]]
    vectors = torch.stack([expert.units().flatten() for expert in experts]).float().cpu().numpy()
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    label = cut_tree(linkage(vectors, 'average'), n_clusters=k)[:, 0]
    groups = [np.flatnonzero(label == i).tolist() for i in range(k)]
    return sorted(groups, key=lambda group: group[0])


def _cut(layer: nn.Module) -> int:
    """How many experts of a layer are as wide as the dense FFN."""
    return _pieces(getattr(layer, 'expert_ratio', 1.0))


def _check_finite(name: str, layer: nn.Module) -> None:
    for key, parameter in layer.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f'{name}: {key} is not finite; take a checkpoint from before it diverged.')


def _describe_width(dense: nn.Module, layers: Dict[str, nn.Module]) -> None:
    """Where the hidden width of a timm model is not the vanilla one, make the model say so by `mlp_ratio`."""
    architecture = (getattr(dense, 'pretrained_cfg', None) or {}).get('architecture')
    changed = [
        name for name, layer in layers.items() if is_ffn(layer.experts[0]) and any(
            dense.get_submodule(name).fc2.in_features != _cut(layer) * expert.fc2.in_features
            for expert in layer.experts)]
    if not changed or not architecture or not is_model(architecture):
        return
    ratios = {
        name: ffn.fc2.in_features / ffn.fc2.out_features for name, ffn in find_ffns(dense).items()
        if block_of(name) or name in changed}
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
                vanilla = create_model(architecture, **args)
        except (TypeError, ValueError, AssertionError):
            continue
        if {key: value.shape for key, value in vanilla.state_dict().items()} == shapes:
            dense._model_args = args
            return
    raise ValueError(
        f'{changed[0]} would have {dense.get_submodule(changed[0]).fc2.in_features} hidden units, and {architecture} '
        f'has no mlp_ratio for that. Leave k out to keep the vanilla width.')
