"""Data sets of the scripts: timm's own, checked before any work is spent.

What timm's factory lets pass and users lose days on: a split folder that is missing (it then reads the whole root),
class folders that differ between training and validation (labels then mean different things), images without class
folders or in hidden ones, a tar that was cut off, images that can't be read (it takes their neighbours for them).
"""
import argparse
import logging
import math
import os
import random
import tarfile
from contextlib import contextmanager, suppress
from glob import escape as glob_escape
from glob import glob
from itertools import islice
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, Mixup, create_dataset, create_loader
from timm.data.model_config import resolve_input_data_config
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms import Compose

from .foreign import foreign

# a Dataset whose `transform` can be set, perhaps with a length and `classes`, of which torch's type knows nothing
ImageSet = Any
_KINDS = ('', 'torch', 'hfds', 'hfids', 'wds', 'tfds')
_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


def _check_folder(root: str, split: str) -> None:
    if os.path.isfile(root):
        return
    if not os.path.isdir(root):
        raise ValueError(f'--data-dir {root} does not exist.')
    names = next((group for group in _SYNONYMS if split in group), (split,))
    if not any(os.path.exists(os.path.join(root, name)) for name in (split, *names)):
        found = ', '.join(sorted(os.listdir(root))[:8]) or 'nothing'
        raise ValueError(
            f'--data-dir {root} has no folder {" or ".join(names)} (found: {found}). Give a folder with train/ and '
            f'val/, or name the splits with --train-split and --val-split.')


