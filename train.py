"""Train a ViT, dense or as a mixture of experts, on images.

    python train.py -c configs/demo.yaml                                         # the embedded sample, on any machine
    python train.py --model vit_small_ewa --data-dir imagenet                    # one device
    torchrun --nproc_per_node 8 train.py --model vit_small_ewa --data-dir imagenet --amp --amp-dtype bfloat16
    accelerate launch --num_machines 2 --num_processes 16 train.py -c configs/imagenet_vit_small_ewa.yaml
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 train.py --model vit_small_ewa --data-dir imagenet

Writes under OUTPUT/EXPERIMENT: args.yaml, summary.csv, TensorBoard events, checkpoints/, and the model
folders last/ and best/. These hold the MoE; `python convert.py OUTPUT/EXPERIMENT/best --output DIR` makes the plain
ViT.
"""
from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedType, broadcast_object_list
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import LogitDistillationTask
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

import ewa
from ewa import checkpoint as ckpt
from ewa.averaging import RatePolicy, runs_hooks
from ewa.data import (
    UNREADABLE,
    EpochLength,
    SeededDataset,
    check_classes,
    class_names,
    complaint,
    epoch_length,
    eval_loader,
    make_mixup,
    open_dataset,
    preparation,
    seed_all,
    set_epoch,
    train_loader,
)
from ewa.distillation import TeacherView, check_weights, distillation_task, forward_flops
from ewa.foreign import NotPossible, foreign
from ewa.logbook import Logbook, say
from ewa.moe import is_random, moe_layers, pulled
from ewa.options import check_effect, check_together, train_parser
from ewa.pull import local
from ewa.sharded import full_state, is_sharded, load_full_state, shard_alike, shard_by_blocks
from ewa.sources import build_model, load_teacher


@dataclass
class Run:
    """What a run is made of.

    Args:
        args: Options, with everything resolved that they leave open.
        plain_model: Holds the parameters, whatever wraps it.
        model: What is called in training.
        optimizer: Of its parameters.
        scheduler: Sets the learning rate.
        averager: Pulls the experts; None for a dense model.
        criterion: Label loss.
        mixup: Mixes the images of a batch; None if they stay apart.
        train_batches: Training loader.
        val_batches: Validation loader.
        length: Of an epoch.
        epochs: Of the run.
        state: Where it stands.
        resume_from: Checkpoint it goes on from.
        flops_per_image: Of training, the teacher's forward pass included.
        teacher: To distil from.
        task: Distillation in the place of `criterion`, once everything is on its device.
        ema: Moving average of the weights.
        whole: Of a model that is sharded, the main process's copy in one piece, see `whole_model`.
    """
    args: argparse.Namespace
    plain_model: nn.Module
    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    averager: Optional[ewa.ExpertAverager]
    criterion: nn.Module
    mixup: Optional[Mixup]
    train_batches: DataLoader
    val_batches: DataLoader
    length: EpochLength
    epochs: int
    state: ckpt.RunState
    resume_from: Optional[Path]
    flops_per_image: float
    teacher: Optional[nn.Module] = None
    task: Optional[LogitDistillationTask] = None
    ema: Optional[ModelEmaV3] = None
    whole: Optional[nn.Module] = None


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's view of devices and processes, for the precision and accumulation that the flags ask for."""
    for name in args.log_with or ():
        if name not in LOGGER_TYPE_TO_CLASS or name == 'tensorboard':
            others = ', '.join(key for key in LOGGER_TYPE_TO_CLASS if key != 'tensorboard')
            raise ValueError(f'--log-with {name}: beside TensorBoard, which is always written, there are {others}.')
        if name not in map(str, get_available_trackers()):
            raise ValueError(f'--log-with {name}: its package is not installed; pip install {name.replace("_", "-")}')
    with foreign(f'--amp --amp-dtype {args.amp_dtype} is not possible here'):
        accelerator = Accelerator(
            cpu=args.device == 'cpu',
            log_with=args.log_with,
            mixed_precision={'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else None,
            gradient_accumulation_steps=args.grad_accum_steps,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            step_scheduler_with_optimizer=False,
        )
    found = accelerator.device.type
    if args.device and args.device.partition(':')[0] != found:
        raise ValueError(f'--device {args.device}: accelerate finds {found} here.')
    if ':' in (args.device or ''):
        raise ValueError(f'--device {args.device}: which one is chosen by CUDA_VISIBLE_DEVICES or accelerate launch.')
    return accelerator


def check_launch(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Refuse what accelerate was asked for and this script can't do.

    Raises:
        ValueError: FSDP of version 1 or on CPUs, DeepSpeed, Megatron-LM; with FSDP clipping by anything but the norm.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError('FSDP of version 1 is not served: add --fsdp_version 2 to accelerate launch.')
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f'{kind.value} is not served: launch with torchrun, or with accelerate launch --use_fsdp '
                         f'--fsdp_version 2.')
    asked = os.environ.get('ACCELERATE_USE_FSDP', '').lower() == 'true'
    if asked and kind != DistributedType.FSDP and accelerator.num_processes > 1:
        raise ValueError(f'accelerate does not shard on {accelerator.device.type}: launch without --use_fsdp.')
    if kind == DistributedType.FSDP and args.clip_grad is not None and args.clip_mode != 'norm':
        raise ValueError(f'--clip-mode {args.clip_mode}: gradients that are sharded can be clipped by their norm only.')


def make_optimizer(model: nn.Module, args: argparse.Namespace, images: int, create: Callable) -> Optimizer:
    """The optimizer; sets `args.lr` for `images` an update where it was left open."""
    if args.lr is None:
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt for o in ('ada', 'lamb', 'lion')) else 'linear')
        ratio = images / args.lr_base_size
        args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    with foreign(f'--opt {args.opt} with --opt-kwargs {args.opt_kwargs} can\'t be made'):
        return create(model, **optimizer_kwargs(args), **args.opt_kwargs)


