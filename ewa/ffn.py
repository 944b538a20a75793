"""The FFNs of a host: which modules they are, in which blocks, and their weights by hidden units.

Axis legend: `G` 1 for a plain FFN or 2 for a GLU (its two input matrices), `H` hidden width, `D` width.

An FFN is found by what it does, whatever its parts are called: it is made of linear maps (or 1x1 convolutions) from
width to hidden units and back, of activations and perhaps of norms, and it treats each token by itself, which is tried
out on random tokens. timm's `Mlp`, `GluMlp`, `SwiGLU` and `ConvMlp` are such, torchvision's `MLPBlock`, the FFNs of
transformers, and a plain `nn.Sequential`. What mixes tokens (depth-wise convolution, batch norm, global response norm,
spatial gate) is none; nor is a perceptron whose output has another width, as in classifiers and position biases.
"""
import re
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .foreign import NotPossible
from .gathering import FFNWeights
from .moe import copied, is_plain, on_tokens


@dataclass(frozen=True)
class Layout:
    """The parts of an FFN by name.

    Args:
        inputs: Maps from the width to the hidden units: one, or the two of a GLU.
        output: The map back.
        width: `D`.
        hidden: `H`.
        norm: The norm over the hidden units; empty if there is none.
        others: What else there is, such as a norm at the input, buffers or a residual: with it the FFN can be
            averaged, but not read by hidden units.
        channels_first: Whether the maps are 1x1 convolutions, over `(B, D, height, width)`.
    """
    inputs: Tuple[str, ...]
    output: str
    width: int
    hidden: int
    norm: str = ''
    others: Tuple[str, ...] = ()
    channels_first: bool = False


def _map_size(module: nn.Module) -> Optional[Tuple[int, int]]:
    """Input and output width of a map that treats each token by itself, else None."""
    if hasattr(module, 'base_layer'):  # an adapter around a map
        return _map_size(module.base_layer)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d) and set(module.kernel_size) == set(module.stride) == {1} and module.groups == 1:
        return module.in_channels, module.out_channels
    return None


def _parts(module: nn.Module, prefix: str = '') -> List[Tuple[str, nn.Module]]:
    """Name and module of all parts that have parameters of their own, in order; a map is one part."""
    parts = []
    for name, child in module.named_children():
        name = f'{prefix}{name}'
        if _map_size(child) is not None or any(p is not None for p in child._parameters.values()):
            parts.append((name, child))
        else:
            parts += _parts(child, f'{name}.')
    return parts


_MIXES = 'it does not treat each token by itself'
_OF_ALL = frozenset(vars(nn.Module()))  # attributes that every module has
_TRIED: Dict[Tuple[str, type, Layout, str], Any] = {}  # question, type, parts and looks of a module -> answer


def _layout(module: nn.Module) -> Optional[Layout]:
    """The layout of what has the parts of an FFN, whether or not it treats each token by itself."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if any(p.dim() != 1 for p in own.values()) or hasattr(module, '_orig_mod'):
        return None
    parts = _parts(module)
    maps = [(name, part, *size) for name, part in parts if (size := _map_size(part)) is not None]
    if not 2 <= len(maps) <= 3:
        return None
    for at in reversed(range(len(maps))):  # the output is the last map, or the second of three as in LLaMA
        inputs = maps[:at] + maps[at + 1:]
        output, _, hidden, width = maps[at]
        if sum(up for *_, up in inputs) in (hidden, 2 * hidden) and all(size == width for _, _, size, _ in inputs):
            break
    else:
        return None
    kinds = {isinstance(getattr(part, 'base_layer', part), nn.Conv2d) for _, part, _, _ in maps}
    if len(kinds) > 1 or width < 4:  # two or three coordinates are no width: perceptrons that make position biases
        return None
    norm, others = '', list(own)
    for i, (name, part) in enumerate(parts):
        if _map_size(part) is not None:
            continue
        shapes = {p.shape for p in part.parameters()}
        if isinstance(part, nn.modules.batchnorm._NormBase) or any(len(shape) != 1 for shape in shapes):
            return None
        behind = i > [n for n, _ in parts].index(inputs[-1][0])
        if name.split('.')[-1] == 'norm' and behind and shapes == {torch.Size([hidden])} and not norm:
            norm = name
        else:
            others.append(name)
    others += [name for name, value in module.named_buffers() if value.dim()]
    if len({getattr(part, 'base_layer', part).bias is None for _, part, _, _ in inputs}) > 1:
        others.append('unlike biases')
    return Layout(
        tuple(name for name, *_ in inputs), output, width, hidden, norm, tuple(others), channels_first=kinds == {True})


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy in `eval()` with random weights in float32, without hooks, on the CPU."""
    copy = copied(module)
    if {*map(id, copy.parameters())} & {*map(id, module.parameters())}:
        raise TypeError('its copy shares parameters with it')
    copy = copy.to_empty(device='cpu') if any(p.is_meta for p in copy.parameters()) else copy.cpu()
    copy = copy.float().eval()
    for part in copy.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in copy.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel() if p.dim() else 1, 1) ** 0.5)
    return copy


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


