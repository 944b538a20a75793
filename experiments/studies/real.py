"""A gated MoE of real size, made of a real pretrained ViT, to dense by refit and by gatherings."""
from typing import Dict, Iterator, List

from ..data import classes_of, subset
from ..pretrained import ARCHITECTURE
from ..runner import Run
from ..setting import GATED, Flags, Notes, Setting, Study
from ..tables import Lines, provenance, select, table

PER_CLASS = dict(train=10, val=2, test=4)
METHODS: Dict[str, Flags] = {
    'refit': dict(method='refit'), 'refit, 300 steps': {'method': 'refit', 'refit-steps': 300},
    **{method: dict(method=method) for method in ('average', 'aligned', 'prune', 'top_kg', 'svd_kg')}}


def runs(s: Setting) -> Iterator[List[Run]]:
    """The MoE and its conversions."""
    data, work = s.work / f'{s.name}-real', s.work / s.study('real')
    for split, count in PER_CLASS.items():
        classes = len(classes_of(s.data / f'{split}.tar'))
        subset(s.data / f'{split}.tar', count * classes, data / f'{split}.tar')
    tuned = {key: s.flags[key] for key in (
        'train-split', 'val-split', 'crop-pct', 'no-aug', 'smoothing', 'workers', 'weight-decay', 'sched-on-updates',
        'checkpoint-hist', 'log-interval', 'opt-kwargs')}
    tuned.update({
        'data-dir': str(data), 'img-size': 112, 'batch-size': 32, 'validation-batch-size': 100, 'val-interval': 4,
        'model': ARCHITECTURE, 'pretrained-path': str(work / 'weights'), 'epochs': 4, 'warmup-epochs': 1, 'lr': 3e-4,
        'layer-decay': 0.75})
    seed = 0
    yield [Run(f'moe-{seed}', dict(tuned, seed=seed, **GATED), dict(kind='moe', seed=seed))]
    source = str(work / f'moe-{seed}' / 'last')
    folders = {method: f'{method.replace(", ", "-").replace(" ", "-")}-{seed}' for method in METHODS}
    yield [Run(folders[method],
               dict(s.converting(), **{'data-dir': str(data), 'batch-size': 32, 'calibration-images': 512}, **flags),
               dict(kind='gathered', method=method, seed=seed), 'convert', source)
           for method, flags in METHODS.items()]


def tables(lines: Lines, name: str) -> str:
    """Top-1 right after each conversion, and what it took."""
    teacher, = (line['test']['top1'] for line in select(lines, kind='moe'))
    rows = [['the MoE', f'{teacher:.1f}', '', '']]
    for line in select(lines, kind='gathered'):
        method, top1 = line['labels']['method'], line['test']['top1']
        rows.append([
            method, f'{top1:.1f}', f'{100 * top1 / teacher:.0f} %',
            f'{line["conversion"]["seconds"]:.0f}' if 'seconds' in line['conversion'] else ''])
    header = ('model', 'test top-1', "of the MoE's", 'conversion, s')
    return '\n'.join([table(header, rows), '', provenance(lines, 'One seed.')])


STUDY = Study(
    question='A MoE of real size: what does each conversion keep of it, and how long does refit take?',
    cost='8 runs, 1 to 3 hours, on glyphs',
    runs=runs,
    tables=tables,
    setup="""
DINOv2's ViT-S/14 (`experiments/pretrained.py` makes its folder, `WORK/real-SET/weights`) at 112 pixels, 65 tokens; the
MoE has 8 experts, 2 a token, in every second block, that start as copies, and is fine-tuned for 4 epochs on the first
10 images of each class, with layer decay 0.75 and learning rate 0.0003 (not tuned). Conversions see 512 of these
images, without labels. Four test images of each class.
""",
    notes=dict(glyphs=Notes(title='glyphs', setup="""
Seconds were taken beside other work. No dense model was fine-tuned beside it, and nothing distilled. Refit was fitted
to the layers' own outputs, as it was then.
""", reading="""
Refit without steps keeps all of it, and its steps add nothing. The experts started as copies and were fine-tuned for
four epochs, so averages keep 95 % too; a single expert keeps 70 %, and both gatherings of OneS that take parts of each
expert nothing.
""")),
)
