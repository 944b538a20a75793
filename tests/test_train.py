import math
import os
import subprocess
import sys

import pytest
import timm
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from PIL import ImageOps
from safetensors.torch import load_file

import ewa
from ewa.checkpoint import read_state
from ewa.diagnostics import distances_to_mean
from ewa.exporting import write_folder
from ewa.options import train_parser
from runs import (  # noqa: F401  fixtures among them
    FLAGS,
    HOST,
    ROOT,
    TINY,
    close,
    config_of,
    equal,
    fails,
    files,
    folder,
    go,
    logits_and_labels,
    make_folder,
    newest,
    reset,
    run_convert,
    run_train,
    sample_images,
    scalars,
    summary,
    train,
    trained,
    weights,
)

# averages over time

def test_ema_follows_its_formula(go):
    flags = ['--batch-size', 80, '--model-ema', '--model-ema-decay', 0.25, '--sched', 'constant']
    first = weights(go(*flags, '--epochs', 1, experiment='first'))
    run = go(*flags, '--epochs', 2, experiment='second')
    second, ema = weights(run), load_file(run / 'last' / 'ema.safetensors')
    assert not equal(first, second)
    for key in second:  # timm's average starts with the weights after the first update
        torch.testing.assert_close(ema[key], torch.lerp(first[key], second[key], 0.75))


# flags reach what they name

def test_dense_name_trains_dense_and_as_a_moe(go):
    dense = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{k}={v}' for k, v in HOST.items()), '--epochs', 1]
    run = go(*dense, experiment='dense')
    assert config_of(run / 'last')['architecture'] == 'vit_tiny_patch16_224'
    vanilla = timm.create_model('vit_tiny_patch16_224', **{k: v for k, v in TINY.items() if k != 'host'})
    vanilla.load_state_dict(weights(run))
    run = go(*dense, '--num-experts', 3, '--moe-layers', 'all', experiment='moe')
    model = ewa.load(run / 'last')
    assert config_of(run / 'last')['architecture'] == 'vit_ewa'
    assert [len(layer.experts) for _, layer in ewa.moe.moe_layers(model)] == [3, 3]


def test_accumulated_micro_batches_are_one_batch(go):
    flags = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{k}={v}' for k, v in HOST.items()), '--no-aug',
             '--opt', 'sgd', '--epochs', 1]
    whole = go(*flags, experiment='whole')
    parts = go(*flags, '--batch-size', 8, '--grad-accum-steps', 2, experiment='parts')
    assert close(weights(whole), weights(parts), atol=1e-6)
    # the last update of an epoch takes what is left, and is not carried into the next
    rest = go(*flags, '--grad-accum-steps', 3, '--epochs', 2, experiment='rest')
    assert read_state(newest(rest)).update == 4
    # nor is its gradient smaller for that
    exact, larger = (go(*flags, '--grad-accum-steps', n, experiment=str(n)) for n in (5, 8))
    assert close(weights(exact), weights(larger), atol=1e-6)


@pytest.mark.parametrize('per_update', [True, False])
def test_warm_up_per_update_or_per_epoch(go, per_update):
    run = go('--epochs', 4, '--warmup-epochs', 2, '--warmup-lr', 0.0001, '--sched', 'cosine', '--log-interval', 1,
             *['--sched-on-updates'] * per_update)
    lr = scalars(run, 'train/lr')
    slope = (0.002 - 0.0001) / 2
    # what is logged is the rate that was used, as timm does
    assert [float(row['lr']) for row in summary(run)] == pytest.approx([lr[t] for t in (5, 10, 15, 20)])
    if per_update:
        assert [lr[t] for t in (1, 5, 9)] == pytest.approx([0.0001 + slope * (t - 1) / 5 for t in (1, 5, 9)], rel=1e-4)
        assert lr[11] > lr[12] > lr[19]
    else:
        assert {round(lr[t], 7) for t in range(1, 6)} == {0.0001}
        assert [lr[t] for t in (6, 10)] == pytest.approx([0.0001 + slope] * 2)
        assert len({lr[t] for t in range(11, 16)}) == 1


