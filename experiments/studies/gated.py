"""Pulls on a gated MoE, and what averaging its experts then costs."""
import math
import statistics
from typing import Dict, Iterator, List

from ..runner import Run
from ..setting import GATED, Flags, Notes, Setting, Study
from ..tables import Lines, by_seed, mean_se, paired, provenance, scored, select, table, unique, with_interval, wrap


def runs(s: Setting) -> Iterator[List[Run]]:
    """A gated MoE with and without pulls, and what averaging its experts then costs."""
    seeds = range(s.seeds or 5)
    rates: Dict[str, Flags] = {'no pull': {'share-rate': 0.}}
    rates.update({f'EWA {rate:g}': {'share-rate': rate} for rate in (1e-3, 1e-2, .1)})
    rates.update({f'EWA {rate:g}, linear': {'share-rate': rate, 'share-schedule': 'linear'} for rate in (3e-3, 1e-2)})
    rates['EWA 0.01, first half'] = {'share-rate': 1e-2, 'share-stop-epoch': s.lengths[1] / 2}

    def run(name, seed, flags, times=1.):
        labels = dict(variant=name, kind='moe', seed=seed)
        return s.train(name, labels, s.size, math.ceil(times * s.lengths[1]), **flags)

    moes = [run(name, seed, dict(GATED, **flags)) for seed in seeds for name, flags in rates.items()]
    # a step of the MoE takes about 1.5 times the dense one
    yield moes + [
        run(name, seed, flags, times) for seed in seeds for name, flags, times in (
            ('dense', {}, 1), ('dense, longer', {}, 1.5), ('no pull, longer', dict(GATED, **rates['no pull']), 1.5))]
    yield [Run(f'{run.name}-average', dict(s.converting(), method='average'), dict(run.labels, kind='average'),
               'convert', str(s.work / s.study('gated') / run.name / 'last')) for run in moes]


def tables(lines: Lines, name: str) -> str:
    """The table of the study `gated`: the MoE with pulls, and its average."""
    dense = by_seed(select(lines, variant='dense'), scored('top1'))
    rows: List[List[str]] = []
    order = ('dense', 'dense, longer', 'no pull', 'no pull, longer')
    variants = sorted(unique(lines, 'variant'), key=lambda v: (order.index(v) if v in order else len(order), v))
    for variant in variants:
        row = [variant]
        for kind in ('moe', 'average'):
            group = select(lines, variant=variant, kind=kind)
            for key, digits in (('top1', 2), ('nll', 3)):
                row.append(mean_se([line['test'][key] for line in group], digits))
        for kind in ('moe', 'average'):
            to_dense = paired(by_seed(select(lines, variant=variant, kind=kind), scored('top1')), dense)
            row.append('' if variant == 'dense' else mean_se(to_dense, 2, True))
        group = select(lines, variant=variant, kind='moe')
        distances = [statistics.mean(v[-1][1] for k, v in line['experts'].items() if k.startswith('distance'))
                     for line in group if line['experts']]
        seconds = statistics.mean(line['last']['train_seconds'] for line in group)
        rows.append([*row, mean_se(distances, 3), f'{seconds:.0f}', str(len(group))])
    header = ('variant', 'top-1', 'NLL', 'averaged: top-1', 'averaged: NLL', 'to dense, top-1',
              'averaged to dense, top-1', 'distance to mean', 'training, s', 'seeds')
    parts = [table(header, rows), '', wrap(
        '95 % intervals (Student, over seeds): the MoE against the one without pulls, and what averaging its experts '
        'changes:'), '']
    rows = []

    def scores(variant: str, kind: str, key: str) -> Dict[int, float]:
        return by_seed(select(lines, variant=variant, kind=kind), scored(key))

    for variant in [v for v in variants if select(lines, variant=v, kind='average')]:
        gains = [paired(scores(variant, 'moe', key), scores('no pull', 'moe', key)) for key in ('top1', 'nll')]
        costs = [paired(scores(variant, 'average', key), scores(variant, 'moe', key)) for key in ('top1', 'nll')]
        texts = [with_interval(values, digits) for values, digits in zip([*gains, *costs], (2, 3, 2, 3))]
        rows.append([variant, *(['', ''] if variant == 'no pull' else texts[:2]), *texts[2:], str(len(costs[0]))])
    parts.append(table(('variant', 'MoE, top-1', 'MoE, NLL', 'averaging, top-1', 'averaging, NLL', 'seeds'), rows))
    return '\n'.join([*parts, '', provenance(lines)])


STUDY = Study(
    question='Do pulls help or hurt a gated MoE, and what does averaging it then cost?',
    cost='85 runs, 1.8 hours',
    runs=runs,
    tables=tables,
    setup="""
8 experts, 2 a token, in every second block, started as copies; pulled at several rates. "Averaged": each layer of the
trained MoE replaced by the mean of its experts, nothing trained after.
""",
    notes=dict(
        fashion=Notes(title='Fashion-MNIST', setup="""
2,000 images, 40 epochs, learning rate 0.002, weight decay 0.05. Five seeds; rising rates and longer trainings two. Some
runs shared the machine with others: their times are no benchmark.
""", reading="""
- This MoE is no better than the dense model: -0.1 points (-1.2 to +1.0) without pulls, at 1.7 times the training time.
- Pulls do not hurt it. At a share rate of 0.01 they lower its loss by 0.14 (0.09 to 0.18), at 0.1 by 0.09; top-1 does
  not change beyond the noise. (With three seeds the gain at 0.1 had looked certain, +0.38, 0.25 to 0.50; five say
  +0.57, -0.49 to +1.63.)
- They decide what conversion costs: averaging the experts loses 3 to 14 points without pulls (6.9 in the mean, 1.3 to
  12.6), 3.1 at 0.001, 0.15 at 0.01 and nothing at 0.1, where the experts have become equal.
- What is then averaged is a dense model as good as one that was trained as such: level with it at 0.01 (+0.0, -0.6 to
  +0.6) at a lower loss, 0.5 points better (0.2 to 0.8) at 0.1. There equal experts mean a smaller learning rate of the
  FFNs, with AdamW, which may be all of that gain ([main study](main-fashion.md)).
- Pulling in the first half only (perhaps what the paper calls early EWA) does not lower the MoE's own loss and leaves a
  cost of 1.1 points, though its average has the lowest loss of all, 0.84; rates that rise to 0.003 or 0.01 are no
  better than constant ones.
"""),
    ))
