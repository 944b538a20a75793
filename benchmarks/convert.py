"""Time and memory of making a plain ViT from a MoE folder by `average`, against reading and writing its files.

    python -m benchmarks.convert                                        # ViT-L/16, 4 experts, random weights
    python -m benchmarks.convert --model vit_small_patch16_224

Load, `to_dense` and export (which loads the folder again and compares outputs) run in a process of their own, after the
libraries are imported; files come from the page cache. Memory is what the process takes beyond what it had before.
"""
import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

import ewa
from ewa.exporting import write_folder

from .common import arguments, build, in_process, peak, seconds, table


def measure(folder: Path) -> str:
    """Seconds and bytes of each part, as JSON."""
    found: dict = {}

    def convert() -> None:
        parts = {}
        parts['load'] = seconds(lambda: found.update(moe=ewa.load(folder)))
        parts['to_dense'] = seconds(lambda: found.update(dense=ewa.to_dense(found.pop('moe'))))
        parts['export'] = seconds(lambda: ewa.export(found.pop('dense'), folder / 'vit'))
        found.update(parts)

    def read() -> None:
        found.update(state={key: value.clone() for key, value in load_file(folder / 'model.safetensors').items()})

    ewa.export(build('small'), folder / 'first')  # what libraries take on their first use
    found['peak'] = peak(convert)
    found['read'] = seconds(read)
    dense = load_file(folder / 'vit' / 'model.safetensors')
    found['write'] = seconds(lambda: save_file(dense, folder / 'copy.safetensors'))
    found.pop('state')
    return json.dumps(found)


def main() -> None:
    """Parse, write a MoE, convert it in a process, print the table."""
    parser = arguments(__doc__)
    parser.add_argument('--model', default='vit_large_patch16_224')
    parser.add_argument('--experts', type=int, default=4)
    parser.add_argument('--layers', default='every:2')
    parser.add_argument('--one', metavar='FOLDER', help='measure in this process')
    args = parser.parse_args()
    if args.one:
        print(measure(Path(args.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        moe = ewa.to_moe(build(args.model).cpu(), num_experts=args.experts, layers=args.layers)
        sizes = [sum(p.numel() for p in model.parameters()) * 4 for model in (moe, ewa.to_dense(moe))]
        write_folder(moe, Path(folder) / 'moe', verify=False)
        del moe
        found = json.loads(in_process('convert', '--one', Path(folder) / 'moe'))
    total, floor = (sum(found[key] for key in keys) for keys in (('load', 'to_dense', 'export'), ('read', 'write')))
    table(f'Conversion of {args.model} with {args.experts} experts, {args.layers}, by average',
          f'MoE {sizes[0] / 2 ** 20:,.0f} MiB, dense {sizes[1] / 2 ** 20:,.0f} MiB; one run.',
          ('load (s)', 'to_dense (s)', 'export (s)', 'all (s)', 'read and write (s)', 'all / read and write',
           'peak (MiB)', 'peak / MoE', 'peak / dense'),
          [(found['load'], found['to_dense'], found['export'], total, floor, total / floor, found['peak'] / 2 ** 20,
            found['peak'] / sizes[0], found['peak'] / sizes[1])])


if __name__ == '__main__':
    main()
