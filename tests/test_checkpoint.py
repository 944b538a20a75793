import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import ewa.checkpoint
from ewa.checkpoint import (
    RunState,
    checkpoints,
    describe,
    load_checkpoint,
    load_ema,
    read_state,
    remove_leftovers,
    resume,
    resume_point,
    save_checkpoint,
    start,
)
from ewa.options import train_parser
from runs import (  # noqa: F401  fixtures among them
    HOST,
    close,
    equal,
    fails,
    files,
    folder,
    go,
    newest,
    reset,
    run_train,
    scalars,
    summary,
    train,
    trained,
    weights,
)


@pytest.fixture
def prepared():
    """An accelerator that holds a small model and its optimizer."""
    reset()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()


def state(update=0, **entries):
    return RunState(dict(architecture='vit'), dict(eval_metric='top1'), ['a', 'b'], dict(mean=[0.5]), update=update,
                    **entries)


def names(experiment):
    return [path.name for path in checkpoints(experiment)]


def test_what_is_saved_is_found_and_read_again(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    step(model, optimizer)
    ema = {'weight': torch.randn(2, 3), 'turned': torch.randn(3, 2).t()}
    saved = state(7, epoch=2, images=3, seconds=0.5, best=dict(value=1.5, epoch=2, weights='EMA', top1=1.5),
                  averager=dict(steps=7, pulls=3), provenance=dict(seed=1))
    save_checkpoint(accelerator, tmp_path, saved, ema)
    (found,) = checkpoints(tmp_path)
    assert found == tmp_path / 'checkpoints' / 'update-00000007'
    assert read_state(found) == saved
    assert all(torch.equal(ema[key], value) for key, value in load_ema(found).items())

    before = [p.clone() for p in model.parameters()]
    step(model, optimizer)
    after = [p.clone() for p in model.parameters()]
    load_checkpoint(accelerator, found, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    step(model, optimizer)  # with the moments of the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters()))


def test_oldest_are_removed_and_order_is_that_of_numbers(prepared, tmp_path):
    for update in (5, 99_999_999, 100_000_000):
        save_checkpoint(prepared[0], tmp_path, state(update), keep=2)
    assert names(tmp_path) == ['update-99999999', 'update-100000000']
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['update-100000000', 'update-99999999']
    save_checkpoint(prepared[0], tmp_path, state(100_000_001), keep=0)
    assert names(tmp_path) == ['update-100000001']


def test_no_experiment_has_no_checkpoints(tmp_path):
    assert checkpoints(tmp_path / 'nothing') == [] and checkpoints(tmp_path) == []


def test_half_written_and_foreign_folders_are_not_checkpoints(prepared, tmp_path):
    save_checkpoint(prepared[0], tmp_path, state(1))
    folder = tmp_path / 'checkpoints'
    for name in ('.update-00000002.new', 'update-00000003', 'update-00000004.bak', 'update-x', 'notes'):
        (folder / name).mkdir()
        if name != 'update-00000003':  # a whole one has a state
            (folder / name / 'state.json').write_text('{}')
    assert names(tmp_path) == ['update-00000001']


@pytest.mark.parametrize('where', ['save_state', 'json', 'rename'])
def test_a_failed_write_leaves_what_was_there(prepared, tmp_path, monkeypatch, where):
    accelerator, model, optimizer = prepared
    save_checkpoint(accelerator, tmp_path, state(1, epoch=1), keep=1)
    before = files(tmp_path)

    def full(*args, **kwargs):
        raise OSError('No space left on device')

    step(model, optimizer)
    with monkeypatch.context() as patch:
        if where == 'save_state':
            patch.setattr(accelerator, 'save_state', full)
        elif where == 'json':
            patch.setattr(json, 'dumps', full)
        else:
            patch.setattr(ewa.exporting.os, 'rename', full)
        for update in (1, 2):
            with pytest.raises(OSError, match='No space'):
                save_checkpoint(accelerator, tmp_path, state(update, epoch=2), keep=1)
            assert names(tmp_path) == ['update-00000001']
            whole = {name: data for name, data in files(tmp_path).items() if '.new' not in name}
            assert whole == before

    save_checkpoint(accelerator, tmp_path, state(2, epoch=2), keep=1)  # and the next try goes through
    assert names(tmp_path) == ['update-00000002'] and read_state(checkpoints(tmp_path)[0]).epoch == 2


def test_the_same_update_is_replaced(prepared, tmp_path):
    for epoch in (1, 2):
        save_checkpoint(prepared[0], tmp_path, state(3, epoch=epoch))
    assert names(tmp_path) == ['update-00000003'] and read_state(checkpoints(tmp_path)[0]).epoch == 2
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['update-00000003']


# what is read

@pytest.fixture
def checkpoint(prepared, tmp_path):
    """A checkpoint, and a function that writes its `state.json` anew with other entries (None: without the entry)."""
    step(*prepared[1:])
    save_checkpoint(prepared[0], tmp_path, state(
        1, best=dict(value=1., epoch=1, weights='model'), averager=dict(steps=1, pulls=1)))
    (path,) = checkpoints(tmp_path)
    entries = json.loads((path / 'state.json').read_text())

    def rewrite(**changes):
        changed = {key: value for key, value in {**entries, **changes}.items() if value != 'gone'}
        (path / 'state.json').write_text(json.dumps(changed))

    return path, rewrite


@pytest.mark.parametrize('text', [b'', b'{"epoch": 1', b'\xff\xfe\x00', b'half'])
def test_a_state_that_is_not_json_is_one_line(checkpoint, text):
    path, _ = checkpoint
    (path / 'state.json').write_bytes(text)
    with pytest.raises(ValueError, match='state.json is damaged, it is not JSON') as e:
        read_state(path)
    assert '\n' not in str(e.value)


def test_a_state_that_is_another_kind_of_json(checkpoint):
    path, _ = checkpoint
    (path / 'state.json').write_text('[1, 2]')
    with pytest.raises(ValueError, match='state.json is damaged: it holds no table'):
        read_state(path)


@pytest.mark.parametrize('key', [field.name for field in dataclasses.fields(RunState)
                                 if field.name not in ('batch', 'loss_sum', 'settings')])
def test_an_entry_that_is_missing_is_named(checkpoint, key):
    path, rewrite = checkpoint
    rewrite(**{key: 'gone'})
    with pytest.raises(ValueError, match=f'has no entry {key}: it is damaged or of a version'):
        read_state(path)


@pytest.mark.parametrize('key, value', [
    ('epoch', '3'), ('epoch', 1.5), ('epoch', True), ('update', None), ('images', 'many'), ('seconds', [1.]),
    ('seconds', None), ('model', 'vit'), ('model', None), ('flags', []), ('class_names', 'a'), ('class_names', [1]),
    ('data_config', None), ('provenance', 3), ('averager', dict(steps=1, pulls='x')), ('best', 3.),
])
def test_an_entry_of_another_type_is_named(checkpoint, key, value):
    path, rewrite = checkpoint
    rewrite(**{key: value})
    with pytest.raises(ValueError, match=f'state.json is damaged: its entry {key} is'):
        read_state(path)


@pytest.mark.parametrize('key, value, name', [
    ('model', dict(depth=3), 'model.architecture'), ('model', dict(architecture=3), 'model.architecture'),
    ('best', dict(value='x', epoch=1, weights='EMA'), 'best.value'), ('best', dict(value=1.), 'best.epoch'),
    ('best', dict(value=1., epoch=1, weights=2), 'best.weights'), ('averager', dict(steps=1), 'averager.pulls'),
])
def test_an_entry_inside_another_is_named(checkpoint, key, value, name):
    path, rewrite = checkpoint
    rewrite(**{key: value})
    with pytest.raises(ValueError, match=f'its entry {name} is'):
        read_state(path)


def test_what_may_be_absent_may_be(checkpoint):
    path, rewrite = checkpoint
    rewrite(best=None, averager=None, class_names=None, seconds=3)
    found = read_state(path)
    assert (found.best, found.averager, found.class_names, found.seconds) == (None, None, None, 3)


def test_a_state_of_version_0_1_0(checkpoint):
    path, rewrite = checkpoint
    rewrite(batch=0, model=dict(architecture='vit_ewa', num_experts=4, init='auto'))
    path.joinpath('state.json').write_text(json.dumps({
        k: v for k, v in json.loads((path / 'state.json').read_text()).items()
        if k not in ('loss_sum', 'settings')}))
    found = read_state(path)
    assert found.model == dict(architecture='vit_ewa', num_experts=4)
    assert (found.batch, found.loss_sum, found.settings) == (0, 0., {})


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.bin', 'random_states_0.pkl'])
@pytest.mark.parametrize('content', [b'', b'half a file', None])
def test_damaged_tensors_are_one_line(prepared, checkpoint, file, content):
    path, _ = checkpoint
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(content)
    if file == 'random_states_0.pkl':  # is not needed, see above; accelerate says what it thinks of that
        load_checkpoint(prepared[0], path, *prepared[1:])
        return
    with pytest.raises(ValueError, match="can't be resumed, remove it to go on from the one before: ") as e:
        load_checkpoint(prepared[0], path, *prepared[1:])
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_ema_weights_that_are_missing_or_damaged(checkpoint):
    path, _ = checkpoint
    with pytest.raises(ValueError, match='has no EMA weights; the run was not trained with --model-ema'):
        load_ema(path)
    (path / 'ema.safetensors').write_bytes(b'half')
    with pytest.raises(ValueError, match="ema.safetensors can't be read as tensors"):
        load_ema(path)


# what a run goes on from

def test_a_run_begins_or_goes_on(prepared, tmp_path):
    assert resume_point(tmp_path / 'new', resuming=False, named=True) is None
    assert resume_point(tmp_path / 'new', resuming=True, named=True) is None
    (tmp_path / 'empty').mkdir()
    assert resume_point(tmp_path / 'empty', resuming=False, named=True) is None
    for update in (1, 2):
        save_checkpoint(prepared[0], tmp_path / 'run', state(update))
    assert resume_point(tmp_path / 'run', resuming=True, named=True).name == 'update-00000002'
    with pytest.raises(ValueError, match='run exists: give another --experiment, or --resume'):
        resume_point(tmp_path / 'run', resuming=False, named=True)
    with pytest.raises(ValueError, match='--resume needs --experiment NAME'):
        resume_point(tmp_path / 'run', resuming=True, named=False)


def test_a_checkpoint_is_of_the_same_model_and_flags(prepared, tiny, tmp_path):
    args = train_parser().parse_args([])
    model = tiny(depth=2)
    fresh = start(model, args, ['a'], dict(input_size=(3, 32, 32)))
    assert fresh.model == describe(model) and fresh.model['architecture'] == 'vit_tiny_patch16_224'
    fresh.epoch = fresh.update = 5
    save_checkpoint(prepared[0], tmp_path, fresh)
    (path,) = checkpoints(tmp_path)
    assert resume(path, start(model, args, ['a'], {})).update == 5
    for other, words in ((tiny(depth=3), 'another model: its depth is 2, here it is 3'),
                         (tiny(depth=2, qkv_bias=False), 'its qkv_bias is None, here it is False')):
        with pytest.raises(ValueError, match=words):
            resume(path, start(other, args, ['a'], {}))
    with pytest.raises(ValueError, match='trained on other classes: label 0 was a, here it is b. Give the same data'):
        resume(path, start(model, args, ['b'], {}))
    assert resume(path, start(model, args, None, {'mean': [0.1]})).data_config == {'mean': [0.1]}  # what is used now
    args.layer_decay = 0.7
    with pytest.raises(ValueError, match='was trained with --layer-decay None, here it is 0.7'):
        resume(path, start(model, args, ['a'], {}))
    args.layer_decay = None
    fresh = start(model, args, ['a'], {})
    fresh.averager = dict(steps=0, pulls=0)
    with pytest.raises(ValueError, match='disagree on having experts'):
        resume(path, fresh)


# which is best

@pytest.mark.parametrize('metric, values, better', [
    ('top1', [50, 60, 60, 55, 61], [1, 1, 0, 0, 1]), ('loss', [2., 1., 1., 1.5, 0.5], [1, 1, 0, 0, 1])])
def test_the_best_epoch_is_the_first_of_the_best(metric, values, better):
    run = state()
    run.flags['eval_metric'] = metric
    for run.epoch, value in enumerate(values, 1):
        assert run.improve({metric: value, 'top5': 3.}) == better[run.epoch - 1]
        assert run.best['epoch'] == max(e for e, is_better in enumerate(better[:run.epoch], 1) if is_better)
    assert run.best == {'value': values[-1], 'epoch': 5, 'weights': 'model', metric: values[-1], 'top5': 3.}


@pytest.mark.parametrize('metric, raw, ema, weights', [
    ('top1', 50., 51., 'EMA'), ('top1', 50., 50., 'model'), ('top1', 50., 49., 'model'),
    ('loss', 1., 0.9, 'EMA'), ('loss', 1., 1., 'model'), ('loss', 1., 1.1, 'model')])
def test_the_better_of_weights_and_their_average_counts(metric, raw, ema, weights):
    run = state(epoch=3)
    run.flags['eval_metric'] = metric
    assert run.improve({metric: raw, f'ema_{metric}': ema})
    assert run.best == {'value': ema if weights == 'EMA' else raw, 'epoch': 3, 'weights': weights, metric: raw,
                        f'ema_{metric}': ema}


def test_what_an_epoch_costs_adds_up():
    run = state()
    run.count(100, 2., 5e14)
    run.count(50, 1., 5e14)
    assert run.spent == dict(images=150, seconds=3., pflops=75.)


# resumed runs

EXACT = ['--epochs', 3, '--model-ema', '--model-ema-decay', 0.9, '--mixup', 0.8, '--cutmix', 1.0, '--drop-path', 0.2,
         '--drop', 0.1, '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', 0.3, '--grad-accum-steps', 2, '--clip-grad', 1.0,
         '--share-schedule', 'cosine', '--share-rate', 0.1]


@pytest.mark.parametrize('flags', [
    ['--workers', 0, '--sched-on-updates'],
    ['--workers', 2, '--warmup-epochs', 1],
    ['--workers', 0, '--expert-form', 'mean', '--spread', 0.5],
    pytest.param(['--workers', 0, '--router', 'topk', '--opt', 'lamb'], marks=pytest.mark.slow),
], ids=['workers0', 'workers2', 'mean', 'gated'])
@pytest.mark.parametrize('how, where', [
    ('crash', 'update-00000003, epoch 1.'),  # the end of the first epoch
    (signal.SIGTERM, 'update-00000005, epoch 1, batch 4.'), (signal.SIGINT, 'update-00000005, epoch 1, batch 4.'),
    ('recovery', 'update-00000004, epoch 1, batch 2.')], ids=str)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(go, monkeypatch, capsys, flags, how, where):
    if how in (signal.SIGINT, 'recovery') and flags[:3] != ['--workers', 2, '--warmup-epochs']:
        pytest.skip('one kind of flags is enough')
    whole = go(*EXACT, *flags, experiment='whole')
    seed_all = train.seed_all

    def interrupted(*key):
        if key == (42, 2, 0, 1, 3):  # in the middle of the second epoch, and of an update
            if isinstance(how, str):
                raise MemoryError
            os.kill(os.getpid(), how)
        seed_all(*key)

    monkeypatch.setattr(train, 'seed_all', interrupted)
    with pytest.raises(MemoryError if isinstance(how, str) else SystemExit) as e:
        go(*EXACT, *flags, *(['--recovery-interval', 2] * (how == 'recovery')), experiment='parts')
    said = capsys.readouterr()
    if not isinstance(how, str):
        assert e.value.code == 128 + how and said.err.count('\n') == 1
        assert 'Interrupted at update 5, which is saved; go on with the same command and --resume' in said.err
    monkeypatch.setattr(train, 'seed_all', seed_all)
    torch.manual_seed(1234)  # what happened in this process meanwhile does not matter
    parts = go(*EXACT, *flags, '--resume', experiment='parts')
    assert f'Resuming from {checkpoints(parts)[0].parent}/{where}' in capsys.readouterr().out

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
    for state in states:
        state.seconds, state.settings = 0., {}
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


def test_a_damaged_checkpoint_is_one_line_before_anything_is_written(trained, folder, tmp_path):
    for file in ('state.json', 'model.safetensors', 'ema.safetensors', 'optimizer.bin'):
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        shutil.copytree(trained, tmp_path / 'run')
        only = newest(tmp_path / 'run')
        for older in set((tmp_path / 'run' / 'checkpoints').iterdir()) - {only}:
            shutil.rmtree(older)
        (only / file).write_bytes(b'half')
        before = files(tmp_path / 'run')
        code, lines = fails(run_train, '--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--resume',
                            '--model-ema', '--epochs', 3)
        assert code == 2 and 'update-00000010' in lines[-1] and lines[-1].startswith('train.py: error: ')
        assert files(tmp_path / 'run') == before


# what must not be lost, or begun in silence

def test_a_finished_run_without_checkpoints_is_not_overwritten(trained, folder, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / 'run'))
    shutil.rmtree(run / 'checkpoints')
    before = files(run)
    code, lines = fails(run_train, '--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--resume')
    assert code == 2 and len(lines) == 1 and 'has no checkpoint to go on from' in lines[0] and files(run) == before


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(trained, folder, tmp_path, capsys):
    run = tmp_path / 'run'
    (run / 'checkpoints' / '.update-00000005.new').mkdir(parents=True)
    shutil.copy(trained / 'args.yaml', run)
    (run / 'events.out.tfevents.1.host.1.0').touch()
    flags = ['--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--resume', '--epochs', 1]
    (run / 'notes.txt').touch()  # of somebody else
    code, lines = fails(run_train, *flags)
    assert code == 2 and 'has no checkpoint to go on from' in lines[-1]
    (run / 'notes.txt').unlink()
    run_train(*flags)
    assert f'No checkpoint in {run}: starting fresh.' in capsys.readouterr().out
    assert [path.name for path in (run / 'checkpoints').iterdir()] == ['update-00000005']


@pytest.mark.parametrize('flags, words', [
    (['--seed', 7], 'trained with seed 42, here it is 7'),
    (['--batch-size', 8], '16 images an update (batch_size 16, grad_accum_steps 1, processes 1), here'),
    (['--grad-accum-steps', 2], 'grad_accum_steps 1, processes 1), here it is 32'),
    (['--data-dir', 'GROWN'], 'trained with training images 80, here it is 82')])
def test_a_run_goes_on_with_its_own_stream_of_images(trained, folder, tmp_path, flags, words):
    if flags[-1] == 'GROWN':
        flags = ['--data-dir', Path(shutil.copytree(folder, tmp_path / 'grown'))]
        for name in ('a.png', 'b.png'):  # too few for another batch
            shutil.copy(next((folder / 'train' / 'bag').glob('*.png')), flags[-1] / 'train' / 'bag' / name)
    code, lines = fails(run_train, '--data-dir', folder, '--output', trained.parent, '--experiment', trained.name,
                        '--resume', '--model-ema', '--epochs', 3, *flags)
    assert code == 2 and len(lines) == 1 and words in lines[0]


def test_micro_batches_of_another_size_are_those_of_the_same_updates(go, tmp_path):
    # nothing is drawn but the order of the images
    flags = ['--model', 'vit_tiny_patch16_224', '--no-aug', '--hflip', 0, '--model-kwargs']
    flags += [f'{key}={value}' for key, value in HOST.items()]
    whole = go(*flags, '--recovery-interval', 3, '--checkpoint-hist', 9, experiment='whole')
    checkpoint = 'checkpoints/update-00000003'  # an odd number
    shutil.copytree(whole / checkpoint, tmp_path / 'parts' / checkpoint)
    parts = go(*flags, '--batch-size', 8, '--grad-accum-steps', 2, '--resume', experiment='parts')
    assert close(weights(parts), weights(whole), atol=1e-4, rtol=0)
    for row, expected in zip(summary(parts), summary(whole), strict=True):
        assert row['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-5)


@pytest.mark.parametrize('file, how, why', [
    *((file, 'lost', f'it has lost {file}') for file in (
        'state.json', 'model.safetensors', 'optimizer.bin', 'ema.safetensors')),
    *((file, 'cut', f'its {file} is damaged') for file in ('model.safetensors', 'optimizer.bin', 'ema.safetensors')),
    ('state.json', 'cut', 'state.json is damaged, it is not JSON'),
    ('state.json', 'batch', "its entry batch is '-1'")])
def test_a_checkpoint_that_is_not_whole_is_left_out_and_named(
        trained, folder, tmp_path, capsys, file, how, why):
    shutil.copytree(trained, tmp_path / 'run')
    path = newest(tmp_path / 'run') / file
    if how == 'lost':
        path.unlink()
    elif how == 'cut':
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), 'batch': -1}))
    run_train('--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--resume', '--model-ema',
              '--model-ema-decay', 0.7, '--drop-path', 0.1, '--share-schedule', 'linear', '--share-rate', 0.1)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('Resuming'))
    assert 'update-00000005, epoch 1. update-00000010 is left out: ' in said and why in said
    # the run ends with whole checkpoints, the damaged one is replaced by its own
    assert equal(weights(tmp_path / 'run'), weights(trained))
    assert [path.name for path in ewa.checkpoint.checkpoints(tmp_path / 'run')][-1] == 'update-00000010'


