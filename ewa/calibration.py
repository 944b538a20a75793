"""What a calibration set says about the experts of gated layers.

Axis legend: `T` tokens, `D` width, `E` experts, `k` experts a token is sent to.
"""
from collections import defaultdict
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .gathering import ExpertStatistics
from .moe import (
    MoELayer,
    are_alike,
    evaluating,
    fuse_experts,
    is_gated,
    moe_layers,
    on_tokens,
    route,
    takes_images,
    to_tokens,
)

_CHUNK = 4096  # tokens that all experts are evaluated on at once


def _images(batch) -> Tensor:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


class _Sums:
    def __init__(self, layer: MoELayer) -> None:
        num_experts = len(layer.experts)
        self.layer = layer
        self.experts = [on_tokens(expert) for expert in layer.experts]
        self.fused = on_tokens(fuse_experts(layer.experts)).eval() if are_alike(layer.experts) else None
        self.tokens = 0
        self.counts, self.probability, self.contribution = torch.zeros(3, num_experts, dtype=torch.float64)
        self.second_moment = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.mass, self.change, self.norm = 0., 0., 0.

    def __call__(self, module: nn.Module, args: Tuple[Tensor, ...]) -> None:
        for tokens in to_tokens(args[0], takes_images(self.layer.experts[0])).split(_CHUNK):
            self.add(tokens)

    def add(self, tokens: Tensor) -> None:
        layer = self.layer
        gates, experts, logits = route(layer, tokens)
        outputs = torch.stack([expert(tokens) for expert in self.experts]).float()  # (E, T, D)
        full = torch.zeros_like(logits, dtype=torch.float32).scatter(1, experts, gates.float())  # (T, E)
        chosen = torch.zeros_like(full).scatter(1, experts, 1.)
        norms = outputs.norm(dim=2).T  # (T, E)
        mixed = torch.einsum('te,etd->td', full, outputs)

        def total(values: Tensor) -> Tensor:
            return values.double().sum(0).cpu()

        self.tokens += len(tokens)
        self.counts += total(chosen)
        self.probability += total(chosen * logits.float().softmax(1))
        self.contribution += total(full * norms)
        self.second_moment += torch.einsum('itd,jtd->ij', outputs, outputs).double().cpu()
        self.mass += float(gates.sum())
        fused = self.fused(tokens).float() if self.fused is not None else float('nan')
        self.change += float((fused - mixed).square().sum())
        self.norm += float(mixed.square().sum())

    def result(self) -> ExpertStatistics:
        counts = self.counts.clamp(min=1)
        return ExpertStatistics(
            self.tokens, self.counts, self.probability / counts, self.contribution / counts,
            self.second_moment / self.tokens, self.mass / self.tokens, (self.change / max(self.norm, 1e-30)) ** 0.5)


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable) -> Dict[str, ExpertStatistics]:
    """Run a calibration set through a model in `eval()` and record every gated layer.

    Args:
        model: A MoE model; left as it was.
        batches: Batches of images, or tuples that start with one.

    Returns:
        Layer name to its statistics.

    Raises:
        ValueError: There are no batches, or the model's forward pass does not reach a gated layer.
    """
    sums = {name: _Sums(layer) for name, layer in moe_layers(model) if is_gated(layer)}
    handles = [entry.layer.register_forward_pre_hook(entry) for entry in sums.values()]
    device = next(model.parameters()).device
    seen = 0
    try:
        with evaluating(model):
            for batch in batches:
                images = _images(batch)
                model(images.to(device))
                seen += len(images)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError('The calibration set has no batches.')
    for name, entry in sums.items():
        if not entry.tokens:
            raise ValueError(f'{name} got no tokens: the forward pass of {type(model).__name__} does not reach it.')
    return {name: entry.result() for name, entry in sums.items()}


