"""Command-line options of the scripts: flag names and meaning are those of timm's `train.py` where timm has them."""
import argparse
import difflib
import math
import os
import sys
from itertools import pairwise
from typing import Any, Dict, Iterable, List, Mapping, NoReturn, Optional, Sequence, Tuple

import yaml
from timm.utils import ParseKwargs

from .averaging import SCHEDULES
from .gathering import METHODS, Option
from .moe import ROUTERS
from .released import READERS

SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant')
WARMUP_EPOCHS = 5
CLIP_MODES = ('norm', 'value', 'agc')
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


class Number:
    """The type of a flag: numbers in a range that `--help` shows and the parser checks.

    Args:
        kind: `int` or `float`.
        low: Smallest value; None: no bound.
        high: Largest value; None: no bound.
        above: Whether `low` itself is out of the range.
        below: Whether `high` itself is.
    """

    def __init__(
            self,
            kind: type,
            low: Optional[float] = None,
            high: Optional[float] = None,
            above: bool = False,
            below: bool = False,
    ) -> None:
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below

    def __str__(self) -> str:
        if self.low is None:
            return ''
        low = f'above {self.low:g}' if self.above else f'{self.low:g}'
        if self.high is None:
            return low if self.above else f'at least {low}'
        return f'{low} to {"below " * self.below}{self.high:g}'

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        fits = math.isfinite(value) and (
            self.low is None or value > self.low or (value == self.low and not self.above)) and (
            self.high is None or value < self.high or (value == self.high and not self.below))
        if not fits:
            what = 'whole number' if self.kind is int else 'number'
            raise argparse.ArgumentTypeError(f'must be a {what}' + f', {self}' * bool(str(self)) + f'; got {text}')
        return value


COUNT = Number(int, 1)
WHOLE = Number(int, 0)
POSITIVE = Number(float, 0, above=True)
NOT_NEGATIVE = Number(float, 0)
SHARE = Number(float, 0, 1)
BELOW_ONE = Number(float, 0, 1, below=True)
NOT_ZERO_SHARE = Number(float, 0, 1, above=True)
PERCENT = Number(float, 0, 100)
FINITE = Number(float)