def make_averager(
        model: nn.Module,
        optimizer: Optimizer,
        args: argparse.Namespace,
        updates_per_epoch: int,
        epochs: int,
        share_rate: Optional[RatePolicy] = None,
) -> Optional[ewa.ExpertAverager]:
    """The pull of the experts after each step of the optimizer, None without experts; sets `args.share_rate`.

    A policy takes the place of `--share-rate` and of its schedule.
    """
    layers = [layer for _, layer in moe_layers(model)]
    if not layers:
        if args.share_rate:
            raise ValueError(f'--share-rate {args.share_rate}: {args.model} has no experts; give --num-experts N.')
        return None
    if share_rate is not None:
        averager = ewa.ExpertAverager(model, share_rate, every=args.share_every)
    else:
        if args.share_rate is None:
            args.share_rate = max(
                (0.1 if hasattr(layer, 'deviations') else 1e-3 for layer in layers if is_random(layer)), default=0.)
        warmup = epochs if args.share_warmup_epochs is None else args.share_warmup_epochs
        averager = ewa.ExpertAverager(
            model, args.share_rate, args.share_schedule, every=args.share_every,
            total_steps=max(1, round(warmup * updates_per_epoch)),
            stop_after=None if args.share_stop_epoch is None else round(args.share_stop_epoch * updates_per_epoch))
    if not runs_hooks(optimizer):
        instead = f'--opt {args.opt.partition("lookahead_")[2]}' if 'lookahead_' in args.opt else 'another --opt'
        raise ValueError(
            f'--opt {args.opt} can\'t be used with experts: {type(optimizer).__name__} does not run step hooks, '
            f'or keeps weights of its own that are not pulled. Give {instead}.')
    averager.attach(optimizer)
    return averager


