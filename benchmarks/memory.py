"""Peak memory of training against the dense peak and what the further expert weights take.

    python -m benchmarks.memory
    python -m benchmarks.memory --model vit_base_patch16_224 --batch-size 64 --experts 2 4 8 16

Expected: `dense + (E-1) * FFN bytes * 4`, with one FFN's bytes for the parameter, the gradient and two moments of
AdamW; in mean form `E` in the place of `E-1`, and the weights of the experts, `E * FFN bytes`, which are computed in
the forward pass and needed until the backward. Each variant is a process of its own; its peak leaves out what
Python and torch take before there is a model.
"""
import ewa
from ewa.moe import moe_layers, pulled

from .common import arguments, build, in_process, peak, table
from .step import training_step


def measure(model: str, batch: int, experts: int, layers: str, form: str) -> str:
    """Bytes at the peak, and bytes of one FFN of each MoE layer together."""
    size = 0

    def train() -> None:
        nonlocal size
        vit = build(model)
        if experts > 1:
            ewa.to_moe(vit, num_experts=experts, layers=layers, form=form)
            size = sum(p.numel() * p.element_size()
                       for _, layer in moe_layers(vit) for p in pulled(layer)[0].parameters())
        step = training_step(vit, batch)
        for _ in range(3):
            step()

    step = training_step(build('small'), 4)  # what libraries take on their first use
    step()
    return f'{peak(train)} {size}'


def main() -> None:
    """Parse, measure each variant in a process, print the table."""
    parser = arguments(__doc__)
    parser.add_argument('--model', default='vit_small_patch16_224')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--experts', type=int, nargs='+', default=[2, 4, 8])
    parser.add_argument('--layers', nargs='+', default=['every:2', 'all'])
    parser.add_argument('--forms', nargs='+', default=['experts', 'mean'], choices=('experts', 'mean'))
    parser.add_argument('--one', nargs=3, metavar=('E', 'LAYERS', 'FORM'), help='measure in this process')
    args = parser.parse_args()
    if args.one:
        print(measure(args.model, args.batch_size, int(args.one[0]), *args.one[1:]))
        return

    def one(*variant: object) -> tuple:
        line = in_process(
            'memory', '--model', args.model, '--batch-size', args.batch_size, '--one', *variant, trim=True)
        return tuple(map(int, line.split()))

    dense, _ = one(1, 'all', 'experts')
    rows: list = [('dense', dense / 2 ** 20, None, None)]
    for layers in args.layers:
        for form in args.forms:
            more = int(form == 'mean')
            for count in args.experts:
                found, size = one(count, layers, form)
                expected = dense + (count - 1 + more) * size * 4 + more * count * size
                rows.append((f'{"EWA in mean form" if more else "EWA"}, {count} experts, {layers}', found / 2 ** 20,
                             expected / 2 ** 20, f'{found / expected:.3f}'))
    table(f'Peak memory of training {args.model}, batch {args.batch_size}, float32, AdamW', '',
          ('variant', 'peak (MiB)', 'expected (MiB)', 'peak / expected'), rows)


if __name__ == '__main__':
    main()
