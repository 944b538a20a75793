"""From a dense host to a MoE model: which FFNs become MoE layers, and the initial weights of their experts.

Axis legend: `E` experts, `H` hidden width, `D` width.
"""
import inspect
import math
import re
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union, cast

import torch
from timm.models import register_notrace_module
from torch import nn

from .ffn import Layout, block_of, build_ffn, find_ffns, layout_of, outside_blocks, read_ffn, runs_again, select_ffns
from .gathering import FFNWeights, take
from .identity import describe_moe
from .moe import ROUTERS, MeanFormMoE, RandomPartitionMoE, TopKMoE, check_plain, is_moe, moe_layers, pieces

# which divide work over processes
_WRAPPERS = ('DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule')


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


def _initial_experts(ffn: nn.Module, count: int, cut: int, init: str) -> List[nn.Module]:
    """`count` FFNs of hidden width `H / cut` made from a dense one, which is reused as the first if it fits."""
    experts = []
    if cut == 1 and init == 'copy':
        return [ffn, *(deepcopy(ffn) for _ in range(count - 1))]
    dense = read_ffn(ffn)
    for i in range(count):
        weights = dense
        if cut > 1:
            hidden = dense.hidden // cut
            start = i % cut * hidden
            weights = take(dense, torch.arange(start, start + hidden, device=dense.down.device))
            if weights.down_bias is not None:
                # so that the `cut` slices of the dense FFN add up to it
                weights = replace(weights, down_bias=weights.down_bias / cut)
        if init == 'independent' and i > 0:
            weights = _shuffled(weights)
        experts.append(ffn if weights is dense else build_ffn(ffn, weights))
    return experts


def _hooked(ffn: nn.Module) -> str:
    """The first part or parameter of an FFN that has hooks; empty if none has."""
    kinds = ('forward_pre', 'forward', 'backward_pre', 'backward', 'post_accumulate_grad')
    parts = [*ffn.named_modules(), *ffn.named_parameters()]
    return next((name or 'it' for name, part in parts if any(getattr(part, f'_{k}_hooks', None) for k in kinds)), '')


