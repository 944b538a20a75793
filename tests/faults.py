"""What goes wrong around the scripts, done to them on purpose and counted: `python -m tests.faults [--short]`.

Mutations: files that the scripts read (model folders, checkpoints, bare weights, recipes) are damaged, byte by byte and
entry by entry. Inputs: command lines that can't be right. Kills: training that is killed at a random moment and resumed
must end as it would have. Disk: files that can't grow beyond a limit.

Each case is counted as `served` (exit code 0), `refused` (one line, exit code 2, nothing written) or one of the faults:
`traceback`, `partial` (an output after a failure), `many lines`, `lost` (a result that was there is gone or another).
"""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from runs import FLAGS, ROOT, files, make_folder, reset, run_convert, run_train, summary  # noqa: E402

FAULTS = ('traceback', 'partial', 'many lines', 'lost')


def outcome(call, written=()):
    """How a call of a script ends, and what it said."""
    before = {path: files(path) if path.is_dir() else None for path in written}
    err = io.StringIO()
    reset()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            call()
        return 'served', ''
    except SystemExit as e:
        lines = err.getvalue().strip().splitlines()
        said = lines[-1] if lines else ''
        if e.code == 2:
            if any((files(path) if path.is_dir() else None) != state for path, state in before.items()):
                return 'partial', said
            ours = [line for line in lines if ': error: ' in line]
            return ('refused', said) if len(ours) == 1 and ours[0] == said else ('many lines', err.getvalue())
        return 'served' if not e.code else 'refused', said
    except BaseException:
        return 'traceback', traceback.format_exc()


def damage(path, rng):
    """Damage a file in one of the ways that disks, transfers and editors do; returns in which."""
    data = path.read_bytes()
    how = rng.choice(('bytes', 'cut', 'empty', 'gone', 'text', 'json', 'json'))
    if how == 'json' and path.suffix != '.json':
        how = 'header' if path.suffix == '.safetensors' else 'bytes'
    if how == 'gone':
        path.unlink()
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'cut':
        path.write_bytes(data[:rng.randrange(len(data))] if data else b'')
    elif how == 'text':
        path.write_text('<html>404 Not Found</html>\n')
    elif how == 'json':
        entries = json.loads(data)
        holder = entries
        while True:  # an entry at any depth
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < .4:
                break
            holder = holder[key]
        if rng.random() < .3 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = rng.choice((None, True, -1, 10 ** 9, 1.5, float('nan'), '', 'x', [], {}, [1], {'a': 1}))
        path.write_text(json.dumps(entries))
        how = f'json {key}'
    elif how == 'header':
        length = int.from_bytes(data[:8], 'little')
        header = bytearray(data[:8 + length])
        for _ in range(rng.randrange(1, 4)):
            header[rng.randrange(len(header))] = rng.randrange(256)
        path.write_bytes(bytes(header) + data[8 + length:])
    else:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
    return f'{path.name}: {how}'


def mutations(count, rng, work, run, folder, show):
    """Damaged files under `convert.py` and `train.py`."""
    counts = Counter()
    checkpoint = sorted((run / 'checkpoints').iterdir())[-1].name
    for i in range(count):
        root, out = work / f'mutation{i}', work / f'out{i}'
        shutil.copytree(run, root)
        kind = ('folder', 'checkpoint', 'bare', 'resume', 'start', 'recipe')[i % 6]
        if kind == 'folder':
            target, call = root / 'best', lambda: run_convert(root / 'best', '--output', out)
        elif kind == 'checkpoint':
            target = root / 'checkpoints' / checkpoint
            call = lambda: run_convert(root / 'checkpoints' / checkpoint, '--output', out)  # noqa: E731
        elif kind == 'bare':
            target = root / 'last' / 'model.safetensors'
            call = lambda: run_convert(  # noqa: E731
                target, '--output', out, '--model', 'vit_ewa', '--img-size', 28, '--in-chans', 1, '--model-kwargs',
                'host=vit_tiny_patch16_224', 'patch_size=7', 'embed_dim=32', 'depth=2', 'num_heads=2')
        elif kind == 'resume':
            target = root / 'checkpoints' / checkpoint
            call = lambda: run_train(  # noqa: E731
                '--data-dir', folder, '--output', work, '--experiment', root.name, '--resume', '--epochs', 2)
        elif kind == 'start':
            target = root / 'best'
            call = lambda: run_train(  # noqa: E731
                '--data-dir', folder, '--output', work, '--experiment', out.name, '--epochs', 1,
                '--initial-checkpoint', root / 'best')
        else:
            target = root / 'args.yaml'
            call = lambda: run_train(  # noqa: E731
                '-c', target, '--data-dir', folder, '--output', work, '--experiment', out.name, '--epochs', 1)
        path = target if target.is_file() else rng.choice(sorted(p for p in target.iterdir() if p.is_file()))
        how = f'{kind}: {damage(path, rng)}'
        kept = {p: p.read_bytes() for p in (root / 'best').iterdir()} if kind == 'resume' else {}
        ended, said = outcome(call, [out])
        if any(not p.exists() or p.read_bytes() != data for p, data in kept.items()) and ended != 'served':
            ended = 'lost'
        counts[ended] += 1
        if ended in FAULTS:
            show(f'{ended}: {how}\n{said}')
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)
    return counts


