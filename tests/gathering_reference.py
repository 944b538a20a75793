"""Slow, obvious versions of ewa/gathering.py: plain loops over experts and hidden units.

An FFN is a dict of tensors named as the fields of `FFNWeights`; absent fields are missing.

Axis legend: `E` experts, `H` hidden units, `D` width, `G` up matrices.
"""
import itertools

import torch


def average(experts, weights=None):
    weights = [1.] * len(experts) if weights is None else [float(w) for w in weights]
    result = {}
    for name in experts[0]:
        result[name] = torch.zeros_like(experts[0][name])
        for expert, weight in zip(experts, weights):
            result[name] += weight / sum(weights) * expert[name]
    return result


def total(experts, rescale=False):
    result = average(experts)
    for name in result:
        if name != 'norm':
            result[name] = result[name] * len(experts)
    if rescale:
        rescale_(result, experts, ('up', 'up_bias', 'down', 'down_bias'))
    return result


def parts(count, num_experts):
    """Deal `count` out one by one, always beginning with the first expert."""
    sizes = [0] * num_experts
    for i in range(count):
        sizes[i % num_experts] += 1
    return sizes


def unit(expert, h):
    """Joint vector of hidden unit h as a list of numbers."""
    values = []
    for g in range(expert['up'].shape[0]):
        values += expert['up'][g, h].tolist()
        if 'up_bias' in expert:
            values.append(expert['up_bias'][g, h].item())
    return values + expert['down'][:, h].tolist()


def pick(expert, units):
    result = dict(expert)
    result['up'] = torch.stack([expert['up'][:, h] for h in units], dim=1)
    for name in ('up_bias', 'down', 'norm'):
        if name in expert:
            result[name] = torch.stack([expert[name][:, h] for h in units], dim=1)
    return result


def score(expert, h):
    """Norm of the rows of hidden unit h plus norm of its column."""
    rows = [value for matrix in expert['up'] for value in matrix[h].tolist()]
    return sum(v * v for v in rows) ** .5 + sum(v * v for v in expert['down'][:, h].tolist()) ** .5


def top_kg(experts, rescale=False):
    hidden = experts[0]['up'].shape[1]
    kept = []
    for expert, n in zip(experts, parts(hidden, len(experts))):
        ranked = sorted(range(hidden), key=lambda h: -score(expert, h))
        if n:
            kept.append(pick(expert, sorted(ranked[:n])))
    result = {name: torch.cat([k[name] for k in kept], dim=1) for name in kept[0] if name != 'down_bias'}
    if 'down_bias' in experts[0]:
        result['down_bias'] = average(experts)['down_bias']
    if rescale:
        rescale_(result, experts, ('up', 'up_bias', 'down'))
    return result


def svd_kg(experts, rescale=False, share=.5):
    def gather(matrices):
        result = torch.zeros_like(matrices[0])
        for matrix in matrices:
            u, s, vh = torch.linalg.svd(matrix)
            held = 0.
            for i in range(len(s)):
                if held >= share * s.sum():
                    break
                result += s[i] * torch.outer(u[:, i], vh[i])
                held += s[i]
        return result

    result = average(experts)
    result['up'] = torch.stack([gather([e['up'][g] for e in experts]) for g in range(len(result['up']))])
    result['down'] = gather([e['down'] for e in experts])
    if rescale:
        rescale_(result, experts, ('up', 'down'))
    return result


def rescale_(result, experts, names):
    def rescaled(tensor, originals):
        norm = tensor.square().sum().sqrt()
        mean = sum(original.square().sum().sqrt() for original in originals) / len(originals)
        return tensor if norm == 0 else tensor * (mean / norm)

    for name in names:
        if name not in result:
            continue
        if name in ('up', 'up_bias'):
            result[name] = torch.stack([
                rescaled(tensor, [e[name][g] for e in experts]) for g, tensor in enumerate(result[name])])
        else:
            result[name] = rescaled(result[name], [e[name] for e in experts])


def align(expert, reference):
    """Try every permutation of the hidden units."""
    hidden = reference['up'].shape[1]
    similarity = [
        [sum(a * b for a, b in zip(unit(reference, i), unit(expert, j))) for j in range(hidden)] for i in range(hidden)]
    best = max(
        itertools.permutations(range(hidden)),
        key=lambda order: sum(similarity[i][j] for i, j in enumerate(order)))
    return pick(expert, best)


def aligned(experts, reference=0):
    return average([align(expert, experts[reference]) for expert in experts])


def do_acp_select(acp, second_moment, k, lam=None):
    """Compute the log determinant of every candidate set anew."""
    num_experts = len(acp)
    kernel = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for i in range(num_experts):
        for j in range(num_experts):
            kernel[i, j] = (acp[i] * acp[j]) ** .5 * second_moment[i, j]
    if lam is None:
        lam = sum(kernel[i, i].item() for i in range(num_experts)) / num_experts / k
    chosen = []
    while len(chosen) < k:
        gains = {}
        for j in range(num_experts):
            if j not in chosen:
                subset = [*chosen, j]
                regularised = kernel[subset][:, subset] + lam * torch.eye(len(subset), dtype=torch.float64)
                gains[j] = torch.linalg.slogdet(regularised).logabsdet.item()
        chosen.append(max(gains, key=gains.get))
    return sorted(chosen)


def forward(ffn, x):
    """Output of one FFN, GELU for G = 1, SwiGLU (first matrix is the gate) for G = 2; x (T, D) -> (T, D)."""
    hidden = [x @ matrix.T for matrix in ffn['up']]
    if 'up_bias' in ffn:
        hidden = [h + bias for h, bias in zip(hidden, ffn['up_bias'])]
    if len(hidden) == 1:
        active = torch.nn.functional.gelu(hidden[0])
    else:
        active = torch.nn.functional.silu(hidden[0]) * hidden[1]
    if 'norm' in ffn:
        active = torch.nn.functional.layer_norm(active, active.shape[-1:], *ffn['norm'])
    out = active @ ffn['down'].T
    return out + ffn['down_bias'] if 'down_bias' in ffn else out
