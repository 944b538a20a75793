"""Every benchmark runs and prints its tables; what it measures is no matter of a test."""
import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import RUNS, sections
from benchmarks.common import interleave, ratio

ROOT = Path(__file__).parents[1]
TINY = {
    'step': '--model small --batch-size 2 --layers every:2 --rounds 1',
    'pull': '--model small --experts 2 --rounds 1',
    'partition': '--width 16 --images 4 --tokens 5 --rounds 1',
    'memory': '--model small --batch-size 2 --experts 2 --layers all --forms mean',
    'processes': '--model small --batch-size 2 --forms',
    'convert': '--model small --experts 2',
    'refit': '--model test_vit --images 32 --experts 2',
    'end_to_end': '--model test_vit --images 20 --batch-size 10 --workers 0 --rounds 1',
    'inference': '--model small --batch-size 2 --rounds 1 --ways eager',
    'scale': '--experts 2 --factors 2 --width 24 --image-size 16 --batch-size 2 --rounds 1',
}


def test_every_benchmark_is_run_for_every_device_and_stands_in_the_readme():
    scripts = {path.stem for path in (ROOT / 'benchmarks').glob('*.py')}
    apart = {'__init__', '__main__', 'common', 'coverage', 'load_released'}
    assert set(TINY) == scripts - apart
    assert all(set(runs) == set(TINY) for runs in RUNS.values())
    assert set(re.findall(r'(?m)^\| `(\w+)` \|', (ROOT / 'benchmarks/README.md').read_text())) == set(TINY)


def test_functions_take_turns_and_short_ones_are_repeated():
    calls = []
    times = interleave({name: lambda name=name: calls.append(name) for name in 'ab'}, rounds=2, warmup=1)
    repeat = (len(calls) - 2) // 4
    assert repeat > 1 and calls == ['a', 'b', *'a' * repeat, *'b' * 2 * repeat, *'a' * repeat]
    assert {name: len(values) for name, values in times.items()} == {'a': 2, 'b': 2}
    assert ratio({'x': [2., 9., 8.], 'y': [1., 1., 2.]}, 'x', 'y') == 4.


def test_a_file_of_results_is_read_by_script(tmp_path):
    path = tmp_path / 'results.md'
    assert sections(path) == {}
    path.write_text('# Title\n\n## step.py\n`a`\n\n| 1 |\n\n## pull.py\n`b`\n')
    assert sections(path) == {'step': '\n`a`\n\n| 1 |\n\n', 'pull': '\n`b`\n'}


@pytest.mark.slow
@pytest.mark.parametrize('script', TINY)
def test_a_benchmark_prints_tables(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, 'argv', [script, *TINY[script].split()])
    importlib.import_module(f'benchmarks.{script}').main()
    tables = re.findall(r'(?m)^\| (.*) \|\n\|(?:---\|)+\n((?:\| .* \|\n)+)', capfd.readouterr().out)
    assert tables
    for head, rows in tables:
        assert all(row.count(' | ') == head.count(' | ') for row in rows.splitlines())