def test_a_learning_rate_that_warm_up_never_reaches_is_named(go, capsys):
    go('--epochs', 1, '--warmup-epochs', 1, '--lr', 0.002, experiment='short')
    assert 'learning rate 0.002 (not reached: --warmup-epochs 1).' in capsys.readouterr().out
    go('--epochs', 1, '--warmup-epochs', 1, '--warmup-prefix', '--lr', 0.002, experiment='prefix')
    assert 'learning rate 0.002.' in capsys.readouterr().out
    go('--epochs', 2, '--warmup-epochs', 1, '--lr', 0.002, experiment='longer')
    assert 'learning rate 0.002.' in capsys.readouterr().out


def test_clipping_and_layer_decay(go):
    flags = ['--opt', 'momentum', '--momentum', 0, '--weight-decay', 0, '--share-rate', 0, '--epochs', 1, '--lr', 1]
    train.seed_all(42, 0)
    start = train.build_model(train_parser().parse_args([*FLAGS, '--num-classes', '10'])).state_dict()

    def moved(run):
        return {key: (value - start[key]).norm().item() for key, value in weights(run).items()}

    clipped = moved(go(*flags, '--clip-grad', 1e-3, experiment='norm'))
    assert 0 < math.hypot(*clipped.values()) <= 5 * 1e-3 * 1.01  # 5 updates of at most that norm, by a rate of 1
    by_value = go(*flags, '--clip-grad', 1e-4, '--clip-mode', 'value', experiment='value')
    largest = max((value - start[key]).abs().max().item() for key, value in weights(by_value).items())
    assert 0 < largest <= 5 * 1e-4 * 1.01

    run = go('--layer-decay', 0.5, '--epochs', 1, '--log-interval', 1, '--sched', 'constant', experiment='decay')
    assert scalars(run, 'train/lr')[1] == pytest.approx(0.002)
    groups = torch.load(newest(run) / 'optimizer.bin', weights_only=True)['param_groups']
    assert {group['lr_scale'] for group in groups} == {1, 0.5, 0.25, 0.125}


def test_units_are_clipped_relative_to_their_weights(go):
    run = go('--opt', 'momentum', '--momentum', 0, '--weight-decay', 0, '--epochs', 1, '--lr', 1, '--channels-last',
             '--clip-grad', 1e-3, '--clip-mode', 'agc', '--device', 'cpu')
    train.seed_all(42, 0)
    start = train.build_model(train_parser().parse_args([*FLAGS, '--num-classes', '10'])).state_dict()
    for key, value in weights(run).items():
        if value.ndim > 1 and key.startswith(('blocks', 'patch_embed')):  # 5 updates by a rate of 1
            units = [tensor.flatten(1).norm(dim=1) for tensor in (value - start[key], start[key])]
            assert (units[0] <= 5 * 1e-3 * 1.01 * units[1]).all() and units[0].sum() > 0, key
    assert (weights(run)['head.weight'] - start['head.weight']).norm() > 0.01 * start['head.weight'].norm()


def test_other_trackers_get_the_curves_too(go, monkeypatch):
    told = {}

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = 'wandb', False, True

        def __init__(self, run_name, **kwargs):
            super().__init__()
            told['begin'] = run_name, kwargs['name']

        def start(self):
            pass

        def store_init_configuration(self, values):
            told['share_rate'] = values['share_rate']

        def log(self, values, step=None, **kwargs):
            told.update({(key, step): value for key, value in values.items()})

        def finish(self):
            told['end'] = True

        tracker = None

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, 'wandb', Tracker)
    monkeypatch.setattr(tracking, '_available_trackers', [LoggerType.WANDB])
    run = go('--log-with', 'wandb', '--epochs', 1)
    assert told['begin'] == ('ewa', run.name) and told['share_rate'] == '0.001' and told['end']
    for tag in ('train/loss', 'eval/top1', 'experts_distance/blocks.1.mlp'):
        (step, value), = scalars(run, tag).items()
        assert told[tag, step] == pytest.approx(value)


