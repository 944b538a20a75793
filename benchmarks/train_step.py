"""Time and memory of a training step, relative to the dense model: forward, backward, AdamW and pull.

    python benchmarks/train_step.py --model vit_tiny_patch16_224 --batch-size 8            # any machine
    python benchmarks/train_step.py --model vit_small_patch16_224 --batch-size 256 --amp   # a GPU

All variants are timed in turn, round after round in one process, so that a drifting machine touches all alike; the
table has the median over rounds of each variant's time divided by the dense model's in the same round.
"""
import argparse
import platform
import statistics
import time
from typing import Any, Dict, List, Optional

import timm
import torch

import ewa

VARIANTS: Dict[str, Optional[Dict[str, Any]]] = {  # name to arguments of to_moe
    'dense': None,
    'EWA, 2 experts, every:2': dict(num_experts=2, layers='every:2'),
    'EWA, 4 experts, every:2': dict(num_experts=4, layers='every:2'),
    'EWA, 8 experts, every:2': dict(num_experts=8, layers='every:2'),
    'EWA, 4 experts, all': dict(num_experts=4, layers='all'),
    'EWA in mean form, 4 experts, every:2': dict(num_experts=4, form='mean', layers='every:2'),
    'EWA in mean form, 4 experts, all': dict(num_experts=4, form='mean', layers='all'),
    'gated, 8 experts, top 2, every:2': dict(num_experts=8, router='topk', top_k=2, layers='every:2'),
}


def main() -> None:
    """Parse, time all variants, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default='vit_tiny_patch16_224')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

    steps, parameters, pulls, peak = {}, {}, {}, {}
    for name, moe in VARIANTS.items():
        torch.manual_seed(0)
        model = timm.create_model(args.model)
        if moe:
            ewa.to_moe(model, init='copy', **moe)
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        averager = ewa.ExpertAverager(model, 1e-3) if moe else None
        if averager is not None:
            averager.attach(optimizer)
        size = timm.data.resolve_model_data_config(model)['input_size']
        images = torch.randn(args.batch_size, *size, device=device)
        target = torch.randint(0, 1000, (args.batch_size,), device=device)
        forward = torch.compile(model) if args.compile else model
        parameters[name] = sum(p.numel() for p in model.parameters()) / 1e6

        def step(forward=forward, optimizer=optimizer, images=images, target=target):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp):
                loss = torch.nn.functional.cross_entropy(forward(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def pull(averager=averager):
            if averager is not None:
                averager.step()

        steps[name], pulls[name] = step, pull

    def timed(function) -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for name, step in steps.items():
        step(), step()
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            step()
            peak[name] = (torch.cuda.max_memory_allocated() - base) / 2 ** 20
    times: Dict[str, List[float]] = {name: [] for name in steps}
    pull_times: Dict[str, List[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
            pull_times[name].append(timed(pulls[name]))

    name = torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or platform.machine()
    print(f'{args.model}, batch {args.batch_size}, {"bfloat16 autocast" if args.amp else "float32"}'
          f'{", compiled" * args.compile}; '
          f'{name}, {args.threads} CPU thread(s), torch {torch.__version__}; median of {args.rounds} rounds\n')
    print('| variant | parameters (M) | step | of it the pull |' + (' activations (MiB) |' if peak else ''))
    print('|---|---|---|---|' + '---|' * bool(peak))
    for name in steps:
        ratio = statistics.median(t / d for t, d in zip(times[name], times['dense']))
        of_pull = statistics.median(p / d for p, d in zip(pull_times[name], times['dense']))
        print(f'| {name} | {parameters[name]:.1f} | {ratio:.2f} | {of_pull if VARIANTS[name] else 0:.3f} |'
              + (f' {peak[name]:.0f} |' if peak else ''))
    print(f'\n(dense: {1000 * statistics.median(times["dense"]):.0f} ms a step)')


if __name__ == '__main__':
    main()
