"""Image sets of the accuracy studies: three made from files in Debian's and Python's packages, or any other.

    python -m experiments.data fashion --output DIR     Fashion-MNIST: 10 classes, 28x28 grey, the official test set
    python -m experiments.data digits --output DIR      scikit-learn's digits: 10 classes, 8x8 grey
    python -m experiments.data glyphs --output DIR      characters of free fonts: over 200 classes, 32x32 RGB, the test
                                                        set holds font families that training never saw
    python -m experiments.data folder --source DIR --output DIR --size 64
                                                        an ImageNet-style folder (train/CLASS/*, val/CLASS/*), cropped
                                                        to squares; its val becomes test, a tenth of its train val

Where the files come from (Debian 12), to be passed as --source fashion or --source fonts:

    mkdir fashion fonts && python -m experiments.data packages > fonts/packages.txt
    (cd fashion && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .)
    (cd fonts && apt-get download $(cat packages.txt) && for f in *.deb; do dpkg -x $f .; done)

or, as root, `apt-get install --no-install-recommends` with the same names and no --source; fonts that the machine has
besides, and those that Debian keeps outside /usr/share/fonts, then make it a slightly different set.

Every set has the same layout: DIR/{train,val,test}.tar, each with PNG images CLASS/NAME.png as timm reads them
(`--data-dir DIR --train-split train.tar --val-split val.tar`), and DIR/info.json with counts, seed, font families and
versions. val is drawn from the training part and serves all choices; test is for the end of a study. The same seed,
files and versions give the same bytes. glyphs: 245 MB of packages, 1.5 GB unpacked, three minutes, 260 MB written.
"""
import argparse
import gzip
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageOps, features
from torchvision.datasets.folder import IMG_EXTENSIONS

from .glyphs import (
    CLASSES,
    FONT_SOURCE,
    PACKAGES,
    drop_outliers,
    find_fonts,
    glyph_images,
    load_face,
    select_faces,
    split_families,
)

SPLITS = ('train', 'val', 'test')
FASHION_SOURCE = '/usr/share/datasets/fashion-mnist'
FRACTIONS = dict(train=0.7, val=0.1, test=0.2)


