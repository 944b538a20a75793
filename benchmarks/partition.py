"""The fresh random partition against cheaper draws, alone and in an FFN's forward and backward pass.

    python -m benchmarks.partition
    python -m benchmarks.partition --width 64 --images 100 --tokens 17            # the model of the studies
    python -m benchmarks.partition --images 256 --compile                         # a GPU

None of the cheaper draws is an option of the package: what they do to accuracy is not known.
"""
from typing import Any, Callable, Dict, List, Tuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ewa.moe import RandomPartitionMoE
from ewa.partition import part_sizes, random_partition

from .common import DEVICE, arguments, interleave, milliseconds, ratio, table

Draw = Callable[[int, int, int], Tuple[Tensor, Tensor, List[int]]]  # images, tokens an image, experts


def invert(index: Tensor) -> Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))


def fresh(images: int, tokens: int, experts: int) -> Tuple[Tensor, Tensor, List[int]]:
    """Ours: a permutation of all tokens."""
    return random_partition(images * tokens, experts, DEVICE)


def hashed(images: int, tokens: int, experts: int) -> Tuple[Tensor, Tensor, List[int]]:
    """An affine bijection of token numbers, `a i + b mod T` with `a` prime and larger than any batch."""
    count = images * tokens
    a = (2_147_483_647, 1_000_000_007, 998_244_353, 1_000_000_009)[int(torch.randint(4, ()))] % count
    index = (torch.arange(count, device=DEVICE) * a + int(torch.randint(count, ()))) % count
    return index, invert(index), part_sizes(count, experts)


def positions(images: int, tokens: int, experts: int) -> Tuple[Tensor, Tensor, List[int]]:
    """One permutation of the positions, the same in all images."""
    order = torch.randperm(tokens, device=DEVICE)
    index = (order[:, None] + tokens * torch.arange(images, device=DEVICE)).flatten()
    return index, invert(index), part_sizes(len(index), experts)


def whole_images(images: int, tokens: int, experts: int) -> Tuple[Tensor, Tensor, List[int]]:
    """A permutation of the images: all tokens of one meet the same expert."""
    order = torch.randperm(images, device=DEVICE)
    index = (tokens * order[:, None] + torch.arange(tokens, device=DEVICE)).flatten()
    return index, invert(index), [tokens * size for size in part_sizes(images, experts)]


DRAWS: Dict[str, Draw] = {
    'fresh permutation (ours)': fresh, 'affine hash': hashed, 'positions': positions, 'whole images': whole_images}


class Drawn(RandomPartitionMoE):
    """A layer with another draw; `draw=None`: token i to expert i mod E, by strided views without a gather."""

    def __init__(self, experts: List[nn.Module], draw: Any) -> None:
        super().__init__(experts)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D) -> (B, N, D)`."""
        tokens = x.flatten(0, 1)
        if self.draw is None:
            out = torch.empty_like(tokens)
            for i, expert in enumerate(self.experts):
                out[i::len(self.experts)] = expert(tokens[i::len(self.experts)])
            return out.view_as(x)
        index, inverse, sizes = self.draw(x.shape[0], x.shape[1], len(self.experts))
        parts = tokens.index_select(0, index).split(sizes)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        return out.index_select(0, inverse).view_as(x)


def main() -> None:
    """Parse, time draws and layers in turn, print the table."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument('--width', type=int, default=384)
    parser.add_argument('--images', type=int, default=16)
    parser.add_argument('--tokens', type=int, default=197, help='of an image')
    parser.add_argument('--experts', type=int, default=4)
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()

    def ffn() -> nn.Module:
        return Mlp(args.width, 4 * args.width).to(DEVICE)

    def experts() -> List[nn.Module]:
        return [ffn() for _ in range(args.experts)]

    layers: Dict[str, nn.Module] = {'dense FFN': ffn(), 'layer of the package': RandomPartitionMoE(experts())}
    layers.update({name: Drawn(experts(), draw) for name, draw in DRAWS.items()})
    layers['strided views'] = Drawn(experts(), None)
    x = torch.randn(args.images, args.tokens, args.width, device=DEVICE, requires_grad=True)
    passes: Dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        called = torch.compile(layer) if args.compile and not isinstance(layer, Drawn) else layer
        passes[name] = lambda called=called: called(x).sum().backward()  # type: ignore[misc]
    times = interleave(passes, args.rounds)
    draws: Dict[str, Callable[[], Any]] = {
        name: lambda draw=draw: draw(args.images, args.tokens, args.experts)  # type: ignore[misc]
        for name, draw in DRAWS.items()}
    drawn = interleave(draws, args.rounds)
    table(f'Partition of {args.images} x {args.tokens} tokens of width {args.width} among {args.experts} experts',
          f'Forward and backward of one FFN{", compiled where it is dense or of the package" * args.compile}; medians '
          f'of {args.rounds} rounds; dense: {milliseconds(times["dense FFN"]):.2f} ms.',
          ('layer', 'time / dense FFN', 'of it the draw'),
          [(name, ratio(times, name, 'dense FFN'),
            milliseconds(drawn[name]) / milliseconds(times['dense FFN']) if name in drawn else None)
           for name in layers])


if __name__ == '__main__':
    main()
