"""Time and memory of one pull against its floor: each expert weight read once and written once.

    python -m benchmarks.pull
    python -m benchmarks.pull --model vit_base_patch16_224 --experts 4 16 --dtype bfloat16

The floor is the time that `mul_` takes on one tensor as large as all expert weights.
"""
import torch

import ewa
from ewa.moe import moe_layers, pulled

from .common import DEVICE, arguments, build, interleave, milliseconds, peak, ratio, table


def main() -> None:
    """Parse, time the pull and its floor in turn, print the table."""
    parser = arguments(__doc__, rounds=20)
    parser.add_argument('--model', nargs='+', default=['vit_small_patch16_224', 'vit_base_patch16_224'])
    parser.add_argument('--experts', type=int, nargs='+', default=[4, 8])
    parser.add_argument('--layers', default='every:2')
    parser.add_argument('--form', default='experts', choices=('experts', 'mean'))
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of the weights')
    args = parser.parse_args()
    rows = []
    for name in args.model:
        for count in args.experts:
            model = ewa.to_moe(build(name), num_experts=count, layers=args.layers, form=args.form)
            model.to(getattr(torch, args.dtype))
            weights = [p for _, layer in moe_layers(model) for p in pulled(layer).parameters()]
            flat = torch.ones(sum(p.numel() for p in weights), dtype=weights[0].dtype, device=DEVICE)
            averager = ewa.ExpertAverager(model, 1e-3)
            averager.step()
            extra = peak(averager.step)
            times = interleave({'floor': lambda: flat.mul_(1.), 'pull': averager.step}, args.rounds)  # noqa: B023
            size = flat.numel() * flat.element_size()
            rows.append((name, count, size / 2 ** 20, 2 * size / 1e9 / (milliseconds(times['floor']) / 1000),
                         milliseconds(times['floor']), milliseconds(times['pull']), ratio(times, 'pull', 'floor'),
                         extra / 2 ** 20))
    table(f'The pull, {args.dtype}, {args.form} form, {args.layers}', f'Medians of {args.rounds} rounds.',
          ('model', 'experts', 'expert weights (MiB)', 'bandwidth (GB/s)', 'floor (ms)', 'pull (ms)', 'pull / floor',
           'allocated (MiB)'), rows)


if __name__ == '__main__':
    main()
