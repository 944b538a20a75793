"""MoE layers: what one is and what one may ask it; then our own, which know no schedule, optimizer or choice of blocks.

Axis legend: `T` tokens, `D` width, `E` experts, `k` experts a token is sent to.

A MoE layer is any module with an `nn.ModuleList` called `experts`, see `MoELayer`. Everybody who wants to know more of
one asks here: `pulled`, `kind`, `renormalises`, `route`, `shared_experts`, `layer_pieces`.
"""
import math
import weakref
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Protocol, Sequence, Tuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .foreign import foreign
from .gathering import mean
from .partition import random_partition
from .routing import dispatch, load_balancing_loss, top_k_gates, z_loss

_REWEIGHTING = (BasePruningMethod, SpectralNorm, WeightNorm)  # hooks that make weights out of other tensors
_REPLACED: 'weakref.WeakKeyDictionary[nn.Module, nn.Module]' = weakref.WeakKeyDictionary()


class MoELayer(Protocol):
    """A MoE layer, ours or anybody's: a module that holds experts and maps `(..., D) -> (..., D)`.

    Where the experts are made of 1x1 convolutions it maps `(B, D, height, width)` to the same.

    What else it may have, and what that means:

    - `fuse()`: in `eval()` the layer computes with the mean of its experts, which this returns as a new module
      (random partition).
    - `deviations`: an `nn.ModuleList` of `E` modules, what the pull moves in the place of `experts`; these are then not
      held but made when asked for, as copies, so ask `pulled` for their number.
    - `router`: a module that maps tokens `(T, D)` to logits `(T, E)` (gated); with it `top_k` (1 where it is missing)
      and `renormalise` (True where it is missing). Or a method `route(tokens)`, see `route`.
    - `shared`: an `nn.ModuleList` of experts that every token passes through, unscaled.
    - `expert_ratio`: `1/m` where `m` experts are as wide as the dense FFN (1 where it is missing).
    """
    experts: nn.ModuleList
    training: bool

    def __call__(self, x: Tensor) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def named_parameters(self) -> Iterator[Tuple[str, nn.Parameter]]: ...

    def load_state_dict(self, state_dict: Dict[str, Tensor]) -> Any: ...

    def register_forward_pre_hook(self, hook: Callable) -> Any: ...

    def register_forward_hook(self, hook: Callable) -> Any: ...


def is_moe(module: nn.Module) -> bool:
    """Whether a module is a MoE layer, see `MoELayer`."""
    # its own: wrappers (torch.compile, PEFT) show the attributes of what they wrap as theirs
    held = (module._modules[key] for key in ('deviations', 'experts') if key in module._modules)
    return any(isinstance(experts, nn.ModuleList) and len(experts) > 0 for experts in held)


def moe_layers(model: nn.Module) -> Iterator[Tuple[str, MoELayer]]:
    """Names and modules of all MoE layers, in the order of `named_modules()`."""
    return ((name, cast(MoELayer, module)) for name, module in model.named_modules() if is_moe(module))


def pulled(layer: MoELayer) -> nn.ModuleList:
    """What the pull moves toward its mean, one module for each of the `E` experts: deviations if a layer has them."""
    return layer.deviations if hasattr(layer, 'deviations') else layer.experts


def kind(layer: MoELayer) -> str:
    """`'random'`, `'gated'`, or `'unknown'` of a layer that says nothing of how it combines its experts."""
    if getattr(layer, 'router', None) is not None or callable(getattr(layer, 'route', None)):
        return 'gated'
    return 'random' if callable(getattr(layer, 'fuse', None)) else 'unknown'


def is_gated(layer: MoELayer) -> bool:
    """Whether a router decides which expert sees a token."""
    return kind(layer) == 'gated'


def is_random(layer: MoELayer) -> bool:
    """Whether chance decides, so that the layer's `eval()` form is the mean of its experts."""
    return kind(layer) == 'random'


def renormalises(layer: MoELayer) -> bool:
    """Whether the gates of a token sum to 1."""
    return getattr(layer, 'renormalise', True)


