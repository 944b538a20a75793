"""The FFNs of a host: which modules they are, in which blocks, and their weights by hidden units.

Axis legend: `G` 1 for a plain FFN or 2 for a GLU (its two input matrices), `H` hidden width, `D` width.

Known are timm's `Mlp`, `GluMlp` (`SwiGLUPacked`), `SwiGLU` and everything built like them: linear layers `fc1` (or
`fc1_g` and `fc1_x`) and `fc2` from width to width, perhaps a `norm` over the hidden units, and no other parameter. An
FFN that mixes tokens (depth-wise convolution, spatial gate, global response norm) has more and is left alone; so are
the two-layer perceptrons of classifiers and relative position biases, whose output has another width.
"""
import re
from copy import deepcopy
from typing import Any, Dict, List, Sequence, Union

import torch
from torch import Tensor, nn

from .gathering import FFNWeights


def _inputs(ffn: nn.Module) -> List[str]:
    return ['fc1_g', 'fc1_x'] if hasattr(ffn, 'fc1_g') else ['fc1']


def is_ffn(module: nn.Module) -> bool:
    """Whether a module is a token-wise FFN of a known layout."""
    linear = [*_inputs(module), 'fc2']
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in linear):
        return False
    hidden, width = module.fc2.in_features, module.fc2.out_features
    up = sum(getattr(module, name).out_features for name in linear[:-1])
    if up not in (hidden, 2 * hidden) or any(getattr(module, name).in_features != width for name in linear[:-1]):
        return False
    others = [(name, p) for name, p in module.named_parameters() if name.split('.')[0] not in linear]
    return all(name.startswith('norm.') and p.shape == (hidden,) for name, p in others)


def find_ffns(model: nn.Module) -> Dict[str, nn.Module]:
    """Name to module of all FFNs of a model, in its order."""
    # what looks alike: MLP-Mixer's token FFNs, which run over the tokens of a channel, and perceptrons that make
    # relative position biases of two heads from two coordinates
    return {
        name: module for name, module in model.named_modules()
        if is_ffn(module) and not name.endswith('mlp_tokens') and 'rel_pos' not in name}


def read_ffn(ffn: nn.Module) -> FFNWeights:
    """The weights of an FFN (detached views, no copy)."""
    if not is_ffn(ffn):
        raise ValueError(
            f'{type(ffn).__name__} is not an FFN this package can read: it needs linear layers fc1 (or fc1_g and '
            f'fc1_x) and fc2 and no other parameters than those of a norm.')
    hidden = ffn.fc2.in_features

    def grouped(name: str) -> Tensor:
        parts = [getattr(getattr(ffn, layer), name) for layer in _inputs(ffn)]
        return torch.cat([part.detach().reshape(-1, hidden, *part.shape[1:]) for part in parts])

    norm = [p.detach() for p in ffn.norm.parameters()] if hasattr(ffn, 'norm') else []
    return FFNWeights(
        up=grouped('weight'),
        down=ffn.fc2.weight.detach(),
        up_bias=None if getattr(ffn, _inputs(ffn)[0]).bias is None else grouped('bias'),
        down_bias=None if ffn.fc2.bias is None else ffn.fc2.bias.detach(),
        norm=torch.stack(norm) if norm else None,
    )


def hidden_activations(ffn: nn.Module, tokens: Tensor) -> Tensor:
    """What `fc2` of an FFN is given for tokens, (T, D) -> (T, H)."""
    kept: List[Tensor] = []
    handle = ffn.fc2.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        ffn(tokens)
    finally:
        handle.remove()
    return kept[0]


