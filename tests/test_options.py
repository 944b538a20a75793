import re

import pytest
import torch
import yaml

from ewa.gathering import METHODS
from ewa.moe import ROUTERS, RandomPartitionMoE, moe_layers
from ewa.options import (
    ABSENT,
    MOE_FLAGS,
    check_effect,
    check_together,
    convert_parser,
    gathering_options,
    moe_arguments,
    train_parser,
)
from ewa.sources import build_model
from ewa.upcycle import ARGUMENTS
from runs import ROOT, fails


def parse(*flags, config=None, tmp_path=None):
    if config is not None:
        (tmp_path / 'c.yaml').write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        flags = ['-c', str(tmp_path / 'c.yaml'), *flags]
    return train_parser().parse_args([str(flag) for flag in flags])


def error_of(*flags):
    code, lines = fails(train_parser().parse_args, list(flags))
    assert code == 2 and len(lines) == 1
    return lines[0]


# the parser

def test_keys_of_a_file_are_flags_and_the_command_line_wins(tmp_path):
    config = {'model': 'vit_tiny_ewa', 'lr': 0.01, 'drop_path': 0.2, 'batch-size': 7, 'amp': True, 'model-ema': False,
              'mean': [0.1, 0.2, 0.3], 'model-kwargs': {'patch_size': 7, 'host': 'x'}, 'clip-grad': None,
              'initial-checkpoint': '', 'scale': [0.5, 1], 'moe-layers': 'all'}
    args = parse('--lr', 0.5, '--model-kwargs', 'depth=3', config=config, tmp_path=tmp_path)
    assert (args.model, args.lr, args.drop_path, args.batch_size) == ('vit_tiny_ewa', 0.5, 0.2, 7)
    assert args.amp is True and args.model_ema is False and args.clip_grad is None and args.initial_checkpoint == ''
    assert args.mean == [0.1, 0.2, 0.3] and args.scale == [0.5, 1] and args.model_kwargs == {'depth': 3}
    assert parse(config=config, tmp_path=tmp_path).model_kwargs == {'patch_size': 7, 'host': 'x'}
    untouched = vars(parse())
    assert {k for k, v in vars(args).items() if v != untouched[k]} == {
        'config', 'model', 'lr', 'drop_path', 'batch_size', 'amp', 'mean', 'model_kwargs', 'scale', 'moe_layers'}


def test_lists_of_a_file_do_not_take_the_positional_argument(tmp_path):
    for config in ({'model-kwargs': {'depth': 3}}, {'mean': [0.5]}):
        (tmp_path / 'c.yaml').write_text(yaml.safe_dump(config))
        args = convert_parser().parse_args(['-c', str(tmp_path / 'c.yaml'), 'source', '--output', 'out'])
        assert args.source == 'source'


def test_empty_file(tmp_path):
    assert {k: v for k, v in vars(parse(config='', tmp_path=tmp_path)).items() if k != 'config'} == {
        k: v for k, v in vars(parse()).items() if k != 'config'}


@pytest.mark.parametrize('config, words', [
    ({'shar-rate': 0.1}, ['unknown key shar-rate', 'nearest flag is --share-rate']),
    ({'num_expert': 4}, ['unknown key num_expert', 'nearest flag is --num-experts']),
    ({'lr': 'fast'}, ['--lr', 'fast']),
    ({'batch-size': 0}, ['--batch-size', 'at least 1']),
    ({'sched': 'cosin'}, ['--sched', 'cosin', 'cosine']),
    ({'amp': 'yes'}, ['--amp']),
    ({'scale': [0.5]}, ['--scale']),
    ('- lr\n', ['flag: value']),
    ('lr: [', ['not YAML']),
])
def test_mistakes_in_a_file(tmp_path, config, words):
    path = tmp_path / 'c.yaml'
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    line = error_of('-c', str(path))
    assert line.startswith('train.py: error: ') and all(word in line for word in words)


