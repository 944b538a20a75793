"""Tables and figures of docs/results.md, made from the lines in experiments/results and nothing else."""
import statistics
from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import Any, Callable, Dict, List, Sequence, Tuple

from matplotlib.figure import Figure
from scipy.stats import t as student

from ewa.distillation import benefit_kept

from .runner import RESULTS, read_results

DOCS = Path(__file__).parent.parent / 'docs'
Lines = List[Dict[str, Any]]


def mean_se(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """`mean ± standard error` of values, one a seed."""
    if not values:
        return ''
    mean = f'{statistics.mean(values):{"+" * sign}.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {standard_error(values):.{digits}f}'


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.


def interval(values: Sequence[float], level: float = 0.95) -> Tuple[float, float]:
    """Student's confidence interval of the mean of at least two values."""
    half = student.ppf(0.5 + level / 2, len(values) - 1) * standard_error(values)
    return statistics.mean(values) - half, statistics.mean(values) + half


def with_interval(values: Sequence[float], digits: int) -> str:
    """`mean (low to high)` of differences, one a seed; the bare mean of a single one."""
    if len(values) < 2:
        return ''.join(f'{value:+.{digits}f}' for value in values)
    low, high = interval(values)
    return f'{statistics.mean(values):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows])


def _select(lines: Lines, **labels) -> Lines:
    found = [line for line in lines if all(line['labels'].get(k) == v for k, v in labels.items())]
    return sorted(found, key=lambda line: line['labels']['seed'])


def _unique(lines: Lines, label: str) -> List[Any]:
    return list(dict.fromkeys(line['labels'][label] for line in lines if label in line['labels']))


def _by_seed(lines: Lines, read: Callable[[Dict[str, Any]], float]) -> Dict[int, float]:
    return {line['labels']['seed']: read(line) for line in lines}


def _paired(lines: Dict[int, float], reference: Dict[int, float]) -> List[float]:
    return [lines[seed] - reference[seed] for seed in lines if seed in reference]


def _test(key: str, part: str = 'test') -> Callable[[Dict[str, Any]], float]:
    return lambda line: line[part][key]


def _provenance(lines: Lines, what: str = 'Mean ± standard error over seeds, test set.') -> str:
    machines = list(dict.fromkeys(
        f'{line["machine"]["gpu"] or line["machine"]["cpu"]}, {line["machine"]["threads"]} thread(s) a run, torch '
        f'{line["machine"]["torch"]}, timm {line["machine"]["timm"]}' for line in lines))
    seeds = sorted({line['labels']['seed'] for line in lines})
    hours = sum(line['seconds'] for line in lines) / 3600
    return _wrap(f'{len(lines)} runs, seeds {", ".join(map(str, seeds))}; {"; ".join(machines)}; {hours:.1f} hours of '
                 f'runs. {what}')


def _wrap(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _save(figure: Figure, name: str, alt: str) -> str:
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / f'{name}.png', dpi=110)
    return f'![{alt}]({name}.png)'


def _error_bars(axis, columns: Sequence[Any], groups: Dict[str, List[List[float]]], xlabel: str, ylabel: str) -> None:
    for label, values in groups.items():
        points = [(i, statistics.mean(v), standard_error(v)) for i, v in enumerate(values) if v]
        if points:
            axis.errorbar(*zip(*points), marker='o', markersize=4, capsize=3, label=label)
    axis.set_xticks(range(len(columns)), [f'{column:g}' for column in columns], fontsize=8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)


def tune(lines: Lines, name: str) -> str:
    """The table of the study `tune`: what was chosen for each family at each length."""
    rows = []
    for epochs in sorted(_unique(lines, 'epochs'), reverse=True):
        for family in _unique(lines, 'family'):
            group = _select(lines, family=family, epochs=epochs)
            if not group:
                continue
            cells = [f'{epochs}', family, str(len(group))]
            for pick in (lambda line: line['labels']['stage'] < 2, lambda line: line['labels']['stage'] == 2):
                best = max(filter(pick, group), default=None,
                           key=lambda line: (line['last']['eval_top1'], -line['last']['eval_loss']))
                cells += ['', ''] if best is None else [
                    ', '.join(f'{best["flags"][key]:g}' for key in ('lr', 'weight-decay', 'drop-path')),
                    f'{best["last"]["eval_top1"]:.2f}']
            rows.append(cells)
    header = ('epochs', 'family', 'runs', 'lr, weight decay, drop-path', 'val top-1', 'with drop-path', 'val top-1')
    return '\n'.join([table(header, rows), '', _provenance(lines, 'Validation split, one run a cell.')])


def main(lines: Lines, name: str) -> str:
    """The tables of the study `main`, with paired differences to dense over equal seeds."""
    cells = sorted({(line['labels']['images'], line['labels']['epochs']) for line in lines})
    order = _unique(lines, 'variant')
    groups: Dict[str, Dict[Tuple[int, int], Lines]] = {}
    for variant in order:
        groups[variant] = {cell: _select(lines, variant=variant, images=cell[0], epochs=cell[1]) for cell in cells}

    def read(variant: str, key: str) -> Tuple[str, Callable]:
        return variant.replace(', EMA', ''), _test(key, 'test_ema' if variant.endswith(', EMA') else 'test')

    variants = []
    for variant in order:
        variants.append(variant)
        if any('test_ema' in line for group in groups[variant].values() for line in group):
            variants.append(f'{variant}, EMA')
    parts = []
    for key, what, digits in (
            ('top1', 'Top-1 (%)', 2), ('nll', 'Negative log-likelihood', 3), ('ece', 'Calibration error', 3)):
        rows = []
        for variant in variants:
            base, reader = read(variant, key)
            row = [variant]
            for cell in cells:
                dense = _by_seed(groups['dense'][cell], _test(key))
                scores = _by_seed(groups[base][cell], reader)
                row.append(mean_se(list(scores.values()), digits) if variant == 'dense' else
                           mean_se(_paired(scores, dense), digits, sign=True))
            rows.append(row)
        parts += ['', table((what, *(f'{images:,} x {epochs}' for images, epochs in cells)), rows)]
    counts = {cell: sorted({n for n in (len(groups[v][cell]) for v in order) if n}) for cell in cells}
    parts += ['', _wrap(
        'Columns: training images x epochs. First row: the score of the dense model; others: paired differences to it. '
        'Seeds: ' + ', '.join(f'{i:,} x {e}: {" or ".join(map(str, n))}' for (i, e), n in counts.items()) + '.')]
    parts += ['', comparisons(groups, cells), '', time_to_accuracy(groups, cells, name), '', conversion(groups, cells),
              '', robustness(groups, cells)]
    return '\n'.join([*parts, '', _provenance(lines)])


Groups = Dict[str, Dict[Tuple[int, int], Lines]]
Cells = Sequence[Tuple[int, int]]
PAIRS = (('EWA', 'dense'), ('EWA, every second', 'dense'), ('EWA 0.01, every second', 'dense'),
         ('EWA, every second', 'EWA'), ('EWA 0.01, every second', 'EWA, every second'),
         ('EWA, drop-path', 'dense, drop-path'), ('EWA', 'dense, drop-path'),
         ('no pull, drop-path', 'dense, drop-path'), ('EWA, drop-path', 'no pull, drop-path'),
         ('whole images', 'EWA'), ('static fusion', 'dense'), ('learned fusion', 'dense'), ('full pull', 'dense'),
         ('full pull, drop-path', 'dense, drop-path'), ('full pull', 'dense, half FFN lr'))


def comparisons(groups: Groups, cells: Cells) -> str:
    """Paired differences of single pairs, with intervals."""
    rows = []
    for first, second in PAIRS:
        for cell in cells:
            pair = [groups.get(variant, {}).get(cell, []) for variant in (first, second)]
            found = [_paired(*(_by_seed(group, read) for group in pair)) for read in (
                _test('top1'), _test('nll'), lambda line: min(point[2] for point in line['curve']))]
            if len(found[0]) > 1:
                rows.append((f'{first} - {second}', f'{cell[0]:,} x {cell[1]}', *(
                    with_interval(values, digits) for values, digits in zip(found, (2, 3, 3))), str(len(found[0]))))
    header = ('difference', 'cell', 'top-1', 'NLL', 'validation loss where it was lowest', 'seeds')
    return '95 % intervals (Student, over seeds):\n\n' + table(header, rows)


def time_to_accuracy(groups: Groups, cells: Cells, name: str) -> str:
    """Validation accuracy and loss against training time, dense and EWA, for each size's longest training."""
    longest = [cell for cell in cells if cell[1] == max(epochs for images, epochs in cells if images == cell[0])]
    figure = Figure(figsize=(5 * len(longest), 5.6), layout='constrained')
    axes = figure.subplots(2, len(longest), squeeze=False)
    notes = []
    for column, cell in enumerate(longest):
        curves = {variant: _by_seed(groups.get(variant, {}).get(cell, []), lambda line: line['curve'])
                  for variant in ('dense', 'dense, drop-path', 'EWA', 'EWA, drop-path', 'no pull, drop-path')}
        curves = {variant: found for variant, found in curves.items() if found}
        common = set.intersection(*(set(found) for found in curves.values()))
        for variant, found in curves.items():
            points = zip(*(found[seed] for seed in common))
            mean = [[statistics.mean(values) for values in zip(*point)] for point in points]
            for axis, index in zip(axes[:, column], (1, 2)):
                axis.plot([p[3] for p in mean], [p[index] for p in mean], marker='o', markersize=3, label=variant)
        axes[0, column].set_title(f'{cell[0]:,} images x {cell[1]} epochs', fontsize=9)
        axes[0, column].set_ylabel('validation top-1 (%)')
        axes[1, column].set_ylabel('validation loss')
        axes[1, column].set_xlabel('seconds of training')
        seconds = [_by_seed(groups.get(variant, {}).get(cell, []), lambda line: line['last']['train_seconds'])
                   for variant in ('EWA, drop-path', 'dense, drop-path')]
        ratios = [seconds[0][seed] / seconds[1][seed] for seed in seconds[0] if seed in seconds[1]]
        notes.append(f'{cell[0]:,} x {cell[1]}: {mean_se(ratios)}' if ratios else '')
    axes[0, 0].legend(fontsize=7)
    picture = _save(figure, f'time_{name}', 'validation accuracy and loss against training time')
    note = ', '.join(filter(None, notes))
    return _wrap('Time to accuracy, mean curves over seeds. Training time of EWA over dense, both with drop-path, same '
                 f'seed: {note}.') + f'\n\n{picture}'


def conversion(groups: Groups, cells: Cells) -> str:
    """What conversion costs random-partition MoEs."""
    rows = []
    for variant, group in groups.items():
        row = [variant]
        for cell in cells:
            pairs = [(line['routed']['top1'], line['dense']['top1']) for line in group[cell] if 'routed' in line]
            row.append(f'{mean_se([moe - dense for moe, dense in pairs], 2, sign=True)} '
                       f'({statistics.mean(moe for moe, _ in pairs):.1f})' if pairs else '')
        if any(row[1:]):
            rows.append(row)
    intro = _wrap('What conversion costs: top-1 of the MoE itself, a random expert for each token as in training, '
                  'minus that of its dense form, a quarter of the test set; in brackets the MoE\'s own.')
    header = ('variant', *(f'{images:,} x {epochs}' for images, epochs in cells))
    return f'{intro}\n\n{table(header, rows)}'


def robustness(groups: Groups, cells: Cells) -> str:
    """Noise on test images and sharpness, in the longest cell of those with most runs."""
    def scored(cell: Tuple[int, int]) -> int:
        return sum('robust' in line for group in groups.values() for line in group[cell])

    cell = max(cells, key=lambda c: (scored(c), c[0] * c[1]))
    dense = {line['labels']['seed']: line['robust'] for line in groups['dense'][cell] if 'robust' in line}
    keys = (('noisy_top1', 2), ('noisy_nll', 3), ('train_nll', 4), ('sharpness', 4))
    rows = []
    for variant, group in groups.items():
        found = {line['labels']['seed']: line['robust'] for line in group[cell] if 'robust' in line}
        if found:
            paired = [(found[seed], dense[seed]) for seed in found if seed in dense]
            rows.append([variant] + [
                mean_se([d[key] for d, _ in paired], digits) if variant == 'dense' else
                mean_se([f[key] - d[key] for f, d in paired], digits, sign=True) for key, digits in keys])
    intro = _wrap(
        f'Robustness, {cell[0]:,} images x {cell[1]} epochs; below dense, paired differences to it. Noise: Gaussian, '
        'standard deviation 0.5 of the normalised pixels, a quarter of the test set. Sharpness: mean rise of the '
        'training loss when each matrix of the dense form moves a tenth of its norm in a random direction.')
    header = ('variant', 'top-1, noisy images', 'NLL, noisy images', 'training loss', 'sharpness')
    return f'{intro}\n\n{table(header, rows)}'


def share_rate(lines: Lines, name: str) -> str:
    """The tables and figures of the study `share_rate`."""
    usual = dict(schedule='constant', init='copy', experts=4, layers='all')
    counts = Counter(line['labels']['epochs'] for line in lines)
    lengths, usual_length = sorted(counts), counts.most_common(1)[0][0]
    groups = {f'{epochs} epochs': _select(lines, epochs=epochs, **usual) for epochs in lengths}
    groups['independent start'] = _select(lines, **dict(usual, init='independent'))
    for schedule in ('linear', 'cosine'):
        for epochs in lengths:
            groups[f'{schedule}, {epochs} epochs'] = _select(lines, epochs=epochs, **dict(usual, schedule=schedule))
    rates = sorted(_unique(lines, 'rate'))

    def distance(line: Dict[str, Any]) -> float:
        return statistics.mean(v[-1][1] for k, v in line['experts'].items() if k.startswith('distance'))

    def values(label: str, rate: float, read: Callable[[Dict[str, Any]], float]) -> List[float]:
        return [read(line) for line in groups[label] if line['labels']['rate'] == rate]

    def to_dense(group: Lines, key: str, digits: int) -> str:
        dense = _select(lines, variant='dense', epochs=group[0]['labels']['epochs'])
        return mean_se(_paired(_by_seed(group, _test(key)), _by_seed(dense, _test(key))), digits, True)

    rows = []
    for epochs in lengths:
        dense = _select(lines, variant='dense', epochs=epochs)
        if dense:
            rows.append((
                f'dense, {epochs} epochs', '', str(len(dense)), mean_se([d['last']['eval_top1'] for d in dense]),
                mean_se([d['test']['top1'] for d in dense]), '', mean_se([d['test']['nll'] for d in dense], 3), '', '',
                '', ''))
    for label in groups:
        for rate in rates:
            cells = values(label, rate, _test('top1'))
            if cells:
                rows.append((
                    label, f'{rate:g}', str(len(cells)),
                    mean_se(values(label, rate, lambda line: line['last']['eval_top1'])), mean_se(cells),
                    to_dense([line for line in groups[label] if line['labels']['rate'] == rate], 'top1', 2),
                    mean_se(values(label, rate, _test('nll')), 3),
                    to_dense([line for line in groups[label] if line['labels']['rate'] == rate], 'nll', 3),
                    mean_se(values(label, rate, lambda line: line['routed']['top1'] - line['dense']['top1']), 2, True),
                    mean_se(values(label, rate, lambda line: line['routed']['nll'] - line['dense']['nll']), 3, True),
                    mean_se(values(label, rate, distance), 3)))
    parts = [table(('setting', 'share rate', 'seeds', 'val top-1', 'test top-1', 'to dense', 'test NLL', 'to dense',
                    'top-1 of the MoE itself minus its dense form', 'NLL likewise', 'distance to mean'), rows)]
    figure = Figure(figsize=(11, 3.4), layout='constrained')
    axes = figure.subplots(1, 3)
    for axis, (what, read) in zip(axes, (('test top-1 (%)', _test('top1')), ('test NLL', _test('nll')),
                                        ('distance to mean', distance))):
        _error_bars(axis, rates, {
            label: [values(label, rate, read) for rate in rates] for label in groups if groups[label]},
            'share rate', what)
    axes[-1].legend(fontsize=7)
    parts += ['', _save(figure, f'share_rate_{name}', 'accuracy, loss and distance over share rates')]

    rows = []
    base = _select(lines, epochs=usual_length, rate=1e-3, **usual)
    others = {f'{n} experts': _select(lines, rate=1e-3, experts=n) for n in (2, 8, 16)}
    others.update({f'layers {where}': _select(lines, rate=1e-3, layers=where) for where in ('every:2', 'last:2')})
    for label, group in {'4 experts, all layers': base, **others}.items():
        if group:
            rows.append((label, str(len(group)), mean_se([line['last']['eval_top1'] for line in group]),
                         mean_se([line['test']['top1'] for line in group]), to_dense(group, 'top1', 2),
                         mean_se([line['test']['nll'] for line in group], 3), to_dense(group, 'nll', 3),
                         mean_se([distance(line) for line in group], 3)))
    if rows:
        parts += ['', f'Experts and layers, share rate 0.001, {usual_length} epochs:', '',
                  table(('setting', 'seeds', 'val top-1', 'test top-1', 'to dense', 'test NLL', 'to dense',
                         'distance to mean'), rows)]
    return '\n'.join([*parts, '', experts(lines, name, usual_length, usual), '', _provenance(lines)])


def experts(lines: Lines, name: str, epochs: int, usual: Dict[str, Any]) -> str:
    """What experts do over training: distance to the mean by share rate and by layer."""
    group = _select(lines, epochs=epochs, **usual)
    if not group:
        return ''
    figure = Figure(figsize=(11, 3.4), layout='constrained')
    axes = figure.subplots(1, 3)

    def mean_course(runs: Lines, keys: Sequence[str]) -> Tuple[List[float], List[float]]:
        courses = [run['experts'][key] for run in runs for key in keys]
        return [p[0] for p in courses[0]], [statistics.mean(c[i][1] for c in courses) for i in range(len(courses[0]))]

    layers = [key.split('/')[1] for key in group[0]['experts'] if key.startswith('distance/')]
    for rate in sorted(_unique(group, 'rate')):
        runs = _select(group, rate=rate)
        for axis, kind in zip(axes, ('distance', 'cosine')):
            axis.plot(*mean_course(runs, [f'{kind}/{layer}' for layer in layers]), label=f'{rate:g}')
    for layer in layers:
        axes[2].plot(*mean_course(_select(group, rate=1e-3), [f'distance/{layer}']), label=layer)
    for axis, what in zip(axes, ('distance to mean', 'pairwise cosine', 'distance to mean, rate 0.001')):
        axis.set_xlabel('update')
        axis.set_ylabel(what)
        axis.legend(fontsize=7, title='share rate' if axis is not axes[2] else 'layer', title_fontsize=7)
    return (f'What experts do over training ({epochs} epochs, copies at the start; mean over layers and seeds, on the '
            'right by layer):\n\n' + _save(figure, f'experts_{name}', 'distance and cosine of experts over training'))


def bounded(lines: Lines, name: str) -> str:
    """The table of the study `bounded`; constant rates at the usual learning rate come from `share_rate`."""
    usual = dict(schedule='constant', init='copy', experts=4, layers='all')
    lengths, lrs = sorted(_unique(lines, 'epochs')), sorted(_unique(lines, 'lr'))
    seeds = _unique(lines, 'seed')
    shared = [dict(line, labels=dict(line['labels'], lr=lrs[-1])) for rate in (0., 1e-3, 1e-2, .1)
              for line in _select(read_results(f'share_rate-{name}'), rate=rate, **usual)
              if line['labels']['seed'] in seeds]
    every = [*lines, *shared]
    settings = [(f'rate {rate:g}', dict(rate=rate)) for rate in sorted(_unique(every, 'rate'))]
    settings += [(f'bound {bound:g}', dict(bound=bound)) for bound in sorted(_unique(lines, 'bound'))]
    columns = [(epochs, lr) for epochs in lengths for lr in lrs]
    parts = []
    for what, read, digits in (
            ('val top-1', lambda line: line['last']['eval_top1'], 2), ('test top-1', _test('top1'), 2),
            ('test NLL', _test('nll'), 3)):
        rows = [[label] + [mean_se([read(line) for line in _select(every, epochs=epochs, lr=lr, **pick)], digits)
                           for epochs, lr in columns] for label, pick in settings]
        parts += ['', table((what, *(f'{epochs} epochs, lr {lr:g}' for epochs, lr in columns)), rows)]
    return '\n'.join([*parts, '', _provenance(lines)])


def finetune(lines: Lines, name: str) -> str:
    """The table of the study `finetune`: each variant at its better learning rate by validation."""
    rows = []
    sizes = sorted(_unique(lines, 'images'))
    pick: Dict[Tuple[int, str], Lines] = {}
    for size in sizes:
        for variant in _unique(_select(lines, images=size), 'variant'):
            runs = [_select(lines, images=size, variant=variant, lr=lr) for lr in sorted(_unique(lines, 'lr'))]
            runs = [_by_seed(group, lambda line: line) for group in runs if group]
            common = set.intersection(*map(set, runs))  # not all learning rates have all seeds
            best = max(runs, key=lambda group: statistics.mean(group[seed]['last']['eval_top1'] for seed in common))
            pick[size, variant] = list(best.values())
    for variant in dict.fromkeys(variant for _, variant in pick):
        row = [variant]
        for size in sizes:
            for key, digits in (('top1', 2), ('nll', 3)):
                scores = _by_seed(pick.get((size, variant), []), _test(key))
                dense = _by_seed(pick[size, 'dense'], _test(key))
                row.append(mean_se(list(scores.values()) if variant == 'dense' else _paired(scores, dense), digits,
                                   sign=variant != 'dense'))
            row.append(f'{pick[size, variant][0]["labels"]["lr"]:g}' if (size, variant) in pick else '')
        rows.append(row)
    header = ['variant'] + [f'{size} images: {what}' for size in sizes for what in ('top-1', 'NLL', 'lr')]
    parts = [table(header, rows), '', '95 % intervals (Student, over seeds):', '']
    rows = []
    for size, variant in pick:
        references = [v for v in ('dense', 'dense, drop-path') if v != variant and v.count(',') <= variant.count(',')]
        for reference in references if variant != 'dense' else ():
            found = [_paired(*(_by_seed(pick[size, v], _test(key)) for v in (variant, reference)))
                     for key in ('top1', 'nll')]
            rows.append((f'{size}', f'{variant} - {reference}', with_interval(found[0], 2), with_interval(found[1], 3),
                         str(len(found[0]))))
    parts.append(table(('images', 'difference', 'top-1', 'NLL', 'seeds'), rows))
    return '\n'.join([*parts, '', _provenance(lines)])


def gated(lines: Lines, name: str) -> str:
    """The table of the study `gated`: the MoE with pulls, and its average."""
    dense = _by_seed(_select(lines, variant='dense'), _test('top1'))
    rows = []
    order = ('dense', 'dense, longer', 'no pull', 'no pull, longer')
    variants = sorted(_unique(lines, 'variant'), key=lambda v: (order.index(v) if v in order else len(order), v))
    for variant in variants:
        row = [variant]
        for kind in ('moe', 'average'):
            group = _select(lines, variant=variant, kind=kind)
            for key, digits in (('top1', 2), ('nll', 3)):
                row.append(mean_se([line['test'][key] for line in group], digits))
        for kind in ('moe', 'average'):
            paired = _paired(_by_seed(_select(lines, variant=variant, kind=kind), _test('top1')), dense)
            row.append('' if variant == 'dense' else mean_se(paired, 2, True))
        group = _select(lines, variant=variant, kind='moe')
        distances = [statistics.mean(v[-1][1] for k, v in line['experts'].items() if k.startswith('distance'))
                     for line in group if line['experts']]
        seconds = statistics.mean(line['last']['train_seconds'] for line in group)
        rows.append([*row, mean_se(distances, 3), f'{seconds:.0f}', str(len(group))])
    header = ('variant', 'top-1', 'NLL', 'averaged: top-1', 'averaged: NLL', 'to dense, top-1',
              'averaged to dense, top-1', 'distance to mean', 'training, s', 'seeds')
    parts = [table(header, rows), '', _wrap(
        '95 % intervals (Student, over seeds): the MoE against the one without pulls, and what averaging its experts '
        'changes:'), '']
    rows = []

    def scores(variant: str, kind: str, key: str) -> Dict[int, float]:
        return _by_seed(_select(lines, variant=variant, kind=kind), _test(key))

    for variant in [v for v in variants if _select(lines, variant=v, kind='average')]:
        gains = [_paired(scores(variant, 'moe', key), scores('no pull', 'moe', key)) for key in ('top1', 'nll')]
        costs = [_paired(scores(variant, 'average', key), scores(variant, 'moe', key)) for key in ('top1', 'nll')]
        texts = [with_interval(values, digits) for values, digits in zip((*gains, *costs), (2, 3, 2, 3))]
        rows.append((variant, *(['', ''] if variant == 'no pull' else texts[:2]), *texts[2:], str(len(costs[0]))))
    parts.append(table(('variant', 'MoE, top-1', 'MoE, NLL', 'averaging, top-1', 'averaging, NLL', 'seeds'), rows))
    return '\n'.join([*parts, '', _provenance(lines)])


def whole(lines: Lines, name: str) -> str:
    """The table of the study `whole`: a gated MoE, EWA and a dense model over widths and learning rates."""
    def setting(line: Dict[str, Any]) -> Tuple[int, int, int, str, float]:
        labels = line['labels']
        return (labels['width'], labels['epochs'], labels.get('mlp_ratio', 4), labels['variant'], labels['lr'])

    rows = [(*(f'{value}' for value in setting(line)), f'{line["last"]["eval_top1"]:.2f}',
             f'{line["last"]["eval_loss"]:.3f}', f'{line["test"]["top1"]:.2f}', f'{line["last"]["train_seconds"]:.0f}')
            for line in sorted(lines, key=setting)]
    header = ('width', 'epochs', 'FFN width / width', 'model', 'learning rate', 'val top-1', 'val loss', 'test top-1',
              'training, s')
    return '\n'.join([table(header, rows), '', _provenance(lines, 'One run a line.')])


def gathering(lines: Lines, name: str) -> str:
    """The tables of the study `gathering`."""
    def top1(**labels) -> Dict[int, float]:
        return _by_seed(_select(lines, **labels), _test('top1'))

    teacher, dense = (top1(kind=kind) for kind in ('moe', 'dense'))
    gains = _paired(teacher, dense)
    if not gains:
        return ''
    gain, error = statistics.mean(gains), standard_error(gains)
    telling = len(gains) > 1 and gain >= max(1., 4 * error)  # points; a share of less is noise over noise

    def kept(scores: Dict[int, float]) -> str:
        if not telling:
            return ''
        means = [statistics.mean(group[seed] for seed in scores) for group in (scores, dense, teacher)]
        share = 100 * benefit_kept(*means)
        return f' ({share:.0f} %)' if share >= 0 else ' (< 0)'

    models = {title: _select(lines, kind=kind)
              for title, kind in (
                  ('gated MoE (teacher)', 'moe'), ('gated MoE, pulled', 'pulled'), ('dense', 'dense'),
                  ('dense, longer', 'dense-longer'), ('EWA', 'ewa'))}
    parts = [table(('model', 'top-1', 'NLL', 'training, s', 'seeds'), [
        (title, mean_se([line['test']['top1'] for line in group]), mean_se([line['test']['nll'] for line in group], 3),
         f'{statistics.mean(line["last"]["train_seconds"] for line in group):.0f}', str(len(group)))
        for title, group in models.items() if group])]
    methods = _unique(_select(lines, kind='gathered'), 'method')
    costs = {}
    for budget in sorted(_unique(_select(lines, kind='distilled'), 'images')):
        runs = _select(lines, kind='distilled', images=budget)
        flops, seconds = (statistics.mean(r['last'][key] for r in runs) for key in ('train_pflops', 'train_seconds'))
        images = statistics.mean(r['last']['train_images'] for r in runs)
        costs[budget] = f'{images:,.0f} images, {1000 * flops:.2g} TFLOP, {seconds:.0f} s'
    rows = []
    for start in [*methods, 'dense model', 'random start']:
        after = dense if start == 'dense model' else top1(kind='gathered', method=start)
        row = [start, mean_se(list(after.values()))]
        for budget in costs:
            scores = top1(kind='distilled', start=start, images=budget)
            row.append(f'{mean_se(list(scores.values()))}{kept(scores)}' if scores else '')
        if any(row[1:]):
            rows.append(row)
    share = 'In brackets the share of that benefit that is kept (< 0: below the dense model).' if telling else (
        'That is no benefit of which a share that is kept could be given.')
    # the oldest lines have a list there
    cosines = [course[-1][1] for line in models['gated MoE (teacher)'] if isinstance(line.get('experts'), dict)
               for key, course in line['experts'].items() if key.startswith('cosine')]
    alike = (f'Cosine between the teacher\'s experts at the end, by layer and seed: {min(cosines):.2f} to '
             f'{max(cosines):.2f}. ' if cosines else '')
    parts += ['', _wrap(f'Teacher minus dense model: {mean_se(gains, 2, True)} points (paired). {share} {alike}Top-1 '
                        'right after gathering and after distillation:'), '',
              table(('start', 'right after gathering', *costs.values()), rows), '', _provenance(lines)]
    return '\n'.join(parts)


SECTIONS = dict(
    tune=tune, main=main, share_rate=share_rate, bounded=bounded, finetune=finetune, gated=gated, whole=whole,
    gathering=gathering)


def write() -> None:
    """Write the tables into docs/results.md, each between its two marker lines; the text around them is kept."""
    path = DOCS / 'results.md'
    text = path.read_text()
    for results in sorted(RESULTS.glob('*.jsonl')):
        study, _, name = results.stem.partition('-')
        lines = read_results(results.stem)
        start, end = f'<!-- {results.stem}: made by python -m experiments report -->', f'<!-- end of {results.stem} -->'
        if start not in text:
            print(f'{results.stem}: docs/results.md has no place for it')
            continue
        before, rest = text.split(start)
        text = f'{before}{start}\n\n{SECTIONS[study](lines, name).strip()}\n\n{end}{rest.split(end)[1]}'
        print(f'{results.stem}: {len(lines)} runs')
    path.write_text(text)