def build_ffn(template: nn.Module, weights: FFNWeights) -> nn.Module:
    """A new FFN of the template's type that holds the given weights; its hidden width may differ.

    Raises:
        ValueError: A norm over the hidden units stands in the way of another width.
    """
    ffn = deepcopy(template)
    if weights.hidden != ffn.fc2.in_features:
        if weights.norm is not None:
            raise ValueError('The hidden width of an FFN with a norm over its hidden units can\'t be changed.')
        dd = dict(device=ffn.fc2.weight.device, dtype=ffn.fc2.weight.dtype)
        per_layer = weights.hidden * len(weights.up) // len(_inputs(ffn))
        for name in _inputs(ffn):
            old = getattr(ffn, name)
            setattr(ffn, name, nn.Linear(old.in_features, per_layer, bias=old.bias is not None, **dd))
        ffn.fc2 = nn.Linear(weights.hidden, ffn.fc2.out_features, bias=ffn.fc2.bias is not None, **dd)
        ffn.train(template.training)
    inputs = [getattr(ffn, name) for name in _inputs(ffn)]
    with torch.no_grad():
        for layer, up in zip(inputs, weights.up.chunk(len(inputs))):
            layer.weight.copy_(up.reshape(layer.weight.shape))
        if weights.up_bias is not None:
            for layer, bias in zip(inputs, weights.up_bias.chunk(len(inputs))):
                layer.bias.copy_(bias.reshape(layer.bias.shape))
        ffn.fc2.weight.copy_(weights.down)
        if weights.down_bias is not None:
            ffn.fc2.bias.copy_(weights.down_bias)
        if weights.norm is not None:
            for parameter, value in zip(ffn.norm.parameters(), weights.norm):
                parameter.copy_(value)
    return ffn


def block_of(name: str) -> str:
    """The transformer block an FFN belongs to, or `''`.

    `layers.0.blocks.1.mlp` -> `layers.0.blocks.1`, `blocks.0.2.mlp` (Twins, which nests lists) -> `blocks.0.2`.
    """
    match = re.match(r'(.*\bblocks(?:\.\d+)+)(\.|$)', name)
    return match.group(1) if match else ''


def select_ffns(model: nn.Module, layers: Union[str, Sequence[int]]) -> List[str]:
    """Names of the FFNs that `layers` chooses.

    Args:
        model: A model with dense FFNs.
        layers: `'every:K'` (blocks K-1, 2K-1, ... counted from 0), `'last:K'`, `'all'`, a list of block indices, or a
            regular expression that is searched for in the names of FFNs.

    Raises:
        ValueError: No FFN at all, an index out of range, a pattern that matches nothing, an unknown form.
    """
    names = list(find_ffns(model))
    if not names:
        raise ValueError(
            f'{type(model).__name__} has no FFN to convert (linear layers fc1 and fc2 and no other parameters).')
    blocks = list(dict.fromkeys(block_of(name) for name in names if block_of(name)))
    if isinstance(layers, str) and not re.fullmatch(r'all|(every|last):.*', layers):
        try:
            chosen = [name for name in names if layers and re.search(layers, name)]
        except re.error as e:
            raise ValueError(
                f'layers={layers!r} is neither every:K, last:K, all nor a regular expression ({e}).') from e
        if not chosen:
            raise ValueError(f'layers={layers!r} matches no FFN. There are: {", ".join(names)}.')
        return chosen

    if not blocks:
        raise ValueError(
            f'{type(model).__name__} has FFNs but no numbered blocks, so layers={layers!r} can\'t count them; give a '
            f'regular expression. There are: {", ".join(names)}.')
    indices: List[Any]
    if isinstance(layers, str):
        kind, _, count = layers.partition(':')
        if kind != 'all' and not (count.isdigit() and 1 <= int(count) <= len(blocks)):
            raise ValueError(f'layers={layers!r}: K must be between 1 and the number of blocks {len(blocks)}.')
        if kind == 'every':
            indices = list(range(int(count) - 1, len(blocks), int(count)))
        else:
            indices = list(range(len(blocks) - int(count) if kind == 'last' else 0, len(blocks)))
    elif not isinstance(layers, Sequence):
        raise ValueError(f'layers={layers!r} is neither every:K, last:K, all, a list of indices nor a pattern.')
    else:
        indices = list(layers)
        bad = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(blocks)]
        if bad or not indices:
            raise ValueError(
                f'layers={indices}: {bad[0] if bad else "an empty list"} is not a block index between 0 and '
                f'{len(blocks) - 1}.')
    chosen_blocks = {blocks[i] for i in indices}
    return [name for name in names if block_of(name) in chosen_blocks]
