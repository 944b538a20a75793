"""A page on a conversion: `report.html`, which needs no other file, and `report.md` with its figures beside it."""
import base64
import html
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Union

from .diagnostics import advise, error_figure, similarity_figure, usage_figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 52rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto }
.wide td, td:first-child { white-space: nowrap }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
p, figcaption { font-size: .9rem }
figure { margin: 1rem 0 }
img { width: 100% }
pre { padding: .7rem; background: #f4f4f4; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere }
@media print {
  body { margin: 0; max-width: none; font-size: 11pt }
  h2 { break-after: avoid }
  .wide { overflow-x: visible; font-size: 80% }
  tr, figure { break-inside: avoid }
}
""".strip()

COLUMNS = {  # of the table of layers: key of a record, and its title
    'layer': 'layer', 'router': 'router', 'num_experts': 'experts', 'units': 'hidden units',
    'distance': 'distance', 'cosine': 'cosine', 'cosine_aligned': 'aligned', 'entropy': 'entropy', 'dead': 'dead',
    'change': 'change'}
LEGEND = (
    'hidden units: of the experts, and of the FFN that they became. distance: of the experts to their mean, relative '
    'to its norm. cosine: mean over pairs of experts, aligned: after their hidden units were permuted to match. '
    'entropy: of usage, 1 when uniform. dead: experts that no token was sent to. change: relative change of the routed '
    'output when the experts are averaged; 0 where they are used at random, for such a layer computes with their mean '
    'already.')


class Table(NamedTuple):
    """Titles of the columns, and rows of cells: text, or numbers, of which floats get four digits; None is empty."""
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Picture(NamedTuple):
    """The name of a file, a matplotlib figure, and what it shows."""
    name: str
    figure: Any
    caption: str


class Section(NamedTuple):
    """Of a page: a heading, tables and pictures, and paragraphs of text; those that begin with `$ ` are commands."""
    heading: str
    blocks: Sequence[Union[Table, Picture, str]]


def write_report(
        records: Sequence[Mapping[str, Any]],
        directory: Path,
        title: str,
        facts: Optional[Mapping[str, Any]] = None,
        accuracy: Sequence[Sequence[Any]] = (),
        errors: Optional[Mapping[str, Mapping[str, Mapping[str, float]]]] = None,
        command: str = '',
) -> None:
    """Write `report.html`, which needs no other file, and `report.md` with PNG figures beside it.

    Args:
        records: Of `ewa.diagnose`; `units` on them says what the hidden units became.
        directory: Where; it is made.
        title: Of the page.
        facts: What is known of the model and of where it came from, by name.
        accuracy: Rows of a model, its top-1 in per cent, and the relative change of its logits, each as text.
        errors: By method and layer, the relative error that fitting left: `fitted`, perhaps `held_out`.
        command: The command line that made it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sections = [Section('', [Table((), list(facts.items()))])] if facts else []
    if accuracy:
        sections.append(Section('Accuracy', [Table(('', 'top-1, %', 'change of the logits'), accuracy)]))
    sections += [*_layers(records), *_errors(errors or {})]
    if command:
        sections.append(Section('Made by', [f'$ {command}']))
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                block.figure.savefig(directory / f'{block.name}.png', dpi=150)
    (directory / 'report.md').write_text(_markdown(title, sections), encoding='utf-8')
    (directory / 'report.html').write_text(_html(title, sections, directory), encoding='utf-8')


def _layers(records: Sequence[Mapping[str, Any]]) -> List[Section]:
    columns = [column for column in COLUMNS if any(column in record for record in records)]
    if 'units' in columns:  # which says their number too
        columns.remove('num_experts')
    table = Table([COLUMNS[c] for c in columns], [[r.get(c) for c in columns] for r in records])
    sections = [Section('Layers', [table, LEGEND, *advise(records)])] if records else []
    if any('similarity' in record for record in records):
        sections.append(Section('Similarity of experts', [Picture(
            'similarity', similarity_figure(records, 7.5),
            'Cosine of the weights of two experts, one square a layer. The colours go from the smallest to the largest '
            'of all.')]))
    if any('usage' in record for record in records):
        sections.append(Section('Use of experts', [Picture(
            'usage', usage_figure(records, 7.5), 'Share of the assignments of calibration tokens.')]))
    return sections


def _errors(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> List[Section]:
    if not errors:
        return []
    names = {'fitted': 'calibration', 'held_out': 'held out'}
    layers = next(iter(errors.values()))
    keys = [(method, key) for method in errors for key in names if any(key in e for e in errors[method].values())]
    table = Table(
        ['layer', *(f'{method}, {names[key]}' for method, key in keys)],
        [[layer, *(errors[method][layer].get(key) for method, key in keys)] for layer in layers])
    return [Section('Error left by fitting', [table, Picture(
        'error', error_figure(errors, 7.5),
        'What the FFN misses of the output of its layer, relative to that output, given what the FFNs before it '
        'compute; on the images it was fitted to, and on others that were held out.')])]


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ', '.join(map(str, value)) or 'none'
    return f'{value:.4f}' if isinstance(value, float) else '' if value is None else str(value)


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f'# {title}']
    for heading, blocks in sections:
        lines += ['', f'## {heading}'] * bool(heading)
        for block in blocks:
            lines.append('')
            if isinstance(block, Table):
                columns = block.columns or [''] * len(block.rows[0])
                lines += ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
                lines += ['| ' + ' | '.join(_cell(cell).replace('|', '\\|') for cell in row) + ' |'
                          for row in block.rows]
            elif isinstance(block, Picture):
                lines += [f'![{block.name}]({block.name}.png)', '', block.caption]
            else:
                lines += [f'    {block[2:]}' if block.startswith('$ ') else block]
    return '\n'.join(lines) + '\n'


def _html(title: str, sections: Sequence[Section], directory: Path) -> str:
    escape = html.escape
    lines = [
        '<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{escape(title)}</title>', f'<style>\n{STYLE}\n</style></head><body>', f'<h1>{escape(title)}</h1>']
    for heading, blocks in sections:
        lines += [f'<h2>{escape(heading)}</h2>'] * bool(heading)
        for block in blocks:
            if isinstance(block, Table):
                lines.append(f'<div{" class=wide" * bool(block.columns)}><table>')
                if block.columns:
                    lines.append('<tr>' + ''.join(f'<th>{escape(column)}</th>' for column in block.columns) + '</tr>')
                for row in block.rows:
                    lines.append('<tr>' + ''.join(f'<td>{escape(_cell(cell))}</td>' for cell in row) + '</tr>')
                lines.append('</table></div>')
            elif isinstance(block, Picture):
                data = base64.b64encode((directory / f'{block.name}.png').read_bytes()).decode()
                lines.append(
                    f'<figure><img src="data:image/png;base64,{data}" alt="{escape(block.caption)}">'
                    f'<figcaption>{escape(block.caption)}</figcaption></figure>')
            elif block.startswith('$ '):
                lines.append(f'<pre>{escape(block[2:])}</pre>')
            else:
                lines.append(f'<p>{escape(block)}</p>')
    return '\n'.join([*lines, '</body></html>']) + '\n'