def make_criterion(args: argparse.Namespace, soft_targets: bool) -> nn.Module:
    """The label loss."""
    bce = dict(bce_sum=args.bce_sum, bce_target_thresh=args.bce_target_thresh) if args.bce_loss else {}
    with foreign(f'The loss can\'t be made with --smoothing {args.smoothing}, {bce}'):
        return create_classification_loss(
            'bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=soft_targets, **bce)


def build(
        args: argparse.Namespace,
        num_processes: int,
        resume_from: Optional[Path] = None,
        open_dataset: Callable = open_dataset,
        create_optimizer: Callable = create_optimizer_v2,
        share_rate: Optional[RatePolicy] = None,
) -> Run:
    """Everything of a run, without writing anything.

    Raises:
        ValueError, OSError: What a user can get wrong.
    """
    check_together(args)
    train_set = open_dataset(args, args.train_split, is_training=True, in_chans=args.in_chans or 3)
    val_set = open_dataset(args, args.val_split, is_training=False, in_chans=args.in_chans or 3)
    args.num_classes = check_classes(train_set, val_set, args.num_classes)
    names = class_names(train_set)

    seed_all(args.seed, 0)
    model = build_model(args)
    layers = [layer for _, layer in moe_layers(model)]
    given = args.share_rate if share_rate is None else 1.  # a policy may pull
    check_effect(args, pulls=any(map(is_random, layers)) if given is None else bool(layers) and given > 0,
                 gated=not all(map(is_random, layers)), mean=any(hasattr(layer, 'deviations') for layer in layers))
    data_config = preparation(model, args)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=data_config['mean'], std=data_config['std'])
    flops_per_image = 3 * forward_flops(model, data_config['input_size'])  # backward: about twice the forward
    teacher = None
    if args.teacher:
        check_weights(args)
        teacher, flops = load_teacher(args.teacher, model.num_classes, data_config['input_size'])
        flops_per_image += flops

    if not isinstance(train_set, IterableDataset):
        train_set = SeededDataset(train_set, args.seed)
    train_batches = train_loader(train_set, args, data_config)
    val_batches = eval_loader(val_set, args, data_config)
    length = epoch_length(train_batches, args, num_processes)
    mixup = make_mixup(args, args.num_classes)
    criterion = make_criterion(args, soft_targets=mixup is not None)

    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    optimizer = make_optimizer(model, args, args.batch_size * num_processes * args.grad_accum_steps, create_optimizer)
    with foreign(f'--sched {args.sched} can\'t be made'):
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=length.updates)
    averager = make_averager(model, optimizer, args, length.updates, epochs, share_rate)

    called = model
    if args.torchcompile:
        with foreign(f'--torchcompile {args.torchcompile} --torchcompile-mode {args.torchcompile_mode}'):
            called = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    counted = None if isinstance(train_set, IterableDataset) else len(train_set)
    state = ckpt.start(
        model, args, names, data_config, processes=num_processes, training_images=counted,
        images_per_epoch=length.batches * args.batch_size * num_processes)
    state.averager = averager.state_dict() if averager is not None else None
    if resume_from is not None:
        state = ckpt.resume(resume_from, state, isinstance(train_set, IterableDataset))
    return Run(
        args, model, called, optimizer, scheduler, averager, criterion, mixup, train_batches, val_batches, length,
        epochs, state, resume_from, flops_per_image, teacher)


def prepare(run: Run, accelerator: Accelerator) -> None:
    """Put a run on its devices and where its checkpoint left off.

    Raises:
        ValueError: The checkpoint can't be read.
    """
    args, state = run.args, run.state
    if accelerator.is_fsdp2:  # shards can't be copied
        shard_by_blocks(accelerator, run.plain_model)
        run.whole = deepcopy(run.plain_model) if accelerator.is_main_process else None
        run.ema = make_ema(run)
    run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
    if run.ema is not None:
        shard_alike(run.ema.module, accelerator)
    else:
        run.ema = make_ema(run)
    if not isinstance(run.train_batches.dataset, IterableDataset):  # timm's split themselves among processes
        run.train_batches, run.val_batches = accelerator.prepare(run.train_batches, run.val_batches)
    if run.teacher is not None:
        run.task = distillation_task(
            run.model, run.teacher.to(accelerator.device), run.criterion, args.kd_temperature,
            args.distill_loss_weight, args.task_loss_weight, accelerator.device)
    if run.resume_from is not None:
        ckpt.load_checkpoint(accelerator, run.resume_from, run.plain_model, run.optimizer)
        if run.averager is not None and state.averager is not None:
            run.averager.load_state_dict(state.averager)
        if run.ema is not None:
            with foreign(f'The EMA weights of {run.resume_from} do not fit'):
                load_full_state(run.ema.module, ckpt.load_ema(run.resume_from))
    if args.sched_on_updates:
        run.scheduler.step_update(state.update)
    else:
        run.scheduler.step(state.epoch)


