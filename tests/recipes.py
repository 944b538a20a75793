"""Recipes of tiny MoE models and of a tiny run, whose outputs are kept in `golden/`.

No weight comes from a random number generator: entry `i` of the `k`-th tensor of a state dict is a residue of whole
numbers, a multiple of 1/256, so that the same model is made by every version of torch on every machine, and averages
and sums of 4 experts are exact.

    PYTHONPATH=. python tests/recipes.py DIR    # writes what golden/ holds, as the code at hand computes it

`golden/` was written by version 0.1.0, but for what `top_kg` and `svd_kg` make, whose meaning has changed since. It is
not to be written again: it stands for the models that users have.
"""
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.models import get_model_input_config

import ewa

GOLDEN = Path(__file__).parent / 'golden'
VIT = dict(
    host='vit_tiny_patch16_224', img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=5,
    num_experts=4, init='copy')
GATED = dict(VIT, router='topk', top_k=2)
GATHERINGS = {  # name: method and options
    'average': ('average', {}), 'aligned': ('aligned', {}), 'sum': ('sum', {}), 'top_kg': ('top_kg', {}),
    'svd_kg': ('svd_kg', {}), 'sum rescaled': ('sum', dict(rescale=True)),
    'top_kg rescaled': ('top_kg', dict(rescale=True)), 'svd_kg rescaled': ('svd_kg', dict(rescale=True)),
}
CALIBRATED = {
    'usage': ('usage', {}), 'prune': ('prune', {}), 'prune by norm': ('prune', dict(score='norm')),
    'do_acp': ('do_acp', {}), 'do_acp, lam': ('do_acp', dict(lam=1e-3)),
}
THIRD = {'aligned to the third': ('aligned', dict(reference=2))}
MODELS = {  # name: arguments of vit_ewa, gatherings
    'vit random': (VIT, {**GATHERINGS, **THIRD}),
    'swin random': (dict(
        host='swin_tiny_patch4_window7_224', img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1),
        num_heads=(1, 2), num_classes=5, num_experts=4, layers='all', init='copy'), {**GATHERINGS, **THIRD}),
    'vit gated': (GATED, {**GATHERINGS, **THIRD, **CALIBRATED}),
    'eva gated': (dict(GATED, host='eva02_tiny_patch14_224', renormalise=False), {**GATHERINGS, **CALIBRATED}),
    'vit fine-grained': (
        dict(GATED, layers='all', num_experts=6, top_k=3, num_shared=1, expert_ratio=0.25),
        {**GATHERINGS, **CALIBRATED,
         'average of five': ('average', dict(k=5)), 'do_acp of two': ('do_acp', dict(k=2))}),
}
EXACT = ('average', 'sum', 'top_kg', 'prune')  # of 4 experts as wide as the FFN: the same bits on any machine


def residues(count, k):
    """`count` float32 numbers in [-1/4, 1/4], multiples of 1/256, for the `k`-th tensor."""
    x = torch.arange(count, dtype=torch.int64) + 7919 * (k + 1)
    return (x ** 3 % 65521 % 129 - 64).float() / 256


@torch.no_grad()
def fill(model):
    """Give every parameter the numbers of its place; norm scales get 1 more."""
    for k, (name, p) in enumerate(model.named_parameters()):
        scale = p.ndim == 1 and name.endswith('weight')
        p.copy_(residues(p.numel(), k).view_as(p) + scale)
    return model.eval()


def build(name):
    return fill(timm.create_model('vit_ewa', **MODELS[name][0]))


def images(model, first=0, count=4):
    size = get_model_input_config(model)['input_size']
    return torch.stack([8 * residues(3 * size[-1] ** 2, 1000 + i).view(3, size[-1], -1)
                        for i in range(first, first + count)])


def gather(model, gathering):
    """The dense model of one entry of `GATHERINGS` or `CALIBRATED`."""
    method, options = gathering
    return ewa.to_dense(model, method, [images(model, 100, 16)], **options)


@torch.no_grad()
def logits(model, batch=None):
    """Logits as rows of numbers, of four images unless a batch is given."""
    rows = model.eval()(images(model) if batch is None else batch).tolist()
    return [[round(value, 8) for value in row] for row in rows]


def digest(state_dict):
    """SHA-256 of names, shapes, types and bytes of all tensors."""
    sha = hashlib.sha256()
    for key, value in state_dict.items():
        sha.update(f'{key} {tuple(value.shape)} {value.dtype}\n'.encode())
        sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()


def config(directory):
    """config.json of a folder, without the versions of what wrote it."""
    found = json.loads((Path(directory) / 'config.json').read_text())
    found['ewa'].pop('versions')
    return found


def describe(name):
    """What `golden/models.json` holds of one model."""
    model = build(name)
    found = dict(keys=list(model.state_dict()), logits=logits(model), gathered={})
    for title, gathering in MODELS[name][1].items():
        dense = gather(model, gathering)
        entry = found['gathered'][title] = dict(logits=logits(dense))
        if title in EXACT and name != 'vit fine-grained':
            entry['digest'] = digest(dense.state_dict())
        if title == 'average':
            found['dense_keys'] = list(dense.state_dict())
            with tempfile.TemporaryDirectory() as folder:
                ewa.export(dense, Path(folder) / 'vit')
                found['config'] = config(Path(folder) / 'vit')
    return found


RUN = [
    '--model-kwargs', 'host=vit_tiny_patch16_224', 'patch_size=7', 'embed_dim=8', 'depth=2', 'num_heads=2',
    '--data-dir', 'images', '--batch-size', '20', '--epochs', '3', '--drop-path', '0.1', '--checkpoint-hist', '3',
    '--share-rate', '0.1', '--share-schedule', 'linear', '--share-every', '2', '--log-interval', '1']
RUNS = {
    'random': [*RUN, '--num-experts', '3', '--model-ema', '--model-ema-decay', '0.7'],
    'gated': [
        *RUN, '--router', 'topk', '--num-experts', '4', '--num-shared', '1', '--expert-ratio', '0.25',
        '--moe-layers', '1', '--expert-init', 'independent', '--opt', 'momentum', '--lr', '0.1'],
}


def grey_images():
    return torch.stack([8 * residues(28 * 28, 2000 + i).view(1, 28, 28) for i in range(2)])


def write(root):
    from runs import make_folder, run_convert, run_train

    root = root.absolute()
    root.mkdir(parents=True)
    (root / 'models.json').write_text(json.dumps({name: describe(name) for name in MODELS}) + '\n')
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_folder(Path('images'))
        for name, flags in RUNS.items():
            run_train(*flags, '--experiment', name)
            run = Path('output') / name
            _, second, _ = sorted((run / 'checkpoints').iterdir())
            shutil.copytree(second, root / name / 'checkpoints' / second.name)  # as if stopped after two of three
            shutil.copytree(run / 'last', root / name / 'last')
            for file in ('args.yaml', 'summary.csv'):
                shutil.copyfile(run / file, root / name / file)
            for source in (second, run / 'last'):
                for ema in (False, True)[:1 + (source / 'ema.safetensors').is_file()]:
                    run_convert(source, '--output', 'vit', '--overwrite', *['--use-ema'] * ema)
                    expected[f'{name} {source.name}' + ' ema' * ema] = logits(ewa.load('vit'), grey_images())
    (root / 'runs.json').write_text(json.dumps(expected) + '\n')


if __name__ == '__main__':
    write(Path(sys.argv[1]))
