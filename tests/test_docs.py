"""What the documents say: links lead somewhere, and the page of results says what the tables say."""
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator

import ewa
from ewa.moe import moe_layers
from ewa.options import convert_parser, train_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(path for folder in ('docs', 'benchmarks', 'examples', 'experiments')
                                      for path in (ROOT / folder).rglob('*.md'))])


def anchors(page):
    """The anchors of a page's headings, made as GitHub makes them."""
    text = re.sub(r'(?ms)^```.*?^```$', '', page.read_text(encoding='utf-8'))
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
            for title in re.findall(r'(?m)^#+ +(.*?) *$', text)}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(page):
    text = re.sub(r'(?ms)^```.*?^```$', '', page.read_text(encoding='utf-8'))
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'[a-z]+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f'{page.relative_to(ROOT)}: {link} leads nowhere'
        assert not anchor or anchor in anchors(target), f'{page.relative_to(ROOT)}: {link} has no such heading'


def test_results_are_one_page_of_numbers_that_stand_in_the_tables():
    text = (ROOT / 'docs/results.md').read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 150
    pages = {path.name: path.read_text(encoding='utf-8') for path in (ROOT / 'experiments/results').glob('*.md')}
    assert all(f'/results/{name})' in text for name in pages)
    tables = '\n'.join(pages.values())
    cells = {cell.strip() for row in re.findall(r'(?m)^\| .*\|$', text) for cell in row.split('|')}
    numbers = {cell for cell in cells if re.fullmatch(r'[-+]?\d+\.\d+( .*)?', cell)}
    numbers |= set(re.findall(r'[-+]?\d+\.\d+\s±\s\d+\.\d+', text))
    assert len(numbers) > 80
    for number in numbers:
        assert f' {" ".join(number.split())} ' in tables, f'{number} stands in no table'


def test_intervals_in_the_prose_of_results_are_those_of_the_tables():
    text = ' '.join((ROOT / 'docs/results.md').read_text(encoding='utf-8').split())
    tables = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT / 'experiments/results').glob('*.md'))
    number = r'[-+]?\d+\.\d+'
    known = [tuple(map(float, found)) for found in re.findall(rf'({number}) \(({number}) to ({number})\)', tables)]
    known += [(-mean, -high, -low) for mean, low, high in known]  # "worse by"
    found = re.findall(rf'({number})(?: \(|, )({number}) to ({number})', text)
    assert len(found) > 50
    for texts in found:
        near = [0.5 * 10. ** -len(value.partition('.')[2]) + 1e-9 for value in texts]
        assert any(all(abs(float(a) - b) <= c for a, b, c in zip(texts, entry, near)) for entry in known), texts


@pytest.mark.filterwarnings('ignore:An ExpertAverager was made for')
def test_a_layer_of_ones_own_is_built_as_the_page_on_ewa_says():
    torch.manual_seed(0)
    code, = re.findall(r'(?ms)^```python\n(.*?)^```$', (ROOT / 'docs/ewa.md').read_text(encoding='utf-8'))
    names = {}
    exec(code.replace('num_classes=100', 'num_classes=10, depth=2, img_size=32'), names)
    model, averager = names['model'].train(), names['averager']
    layers = [layer for _, layer in moe_layers(model)]
    assert [type(layer) for layer in layers] == [names['ImagePartition']]
    assert averager.share_rate == 1e-3
    # images of a batch meet different experts, all tokens of an image the same
    with torch.no_grad():
        for i, expert in enumerate(layers[0].experts):
            for p in expert.parameters():
                p.zero_()
            expert.fc2.bias.fill_(i)
    out = layers[0](torch.randn(8, 5, 192))
    assert sorted(out[:, 0, 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ewa.to_dense(model).eval()(images), model.eval()(images))


def blocks(language):
    return re.findall(rf'(?ms)^```{language}\n(.*?)^```$', (ROOT / 'README.md').read_text(encoding='utf-8'))


def test_readme_is_short_and_its_commands_are_those_of_the_scripts():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').split()) <= 1200
    parsers = {'train.py': train_parser(), 'convert.py': convert_parser()}
    seen = 0
    for command in re.split(r'&&|\n', '\n'.join(blocks('bash')).replace('\\\n', ' ')):
        words = shlex.split(command, comments=True)
        if words[:1] == ['python'] and words[1] in parsers:
            parsers[words[1]].parse_args(words[2:])
            seen += 1
    assert seen >= 4


def test_python_of_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def small(name, pretrained=False, **kwargs):  # no hub
        if name.startswith('local-dir:'):
            return create(name, pretrained=pretrained, **kwargs)
        return create('test_vit', img_size=160, **kwargs)

    monkeypatch.setattr(timm, 'create_model', small)
    torch.manual_seed(0)
    code = blocks('python')
    loop = next(block for block in code if 'for images, target in loader' in block)
    loader = [(torch.randn(2, 3, 160, 160), torch.tensor([3, 5])) for _ in range(2)]
    for number, block in enumerate([loop, *(block for block in code if block is not loop)]):
        model = create('test_vit', num_classes=10)
        if 'EWACallback' in block:
            pytest.importorskip('lightning')
        if 'to_moe' not in block:
            ewa.to_moe(model)
        optimizer = torch.optim.AdamW(model.parameters())
        names = dict(
            ewa=ewa, timm=timm, torch=torch, model=model, module=model, loader=loader, optimizer=optimizer,
            accelerator=Accelerator(cpu=True))
        if block is not loop and 'to_moe(model' in block:
            before, after = block.split('\n', 1)  # what stands between the lines of the plugin
            exec(before, names)
            names['optimizer'] = torch.optim.AdamW(model.parameters())
            block = after
        folder = 'my_vit' if block is loop or 'local-dir' in block else f'other{number}'
        exec(re.sub('(?<=local-dir:)vit|my_vit', folder, block), names)