def _check_tar(path: str) -> None:
    """A tar ends with blocks of zeros; one that was cut off would be read up to there without a word."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        f.seek(max(0, size - 512))
        if size < 1024 or size % 512 or any(f.read()):
            raise ValueError(f'{path} is no whole tar: its end is missing. Copy or make it again.')


def _check_samples(dataset: ImageSet, where: str) -> None:
    """Whether the classes of folders or tars are what they seem."""
    reader = dataset.reader
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if mapping is None:
        return
    hidden = next((name for name in mapping if name.startswith('.')), None)
    if hidden is not None:
        raise ValueError(f'{where} has images in a hidden folder {hidden}, which would be a class: remove it.')
    if len(set(mapping.values())) < 2:
        only = next(iter(mapping), '')
        found = f'has images of one class only ({only})' if only else 'has no class folders'
        raise ValueError(f'{where} {found}: put the images of each class into a folder of its own.')
    missing = sorted(set(range(max(mapping.values()) + 1)) - set(mapping.values()))
    if missing:
        raise ValueError(f'The class map of {where} has no class for label {missing[0]}: labels are 0, 1, 2, ...')


def open_dataset(args: argparse.Namespace, split: str, is_training: bool, in_chans: int = 3) -> ImageSet:
    """timm's `create_dataset` for the data options of a script.

    Raises:
        ValueError: The folder, its split or its images are missing, or the data set can't be opened.
    """
    if not args.dataset:
        _check_folder(args.data_dir, split)
    kind = args.dataset.split('/')[0].lower()
    if kind not in _KINDS:
        raise ValueError(f'--dataset {args.dataset} is not one of {", ".join(f"{k}/NAME" for k in _KINDS if k)}.')
    options: Dict[str, Any] = {}
    if kind != 'torch':
        options.update(input_img_mode=args.input_img_mode or ('L' if in_chans == 1 else 'RGB'))
        options.update(input_key=args.input_key, target_key=args.target_key)
    where = f'--dataset {args.dataset}, ' * bool(args.dataset) + f'--data-dir {args.data_dir}'
    with foreign(f'The split {split} of {where} can\'t be read'):
        dataset = create_dataset(
            args.dataset, root=args.data_dir, split=split, is_training=is_training, class_map=args.class_map,
            download=args.dataset_download, batch_size=args.batch_size, seed=getattr(args, 'seed', 42),
            num_samples=args.train_num_samples if is_training else args.val_num_samples, **options)
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(f'The split {split} of --data-dir {args.data_dir} has no images.')
    if isinstance(dataset, ImageDataset):
        source = getattr(dataset.reader, 'root', args.data_dir)
        for path in [source] if os.path.isfile(source) else glob(os.path.join(glob_escape(source), '*.tar')):
            if path.endswith('.tar'):
                _check_tar(path)
        _check_samples(dataset, f'The split {split} of --data-dir {args.data_dir}')
        images = ReadableImages(dataset, replace=is_training)
        images.check()
        return images
    if kind == 'torch':
        return _ImgMode(dataset, args.input_img_mode or ('L' if in_chans == 1 else 'RGB'))
    return dataset


def open_unlabelled(args: argparse.Namespace, in_chans: int = 3) -> ImageSet:
    """The images of `--calibration-dir`, a folder with images at any depth or a tar; their labels mean nothing.

    Raises:
        ValueError: It is missing, or holds no images.
        OSError: None of them can be read.
    """
    where = f'--calibration-dir {args.calibration_dir}'
    if not os.path.exists(args.calibration_dir):
        raise ValueError(f'{where} does not exist.')
    with foreign(f'{where} can\'t be read'):
        dataset = create_dataset(
            '', root=args.calibration_dir, search_split=False,
            input_img_mode=args.input_img_mode or ('L' if in_chans == 1 else 'RGB'))
    if os.path.isfile(args.calibration_dir):
        _check_tar(args.calibration_dir)
    images = ReadableImages(dataset, replace=False)
    images.check()
    return images


def class_names(dataset: ImageSet) -> Optional[List[str]]:
    """Names of the classes in the order of their labels, or None if the data set does not know them."""
    if isinstance(dataset, Wrapper):
        return class_names(dataset.dataset)
    if getattr(dataset, 'classes', None):
        return [str(name) for name in dataset.classes]
    reader = getattr(dataset, 'reader', None)
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if mapping:
        merged: Dict[int, List[str]] = {}  # a class map may give several folders one label
        for name, label in mapping.items():
            merged.setdefault(label, []).append(str(name))
        return [', '.join(merged[label]) for label in sorted(merged)]
    features = getattr(getattr(reader, 'dataset', None), 'features', None)  # Hugging Face data sets
    label = (features or {}).get(getattr(reader, 'label_key', ''))
    names = getattr(label, 'names', None)
    return None if names is None else list(names)


def check_classes(train: ImageSet, val: ImageSet, num_classes: Optional[int]) -> int:
    """The number of classes of two splits that agree.

    Raises:
        ValueError: Classes of the splits differ, `num_classes` is not their number, or there is no telling it.
    """
    names, val_names = class_names(train), class_names(val)
    if names is not None and val_names is not None and names != val_names:
        only = [f'{name} only in training' for name in names if name not in val_names]
        only += [f'{name} only in validation' for name in val_names if name not in names]
        raise ValueError(
            f'The classes of training ({len(names)}) and validation ({len(val_names)}) differ: '
            f'{"; ".join(only[:4]) or "same names in another order"}.')
    if names is None:
        if num_classes is None:
            raise ValueError('The number of classes can\'t be found from this data set: give --num-classes.')
        return num_classes
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f'The data has {len(names)} classes, --num-classes says {num_classes}. Leave the flag out to use the '
            f'data\'s.')
    return len(names)


class Wrapper(Dataset):
    """A data set over another one; the transform is the inner one's."""

    def __init__(self, dataset: ImageSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index]

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform) -> None:
        self.dataset.transform = transform


UNREADABLE = -1  # the label of an image that could not be read


def _left_out(reader: Any) -> Tuple[int, str]:
    """How many image files in a folder or a tar a reader of timm's does not serve, and the first of them."""
    kinds = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    if isinstance(reader, ReaderImageFolder):
        served = {path for path, _ in reader.samples}
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(reader.root, followlinks=True)
                 for name in names]
    elif isinstance(reader, ReaderImageInTar) and os.path.isfile(reader.root):
        served = {member.name for member, *_ in reader.samples}
        with tarfile.open(reader.root) as tar:
            paths = [member.name for member in tar if member.isfile()]
    else:
        return 0, ''
    others = sorted(path for path in paths if os.path.splitext(path)[1].lower() in kinds and path not in served)
    return len(others), others[0] if others else ''


def _reopen(reader: Any) -> None:
    """Let a process open the tars of a reader itself: the file that it was forked with has one position for all."""
    if isinstance(reader, ReaderImageInTar):
        states = [reader.tar_state] if reader.root_is_tar else list(reader.tar_state.values())
        while states:
            state = states.pop()
            state.tf = None
            states += state.children.values()


