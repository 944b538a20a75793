"""Slow, obvious versions of the fast paths: plain loops over experts and tokens.

Axis legend: `T` tokens, `D` width, `E` experts, `k` experts a token is sent to.
"""
import copy
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


def mean_form_experts(layer):
    """W_i = M + s (D_i - mean_j D_j) in float64, parameter by parameter, as new FFNs."""
    experts = []
    for i in range(len(layer.deviations)):
        expert = copy.deepcopy(layer.mean)
        for name, m in layer.mean.named_parameters():
            deviations = [d.get_parameter(name).detach() for d in layer.deviations]
            centred = deviations[i].double() - mean(deviations)
            expert.get_parameter(name).data = (m.detach().double() + layer.spread * centred).to(m.dtype)
        experts.append(expert)
    return experts


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


@torch.no_grad()
def inputs_of(model, layer, batches):
    """The tokens (T, D) that reach a layer of a model in `eval()`, one after the other."""
    seen, handle = [], layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    training = model.training
    model.eval()
    for images in batches:
        model(images)
    model.train(training)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


@torch.no_grad()
def usage(tokens, experts, logits, top_k, renormalise=True):
    """The statistics of `ExpertStatistics` as a dict of lists and numbers, token by token."""
    count, num_experts = len(tokens), len(experts)
    counts, probability, contribution = ([0.] * num_experts for _ in range(3))
    moment = [[0.] * num_experts for _ in range(num_experts)]
    mass = change = norm = 0.
    probabilities = gates(logits, num_experts)
    for token, gate, p in zip(tokens, gates(logits, top_k, renormalise), probabilities):
        outputs = [expert(token[None])[0].double() for expert in experts]
        for e, g in gate.items():
            counts[e] += 1
            probability[e] += p[e]
            contribution[e] += g * outputs[e].norm().item()
            mass += g / count
        for i in range(num_experts):
            for j in range(num_experts):
                moment[i][j] += (outputs[i] @ outputs[j]).item() / count
        y = sum(g * outputs[e] for e, g in gate.items())
        change += (fused(experts)(token[None])[0].double() - y).square().sum().item()
        norm += y.square().sum().item()
    return dict(
        tokens=count, counts=counts, probability=[p / max(n, 1) for p, n in zip(probability, counts)],
        contribution=[c / max(n, 1) for c, n in zip(contribution, counts)], second_moment=moment, mass=mass,
        change=(change / norm) ** .5)


def fused(experts):
    """The FFN with the mean weights, in `eval()`."""
    ffn = copy.deepcopy(experts[0]).eval()
    ffn.load_state_dict({
        key: mean([expert.state_dict()[key] for expert in experts]).to(value.dtype)
        for key, value in ffn.state_dict().items()})
    return ffn


def ffn_weights(ffn):
    """An FFN of timm as a dict of tensors, as in gathering_reference.py."""
    def split(name):
        if hasattr(ffn, 'fc1_g'):
            return torch.stack([getattr(ffn.fc1_g, name), getattr(ffn.fc1_x, name)])
        tensor = getattr(ffn.fc1, name)
        return torch.stack(tensor.chunk(tensor.shape[0] // ffn.fc2.in_features))

    result = dict(up=split('weight'), up_bias=split('bias'), down=ffn.fc2.weight, down_bias=ffn.fc2.bias)
    if list(ffn.norm.parameters()):
        result['norm'] = torch.stack([ffn.norm.weight, ffn.norm.bias])
    return {name: tensor.detach() for name, tensor in result.items()}


def group_similar(vectors, k):
    """Merge the two groups of the smallest mean distance between normalised members until k are left."""
    vectors = [vector / vector.norm() for vector in vectors]
    groups = [[i] for i in range(len(vectors))]
    while len(groups) > k:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
        a, b = min(pairs, key=lambda pair: sum(
            (vectors[i] - vectors[j]).norm().item() for i in groups[pair[0]] for j in groups[pair[1]]
        ) / len(groups[pair[0]]) / len(groups[pair[1]]))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()