def write_set(output: str, splits: Mapping[str, Iterable[Tuple[str, str, Image.Image]]], info: dict) -> dict:
    """Write {split: (class, name, image), ...} as tar files, with `info.json`; `output` appears whole or not."""
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    try:
        temporary.chmod(0o755)
        counts: Dict[str, Counter] = {}
        for split, images in splits.items():
            counts[split] = Counter()
            with tarfile.open(temporary / f'{split}.tar', 'w', format=tarfile.USTAR_FORMAT) as tar:
                for class_name, name, image in images:
                    data = io.BytesIO()
                    image.save(data, 'PNG')
                    member = tarfile.TarInfo(f'{class_name}/{name}.png')
                    member.size = data.tell()
                    data.seek(0)
                    tar.addfile(member, data)
                    counts[split][class_name] += 1
        info = dict(
            info,
            classes=sorted(set().union(*counts.values())),
            images={split: sum(c.values()) for split, c in counts.items()},
            images_per_class={split: [min(c.values()), max(c.values())] for split, c in counts.items()},
            versions=dict(
                python=platform.python_version(), numpy=np.__version__, pillow=Image.__version__,
                freetype=features.version('freetype2'), **info.get('versions', {})),
        )
        (temporary / 'info.json').write_text(json.dumps(info, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return info


def stratified_split(
        labels: np.ndarray,
        fractions: Dict[str, float],
        rng: np.random.Generator,
) -> Dict[str, np.ndarray]:
    """Sorted indices of each named part, the same fraction of every class; what is left over is `train`."""
    parts = defaultdict(list)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        for name, fraction in fractions.items():
            count = round(fraction * np.sum(labels == label))
            parts[name].append(indices[:count])
            indices = indices[count:]
        parts['train'].append(indices)
    return {name: np.sort(np.concatenate(p)) for name, p in parts.items()}


def grey_images(images: np.ndarray, labels: np.ndarray, indices: Iterable[int]):
    for i in indices:
        yield str(labels[i]), f'{i:05d}', Image.fromarray(images[i])


def package_versions(source: Path, packages: Sequence[str]) -> Dict[str, str]:
    """Versions out of the Debian changelogs beside installed or unpacked files, where there are any."""
    versions = {}
    for package in packages:
        for doc in (source / 'usr/share/doc', source.parent / 'doc', source.parent.parent / 'doc'):
            for changelog in sorted((doc / package).glob('changelog.Debian*gz')):
                with gzip.open(changelog, 'rt', encoding='utf-8', errors='replace') as f:
                    versions[package] = f.readline().partition('(')[2].partition(')')[0]
    return versions


def make_fashion(args) -> dict:
    source = Path(args.source or FASHION_SOURCE)

    def read(name):
        path = next(iter(sorted(source.rglob(f'{name}.gz'))), None)
        if path is None:
            raise FileNotFoundError(
                f'no {name}.gz under {source}; run `apt-get download dataset-fashion-mnist && '
                'dpkg -x dataset-fashion-mnist_*.deb .` in a folder and pass it as --source')
        data = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(data, '>i4', count=data[3], offset=4)  # IDX: data[3] is the number of axes
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)

    images, labels = read('train-images-idx3-ubyte'), read('train-labels-idx1-ubyte')
    test_images, test_labels = read('t10k-images-idx3-ubyte'), read('t10k-labels-idx1-ubyte')
    parts = stratified_split(labels, dict(val=5000 / 60000), np.random.default_rng(args.seed))
    splits = {name: grey_images(images, labels, parts[name]) for name in ('train', 'val')}
    splits['test'] = grey_images(test_images, test_labels, range(len(test_labels)))
    return write_set(args.output, splits, dict(
        set='fashion', seed=args.seed, versions=package_versions(source, ['dataset-fashion-mnist'])))


def make_digits(args) -> dict:
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f'the digits come with scikit-learn ({error}); pip install scikit-learn') from error
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = stratified_split(digits.target, dict(test=0.2, val=0.2), np.random.default_rng(args.seed))
    splits = {name: grey_images(images, digits.target, parts[name]) for name in SPLITS}
    return write_set(args.output, splits, dict(
        set='digits', seed=args.seed, versions={'scikit-learn': sklearn.__version__}))


def make_folder(args) -> dict:
    source = Path(args.source)
    if args.size < 8:
        raise ValueError(f'--size {args.size} must be at least 8')
    files = {split: [path for path in sorted((source / split).glob('*/*')) if path.suffix.lower() in IMG_EXTENSIONS]
             for split in ('train', 'val')}
    empty = next((split for split, paths in files.items() if not paths), None)
    if empty is not None:
        raise FileNotFoundError(f'--source {source} has no images {empty}/CLASS/NAME.jpg: name an ImageNet folder')
    labels = np.array([path.parent.name for path in files['train']])
    parts = stratified_split(labels, dict(val=0.1), np.random.default_rng(args.seed))
    for name, part in parts.items():
        missing = sorted(set(labels) - set(labels[part]))
        if missing:
            raise ValueError(f'{source}/train/{missing[0]} has too few images for a {name} split of a tenth')

    def images(paths):
        for path in paths:
            with Image.open(path) as image:
                yield path.parent.name, path.stem, ImageOps.fit(image.convert('RGB'), (args.size, args.size))

    splits = {name: images([files['train'][i] for i in parts[name]]) for name in ('train', 'val')}
    return write_set(args.output, dict(splits, test=images(files['val'])), dict(
        set=Path(args.output).name, seed=args.seed, size=args.size))


