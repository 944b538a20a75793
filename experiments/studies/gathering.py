"""Gated MoE to dense: every gathering, then distillation (OneS, arXiv 2201.10890)."""
import math
import statistics
from typing import Dict, Iterator, List

from ewa.distillation import benefit_kept
from ewa.gathering import METHODS

from ..data import classes_of, subset
from ..runner import Run
from ..setting import EWA, Notes, Setting, Study
from ..tables import (
    Lines,
    by_seed,
    mean_se,
    paired,
    provenance,
    scored,
    select,
    standard_error,
    table,
    unique,
    with_interval,
    wrap,
)
from .whole import best_rate


def runs(s: Setting) -> Iterator[List[Run]]:
    """Gated MoE to dense: every gathering, then distillation at six budgets (OneS, arXiv 2201.10890).

    Beside it what else could be done: a dense model, trained as long or longer, a MoE that is pulled while it trains,
    EWA.
    """
    seeds = range(s.seeds or 3)
    trained = s.work / s.study('gathering')
    model = s.whole[-1]
    gated_name, teacher = list(model.variants().items())[-1]
    rates = {'dense': best_rate(s, 'dense'), 'MoE': best_rate(s, gated_name)}
    pulled = dict(teacher, **{'share-rate': 0.01})
    # by whose learning rate, and how much longer: so many times the dense one a step of the MoE takes, about
    slower = 2.5 if teacher['moe-layers'] == 'all' else 1.8
    models = {
        'moe': (teacher, 'MoE', 1), 'dense': ({}, 'dense', 1), 'pulled': (pulled, 'MoE', 1), 'ewa': (EWA, 'dense', 1),
        'dense-longer': ({}, 'dense', slower)}
    yield [
        s.train_all(f'{kind}-{seed}', dict(kind=kind, seed=seed), model, math.ceil(times * model.epochs),
                    rates[variant], **flags)
        for seed in seeds for kind, (flags, variant, times) in models.items()]
    starts = {method: ('moe', method) for method in METHODS}
    starts.update({'pulled MoE, average': ('pulled', 'average'), 'EWA export': ('ewa', 'average')})
    folders = {start: start.lower().replace(', ', '-').replace(' ', '-') for start in starts}
    yield [
        Run(f'{folders[start]}-{seed}', dict(s.converting(), method=method),
            dict(kind='gathered', method=start, seed=seed), 'convert', str(trained / f'{kind}-{seed}' / 'last'))
        for seed in seeds for start, (kind, method) in starts.items()]
    folders.update({'dense model': 'dense', 'random start': ''})
    # in long distillations the methods of OneS, and what else is of use; in the longest what led
    few = {4: ('sum', 'average', 'top_kg', 'svd_kg', 'aligned', 'pulled MoE, average', 'dense model', 'random start'),
           12: ('aligned', 'dense model', 'random start')}
    available = sum(map(len, classes_of(s.data / 'train.tar').values()))
    budgets = [(count, 1) for count in (1000, 5000, 25000) if count < available] + [
        (available, times) for times in (1, 4, 12)]
    for count, times in budgets:
        part = s.data / 'train.tar'
        if count < available:
            part = subset(part, count, s.work / f'{s.name}-{count}.tar')
        trainings = []
        for seed in seeds:
            for start, name in folders.items():
                if times > 1 and start not in few[times]:
                    continue
                folder = str(trained / f'{name}-{seed}' / ('last' if start == 'dense model' else '')) if name else None
                trainings.append(s.train_all(
                    f'distil-{count * times}-{name or "random"}-{seed}',
                    dict(kind='distilled', start=start, images=count * times, seed=seed), model, times,
                    rates['MoE'] / 4 if name else rates['dense'], **{
                        'warmup-epochs': 0, 'train-split': str(part), 'initial-checkpoint': folder,
                        'teacher': f'local-dir:{trained / f"moe-{seed}" / "last"}', 'kd-temperature': 2.0,
                        'task-loss-weight': 0.5}))
        yield trainings


def tables(lines: Lines, name: str) -> str:
    """The tables of the study `gathering`."""
    def top1(**labels) -> Dict[int, float]:
        return by_seed(select(lines, **labels), scored('top1'))

    teacher, dense = (top1(kind=kind) for kind in ('moe', 'dense'))
    gains = paired(teacher, dense)
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

    models = {title: select(lines, kind=kind)
              for title, kind in (
                  ('gated MoE (teacher)', 'moe'), ('gated MoE, pulled', 'pulled'), ('dense', 'dense'),
                  ('dense, longer', 'dense-longer'), ('EWA', 'ewa'))}
    parts = [table(('model', 'top-1', 'NLL', 'training, s', 'seeds'), [
        (title, mean_se([line['test']['top1'] for line in group]), mean_se([line['test']['nll'] for line in group], 3),
         f'{statistics.mean(line["last"]["train_seconds"] for line in group):.0f}', str(len(group)))
        for title, group in models.items() if group])]
    methods = unique(select(lines, kind='gathered'), 'method')
    costs = {}
    for budget in sorted(unique(select(lines, kind='distilled'), 'images')):
        group = select(lines, kind='distilled', images=budget)
        images, flops, seconds = (statistics.mean(line['last'][key] for line in group)
                                  for key in ('train_images', 'train_pflops', 'train_seconds'))
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
    parts += ['', wrap(f'Teacher minus dense model: {with_interval(gains, 2)} points (paired, 95 % interval). {share} '
                       f'{alike}Top-1 right after gathering and after distillation:'), '',
              table(('start', 'right after gathering', *costs.values()), rows), '', provenance(lines)]
    return '\n'.join(parts)


