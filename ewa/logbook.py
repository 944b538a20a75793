"""What a run tells: lines and a progress bar on the console, TensorBoard events, `summary.csv`, and the model folders.

Everything lies in the folder of the run: `args.yaml`, `summary.csv`, events, and `last/` and `best/`, which hold the
model itself (a MoE stays one) with its EMA weights beside it.
"""
from __future__ import annotations

import fcntl
import math
import os
import shlex
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, TextIO, cast

import torch
import yaml
from accelerate import Accelerator
from timm.utils import trim_summary, update_summary
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .averaging import ExpertAverager
from .checkpoint import RunState, checkpoints, remove_leftovers
from .diagnostics import diagnose, similarity_figure, usage_figure
from .distillation import benefit_kept
from .exporting import write_folder
from .foreign import foreign

# what is drawn of the experts of each layer, and the chart that has all layers (in TensorBoard's tab of custom scalars)
CHARTS = {
    'distance': 'distance of the experts to their mean', 'cosine': 'cosine of two experts, mean over pairs',
    'entropy': 'entropy of usage, 1 when uniform', 'change': 'change of the output if the experts are averaged'}


def say(accelerator: Accelerator, message: str, file: Optional[TextIO] = None) -> None:
    """A line on the console, from the main process alone and above the progress bar."""
    if accelerator.is_main_process:
        tqdm.write(message, file=file or sys.stdout)


def learning_rate(optimizer: Optimizer) -> float:
    """The largest of all parameter groups."""
    return max(group['lr'] for group in optimizer.param_groups)


