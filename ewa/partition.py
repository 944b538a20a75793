"""Random uniform partition (RUP): which expert sees which token, with no router.

Axis legend: `T` tokens (all tokens of all images of a batch), `E` experts.

Paper: Experts Weights Averaging, arXiv 2308.06093, the section on MoE with random uniform partition.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor


def part_sizes(num_tokens: int, num_experts: int) -> List[int]:
    """Sizes of `E` parts of `T` tokens, the `T % E` larger ones first.

    Args:
        num_tokens: `T`, may be smaller than `E` or zero; some parts are then empty.
        num_experts: `E`.

    Returns:
        `E` sizes, each `T // E` or `T // E + 1`, that sum to `T`.
    """
    small, larger = num_tokens // num_experts, num_tokens % num_experts  # torch.compile can't trace divmod here
    return [small + 1] * larger + [small] * (num_experts - larger)


def random_partition(
        num_tokens: int,
        num_experts: int,
        device: Optional[torch.device] = None,
        static: bool = False,
) -> Tuple[Tensor, Tensor, List[int]]:
    """Draw a uniformly random partition of `T` tokens into `E` parts whose sizes differ by at most one.

    With `index, inverse, sizes = random_partition(T, E)`, expert `e` gets the `e`-th part of
    `tokens[index].split(sizes)`, and `torch.cat(outputs)[inverse]` puts the results back in token order. Which experts
    get the larger parts is drawn too. Everything is drawn from torch's global generators, so seeding them and
    replaying them (gradient checkpointing) works as for dropout.

    Args:
        num_tokens: `T`.
        num_experts: `E`.
        device: Where the index tensors live.
        static: Give all parts the static size `ceil(T / E)`, as a compiler needs: parts that are one token short are
            filled up with a token that belongs elsewhere, and `inverse` never reads that row back.

    Returns:
        index: `(sum(sizes),)` token of each row of the partitioned batch.
        inverse: `(T,)` row of each token.
        sizes: Rows of each part, `E` ints.
    """
    if num_tokens % num_experts == 0 or not static:
        index = torch.randperm(num_tokens, device=device)
        inverse = torch.empty_like(index).scatter_(0, index, torch.arange(num_tokens, device=device))
        sizes = part_sizes(num_tokens, num_experts)
        if num_tokens % num_experts:
            # drawn on the CPU: sizes are needed on the host, and reading them from a GPU would stall it
            sizes = [sizes[i] for i in torch.randperm(num_experts, device='cpu').tolist()]
        return index, inverse, sizes

    # `rows - 1` full rounds over the experts, then one last token each for the experts that come first in `order`
    rows = -(-num_tokens // num_experts)
    order = torch.randperm(num_experts, device=device)
    token = torch.randperm(num_tokens, device=device)
    slot = torch.arange(num_tokens, device=device)
    inverse = torch.empty_like(token).scatter_(0, token, order[slot % num_experts] * rows + slot // num_experts)
    index = torch.zeros(num_experts * rows, dtype=token.dtype, device=device).scatter_(
        0, inverse, torch.arange(num_tokens, device=device))
    return index, inverse, [rows] * num_experts
