"""EWA against dense models, other regularisers, partitions and weight fusion, all tuned."""
import statistics
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

from matplotlib.figure import Figure

from ..runner import Run
from ..setting import EWA, Flags, Notes, Setting, Study
from ..tables import Lines, by_seed, mean_se, paired, provenance, scored, select, table, unique, with_interval, wrap
from .tune import FAMILIES, NARROW, chosen

Groups = Dict[str, Dict[Tuple[int, int], Lines]]
Cells = Sequence[Tuple[int, int]]
# name, flags, baseline; family and number of stages of `tune` that learning rate and others come from; further flags
Variant = Tuple[str, Flags, str, str, int, Flags]
PAIRS = (('EWA', 'dense'), ('EWA, every second', 'dense'), ('EWA 0.01, every second', 'dense'),
         ('EWA, every second', 'EWA'), ('EWA 0.01, every second', 'EWA, every second'),
         ('EWA, drop-path', 'dense, drop-path'), ('EWA', 'dense, drop-path'),
         ('no pull, drop-path', 'dense, drop-path'), ('EWA, drop-path', 'no pull, drop-path'),
         ('whole images', 'EWA'), ('static fusion', 'dense'), ('learned fusion', 'dense'), ('full pull', 'dense'),
         ('full pull, drop-path', 'dense, drop-path'), ('full pull', 'dense, half FFN lr'))


