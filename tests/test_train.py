import math
import os
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from PIL import ImageOps
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ewa
from ewa.checkpoint import checkpoints, read_state
from ewa.diagnostics import distances_to_mean
from ewa.exporting import write_folder
from ewa.options import train_parser
from runs import (  # noqa: F401  fixtures among them
    FLAGS,
    HOST,
    ROOT,
    TINY,
    config_of,
    fails,
    files,
    folder,
    logits_and_labels,
    make_folder,
    reset,
    run_convert,
    run_train,
    sample_images,
    summary,
    train,
    trained,
)


@pytest.fixture
def go(folder, tmp_path):
    """A run on the folder of images; returns its experiment folder."""
    def start(*flags, experiment='a', data=folder):
        run_train('--data-dir', data, '--output', tmp_path, '--experiment', experiment, *flags)
        return tmp_path / experiment

    return start


def events(experiment):
    accumulator = EventAccumulator(str(experiment), size_guidance=dict(scalars=0, tensors=0, images=0))
    return accumulator.Reload()


def scalars(experiment, tag):
    return {event.step: event.value for event in events(experiment).Scalars(tag)}


def newest(experiment):
    return checkpoints(experiment)[-1]


def weights(experiment):
    return load_file(experiment / 'last' / 'model.safetensors')


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a, b, **tolerance):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], **tolerance) for key in a)


# what a run leaves behind

