"""Refit beside gatherings of the weights: right after, over images and steps, and after little distillation."""
import statistics
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from matplotlib.figure import Figure

from ..data import classes_of, subset
from ..runner import Run
from ..setting import GATED, Flags, Notes, Setting, Study, Whole
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
OTHERS: Dict[str, Dict[str, Teacher]] = {  # other kinds of MoE, one seed, conversions alone
    'glyphs': {
        'shared': Teacher(
            'width 32, MoEs in every second block, one shared expert and 16 of half the width, 3 a token',
            Whole(32, 5, 0, ()), dict(GATED, **{
                'num-experts': 16, 'top-k': 3, 'expert-ratio': 0.5, 'num-shared': 1}), .016),
        'top1': Teacher(
            'width 32, MoEs in every second block, one expert a token by its raw gate', Whole(32, 5, 0, ()),
            dict(GATED, **{'top-k': 1, 'model-kwargs': {'renormalise': False}}), .016),
    },
}
METHODS: Dict[str, Flags] = {
    'average': dict(method='average'), 'aligned': dict(method='aligned'), 'refit': dict(method='refit'),
    'refit, 1000 steps': {'method': 'refit', 'refit-steps': 1000}}
JOINT: Dict[str, Flags] = {
    'refit, 1000 joint steps': {'method': 'refit', 'refit-joint-steps': 1000},
    'refit, 1000 and 3000 joint steps': {'method': 'refit', 'refit-steps': 1000, 'refit-joint-steps': 3000}}
BEST = 'refit, 1000 and 3000 joint steps'
MANY: Dict[str, Flags] = {f'{BEST}, 5000 images': {**JOINT[BEST], 'calibration-images': 5000}}
RIDGE: Dict[str, Flags] = {'refit, ridge 1e-08': {'method': 'refit', 'ridge': 1e-08}}
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
    cells = [(seed, key, teacher) for seed in range(s.seeds or 3) for key, teacher in teachers.items()]

    def converted(methods: Dict[str, Flags], cells: Sequence[Tuple[int, str, Teacher]]) -> List[Run]:
        return [
            Run(f'{key}-{method.replace(", ", "-").replace(" ", "-")}-{seed}',
                {**s.converting(), 'calibration-images': 512, **flags},
                dict(kind='gathered', teacher=key, method=method, seed=seed), 'convert',
                str(work / f'{key}-moe-{seed}' / 'last'))
            for seed, key, _ in cells for method, flags in methods.items()]

    def moes(cells: Sequence[Tuple[int, str, Teacher]]) -> List[Run]:
        return [s.train_all(f'{key}-moe-{seed}', dict(kind='moe', teacher=key, seed=seed), teacher.model,
                            teacher.model.epochs, teacher.lr, **teacher.flags) for seed, key, teacher in cells]

    yield moes(cells)
    yield converted(METHODS, cells)
    available = sum(map(len, classes_of(s.data / 'train.tar').values()))
    starts = {'aligned': 'aligned', 'refit': 'refit', 'refit, 1000 steps': 'refit-1000-steps'}

    def distilled(start: str, images: int, factor: float = 0.25, kind: str = 'distilled', epochs: int = 1,
                  keys: Sequence[str] = tuple(teachers), **extra) -> List[Run]:
        part = s.data / 'train.tar'
        if images < available:
            part = subset(part, images, s.work / f'{s.name}-{images}.tar')
        what = {} if factor == 0.25 else dict(factor=factor)
        name = f'{kind.replace("distilled", "distil").replace(" ", "-")}-{images}-{starts[start]}'
        name += f'-lr-{factor:g}' * bool(what)
        return [
            s.train_all(
                f'{key}-{name}-{seed}',
                dict(kind=kind, teacher=key, start=start, images=images, seed=seed, **what), teacher.model,
                epochs, teacher.lr * factor, **{
                    'warmup-epochs': 0, 'train-split': str(part),
                    'initial-checkpoint': str(work / f'{key}-{starts[start]}-{seed}'),
                    'teacher': f'local-dir:{work / f"{key}-moe-{seed}" / "last"}', 'kd-temperature': 2.0,
                    'task-loss-weight': 0.5, **{name.replace('_', '-'): value for name, value in extra.items()}})
            for seed, key, teacher in cells if key in keys and (
                epochs == 1 or seed < 2 or kind == 'unlabelled' or s.name != 'glyphs')]

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
           for run in distilled('refit', images, factor=factor) if run.labels['seed'] == 0]
    for images in more:
        yield [run for start in starts for run in distilled(start, images)]
    yield converted(JOINT, cells)
    starts.update({BEST: BEST.replace(', ', '-').replace(' ', '-')})
    for images in (*few[:1], *more):
        yield distilled(BEST, images)
    for images in few[:1]:  # smaller batches, no labels
        yield [run for start in ('aligned', BEST) for run in distilled(
            start, images, kind='small batches', factor=1 / 8, batch_size=25, task_loss_weight=0.)]
    starts.update(dict.fromkeys(RIDGE, 'refit-ridge-1e-08'))
    yield converted(RIDGE, cells)
    for images in few[:1]:
        yield [run for method in RIDGE for run in distilled(method, images)]
    yield converted(MORE, [cell for cell in cells if cell[0] == 0])
    others = [(0, key, teacher) for key, teacher in OTHERS.get(s.name, {}).items() if not s.gpu]
    yield moes(others)
    yield converted({name: flags for name, flags in {**METHODS, **JOINT}.items() if name != 'aligned'}, others)
    yield converted(MANY, [cell for cell in cells if cell[0] == 2])


