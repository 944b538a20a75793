"""Time of a training step relative to the dense model: forward, backward, AdamW and pull.

    python -m benchmarks.step                                                       # ViT-S/16 at 224, batch 16
    python -m benchmarks.step --model small --batch-size 100 --rounds 30            # the model of the studies
    python -m benchmarks.step --batch-size 256 --dtype bfloat16 --compile           # a GPU
    python -m benchmarks.step --experts 2 4 8 16 --batch-size 8 16 32

In the same run: the dense model once more (the noise), a gated layer with one expert a token, the same as people write
it by hand (a loop over experts with boolean masks), and weight fusion (all tokens through the mean of the experts).
"""
from typing import Any, Callable, Dict, Iterable, List

import torch
import torch._dynamo.config as dynamo
from torch import Tensor, nn

import ewa
from ewa.moe import RandomPartitionMoE

from .common import DEVICE, arguments, build, images_for, interleave, milliseconds, ratio, table


class ByHand(nn.Module):
    """A gated layer with one expert a token, as a loop over experts with boolean masks."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(next(self.experts[0].parameters()).shape[1], len(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        tokens = x.reshape(-1, x.shape[-1])
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if mask.any():
                y = expert(tokens[mask])
                out = out.to(y.dtype)
                out[mask] = gate[mask, None].to(y.dtype) * y
        return out.reshape(x.shape)


class Fusion(RandomPartitionMoE):
    """All tokens through the mean of the experts, in training too."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        return self.mean_function(x)


def variants(experts: List[int], layers: List[str], rivals: bool) -> Dict[str, Dict[str, Any]]:
    """Name to arguments of `to_moe`, none for the dense model."""
    found: Dict[str, Dict[str, Any]] = {'dense': {}, 'dense, again': {}}
    for where in layers:
        for count in experts:
            found[f'EWA, {count} experts, {where}'] = dict(num_experts=count, layers=where)
            found[f'EWA in mean form, {count} experts, {where}'] = dict(num_experts=count, layers=where, form='mean')
    if rivals:
        first: Dict[str, Any] = dict(num_experts=4 if 4 in experts else experts[0], layers=layers[0])
        label = f'{first["num_experts"]} experts, {layers[0]}'
        found[f'gated, top 1, {label}'] = dict(first, router='topk', top_k=1, renormalise=False)
        found[f'gated, by hand, {label}'] = dict(first, router=ByHand)
        found[f'weight fusion, {label}'] = dict(first, router=Fusion)
    return found


def training_step(model: nn.Module, batch: int, dtype: torch.dtype = torch.float32, compiled: bool = False,
                  pull: bool = True) -> Callable[[], None]:
    """One step of a model on a batch of random images, which stays the same."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if any(ewa.moe.moe_layers(model)) and pull:
        ewa.ExpertAverager(model, 1e-3).attach(optimizer)
    images = images_for(model, batch)
    target = torch.randint(0, model.num_classes, (batch,), device=DEVICE)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(images), target)
        loss = loss + sum(ewa.routing_losses(model).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Parse, time all variants in turn, print a table for each precision and batch size."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument('--model', default='vit_small_patch16_224', help='timm name, or small')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[16])
    parser.add_argument('--experts', type=int, nargs='+', default=[4])
    parser.add_argument('--layers', nargs='+', default=['every:2', 'all'])
    parser.add_argument('--dtype', nargs='+', default=['float32'], choices=('float32', 'bfloat16'),
                        help='bfloat16: autocast')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--no-rivals', action='store_true', help='without gated layers and weight fusion')
    args = parser.parse_args()
    dynamo.recompile_limit = 64  # of one function, which all models share
    for dtype in args.dtype:
        for batch in args.batch_size:
            steps, parameters = {}, {}
            for name, moe in variants(args.experts, args.layers, not args.no_rivals).items():
                model = build(args.model)
                if moe:
                    ewa.to_moe(model, **moe)
                parameters[name] = sum(p.numel() for p in model.parameters()) / 1e6
                steps[name] = training_step(model, batch, getattr(torch, dtype), args.compile)
            times = interleave(steps, args.rounds)
            precision = f'{"bfloat16 autocast" if dtype == "bfloat16" else dtype}{", compiled" * args.compile}'
            table(f'A training step of {args.model}, batch {batch}, {precision}',
                  f'Medians of {args.rounds} rounds; dense: {milliseconds(times["dense"]):.1f} ms.',
                  ('variant', 'parameters (M)', 'time / dense'),
                  [(name, parameters[name], f'{ratio(times, name, "dense"):.3f}') for name in steps])


if __name__ == '__main__':
    main()
