"""Checkpoints whose experts are stacked tensors, `(E, H, D)`, as other MoE libraries write them.

Axis legend: `E` experts, `H` hidden width, `D` width.

A layout is a table from a regular expression over keys, whose first group is the name of the FFN in the host, to what
lies there: which tensor of this package, and the axes it has in the file. To read another library's files, put such a
table into `LAYOUTS`.
"""
import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

# the tensors of a MoE layer and their axes: of one expert, and of a linear and of a cosine router (`P` its projection)
AXES = {
    'fc1.weight': 'HD', 'fc1.bias': 'H', 'fc2.weight': 'DH', 'fc2.bias': 'D',
    'router.weight': 'ED', 'router.bias': 'E',
    'router.projection.weight': 'PD', 'router.projection.bias': 'P', 'router.directions': 'PE', 'router.log_scale': '1',
}


class Stacked(NamedTuple):
    """A tensor of another library."""
    tensor: Optional[str]  # of `AXES`; None: nothing that is needed
    axes: Tuple[str, ...] = ()  # those it may have, one letter an axis, e.g. 'EHD'; '1' is an axis of size 1


Layout = Dict[str, Stacked]

LAYOUTS: Dict[str, Layout] = {
    # tutel/experts/ffn.py, tutel/gates/*.py; biases had one more axis in the versions that wrote Swin-MoE
    'tutel': {
        r'(.+?)(?:\._moe_layer)?\.experts\.batched_fc1_w': Stacked('fc1.weight', ('EHD',)),
        r'(.+?)(?:\._moe_layer)?\.experts\.batched_fc1_bias': Stacked('fc1.bias', ('EH', 'E1H')),
        r'(.+?)(?:\._moe_layer)?\.experts\.batched_fc2_w': Stacked('fc2.weight', ('EHD',)),
        r'(.+?)(?:\._moe_layer)?\.experts\.batched_fc2_bias': Stacked('fc2.bias', ('ED', 'E1D')),
        r'(.+?)(?:\._moe_layer)?\.gates\.0\.wg\.weight': Stacked('router.weight', ('ED',)),
        r'(.+?)(?:\._moe_layer)?\.gates\.0\.cosine_projector\.weight': Stacked('router.projection.weight', ('PD',)),
        r'(.+?)(?:\._moe_layer)?\.gates\.0\.cosine_projector\.bias': Stacked('router.projection.bias', ('P',)),
        r'(.+?)(?:\._moe_layer)?\.gates\.0\.sim_matrix': Stacked('router.directions', ('PE',)),
        r'(.+?)(?:\._moe_layer)?\.gates\.0\.temperature': Stacked('router.log_scale', ('1',)),
        r'(.+?)(?:\._moe_layer)?\._num_global_experts': Stacked(None),
    },
    # fmoe/transformer.py, fmoe/gates/naive_gate.py
    'fastmoe': {
        r'(.+?)\.experts\.htoh4\.weight': Stacked('fc1.weight', ('EHD',)),
        r'(.+?)\.experts\.htoh4\.bias': Stacked('fc1.bias', ('EH',)),
        r'(.+?)\.experts\.h4toh\.weight': Stacked('fc2.weight', ('EDH',)),
        r'(.+?)\.experts\.h4toh\.bias': Stacked('fc2.bias', ('ED',)),
        r'(.+?)\.gate\.gate\.weight': Stacked('router.weight', ('ED',)),
        r'(.+?)\.gate\.gate\.bias': Stacked('router.bias', ('E',)),
    },
    # vmoe/nn/vit_moe.py, names joined by dots
    'v_moe': {
        r'(.+?)\.Moe\.Mlp\.Dense_0\.kernel': Stacked('fc1.weight', ('EDH',)),
        r'(.+?)\.Moe\.Mlp\.Dense_0\.bias': Stacked('fc1.bias', ('EH',)),
        r'(.+?)\.Moe\.Mlp\.Dense_1\.kernel': Stacked('fc2.weight', ('EHD',)),
        r'(.+?)\.Moe\.Mlp\.Dense_1\.bias': Stacked('fc2.bias', ('ED',)),
        r'(.+?)\.Moe\.Router\.dense\.kernel': Stacked('router.weight', ('DE',)),
    },
}


class _Found(NamedTuple):
    key: str
    tensor: str  # of `AXES`
    pieces: List[Tensor]  # one a file, axes `E...` for experts
    shapes: List[Tuple[int, ...]]  # that they had in the file

    @property
    def is_router(self) -> bool:
        return self.tensor.startswith('router.')


