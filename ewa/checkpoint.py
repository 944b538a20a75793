"""Checkpoints of a run: written whole or not at all, found again, and checked when they are read.

Layout: `EXPERIMENT/checkpoints/update-00001234/` holds what `accelerator.save_state` writes, `state.json` (a
`RunState`) and `ema.safetensors`. A folder with that name is complete: it is written under another name, synced, and
renamed.

Random numbers are not part of a checkpoint. They are drawn from streams that are seeded from their place in the run
(`ewa.data.seed_all`: every image from seed, epoch and index; every micro-batch from seed, rank, epoch and batch), so a
resumed run draws what an uninterrupted one would.
"""
from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import signal
import threading
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from timm.models import get_model_args
from torch import Tensor, nn

from .exporting import clean_up, replace_folder
from .foreign import foreign
from .sharded import SHARDS, is_sharded, load_shards

if TYPE_CHECKING:  # models are read from checkpoints also where nobody trains
    from accelerate import Accelerator

_NAME = re.compile(r'update-(\d{8,})')
# flags that a run can't change on its way: what they make is part of a checkpoint
FLAGS = ('opt', 'weight_decay', 'layer_decay', 'model_ema', 'torchcompile', 'eval_metric')
# what decides which images an update sees: with another value the rest of a run would be that of no run
STREAM = ('seed', 'dataset', 'train_split', 'class_map', 'training_images', 'images_per_epoch')
PARTS = ('batch_size', 'grad_accum_steps', 'processes')  # their product is the images of an update
# flags that may be others when a run goes on, and need no word
FREE = ('config', 'resume', 'output', 'experiment', 'workers', 'pin_mem', 'log_interval', 'log_with', 'val_interval',
        'checkpoint_hist', 'recovery_interval', 'validation_batch_size', 'teacher_top1', 'dense_top1', 'data_dir',
        'initial_checkpoint', 'pretrained_path', 'pretrained', 'model', 'model_kwargs', 'dataset_download')
_NEWER = ('batch', 'loss_sum', 'settings')  # entries that checkpoints of version 0.1.0 lack
_INSIDE: Dict[str, Dict[str, Any]] = {  # what must be in the dictionaries of a `RunState`
    'model': {'architecture': str},
    'best': {'value': float, 'epoch': int, 'weights': str},
    'averager': {'steps': int, 'pulls': int},
    'settings': dict.fromkeys(PARTS, Optional[int]),
}


@dataclass
class RunState:
    """What a run is and how far it is, beside its tensors; JSON in `state.json`.

    Args:
        model: Architecture and arguments of the model, see `describe`.
        flags: Of `FLAGS`, with their values.
        class_names: Names of the classes in the order of their labels.
        data_config: How images are prepared, as timm resolves it.
        epoch: Epochs done.
        update: Optimizer updates done.
        images: Training images seen by all processes.
        seconds: Time spent on training epochs.
        pflops: 1e15 floating-point operations of training, the teacher's included.
        batch: Micro-batches done of the epoch that has begun.
        loss_sum: Sum of their losses, the mean over processes.
        settings: Other flags that the course of a run depends on, see `SETTINGS`.
        best: Value of `--eval-metric`, epoch (from 1), weights (`'model'` or `'EMA'`), all metrics of the best epoch.
        provenance: What is written into model folders about their training.
        averager: Position of the `ExpertAverager`; None for a dense model.
    """
    model: Dict[str, Any]
    flags: Dict[str, Any]
    class_names: Optional[List[str]]
    data_config: Dict[str, Any]
    epoch: int = 0
    update: int = 0
    images: int = 0
    seconds: float = 0.
    pflops: float = 0.
    batch: int = 0
    loss_sum: float = 0.
    settings: Dict[str, Any] = field(default_factory=dict)
    best: Optional[Dict[str, Any]] = None
    provenance: Dict[str, Any] = field(default_factory=dict)
    averager: Optional[Dict[str, int]] = None

    def count(self, images: int, seconds: float, flops_per_image: float) -> None:
        """Add what an epoch of training has cost."""
        self.images += images
        self.seconds += seconds
        self.pflops = self.images * flops_per_image / 1e15

    @property
    def spent(self) -> Dict[str, float]:
        """Images, seconds and PFLOP so far."""
        return dict(images=self.images, seconds=self.seconds, pflops=self.pflops)

    def improve(self, metrics: Dict[str, float]) -> bool:
        """Note the metrics of the last epoch as the best so far if they are.

        Args:
            metrics: Of the weights and, prefixed with `ema_`, of their average. The better of the two counts.

        Returns:
            Whether they are better than all before.
        """
        metric = self.flags['eval_metric']
        sign = -1 if metric == 'loss' else 1
        value, weights = metrics[metric], 'model'
        ema = metrics.get(f'ema_{metric}', math.nan)
        if sign * ema > sign * value or math.isnan(value):
            value, weights = ema, 'EMA'
        if math.isnan(value) or (self.best is not None and sign * value <= sign * self.best['value']):
            return False
        self.best = dict(value=value, epoch=self.epoch, weights=weights, **metrics)
        return True


