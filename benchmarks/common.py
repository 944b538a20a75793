"""What the benchmarks share: the line about the machine, medians of interleaved runs, peaks of memory, the table."""
import argparse
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import timm
import torch
from torch import nn

import ewa

Cell = Union[str, int, float, None]
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
ROOT = Path(__file__).parents[1]
# the model of the accuracy studies: 16 patch tokens
SMALL: Dict[str, Any] = dict(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4)


def arguments(doc: Optional[str], rounds: Optional[int] = None) -> argparse.ArgumentParser:
    """A parser with `--rounds`, described by the first line of a script."""
    parser = argparse.ArgumentParser(description=(doc or '').split('\n')[0])
    if rounds:
        parser.add_argument('--rounds', type=int, default=rounds, metavar='N', help='medians are over these')
    return parser


def build(model: str, **kwargs: Any) -> nn.Module:
    """A timm model with random weights, on the device; `'small'` is that of the studies."""
    torch.manual_seed(0)
    if model == 'small':
        return timm.create_model('vit_tiny_patch16_224', **{**SMALL, **kwargs}).to(DEVICE)
    return timm.create_model(model, **kwargs).to(DEVICE)


def images_for(model: nn.Module, count: int) -> torch.Tensor:
    """Random images of the size a model takes."""
    side = model.patch_embed.img_size
    return torch.randn(count, model.patch_embed.proj.in_channels, *side, device=DEVICE)


def machine() -> str:
    """Device, threads and versions."""
    if DEVICE.type == 'cuda':
        name = torch.cuda.get_device_name()
    else:
        path = Path('/proc/cpuinfo')
        lines = path.read_text().splitlines() if path.exists() else []
        names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
        name = f'{(names or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} CPU thread(s)'
    return f'{name}, torch {torch.__version__}, timm {timm.__version__}, ewa {ewa.__version__}'


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleave(functions: Dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Dict[str, List[float]]:
    """Seconds of a call of each function, for each round; every second round goes backward.

    So a machine that drifts touches all alike. Short functions are called several times and their times divided.
    """
    warm = {name: min(seconds(function) for _ in range(warmup)) for name, function in functions.items()}
    repeat = max(1, round(0.02 / max(warm.values())))
    times: Dict[str, List[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[::-1 if turn % 2 else 1]:
            times[name].append(seconds(lambda: [functions[name]() for _ in range(repeat)]) / repeat)  # noqa: B023
    return times


def ratio(times: Dict[str, List[float]], name: str, base: str) -> float:
    """Median over rounds of the time of one function, divided by that of another in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base]))


def milliseconds(times: Sequence[float]) -> float:
    """Median, in ms."""
    return 1000 * statistics.median(times)


def own_memory() -> int:
    """Bytes of this process that are not files mapped into memory (Linux)."""
    return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) * 1024


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a call takes at most beyond what is taken before; on a CPU sampled each millisecond."""
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)  # else blocks that were freed before are taken again unseen
    before = most = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        most = max(most, own_memory())
        done.set()
        watcher.join()
    return most - before


def in_process(script: str, *flags: Any, trim: bool = False) -> str:
    """The last line that a benchmark prints in a process of its own, where memory is counted from nothing.

    With `trim`, glibc gives back at once what is freed, which takes time; else a peak has what it keeps.
    """
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'} if trim else None
    done = subprocess.run([sys.executable, '-m', f'benchmarks.{script}', *map(str, flags)], cwd=ROOT, env=env,
                          check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def table(title: str, notes: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print one table in Markdown, with the machine under its title."""
    def text(cell: Cell) -> str:
        return '' if cell is None else f'{cell:.3g}' if isinstance(cell, float) and abs(cell) < 1 else (
            f'{cell:.2f}' if isinstance(cell, float) and abs(cell) < 10 else
            f'{cell:,.0f}' if isinstance(cell, (int, float)) else cell)

    print(f'### {title}\n\n{machine()}. {notes}\n')
    print(f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}')
    for row in rows:
        print(f'| {" | ".join(map(text, row))} |')
    print(flush=True)