def make_ema(run: Run) -> Optional[ModelEmaV3]:
    """The moving average of the weights; None if it was not asked for."""
    args = run.args
    if not args.model_ema:
        return None
    return ModelEmaV3(run.plain_model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


def whole_model(run: Run) -> nn.Module:
    """The model with all its weights; of a sharded one a copy on the CPU. Called on all processes, for the main one."""
    if not is_sharded(run.plain_model):
        return run.plain_model
    state = full_state(run.plain_model)
    if run.whole is None:  # another process
        return run.plain_model
    run.whole.load_state_dict(state)
    return run.whole


# updates from one look at whether another process was interrupted to the next; of a single process each
LOOK_EVERY = 10


def save(run: Run, state: ckpt.RunState, accelerator: Accelerator, experiment: Path) -> None:
    """Write a checkpoint of a run, which then stands at `state`."""
    if run.averager is not None:
        state.averager = run.averager.state_dict()
    ema = full_state(run.ema.module) if run.ema is not None else None
    ckpt.save_checkpoint(accelerator, experiment, state, ema, run.args.checkpoint_hist)


def save_within_epoch(run: Run, batch: int, accelerator: Accelerator, book: Logbook, interrupt: ckpt.Interrupt) -> None:
    """After an update within an epoch: save if it is time to, and end if that was asked for.

    Raises:
        SystemExit: See `end`.
    """
    args, update = run.args, run.state.update
    due = bool(args.recovery_interval) and update % args.recovery_interval == 0
    looks = accelerator.num_processes == 1 or update % LOOK_EVERY == 0
    asked = looks and interrupt.asked(accelerator)
    if due or asked:
        check_finite(run, accelerator, book)
        state = replace(run.state, batch=batch, loss_sum=accelerator.reduce(book.loss_sum, reduction='mean').item())
        state.count(book.images, book.seconds, run.flops_per_image)
        save(run, state, accelerator, book.experiment)
    if asked:
        end(update, book, interrupt)


def check_finite(run: Run, accelerator: Accelerator, book: Logbook) -> None:
    """Before anything is written: whether loss and weights are numbers.

    Raises:
        SystemExit: They are not; exit code 1.
    """
    found = [book.loss_sum, *(local(p) for p in run.plain_model.parameters())]
    lost = torch.stack([~value.detach().isfinite().all() for value in found]).sum()
    if accelerator.reduce(lost, reduction='sum').item():
        book.diverged('Loss or weights are not finite', run.state.update, run.optimizer)


def end(update: int, book: Logbook, interrupt: ckpt.Interrupt) -> None:
    """End a run that was interrupted and is saved.

    Raises:
        SystemExit: Always; exit code 128 and the number of the signal.
    """
    book.say(f'Interrupted at update {update}, which is saved; go on with the same command and --resume '
             f'--experiment {book.experiment.name}.', sys.stderr)
    sys.exit(128 + interrupt.signal)


def introduction(run: Run, accelerator: Accelerator) -> str:
    """The line a run begins with."""
    args, device = run.args, accelerator.device.type
    device_name = torch.cuda.get_device_name() if device == 'cuda' else device
    moe = [layer for _, layer in moe_layers(run.plain_model)]
    rate = f'share rate {args.share_rate:g}' if args.share_rate is not None else 'share rate by a policy'
    experts = f'{len(pulled(moe[0]))} experts in {len(moe)} FFNs, {rate}' if moe else 'dense'
    sets: List[Any] = [run.train_batches.dataset, run.val_batches.dataset]
    reached = args.epochs > args.warmup_epochs or args.warmup_prefix
    counts = ['?' if isinstance(images, IterableDataset) else len(images) for images in sets]
    return (
        f'{args.model}: {sum(p.numel() for p in run.plain_model.parameters()) / 1e6:.2f} M parameters, {experts}. '
        f'{counts[0]} training and {counts[1]} validation images of {args.num_classes} classes. '
        f'{accelerator.num_processes} x {device_name}{", sharded" * accelerator.is_fsdp2}, {run.epochs} epochs of '
        f'{run.length.updates} updates, learning rate {args.lr:.3g}'
        + f' (not reached: --warmup-epochs {args.warmup_epochs})' * (not reached) + '.')


def clip_gradients(run: Run, accelerator: Accelerator) -> None:
    """By `--clip-mode`: their norm, each value, or those of each unit relative to its weights (AGC, not the head)."""
    args = run.args
    if args.clip_mode == 'agc':
        accelerator.unscale_gradients()
        adaptive_clip_grad(model_parameters(run.plain_model, exclude_head=True), args.clip_grad)
    else:
        clip = accelerator.clip_grad_norm_ if args.clip_mode == 'norm' else accelerator.clip_grad_value_
        clip(run.plain_model.parameters(), args.clip_grad)


def train_epoch(run: Run, epoch: int, accelerator: Accelerator, book: Logbook, interrupt: ckpt.Interrupt) -> None:
    """One pass over the training images."""
    args, state = run.args, run.state
    run.model.train()
    set_epoch(run.train_batches, epoch)
    first = state.batch  # those before are in the checkpoint
    batches = accelerator.skip_first_batches(run.train_batches, first) if first else run.train_batches
    if run.mixup is not None and args.mixup_off_epoch:
        run.mixup.mixup_enabled = epoch < args.mixup_off_epoch
    book.start_epoch(epoch, first, state.loss_sum)
    for batch, (images, target) in enumerate(batches, first):
        seed_all(args.seed, 2, accelerator.process_index, epoch, batch)
        images, target = images.to(accelerator.device), target.to(accelerator.device)
        if run.mixup is not None:
            images, target = run.mixup(images, target)
        with accelerator.accumulate(run.model):
            with accelerator.autocast():
                if run.task is not None:
                    loss = run.task(images, target)['loss']
                else:
                    loss = run.criterion(run.model(images), target)
                routing = ewa.routing_losses(run.plain_model)
                if routing:
                    loss = loss + args.balance_loss_weight * routing['load_balance']
                    loss = loss + args.z_loss_weight * routing['z']
            book.count(loss, len(images))
            if batch >= run.length.batches - run.length.left_over:
                loss = loss * (args.grad_accum_steps / run.length.left_over)  # accelerate divides by the former
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.clip_grad is not None:
                clip_gradients(run, accelerator)
            run.optimizer.step()
            run.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        state.update += 1
        if run.ema is not None:
            run.ema.update(run.plain_model, step=state.update)
        book.log_update(state.update, run.optimizer, run.averager, routing)
        if args.sched_on_updates:
            run.scheduler.step_update(state.update)
        if batch + 1 < run.length.batches:
            save_within_epoch(run, batch + 1, accelerator, book, interrupt)
    book.warn('Training', complaint(run.train_batches.dataset))
    if not args.sched_on_updates:
        run.scheduler.step(epoch + 1)
    state.epoch, state.batch, state.loss_sum = epoch + 1, 0, 0.
    state.count(book.images, book.seconds, run.flops_per_image)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, accelerator: Accelerator) -> Dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 in per cent over all processes, each image counted once."""
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    for images, target in loader:
        images, target = images.to(accelerator.device), target.to(accelerator.device)
        with accelerator.autocast():
            output = model(images)
        output, target = accelerator.gather_for_metrics((output.float(), target))
        output, target = output[target != UNREADABLE], target[target != UNREADABLE]
        ranked = output.topk(min(5, output.shape[1])).indices == target[:, None]
        loss = torch.nn.functional.cross_entropy(output, target, reduction='sum')
        totals += torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), loss.new_tensor(len(target))]).double().cpu()
    model.train(training)
    loss, top1, top5, count = totals.tolist()
    count = count or math.nan  # of no image that could be read
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


def validate(run: Run, accelerator: Accelerator, book: Logbook) -> Dict[str, float]:
    """Metrics of the eval form, for random partition exactly what will be exported, and `ema_` ones of the average."""
    book.start_validation()
    metrics = evaluate(run.model, run.val_batches, accelerator)
    if run.ema is not None:
        metrics.update({
            f'ema_{key}': value for key, value in evaluate(run.ema.module, run.val_batches, accelerator).items()})
    book.warn('Validation', complaint(run.val_batches.dataset))
    return metrics


def fit(run: Run, accelerator: Accelerator, book: Logbook, interrupt: ckpt.Interrupt) -> None:
    """All epochs that are left."""
    args, state = run.args, run.state
    sample = next(iter(run.val_batches))[0]  # what the usage of experts is shown on
    for split, batches in (('Training', run.train_batches), ('Validation', run.val_batches)):
        book.warn(split, complaint(batches.dataset))
    for epoch in range(state.epoch, run.epochs):
        train_epoch(run, epoch, accelerator, book, interrupt)
        check_finite(run, accelerator, book)
        validated = state.epoch % args.val_interval == 0 or state.epoch == run.epochs
        metrics = validate(run, accelerator, book) if validated else {}
        if not math.isfinite(metrics.get('loss', 0.)):
            book.diverged(f'The validation loss is {metrics["loss"]}', state.update, run.optimizer)
        improved = validated and state.improve(metrics)
        state.provenance = dict(updates=state.update, epochs=state.epoch, seed=args.seed, **metrics)
        if run.averager is not None:
            state.provenance.update(share_rate=args.share_rate, share_schedule=args.share_schedule)
        ema = full_state(run.ema.module) if run.ema is not None else None
        book.end_epoch(whole_model(run), state, metrics, improved, sample, run.optimizer, ema)
        save(run, state, accelerator, book.experiment)
        if state.epoch < run.epochs and interrupt.asked(accelerator):
            end(state.update, book, interrupt)

    book.conclude(
        state, has_experts=run.averager is not None,
        teacher_top1=args.teacher_top1 if run.task is not None else None, dense_top1=args.dense_top1)


def main(
        argv: Optional[Sequence[str]] = None,
        *,
        open_dataset: Callable = open_dataset,
        create_optimizer: Callable = create_optimizer_v2,
        share_rate: Optional[RatePolicy] = None,
) -> Optional[Dict[str, Any]]:
    """Train; a mistake of the user's ends in one line and exit code 2, before anything is written.

    Args:
        argv: Command line; default: that of the process.
        open_dataset: Takes the place of `ewa.data.open_dataset`.
        create_optimizer: Takes the place of timm's `create_optimizer_v2`.
        share_rate: A policy for `ewa.ExpertAverager` that takes the place of `--share-rate` and its schedule.

    Returns:
        The best result, see `ewa.checkpoint.RunState`.
    """
    parser = train_parser()
    args = parser.parse_args(argv)
    logging.getLogger('timm').setLevel(logging.WARNING)
    if not args.data_dir and not args.dataset:
        parser.error('no images: give --data-dir DIR (a folder with train/ and val/), or try the embedded sample with '
                     '-c configs/demo.yaml')
    try:
        accelerator = make_accelerator(args)
    except ValueError as e:
        parser.error(str(e))
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model.split("/")[-1]}'
    experiment = Path(args.output) / broadcast_object_list([name])[0]  # clocks of machines differ

    try:
        check_launch(accelerator, args)
        resume_from = ckpt.resume_point(experiment, args.resume, named=bool(args.experiment))
        run = build(args, accelerator.num_processes, resume_from, open_dataset, create_optimizer, share_rate)
        state = run.state
        if args.resume:
            if state.epoch >= run.epochs:
                say(accelerator, f'{experiment} is finished: {state.epoch} of {run.epochs} epochs are done.')
                return state.best
            say(accelerator, ckpt.resumption(resume_from, state) if resume_from else
                f'No checkpoint in {experiment}: starting fresh.')
        prepare(run, accelerator)
        accelerator.wait_for_everyone()
        arguments = {key: value for key, value in vars(args).items() if key not in ('config', 'resume')}
        book = Logbook(  # from here on the run writes
            accelerator, experiment, arguments, state, run.epochs, run.length.updates, args.log_interval)
    except (ValueError, OSError) as e:
        if accelerator.is_main_process:
            parser.error(str(e))
        time.sleep(3)  # a launcher ends all processes as soon as one has ended: the main one speaks first
        sys.exit(2)

    book.say(f'{introduction(run, accelerator)} Writing {experiment}')
    if run.task is not None and args.teacher_top1 is None:
        args.teacher_top1 = evaluate(TeacherView(run.task), run.val_batches, accelerator)['top1']
        book.say(f'Teacher {args.teacher}: top-1 {args.teacher_top1:.2f}.')
    try:
        with book, ckpt.Interrupt() as interrupt:
            fit(run, accelerator, book, interrupt)
    except (OSError, NotPossible) as e:  # of a full disk, or images that can't be read
        message = str(e).strip().splitlines()[-1]  # a loader's worker gives its traceback as the message
        found = ckpt.checkpoints(experiment)
        way_out = (f'{found[-1].name} is whole, go on from it with the same command and --resume --experiment '
                   f'{experiment.name}' if found else 'no checkpoint was saved yet')
        print(f'{parser.prog}: error: {message}; {way_out}.', file=sys.stderr)
        sys.exit(1)
    accelerator.end_training()
    return state.best


if __name__ == '__main__':
    main()
