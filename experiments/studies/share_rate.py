"""Share rates, schedules, initial weights, numbers and places of experts."""
import statistics
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

from matplotlib.figure import Figure

from ..runner import Run
from ..setting import EWA, Notes, Setting, Study
from ..tables import Lines, by_seed, error_bars, mean_se, paired, provenance, scored, select, table, unique, wrap
from .tune import NARROW

USUAL = dict(schedule='constant', init='copy', experts=4, layers='all')


def runs(s: Setting) -> Iterator[List[Run]]:
    """The MoE and its dense form over rates, lengths, schedules, initial weights, numbers and places of experts."""
    short, long = s.lengths
    seeds = range(s.seeds or 3)

    def run(seed, epochs, rate, schedule='constant', init='copy', experts=4, layers='all'):
        labels = dict(rate=rate, schedule=schedule, init=init, experts=experts, layers=layers, seed=seed)
        name = f'{rate:g}-{schedule}-{init}-{experts}-{layers}'.replace(':', '')
        return s.train(name, labels, s.size, epochs, **dict(EWA, **{
            'share-rate': rate, 'share-schedule': schedule, 'expert-init': init, 'num-experts': experts,
            'moe-layers': layers}))

    rates = (0., 1e-4, 1e-3, 1e-2, .1, .3, .75)
    yield [run(seed, epochs, rate) for seed in seeds for epochs in (long, short) for rate in rates]
    yield [s.train('dense', dict(variant='dense', seed=seed), s.size, epochs)
           for seed in seeds for epochs in (long, short)]
    # what is less in doubt, with fewer seeds
    few = seeds[:2]
    yield [run(seed, long, rate, init='independent') for seed in few for rate in (0., 1e-3, 1e-2, .1, .75)]
    yield [run(seed, long, 1e-3, experts=experts) for seed in few for experts in (2, 8, 16)] + [
        run(seed, long, 1e-3, layers=layers) for seed in few for layers in ('every:2', 'last:2')]
    # four times as long: do experts stay mergeable?
    yield [run(0, 4 * long, rate) for rate in (0., 1e-3)] + [
        s.train('dense', dict(variant='dense', seed=0), s.size, 4 * long)]
    yield [run(seed, epochs, rate, schedule) for seed in few for epochs in (long, short)
           for rate in rates[1:] for schedule in ('linear', 'cosine')]


def by_setting(lines: Lines) -> Dict[str, Lines]:
    """The rows of the first table but for the dense models, each with the lines of all its rates."""
    lengths = sorted(unique(lines, 'epochs'))
    groups = {f'{epochs} epochs': select(lines, epochs=epochs, **USUAL) for epochs in lengths}
    groups['independent start'] = select(lines, **dict(USUAL, init='independent'))
    for schedule in ('linear', 'cosine'):
        for epochs in lengths:
            groups[f'{schedule}, {epochs} epochs'] = select(lines, epochs=epochs, **dict(USUAL, schedule=schedule))
    return groups


def distance(line: Dict[str, Any]) -> float:
    """Of the experts to their mean at the end, mean over layers."""
    return statistics.mean(v[-1][1] for k, v in line['experts'].items() if k.startswith('distance'))


