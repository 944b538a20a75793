"""The examples run as they stand and write a folder that timm loads."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('name', ['plain_loop', 'accelerate_loop'])
def test_example_exports_a_vanilla_vit(name, tmp_path):
    output = tmp_path / 'vit'
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    done = subprocess.run(
        [sys.executable, str(ROOT / 'examples' / f'{name}.py'), '--steps', '3', '--output', str(output)],
        cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f'local-dir:{output}', pretrained=True)
    assert type(model).__module__ == 'timm.models.vision_transformer'
    assert not any('experts' in key for key in model.state_dict())