class Part:
    """Some images of each of several batches; an iterator copies those of one batch at a time.

    Args:
        batches: Images of a batch, and the indices of those that are meant, at least one.
    """

    def __init__(self, batches: Sequence[Tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Number of images."""
        return sum(len(index) for _, index in self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (images[index] for images, index in self.batches)


def hold_out(batches: Iterable) -> Tuple[Part, Part]:
    """Calibration images in two parts: every eighth, from the second on, is held out to measure on.

    Raises:
        ValueError: There are no images.
    """
    parts: Tuple[List[Tuple[Tensor, Tensor]], List[Tuple[Tensor, Tensor]]] = ([], [])
    seen = 0
    for images in map(_images, batches):
        held = torch.arange(seen, seen + len(images)) % 8 == 1
        for part, chosen in zip(parts, (~held, held)):
            if chosen.any():
                part.append((images, chosen.nonzero()[:, 0]))
        seen += len(images)
    if not seen:
        raise ValueError('The calibration set has no batches.')
    return Part(parts[0]), Part(parts[1])


class _Reached(Exception):
    """Ends a forward pass behind the layer whose tokens are wanted."""


def call_order(model: nn.Module, images: Tensor) -> List[str]:
    """Names of the MoE layers in the order in which the model calls them.

    Raises:
        ValueError: The forward pass calls a layer not at all, or more than once.
    """
    calls: List[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name, layer in moe_layers(model)]
    try:
        model(images.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    for name, _ in moe_layers(model):
        if calls.count(name) != 1:
            raise ValueError(
                f'{name}: the forward pass of {type(model).__name__} calls it {calls.count(name)} times, once is what '
                f'can be fitted.')
    return calls


def sensitivities(model: nn.Module, batches: Iterable[Tensor]) -> Dict[str, List[Tensor]]:
    """How much the model's outputs move with the output of each MoE layer, token by token.

    `|J_t^T r|^2`, `J_t` the derivative of the model's outputs by the layer's output at token `t` and `r ~ N(0, I)`,
    drawn by a generator of its own; one backward pass for every 8 images.

    Returns:
        Layer name to a tensor for each of the batches, (tokens,); zeros of a layer that the outputs do not depend on.

    Raises:
        ValueError: The model returns something else than a tensor.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    layers = dict(moe_layers(model))
    kept: Dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Tuple[Tensor, ...], output: Tensor, name: str) -> Tensor:
        if not output.requires_grad:  # the first: what comes before it needs no graph
            torch.set_grad_enabled(True)
            output = output.detach().requires_grad_()
        kept[name] = output
        return output

    handles = [layer.register_forward_hook(partial(keep, name=name)) for name, layer in layers.items()]
    result: Dict[str, List[Tensor]] = {name: [] for name in layers}
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:  # else the graph keeps what only their gradients need
            p.requires_grad_(False)
        for batch in batches:
            parts: Dict[str, List[Tensor]] = {name: [] for name in result}
            for images in batch.split(16):
                draw = None
                for half, some in enumerate(images.split(8)):  # a graph of 16 would be the most memory that refit takes
                    with torch.no_grad():  # and back to what was before
                        outputs = model(some.to(device))
                        if not isinstance(outputs, Tensor):
                            raise ValueError(
                                f'refit weighs tokens by what they do to a tensor of outputs, and '
                                f'{type(model).__name__} returns a {type(outputs).__name__}: wrap it so that it '
                                f'returns its logits.')
                        if draw is None:
                            draw = torch.randn(len(images), *outputs.shape[1:], generator=generator).to(outputs)
                        gradients = (
                            torch.autograd.grad(
                                (outputs * draw[8 * half:][:len(some)]).sum(), list(kept.values()), allow_unused=True)
                            if outputs.requires_grad else [None] * len(kept))
                    for (name, output), gradient in zip(kept.items(), gradients):
                        gradient = torch.zeros_like(output) if gradient is None else gradient
                        tokens = to_tokens(gradient.detach(), takes_images(layers[name].experts[0]))
                        parts[name].append(tokens.float().square().sum(1))
                    kept.clear()
            for name, values in parts.items():
                result[name].append(torch.cat(values))
    finally:
        for p in trained:
            p.requires_grad_()
        for handle in handles:
            handle.remove()
    return result


class Stream(NamedTuple):
    """A place behind a MoE layer at which the residual stream that it adds to can be read.

    Args:
        module: Name of the module whose output it is.
        scale: With which the layer's output is added, (D,), of ones without layer scale.
        images: Whether it comes as `(B, D, height, width)`.
    """
    module: str
    scale: Tensor
    images: bool


@torch.no_grad()
def residual_stream(model: nn.Module, name: str, images: Tensor) -> Optional[Stream]:
    """The output of the outermost module around a MoE layer that is the residual stream behind it.

    It has a token for each of the layer's, and changes by `scale * d` when these change by `d`, channel by channel: a
    block without a norm behind its FFN. Found by adding random numbers (of a generator of their own) to what the layer
    computes. None where no module that is called once is like that.

    Args:
        model: A MoE model in `eval()`.
        name: Of the layer.
        images: A few.
    """
    layer = model.get_submodule(name)
    parts = name.split('.')
    around = ['.'.join(parts[:depth]) for depth in range(len(parts))]  # the model itself first

    def run(size: float) -> Tuple[Tensor, Dict[Tuple[str, bool], List[Tensor]]]:
        tokens: List[Tensor] = []
        streams: Dict[Tuple[str, bool], List[Tensor]] = defaultdict(list)

        def keep(module: nn.Module, args: Tuple, output, key: str) -> None:
            output = output[0] if isinstance(output, tuple) else output
            for form in (False, True):
                if isinstance(output, Tensor) and output.dim() >= 2 + 2 * form:
                    streams[key, form].append(to_tokens(output.double(), form))

        def change(module: nn.Module, args: Tuple[Tensor, ...], output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            output = output + size * output.square().mean().sqrt() * noise
            tokens.append(to_tokens(output.double(), takes_images(layer.experts[0])))
            return output

        handles = [model.get_submodule(key).register_forward_hook(partial(keep, key=key)) for key in around]
        handles.append(layer.register_forward_hook(change))
        try:
            model(images.to(next(model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
        return tokens[0], streams

    (tokens, before), (changed, after) = run(0.), run(1.)
    added = changed - tokens
    for key, form in product(around, (False, True)):
        if [x.shape for x in before[key, form]] == [added.shape] and len(added) > 1:
            change = after[key, form][0] - before[key, form][0]
            scale = (change * added).sum(0) / added.square().sum(0).clamp(min=1e-30)
            if (change - scale * added).norm() < 1e-2 * change.norm():
                return Stream(key, scale, form)
    return None


class Tap(NamedTuple):
    """A place in a model at which tokens are read.

    Args:
        module: Whose inputs or outputs they are.
        images: Whether they come as `(B, D, height, width)`.
        tokens: Those to keep, ascending, counted over all batches, (n,).
        inputs: Whether its inputs are meant.
    """
    module: nn.Module
    images: bool
    tokens: Tensor
    inputs: bool = False


def read_tokens(model: nn.Module, taps: Sequence[Tap], batches: Iterable[Tensor]) -> List[Tensor]:
    """Some of the tokens at some places of a model, (n, D) for each; each forward pass ends behind the last of them.

    Raises:
        ValueError: Tokens that are not finite.
    """
    device = next(model.parameters()).device
    kept: List[List[Tensor]] = [[] for _ in taps]
    starts = [0] * len(taps)

    def keep(module: nn.Module, args: Tuple, output, number: int) -> None:
        tap = taps[number]
        x = to_tokens(args[0] if tap.inputs else output[0] if isinstance(output, tuple) else output, tap.images)
        start, starts[number] = starts[number], starts[number] + len(x)
        kept[number].append(x[tap.tokens[(tap.tokens >= start) & (tap.tokens < starts[number])] - start])
        if len({len(parts) for parts in kept}) == 1:
            raise _Reached

    handles = [
        tap.module.register_forward_hook(partial(keep, number=number)) for number, tap in enumerate(taps)]
    try:
        for batch in batches:
            with suppress(_Reached):
                model(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    result = [torch.cat(kept.pop(0)) for _ in taps]  # one after the other, so that parts and whole are not both there
    if not all(values.isfinite().all() for values in result):
        raise ValueError('the calibration images give tokens that are not finite; look for broken images among them.')
    return result
