import argparse
import logging
import pickle
import random
import shutil
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import ewa.data
from ewa.data import (
    UNREADABLE,
    SeededDataset,
    calibration_batches,
    check_classes,
    class_names,
    complaint,
    eval_loader,
    open_dataset,
    preparation,
    seed_all,
    train_loader,
)
from ewa.options import train_parser
from runs import FLAGS, SAMPLE, folder  # noqa: F401  a fixture

CONFIG = dict(
    input_size=(1, 28, 28), interpolation='bicubic', mean=(0.286,), std=(0.353,), crop_pct=1.0, crop_mode='center')


def options(*flags):
    return train_parser().parse_args([*FLAGS, *map(str, flags)])


def opened(args, split='train', is_training=True, in_chans=1):
    return open_dataset(args, split, is_training, in_chans)


# what is opened

def test_folder(folder):
    args = options('--data-dir', folder)
    train, val = opened(args), opened(args, 'validation', False)  # val/ is one of its names
    assert (len(train), len(val)) == (80, 40)
    assert class_names(train) == sorted(path.name for path in (folder / 'train').iterdir())
    assert Counter(target for _, target in train) == dict.fromkeys(range(10), 8)
    assert train[0][0].mode == 'L' and opened(args, in_chans=3)[0][0].mode == 'RGB'
    assert opened(options('--data-dir', folder, '--input-img-mode', 'RGB'))[0][0].mode == 'RGB'


def test_tar():
    args = options('--data-dir', SAMPLE)
    val = opened(args, 'val.tar', False)
    assert len(val) == 1000 and val[0][0].size == (28, 28)
    assert check_classes(opened(args, 'train.tar'), val, None) == 10 and 'ankle-boot' in class_names(val)


