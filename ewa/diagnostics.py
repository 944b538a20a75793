"""What the experts of a model are doing.

Axis legend: `E` experts.
"""
from typing import Dict

import torch
from torch import nn

from .moe import mean_state, moe_layers


@torch.no_grad()
def distances_to_mean(model: nn.Module) -> Dict[str, float]:
    """How far the experts of each MoE layer are from their mean.

    Returns:
        Layer name to `sqrt(mean_e |W_e - W_mean|^2) / |W_mean|` over all parameters of an expert: 0 for equal experts,
        about `sqrt(E-1)` for independent ones.
    """
    result = {}
    for name, layer in moe_layers(model):
        mean = mean_state(layer.experts)
        squares = [
            sum((p.float() - mean[key].float()).square().sum() for key, p in expert.named_parameters())
            for expert in layer.experts
        ]
        norm = sum(mean[key].float().square().sum() for key, _ in layer.experts[0].named_parameters())
        result[name] = float((torch.stack(squares).mean() / norm.clamp(min=1e-30)).sqrt())
    return result
