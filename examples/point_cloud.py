"""EWA beyond images: a small point-cloud transformer tells shapes apart, as a dense model and with experts.

    python examples/point_cloud.py                      # a minute on a CPU

The shapes are sampled here: points on a sphere, cube, cylinder, cone or torus, stretched, turned at random and moved by
noise. Both models start from the same weights, see the same batches, and are as large and as fast when they are used.

Axis legend: `B` clouds, `P` points of a cloud, `G` groups of neighbouring points, a token each, `D` width.
"""
import argparse
from copy import deepcopy

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import ewa

SHAPES = ('sphere', 'cube', 'cylinder', 'cone', 'torus')

parser = argparse.ArgumentParser()
parser.add_argument('--steps', type=int, default=300)
parser.add_argument('--train', type=int, default=400, help='clouds to train on')
parser.add_argument('--test', type=int, default=1000, help='clouds to test on')
parser.add_argument('--share-rate', type=float, default=1e-3)
parser.add_argument('--output', help='file for the state dict of the converted model')
args = parser.parse_args()


def sample(count: int, generator: torch.Generator, points: int = 128) -> 'tuple[Tensor, Tensor]':
    """Clouds `(B, P, 3)` and which shape each is `(B,)`."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    label = torch.randint(len(SHAPES), (count,), generator=generator)
    angle, u, v = 2 * torch.pi * uniform(count, points), uniform(count, points), 2 * uniform(count, points) - 1
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    ball = torch.randn(count, points, 3, generator=generator)
    box = 2 * uniform(count, points, 3) - 1
    ring = 2 * torch.pi * u[..., None]
    forms = torch.stack([
        nn.functional.normalize(ball, dim=-1),
        box / box.abs().amax(-1, keepdim=True),
        torch.cat([circle, v[..., None]], -1),
        torch.cat([circle * u.sqrt()[..., None], 2 * u.sqrt()[..., None] - 1], -1),
        torch.cat([circle * (1 + .4 * ring.cos()), .4 * ring.sin()], -1),
    ])
    cloud = forms[label, torch.arange(count)]
    cloud = cloud * (.6 + .8 * uniform(count, 1, 3)) + .1 * torch.randn(cloud.shape, generator=generator)
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]
    return cloud @ turn, label


class PointTransformer(nn.Module):
    """Groups of neighbouring points are tokens of a plain transformer.

    Args:
        width: `D`.
        groups: `G`.
        neighbours: Points of a group.
    """

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, groups: int = 32, neighbours: int = 12) -> None:
        super().__init__()
        self.groups, self.neighbours = groups, neighbours
        self.embed = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.position = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(SHAPES))

    def forward(self, cloud: Tensor) -> Tensor:
        """`(B, P, 3)` -> `(B, classes)`."""
        centres = cloud[:, :self.groups]  # points come in no order
        near = torch.cdist(centres, cloud).topk(self.neighbours, largest=False).indices
        group = cloud[torch.arange(len(cloud))[:, None, None], near] - centres[:, :, None]
        tokens = self.embed(group).amax(2) + self.position(centres)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def train(model: nn.Module, averaged: bool) -> None:
    """AdamW on the same batches whatever the model; the line with `ewa` is all that is added."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    if averaged:
        ewa.ExpertAverager(model, args.share_rate).attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(args.steps):
        batch = torch.randint(len(clouds), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model.train()(clouds[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Top-1 on the test clouds, in percent."""
    return 100 * (model.eval()(test_clouds).argmax(1) == test_labels).float().mean().item()


generator = torch.Generator().manual_seed(0)
clouds, labels = sample(args.train, generator)
test_clouds, test_labels = sample(args.test, generator)
torch.manual_seed(0)
dense = PointTransformer()
moe = ewa.to_moe(deepcopy(dense), num_experts=4, layers='all')

train(dense, averaged=False)
print(f'dense  {accuracy(dense):.1f} % of {args.test} clouds')
train(moe, averaged=True)
converted = ewa.to_dense(moe)
assert list(converted.state_dict()) == list(dense.state_dict())
print(f'EWA    {accuracy(moe):.1f} % with experts, {accuracy(converted):.1f} % as a plain model '
      f'(one run: differences of some percent are chance)')
if args.output:
    torch.save(converted.state_dict(), args.output)