def cores() -> int:
    """What this process may use of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


class _Help(argparse.HelpFormatter):
    """A line for each flag: what it is, its range or its choices, and its default where it has one of its own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = self._format_args(action, 'NAME' if action.choices else action.dest.upper())
        return f'{", ".join(action.option_strings)} {values}'.strip()

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str):
        name = action.metavar or default_metavar
        return lambda count: name if isinstance(name, tuple) else (name,) * count

    def _get_help_string(self, action: argparse.Action) -> str:
        notes = [str(action.type)] if isinstance(action.type, Number) and str(action.type) else []
        if action.choices:
            notes.append(', '.join(filter(None, map(str, action.choices))))
        default = action.default
        if action.option_strings and default is not False and default not in (None, '', argparse.SUPPRESS, [], {}):
            values = default if isinstance(default, list) else [default]
            notes.append('default: ' + ' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values))
        return f'{action.help}' + f' ({"; ".join(notes)})' * bool(notes)


# flag, argument of `to_moe`, settings of the flag; `renormalise` is given by --model-kwargs
MOE_FLAGS: Tuple[Tuple[str, str, Dict[str, Any]], ...] = (
    ('--num-experts', 'num_experts', dict(
        type=Number(int, 2, 1024), metavar='N', help='experts a MoE layer; makes a dense model a MoE')),
    ('--moe-layers', 'layers', dict(
        metavar='WHICH', help='every:K, last:K, all, block indices "1,3,5", or a regular expression over names')),
    ('--expert-init', 'init', dict(
        choices=('copy', 'independent'), help='first weights; default: copies of one FFN')),
    ('--router', 'router', dict(choices=ROUTERS, help='random: random partition (EWA), others: gated')),
    ('--expert-form', 'form', dict(
        choices=('experts', 'mean'),
        help='random: as published, or mean and deviations; default: experts')),
    ('--spread', 'spread', dict(
        type=NOT_NEGATIVE, metavar='S', help='form mean: factor of the deviations; default: 0.3')),
    ('--top-k', 'top_k', dict(type=COUNT, metavar='K', help='gated: experts a token')),
    ('--num-shared', 'num_shared', dict(type=WHOLE, metavar='N', help='gated: experts that see every token')),
    ('--expert-ratio', 'expert_ratio', dict(
        type=NOT_ZERO_SHARE, metavar='R', help='gated: 1/m, hidden width of an expert over the FFN\'s')),
)


# flags of timm's train.py that ours lacks, and what is there instead
ABSENT = dict.fromkeys((
    'dataset-trust-remote-code no-resume-opt fuser fast-norm head-init-scale head-init-bias torchscript amp-impl '
    'model-dtype no-ddp-bb synchronize-step device-modules layer-decay-no-opt-scale lr-noise lr-noise-pct '
    'lr-noise-std lr-cycle-mul lr-cycle-decay lr-cycle-limit lr-k-decay epoch-repeats start-epoch patience-epochs '
    'aug-repeats aug-splits jsd-loss bce-pos-weight resplit drop-connect drop-block bn-momentum bn-eps sync-bn '
    'dist-bn split-bn model-ema-force-cpu save-images no-prefetcher tta use-multi-epochs-loader wandb-project '
    'wandb-tags wandb-resume-id naflex-loader naflex-train-seq-lens naflex-max-seq-len naflex-patch-sizes '
    'naflex-patch-size-probs naflex-loss-scale naflex-patchify-channels-first kd-model-kwargs kd-distill-type '
    'kd-loss-type kd-token-distill-type kd-student-feature-dim kd-teacher-feature-dim train-batch-sizes '
    'train-batches-per-epoch train-img-sizes train-size-probs train-size-random-mix train-size-schedule '
    'train-size-schedule-spread train-steps-per-epoch variable-batch-loss-scale').split(), '')
ABSENT.update({
    'log-wandb': 'give --log-with wandb', 'kd-model-name': 'give --teacher', 'local-rank': 'start it with torchrun',
    'dr': 'give --decay-rate',
    'worker-seeding': 'augmentation is drawn from --seed, epoch and image, whichever worker loads it'})


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes defaults from a YAML file (`-c`) and fails in one line that names the way out."""

    absent: Mapping[str, str] = {}  # flags of a script that this one is like, and what to give instead

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)
        self.add_argument('-c', '--config', metavar='FILE', help='YAML file of defaults, its keys are flag names')

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {" ".join(str(message).split())}\n')

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        # the file's entries become flags in front of the given ones: one set of checks, and the command line wins
        config = self._config_file(args)
        parsed, unknown = self.parse_known_args((self._config_flags(config) if config else []) + args, namespace)
        if unknown and not unknown[0].startswith('-') and getattr(parsed, 'resume', False):
            self.error(f'--resume takes no path, got {unknown[0]}: it goes on with --experiment')
        if unknown:
            self.error(f'unknown argument {unknown[0]}{self._nearest(unknown[0].lstrip("-"))}')
        data = parsed.__dict__.pop('data', None)
        if data is not None:
            if ('--resume', data) in pairwise(args):
                self.error(f'--resume takes no path: it goes on with --experiment; what is {data}?')
            if any(arg.split('=', maxsplit=1)[0] == '--data-dir' for arg in args):
                self.error(f'{data} belongs to no flag, and the data set is that of --data-dir {parsed.data_dir}')
            parsed.data_dir = data
        return parsed

    @staticmethod
    def _config_file(args: List[str]) -> Optional[str]:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument('-c', '--config')
        return finder.parse_known_args(args)[0].config

    def _nearest(self, name: str) -> str:
        name = name.split('=', maxsplit=1)[0].replace('_', '-')
        if name in self.absent:
            return ': a flag of timm\'s train.py that this one does not have' + f'; {self.absent[name]}'.rstrip('; ')
        if name == 'learning-rate':
            return '; the flag is --lr'
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith('--')]
        close = difflib.get_close_matches(name, flags, n=1)
        return f'; the nearest flag is --{close[0]}' if close else ''

    def _config_flags(self, path: str) -> List[str]:
        try:
            with open(path) as f:
                entries = yaml.safe_load(f) or {}
        except OSError as e:
            self.error(f'config file {path}: {e.strerror}')
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            self.error(f'config file {path} is not YAML: {e}')
        if not isinstance(entries, dict):
            self.error(f'config file {path} must be a list of "flag: value" lines')
        flags = []
        for key, value in entries.items():
            flag = f'--{str(key).replace("_", "-")}'
            action = self._option_string_actions.get(flag)
            if action is None:
                self.error(f'config file {path}: unknown key {key}{self._nearest(str(key))}')
            if action.dest == 'config' or value is None or value is False or value == '' or value == {}:
                continue
            if value is True:
                flags.append(flag)
            elif isinstance(value, dict):
                flags += [flag, *(f'{k}={v}' for k, v in value.items())]
            elif isinstance(value, (list, tuple)):
                flags += [flag, *map(str, value)]
            else:
                flags += [f'{flag}={value}']
        return [*flags, f'--config={path}']  # a last flag of one value, so that lists do not take a positional argument


class _InputSize(argparse.Action):
    """Channels, height and width, as the two flags that hold them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        channels, height, width = values
        if height != width:
            raise argparse.ArgumentError(self, f'{height} x {width} is not square')
        namespace.in_chans, namespace.img_size = channels, height


class _KeyValues(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        wrong = next((value for value in values if value and '=' not in value), None)
        if wrong is not None:
            raise argparse.ArgumentError(self, f'{wrong} is not KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_data_options(parser: argparse.ArgumentParser) -> Any:
    """Where images come from and how they are prepared; the same for training, validation and calibration.

    Returns:
        The group of these options.
    """
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='root of the data set')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='TYPE/NAME for torch, hfds, wds, tfds; default: folders or tars of images')
    group.add_argument('--train-split', metavar='NAME', default='train',
                       help='folder, .tar or name of the training split')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help='the same of validation; finds val/ too')
    group.add_argument('--train-num-samples', type=COUNT, metavar='N',
                       help='size of the training split of an iterable data set')
    group.add_argument('--val-num-samples', type=COUNT, metavar='N',
                       help='size of the validation split of an iterable data set')
    group.add_argument('--dataset-download', action='store_true',
                       help='allow torch/ and tfds/ data sets to be downloaded')
    group.add_argument('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    group.add_argument('--input-img-mode', metavar='MODE', help='PIL mode of images; default: RGB, of one channel L')
    group.add_argument('--input-key', metavar='KEY', help='key of images in hfds/, wds/ data sets')
    group.add_argument('--target-key', metavar='KEY', help='key of labels in hfds/, wds/ data sets')
    group.add_argument('--img-size', type=COUNT, metavar='N', help='image size; default: the model\'s')
    group.add_argument('--input-size', type=COUNT, nargs=3, action=_InputSize, default=argparse.SUPPRESS,
                       metavar=('C', 'H', 'W'),
                       help='--in-chans C and --img-size H in one')
    group.add_argument('--in-chans', type=COUNT, metavar='N', help='input channels; default: 3')
    group.add_argument('--crop-pct', type=POSITIVE, metavar='N', help='centre crop of validation images')
    group.add_argument('--mean', type=FINITE, nargs='+', metavar='M', help='pixel mean; default: the model\'s')
    group.add_argument('--std', type=POSITIVE, nargs='+', metavar='S',
                       help='pixel standard deviation; default: the model\'s')
    group.add_argument('--interpolation', default='', choices=('', *INTERPOLATIONS),
                       help='of resizing; default: the model\'s')
    group.add_argument('-b', '--batch-size', type=COUNT, default=128, metavar='N',
                       help='images of a process and micro-batch')
    group.add_argument('-j', '--workers', type=WHOLE, default=min(4, cores()), metavar='N',
                       help='data loading processes')
    return group


def train_parser() -> Parser:
    """The options of `train.py`."""
    parser = Parser(prog='train.py', usage='%(prog)s [-c FILE] DIR [--FLAG VALUE ...]',
                    description='Train a ViT, dense or as a mixture of experts.')
    parser.absent = ABSENT
    add_data_options(parser).add_argument('data', nargs='?', metavar='DIR', help='the same as --data-dir DIR')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='vit_small_ewa', metavar='NAME', help='timm model name, or local-dir:DIR')
    group.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    group.add_argument('--pretrained-path', metavar='PATH',
                       help='start from this file or folder as if it were pretrained')
    group.add_argument('--initial-checkpoint', default='', metavar='PATH',
                       help='start from all weights of it, the classifier too; dense ones go to all experts')
    group.add_argument('--num-classes', type=COUNT, metavar='N', help='default: found from the data')
    group.add_argument('--gp', metavar='POOL', help='global pool; default: the model\'s')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_KeyValues, metavar='KEY=VALUE',
                       help='further arguments of the model')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    group.add_argument('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    group.add_argument('--channels-last', action='store_true', help='memory layout of convolutions')

    group = parser.add_argument_group('Experts')
    for flag, _, settings in MOE_FLAGS:
        group.add_argument(flag, **settings)
    group.add_argument('--share-rate', type=BELOW_ONE, metavar='R',
                       help='pull to the mean; default: random 1e-3, form mean 0.1, gated 0')
    group.add_argument('--share-schedule', choices=SCHEDULES, default='constant', help='course of the share rate')
    group.add_argument('--share-warmup-epochs', type=NOT_NEGATIVE, metavar='N',
                       help='epochs until linear or cosine is full; default: all')
    group.add_argument('--share-every', type=COUNT, default=1, metavar='N', help='pull at every n-th update')
    group.add_argument('--share-stop-epoch', type=NOT_NEGATIVE, metavar='N', help='stop pulling after this many epochs')
    group.add_argument('--balance-loss-weight', type=NOT_NEGATIVE, default=0.01, metavar='W',
                       help='gated: load-balancing loss')
    group.add_argument('--z-loss-weight', type=NOT_NEGATIVE, default=0.001, metavar='W', help='gated: router z-loss')

    group = parser.add_argument_group('Distillation')
    group.add_argument('--teacher', metavar='NAME',
                       help='distil from this model: local-dir:DIR or a pretrained timm name')
    group.add_argument('--kd-temperature', type=POSITIVE, default=4.0, metavar='T',
                       help='temperature of both softmaxes')
    group.add_argument('--distill-loss-weight', type=NOT_NEGATIVE, metavar='W',
                       help='weight of the KL term; default: 1, or what --task-loss-weight leaves of 1')
    group.add_argument('--task-loss-weight', type=NOT_NEGATIVE, metavar='W',
                       help='weight of the label loss; default: 1')
    group.add_argument('--teacher-top1', type=PERCENT, metavar='PCT', help='accuracy of the teacher; default: measured')
    group.add_argument('--dense-top1', type=PERCENT, metavar='PCT',
                       help='accuracy of a dense model, to report the benefit kept')

    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='optimizer of timm.optim')
    group.add_argument('--opt-eps', type=NOT_NEGATIVE, metavar='EPS', help='epsilon; default: the optimizer\'s')
    group.add_argument('--opt-betas', type=BELOW_ONE, nargs='+', metavar='BETA',
                       help='betas; default: the optimizer\'s')
    group.add_argument('--momentum', type=BELOW_ONE, default=0.9, metavar='M', help='momentum where there is one')
    group.add_argument('--weight-decay', type=NOT_NEGATIVE, default=0.05, metavar='W', help='weight decay')
    group.add_argument('--clip-grad', type=POSITIVE, metavar='G', help='largest gradient; agc: relative to weights')
    group.add_argument('--clip-mode', choices=CLIP_MODES, default='norm',
                       help='norm of all, each value, or units relative to weights')
    group.add_argument('--layer-decay', type=NOT_ZERO_SHARE, metavar='D', help='layer-wise learning rate decay')
    group.add_argument('--layer-decay-min-scale', type=SHARE, default=0., metavar='S', help='its lowest scale')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=_KeyValues, metavar='KEY=VALUE',
                       help='further arguments')
    group.add_argument('--grad-accum-steps', type=COUNT, default=1, metavar='N', help='micro-batches an update')
    group.add_argument('--model-ema', action='store_true', help='keep an exponential moving average of the weights')
    group.add_argument('--model-ema-decay', type=SHARE, default=0.9998, metavar='D', help='its decay an update')
    group.add_argument('--model-ema-warmup', action='store_true', help='let the decay rise from 0')

    group = parser.add_argument_group('Learning rate')
    group.add_argument('--sched', default='cosine', choices=SCHEDULERS, help='course')
    group.add_argument('--sched-on-updates', action='store_true', help='step the schedule at each update, not epoch')
    group.add_argument('--lr', type=NOT_NEGATIVE, metavar='LR', help='learning rate; default: from --lr-base')
    group.add_argument('--lr-base', type=NOT_NEGATIVE, default=5e-4, metavar='LR',
                       help='learning rate at a batch of --lr-base-size')
    group.add_argument('--lr-base-size', type=COUNT, default=512, metavar='N', help='images an update')
    group.add_argument('--lr-base-scale', choices=('', 'linear', 'sqrt'), default='',
                       help='with the batch; default: sqrt if adaptive, else linear')
    group.add_argument('--epochs', type=COUNT, default=300, metavar='N', help='epochs to train')
    group.add_argument('--warmup-epochs', type=WHOLE, default=WARMUP_EPOCHS, metavar='N',
                       help='of these the first ones, in which the learning rate rises')
    group.add_argument('--warmup-lr', type=NOT_NEGATIVE, default=1e-6, metavar='LR',
                       help='learning rate at their beginning')
    group.add_argument('--warmup-prefix', action='store_true', help='count warm-up epochs apart from --epochs')
    group.add_argument('--min-lr', type=NOT_NEGATIVE, default=0., metavar='LR', help='learning rate at the end')
    group.add_argument('--cooldown-epochs', type=WHOLE, default=0, metavar='N', help='further epochs at --min-lr')
    group.add_argument('--decay-epochs', type=POSITIVE, default=90, metavar='N',
                       help='sched step: epochs from one decay to the next')
    group.add_argument('--decay-milestones', type=COUNT, nargs='+', default=[90, 180, 270], metavar='N',
                       help='sched multistep: epochs of decay')
    group.add_argument('--decay-rate', type=POSITIVE, default=0.1, metavar='R', help='factor of a decay')

    group = parser.add_argument_group('Augmentation and regularisation')
    group.add_argument('--no-aug', action='store_true', help='no training augmentation at all')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'),
                       help='how training images are cropped; default: rrc')
    group.add_argument('--scale', type=NOT_ZERO_SHARE, nargs=2, default=[0.08, 1.0], metavar='PCT',
                       help='area of random crops')
    group.add_argument('--ratio', type=POSITIVE, nargs=2, default=[3 / 4, 4 / 3], metavar='R',
                       help='aspect of random crops')
    group.add_argument('--hflip', type=SHARE, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--vflip', type=SHARE, default=0., metavar='P', help='probability of a vertical flip')
    group.add_argument('--color-jitter', type=NOT_NEGATIVE, default=0.4, metavar='F', help='strength of colour jitter')
    group.add_argument('--color-jitter-prob', type=SHARE, metavar='P', help='its probability; default: always')
    group.add_argument('--grayscale-prob', type=SHARE, default=0., metavar='P', help='probability of grey')
    group.add_argument('--gaussian-blur-prob', type=SHARE, default=0., metavar='P', help='probability of a blur')
    group.add_argument('--aa', metavar='NAME', help='RandAugment or AutoAugment, e.g. rand-m9-mstd0.5-inc1')
    group.add_argument('--reprob', type=SHARE, default=0., metavar='P', help='random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='what is put there')
    group.add_argument('--recount', type=COUNT, default=1, metavar='N', help='areas to erase')
    group.add_argument('--train-interpolation', default='random', choices=('random', *INTERPOLATIONS),
                       help='resize')
    group.add_argument('--mixup', type=NOT_NEGATIVE, default=0., metavar='ALPHA', help='alpha of mixup; 0: off')
    group.add_argument('--cutmix', type=NOT_NEGATIVE, default=0., metavar='ALPHA', help='alpha of cutmix; 0: off')
    group.add_argument('--cutmix-minmax', type=SHARE, nargs=2, metavar='R',
                       help='smallest and largest part to cut, instead of --cutmix')
    group.add_argument('--mixup-prob', type=SHARE, default=1., metavar='P', help='probability of mixing a batch')
    group.add_argument('--mixup-switch-prob', type=SHARE, default=0.5, metavar='P',
                       help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', choices=('batch', 'pair', 'elem'), default='batch',
                       help='what shares a draw')
    group.add_argument('--mixup-off-epoch', type=WHOLE, default=0, metavar='N',
                       help='no mixup from this epoch on; 0: never')
    group.add_argument('--smoothing', type=BELOW_ONE, default=0.1, metavar='S', help='label smoothing')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy')
    group.add_argument('--bce-sum', action='store_true', help='sum it over classes')
    group.add_argument('--bce-target-thresh', type=SHARE, metavar='T', help='make soft targets binary above this')
    group.add_argument('--drop', type=BELOW_ONE, metavar='P', help='dropout')
    group.add_argument('--drop-path', type=BELOW_ONE, metavar='P', help='stochastic depth')

    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=WHOLE, default=42, metavar='N', help='of all random numbers')
    group.add_argument('--amp', action='store_true', help='mixed precision (or by accelerate launch)')
    group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='with --amp')
    group.add_argument('-vb', '--validation-batch-size', type=COUNT, metavar='N', help='default: --batch-size')
    group.add_argument('--device', metavar='NAME', help='cpu, cuda, mps, ...; default: what accelerate finds')
    group.add_argument('--pin-mem', action='store_true', help='pin host memory of batches')
    group.add_argument('--log-interval', type=COUNT, default=50, metavar='N', help='updates between log entries')
    group.add_argument('--log-with', nargs='+', metavar='NAME',
                       help='trackers beside TensorBoard, of those that accelerate knows: wandb, mlflow, ...')
    group.add_argument('--val-interval', type=COUNT, default=1, metavar='N', help='epochs between validations')
    group.add_argument('--recovery-interval', type=WHOLE, default=0, metavar='N',
                       help='updates between checkpoints; 0: one an epoch')
    group.add_argument('--checkpoint-hist', type=COUNT, default=2, metavar='N', help='checkpoints to keep')
    group.add_argument('--eval-metric', choices=('top1', 'top5', 'loss'), default='top1',
                       help='what best/ is chosen by')
    group.add_argument('--output', default='output', metavar='DIR', help='parent of all experiments')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder of this run; default: time and model')
    group.add_argument('--resume', action='store_true',
                       help='go on with --experiment from its newest checkpoint if it has one; takes no path')
    return parser


