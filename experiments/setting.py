"""What a study is, and on what it runs: data set, model, flags, sizes.

Sizes are numbers of training images, lengths are epochs. Everything that is compared shares seeds, initial weights and
batches. Learning rate, weight decay and drop-path are chosen on the validation split; what the tables show is the test
set.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from matplotlib.figure import Figure

from .data import subset
from .runner import Run
from .tables import Lines

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
    # with a class token and timm's usual initial weights learning starts so late here that seeds hide all else
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
        """One training on all images, with timm's usual head and initial weights; flags in `extra` as in `train.py`."""
        kwargs = {key: self.flags['model-kwargs'][key] for key in (*WIDTH, 'patch_size')}
        kwargs['embed_dim'] = kind.width
        if kind.mlp_ratio != 4:
            kwargs['mlp_ratio'] = kind.mlp_ratio
        kwargs.update(extra.pop('model-kwargs', {}))
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


class Notes(NamedTuple):
    """What stands beside the tables of one results file; Markdown."""
    title: str = ''
    setup: str = ''
    reading: str = ''


@dataclass(frozen=True)
class Study:
    """One question, the runs that answer it and the tables made of their results.

    Args:
        question: In one sentence.
        cost: Number of runs and hours.
        runs: The stages; the runs of a stage may go on at once.
        tables: Markdown of the lines of one results file; the second argument is its name without the study's, the
            data set in most cases.
        figures: What `tables` refers to, by what follows the name of the results file.
        setup: Common to all data sets; Markdown.
        notes: Beside the tables of each results file. One that is not named here has tables alone.
        raw: Results files of earlier settings that have no page.
    """
    question: str
    cost: str
    runs: Callable[[Setting], Iterator[List[Run]]]
    tables: Callable[[Lines, str], str]
    figures: Callable[[Lines], Dict[str, Figure]] = lambda lines: {}
    setup: str = ''
    notes: Dict[str, Notes] = field(default_factory=dict)
    raw: Tuple[str, ...] = ()
