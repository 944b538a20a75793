"""README's first command against a dense model of equal length."""
from pathlib import Path
from typing import Any, Dict, Iterator, List

import yaml

from ..data import subset
from ..runner import Run
from ..setting import Flags, Setting, Study
from ..tables import Lines, provenance
from .mean import RATE, SPREAD, against_dense

ROOT = Path(__file__).parents[2]


def runs(s: Setting) -> Iterator[List[Run]]:
    """The recipe as it is, in mean form, and without experts."""
    recipe = yaml.safe_load((ROOT / 'configs/demo.yaml').read_text(encoding='utf-8'))
    images, data = ROOT / recipe.pop('data-dir'), s.work / 'demo'
    kwargs = dict(recipe.pop('model-kwargs'))
    host = kwargs.pop('host')
    flags: Flags = {key: value for key, value in recipe.items() if key not in ('output', 'experiment', 'model')}
    flags.update({
        'model': host, 'model-kwargs': kwargs, 'data-dir': str(data), 'workers': 0, 'checkpoint-hist': 1,
        'val-interval': 10})
    for split, source in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        subset(images / f'{source}.tar', None, data / f'{split}.tar')
    own = {key: flags.pop(key) for key in ('num-experts', 'moe-layers', 'expert-init', 'share-rate')}
    variants: Dict[str, Dict[str, Any]] = {
        'dense': {}, 'the demo': own,
        'mean form': dict(own, **{'expert-form': 'mean', 'share-rate': RATE, 'spread': SPREAD})}
    yield [Run(f'{variant.replace(" ", "-")}-{seed}', dict(flags, seed=seed, **extra),
               dict(variant=variant, images=2000, epochs=flags['epochs'], seed=seed))
           for seed in range(s.seeds or 3) for variant, extra in variants.items()]


def tables(lines: Lines, name: str) -> str:
    """Paired differences to dense."""
    return '\n'.join([against_dense(lines), '', provenance(lines)])


STUDY = Study(
    question='Is the model of the demo better than a dense one, trained as long with the same flags?',
    cost='9 runs, 10 minutes, on fashion',
    runs=runs,
    tables=tables,
    setup=f"""
`configs/demo.yaml` on its 2,000 images, width 64, 6 blocks, drop-path 0.1, label smoothing 0.1; measured on
its 1,000 validation images, last epoch; they choose nothing. Mean form: share rate {RATE}, spread {SPREAD}. Flags are
the recipe's, tuned for none.
""",
)