BAD_FLAGS = """
--batch-size 0|--batch-size -4|--batch-size x|--epochs 0|--epochs 1.5|--lr nan|--lr inf|--lr -1|--weight-decay -1
--weight-decay nan|--clip-grad -1|--clip-grad 0|--layer-decay nan|--layer-decay 2|--layer-decay -1|--warmup-epochs -1
--warmup-epochs 9|--mixup -1|--cutmix -1|--mixup nan|--smoothing -1|--smoothing 1.5|--model-ema --model-ema-decay 2
--model-ema --model-ema-decay -1|--hflip 2|--vflip -1|--drop 1|--drop -1|--drop-path 1|--drop-path -0.1|--reprob 2
--share-rate 0.9|--share-rate -1|--share-rate nan|--num-experts 1|--num-experts 0|--num-experts x|--moe-layers every:9
--moe-layers none|--moe-layers 0,7|--top-k 0 --router topk|--top-k 9 --router topk|--router hash|--expert-ratio 0.3
--num-shared -1 --router topk|--opt nothing|--opt lookahead_adamw|--sched nothing|--img-size 0|--in-chans 0
--crop-pct 0|--crop-pct -1|--crop-pct nan|--workers -1|--grad-accum-steps 0|--log-interval 0|--val-interval 0
--checkpoint-hist 0|--seed x|--seed -1|--color-jitter -1|--scale 1.0 0.1|--scale -1 1|--ratio 0 1|--aa nothing
--opt-betas 2 3|--opt-eps -1|--momentum -1 --opt sgd|--lr-base-size 0|--num-classes 3|--eval-metric top9|--unknown 1
--teacher nowhere|--initial-checkpoint nowhere|--pretrained-path nowhere|--model no_such_model|-c nowhere.yaml
--train-split nowhere|--val-split nowhere|--class-map nowhere|--mean 1 2|--std 0|--std -1|--dataset x/y
--share-schedule up|--share-every 0|--share-stop-epoch -1|--share-warmup-epochs -1|--balance-loss-weight nan
--min-lr -1|--warmup-lr -1|--cooldown-epochs -1|--decay-rate 0|--mixup-prob 2|--grayscale-prob 2
--gaussian-blur-prob -1|--kd-temperature 0 --teacher local-dir:BEST|--model-kwargs depth=x|--model-kwargs depth
--torchcompile nothing|--bce-target-thresh 2 --bce-loss|--validation-batch-size 0|--recount 0
""".replace('\n', '|').strip('|').split('|')


def inputs(work, run, folder, show):
    """Command lines that can't be right."""
    counts = Counter()
    for i, line in enumerate(BAD_FLAGS):
        out = work / f'input{i}'
        flags = line.replace('BEST', str(run / 'best')).split()
        ended, said = outcome(
            lambda: run_train('--data-dir', folder, '--output', work, '--experiment', out.name, '--epochs', 1, *flags),
            [out])
        if ended == 'served':
            ended = 'accepted'
        counts[ended] += 1
        if ended != 'refused':
            show(f'{ended}: train.py {line}\n{said}')
        shutil.rmtree(out, ignore_errors=True)
    return counts