@pytest.mark.parametrize('change, words', [
    (dict(update=10 ** 9), 'is at update 1000000000, 2 epochs and 0 batches; with these flags and images an epoch has'),
    (dict(batch=10 ** 9), 'an epoch has 5 updates'), (dict(epoch=10 ** 9), 'an epoch has 5 updates'),
    (dict(settings={}, update=4), 'an epoch has 5 updates')], ids=str)
def test_a_checkpoint_at_a_place_that_is_none_is_refused(trained, folder, tmp_path, change, words):
    shutil.copytree(trained, tmp_path / 'run')
    path = newest(tmp_path / 'run') / 'state.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = files(tmp_path / 'run')
    code, lines = fails(run_train, '--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--resume',
                        '--model-ema', '--epochs', 3)
    assert code == 2 and len(lines) == 1 and words in lines[0] and files(tmp_path / 'run') == before


def test_flags_that_are_others_are_told(go, capsys):
    go('--epochs', 1, experiment='run')
    go('--epochs', 2, '--lr', 0.01, '--drop', 0.1, '--resume', experiment='run')
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('Resuming'))
    assert '--lr is 0.01 now, it was 0.002.' in line and '--epochs is 2 now, it was 1.' in line and 'seed' not in line


def test_two_runs_on_one_folder(go, folder, tmp_path, monkeypatch):
    second = {}
    end_epoch = train.Logbook.end_epoch

    def meanwhile(book, *args, **kwargs):
        if not second:
            second.update(zip(('code', 'lines'), fails(
                run_train, '--data-dir', folder, '--output', book.experiment.parent, '--experiment',
                book.experiment.name, '--resume')))
        end_epoch(book, *args, **kwargs)

    monkeypatch.setattr(train.Logbook, 'end_epoch', meanwhile)
    first = go('--epochs', 2, experiment='run')
    assert second['code'] == 2 and len(second['lines']) == 1
    assert 'is being written by another run' in second['lines'][0] or 'has no checkpoint' in second['lines'][0]
    assert len(summary(first)) == 2


