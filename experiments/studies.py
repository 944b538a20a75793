"""The studies: which runs, in which order. Everything that is compared shares seeds, first weights and batches.

Sizes are numbers of training images, lengths are epochs. Learning rate, weight decay and drop-path are chosen on the
validation split; what the tables show is the test set.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from ewa.gathering import METHODS

from .runner import Run, classes_of, read_results, subset

Flags = Dict[str, Any]

# no augmentation, so that models can be told apart in minutes
BASE: Flags = {
    'train-split': 'train.tar', 'val-split': 'val.tar', 'crop-pct': 1.0, 'no-aug': True, 'smoothing': 0.0,
    'batch-size': 100, 'validation-batch-size': 500, 'workers': 0, 'model': 'vit_tiny_patch16_224', 'lr': 0.002,
    'weight-decay': 0.05, 'sched-on-updates': True, 'warmup-epochs': 1, 'checkpoint-hist': 1, 'log-interval': 100000,
    'opt-kwargs': {'fused': True},
}
# a ViT of 16 patch tokens
WIDTH: Flags = {'embed_dim': 64, 'depth': 4, 'num_heads': 4}
SETS: Dict[str, Flags] = {
    'fashion': {'img-size': 28, 'in-chans': 1, 'mean': 0.286, 'std': 0.353, 'model-kwargs': dict(WIDTH, patch_size=7)},
    'digits': {'img-size': 8, 'in-chans': 1, 'mean': 0.305, 'std': 0.376, 'model-kwargs': dict(WIDTH, patch_size=2)},
    # with a class token and timm's usual first weights learning starts so late here that seeds hide all else
    'glyphs': {'img-size': 32, 'in-chans': 1, 'mean': 0.63, 'std': 0.18, 'lr': 0.016,
               'model-kwargs': dict(WIDTH, patch_size=8, embed_dim=16, class_token=False, global_pool='avg',
                                    weight_init='jax')},
}
EWA: Flags = {'num-experts': 4, 'moe-layers': 'all', 'expert-init': 'copy', 'share-rate': 0.001}
GATED: Flags = {'num-experts': 8, 'router': 'topk', 'top-k': 2, 'moe-layers': 'every:2', 'expert-init': 'copy'}


class Whole(NamedTuple):
    """Training on all images of a set: width of the model, length, seed, learning rates, FFN width over model width."""
    width: int
    epochs: int
    seed: int
    rates: Tuple[float, ...]
    mlp_ratio: int = 4

    def variants(self) -> Dict[str, Flags]:
        """What is compared; the last gated one is the teacher of `gathering`."""
        variants = {'dense': {}, 'MoE': GATED}
        if self.mlp_ratio < 4:
            variants['MoE in all blocks'] = dict(GATED, **{'moe-layers': 'all'})
        return variants


# `gathering` takes the last of a set
WHOLE: Dict[str, List[Whole]] = {
    'fashion': [Whole(64, 5, 0, (0.004,)), Whole(16, 5, 100, (0.004, 0.008, 0.016))],
    'glyphs': [Whole(64, 5, 0, (0.001, 0.004)), Whole(32, 5, 100, (0.004, 0.008, 0.016)),
               Whole(16, 12, 100, (0.008, 0.016, 0.032, 0.064)), Whole(16, 12, 100, (0.016, 0.032, 0.064), 1)],
}


@dataclass(frozen=True)
class Setting:
    """A data set, and how large the studies are.

    Args:
        name: Of the set.
        data: Folder with train.tar, val.tar and test.tar.
        work: Folder for models, logs and subsets.
        flags: Of `train.py`, for all runs.
        size: Training images of the studies that take one size.
        lengths: Short and long training, epochs at that size.
        seeds: Number of seeds; None: the study's.
        gpu: Whether this is the large version.
        whole: Trainings on all images, see `WHOLE`.
    """
    name: str
    data: Path
    work: Path
    flags: Flags
    size: int
    lengths: Tuple[int, int]
    seeds: Optional[int]
    gpu: bool
    whole: List[Whole]

    def study(self, name: str) -> str:
        """What the results of a study on this set are called, and its folder of models."""
        return f'{name}-{self.name}' + '-gpu' * self.gpu

    def train(self, name: str, labels: Flags, size: int, epochs: int, baseline: str = '', **extra) -> Run:
        """One training on the first `size` images; flags in `extra` with underscores for dashes."""
        part = subset(self.data / 'train.tar', size, self.work / f'{self.name}-{size}.tar')
        flags = dict(self.flags, epochs=epochs, seed=labels['seed'], **{
            'train-split': str(part), 'val-interval': -(-epochs // (4 if epochs > 20 else 2))})
        flags.update({key.replace('_', '-'): value for key, value in extra.items()})
        return Run(f'{name}-{size}x{epochs}-{labels["seed"]}'.replace(' ', '-').replace(',', ''), flags,
                   dict(labels, images=size, epochs=epochs), baseline=baseline)

    def train_all(self, name: str, labels: Flags, kind: Whole, epochs: int, lr: float, **extra) -> Run:
        """One training on all images, with timm's usual head and first weights; flags in `extra` as in `train.py`."""
        kwargs = {key: self.flags['model-kwargs'][key] for key in (*WIDTH, 'patch_size')}
        kwargs['embed_dim'] = kind.width
        if kind.mlp_ratio != 4:
            kwargs['mlp_ratio'] = kind.mlp_ratio
        flags = {**self.flags, 'model-kwargs': kwargs, 'epochs': epochs, 'lr': lr, 'warmup-epochs': 1, **extra}
        return Run(name, dict(flags, seed=labels['seed']), labels)

    def converting(self) -> Flags:
        """Flags of `convert.py`."""
        return {'data-dir': str(self.data), 'train-split': 'train.tar', 'val-split': 'val.tar', 'workers': 0}


