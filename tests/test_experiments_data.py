"""The image sets of the studies: layout, splits and their independence, without any font or package installed."""
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments import data, glyphs

MINI = Path(__file__).parent.parent / 'data' / 'fashion_mini'


def read(path):
    """{member name: image} of a tar file."""
    with tarfile.open(path) as tar:
        return {m.name: np.asarray(Image.open(tar.extractfile(m))) for m in tar.getmembers()}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    pytest.importorskip('sklearn')
    output = tmp_path_factory.mktemp('sets') / 'digits'
    assert data.main(['digits', '--output', str(output)]) == 0
    return output


def test_digits_hold_every_image_once(digits):
    from sklearn.datasets import load_digits
    splits = {split: read(digits / f'{split}.tar') for split in data.SPLITS}
    merged = {name: image for images in splits.values() for name, image in images.items()}
    assert len(merged) == sum(map(len, splits.values())) == 1797
    source = load_digits()
    for name, image in merged.items():
        label, index = name.removesuffix('.png').split('/')
        assert int(label) == source.target[int(index)]
        assert np.abs(image - source.images[int(index)] * (255 / 16)).max() <= 0.5
    assert sorted(p.name for p in digits.iterdir()) == ['info.json', 'test.tar', 'train.tar', 'val.tar']


def test_digits_are_stratified_and_counted(digits):
    info = json.loads((digits / 'info.json').read_text(encoding='utf-8'))
    counts = {split: Counter(name.split('/')[0] for name in read(digits / f'{split}.tar')) for split in data.SPLITS}
    total = sum(counts.values(), Counter())
    for split, fraction in (('val', 0.2), ('test', 0.2), ('train', 0.6)):
        assert info['images'][split] == sum(counts[split].values())
        assert all(abs(counts[split][c] - fraction * total[c]) <= 1 for c in total)


def test_same_seed_same_bytes_and_another_seed_another_split(digits, tmp_path):
    for seed in (0, 1):
        assert data.main(['digits', '--output', str(tmp_path / str(seed)), '--seed', str(seed)]) == 0
    for file in digits.iterdir():
        assert (tmp_path / '0' / file.name).read_bytes() == file.read_bytes()
    assert set(read(tmp_path / '1/test.tar')) != set(read(digits / 'test.tar'))


def test_timm_reads_the_layout(digits):
    from timm.data import create_dataset
    dataset = create_dataset('', root=str(digits), split='val.tar')
    assert dataset.reader.class_name_to_idx == {str(i): i for i in range(10)}
    assert len(dataset) == len(read(digits / 'val.tar'))


def test_an_existing_output_is_refused_and_kept(tmp_path, capsys):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / 'file').write_text('mine')
    assert data.main(['digits', '--output', str(tmp_path / 'set')]) == 2
    assert str(tmp_path / 'set') in capsys.readouterr().err
    assert (tmp_path / 'set' / 'file').read_text() == 'mine'


