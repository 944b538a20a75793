"""When experts are pulled toward their mean: the schedule of the share rate, and the hook in the optimizer.

Axis legend: `E` experts, `t` the number of a pull, counted from 1.
"""
import math
import warnings
import weakref
from typing import Callable, Dict, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .moe import (
    MeanFormMoE,
    MoELayer,
    RandomPartitionMoE,
    TopKMoE,
    are_alike,
    check_plain,
    is_random,
    moe_layers,
    pulled,
)
from .pull import local, max_share_rate, pull_

SCHEDULES = ('constant', 'linear', 'cosine')
RatePolicy = Callable[[MoELayer, int], float]  # (layer, t) -> share rate of that layer at pull t


_PATIENCE = 100  # backward passes without a step of the optimizer after which it is said
_LOOK_AGAIN = 10  # the step after which it is looked for what can't be seen when attaching
_USED: 'weakref.WeakKeyDictionary' = weakref.WeakKeyDictionary()  # MoE layer -> whether an averager of it was used
_ATTACHED: 'weakref.WeakKeyDictionary' = weakref.WeakKeyDictionary()  # MoE layer -> reference to the averager


class _Handle(RemovableHandle):
    """Of a pair of hooks that belong together."""

    def __init__(self, handle: RemovableHandle, other: RemovableHandle) -> None:
        self.hooks_dict_ref, self.id, self.extra_dict_ref = handle.hooks_dict_ref, handle.id, ()
        self.other = other

    def remove(self) -> None:
        super().remove()
        self.other.remove()


def rate_schedule(
        share_rate: float,
        schedule: str = 'constant',
        total_steps: Optional[int] = None,
        every: int = 1,
        stop_after: Optional[int] = None,
) -> RatePolicy:
    """The policy that gives all layers one share rate, which may rise over the first optimizer steps.

    Args:
        share_rate: `r`, the rate that is reached.
        schedule: With `part = min(1, step / total_steps)`: `'constant'`: `r`; `'linear'`: `r * part`; `'cosine'`:
            `r * (1 - cos(pi * part)) / 2`.
        total_steps: Optimizer steps until the rate is `r`; required unless the schedule is constant.
        every: Optimizer steps from one pull to the next.
        stop_after: Optimizer steps after which the rate is 0; None: never.

    Raises:
        ValueError: An argument out of its range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)}, got {schedule!r}.')
    if schedule != 'constant' and (total_steps is None or total_steps < 1):
        raise ValueError(f'schedule={schedule!r} needs total_steps >= 1, got {total_steps}.')
    if stop_after is not None and stop_after < 0:
        raise ValueError(f'stop_after must be at least 0 optimizer steps or None, got {stop_after}.')

    def policy(layer: MoELayer, t: int) -> float:
        step = t * every
        if stop_after is not None and step > stop_after:
            return 0.
        if total_steps is None or schedule == 'constant':
            return share_rate
        part = min(1., step / total_steps)
        return share_rate * (part if schedule == 'linear' else (1 - math.cos(math.pi * part)) / 2)

    return policy


def zip_parameters(name: str, layer: MoELayer) -> Iterator[Tuple[Tensor, ...]]:
    """The parameters of what is pulled of a layer side by side: for each one a tuple of `E` tensors of one shape.

    Raises:
        ValueError: Experts differ in shape, have weights that are no plain parameters, or are frozen in part.
    """
    experts = pulled(layer)
    try:
        check_plain(experts)
    except ValueError as e:
        raise ValueError(f'{name}: {e}') from e
    if not are_alike(experts):
        raise ValueError(f'The experts of {name} differ in shape, so they have no mean.')
    for (key, _), parameters in zip(
            experts[0].named_parameters(), zip(*(expert.parameters() for expert in experts))):
        if len({parameter.requires_grad for parameter in parameters}) > 1:
            raise ValueError(f'{key} is frozen in some experts of {name} and trained in others: freeze all or none.')
        if len({id(parameter) for parameter in parameters}) < len(parameters):
            raise ValueError(f'{key} is one parameter in several experts of {name}: give each its own.')
        yield parameters


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer runs hooks at each of its steps, from the first one on."""
    # timm's Lookahead does not run Optimizer.__init__; its steps run hooks only from its first zero_grad() on
    initialised = hasattr(optimizer, '_optimizer_state_dict_pre_hooks')
    hooked = getattr(type(optimizer).step, 'hooked', False)
    return initialised and hooked and not hasattr(optimizer, 'second_step')  # SAM's steps have other names


