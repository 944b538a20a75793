"""Learning rate, weight decay and drop-path of each family of `main`."""
from typing import Dict, Iterator, List, Tuple

from ..runner import Run, read_results
from ..setting import EWA, Flags, Notes, Setting, Study
from ..tables import Lines, provenance, select, table, unique

FAMILIES: Dict[str, Tuple[Flags, str]] = {
    'dense': ({}, ''),
    'EWA': (EWA, ''),
    'no pull': (dict(EWA, **{'share-rate': 0.}), ''),
    'learned fusion': (dict(EWA, **{'share-rate': 0., 'expert-init': 'independent'}), 'learned fusion'),
    # (E - 1) / E: experts are equal after each step, and only the optimizer sees that there are several
    'full pull': (dict(EWA, **{'share-rate': .75}), ''),
}

NARROW = """
On glyphs the model of the studies `main`, `tune` and `share_rate` has width 16, the mean of all patches instead of a
class token, and initial weights drawn by the size of each matrix (timm's `weight_init='jax'`; the usual standard
deviation of 0.02 is little for so narrow a layer). With a class token and the usual initial weights learning starts
late on this set in these trainings, and at such different times that seeds hide all else. (The longer trainings on all
images, [whole](whole-glyphs.md) and [gathering](gathering-glyphs.md), have both.)
"""


def runs(s: Setting) -> Iterator[List[Run]]:
    """Learning rate, then weight decay, then drop-path of each family, by validation top-1: six runs each a length."""
    for families in (('dense', 'EWA', 'no pull'), ('learned fusion',), ('full pull',)):
        for epochs in s.lengths[::-1]:
            # short trainings like larger learning rates, on glyphs smaller ones
            larger = epochs == s.lengths[0] and s.name != 'glyphs'
            rates = [s.flags['lr'] * factor for factor in ((1, 2, 4) if larger else (0.5, 1, 2))]
            trials = [('lr', rates), ('weight-decay', (0.2,)), ('drop-path', (0.1, 0.2))]
            for stage, (flag, values) in enumerate(trials):
                trainings = []
                for family in families:
                    extra, baseline = FAMILIES[family]
                    start = {'lr': s.flags['lr'], 'weight-decay': 0.05, 'drop-path': 0.}
                    if stage:
                        start.update(chosen(s, family, epochs, stage))
                    for value in values:
                        flags = dict(start, **{flag: value})
                        name = f'{family}-{flags["lr"]}-{flags["weight-decay"]}-{flags["drop-path"]}'
                        trainings.append(s.train(
                            name, dict(family=family, stage=stage, seed=100), s.size, epochs, baseline, **extra,
                            **flags))
                yield trainings


def chosen(s: Setting, family: str, epochs: int, stages: int = 3) -> Flags:
    """Learning rate, weight decay and drop-path of a family with the best validation top-1 in the first stages of tune.

    Equal ones are told apart by validation loss. `epochs`: one of `s.lengths`; `stages=3` looks at runs with drop-path
    only.
    """
    lines = [line for line in read_results(s.study('tune'))
             if line['labels']['family'] == family and line['labels']['epochs'] == epochs
             and (line['labels']['stage'] == 2 if stages == 3 else line['labels']['stage'] < stages)]
    if not lines:
        raise ValueError(
            f'no runs of {family} over {epochs} epochs in results/{s.study("tune")}.jsonl: run the study tune on this '
            'set')
    best = max(lines, key=lambda line: (line['last']['eval_top1'], -line['last']['eval_loss']))
    return {key: best['flags'][key] for key in ('lr', 'weight-decay', 'drop-path')}


def tables(lines: Lines, name: str) -> str:
    """The table of the study `tune`: what was chosen for each family at each length."""
    rows = []
    for epochs in sorted(unique(lines, 'epochs'), reverse=True):
        for family in unique(lines, 'family'):
            group = select(lines, family=family, epochs=epochs)
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
    return '\n'.join([table(header, rows), '', provenance(lines, 'Validation split, one run a cell.')])


STUDY = Study(
    question='Which learning rate, weight decay and drop-path suit each family at each length, by validation?',
    cost='60 runs, 0.9 hours',
    runs=runs,
    tables=tables,
    setup="""
Each family got the same six runs for each length of training, seed 100: three learning rates, then a larger weight
decay, then two rates of drop-path, each step from the best so far by validation top-1 (equal ones by validation loss).
"Learned fusion" is weight fusion with learned coefficients, after ExFusion (arXiv 2603.27965) and written from its
abstract; its experts start independent, since with copies it is the dense model.

This is a thin search: one seed, 5,000 validation images (standard error of a top-1 about 0.6 points). So families
differ in their flags, and what a table says of one against another is of method and flags together. Neither the share
rate of EWA, 0.001, nor EMA's decay, 0.998, was searched here.
""",
    notes=dict(
        fashion=Notes(title='Fashion-MNIST', setup="""
Over 40 and over 10 epochs on 2,000 images.
""", reading="""
Over 40 epochs the largest weight decay and drop-path were chosen everywhere, the smallest learning rate for EWA and the
largest for learned fusion and full pull; over 10 epochs the smallest learning rate for dense and no pull. The share
rate of EWA, 0.001, comes from an earlier pilot that compared rates on test images of this very data set, an advantage
of EWA over its rivals.
"""),
        glyphs=Notes(title='glyphs', setup=NARROW + """
Over 36 and over 12 epochs on 8,000 images. The short trainings of dense, EWA and no pull have seven or nine runs: three
that were made with larger learning rates, up to 0.064, gave less and were removed, and the search was made again from
the smaller ones.
""", reading="""
The smallest learning rate was chosen for no pull and learned fusion at both lengths and for full pull at the short one.
"""),
    ))