def check_together(args: argparse.Namespace) -> None:
    """What flags of `train.py` must be to each other.

    Raises:
        ValueError: They are not.
    """
    # the default is no mistake of the user's: a shorter run ends while its learning rate rises, as in timm
    if args.epochs < args.warmup_epochs != WARMUP_EPOCHS and not args.warmup_prefix:
        raise ValueError(
            f'--warmup-epochs {args.warmup_epochs} is beyond --epochs {args.epochs}: give less, or --warmup-prefix to '
            f'add them.')
    for flag in ('scale', 'ratio', 'cutmix_minmax'):
        pair = vars(args)[flag]
        if pair and pair[0] > pair[1]:
            raise ValueError(f'--{flag.replace("_", "-")} {pair[0]:g} {pair[1]:g}: the smaller number comes first.')


def check_effect(args: argparse.Namespace, pulls: bool, gated: bool, mean: bool) -> None:
    """Flags of experts and distillation that were given must do something; timm's own may be there in vain, as in timm.

    Args:
        args: Of `train_parser`.
        pulls: Whether experts are pulled at a rate above 0.
        gated: Whether the model has MoE layers with a router,
        mean: or in mean form.

    Raises:
        ValueError: One does nothing.
    """
    in_vain = (
        (not pulls, 'where no experts are pulled', '--share-rate R above 0',
         ('share_schedule', 'share_warmup_epochs', 'share_every', 'share_stop_epoch')),
        (args.share_schedule == 'constant', 'at a constant rate', '--share-schedule linear', ('share_warmup_epochs',)),
        (not gated, 'without a router', '--router topk', ('top_k', 'balance_loss_weight', 'z_loss_weight')),
        (not mean, 'without experts in mean form', '--expert-form mean', ('spread',)),
        (not args.teacher, 'without a teacher', '--teacher NAME', (
            'kd_temperature', 'distill_loss_weight', 'task_loss_weight', 'teacher_top1', 'dense_top1')),
        (not args.torchcompile, 'alone', '--torchcompile', ('torchcompile_mode',)),
    )
    _refuse_idle(args, train_parser(), in_vain)