def test_a_tracker_that_cant_start_leaves_nothing(folder, tmp_path, monkeypatch):
    def init_trackers(*args, **kwargs):
        raise RuntimeError('api_key not configured')

    monkeypatch.setattr(train.Accelerator, 'init_trackers', init_trackers)
    monkeypatch.setattr(tracking, '_available_trackers', [LoggerType.WANDB])
    code, lines = fails(run_train, '--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--log-with',
                        'wandb')
    assert code == 2 and lines == ["train.py: error: --log-with wandb can't start: api_key not configured"]
    assert not (tmp_path / 'run').exists()


def test_share_rate_reaches_the_experts(go):
    runs = [go('--share-rate', rate, '--expert-init', 'independent', '--epochs', 1, experiment=f'rate{rate}')
            for rate in (0, 0.75)]
    apart, together = (distances_to_mean(ewa.load(run / 'last'))['blocks.1.mlp'] for run in runs)
    assert apart > 1 and together < 1e-5
    run = go('--share-rate', 0.1, '--share-every', 2, '--share-stop-epoch', 1, '--log-interval', 1, experiment='stop')
    assert read_state(newest(run)).averager == dict(steps=10, pulls=5)
    rates = scalars(run, 'train/share_rate')
    assert rates[1] == pytest.approx(0.1) and rates[10] == 0
    run = go('--share-rate', 0.1, '--share-schedule', 'linear', '--share-warmup-epochs', 0, '--epochs', 1,
             '--log-interval', 1, experiment='at once')
    assert list(scalars(run, 'train/share_rate').values()) == pytest.approx([0.1] * 5)


@pytest.mark.parametrize('flags', [
    ['--aa', 'rand-m9-mstd0.5-inc1', '--reprob', 0.5, '--color-jitter', 0.4, '--smoothing', 0.1],
    ['--mixup', 0.8, '--cutmix', 1.0, '--mixup-off-epoch', 1],
    ['--bce-loss', '--cutmix-minmax', 0.2, 0.6],
    ['--opt', 'lamb', '--sched', 'step', '--decay-epochs', 1],
    ['--amp', '--amp-dtype', 'bfloat16', '--model-ema'],
    ['--grad-checkpointing', '--drop', 0.1],
], ids=lambda flags: flags[0][2:])
def test_options_train(go, flags):
    run = go(*flags)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights(run).values())
    assert summary(run)[-1]['eval_loss'] < 2.4  # log(10) = 2.303 for a guess


@pytest.mark.parametrize('form', ['experts', 'mean'])
def test_recomputed_activations_change_nothing(go, form):
    # the random partition is drawn again in the backward pass
    flags = ['--epochs', 1, '--expert-form', form]
    assert close(weights(go(*flags, experiment='kept')),
                 weights(go(*flags, '--grad-checkpointing', experiment='recomputed')), atol=1e-6)


def test_the_mean_form_trains_tells_its_deviations_and_converts(go, tmp_path):
    run = go('--expert-form', 'mean', '--spread', 0.5, '--model-ema', '--amp', '--amp-dtype', 'bfloat16',
             '--grad-accum-steps', 2)
    model = ewa.load(run / 'last').eval()
    assert {f'blocks.1.mlp.{part}.fc1.weight' for part in ('mean', 'deviations.0', 'deviations.3')} <= set(weights(run))
    distance = list(scalars(run, 'experts_distance/blocks.1.mlp').values())[-1]
    assert distance == pytest.approx(ewa.diagnose(model)[0]['distance'], rel=1e-3) and distance > 0
    run_convert(run / 'last', '--output', tmp_path / 'vit')
    vit = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(vit(x), model(x)) and not any(ewa.moe.moe_layers(vit))
    assert list(scalars(run, 'train/share_rate').values()) == pytest.approx([0.1, 0.1])


