"""Gated models for tests: experts that differ, a MoE layer that is not ours, weights that are no parameters."""
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import ewa

GLU = 'eva02_tiny_patch14_224'


def scatter(module, std=.1, seed=3):
    """Move every parameter away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return module


def gated(host, **kwargs):
    """A host with gated MoE layers, all of their parameters random."""
    return scatter(ewa.to_moe(host, **{**dict(router='topk', num_experts=4, init='independent'), **kwargs})).eval()


def make_equal(layer, change=lambda expert: expert):
    """Give every expert of a layer the weights of the first, each changed in its own way."""
    first = {key: value.clone() for key, value in layer.experts[0].state_dict().items()}
    for expert in layer.experts[1:]:
        expert.load_state_dict(first)
        change(expert)


def permute(expert):
    """Shuffle the hidden units of an `Mlp` or `GluMlp`; it computes what it did."""
    hidden = expert.fc2.in_features
    order = torch.randperm(hidden)
    rows = torch.cat([order + start for start in range(0, expert.fc1.out_features, hidden)])
    with torch.no_grad():
        expert.fc1.weight.copy_(expert.fc1.weight[rows])
        expert.fc1.bias.copy_(expert.fc1.bias[rows])
        expert.fc2.weight.copy_(expert.fc2.weight[:, order])


def hide(layer, index):
    """Make an expert's logit the mean of two others, which is never the largest."""
    with torch.no_grad():
        others = [e for e in range(len(layer.experts)) if e != index][:2]
        layer.router.weight[index] = layer.router.weight[others].mean(0)


class HandMadeMoE(nn.Module):
    """Somebody else's MoE layer: a loop over experts and masks."""

    def __init__(self, hidden=(12,) * 4, shared=0, top_k=2, renormalise=True):
        super().__init__()
        self.experts = nn.ModuleList(Mlp(8, h) for h in hidden)
        self.router = nn.Linear(8, len(hidden))
        if shared:
            self.shared = nn.ModuleList(Mlp(8, 12) for _ in range(shared))
        self.top_k = top_k
        self.renormalise = renormalise

    def forward(self, x):
        p = self.router(x).softmax(-1)
        threshold = p.sort(dim=-1, descending=True).values[..., self.top_k - 1, None]
        p = p * (p >= threshold)
        p = p / p.sum(-1, keepdim=True) if self.renormalise else p
        y = sum(p[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        return y + sum(expert(x) for expert in getattr(self, 'shared', ()))


class Foreign(nn.Module):
    """A small model that timm knows nothing of: (B, N, 5) to (B, 3)."""

    def __init__(self, layer):
        super().__init__()
        self.stem, self.moe, self.head = nn.Linear(5, 8), layer, nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.moe(x)).mean(1))


def foreign(**kwargs):
    torch.manual_seed(0)
    return scatter(Foreign(HandMadeMoE(**kwargs)), std=.3).eval()


def sequences():
    """Two batches for `foreign`, of 4 and 3 sequences of 6 tokens."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 6, 5, generator=generator) for n in (4, 3)]


class LoRA(nn.Module):
    """An adapter as PEFT's."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def merge(self):
        self.base_layer.weight.data += self.lora_B.weight @ self.lora_A.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def _adapt(ffn):
    ffn.fc1 = LoRA(ffn.fc1)


# what makes the mean of an FFN's parameters another thing than the mean of its weights, and how it is called
REWEIGHTED = [
    (lambda ffn: parametrizations.weight_norm(ffn.fc2), r'fc2 \(ParametrizedLinear\).*remove_parametrizations'),
    (lambda ffn: prune.l1_unstructured(ffn.fc1, 'weight', .5), r'masked or normalised weights in fc1 .*prune.remove'),
    (lambda ffn: weight_norm(ffn.fc1), r'masked or normalised weights in fc1 \(Linear\)'),
    (_adapt, r'an adapter in fc1 \(LoRA\): merge it first'),
]