def check_images_used(args: argparse.Namespace, gated: bool) -> None:
    """`--calibration-dir` and `--calibration-images` must do something.

    Args:
        args: Of `convert_parser`.
        gated: Whether the model has MoE layers with a router.

    Raises:
        ValueError: It does nothing.
    """
    _refuse_idle(args, convert_parser(), (
        (not gated, 'without a router', 'a gated model', ('calibration_dir', 'calibration_images')),
        (not has_images(args), 'without images', '--calibration-dir DIR', ('calibration_images',))))


def has_images(args: argparse.Namespace) -> bool:
    """Whether `convert.py` was given images that a method may look at."""
    return bool(args.calibration_dir or args.data_dir or args.dataset)


def _refuse_idle(
        args: argparse.Namespace,
        parser: Parser,
        in_vain: Iterable[Tuple[bool, str, str, Tuple[str, ...]]],
) -> None:
    for idle, why, instead, flags in in_vain:
        for flag in flags:
            if idle and vars(args)[flag] != parser.get_default(flag):
                raise ValueError(
                    f'--{flag.replace("_", "-")} {vars(args)[flag]} does nothing {why}: leave it out, or give '
                    f'{instead}.')


def convert_parser() -> Parser:
    """The options of `convert.py`."""
    parser = Parser(prog='convert.py', usage='%(prog)s SRC --output DIR [--FLAG VALUE ...]',
                    description='Turn a MoE model into a dense one and export it as a vanilla timm folder.')
    parser.add_argument('source', metavar='SRC', help='model folder, checkpoint folder, .safetensors / .pth file, or '
                        'with --from the released files')
    parser.add_argument('--from', dest='layout', choices=tuple(READERS),
                        help='SRC is a MoE model as others released it, see docs/owners.md')
    parser.add_argument('--output', required=True, metavar='DIR', help='folder to make')
    parser.add_argument('--overwrite', action='store_true',
                        help='replace the model in DIR if there is one; other files there stay')
    parser.add_argument('--method', choices=(*METHODS, 'all'),
                        help='how experts become one FFN; all compares and writes the best; default: refit for a gated '
                        'model with images, else average')
    parser.add_argument('--calibration-dir', metavar='DIR',
                        help='images without labels for methods and reports that need data, a folder or tar; '
                        'default: the training split')
    parser.add_argument('--calibration-images', type=COUNT, default=1024, metavar='N', help='how many of them are used')
    parser.add_argument('--report', metavar='DIR', help='also write report.html: what was converted, what it changed')
    parser.add_argument('--use-ema', action='store_true', help='convert the EMA weights')
    parser.add_argument('--onnx', action='store_true', help='also write DIR/model.onnx and compare it with onnxruntime')
    group = parser.add_argument_group('Methods', '. '.join(
        f'{method.name}: {method.summary}' + f' ({method.source})' * bool(method.source)
        for method in METHODS.values()).replace('`', ''))
    group.add_argument('--k', type=COUNT, metavar='N',
                       help='experts kept, beside shared ones; default: as many as make FFNs of the usual width')
    for name, (option, takers) in _method_options().items():
        settings: Dict[str, Any] = dict(default=None, help=f'{", ".join(takers)}: {option.help}')
        if option.type is bool:
            settings['action'] = 'store_true'
        else:
            settings.update(type=option.type, choices=option.choices or None)
        group.add_argument(option.flag, dest=name, **settings)
    group = parser.add_argument_group('Bare files')
    group.add_argument('--model', metavar='NAME', help='architecture of the weights, e.g. vit_small_ewa')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_KeyValues, metavar='KEY=VALUE',
                       help='its arguments, e.g. num_classes=100 num_experts=8')
    add_data_options(parser)
    return parser