def to_moe(
        model: nn.Module,
        num_experts: int = 4,
        layers: Union[str, Sequence[int], Sequence[str]] = 'every:2',
        router: Union[str, Callable[[List[nn.Module]], nn.Module]] = 'random',
        init: str = 'copy',
        form: str = 'experts',
        spread: Optional[float] = None,
        top_k: Optional[int] = None,
        num_shared: int = 0,
        expert_ratio: float = 1.0,
        renormalise: bool = True,
) -> nn.Module:
    """Replace FFNs of a model by MoE layers, in place. Call it before the optimizer is made.

    State-dict keys are the dense ones with `experts.<i>.` inserted after the FFN's name:
    `blocks.1.mlp.fc1.weight` -> `blocks.1.mlp.experts.0.fc1.weight`; in the form `'mean'` with `mean.` or
    `deviations.<i>.` there.

    Args:
        model: Any model with token-wise FFNs, see `ewa.ffn`: of timm, torchvision, transformers, your own.
        num_experts: `E >= 2`.
        layers: Which FFNs: `'every:K'` (blocks K-1, 2K-1, ... counted from 0), `'last:K'`, `'all'`, a list of block
            indices, a list of module names, or a regular expression over FFN names.
        router: `'random'` (random uniform partition, for EWA: arXiv 2308.06093) or `'topk'` (gated). For layers of your
            own: a factory that is called with the list of `E` experts and returns the layer, or the name it has by
            `ewa.moe.register_router` (a model can be loaded again if its factory is registered under the name it has).
        init: `'copy'`: experts start as the dense FFN. `'independent'`: each expert beyond the first is a further draw
            from the host's initialisation, for a model that has not been trained.
        form: Random partition only: `'experts'`, each with parameters of its own as published, or `'mean'`, the mean
            FFN and deviations from it (`ewa.moe.MeanFormMoE`), which trains the mean as a dense FFN is trained.
        spread: Form `'mean'` only: `s >= 0`, what deviations are multiplied by, by default 0.3; under Adam it scales
            their learning rate, under SGD it acts squared.
        top_k: `'topk'` only: experts a token, 1 to `E`, by default 2.
        num_shared: Gated only: further experts that every token passes through.
        expert_ratio: Gated only: `1/m` makes all experts of hidden width `H/m`. They start as consecutive slices of
            the dense FFN's hidden units, cyclically, the routed ones first; each slice carries `1/m` of the output
            bias, so that `m` slices add up to the dense FFN.
        renormalise: Gated only: gates of a token sum to 1.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module.
        ValueError: Any argument out of its range, a model without FFNs or with MoE layers, an FFN whose copies
            would be no experts (it stands in several places, has hooks or computed weights, was compiled by itself).
            The model is untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch module, e.g. of timm.create_model, got {model!r}.')
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 2:
        raise ValueError(f'num_experts must be a whole number of at least 2, got {num_experts!r}.')
    if not callable(router) and (not isinstance(router, str) or router not in ROUTERS):
        raise ValueError(
            f'router must be {", ".join(map(repr, ROUTERS))} or a function of a list of experts, got {router!r}; make '
            f'a router of your own known with ewa.moe.register_router.')
    factory = router if callable(router) else ROUTERS[router]
    gated = factory is TopKMoE
    if form not in ('experts', 'mean'):
        raise ValueError(f"form must be 'experts' or 'mean', got {form!r}.")
    if spread is not None and form != 'mean':
        raise ValueError(f"spread={spread} does nothing with form={form!r}: leave it out, or give form='mean'.")
    if top_k is not None and not gated:
        raise ValueError(f"top_k={top_k} does nothing with router={router!r}: leave it out, or give router='topk'.")
    spread, top_k = 0.3 if spread is None else spread, 2 if top_k is None else top_k
    if form == 'mean':
        if factory is not RandomPartitionMoE:
            raise ValueError(f"form='mean' is a form of router='random', not of {router!r}.")
        if not 0 <= spread < math.inf or (spread == 0 and init == 'independent'):
            raise ValueError(f"spread must be at least 0, and above with init='independent', got {spread}.")
        factory = partial(MeanFormMoE, spread=spread)
    if init not in ('copy', 'independent'):
        raise ValueError(f"init must be 'copy' or 'independent', got {init!r}.")
    if num_shared < 0:
        raise ValueError(f'num_shared must be at least 0, got {num_shared}.')
    cut = pieces(expert_ratio)
    if not gated and (num_shared or cut > 1):
        raise ValueError(
            f"router={router!r} has neither shared nor fine-grained experts (num_shared={num_shared}, "
            f"expert_ratio={expert_ratio}): the mean of its experts must be the dense FFN. Use router='topk'.")
    if gated and not 1 <= top_k <= num_experts:
        raise ValueError(f'top_k must be between 1 and num_experts={num_experts}, got {top_k}.')
    converted = [name or type(model).__name__ for name, _ in moe_layers(model)]
    if converted:
        raise ValueError(
            f'The model already has MoE layers (what holds an nn.ModuleList called experts): {", ".join(converted)}. '
            f'Convert a dense model.')
    for name, part in model.named_modules():
        wrapper = next((base.__name__ for base in type(part).__mro__ if base.__name__ in _WRAPPERS), '')
        if wrapper:
            raise ValueError(
                f'{name or "The model"} was wrapped already ({wrapper}), and the wrapper knows the parameters that it '
                f'had then: call ewa.to_moe before.')
    names = select_ffns(model, layers)
    layouts = {name: cast(Layout, layout_of(model.get_submodule(name))) for name in names}
    for name, layout in layouts.items():
        if layout.hidden % cut:
            raise ValueError(f'expert_ratio=1/{cut} does not divide the hidden width {layout.hidden} of {name}.')
        if cut > 1 and layout.norm:
            raise ValueError(f'{name} has a norm over its hidden units and can\'t be cut: use expert_ratio=1.')
        if layout.others and (cut > 1 or init == 'independent'):
            raise ValueError(
                f'{name} has {" and ".join(layout.others)} beside its maps, so its hidden units can\'t be taken apart: '
                f"use expert_ratio=1 and init='copy'.")
    holders = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name in names:
        if name.endswith('._orig_mod'):  # the compiled module would go on calling what it was made of
            raise ValueError(
                f'{name.removesuffix("._orig_mod")} can\'t become a MoE layer: it is compiled by itself: call '
                f'torch.compile after ewa.to_moe.')
        for key, part in model.get_submodule(name).named_modules():
            if holders[id(part)] > 1 and next(part.parameters(), None) is not None:
                where = f'{name}.{key}'.rstrip('.')
                raise ValueError(
                    f'{where} is used in several places of the model, so {name if key else "it"} can\'t become a MoE: '
                    f'leave it out.')
        try:
            check_plain([model.get_submodule(name)])
        except ValueError as e:
            raise ValueError(f'{name}: {e}') from e
        hooked = _hooked(model.get_submodule(name))
        if hooked:
            raise ValueError(
                f'{name}: {hooked} has hooks, which would see the tokens of one expert, or none: remove them, and '
                f'register them again after ewa.to_moe.')
        if form == 'mean' and runs_again(model.get_submodule(name)):
            raise ValueError(
                f'{name} runs its forward pass again in the backward pass (gradient checkpointing inside it), and by '
                f"then the weights of the mean form are gone: checkpoint the whole block, or use form='experts'.")
    owners: Dict[Tuple[bool, int], List[str]] = {}
    for owner, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_place(parameter), []).append(f'{owner}.{key}')
    for name in names:
        places = map(_place, model.get_submodule(name).parameters())
        shared = next((owners[place] for place in places if len(owners[place]) > 1), None)
        if shared:
            raise ValueError(
                f'{" and ".join(shared)} are one parameter; as experts they would no longer be. Leave {name} out.')
    left_out = outside_blocks(model) if isinstance(layers, str) and re.match('every:|last:|all$', layers) else []
    if left_out:
        warnings.warn(
            f'{", ".join(left_out)} stay dense: FFNs outside the blocks (class attention, pooling) see one token an '
            f'image. layers= takes their names.', stacklevel=2)
    _warn(model, layouts, gated, top_k, num_shared, cut, renormalise)

    layers_made: Dict[str, nn.Module] = {}
    for name in names:
        ffn = model.get_submodule(name)
        experts = _initial_experts(ffn, num_experts + num_shared, cut, init)
        if gated:
            layer = TopKMoE(
                experts[:num_experts], layouts[name].width, top_k, renormalise, experts[num_experts:], expert_ratio)
        else:
            layer = factory(experts)
            if not (isinstance(layer, nn.Module) and is_moe(layer)):
                raise ValueError(
                    f'router={router!r} must return a module that holds its experts in an nn.ModuleList called '
                    f'experts, got {type(layer).__name__}.')
        layers_made[name] = layer
    # nothing can go wrong from here on
    for name, layer in layers_made.items():
        register_notrace_module(type(layer))  # a leaf of FX graphs: its forward depends on data and on train() / eval()
        model.set_submodule(name, layer)

    args: Dict[str, Any] = dict(num_experts=num_experts, layers=layers if isinstance(layers, str) else list(layers))
    args['router'] = getattr(router, '__name__', type(router).__name__) if callable(router) else router
    if gated:
        args.update(top_k=top_k, num_shared=num_shared, expert_ratio=expert_ratio, renormalise=renormalise)
    if form == 'mean':
        args.update(form=form, spread=spread)
    describe_moe(model, args)
    return model


def _place(parameter: nn.Parameter) -> Tuple[bool, int]:
    """What two parameters have in common that are one or, tied by `.data`, have one memory."""
    plain = type(parameter) is nn.Parameter and parameter.numel() and not parameter.is_meta
    return (True, parameter.data_ptr()) if plain else (False, id(parameter))


def _warn(
        model: nn.Module,
        layouts: Dict[str, Layout],
        gated: bool,
        top_k: int,
        num_shared: int,
        cut: int,
        renormalise: bool,
) -> None:
    if gated and top_k == 1 and renormalise:
        warnings.warn(
            'top_k=1 with renormalise=True makes every gate 1, so the task does not train the router: use '
            'renormalise=False (train.py: --model-kwargs renormalise=False).', stacklevel=3)
    normed = next((name for name, layout in layouts.items() if layout.norm), None)
    if num_shared and normed:
        warnings.warn(
            f'{normed} has a norm over its hidden units, so shared and routed experts can\'t become one FFN: this MoE '
            f'can\'t be converted to a dense model. Use num_shared=0.', stacklevel=3)
    elif num_shared >= cut and getattr(model, 'pretrained_cfg', None) and any(
            block_of(name) and name not in layouts for name in find_ffns(model)):
        warnings.warn(
            f'{num_shared} shared expert(s) of 1/{cut} of the hidden width leave no room for routed ones in a dense '
            f'FFN of the width that the other blocks have: this MoE can\'t be converted to a dense model. Use '
            f'expert_ratio=1/m with m > num_shared, or layers="all".', stacklevel=3)


# the names of `to_moe`'s arguments
ARGUMENTS = tuple(inspect.signature(to_moe).parameters)[1:]
