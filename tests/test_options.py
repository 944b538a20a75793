import re

import pytest
import timm
import torch
import yaml

import ewa
from ewa.moe import moe_layers
from ewa.options import build_model, convert_parser, moe_arguments, train_parser
from runs import FLAGS, ROOT, TINY, fails

DENSE = {k: v for k, v in TINY.items() if k != 'host'}
NAMED = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'patch_size=7', 'embed_dim=32', 'depth=2', 'num_heads=2']


def parse(*flags, config=None, tmp_path=None):
    if config is not None:
        (tmp_path / 'c.yaml').write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        flags = ['-c', str(tmp_path / 'c.yaml'), *flags]
    return train_parser().parse_args([str(flag) for flag in flags])


def build(*flags):
    torch.manual_seed(0)
    return build_model(parse(*FLAGS, '--num-classes', 10, *flags))


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
    assert moe_arguments(parse('--num-experts', 8, '--router', 'topk', '--top-k', 3, '--num-shared', 1,
                               '--expert-ratio', 0.5, '--expert-init', 'copy')) == dict(
        num_experts=8, router='topk', top_k=3, num_shared=1, expert_ratio=0.5, init='copy')
    with pytest.raises(ValueError, match='1,x'):
        moe_arguments(parse('--moe-layers', '1,x'))


def test_flags_reach_the_model():
    model = build('--num-experts', 3, '--moe-layers', 'all', '--drop-path', 0.5, '--img-size', 35, '--in-chans', 2,
                  '--gp', 'avg', '--num-classes', 6)
    assert [len(layer.experts) for _, layer in moe_layers(model)] == [3, 3]
    assert model.blocks[-1].drop_path1.drop_prob == 0.5 and model.global_pool == 'avg' and model.num_classes == 6
    assert model(torch.randn(1, 2, 35, 35)).shape == (1, 6)


def test_a_dense_name_is_dense_or_a_moe():
    dense = build(*NAMED)
    assert type(dense) is timm.models.VisionTransformer and not any(moe_layers(dense))
    moe = build(*NAMED, '--num-experts', 3)
    assert moe.pretrained_cfg['architecture'] == 'vit_ewa' and [n for n, _ in moe_layers(moe)] == ['blocks.1.mlp']
    with pytest.raises(ValueError, match='is dense; give --num-experts N'):
        build(*NAMED, '--top-k', 2)


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model('vit_tiny_patch16_224', **DENSE)
    torch.nn.init.uniform_(model.norm.weight)  # of weights that look fresh, experts would not be copies
    timm.models.save_for_hf(model, tmp_path / 'dense', safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    return model.state_dict()


@pytest.mark.parametrize('name', ['dense', 'dense.pth'])
def test_initial_checkpoint_is_copied_into_the_experts(dense, tmp_path, name):
    model = build('--initial-checkpoint', tmp_path / name)
    (layer,) = [layer for _, layer in moe_layers(model)]
    for expert in layer.experts:
        for key, value in expert.state_dict().items():
            assert torch.equal(value, dense[f'blocks.1.mlp.{key}'])
    rest = {k: v for k, v in model.state_dict().items() if '.experts.' not in k}
    assert all(torch.equal(value, dense[key]) for key, value in rest.items()) and 'head.weight' in rest


def test_initial_checkpoint_of_a_moe_goes_where_it_belongs(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model('vit_ewa', **TINY)
    ewa.exporting.write_folder(model, tmp_path / 'moe')
    built = build('--initial-checkpoint', tmp_path / 'moe')
    assert all(torch.equal(value, built.state_dict()[key]) for key, value in model.state_dict().items())


def test_pretrained_weights_get_another_classifier(dense, tmp_path):
    model = build(*NAMED, '--pretrained-path', tmp_path / 'dense.pth')
    for key, value in model.state_dict().items():
        assert torch.equal(value, dense[key]) == (key != 'head.weight')  # biases are zero in both
    assert build(*NAMED, '--pretrained-path', tmp_path / 'dense.pth', '--num-classes', 4).num_classes == 4


def test_a_folder_as_the_model(dense, tmp_path):
    model = build_model(parse('--model', f'local-dir:{tmp_path / "dense"}', '--num-classes', 10, '--in-chans', 1))
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('flags, message', [
    (['--model', 'vit_smal_ewa'], 'not a model; the nearest are vit_small_ewa'),
    (['--model-kwargs', 'host=nope'], "host='nope'"),
    (['--model-kwargs', 'patch_sise=7'], "can't be made with .*patch_sise"),
    (['--initial-checkpoint', 'nope.pth'], 'nope.pth does not exist'),
])
def test_mistakes_name_the_way_out(flags, message):
    with pytest.raises(ValueError, match=message):
        build(*flags)