def moe_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """The arguments of `to_moe` that were given as flags.

    Raises:
        ValueError: `--moe-layers` holds numbers that are not block indices.
    """
    given = {argument: getattr(args, flag[2:].replace('-', '_')) for flag, argument, _ in MOE_FLAGS}
    given = {argument: value for argument, value in given.items() if value is not None}
    if given.get('layers', '')[:1].isdigit():
        try:
            given['layers'] = [int(i) for i in given['layers'].split(',')]
        except ValueError as e:
            raise ValueError(f'--moe-layers {args.moe_layers}: give block indices as 1,3,5.') from e
    return given


def gathering_options(args: argparse.Namespace, methods: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    """The options of gathering methods that were given as flags, by method.

    Args:
        args: Of `convert_parser`.
        methods: Those that are to be used.

    Raises:
        ValueError: None of them has such an option.
    """
    given: Dict[str, Dict[str, Any]] = {method: {} for method in methods}
    for name, (option, takers) in _method_options().items():
        value = getattr(args, name)
        if value is None:
            continue
        if not any(method in takers for method in methods):
            raise ValueError(
                f'{option.flag} is an option of {", ".join(takers)}, not of {", ".join(methods)}: leave '
                'it out or give another --method.')
        for method in methods:
            if method in takers:
                given[method][name] = value
    return given


def _method_options() -> Dict[str, Tuple[Option, List[str]]]:
    """Name of an option to what it is, and the gathering methods that take it."""
    options: Dict[str, Tuple[Option, List[str]]] = {}
    for method in METHODS.values():
        for option in method.options:
            options.setdefault(option.name, (option, []))[1].append(method.name)
    return options