def tables(lines: Lines, name: str) -> str:
    """A table for each teacher: top-1 right after, its share of the teacher's, and after distillation."""
    parts = []
    for key in unique(lines, 'teacher'):
        of = select(lines, teacher=key)
        teacher = by_seed(select(of, kind='moe'), scored('top1'))
        known = {**TEACHERS.get(name, {}), **OTHERS.get(name, {})}.get(key)
        usual = [line for line in of if line['labels']['kind'] == 'distilled' and 'factor' not in line['labels']]
        budgets = sorted(unique(usual, 'images'))
        others = [(title, group) for title, group in (
            (f'{BUDGETS[0]:,} images in batches of 25, no labels', select(of, kind='small batches')),
            (f'{UNLABELLED[0]} images x {UNLABELLED[1]}, no labels', select(of, kind='unlabelled'))) if group]
        rows = [['the MoE', mean_se(list(teacher.values())), '100 %', *([''] * (len(budgets) + len(others)))]]
        for method in unique(of, 'method'):
            after = by_seed(select(of, kind='gathered', method=method), scored('top1'))
            kept = 100 * sum(after.values()) / sum(teacher[seed] for seed in after)
            row = [method, mean_se(list(after.values())), f'{kept:.0f} %', *(
                mean_se([line['test']['top1'] for line in select(usual, start=method, images=images)])
                for images in budgets)]
            row += [mean_se([line['test']['top1'] for line in select(group, start=method)]) for _, group in others]
            rows.append(row)
        header = ['conversion', 'right after', "of the MoE's", *(f'distilled, {images:,} images' for images in budgets)]
        header += [f'distilled, {title}' for title, _ in others]
        seeds = ', '.join(map(str, sorted(teacher)))
        parts += [wrap(f'`{key}`: {known.title if known else key}. MoE of seeds {seeds}; a cell without ± is one seed '
                       'alone. Top-1:'), '', table(header, rows), '']
        factors = sorted(unique(select(of, kind='distilled'), 'factor'))
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
    """Top-1 over the seconds that conversion and distillation take, a panel a teacher.

    Equal work takes equal time from any start, so a second of distillation is that of the fastest run, an image at a
    time, and a conversion that of the fastest of its kind; of gatherings, which take no steps, it is not known.
    """
    panels = []
    for key in ('large', 'wide', 'narrow'):
        of = select(lines, teacher=key)
        fits = {method: [line['conversion']['seconds'] for line in select(of, kind='gathered', method=method)
                         if 'seconds' in line.get('conversion', {})] for method in unique(of, 'method')}
        distilled = [line for line in select(of, kind='distilled') if 'factor' not in line['labels']]
        if fits.get('refit') and distilled:
            panels.append((key, of, fits, distilled))
    if not panels:
        return {}
    figure = Figure(figsize=(1.2 + 3.1 * len(panels), 3.4), layout='constrained')
    for axis, (key, of, fits, distilled) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        image = min(line['last']['train_seconds'] / line['labels']['images'] for line in distilled)
        for start, label in (('aligned', 'aligned average, distilled'), ('refit', 'refit (first point), distilled'),
                             ('refit, 1000 steps', 'refit with 1,000 steps, distilled'),
                             (BEST, 'refit with 3,000 joint steps too, distilled')):
            spent = min(fits.get(start) or [0.])
            points = [(spent, select(of, kind='gathered', method=start))] * bool(spent)
            points += [(spent + image * images, select(distilled, start=start, images=images))
                       for images in sorted(unique(select(distilled, start=start), 'images'))]
            axis.plot(*zip(*((x, statistics.mean(line['test']['top1'] for line in group)) for x, group in points)),
                      marker='o', markersize=3, label=label)
        axis.axhline(statistics.mean(line['test']['top1'] for line in select(of, kind='moe')), color='black',
                     linestyle=':', linewidth=1, label='the MoE')
        axis.set_xscale('log')
        axis.set_ylim(0, 100)
        flags = select(of, kind='moe')[0]['flags']
        where = 'all blocks' if flags['moe-layers'] == 'all' else 'every second block'
        axis.set_title(f'width {flags["model-kwargs"]["embed_dim"]}, MoEs in {where}' + ', narrow' * (key == 'narrow'),
                       fontsize=8)
        axis.set_xlabel('seconds on one core')
    figure.axes[0].set_ylabel('test top-1, %')
    figure.axes[0].legend(loc='lower right', fontsize=7)
    return {'seconds': figure}