def write_idx(path, array):
    path.write_bytes(struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.mark.parametrize('in_chans', [1, 3])
def test_torchvision_data_set(tmp_path, in_chans):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for prefix, count in (('train', 20), ('t10k', 10)):
        write_idx(raw / f'{prefix}-images-idx3-ubyte', np.full((count, 28, 28), 200, np.uint8))
        write_idx(raw / f'{prefix}-labels-idx1-ubyte', np.arange(count).astype(np.uint8) % 10)
    args = options('--dataset', 'torch/fashion_mnist', '--data-dir', tmp_path, '--batch-size', 5)
    train, val = opened(args, in_chans=in_chans), opened(args, 'validation', False, in_chans)
    assert (len(train), len(val)) == (20, 10)
    assert check_classes(train, val, None) == 10 and class_names(train)[0] == 'T-shirt/top'
    config = dict(CONFIG, input_size=(in_chans, 28, 28), mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    for loader in (train_loader(SeededDataset(train, 0), args, config), eval_loader(val, args, config)):
        images, _ = next(iter(loader))
        assert images.shape == (5, in_chans, 28, 28)
    assert torch.allclose(images, torch.tensor((200 / 255 - 0.5) / 0.5))


@pytest.mark.parametrize('flags, split, message', [
    (['--data-dir', '{}/missing'], 'train', 'missing does not exist'),
    (['--data-dir', '{}'], 'train', r'no folder train or training \(found: a\)'),
    (['--data-dir', '{}'], 'validation', 'no folder val or valid or validation'),
    (['--data-dir', '{}', '--class-map', '{}/map.txt'], 'a', "can't be read: .*map.txt"),
    (['--data-dir', '{}'], 'a', '0 images'),
    (['--dataset', 'tourch/cifar10'], 'train', 'tourch/cifar10 is not one of torch/NAME, hfds/NAME'),
    (['--dataset', 'torch/nope', '--data-dir', '{}'], 'train', 'torch/nope.*Unknown'),
    (['--dataset', 'torch/cifar10', '--data-dir', '{}'], 'train', 'torch/cifar10.*not found'),
])
def test_what_is_not_there_is_named(tmp_path, flags, split, message):
    (tmp_path / 'a').mkdir()
    args = options(*(flag.replace('{}', str(tmp_path)) for flag in flags))
    with pytest.raises(ValueError, match=message):
        opened(args, split)


class Named:
    def __init__(self, *classes):
        self.classes = classes


def test_classes_must_agree():
    assert check_classes(Named('a', 'b'), Named('a', 'b'), None) == 2
    assert check_classes(Named('a', 'b'), Named('a', 'b'), 2) == 2
    assert check_classes(Named('a', 'b'), object(), None) == 2
    assert check_classes(object(), object(), 5) == 5
    with pytest.raises(ValueError, match=r'\(2\) and validation \(2\) differ: b only in training; c only'):
        check_classes(Named('a', 'b'), Named('a', 'c'), None)
    with pytest.raises(ValueError, match='same names in another order'):
        check_classes(Named('a', 'b'), Named('b', 'a'), None)
    with pytest.raises(ValueError, match='2 classes, --num-classes says 3'):
        check_classes(Named('a', 'b'), Named('a', 'b'), 3)
    with pytest.raises(ValueError, match='give --num-classes'):
        check_classes(object(), object(), None)


# what comes out of the loaders

def test_validation_sees_every_image_once_and_plain(folder):
    args = options('--data-dir', folder, '--batch-size', 7)
    dataset = opened(args, 'val', False)
    raw = [(np.asarray(image), target) for image, target in dataset]
    batches = list(eval_loader(dataset, args, CONFIG))
    assert [len(images) for images, _ in batches] == [7] * 5 + [5]
    images, targets = (torch.cat(parts) for parts in zip(*batches))
    assert targets.tolist() == [target for _, target in raw]
    expected = torch.stack([torch.tensor(image)[None] / 255 for image, _ in raw])
    assert torch.allclose(images, (expected - 0.286) / 0.353, atol=1e-6)
    assert len(next(iter(eval_loader(dataset, options('--data-dir', folder, '-vb', 9), CONFIG)))[0]) == 9


def test_training_drops_the_incomplete_batch(folder):
    args = options('--data-dir', folder, '--batch-size', 32)
    loader = train_loader(SeededDataset(opened(args), 0), args, CONFIG)
    assert len(loader) == 2 and [len(images) for images, _ in loader] == [32, 32]


@pytest.mark.parametrize('flags, varied', [
    (['--no-aug'], False), ([], True), (['--scale', 1, 1, '--ratio', 1, 1, '--hflip', 0, '--color-jitter', 0], False),
    (['--no-aug', '--reprob', 0], False), (['--scale', 1, 1, '--ratio', 1, 1, '--hflip', 0, '--color-jitter', 0,
                                           '--reprob', 1], True)], ids=['none', 'default', 'off', 'off2', 'erasing'])
def test_augmentation_flags(folder, flags, varied):
    args = options('--data-dir', folder, *flags)
    dataset = SeededDataset(opened(args), 0)
    train_loader(dataset, args, CONFIG)  # sets the transform
    first = [dataset[i][0] for i in range(8)]
    dataset.set_epoch(1)
    assert all(torch.equal(a, dataset[i][0]) for i, a in enumerate(first)) == (not varied)


# random streams

@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_depends_on_seed_epoch_and_index_alone(folder, workers):
    args = options('--data-dir', folder, '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', 0.5, '--workers', workers)

    def pixels(seed, epoch, order, workers=0):
        dataset = SeededDataset(opened(args), seed)
        train_loader(dataset, args, CONFIG)
        dataset.set_epoch(epoch)
        batches = DataLoader(dataset, batch_size=4, sampler=order, num_workers=workers)
        return dict(zip(order, torch.cat([images for images, _ in batches])))

    reference = pixels(0, 3, range(12))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    other = pixels(0, 3, [7, 11, 3, 2, 5], workers)
    assert all(torch.equal(reference[i], other[i]) for i in other)
    assert not all(torch.equal(reference[i], pixels(0, 4, range(12))[i]) for i in range(12))
    assert not all(torch.equal(reference[i], pixels(1, 3, range(12))[i]) for i in range(12))


def test_workers_that_outlive_an_epoch_see_the_next(folder):
    args = options('--data-dir', folder, '--workers', 1, '--batch-size', 80)
    dataset = SeededDataset(opened(args), 0)
    loader = train_loader(dataset, args, CONFIG)
    assert loader.persistent_workers
    plain = DataLoader(dataset, batch_size=80)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        images, _ = next(iter(plain))
        shuffled, _ = next(iter(loader))
        assert torch.equal(images.flatten(1).sum(1).sort().values, shuffled.flatten(1).sum(1).sort().values)


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_are_independent_streams():
    seen = {}
    for key in [(0,), (0, 0), (0, 1), (1, 0), (0, 1, 2), (0, 2, 1), (0, 1, 2, 3), (2**40, 1)]:
        seed_all(*key)
        first = draws()
        random.random(), torch.rand(7)
        seed_all(*key)
        assert draws() == first
        seen[key] = first
    for values in zip(*(seen[key] for key in seen if key != (0, 0))):
        assert len(set(values)) == len(values)


def test_images_are_seeded_without_touching_accelerators(monkeypatch):
    class Drawing(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return draws()

    seed_all(5, 1, 3, 1)
    expected = draws()
    monkeypatch.setattr(torch, 'manual_seed', None)
    dataset = SeededDataset(Drawing(), 5)
    dataset.set_epoch(3)
    assert dataset[1] == expected


# what can't be what it seems

def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / 'copy'))


def test_images_without_class_folders(folder, tmp_path):
    root = copied(folder, tmp_path)
    for path in list((root / 'train').rglob('*.*')):
        path.rename(root / 'train' / path.name)
    with pytest.raises(ValueError, match='has no class folders: put .*into a folder of its own'):
        opened(options('--data-dir', root))


def test_hidden_folders_are_no_classes(folder, tmp_path):
    root = copied(folder, tmp_path)
    shutil.copytree(root / 'train' / 'bag', root / 'train' / '.ipynb_checkpoints')
    with pytest.raises(ValueError, match='hidden folder .ipynb_checkpoints, which would be a class'):
        opened(options('--data-dir', root))


def test_a_class_map_that_merges_folders(folder, tmp_path):
    names = sorted(path.name for path in (folder / 'train').iterdir())
    (tmp_path / 'map.txt').write_text('\n'.join(names))
    args = options('--data-dir', folder, '--class-map', tmp_path / 'map.txt')
    train = opened(args)
    train.dataset.reader.class_to_idx = {name: min(i, 3) for i, name in enumerate(names)}
    assert class_names(train) == [*names[:3], ', '.join(names[3:])]
    train.dataset.reader.class_to_idx = {name: i + (i > 2) for i, name in enumerate(names)}
    with pytest.raises(ValueError, match='has no class for label 3'):
        ewa.data._check_samples(train.dataset, 'the split')


@pytest.mark.parametrize('part', [.3, .5, 'between members', .98])
def test_a_tar_that_was_cut_off(tmp_path, part):
    data = (SAMPLE / 'val.tar').read_bytes()
    with tarfile.open(SAMPLE / 'val.tar') as tar:
        between = tar.getmembers()[500].offset
    end = between if part == 'between members' else int(part * len(data)) // 512 * 512
    (tmp_path / 'train.tar').write_bytes(data[:end])
    with pytest.raises(ValueError, match='train.tar is no whole tar|train.tar .* unexpected end of data'):
        opened(options('--data-dir', tmp_path), 'train.tar')


@pytest.mark.parametrize('content', [b'', b'no image', None])
@pytest.mark.parametrize('workers', [0, 2])
def test_images_that_cant_be_read_are_counted(folder, tmp_path, content, workers):
    root = copied(folder, tmp_path)
    for split, many in (('train', 3), ('val', 2)):
        for path in sorted((root / split).rglob('*.png'))[:many]:
            path.write_bytes(path.read_bytes()[:150] if content is None else content)
    args = options('--data-dir', root, '--workers', workers)
    train, val = opened(args), opened(args, 'validation', False)
    assert complaint(train) == complaint(SeededDataset(train, 0)) == ''
    labels = torch.cat([target for _, target in train_loader(SeededDataset(train, 0), args, CONFIG)])
    assert len(labels) == 80 and (labels >= 0).all()
    words = "3 of 80 images can't be read, others took their place; the first is "
    assert complaint(SeededDataset(train, 0)).startswith(words)
    images, labels = zip(*eval_loader(val, args, CONFIG))
    assert (torch.cat(labels) == UNREADABLE).sum() == 2 and sum(map(len, images)) == 40
    assert complaint(val).startswith("2 of 40 images can't be read, they are left out; the first is ankle-boot")
    assert sum(map(len, calibration_batches(val, argparse.Namespace(
        **vars(args), calibration_images=40), CONFIG))) == 38


def test_image_files_that_are_not_read_are_counted(folder, tmp_path):
    root = copied(folder, tmp_path)
    paths = sorted((root / 'train').rglob('*.png'))[:2]
    for path in paths:
        Image.open(path).save(path.with_suffix('.webp'))
        path.unlink()
    (root / 'train' / 'bag' / 'notes.txt').write_text('no image')
    args = options('--data-dir', root)
    assert complaint(SeededDataset(opened(args), 0)) == (
        '2 image files are left out, of other types than those read (give --input-key ".jpg;.png;...") or of no class; '
        f'the first is {paths[0].with_suffix(".webp")}')
    assert complaint(opened(options('--data-dir', root, '--input-key', '.jpg;.png;.webp'))) == ''
    (tmp_path / 'map.txt').write_text('bag\ncoat\n')
    part = opened(options('--data-dir', folder, '--class-map', tmp_path / 'map.txt'))
    assert len(part) == 16 and complaint(part).startswith('64 image files are left out')
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for path in sorted((root / 'train').rglob('*.*')):
            tar.add(path, f'train/{path.parent.name}/{path.name}')
    part = opened(options('--data-dir', tmp_path), 'train.tar')
    assert len(part) == 78 and complaint(part).startswith('2 image files are left out')
    assert complaint(part).endswith(f'the first is train/{paths[0].parent.name}/{paths[0].stem}.webp')


@pytest.mark.parametrize('split, is_training', [('train', True), ('validation', False)])
def test_a_split_of_which_nothing_can_be_read_is_refused(folder, tmp_path, split, is_training):
    root = copied(folder, tmp_path)
    paths = sorted((root / ('train' if is_training else 'val')).rglob('*.*'))
    for path in paths[1:]:
        path.write_bytes(b'no image')
    assert len(opened(options('--data-dir', root), split, is_training)) == len(paths)
    paths[0].write_bytes(b'')
    with pytest.raises(OSError, match='None of (40|50) images that were tried can be read, .*ankle-boot.*is the first'):
        opened(options('--data-dir', root), split, is_training)


@pytest.mark.parametrize('started', [None, 'somewhere'])
def test_what_timm_knows_of_pretrained_pixels_is_no_news_of_a_model_that_starts_from_nothing(caplog, started):
    caplog.set_level(logging.WARNING, 'timm')
    model = timm.create_model('vit_tiny_patch16_224', in_chans=1)
    args = argparse.Namespace(in_chans=1, img_size=None, mean=None, std=None, crop_pct=None, pretrained_path=started)
    assert preparation(model, args)['mean'] == (0.5,)
    assert ('Pretrained mean does not match' in caplog.text) == bool(started)


def test_workers_read_a_tar_each_for_itself():
    args = options('--data-dir', SAMPLE, '--batch-size', '1', '--workers', '0')
    images = opened(args, 'train.tar', False)  # which reads some of it, before there are workers
    assert len(pickle.loads(pickle.dumps(images))) == len(images)  # as workers that are not forked get it
    expected = [(image.clone(), int(target)) for image, target in eval_loader(images, args, CONFIG)]
    args.workers = 4
    for found, wanted in zip(eval_loader(images, args, CONFIG), expected, strict=True):
        assert int(found[1]) == wanted[1] and torch.equal(found[0], wanted[0])
    assert not complaint(images)