@pytest.mark.parametrize('metric', ['top1', 'loss'])
def test_not_a_number_never_wins(metric):
    state = RunState({}, dict(eval_metric=metric), None, {})
    nan = float('nan')
    assert not state.improve({metric: nan}) and state.best is None
    assert state.improve({metric: 1.}) and not state.improve({metric: nan})
    assert state.improve({metric: nan, f'ema_{metric}': 5. if metric == 'top1' else .5})
    assert state.best['weights'] == 'EMA'
    state.best['value'] = nan  # of a version that let it
    assert state.improve({metric: 2.}) and state.best['value'] == 2.


def test_a_diverged_run_leaves_its_results_alone(go, monkeypatch, capsys):
    run = go('--epochs', 1, experiment='run')
    before = files(run / 'best'), files(run / 'last'), [path.name for path in checkpoints(run)]
    evaluate = train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda *args: dict(evaluate(*args), loss=float('nan')))
    with pytest.raises(SystemExit) as e:
        go('--epochs', 2, '--resume', experiment='run')
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'The validation loss is nan in epoch 2, at update 10, learning rate' in err
    assert 'go on from update-00000005 with --resume and a smaller --lr' in err
    assert (files(run / 'best'), files(run / 'last'), [path.name for path in checkpoints(run)]) == before


