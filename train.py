"""Train a ViT, dense or as a mixture of experts, on images.

    python train.py -c configs/demo.yaml                                         # the embedded sample, on any machine
    python train.py --model vit_small_ewa --data-dir imagenet                    # one device
    torchrun --nproc_per_node 8 train.py --model vit_small_ewa --data-dir imagenet --amp --amp-dtype bfloat16
    accelerate launch --num_machines 2 --num_processes 16 train.py -c configs/imagenet_vit_small_ewa.yaml

Writes under OUTPUT/EXPERIMENT: args.yaml, summary.csv, TensorBoard events, checkpoints/, and the model
folders last/ and best/. These hold the MoE; `python convert.py OUTPUT/EXPERIMENT/best --output DIR` makes the plain
ViT.
"""
import json
import logging
import math
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from timm.data import Mixup
from timm.data.model_config import resolve_input_data_config
from timm.loss import create_classification_loss
from timm.models import get_model_args, get_model_input_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3, trim_summary, update_summary
from torch.utils.data import IterableDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import ewa
from ewa import checkpoint as ckpt
from ewa.data import SeededDataset, check_classes, class_names, eval_loader, open_dataset, seed_all, train_loader
from ewa.diagnostics import diagnose, similarity_figure, usage_figure
from ewa.distillation import TeacherView, benefit_kept, distillation_task, forward_flops, load_teacher
from ewa.exporting import write_folder
from ewa.moe import is_random, moe_layers
from ewa.options import build_model, train_parser


@torch.no_grad()
def evaluate(model, loader, accelerator):
    """Mean cross-entropy, top-1 and top-5 in per cent over all processes, each image counted once."""
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    for images, target in loader:
        images, target = images.to(accelerator.device), target.to(accelerator.device)
        with accelerator.autocast():
            output = model(images)
        output, target = accelerator.gather_for_metrics((output.float(), target))
        ranked = output.topk(min(5, output.shape[1])).indices == target[:, None]
        loss = torch.nn.functional.cross_entropy(output, target, reduction='sum')
        totals += torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), loss.new_tensor(len(target))]).double().cpu()
    model.train(training)
    loss, top1, top5, count = totals.tolist()
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


