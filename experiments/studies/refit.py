"""Refit beside gatherings of the weights: right after, over images and steps, and after little distillation."""
import statistics
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from matplotlib.figure import Figure

from ..data import classes_of, subset
from ..runner import Run
from ..setting import GATED, Flags, Setting, Study, Whole
from ..tables import Lines, by_seed, mean_se, provenance, scored, select, table, unique, wrap


class Teacher(NamedTuple):
    """A gated MoE to convert, and the learning rate it is trained with."""
    title: str
    model: Whole
    flags: Flags
    lr: float


ALL = dict(GATED, **{'moe-layers': 'all'})
TEACHERS: Dict[str, Dict[str, Teacher]] = {
    'fashion': {'wide': Teacher('width 32, MoEs in all blocks', Whole(32, 5, 0, ()), ALL, .008)},
    'glyphs': {
        'large': Teacher('width 32, MoEs in every second block', Whole(32, 12, 0, ()), GATED, .016),
        'wide': Teacher('width 16, MoEs in every second block', Whole(16, 12, 0, ()), GATED, .016),
        'narrow': Teacher('width 16, FFNs as wide, MoEs in all blocks', Whole(16, 12, 0, (), 1), ALL, .032),
    },
}
METHODS: Dict[str, Flags] = {
    'average': dict(method='average'), 'aligned': dict(method='aligned'), 'refit': dict(method='refit'),
    'refit, 1000 steps': {'method': 'refit', 'refit-steps': 1000}}
MORE: Dict[str, Flags] = {
    **{f'refit, {images} images': {'method': 'refit', 'calibration-images': images} for images in (64, 2048, 8192)},
    **{f'refit, {steps} steps': {'method': 'refit', 'refit-steps': steps} for steps in (300, 3000)},
    'prune': dict(method='prune')}
BUDGETS = (5000, 1000, 25000)  # images of distillation
EPOCHS = {1: ('large', 'wide', 'narrow'), 4: ('wide', 'narrow'), 12: ('narrow',)}  # on all images, by teacher
UNLABELLED = (512, 125)  # images and epochs of distillation without labels


def runs(s: Setting) -> Iterator[List[Run]]:
    """For each teacher the conversions with 512 images, distillation from three of them, and more of refit's own."""
    work = s.work / s.study('refit')
    other = {'wide': Teacher('as in whole', s.whole[-1], GATED, s.whole[-1].rates[0])}
    teachers = other if s.gpu else TEACHERS.get(s.name, other)
    cells = [(seed, key, teacher) for seed in range(s.seeds or 2) for key, teacher in teachers.items()]

    def converted(methods: Dict[str, Flags], cells: Sequence[Tuple[int, str, Teacher]]) -> List[Run]:
        return [
            Run(f'{key}-{method.replace(", ", "-").replace(" ", "-")}-{seed}',
                {**s.converting(), 'calibration-images': 512, **flags},
                dict(kind='gathered', teacher=key, method=method, seed=seed), 'convert',
                str(work / f'{key}-moe-{seed}' / 'last'))
            for seed, key, _ in cells for method, flags in methods.items()]

    yield [s.train_all(f'{key}-moe-{seed}', dict(kind='moe', teacher=key, seed=seed), teacher.model,
                       teacher.model.epochs, teacher.lr, **teacher.flags) for seed, key, teacher in cells]
    yield converted(METHODS, cells)
    available = sum(map(len, classes_of(s.data / 'train.tar').values()))
    starts = {'aligned': 'aligned', 'refit': 'refit', 'refit, 1000 steps': 'refit-1000-steps'}

    def distilled(start: str, images: int, factor: float = 0.25, kind: str = 'distilled', epochs: int = 1,
                  keys: Sequence[str] = tuple(teachers), **extra) -> List[Run]:
        part = s.data / 'train.tar'
        if images < available:
            part = subset(part, images, s.work / f'{s.name}-{images}.tar')
        what = {} if factor == 0.25 else dict(factor=factor)
        name = f'{kind.replace("distilled", "distil")}-{images}-{starts[start]}' + f'-lr-{factor:g}' * bool(what)
        return [
            s.train_all(
                f'{key}-{name}-{seed}',
                dict(kind=kind, teacher=key, start=start, images=images, seed=seed, **what), teacher.model,
                epochs, teacher.lr * factor, **{
                    'warmup-epochs': 0, 'train-split': str(part),
                    'initial-checkpoint': str(work / f'{key}-{starts[start]}-{seed}'),
                    'teacher': f'local-dir:{work / f"{key}-moe-{seed}" / "last"}', 'kd-temperature': 2.0,
                    'task-loss-weight': 0.5, **{name.replace('_', '-'): value for name, value in extra.items()}})
            for seed, key, teacher in cells if key in keys]

    few, more = (tuple(images for images in part if images < available) for part in (BUDGETS[:2], BUDGETS[2:]))
    for images in few:
        yield [run for start in starts for run in distilled(start, images)]
    for epochs, keys in EPOCHS.items():
        for start in ('refit, 1000 steps', 'aligned'):
            if epochs < 12 or start != 'aligned':
                yield distilled(start, available * epochs, epochs=epochs, keys=keys)
    size, epochs = UNLABELLED
    yield distilled(
        'refit, 1000 steps', size, kind='unlabelled', epochs=epochs, keys=('narrow',), task_loss_weight=0.,
        val_interval=epochs)
    yield [run for images in few[:1] for factor in (1 / 16, 1.)
           for run in distilled('refit', images, factor=factor, keys=('wide', 'narrow')) if run.labels['seed'] == 0]
    for images in more:
        yield [run for start in starts for run in distilled(start, images)]
    yield converted(MORE, [cell for cell in cells if cell[0] == 0])


