"""What a calibration set says about the experts of gated layers.

Axis legend: `T` tokens, `D` width, `E` experts, `k` experts a token is sent to.
"""
from dataclasses import dataclass
from typing import Dict, Iterable, Tuple

import torch
from torch import Tensor, nn

from .moe import are_alike, fuse_experts, moe_layers
from .routing import top_k_gates

_CHUNK = 4096  # tokens that all experts are evaluated on at once


def is_gated(layer: nn.Module) -> bool:
    """Whether a MoE layer has a router (the random partition has none)."""
    return getattr(layer, 'router', None) is not None


def renormalises(layer: nn.Module) -> bool:
    """Whether the gates of a token sum to 1."""
    return getattr(layer, 'renormalise', True)


def route(layer: nn.Module, tokens: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Gates `(T, k)`, experts `(T, k)` and logits `(T, E)` of any gated layer.

    A layer that is not ours may have a method `route` of that form, or a `router` that maps `(T, D)` to logits
    `(T, E)`, with attributes `top_k` (default 1) and `renormalise` (default True).

    Raises:
        TypeError: The router returns something else.
    """
    if hasattr(layer, 'route'):
        return layer.route(tokens)
    logits = layer.router(tokens)
    if not isinstance(logits, Tensor) or logits.shape != (len(tokens), len(layer.experts)):
        raise TypeError(
            f'{type(layer).__name__}.router must map (T, D) to logits (T, E = {len(layer.experts)}); give the layer a '
            f'method route(tokens) -> gates (T, k), experts (T, k), logits (T, E).')
    gates, experts = top_k_gates(logits.float(), getattr(layer, 'top_k', 1), renormalises(layer))
    return gates, experts, logits


@dataclass
class LayerUsage:
    """Statistics of one gated layer over the tokens of a calibration set.

    Args:
        tokens: `T`.
        counts: Tokens sent to each expert, `(E,)`.
        probability: Mean router probability of each expert over the tokens that chose it, `(E,)`; 0 where none did.
        contribution: Mean of `gate * ||f_e(x)||` over the tokens that chose the expert, `(E,)`; 0 where none did.
        second_moment: `E<f_i(x), f_j(x)>` over all tokens, chosen or not, `(E, E)`.
        mass: Mean sum of the gates of a token.
        change: `sqrt(E|y' - y|^2 / E|y|^2)` for the routed part of the layer's output `y` and the output `y'` of the
            plain average of its experts; not a number if the experts are of unequal widths and have no average.
    """
    tokens: int
    counts: Tensor
    probability: Tensor
    contribution: Tensor
    second_moment: Tensor
    mass: float
    change: float


class _Sums:
    def __init__(self, layer: nn.Module) -> None:
        num_experts = len(layer.experts)
        self.layer = layer
        self.fused = fuse_experts(layer.experts).eval() if are_alike(layer.experts) else None
        self.tokens = 0
        self.counts, self.probability, self.contribution = torch.zeros(3, num_experts, dtype=torch.float64)
        self.second_moment = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.mass, self.change, self.norm = 0., 0., 0.

    def __call__(self, module: nn.Module, args: Tuple[Tensor, ...]) -> None:
        for tokens in args[0].reshape(-1, args[0].shape[-1]).split(_CHUNK):
            self.add(tokens)

    def add(self, tokens: Tensor) -> None:
        layer = self.layer
        gates, experts, logits = route(layer, tokens)
        outputs = torch.stack([expert(tokens) for expert in layer.experts]).float()  # (E, T, D)
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

    def result(self) -> LayerUsage:
        counts = self.counts.clamp(min=1)
        return LayerUsage(
            self.tokens, self.counts, self.probability / counts, self.contribution / counts,
            self.second_moment / self.tokens, self.mass / self.tokens, (self.change / max(self.norm, 1e-30)) ** 0.5)


@torch.no_grad()
def measure_usage(model: nn.Module, batches: Iterable) -> Dict[str, LayerUsage]:
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
    modes = {module: module.training for module in model.modules()}
    handles = [entry.layer.register_forward_pre_hook(entry) for entry in sums.values()]
    device = next(model.parameters()).device
    seen = 0
    try:
        model.eval()
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(images.to(device))
            seen += len(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError('The calibration set has no batches.')
    for name, entry in sums.items():
        if not entry.tokens:
            raise ValueError(f'{name} got no tokens: the forward pass of {type(model).__name__} does not reach it.')
    return {name: entry.result() for name, entry in sums.items()}
