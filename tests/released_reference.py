"""Swin-MoE and V-MoE written slowly from their descriptions, and writers of their files.

Nothing here comes from the package. Images are `(B, C, height, width)`; one image, one window, one token at a time.
"""
import math
import struct

import numpy as np
import torch
from torch.nn.functional import conv2d, cosine_similarity, layer_norm
from torch.nn.functional import gelu as exact_gelu
from torch.nn.functional import linear as affine

SWIN = dict(img_size=32, patch=4, width=8, depths=(2, 2, 2), heads=(1, 2, 4), window=4, classes=5, experts=4,
            moe=((1, 1), (2, 1)))
VIT = dict(img_size=32, patch=8, width=16, depth=4, heads=2, hidden=32, classes=5, experts=4, moe=(1, 3))


def _random(shapes, seed, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * std for key, shape in shapes.items()}


# ---- Swin-MoE


def swin_moe_weights(seed=0, fc2_bias=False, cosine=False, **changes):
    """Names and shapes as in its repository, with the buffers that its state dicts hold; experts not yet on ranks."""
    s = {**SWIN, **changes}
    shapes = {
        'patch_embed.proj.weight': (s['width'], 3, s['patch'], s['patch']), 'patch_embed.proj.bias': (s['width'],)}
    norms = {'patch_embed.norm': s['width']}
    buffers = {}
    for stage, depth in enumerate(s['depths']):
        d, size = s['width'] << stage, s['img_size'] // s['patch'] >> stage
        w = min(size, s['window'])
        for block in range(depth):
            name = f'layers.{stage}.blocks.{block}'
            norms.update({f'{name}.norm1': d, f'{name}.norm2': d})
            shapes.update({
                f'{name}.attn.cpb_mlp.0.weight': (512, 2), f'{name}.attn.cpb_mlp.0.bias': (512,),
                f'{name}.attn.cpb_mlp.2.weight': (s['heads'][stage], 512),
                f'{name}.attn.qkv.weight': (3 * d, d), f'{name}.attn.qkv.bias': (3 * d,),
                f'{name}.attn.proj.weight': (d, d), f'{name}.attn.proj.bias': (d,)})
            axis = torch.arange(-(w - 1), w).float() * 8 / (w - 1)
            axis = axis.sign() * (axis.abs() + 1).log2() / 3
            coords = torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1)
            buffers[f'{name}.attn.relative_coords_table'] = coords[None]
            place = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing='ij')).flatten(1)
            away = place[:, :, None] - place[:, None] + w - 1
            buffers[f'{name}.attn.relative_position_index'] = away[0] * (2 * w - 1) + away[1]
            if block % 2 and size > w:
                buffers[f'{name}.attn_mask'] = torch.stack([
                    _mask(i, j, w, size) for i in range(0, size, w) for j in range(0, size, w)])
            if (stage, block) in s['moe']:
                e, moe = s['experts'], f'{name}.mlp._moe_layer'
                shapes.update({
                    f'{moe}.experts.batched_fc1_w': (e, 4 * d, d), f'{moe}.experts.batched_fc2_w': (e, 4 * d, d),
                    f'{moe}.experts.batched_fc1_bias': (e, 1, 4 * d), f'{moe}.experts.batched_fc2_bias': (e, 1, d)})
                shapes.update({
                    f'{moe}.gates.0.temperature': (1,), f'{moe}.gates.0.cosine_projector.weight': (256, d),
                    f'{moe}.gates.0.cosine_projector.bias': (256,), f'{moe}.gates.0.sim_matrix': (256, e),
                } if cosine else {f'{moe}.gates.0.wg.weight': (e, d)})
            else:
                shapes.update({f'{name}.mlp.fc1.weight': (4 * d, d), f'{name}.mlp.fc1.bias': (4 * d,),
                               f'{name}.mlp.fc2.weight': (d, 4 * d)})
                shapes.update({f'{name}.mlp.fc2.bias': (d,)} if fc2_bias else {})
        if stage < len(s['depths']) - 1:
            shapes[f'layers.{stage}.downsample.reduction.weight'] = (2 * d, 4 * d)
            norms[f'layers.{stage}.downsample.norm'] = 4 * d
    norms['norm'] = d
    shapes.update({'head.weight': (s['classes'], d), 'head.bias': (s['classes'],)})
    shapes.update({f'{name}.{part}': (n,) for name, n in norms.items() for part in ('weight', 'bias')})
    weights = _random(shapes, seed)
    for key in weights:
        if 'norm' in key and key.endswith('weight'):
            weights[key] += 1
        elif key.endswith('batched_fc2_bias') and not fc2_bias:
            weights[key].zero_()
        elif key.endswith(('wg.weight', 'sim_matrix')):
            weights[key] *= 3  # clear decisions
    return {**weights, **buffers}