def _try(module: nn.Module, layout: Layout) -> Union[Layout, str]:
    """What `_try_copy` finds."""
    try:
        return _try_copy(_bare_copy(module), layout)
    except (NotPossible, NotImplementedError, TypeError) as e:
        return f'it can\'t be copied and called with tokens alone ({" ".join(str(e).split())[:200]})'
    except Exception:  # a module of anybody's, called in a way that it was perhaps not made for
        return _MIXES


@torch.no_grad()
def _try_copy(copy: nn.Module, layout: Layout) -> Union[Layout, str]:
    """The layout of a copy that is given random tokens, with `others` where it does more than its maps do.

    Of what is no FFN the reason: it mixes tokens, or computes with weights that are not the copy's.
    """
    def run(tokens: Tensor) -> Tensor:
        return on_tokens(copy)(tokens.flatten(0, -2)).reshape(tokens.shape) if layout.channels_first else copy(tokens)

    x = torch.randn(2, 3, layout.width, generator=torch.Generator().manual_seed(1))
    image = x.movedim(-1, 1)[..., None] if layout.channels_first else x  # as the host calls it
    y = copy(image)
    if not isinstance(y, Tensor):
        return 'it does not return a tensor'
    y = y[..., 0].movedim(1, -1) if layout.channels_first else y
    changed = x.clone()
    changed[0, 0] += 1
    differs = (run(changed) != run(x)).any(-1)
    x = x.flatten(0, 1)
    alone = run(x)
    if not (y.shape == (2, 3, layout.width) and differs[0, 0] and differs.sum() == 1 and _near(alone, y.flatten(0, 1))):
        return _MIXES
    for p in copy.parameters():
        kept = p.clone()
        p.fill_(torch.nan)
        if torch.equal(run(x), alone):
            return ('a copy of it does not compute with all of its own parameters and only them (a function in it, '
                    'such as a replaced forward, may belong to the original)')
        p.copy_(kept)

    maps = [copy.get_submodule(name) for name in (*layout.inputs, layout.output)]
    calls: Dict[nn.Module, Tuple[Tensor, Tensor]] = {}
    for part in maps:
        part.register_forward_hook(  # clones, since activations may work in place
            lambda part, args, out: calls.update({part: (args[0].flatten(1).clone(), out.flatten(1).clone())}))
    run(x)
    inputs = [calls[part][0] for part in maps[:-1] if part in calls]
    if not all(torch.equal(tokens, inputs[0]) for tokens in inputs):  # three maps one after the other
        return _MIXES
    own_steps = replace(layout, others=layout.others or ('steps of its own',))
    if layout.others or len(calls) < len(maps):
        return own_steps

    # the output is that of the last map, each map is its matrix and bias, and a row of the first ones is a unit
    apart = _near(calls[maps[-1]][1], alone) and all(
        _near(out, nn.functional.linear(tokens, part.weight.flatten(1), part.bias))
        for part, (tokens, out) in calls.items())
    unit = min(1, layout.hidden - 1)
    before = calls[maps[-1]][0]
    for part in [] if layout.norm else maps[:-1]:
        for row in part.weight[unit::layout.hidden]:
            row += 1
            run(x)
            after = calls[maps[-1]][0]
            apart = apart and not bool((after != before).any(0).index_fill(0, torch.tensor(unit), False).any())
            before = after
    return layout if apart else own_steps