def tables(lines: Lines, name: str) -> str:
    """A table for each teacher: top-1 right after, its share of the teacher's, and after distillation."""
    parts = []
    for key in unique(lines, 'teacher'):
        of = select(lines, teacher=key)
        teacher = by_seed(select(of, kind='moe'), scored('top1'))
        known = TEACHERS.get(name, {}).get(key)
        usual = [line for line in of if line['labels']['kind'] == 'distilled' and 'factor' not in line['labels']]
        budgets = sorted(unique(usual, 'images'))
        unlabelled = select(of, kind='unlabelled')
        rows = [['the MoE', mean_se(list(teacher.values())), '100 %', *([''] * (len(budgets) + bool(unlabelled)))]]
        for method in unique(of, 'method'):
            after = by_seed(select(of, kind='gathered', method=method), scored('top1'))
            kept = 100 * sum(after.values()) / sum(teacher[seed] for seed in after)
            row = [method, mean_se(list(after.values())), f'{kept:.0f} %', *(
                mean_se([line['test']['top1'] for line in select(usual, start=method, images=images)])
                for images in budgets)]
            if unlabelled:
                row.append(mean_se([line['test']['top1'] for line in select(unlabelled, start=method)]))
            rows.append(row)
        header = ['conversion', 'right after', "of the MoE's", *(f'distilled, {images:,} images' for images in budgets)]
        if unlabelled:
            header.append(f'distilled, {UNLABELLED[0]} images x {UNLABELLED[1]}, no labels')
        seeds = ', '.join(map(str, sorted(teacher)))
        parts += [wrap(f'`{key}`: {known.title if known else key}. MoE of seeds {seeds}; a cell without ± is seed 0 '
                       'alone. Top-1:'), '', table(header, rows), '']
        factors = sorted({line['labels']['factor'] for line in of if 'factor' in line['labels']})
        if factors:
            tried = [(factor, select(of, kind='distilled', start='refit', factor=factor)) for factor in factors]
            tried.append((0.25, select(usual, start='refit', images=BUDGETS[0])))
            scores = ', '.join(f'{factor:g}: {mean_se([line["test"]["top1"] for line in group])}'
                               for factor, group in sorted(tried, key=lambda pair: pair[0]))
            parts += [wrap(f'From refit, {BUDGETS[0]:,} images, over the learning rate as a share of the teacher\'s: '
                           f'{scores}.'), '']
    if figures(lines):
        parts += [f'![top-1 over seconds of conversion and distillation](refit-{name}-seconds.png)', '']
    return '\n'.join([*parts, provenance(lines)])


def figures(lines: Lines) -> Dict[str, Figure]:
    """Top-1 over the seconds that conversion and distillation take, of one teacher.

    Equal work takes equal time from any start, so a second of distillation is that of the fastest run, an image at a
    time, and a conversion that of the fastest of its kind.
    """
    known = [key for key in ('large', 'wide') if select(lines, teacher=key)]
    of = select(lines, teacher=known[0]) if known else []
    times = {method: [line['conversion']['seconds'] for line in select(of, kind='gathered', method=method)
                      if 'seconds' in line.get('conversion', {})] for method in unique(of, 'method')}
    distilled = [line for line in select(of, kind='distilled') if 'factor' not in line['labels']]
    if not times.get('refit') or not distilled:
        return {}
    image = min(line['last']['train_seconds'] / line['labels']['images'] for line in distilled)
    figure = Figure(figsize=(6.4, 3.6), layout='constrained')
    axis = figure.subplots()
    for start, label in (('aligned', 'experts averaged (aligned), distilled'), ('refit', 'refit, distilled'),
                         ('refit, 1000 steps', 'refit with 1,000 steps, distilled')):
        spent = min(times.get(start) or [0.])  # not known of gatherings, which take no steps
        points = [(spent, select(of, kind='gathered', method=start))] * bool(spent)
        points += [(spent + image * images, select(distilled, start=start, images=images))
                   for images in sorted(unique(select(distilled, start=start), 'images'))]
        axis.plot(*zip(*((x, statistics.mean(line['test']['top1'] for line in group)) for x, group in points)),
                  marker='o', markersize=4, label=label)
    teacher = statistics.mean(line['test']['top1'] for line in select(of, kind='moe'))
    axis.axhline(teacher, color='black', linestyle=':', linewidth=1)
    axis.annotate('the MoE', (1, teacher), xycoords=('axes fraction', 'data'), xytext=(-4, 3),
                  textcoords='offset points', ha='right', fontsize=8)
    axis.set_xscale('log')
    axis.set_ylim(0, 100)
    axis.set_xlabel('seconds on one core, conversion and distillation')
    axis.set_ylabel('test top-1, %')
    axis.legend(loc='lower right', fontsize=8)
    return {'seconds': figure}


STUDY = Study(
    question='What does refit keep of a gated MoE, right after and with little distillation?',
    cost='about 130 runs, 3 hours, most of it the teachers',
    runs=runs,
    tables=tables,
    figures=figures,
    setup="""
Conversions see 512 training images without labels unless it says otherwise; refit fits to seven eighths of them. "N
steps": of Adam for each FFN, still without labels. The teachers have 8 experts, 2 a token, started as copies.
Distillation: one epoch over the given number of training images, temperature 2, label and KL terms weighted half each,
a quarter of the teacher's learning rate, no warm-up. "No labels": of the teacher's logits alone.
""",
)