@pytest.mark.slow
def test_compiled_training_is_the_same_training(go):
    flags = ['--model-ema', '--sched', 'constant', '--epochs', 1]
    compiled = go(*flags, '--torchcompile', 'eager', experiment='compiled')
    assert close(weights(go(*flags, experiment='plain')), weights(compiled), atol=1e-6)
    go(*flags, '--torchcompile', 'eager', '--resume', '--epochs', 2, experiment='compiled')
    assert close(weights(go(*flags, '--resume', '--epochs', 2, experiment='plain')), weights(compiled), atol=1e-5)


@pytest.mark.slow
def test_an_unknown_compiler_is_a_mistake(folder, tmp_path):
    code, lines = fails(run_train, '--data-dir', folder, '--output', tmp_path / 'o', '--torchcompile', 'nope')
    assert code == 2 and "'nope'" in lines[-1] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_sample_is_learnt(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    reset()
    best = train.main(['-c', 'configs/demo.yaml', '--epochs', '6', '--workers', '0', '--output', str(tmp_path)])
    assert best['top1'] > 65


# mistakes

@pytest.fixture(scope='session')
def mistakes(folder, tmp_path_factory):
    """Folders and files that are not what they should be."""
    root = tmp_path_factory.mktemp('mistakes')
    (root / 'empty').mkdir()
    for name in ('half', 'other'):
        (root / name).mkdir()
        os.symlink(folder / 'train', root / name / 'train')
    (root / 'noimages' / 'train' / 'a').mkdir(parents=True)
    (root / 'noimages' / 'val' / 'a').mkdir(parents=True)
    (root / 'other' / 'val').mkdir()
    for path in (folder / 'val').iterdir():
        os.symlink(path, root / 'other' / 'val' / path.name.replace('bag', 'handbag'))
    (root / 'file').write_text('not a model')
    (root / 'full').mkdir()
    (root / 'full' / 'notes.txt').write_text('mine')
    dense = {k: v for k, v in TINY.items() if k != 'host'}
    for name, kwargs in (('deep', dict(depth=3)), ('classes', dict(num_classes=7)), ('wide', dict(embed_dim=64))):
        torch.save(timm.create_model('vit_tiny_patch16_224', **{**dense, **kwargs}).state_dict(), root / f'{name}.pth')
    torch.save(timm.create_model('deit3_small_patch16_224', **dense).state_dict(), root / 'deit3.pth')
    torch.save(timm.create_model('vit_ewa', **TINY, num_experts=3).state_dict(), root / 'three.pth')
    write_folder(timm.create_model('vit_tiny_patch16_224', **dict(dense, img_size=56)), root / 'large')
    (root / 'typo.yaml').write_text('shar-rate: 0.1\n')
    (root / 'broken.yaml').write_text('a: [1\n')
    return root


MISTAKES = {
    'no folder': ('--data-dir {}/missing', 'missing does not exist'),
    'empty folder': ('--data-dir {}/empty', 'has no folder train'),
    'no split': ('--data-dir {}/half', 'has no folder val', 'found: train'),
    'no images': ('--data-dir {}/noimages', 'noimages', '0 images'),
    'other classes': ('--data-dir {}/other', 'differ', 'bag only in training', 'handbag only in validation'),
    'class count': ('--num-classes 5', '10 classes', '--num-classes says 5'),
    'unknown model': ('--model vit_smal_ewa', 'not a model', 'vit_small_ewa'),
    'unknown host': ('--model-kwargs host=nope', "host='nope'"),
    'unknown argument': ('--model-kwargs foo=1', "'foo'"),
    'no value': ('--model-kwargs depth', '--model-kwargs', 'depth is not KEY=VALUE'),
    'unknown flag': ('--shar-rate 0.1', 'unknown argument --shar-rate', 'nearest flag is --share-rate'),
    'unknown key': ('-c {}/typo.yaml', 'typo.yaml', 'unknown key shar-rate', 'nearest flag is --share-rate'),
    'broken file': ('-c {}/broken.yaml', 'not YAML'),
    'no file': ('-c {}/nope.yaml', 'nope.yaml', 'No such file'),
    'large share rate': ('--share-rate 0.8', '(E-1)/E = 0.75', '0.8'),
    'negative share rate': ('--share-rate -0.1', '-0.1'),
    'share rate of a dense model': (
        '--model vit_tiny_patch16_224 --model-kwargs patch_size=7 --share-rate 0.1', 'no experts', '--num-experts'),
    'one expert': ('--num-experts 1', 'must be a whole number, 2 to 1024'),
    'no such block': ('--moe-layers 7', '7 is not a block index'),
    'too many batches': ('--batch-size 100', '80 training images', '--batch-size 100'),
    'odd mixup': ('--batch-size 15 --mixup 1', 'even'),
    'unknown optimizer': ('--opt nope', 'nope'),
    'deaf optimizer': ('--opt lookahead_adamw', 'Lookahead', 'Give --opt adamw.'),
    'no such device': ('--device cuda', '--device cuda: accelerate finds cpu here'),
    'one of several devices': ('--device cpu:1', 'accelerate launch'),
    'tracker without its package': ('--log-with wandb', 'pip install wandb'),
    'unknown tracker': ('--log-with nope', 'nope', 'mlflow'),
    'path to resume': ('--resume {}/full', '--resume takes no path', 'full'),
    'two folders': ('{}/full', 'full belongs to no flag'),
    'sides that differ': ('--input-size 1 28 32', '28 x 32 is not square'),
    'unknown policy': ('--aa nope', 'nope'),
    'no epochs': ('--epochs 0', '--epochs', 'at least 1'),
    'no such interpolation': ('--interpolation nope', 'nope', 'bicubic'),
    'unknown kind of data': ('--dataset tourch/cifar10', 'tourch/cifar10', 'torch/NAME'),
    'unknown data set': ('--dataset torch/nope', 'nope'),
    'data set not there': ('--dataset torch/cifar10', 'torch/cifar10', "can't be read"),
    'output is a file': ('--output {}/file', 'file', 'Not a directory'),
    'output exists': ('--output {} --experiment full', 'full exists', '--resume'),
    'resume what': ('--resume', '--experiment'),
    'cold distillation': ('--teacher nope --kd-temperature 0', '--kd-temperature: must be a number, above 0; got 0'),
    'heavy label loss': ('--teacher nope --task-loss-weight 1.5', '--task-loss-weight 1.5', 'at most 1'),
    'teacher of larger images': ('--teacher local-dir:{}/large', 'large', "can't take the images of the student"),
    'no checkpoint': ('--initial-checkpoint {}/nope.pth', 'nope.pth does not exist'),
    'not a checkpoint': ('--initial-checkpoint {}/file', 'file', "can't be loaded"),
    'deeper checkpoint': ('--initial-checkpoint {}/deep.pth', 'deep.pth', 'blocks.2'),
    'wider checkpoint': ('--initial-checkpoint {}/wide.pth', 'wide.pth'),
    'other architecture': ('--initial-checkpoint {}/deit3.pth', 'deit3.pth'),
    'other classifier': ('--initial-checkpoint {}/classes.pth', 'classes.pth', '7'),
    'other experts': ('--initial-checkpoint {}/three.pth', '3 experts', '4'),
    'not a folder of a model': ('--model local-dir:{}/empty', 'config.json'),
}


@pytest.mark.parametrize('flags, words', [(text, words) for text, *words in MISTAKES.values()], ids=list(MISTAKES))
def test_a_mistake_gives_one_line_and_exit_code_2(mistakes, folder, tmp_path, flags, words):
    before = {name: (mistakes / 'full' / name).read_text() for name in os.listdir(mistakes / 'full')}
    given = flags.replace('{}', str(mistakes)).split()
    output = [] if '--output' in given else ['--output', tmp_path / 'output']
    code, lines = fails(run_train, '--data-dir', folder, *output, *given)
    errors = [line for line in lines if line.startswith('train.py: error: ')]
    assert code == 2 and len(errors) == 1 and lines[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    assert not list(tmp_path.iterdir())
    assert before == {name: (mistakes / 'full' / name).read_text() for name in os.listdir(mistakes / 'full')}
    assert (mistakes / 'file').read_text() == 'not a model'


def test_model_of_other_channels_than_the_images(trained, folder, tmp_path):
    code, lines = fails(train.main, [
        '--model', f'local-dir:{trained / "best"}', '--data-dir', str(folder), '--output', str(tmp_path / 'o')])
    assert code == 2 and 'takes images of 1 channels: give --in-chans 1' in lines[-1] and not list(tmp_path.iterdir())


def test_without_data_the_sample_is_offered(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'train.py')], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert 'no images: give --data-dir DIR' in line and '-c configs/demo.yaml' in line


def test_an_exploding_loss_stops_the_run(folder, tmp_path):
    code, lines = fails(run_train, '--data-dir', folder, '--output', tmp_path, '--experiment', 'a', '--lr', 1e30,
                        '--opt', 'sgd')
    assert code == 1 and any('loss is nan' in line or 'loss is inf' in line for line in lines)
    assert not (tmp_path / 'a' / 'checkpoints').exists() and not (tmp_path / 'a' / 'last').exists()


# what a study may put in the place of ours

def test_seams(folder, tmp_path):
    opened, made, rates = [], [], []

    def open_dataset(args, split, **kwargs):
        opened.append(split)
        return train.open_dataset(args, split, **kwargs)

    def create_optimizer(model, **kwargs):
        made.append(kwargs['opt'])
        return timm.optim.create_optimizer_v2(model, **kwargs)

    def policy(layer, t):
        rates.append(t)
        return 0.75 if t == 5 else 0.

    reset()
    train.main([*FLAGS, '--data-dir', str(folder), '--output', str(tmp_path), '--experiment', 'a', '--epochs', '1',
                '--expert-init', 'independent', '--log-interval', '1'],
               open_dataset=open_dataset, create_optimizer=create_optimizer, share_rate=policy)
    assert opened == ['train', 'validation'] and made == ['adamw'] and set(rates) == {1, 2, 3, 4, 5, 6}
    assert scalars(tmp_path / 'a', 'train/share_rate')[4] == 0.75  # of the next pull
    assert distances_to_mean(ewa.load(tmp_path / 'a' / 'last'))['blocks.1.mlp'] < 1e-5


# large and several

@pytest.fixture(scope='session')
def colour(tmp_path_factory):
    """An ImageNet-style folder of colour JPEG and PNG images of uneven sizes, 4 classes."""
    root = tmp_path_factory.mktemp('colour')
    for split, per_class in (('train', 3), ('val', 2)):
        for i, (name, image) in enumerate(sample_images(split, per_class)):
            if name not in ('bag', 'coat', 'dress', 'sandal'):
                continue
            image = ImageOps.colorize(image, 'navy', ('gold', 'red', 'lime')[i % 3]).resize((230 + i, 250))
            (root / split / name).mkdir(parents=True, exist_ok=True)
            image.save(root / split / name / f'{i}.{("jpg", "png")[i % 2]}')
    return root


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--model', 'vit_small_ewa'], ['--model', 'deit3_small_patch16_224', '--num-experts', '4']], ids=['ewa', 'deit3'])
def test_real_models_train_at_224_pixels_and_convert(colour, tmp_path, capsys, flags):
    reset()
    train.main([*flags, '--data-dir', str(colour), '--epochs', '1', '--batch-size', '4', '--workers', '0',
                '--output', str(tmp_path), '--experiment', 'a', '--checkpoint-hist', '1'])
    assert read_state(newest(tmp_path / 'a')).update == 3
    run_convert(tmp_path / 'a' / 'best', '--output', tmp_path / 'vit', '--data-dir', colour, '--workers', 0)
    out = capsys.readouterr().out
    host = 'deit3_small_patch16_224' if 'deit3' in flags[1] else 'vit_small_patch16_224'
    assert config_of(tmp_path / 'vit')['architecture'] == host
    vit = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(vit(image), ewa.load(tmp_path / 'a' / 'best').eval()(image))
    before = f'top-1 of 8 images: {summary(tmp_path / "a")[0]["eval_top1"]:.2f} before'
    assert before in out


RANKS = """
import sys, torch, train
from accelerate import PartialState
models, build_model = [], train.build_model
train.build_model = lambda args: models.append(build_model(args)) or models[-1]
train.main(sys.argv[2:])
state = PartialState()
assert state.num_processes == 2
torch.save(models[0].state_dict(), f'{sys.argv[1]}/rank{state.process_index}.pt')
"""


def two_processes(tmp_path, *flags, script=RANKS):
    path = tmp_path / 'ranks.py'
    path.write_text(script)
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(path),
         str(tmp_path), *FLAGS, *map(str, flags)], capture_output=True, text=True,
        env={**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})


