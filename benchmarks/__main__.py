"""Run all benchmarks for this machine and write their tables to benchmarks/results-cpu.md or results-cuda.md.

    OMP_NUM_THREADS=2 python -m benchmarks       # two quiet cores: about 20 minutes
    python -m benchmarks --only step pull        # these alone; what the file has of the others stays
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

from .common import DEVICE, ROOT

SMALL = '--model small --batch-size 100'
RUNS: Dict[str, Dict[str, List[str]]] = {
    'cpu': {
        'step': ['--no-rivals --rounds 4', f'{SMALL} --rounds 40', f'{SMALL} --rounds 20 --experts 2 8 16 --no-rivals',
                 f'{SMALL} --rounds 20 --layers every:2 --dtype bfloat16 --no-rivals',
                 f'{SMALL} --rounds 20 --layers every:2 --compile --no-rivals',
                 '--model vit_tiny_patch16_224 --experts 2 8 16 --no-rivals --rounds 4'],
        'pull': ['', '--form mean --model vit_small_patch16_224'],
        'partition': ['', '--width 64 --images 100 --tokens 17 --rounds 40'],
        'memory': [''],
        'processes': [''],
        'convert': [''],
        'refit': ['--images 128 --threads 2'],
        'end_to_end': ['--images 480'],
        'inference': ['', '--ways compiled'],
        'scale': ['--experts 2 4 8 16 64'],
    },
    'cuda': {
        'step': ['--batch-size 256 --dtype bfloat16 --rounds 20',
                 '--batch-size 256 --dtype bfloat16 --rounds 20 --compile --no-rivals',
                 '--batch-size 64 --dtype float32 bfloat16 --experts 2 4 8 16 --no-rivals --rounds 10',
                 f'{SMALL} --rounds 40'],
        'pull': ['--rounds 50', '--rounds 50 --layers all --experts 16', '--rounds 50 --form mean'],
        'partition': ['--images 256 --rounds 50', '--images 256 --rounds 50 --compile'],
        'memory': ['--batch-size 64'],
        'processes': [],
        'convert': [''],
        'refit': ['', '--model vit_base_patch16_224'],
        'end_to_end': ['--model vit_small_patch16_224 --batch-size 128 --images 5120 --workers 12'],
        'inference': ['--batch-size 256 --ways eager compiled ONNX --rounds 20'],
        'scale': ['--image-size 128 --batch-size 64 --width 384'],
    },
}


def sections(path: Path) -> Dict[str, str]:
    """Script to its part of a file of results."""
    parts = re.split(r'(?m)^## (\w+)\.py$', path.read_text(encoding='utf-8')) if path.exists() else ['']
    return dict(zip(parts[1::2], parts[2::2]))


def main() -> None:
    """Run each script, and write the file again after each."""
    runs = RUNS[DEVICE.type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=runs, default=list(runs), metavar='SCRIPT')
    parser.add_argument('--timm-train', metavar='FILE', help='train.py of a checkout of timm')
    args = parser.parse_args()
    path = ROOT / 'benchmarks' / f'results-{DEVICE.type}.md'
    found = sections(path)
    for script in filter(runs.get, args.only):
        more = f' --timm-train {args.timm_train}' if args.timm_train and script == 'end_to_end' else ''
        started, found[script] = time.time(), '\n'
        for flags in runs[script]:
            command = f'-m benchmarks.{script} {flags}{more}'.strip()
            print(f'python {command}', flush=True)
            done = subprocess.run(
                [sys.executable, *command.split()], check=False, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f'python {command} failed with exit code {done.returncode}.')
            command = re.sub(r'(--timm-train) \S+', r'\1 FILE', command)
            found[script] += f'`python {command}`\n\n{done.stdout.strip()}\n\n'
        text = f'# Benchmarks on {"a GPU" if DEVICE.type == "cuda" else "a CPU"}\n\nWritten by `python -m benchmarks`; '
        text += '[questions and targets](README.md).\n\n'
        text += ''.join(f'## {name}.py\n\n{found[name].strip()}\n\n' for name in runs if name in found)
        path.write_text(text.rstrip() + '\n', encoding='utf-8')
        print(f'{script}: {time.time() - started:.0f} s', flush=True)


if __name__ == '__main__':
    main()
