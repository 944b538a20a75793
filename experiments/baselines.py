"""What EWA is compared with, and is no part of the package: other partitions, weight fusion, a bounded distance.

Each enters where the package lets a user in: layers as routers of `ewa.to_moe`, the bound as a policy of share rates,
and the slower FFNs as an optimizer of `train.main`. So all else stays the same loop.

Axis legend: `B` images, `N` tokens of an image, `D` width, `E` experts.
"""
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Tuple

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.func import functional_call

from ewa.averaging import RatePolicy
from ewa.diagnostics import distances_to_mean
from ewa.ffn import find_ffns
from ewa.moe import MeanFormMoE, MoELayer, RandomPartitionMoE, mean_state, pulled, register_router
from ewa.partition import random_partition
from ewa.pull import max_share_rate


class ImagePartitionMoE(RandomPartitionMoE):
    """All tokens of an image go to the same expert; images are split evenly at random."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D) -> (B, N, D)`."""
        if not self.training:
            return super().forward(x)
        index, inverse, sizes = random_partition(x.shape[0], len(self.experts), x.device)
        parts = x.index_select(0, index).split(sizes)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts)]).index_select(0, inverse)


class FusedMoE(RandomPartitionMoE):
    """Every token passes through the mean of the experts' weights, in training too (after ExFusion, arXiv 2603.27965).

    The gradient of the mean goes to all experts alike, so with AdamW this is a dense FFN in another parametrisation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        return functional_call(self.experts[0], mean_state(self.experts), (x,))


class RandomSignsMoE(MeanFormMoE):
    """The mean form with deviations of the size that training gives them, and no direction.

    In each pass the deviations of all experts are multiplied by one random sign a weight; the gradients are those
    without signs, so that deviations grow as they do in the mean form.
    """

    def expert_states(self) -> List[Dict[str, Tensor]]:
        states = super().expert_states()
        for key, m in self.mean.named_parameters():
            flip = torch.randint(0, 2, m.shape, device=m.device)  # 1 where the sign turns
            for state in states:
                state[key] = state[key] - (2 * flip * (state[key] - m)).detach()
        return states


class OneExpertMoE(MeanFormMoE):
    """The mean form without partition: all tokens of a batch pass through one expert, drawn in each layer and pass."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        if not self.training:
            return super().forward(x)
        experts = self.expert_functions()
        return experts[int(torch.randint(len(experts), ()))](x)


class LearnedFusionMoE(RandomPartitionMoE):
    """Weight fusion with one learned coefficient an expert, a softmax over `E` scores that start equal."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self.scores = nn.Parameter(torch.zeros(len(self.experts)))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        states = [dict(expert.named_parameters()) for expert in self.experts]
        fused = {key: sum(w * state[key] for w, state in zip(self.scores.softmax(0), states)) for key in states[0]}
        return functional_call(self.experts[0], fused, (x,))


def bounded_share_rate(bound: float) -> RatePolicy:
    """The policy that pulls just as much as keeps each layer's experts within a relative distance of their mean.

    With the distance `d = sqrt(mean_e |W_e - W_mean|^2) / |W_mean|` of a layer and the bound `b`, deviations from the
    mean are multiplied by `min(1, b/d)`: the experts are projected onto the set `d <= b`. The share rate that does this
    is `(E-1)/E * (1 - b/d)`, a new one for each layer and step; there is nothing else to tune.
    """
    def policy(layer: MoELayer, t: int) -> float:
        distance = distances_to_mean(layer)['']
        return max_share_rate(len(pulled(layer))) * (1 - bound / distance) if distance > bound else 0.

    return policy


def slow_ffns(model: nn.Module, scale: float, **kwargs) -> torch.optim.Optimizer:
    """timm's optimizer with `scale` times the learning rate for FFNs, and the same weight decay a step.

    What experts that are made equal after each step come to with AdamW where noise rules its second moments: an expert
    sees 1/E of the signal and 1/sqrt(E) of the noise, so their mean moves by 1/sqrt(E) of the dense FFN's step.
    """
    optimizer = create_optimizer_v2(model, **kwargs)
    ffns = {id(p) for ffn in find_ffns(model).values() for p in ffn.parameters()}
    for group in list(optimizer.param_groups):
        slow = [p for p in group['params'] if id(p) in ffns]
        group['params'] = [p for p in group['params'] if id(p) not in ffns]
        optimizer.add_param_group(dict(
            group, params=slow, lr_scale=scale, weight_decay=group['weight_decay'] / scale))
    return optimizer


LAYERS: Dict[str, Callable[..., nn.Module]] = {
    'whole images': ImagePartitionMoE, 'static fusion': FusedMoE, 'learned fusion': LearnedFusionMoE}
for spread in (0.3, 1.):
    LAYERS[f'random signs {spread:g}'] = partial(RandomSignsMoE, spread=spread)
    LAYERS[f'one expert a batch {spread:g}'] = partial(OneExpertMoE, spread=spread)
for name, layer in LAYERS.items():
    register_router(name.replace(' ', '-'), layer)


def baseline(name: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Flags and keyword arguments of `train.main` that put a baseline in the place of random partition or of the pull.

    Args:
        name: A key of `LAYERS`, `'bound B'` for `bounded_share_rate` with the bound `B`, `'FFN lr S'` for `slow_ffns`
            with the scale `S`, or '' for nothing.
    """
    if not name:
        return {}, {}
    if name in LAYERS:
        return {'router': name.replace(' ', '-')}, {}
    if name.startswith('bound '):
        return {}, {'share_rate': bounded_share_rate(float(name.removeprefix('bound ')))}
    if name.startswith('FFN lr '):
        return {}, {'create_optimizer': partial(slow_ffns, scale=float(name.removeprefix('FFN lr ')))}
    raise ValueError(f'no baseline is called {name!r}; there are {", ".join(LAYERS)}, "bound B" and "FFN lr S"')