@torch.enable_grad()
def _runs_again(module: nn.Module, layout: Layout) -> bool:
    """Whether its gradients are others where weights stand in for its own as long as it is called, and no longer."""
    first, second = (_bare_copy(module).train().requires_grad_() for _ in range(2))
    weights = {name: (1.5 * p.detach().roll(1)).requires_grad_() for name, p in first.named_parameters()}
    with torch.no_grad():
        for w, p in zip(weights.values(), second.parameters()):
            p.copy_(w)
    x = torch.linspace(-1, 1, 6 * layout.width).sin().reshape(6, -1, *[1, 1] * layout.channels_first).requires_grad_()
    for call in (partial(functional_call, first, weights), second):
        torch.default_generator.manual_seed(0)
        (call(x) * x).sum().backward()
    gradients = [(w.grad, p.grad) for w, p in zip(weights.values(), second.parameters()) if p.grad is not None]
    return not all(a is not None and _near(a, b) for a, b in gradients)


def _tried(question: Callable[[nn.Module, Layout], Any], module: nn.Module, layout: Layout) -> Any:
    """The answer to a question about a module; that of another one of its type and looks, if there was one."""
    # modules of one class may differ by a flag or a function that their text does not show
    own = [{k: v for k, v in vars(part).items() if k not in _OF_ALL} for part in module.modules()]
    key = question.__name__, type(module), layout, f'{module}{own}'
    if key in _TRIED:
        return _TRIED[key]
    # whatever the caller has set up, such as models built on the meta device, under autocast or in inference mode
    with torch.device('cpu'), torch.random.fork_rng(devices=[]), torch.autocast('cpu', enabled=False), \
            torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        answer = question(module, layout)
    if ' at 0x' not in key[-1]:  # an address may be somebody else's tomorrow
        _TRIED[key] = answer
    return answer


def layout_of(module: nn.Module) -> Optional[Layout]:
    """The layout of an FFN, None for what is none."""
    layout = _layout(module)
    if layout is None or not is_plain(module):
        return layout  # what is not plain is refused where it would be converted, by name
    found = _tried(_try, module, layout)
    return found if isinstance(found, Layout) else None


def runs_again(ffn: nn.Module) -> bool:
    """Whether the forward pass of an FFN runs again in the backward pass: gradient checkpointing inside it."""
    layout = layout_of(ffn)
    return layout is not None and _tried(_runs_again, ffn, layout)


def is_ffn(module: nn.Module) -> bool:
    """Whether a module is an FFN whose weights can be read by hidden units."""
    layout = layout_of(module)
    return layout is not None and not layout.others


def find_ffns(model: nn.Module) -> Dict[str, nn.Module]:
    """Name to module of all FFNs of a model, in its order."""
    # MLP-Mixer's token FFNs run over the tokens of a channel; other perceptrons make relative position biases, or gates
    # of channels from the one mean token of an image (timm's GlobalContext)
    found = {
        name: module for name, module in model.named_modules()
        if name and not re.search(r'mlp_tokens$|rel_pos|\bmlp_(add|scale)\b', name) and layout_of(module) is not None}
    # of nested ones the innermost
    return {name: ffn for name, ffn in found.items() if not any(other.startswith(f'{name}.') for other in found)}


def describe_ffn(module: nn.Module) -> str:
    """Why a module is no FFN that can be converted, in words; empty if it is one."""
    if layout_of(module) is not None:
        return ''
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            return f'its {name} ({type(part).__name__}) takes statistics over tokens'
        if isinstance(part, nn.Conv2d) and _map_size(part) is None:
            return f'its {name} is a convolution over neighbouring tokens'
    if hasattr(module, '_orig_mod'):
        return 'it is compiled by itself: call torch.compile after ewa.to_moe'
    layout = _layout(module)
    if layout is None:
        return 'it is not made of maps from its width to hidden units and back'
    reason = str(_tried(_try, module, layout))
    holds = [name for part in [*module.modules()][1:] if 'norm' in (name := type(part).__name__).lower()]
    return reason + (f' (it holds a {holds[0]})' if reason == _MIXES and holds else '')