STUDY = Study(
    question='What does refit keep of a gated MoE, right after and with little distillation?',
    cost='about 270 runs, 4 hours, two fifths of it the teachers',
    runs=runs,
    tables=tables,
    figures=figures,
    setup="""
Conversions see 512 training images without labels unless it says otherwise; refit fits to seven eighths of them. "N
steps": of Adam for each FFN, "joint steps": for the whole dense model against the MoE's outputs on mixed images, still
without labels. The teachers have 8 experts, 2 a token, started as copies, unless it says otherwise.
Distillation: one epoch over the given number of training images, temperature 2, label and KL terms weighted half each,
a quarter of the teacher's learning rate, no warm-up. "No labels": of the teacher's logits alone; in batches of 25
instead of 100 an eighth of that rate. More than one epoch on glyphs: seeds 0 and 1. What joint steps mix, what
they train and their rate were chosen on validation images of `wide` and `narrow`, seed 0.
""",
    notes=dict(
        fashion=Notes(title='Fashion-MNIST', reading="""
- Refit keeps 99 %, steps of either kind bring up to 0.6 points, and between 64 and 8,192 images and 300 and 3,000 steps
  lies about a point.
- A short distillation at a quarter of the teacher's learning rate takes off 1 to 3.4 points of refit without and with
  steps a layer, 0.9 after joint steps; at a sixteenth 5,000 images keep what refit has. From a fit with a ridge of
  1e-8, which is as good right after, it takes off a point more: units that are nearly alike, which a small ridge gives
  large weights of opposite signs, may be why.
- After 25,000 images refit is 0.6 to 0.9 points ahead of `aligned`, after an epoch, with steps, 0.6; after four epochs
  all are at the teacher.
"""),
        glyphs=Notes(title='glyphs', reading="""
- The wider the model, the less is lost: at width 32, where a token's two experts leave the dense FFN half of the hidden
  units they have, refit keeps 93 % and with steps 96; at width 16 78 and 86; with FFNs as wide as the model, in all
  blocks, 54 and 73. 1,000 joint steps without any others bring 98, 93 and 88 %, steps of both kinds, 1,000 and 3,000,
  99, 95 and 91.
- A MoE with shared and fine-grained experts keeps 99 %, one with raw top-1 gates all (one seed, five epochs).
- At width 32 `aligned` keeps 52 % in the mean, 29 to 65 by seed. One epoch of distillation brings it 0.3 points above
  where refit with steps is after 25,000 images.
- With joint steps on 512 images without labels refit is 0.2, 0.7 and 0.5 points ahead of an epoch of distillation with
  labels after `aligned`. 5,000 images more, in batches of 25 and without labels, leave it there; in batches of 100 and
  with labels they take off 0.7 to 1.7 points; 25,000 bring 0.2, 0.9 and 1.3.
- A distillation of 1,000 images at a quarter of the teacher's learning rate takes off 2 or 3 points of what refit with
  steps had: with so few images leave it as it is, or take a smaller rate.
- More images than 512 bring up to 1.5 points, 5,000 for joint steps 0.1 to 0.2 (seed 2); 3,000 steps instead of 1,000
  one to 2.5 at width 16, nothing at 32.
- After four epochs the start no longer matters.
- The MoEs with narrow FFNs are those of `gathering`, to the bit.
"""),
    ))