def tables(lines: Lines, name: str) -> str:
    """The tables and figures of the study `share_rate`."""
    counts = Counter(line['labels']['epochs'] for line in lines)
    lengths, usual_length = sorted(counts), counts.most_common(1)[0][0]
    groups = by_setting(lines)
    rates = sorted(unique(lines, 'rate'))

    def values(label: str, rate: float, read: Callable[[Dict[str, Any]], float]) -> List[float]:
        return [read(line) for line in groups[label] if line['labels']['rate'] == rate]

    def to_dense(group: Lines, key: str, digits: int) -> str:
        dense = select(lines, variant='dense', epochs=group[0]['labels']['epochs'])
        return mean_se(paired(by_seed(group, scored(key)), by_seed(dense, scored(key))), digits, True)

    rows: List[Sequence[str]] = []
    for epochs in lengths:
        dense = select(lines, variant='dense', epochs=epochs)
        if dense:
            rows.append((
                f'dense, {epochs} epochs', '', str(len(dense)), mean_se([d['last']['eval_top1'] for d in dense]),
                mean_se([d['test']['top1'] for d in dense]), '', mean_se([d['test']['nll'] for d in dense], 3), '', '',
                '', ''))
    for label in groups:
        for rate in rates:
            cells = values(label, rate, scored('top1'))
            if cells:
                rows.append((
                    label, f'{rate:g}', str(len(cells)),
                    mean_se(values(label, rate, lambda line: line['last']['eval_top1'])), mean_se(cells),
                    to_dense([line for line in groups[label] if line['labels']['rate'] == rate], 'top1', 2),
                    mean_se(values(label, rate, scored('nll')), 3),
                    to_dense([line for line in groups[label] if line['labels']['rate'] == rate], 'nll', 3),
                    mean_se(values(label, rate, lambda line: line['routed']['top1'] - line['dense']['top1']), 2, True),
                    mean_se(values(label, rate, lambda line: line['routed']['nll'] - line['dense']['nll']), 3, True),
                    mean_se(values(label, rate, distance), 3)))
    parts = [table(('setting', 'share rate', 'seeds', 'val top-1', 'test top-1', 'to dense', 'test NLL', 'to dense',
                    'top-1 of the MoE itself minus its dense form', 'NLL likewise', 'distance to mean'), rows)]
    parts += ['', f'![accuracy, loss and distance over share rates](share_rate-{name}-rates.png)']

    rows = []
    base = select(lines, epochs=usual_length, rate=1e-3, **USUAL)
    others = {f'{n} experts': select(lines, rate=1e-3, experts=n) for n in (2, 8, 16)}
    others.update({f'layers {where}': select(lines, rate=1e-3, layers=where) for where in ('every:2', 'last:2')})
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
    if select(lines, epochs=usual_length, **USUAL):
        parts += ['', wrap(f'What experts do over training ({usual_length} epochs, copies at the start; mean over '
                           'layers and seeds, on the right by layer):'), '',
                  f'![distance and cosine of experts over training](share_rate-{name}-experts.png)']
    return '\n'.join([*parts, '', provenance(lines)])


def figures(lines: Lines) -> Dict[str, Figure]:
    """Accuracy, loss and distance over share rates; and what experts do over training."""
    groups, rates = by_setting(lines), sorted(unique(lines, 'rate'))
    over_rates = Figure(figsize=(11, 3.4), layout='constrained')
    axes = over_rates.subplots(1, 3)
    for axis, (what, read) in zip(axes, (('test top-1 (%)', scored('top1')), ('test NLL', scored('nll')),
                                        ('distance to mean', distance))):
        error_bars(axis, rates, {
            label: [[read(line) for line in group if line['labels']['rate'] == rate] for rate in rates]
            for label, group in groups.items() if group}, 'share rate', what)
    axes[-1].legend(fontsize=7)
    epochs = Counter(line['labels']['epochs'] for line in lines).most_common(1)[0][0]
    group = select(lines, epochs=epochs, **USUAL)
    return {'rates': over_rates, **({'experts': over_training(group)} if group else {})}


def over_training(group: Lines) -> Figure:
    """Distance to the mean and cosine of the experts, by share rate and by layer."""
    figure = Figure(figsize=(11, 3.4), layout='constrained')
    axes = figure.subplots(1, 3)

    def mean_course(runs: Lines, keys: Sequence[str]) -> Tuple[List[float], List[float]]:
        courses = [run['experts'][key] for run in runs for key in keys]
        return [p[0] for p in courses[0]], [statistics.mean(c[i][1] for c in courses) for i in range(len(courses[0]))]

    layers = [key.split('/')[1] for key in group[0]['experts'] if key.startswith('distance/')]
    for rate in sorted(unique(group, 'rate')):
        runs = select(group, rate=rate)
        for axis, kind in zip(axes, ('distance', 'cosine')):
            axis.plot(*mean_course(runs, [f'{kind}/{layer}' for layer in layers]), label=f'{rate:g}')
    for layer in layers:
        axes[2].plot(*mean_course(select(group, rate=1e-3), [f'distance/{layer}']), label=layer)
    for axis, what in zip(axes, ('distance to mean', 'pairwise cosine', 'distance to mean, rate 0.001')):
        axis.set_xlabel('update')
        axis.set_ylabel(what)
        axis.legend(fontsize=7, title='share rate' if axis is not axes[2] else 'layer', title_fontsize=7)
    return figure


