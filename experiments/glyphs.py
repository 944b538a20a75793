"""Characters as many fonts draw them: find fonts, draw their glyphs, drop what is alike, place them on images.

Arrays: `F` font families, `C` classes, `P` probe characters, `S` side of an image in pixels.
"""
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


class Face(NamedTuple):
    """One font family: its drawings are cropped to the ink, 8-bit coverage."""
    family: str
    path: Path
    glyphs: Dict[str, Image.Image]


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
    parts: Dict[str, List[str]] = {part: [] for part in fractions}
    dealt = 0
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
        drawn = {char: draw_glyph(font, char) for char in CLASSES}
    except OSError:  # bitmap fonts of one size, faulty instructions
        return None
    empty = missing and (missing.size, missing.tobytes())
    glyphs = {c: g for c, g in drawn.items() if g is not None and (g.size, g.tobytes()) != empty}
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

    faces: Dict[str, Tuple[Tuple, Path]] = {}
    for path in sorted(p for p in source.rglob('*') if p.suffix.lower() in ('.ttf', '.otf')):
        try:
            name, style = ImageFont.truetype(path, 16).getname()
        except OSError:
            continue
        family = base_family(name or path.stem)
        rank = (family != name, *irregularity(style or '', path))
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
    canvas = Image.new('L', (size, size))
    canvas.paste(glyph, (int(rng.integers(0, size - glyph.width + 1)), int(rng.integers(0, size - glyph.height + 1))))
    ink = np.asarray(canvas, np.float32)[:, :, None] / 255

    while True:
        colours = rng.uniform(0, 255, (3, 3)).astype(np.float32)  # ink, two ends of the gradient
        colours[2] = np.clip(colours[1] + rng.uniform(-50, 50, 3), 0, 255)
        luminance = colours @ np.array([0.299, 0.587, 0.114], np.float32)
        if luminance[1:].min() - luminance[0] >= contrast:
            break
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size - 1) - 0.5
    ramp = (0.5 + (math.cos(angle) * x + math.sin(angle) * y) / math.sqrt(2))[:, :, None]
    image = ink * colours[0] + (1 - ink) * (ramp * colours[1] + (1 - ramp) * colours[2])
    image += rng.normal(0, rng.uniform(0, noise), (size, size, 1))
    return Image.fromarray(np.clip(np.round(image), 0, 255).astype(np.uint8))


def glyph_images(
        faces: Dict[str, Face],
        members: Sequence[str],
        classes: str,
        count: int,
        size: int,
        seed: Sequence[int],
) -> Iterator[Tuple[str, str, Image.Image]]:
    """Class, name and image, `count` times for every class; all `members` that have it are used in turn."""
    for char in classes:
        rng = np.random.default_rng([*seed, ord(char)])
        families = rng.permutation([name for name in members if char in faces[name].glyphs]).tolist()
        for i in range(count):
            family = families[i % len(families)]
            slug = re.sub('[^0-9A-Za-z]+', '-', family).strip('-')
            image = render(faces[family].glyphs[char], size, rng)
            yield f'U+{ord(char):04X}', f'{i:04d}_{slug}', image