def describe(model: nn.Module) -> Dict[str, Any]:
    """Architecture and arguments of a timm model, as they are read from JSON again."""
    return json.loads(json.dumps(dict(architecture=model.pretrained_cfg['architecture'], **get_model_args(model))))


def start(
        model: nn.Module,
        args: argparse.Namespace,
        class_names: Optional[List[str]],
        data_config: Dict[str, Any],
        processes: int = 1,
        training_images: Optional[int] = None,
        images_per_epoch: int = 1,
) -> RunState:
    """The state of a run that has not begun."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE and key not in FLAGS}
    settings.update(
        processes=processes, training_images=training_images, images_per_epoch=images_per_epoch)
    return RunState(
        describe(model), {key: vars(args)[key] for key in FLAGS}, class_names, data_config,
        settings=json.loads(json.dumps(settings, default=str)))


def resume(checkpoint: Path, fresh: RunState, iterable: bool = False) -> RunState:
    """The state of a checkpoint, which must be one of the run that would begin with `fresh`.

    The images of an update may be shared by other numbers of processes and of micro-batches than before.

    Args:
        checkpoint: Folder of the checkpoint.
        fresh: What `start` gives.
        iterable: Whether the order of the images depends on the number of processes.

    Raises:
        ValueError: It was made by another model or with other `FLAGS`, or it can't be read.
    """
    state = read_state(checkpoint)
    key = next((key for key in {**state.model, **fresh.model}
                if key not in state.model or key not in fresh.model or state.model[key] != fresh.model[key]), None)
    if key is not None:
        raise ValueError(
            f'{checkpoint} is a checkpoint of another model: its {key} is {state.model.get(key)}, here it is '
            f'{fresh.model.get(key)}.')
    key = next((key for key in FLAGS if fresh.flags[key] != state.flags.get(key, fresh.flags[key])), None)
    if key is not None:
        raise ValueError(
            f'{checkpoint} was trained with --{key.replace("_", "-")} {state.flags[key]}, here it is '
            f'{fresh.flags[key]}.')
    if None not in (state.class_names, fresh.class_names) and state.class_names != fresh.class_names:
        pairs = zip_longest(state.class_names or (), fresh.class_names or ())
        label, (was, is_now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f'{checkpoint} was trained on other classes: label {label} was {was}, here it is {is_now}. Give the same '
            f'data, or start anew with --initial-checkpoint.')
    changed = changes(state.settings, fresh.settings)
    told = {key: f'{key.replace("_", " ")} {old}, here it is {new}' for key, (old, new) in changed.items()}
    wrong = next((told[key] for key in (*STREAM, *PARTS * iterable) if key in told), None)
    parts = [[settings.get(key) or 1 for key in PARTS] for settings in (state.settings, fresh.settings)]
    before, now = map(math.prod, parts)
    if before != now and not set(PARTS).isdisjoint(told):
        wrong = (f'{before} images an update ({", ".join(f"{key} {n}" for key, n in zip(PARTS, parts[0]))}), here it '
                 f'is {now}')
    if wrong is not None:
        raise ValueError(
            f'{checkpoint} was trained with {wrong}: the rest would be trained on other images. Give the same, or '
            f'start anew with --initial-checkpoint.')
    updates = math.ceil(fresh.settings['images_per_epoch'] / now)
    if state.update != state.epoch * updates + state.batch / parts[0][1]:
        raise ValueError(
            f'{checkpoint} is at update {state.update}, {state.epoch} epochs and {state.batch} batches; with these '
            f'flags and images an epoch has {updates} updates. Give those of the run, or start anew with '
            f'--initial-checkpoint.')
    if state.batch:  # micro-batches of another size are of another number
        scale = parts[0][0] * parts[0][2] / (parts[1][0] * parts[1][2])
        state.batch, state.loss_sum = round(state.batch * scale), state.loss_sum * scale
    state.flags, state.settings, state.data_config = fresh.flags, fresh.settings, fresh.data_config
    if (state.averager is None) != (fresh.averager is None):
        raise ValueError(f'{checkpoint} can\'t be resumed: its state.json and its model disagree on having experts.')
    return state


def changes(old: Dict[str, Any], new: Dict[str, Any]) -> Dict[str, Tuple[Any, Any]]:
    """Settings that are others than they were, by name: (old, new)."""
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def resumption(checkpoint: Path, state: RunState) -> str:
    """Where a run goes on, and which of its flags are others than before, in words."""
    changed = changes(read_state(checkpoint).settings, state.settings)
    told = ''.join(f' --{key.replace("_", "-")} is {new} now, it was {old}.' for key, (old, new) in changed.items())
    told = told.replace('--processes is', 'The number of processes is')
    told += ''.join(f' {path.name} is left out: {fault(path)}.' for path in _named(checkpoint.parent)
                    if _number(path) > _number(checkpoint))
    return f'Resuming from {checkpoint}, epoch {state.epoch}{f", batch {state.batch}" * bool(state.batch)}.{told}'


def remove_leftovers(experiment: Path) -> None:
    """Remove what a killed run left half written; what it had moved aside comes back."""
    for folder in (experiment, experiment / 'checkpoints'):
        if folder.is_dir():
            clean_up(folder)
    for left in (experiment / 'checkpoints').glob('.update-*.new'):
        shutil.rmtree(left)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name[7:])


def _named(folder: Path) -> List[Path]:
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_number)


def lost(checkpoint: Path) -> Optional[str]:
    """The first file that a checkpoint should have and has not; None of a whole one."""
    parts = (SHARDS, 'optimizer_0')
    files = ['state.json', 'model.safetensors', 'optimizer.bin']
    if any((checkpoint / part).is_dir() for part in parts):
        files[1:] = [f'{part}/.metadata' for part in parts]
    with suppress(ValueError, OSError):  # said by who reads it
        files += ['ema.safetensors'] * bool(read_state(checkpoint).flags.get('model_ema'))
    return next((name for name in files if not (checkpoint / name).is_file()), None)


def fault(checkpoint: Path) -> Optional[str]:
    """Why no run can go on from a checkpoint, as far as it is seen without reading tensors; None of a whole one."""
    name = lost(checkpoint)
    if name is not None:
        return f'it has lost {name}'
    try:
        read_state(checkpoint)
    except ValueError as e:
        return str(e).rstrip('.')
    for path in sorted(checkpoint.iterdir()):
        try:
            whole = zipfile.is_zipfile(path) if path.suffix in ('.bin', '.pt') else True  # by torch.save
            if path.suffix == '.safetensors':
                with safe_open(path, 'pt'):  # its header, which says how long the file is
                    pass
        except SafetensorError:
            whole = False
        if not whole:
            return f'its {path.name} is damaged'
    return None


def checkpoints(experiment: Path) -> List[Path]:
    """Whole checkpoints of an experiment, oldest first."""
    return [path for path in _named(experiment / 'checkpoints') if fault(path) is None]


def _has_only_begun(experiment: Path) -> bool:
    """Whether a folder is empty or of a run that ended before it saved anything."""
    if not experiment.is_dir() or _named(experiment / 'checkpoints'):
        return False
    names = {path.name for path in experiment.iterdir() if not path.name.startswith(('.', 'events.out.tfevents.'))}
    return not any(experiment.iterdir()) or {'args.yaml'} <= names <= {'args.yaml', 'checkpoints'}


def resume_point(experiment: Path, resuming: bool, named: bool) -> Optional[Path]:
    """The checkpoint that a run goes on from, or None for a run that begins.

    Args:
        experiment: Folder of the run.
        resuming: Whether `--resume` was given.
        named: Whether `--experiment` was given.

    Raises:
        ValueError: `--resume` without the name of a run, or a folder that exists without `--resume`.
    """
    if resuming:
        if not named:
            raise ValueError('--resume needs --experiment NAME, the run to go on with.')
        found = checkpoints(experiment)
        if not found and experiment.exists() and not _has_only_begun(experiment):
            damaged = ''.join(f' ({path.name}: {fault(path)})' for path in _named(experiment / 'checkpoints')[-1:])
            raise ValueError(
                f'{experiment} has no checkpoint to go on from{damaged}: give another --experiment, or start from its '
                f'model with --initial-checkpoint {experiment / "last"}.')
        return found[-1] if found else None
    if experiment.exists() and (not experiment.is_dir() or any(experiment.iterdir())):
        raise ValueError(f'{experiment} exists: give another --experiment, or --resume to go on with it.')
    return None


class Interrupt:
    """Notes that Ctrl-C or SIGTERM asks a run to end, so that it can save first; a second time ends it at once.

    A context manager: whoever had the signals before gets them back after it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.former: Dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # nobody else may
            self.former = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for kind, handler in self.former.items():
            signal.signal(kind, handler)

    def _note(self, kind: int, frame: Any) -> None:
        self.signal = kind
        self.__exit__()

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to end. Called on all processes, which all get one answer."""
        if accelerator.num_processes > 1:
            noted = torch.tensor([self.signal], device=accelerator.device)
            self.signal = int(accelerator.gather(noted).max())
        return self.signal != 0


def save_checkpoint(
        accelerator: Accelerator,
        experiment: Path,
        state: RunState,
        ema: Optional[Dict[str, Tensor]] = None,
        keep: int = 2,
) -> None:
    """Write a checkpoint, then remove the oldest beyond `keep`. Called on all processes.

    Args:
        accelerator: Holds model, optimizer and loss scaler.
        experiment: Folder of the run.
        state: Found again by `read_state`.
        ema: EMA weights.
        keep: Checkpoints to keep, at least 1.

    Raises:
        NotPossible, OSError: It can't be written; those before it stay.
    """
    final = experiment / 'checkpoints' / f'update-{state.update:08d}'
    new = final.with_name(f'.{final.name}.new')
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with foreign(f'{final} can\'t be written', RuntimeError, SafetensorError):
        accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            with foreign(f'{final} can\'t be written', RuntimeError, SafetensorError):
                safetensors.torch.save_file({k: v.contiguous() for k, v in ema.items()}, new / 'ema.safetensors')
        (new / 'state.json').write_text(json.dumps(asdict(state), indent=2))
        replace_folder(new, final)
        for old in checkpoints(experiment)[:-max(keep, 1)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
        accelerator: Accelerator, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load model, optimizer and loss scaler into what an accelerator has prepared.

    Args:
        accelerator: Has prepared them.
        checkpoint: Of a run with sharded parameters or without; if these are sharded, of one with them.
        model: Without wrappers.
        optimizer: Of its parameters.

    Raises:
        ValueError: A file is missing, damaged or of another run, or parameters were not sharded and are now.
    """
    were_sharded = (checkpoint / SHARDS).is_dir()
    if is_sharded(model) and not were_sharded:
        raise ValueError(
            f'{checkpoint} was saved without FSDP2: go on without it, or start anew with --initial-checkpoint.')
    with foreign(f'{checkpoint} can\'t be resumed, remove it to go on from the one before'):
        if were_sharded and not is_sharded(model):
            load_shards(model, getattr(optimizer, 'optimizer', optimizer), checkpoint)
        else:
            accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # micro-batches of an update done: of none, however many they were in the run that saved


