"""What EWA is compared with, and is no part of the package: other partitions, weight fusion, a bounded distance.

Each is put in the place of a class of `ewa` or of the optimizer while a run of `train.py` lasts, so that all else stays
the same loop.

Axis legend: `B` images, `N` tokens of an image, `D` width, `E` experts.
"""
import contextlib
from functools import partial
from typing import Iterator
from unittest import mock

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.func import functional_call

import ewa
import train
from ewa.averaging import ExpertAverager
from ewa.diagnostics import distances_to_mean
from ewa.ffn import find_ffns
from ewa.moe import ROUTERS, RandomPartitionMoE, mean_state, moe_layers
from ewa.partition import random_partition
from ewa.pull import max_share_rate, pull_


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


class LearnedFusionMoE(RandomPartitionMoE):
    """Weight fusion with one learned coefficient an expert, a softmax over `E` scores that start equal."""

    def __init__(self, experts) -> None:
        super().__init__(experts)
        self.scores = nn.Parameter(torch.zeros(len(self.experts)))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        states = [dict(expert.named_parameters()) for expert in self.experts]
        fused = {key: sum(w * state[key] for w, state in zip(self.scores.softmax(0), states)) for key in states[0]}
        return functional_call(self.experts[0], fused, (x,))


class BoundedAverager(ExpertAverager):
    """Pulls just as much as keeps each layer's experts within a relative distance of their mean.

    With the distance `d = sqrt(mean_e |W_e - W_mean|^2) / |W_mean|` of a layer and the bound `b`, deviations from the
    mean are multiplied by `min(1, b/d)`: the experts are projected onto the set `d <= b`. The share rate that does this
    is `(E-1)/E * (1 - b/d)`, a new one for each layer and step; there is nothing else to tune.
    """

    bound = 0.1

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self.pulls += 1
        distances = distances_to_mean(self.model)
        for name, layer in moe_layers(self.model):
            experts = [list(expert.parameters()) for expert in layer.experts]
            if distances[name] > self.bound:
                pull_(experts, max_share_rate(len(experts)) * (1 - self.bound / distances[name]), self.pulls)


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


LAYERS = {'whole images': ImagePartitionMoE, 'static fusion': FusedMoE, 'learned fusion': LearnedFusionMoE}


@contextlib.contextmanager
def baseline(name: str) -> Iterator[None]:
    """Build and train models with a baseline in the place of random partition or of the pull, inside this context.

    Args:
        name: A key of `LAYERS`, `'bound B'` for `BoundedAverager` with the bound `B`, `'FFN lr S'` for `slow_ffns` with
            the scale `S`, or '' for nothing.
    """
    if name in LAYERS:
        with mock.patch.dict(ROUTERS, random=LAYERS[name]):
            yield
    elif name.startswith('bound '):
        averager = type('BoundedAverager', (BoundedAverager,), dict(bound=float(name.split()[1])))
        with mock.patch.object(ewa, 'ExpertAverager', averager):
            yield
    elif name.startswith('FFN lr '):
        with mock.patch.object(train, 'create_optimizer_v2', partial(slow_ffns, scale=float(name.split()[2]))):
            yield
    elif name:
        raise ValueError(f'no baseline is called {name!r}; there are {", ".join(LAYERS)}, "bound B" and "FFN lr S"')
    else:
        yield
