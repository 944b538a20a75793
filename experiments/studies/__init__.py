"""The studies, one a file; the only list of them.

`main` and `mean` need the results of `tune`, `gathering` those of `whole`.
"""
from typing import Dict

from ..setting import Study
from . import bounded, demo, finetune, gated, gathering, main, mean, pretrained, real, refit, share_rate, tune, whole

STUDIES: Dict[str, Study] = {
    'tune': tune.STUDY,
    'main': main.STUDY,
    'mean': mean.STUDY,
    'pretrained': pretrained.STUDY,
    'demo': demo.STUDY,
    'share_rate': share_rate.STUDY,
    'bounded': bounded.STUDY,
    'finetune': finetune.STUDY,
    'gated': gated.STUDY,
    'whole': whole.STUDY,
    'gathering': gathering.STUDY,
    'refit': refit.STUDY,
    'real': real.STUDY,
}
