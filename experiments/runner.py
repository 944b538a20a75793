"""Runs of `train.py` and `convert.py`: each once, several at a time, each with one line of results.

A study is a list of stages, a stage a list of `Run`s that may go on at once. Results are JSON lines in
`experiments/results/STUDY.jsonl` with the arguments, scores, versions and machine; a run whose line is there is not
done again, so a study that was stopped goes on where it was. The test set is read once a run, at its end.
"""
import argparse
import contextlib
import csv
import json
import os
import platform
import shutil
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, List, Sequence

import accelerate
import timm
import torch

import convert
import ewa
import train
from ewa.data import open_dataset

from .baselines import baseline
from .scoring import Memory, course, score

RESULTS = Path(__file__).parent / 'results'


@dataclass(frozen=True)
class Run:
    """One training or one conversion.

    Args:
        name: Unique in its study; also the folder of its output.
        flags: Flags of the script, without dashes; True for a flag without value.
        labels: What the tables group by, e.g. variant and seed.
        script: `'train'` or `'convert'`.
        source: For `'convert'`: the model folder to convert.
        baseline: What takes the place of EWA's layers or pull, see `baselines.baseline`.
    """
    name: str
    flags: Dict[str, Any]
    labels: Dict[str, Any] = field(default_factory=dict)
    script: str = 'train'
    source: str = ''
    baseline: str = ''


def arguments(flags: Dict[str, Any]) -> List[str]:
    """Flags as a command line."""
    line = []
    for key, value in flags.items():
        if value is None or value is False:
            continue
        line.append(f'--{key}')
        if isinstance(value, dict):
            line += [f'{k}={v}' for k, v in value.items()]
        elif value is not True:
            line += [str(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return line


def read_results(study: str) -> List[Dict[str, Any]]:
    """The lines of a study's results, oldest first."""
    path = RESULTS / f'{study}.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n')]  # the last may have been cut off


def machine() -> Dict[str, Any]:
    """Where a run took place."""
    model = ''
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        model = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), '')
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        cpu=model, threads=torch.get_num_threads(), gpu=gpu, python=platform.python_version(),
        torch=str(torch.__version__), timm=timm.__version__, accelerate=accelerate.__version__, ewa=ewa.__version__)


def record(run: Run, work: Path) -> Dict[str, Any]:
    """What is written down of a run before it is done. Paths of the machine are not recorded."""
    flags = json.dumps(run.flags).replace(str(work), 'WORK').replace(run.flags['data-dir'], 'DATA')
    line = dict(name=run.name, labels=run.labels, script=run.script, flags=json.loads(flags))
    if run.baseline:
        line['baseline'] = run.baseline
    return line


def remembered(args: argparse.Namespace, split: str, **kwargs) -> Memory:
    """The data set of a script that opens each image once a process."""
    return Memory(open_dataset(args, split, **kwargs), str(Path(args.data_dir) / split))


def execute(study: str, run: Run, work: Path) -> Dict[str, Any]:
    """Do one run in this process and return its line of results."""
    torch.set_num_threads(1)
    output = work / study / run.name
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.parent / f'{run.name}.log'
    started = time.time()
    test = Path(run.flags['data-dir']) / 'test.tar'
    line = record(run, work)
    flags, seams = baseline(run.baseline)
    if run.flags.get('no-aug') and not run.flags.get('workers'):
        seams['open_dataset'] = remembered
    with open(log, 'w') as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        if run.script == 'train':
            train.main(arguments(dict(run.flags, **flags, output=work / study, experiment=run.name)), **seams)
            with open(output / 'summary.csv') as table:
                rows = list(csv.DictReader(table))
            line['last'] = {k: float(v) for k, v in rows[-1].items() if v}
            columns = ('epoch', 'eval_top1', 'eval_loss', 'train_seconds')
            line['curve'] = [[round(float(row[column]), 4) for column in columns] for row in rows]
            shutil.rmtree(output / 'checkpoints')
            shutil.rmtree(output / 'best')
            folder = output / 'last'
            split = Path(run.flags['data-dir']) / run.flags['train-split']
            line.update(score(folder, test, split if split.is_file() else None))
            if (folder / 'ema.safetensors').exists():
                shutil.move(folder / 'ema.safetensors', folder / 'model.safetensors')
                line['test_ema'] = score(folder, test)['test']
            line['experts'] = course(output)
        else:
            convert.main([run.source, *arguments(dict(run.flags, output=output))])
            made = json.loads((output / 'config.json').read_text(encoding='utf-8'))['ewa']
            line['conversion'] = {key: made[key] for key in ('calibration_tokens', 'error', 'seconds') if key in made}
            line.update(score(output, test))
    return dict(line, seconds=time.time() - started, machine=machine())


def _work(study: str, run: Run, work: Path) -> Dict[str, Any]:
    try:
        return execute(study, run, work)
    except (Exception, SystemExit) as e:
        raise RuntimeError(f'{run.name} failed: {e!r}\n{traceback.format_exc()[-1500:]}') from None


def run_stage(study: str, runs: Sequence[Run], work: Path, jobs: int) -> None:
    """Do the runs of a stage that have no line of results yet, `jobs` at a time.

    Raises:
        ValueError: A line of results was made with other flags than the run of that name has now.
        RuntimeError: Runs failed; the others are done.
    """
    done = {line['name']: line for line in read_results(study)}
    for run in (run for run in runs if run.name in done):
        old, new = done[run.name]['flags'], record(run, work)['flags']
        other = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if other:
            raise ValueError(
                f'{RESULTS / study}.jsonl has a run {run.name} with other flags ({", ".join(other)}): move '
                f'that file away to do the study anew.')
    todo = [run for run in runs if run.name not in done]
    print(f'{study}: {len(runs) - len(todo)} of {len(runs)} runs are done', flush=True)
    RESULTS.mkdir(exist_ok=True)
    # what the runs inherit: one thread each, no page faults for each large tensor, on CPUs the faster attention
    os.environ.update(OMP_NUM_THREADS='1', MALLOC_MMAP_THRESHOLD_='2000000000', MALLOC_TRIM_THRESHOLD_='4000000000')
    if not torch.cuda.is_available():
        os.environ['TIMM_FUSED_ATTN'] = '0'
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) as pool:
        try:
            for future in as_completed([pool.submit(_work, study, run, work) for run in todo]):
                try:
                    line = future.result()
                except RuntimeError as e:
                    failed.append(str(e))
                    print(e, flush=True)
                    continue
                with open(RESULTS / f'{study}.jsonl', 'a') as f:
                    f.write(json.dumps(line) + '\n')
                print(f'{line["name"]}: test top-1 {line["test"]["top1"]:.2f}, {line["seconds"]:.0f} s', flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise RuntimeError(f'{len(failed)} of {len(todo)} runs failed, the first: {failed[0]}')
