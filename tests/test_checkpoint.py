import json

import pytest
import torch
from accelerate import Accelerator

import ewa.checkpoint
from ewa.checkpoint import checkpoints, load_ema, read_state, save_checkpoint
from runs import files, reset


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


def names(experiment):
    return [path.name for path in checkpoints(experiment)]


def test_what_is_saved_is_found_and_read_again(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    step(model, optimizer)
    ema = {'weight': torch.randn(2, 3), 'turned': torch.randn(3, 2).t()}
    save_checkpoint(accelerator, tmp_path, 7, dict(epoch=2, best=None, averager=dict(steps=7)), ema)
    (found,) = checkpoints(tmp_path)
    assert found == tmp_path / 'checkpoints' / 'update-00000007'
    assert read_state(found) == dict(epoch=2, best=None, averager=dict(steps=7), update=7)
    assert all(torch.equal(ema[key], value) for key, value in load_ema(found).items())

    saved = [p.clone() for p in model.parameters()]
    step(model, optimizer)
    after = [p.clone() for p in model.parameters()]
    accelerator.load_state(str(found))
    assert all(torch.equal(a, b) for a, b in zip(saved, model.parameters()))
    step(model, optimizer)  # with the moments of the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters()))


def test_oldest_are_removed_and_order_is_that_of_numbers(prepared, tmp_path):
    for update in (5, 99_999_999, 100_000_000):
        save_checkpoint(prepared[0], tmp_path, update, {}, keep=2)
    assert names(tmp_path) == ['update-99999999', 'update-100000000']
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['update-100000000', 'update-99999999']
    save_checkpoint(prepared[0], tmp_path, 100_000_001, {}, keep=0)
    assert names(tmp_path) == ['update-100000001']


def test_no_experiment_has_no_checkpoints(tmp_path):
    assert checkpoints(tmp_path / 'nothing') == [] and checkpoints(tmp_path) == []


def test_half_written_and_foreign_folders_are_not_checkpoints(prepared, tmp_path):
    save_checkpoint(prepared[0], tmp_path, 1, {})
    folder = tmp_path / 'checkpoints'
    for name in ('.update-00000002.new', 'update-00000003', 'update-00000004.bak', 'update-x', 'notes'):
        (folder / name).mkdir()
        if name != 'update-00000003':  # a whole one has a state
            (folder / name / 'state.json').write_text('{}')
    assert names(tmp_path) == ['update-00000001']


@pytest.mark.parametrize('where', ['save_state', 'json', 'rename'])
def test_a_failed_write_leaves_what_was_there(prepared, tmp_path, monkeypatch, where):
    accelerator, model, optimizer = prepared
    save_checkpoint(accelerator, tmp_path, 1, dict(epoch=1), keep=1)
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
                save_checkpoint(accelerator, tmp_path, update, dict(epoch=2), keep=1)
            assert names(tmp_path) == ['update-00000001']
            whole = {name: data for name, data in files(tmp_path).items() if '.new' not in name}
            assert whole == before

    save_checkpoint(accelerator, tmp_path, 2, dict(epoch=2), keep=1)  # and the next try goes through
    assert names(tmp_path) == ['update-00000002'] and read_state(checkpoints(tmp_path)[0])['epoch'] == 2


def test_the_same_update_is_replaced(prepared, tmp_path):
    for epoch in (1, 2):
        save_checkpoint(prepared[0], tmp_path, 3, dict(epoch=epoch))
    assert names(tmp_path) == ['update-00000003'] and read_state(checkpoints(tmp_path)[0])['epoch'] == 2
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['update-00000003']
