"""What the tests of the scripts share: a folder of images, a tiny model, and the scripts called in this process."""
import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import convert  # noqa: E402
import train  # noqa: E402
from ewa.checkpoint import checkpoints  # noqa: E402

SAMPLE = ROOT / 'data' / 'fashion_mini'
HOST = dict(patch_size=7, embed_dim=32, depth=2, num_heads=2)
TINY = dict(host='vit_tiny_patch16_224', **HOST, img_size=28, in_chans=1, num_classes=10)  # the model of FLAGS
FLAGS = ['--model', 'vit_ewa', '--model-kwargs', 'host=vit_tiny_patch16_224', *(f'{k}={v}' for k, v in HOST.items()),
         '--img-size', '28', '--in-chans', '1', '--mean', '0.286', '--std', '0.353', '--crop-pct', '1',
         '--workers', '0', '--batch-size', '16', '--epochs', '2', '--warmup-epochs', '0', '--lr', '0.002']


def sample_images(split, per_class):
    """Class name and PIL image of the first `per_class` images of each class of the embedded sample."""
    seen = {}
    with tarfile.open(SAMPLE / f'{split}.tar') as archive:
        for member in archive:
            name = member.name.split('/')[0]
            if seen.setdefault(name, 0) < per_class:
                seen[name] += 1
                yield name, Image.open(io.BytesIO(archive.extractfile(member).read()))


def make_folder(root, train=8, val=4):
    """An ImageNet-style folder, grey PNG and JPEG of 28x28 pixels in 10 classes."""
    for split, per_class in (('train', train), ('val', val)):
        for i, (name, image) in enumerate(sample_images(split, per_class)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            image.save(root / split / name / f'{i:04d}.{"jpg" if i % 4 == 0 else "png"}')
    return root


def reset():
    """Forget accelerate's process-wide state, which is made once for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_train(*flags):
    reset()
    return train.main([*FLAGS, *map(str, flags)])


def run_convert(*flags):
    convert.main([str(flag) for flag in flags])


def fails(script, *flags):
    """The exit code and the lines on stderr of a call that must not succeed."""
    reset()
    err, sys.stderr = sys.stderr, io.StringIO()
    try:
        with pytest.raises(SystemExit) as e:
            script(*flags)
        return e.value.code, sys.stderr.getvalue().splitlines()
    finally:
        sys.stderr = err


def files(root):
    """The bytes of every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def summary(experiment):
    with open(experiment / 'summary.csv') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def config_of(directory):
    return json.loads((directory / 'config.json').read_text())


@torch.no_grad()
def logits_and_labels(model, folder):
    """Of all validation images, read and normalised by hand, in the order of their paths."""
    names = sorted(path.name for path in (folder / 'val').iterdir())
    pixels, labels = [], []
    for path in sorted((folder / 'val').rglob('*.*')):
        image = torch.tensor(list(Image.open(path).convert('L').getdata())).view(1, 28, 28)
        pixels.append((image / 255 - 0.286) / 0.353)
        labels.append(names.index(path.parent.name))
    return model.eval()(torch.stack(pixels)), torch.tensor(labels)


def top1(model, folder):
    logits, labels = logits_and_labels(model, folder)
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def events(experiment):
    accumulator = EventAccumulator(str(experiment), size_guidance=dict(scalars=0, tensors=0, images=0))
    return accumulator.Reload()


def scalars(experiment, tag):
    return {event.step: event.value for event in events(experiment).Scalars(tag)}


def newest(experiment):
    return checkpoints(experiment)[-1]


def weights(experiment):
    return load_file(experiment / 'last' / 'model.safetensors')


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a, b, **tolerance):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], **tolerance) for key in a)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def trained(folder, tmp_path_factory):
    """The folder of a finished run of two epochs, with EMA weights."""
    output = tmp_path_factory.mktemp('runs')
    run_train('--data-dir', folder, '--output', output, '--experiment', 'run', '--model-ema', '--model-ema-decay', 0.7,
              '--drop-path', 0.1, '--log-interval', 1, '--share-schedule', 'linear', '--share-rate', 0.1)
    return output / 'run'


@pytest.fixture
def go(folder, tmp_path):
    """A run on the folder of images; returns its experiment folder."""
    def start(*flags, experiment='a', data=folder):
        run_train('--data-dir', data, '--output', tmp_path, '--experiment', experiment, *flags)
        return tmp_path / experiment

    return start