STUDY = Study(
    question='Which share rate, schedule, number and place of experts; and what do experts do?',
    cost='119 runs, 1.7 hours',
    runs=runs,
    tables=tables,
    figures=figures,
    setup="""
Learning rate 0.002 (glyphs: 0.016), weight decay 0.05, no drop-path. In `eval()` the MoE computes with the mean of its
experts, so its accuracy is that of its dense form. "The MoE itself" sends each test token through a random expert, as
in training, on a quarter of the test set, and is compared with the dense form there. Distance: of the experts to their
mean at the end, relative to its norm.
""",
    notes=dict(
        fashion=Notes(title='Fashion-MNIST', setup="""
Copies and dense models: three seeds; independent starts, numbers, places and schedules: two; 160 epochs: one. The dense
models ran with torch 2.14, most EWA runs with 2.15, and most of the rising share rates on another CPU than the dense
models.
""", reading="""
- Doubt 1, "pulling experts together costs the MoE its advantage": started as copies, the MoE itself and its dense form
  differ by at most 0.7 points, mostly in favour of the dense form. Conversion costs next to nothing here, and this kind
  of MoE has no advantage to lose. (It is not so everywhere: without pulls on [8,000 glyphs](main-glyphs.md) experts end
  at 0.7 of their mean's norm from it, as here after 160 epochs, and conversion costs 8.9 points, on 32,000 even 38; at
  0.001 it costs 0.4 and nothing.) (Gated MoEs: [gated](gated-fashion.md).)
- The 10-epoch schedule likes large rates: 0.75 makes all experts equal after each step and is 1.3 points (-0.0 to +2.7)
  better than dense at these flags, [as half the learning rate of the FFNs is](main-fashion.md); with rates of 0.01 and
  less EWA is about a point worse (none of these intervals excludes 0). The 40-epoch schedule, in which the model
  overfits, likes small rates by loss; by top-1 rates of 0 and 0.0001 are 0.9 above 0.01, and 0.75 comes near them
  again. The pilot's guess that the best rate falls as one over the number of steps does not fit: it goes from the
  largest to none within a factor of 4.
- Rates that rise to their value over the training (linear, cosine; six rates, two lengths, two seeds) bring nothing
  that a constant rate does not: over 40 epochs their best loss is 0.17 below dense (cosine to 0.001), where the
  constant 0.001 and no pull are 0.14 and 0.17 below; over 10 epochs large ones gain less than constant ones of that
  size (at 0.1 top-1 is 0.2 below dense, constant 0.9 above).
- Started as copies, experts stay mergeable over 800 updates (40 epochs) without any pull, and over 3,200 (160 epochs,
  one seed), at a distance of 0.7 of their mean's norm: the dense form is within 0.3 points of the MoE itself. How long
  that lasts is not known. At that length a share rate of 0.001 does no worse than none (top-1 +0.7 to the dense model
  against +0.3, NLL -0.09 against -0.06; the same seed).
- Doubt 2, "what do experts learn": they move apart while the learning rate is high, to a pairwise cosine of 0.8 without
  pull and 0.86 at rate 0.001; the pull then closes the gap as the learning rate falls. Layers behave alike.
"""),
        glyphs=Notes(title='glyphs', setup=NARROW + """
8,000 images, 36 epochs, learning rate 0.016 and weight decay 0.05. Two seeds; neither was tuned for this: by
[main](main-glyphs.md) a larger weight decay is better for all.
""", reading="""
- Large rates are right here: from none to 0.1 accuracy rises from 3 % to 29, 1.2 points below the dense model; at 0.75
  it is 24 %. At 0.1 experts are nearly equal, so the model nearly is a dense one. Our reading: what is lost here is
  lost to the noise of the partition, which a narrow model can ill afford, and not to the pull.
- Without pulls the experts end farther from their mean than its norm, with a cosine of 0.3, and conversion costs 14
  points of the 16 that the MoE itself has. At 0.001 they part at first, to a cosine of 0.6, and come together as the
  learning rate falls; conversion costs nothing.
- Where experts are matters as much as the rate: in every second block (the package's default) EWA at 0.001 is 3.4
  points below the dense model, in all blocks 17. (In the last two blocks one seed is level with it, and one hardly
  learnt.)
"""),
    ))
