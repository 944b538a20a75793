"""Runs of `train.py` and `convert.py`: each once, several at a time, each with one line of results.

A study is a list of stages, a stage a list of `Run`s that may go on at once. Results are JSON lines in
`experiments/results/STUDY.jsonl` with the arguments, scores, versions and machine; a run whose line is there is not
done again, so a study that was stopped goes on where it was. The test set is read once a run, at its end.
"""
import contextlib
import json
import os
import platform
import shutil
import tarfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, List, Sequence

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
    """
    name: str
    flags: Dict[str, Any]
    labels: Dict[str, Any] = field(default_factory=dict)
    script: str = 'train'
    source: str = ''


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
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def machine() -> Dict[str, Any]:
    """Where a run took place."""
    import timm
    import torch

    model = ''
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        model = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), '')
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        cpu=model, threads=torch.get_num_threads(), gpu=gpu, python=platform.python_version(),
        torch=str(torch.__version__), timm=timm.__version__)


def score(folder: Path, split: Path, batch_size: int = 500) -> Dict[str, float]:
    """Top-1 (per cent), negative log-likelihood and expected calibration error (15 bins) of a model folder."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader

    import ewa

    model = ewa.load(folder).eval()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model.to(device)
    config = timm.data.resolve_model_data_config(model)
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    loader = create_loader(
        create_dataset('', root=str(split), input_img_mode=mode), config['input_size'], batch_size,
        use_prefetcher=False, mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'],
        interpolation=config['interpolation'], num_workers=0, persistent_workers=False)
    with torch.no_grad():
        pairs = [(model(images.to(device)).float().cpu(), target) for images, target in loader]
    logits, target = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == target).float()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(right[bins == b].sum() - confidence[bins == b].sum()).abs().item() for b in range(15)]
    return dict(
        top1=100 * right.mean().item(), nll=torch.nn.functional.cross_entropy(logits, target).item(),
        ece=sum(gaps) / len(target))


def execute(study: str, run: Run, work: Path, test: Path) -> Dict[str, Any]:
    """Do one run in this process and return its line of results."""
    import torch

    torch.set_num_threads(1)
    output = work / study / run.name
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.parent / f'{run.name}.log'
    started = time.time()
    # where the folders were is nobody's business
    flags = json.loads(json.dumps(run.flags).replace(str(work), 'WORK').replace(str(test.parent), 'DATA'))
    line = dict(name=run.name, labels=run.labels, script=run.script, flags=flags)
    with open(log, 'w') as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        if run.script == 'train':
            from train import main
            main(arguments(dict(run.flags, output=work / study, experiment=run.name)))
            import csv
            with open(output / 'summary.csv') as table:
                rows = list(csv.DictReader(table))
            line['last'] = {k: float(v) for k, v in rows[-1].items() if v}
            columns = ('epoch', 'eval_top1', 'eval_loss', 'train_seconds')
            line['curve'] = [[float(row[column]) for column in columns] for row in rows]
            shutil.rmtree(output / 'checkpoints')
            shutil.rmtree(output / 'best')
            folder = output / 'last'
        else:
            from convert import main
            main([run.source, *arguments(dict(run.flags, output=output))])
            folder = output
        line['test'] = score(folder, test)
        if run.script == 'train' and (folder / 'ema.safetensors').exists():
            shutil.move(folder / 'ema.safetensors', folder / 'model.safetensors')
            line['test_ema'] = score(folder, test)
        if run.script == 'train':
            import ewa
            line['experts'] = ewa.diagnose(ewa.load(folder), align=False)
            for record in line['experts']:
                record.pop('similarity', None)
    return dict(line, seconds=time.time() - started, machine=machine())


def _work(study: str, run: Run, work: Path, test: Path) -> Dict[str, Any]:
    try:
        return execute(study, run, work, test)
    except (Exception, SystemExit) as e:
        raise RuntimeError(f'{run.name} failed: {e!r}\n{traceback.format_exc()[-1500:]}') from None


def run_stage(study: str, runs: Sequence[Run], work: Path, test: Path, jobs: int) -> None:
    """Do the runs of a stage that have no line of results yet, `jobs` at a time."""
    done = {line['name'] for line in read_results(study)}
    todo = [run for run in runs if run.name not in done]
    print(f'{study}: {len(runs) - len(todo)} of {len(runs)} runs are done', flush=True)
    RESULTS.mkdir(exist_ok=True)
    os.environ['OMP_NUM_THREADS'] = '1'
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) as pool:
        futures = {pool.submit(_work, study, run, work, test): run for run in todo}
        for future in as_completed(futures):
            line = future.result()
            with open(RESULTS / f'{study}.jsonl', 'a') as f:
                f.write(json.dumps(line) + '\n')
            print(f'{line["name"]}: test top-1 {line["test"]["top1"]:.2f}, {line["seconds"]:.0f} s', flush=True)


def subset(source: Path, count: int, target: Path) -> Path:
    """The first `count` images of a tar, evenly over classes, as another tar; made once."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        classes: Dict[str, List] = {}
        for member in members:
            classes.setdefault(os.path.dirname(member.name), []).append(member)
        each = -(-count // len(classes))
        new = target.with_suffix('.new')
        with tarfile.open(new, 'w') as out:
            for group in classes.values():
                for member in group[:each]:
                    out.addfile(member, tar.extractfile(member))
    os.rename(new, target)
    return target
