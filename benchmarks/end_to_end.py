"""Images a second of train.py on a folder of JPEG files, and the time from command to first step.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --timm-train PATH/TO/timm/train.py       # of a checkout of timm, the wheel has none
    python -m benchmarks.end_to_end --model vit_small_patch16_224 --batch-size 128 --images 5120

A plain loop with timm's own parts, train.py on the dense model and on the same with experts, and timm's train.py run in
turn, each in processes of their own, at equal settings. Times are those of the steps of the optimizer, seen by a hook.
Images a second are those of the last epoch from its first step to its last; between epochs: validation, saving and the
start of loading.
"""
import argparse
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch.optim.optimizer import register_optimizer_step_post_hook

from .common import DEVICE, ROOT, arguments, table


def make_folder(folder: Path, images: int) -> None:
    """JPEG files of 10 classes, smooth noise."""
    random = np.random.default_rng(0)
    for split, count in ('train', images), ('validation', max(10, images // 4)):
        for i in range(count):
            path = folder / split / str(i % 10) / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            noise.resize((288, 256), Image.Resampling.BICUBIC).save(path, quality=90)


def plain_loop(flags: List[str]) -> None:
    """What one writes with timm: loader, model, optimizer, loop, validation."""
    parser = argparse.ArgumentParser()
    for name, kind in dict(model=str, batch_size=int, workers=int, epochs=int, data_dir=str).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=kind)
    args, _ = parser.parse_known_args(flags)
    model = timm.create_model(args.model, num_classes=10).to(DEVICE)
    config = resolve_model_data_config(model)
    shared = dict(input_size=config['input_size'], batch_size=args.batch_size, mean=config['mean'], std=config['std'],
                  num_workers=args.workers, device=DEVICE)
    training = create_loader(
        create_dataset('', args.data_dir, split='train', is_training=True), is_training=True, color_jitter=0.4,
        hflip=0.5, interpolation='random', **shared)
    validation = create_loader(
        create_dataset('', args.data_dir, split='validation'), interpolation=config['interpolation'],
        crop_pct=config['crop_pct'], **shared)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-4, weight_decay=0.05)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(args.epochs):
        model.train()
        for images, target in training:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.inference_mode():
            for images, target in validation:
                correct += (model(images).argmax(1) == target).sum().item()


def run(script: str, flags: List[str]) -> None:
    """Run a script, or the plain loop, in this process; print when its optimizer stepped."""
    times: List[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.time()))
    if script == 'plain':
        plain_loop(flags)
    else:
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name='__main__')
    print(f'\n{json.dumps(times)}')


def measure(script: str, flags: List[str], epochs: int, batch: int) -> Dict[str, float]:
    """Seconds to the first step and between epochs, images a second."""
    started = time.time()
    done = subprocess.run([sys.executable, '-m', 'benchmarks.end_to_end', '--one', script, *flags], check=False,
                          cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{script} failed:\n{done.stderr}')
    times = json.loads(done.stdout.splitlines()[-1])
    steps = len(times) // epochs
    last = times[-steps:]
    return dict(first=times[0] - started, speed=(steps - 1) * batch / (last[-1] - last[0]),
                between=times[-steps] - times[-steps - 1])


def main() -> None:
    """Parse, run all scripts in turn, print the table."""
    if sys.argv[1:2] == ['--one']:
        run(sys.argv[2], sys.argv[3:])
        return
    parser = arguments(__doc__, rounds=2)
    parser.add_argument('--model', default='vit_tiny_patch16_224')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--images', type=int, default=160)
    parser.add_argument('--epochs', type=int, default=2, help='2 or more')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--timm-train', metavar='FILE', help='train.py of a checkout of timm')
    args = parser.parse_args()
    found: Dict[str, List[Dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / 'images', args.images)
        shared: List[Any] = [
            '--model', args.model, '--batch-size', args.batch_size, '--workers', args.workers, '--epochs', args.epochs,
            '--data-dir', f'{folder}/images', '--num-classes', 10, '--opt', 'adamw', '--lr', 1e-4, '--weight-decay',
            0.05, '--warmup-epochs', 0, '--smoothing', 0.1, '--checkpoint-hist', 1, '--output', f'{folder}/output']
        runs: Dict[str, List[Any]] = {
            'plain loop': ['plain', *shared],
            'train.py, dense': [ROOT / 'train.py', *shared],
            'train.py, EWA, 4 experts, every:2': [ROOT / 'train.py', *shared, '--num-experts', 4]}
        if args.timm_train:
            runs['train.py of timm'] = [args.timm_train, *shared, '--device', DEVICE.type]
        for _ in range(args.rounds):
            for name, (script, *flags) in runs.items():
                found.setdefault(name, []).append(
                    measure(str(script), list(map(str, flags)), args.epochs, args.batch_size))

    def median(name: str, key: str) -> float:
        return statistics.median(entry[key] for entry in found[name])

    def against(name: str, base: str) -> Any:
        return f'{statistics.median(a["speed"] / b["speed"] for a, b in zip(found[name], found[base])):.3f}' \
            if base in found else None

    table(f'Training {args.model} from a folder, batch {args.batch_size}, {args.workers} loading process(es)',
          f'Medians of {args.rounds} runs of {args.epochs} epochs on {args.images} images.',
          ('command', 'to the first step (s)', 'images/s', '/ plain loop', '/ train.py of timm', 'between epochs (s)'),
          [(name, median(name, 'first'), median(name, 'speed'), against(name, 'plain loop'),
            against(name, 'train.py of timm'), median(name, 'between')) for name in found])


if __name__ == '__main__':
    main()