def test_weights_that_are_no_numbers_become_no_checkpoint(go, monkeypatch, capsys):
    seed_all = train.seed_all

    def poisoned(*key):
        if key == (42, 2, 0, 0, 2):  # the third update: its weights can't be numbers, nor is its loss looked at
            for group in made[0].param_groups:
                group['lr'] = float('inf')
        seed_all(*key)

    made = []
    make_optimizer = train.make_optimizer
    monkeypatch.setattr(train, 'make_optimizer', lambda *args: made.append(make_optimizer(*args)) or made[-1])
    monkeypatch.setattr(train, 'seed_all', poisoned)
    with pytest.raises(SystemExit) as e:
        go('--recovery-interval', 1, '--log-interval', 1000, experiment='run')
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'Loss or weights are not finite in epoch 1, at update 3, learning rate inf' in err
    assert 'go on from update-00000002 with --resume and a smaller --lr' in err


@pytest.mark.parametrize('error, words', [
    (OSError(28, 'No space left on device'), 'error: [Errno 28] No space left on device; update-00000005'),
    (RuntimeError('unexpected pos 64'), "update-00000010 can't be written: unexpected pos 64; update-0")], ids=str)
def test_a_full_disk_is_one_line_and_costs_no_result(go, monkeypatch, capsys, error, words):
    whole = go(experiment='whole')
    save_state = Accelerator.save_state

    def full(accelerator, folder):
        if 'update-00000010' in folder:
            raise error
        return save_state(accelerator, folder)

    monkeypatch.setattr(Accelerator, 'save_state', full)
    with pytest.raises(SystemExit) as e:
        go(experiment='run')
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and words in line
    assert 'update-00000005 is whole, go on from it with the same command and --resume --experiment run.' in line
    monkeypatch.setattr(Accelerator, 'save_state', save_state)
    assert equal(weights(go('--resume', experiment='run')), weights(whole))