def photographs(root, classes=('cat', 'dog'), train=20):
    """An ImageNet-style folder of images of several shapes, each of one colour of its own."""
    value = 0
    for split, count in (('train', train), ('val', 3)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                value += 1
                Image.new('RGB', (40 + i, 30), (value, 0, 0)).save(root / split / name / f'{split}{i}.PNG')
    return root


def test_a_folder_becomes_a_set_whose_test_images_are_its_val(tmp_path):
    source, output = photographs(tmp_path / 'photographs'), tmp_path / 'set'
    assert data.main(['folder', '--source', str(source), '--output', str(output), '--size', '16']) == 0
    splits = {split: read(output / f'{split}.tar') for split in data.SPLITS}
    assert {split: len(images) for split, images in splits.items()} == dict(train=36, val=4, test=6)
    assert Counter(name.split('/')[0] for name in splits['val']) == dict(cat=2, dog=2)
    assert all(name.split('/')[1].startswith('val') for name in splits['test'])
    images = [image for split in splits.values() for image in split.values()]
    assert len({int(image[0, 0, 0]) for image in images}) == 46  # no image is lost or in two splits
    assert all(image.shape == (16, 16, 3) for image in images)


def test_a_folder_without_images_or_with_too_few_is_refused(tmp_path, capsys):
    source = photographs(tmp_path / 'photographs', train=3)
    assert data.main(['folder', '--source', str(source), '--output', str(tmp_path / 'set')]) == 2
    assert 'train/cat has too few images for a val split' in capsys.readouterr().err
    assert data.main(['folder', '--source', str(source / 'train'), '--output', str(tmp_path / 'set')]) == 2
    assert 'has no images train/CLASS' in capsys.readouterr().err
    assert not (tmp_path / 'set').exists()


def test_subset_is_even_over_classes_and_can_keep_some(tmp_path):
    def counts(path):
        with tarfile.open(path) as tar:
            names = [member.name.split('/')[0] for member in tar]
        return {name: names.count(name) for name in names}

    assert set(counts(data.subset(MINI / 'val.tar', 50, tmp_path / 'a.tar')).values()) == {5}
    with pytest.raises(ValueError, match='100 images of class'):
        data.subset(MINI / 'val.tar', 1001, tmp_path / 'd.tar')
    assert sorted(counts(data.subset(MINI / 'val.tar', 23, tmp_path / 'e.tar')).values()) == [2] * 7 + [3] * 3
    some = sorted(counts(MINI / 'val.tar'))[1:4]
    assert counts(data.subset(MINI / 'val.tar', 9, tmp_path / 'b.tar', some)) == dict.fromkeys(some, 3)
    assert counts(data.subset(MINI / 'val.tar', None, tmp_path / 'c.tar', some[:1])) == {some[0]: 100}


@pytest.mark.parametrize('name', ['fashion', 'glyphs'])
def test_missing_files_are_answered_with_the_apt_line(name, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    assert data.main([name, '--source', str(tmp_path / 'empty'), '--output', str(tmp_path / 'set')]) == 2
    error = capsys.readouterr().err
    assert 'apt-get download' in error and str(tmp_path / 'empty') in error and error.count('\n') == 1
    assert [p.name for p in tmp_path.iterdir()] == ['empty']


def test_a_failed_write_leaves_nothing(tmp_path):
    def images():
        yield 'a', '0', Image.new('L', (4, 4))
        raise RuntimeError('disk full')

    with pytest.raises(RuntimeError):
        data.write_set(str(tmp_path / 'set'), {'train': images()}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name,expected', [
    ('Noto Sans Display', 'noto'), ('Noto Serif', 'noto'), ('DejaVu Sans Mono', 'deja'), ('DejaVu Serif', 'deja'),
    ('FreeSans', 'free'), ('FreeMono', 'free'), ('LMRoman10', 'lm'), ('GFS Didot', 'gfs'), ('mononoki', 'mononoki'),
    ('18 Holes BRK', 'holes'), ('3270', '3270'),
])
def test_superfamily_is_the_leading_word(name, expected):
    assert glyphs.superfamily(name) == expected


def test_weights_and_widths_belong_to_one_family():
    names = ('Lato', 'Lato Light', 'Lato Semibold', 'Lato Extra Condensed', 'Lato Black Italic')
    assert {glyphs.base_family(name) for name in names} == {'Lato'}
    assert glyphs.base_family('Bold Street') == 'Bold Street'


def test_split_keeps_superfamilies_together_and_deals_out_coverage():
    rng = np.random.default_rng(0)
    characters = {f'{chr(65 + i // 26)}{chr(97 + i % 26)}x {kind}': 250 if i % 4 == 0 else 80
                  for i in range(200) for kind in ('Sans', 'Serif', 'Mono')[:1 + i % 3]}
    parts = glyphs.split_families(characters, data.FRACTIONS, rng)
    assert sorted(sum(parts.values(), [])) == sorted(characters)
    groups = [{glyphs.superfamily(name) for name in members} for members in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    rich = sum(n == 250 for n in characters.values())
    for part, fraction in data.FRACTIONS.items():
        assert abs(len(parts[part]) - fraction * len(characters)) <= 3
        assert abs(sum(characters[name] == 250 for name in parts[part]) - fraction * rich) <= 3


def test_near_duplicates_keeps_the_first_of_each_cluster():
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(6, 400))
    vectors = np.concatenate([distinct, distinct[[4, 1, 1]] + 0.05 * rng.normal(size=(3, 400))])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert glyphs.near_duplicates(vectors, 0.97).tolist() == [False] * 6 + [True] * 3


def synthetic_face(family, rng, noise):
    """A face whose characters are fixed random blots, with `noise` of its own."""
    drawn = {}
    for char in glyphs.PROBE:
        blot = np.random.default_rng(ord(char)).uniform(0, 255, (6, 6)) + noise * rng.normal(size=(6, 6))
        drawn[char] = Image.fromarray(np.clip(blot, 0, 255).astype(np.uint8)).resize((30, 40))
    return glyphs.Face(family, None, drawn)


def test_select_drops_copies_and_faces_of_other_symbols():
    rng = np.random.default_rng(0)
    faces = [synthetic_face(f'Design {i}', rng, 80) for i in range(12)]
    copy = glyphs.Face('Copy', None, {c: g.resize((60, 80)) for c, g in faces[3].glyphs.items()})
    symbols = glyphs.Face('Symbols', None, dict(zip(glyphs.PROBE, list(faces[5].glyphs.values())[::-1])))
    partial = glyphs.Face('Partial', None, dict(list(faces[7].glyphs.items())[:-1]))
    kept = {face.family for face in glyphs.select_faces([*faces, copy, symbols, partial])}
    assert kept == {f'Design {i}' for i in range(12) if i != 3} | {'Copy'}  # 'Copy' comes first by name


def test_render_is_reproducible_and_keeps_its_contrast():
    glyph = Image.new('L', (40, 60))
    ImageDraw.Draw(glyph).rectangle((10, 5, 30, 55), fill=255)
    for seed in range(20):
        image = glyphs.render(glyph, 32, np.random.default_rng(seed), contrast=80., noise=0.)
        assert image.size == (32, 32) and image.mode == 'RGB'
        again = glyphs.render(glyph, 32, np.random.default_rng(seed), contrast=80., noise=0.)
        assert image.tobytes() == again.tobytes()
        assert np.ptp(np.asarray(image.convert('L'))) >= 70


def test_classes_are_distinct_and_include_the_probe():
    assert len(set(glyphs.CLASSES)) == len(glyphs.CLASSES) >= 200
    assert set(glyphs.PROBE) <= set(glyphs.CLASSES)
    assert len(set(glyphs.PACKAGES)) == len(glyphs.PACKAGES) and all(p.startswith('fonts-') for p in glyphs.PACKAGES)