def _layout_to_read(ffn: nn.Module) -> Layout:
    layout = layout_of(ffn)
    if layout is None:
        raise ValueError(f'{type(ffn).__name__} is not an FFN this package can read: {describe_ffn(ffn)}.')
    if layout.others:
        raise ValueError(
            f'{type(ffn).__name__} has {" and ".join(layout.others)} beside its maps, so its hidden units can\'t be '
            f'taken apart: use average.')
    return layout


def read_ffn(ffn: nn.Module) -> FFNWeights:
    """The weights of an FFN (detached views, no copy).

    Raises:
        ValueError: It is none whose hidden units can be told apart.
    """
    layout = _layout_to_read(ffn)
    inputs = [ffn.get_submodule(name) for name in layout.inputs]
    output = ffn.get_submodule(layout.output)

    def grouped(name: str) -> Tensor:
        parts = [getattr(part, name).detach() for part in inputs]
        shape = (-1, layout.hidden) + (layout.width,) * (name == 'weight')
        return torch.cat([part.reshape(shape) for part in parts])

    norm = [p.detach() for p in ffn.get_submodule(layout.norm).parameters()] if layout.norm else []
    return FFNWeights(
        up=grouped('weight'),
        down=output.weight.detach().reshape(layout.width, layout.hidden),
        up_bias=None if inputs[0].bias is None else grouped('bias'),
        down_bias=None if output.bias is None else output.bias.detach(),
        norm=torch.stack(norm) if norm else None,
    )


def hidden_activations(ffn: nn.Module, tokens: Tensor) -> Tensor:
    """What the output map of an FFN is given for tokens, (T, D) -> (T, H)."""
    kept: List[Tensor] = []
    output = ffn.get_submodule(_layout_to_read(ffn).output)
    handle = output.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        on_tokens(ffn)(tokens)
    finally:
        handle.remove()
    return kept[0].flatten(1)


def build_ffn(template: nn.Module, weights: FFNWeights) -> nn.Module:
    """A new FFN of the template's type that holds the given weights; its hidden width may differ.

    Raises:
        ValueError: The template is no FFN that can be read, or a norm over the hidden units stands in the way of
            another width.
    """
    layout = _layout_to_read(template)
    ffn = deepcopy(template)
    if weights.hidden != layout.hidden:
        if weights.norm is not None:
            raise ValueError('The hidden width of an FFN with a norm over its hidden units can\'t be changed.')
        per_map = weights.hidden * len(weights.up) // len(layout.inputs)
        for name in layout.inputs:
            ffn.set_submodule(name, _resized(ffn.get_submodule(name), layout.width, per_map))
        ffn.set_submodule(layout.output, _resized(ffn.get_submodule(layout.output), weights.hidden, layout.width))
        ffn.train(template.training)
    inputs = [ffn.get_submodule(name) for name in layout.inputs]
    output = ffn.get_submodule(layout.output)
    with torch.no_grad():
        for part, up in zip(inputs, weights.up.chunk(len(inputs))):
            part.weight.copy_(up.reshape(part.weight.shape))
        if weights.up_bias is not None:
            for part, bias in zip(inputs, weights.up_bias.chunk(len(inputs))):
                part.bias.copy_(bias.reshape(part.bias.shape))
        output.weight.copy_(weights.down.reshape(output.weight.shape))
        if weights.down_bias is not None:
            output.bias.copy_(weights.down_bias)
        if weights.norm is not None:
            for parameter, value in zip(ffn.get_submodule(layout.norm).parameters(), weights.norm):
                parameter.copy_(value)
    return ffn


def _resized(part: nn.Module, inputs: int, outputs: int) -> nn.Module:
    dd: Dict[str, Any] = dict(bias=part.bias is not None, device=part.weight.device, dtype=part.weight.dtype)
    return nn.Conv2d(inputs, outputs, 1, **dd) if isinstance(part, nn.Conv2d) else nn.Linear(inputs, outputs, **dd)