def make_glyphs(args) -> dict:
    source = Path(args.source or FONT_SOURCE)
    if args.size < 16 or args.images_per_class < 10 or args.min_families < 4:
        raise ValueError(
            f'--size {args.size}, --images-per-class {args.images_per_class}, --min-families {args.min_families}: '
            'must be at least 16, 10 and 4')
    with ProcessPoolExecutor(args.workers) as pool:
        fonts = find_fonts(source)
        found = select_faces([face for face in pool.map(load_face, fonts, fonts.values(), chunksize=8) if face])
    faces = {face.family: face for face in drop_outliers(found)}
    members = split_families({k: len(f.glyphs) for k, f in faces.items()}, FRACTIONS, np.random.default_rng(args.seed))

    def enough(char, split):
        needed = args.min_families * FRACTIONS[split] / FRACTIONS['train']
        return sum(char in faces[name].glyphs for name in members[split]) >= max(1, needed)

    classes = ''.join(char for char in CLASSES if all(enough(char, split) for split in SPLITS))
    if len(classes) < 2:
        raise FileNotFoundError(
            f'only {len(faces)} usable font families under {source}, none of {len(CLASSES)} characters in '
            f'{args.min_families} of them; run `apt-get download $(python -m experiments.data packages) && for f in '
            'fonts-*.deb; do dpkg -x $f fonts; done` and pass --source fonts, or lower --min-families')
    splits = {
        split: glyph_images(
            faces, members[split], classes, round(args.images_per_class * FRACTIONS[split]), args.size,
            (args.seed, number))
        for number, split in enumerate(SPLITS)}
    return write_set(args.output, splits, dict(
        set='glyphs', seed=args.seed, size=args.size, characters=classes, families=members,
        versions=package_versions(source, PACKAGES)))


def classes_of(source: Path) -> Dict[str, List[tarfile.TarInfo]]:
    """Class to images of a tar."""
    classes: Dict[str, List[tarfile.TarInfo]] = {}
    with tarfile.open(source) as tar:
        for member in tar.getmembers():
            if member.isfile():
                classes.setdefault(os.path.dirname(member.name), []).append(member)
    return classes


def subset(source: Path, count: Optional[int], target: Path, classes: Optional[Sequence[str]] = None) -> Path:
    """The first `count` images (None: all) of a tar, evenly over its or the given classes, as another tar; made once.

    Raises:
        ValueError: A class has too few.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    groups = classes_of(source)
    groups = {name: groups[name] for name in classes or groups}
    wanted = {name: len(group) if count is None else count // len(groups) + (i < count % len(groups))
              for i, (name, group) in enumerate(groups.items())}
    short = next((name for name, group in groups.items() if len(group) < wanted[name]), None)
    if short is not None:
        raise ValueError(
            f'{source} has {len(groups[short])} images of class {short}, {count} over all take {wanted[short]}.')
    new = target.with_suffix('.new')
    with tarfile.open(source) as tar, tarfile.open(new, 'w') as out:
        for name, group in groups.items():
            for member in group[:wanted[name]]:
                out.addfile(member, tar.extractfile(member))
    os.rename(new, target)
    return target


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m experiments.data', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, make in (
            ('fashion', make_fashion), ('digits', make_digits), ('folder', make_folder), ('glyphs', make_glyphs)):
        command = commands.add_parser(name)
        command.set_defaults(run=make)
        command.add_argument('--output', required=True, help='new folder for the set')
        command.add_argument('--seed', type=int, default=0)
        if name in ('fashion', 'glyphs'):
            command.add_argument('--source', help='folder of the unpacked packages (default: the installed ones)')
        if name == 'folder':
            command.add_argument('--source', required=True, help='folder with train/CLASS/* and val/CLASS/*')
        if name in ('folder', 'glyphs'):
            command.add_argument(
                '--size', type=int, default=32 if name == 'glyphs' else 64, help='side of an image in pixels')
    command.add_argument('--images-per-class', type=int, default=380, help='in all three splits, 70 %% of them train')
    command.add_argument('--min-families', type=int, default=50, help='of a class in train, others their share')
    command.add_argument('--workers', type=int, default=2, help='processes that draw the fonts')
    commands.add_parser('packages', help='print the names of the font packages').set_defaults(run=None)
    args = parser.parse_args(argv)
    if args.command == 'packages':
        print(*PACKAGES, sep='\n')
        return 0
    try:
        if os.path.lexists(getattr(args, 'output', '')):
            raise FileExistsError(f'--output {args.output} exists; remove it or name another folder')
        info = args.run(args)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f'{parser.prog} {args.command}: {error}', file=sys.stderr)
        return 2
    print(f'{args.output}: {len(info["classes"])} classes, images {info["images"]}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
