import math
import re
import shlex
import sys

import pytest
import torch
import yaml
from accelerate import Accelerator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

import ewa
from ewa.checkpoint import RunState
from ewa.diagnostics import distances_to_mean
from ewa.logbook import Logbook
from ewa.options import train_parser
from runs import (  # noqa: F401  fixtures among them
    config_of,
    equal,
    events,
    folder,
    go,
    logits_and_labels,
    reset,
    run_train,
    scalars,
    summary,
    trained,
    weights,
)


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
    rows = text.tensor_proto.string_val[0].decode().splitlines()
    assert '| share_rate | 0.1 |' in rows and not any('| None |' in row or '| False |' in row for row in rows)


def layout(experiment):
    """Titles of the charts in the tab of custom scalars, and the pattern of what they show."""
    (event,) = events(experiment).Tensors(metadata.CONFIG_SUMMARY_TAG)
    categories = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for category in categories for chart in category.chart}


def test_one_chart_has_all_layers_and_what_is_zero_by_construction_is_not_drawn(trained, go):
    assert sorted(sum(layout(trained).values(), [])) == ['experts_cosine/.*', 'experts_distance/.*']
    gated = go('--router', 'topk', '--epochs', 1)
    assert sorted(sum(layout(gated).values(), [])) == [
        f'experts_{key}/.*' for key in ('change', 'cosine', 'distance', 'entropy')]
    tags = events(gated).Tags()['scalars']
    assert 'train/share_rate' not in tags and 'train/share_rate' in events(trained).Tags()['scalars']
    for pattern in sum(layout(gated).values(), []):
        assert any(re.fullmatch(pattern, tag) for tag in tags)
    assert not [tag for tag in events(trained).Tags()['scalars'] if tag.startswith('experts_change')]


def test_pictures_fit_the_card_of_a_dashboard(trained):
    event = events(trained).Images('experts/similarity')[-1]
    assert 200 < event.width <= 350


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
    assert not any('nan' in bar for bar in bars)
    assert not any('top-1' in bar for bar in bars if 'epoch 1/2' in bar) and any('validating' in bar for bar in bars)
    assert 'epoch 2/2' in bars[-1] and '10/10' in bars[-1]
    for word in ('loss ', 'top-1 ', ' images/s', '<'):
        assert word in bars[-1]
    assert 'top-1 0.0' not in bars[-1]  # from the validation after the first epoch


def test_the_bar_moves_between_log_entries(book, monkeypatch, capsys):
    book, _ = book
    now = [0.]
    monkeypatch.setattr('ewa.logbook.time.time', lambda: now[0])
    book.interactive, book.metrics = True, dict(top1=12.34)
    book.start_epoch(1)
    assert book.bar.postfix == 'top-1 12.3'  # the loss of the last epoch is not that of this one
    for seconds, loss, shown in [(0.5, 1., 'top-1 12.3'), (1.25, 3., 'loss 2.000, top-1 12.3, 16 images/s'),
                                 (2., 8., 'loss 2.000, top-1 12.3, 16 images/s'),
                                 (2.5, 4., 'loss 4.000, top-1 12.3, 16 images/s'),
                                 (5., math.nan, 'top-1 12.3, 10 images/s')]:
        now[0] = seconds
        book.count(torch.tensor(loss), 10)
        assert book.bar.postfix == shown


def test_the_clock_goes_on_whatever_takes_long(book, monkeypatch):
    book, _ = book
    waits, shown = iter([False, False, True]), []
    monkeypatch.setattr(book.done, 'wait', lambda seconds: seconds > 1 or next(waits))
    monkeypatch.setattr(book.bar, 'refresh', lambda: shown.append(1))
    book.tick()
    assert len(shown) == 2


def test_unvalidated_epochs_report_nothing(go, capsys):
    run = go('--epochs', 3, '--val-interval', 2)
    assert ['top-1' in line for line in capsys.readouterr().out.splitlines() if '/3: loss' in line] == [0, 1, 1]
    assert [row['epoch'] for row in summary(run)] == [2, 3]
    assert list(scalars(run, 'eval/top1')) == [10, 15]


