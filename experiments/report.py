"""The page of each results file: `experiments/results/NAME.md`, made from `NAME.jsonl` and the study's file alone."""
from pathlib import Path

from .runner import RESULTS, read_results
from .studies import STUDIES

SETUP = """
Small studies on two CPU cores. Unless it says otherwise below, the model is a ViT of width 64, 4 blocks, 4 heads on 16
patches, trained with AdamW at batch size 100, one epoch of warm-up and a cosine decay, without augmentation. EWA: 4
experts in every block that start as copies of the dense FFN, constant share rate 0.001 ("no pull": 0, averaged at the
end; "full pull": (E-1)/E = 0.75, which makes the experts equal after each step).

A seed sets initial weights and the order of batches; all variants of a seed start from the same dense weights (with
independent experts: the first one of each layer) and see the same batches. Training subsets are the first images of
each class, the same for all seeds, so standard errors speak of seeds on one fixed set. The weights of the last epoch
are scored once, on the test set. NLL: mean negative log-likelihood. ECE: expected calibration error in 15 bins.
Differences "to dense" are paired over equal seeds. Runs were made with two versions of torch and two kernels of
attention (torch's fused one with 2.15, timm's plain one with 2.14); the last line names the versions. Pairs are of one
such kind unless it says otherwise below.
"""
SETS = dict(
    fashion="""
`fashion` is Fashion-MNIST, 5,000 of its training images held out for choices; the test set is the official one.
""",
    glyphs="""
`glyphs` are 271 characters in the fonts of Debian's packages, 32x32, read as grey, with test fonts that training never
saw.
""")


def page(results: str) -> str:
    """The Markdown of one results file, whole: set-up, tables, and what we read in them."""
    study_name, _, name = results.partition('-')
    study, lines = STUDIES[study_name], read_results(results)
    notes = study.notes.get(name)
    data = next((text for key, text in SETS.items() if name.startswith(key)), '')
    parts = [
        f'<!-- made by `python -m experiments report` from {results}.jsonl and studies/{study_name}.py: edit that -->',
        f'# {study_name}: {notes.title if notes else name}',
        study.question,
        'All answers on one page: [results](../../docs/results.md).',
        '## Set-up', SETUP, data, study.setup, notes.setup if notes else '',
        '## Tables', study.tables(lines, name)]
    if notes:
        parts += ['## What we read in it', notes.reading]
    return '\n\n'.join(part.strip() for part in parts if part) + '\n'


def write(folder: Path = RESULTS, figures: bool = True) -> None:
    """Write the page of every results file into a folder, and the figures in it.

    Pages are the same to the byte each time. Figures are so with one version of matplotlib only.
    """
    for path in sorted(RESULTS.glob('*.jsonl')):
        study_name, _, name = path.stem.partition('-')
        study = STUDIES[study_name]
        if name in study.raw:
            print(f'{path.stem}: an earlier setting, raw lines only')
            continue
        (folder / f'{path.stem}.md').write_text(page(path.stem), encoding='utf-8')
        lines = read_results(path.stem)
        for what, figure in study.figures(lines).items() if figures else ():
            figure.savefig(folder / f'{path.stem}-{what}.png', dpi=110, metadata={'Software': None})
        print(f'{path.stem}: {len(lines)} runs')