def test_abbreviations_are_unknown():
    assert 'unknown argument --share-ra; the nearest flag is --share-rate' in error_of('--share-ra', '0.1')
    assert 'unknown argument --learning-rate; the flag is --lr' in error_of('--learning-rate', '0.1')
    assert '--resume takes no path, got output/demo: it goes on with' in error_of('DIR', '--resume', 'output/demo')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda path: path.name)
def test_recipes_parse_and_build(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = train_parser().parse_args(['-c', str(path)])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, key.replace('-', '_')) == value
    args.num_classes, args.pretrained = 10, False
    with torch.device('meta'):
        model = build_model(args)
    if args.num_experts:
        assert {len(layer.experts) for _, layer in moe_layers(model)} == {args.num_experts}


@pytest.mark.parametrize('make', [train_parser, convert_parser])
def test_defaults_are_written_in_the_help(make):
    text = make().format_help()
    assert '--data-dir' in text and re.search(r'--batch-size N\s.*default: 128', text, re.S)
    assert '%(default)s' not in text


def test_names_and_defaults_are_those_of_timm():
    args = parse()
    # from timm's train.py; where ours differ on purpose: AdamW with weight decay, ViT sizes
    assert dict(sched=args.sched, min_lr=args.min_lr, warmup_lr=args.warmup_lr, reprob=args.reprob, hflip=args.hflip,
                scale=args.scale, color_jitter=args.color_jitter, smoothing=args.smoothing, seed=args.seed,
                mixup=args.mixup, model_ema_decay=args.model_ema_decay, epochs=args.epochs) == dict(
        sched='cosine', min_lr=0., warmup_lr=1e-6, reprob=0., hflip=0.5, scale=[0.08, 1.0], color_jitter=0.4,
        smoothing=0.1, seed=42, mixup=0., model_ema_decay=0.9998, epochs=300)


# from flags to a model

@pytest.mark.parametrize('text, layers', [
    ('1,3,5', [1, 3, 5]), ('0', [0]), ('every:2', 'every:2'), ('last:3', 'last:3'), ('all', 'all'),
    (r'blocks\.1\.mlp', r'blocks\.1\.mlp')])
def test_layers_as_text(text, layers):
    assert moe_arguments(parse('--moe-layers', text)) == {'layers': layers}


def test_only_given_expert_flags_are_passed():
    assert moe_arguments(parse()) == {}
    given = parse(
        '--num-experts', 8, '--router', 'topk', '--top-k', 3, '--num-shared', 1, '--expert-ratio', 0.5,
        '--expert-init', 'copy', '--expert-form', 'mean', '--spread', 0.5)
    assert moe_arguments(given) == dict(
        num_experts=8, router='topk', top_k=3, num_shared=1, expert_ratio=0.5, init='copy', form='mean', spread=0.5)
    with pytest.raises(ValueError, match='1,x'):
        moe_arguments(parse('--moe-layers', '1,x'))


def test_every_argument_of_to_moe_has_its_flag():
    arguments = [argument for _, argument, _ in MOE_FLAGS]
    assert len(set(arguments)) == len(arguments)
    # renormalise is on for good reasons; --model-kwargs renormalise=False where there are better ones
    assert set(arguments) == set(ARGUMENTS) - {'renormalise'}


def test_a_registered_router_can_be_chosen(monkeypatch):
    assert 'of-my-own' in error_of('--router', 'of-my-own')
    monkeypatch.setitem(ROUTERS, 'of-my-own', RandomPartitionMoE)
    assert moe_arguments(parse('--router', 'of-my-own')) == dict(router='of-my-own')


# from flags to a gathering method

def convert(*flags):
    return convert_parser().parse_args(['source', '--output', 'out', *flags])


def test_every_option_of_a_method_is_a_flag_with_help():
    text = ' '.join(convert_parser().format_help().split())
    for method in METHODS.values():
        assert f'{method.name}: {method.summary[:20]}'.replace('`', '') in text
        for option in method.options:
            assert f'{option.flag} ' in text and option.help[:30] in text


