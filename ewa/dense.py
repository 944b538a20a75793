"""From a MoE model to a dense one: walk the model, gather the experts of each MoE layer into one FFN.

Axis legend: `E` routed experts, `S` shared experts, `k` routed experts (or groups of them) that are kept, `H` hidden
width of the dense FFN, `h` of an expert.
"""
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from types import FunctionType
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, cast

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from . import gathering, refit
from .averaging import never_used
from .calibration import (
    Part,
    Stream,
    Tap,
    call_order,
    hold_out,
    measure_statistics,
    read_tokens,
    residual_stream,
    sensitivities,
)
from .ffn import build_ffn, hidden_activations, is_ffn, read_ffn
from .foreign import foreign
from .gathering import METHODS, ExpertStatistics, FFNWeights, Method
from .identity import describe_dense, describe_width, plain_forward
from .moe import (
    MoELayer,
    check_plain,
    evaluating,
    fuse_experts,
    inherit_requires_grad,
    is_gated,
    is_moe,
    is_random,
    kind,
    layer_pieces,
    moe_layers,
    on_tokens,
    pulled,
    renormalises,
    route,
    shared_experts,
    takes_images,
)
from .upcycle import ARGUMENTS


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
        method: `'refit'` (hidden units chosen and fc2 solved so that each FFN computes what its layer does; the one
            for gated models where there are images), `'average'`, `'sum'`, `'top_kg'`, `'svd_kg'` (OneS, arXiv
            2201.10890), `'usage'` (average weighted by tokens), `'aligned'` (hidden units permuted to match, then
            average), `'prune'` (the best expert), `'do_acp'` (arXiv 2605.28207). See `ewa.gathering`.
        batches: Calibration images for refit, usage, prune and do_acp: batches of images, or tuples that start with
            one. Refit keeps them; some hundreds are enough.
        k: Routed experts kept. Default: as many as make the vanilla hidden width, `H/h - S`. Another width is
            possible where all blocks have MoE layers, and becomes the host's `mlp_ratio`.
        **options: refit: `steps`, optimizer steps for each FFN against what its layer computes, `joint_steps` for the
            whole dense model against what the MoE model computes, and `ridge`. sum, top_kg, svd_kg: `rescale` (see
            `ewa.gathering`). aligned: `reference`, index of an expert. prune: `score`, `'usage'` (tokens) or `'norm'`
            (mean of gate times output norm). do_acp: `lam`.

    Returns:
        A model on the device of the input; `conversion` on it records what was done.

    Raises:
        ValueError: Unknown method or option, no MoE layer, missing calibration images, experts with NaN or unequal
            widths, a width that the architecture has no name for, a model that can't be copied. The message names the
            layer.
    """
    model = unwrap_model(model)
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method!r}.')
    how = METHODS[method]
    known = [option.name for option in how.options]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f'{method} has no option {unknown[0]!r}; it has: {", ".join((*known, "k"))}.')
    layers = dict(moe_layers(model))
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MoE layer: it is dense already.')
    for name, layer in layers.items():
        if kind(layer) == 'unknown':
            raise ValueError(
                f'{name} is a {type(layer).__name__} with experts but no router, so what it computes is not known: '
                f'give it an attribute router or a method route(tokens), see ewa.moe.MoELayer.')
    gated = {name: layer for name, layer in layers.items() if is_gated(layer)}
    if len(gated) < len(layers) and how.needs_data:
        raise ValueError(
            f'{method} looks at how a router uses the experts, and a random partition uses all alike: use average.')
    for name, layer in layers.items():
        try:
            check_plain([*layer.experts, *shared_experts(layer)])
        except ValueError as e:
            raise ValueError(f'{name}: {e}') from e
        _check_finite(name, layer)
    needs_data = how.needs_data or any(
        not renormalises(layer) and (k or shared_experts(layer) or layer_pieces(layer) > 1)
        for layer in gated.values())
    if needs_data and batches is None:
        raise ValueError(f'{method} needs calibration images for this model: give batches (convert.py: --data-dir or '
                         f'--calibration-dir).')
    if isinstance(batches, Tensor):
        raise ValueError(
            f'batches must be a list of batches, got one tensor of shape {tuple(batches.shape)}: give [it].')
    ffns: Dict[str, nn.Module] = {}
    statistics: Dict[str, ExpertStatistics] = {}
    fitted: Dict[str, Any] = {}
    others: Dict[str, Tensor] = {}
    if how.kind == 'fit' and batches is not None:
        ffns, others, fitted = refit_layers(model, layers, batches, k, **options)
    else:
        if needs_data and batches is not None:
            statistics = measure_statistics(model, batches)
        for name, layer in layers.items():
            try:
                ffns[name] = gather_layer(layer, how, statistics.get(name), k, options)
            except ValueError as e:
                raise ValueError(f'{name}: {e}') from e
    idle = [name for name, layer in layers.items() if is_random(layer) and never_used(layer) and not all(
        torch.equal(a, b) for a, b in zip(*(expert.parameters() for expert in pulled(layer)[:2])))]
    if idle:
        warnings.warn(
            f'An ExpertAverager was made for {idle[0]} and pulled nothing: experts that drift apart may have a mean '
            f'much worse than they are. Call its attach(optimizer) before training, or step() after each step.',
            stacklevel=2)
    for name, layer in layers.items():
        inherit_requires_grad(ffns[name], layer.experts)
    # with the FFNs in the memo, deepcopy takes them where it would copy a layer
    with foreign(f'{type(model).__name__} can\'t be copied', RuntimeError, TypeError):
        dense = deepcopy(model, {id(layer): ffns[name] for name, layer in layers.items()})
    for name, values in others.items():
        dense.get_parameter(name).data.copy_(values)
    for name, part in reversed(list(dense.named_modules())):
        if hasattr(part, '_orig_mod'):  # a block that was compiled by itself
            dense.set_submodule(name, part.get_submodule('_orig_mod'))
    layers = {name.replace('._orig_mod', ''): layer for name, layer in layers.items()}
    plain_forward(dense)
    for name, part in dense.named_modules():
        if isinstance(vars(part).get('forward'), FunctionType):
            raise ValueError(
                f'The forward of {name or type(dense).__name__} was replaced by a function, which belongs to the model '
                f'it was made for and not to a copy: make it a method (types.MethodType) or take it off (del).')
        if is_moe(part):
            raise ValueError(f'{type(model).__name__} has a __deepcopy__ of its own that keeps MoE layers.')
    hooked = [
        name for name, layer in layers.items() if vars(layer)['_forward_hooks'] or vars(layer)['_forward_pre_hooks']]
    if hooked:
        warnings.warn(f'Hooks of {", ".join(hooked)} stay with the MoE model.', stacklevel=2)
    describe_dense(dense, ARGUMENTS)
    describe_width(dense, layers)
    first = next(iter(layers.values()))
    dense.conversion = dict(
        method=method, **options, num_experts=len(pulled(first)), layers=list(layers),
        router='topk' if gated else 'random')
    if k is not None:
        dense.conversion['k'] = k
    if statistics:
        dense.conversion['calibration_tokens'] = max(entry.tokens for entry in statistics.values())
    dense.conversion.update(fitted)
    return dense


def gather_layer(
        layer: MoELayer,
        method: Method,
        statistics: Optional[ExpertStatistics] = None,
        k: Optional[int] = None,
        options: Optional[Dict[str, Any]] = None,
) -> nn.Module:
    """The FFN that a method makes of a MoE layer, a new module; the arguments are those of `to_dense`.

    Raises:
        ValueError: Experts that the method can't read or gather, `k` out of its range.
    """
    options = options or {}
    shared = shared_experts(layer)
    cut = layer_pieces(layer)
    single = cut == 1 and not shared and k is None
    if single and method.name == 'average':
        return cast(Any, layer).fuse() if is_random(layer) else fuse_experts(layer.experts)
    routed = layer.experts
    template = routed[0]
    if not all(is_ffn(expert) for expert in [*routed, *shared]):
        raise ValueError(f'{method.name} can\'t read experts of type {type(template).__name__}; use average.')
    experts = [read_ffn(expert) for expert in routed]

    def merged(group: List[int]) -> FFNWeights:
        members = [experts[i] for i in group]
        if method.needs_data and statistics is not None:
            return method.function(members, statistics.counts[group], **options)
        return method.function(members, **options)

    if single and method.kind == 'merge':
        return build_ffn(template, merged(list(range(len(experts)))))
    if single and method.name == 'prune':
        return build_ffn(template, experts[method.function(statistics, 1, **options)[0]])

    if k is None:
        k = cut - len(shared)
    if not 1 <= k <= len(experts):
        raise ValueError(
            f'{k} routed experts can\'t be kept of {len(experts)}, beside {len(shared)} shared ones at 1/{cut} of '
            f'the hidden width: give k between 1 and {len(experts)} (where all blocks have MoE layers).')
    mass = 1. if renormalises(layer) or statistics is None else statistics.mass
    if method.kind == 'select':
        parts = [experts[i] for i in method.function(statistics, k, **options)]
        scales = [mass / k] * k
    else:
        groups = group_similar(experts, k)
        counts = statistics.counts if method.needs_data and statistics is not None else torch.ones(len(experts))
        share = counts / counts.sum()
        scales = [mass * float(share[group].sum()) for group in groups]
        parts = [merged(group) for group in groups]
    return build_ffn(template, gathering.combine(parts, scales, [read_ffn(expert) for expert in shared]))


@torch.no_grad()
def refit_layers(
        model: nn.Module,
        layers: Dict[str, MoELayer],
        batches: Iterable,
        k: Optional[int] = None,
        steps: int = 0,
        joint_steps: int = 0,
        ridge: float = 1e-4,
) -> Tuple[Dict[str, nn.Module], Dict[str, Tensor], Dict[str, Any]]:
    """One FFN for each gated layer by `ewa.refit`, in the order in which the model calls them.

    A layer is fed by the model in which those before it are converted already. Its FFN is fitted to what it computes
    there, and to what brings the residual stream half the way back to that of the MoE model (`ewa.refit.toward`), where
    that can be read (`ewa.calibration.residual_stream`). Tokens are weighted by how much the outputs of the MoE model
    move with them. Of the images, which are kept, seven eighths are fitted to and the others measured on; of the tokens
    of a layer about 32,768, or ten for each unknown of an output, drawn in proportion to their weights.

    Args:
        model, batches, k: See `to_dense`.
        layers: All MoE layers of the model.
        steps: Of `ewa.refit.fit`, for each FFN.
        joint_steps: Of `ewa.refit.fit_outputs`, after that, for the whole dense model: all its weights, but where some
            of those outside the MoE layers require gradients, only these and the FFNs.
        ridge: See `ewa.refit.Moments.normal`.

    Returns:
        FFN of each layer; the other parameters that joint steps have changed; and what is to be told:
        `calibration_images`, `calibration_tokens` (of a layer, fitted to), `error` (layer to `fitted` and `held_out`:
        `sqrt(E w|y' - y|^2 / E w|y|^2)` for its target `y`, the FFN's output `y'` before joint steps and the weight
        `w` of the token; no `held_out` of a single image), `steps_in_vain` (layers that are without steps, since these
        brought them no closer), `outputs_error` (of the model, `before` and `after` joint steps), `joint_steps_in_vain`
        (True where they brought it no closer and are left out), `seconds`.

    Raises:
        ValueError: See `to_dense`; the message names the layer.
    """
    started = time.perf_counter()
    for key, value in dict(steps=steps, joint_steps=joint_steps).items():
        if value < 0:
            raise ValueError(f'{key} must be >= 0, got {value}.')
    fitted, held = hold_out(batches)
    few = next(iter(fitted))[:2]
    ffns: Dict[str, nn.Module] = {}
    errors: Dict[str, Dict[str, float]] = {}
    vain: List[str] = []
    tokens = 0
    with evaluating(model):
        order = call_order(model, few[:1])
        parts = [part for part in (fitted, held) if part]
        known = [sensitivities(model, part) for part in parts]
        hidden: Dict[str, int] = {}
        drawn: Dict[str, List[Tuple[Tensor, Tensor]]] = {}
        for name in order:
            try:
                hidden[name] = _dense_hidden(layers[name], k)
                limit = max(32768, 10 * (hidden[name] + 1))
                drawn[name] = [refit.draw(refit.token_weights(torch.cat(of_layer[name])), limit) for of_layer in known]
            except ValueError as e:
                raise ValueError(f'{name}: {e}') from e
        places = {name: residual_stream(model, name, few) for name in order[1:]}  # as it was before the first
        streams = [_streams(model, places, part, {name: draws[n][0] for name, draws in drawn.items()})
                   for n, part in enumerate(parts)]
        for name in order:
            layer = layers[name]
            partly = deepcopy(model, {  # with the same tensors
                **{id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]},
                **{id(other): ffns.get(key, other) for key, other in layers.items()}})
            problem = partial(_problem, partly, layer, places.get(name))
            (index, weights), *others = drawn[name]
            try:
                inputs, targets = problem(fitted, index, streams[0].pop(name, None))
                ffn = _refit_layer(layer, inputs, targets, weights, hidden[name], ridge)
            except ValueError as e:
                raise ValueError(f'{name}: {e}') from e
            error = refit.relative_error(on_tokens(ffn)(inputs), targets, weights)
            if steps:
                wide = torch.promote_types(inputs.dtype, torch.float32)
                trained = deepcopy(ffn).to(wide).requires_grad_()
                refit.fit(on_tokens(trained), inputs.to(wide), targets.to(wide), weights, steps)
                trained = trained.to(inputs.dtype)
                after = refit.relative_error(on_tokens(trained)(inputs), targets, weights)
                if after < error:  # a few steps may be worse than none
                    ffn, error = trained, after
                else:
                    vain.append(name)
            errors[name] = dict(fitted=error)
            tokens = max(tokens, len(inputs))
            for index, weights in others:
                inputs, targets = problem(held, index, streams[1].pop(name, None))
                errors[name]['held_out'] = refit.relative_error(on_tokens(ffn)(inputs), targets, weights)
            ffns[name] = ffn
        changed: Dict[str, Tensor] = {}
        if joint_steps:
            ffns, changed, outputs = _fit_jointly(model, layers, ffns, fitted, held, joint_steps)
    for name, ffn in ffns.items():
        ffn.train(layers[name].experts[0].training)
    record = dict(
        **dict(outputs_error=outputs) if joint_steps else {}, **dict(steps_in_vain=vain) if vain else {},
        **dict(joint_steps_in_vain=True) if joint_steps and outputs['after'] >= outputs['before'] else {},
        calibration_images=len(fitted) + len(held), calibration_tokens=tokens, error=errors,
        seconds=round(time.perf_counter() - started, 1))
    return ffns, changed, record


def _streams(
        model: nn.Module,
        places: Dict[str, Optional[Stream]],
        batches: Iterable[Tensor],
        drawn: Dict[str, Tensor],
) -> Dict[str, Tensor]:
    """The residual stream of the MoE model behind its layers, where it can be read, (n, D) for the tokens of each."""
    taps = {name: Tap(model.get_submodule(place.module), place.images, drawn[name])
            for name, place in places.items() if place is not None}
    return dict(zip(taps, read_tokens(model, list(taps.values()), batches))) if taps else {}


def _problem(
        partly: nn.Module,
        layer: MoELayer,
        place: Optional[Stream],
        batches: Iterable[Tensor],
        index: Tensor,
        wanted: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """Inputs and targets (n, D) of the FFN of a layer in a model that is partly converted."""
    images = takes_images(layer.experts[0])
    taps = [Tap(layer, images, index, inputs=True), Tap(layer, images, index)]
    if place is None or wanted is None:
        inputs, outputs = read_tokens(partly, taps, batches)
        return inputs, outputs
    inputs, outputs, stream = read_tokens(
        partly, [*taps, Tap(partly.get_submodule(place.module), place.images, index)], batches)
    return inputs, refit.toward(outputs, stream, wanted, place.scale)


def _fit_jointly(
        model: nn.Module,
        layers: Dict[str, MoELayer],
        ffns: Dict[str, nn.Module],
        fitted: Part,
        held: Part,
        steps: int,
) -> Tuple[Dict[str, nn.Module], Dict[str, Tensor], Dict[str, float]]:
    """FFNs and the other parameters of the dense model, trained together for the outputs of the MoE model.

    And the error of these, `before` and `after`: `sqrt(E|y' - y|^2 / E|y|^2)` on images that are held out, if there are
    any. Where it does not fall, the FFNs given and no others.
    """
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    shape, *more = {images.shape[1:] for images in chain(fitted, held)}
    if more:
        raise ValueError('joint_steps mixes calibration images: give all of one size.')
    if len(shape) != 3:
        raise ValueError(
            f'joint_steps cuts and moves images (C, H, W), and those given have shape {tuple(shape)}: leave it out.')
    teacher = deepcopy(model).to(wide)
    named = dict(teacher.named_modules())
    trained = {name: deepcopy(ffn).to(wide) for name, ffn in ffns.items()}
    student = deepcopy(teacher, {id(named[name]): ffn for name, ffn in trained.items()})
    new = {p for ffn in trained.values() for p in ffn.parameters()}
    others = {name: p for name, p in student.named_parameters() if p not in new and p.is_floating_point()}
    free = {name: p for name, p in others.items() if p.requires_grad} or others
    chosen = new.union(free.values())
    parameters = [p for p in student.parameters() if p in chosen]
    student.requires_grad_(False)
    for p in parameters:
        p.requires_grad_()
    device = parameters[0].device

    def error() -> float:
        pairs = [(student(images.to(device)), teacher(images.to(device)))
                 for batch in held or fitted for images in batch.to(wide).split(16)]
        ours, theirs = (torch.cat(part).flatten(1) for part in zip(*pairs))
        return refit.relative_error(ours, theirs, theirs.new_ones(len(theirs)).double())

    before = error()
    refit.fit_outputs(student, parameters, teacher, torch.cat(list(fitted)).to(wide), steps)
    after = error()
    if after >= before:
        return ffns, {}, dict(before=before, after=after)
    return {name: ffn.to(next(ffns[name].parameters()).dtype) for name, ffn in trained.items()}, free, dict(
        before=before, after=after)


def _dense_hidden(layer: MoELayer, k: Optional[int]) -> int:
    """Hidden units of the FFN that takes the place of a layer: as many as `k` routed and all shared experts have."""
    shared = shared_experts(layer)
    for expert in [*layer.experts, *shared]:
        if not is_ffn(expert):
            raise ValueError(
                f'refit can\'t read experts of type {type(expert).__name__}: use average.')
    widths = [read_ffn(expert).hidden for expert in layer.experts]
    if k is None:
        k = layer_pieces(layer) - len(shared)
    if not 1 <= k <= len(widths):
        raise ValueError(
            f'{k} routed experts\' hidden units can\'t be kept of {len(widths)}, beside {len(shared)} shared experts '
            f'at 1/{layer_pieces(layer)} of the hidden width: give k between 1 and {len(widths)} (where all blocks '
            f'have MoE layers).')
    return sum(sorted(widths)[-k:]) + sum(read_ffn(expert).hidden for expert in shared)


def _refit_layer(
        layer: MoELayer,
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        hidden: int,
        ridge: float,
) -> nn.Module:
    shared = shared_experts(layer)
    experts = [*shared, *layer.experts]
    template = layer.experts[0]
    kinds = {', '.join([type(expert).__name__, *(
        repr(part) for part in expert.modules() if not [*part.children(), *part.parameters()])]) for expert in experts}
    if len(kinds) > 1:
        raise ValueError(f'hidden units of unlike experts can\'t stand in one FFN, got {sorted(kinds)}: use prune.')
    parts = [read_ffn(expert) for expert in experts]
    if parts[0].norm is not None:
        raise ValueError(
            'the experts have a norm over their hidden units, which would run over units of several: use average, '
            'aligned or prune.')
    units = gathering.concatenate(parts)

    stride = -(-len(inputs) // 4096)
    sample, weight = inputs[::stride], weights[::stride]
    gates, chosen, _ = route(layer, sample)
    gate = gates.new_zeros(len(sample), len(layer.experts)).scatter(1, chosen, gates)
    gate = torch.cat([gate.new_ones(len(sample), len(shared)), gate], dim=1)
    contributions = [
        weight @ (gate[:, e, None] * hidden_activations(expert, sample)).double().square() * part.down.square().sum(0)
        for e, (expert, part) in enumerate(zip(experts, parts))]
    units = gathering.take(
        units, refit.preselect(contributions, max(3 * hidden, 4096), hidden, whole=len(shared)))

    bias = units.down_bias is not None
    index, down, down_bias = refit.choose_and_solve(
        partial(hidden_activations, build_ffn(template, units)), units.hidden, inputs, targets, weights, hidden, ridge,
        bias)
    kept = gathering.take(units, index)
    return build_ffn(template, replace(kept, down=down, down_bias=down_bias))


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


def _check_finite(name: str, layer: MoELayer) -> None:
    for key, parameter in layer.named_parameters():
        if parameter.is_meta:
            raise ValueError(f'{name}: {key} is on the meta device, so it has no values: load weights first.')
        if not all(bool(end.isfinite()) for end in parameter.detach().aminmax()):  # no mask of the parameter's size
            raise ValueError(f'{name}: {key} is not finite; take a checkpoint from before it diverged.')