def load_ema(checkpoint: Path) -> Dict[str, Tensor]:
    """The EMA weights of a checkpoint.

    Raises:
        ValueError: There are none, or they can't be read.
    """
    path = checkpoint / 'ema.safetensors'
    if not path.is_file():
        raise ValueError(f'{checkpoint} has no EMA weights; the run was not trained with --model-ema.')
    with foreign(f'{path} can\'t be read as tensors'):
        return safetensors.torch.load_file(path)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type as written in the annotations of `RunState`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Union:
        return any(_fits(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, inner[1]) for entry in value.values())
    if hint in (int, float):  # True is an int for Python, 1 is a float for JSON
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def read_state(checkpoint: Path) -> RunState:
    """The state that a checkpoint was saved with.

    Raises:
        ValueError: `state.json` is not JSON, or not what `RunState` declares.
    """
    path = checkpoint / 'state.json'
    try:
        entries = json.loads(path.read_text())
    except ValueError as e:  # UnicodeDecodeError among them
        raise ValueError(f'{path} is damaged, it is not JSON: {e}') from e
    if not isinstance(entries, dict):
        raise ValueError(f'{path} is damaged: it holds no table of entries.')
    hints = get_type_hints(RunState)
    for key, hint in hints.items():
        if key in _NEWER:
            entries.setdefault(key, {} if key == 'settings' else 0)
        if key not in entries:
            raise ValueError(f'{path} has no entry {key}: it is damaged or of a version this one can\'t go on with.')
        value = entries[key]
        wrong = None if _fits(value, hint) and not (hint is int and value < 0) else key
        if wrong is None and value is not None:
            wrong = next((f'{key}.{part}' for part, kind in _INSIDE.get(key, {}).items()
                          if not _fits(value.get(part), kind)), None)
        if wrong is not None:
            raise ValueError(f'{path} is damaged: its entry {wrong} is {str(value)[:80]!r}.')
    state = RunState(**{entry.name: entries[entry.name] for entry in fields(RunState)})
    if state.model.get('init') == 'auto':  # a choice there was once; it said how a run began, not what it is
        del state.model['init']
    return state