def test_gated_experts_log_their_losses(go):
    run = go('--router', 'topk', '--top-k', 2, '--epochs', 1)
    found = events(run)
    for tag in ('train/load_balance', 'train/z'):
        assert math.isfinite(found.Scalars(tag)[-1].value)


@pytest.fixture
def book(tmp_path):
    """A logbook of two epochs of three updates, and its state."""
    reset()
    state = RunState(dict(architecture='vit'), dict(eval_metric='top1'), None, {})
    arguments = dict(output=str(tmp_path), lr=0.5)
    return Logbook(Accelerator(cpu=True), tmp_path / 'run', arguments, state, 2, 3, log_interval=2), state


def test_losses_of_an_epoch_are_summed_up(book, tmp_path, capsys):
    book, state = book
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    for epoch, losses in enumerate(([1., 2., 6.], [4., 4., 1.])):
        book.start_epoch(epoch)
        for loss in losses:
            book.count(torch.tensor(loss), 10)
            state.update += 1
            book.log_update(state.update, optimizer)
        assert book.loss == sum(losses) / 3 and book.images == 30 and book.batches == 3
    book.board.close()
    assert scalars(tmp_path / 'run', 'train/loss') == {2: 1.5, 3: 3., 4: 4., 6: 3.}  # every second, and the last
    assert set(scalars(tmp_path / 'run', 'train/lr').values()) == {0.25}
    assert [line.split(' loss')[0] for line in capsys.readouterr().out.splitlines()] == [
        'epoch 1/2 update 2', 'epoch 2/2 update 4']
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['lr'] == 0.5


@pytest.mark.parametrize('loss', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(book, capsys, loss):
    book, _ = book
    book.start_epoch(0)
    book.count(torch.tensor(loss), 10)
    with pytest.raises(SystemExit) as e:
        book.log_update(2, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.))
    err = capsys.readouterr().err
    assert e.value.code == 1 and f'The training loss is {loss} in epoch 1, at update 2, learning rate 1: stop' in err


def test_a_folder_that_can_not_be_made(book, tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(ValueError, match='--output x can\'t be written: Not a directory'):
        Logbook(Accelerator(cpu=True), tmp_path / 'file' / 'run', dict(output='x'), book[1], 2, 3)


@pytest.mark.parametrize('weights, has_experts, last', [
    ('model', True, 'Export the plain ViT with:  python convert.py {}/best --output {}/vit'),
    ('EMA', True, 'Export the plain ViT with:  python convert.py {}/best --output {}/vit --use-ema'),
    ('model', False, 'The model is in {}/best.'), ('EMA', False, 'The model is in {}/best (ema.safetensors).')])
def test_the_last_lines(book, capsys, tmp_path, weights, has_experts, last):
    book, state = book
    state.best = dict(value=61.234, epoch=2, weights=weights)
    book.metrics = dict(top1=60.)
    state.count(100, 2., 1e13)
    book.conclude(state, has_experts, teacher_top1=70., dense_top1=50.)
    distilled, best, where = capsys.readouterr().out.splitlines()
    assert distilled == ('Distilled with 100 images, 1 PFLOP, 2 s: top-1 60.00 in the last epoch, 50.0 % of the '
                         'benefit of the teacher (70.00) over a dense model (50.00) kept.')
    assert best == 'Best top1: 61.23 in epoch 2' + ' (EMA weights)' * (weights == 'EMA') + '.'
    assert where == last.replace('{}', str(tmp_path / 'run'))


def test_the_command_to_export_is_one_for_the_shell(tmp_path, capsys):
    state = RunState(dict(architecture='vit'), dict(eval_metric='top1'), None, {})
    state.best = dict(value=60., epoch=1, weights='model')
    run = tmp_path / 'of mine'
    Logbook(Accelerator(cpu=True), run, dict(output=str(tmp_path)), state, 1, 1).conclude(state, True)
    command = capsys.readouterr().out.splitlines()[-1].split(':  ')[1]
    assert shlex.split(command) == ['python', 'convert.py', str(run / 'best'), '--output', str(run / 'vit')]