def setting(data: Path, work: Path, gpu: bool, seeds: Optional[int]) -> Setting:
    """What is known of a data set, from its `info.json`, or else from its name."""
    path = data / 'info.json'
    info = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    name, side = info.get('set', data.name), info.get('size', 224)
    own = SETS.get(name, {'img-size': side, 'model-kwargs': dict(WIDTH, patch_size=side // 4)})
    flags = dict(BASE, **{'data-dir': str(data)}, **own)
    whole = WHOLE.get(name, [Whole(64, 3, 100, (0.002, 0.004, 0.008))])
    size, lengths = {'digits': (250, (20, 80)), 'glyphs': (8000, (12, 36))}.get(name, (2000, (10, 40)))
    if gpu:
        # ViT-S on patches of half the side, 12,000 images, augmentation; no flips, for characters
        small = {'embed_dim': 384, 'depth': 12, 'num_heads': 6}
        patch = max(2, own['model-kwargs']['patch_size'] // 2)
        flags.update({
            'model': 'vit_small_patch16_224', 'model-kwargs': dict(small, patch_size=patch), 'lr': 0.001,
            'batch-size': 256, 'workers': 6, 'amp': True, 'amp-dtype': 'bfloat16', 'warmup-epochs': 5, 'no-aug': False,
            'hflip': 0.0, 'scale': (0.6, 1.0), 'aa': 'rand-m7-mstd0.5', 'reprob': 0.1, 'smoothing': 0.1})
        size, lengths = 12000, (50, 200)
        whole = [Whole(384, 30, 100, (0.0005, 0.001, 0.002))]
    return Setting(name, data, work, flags, size, lengths, seeds, gpu, whole)


def share_rate(s: Setting) -> Iterator[List[Run]]:
    """The MoE and its dense form over share rates, lengths, schedules, first weights, numbers and places of experts."""
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


FAMILIES: Dict[str, Tuple[Flags, str]] = {
    'dense': ({}, ''),
    'EWA': (EWA, ''),
    'no pull': (dict(EWA, **{'share-rate': 0.}), ''),
    'learned fusion': (dict(EWA, **{'share-rate': 0., 'expert-init': 'independent'}), 'learned fusion'),
    # (E - 1) / E: experts are equal after each step, and only the optimizer sees that there are several
    'full pull': (dict(EWA, **{'share-rate': .75}), ''),
}


def tune(s: Setting) -> Iterator[List[Run]]:
    """Learning rate, then weight decay, then drop-path of each family, by validation top-1: six runs each a length."""
    for families in (('dense', 'EWA', 'no pull'), ('learned fusion',), ('full pull',)):
        for epochs in s.lengths[::-1]:
            # short trainings like larger learning rates, on glyphs smaller ones
            larger = epochs == s.lengths[0] and s.name != 'glyphs'
            rates = [s.flags['lr'] * factor for factor in ((1, 2, 4) if larger else (0.5, 1, 2))]
            trials = [('lr', rates), ('weight-decay', (0.2,)), ('drop-path', (0.1, 0.2))]
            for stage, (flag, values) in enumerate(trials):
                runs = []
                for family in families:
                    extra, baseline = FAMILIES[family]
                    start = {'lr': s.flags['lr'], 'weight-decay': 0.05, 'drop-path': 0.}
                    if stage:
                        start.update(chosen(s, family, epochs, stage))
                    for value in values:
                        flags = dict(start, **{flag: value})
                        name = f'{family}-{flags["lr"]}-{flags["weight-decay"]}-{flags["drop-path"]}'
                        runs.append(s.train(
                            name, dict(family=family, stage=stage, seed=100), s.size, epochs, baseline, **extra,
                            **flags))
                yield runs


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


def main_study(s: Setting) -> Iterator[List[Run]]:
    """Does EWA help? Against drop-path, EMA, weight fusion; at the middle size also what large pulls do. All tuned."""
    ema = {'model-ema': True, 'model-ema-decay': 0.998, 'model-ema-warmup': True}
    fusion = FAMILIES['learned fusion']
    first = [('dense', *FAMILIES['dense'], 'dense', 2, ema), ('EWA', *FAMILIES['EWA'], 'EWA', 2, ema),
             ('no pull', *FAMILIES['no pull'], 'no pull', 2, {})]
    first += [(f'{name}, drop-path', *FAMILIES[name], name, 3, {}) for name in ('dense', 'EWA', 'no pull')]
    # where the package puts experts if it is not told otherwise
    first.append(('EWA, every second', dict(EWA, **{'moe-layers': 'every:2'}), '', 'EWA', 2, {}))
    others = [('whole images', EWA, 'whole images', 'EWA', 2, {}),
              ('static fusion', fusion[0], 'static fusion', 'learned fusion', 2, {}),
              ('learned fusion', *fusion, 'learned fusion', 2, {})]
    stronger = [('EWA 0.01, every second', dict(EWA, **{'moe-layers': 'every:2', 'share-rate': .01}), '', 'EWA', 2, {})]
    pulls = [('full pull', *FAMILIES['full pull'], 'full pull', 2, {}),
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


def bounded(s: Setting) -> Iterator[List[Run]]:
    """A bound on the experts' distance to their mean against constant share rates, at two lengths and learning rates.

    Constant rates at the usual learning rate are those of `share_rate`.
    """
    low, runs = s.flags['lr'] / 4, []
    for seed in range(s.seeds or 3):
        for epochs in s.lengths[::-1]:
            for lr in (s.flags['lr'], low):
                for bound in (0.05, 0.15, 0.45):
                    runs.append(s.train(f'bound-{bound}-{lr}', dict(bound=bound, lr=lr, seed=seed), s.size, epochs,
                                        f'bound {bound}', **dict(EWA, lr=lr)))
            for rate in (0., 1e-3, 1e-2, .1):
                runs.append(s.train(f'rate-{rate:g}-{low}', dict(rate=rate, lr=low, seed=seed), s.size, epochs,
                                    **dict(EWA, lr=low, **{'share-rate': rate})))
    yield runs


def finetune(s: Setting) -> Iterator[List[Run]]:
    """Pretrained on half of the classes, fine-tuned on the others with little data."""
    seeds = range(s.seeds or 5)
    names = sorted(classes_of(s.data / 'train.tar'))
    folders = {}
    for half, kept in (('first', names[:len(names) // 2]), ('second', names[len(names) // 2:])):
        folders[half] = s.work / f'{s.name}-{half}'
        for split in ('train', 'val', 'test'):
            subset(s.data / f'{split}.tar', None, folders[half] / f'{split}.tar', kept)
    pretrained = {seed: f'pretrain-{seed}' for seed in seeds}
    yield [Run(name, dict(s.flags, epochs=4, seed=seed, **{'warmup-epochs': 1, 'data-dir': str(folders['first'])}),
               dict(variant='pretrain', seed=seed)) for seed, name in pretrained.items()]
    variants = {'dense': {}, 'dense, drop-path': {'drop-path': 0.1}}
    variants.update({f'EWA {rate:g}' if rate else 'no pull': dict(EWA, **{'share-rate': rate})
                     for rate in (0., 1e-3, 1e-2, .1)})
    variants['EWA 0.001, drop-path'] = dict(EWA, **{'drop-path': 0.1})
    for size in (500, 100):
        part = subset(folders['second'] / 'train.tar', size, s.work / f'{s.name}-second-{size}.tar')
        yield [
            Run(f'{size}-{variant}-{lr}-{seed}'.replace(', ', '-').replace(' ', '-'),
                dict(s.flags, epochs=30, seed=seed, lr=lr, **{
                    'warmup-epochs': 1, 'batch-size': 50, 'val-interval': 10,
                    'data-dir': str(folders['second']), 'train-split': str(part),
                    'pretrained-path': str(s.work / s.study('finetune') / pretrained[seed] / 'last')}, **flags),
                dict(variant=variant, images=size, lr=lr, seed=seed))
            for lr in (5e-4, 2e-3, 4e-3) for seed in seeds for variant, flags in variants.items()]


def gated(s: Setting) -> Iterator[List[Run]]:
    """A gated MoE with and without pulls, and what averaging its experts then costs."""
    seeds = range(s.seeds or 5)
    rates = {'no pull': {'share-rate': 0.}}
    rates.update({f'EWA {rate:g}': {'share-rate': rate} for rate in (1e-3, 1e-2, .1)})
    rates.update({f'EWA {rate:g}, linear': {'share-rate': rate, 'share-schedule': 'linear'} for rate in (3e-3, 1e-2)})
    rates['EWA 0.01, first half'] = {'share-rate': 1e-2, 'share-stop-epoch': s.lengths[1] / 2}

    def run(name, seed, flags, times=1.):
        labels = dict(variant=name, kind='moe', seed=seed)
        return s.train(name, labels, s.size, math.ceil(times * s.lengths[1]), **flags)

    runs = [run(name, seed, dict(GATED, **flags)) for seed in seeds for name, flags in rates.items()]
    # a step of the MoE takes about 1.5 times the dense one
    yield runs + [
        run(name, seed, flags, times) for seed in seeds for name, flags, times in (
            ('dense', {}, 1), ('dense, longer', {}, 1.5), ('no pull, longer', dict(GATED, **rates['no pull']), 1.5))]
    yield [Run(f'{run.name}-average', dict(s.converting(), method='average'), dict(run.labels, kind='average'),
               'convert', str(s.work / s.study('gated') / run.name / 'last')) for run in runs]


def whole(s: Setting) -> Iterator[List[Run]]:
    """A gated MoE, and EWA, against a dense model on all images, over widths and learning rates."""
    runs = []
    narrowest = min(kind.width for kind in s.whole)
    for kind in s.whole:
        width, epochs, seed, rates, ratio = kind
        variants = kind.variants()
        if width == narrowest and ratio == 4:
            variants['EWA'] = EWA
        for lr in rates:
            runs += [s.train_all(
                f'{variant}-{width}x{epochs}-{lr}'.replace(' ', '-') + f'-mlp{ratio}' * (ratio != 4),
                dict(variant=variant, width=width, epochs=epochs, lr=lr, mlp_ratio=ratio, seed=seed), kind, epochs, lr,
                **flags) for variant, flags in variants.items()]
    yield runs


def best_rate(s: Setting, variant: str) -> float:
    """The learning rate of a variant of `whole` with the best validation top-1, among the last kind of model there."""
    kind = s.whole[-1]
    lines = [line for line in read_results(s.study('whole'))
             if line['labels'].items() >= dict(variant=variant, width=kind.width, epochs=kind.epochs).items()
             and line['labels'].get('mlp_ratio', 4) == kind.mlp_ratio]
    if not lines:
        raise ValueError(
            f'no runs of {variant} like {kind} in results/{s.study("whole")}.jsonl: run the study whole on this set')
    return max(lines, key=lambda line: line['last']['eval_top1'])['labels']['lr']


def gathering(s: Setting) -> Iterator[List[Run]]:
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
        runs = []
        for seed in seeds:
            for start, name in folders.items():
                if times > 1 and start not in few[times]:
                    continue
                folder = str(trained / f'{name}-{seed}' / ('last' if start == 'dense model' else '')) if name else None
                runs.append(s.train_all(
                    f'distil-{count * times}-{name or "random"}-{seed}',
                    dict(kind='distilled', start=start, images=count * times, seed=seed), model, times,
                    rates['MoE'] / 4 if name else rates['dense'], **{
                        'warmup-epochs': 0, 'train-split': str(part), 'initial-checkpoint': folder,
                        'teacher': f'local-dir:{trained / f"moe-{seed}" / "last"}', 'kd-temperature': 2.0,
                        'task-loss-weight': 0.5}))
        yield runs


STUDIES = dict(
    share_rate=share_rate, tune=tune, main=main_study, bounded=bounded, finetune=finetune, gated=gated,
    whole=whole, gathering=gathering)