class ReadableImages(Wrapper):
    """timm's `ImageDataset`, which says what it could not read.

    Args:
        dataset: Images in folders or tars.
        replace: Give the next image that can be read for one that can't, as timm does; else a blank one with the label
            `UNREADABLE`.
    """

    tries = 50

    def __init__(self, dataset: ImageDataset, replace: bool) -> None:
        super().__init__(dataset)
        self.replace = replace
        self.left_out, self.first_left_out = _left_out(dataset.reader)
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # workers fill it in
        self._process = os.getpid()

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration
        if self._process != os.getpid():
            self._process = os.getpid()
            _reopen(self.dataset.reader)
        for i in range(index, index + self.tries) if self.replace else (index,):
            i %= len(self)
            try:
                source, target = self.dataset.reader[i][:2]
                with source, Image.open(source) as opened:
                    image = opened.convert(self.dataset.input_img_mode or opened.mode)
            except Exception:  # damaged files bring decoders to raise whatever they like
                self._unreadable[i] = True
            else:
                return self._prepared(image), UNREADABLE if target is None else target
        if self.replace:
            raise OSError(f'{self.tries} images in a row can\'t be read, from {self.dataset.filename(index)} on.')
        return self._prepared(Image.new(self.dataset.input_img_mode or 'RGB', (64, 64))), UNREADABLE

    def _prepared(self, image: Image.Image):
        return image if self.transform is None else self.transform(image)

    def check(self) -> None:
        """Try some images, spread evenly.

        Raises:
            OSError: None of them can be read.
        """
        count = min(self.tries, len(self))
        for i in range(count):
            with suppress(OSError):
                if self[i * len(self) // count][1] != UNREADABLE:
                    _reopen(self.dataset.reader)  # workers that are not forked are sent no open file
                    return
        raise OSError(f'None of {count} images that were tried can be read, {self.dataset.filename(0)} is the first.')

    def complaint(self) -> str:
        """What is left out and what could not be read so far, in words; empty if nothing."""
        parts = []
        if self.left_out:
            parts.append(f'{self.left_out} image files are left out, of other types than those read (give --input-key '
                         f'".jpg;.png;...") or of no class; the first is {self.first_left_out}')
        found = self._unreadable.nonzero().flatten().tolist()
        if found:
            done = 'others took their place' if self.replace else 'they are left out'
            first = self.dataset.filename(found[0])
            parts.append(f'{len(found)} of {len(self)} images can\'t be read, {done}; the first is {first}')
        return '; '.join(parts)


def complaint(dataset: ImageSet) -> str:
    """What could not be read of a data set so far, in words; empty if all could or nobody looked."""
    while isinstance(dataset, Wrapper) and not isinstance(dataset, ReadableImages):
        dataset = dataset.dataset
    return dataset.complaint() if isinstance(dataset, ReadableImages) else ''


class _Convert:
    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, image):
        return image.convert(self.mode)


class _ImgMode(Wrapper):
    """torchvision's data sets know no image mode: convert before the transform."""

    def __init__(self, dataset: ImageSet, mode: str) -> None:
        super().__init__(dataset)
        self.mode = mode

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform) -> None:
        self.dataset.transform = Compose([_Convert(self.mode), transform])


class SeededDataset(Wrapper):
    """Draws the augmentation of each image from (seed, epoch, index) and nothing else.

    So it does not matter which worker loads an image, or what was loaded before: a resumed run sees the same pixels.
    """

    def __init__(self, dataset: ImageSet, seed: int) -> None:
        super().__init__(dataset)
        self.seed = seed
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int):
        seed_all(self.seed, 1, int(self._epoch), index, devices=False)
        return self.dataset[index]


def seed_all(*key: int, devices: bool = True) -> None:
    """Seed Python, NumPy and torch from a tuple of whole numbers, as (seed, stream, ...).

    `devices=False` leaves accelerators out: where CUDA is built in but not started, as in the workers of a loader,
    seeding it takes longer than decoding a small image.
    """
    words = np.random.SeedSequence(key).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(int(words[2]))


def preparation(model: nn.Module, args: argparse.Namespace) -> Dict[str, Any]:
    """How images are prepared for a model: what the flags say, else what timm knows of it.

    Returns:
        `input_size` `(C, H, W)`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.

    Raises:
        ValueError: The flags do not go together.
    """
    started_somewhere = any(getattr(args, key, None) for key in ('pretrained', 'pretrained_path', 'initial_checkpoint'))
    with foreign('The images can\'t be prepared by --img-size, --mean, --std and --crop-pct as they are'), (
            _quiet(not started_somewhere)):
        return resolve_input_data_config(model, vars(args))


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Without timm's notices about pretrained statistics, which say nothing of a model that starts from nothing."""
    logger = logging.getLogger('timm.data')
    level = logger.level
    logger.setLevel(logging.ERROR if wanted else level)
    try:
        yield
    finally:
        logger.setLevel(level)