def shared_experts(layer: MoELayer) -> List[nn.Module]:
    """The experts that every token passes through."""
    return list(getattr(layer, 'shared', None) or [])


def pieces(expert_ratio: float) -> int:
    """How many experts of hidden width `expert_ratio * H` make the dense FFN's `H`.

    Raises:
        ValueError: `expert_ratio` is not `1/m` for a whole number `m`.
    """
    count = round(1 / expert_ratio) if 0 < expert_ratio <= 1 else 0
    if not count or not math.isclose(count * expert_ratio, 1, rel_tol=1e-3):
        raise ValueError(f'expert_ratio must be 1/m for a whole number m >= 1, got {expert_ratio}.')
    return count


def layer_pieces(layer: MoELayer) -> int:
    """How many experts of a layer are as wide as the dense FFN."""
    return pieces(getattr(layer, 'expert_ratio', 1.0))


def takes_images(expert: nn.Module) -> bool:
    """Whether an expert is made of 1x1 convolutions: it takes tokens as `(B, D, height, width)`."""
    return any(isinstance(part, nn.Conv2d) for part in expert.modules())


def on_tokens(expert: nn.Module) -> nn.Module:
    """An expert as a module `(T, D) -> (T, D)`, of the same weights."""
    return nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), expert, nn.Flatten()) if takes_images(expert) else expert


def to_tokens(x: Tensor, images: bool) -> Tensor:
    """`(..., D)`, or `(B, D, height, width)` with `images`, -> `(T, D)`."""
    x = x.movedim(1, -1) if images else x
    return x.reshape(-1, x.shape[-1])


def from_tokens(tokens: Tensor, x: Tensor, images: bool) -> Tensor:
    """`(T, D)` -> the shape of the `x` that `to_tokens` was given, but for its width."""
    if images:
        return tokens.reshape(len(x), *x.shape[2:], tokens.shape[-1]).movedim(-1, 1)
    return tokens.reshape(*x.shape[:-1], tokens.shape[-1])


def _on_parts(experts: Iterable[Callable[[Tensor], Tensor]], parts: Iterable[Tensor], images: bool) -> Tensor:
    """What each expert makes of its part `(n, D)`, one under the other, `(T, D)`."""
    if images:
        return torch.cat([expert(part[:, :, None, None]).flatten(1) for expert, part in zip(experts, parts)])
    return torch.cat([expert(part) for expert, part in zip(experts, parts)])