def main(argv=None):
    parser = train_parser()
    args = parser.parse_args(argv)
    logging.getLogger('timm').setLevel(logging.WARNING)
    if not args.data_dir and not args.dataset:
        parser.error('no images: give --data-dir DIR (a folder with train/ and val/), or try the embedded sample with '
                     '-c configs/demo.yaml')

    accelerator = Accelerator(
        mixed_precision={'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else None,
        gradient_accumulation_steps=args.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        step_scheduler_with_optimizer=False,
    )
    main_process = accelerator.is_main_process
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model.split("/")[-1]}'
    experiment = Path(args.output) / broadcast_object_list([name])[0]  # clocks of machines differ

    # everything a user can get wrong is found out here, before anything is written
    try:
        resume_from = None
        if args.resume:
            if not args.experiment:
                raise ValueError('--resume needs --experiment NAME, the run to go on with.')
            resume_from = (ckpt.checkpoints(experiment) or [None])[-1]
        elif experiment.exists() and (not experiment.is_dir() or any(experiment.iterdir())):
            raise ValueError(f'{experiment} exists: give another --experiment, or --resume to go on with it.')
        train_set = open_dataset(args, args.train_split, is_training=True, in_chans=args.in_chans or 3)
        val_set = open_dataset(args, args.val_split, is_training=False, in_chans=args.in_chans or 3)
        args.num_classes = check_classes(train_set, val_set, args.num_classes)
        names = class_names(train_set)
        seed_all(args.seed, 0)
        model = build_model(args)
        in_chans = get_model_input_config(model)['input_size'][0]
        if in_chans != (args.in_chans or 3):
            raise ValueError(f'--model {args.model} takes images of {in_chans} channels: give --in-chans {in_chans}.')
        data_config = resolve_input_data_config(model, vars(args))
        model.pretrained_cfg = dict(model.pretrained_cfg, mean=data_config['mean'], std=data_config['std'])
        flops_per_image = 3 * forward_flops(model, data_config['input_size'])  # backward: about twice the forward
        teacher = None
        if args.teacher:
            for key, low in (('kd_temperature', 1e-6), ('distill_loss_weight', 0.), ('task_loss_weight', 0.)):
                if vars(args)[key] is not None and vars(args)[key] < low:
                    raise ValueError(f'--{key.replace("_", "-")} {vars(args)[key]} is too small.')
            if args.distill_loss_weight is None and (args.task_loss_weight or 0.) > 1:
                raise ValueError(
                    f'--task-loss-weight {args.task_loss_weight}: alone it can be at most 1, the KL term gets the '
                    'rest; or give --distill-loss-weight too.')
            teacher = load_teacher(args.teacher, model.num_classes, data_config['input_size'][0])
            try:
                flops_per_image += forward_flops(teacher, data_config['input_size'])
            except (AssertionError, RuntimeError) as e:
                raise ValueError(f'--teacher {args.teacher} can\'t take the images of the student: {e}') from e
        iterable = isinstance(train_set, IterableDataset)
        if not iterable:
            train_set = SeededDataset(train_set, args.seed)
        train_batches = train_loader(train_set, args, data_config)
        val_batches = eval_loader(val_set, args, data_config)
        if not iterable and len(train_set) < args.batch_size * accelerator.num_processes:
            raise ValueError(
                f'{len(train_set)} training images do not fill one batch of --batch-size {args.batch_size} on '
                f'{accelerator.num_processes} process(es).')

        images_per_update = args.batch_size * accelerator.num_processes * args.grad_accum_steps
        if args.lr is None:
            scale = args.lr_base_scale or ('sqrt' if any(o in args.opt for o in ('ada', 'lamb', 'lion')) else 'linear')
            ratio = images_per_update / args.lr_base_size
            args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)

        batches_per_epoch = len(train_batches) if iterable else len(train_batches) // accelerator.num_processes
        updates_per_epoch = math.ceil(batches_per_epoch / args.grad_accum_steps)
        left_over = batches_per_epoch % args.grad_accum_steps  # micro-batches of the last update
        if iterable and left_over:  # only of others accelerate sees the end coming
            raise ValueError(
                f'An epoch of {batches_per_epoch} batches is no multiple of --grad-accum-steps '
                f'{args.grad_accum_steps}: give another --train-num-samples.')
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)

        averager = None
        if any(moe_layers(model)):
            if args.share_rate is None:
                args.share_rate = 1e-3 if any(is_random(layer) for _, layer in moe_layers(model)) else 0.
            averager = ewa.ExpertAverager(
                model, args.share_rate, args.share_schedule, every=args.share_every,
                total_steps=max(1, round(updates_per_epoch * (
                    epochs if args.share_warmup_epochs is None else args.share_warmup_epochs))),
                stop_after=None if args.share_stop_epoch is None else round(args.share_stop_epoch * updates_per_epoch))
            averager.attach(optimizer)
        elif args.share_rate:
            raise ValueError(f'--share-rate {args.share_rate}: {args.model} has no experts; give --num-experts N.')

        mixup = None
        if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax:
            mixup = Mixup(
                args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                label_smoothing=args.smoothing, num_classes=args.num_classes)
            if args.batch_size % 2:
                raise ValueError(f'--batch-size {args.batch_size} must be even with mixup or cutmix.')
        bce = dict(bce_sum=args.bce_sum, bce_target_thresh=args.bce_target_thresh) if args.bce_loss else {}
        criterion = create_classification_loss(
            'bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=mixup is not None, **bce)

        plain_model = model  # holds the parameters whatever wraps it
        if args.torchcompile:
            model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)

        # what a checkpoint must have been made by
        flags = {key: vars(args)[key] for key in (
            'opt', 'weight_decay', 'layer_decay', 'model_ema', 'torchcompile', 'eval_metric')}
        identity = json.loads(json.dumps(dict(
            architecture=plain_model.pretrained_cfg['architecture'], **get_model_args(plain_model))))
        start_epoch, update, best = 0, 0, None
        state = {'images': 0, 'seconds': 0.}
        if resume_from is not None:
            state = ckpt.read_state(resume_from)
            other = {k: v for k, v in state['model'].items() if identity.get(k) != v}
            if other or len(identity) != len(state['model']):
                key = next(iter(other), None) or next(k for k in identity if k not in state['model'])
                raise ValueError(
                    f'{resume_from} is a checkpoint of another model: its {key} is {state["model"].get(key)}, here it '
                    f'is {identity.get(key)}.')
            key = next((key for key in flags if flags[key] != state['flags'].get(key, flags[key])), None)
            if key is not None:
                raise ValueError(
                    f'{resume_from} was trained with --{key.replace("_", "-")} {state["flags"][key]}, here it is '
                    f'{flags[key]}.')
            start_epoch, update, best = state['epoch'], state['update'], state['best']
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError) as e:
        if main_process:
            parser.error(str(e) or repr(e))
        sys.exit(2)

    def say(message, file=sys.stdout):
        if main_process:
            tqdm.write(message, file=file)

    if args.resume:
        if start_epoch >= epochs:
            say(f'{experiment} is finished: {start_epoch} of {epochs} epochs are done.')
            return best
        say(f'Resuming from {resume_from}, epoch {start_epoch}.' if resume_from else
            f'No checkpoint in {experiment}: starting fresh.')

    # from here on the run writes
    accelerator.wait_for_everyone()
    if main_process:
        try:
            experiment.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            parser.error(f'--output {args.output} can\'t be written: {e.strerror}.')
        resolved = {k: v for k, v in vars(args).items() if k not in ('config', 'resume')}
        (experiment / 'args.yaml').write_text(yaml.safe_dump(resolved))
        trim_summary(str(experiment / 'summary.csv'), start_epoch + 1)
        board = SummaryWriter(str(experiment), purge_step=update + 1 if update else None)
        board.add_text('arguments', f'```\n{yaml.safe_dump(resolved)}\n```')
        device_name = torch.cuda.get_device_name() if accelerator.device.type == 'cuda' else accelerator.device.type
        moe = list(moe_layers(model))
        experts = 'dense' if not moe else (
            f'{len(moe[0][1].experts)} experts in {len(moe)} FFNs, share rate {args.share_rate:g}')
        say(f'{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {experts}. '
            f'{len(train_set) if not iterable else "?"} training and '
            f'{len(val_set) if not isinstance(val_set, IterableDataset) else "?"} validation images of '
            f'{args.num_classes} classes. {accelerator.num_processes} x {device_name}, {epochs} epochs of '
            f'{updates_per_epoch} updates, learning rate {args.lr:.3g}. Writing {experiment}')

    model, optimizer = accelerator.prepare(model, optimizer)
    if not iterable:  # iterable readers of timm split themselves among processes
        train_batches, val_batches = accelerator.prepare(train_batches, val_batches)
    task = None
    if teacher is not None:
        task = distillation_task(
            model, teacher.to(accelerator.device), criterion, args.kd_temperature, args.distill_loss_weight,
            args.task_loss_weight, accelerator.device)
        if args.teacher_top1 is None:
            args.teacher_top1 = evaluate(TeacherView(task), val_batches, accelerator)['top1']
            say(f'Teacher {args.teacher}: top-1 {args.teacher_top1:.2f}.')
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(plain_model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        if averager is not None:
            averager.load_state_dict(state['averager'])
        if ema is not None:
            ema.module.load_state_dict(ckpt.load_ema(resume_from))
    if args.sched_on_updates:
        scheduler.step_update(update)
    else:
        scheduler.step(start_epoch)

    interactive = main_process and sys.stderr.isatty()
    bar = tqdm(
        total=epochs * updates_per_epoch, initial=update, disable=not interactive, unit='update', dynamic_ncols=True,
        bar_format='{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}]{postfix}')
    metrics = {}
    sample = next(iter(val_batches))[0]  # what the usage of experts is shown on
    for epoch in range(start_epoch, epochs):
        model.train()
        if not iterable:
            train_set.set_epoch(epoch)
            train_batches.set_epoch(epoch)
        elif hasattr(train_batches.dataset, 'set_epoch'):
            train_batches.dataset.set_epoch(epoch)
        if mixup is not None and args.mixup_off_epoch:
            mixup.mixup_enabled = epoch < args.mixup_off_epoch
        bar.set_description(f'epoch {epoch + 1}/{epochs}')
        loss_sum, loss_count, images_seen, started = torch.zeros((), device=accelerator.device), 0, 0, time.time()

        for batch, (images, target) in enumerate(train_batches):
            seed_all(args.seed, 2, accelerator.process_index, epoch, batch)
            if iterable:
                images, target = images.to(accelerator.device), target.to(accelerator.device)
            if mixup is not None:
                images, target = mixup(images, target)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = task(images, target)['loss'] if task is not None else criterion(model(images), target)
                    routing = ewa.routing_losses(plain_model)
                    if routing:
                        loss = loss + args.balance_loss_weight * routing['load_balance']
                        loss = loss + args.z_loss_weight * routing['z']
                last = batch >= batches_per_epoch - left_over  # accelerate divides by --grad-accum-steps all the same
                accelerator.backward(loss * (args.grad_accum_steps / left_over) if last else loss)
                if accelerator.sync_gradients and args.clip_grad is not None:
                    clip = accelerator.clip_grad_norm_ if args.clip_mode == 'norm' else accelerator.clip_grad_value_
                    clip(plain_model.parameters(), args.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach()
            loss_count += 1
            images_seen += len(images) * accelerator.num_processes
            if not accelerator.sync_gradients:
                continue

            update += 1
            if ema is not None:
                ema.update(plain_model, step=update)
            if args.sched_on_updates:
                scheduler.step_update(update)
            bar.update()
            if update % args.log_interval == 0 or update % updates_per_epoch == 0:
                mean_loss = accelerator.reduce(loss_sum, reduction='mean').item() / loss_count
                if not math.isfinite(mean_loss):
                    say(f'The training loss is {mean_loss} in epoch {epoch + 1}: stopping.', sys.stderr)
                    sys.exit(1)
                speed = images_seen / (time.time() - started)
                if main_process:
                    rate = {'train/share_rate': averager.share_rate} if averager is not None else {}
                    aux = {f'train/{k}': v.item() for k, v in routing.items()}
                    scalars = {
                        'train/loss': mean_loss, 'train/lr': max(group['lr'] for group in optimizer.param_groups),
                        'train/images_per_second': speed, 'train/epoch': epoch + 1, **rate, **aux}
                    for key, scalar in scalars.items():
                        board.add_scalar(key, scalar, update)
                    top1 = metrics.get('top1', math.nan)
                    bar.set_postfix_str(f'loss {mean_loss:.3f}, top-1 {top1:.1f}, {speed:.0f} images/s')
                    if not interactive and update % updates_per_epoch:
                        say(f'epoch {epoch + 1}/{epochs} update {update} loss {mean_loss:.4f} {speed:.0f} images/s')
        if not args.sched_on_updates:
            scheduler.step(epoch + 1)
        spent = dict(images=state['images'] + images_seen, seconds=state['seconds'] + time.time() - started)
        spent['pflops'] = spent['images'] * flops_per_image / 1e15
        state.update(spent)

        # validation on the eval form: for random partition exactly what will be exported
        validated = (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs
        if validated:
            metrics = evaluate(model, val_batches, accelerator)
            if ema is not None:
                metrics.update({f'ema_{k}': v for k, v in evaluate(ema.module, val_batches, accelerator).items()})
        sign = -1 if args.eval_metric == 'loss' else 1
        value, weights = metrics.get(args.eval_metric), 'model'
        if ema is not None and validated and sign * metrics[f'ema_{args.eval_metric}'] > sign * value:
            value, weights = metrics[f'ema_{args.eval_metric}'], 'EMA'
        improved = validated and (best is None or sign * value > sign * best['value'])
        if improved:
            best = dict(value=value, epoch=epoch + 1, weights=weights, **metrics)

        ema_state = ema.module.state_dict() if ema is not None else None
        provenance = dict(updates=update, epochs=epoch + 1, seed=args.seed, **(metrics if validated else {}))
        if averager is not None:
            provenance.update(share_rate=args.share_rate, share_schedule=args.share_schedule)
        if main_process:
            records = diagnose(plain_model, [sample], align=False)
            for key, scalar in [*((f'eval/{k}', v) for k, v in metrics.items() if validated),
                                *((f'spent/{k}', v) for k, v in spent.items()),
                                *((f'experts_{k}/{record["layer"]}', record[k]) for record in records
                                  for k in ('distance', 'cosine', 'entropy', 'change') if k in record)]:
                board.add_scalar(key, scalar, update)
            if records and validated:
                board.add_figure('experts/similarity', similarity_figure(records), update)
                usage = usage_figure(records)
                if usage is not None:
                    board.add_figure('experts/usage', usage, update)
            board.flush()
            if validated:
                update_summary(
                    epoch + 1, dict(loss=mean_loss, **spent), metrics, str(experiment / 'summary.csv'),
                    lr=max(group['lr'] for group in optimizer.param_groups))
            for folder in ['last'] + ['best'] * improved:
                write_folder(
                    plain_model, experiment / folder, names, data_config, provenance, ema_state, overwrite=True,
                    verify=False)
            spread = '' if not records else (
                f', experts {sum(r["distance"] for r in records) / len(records):.2g} from their mean')
            scores = '' if not validated else (
                f', validation loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f}'
                + (f', EMA {metrics["ema_top1"]:.2f}' if ema is not None else ''))
            say(f'epoch {epoch + 1}/{epochs}: loss {mean_loss:.4f}{scores}, {speed:.0f} images/s{spread}')
        ckpt.save_checkpoint(
            accelerator, experiment, update,
            dict(epoch=epoch + 1, batch=0, best=best, model=identity, flags=flags, class_names=names,
                 data_config=data_config, provenance=provenance, **spent,
                 averager=averager.state_dict() if averager is not None else None),
            ema_state, args.checkpoint_hist)

    bar.close()
    if main_process:
        board.close()
        if task is not None:
            kept = '' if args.dense_top1 is None else (
                f', {100 * benefit_kept(metrics["top1"], args.dense_top1, args.teacher_top1):.1f} % of the benefit of '
                f'the teacher ({args.teacher_top1:.2f}) over a dense model ({args.dense_top1:.2f}) kept')
            say(f'Distilled with {state["images"]} images, {state["pflops"]:.3g} PFLOP, {state["seconds"]:.0f} s: '
                f'top-1 {metrics["top1"]:.2f}{kept}.')
        of_ema = best.get('weights') == 'EMA'
        say(f'Best {args.eval_metric}: {best["value"]:.2f} in epoch {best["epoch"]}{" (EMA weights)" * of_ema}.')
        say(f'Export the plain ViT with:  python convert.py {experiment / "best"} --output {experiment / "vit"}'
            + ' --use-ema' * of_ema
            if averager is not None else f'The model is in {experiment / "best"}{" (ema.safetensors)" * of_ema}.')
    accelerator.end_training()
    return best


if __name__ == '__main__':
    main()
