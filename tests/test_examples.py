"""The examples run as they stand and write a folder that timm loads."""
import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

import ewa
from runs import run_convert

ROOT = Path(__file__).parent.parent


def run(name, *args):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    done = subprocess.run(
        [sys.executable, str(ROOT / 'examples' / f'{name}.py'), *map(str, args)], cwd=ROOT, env=env,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('name', [
    'plain_loop', 'accelerate_loop', pytest.param('lightning_loop', marks=pytest.mark.slow)])
def test_example_exports_a_vanilla_vit(name, tmp_path):
    if name == 'lightning_loop':
        pytest.importorskip('lightning')
    output = tmp_path / 'vit'
    run(name, '--steps', 3, '--output', output)
    model = timm.create_model(f'local-dir:{output}', pretrained=True)
    assert type(model).__module__ == 'timm.models.vision_transformer'
    assert not any('experts' in key for key in model.state_dict())
    assert (model.pretrained_cfg['mean'], model.pretrained_cfg['std']) == ([0.286], [0.353])


def test_examples_look_at_their_output_before_they_train(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'examples' / 'plain_loop.py'), '--output', str(tmp_path)], cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 2 and 'exists: give another --output' in done.stderr and not done.stdout


@pytest.mark.slow
def test_the_example_of_the_trainer_exports_its_own_vit(tmp_path):
    transformers = pytest.importorskip('transformers')
    run('trainer_loop', '--steps', 3, '--output', tmp_path / 'vit')
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'vit')
    assert not any('experts' in key for key in model.state_dict())


@pytest.mark.slow
def test_point_clouds_are_told_apart_by_the_converted_model_as_by_its_experts(tmp_path):
    out = run('point_cloud', '--steps', 60, '--train', 100, '--test', 100, '--output', tmp_path / 'plain.pt')
    dense, experts, plain = map(float, re.findall(r'([0-9.]+) %', out))
    assert experts == plain and min(dense, plain) > 30  # 20 by chance
    assert not any('experts' in key for key in torch.load(tmp_path / 'plain.pt'))


@pytest.mark.parametrize('form', ['experts', 'mean'])
def test_what_the_training_script_of_timm_does_with_our_models(form, tmp_path):
    """`--device-modules ewa --model vit_ewa --model-kwargs ...`: imported, built, saved; never pulled."""
    importlib.import_module('ewa')
    kwargs = dict(
        host='vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10,
        form=form)
    model = timm.create_model('vit_ewa', **kwargs)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-2, layer_decay=.75)
    ema = ModelEmaV3(model, decay=.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        ema.update(model)
    args = argparse.Namespace(model='vit_ewa')
    CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.)
    options = {key: value for key, value in kwargs.items() if key not in ('img_size', 'num_classes')}
    run_convert(
        tmp_path / 'last.pth.tar', '--model', 'vit_ewa', '--img-size', 32, '--use-ema', '--output', tmp_path / 'vit',
        '--model-kwargs', *(f'{key}={value}' for key, value in options.items()))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ewa.load(tmp_path / 'vit').eval()(images), ema.module.eval()(images))