class Logbook:
    """Owns the records of a run, from its first line to its last; made on all processes, written by the main one.

    Args:
        accelerator: Of the run.
        experiment: Folder of the run; it is made.
        arguments: Written to `args.yaml`, so that `-c args.yaml` repeats the run.
        state: Where the run begins.
        epochs: Where it ends.
        updates_per_epoch: Optimizer updates of an epoch.
        log_interval: Updates between log entries.

    Raises:
        ValueError: The folder can't be made, or another run writes to it.
    """

    def __init__(
            self,
            accelerator: Accelerator,
            experiment: Path,
            arguments: Dict[str, Any],
            state: RunState,
            epochs: int,
            updates_per_epoch: int,
            log_interval: int = 50,
    ) -> None:
        self.accelerator = accelerator
        self.experiment = experiment
        self.epochs = epochs
        self.updates_per_epoch = updates_per_epoch
        self.log_interval = log_interval
        self.metrics: Dict[str, float] = {}  # of the last validation
        self.rate = math.nan  # of the last update, before the schedule goes on
        self.complaints: Dict[str, str] = {}  # by split
        self.pulled = False  # a share rate that is 0 throughout is not drawn
        self.charted = False
        self.board: Optional[SummaryWriter] = None
        if accelerator.is_main_process:
            try:
                experiment.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise ValueError(f'--output {arguments["output"]} can\'t be written: {e.strerror}.') from e
            self.lock = os.open(experiment, os.O_RDONLY)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                os.close(self.lock)
                raise ValueError(f'{experiment} is being written by another run: give another --experiment.') from e
            remove_leftovers(experiment)
        if accelerator.log_with:
            try:
                with foreign(f'--log-with {" ".join(arguments["log_with"])} can\'t start'):
                    accelerator.init_trackers(
                        'ewa', {key: str(value) for key, value in arguments.items()},
                        dict(wandb=dict(name=experiment.name, dir=str(experiment))))
            except ValueError:
                if accelerator.is_main_process:
                    os.close(self.lock)
                    with suppress(OSError):  # it was there before
                        experiment.rmdir()
                raise
        if accelerator.is_main_process:
            (experiment / 'args.yaml').write_text(yaml.safe_dump(arguments))
            trim_summary(str(experiment / 'summary.csv'), state.epoch + 1)
            self.board = SummaryWriter(str(experiment), purge_step=state.update + 1)
            given = {key: str(value) for key, value in arguments.items()}
            rows = [f'| {key} | ' + value.replace('|', '\\|') + ' |' for key, value in given.items()
                    if value not in ('None', 'False', '', '{}')]
            self.board.add_text('arguments', '\n'.join(['| flag | value |', '|---|---|', *rows]))
        self.interactive = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(
            total=epochs * updates_per_epoch, initial=state.update, disable=not self.interactive, unit='update',
            dynamic_ncols=True,
            miniters=1, bar_format='{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}]{postfix}')
        self.shown = 0.  # when the bar last got figures
        self.done = threading.Event()
        if self.interactive:
            threading.Thread(target=self.tick, daemon=True).start()

    def tick(self) -> None:
        """Show once a second how long the run has taken, whatever else takes longer than that."""
        while not self.done.wait(1.):
            self.bar.refresh()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close_bar()
        if self.board is not None:
            self.board.close()
            fcntl.flock(self.lock, fcntl.LOCK_UN)  # loading processes have the file open too
            os.close(self.lock)

    def close_bar(self) -> None:
        """Leave the progress bar as it is."""
        self.done.set()
        self.bar.close()

    def say(self, message: str, file: Optional[TextIO] = None) -> None:
        """See `say`."""
        say(self.accelerator, message, file)

    def warn(self, split: str, complaint: str) -> None:
        """Say once on stderr what is wrong with the images of a split, and again if there is more."""
        if complaint and self.complaints.get(split) != complaint:
            self.complaints[split] = complaint
            self.say(f'{split}: {complaint}.', sys.stderr)

    def start_validation(self) -> None:
        """Say that training pauses."""
        self.bar.set_description(f'epoch {self.epoch}/{self.epochs}, validating')

    def start_epoch(self, epoch: int, batches: int = 0, loss_sum: float = 0.) -> None:
        """Begin to sum up an epoch, counted from 0, of which micro-batches may be done already."""
        self.epoch = epoch + 1
        self.bar.set_description(f'epoch {self.epoch}/{self.epochs}')
        self.loss_sum = torch.tensor(float(loss_sum), device=self.accelerator.device)
        self.batches = batches
        self.images = 0
        self.started = time.time()
        self.show()

    def show(self, loss: Optional[float] = None) -> None:
        """Put figures beside the bar: of this epoch, with the top-1 of the last validation."""
        self.shown = time.time()
        figures = [f'loss {loss:.3f}'] if loss is not None and math.isfinite(loss) else []
        figures += [f'top-1 {self.metrics["top1"]:.1f}'] if 'top1' in self.metrics else []
        figures += [f'{self.images / self.seconds:.0f} images/s'] if self.images else []
        self.bar.set_postfix_str(', '.join(figures))

    def count(self, loss: Tensor, images: int) -> None:
        """Add the loss and the images of a micro-batch of this process."""
        self.loss_sum += loss.detach()
        self.batches += 1
        self.images += images * self.accelerator.num_processes
        if self.interactive and time.time() - self.shown >= 1:
            self.show(self.loss_sum.item() / self.batches)  # of this process alone: the others are not asked

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.time() - self.started

    def log_update(
            self,
            update: int,
            optimizer: Optimizer,
            averager: Optional[ExpertAverager] = None,
            routing: Optional[Dict[str, Tensor]] = None,
    ) -> None:
        """After an optimizer update: every `log_interval` of them, and at the end of an epoch, how training goes.

        Args:
            update: Its number in the run, from 1.
            optimizer: What the learning rate is read from.
            averager: Whose next rate is told; None without experts.
            routing: Losses of gated layers by name; None without any.

        Raises:
            SystemExit: The loss is not finite; exit code 1.
        """
        self.bar.update()
        self.rate = learning_rate(optimizer)
        last = update % self.updates_per_epoch == 0
        if update % self.log_interval and not last:
            return
        self.loss = self.accelerator.reduce(self.loss_sum, reduction='mean').item() / self.batches
        if not math.isfinite(self.loss):
            self.diverged(f'The training loss is {self.loss}', update, optimizer)
        self.speed = self.images / self.seconds
        if self.board is None:
            return
        scalars = {
            'loss': self.loss, 'lr': self.rate, 'images_per_second': self.speed, 'epoch': self.epoch,
            **{k: v.item() for k, v in (routing or {}).items()}}
        if averager is not None:
            self.pulled |= averager.share_rate > 0
            scalars.update(dict(share_rate=averager.share_rate) if self.pulled else {})
        self.draw({f'train/{key}': scalar for key, scalar in scalars.items()}, update)
        if self.interactive:
            self.show(self.loss)
        if not self.interactive and not last:
            self.say(f'epoch {self.epoch}/{self.epochs} update {update} loss {self.loss:.4f} {self.speed:.0f} images/s')

    def draw(self, scalars: Dict[str, float], update: int) -> None:
        """Points of the curves by name."""
        if self.board is not None:
            for key, scalar in scalars.items():
                self.board.add_scalar(key, scalar, update)
        self.accelerator.log(scalars, step=update)  # to the trackers of --log-with

    def diverged(self, what: str, update: int, optimizer: Optimizer) -> None:
        """Stop a run whose numbers are not finite, before they are written anywhere.

        Raises:
            SystemExit: Exit code 1.
        """
        found = checkpoints(self.experiment)
        way_out = (f'go on from {found[-1].name} with --resume and a smaller --lr' if found
                   else 'start again with a smaller --lr')
        self.say(f'{what} in epoch {self.epoch}, at update {update}, learning rate {learning_rate(optimizer):.3g}: '
                 f'stopping; {way_out}.', sys.stderr)
        sys.exit(1)

    def end_epoch(
            self,
            model: nn.Module,
            state: RunState,
            metrics: Dict[str, float],
            improved: bool,
            sample: Tensor,
            optimizer: Optimizer,
            ema: Optional[Dict[str, Tensor]] = None,
    ) -> None:
        """Write down what an epoch came to, and the model into `last/`, and into `best/` if it has improved.

        Args:
            model: The model itself, without wrappers.
            state: After the epoch.
            metrics: Of the validation; empty if there was none.
            improved: Whether they are the best so far.
            sample: Images that the usage of experts is shown on.
            optimizer: What the learning rate is read from.
            ema: EMA weights.
        """
        self.metrics = metrics or self.metrics
        self.bar.set_description(f'epoch {self.epoch}/{self.epochs}')
        if self.board is None:
            return
        records = diagnose(model, [sample], align=False)
        scalars = {f'eval/{k}': v for k, v in metrics.items()}
        scalars.update({f'spent/{k}': v for k, v in state.spent.items()})
        scalars.update({  # but the change of random partitions, which is 0 by construction
            f'experts_{k}/{record["layer"]}': record[k] for record in records
            for k in CHARTS if k in record and (k != 'change' or record['router'] != 'random')})
        self.draw(scalars, state.update)
        charts = {
            title: ['Multiline', [f'experts_{key}/.*']] for key, title in CHARTS.items()
            if any(tag.startswith(f'experts_{key}/') for tag in scalars)}
        if charts and not self.charted:
            self.board.add_custom_scalars({'experts': charts})
            self.charted = True
        if records and metrics:
            self.board.add_figure('experts/similarity', similarity_figure(records), state.update)
            usage = usage_figure(records)
            if usage is not None:
                self.board.add_figure('experts/usage', usage, state.update)
        self.board.flush()
        if metrics:
            update_summary(
                state.epoch, dict(loss=self.loss, **state.spent), metrics, str(self.experiment / 'summary.csv'),
                lr=self.rate)
        for folder in ['last'] + ['best'] * improved:
            write_folder(
                model, self.experiment / folder, state.class_names, state.data_config, state.provenance, ema,
                overwrite=True, verify=False)
        self.say(f'epoch {state.epoch}/{self.epochs}: loss {self.loss:.4f}{_scores(metrics)}, '
                 f'{self.speed:.0f} images/s{_spread(records)}')

    def conclude(
            self,
            state: RunState,
            has_experts: bool,
            teacher_top1: Optional[float] = None,
            dense_top1: Optional[float] = None,
    ) -> None:
        """The last lines: what distillation came to, which epoch was best, and where the model is.

        Args:
            state: After the last epoch.
            has_experts: Whether `convert.py` is of use.
            teacher_top1: Accuracy of the teacher; None if there was none.
            dense_top1: Accuracy of a dense model without a teacher.
        """
        self.close_bar()
        if teacher_top1 is not None:
            top1 = self.metrics['top1']
            kept = '' if dense_top1 is None else (
                f', {100 * benefit_kept(top1, dense_top1, teacher_top1):.1f} % of the benefit of the teacher '
                f'({teacher_top1:.2f}) over a dense model ({dense_top1:.2f}) kept')
            self.say(f'Distilled with {state.images} images, {state.pflops:.3g} PFLOP, {state.seconds:.0f} s: '
                     f'top-1 {top1:.2f} in the last epoch{kept}.')
        best = cast(Dict[str, Any], state.best)  # the last epoch is always validated
        of_ema = best['weights'] == 'EMA'
        self.say(f'Best {state.flags["eval_metric"]}: {best["value"]:.2f} in epoch {best["epoch"]}'
                 + ' (EMA weights)' * of_ema + '.')
        folder = self.experiment / 'best'
        if has_experts:
            paths = [shlex.quote(str(path)) for path in (folder, self.experiment / 'vit')]
            self.say('Export the plain ViT with:  python convert.py {} --output {}'.format(*paths)
                     + ' --use-ema' * of_ema)
        else:
            self.say(f'The model is in {folder}' + ' (ema.safetensors)' * of_ema + '.')


def _scores(metrics: Dict[str, float]) -> str:
    if not metrics:
        return ''
    ema = f', EMA {metrics["ema_top1"]:.2f}' if 'ema_top1' in metrics else ''
    return f', validation loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f}{ema}'


def _spread(records: List[Dict[str, Any]]) -> str:
    distances = [record['distance'] for record in records if 'distance' in record]
    return f', experts {sum(distances) / len(distances):.2g} from their mean' if distances else ''