@torch.no_grad()
def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether a step is the one with which torch's distributed checkpoints make an optimizer have a state.

    Saving and loading a state that is empty steps once without learning rate or gradients. A pull after it would change
    weights that were just loaded.
    """
    groups = optimizer.param_groups
    if not all('lr' in group and float(group['lr']) == 0 for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group['params'] if p.requires_grad]
    return all(gradient is not None and not bool(local(gradient).any()) for gradient in gradients)


def never_used(layer: nn.Module) -> bool:
    """Whether averagers were made for a MoE layer, and none of them attached or stepped."""
    return _USED.get(layer) is False


class ExpertAverager:
    """Pulls the experts of every MoE layer of a model toward their mean (Experts Weights Averaging).

    For all experts at once, from their old values, with the share rate `r`:

        W_i <- (1 - r) * W_i + r / (E-1) * sum_{j != i} W_j

    The mean stays, each deviation from it shrinks by `1 - r*E/(E-1)` (`ewa.pull`). Parameters are changed in place;
    nothing but the trainable parameters of `layer.experts`, or of the deviations of a layer in mean form, is touched.
    Gated MoE layers are pulled too; their routers and shared experts are not. Parameters may be replicated (DDP) or
    sharded (FSDP2): every process pulls what it holds, without communication.

    bfloat16 and float16 parameters are computed in float32 and rounded stochastically, so that a small share rate
    does not round away; the random bits depend only on `t`, so all replicas of a model stay equal.

    Paper: arXiv 2308.06093.

    Args:
        model: The model itself, before any wrapper. Its parameters are looked up at each pull, so they may be moved
            or replaced after this.
        share_rate: `r`, `0 <= r <= (E-1)/E` for the smallest `E` in the model; or a policy of your own, a function of a
            MoE layer and the number `t` of the pull (from 1) that returns the rate. The other arguments but `every`
            then stay at their defaults.
        schedule, total_steps, stop_after: Course of the rate, see `rate_schedule`. (`stop_after` is "early EWA" for
            gated MoE.)
        every: Pull at every n-th optimizer step only.

    Raises:
        ValueError: An argument out of its range, or a model without MoE layers.

    Example:
        >>> averager = ewa.ExpertAverager(model, share_rate=1e-3)
        >>> handle = averager.attach(optimizer)
    """

    def __init__(
            self,
            model: nn.Module,
            share_rate: Union[float, RatePolicy],
            schedule: str = 'constant',
            total_steps: Optional[int] = None,
            every: int = 1,
            stop_after: Optional[int] = None,
    ) -> None:
        sizes = [len(pulled(layer)) for _, layer in moe_layers(model)]
        if not sizes:
            raise ValueError(f'{type(model).__name__} has no MoE layer to average; convert it with ewa.to_moe first.')
        if every < 1:
            raise ValueError(f'every must be at least 1, got {every}.')
        if callable(share_rate):
            if schedule != 'constant' or total_steps is not None or stop_after is not None:
                raise ValueError(
                    'A share_rate that is a function sets the whole course itself: leave schedule, total_steps and '
                    'stop_after out.')
            self.policy = share_rate
        else:
            limit = max_share_rate(min(sizes))
            if not 0 <= share_rate <= limit:
                raise ValueError(
                    f'share_rate must be between 0 and (E-1)/E = {limit:.6g} for {min(sizes)} experts, got '
                    f'{share_rate}.')
            self.policy = rate_schedule(share_rate, schedule, total_steps, every, stop_after)
        self.model = model
        self.every = every
        self.steps = 0
        self.pulls = 0
        self._handle: Optional[RemovableHandle] = None
        self._stepping = self._called = False
        for _, layer in moe_layers(model):
            _USED.setdefault(layer, False)

    @property
    def share_rate(self) -> float:
        """The rate of the next pull; the largest one where layers differ."""
        return max(self.policy(layer, self.pulls + 1) for _, layer in moe_layers(self.model))

    def step(self) -> None:
        """Count one optimizer step, and pull if it is the turn. For loops in which `attach` is not used.

        Raises:
            RuntimeError: It is attached and counts the steps of its optimizer already.
        """
        if self.is_attached():
            raise RuntimeError(
                'This ExpertAverager is attached and pulls after each step of its optimizer: leave averager.step() '
                'out, or call .remove() on its handle first.')
        self._step()

    @torch.no_grad()
    def _step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            self._is_used()
        if self.steps % self.every:
            return
        self.pulls += 1
        # all layers with as many experts and the same rate in one go: the lists are the parameters of all i-th experts
        groups: Dict[Tuple[int, float], List[List[Tensor]]] = {}
        for name, layer in moe_layers(self.model):
            rate, experts = self.policy(layer, self.pulls), pulled(layer)
            if not 0 <= rate <= max_share_rate(len(experts)):
                raise ValueError(
                    f'The share rate of {name} at pull {self.pulls} is {rate}, not between 0 and (E-1)/E = '
                    f'{max_share_rate(len(experts)):.6g}.')
            if rate == 0:
                continue
            group = groups.setdefault((len(experts), rate), [[] for _ in experts])
            for parameters in zip_parameters(name, layer):
                if parameters[0].requires_grad:
                    for tensors, parameter in zip(group, parameters):
                        tensors.append(parameter)
        for (_, rate), group in groups.items():
            if group[0]:
                pull_(group, rate, self.pulls)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Pull after every real step of an optimizer, from now on until `handle.remove()`.

        Steps skipped for gradient accumulation or by a loss scaler, and those by which torch's distributed checkpoints
        make the state of an optimizer, are not counted. A class whose step() calls its
        parent's is pulled once, after the parent's. Of an `AcceleratedOptimizer` the optimizer inside is used. The hook
        is part of neither `optimizer.state_dict()` nor a `deepcopy`: attach again after either.

        Raises:
            RuntimeError: This averager, or another one of the same layers, is attached already (experts would be pulled
                twice a step).
            TypeError: The optimizer does not run hooks at each of its steps: timm's `Lookahead`, SAM with its
                `first_step` and `second_step`. Call `step()` after its steps instead.
            ValueError: The optimizer does not hold the trainable experts of this model, or experts have weights that
                are no plain parameters.
        """
        if self.is_attached():
            raise RuntimeError('This ExpertAverager is attached already; call .remove() on its handle first.')
        inner = getattr(optimizer, 'optimizer', None)
        if isinstance(inner, Optimizer):
            optimizer = inner
        if not runs_hooks(optimizer):
            raise TypeError(
                f'{type(optimizer).__name__} does not run step hooks reliably, so experts might never be pulled. Call '
                f'averager.step() after each optimizer.step() instead of attaching.')
        held = {id(p) for group in optimizer.param_groups for p in group['params']}
        for name, layer in moe_layers(self.model):
            other = _ATTACHED.get(layer, lambda: None)()
            if other is not None and other.is_attached():
                raise RuntimeError(
                    f'Another ExpertAverager pulls {name} already, the experts would be pulled twice a step: call '
                    f'.remove() on its handle first.')
            trained = [p for parameters in zip_parameters(name, layer) for p in parameters if p.requires_grad]
            missing = sum(id(p) not in held for p in trained)
            if missing:
                raise ValueError(
                    f'The optimizer holds {len(trained) - missing} of the {len(trained)} trainable expert parameters '
                    f'of {name}: make it after ewa.to_moe, from the parameters of this model. (Where several '
                    f'optimizers share a model, call averager.step() after their steps instead.)')
        before = optimizer.register_step_pre_hook(self._before_step)
        self._handle = _Handle(optimizer.register_step_post_hook(self._after_step), before)
        for _, layer in moe_layers(self.model):
            _ATTACHED[layer] = weakref.ref(self)
        self._called = False
        self._is_used()
        self._watch(optimizer)
        return self._handle

    def _is_used(self) -> None:
        for _, layer in moe_layers(self.model):
            _USED[layer] = True

    def is_attached(self) -> bool:
        """Whether it pulls after the steps of an optimizer."""
        return self._handle is not None and self._handle.id in (self._handle.hooks_dict_ref() or {})

    def _watch(self, optimizer: Optimizer) -> None:
        """Say it once where backward passes come and the optimizer's `step()` never does; until its first one."""
        begun, passes = self.steps, 0
        averager, kind = weakref.ref(self), type(optimizer).__name__  # what a hook of a tensor holds is never collected

        def count(parameter: Tensor) -> None:
            nonlocal passes
            passes += 1
            ours = averager()
            waiting = ours is not None and not ours._called and ours.steps == begun  # noqa: SLF001  ours
            if waiting and passes == _PATIENCE:
                warnings.warn(
                    f'After {passes} backward passes {kind}.step() was not called, so no expert was pulled. If it '
                    f'trains by another method, call averager.step() after that instead of attaching.', stacklevel=2)
            if not waiting or passes == _PATIENCE:
                handle.remove()

        trained = (p for _, layer in moe_layers(self.model) for p in pulled(layer).parameters() if p.requires_grad)
        first = next(trained, None)
        if first is not None:
            handle = first.register_post_accumulate_grad_hook(count)

    def _before_step(self, optimizer: Optimizer, args, kwargs) -> None:
        self._called = True
        self._stepping = not _only_makes_state(optimizer)

    def _after_step(self, optimizer: Optimizer, args, kwargs) -> None:
        # where a class's step() calls that of its parent, torch runs the hooks of both
        if not self._stepping:
            return
        self._stepping = False
        # fused optimizers are called even when the loss scaler found infinities, and skip the step inside
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is None or not bool(found_inf):
            self._step()
            if self.steps == 1:
                self._warn_of_unused()
            if self.steps == _LOOK_AGAIN:
                self._warn_of_copies(optimizer)

    def _warn_of_unused(self) -> None:
        """Say it where the model is in eval mode, or calls an FFN that it has kept hold of, not what took its place."""
        for name, layer in moe_layers(self.model):
            if type(layer) not in (RandomPartitionMoE, MeanFormMoE, TopKMoE):
                continue
            if not layer.training and is_random(layer):
                warnings.warn(
                    f'{name} is in eval mode, where it computes with the mean of its experts: they all learn the same. '
                    f'Call model.train() before training.', stacklevel=2)
                return
            # all parts of these layers have gradients, whatever the partition, or none
            parts = [layer.mean if isinstance(layer, MeanFormMoE) else pulled(layer)[0], pulled(layer)[-1]]
            first, last = ({p.grad is not None for p in part.parameters() if p.requires_grad} for part in parts)
            if True in first and last == {False}:
                warnings.warn(
                    f'{name} was not called, only an FFN in it: the model has kept this FFN in a list or a function '
                    f'since before ewa.to_moe, and trains as a dense model there. Let it call its submodule.',
                    stacklevel=2)

    def _warn_of_copies(self, optimizer: Optimizer) -> None:
        """Say it where an optimizer keeps weights of its own, from which it would undo the pull."""
        known = {id(p) for group in optimizer.param_groups for p in group['params']}
        held = {key: value for key, value in vars(optimizer).items() if key not in ('state', 'param_groups')}
        for name, layer in moe_layers(self.model):
            for parameter in pulled(layer)[0].parameters():
                weights = local(parameter)
                for key, values in {**held, **optimizer.state.get(parameter, {})}.items():
                    copies = [value for value in tree_leaves(values) if isinstance(value, Tensor)
                              and value.shape == parameter.shape and id(value) not in known]
                    if weights.any() and any((local(c) - weights).norm() < 0.5 * weights.norm() for c in copies):
                        warnings.warn(
                            f'{type(optimizer).__name__} keeps a copy of the weights of {name} (its {key!r}): it may '
                            f'undo what the averager pulls. Use an optimizer without weights of its own.', stacklevel=2)
                        return

    def state_dict(self) -> Dict[str, int]:
        """The position in the schedule; the constructor arguments are not part of it."""
        return {'steps': self.steps, 'pulls': self.pulls}

    def load_state_dict(self, state_dict: Dict[str, int]) -> None:
        self.steps, self.pulls = state_dict['steps'], state_dict['pulls']
        if self.steps:
            self._is_used()
