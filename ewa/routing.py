"""Gates and auxiliary losses of a top-k router.

Axis legend: `T` tokens, `E` experts, `k` experts a token is sent to.
"""
from typing import List, Tuple

import torch
from torch import Tensor


def top_k_gates(logits: Tensor, top_k: int, renormalise: bool = True) -> Tuple[Tensor, Tensor]:
    """The `k` experts of each token and their gates.

    With `p = softmax(logits)`, gates are `p_e / sum_selected p` (the softmax over the selected logits, so they sum
    to 1) or the raw `p_e`.

    Args:
        logits: `(T, E)` router outputs, float32 or wider.
        top_k: `k`, 1 to `E`.
        renormalise: Make the gates of a token sum to 1.

    Returns:
        gates: `(T, k)`, differentiable.
        experts: `(T, k)` indices, by falling gate.
    """
    top, experts = logits.topk(top_k, dim=-1)
    gates = top.softmax(dim=-1) if renormalise else (top - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return gates, experts


def dispatch(experts: Tensor, num_experts: int) -> Tuple[Tensor, List[int]]:
    """Sort the `T * k` assignments by expert, so that every expert reads one contiguous segment.

    Args:
        experts: `(T, k)` indices of the chosen experts.
        num_experts: `E`.

    Returns:
        order: `(T * k,)` assignment (token `order // k`) of each row of the dispatched batch; a stable sort.
        sizes: Assignments of each expert, `E` ints that sum to `T * k`. No token is dropped.
    """
    flat = experts.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts).tolist()


def load_balancing_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """`E * sum_e f_e * P_e`, with `f_e` the share of assignments and `P_e` the mean probability of expert `e`.

    1 when both are uniform. Switch Transformers (arXiv 2101.03961, eq. 4), here with `f` over all `k` choices.

    Args:
        logits: `(T, E)`.
        experts: `(T, k)` indices.
    """
    num_experts = logits.shape[-1]
    share = torch.bincount(experts.reshape(-1), minlength=num_experts).to(logits.dtype) / max(experts.numel(), 1)
    return num_experts * (share * logits.softmax(dim=-1).mean(dim=0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-partition of the router, which keeps its logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits: `(T, E)`.
    """
    return logits.logsumexp(dim=-1).square().mean()
