"""Image sets of the accuracy studies, made from files in Debian's packages, so that no other download is needed.

    python -m experiments.data fashion --output DIR     Fashion-MNIST: 10 classes, 28x28 grey, the official test set
    python -m experiments.data digits --output DIR      scikit-learn's digits: 10 classes, 8x8 grey
    python -m experiments.data glyphs --output DIR      characters of free fonts: over 200 classes, 32x32 RGB, the test
                                                        set holds font families that training never saw
    python -m experiments.data check --data-dir DIR --model linear|vit     how hard a set is

Where the files come from (Debian 12), to be passed as --source fashion or --source fonts:

    mkdir fashion fonts && python -m experiments.data packages > fonts/packages.txt
    (cd fashion && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .)
    (cd fonts && apt-get download $(cat packages.txt) && for f in *.deb; do dpkg -x $f .; done)

or, as root, `apt-get install --no-install-recommends` with the same names and no --source; fonts that the machine has
besides, and those that Debian keeps outside /usr/share/fonts, then make it a slightly different set.

Every set has the same layout: DIR/{train,val,test}.tar, each with PNG images CLASS/NAME.png as timm reads them
(`--data-dir DIR --train-split train.tar --val-split val.tar`), and DIR/info.json with counts, seed, font families and
versions. val is drawn from the training part and serves all choices; test is for the end of a study. The same seed,
files and versions give the same bytes. glyphs: 235 MB of packages, 1.2 GB unpacked, two minutes, 260 MB written.

How hard glyphs is: a linear model reaches 13.6 % of the test images (`check --model linear --split test`, 10 epochs,
chance 0.4 %), the small ViT of the study `gathering` 43 % and a gated MoE 58 % after 5 epochs (docs/results.md).

Arrays: `F` font families, `C` classes, `P` probe characters, `S` side of an image in pixels.
"""
import argparse
import gzip
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

SPLITS = ('train', 'val', 'test')
FASHION_SOURCE = '/usr/share/datasets/fashion-mnist'
FONT_SOURCE = '/usr/share/fonts'
PACKAGES = [f'fonts-{name}' for name in """
    3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus
    adf-oldania adf-romande adf-switzera adf-universalis aenigma agave alee allerta amiga anonymous-pro apropal
    arabeyes arapey arkpandora arphic-gkai00mp atarismall averia-gwf averia-sans-gwf averia-serif-gwf b612 baekmuk
    beng-extra beteckna bpg-georgian cabin cabinsketch cantarell cardo cegui century-catalogue clear-sans cmu
    comfortaa comic-neue courier-prime croscore crosextra-caladea ddc-uchen dejavu-core dosis dustin ebgaramond elstob
    engadget essays1743 eurofurence fantasma fantasque-sans fanwood firacode freefarsi freefont-otf gamaliel
    gemunu-libre georgewilliams gfs-artemisia gfs-didot gfs-neohellenic gfs-theokritos glasstty go gotico-antiqua
    goudybookletter gujr-extra hermit horai-umefont hosny-amiri hosny-thabit inter ipafont-gothic ipafont-mincho
    jetbrains-mono junction jura karla karmilla khmeros kiloji komatuna konatu lato le-murmure league-mono
    league-spartan lemonada lexi-gulim lexi-saebom lg-aboriginal liberation lindenhill linex linuxlibertine lmodern
    lohit-deva manchufont manrope meera-inimai migmix mmcedar mona monlam monofur monoid mononoki
    morisawa-bizud-gothic morisawa-bizud-mincho motoya-l-cedar mph-2b-damase myanmar nafees nanum national-park
    noto-core noto-mono ocr-a ocr-b oldstandard opendin opendyslexic osifont oxygen pagul paratype play povray
    prociono proggy quattrocento quicksand ricty-diminished rit-sundar roadgeek roboto-slab routed-gothic
    sambhota-yigchung sarai sawarabi-gothic sawarabi-mincho senamirmir-washra sil-alkalami sil-andika sil-charis
    sil-dai-banna sil-doulos sil-harmattan sil-lateef sil-mondulkiri-extra sil-padauk sil-shimenkan-salaowu
    sil-sophia-nubian sixtyfour smc-anjalioldlipi smc-chilanka smc-dyuthi smc-gayathri smc-keraleeyam smc-manjari
    smc-meera smc-rachana smc-suruma smc-uroob smiley-sans sora spleen staypuft summersby teluguvijayam
    terminus tiresias tlwg-garuda-otf tlwg-laksaman-otf tlwg-loma-otf tlwg-sawasdee-otf tuffy ukij-uyghur
    unfonts-extra urw-base35 vollkorn woowa-bm yanone-kaffeesatz yozvox-yozfont-antique yozvox-yozfont-edu yrsa-rasa
""".split()]

