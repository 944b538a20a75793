"""What an installation away from the clone holds."""
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

import ewa.version
from runs import ROOT

LIBRARY = """
import importlib, pkgutil, sys
import timm, ewa
from pathlib import Path
names = [module.name for module in pkgutil.iter_modules(ewa.__path__) if not module.ispkg]
[importlib.import_module(f'ewa.{name}') for name in names]
model = timm.create_model('vit_ewa', host='vit_tiny_patch16_224', depth=2, embed_dim=16, num_heads=2, num_classes=3)
ewa.export(ewa.to_dense(model), 'vit')
assert ewa.load('vit').num_classes == 3
print(Path(ewa.__file__).parent, ewa.__version__, *sorted(names))
"""


@pytest.mark.slow
def test_source_distribution_and_wheel_hold_all_that_is_needed(tmp_path):
    pytest.importorskip('setuptools')
    source = shutil.copytree(ROOT, tmp_path / 'source', ignore=shutil.ignore_patterns(
        '.*', 'output', '__pycache__', '*.egg-info', 'build', 'results'))
    run = dict(check=True, capture_output=True, text=True)
    subprocess.run([sys.executable, '-c', 'from setuptools.build_meta import build_sdist; build_sdist("..")'],
                   cwd=source, **run)
    archive = tmp_path / f'ewa_vit-{ewa.version.__version__}.tar.gz'
    with tarfile.open(archive) as tar:
        files = {name.partition('/')[2] for name in tar.getnames()}
    assert {'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'train.py', 'convert.py', 'ewa/py.typed',
            'configs/demo.yaml', 'data/fashion_mini/train.tar', 'tests/test_packaging.py', 'examples/plain_loop.py',
            'docs/results.md'} <= files

    # a wheel of the source distribution, as pip makes it, in a folder of its own
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path / 'site', archive],
                   cwd=tmp_path, **run)
    installed = tmp_path / 'site' / 'ewa'
    assert (installed / 'py.typed').is_file() and list((tmp_path / 'site').glob('ewa_vit-*/licenses/LICENSE'))
    assert sorted(path.name.partition('-')[0] for path in (tmp_path / 'site').iterdir()) == ['ewa', 'ewa_vit']
    where, version, *modules = subprocess.run(
        [sys.executable, '-c', LIBRARY], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')},
        **run).stdout.splitlines()[-1].split()
    assert (where, version) == (str(installed), ewa.version.__version__)
    assert modules == sorted(path.stem for path in (ROOT / 'ewa').glob('*.py') if path.stem != '__init__')
