"""Peak memory of each of two processes, replicated (DDP) and sharded (FSDP2), against the formulas of docs/scaling.md.

    python -m benchmarks.processes

With `P` bytes of parameters (those of all experts included), `B` of the largest block and `A` of activations: one
process takes `A + 4P` (parameter, gradient, two moments of AdamW), DDP `A + 5P` (a copy of the gradients is what is
sent), FSDP2 on `n` processes `A + 4P/n + 4B` (parameters and gradients of a block, and of the one that is fetched
ahead). `A` is what the dense model takes in one process beyond `4P`; in mean form the weights of the experts, which
are computed in the forward pass, come to it. All processes are on this machine (gloo); each has one CPU thread.
"""
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ewa

from .common import DEVICE, arguments, build, images_for, in_process, peak, table

WAYS = {'one process': 1, 'DDP': 2, 'FSDP2': 2}


def size(module: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def run(rank: int, folder: str, way: str, model: str, batch: int, experts: int, form: str) -> None:
    """Three steps on one of the processes; the first writes its peak, and the sizes of the model and of a block."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=WAYS[way])
    warm = build('small')
    warm(images_for(warm, 4)).sum().backward()  # what libraries take on their first use
    sizes = []

    def train() -> None:
        vit = build(model)
        if experts > 1:
            ewa.to_moe(vit, num_experts=experts, form=form)
        sizes.extend([size(vit), max(map(size, vit.blocks))])
        images = images_for(vit, batch)
        called = vit
        if way == 'DDP':
            called = nn.parallel.DistributedDataParallel(vit)
        if way == 'FSDP2':
            mesh = init_device_mesh(DEVICE.type, (WAYS[way],))
            for module in (*vit.blocks, vit):
                fully_shard(module, mesh=mesh)
        optimizer = torch.optim.AdamW(vit.parameters())
        if experts > 1:
            ewa.ExpertAverager(vit, 1e-3).attach(optimizer)
        for _ in range(3):
            called(images).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    most = peak(train)
    if rank == 0:
        with open(f'{folder}/result', 'w', encoding='utf-8') as f:
            f.write(' '.join(map(str, [most, *sizes])))
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Parse, measure each variant in processes of its own, print the table."""
    parser = arguments(__doc__)
    parser.add_argument('--model', default='vit_small_patch16_224')
    parser.add_argument('--batch-size', type=int, default=8, help='of each process')
    parser.add_argument('--forms', nargs='*', default=['experts', 'mean'], choices=('experts', 'mean'))
    parser.add_argument('--one', nargs=3, metavar=('WAY', 'E', 'FORM'), help='measure this variant')
    args = parser.parse_args()
    if args.one:
        way, experts, form = args.one
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                run, (folder, way, args.model, args.batch_size, int(experts), form), nprocs=WAYS[way])
            with open(f'{folder}/result', encoding='utf-8') as f:
                print(f.read())
        return

    rows = []
    activations = dense = 0
    for experts, form in ((1, 'experts'), *((4, form) for form in args.forms)):
        for way, count in WAYS.items():
            line = in_process(
                'processes', '--model', args.model, '--batch-size', args.batch_size, '--one', way, experts, form,
                trim=True)
            found, whole, block = map(int, line.split())
            activations, dense = activations or found - 4 * whole, dense or whole
            computed = whole - dense if form == 'mean' else 0  # weights of experts, forward to backward
            states = dict(zip(WAYS, (4 * whole, 5 * whole, 4 * whole // count + 4 * block)))
            expected = activations + computed + states[way]
            name = 'dense' if experts == 1 else f'EWA, {experts} experts, every:2{", mean form" * (form == "mean")}'
            rows.append((name, way, found / 2 ** 20, expected / 2 ** 20, f'{found / expected:.3f}'))
    table(f'Peak memory of each process, training {args.model}, batch {args.batch_size}, float32, AdamW', '',
          ('variant', 'processes', 'peak (MiB)', 'expected (MiB)', 'peak / expected'), rows)


if __name__ == '__main__':
    main()