def route(layer: MoELayer, tokens: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Gates `(T, k)`, experts `(T, k)` and logits `(T, E)` of a gated layer for tokens `(T, D)`.

    The layer's own method `route` of that form if it has one, else its `router`, see `MoELayer`.

    Raises:
        TypeError: The router returns something else.
    """
    if hasattr(layer, 'route'):
        return layer.route(tokens)
    logits = cast(Any, layer).router(tokens)
    if not isinstance(logits, Tensor) or logits.shape != (len(tokens), len(layer.experts)):
        raise TypeError(
            f'{type(layer).__name__}.router must map (T, D) to logits (T, E = {len(layer.experts)}); give the layer a '
            f'method route(tokens) -> gates (T, k), experts (T, k), logits (T, E).')
    gates, experts = top_k_gates(logits.float(), getattr(layer, 'top_k', 1), renormalises(layer))
    return gates, experts, logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in `eval()`; afterwards each module is in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_plain(experts: Iterable[nn.Module]) -> None:
    """Refuse experts whose weights are not what their parameters say: a mean of these is no mean of experts.

    Raises:
        ValueError: Weights that are computed from others (`torch.nn.utils.parametrize`, pruning masks, weight norm,
            adapters such as LoRA), or that are no parameters at all (packed by quantisation, replicas of
            `nn.DataParallel`). The message names the module and the way out.
    """
    for expert in experts:
        if next(expert.parameters(), None) is None:
            raise ValueError(
                f'An expert of type {type(expert).__name__} has no parameters: its weights are packed or it is a '
                f'replica of nn.DataParallel. Convert and evaluate the model itself, in floating point (on several '
                f'devices: DistributedDataParallel).')
        for name, module in expert.named_modules():
            where = f'{name or "it"} ({type(module).__name__})'
            if parametrize.is_parametrized(module):
                raise ValueError(
                    f'An expert has weights that are computed from others in {where}: merge them first with '
                    f'torch.nn.utils.parametrize.remove_parametrizations.')
            if any(isinstance(hook, _REWEIGHTING) for hook in module._forward_pre_hooks.values()):
                raise ValueError(
                    f'An expert has masked or normalised weights in {where}: make them permanent first with '
                    f'torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm.')
            if hasattr(module, 'base_layer') and callable(getattr(module, 'merge', None)):
                raise ValueError(
                    f'An expert has an adapter in {where}: merge it first (PEFT: model.merge_and_unload()).')
            packed = hasattr(module, '_packed_params') or any(  # torchao's tensors hold others, and so do sharded ones
                hasattr(p, '__tensor_flatten__') and not hasattr(p, 'to_local') for p in module.parameters(False))
            if packed:
                raise ValueError(f'An expert has packed weights in {where}: convert the model before quantising it.')


def is_plain(ffn: nn.Module) -> bool:
    """Whether the weights of an FFN are what its parameters say, see `check_plain`."""
    try:
        check_plain([ffn])
    except ValueError:
        return False
    return True


def mean_state(experts: Iterable[nn.Module]) -> Dict[str, Tensor]:
    """Name to mean over experts, for every parameter and buffer of an expert. Keeps the autograd graph."""
    experts = list(experts)
    parameters = [dict(expert.named_parameters()) for expert in experts]
    buffers = [dict(expert.named_buffers()) for expert in experts]
    result = {name: mean([state[name] for state in parameters]) for name in parameters[0]}
    for name, value in buffers[0].items():
        # infinite ones, as the bounds of a clip that does not clip, stay
        result[name] = torch.where(
            value.isfinite(), mean([state[name] for state in buffers]), value) if value.is_floating_point() else value
    return result


def are_alike(experts: Iterable[nn.Module]) -> bool:
    """Whether experts have the same parameters, name for name and shape for shape."""
    first, *others = [[(name, p.shape) for name, p in expert.named_parameters()] for expert in experts]
    return all(other == first for other in others)


def inherit_requires_grad(ffn: nn.Module, experts: Iterable[nn.Module]) -> None:
    """Let each parameter of an FFN that was made of experts be trainable if it is in any of them."""
    experts = list(experts)
    for name, parameter in ffn.named_parameters():
        parameter.requires_grad_(any(expert.get_parameter(name).requires_grad for expert in experts))


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; a ValueError of what torch can't copy, such as an output that a module has kept."""
    with foreign(f'{type(module).__name__} can\'t be copied', RuntimeError, TypeError):
        return deepcopy(module)


def fuse_experts(experts: Sequence[nn.Module]) -> nn.Module:
    """One new FFN whose weights are the mean of the experts'; it shares no storage with them.

    Raises:
        ValueError: The experts are of unequal shapes, or their weights are not plain parameters.
    """
    check_plain(experts)
    if not are_alike(experts):
        raise ValueError('Experts of unequal shapes have no mean; prune and do_acp take unequal hidden widths.')
    ffn = copied(experts[0])
    inherit_requires_grad(ffn, experts)
    with torch.no_grad():
        target = dict([*ffn.named_parameters(), *ffn.named_buffers()])
        for name, value in mean_state(experts).items():
            target[name].copy_(value)
    return ffn


class RandomPartitionMoE(nn.Module):
    """A MoE whose tokens are split among the experts at random; a plain FFN for everyone but the optimizer.

    `train()`: a fresh random uniform partition over all tokens of the batch at every call; each token passes through
    exactly one expert, unscaled. `eval()`: the FFN with the mean weights, the very FFN that `fuse()` returns.

    `timm.models.reparameterize_model` and `torch.jit.script` see the fused FFN (scripting replaces the layer in the
    model it is given, as it does for everything that prepares itself for scripting).

    Paper: Experts Weights Averaging, arXiv 2308.06093.

    Args:
        experts: `E >= 2` FFNs of one architecture that map `(T, D) -> (T, D)` row by row.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if len(self.experts) < 2:
            raise ValueError(f'A MoE layer needs at least 2 experts, got {len(self.experts)}.')
        self.takes_images = takes_images(self.experts[0])
        self.train(self.experts[0].training)

    def expert_functions(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """`E` functions `(n, D) -> (n, D)`, for the tokens of each part; override here.

        Of 1x1 convolutions `(n, D, 1, 1) -> (n, D, 1, 1)`.
        """
        return self.experts

    def mean_function(self, x: Tensor) -> Tensor:
        """The FFN with the mean weights, `(..., D) -> (..., D)`; override here."""
        if not torch.compiler.is_compiling():
            check_plain(self.experts)
        return functional_call(self.experts[0], mean_state(self.experts), (x,))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`; of 1x1 convolutions `(B, D, height, width)` to the same."""
        if not self.training:
            return self.mean_function(x)
        experts = self.expert_functions()
        tokens = to_tokens(x, self.takes_images)
        index, inverse, sizes = random_partition(
            tokens.shape[0], len(experts), x.device, static=torch.compiler.is_compiling())
        parts = tokens.index_select(0, index).split(sizes)
        # an expert without tokens is called on zero rows: every parameter has a gradient, as DDP wants
        out = _on_parts(experts, parts, self.takes_images)
        return from_tokens(out.index_select(0, inverse), x, self.takes_images)

    def fuse(self) -> nn.Module:
        """The dense FFN this layer computes with in `eval()`: a new module, the mean of the experts."""
        return fuse_experts(self.experts)

    def __prepare_scriptable__(self) -> nn.Module:
        ffn = self.fuse()
        # torch.jit.script remembers what it replaced by id(): if this layer were freed, another module could get its id
        # and be taken for it
        _REPLACED[ffn] = self
        return ffn

    def extra_repr(self) -> str:
        return 'router=random'


class MeanFormMoE(RandomPartitionMoE):
    """A random-partition MoE in mean coordinates: its parameters are the mean FFN and `E` deviations from it.

    With the mean `M`, deviations `D_i` and the spread `s`, for each parameter of the FFN, expert `i` is

        W_i = M + s * (D_i - mean_j D_j)

    so the gradient of `M` is the sum over all tokens, as that of the dense FFN, and the gradient of `D_i` is
    `s * (g_i - mean_j g_j)` with that of expert `i` in `g_i`. The weights of experts are computed in each forward pass
    in training and not kept. `eval()`: the FFN `mean` itself.

    Differs from `RandomPartitionMoE` by: state-dict keys `mean.` and `deviations.<i>.`; `experts` are copies, computed
    when asked for; in `eval()` the deviations have no gradient.

    Args:
        experts: `E >= 2` FFNs of one architecture that map `(T, D) -> (T, D)` row by row; equal ones have deviations of
            zero. The first becomes the module `mean`; of the others only the weights are used.
        spread: `s >= 0`.

    Raises:
        ValueError: Fewer than 2 experts, a spread out of its range, or unequal experts with `spread=0`.
    """

    def __init__(self, experts: Iterable[nn.Module], spread: float = 1.) -> None:
        super().__init__(experts)
        if not 0 <= spread < math.inf:
            raise ValueError(f'spread must be a number of at least 0, got {spread}.')
        experts = self._modules.pop('experts')
        self.mean = experts[0]
        self.deviations = nn.ModuleList(deepcopy(expert) for expert in experts)
        self.spread = float(spread)
        mean = mean_state(experts)
        with torch.no_grad():
            for deviation in self.deviations:
                for name, d in deviation.named_parameters():
                    d.sub_(mean[name])
                    if spread:
                        d.div_(spread)
                    elif bool(d.any()):
                        raise ValueError('Experts that start unequal need a spread above 0.')
            for name, m in self.mean.named_parameters():
                m.copy_(mean[name])

    def expert_states(self) -> List[Dict[str, Tensor]]:
        """Name to weight `W_i`, for each expert. Keeps the autograd graph."""
        if not torch.compiler.is_compiling():
            check_plain([self.mean, *self.deviations])
        states: List[Dict[str, Tensor]] = [{} for _ in self.deviations]
        for name, m in self.mean.named_parameters():
            deviations = [deviation.get_parameter(name) for deviation in self.deviations]
            base = torch.add(m, sum(deviations[1:], deviations[0]), alpha=-self.spread / len(deviations))
            for state, d in zip(states, deviations):
                state[name] = torch.add(base, d, alpha=self.spread)
        return states

    @property
    def experts(self) -> nn.ModuleList:
        """New FFNs with the weights of the experts."""
        with torch.no_grad():
            states = self.expert_states()
            experts = nn.ModuleList(copied(self.mean) for _ in states)
            for expert, state in zip(experts, states):
                for name, p in expert.named_parameters():
                    p.copy_(state[name])
        return experts

    def expert_functions(self) -> Sequence[Callable[[Tensor], Tensor]]:
        return [partial(functional_call, self.mean, state) for state in self.expert_states()]

    def mean_function(self, x: Tensor) -> Tensor:
        return self.mean(x)

    def fuse(self) -> nn.Module:
        """The dense FFN this layer computes with in `eval()`: a copy of `mean`."""
        return copied(self.mean)

    def extra_repr(self) -> str:
        return f'router=random, form=mean, spread={self.spread:g}'


class TopKMoE(nn.Module):
    """A gated MoE: a linear router sends each token to its `k` best experts; no token is dropped.

    `y = sum_shared s(x) + sum_{e in top-k(x)} g_e(x) * f_e(x)`. Routing is computed in float32. It also routes in
    `eval()`, so it has no `fuse()`: turning it into one FFN changes its outputs (see `ewa.to_dense`).

    After a forward pass in training `losses` holds the differentiable `load_balance` and `z` terms, see
    `routing_losses`; and after every pass `counts` holds the assignments of each expert in it, `(E,)`.

    Args:
        experts: `E >= 2` FFNs that map `(T, D) -> (T, D)` row by row.
        width: `D`.
        top_k: Experts a token, 1 to `E`.
        renormalise: Make the gates of a token sum to 1.
        shared: FFNs that every token passes through, unscaled.
        expert_ratio: `1/m` where `m` experts are as wide as the dense FFN.
    """

    def __init__(
            self,
            experts: Iterable[nn.Module],
            width: int,
            top_k: int = 2,
            renormalise: bool = True,
            shared: Iterable[nn.Module] = (),
            expert_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if len(self.experts) < 2:
            raise ValueError(f'A MoE layer needs at least 2 experts, got {len(self.experts)}.')
        if not 1 <= top_k <= len(self.experts):
            raise ValueError(f'top_k must be between 1 and the number of experts {len(self.experts)}, got {top_k}.')
        reference = next(self.experts[0].parameters())
        self.router = nn.Linear(width, len(self.experts), bias=False, device=reference.device, dtype=reference.dtype)
        nn.init.normal_(self.router.weight, std=0.02)
        shared = list(shared)
        if shared:
            self.shared = nn.ModuleList(shared)
        self.top_k = top_k
        self.renormalise = renormalise
        self.expert_ratio = expert_ratio
        self.takes_images = takes_images(self.experts[0])
        self.losses: Dict[str, Tensor] = {}
        self.counts: Optional[Tensor] = None
        self.train(self.experts[0].training)

    def route(self, tokens: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Gates `(T, k)`, experts `(T, k)` and logits `(T, E)` of tokens `(T, D)`."""
        if tokens.is_meta:
            raise ValueError('A gated MoE layer routes tokens by their values, and on the meta device they have none.')
        with torch.autocast(tokens.device.type, enabled=False):
            bias = None if self.router.bias is None else self.router.bias.float()  # of routers by others
            logits = nn.functional.linear(tokens.float(), self.router.weight.float(), bias)
            gates, experts = top_k_gates(logits, self.top_k, self.renormalise)
        return gates, experts, logits

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`; of 1x1 convolutions `(B, D, height, width)` to the same."""
        tokens = to_tokens(x, self.takes_images)
        gates, experts, logits = self.route(tokens)
        self.counts = torch.bincount(experts.reshape(-1), minlength=len(self.experts)).detach()
        self.losses = {}
        if self.training:
            self.losses = {'load_balance': load_balancing_loss(logits, experts), 'z': z_loss(logits)}

        order, sizes = dispatch(experts, len(self.experts))
        rows = order // self.top_k
        parts = tokens.index_select(0, rows).split(sizes)
        routed = _on_parts(self.experts, parts, self.takes_images)
        routed = routed * gates.reshape(-1, 1).index_select(0, order).to(routed.dtype)
        out = torch.zeros(tokens.shape[0], routed.shape[-1], dtype=routed.dtype, device=x.device)
        out = out.index_add(0, rows, routed)
        for expert in shared_experts(self):
            out = out + on_tokens(expert)(tokens)
        return from_tokens(out, x, self.takes_images)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError('A gated MoE layer can\'t be scripted; convert the model with ewa.to_dense first.')

    def __getstate__(self) -> Dict:
        # the losses carry an autograd graph, which can be neither copied nor pickled
        return {**self.__dict__, 'losses': {}, 'counts': None}

    def extra_repr(self) -> str:
        return f'router=topk, top_k={self.top_k}, renormalise={self.renormalise}'


# what `to_moe(router=NAME)` makes of a list of experts: NAME -> factory
ROUTERS: Dict[str, Callable[..., nn.Module]] = {'random': RandomPartitionMoE, 'topk': TopKMoE}


def register_router(name: str, factory: Callable[[List[nn.Module]], nn.Module]) -> None:
    """Make a MoE layer of your own known to `ewa.to_moe(router=name)`, `train.py --router name` and saved models.

    Args:
        name: In small letters, e.g. `'whole-images'`.
        factory: Called as `factory(experts)` with `E` FFNs, returns a module that holds them as `experts`; for
            instance a subclass of `RandomPartitionMoE` with another `forward`.

    Raises:
        ValueError: The name is taken by another factory.
    """
    if ROUTERS.setdefault(name, factory) is not factory:
        raise ValueError(f'There is a router {name!r} already: {ROUTERS[name].__name__}.')


def routing_losses(model: nn.Module) -> Dict[str, Tensor]:
    """The mean over gated layers of each auxiliary loss of the last forward pass in training.

    Returns:
        `{'load_balance': scalar, 'z': scalar}`, differentiable; empty when the model has no gated layer or is in
        `eval()`. Add them to the task loss, for instance with weights 0.01 and 0.001.

    Raises:
        RuntimeError: A gated layer in training has nothing to differentiate: the forward pass was that of another
            module object (a copy), or its graph was thrown away (gradient checkpointing with `use_reentrant=True`).
    """
    losses: Dict[str, List[Tensor]] = {}
    for name, layer in moe_layers(model):
        if not isinstance(layer, TopKMoE):
            continue
        expected = layer.training and torch.is_grad_enabled() and any(
            p.requires_grad for p in layer.router.parameters())
        if expected and not layer.losses:
            raise RuntimeError(
                f'{name} has no routing losses: this module object has done no forward pass in training. Call '
                f'routing_losses after it, with the module that computed it (not with a copy).')
        if expected and not all(value.requires_grad for value in layer.losses.values()):
            raise RuntimeError(
                f'The routing losses of {name} carry no graph, so the router would not learn from them. With gradient '
                f'checkpointing use use_reentrant=False; otherwise run the forward pass with gradients enabled.')
        for key, value in layer.losses.items():
            losses.setdefault(key, []).append(value)
    return {name: torch.stack(values).mean() for name, values in losses.items()}