def _mask(top, left, w, size):
    """-100 between tokens of a shifted window of which one came round the edge; (w * w, w * w)."""
    shift = w // 2
    side = torch.tensor([[(i + shift >= size) * 2 + (j + shift >= size) for j in range(left, left + w)]
                         for i in range(top, top + w)]).flatten()
    return torch.where(side[:, None] == side, 0., -100.)


@torch.no_grad()
def swin_moe(weights, images, top_k=1, normalise=False, **changes):
    """Logits of images in float64."""
    s = {**SWIN, **changes}
    p = {key: value.double() for key, value in weights.items()}

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], p[f'{name}.weight'], p[f'{name}.bias'], 1e-5)

    def linear(x, name):
        return affine(x, p[f'{name}.weight'], p.get(f'{name}.bias'))

    def bias_between(name, w, a, b):
        away = torch.tensor([a // w - b // w, a % w - b % w]).double() * 8 / (w - 1)
        away = away.sign() * (away.abs() + 1).log2() / math.log2(8)
        return p[f'{name}.cpb_mlp.2.weight'] @ linear(away, f'{name}.cpb_mlp.0').relu()

    def attention(x, name, heads, w, shift):
        size, d = x.shape[0], x.shape[-1]
        bias = torch.stack([torch.stack([bias_between(name, w, a, b) for b in range(w * w)]) for a in range(w * w)])
        out = torch.zeros_like(x)
        for top in range(0, size, w):
            for left in range(0, size, w):
                rows = [((top + i + shift) % size, (left + j + shift) % size) for i in range(w) for j in range(w)]
                tokens = torch.stack([x[row] for row in rows])
                q, k, v = linear(tokens, f'{name}.qkv').chunk(3, -1)
                mask = _mask(top, left, w, size).double() if shift else 0
                heads_out = []
                for h in range(heads):
                    part = slice(h * d // heads, (h + 1) * d // heads)
                    scores = q[:, part] @ k[:, part].T / math.sqrt(d // heads) + bias[..., h] + mask
                    heads_out.append(scores.softmax(-1) @ v[:, part])
                for row, value in zip(rows, linear(torch.cat(heads_out, -1), f'{name}.proj')):
                    out[row] = value
        return out

    def ffn(x, name):
        moe = f'{name}._moe_layer'
        if f'{moe}.experts.batched_fc1_w' not in p:
            return linear(exact_gelu(linear(x, f'{name}.fc1')), f'{name}.fc2')
        w1, w2, b1, b2 = (p[f'{moe}.experts.batched_{n}'] for n in ('fc1_w', 'fc2_w', 'fc1_bias', 'fc2_bias'))
        out = torch.zeros_like(x)
        for row in np.ndindex(x.shape[:-1]):
            token = x[row]
            if f'{moe}.gates.0.wg.weight' in p:
                logits = p[f'{moe}.gates.0.wg.weight'] @ token
            else:
                projected = linear(token, f'{moe}.gates.0.cosine_projector')
                logits = torch.stack([
                    cosine_similarity(projected, direction, 0) for direction in p[f'{moe}.gates.0.sim_matrix'].T])
                logits = logits * min(math.exp(p[f'{moe}.gates.0.temperature']), 100)
            gates = logits.softmax(0)
            chosen = gates.argsort(descending=True)[:top_k].tolist()
            total = sum(gates[e] for e in chosen) if normalise else 1
            for e in chosen:
                out[row] += gates[e] / total * (exact_gelu(w1[e] @ token + b1[e, 0]) @ w2[e] + b2[e, 0])
        return out

    logits = []
    for image in images.double():
        x = conv2d(image[None], p['patch_embed.proj.weight'], p['patch_embed.proj.bias'], s['patch'])[0]
        x = norm(x.permute(1, 2, 0), 'patch_embed.norm')
        for stage, depth in enumerate(s['depths']):
            w = min(len(x), s['window'])
            for block in range(depth):
                name = f'layers.{stage}.blocks.{block}'
                shift = w // 2 if block % 2 and len(x) > w else 0
                x = x + attention(norm(x, f'{name}.norm1'), f'{name}.attn', s['heads'][stage], w, shift)
                x = x + ffn(norm(x, f'{name}.norm2'), f'{name}.mlp')
            if stage < len(s['depths']) - 1:
                x = torch.cat([x[::2, ::2], x[1::2, ::2], x[::2, 1::2], x[1::2, 1::2]], -1)
                x = linear(norm(x, f'layers.{stage}.downsample.norm'), f'layers.{stage}.downsample.reduction')
        logits.append(linear(norm(x, 'norm').mean((0, 1)), 'head'))
    return torch.stack(logits)


def write_swin_moe(folder, weights, ranks, name='swin_moe.pth', fc2_bias=False, master=True):
    """`NAME.rank0`, ... with the experts of each rank, and `NAME.master`; fewer experts than ranks are cut along H.

    Output biases that are frozen, as in the released files, are no rank's: the master has those of rank 0.
    """
    folder.mkdir(exist_ok=True)
    states = [{} for _ in range(ranks)]
    rest = {key: value for key, value in weights.items() if '.experts.' not in key}
    for key, value in weights.items():
        if '.experts.' not in key:
            continue
        axis = 1 if key.endswith('_w') else 2
        cut = max(ranks // len(value), 1)
        pieces = [part for expert in value.split(max(len(value) // ranks, 1)) for part in expert.chunk(cut, axis)]
        assert len(pieces) == ranks
        if key.endswith('fc2_bias') and not fc2_bias:
            rest[key] = pieces[0]
        else:
            for state, piece in zip(states, pieces):
                state[key] = piece.clone()
    for rank, state in enumerate(states):
        torch.save({'model': state if master else {**rest, **state}}, folder / f'{name}.rank{rank}')
    if master:
        torch.save({'model': rest}, folder / f'{name}.master')
    return folder


# ---- V-MoE


def v_moe_weights(seed=0, tanh=False, **changes):
    """Names and shapes of its parameters, joined by `/`."""
    s = {**VIT, **changes}
    d, h, hidden, e = s['width'], s['heads'], s['hidden'], s['experts']
    shapes = {
        'embedding/kernel': (s['patch'], s['patch'], 3, d), 'embedding/bias': (d,), 'cls': (1, 1, d),
        'Encoder/posembed_input/pos_embedding': (1, 1 + (s['img_size'] // s['patch']) ** 2, d),
        'Encoder/encoder_norm/scale': (d,), 'Encoder/encoder_norm/bias': (d,),
        'head/kernel': (d, s['classes']), 'head/bias': (s['classes'],)}
    shapes.update({'pre_logits/kernel': (d, d), 'pre_logits/bias': (d,)} if tanh else {})
    for i in range(s['depth']):
        block = f'Encoder/encoderblock_{i}'
        shapes.update({f'{block}/LayerNorm_{n}/{part}': (d,) for n in (0, 1) for part in ('scale', 'bias')})
        for name in ('query', 'key', 'value'):
            shapes.update({f'{block}/SelfAttention/{name}/kernel': (d, h, d // h),
                           f'{block}/SelfAttention/{name}/bias': (h, d // h)})
        shapes.update({f'{block}/SelfAttention/out/kernel': (h, d // h, d), f'{block}/SelfAttention/out/bias': (d,)})
        ffn, stack = (f'{block}/Moe/Mlp', (e,)) if i in s['moe'] else (f'{block}/Mlp', ())
        shapes.update({f'{ffn}/Dense_0/kernel': (*stack, d, hidden), f'{ffn}/Dense_0/bias': (*stack, hidden),
                       f'{ffn}/Dense_1/kernel': (*stack, hidden, d), f'{ffn}/Dense_1/bias': (*stack, d)})
        if i in s['moe']:
            shapes[f'{block}/Moe/Router/dense/kernel'] = (d, e)
    weights = _random(shapes, seed)
    for key in weights:
        weights[key] += key.endswith('scale')
    return weights


@torch.no_grad()
def v_moe(weights, images, top_k=2, **changes):
    """Logits of images in float64."""
    s = {**VIT, **changes}
    p = {key: value.double() for key, value in weights.items()}

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], 1e-6)

    def gelu(x):
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    def ffn(token, block):
        if f'{block}/Moe/Router/dense/kernel' not in p:
            w1, w2, b1, b2 = (p[f'{block}/Mlp/Dense_{n}'] for n in ('0/kernel', '1/kernel', '0/bias', '1/bias'))
            return gelu(token @ w1 + b1) @ w2 + b2
        w1, w2, b1, b2 = (p[f'{block}/Moe/Mlp/Dense_{n}'] for n in ('0/kernel', '1/kernel', '0/bias', '1/bias'))
        gates = (token @ p[f'{block}/Moe/Router/dense/kernel']).softmax(0)
        return sum(gates[e] * (gelu(token @ w1[e] + b1[e]) @ w2[e] + b2[e])
                   for e in gates.argsort(descending=True)[:top_k].tolist())

    logits = []
    for image in images.double():
        patches = [image[:, i:i + s['patch'], j:j + s['patch']].permute(1, 2, 0)
                   for i in range(0, s['img_size'], s['patch']) for j in range(0, s['img_size'], s['patch'])]
        x = [torch.einsum('hwc,hwcd->d', patch, p['embedding/kernel']) + p['embedding/bias'] for patch in patches]
        x = torch.stack([p['cls'][0, 0], *x]) + p['Encoder/posembed_input/pos_embedding'][0]
        for i in range(s['depth']):
            block = f'Encoder/encoderblock_{i}'
            y = norm(x, f'{block}/LayerNorm_0')
            q, k, v = (torch.einsum('nd,dhk->hnk', y, p[f'{block}/SelfAttention/{name}/kernel'])
                       + p[f'{block}/SelfAttention/{name}/bias'][:, None] for name in ('query', 'key', 'value'))
            attended = (q @ k.transpose(1, 2) / math.sqrt(s['width'] // s['heads'])).softmax(-1) @ v
            x = x + torch.einsum('hnk,hkd->nd', attended, p[f'{block}/SelfAttention/out/kernel'])
            x = x + p[f'{block}/SelfAttention/out/bias']
            x = x + torch.stack([ffn(token, block) for token in norm(x, f'{block}/LayerNorm_1')])
        x = norm(x, 'Encoder/encoder_norm')[0]
        if 'pre_logits/kernel' in p:
            x = torch.tanh(x @ p['pre_logits/kernel'] + p['pre_logits/bias'])
        logits.append(x @ p['head/kernel'] + p['head/bias'])
    return torch.stack(logits)


class Ext:
    """A msgpack extension value."""

    def __init__(self, code, content):
        self.code, self.content = code, content


def _sized(count, forms):
    """The first of several forms, (largest count, code, struct format), that a count fits."""
    for largest, code, form in forms:
        if count <= largest:
            return bytes([code + count]) if not form else struct.pack(f'>B{form}', code, count)
    raise ValueError(count)


def pack(value):
    """msgpack of what flax writes."""
    if value is None or isinstance(value, bool):
        return {None: b'\xc0', False: b'\xc2', True: b'\xc3'}[value]
    if isinstance(value, int):
        if value < 0:
            return struct.pack('>bb' if value < -32 else '>b', *((-48, value) if value < -32 else (value,)))
        return _sized(value, [(127, 0, '')]) if value < 128 else struct.pack('>BI', 0xce, value)
    if isinstance(value, str):
        data = value.encode()
        return _sized(len(data), [(31, 0xa0, ''), (255, 0xd9, 'B'), (65535, 0xda, 'H')]) + data
    if isinstance(value, bytes):
        return _sized(len(value), [(255, 0xc4, 'B'), (65535, 0xc5, 'H'), (2 ** 32, 0xc6, 'I')]) + value
    if isinstance(value, (list, tuple)):
        return _sized(len(value), [(15, 0x90, ''), (65535, 0xdc, 'H')]) + b''.join(map(pack, value))
    if isinstance(value, dict):
        return _sized(len(value), [(15, 0x80, ''), (65535, 0xde, 'H')]) + b''.join(
            pack(key) + pack(entry) for key, entry in value.items())
    fixed = {1: 0xd4, 2: 0xd5, 4: 0xd6, 8: 0xd7, 16: 0xd8}.get(len(value.content))
    head = bytes([fixed]) if fixed else _sized(
        len(value.content), [(255, 0xc7, 'B'), (65535, 0xc8, 'H'), (2 ** 32, 0xc9, 'I')])
    return head + struct.pack('b', value.code) + value.content


def _array(value):
    name = str(value.dtype).removeprefix('torch.')
    raw = value.contiguous().view(torch.uint8 if value.dtype == torch.bfloat16 else value.dtype).numpy().tobytes()
    return Ext(1, pack((tuple(value.shape), name, raw)))


def _place(slices):
    return pack(tuple(pack((start, stop, None)) for start, stop in slices))


def write_v_moe(prefix, arrays, shards=2, version='20220622', chunk=100, fields=()):
    """`PREFIX.index` and `PREFIX.data-...`: arrays cut in two along the first axis, dealt out to the shards in turn.

    Args:
        arrays: Names joined by `/` to tensors.
        chunk: Numbers in one of flax's arrays, of which a piece is made.
        fields: Parts of a training state that are numbered before the others, as those without a version are.
    """
    prefix.parent.mkdir(exist_ok=True)
    tree = {}
    for name, value in arrays.items():
        *path, last = name.split('/')
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    data = [{'__msgpack_array_chunk_a87ca2__': True} for _ in range(shards)]
    count = 0

    def index(node):
        nonlocal count
        if isinstance(node, dict):
            return {key: index(node[key]) for key in (
                *(field for field in fields if node is tree), *sorted(key for key in node if key not in fields))}
        number, count = count, count + 1
        length = len(node) if node.ndim else 1
        middle = length // 2
        places, owners = [], []
        for start, stop in [(0, middle), (middle, length)] if middle else [(0, length)]:
            piece = node[start:stop] if node.ndim else node
            slices = [(start, stop), *((0, size) for size in node.shape[1:])] if node.ndim else []
            places.append(slices)
            owners.append((number + start) % shards)
            flat = piece.flatten()
            subchunks = [flat[i:i + chunk] for i in range(0, len(flat), chunk)]
            data[owners[-1]].setdefault(str(number), []).append(
                [[_array(chunk) for chunk in subchunks], Ext(6, _place(slices))])
        shape = pack((tuple(node.shape), str(node.dtype).removeprefix('torch.'), False, {}))
        return Ext(8, pack((shape, tuple(map(_place, places)), tuple(owners))))

    content = {'shard_count': shards, 'index': index(tree), **({'version': version} if version else {})}
    prefix.with_name(f'{prefix.name}.index').write_bytes(pack(content))
    for shard, content in enumerate(data):
        prefix.with_name(f'{prefix.name}.data-{shard:05d}-of-{shards:05d}').write_bytes(pack(content))
    return prefix