def kills(count, rng, work, folder, show):
    """Training that is killed at a random moment and resumed ends as training that was left alone."""
    counts = Counter()
    line = [sys.executable, str(ROOT / 'train.py'), *FLAGS, '--data-dir', str(folder), '--output', str(work),
            '--model-ema', '--model-ema-decay', '0.7', '--epochs', '3']
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    started = time.time()
    subprocess.run([*line, '--experiment', 'whole'], check=True, capture_output=True, env=environment)
    seconds = time.time() - started
    expected = [(row['train_loss'], row['eval_loss']) for row in summary(work / 'whole')]
    weights = (work / 'whole' / 'last' / 'model.safetensors').read_bytes()
    for i in range(count):
        name = f'killed{i}'
        how = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        process = subprocess.Popen([*line, '--experiment', name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=environment)
        time.sleep(rng.uniform(.3, 1.) * seconds)
        process.send_signal(how)
        process.wait()
        again = [] if not (work / name).exists() else ['--resume']
        done = subprocess.run([*line, '--experiment', name, *again], capture_output=True, text=True, env=environment)
        same = done.returncode == 0 and [
            (row['train_loss'], row['eval_loss']) for row in summary(work / name)] == expected and (
            work / name / 'last' / 'model.safetensors').read_bytes() == weights
        left = [path.name for path in (work / name).rglob('.*')] if same else []
        counts['resumed' if same and not left else 'lost'] += 1
        if not same or left:
            show(f'lost: killed by {how.name}; {left}\n{done.stderr[-600:]}')
        shutil.rmtree(work / name, ignore_errors=True)
    return counts


def disk(work, run, folder, show):
    """Files that can't grow beyond a limit, as on a full disk: what was there before stays."""
    counts = Counter()
    for limit in (0, 1000, 20000, 60000):
        out = work / 'vit'
        subprocess.run([sys.executable, str(ROOT / 'convert.py'), str(run / 'best'), '--output', str(out)], check=True,
                       capture_output=True)
        before = files(out)
        script = (f'import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
                  f'sys.argv = ["convert.py", {str(run / "best")!r}, "--output", {str(out)!r}, "--overwrite"]; '
                  f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); '
                  f'runpy.run_path({str(ROOT / "convert.py")!r}, run_name="__main__")')
        done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
        lines = done.stderr.strip().splitlines()
        if files(out) != before and done.returncode:
            ended = 'lost'
        elif 'Traceback' in done.stderr:
            ended = 'traceback'
        else:
            ended = 'refused' if done.returncode == 2 and ': error: ' in lines[-1] else 'served'
        counts[ended] += 1
        if ended in FAULTS:
            show(f'{ended}: files of at most {limit} bytes\n{done.stderr[-800:]}')
        shutil.rmtree(out)
    return counts


def main():
    parser = argparse.ArgumentParser(prog='tests.faults', description=__doc__.split('\n')[0])
    parser.add_argument('--short', action='store_true', help='a tenth of it')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=('mutations', 'inputs', 'kills', 'disk'))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    parts = {
        'mutations': lambda: mutations(100 if args.short else 1000, rng, work, run, folder, show),
        'inputs': lambda: inputs(work, run, folder, show),
        'kills': lambda: kills(3 if args.short else 30, rng, work, folder, show),
        'disk': lambda: disk(work, run, folder, show),
    }
    failed = False

    def show(text):
        print('  ' + text.strip().replace('\n', '\n    '), flush=True)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = make_folder(work / 'images')
        with contextlib.redirect_stdout(io.StringIO()):
            run_train('--data-dir', folder, '--output', work, '--experiment', 'run', '--model-ema')
        run = work / 'run'
        for part, do in parts.items():
            if args.only in (None, part):
                counts = do()
                print(f'{part}: ' + ', '.join(f'{n} {ended}' for ended, n in sorted(counts.items())), flush=True)
                failed |= any(counts[fault] for fault in (*FAULTS, 'accepted'))
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