def train_loader(dataset: ImageSet, args: argparse.Namespace, data_config: Dict[str, Any]) -> DataLoader:
    """timm's training loader with the augmentation flags; complete batches only.

    Raises:
        ValueError: timm does not know such an augmentation.
    """
    with foreign(f'The training images can\'t be prepared (--aa {args.aa}, --train-crop-mode {args.train_crop_mode}, '
                 f'--scale, --ratio, --color-jitter, ...)'):
        return create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            mean=data_config['mean'],
            std=data_config['std'],
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            use_prefetcher=False,
            persistent_workers=args.workers > 0,
        )


def eval_loader(dataset: ImageSet, args: argparse.Namespace, data_config: Dict[str, Any]) -> DataLoader:
    """timm's validation loader.

    Raises:
        ValueError: timm can't prepare images so.
    """
    with foreign(f'The images can\'t be prepared for validation by {data_config}'):
        return create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=getattr(args, 'validation_batch_size', None) or args.batch_size,
            is_training=False,
            interpolation=data_config['interpolation'],
            mean=data_config['mean'],
            std=data_config['std'],
            crop_pct=data_config['crop_pct'],
            crop_mode=data_config.get('crop_mode'),
            num_workers=args.workers,
            pin_memory=getattr(args, 'pin_mem', False),
            use_prefetcher=False,
            persistent_workers=args.workers > 0,
        )


class EpochLength(NamedTuple):
    """Of one process.

    Args:
        batches: Micro-batches.
        updates: Optimizer updates.
        left_over: Micro-batches of the last update, 0 if it has as many as the others.
    """
    batches: int
    updates: int
    left_over: int


def epoch_length(loader: DataLoader, args: argparse.Namespace, num_processes: int) -> EpochLength:
    """How long an epoch of a training loader is when it is shared by processes.

    Args:
        loader: As `train_loader` makes it. Iterable data sets of timm have split themselves among processes already.
        args: Options of the script.
        num_processes: Processes.

    Raises:
        ValueError: There is not one batch for each process, or the micro-batches of an iterable data set do not add up
            to whole updates.
    """
    dataset: ImageSet = loader.dataset
    iterable = isinstance(dataset, IterableDataset)
    if not iterable and len(dataset) < args.batch_size * num_processes:
        raise ValueError(
            f'{len(dataset)} training images do not fill one batch of --batch-size {args.batch_size} on '
            f'{num_processes} process(es).')
    batches = len(loader) if iterable else len(loader) // num_processes
    left_over = batches % args.grad_accum_steps
    if iterable and left_over:  # only of others accelerate sees the end coming
        raise ValueError(
            f'An epoch of {batches} batches is no multiple of --grad-accum-steps {args.grad_accum_steps}: give another '
            '--train-num-samples.')
    return EpochLength(batches, math.ceil(batches / args.grad_accum_steps), left_over)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell a loader and its data set which epoch they are in, as far as they can be told."""
    for part in (loader.dataset, loader):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


def make_mixup(args: argparse.Namespace, num_classes: int) -> Optional[Mixup]:
    """timm's mixup and cutmix, or None where the flags ask for neither.

    Raises:
        ValueError: Batches are odd, or timm refuses the values.
    """
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.batch_size % 2:
        raise ValueError(f'--batch-size {args.batch_size} must be even with mixup or cutmix.')
    with foreign(f'--mixup {args.mixup}, --cutmix {args.cutmix}, --cutmix-minmax {args.cutmix_minmax}'):
        return Mixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=num_classes)


def calibration_batches(dataset: ImageSet, args: argparse.Namespace, data_config: Dict[str, Any]) -> List[Tensor]:
    """`--calibration-images` images, spread evenly over a data set and prepared as for validation, in batches."""
    if isinstance(dataset, IterableDataset):
        loader = eval_loader(dataset, args, data_config)
        count = -(-args.calibration_images // args.batch_size)
        return [images for images, _ in islice(loader, count)]
    loader = eval_loader(dataset, args, data_config)  # sets the transform of the data set
    count = min(args.calibration_images, len(dataset))
    picked = Subset(loader.dataset, [i * len(dataset) // count for i in range(count)])
    loaded = DataLoader(picked, batch_size=args.batch_size, num_workers=args.workers)
    return [kept for images, target in loaded if len(kept := images[target != UNREADABLE])]
