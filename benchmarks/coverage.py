"""Which of timm's models become MoE models by default, and what comes of them: the table docs/coverage.md.

    python benchmarks/coverage.py               # some minutes on one core
    python benchmarks/coverage.py --check       # exit code 1 if the page is not what this writes

All names are built without memory (on the meta device) and converted with the defaults of `ewa.to_moe`. Of each family
the smallest model is then built for real, converted, trained for one step with the pull, and exported.
"""
import argparse
import collections
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence

import timm
import torch
from timm.models import get_model_input_config
from torch import nn
from torch.utils._pytree import tree_leaves

import ewa
from ewa.ffn import layout_of
from ewa.moe import moe_layers

PAGE = Path(__file__).parents[1] / 'docs' / 'coverage.md'
# how the smallest model of a family is made smaller still, for speed alone
SMALLER: Dict[str, Dict[str, Any]] = {
    'beit_base_patch16_224': dict(depth=2),
    'deepseek_vit_412m': dict(depth=2),
    'gemma4_vit_167m': dict(depth=2),
    'naflexvit_base_patch16_parfac_gap': dict(depth=2),
    'qwen3_vit_88m': dict(depth=2),
    'samvit_base_patch16_224': dict(depth=2, global_attn_indexes=(1,)),
}
# an FFN of theirs is tried with the bounds of a clip in buffers, which the meta device does not keep
BUILT = ('gemma4_vit_167m', 'gemma4_vit_167m_enc')


@dataclass
class Name:
    """What came of one name of timm.

    Args:
        family: The file of timm that it stands in.
        ffn: The FFNs that become MoE layers, in words; empty if there are none.
        reason: Why there are none.
    """
    name: str
    family: str
    parameters: int
    ffn: str = ''
    reason: str = ''


def timm_names() -> List[str]:
    """All names that timm registers itself, without those of this package."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm.')]


def describe(ffn: nn.Module) -> str:
    """The type of an FFN and what is special about it."""
    layout = layout_of(ffn)
    assert layout is not None
    glu = len(layout.inputs) > 1 or len(ffn.get_submodule(layout.inputs[0]).weight) > layout.hidden
    notes = ['GLU'] * glu
    notes += ['norm over hidden units'] * bool(layout.norm) + ['1x1 convolutions'] * layout.channels_first
    notes += [f'with {" and ".join(sorted(set(layout.others)))}'] * bool(layout.others)
    return type(ffn).__name__ + f' ({", ".join(notes)})' * bool(notes)


def try_name(name: str) -> Name:
    """Build a model without memory and convert it."""
    with torch.device('cpu' if name in BUILT else 'meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = timm.create_model(name)
    family = timm.model_entrypoint(name).__module__.rpartition('.')[2]
    entry = Name(name, family, sum(p.numel() for p in model.parameters()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            ewa.to_moe(model)
    except ValueError as e:
        entry.reason = str(e)
    else:
        entry.ffn = ', '.join(sorted({describe(layer.experts[0]) for _, layer in moe_layers(model)}))
    return entry


@dataclass
class Checked:
    """What came of one model that was built for real.

    Args:
        difference: The largest one between logits in `eval()` and those of the exported folder.
        trained: Whether one step with the pull moved the experts and left every one of their parameters a gradient.
        keys: Whether the export has the keys of the vanilla model, in its order.
    """
    difference: float
    trained: bool
    keys: bool


def build(name: str, **kwargs: Any) -> nn.Module:
    """A seeded model of five classes, or of features where a name has no classifier."""
    torch.manual_seed(0)
    try:
        return timm.create_model(name, num_classes=5, **kwargs)
    except TypeError:  # an encoder
        torch.manual_seed(0)
        return timm.create_model(name, **kwargs)


def random_images(model: nn.Module, count: int = 2) -> torch.Tensor:
    """`(count, C, H, W)` of the size that a model takes."""
    return torch.randn(count, *get_model_input_config(model)['input_size'], generator=torch.Generator().manual_seed(1))


def train_step(model: nn.Module, images: torch.Tensor, **kwargs: Any) -> bool:
    """One step of SGD and one pull, see `Checked.trained`."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from zeros, behind which nothing has a gradient
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * .02)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    averager = ewa.ExpertAverager(model, share_rate=.1, **kwargs)
    averager.attach(optimizer)
    before = [p.detach().clone() for _, layer in moe_layers(model) for _, p in layer.named_parameters()]
    out = model.train()(images)
    out = out[0] if isinstance(out, (tuple, list)) else out
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
    experts = [p for _, layer in moe_layers(model) for _, p in layer.named_parameters()]
    graded = all(p.grad is not None for p in experts)
    optimizer.step()
    moved = any(not torch.equal(p, q) for p, q in zip(before, experts))
    return graded and moved and averager.pulls == 1


