"""The pull: after each optimizer step, experts move toward their mean.

Axis legend: `E` experts, `t` the number of a pull, counted from 1.
"""
import math
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .moe import moe_layers

SCHEDULES = ('constant', 'linear', 'cosine')


def max_share_rate(num_experts: int) -> float:
    """`(E-1)/E`: the share rate that makes all experts equal at once; more would overshoot."""
    return (num_experts - 1) / num_experts


def _stochastic_round(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 `values` to one of their two neighbours in `dtype`, to each with its probability.

    The expected result is the value itself, so changes far below the resolution of `dtype` add up over many steps
    where rounding to nearest would drop every one of them. `noise` is uniform in [0, 1), of the shape of `values`.
    """
    digits, smallest = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
    exponent = torch.frexp(values).exponent
    unit = torch.ldexp(torch.ones_like(values), (exponent - digits).clamp(min=smallest))
    scaled = values / unit
    below = scaled.floor()
    # compared rather than added: a sum would be rounded itself, and lift values that need no rounding
    return ((below + (noise < scaled - below)) * unit).to(dtype)


class ExpertAverager:
    """Pulls the experts of every MoE layer of a model toward their mean (Experts Weights Averaging).

    For all experts at once, from their old values, with the share rate `r`:

        W_i <- (1 - r) * W_i + r / (E-1) * sum_{j != i} W_j

    which is `lerp(W_i, mean, r * E / (E-1))`: the mean stays, each deviation from it shrinks by `1 - r*E/(E-1)`.
    Parameters are changed in place; nothing but the parameters of `layer.experts` is touched. Gated MoE layers are
    pulled too; their routers and shared experts are not.

    bfloat16 and float16 parameters are computed in float32 and rounded stochastically, so that a small share rate
    does not round away; the random bits depend only on `t`, so all replicas of a model stay equal.

    Paper: arXiv 2308.06093.

    Args:
        model: The model itself, before any wrapper. Its parameters are looked up at each pull, so they may be moved
            or replaced after this.
        share_rate: `r`, `0 <= r <= (E-1)/E` for the smallest `E` in the model.
        schedule: Rate at pull `t`. `'constant'`: `r`; `'linear'`: `r * min(1, t/total_steps)`; `'cosine'`:
            `r * (1 - cos(pi * min(1, t/total_steps))) / 2`.
        total_steps: Pulls until the rate is `r`; required unless the schedule is constant.
        every: Pull at every n-th optimizer step only.
        stop_after: Stop pulling after this many pulls ("early EWA" for gated MoE); None: never.

    Raises:
        ValueError: An argument out of its range, or a model without MoE layers.

    Example:

        >>> averager = ewa.ExpertAverager(model, share_rate=1e-3)
        >>> handle = averager.attach(optimizer)
    """

    def __init__(
            self,
            model: nn.Module,
            share_rate: float,
            schedule: str = 'constant',
            total_steps: Optional[int] = None,
            every: int = 1,
            stop_after: Optional[int] = None,
    ) -> None:
        sizes = [len(layer.experts) for _, layer in moe_layers(model)]
        if not sizes:
            raise ValueError(f'{type(model).__name__} has no MoE layer to average; convert it with ewa.to_moe first.')
        limit = max_share_rate(min(sizes))
        if not 0 <= share_rate <= limit:
            raise ValueError(
                f'share_rate must be between 0 and (E-1)/E = {limit:.6g} for {min(sizes)} experts, got {share_rate}.')
        if schedule not in SCHEDULES:
            raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)}, got {schedule!r}.')
        if schedule != 'constant' and (total_steps is None or total_steps < 1):
            raise ValueError(f'schedule={schedule!r} needs total_steps >= 1, got {total_steps}.')
        if every < 1:
            raise ValueError(f'every must be at least 1, got {every}.')
        if stop_after is not None and stop_after < 0:
            raise ValueError(f'stop_after must be at least 0 pulls or None, got {stop_after}.')
        self.model = model
        self.max_rate = share_rate
        self.schedule = schedule
        self.total_steps = total_steps
        self.every = every
        self.stop_after = stop_after
        self.steps = 0
        self.pulls = 0
        self._handle: Optional[RemovableHandle] = None
        self._stepping = False

    @property
    def share_rate(self) -> float:
        """The rate of the next pull."""
        if self.stop_after is not None and self.pulls >= self.stop_after:
            return 0.
        if self.schedule == 'constant':
            return self.max_rate
        part = min(1., (self.pulls + 1) / self.total_steps)
        return self.max_rate * (part if self.schedule == 'linear' else (1 - math.cos(math.pi * part)) / 2)

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step, and pull if it is the turn. For loops in which `attach` is not used."""
        self.steps += 1
        if self.steps % self.every:
            return
        rate = self.share_rate
        self.pulls += 1
        if rate == 0:
            return
        # all layers with equally many experts in one go: groups[E][i] are the parameters of all i-th experts
        groups: Dict[int, List[List[Tensor]]] = {}
        for name, layer in moe_layers(self.model):
            group = groups.setdefault(len(layer.experts), [[] for _ in layer.experts])
            shapes = {tuple(p.shape for p in expert.parameters()) for expert in layer.experts}
            if len(shapes) > 1:
                raise ValueError(f'The experts of {name} differ in shape, so they have no mean.')
            for parameters, expert in zip(group, layer.experts):
                parameters.extend(expert.parameters())
        for num_experts, experts in groups.items():
            self._pull(experts, min(1., rate * num_experts / (num_experts - 1)))

    def _pull(self, experts: List[List[Tensor]], weight: float) -> None:
        half = [i for i, p in enumerate(experts[0]) if p.dtype in (torch.bfloat16, torch.float16)]
        full = [i for i, p in enumerate(experts[0]) if p.dtype not in (torch.bfloat16, torch.float16)]
        if full:
            self._lerp_to_mean([[parameters[i] for i in full] for parameters in experts], weight)
        generators: Dict[torch.device, torch.Generator] = {}
        for i in half:
            # one tensor at a time, to keep the float32 copies small
            stack = [[parameters[i].float()] for parameters in experts]
            self._lerp_to_mean(stack, weight)
            value = stack[0][0]
            if value.device not in generators:
                generators[value.device] = torch.Generator(value.device).manual_seed(self.pulls)
            # one noise for all experts, so that equal values stay equal
            noise = torch.rand(value.shape, device=value.device, generator=generators[value.device])
            for parameters, (value,) in zip(experts, stack):
                parameters[i].copy_(_stochastic_round(value, parameters[i].dtype, noise))

    @staticmethod
    def _lerp_to_mean(experts: List[List[Tensor]], weight: float) -> None:
        # mean = W_0 + sum_i (W_i - W_0) / E: equal experts are their own mean to the bit
        total = torch._foreach_sub(experts[1], experts[0])
        for parameters in experts[2:]:
            torch._foreach_add_(total, torch._foreach_sub(parameters, experts[0]))
        mean = torch._foreach_add(experts[0], total, alpha=1 / len(experts))
        for parameters in experts:
            torch._foreach_lerp_(parameters, mean, weight)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Pull after every real step of an optimizer, from now on until `handle.remove()`.

        Steps skipped for gradient accumulation or by a loss scaler are not counted. A class whose step() calls its
        parent's is pulled once, after the parent's. Of an `AcceleratedOptimizer` the optimizer inside is used. The hook
        is part of neither `optimizer.state_dict()` nor a `deepcopy`: attach again after either.

        Raises:
            RuntimeError: This averager is attached already (experts would be pulled twice a step).
            TypeError: The optimizer does not run hooks from its first step on, as timm's `Lookahead`; call `step()`
                after its steps instead.
        """
        if self._handle is not None and self._handle.id in (self._handle.hooks_dict_ref() or {}):
            raise RuntimeError('This ExpertAverager is attached already; call .remove() on its handle first.')
        inner = getattr(optimizer, 'optimizer', None)
        if isinstance(inner, Optimizer):
            optimizer = inner
        # timm's Lookahead does not run Optimizer.__init__; its steps run hooks only from its first zero_grad() on
        initialised = hasattr(optimizer, '_optimizer_state_dict_pre_hooks')
        if not initialised or not getattr(type(optimizer).step, 'hooked', False):
            raise TypeError(
                f'{type(optimizer).__name__} does not run step hooks reliably, so experts might never be pulled. Call '
                f'averager.step() after each optimizer.step() instead of attaching.')
        optimizer.register_step_pre_hook(self._before_step)
        self._handle = optimizer.register_step_post_hook(self._after_step)
        return self._handle

    def _before_step(self, optimizer: Optimizer, args, kwargs) -> None:
        self._stepping = True

    def _after_step(self, optimizer: Optimizer, args, kwargs) -> None:
        # where a class's step() calls that of its parent, torch runs the hooks of both
        if not self._stepping:
            return
        self._stepping = False
        # fused optimizers are called even when the loss scaler found infinities, and skip the step inside
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is None or not bool(found_inf):
            self.step()

    def state_dict(self) -> Dict[str, int]:
        """The position in the schedule; the constructor arguments are not part of it."""
        return {'steps': self.steps, 'pulls': self.pulls}

    def load_state_dict(self, state_dict: Dict[str, int]) -> None:
        self.steps, self.pulls = state_dict['steps'], state_dict['pulls']