def test_folders_hold_the_moe_whose_accuracy_was_reported(trained, folder):
    row = summary(trained)[-1]
    for ema, prefix in ((False, 'eval_'), (True, 'eval_ema_')):
        model = ewa.load(trained / 'last', ema=ema)
        logits, labels = logits_and_labels(model, folder)
        assert row[f'{prefix}top1'] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
        top5 = (logits.topk(5).indices == labels[:, None]).any(1)
        assert row[f'{prefix}top5'] == pytest.approx(100 * top5.double().mean().item())
        assert row[f'{prefix}loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
        assert len(dict(ewa.moe.moe_layers(model))) == 1
    config = config_of(trained / 'last')
    assert config['label_names'] == sorted(path.name for path in (folder / 'train').iterdir())
    assert config['pretrained_cfg']['input_size'] == [1, 28, 28] and config['pretrained_cfg']['mean'] == [0.286]
    assert config['ewa']['updates'] == 10 and config['ewa']['epochs'] == 2


def test_best_is_the_epoch_with_the_best_metric(go, capsys):
    for metric, choose in (('top1', max), ('loss', min)):
        run = go('--epochs', 4, '--eval-metric', metric, '--model-ema', '--model-ema-decay', 0.5, experiment=metric)
        rows = summary(run)
        values = [choose(row[f'eval_{metric}'], row[f'eval_ema_{metric}']) for row in rows]
        epoch = 1 + values.index(choose(values))
        of_ema = choose(values) != rows[epoch - 1][f'eval_{metric}']
        text = capsys.readouterr().out
        assert (f'in epoch {epoch} (EMA weights)' in text, '--use-ema' in text) == (of_ema, of_ema)
        assert config_of(run / 'best')['ewa']['epochs'] == epoch
        assert config_of(run / 'best')['ewa'][metric] == pytest.approx(rows[epoch - 1][f'eval_{metric}'])


def test_ema_follows_its_formula(go):
    flags = ['--batch-size', 80, '--model-ema', '--model-ema-decay', 0.25, '--sched', 'constant']
    first = weights(go(*flags, '--epochs', 1, experiment='first'))
    run = go(*flags, '--epochs', 2, experiment='second')
    second, ema = weights(run), load_file(run / 'last' / 'ema.safetensors')
    assert not equal(first, second)
    for key in second:  # timm's average starts with the weights after the first update
        torch.testing.assert_close(ema[key], torch.lerp(first[key], second[key], 0.75))


def test_arguments_are_saved_and_repeat_the_run(trained, folder, tmp_path):
    saved = yaml.safe_load((trained / 'args.yaml').read_text())
    assert saved['share_rate'] == 0.1 and saved['num_classes'] == 10 and saved['model_kwargs']['patch_size'] == 7
    train_again = ['-c', str(trained / 'args.yaml'), '--output', str(tmp_path)]
    parsed = vars(train_parser().parse_args(train_again))
    assert {k: v for k, v in parsed.items() if k in saved and k != 'output'} == {
        k: v for k, v in saved.items() if k != 'output'}
    run_train(*train_again)
    assert equal(weights(tmp_path / 'run'), weights(trained))


def test_tensorboard_has_the_course_of_the_run(trained):
    found = events(trained)
    tags = found.Tags()['scalars']
    assert {'train/loss', 'train/lr', 'train/share_rate', 'train/images_per_second', 'eval/loss', 'eval/top1',
            'eval/top5', 'eval/ema_top1'} <= set(tags)
    for tag in tags:
        values = [event.value for event in found.Scalars(tag)]
        assert values and all(math.isfinite(value) for value in values), tag
    rows = summary(trained)
    assert list(scalars(trained, 'eval/top1').values()) == pytest.approx([row['eval_top1'] for row in rows])
    assert list(scalars(trained, 'train/loss')) == list(range(1, 11))  # --log-interval 1
    assert scalars(trained, 'train/loss')[10] == pytest.approx(rows[-1]['train_loss'])
    # linear over the 10 updates; the rate of the pull that comes next
    assert [scalars(trained, 'train/share_rate')[t] for t in (1, 4)] == pytest.approx([0.02, 0.05])
    assert all(speed > 0 for speed in scalars(trained, 'train/images_per_second').values())

    (tag,) = [tag for tag in tags if 'distance' in tag and 'blocks.1.mlp' in tag]
    expected = distances_to_mean(ewa.load(trained / 'last'))['blocks.1.mlp']
    assert scalars(trained, tag)[10] == pytest.approx(expected, rel=1e-4)
    (text,) = found.Tensors('arguments/text_summary')
    assert b'share_rate: 0.1' in text.tensor_proto.string_val[0]


def test_quiet_lines_without_a_terminal(go, capsys):
    run = go('--log-interval', 3)
    out, err = capsys.readouterr()
    assert '\r' not in out + err and '%|' not in out + err
    lines = out.splitlines()
    assert [line for line in lines if line.startswith('epoch 1/2: loss ') and 'top-1' in line and 'images/s' in line]
    assert sum('update 3 ' in line for line in lines) == 1
    assert '0.05 M parameters, 4 experts in 1 FFNs' in lines[0] and '80 training and 40 validation images' in lines[0]
    assert lines[-1] == f'Export the plain ViT with:  python convert.py {run / "best"} --output {run / "vit"}'


def test_progress_bar_on_a_terminal(go, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    go('--log-interval', 1)
    bars = [bar for bar in capsys.readouterr().err.split('\r') if '%|' in bar]
    assert 'epoch 2/2' in bars[-1] and '10/10' in bars[-1]
    for word in ('loss ', 'top-1 ', ' images/s', '<'):
        assert word in bars[-1]
    assert 'top-1 0.0' not in bars[-1]  # from the validation after the first epoch


def test_unvalidated_epochs_report_nothing(go, capsys):
    run = go('--epochs', 3, '--val-interval', 2)
    assert ['top-1' in line for line in capsys.readouterr().out.splitlines() if '/3: loss' in line] == [0, 1, 1]
    assert [row['epoch'] for row in summary(run)] == [2, 3]
    assert list(scalars(run, 'eval/top1')) == [10, 15]


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
    if per_update:  # the rate that is logged at update t is that of the next one
        assert [lr[t] for t in (1, 5, 9)] == pytest.approx([0.0001 + slope * t / 5 for t in (1, 5, 9)], rel=1e-4)
        assert lr[11] > lr[12] > lr[19]
    else:
        assert {round(lr[t], 7) for t in range(1, 6)} == {0.0001}
        assert [lr[t] for t in (6, 10)] == pytest.approx([0.0001 + slope] * 2)
        assert len({lr[t] for t in range(11, 16)}) == 1


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


def test_gated_experts_log_their_losses(go):
    run = go('--router', 'topk', '--top-k', 2, '--epochs', 1)
    found = events(run)
    for tag in ('train/load_balance', 'train/z'):
        assert math.isfinite(found.Scalars(tag)[-1].value)


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
    run = go('--expert-form', 'mean', '--spread', 0.5, '--share-rate', 0.1, '--model-ema', '--amp', '--amp-dtype',
             'bfloat16', '--grad-accum-steps', 2)
    model = ewa.load(run / 'last').eval()
    assert {f'blocks.1.mlp.{part}.fc1.weight' for part in ('mean', 'deviations.0', 'deviations.3')} <= set(weights(run))
    distance = list(scalars(run, 'experts_distance/blocks.1.mlp').values())[-1]
    assert distance == pytest.approx(ewa.diagnose(model)[0]['distance'], rel=1e-3) and distance > 0
    run_convert(run / 'last', '--output', tmp_path / 'vit')
    vit = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(vit(x), model(x)) and not any(ewa.moe.moe_layers(vit))


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


# resuming

EXACT = ['--epochs', 3, '--model-ema', '--model-ema-decay', 0.9, '--mixup', 0.8, '--cutmix', 1.0, '--drop-path', 0.2,
         '--drop', 0.1, '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', 0.3, '--grad-accum-steps', 2, '--clip-grad', 1.0,
         '--share-schedule', 'cosine', '--share-rate', 0.1]


@pytest.mark.parametrize('flags', [
    ['--workers', 0, '--sched-on-updates'],
    ['--workers', 2, '--warmup-epochs', 1],
    ['--workers', 0, '--expert-form', 'mean', '--spread', 0.5],
    pytest.param(['--workers', 0, '--router', 'topk', '--opt', 'lamb'], marks=pytest.mark.slow),
], ids=['workers0', 'workers2', 'mean', 'gated'])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(go, monkeypatch, capsys, flags):
    whole = go(*EXACT, *flags, experiment='whole')
    seed_all = train.seed_all

    def interrupted(*key):
        if key == (42, 2, 0, 1, 3):  # in the middle of the second epoch
            raise KeyboardInterrupt
        seed_all(*key)

    monkeypatch.setattr(train, 'seed_all', interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(*EXACT, *flags, experiment='parts')
    monkeypatch.setattr(train, 'seed_all', seed_all)
    torch.manual_seed(1234)  # what happened in this process meanwhile does not matter
    capsys.readouterr()
    parts = go(*EXACT, *flags, '--resume', experiment='parts')
    assert f'Resuming from {checkpoints(parts)[0].parent / "update-00000003"}, epoch 1.' in capsys.readouterr().out

    for name in ('model.safetensors', 'ema.safetensors'):
        assert equal(load_file(newest(whole) / name), load_file(newest(parts) / name))
        for kind in ('last', 'best'):
            assert equal(load_file(whole / kind / name), load_file(parts / kind / name))
    optimizers = [torch.load(newest(run) / 'optimizer.bin', weights_only=True) for run in (whole, parts)]
    assert optimizers[0]['param_groups'] == optimizers[1]['param_groups']
    assert optimizers[0]['state'].keys() == optimizers[1]['state'].keys() and len(optimizers[0]['state']) > 20
    for number, one in optimizers[0]['state'].items():
        other = optimizers[1]['state'][number]
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    states = [read_state(newest(run)) for run in (whole, parts)]
    states[0].seconds = states[1].seconds
    assert states[0] == states[1]
    timings = ('train_seconds',)
    rows = [[{k: v for k, v in row.items() if k not in timings} for row in summary(run)] for run in (whole, parts)]
    assert rows[0] == rows[1] and [row['epoch'] for row in rows[0]] == [1, 2, 3]
    assert [scalars(run, 'train/loss') for run in (whole,)] == [scalars(run, 'train/loss') for run in (parts,)]


def test_resume_without_a_run_starts_fresh(go, capsys):
    fresh = go('--epochs', 1, '--resume')
    assert f'No checkpoint in {fresh}: starting fresh.' in capsys.readouterr().out
    assert equal(weights(fresh), weights(go('--epochs', 1, experiment='b')))


def test_resume_of_a_finished_run_says_so_and_changes_nothing(trained, folder, capsys):
    before = files(trained)
    run_train('--data-dir', folder, '--output', trained.parent, '--experiment', trained.name, '--resume', '--model-ema')
    assert f'{trained} is finished: 2 of 2 epochs are done.' in capsys.readouterr().out
    assert files(trained) == before


@pytest.mark.parametrize('flags, words', [
    (['--num-experts', 3], 'num_experts is 4, here it is 3'),
    (['--moe-layers', 'all'], 'checkpoint of another model: its layers is every:2, here it is all'),
    (['--router', 'topk'], 'checkpoint of another model'),
    (['--expert-form', 'mean'], 'checkpoint of another model: its form is None, here it is mean'),
    (['--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{k}={v}' for k, v in HOST.items())],
     'its architecture is vit_ewa, here it is vit_tiny_patch16_224'),
    (['--opt', 'sgd'], 'was trained with --opt adamw, here it is sgd'),
    (['--layer-decay', 0.7], 'was trained with --layer-decay None, here it is 0.7'),
    (['--eval-metric', 'loss'], 'was trained with --eval-metric top1, here it is loss'),
], ids=lambda value: value[0] if isinstance(value, list) else '')
def test_resume_refuses_the_checkpoint_of_another_model(trained, folder, flags, words):
    before = files(trained)
    code, lines = fails(run_train, '--data-dir', folder, '--output', trained.parent, '--experiment', trained.name,
                        '--resume', '--model-ema', '--epochs', 3, *flags)
    assert code == 2 and len(lines) == 1 and words in lines[0]
    assert files(trained) == before


def test_resume_needs_the_ema_of_the_run(trained, folder):
    code, lines = fails(run_train, '--data-dir', folder, '--output', trained.parent, '--experiment', trained.name,
                        '--resume', '--epochs', 3)
    assert code == 2 and 'was trained with --model-ema True, here it is False' in lines[0]


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
    'one expert': ('--num-experts 1', 'at least 2'),
    'no such block': ('--moe-layers 7', '7 is not a block index'),
    'too many batches': ('--batch-size 100', '80 training images', '--batch-size 100'),
    'odd mixup': ('--batch-size 15 --mixup 1', 'even'),
    'unknown optimizer': ('--opt nope', 'nope'),
    'deaf optimizer': ('--opt lookahead_adamw', 'Lookahead'),
    'unknown policy': ('--aa nope', 'nope'),
    'no epochs': ('--epochs 0', '--epochs', 'at least 1'),
    'no such interpolation': ('--interpolation nope', 'nope', 'bicubic'),
    'unknown kind of data': ('--dataset tourch/cifar10', 'tourch/cifar10', 'torch/NAME'),
    'unknown data set': ('--dataset torch/nope', 'nope'),
    'data set not there': ('--dataset torch/cifar10', 'torch/cifar10', "can't be read"),
    'output is a file': ('--output {}/file', 'file', 'Not a directory'),
    'output exists': ('--output {} --experiment full', 'full exists', '--resume'),
    'resume what': ('--resume', '--experiment'),
    'cold distillation': ('--teacher nope --kd-temperature 0', '--kd-temperature: 0 is not a number (above 0)'),
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


def two_processes(tmp_path, *flags):
    script = tmp_path / 'ranks.py'
    script.write_text(RANKS)
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script),
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


def _broken(*args, **kwargs):
    return None + 1


@pytest.mark.parametrize('where', [
    'train.build_model', 'train.check_classes', 'train.make_optimizer', 'train.make_averager', 'train.prepare',
    'ewa.upcycle.select_ffns', 'ewa.averaging.ExpertAverager.attach', 'ewa.checkpoint.start', 'ewa.data.class_names'])
def test_a_mistake_of_ours_is_a_traceback(folder, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, _broken)
    with pytest.raises(TypeError, match='NoneType'):
        run_train('--data-dir', folder, '--output', tmp_path, '--experiment', 'run')