def test_options_go_to_the_methods_that_take_them():
    assert gathering_options(convert(), METHODS) == {name: {} for name in METHODS}
    given = convert('--rescale', '--lam', '0.5', '--reference', '2', '--score', 'norm')
    assert {name: options for name, options in gathering_options(given, METHODS).items() if options} == dict(
        sum=dict(rescale=True), top_kg=dict(rescale=True), svd_kg=dict(rescale=True), do_acp=dict(lam=0.5),
        aligned=dict(reference=2), prune=dict(score='norm'))
    assert gathering_options(convert('--lam', '0'), ['do_acp']) == dict(do_acp=dict(lam=0.))


@pytest.mark.parametrize('flags, methods, message', [
    (['--lam', '1'], ['average'], '--lam is an option of do_acp, not of average'),
    (['--rescale'], ['aligned'], '--rescale is an option of sum, top_kg, svd_kg, not of aligned'),
    (['--score', 'norm'], ['sum', 'average'], '--score is an option of prune, not of sum, average'),
])
def test_an_option_that_no_method_takes_is_refused(flags, methods, message):
    with pytest.raises(ValueError, match=message):
        gathering_options(convert(*flags), methods)


@pytest.mark.parametrize('line, words', [
    ('--clip-grad -1', '--clip-grad: must be a number, above 0; got -1'),
    ('--hflip 2', '--hflip: must be a number, 0 to 1; got 2'),
    ('--layer-decay nan', '--layer-decay: must be a number, above 0 to 1; got nan'),
    ('--smoothing 1', '--smoothing: must be a number, 0 to below 1; got 1'),
    ('--lr inf', '--lr: must be a number, at least 0; got inf'),
    ('--epochs 1.5', '--epochs: must be a whole number, at least 1'),
    ('--mean nan', '--mean: must be a number; got nan'),
    ('--model-ema-decay 2', '--model-ema-decay: must be a number, 0 to 1; got 2'),
    ('--seed -1', '--seed: must be a whole number, at least 0; got -1'),
])
def test_numbers_have_ranges(line, words, capsys):
    with pytest.raises(SystemExit) as e:
        train_parser().parse_args(line.split())
    assert e.value.code == 2 and words in capsys.readouterr().err


@pytest.fixture
def routers_of_ours(monkeypatch):
    """Without those that other tests registered."""
    for name in set(ROUTERS) - {'random', 'topk', 'cosine'}:
        monkeypatch.delitem(ROUTERS, name)


@pytest.mark.parametrize('make', [train_parser, convert_parser])
def test_every_flag_says_what_it_is_and_no_default_is_none(make, routers_of_ours):
    parser = make()
    assert all(action.help for action in parser._actions)
    text = ' '.join(parser.format_help().split())
    assert 'None' not in text
    for action in parser._actions:
        if action.choices and action.option_strings:
            assert all(str(choice) in text for choice in action.choices)


def test_help_has_one_line_a_flag_with_choices_and_default_once(routers_of_ours):
    parser = train_parser()
    lines = parser.format_help().splitlines()
    assert len(lines) <= 155 and max(map(len, lines)) <= 120
    for action in parser._actions:
        flag = action.option_strings[-1] if action.option_strings else action.metavar
        line, = [line for line in lines if re.match(rf'  (-\w+, )?{flag} .*  \S', line)]
        assert line.count('default') <= 1, line
        if action.choices:
            assert ', '.join(filter(None, action.choices)) in line and '{' not in line
        if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            assert f'default: {action.default:g})' in line


