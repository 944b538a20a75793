"""Slow, obvious versions of the fast paths: plain loops over experts and tokens.

Axis legend: `T` tokens, `D` width, `E` experts, `k` experts a token is sent to.
"""
import math

import torch


def pull(experts, share_rate):
    """W_i <- (1 - b) W_i + b/(E-1) sum_{j != i} W_j in float64; `experts[i]` is the list of tensors of expert i."""
    num_experts = len(experts)
    old = [[w.detach().double() for w in expert] for expert in experts]
    new = []
    for i in range(num_experts):
        new.append([])
        for w in range(len(old[i])):
            others = torch.zeros_like(old[i][w])
            for j in range(num_experts):
                if j != i:
                    others += old[j][w]
            new[i].append((1 - share_rate) * old[i][w] + share_rate / (num_experts - 1) * others)
    return new


@torch.no_grad()
def pull_layers(layers, share_rate):
    for layer in layers:
        experts = [list(expert.parameters()) for expert in layer.experts]
        for parameters, values in zip(experts, pull(experts, share_rate)):
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)


def owners(index, inverse, sizes):
    """The expert of each token, from a partition as `random_partition` returns it."""
    part_of_row = [part for part, size in enumerate(sizes) for _ in range(size)]
    assert len(index) == len(part_of_row)
    result = []
    for token, row in enumerate(inverse.tolist()):
        assert index[row] == token
        result.append(part_of_row[row])
    return result


def partition_forward(tokens, experts, owner):
    """Each token (D,) of `tokens` (T, D) through its own expert."""
    return torch.stack([experts[owner[t]](tokens[t:t + 1])[0] for t in range(len(tokens))])


def gates(logits, top_k, renormalise=True):
    """For each token a dict from chosen expert to its gate; logits (T, E)."""
    result = []
    for row in logits.tolist():
        total = sum(math.exp(v) for v in row)
        chosen = sorted(range(len(row)), key=lambda e: -row[e])[:top_k]
        mass = sum(math.exp(row[e]) / total for e in chosen) if renormalise else 1
        result.append({e: math.exp(row[e]) / total / mass for e in chosen})
    return result


def top_k_forward(tokens, experts, logits, top_k, renormalise=True, shared=()):
    """y = sum_shared s(x) + sum_{e in top-k(x)} g_e(x) f_e(x), token by token."""
    outputs = []
    for token, gate in zip(tokens, gates(logits, top_k, renormalise)):
        y = sum(g * experts[e](token[None])[0] for e, g in gate.items())
        for s in shared:
            y = y + s(token[None])[0]
        outputs.append(y)
    return torch.stack(outputs)


def load_balancing_loss(logits, top_k):
    """E * sum_e f_e P_e."""
    num_tokens, num_experts = logits.shape
    chosen = gates(logits, top_k)
    probabilities = gates(logits, num_experts)
    loss = 0.
    for e in range(num_experts):
        share = sum(e in c for c in chosen) / (num_tokens * top_k)
        mean = sum(p[e] for p in probabilities) / num_tokens
        loss += num_experts * share * mean
    return loss


def mean(tensors):
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor.double()
    return total / len(tensors)