def block_of(name: str) -> str:
    """The transformer block an FFN belongs to, or `''`.

    A block is what the last number in front of the FFN's own name counts: `layers.0.blocks.1.mlp` ->
    `layers.0.blocks.1`, `encoder.layer.3.mlp` -> `encoder.layer.3`, `blocks.0.2.mlp` (Twins, which nests lists) ->
    `blocks.0.2`, `blocks.1.ffns.0.mlp` (branches of a block) -> `blocks.1`. Class attention and pooling heads are no
    blocks: their FFNs see one token an image.
    """
    if re.search(r'token_only|cls_|pool|head|post_network', name):  # of CaiT, XCiT, several, several, VOLO
        return ''
    match = re.match(r'(.*\bblocks(?:\.\d+)+)(\.|$)', name) or re.match(r'(.*\d)(?:\.[^.\d]*)*\.[^.]+$', name)
    return match.group(1) if match else ''


def select_ffns(model: nn.Module, layers: Union[str, Sequence[int], Sequence[str]]) -> List[str]:
    """Names of the FFNs that `layers` chooses.

    Args:
        model: A model with dense FFNs.
        layers: `'every:K'` (blocks K-1, 2K-1, ... counted from 0), `'last:K'`, `'all'`, a list of block indices, a list
            of module names, or a regular expression that is searched for in the names of FFNs.

    Raises:
        ValueError: No FFN at all, an index out of range, a pattern that matches nothing, an unknown form.
    """
    if not isinstance(layers, str) and isinstance(layers, Sequence) and any(isinstance(n, str) for n in layers):
        modules = dict(model.named_modules())
        for name in map(str, layers):
            if not name or name not in modules:
                raise ValueError(f'layers={list(layers)}: {type(model).__name__} has no module {name}.')
            if layout_of(modules[name]) is None:
                raise ValueError(f'{name} can\'t become a MoE layer: {describe_ffn(modules[name])}.')
            outer = next((other for other in layers if str(name).startswith(f'{other}.')), None)
            if outer is not None:
                raise ValueError(f'layers={list(layers)}: {name} is part of {outer}; give one of them.')
        return list(map(str, layers))
    names = list(find_ffns(model))
    if not names:
        raise ValueError(
            f'{type(model).__name__} has no FFN to convert{_nearest_ffn(model)}. Take a ViT, Swin, ConvNeXt, ...: '
            f'docs/coverage.md lists the names.')
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


def _nearest_ffn(model: nn.Module) -> str:
    """What a model has that looks like an FFN, and why it is none."""
    near: Dict[str, nn.Module] = {}
    apart: Dict[str, str] = {}  # as in transformers' BERT
    for name, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return f': {name} holds the two linear layers of its FFN itself; give it an FFN module of its own'
        if hasattr(module, 'in_proj') and hasattr(module, 'mlp_act'):  # timm's ParallelScalingBlock
            return f': {name} holds the linear layers of its FFN itself, each in one matrix with those of its attention'
        sizes = {key: size for key, part in _parts(module) if (size := _map_size(part)) is not None}
        rest = [key for key in sizes if not re.search('attn|attention', key)]
        linear = all(isinstance(module.get_submodule(key), nn.Linear) for key in rest)
        if name and linear and len(rest) == 2 < len(sizes):
            (width, up), (hidden, back) = (sizes[key] for key in rest)
            if width == back < up == hidden:
                apart[name] = f': {name} holds {" and ".join(rest)} in no FFN module; give it one'
        maps = list(sizes.values())
        attends = 'attn' in name or 'attention' in type(module).__name__.lower()
        if not name or attends or not 2 <= len(maps) <= 3:
            continue
        (width, up), (hidden, back) = maps[0], maps[-1]
        if width == back <= up and up in (hidden, 2 * hidden):  # what has fewer hidden units than channels is a gate
            near[name] = module

    def innermost(found: Dict[str, Any]) -> str:
        return next((name for name in found if not any(other.startswith(f'{name}.') for other in found)), '')

    if near:
        return f': {innermost(near)} is none, since {describe_ffn(near[innermost(near)])}'
    return apart.get(innermost(apart), '')


def outside_blocks(model: nn.Module) -> List[str]:
    """Names of the FFNs that stand in no block: those of class attention and of pooling heads."""
    return [name for name in find_ffns(model) if not block_of(name)]
