"""The pull: experts move toward their mean.

Axis legend: `E` experts.

Paper: Experts Weights Averaging, arXiv 2308.06093. With the share rate `r`, for all experts at once and from their old
values:

    W_i <- (1 - r) * W_i + r / (E-1) * sum_{j != i} W_j

which is `lerp(W_i, mean, r * E / (E-1))`: the mean stays, each deviation from it shrinks by `1 - r * E / (E-1)`.
"""
from typing import Dict, Iterator, List, Sequence

import torch
from torch import Tensor


def max_share_rate(num_experts: int) -> float:
    """`(E-1)/E`: the share rate that makes all experts equal at once; more would overshoot."""
    return (num_experts - 1) / num_experts


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, in the same storage; else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


@torch.no_grad()
def pull_(experts: Sequence[Sequence[Tensor]], share_rate: float, seed: int) -> None:
    """Pull experts toward their mean, in place.

    bfloat16 and float16 tensors are computed in float32 and rounded stochastically, so that a small share rate does not
    round away. Equal experts stay equal to the bit. Of sharded tensors (DTensor) each process pulls its own shards: no
    communication.

    Args:
        experts: `E >= 2` lists of tensors; the n-th tensors of all experts are of one shape, dtype and device, and
            sharded alike.
        share_rate: `r`, 0 to `(E-1)/E`.
        seed: Of the random bits of the rounding. Replicas that give the same one stay equal.
    """
    weight = min(1., share_rate * len(experts) / (len(experts) - 1))
    experts = [[local(tensor) for tensor in tensors] for tensors in experts]
    half = [i for i, tensor in enumerate(experts[0]) if tensor.dtype in (torch.bfloat16, torch.float16)]
    full = [i for i, tensor in enumerate(experts[0]) if tensor.dtype not in (torch.bfloat16, torch.float16)]
    for part in _in_goes([[tensors[i] for i in full] for tensors in experts]):
        _lerp_to_mean(part, weight)
    generators: Dict[torch.device, torch.Generator] = {}
    for i in half:
        # one tensor at a time, to keep the float32 copies small
        stack = [[tensors[i].float()] for tensors in experts]
        _lerp_to_mean(stack, weight)
        value = stack[0][0]
        if value.device not in generators:
            generators[value.device] = torch.Generator(value.device).manual_seed(seed)
        # one noise for all experts, so that equal values stay equal
        noise = torch.rand(value.shape, device=value.device, generator=generators[value.device])
        for tensors, (value,) in zip(experts, stack):
            tensors[i].copy_(stochastic_round(value, tensors[i].dtype, noise))


def _in_goes(experts: List[List[Tensor]]) -> Iterator[List[List[Tensor]]]:
    """The elements of all experts in goes of about as many: what a go allocates does not grow with the model.

    On a CPU a go stays in its caches, so that each weight comes from memory once.
    """
    go: List[List[Tensor]] = [[] for _ in experts]
    count = 0
    for tensors in zip(*experts):
        limit = 2 ** 17 if tensors[0].device.type == 'cpu' else 2 ** 24
        large = tensors[0].numel() > limit and all(tensor.is_contiguous() for tensor in tensors)
        for pieces in zip(*(tensor.view(-1).split(limit) for tensor in tensors)) if large else (tensors,):
            if count and count + pieces[0].numel() > limit:
                yield go
                go, count = [[] for _ in experts], 0
            for part, piece in zip(go, pieces):
                part.append(piece)
            count += pieces[0].numel()
    if count:
        yield go


def _lerp_to_mean(experts: List[List[Tensor]], weight: float) -> None:
    # mean = W_0 + sum_i (W_i - W_0) / E: equal experts are their own mean to the bit
    total = torch._foreach_sub(experts[1], experts[0])
    for tensors in experts[2:]:
        torch._foreach_add_(total, torch._foreach_sub(tensors, experts[0]))
    mean = torch._foreach_add(experts[0], total, alpha=1 / len(experts))
    for tensors in experts:
        torch._foreach_lerp_(tensors, mean, weight)


def stochastic_round(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 `values` to one of their two neighbours in `dtype`, to each with its probability.

    The expected result is the value itself, so changes far below the resolution of `dtype` add up over many steps
    where rounding to nearest would drop every one of them.

    Args:
        values: float32, of any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        noise: Uniform in [0, 1), of the shape of `values`.
    """
    digits, smallest = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
    exponent = torch.frexp(values).exponent
    unit = torch.ldexp(torch.ones_like(values), (exponent - digits).clamp(min=smallest))
    scaled = values / unit
    below = scaled.floor()
    # compared rather than added: a sum would be rounded itself, and lift values that need no rounding
    return ((below + (noise < scaled - below)) * unit).to(dtype)
