import base64
import io
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

import ewa
from ewa.diagnostics import advise
from ewa.report import write_report
from gated import gated, hide

VOID = ('meta', 'img')
ERRORS = {'refit': {'blocks.1.mlp': dict(fitted=.125, held_out=.25), 'blocks.3.mlp': dict(fitted=.0625)}}
HOSTILE = '<script>alert("x")</script> & | `'


class Page(HTMLParser):
    """What a browser would make of a page: text, attributes and images; tags that are not closed in order fail."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.attributes, self.images, self.tags = [], [], [], [], []
        self.feed(path.read_text(encoding='utf-8'))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == 'img':
            head, data = dict(attrs)['src'].split(',')
            assert head == 'data:image/png;base64'
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def records(tiny, images):
    model = gated(tiny(), top_k=1, layers=[1, 3])
    hide(model.blocks[1].mlp, 2)
    return ewa.diagnose(model, [images])


@pytest.fixture
def folder(records, tmp_path):
    write_report(
        records, tmp_path / 'new' / 'report', f'Of {HOSTILE}', {'source': HOSTILE}, [('average', '81.25', HOSTILE)],
        ERRORS, f'python convert.py {HOSTILE}')
    return tmp_path / 'new' / 'report'


def numbers(records):
    return [f'{record[name]:.4f}' for record in records
            for name in ('distance', 'cosine', 'cosine_aligned', 'entropy', 'change')]


def test_the_page_needs_nothing_but_itself(folder, records):
    page = Page(folder / 'report.html')
    assert [image.format for image in page.images] == ['PNG'] * 3
    assert all(min(image.size) > 200 and image.convert('RGB').resize((64, 64)).getcolors(9) is None
               for image in page.images)
    assert not {'script', 'link', 'iframe', 'object'} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith('on') or name == 'href']
    text = (folder / 'report.html').read_text(encoding='utf-8')
    assert 'http:' not in text and 'https:' not in text and 'url(' not in text and '@import' not in text


def test_the_page_says_what_it_was_given(folder, records):
    texts = Page(folder / 'report.html').texts
    assert {f'Of {HOSTILE}', HOSTILE, '81.25', f'python convert.py {HOSTILE}', '0.1250', '0.2500', '0.0625',
            *numbers(records), *advise(records)} <= set(texts)
    assert advise(records)


def test_markdown_has_the_same_tables_and_shows_the_figures_beside_it(folder, records):
    page = (folder / 'report.md').read_text(encoding='utf-8')
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in page.splitlines() if line[:1] == '|']
    assert len({len(row) for row in rows if row[:1] and row[0].startswith('blocks')}) == 2  # layers, errors
    cells = sum(rows, [])
    assert {'81.25', '0.1250', *numbers(records)} <= set(cells)
    assert all(warning in page for warning in advise(records))
    assert sorted(path.name for path in folder.iterdir()) == [
        'error.png', 'report.html', 'report.md', 'similarity.png', 'usage.png']
    for name in ('error', 'similarity', 'usage'):
        assert f'![{name}]({name}.png)' in page


def test_what_was_not_measured_has_no_section(tiny, tmp_path):
    write_report(ewa.diagnose(ewa.to_moe(tiny(), init='independent')), tmp_path / 'random', 'x')
    page = Page(tmp_path / 'random' / 'report.html')
    assert len(page.images) == 1 and not {'entropy', 'Accuracy', 'Use of experts', 'Made by'} & set(page.texts)
    write_report([], tmp_path / 'nothing', 'nothing')
    assert sorted(path.name for path in (tmp_path / 'nothing').iterdir()) == ['report.html', 'report.md']


@pytest.mark.slow
def test_a_browser_shows_the_page(folder):
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if browser is None:
        pytest.skip('no Chromium is installed')
    (folder / 'page.html').write_text(
        (folder / 'report.html').read_text(encoding='utf-8').replace('</body>', """<script>
        document.title = [...document.images].filter(i => i.complete && i.naturalWidth > 300).length + ' images, '
            + document.querySelectorAll('td').length + ' cells, '
            + (document.documentElement.scrollWidth <= window.innerWidth)</script></body>"""), encoding='utf-8')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=900,2000',
             f'--user-data-dir={folder / "me"}']
    page = Page(folder / 'report.html')
    found = subprocess.run([browser, *flags, '--dump-dom', f'file://{folder}/page.html'], capture_output=True,
                           text=True, timeout=120)
    assert f'<title>3 images, {page.tags.count("td")} cells, true</title>' in found.stdout
    subprocess.run([browser, *flags, f'--screenshot={folder / "shot.png"}', f'file://{folder}/report.html'],
                   capture_output=True, timeout=120, check=True)
    with Image.open(folder / 'shot.png') as shot:
        assert shot.size == (900, 2000) and len(shot.convert('RGB').getcolors(1 << 24)) > 500