def test_leftovers_of_killed_runs_are_cleaned_up(go):
    run = go('--epochs', 1, experiment='run')
    best = files(run / 'best')
    (run / '.best.old-abcdefgh').mkdir()
    (run / 'best').rename(run / '.best.old-abcdefgh' / 'best')  # killed between two renames
    (run / '.last.new-ij_klmn0').mkdir()  # killed while it wrote
    (run / 'checkpoints' / '.update-00000007.new').mkdir()
    (run / '.notes.old-ones').mkdir()  # of somebody else
    remove_leftovers(run)
    assert files(run / 'best') == best
    assert [path.name for path in run.rglob('.*')] == ['.notes.old-ones']


@pytest.mark.parametrize('where', ['.last.old-abcdefgh/last', '.last.new-abcdefgh'])
def test_files_of_others_outlive_a_kill_between_exchange_and_move(go, where):
    run = go('--epochs', 1, experiment='run')
    shutil.copytree(run / 'last', run / where)  # what the folder was before
    (run / where / 'notes.txt').write_text('mine')
    last = files(run / 'last')
    go('--epochs', 2, '--resume', experiment='run')
    assert (run / 'last' / 'notes.txt').read_text() == 'mine' and not list(run.glob('.last*'))
    assert files(run / 'last').keys() == {*last, 'notes.txt'}
