"""The studies: which runs, in which order. Everything that is compared shares seeds, first weights and batches."""
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from ewa.dense import METHODS

from .runner import Run, subset

# a ViT of 16 patch tokens for 28x28 grey images; no augmentation, so that models can be told apart in minutes
SMALL = {'patch_size': 7, 'embed_dim': 64, 'depth': 6, 'num_heads': 4}
FASHION: Dict[str, Any] = {
    'train-split': 'train.tar', 'val-split': 'val.tar', 'img-size': 28, 'in-chans': 1, 'mean': 0.286, 'std': 0.353,
    'crop-pct': 1.0, 'no-aug': True, 'smoothing': 0.0, 'batch-size': 100, 'validation-batch-size': 500, 'workers': 0,
    'model': 'vit_tiny_patch16_224', 'model-kwargs': SMALL, 'lr': 0.002, 'weight-decay': 0.05, 'sched-on-updates': True,
    'checkpoint-hist': 1, 'log-interval': 100000,
}
EXPERTS: Dict[str, Any] = {'num-experts': 4, 'moe-layers': 'all', 'expert-init': 'copy'}
GATED: Dict[str, Any] = {'num-experts': 8, 'router': 'topk', 'top-k': 2, 'moe-layers': 'every:2', 'expert-init': 'copy'}


def gathering(data: Path, work: Path, seeds: Optional[int]) -> Iterator[List[Run]]:
    """Gated MoE to dense: every gathering, then distillation at three budgets (OneS, arXiv 2201.10890)."""
    seeds = range(seeds or 3)
    base = dict(FASHION, **{'data-dir': str(data)})
    trained = work / 'gathering'
    full = dict(base, epochs=3, **{'warmup-epochs': 1})
    yield [
        Run(f'{kind}-{seed}', dict(full, seed=seed, **extra), dict(kind=kind, seed=seed))
        for seed in seeds
        for kind, extra in (('moe', GATED), ('dense', {}), ('ewa', dict(EXPERTS, **{'share-rate': 0.001})))
    ]
    yield [
        Run(f'{method}-{seed}',
            {'method': method, 'data-dir': str(data), 'train-split': 'train.tar', 'val-split': 'val.tar', 'workers': 0},
            dict(kind='gathered', method=method, seed=seed), 'convert', str(trained / f'moe-{seed}' / 'last'))
        for seed in seeds for method in METHODS
    ] + [
        Run(f'ewa-export-{seed}', {'method': 'average'}, dict(kind='ewa-export', seed=seed), 'convert',
            str(trained / f'ewa-{seed}' / 'last'))
        for seed in seeds
    ]
    runs = []
    for count in (1000, 5000, 25000):
        part = subset(data / 'train.tar', count, work / 'gathering' / f'train-{count}.tar')
        for seed in seeds:
            starts = {method: str(trained / f'{method}-{seed}') for method in METHODS}
            starts.update({
                'EWA export': str(trained / f'ewa-export-{seed}'), 'dense model': str(trained / f'dense-{seed}' / 'last'),
                'random start': ''})
            for start, folder in starts.items():
                flags = dict(base, seed=seed, epochs=1, lr=0.0005 if folder else 0.002, **{
                    'warmup-epochs': 0, 'train-split': str(part), 'initial-checkpoint': folder or None,
                    'teacher': f'local-dir:{trained / f"moe-{seed}" / "last"}', 'kd-temperature': 2.0,
                    'task-loss-weight': 0.5})
                name = f'distil-{count}-{start.replace(" ", "-")}-{seed}'
                runs.append(Run(name, flags, dict(kind='distilled', start=start, images=count, seed=seed)))
    yield runs


def main_study(data: Path, work: Path, seeds: Optional[int]) -> Iterator[List[Run]]:
    """Does EWA help? Dense and EWA with and without drop-path and EMA, on small training sets, at two lengths."""
    variants: Dict[str, Dict[str, Any]] = {
        'dense': {},
        'dense, drop-path': {'drop-path': 0.1},
        'dense, EMA': {'model-ema': True, 'model-ema-decay': 0.998, 'model-ema-warmup': True},
        'EWA': dict(EXPERTS, **{'share-rate': 0.001}),
        'EWA, drop-path': dict(EXPERTS, **{'share-rate': 0.001, 'drop-path': 0.1}),
        'no pull': dict(EXPERTS, **{'share-rate': 0.0}),
        'no pull, drop-path': dict(EXPERTS, **{'share-rate': 0.0, 'drop-path': 0.1}),
    }
    for count, epochs in ((2000, 40), (2000, 120)):
        part = subset(data / 'train.tar', count, work / 'main' / f'train-{count}.tar')
        yield [
            Run(f'{count}x{epochs}-{variant.replace(", ", "-").replace(" ", "-")}-{seed}',
                dict(FASHION, epochs=epochs, seed=seed, **{
                    'warmup-epochs': 2, 'data-dir': str(data), 'val-interval': 10, 'train-split': str(part)}, **extra),
                dict(variant=variant, images=count, epochs=epochs, seed=seed))
            for seed in range(seeds or 5) for variant, extra in variants.items()
        ]


def share_rate(data: Path, work: Path, seeds: Optional[int]) -> Iterator[List[Run]]:
    """The MoE and its dense form over share rates, for copied and independent first experts."""
    part = subset(data / 'train.tar', 2000, work / 'share_rate' / 'train-2000.tar')
    yield [
        Run(f'{init}-{rate:g}-{seed}',
            dict(FASHION, epochs=40, seed=seed, **{'warmup-epochs': 2, 'data-dir': str(data), 'val-interval': 10,
                                                  'train-split': str(part)}, **EXPERTS, **{'share-rate': rate}) |
            {'expert-init': init},
            dict(init=init, rate=rate, seed=seed))
        for seed in range(seeds or 3) for init in ('copy', 'independent')
        for rate in (0., 1e-4, 1e-3, 1e-2, .1, .3, .75)
    ]


STUDIES = dict(gathering=gathering, main=main_study, share_rate=share_rate)
