r"""Checkpoints whose experts are stacked tensors, `(E, H, D)`, as other MoE libraries write them.

Axis legend: `E` experts, `H` hidden width, `D` width.

A layout is a table from a regular expression over keys to where one expert's slice goes: `\1` is the name of the FFN
in the host, `{e}` the number of the expert; `None` drops the key. With `transpose`, a slice `(H, D)` becomes `(D, H)`.
To read another library's files, write such a table and pass it to `unstack`.
"""
import re
from typing import Dict, NamedTuple, Optional

from torch import Tensor


class Target(NamedTuple):
    """Where a stacked tensor goes."""
    key: Optional[str]
    transpose: bool = False


# tutel's FFN experts and top gate, as in Swin-MoE: both matrices are (E, H, D), so fc2 is the transposed one
TUTEL: Dict[str, Target] = {
    r'(.+?)\._moe_layer\.experts\.batched_fc1_w': Target(r'\1.experts.{e}.fc1.weight'),
    r'(.+?)\._moe_layer\.experts\.batched_fc1_bias': Target(r'\1.experts.{e}.fc1.bias'),
    r'(.+?)\._moe_layer\.experts\.batched_fc2_w': Target(r'\1.experts.{e}.fc2.weight', transpose=True),
    r'(.+?)\._moe_layer\.experts\.batched_fc2_bias': Target(r'\1.experts.{e}.fc2.bias'),
    r'(.+?)\._moe_layer\.gates\.0\.wg\.weight': Target(r'\1.router.weight'),
    r'(.+?)\._moe_layer\._num_global_experts': Target(None),
}


def unstack(state_dict: Dict[str, Tensor], layout: Dict[str, Target] = TUTEL) -> Dict[str, Tensor]:
    """Split stacked experts into one entry an expert; keys that are not of the layout stay as they are.

    Args:
        state_dict: Weights, e.g. of a Swin-MoE checkpoint (all experts gathered into one file).
        layout: Table from key pattern to target.

    Returns:
        Keys of this package: `NAME.experts.<i>.fc1.weight`, ..., `NAME.router.weight`.

    Raises:
        ValueError: Tensors of one layer are stacked over different numbers of experts.
    """
    result: Dict[str, Tensor] = {}
    counts: Dict[str, int] = {}
    for key, value in state_dict.items():
        match, target = None, Target(key)
        for pattern, candidate in layout.items():
            match = re.fullmatch(pattern, key)
            if match:
                target = candidate
                break
        if target.key is None:
            continue
        name = match.expand(target.key) if match else key
        if not match or '{e}' not in name:
            result[name] = value
            continue
        layer = match.group(1)
        if counts.setdefault(layer, len(value)) != len(value):
            raise ValueError(f'{key} stacks {len(value)} experts, other tensors of {layer} {counts[layer]}.')
        for e, part in enumerate(value):
            result[name.replace('{e}', str(e))] = (part.T if target.transpose else part).contiguous()
    return result