def check(name: str, **kwargs: Any) -> Checked:
    """Build, convert, train for a step, export, load with timm alone, compare."""
    model = build(name, **kwargs)
    keys = list(model.state_dict())
    images = random_images(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        ewa.to_moe(model)
    trained = train_step(model, images)
    model.eval()
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        ewa.export(ewa.to_dense(model), Path(directory) / 'out')
        loaded = timm.create_model(f'local-dir:{directory}/out', pretrained=True).eval()
        pairs = zip(*(tree_leaves(m(images)) for m in (model, loaded)))
        difference = max(float((a - b).abs().max()) for a, b in pairs)
    return Checked(difference, trained, list(loaded.state_dict()) == keys)


def smallest(names: Sequence[Name]) -> Name:
    """The smallest one of a family that is converted."""
    return min((entry for entry in names if entry.ffn), key=lambda entry: (entry.parameters, entry.name))


def shorten(reason: str) -> str:
    """The part of a refusal that holds for a whole family, numbers of layers aside."""
    reason = re.sub(r' Take a ViT, .*$', '', reason)  # the way out, which is this page
    reason = re.sub(r'^\w+ has no FFN to convert:? ?', '', reason).rstrip('.')
    return re.sub(r'\.\d+', '.N', re.sub(r'stages?\d|layer\d|(?<=\bs)\d|(?<=\bb)\d', 'N', reason)) or 'no FFN'


def page(entries: Sequence[Name], checked: Dict[str, Checked]) -> str:
    """The Markdown of docs/coverage.md."""
    families: Dict[str, List[Name]] = collections.defaultdict(list)
    for entry in entries:
        families[entry.family].append(entry)
    served = sum(bool(entry.ffn) for entry in entries)
    lines = [
        '# Which models of timm are converted', '',
        f'Written by `python benchmarks/coverage.py`, timm {timm.__version__}. Of the {len(entries)} names that timm',
        f'registers, **{served} become MoE models** by `ewa.to_moe(model)` as it is (`layers="every:2"`). Of each '
        'family',
        'the smallest of them was built, trained for one step with the pull, converted back, exported and loaded by '
        'timm:',
        'the difference is the largest one between its logits in `eval()` and those of the export. (Six large ones '
        'were',
        'built with two blocks, see `SMALLER` in the script.)', '',
        '| family | names | converted | FFN | tried | difference | trained | keys |',
        '|---|---|---|---|---|---|---|---|']
    for family, names in sorted(families.items()):
        kinds = collections.Counter(entry.ffn for entry in names if entry.ffn)
        if not kinds:
            continue
        one = smallest(names).name
        result = checked[one]
        lines.append(
            f'| {family} | {len(names)} | {sum(kinds.values())} | {"; ".join(sorted(kinds))} | {one} | '
            f'{result.difference:g} | {"yes" if result.trained else "**no**"} | '
            f'{"vanilla" if result.keys else "**other**"} |')
    lines += [
        '', '## What is left dense, and why', '', 'With an example each. A family stands in both tables where only',
        'some of its names are converted. An FFN that mixes tokens (depth-wise convolutions, batch norm, global',
        'response norm, spatial gates) would compute something else on parts of the tokens.', '',
        '| family | names | not converted | example | why |', '|---|---|---|---|---|']
    for family, names in sorted(families.items()):
        reasons: Dict[str, List[str]] = collections.defaultdict(list)
        for entry in names:
            if entry.reason:
                reasons[shorten(entry.reason)].append(entry.name)
        for reason, examples in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f'| {family} | {len(names)} | {len(examples)} | {min(examples)} | {reason} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, compare')
    args = parser.parse_args()
    torch.set_num_threads(1)
    entries = [try_name(name) for name in timm_names()]
    families = sorted({entry.family for entry in entries if entry.ffn})
    tried = [smallest([entry for entry in entries if entry.family == family]).name for family in families]
    text = page(entries, {name: check(name, **SMALLER.get(name, {})) for name in tried})
    if not args.check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f'{PAGE} is not what this script writes')


if __name__ == '__main__':
    main()