# One character per shape: left out is what cannot be told apart once size, height on the line and slant are random
# (c/C, o/O/0, l/I/|, Latin/Greek/Cyrillic A, Í/í, breve/caron). The first of two that one font draws alike is kept.
CLASSES = (
    'ABCDEFGHIJKLMNOPQRSTUVWXYZ123456789abdefghijkmnqrty!?#$%&*+=/@[]{}()<>~;"'
    '¡¿£¥€§©®¶¢¤«±÷½¼¾†‡…™'
    'ÀÁÂÃÄÅÆÇÈÉÊËÐÑØÝÞßàáâãäåæèéêëìíîïðñòóôõöùúûüýÿŸ'
    'ĀāĂăĄąĆĈĊČĎĒēĖėĘęĚěĜĝĞğĠġĢģĤĥĦħĩīįĵĶķĹĻĽŁłŃńŅņŇňŊŋōőŒœŔŕŖŗŘřŚŜŞŠŢţŤťŦŧũūŭůűųŴŶŷŹŻŽ'
    'ΔΞΣΨΩαβγδεζηθλμξπστφω'
    'БГДЖИЙЛПФЦЧШЩЪЫЭЮЯбЂЄЉЊЋҐЎЏ')
PROBE = 'ABDEGHKMNQRSTabdeghkmnqrt2457'
GLYPH_SIZE = 64  # pixels per em of the master drawings
FRACTIONS = dict(train=0.7, val=0.1, test=0.2)


class Face(NamedTuple):
    """One font family: its drawings are cropped to the ink, 8-bit coverage."""
    family: str
    path: Path
    glyphs: Dict[str, Image.Image]


