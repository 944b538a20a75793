"""Tables and figures of docs/results.md, made from the lines in experiments/results and nothing else."""
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from ewa.distillation import benefit_kept

from .runner import read_results

DOCS = Path(__file__).parent.parent / 'docs'


def mean_se(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± standard error` of values, one a seed."""
    if not values:
        return ''
    if len(values) == 1:
        return f'{values[0]:.{digits}f}'
    return f'{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows])


def _select(lines: List[Dict[str, Any]], **labels) -> List[Dict[str, Any]]:
    found = [line for line in lines if all(line['labels'].get(k) == v for k, v in labels.items())]
    return sorted(found, key=lambda line: line['labels']['seed'])


def _unique(lines: List[Dict[str, Any]], label: str) -> List[Any]:
    return list(dict.fromkeys(line['labels'][label] for line in lines if label in line['labels']))


def _provenance(lines: List[Dict[str, Any]]) -> str:
    machine = lines[-1]['machine']
    seeds = sorted({line['labels']['seed'] for line in lines})
    hours = sum(line['seconds'] for line in lines) / 3600
    return (f'Seeds {", ".join(map(str, seeds))}; {machine["gpu"] or machine["cpu"]}, {machine["threads"]} thread(s) a '
            f'run, torch {machine["torch"]}, timm {machine["timm"]}; {hours:.1f} hours of runs. Mean ± standard error '
            f'over seeds, test set.')


def gathering(lines: List[Dict[str, Any]]) -> str:
    """The tables of the study `gathering`."""
    def top1(**labels) -> Dict[int, float]:
        return {line['labels']['seed']: line['test']['top1'] for line in _select(lines, **labels)}

    teacher, dense, ewa = (top1(kind=kind) for kind in ('moe', 'dense', 'ewa'))
    if not teacher or not dense:
        return ''

    gains = [teacher[seed] - dense[seed] for seed in teacher if seed in dense]
    gain = statistics.mean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.
    telling = gain >= max(1., 4 * error)  # points; a share of less is noise over noise

    def kept(scores: Dict[int, float]) -> str:
        if not telling:
            return ''
        means = [statistics.mean(group[seed] for seed in scores) for group in (scores, dense, teacher)]
        return f' ({100 * benefit_kept(*means):.0f} %)'

    parts = [table(('model', 'top-1', 'NLL'), [
        (name, mean_se([line['test']['top1'] for line in _select(lines, kind=kind)]),
         mean_se([line['test']['nll'] for line in _select(lines, kind=kind)], 3))
        for name, kind in (('gated MoE (teacher)', 'moe'), ('dense', 'dense'), ('EWA', 'ewa'))])]
    methods = _unique(_select(lines, kind='gathered'), 'method')
    budgets = sorted(_unique(lines, 'images'))
    costs = {}
    for budget in budgets:
        runs = _select(lines, kind='distilled', images=budget)
        flops, seconds = (statistics.mean(r['last'][key] for r in runs) for key in ('train_pflops', 'train_seconds'))
        costs[budget] = f'{budget:,} images, {1000 * flops:.2g} TFLOP, {seconds:.0f} s'
    rows = []
    for start in [*methods, 'EWA export', 'dense model', 'random start']:
        after = top1(kind='gathered', method=start) if start in methods else (
            top1(kind='ewa-export') if start == 'EWA export' else dense if start == 'dense model' else {})
        row = [start, mean_se(list(after.values()))]
        for budget in budgets:
            scores = top1(kind='distilled', start=start, images=budget)
            row.append(f'{mean_se(list(scores.values()))}{kept(scores)}' if scores else '')
        rows.append(row)
    share = 'In brackets the share of that benefit that is kept.' if telling else (
        'That is too little to say what share of it is kept, so none is given.')
    parts += ['', f'The teacher beats the dense model by {gain:.2f} ± {error:.2f} points (paired). {share} Top-1 right after '
              'gathering and after distillation:', '',
              table(('start', 'right after gathering', *costs.values()), rows)]
    gathered = _select(lines, kind='gathered')
    if gathered:
        parts += ['', _provenance(lines)]
    return '\n'.join(parts)


def main_study(lines: List[Dict[str, Any]]) -> str:
    """The table of the study `main`, with paired differences to dense over equal seeds."""
    parts = []
    for images in _unique(lines, 'images'):
        for epochs in _unique(lines, 'epochs'):
            group = _select(lines, images=images, epochs=epochs)
            if not group:
                continue
            key = {line['labels']['seed']: line for line in _select(group, variant='dense')}
            rows = []
            for variant in _unique(group, 'variant'):
                runs = _select(group, variant=variant)
                test = 'test_ema' if 'EMA' in variant else 'test'
                paired = [(run, key[run['labels']['seed']]) for run in runs if run['labels']['seed'] in key]
                rows.append((
                    variant, str(len(runs)), mean_se([run[test]['top1'] for run in runs]),
                    '' if variant == 'dense' else mean_se([run[test]['top1'] - d['test']['top1'] for run, d in paired]),
                    mean_se([run[test]['nll'] for run in runs], 3),
                    '' if variant == 'dense' else mean_se(
                        [run[test]['nll'] - d['test']['nll'] for run, d in paired], 3),
                    mean_se([run[test]['ece'] for run in runs], 3)))
            parts += ['', f'{images:,} training images, {epochs} epochs:', '',
                      table(('variant', 'seeds', 'top-1', 'to dense', 'NLL', 'to dense', 'ECE'), rows)]
    return '\n'.join([*parts, '', _provenance(lines)]) if parts else ''


def share_rate(lines: List[Dict[str, Any]]) -> str:
    """The table and the figure of the study `share_rate`."""
    inits = _unique(lines, 'init')
    rates = sorted(_unique(lines, 'rate'))

    def column(init: str, rate: float, read: Callable[[Dict[str, Any]], float]) -> List[float]:
        return [read(line) for line in _select(lines, init=init, rate=rate)]

    def distance(line: Dict[str, Any]) -> float:
        return statistics.mean(record['distance'] for record in line['experts'])

    header = ['share rate'] + [f'{init}: {what}' for init in inits for what in ('top-1', 'NLL', 'distance to mean')]
    rows = [[f'{rate:g}'] + [cell for init in inits for cell in (
        mean_se(column(init, rate, lambda line: line['test']['top1'])),
        mean_se(column(init, rate, lambda line: line['test']['nll']), 3),
        mean_se(column(init, rate, distance), 3))] for rate in rates]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout='constrained')
    for axis, (what, key) in zip(figure.subplots(1, 2), (('test top-1 (%)', 'top1'), ('test NLL', 'nll'))):
        for init in inits:
            values = [column(init, rate, lambda line: line['test'][key]) for rate in rates]
            means = [statistics.mean(v) if v else float('nan') for v in values]
            errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0 for v in values]
            axis.errorbar(range(len(rates)), means, errors, marker='o', capsize=3, label=f'{init} start')
        axis.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates])
        axis.set_xlabel('share rate')
        axis.set_ylabel(what)
        axis.legend()
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / 'share_rate.png', dpi=120)
    return '\n'.join([table(header, rows), '', '![share rate](share_rate.png)', '', _provenance(lines)])


SECTIONS = dict(main=main_study, share_rate=share_rate, gathering=gathering)


def write() -> None:
    """Write the tables into docs/results.md, each between its two marker lines; the text around them is kept."""
    path = DOCS / 'results.md'
    text = path.read_text()
    for name, section in SECTIONS.items():
        lines = read_results(name)
        start, end = f'<!-- {name}: made by python -m experiments report -->', f'<!-- end of {name} -->'
        if not lines or start not in text:
            continue
        before, rest = text.split(start)
        text = f'{before}{start}\n\n{section(lines)}\n\n{end}{rest.split(end)[1]}'
        print(f'{name}: {len(lines)} runs')
    path.write_text(text)
