"""Time of a training step over experts, depth, width and batch, and host synchronisations of a gated layer.

    python -m benchmarks.scale
    python -m benchmarks.scale --image-size 224 --batch-size 64 --width 384       # a GPU

One of four sizes moves at a time, with experts in all blocks. Linear must be: the dense step in depth and batch, the
parameters in experts. Flat should be: time / dense. A synchronisation is a place where the host waits for a GPU.
"""
import warnings
from typing import Any, Dict, List, Optional

import torch

import ewa

from .common import DEVICE, arguments, build, images_for, interleave, milliseconds, ratio, table
from .step import training_step


def synchronisations(size: Dict[str, Any], experts: int, router: str) -> Optional[float]:
    """Of a layer in a forward and backward pass in training, on a GPU."""
    if DEVICE.type != 'cuda':
        return None
    counts: List[int] = []
    for moe in (False, True):
        model = build('vit_tiny_patch16_224', **size)
        if moe:
            ewa.to_moe(model, num_experts=experts, layers='all', router=router)
        images = images_for(model.train(), 4)
        model(images).sum().backward()
        torch.cuda.set_sync_debug_mode('warn')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            model(images).sum().backward()
        torch.cuda.set_sync_debug_mode('default')
        counts.append(len(caught))
    return (counts[1] - counts[0]) / size['depth']


def main() -> None:
    """Parse, move one size at a time, print the tables."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument('--experts', type=int, nargs='+', default=[2, 4, 8, 16, 32, 64])
    parser.add_argument('--width', type=int, default=96)
    parser.add_argument('--image-size', type=int, default=64, help='with patches of 8')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--factors', type=float, nargs='+', default=[0.5, 1, 2, 4], help='of depth, width and batch')
    args = parser.parse_args()
    base: Dict[str, Any] = dict(depth=4, width=args.width, batch=args.batch_size, experts=4)
    cases = [dict(base, experts=experts) for experts in args.experts]
    cases += [dict(base, **{key: int(factor * base[key])}) for key in ('depth', 'width', 'batch')
              for factor in args.factors if factor != 1]
    rows = []
    for case in cases:
        size = dict(img_size=args.image_size, patch_size=8, depth=case['depth'], embed_dim=case['width'], num_heads=3,
                    num_classes=10)
        models = {'dense': build('vit_tiny_patch16_224', **size)}
        for form in ('experts', 'mean'):
            models[form] = ewa.to_moe(build('vit_tiny_patch16_224', **size), case['experts'], layers='all', form=form)
        models['gated'] = ewa.to_moe(
            build('vit_tiny_patch16_224', **size), case['experts'], layers='all', router='topk', top_k=1,
            renormalise=False)
        times = interleave({name: training_step(model, case['batch']) for name, model in models.items()}, args.rounds)
        rows.append((*case.values(), sum(p.numel() for p in models['experts'].parameters()) / 1e6,
                     milliseconds(times['dense']), *(ratio(times, name, 'dense') for name in list(models)[1:]),
                     *(synchronisations(size, case['experts'], router) for router in ('random', 'topk'))))
    table(f'Steps of a ViT of {(args.image_size // 8) ** 2} tokens over its sizes, float32',
          f'Medians of {args.rounds} rounds. Synchronisations are counted on a GPU.',
          ('depth', 'width', 'batch', 'experts', 'parameters (M)', 'dense (ms)', 'EWA / dense', 'mean form / dense',
           'gated, top 1 / dense', 'synchronisations of a layer', 'of a gated one'), rows)


if __name__ == '__main__':
    main()