def write_set(output: str, splits: Dict[str, Iterable[Tuple[str, str, Image.Image]]], info: dict) -> dict:
    """Write {split: (class, name, image), ...} as tar files, with `info.json`; `output` appears whole or not."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
    try:
        temporary.chmod(0o755)
        counts = {}
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
        os.rename(temporary, output)
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


def base_family(name: str) -> str:
    """Family name without words for weight and width, so that 'Lato Light' and 'Lato' are one family."""
    words = (
        r'(?:extra|ultra|semi|demi|thin|hairline|book|regular|roman|medium|heavy|italic|oblique|slanted|'
        r'(?:extra|ultra|semi|demi)?-?(?:light|bold|black|condensed|narrow|expanded))')
    return re.sub(rf'[ _-]+{words}(?=$|[ _-])', '', ' '.join(name.split()), flags=re.IGNORECASE)


def superfamily(name: str) -> str:
    """Leading word of a family name: 'Noto Serif' -> 'noto', 'FreeSans' -> 'free', 'LMRoman10' -> 'lm'."""
    match = re.search(r'[A-Z]{2,}(?![a-z])|[^\W\d_A-Z]*[A-Z]?[^\W\d_A-Z]+', name)
    return (match.group() if match else name).lower()


def split_families(
        characters: Dict[str, int],
        fractions: Dict[str, float],
        rng: np.random.Generator,
) -> Dict[str, List[str]]:
    """Deal families out to parts, a superfamily at a time, those with most characters first so that all parts get some.

    Args:
        characters: Number of characters of every family.
        fractions: Share of the families that each part is to have; they sum to 1.
        rng: Decides among superfamilies with equally many characters.
    """
    groups = defaultdict(list)
    for name in sorted(characters):
        groups[superfamily(name)].append(name)
    order = rng.permutation(sorted(groups)).tolist()
    order.sort(key=lambda key: -max(characters[name] for name in groups[key]))
    parts, dealt = {part: [] for part in fractions}, 0
    for key in order:
        dealt += len(groups[key])
        part = max(parts, key=lambda p: fractions[p] * dealt - len(parts[p]))
        parts[part] += groups[key]
    return {part: sorted(members) for part, members in parts.items()}


def near_duplicates(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """(F, D) unit vectors -> (F,) mask of those that have a cosine above `threshold` with an earlier, kept one."""
    similar = vectors @ vectors.T > threshold
    duplicate = np.zeros(len(vectors), bool)
    for i in range(len(vectors)):
        duplicate[i] = np.any(similar[i, :i] & ~duplicate[:i])
    return duplicate


def shape_vectors(images: Sequence[Image.Image]) -> np.ndarray:
    """(n, 24 * 24) unit vectors of drawings stretched to one size; their products are normalised correlations."""
    vectors = np.stack([np.asarray(image.resize((24, 24)), np.float32).ravel() for image in images])
    vectors -= vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def draw_glyph(font: ImageFont.FreeTypeFont, char: str) -> Optional[Image.Image]:
    """The character cropped to its ink, or None where it is empty or far larger or smaller than its em."""
    side = 4 * GLYPH_SIZE
    image = Image.new('L', (side, side))
    ImageDraw.Draw(image).text((side // 3, side * 2 // 3), char, fill=255, font=font, anchor='ls')
    box = image.getbbox()
    if box is None or min(box[:2]) == 0 or max(box[2:]) == side or max(box[2] - box[0], box[3] - box[1]) < 8:
        return None
    return image.crop(box)


def load_face(family: str, path: Path) -> Optional[Face]:
    """Draw every class the font has, without those it draws like an earlier one; None if it cannot be drawn at all."""
    try:
        font = ImageFont.truetype(path, GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
        missing = draw_glyph(font, '\U0010fffd')
        glyphs = {char: draw_glyph(font, char) for char in CLASSES}
    except OSError:  # bitmap fonts of one size, faulty instructions
        return None
    missing = missing and (missing.size, missing.tobytes())
    glyphs = {c: g for c, g in glyphs.items() if g is not None and (g.size, g.tobytes()) != missing}
    if glyphs:
        vectors = shape_vectors(list(glyphs.values()))
        aspect = np.array([math.log(g.width / g.height) for g in glyphs.values()])
        alike = (vectors @ vectors.T > 0.98) & (np.abs(aspect[:, None] - aspect) < 0.1)
        keep = ~np.tril(alike, -1).any(1)
        glyphs = {c: g for (c, g), k in zip(glyphs.items(), keep) if k}
    return Face(family, path, glyphs)


def find_fonts(source: Path) -> Dict[str, Path]:
    """One file for each family below `source`, the most regular of its faces."""
    def irregularity(style, path):
        style = style.lower()
        return (
            style not in ('regular', 'book', 'roman', 'normal', 'medium'),
            any(word in style for word in ('italic', 'oblique', 'bold', 'black', 'thin', 'condensed')),
            len(style), path.as_posix())

    faces = {}
    for path in sorted(p for p in source.rglob('*') if p.suffix.lower() in ('.ttf', '.otf')):
        try:
            name, style = ImageFont.truetype(path, 16).getname()
        except OSError:
            continue
        family = base_family(name or path.stem)
        rank = (family != name,) + irregularity(style or '', path)
        faces[family] = min(faces.get(family, (rank, path)), (rank, path))
    return {family: path for family, (_, path) in sorted(faces.items())}


def select_faces(faces: Sequence[Face], legible: float = 0.7, duplicate: float = 0.95) -> List[Face]:
    """Text faces without near-duplicates, of two alike the one with more characters.

    A face is a text face if at least the share `legible` of its probe characters is closest to the mean drawing, over
    all faces, of that same character: symbols, other scripts under Latin code points and small capitals fall short.
    Faces are near-duplicates if the mean normalised correlation of their probe characters exceeds `duplicate`.
    """
    faces = sorted((f for f in faces if all(c in f.glyphs for c in PROBE)), key=lambda f: (-len(f.glyphs), f.family))
    if not faces:
        return []
    vectors = np.stack([shape_vectors([f.glyphs[c] for c in PROBE]) for f in faces])  # (F, P, D)
    means = vectors.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    nearest = np.einsum('fpd,qd->fpq', vectors, means).argmax(2)
    keep = (nearest == np.arange(len(PROBE))).mean(1) >= legible
    faces, vectors = [f for f, k in zip(faces, keep) if k], vectors[keep]
    keep = ~near_duplicates(vectors.reshape(len(faces), -1) / math.sqrt(len(PROBE)), duplicate)
    return [f for f, k in zip(faces, keep) if k]


def drop_outliers(faces: Sequence[Face], threshold: float = 0.) -> List[Face]:
    """Faces without the characters whose correlation with their mean drawing is below `threshold` (a heart for @)."""
    faces = [Face(face.family, face.path, dict(face.glyphs)) for face in faces]
    for char in CLASSES:
        owners = [face for face in faces if char in face.glyphs]
        if owners:
            vectors = shape_vectors([face.glyphs[char] for face in owners])
            mean = vectors.mean(0)
            for face, score in zip(owners, vectors @ (mean / np.linalg.norm(mean))):
                if score < threshold:
                    del face.glyphs[char]
    return faces


def render(glyph: Image.Image, size: int, rng: np.random.Generator, contrast: float = 100., noise: float = 8.):
    """A glyph, turned, stretched and placed at random, on a gradient with noise: RGB, size x size.

    The luminance of the ink is at least `contrast` (of 255) below that of both ends of the gradient: were light ink as
    likely as dark, the mean image of every class would be flat, and models would start to learn much later.
    """
    glyph = glyph.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    side, stretch = size * rng.uniform(0.65, 0.95), rng.uniform(0.8, 1.25)
    scale = side / max(glyph.width * stretch, glyph.height)
    glyph = glyph.resize((max(2, round(glyph.width * stretch * scale)), max(2, round(glyph.height * scale))))
    ink = Image.new('L', (size, size))
    ink.paste(glyph, tuple(int(rng.integers(0, size - side + 1)) for side in glyph.size))
    ink = np.asarray(ink, np.float32)[:, :, None] / 255

    while True:
        colours = rng.uniform(0, 255, (3, 3)).astype(np.float32)  # ink, two ends of the gradient
        colours[2] = np.clip(colours[1] + rng.uniform(-50, 50, 3), 0, 255)
        luminance = colours @ np.float32([0.299, 0.587, 0.114])
        if luminance[1:].min() - luminance[0] >= contrast:
            break
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size - 1) - 0.5
    ramp = (0.5 + (math.cos(angle) * x + math.sin(angle) * y) / math.sqrt(2))[:, :, None]
    image = ink * colours[0] + (1 - ink) * (ramp * colours[1] + (1 - ramp) * colours[2])
    image += rng.normal(0, rng.uniform(0, noise), (size, size, 1))
    return Image.fromarray(np.clip(np.round(image), 0, 255).astype(np.uint8))


def glyph_images(faces: Dict[str, Face], members: Sequence[str], classes: str, split: int, count: int, args):
    """`count` images of every class; all families of the split that have it are used in turn."""
    for char in classes:
        rng = np.random.default_rng([args.seed, split, ord(char)])
        families = rng.permutation([name for name in members if char in faces[name].glyphs]).tolist()
        for i in range(count):
            family = families[i % len(families)]
            slug = re.sub('[^0-9A-Za-z]+', '-', family).strip('-')
            image = render(faces[family].glyphs[char], args.size, rng)
            yield f'U+{ord(char):04X}', f'{i:04d}_{slug}', image


def make_glyphs(args) -> dict:
    source = Path(args.source or FONT_SOURCE)
    if args.size < 16 or args.images_per_class < 10 or args.min_families < 4:
        raise ValueError(
            f'--size {args.size}, --images-per-class {args.images_per_class}, --min-families {args.min_families}: '
            'must be at least 16, 10 and 4')
    with ProcessPoolExecutor(args.workers) as pool:
        fonts = find_fonts(source)
        faces = select_faces([face for face in pool.map(load_face, fonts, fonts.values(), chunksize=8) if face])
    faces = {face.family: face for face in drop_outliers(faces)}
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
            faces, members[split], classes, number, round(args.images_per_class * FRACTIONS[split]), args)
        for number, split in enumerate(SPLITS)}
    return write_set(args.output, splits, dict(
        set='glyphs', seed=args.seed, size=args.size, characters=classes, families=members,
        versions=package_versions(source, PACKAGES)))


def read_split(data_dir: str, split: str, classes: Sequence[str], limit: Optional[int] = None):
    """Images `(n, 3, S, S)` in [-1, 1] and labels of a split, every k-th image where there are more than `limit`."""
    import torch
    images, labels = [], []
    with tarfile.open(Path(data_dir) / f'{split}.tar') as tar:
        members = tar.getmembers()
        for member in members[::math.ceil(len(members) / limit) if limit else 1]:
            images.append(np.asarray(Image.open(tar.extractfile(member)).convert('RGB')))
            labels.append(classes.index(member.name.split('/')[0]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)


def check(args) -> None:
    """Train a linear model on pixels, or a small ViT, and print its top-1 on a split."""
    import timm
    import torch
    torch.manual_seed(args.seed)
    path = Path(args.data_dir) / 'info.json'
    if not path.exists():
        raise FileNotFoundError(f'--data-dir {args.data_dir} has no info.json; name a folder made by this script')
    classes = json.loads(path.read_text(encoding='utf-8'))['classes']
    images, labels = read_split(args.data_dir, 'train', classes, args.limit)
    size = images.shape[-1]
    if args.model == 'linear':
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, len(classes)))
    else:
        model = timm.models.VisionTransformer(
            img_size=size, patch_size=size // 4, embed_dim=128, depth=6, num_heads=4, num_classes=len(classes),
            class_token=False, global_pool='avg')
    steps = args.epochs * (len(labels) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1)
    for epoch in range(args.epochs):
        order = torch.randperm(len(labels))
        for batch in order[:len(labels) // args.batch_size * args.batch_size].split(args.batch_size):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f'epoch {epoch + 1}/{args.epochs}: loss of the last batch {loss.item():.3f}', flush=True)
    images, labels = read_split(args.data_dir, args.split, classes)
    model.eval()
    with torch.inference_mode():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500)))
    print(f'{args.model}: {args.split} top-1 {100 * correct / len(labels):.1f} % of {len(labels)} images')


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m experiments.data', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, make in (('fashion', make_fashion), ('digits', make_digits), ('glyphs', make_glyphs)):
        command = commands.add_parser(name)
        command.set_defaults(run=make)
        command.add_argument('--output', required=True, help='new folder for the set')
        command.add_argument('--seed', type=int, default=0)
        if name != 'digits':
            command.add_argument('--source', help='folder of the unpacked packages (default: the installed ones)')
    command.add_argument('--size', type=int, default=32, help='side of an image in pixels')
    command.add_argument('--images-per-class', type=int, default=380, help='in all three splits, 70 %% of them train')
    command.add_argument('--min-families', type=int, default=50, help='of a class in train, others their share')
    command.add_argument('--workers', type=int, default=2, help='processes that draw the fonts')
    commands.add_parser('packages', help='print the names of the font packages').set_defaults(run=None)
    command = commands.add_parser('check', help='how hard a set is')
    command.set_defaults(run=check)
    command.add_argument('--data-dir', required=True)
    command.add_argument('--model', choices=('linear', 'vit'), default='linear')
    command.add_argument('--split', choices=SPLITS[1:], default='val')
    command.add_argument('--limit', type=int, help='train on about that many images')
    command.add_argument('--epochs', type=int, default=10)
    command.add_argument('--batch-size', type=int, default=64)
    command.add_argument('--lr', type=float, default=1e-3)
    command.add_argument('--seed', type=int, default=0)
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
    if info:
        print(f'{args.output}: {len(info["classes"])} classes, images {info["images"]}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
