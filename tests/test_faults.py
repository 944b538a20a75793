import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_damage_done_on_purpose_costs_nothing():
    done = subprocess.run(
        [sys.executable, '-m', 'tests.faults', '--short'], cwd=Path(__file__).parents[1], capture_output=True,
        text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout
    assert [line.split(':')[0] for line in done.stdout.splitlines()] == ['mutations', 'inputs', 'kills', 'disk']