def test_the_folder_of_images_with_or_without_its_flag(tmp_path):
    for flags in (['data'], ['--lr', '1', 'data'], ['data', '--amp'], ['--data-dir', 'data']):
        assert parse(*flags).data_dir == 'data' and 'data' not in vars(parse(*flags))
    assert parse('data', config={'data-dir': 'other', 'mean': [0.5]}, tmp_path=tmp_path).data_dir == 'data'
    assert parse(config={'data-dir': 'other'}, tmp_path=tmp_path).data_dir == 'other' and parse().data_dir is None
    assert 'data belongs to no flag' in error_of('data', '--data-dir', 'other')
    assert '--resume takes no path' in error_of('--resume', 'output/a')


def test_input_size_is_two_flags_in_one():
    args = parse('--input-size', 1, 28, 28)
    assert (args.in_chans, args.img_size) == (1, 28) and 'input_size' not in vars(args)


@pytest.mark.parametrize('flag, words', [
    ('--aug-repeats', ''), ('--log-wandb', 'give --log-with wandb'), ('--local_rank=0', 'torchrun'),
    ('--worker-seeding', 'whichever worker loads it')])
def test_flags_of_timm_that_are_not_here_are_named_as_such(flag, words, tmp_path):
    line = error_of(flag)
    assert f'unknown argument {flag}: a flag of timm\'s train.py that this one does not have' in line
    assert words in line and 'nearest' not in line
    (tmp_path / 'c.yaml').write_text('jsd_loss: true\n')
    assert 'unknown key jsd_loss: a flag of timm' in error_of('-c', str(tmp_path / 'c.yaml'))
    assert 'nearest' not in error_of('--zzzzzz') and not set(ABSENT) & {
        option.lstrip('-') for action in train_parser()._actions for option in action.option_strings}


@pytest.mark.parametrize('line, words', [
    ('--warmup-epochs 301', 'beyond --epochs 300'), ('--scale 1 0.1', 'the smaller number comes first'),
    ('--cutmix-minmax 0.8 0.2', 'the smaller number comes first')])
def test_flags_that_contradict_each_other(line, words):
    with pytest.raises(ValueError, match=words):
        check_together(train_parser().parse_args(line.split()))
    check_together(train_parser().parse_args(['--warmup-epochs', '301', '--warmup-prefix']))
    check_together(train_parser().parse_args(['--epochs', '1']))


@pytest.mark.parametrize('flags, words', [
    (['--top-k', '3'], '--top-k 3 does nothing without a router: leave it out, or give --router topk'),
    (['--z-loss-weight', '0.1'], '--z-loss-weight 0.1 does nothing without a router'),
    (['--spread', '1'], '--spread 1.0 does nothing without experts in mean form: leave it out, or give --expert-form'),
    (['--share-every', '2'], '--share-every 2 does nothing where no experts are pulled: leave it out, or give'),
    (['--dense-top1', '70'], '--dense-top1 70.0 does nothing without a teacher'),
    (['--kd-temperature', '2'], '--kd-temperature 2.0 does nothing without a teacher'),
    (['--torchcompile-mode', 'default'], '--torchcompile-mode default does nothing alone')])
def test_flags_in_vain_are_refused(flags, words):
    args = train_parser().parse_args(flags)
    with pytest.raises(ValueError, match=re.escape(words)):
        check_effect(args, pulls=False, gated=False, mean=False)
    args.teacher, args.torchcompile = 'name', 'inductor'
    args.share_schedule = 'linear'
    check_effect(args, pulls=True, gated=True, mean=True)


def test_defaults_are_never_in_vain():
    """Neither is a file that says them."""
    given = ['--balance-loss-weight', '0.01', '--kd-temperature', '4', '--share-every', '1', '--amp-dtype', 'bfloat16']
    check_effect(train_parser().parse_args(given), pulls=False, gated=False, mean=False)


def test_a_warm_up_of_a_constant_share_rate_is_in_vain():
    args = train_parser().parse_args(['--share-warmup-epochs', '2'])
    with pytest.raises(ValueError, match='--share-warmup-epochs 2.0 does nothing at a constant rate'):
        check_effect(args, pulls=True, gated=False, mean=False)