@pytest.mark.slow
def test_two_processes(tmp_path):
    data = make_folder(tmp_path / 'data', train=8, val=3)  # 30 images: the last batches are filled up, not counted
    flags = ['--data-dir', data, '--output', tmp_path, '--batch-size', 8, '--mixup', 0.8, '--drop-path', 0.1,
             '--model-ema', '--model-ema-decay', 0.5]
    done = two_processes(tmp_path, *flags, '-vb', 7)  # no name: both processes must agree on one
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('2 x cpu, 2 epochs of 5 updates') == 1
    (run,) = [path for path in tmp_path.iterdir() if (path / 'summary.csv').exists()]
    ranks = [torch.load(tmp_path / f'rank{i}.pt') for i in (0, 1)]
    assert equal(*ranks) and equal(ranks[0], weights(run))
    row = summary(run)[-1]
    for ema, prefix in ((False, 'eval_'), (True, 'eval_ema_')):
        logits, labels = logits_and_labels(ewa.load(run / 'last', ema=ema), data)
        assert len(labels) == 30
        assert row[f'{prefix}top1'] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
        assert row[f'{prefix}loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    done = two_processes(tmp_path, *flags, '--experiment', run.name)
    assert done.returncode != 0 and done.stderr.count('train.py: error: ') == 1 and 'exists' in done.stderr


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path, folder):
    flags = ['--data-dir', folder, '--output', tmp_path, '--batch-size', 8, '--mixup', 0.8, '--drop-path', 0.1,
             '--sched', 'constant']
    for experiment, calls in (('whole', [[2]]), ('parts', [[1], [2, '--resume']])):
        for epochs, *more in calls:
            done = two_processes(tmp_path, *flags, '--experiment', experiment, '--epochs', epochs, *more)
            assert done.returncode == 0, done.stderr
    assert equal(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_and_loses_nothing(tmp_path, folder):
    flags = ['--data-dir', folder, '--output', tmp_path, '--batch-size', 2, '--drop-path', 0.1]
    assert two_processes(tmp_path, *flags, '--experiment', 'whole').returncode == 0
    interrupted = RANKS.replace('train.main(', """
import os, signal
seed_all = train.seed_all
def interrupt(*key):
    if key == (42, 2, 1, 0, 3):
        os.kill(os.getpid(), signal.SIGTERM)
    seed_all(*key)
train.seed_all = interrupt
train.main(""")
    done = two_processes(tmp_path, *flags, '--experiment', 'parts', script=interrupted)
    assert done.returncode != 0 and done.stderr.count('Interrupted at update 10, which is saved') == 1
    done = two_processes(tmp_path, *flags, '--experiment', 'parts', '--resume')
    assert done.returncode == 0 and 'update-00000010, epoch 0, batch 10.' in done.stdout, done.stderr
    assert equal(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


def _broken(*args, **kwargs):
    return None + 1


@pytest.mark.parametrize('where', [
    'train.build_model', 'train.check_classes', 'train.make_optimizer', 'train.make_averager', 'train.prepare',
    'ewa.upcycle.select_ffns', 'ewa.averaging.ExpertAverager.attach', 'ewa.checkpoint.start', 'ewa.data.class_names'])
def test_a_mistake_of_ours_is_a_traceback(folder, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, _broken)
    with pytest.raises(TypeError, match='NoneType'):
        run_train('--data-dir', folder, '--output', tmp_path, '--experiment', 'run')