def unstack(
        state_dict: Mapping[str, Tensor],
        layouts: Optional[Mapping[str, Layout]] = None,
        ranks: Sequence[Mapping[str, Tensor]] = (),
) -> Dict[str, Tensor]:
    """Split stacked experts into one entry an expert; keys that are of no layout stay as they are.

    Args:
        state_dict: Weights.
        layouts: Name to layout. Default: `LAYOUTS`.
        ranks: The stacked tensors of further files, one a rank in order, where experts are spread over ranks: whole
            experts, or each cut along `H` over consecutive ranks, as many as the router's number of experts tells.

    Returns:
        Keys of this package: `NAME.experts.<i>.fc1.weight`, ..., `NAME.router.weight`.

    Raises:
        ValueError: Stacked tensors of shapes that their layout does not have, that do not fit each other, or of no
            known layout. The message says what was found.
    """
    layouts = LAYOUTS if layouts is None else layouts
    layers: Dict[str, Dict[str, _Found]] = {}  # layer to key to what was found
    order: Dict[str, str] = {}  # key to its layer, '' for one that stays as it is
    for state in (state_dict, *ranks):
        for key, value in state.items():
            layer, name, stacked = _look_up(key, layouts)
            if stacked is None:
                if re.search(r'\.experts\.(?!\d)', key):
                    raise ValueError(
                        f'{key} {tuple(value.shape)} looks like stacked experts of a layout that is not known: it is '
                        f'none of {", ".join(layouts)}. Add a table for it to ewa.stacked.LAYOUTS.')
                order[key] = ''
            elif stacked.tensor is not None:
                order[key] = layer
                found = layers.setdefault(layer, {}).setdefault(key, _Found(key, stacked.tensor, [], []))
                found.pieces.append(_arrange(key, value, name, stacked))
                found.shapes.append(tuple(value.shape))
    split = {key: tensors for layer, found in layers.items() for key, tensors in _split(layer, found).items()}
    result: Dict[str, Tensor] = {}
    for key, layer in order.items():
        result.update(split[key] if layer else {key: state_dict[key]})
    return result


def _look_up(key: str, layouts: Mapping[str, Layout]) -> Tuple[str, str, Optional[Stacked]]:
    """The layer of a key, the name of its layout and what it is there, if it is of any."""
    for name, layout in layouts.items():
        for pattern, stacked in layout.items():
            match = re.fullmatch(pattern, key)
            if match:
                return match.group(1), name, stacked
    return '', '', None


def _arrange(key: str, value: Tensor, name: str, stacked: Stacked) -> Tensor:
    """A tensor with the axes that this package has, those of an expert after `E`."""
    assert stacked.tensor is not None
    wanted = AXES[stacked.tensor] if stacked.tensor.startswith('router.') else f'E{AXES[stacked.tensor]}'
    for axes in stacked.axes:
        if len(axes) == value.ndim and all(size == 1 for axis, size in zip(axes, value.shape) if axis == '1'):
            ones = [i for i, axis in enumerate(axes) if axis == '1' and '1' not in wanted]
            value = value.squeeze(ones)
            axes = ''.join(axis for i, axis in enumerate(axes) if i not in ones)
            return value.permute([axes.index(axis) for axis in wanted])
    raise ValueError(
        f'{key} has the shape {tuple(value.shape)}; the layout {name} has '
        f'{" or ".join(", ".join(axes).join("()") for axes in stacked.axes)} there.')


def _split(layer: str, entries: Dict[str, _Found]) -> Dict[str, Dict[str, Tensor]]:
    """What each key of a layer becomes."""
    counts = [found.pieces[0].shape[AXES[found.tensor].index('E')] for found in entries.values()
              if found.is_router and 'E' in AXES[found.tensor]]
    sizes = dict(E=counts[0] if counts else min(sum(map(len, found.pieces)) for found in entries.values()))
    result = {}
    for key, found in sorted(entries.items(), key=lambda item: item[1].tensor == 'fc2.bias'):  # after D is known
        parts = found.pieces[:1] if found.is_router else _experts(layer, found, sizes)
        for axis, size in zip(AXES[found.tensor], parts[0].shape):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f'The tensors of {layer} do not fit each other: ' + ', '.join(
                    f'{found.key} {" + ".join(map(str, found.shapes[:4]))}' + ' + ...' * (len(found.shapes) > 4)
                    for found in entries.values()) + '.')
        names = [found.tensor] if found.is_router else [f'experts.{e}.{found.tensor}' for e in range(sizes['E'])]
        result[key] = {f'{layer}.{name}': part.contiguous() for name, part in zip(names, parts)}
    return result


def _experts(layer: str, found: _Found, sizes: Dict[str, int]) -> List[Tensor]:
    """The pieces of a tensor as one tensor an expert."""
    slices = [part for piece in found.pieces for part in piece]
    cut, rest = divmod(len(slices), sizes['E'])
    if cut == 1 and not rest:
        return slices
    is_output = found.tensor == 'fc2.bias'
    if is_output and not any(part.any() for part in slices):
        # frozen at zero, and so not part of every rank's file
        return [slices[0].new_zeros(sizes.get('D', len(slices[0])))] * sizes['E']
    if rest or not cut or len(found.pieces) == 1:
        raise ValueError(
            f'{found.key} stacks {len(slices)} experts, other tensors of {layer} {sizes["E"]}; files of ranks may be '
            'missing.')
    axis = AXES[found.tensor].index('D' if is_output else 'H')
    joined = [torch.cat(slices[start:start + cut], axis) for start in range(0, len(slices), cut)]
    # ranks hold equal parts of D, so the last may be padded
    return [part[:sizes.get('D')] for part in joined] if is_output else joined
