"""Time and memory to load a released MoE model and to convert it, at the sizes that were released.

    python benchmarks/load_released.py                  # files of random weights (2 GB in the temporary folder)
    python benchmarks/load_released.py DIR swin_moe     # files of yours
    python benchmarks/load_released.py --method refit --images 1024 --only V-MoE-S
"""
import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import ewa

SWIN_S = dict(img_size=192, width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), window=12, classes=21841,
              moe=(*((2, block) for block in range(1, 18, 2)), (3, 1)))
SIZES = {  # name to layout and arguments of tests/released_reference.py
    'Swin-MoE-S, 8 experts, 32 ranks': ('swin_moe', dict(SWIN_S, experts=8)),
    'Swin-MoE-S, 32 experts, 32 ranks': ('swin_moe', dict(SWIN_S, experts=32)),
    'V-MoE-S/32, 384 pixels': ('v_moe', dict(
        img_size=384, patch=32, width=512, depth=8, heads=8, hidden=2048, classes=1000, experts=8, moe=(5, 7))),
    'V-MoE-B/16, 384 pixels': ('v_moe', dict(
        img_size=384, patch=16, width=768, depth=12, heads=12, hidden=3072, classes=1000, experts=8,
        moe=tuple(range(1, 12, 2)))),
}


def write(layout: str, size: dict, folder: Path) -> None:
    """Files of random weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
    import released_reference

    if layout == 'swin_moe':
        released_reference.write_swin_moe(folder, released_reference.swin_moe_weights(**size), ranks=32)
    else:
        released_reference.write_v_moe(
            folder / 'checkpoint', released_reference.v_moe_weights(**size), shards=8, chunk=10 ** 7)


def own_memory() -> float:
    """GB of this process that are not files mapped into memory, or of all on systems other than Linux."""
    try:
        return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) / 1e6
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(path: Path, layout: str, method: str, images: int) -> str:
    """The cells of a row, measured in this process."""
    torch.set_num_threads(1)
    before, peak, done = own_memory(), [0.], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own_memory())

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    model = ewa.load(path, layout=layout).eval()
    loading = time.perf_counter() - started
    most, peak[0] = peak[0] - before, 0
    side = model.pretrained_cfg['input_size'][-1]
    batches = [torch.randn(min(images - start, 32), 3, side, side) for start in range(0, images, 32)]
    started = time.perf_counter()
    dense = ewa.to_dense(model, method, batches or None)
    converting = time.perf_counter() - started
    time.sleep(0.1)
    done.set()
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, dense)]
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    cells = (f'{size:.2f}', f'{count[0]:.0f}', f'{count[1]:.0f}', f'{loading:.0f}', f'{most:.1f}', f'{converting:.0f}',
             f'{peak[0] - before:.1f}')
    return ' | '.join(cells)


def main() -> None:
    """Parse, measure each model in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('directory', nargs='?')
    parser.add_argument('layout', nargs='?', choices=('swin_moe', 'v_moe'))
    parser.add_argument('--method', default='average')
    parser.add_argument('--images', type=int, default=0, help='random ones, for methods that look at images')
    parser.add_argument('--only', default='', help='models whose names begin so')
    args = parser.parse_args()
    if args.directory:
        print(measure(Path(args.directory), args.layout, args.method, args.images))
        return
    print(f'{platform.machine()}, 1 CPU thread, torch {torch.__version__}\n')
    columns = ('random weights as', 'files (GB)', 'parameters (M)', 'of the dense model (M)', 'loading (s)',
               'memory for it (GB)', f'{args.method} (s)', 'memory then (GB)')
    print(f'| {" | ".join(columns)} |\n|' + '---|' * len(columns))
    for name, (layout, size) in SIZES.items():
        if not name.startswith(args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(layout, size, Path(folder))
            row = subprocess.run([
                sys.executable, __file__, folder, layout, '--method', args.method, '--images', str(args.images)],
                check=True, capture_output=True, text=True)
        print(f'| {name} | {row.stdout.strip()} |', flush=True)


if __name__ == '__main__':
    main()