STUDY = Study(
    question='What do gathering and distillation keep of a gated MoE?',
    cost='237 runs, 6 hours',
    runs=runs,
    tables=tables,
    raw=('fashion6',),
    setup="""
The teacher has 8 experts, 2 a token, in every second block or in all, started as copies. With full-width experts
`do_acp` keeps a single one, so it is not the published method here. Distillation: one epoch over the given number of
training images (288,000 and 864,000: four and twelve over all), temperature 2, label and KL terms weighted half each, a
quarter of the teacher's learning rate (random start: all of the dense model's). Lines of `top_kg` and `svd_kg` up to
version 0.1.0 are by an earlier reading of OneS: units by the norm of their joint vector, `r/E` singular triplets.
""",
    notes=dict(
        glyphs=Notes(title='glyphs, FFNs as wide as the model', setup="""
All 72,086 training images, 12 epochs, width 16, MoEs in all blocks; learning rate 0.032 for MoE and dense model, the
best of each in [whole](whole-glyphs.md). "Dense, longer": 30 epochs, about the time that the MoE takes. 864,000 images:
twelve epochs. Three seeds; the longer dense model and less than an epoch of distillation two; no pulled MoE and no EWA
yet, no random start over twelve epochs.
""", reading="""
- Here the MoE has a benefit over a dense model of equal epochs: 3.45 points (0.5 to 6.4, three seeds), for 2.7 times
  its training time. The dense model trained as long as that in time is 1.2 points better than the MoE (1.6 and 0.8, two
  seeds).
- Gathering alone keeps nothing (0.4 to 1.3 %). Up to four epochs of distillation every gathered model stays below the
  dense one, at 77.7 by `aligned`, 77.4 by the average and 72.3 by `sum`.
- After twelve epochs (1.2 TFLOP, as many epochs as the dense model's training, in 1.8 times its time) `aligned` is at
  79.4 and keeps 37 % of the benefit (18, 53 and 27 by seed). The dense model, distilled as long by the same teacher, is
  at 80.0, 0.6 above it (0.6 below to 1.8 above; ahead in each seed): the gathered start has no advantage over it that
  was seen. (Training the dense model for 30 epochs instead gives 83.0, more than the MoE has.)
- A gathered start is still worth much against a random one: 43 % after four epochs where `aligned` has 78.
"""),
        glyphs4=Notes(title='glyphs, FFNs four times as wide, an earlier setting', setup="""
Nobody can go on with this setting: the study now takes narrow FFNs and MoEs in all blocks. The page stays because two
verdicts rest on it: that a MoE with wide FFNs has no benefit over a dense model here, and what pulls cost a gated MoE
on glyphs.

MoEs in every second block. All 72,086 training images, 12 epochs, width 16; learning rate 0.016 for the MoEs, 0.032 for
the dense models and EWA, the dense model's best ([whole](whole-glyphs.md); EWA's own is 0.016). "Pulled": share rate
0.01. "Dense, longer": 22 epochs, about the time that the MoE takes.

Seeds 0 and 1; the gated MoEs, the dense model and the row right after gathering also seed 2.
""", reading="""
- The teachers are 1.2 and 0.9 points better than the dense model (seeds 0 and 1) and 2.7 worse (seed 2): no benefit
  that is certain. The dense model trained as long as they take is 1.7 points above them (two seeds). What follows is of
  use to those who own only the MoE.
- Right after gathering little is left by any method: 3 to 22 % by averages, 11 to 27 % by `aligned`, 2 to 6 % by the
  most used expert, 0.4 to 2.7 % by the others.
- Distillation makes most of that equal: after 25,000 images `aligned` is at 73.6 %, after one epoch at 77.9, after four
  (0.66 TFLOP) at 81.5, 2.7 points below its teachers; `average` and Top-KG end within 0.7 points of it, SVD-KG 1.8 and
  `sum` 4 below. Starting from any gathering is worth a lot against a random start (62 % after four epochs).
- The dense model as it is lies 1.4 points or more above every converted MoE at every budget (means of seeds 0 and 1);
  distilled by the MoE it does not gain.
- A pulled MoE averages without loss (its experts are equal in the end), but it ends below the free MoE, by 1.3, 5.0 and
  0.3 points. Our reading: with equal experts it is a dense model at the learning rate of the MoE, half of what suits a
  dense model here (in [the study of rates](whole-glyphs.md) one reached 80.6 at it; the pulled MoEs, 80.9 in the mean).
  What a share rate between 0 and 0.01 keeps was not measured.
"""),
    ))
