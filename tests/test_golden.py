"""Models, checkpoints and folders of version 0.1.0 (`golden/`) mean what they meant when they were written.

How they were made stands in `recipes.py`.
"""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import ewa
from ewa.checkpoint import checkpoints, read_state
from recipes import EXACT, GOLDEN, MODELS, RUNS, build, config, digest, gather, grey_images, logits
from runs import folder, reset, run_convert, summary, train  # noqa: F401  a fixture among them

STORED = json.loads((GOLDEN / 'models.json').read_text())
CONVERTED = json.loads((GOLDEN / 'runs.json').read_text())
CASES = [(name, title) for name, (_, gatherings) in MODELS.items() for title in gatherings]


def assert_same(found, stored, tolerance=5e-6):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(stored), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', MODELS)
def test_a_moe_model_has_its_keys_and_logits(name):
    model = build(name)
    assert list(model.state_dict()) == STORED[name]['keys']
    assert_same(logits(model), STORED[name]['logits'])


@pytest.mark.parametrize('name, title', CASES)
def test_a_gathered_model_has_its_keys_and_logits(name, title):
    dense = gather(build(name), MODELS[name][1][title])
    assert list(dense.state_dict()) == STORED[name]['dense_keys']
    stored = STORED[name]['gathered'][title]
    assert_same(logits(dense), stored['logits'])
    if 'digest' in stored:
        assert digest(dense.state_dict()) == stored['digest']


def test_bits_are_kept_of_every_method_that_is_exact():
    assert all(('digest' in entry) == (title in EXACT and name != 'vit fine-grained')
               for name in MODELS for title, entry in STORED[name]['gathered'].items())


@pytest.mark.parametrize('name', MODELS)
def test_an_exported_folder_says_what_it_said(name, tmp_path):
    ewa.export(gather(build(name), MODELS[name][1]['average']), tmp_path / 'vit')
    found, stored = config(tmp_path / 'vit'), STORED[name]['config']
    # a later timm may say more of the input
    assert {key: found['pretrained_cfg'].get(key) for key in stored['pretrained_cfg']} == stored['pretrained_cfg']
    # the number of classes stands beside these since: transformers would be given it twice
    args = {key: value for key, value in stored['model_args'].items() if key != 'num_classes'}
    assert found['num_classes'] == stored['model_args']['num_classes']
    assert {**found, 'pretrained_cfg': None} == {**stored, 'pretrained_cfg': None, 'model_args': args}


@pytest.mark.parametrize('case', CONVERTED)
def test_checkpoints_and_model_folders_are_converted(case, tmp_path):
    run, source, *ema = case.split()
    where = 'last' if source == 'last' else f'checkpoints/{source}'
    run_convert(GOLDEN / run / where, '--output', tmp_path / 'vit', *['--use-ema'] * len(ema))
    assert_same(logits(ewa.load(tmp_path / 'vit'), grey_images()), CONVERTED[case])


@pytest.mark.parametrize('run', RUNS)
def test_a_run_is_resumed_and_ends_where_it_ended(run, folder, tmp_path):
    shutil.copytree(GOLDEN / run, tmp_path / run, ignore=shutil.ignore_patterns('last'))
    (tmp_path / run / 'summary.csv').write_text(
        ''.join((GOLDEN / run / 'summary.csv').read_text().splitlines(keepends=True)[:3]))
    reset()
    train.main(['-c', str(GOLDEN / run / 'args.yaml'), '--data-dir', str(folder), '--output', str(tmp_path),
                '--resume'])

    state = read_state(checkpoints(tmp_path / run)[-1])
    assert (state.epoch, state.update, state.averager) == (3, 12, {'steps': 12, 'pulls': 6})
    rows, stored = summary(tmp_path / run), summary(GOLDEN / run)
    assert len(rows) == 3 and rows[:2] == stored[:2]
    assert rows[2].keys() == stored[2].keys()
    stored[2]['lr'] = stored[1]['lr']  # these runs noted the rate of the next epoch
    for key in rows[2].keys() - {'train_seconds'}:
        assert rows[2][key] == pytest.approx(stored[2][key], rel=1e-4)
    for file in ('model.safetensors', 'ema.safetensors'):
        if (GOLDEN / run / 'last' / file).is_file():
            found, expected = (load_file(root / run / 'last' / file) for root in (tmp_path, GOLDEN))
            assert list(found) == list(expected)
            # an update of AdamW is of the size of the learning rate, whichever way a rounding error turns it
            assert all(torch.allclose(found[key], expected[key], atol=2e-3) for key in found)