def runs(s: Setting) -> Iterator[List[Run]]:
    """Does EWA help? Against drop-path, EMA, weight fusion; at the middle size also what large pulls do. All tuned."""
    ema = {'model-ema': True, 'model-ema-decay': 0.998, 'model-ema-warmup': True}
    fusion = FAMILIES['learned fusion']
    first: List[Variant] = [
        ('dense', *FAMILIES['dense'], 'dense', 2, ema), ('EWA', *FAMILIES['EWA'], 'EWA', 2, ema),
        ('no pull', *FAMILIES['no pull'], 'no pull', 2, {})]
    first += [(f'{name}, drop-path', *FAMILIES[name], name, 3, {}) for name in ('dense', 'EWA', 'no pull')]
    # where the package puts experts if it is not told otherwise
    first.append(('EWA, every second', dict(EWA, **{'moe-layers': 'every:2'}), '', 'EWA', 2, {}))
    others: List[Variant] = [
        ('whole images', EWA, 'whole images', 'EWA', 2, {}),
        ('static fusion', fusion[0], 'static fusion', 'learned fusion', 2, {}),
        ('learned fusion', *fusion, 'learned fusion', 2, {})]
    stronger: List[Variant] = [
        ('EWA 0.01, every second', dict(EWA, **{'moe-layers': 'every:2', 'share-rate': .01}), '', 'EWA', 2, {})]
    pulls: List[Variant] = [
        ('full pull', *FAMILIES['full pull'], 'full pull', 2, {}),
        ('full pull, drop-path', *FAMILIES['full pull'], 'full pull', 3, {}),
        ('dense, half FFN lr', {}, 'FFN lr 0.5', 'full pull', 2, {})]
    short, long = s.lengths
    # a quarter of the images for 2.5 times the epochs, four times the images for half of them
    small, large = (s.size // 4, 5, 2), (s.size * 4, 1, 2)
    middle = [((s.size, 1, 1), length) for length in (long, short)]
    cells = middle + [(size, length) for length in (long, short) for size in (small, large)]
    parts = ((first, cells), (others, cells), (stronger, [cell for cell in cells if cell[1] == long]), (pulls, middle))
    for variants, cells in parts:
        for (size, times, by), length in cells:
            yield [
                s.train(name, dict(variant=name, seed=seed), size, max(2, length * times // by), baseline,
                        **dict(flags, **chosen(s, family, length, stages), **more))
                for seed in range(s.seeds or 5) for name, flags, baseline, family, stages, more in variants]


def by_cell(lines: Lines) -> Tuple[Groups, Cells]:
    """Variant to cell to lines, and all cells, (images, epochs)."""
    cells = sorted({(line['labels']['images'], line['labels']['epochs']) for line in lines})
    return {variant: {cell: select(lines, variant=variant, images=cell[0], epochs=cell[1]) for cell in cells}
            for variant in unique(lines, 'variant')}, cells


def tables(lines: Lines, name: str) -> str:
    """The tables of the study `main`, with paired differences to dense over equal seeds."""
    groups, cells = by_cell(lines)
    order = list(groups)

    def read(variant: str, key: str) -> Tuple[str, Callable]:
        return variant.replace(', EMA', ''), scored(key, 'test_ema' if variant.endswith(', EMA') else 'test')

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
                dense = by_seed(groups['dense'][cell], scored(key))
                scores = by_seed(groups[base][cell], reader)
                row.append(mean_se(list(scores.values()), digits) if variant == 'dense' else
                           mean_se(paired(scores, dense), digits, sign=True))
            rows.append(row)
        parts += ['', table((what, *(f'{images:,} x {epochs}' for images, epochs in cells)), rows)]
    counts = {cell: sorted({n for n in (len(groups[v][cell]) for v in order) if n}) for cell in cells}
    parts += ['', wrap(
        'Columns: training images x epochs. First row: the score of the dense model; others: paired differences to it. '
        'Seeds: ' + ', '.join(f'{i:,} x {e}: {" or ".join(map(str, n))}' for (i, e), n in counts.items()) + '.')]
    parts += ['', comparisons(groups, cells), '', time_to_accuracy(groups, cells, name), '', conversion(groups, cells),
              '', robustness(groups, cells)]
    return '\n'.join([*parts, '', provenance(lines)])


def comparisons(groups: Groups, cells: Cells) -> str:
    """Paired differences of single pairs, with intervals."""
    rows = []
    for first, second in PAIRS:
        for cell in cells:
            pair = [groups.get(variant, {}).get(cell, []) for variant in (first, second)]
            found = [paired(*(by_seed(group, read) for group in pair)) for read in (
                scored('top1'), scored('nll'), lambda line: min(point[2] for point in line['curve']))]
            if len(found[0]) > 1:
                rows.append((f'{first} - {second}', f'{cell[0]:,} x {cell[1]}', *(
                    with_interval(values, digits) for values, digits in zip(found, (2, 3, 3))), str(len(found[0]))))
    header = ('difference', 'cell', 'top-1', 'NLL', 'validation loss where it was lowest', 'seeds')
    return '95 % intervals (Student, over seeds):\n\n' + table(header, rows)


def longest(cells: Cells) -> Cells:
    """Each size's longest training."""
    return [cell for cell in cells if cell[1] == max(epochs for images, epochs in cells if images == cell[0])]


def time_to_accuracy(groups: Groups, cells: Cells, name: str) -> str:
    """Where the figure is, and what a step of EWA takes."""
    notes = []
    for cell in longest(cells):
        seconds = [by_seed(groups.get(variant, {}).get(cell, []), lambda line: line['last']['train_seconds'])
                   for variant in ('EWA, drop-path', 'dense, drop-path')]
        ratios = [seconds[0][seed] / seconds[1][seed] for seed in seconds[0] if seed in seconds[1]]
        notes.append(f'{cell[0]:,} x {cell[1]}: {mean_se(ratios)}' if ratios else '')
    note = ', '.join(filter(None, notes))
    return wrap('Time to accuracy, mean curves over seeds. Training time of EWA over dense, both with drop-path, same '
                f'seed: {note}.') + f'\n\n![validation accuracy and loss against training time](main-{name}-time.png)'


def figures(lines: Lines) -> Dict[str, Figure]:
    """Validation accuracy and loss against training time, dense and EWA, for each size's longest training."""
    groups, cells = by_cell(lines)
    cells = longest(cells)
    figure = Figure(figsize=(5 * len(cells), 5.6), layout='constrained')
    axes = figure.subplots(2, len(cells), squeeze=False)
    for column, cell in enumerate(cells):
        curves = {variant: by_seed(groups.get(variant, {}).get(cell, []), lambda line: line['curve'])
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
    axes[0, 0].legend(fontsize=7)
    return {'time': figure}


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
    intro = wrap('What conversion costs: top-1 of the MoE itself, a random expert for each token as in training, '
                  'minus that of its dense form, a quarter of the test set; in brackets the MoE\'s own.')
    header = ('variant', *(f'{images:,} x {epochs}' for images, epochs in cells))
    return f'{intro}\n\n{table(header, rows)}'


def robustness(groups: Groups, cells: Cells) -> str:
    """Noise on test images and sharpness, in the longest cell of those with most runs."""
    def known(cell: Tuple[int, int]) -> int:
        return sum('robust' in line for group in groups.values() for line in group[cell])

    cell = max(cells, key=lambda c: (known(c), c[0] * c[1]))
    dense = {line['labels']['seed']: line['robust'] for line in groups['dense'][cell] if 'robust' in line}
    keys = (('noisy_top1', 2), ('noisy_nll', 3), ('train_nll', 4), ('sharpness', 4))
    rows = []
    for variant, group in groups.items():
        found = {line['labels']['seed']: line['robust'] for line in group[cell] if 'robust' in line}
        if found:
            pairs = [(found[seed], dense[seed]) for seed in found if seed in dense]
            rows.append([variant] + [
                mean_se([d[key] for d, _ in pairs], digits) if variant == 'dense' else
                mean_se([f[key] - d[key] for f, d in pairs], digits, sign=True) for key, digits in keys])
    intro = wrap(
        f'Robustness, {cell[0]:,} images x {cell[1]} epochs; below dense, paired differences to it. Noise: Gaussian, '
        'standard deviation 0.5 of the normalised pixels, a quarter of the test set. Sharpness: mean rise of the '
        'training loss when each matrix of the dense form moves a tenth of its norm in a random direction.')
    header = ('variant', 'top-1, noisy images', 'NLL, noisy images', 'training loss', 'sharpness')
    return f'{intro}\n\n{table(header, rows)}'


STUDY = Study(
    question='Does EWA help, beside drop-path, EMA, whole images and weight fusion, at three sizes and two lengths?',
    cost='345 runs, 5.5 hours',
    runs=runs,
    tables=tables,
    figures=figures,
    setup="""
Flags of `tune`: those of the long training there for the long trainings of each size, those of the short one for the
short ones. Whole-image partition and experts in every second block use those of EWA, static fusion (the mean of the
experts in the forward pass too) those of learned fusion, and "half FFN lr", a dense model whose FFNs learn at half the
rate, those of full pull.
""",
    notes=dict(
        fashion=Notes(title='Fashion-MNIST', setup="""
Tuned on 2,000 images and used so on 500 and 8,000 too.

Runs of torch 2.14 are paired with dense models of 2.15 at 2,000 x 40: experts in every second block, whole images,
fusion, full pull and half FFN learning rate. What was added last ran on another CPU than its dense models: experts in
every second block everywhere, whole images and fusion on 500 and 8,000 images.
""", reading="""
- Trained until it overfits (2,000 x 40), EWA is a regulariser: loss and calibration error at the last epoch fall, and
  add to what drop-path gives. Most of that is less overfitting late in training: where validation loss is lowest the
  difference is a third of it or less.
- Top-1 does not gain on 2,000 images. With drop-path on both sides the difference is 0.01 points (95 % interval -0.8 to
  +0.8). By validation top-1 one would have picked EWA without drop-path and dense with it, and this EWA is 0.8 points
  below (-1.9 to +0.3).
- The partition without any pull, averaged once at the end, does about as well as EWA on 2,000 images; on 500 its loss
  is higher (by 0.13, 0.05 to 0.21, with drop-path on both sides), at twice the learning rate. The [share
  rates](share_rate-fashion.md) have the same comparison at equal flags.
- In short trainings EWA is worse than dense at each size, without drop-path by 3.0 points on 500 images (0.0 to 6.1),
  2.5 on 2,000 (1.4 to 3.6) and 1.1 on 8,000 (0.5 to 1.8); the partition without pull likewise.
- EMA changes little in long trainings and costs 0.2 to 0.5 points in short ones.
- On 500 images x 100 epochs the effect is larger: with drop-path on both sides EWA lowers the loss by 0.29 (0.24 to
  0.34; by 0.08 where it is lowest) and top-1 differs by +0.56 (-0.8 to +1.9). The partition without pull, with
  drop-path, gains 0.79 points (0.28 to 1.30): the only interval of top-1 above 0 against a dense model in the table,
  but for one of learned fusion.
- On four times the images (8,000 x 20) there is little to regularise, the dense model hardly overfits: with drop-path
  on both sides EWA is 0.74 points worse (0.09 to 1.39) at an equal loss; for the partition without pull no difference
  is seen (-0.59 to +0.40). EWA is 0.64 points below no pull (0.05 to 1.24, both with drop-path), by the pull or by its
  learning rate, half as large. Calibration error still falls.
- Full pull does as half the learning rate of the FFNs does (top-1 -0.29, -0.69 to +0.12, over 40 epochs and -0.56,
  -1.89 to +0.76, over 10; loss, calibration, noise and sharpness alike). AdamW explains it: an expert sees 1/E of the
  tokens, so its gradient has 1/E of the signal but 1/sqrt(E) of the noise, and where noise rules the second moments the
  mean of the experts moves by 1/sqrt(E) of the dense FFN's step. What large share rates gain here, above all in short
  trainings and against noisy images, may be no more than such a learning rate, for which no experts are needed. Over 10
  epochs that dense model is 1.3 points (0.2 to 2.4) better than the tuned one.
- With experts in every second block, the package's default, effects are the same and smaller: the loss falls by 0.20
  (0.11 to 0.29) on 500 images and 0.13 (0.10 to 0.17) on 2,000 in the long trainings; top-1 is 2.4 points below dense
  in the short training on 500 images (1.2 to 3.6) and 0.7 in the long one on 8,000 (0.4 to 1.1), without a difference
  that was seen elsewhere. In the short trainings on 2,000 and 8,000 that is better than experts in all blocks, by 1.8
  points (0.7 to 2.8) and 0.8 (0.1 to 1.5).
- There a share rate of 0.01 does as 0.001 does: top-1 within 0.15 points in each long training (intervals within 0.43),
  the loss within 0.02.
- Whole-image partition does as EWA does, in all six cells (top-1 within 0.25 points).
- Weight fusion does little: its top-1 is within 0.9 points of the dense model's. Learned fusion is 0.24 points better
  on 8,000 x 20 (0.14 to 0.34), its one certain gain; on 500 x 100 its loss is higher, by 0.10 (0.00 to 0.20; static
  fusion 0.17, 0.07 to 0.27).
- Time to accuracy: a step of EWA takes 1.1 to 1.2 times the dense one on these small matrices. On 2,000 images EWA with
  drop-path is behind dense with drop-path at 10 of 40 epochs and level or ahead from 20 on; on 500 images likewise,
  from 50 of 100 epochs; on 8,000 it is behind at both points.
- The analysis of the EWA paper expects flatter, more regular solutions. With these flags EWA is hurt more by noise (by
  6 points, with drop-path on both sides; with experts in every second block by 9, without), and the partition without
  pull, at the dense model's learning rate, less or equally. Sharpness can't be compared well, since training losses
  differ several-fold.
"""),
        glyphs=Notes(title='glyphs', setup=NARROW + """
It was tuned on 8,000 images (30 of each class) and is used so on 2,000 and 32,000 too. "No pull" got another learning
rate and weight decay than EWA and the dense model. Five seeds. Times were taken while tests ran on the same two cores,
so their ratios are rough.
""", reading="""
- EWA with experts in all blocks is far worse than the dense model: by 18.7 points (9.5 to 27.9) on 8,000 images, by
  11.0 (6.9 to 15.2) on 32,000, in the long trainings; with drop-path on both sides by 13.3 (7.7 to 18.9) and 12.6 (8.0
  to 17.2). It has not fitted the training images: on 8,000 its loss on them is 0.95 above the dense model's 1.12.
  Drop-path does not help the dense model there either. A regulariser costs where a small model has much to learn.
- With experts in every second block, where the package puts them by default, it is 9.1 points below on 8,000 images
  (20.4 below to 2.2 above) and 2.3 on 32,000 (4.6 below to 0.0); at other flags (two seeds, [share
  rates](share_rate-glyphs.md)) 3.4 instead of 17. A share rate of 0.01 makes no difference there that was seen: 3.4
  below on 8,000, 2.0 on 32,000 (0.4 to 3.7).
- Conversion needs the pull. Without it the MoE itself scores 8.9 points above its dense form on 8,000 images and 38 on
  32,000 (64 against 27 %): its experts have learnt to work and can't be averaged any more. At a share rate of 0.001
  conversion costs 0.4 points or less in the long trainings, 0.8 at most. Whether the pull costs the MoE itself anything
  can't be told from these: on 32,000 x 18 it is 8 points better with pulls, in the short training on 8,000 two worse,
  at other learning rates each.
- On 2,000 images (7 of each class) all overfit: 4 % at a loss above that of guessing. Drop-path lowers the dense
  model's loss by 1.8, EWA with drop-path as much and not more; in top-1 EWA is 1.4 points (0.6 to 2.2) below, with
  drop-path on both sides.
- In the short trainings on 2,000 and 8,000 images little has been learnt yet (3 to 6 %); EWA is level or behind. In
  that on 32,000 the dense model has 41 %, and EWA is 11 points below (1 to 21).
- Whole-image partition is worse than EWA: by 12.3 points (0.9 to 23.8) on 32,000 x 18, 15.3 (3.9 to 26.6) on 32,000 x 6
  and 0.9 (0.5 to 1.4) on 2,000 x 90. Our reading: whole images are less alike than shuffled tokens, so the gradients of
  its experts are too.
- Weight fusion gains nothing: static and learned 3.0 points below the dense model on 8,000 x 36 (intervals of 7 and 11
  on either side), 1.1 and 0.6 on 32,000 x 18 (-2.7 to +0.5, -1.8 to +0.6). Its experts start independent, which alone
  may cost something.
- Between full pull and half the learning rate of the FFNs no difference was seen here either (-0.5, -1.7 to +0.8, on
  8,000 x 12 and -3.4, -11.7 to +5.0, on 8,000 x 36), nor between it and the dense model (+2.7, -0.4 to +5.7, and -4.6,
  -12.3 to +3.2).
- On 8,000 x 36 and 32,000 x 6 seeds differ by 10 to 13 points of top-1 (standard deviation), so only large differences
  can be seen there.
"""),
    ))
