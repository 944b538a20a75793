"""The driver of the accuracy studies, its baselines and its tables."""
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import ewa
from ewa.diagnostics import distances_to_mean
from ewa.exporting import write_folder
from ewa.moe import MeanFormMoE, moe_layers
from ewa.options import convert_parser, train_parser
from experiments import runner, setting, studies
from experiments.baselines import (
    LAYERS,
    FusedMoE,
    ImagePartitionMoE,
    LearnedFusionMoE,
    OneExpertMoE,
    RandomSignsMoE,
    baseline,
    slow_ffns,
)
from experiments.data import subset
from experiments.runner import Run, arguments, read_results, record, run_stage
from experiments.scoring import Memory, metrics, score
from experiments.setting import EWA

MINI = Path(__file__).parent.parent / 'data' / 'fashion_mini'


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        'vit_tiny_patch16_224', img_size=28, in_chans=1, patch_size=7, embed_dim=16, depth=2, num_heads=2,
        num_classes=10, **kwargs)


def experts(count: int = 3, width: int = 8, same: bool = False):
    torch.manual_seed(1)
    made = [timm.layers.Mlp(width, 2 * width) for _ in range(count)]
    if same:
        for expert in made[1:]:
            expert.load_state_dict(made[0].state_dict())
    return made


def test_image_partition_sends_an_image_to_one_expert():
    layer = ImagePartitionMoE(experts(3)).train()
    x = torch.randn(8, 5, 8)
    out = layer(x)
    outputs = torch.stack([expert(x) for expert in layer.experts])  # (E, B, N, D)
    owner = [[i for i in range(3) if torch.allclose(out[b], outputs[i, b], atol=1e-6)] for b in range(8)]
    assert all(len(found) == 1 for found in owner)
    assert sorted(sum(i == found[0] for found in owner) for i in range(3)) == [2, 3, 3]


def test_image_partition_evaluates_the_mean():
    layer = ImagePartitionMoE(experts(3)).eval()
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), layer.fuse()(x))


def test_static_fusion_is_the_mean_ffn_in_training_too():
    layer = FusedMoE(experts(3)).train()
    x = torch.randn(2, 5, 8)
    assert torch.allclose(layer(x), layer.fuse()(x), atol=1e-6)


def test_static_fusion_of_copies_trains_as_the_dense_model_under_plain_gradient_descent():
    dense, x, y = vit(), torch.randn(6, 1, 28, 28), torch.arange(6)
    fused = ewa.to_moe(vit(), 3, layers='all', router='static-fusion')
    # each expert gets a third of the gradient of their mean
    groups = [{'params': [p for n, p in fused.named_parameters() if ('experts' in n) == inside], 'lr': lr}
              for inside, lr in ((True, 0.3), (False, 0.1))]
    for model, optimizer in ((dense, torch.optim.SGD(dense.parameters(), 0.1)), (fused, torch.optim.SGD(groups, 0.1))):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert torch.allclose(dense(x), fused(x), atol=1e-4)


def test_learned_fusion_is_the_weighted_ffn_and_learns_its_weights():
    layer = LearnedFusionMoE(experts(3))
    with torch.no_grad():
        layer.scores.copy_(torch.tensor([2., 0., -1.]))
    x = torch.randn(4, 8)
    weights = layer.scores.softmax(0)
    states = [expert.state_dict() for expert in layer.experts]
    expected = torch.func.functional_call(
        layer.experts[0], {k: sum(w * s[k] for w, s in zip(weights, states)) for k in states[0]}, (x,))
    out = layer(x)
    assert torch.allclose(out, expected, atol=1e-6)
    out.square().sum().backward()
    assert layer.scores.grad.abs().max() > 0


def test_learned_fusion_of_copies_has_nothing_to_learn():
    layer = LearnedFusionMoE(experts(3, same=True))
    layer(torch.randn(4, 8)).square().sum().backward()
    assert layer.scores.grad.abs().max() < 1e-4


def test_random_signs_keep_size_and_gradients_of_deviations():
    layer = RandomSignsMoE(experts(4), spread=0.3).train()
    plain = MeanFormMoE.expert_states(layer)
    torch.manual_seed(2)
    states = layer.expert_states()
    for key, m in layer.mean.named_parameters():
        before, after = (torch.stack([state[key] for state in found]) - m for found in (plain, states))
        assert torch.allclose(before.abs(), after.abs(), atol=1e-6)
        signs = (before * after).sign().detach()
        assert (signs == signs[0]).all() and 0 < (signs[0] > 0).float().mean() < 1
        assert torch.allclose(after.mean(0), torch.zeros_like(m), atol=1e-6)
    # as without signs: s times what an expert gets, centred
    torch.stack([state['fc1.weight'].sum() * i for i, state in enumerate(states)]).sum().backward()
    for i, deviation in enumerate(layer.deviations):
        assert torch.allclose(deviation.fc1.weight.grad, torch.full((16, 8), 0.3 * (i - 1.5)), atol=1e-6)
    assert torch.allclose(layer.mean.fc1.weight.grad, torch.full((16, 8), 6.))


def test_one_expert_takes_the_whole_batch():
    layer, x = OneExpertMoE(experts(4), spread=1.).train(), torch.randn(2, 5, 8)
    outputs = [expert(x) for expert in layer.experts]
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = layer(x)
        seen.add(next(i for i, expected in enumerate(outputs) if torch.allclose(out, expected, atol=1e-5)))
    assert seen == {0, 1, 2, 3}
    assert torch.equal(layer.eval()(x), layer.mean(x))


@pytest.mark.parametrize('name', ['random signs 0.3', 'one expert a batch 1'])
def test_controls_of_the_mean_form_are_saved_and_loaded(name, tmp_path):
    model = ewa.to_moe(vit(), 4, layers='all', router=baseline(name)[0]['router']).eval()
    write_folder(model, tmp_path / 'out')
    loaded = ewa.load(tmp_path / 'out').eval()
    x = torch.randn(2, 1, 28, 28)
    assert repr(loaded) == repr(model) and torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('bound', [0.05, 0.3])
def test_bound_holds_exactly_and_keeps_the_mean(bound):
    model = ewa.to_moe(vit(), 4, layers='all', init='independent')
    first = next(moe_layers(model))[0]
    with torch.no_grad():  # one layer within the bound already
        for expert in model.get_submodule(first).experts[1:]:
            expert.load_state_dict(model.get_submodule(first).experts[0].state_dict())
    before = {name: layer.fuse().state_dict() for name, layer in moe_layers(model)}
    ewa.ExpertAverager(model, **baseline(f'bound {bound}')[1]).step()
    distances = distances_to_mean(model)
    assert distances.pop(first) == 0
    assert all(distance == pytest.approx(bound, rel=1e-3) for distance in distances.values())
    for name, layer in moe_layers(model):
        for key, value in layer.fuse().state_dict().items():
            assert torch.allclose(value, before[name][key], atol=1e-6)


def test_slow_ffns_move_less_and_decay_alike():
    model = vit()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = slow_ffns(model, 0.5, opt='adamw', lr=0.01, weight_decay=0.1)
    timm.scheduler.CosineLRScheduler(optimizer, 10).step_update(0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():  # AdamW: p (1 - lr wd) - lr at the first step
        decay = 1 - 0.01 * 0.1 * (p.ndim > 1 and 'pos_embed' not in name and 'cls_token' not in name)
        expected = decay * before[name] - (0.005 if '.mlp.' in name else 0.01)
        assert torch.allclose(p, expected, atol=1e-6), name


def test_baselines_enter_as_routers_policies_and_optimizers():
    for name, layer in LAYERS.items():
        flags, seams = baseline(name)
        args = train_parser().parse_args(arguments(flags))
        assert type(next(moe_layers(ewa.to_moe(vit(), 2, router=args.router)))[1]) is getattr(layer, 'func', layer)
        assert not seams
    assert baseline('FFN lr 0.5')[1]['create_optimizer'].keywords == {'scale': 0.5}
    assert baseline('') == ({}, {})
    with pytest.raises(ValueError, match='nonsense'):
        baseline('nonsense')


def test_memory_gives_what_the_data_set_gives_and_reads_once():
    class Counting(torch.utils.data.Dataset):
        transform, reads = None, 0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            self.reads += 1
            return torch.full((2,), float(index)), index

    inner = Counting()
    dataset = Memory(inner, 'counting')
    dataset.transform = 'any'
    first = [dataset[i] for i in range(3)]
    again = Memory(inner, 'counting')
    again.transform = 'any'
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, (again[i] for i in range(3))))
    assert inner.reads == 3 and inner.transform == 'any'
    again.transform = 'other'
    again[0]
    assert inner.reads == 4


def test_arguments_are_a_command_line():
    line = arguments({
        'lr': 0.1, 'no-aug': True, 'amp': False, 'aa': None, 'model-kwargs': {'depth': 4}, 'ratio': (1, 2)})
    assert line == ['--lr', '0.1', '--no-aug', '--model-kwargs', 'depth=4', '--ratio', '1', '2']


def test_metrics_of_a_calibrated_guess():
    logits = torch.log(torch.tensor([[0.75, 0.25]] * 4))
    result = metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert result['top1'] == 75 and result['ece'] == pytest.approx(0, abs=1e-6)
    expected = -(3 * torch.log(torch.tensor(0.75)) + torch.log(torch.tensor(0.25))).item() / 4
    assert result['nll'] == pytest.approx(expected)


def test_choice_is_by_validation(monkeypatch):
    def trial(lr, drop_path, stage, top1, epochs=40):
        return dict(
            labels=dict(family='dense', stage=stage, epochs=epochs), test=dict(top1=0),
            last=dict(eval_top1=top1, eval_loss=lr), flags={'lr': lr, 'weight-decay': 0.05, 'drop-path': drop_path})

    trials = [trial(0.1, 0., 0, 70.), trial(0.3, 0., 0, 72.), trial(0.2, 0., 0, 72.), trial(0.2, 0.1, 2, 71.),
              trial(0.2, 0.2, 2, 69.), trial(0.4, 0., 0, 90., epochs=10)]
    monkeypatch.setattr(studies.tune, 'read_results', lambda name: trials)
    s = setting.setting(Path('some'), Path('work'), False, None)
    assert studies.tune.chosen(s, 'dense', 40, 2) == {'lr': 0.2, 'weight-decay': 0.05, 'drop-path': 0.}
    assert studies.tune.chosen(s, 'dense', 10, 2)['lr'] == 0.4
    assert studies.tune.chosen(s, 'dense', 40, 3) == {'lr': 0.2, 'weight-decay': 0.05, 'drop-path': 0.1}
    with pytest.raises(ValueError, match='run the study tune'):
        studies.tune.chosen(s, 'no pull', 40)


def test_rate_on_all_images_is_chosen_by_validation_among_equal_models(monkeypatch):
    s = setting.setting(Path('glyphs'), Path('work'), False, None)
    width, epochs, *_, ratio = s.whole[-1]

    def trial(lr, val, test, **other):
        labels = dict(dict(variant='dense', width=width, epochs=epochs, mlp_ratio=ratio, lr=lr), **other)
        return dict(labels=labels, last=dict(eval_top1=val), test=dict(top1=test))

    trials = [trial(0.1, 70., 99.), trial(0.2, 72., 60.), trial(0.3, 71., 70.), trial(0.4, 90., 90., width=2 * width),
              trial(0.5, 90., 90., epochs=epochs + 1), trial(0.6, 90., 90., variant='MoE'),
              trial(0.7, 90., 90., mlp_ratio=2)]
    monkeypatch.setattr(studies.whole, 'read_results', lambda name: trials)
    assert studies.whole.best_rate(s, 'dense') == 0.2
    assert studies.whole.best_rate(s, 'MoE') == 0.6
    with pytest.raises(ValueError, match='run the study whole'):
        studies.whole.best_rate(s, 'EWA')


@pytest.mark.parametrize('name, gpu', [('fashion', False), ('fashion', True), ('glyphs', False)])
@pytest.mark.parametrize('study', studies.STUDIES)
def test_every_run_of_a_study_is_a_command_line_of_the_scripts(study, name, gpu, tmp_path, monkeypatch):
    data = tmp_path / name
    data.mkdir()
    for split in ('train', 'val', 'test'):
        subset(MINI / 'val.tar', None, data / f'{split}.tar')
    monkeypatch.setattr(studies.pretrained, 'best', lambda s, variants, images: (variants[0], 0.1))
    for module in (studies.tune, studies.main, studies.mean):
        monkeypatch.setattr(module, 'chosen', lambda *_: {'lr': 0.1, 'weight-decay': 0.2, 'drop-path': 0.3})
    for module in (studies.gathering, studies.whole):
        monkeypatch.setattr(module, 'best_rate', lambda *_: 0.1)
    for module in (setting, *(study for study in vars(studies).values() if hasattr(study, 'subset'))):
        monkeypatch.setattr(module, 'subset', lambda source, count, target, classes=None: target)
    s = setting.setting(data, tmp_path / 'work', gpu, None)
    runs = [run for stage in studies.STUDIES[study].runs(s) for run in stage]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        parser = train_parser() if run.script == 'train' else convert_parser()
        args = parser.parse_args([run.source] * bool(run.source) + arguments(dict(run.flags, output='out')))
        assert getattr(args, 'seed', run.labels['seed']) == run.labels['seed']
        if run.script == 'train':
            assert args.epochs > args.warmup_epochs
        # what a run starts from was made by the same study
        made = s.work / s.study(study)
        earlier = [run.source, getattr(args, 'pretrained_path', None), getattr(args, 'initial_checkpoint', None)]
        earlier += [(getattr(args, 'teacher', None) or '').removeprefix('local-dir:')]
        assert all(Path(path).is_relative_to(made) for path in filter(None, earlier))


@pytest.mark.parametrize('data, images', [('fashion', 55000), ('glyphs', 72086)])
def test_stored_results_are_those_of_the_runs_of_today(data, images, tmp_path, monkeypatch):
    for module in (setting, *(study for study in vars(studies).values() if hasattr(study, 'subset'))):
        monkeypatch.setattr(module, 'subset', lambda source, count, target, classes=None: target)
    for module in (studies.gathering, studies.real, studies.refit):
        monkeypatch.setattr(module, 'classes_of', lambda tar: {'all': range(images)})
    monkeypatch.setattr(studies.finetune, 'classes_of', lambda tar: {str(i): [] for i in range(10)})
    s = setting.setting(tmp_path / data, tmp_path / 'work', False, None)
    compared = 0
    for name, study in studies.STUDIES.items():
        lines = read_results(s.study(name))
        runs = [run for stage in study.runs(s) for run in stage] if lines else []
        records = {run.name: json.loads(json.dumps(record(run, s.work))) for run in runs}
        for line in lines:
            if line['name'] in records:  # others: more seeds, and trials that the search was made again without
                for key in ('script', 'flags', 'baseline'):
                    assert line.get(key) == records[line['name']].get(key), line['name']
                compared += 1
    assert compared > 500


@pytest.mark.slow
def test_stage_runs_scores_and_resumes(tmp_path, monkeypatch, capsys):
    data = tmp_path / 'fashion'
    data.mkdir()
    for split, source in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        subset(MINI / f'{source}.tar', 200, data / f'{split}.tar')
    monkeypatch.setattr(runner, 'RESULTS', tmp_path / 'results')
    s = setting.setting(data, tmp_path / 'work', False, None)
    runs = [s.train(variant, dict(variant=variant, seed=0), 200, 2, kind, **flags) for variant, flags, kind in (
        ('dense', {'model-ema': True}, ''), ('EWA', EWA, ''), ('learned', EWA, 'learned fusion'))]
    convert = Run('average', dict(s.converting(), method='average'), dict(seed=0), 'convert',
                  str(tmp_path / 'work' / 'some' / runs[1].name / 'last'))
    run_stage('some', runs, s.work, 1)
    run_stage('some', [*runs, convert], s.work, 1)
    assert '3 of 4 runs are done' in capsys.readouterr().out
    text = (tmp_path / 'results/some.jsonl').read_text()
    lines = {entry['name']: entry for entry in map(json.loads, text.splitlines())}
    assert len(lines) == 4 and str(tmp_path) not in json.dumps(lines)
    dense, moe, learned = (lines[run.name] for run in runs)
    assert set(dense['test']) == {'top1', 'nll', 'ece'} and 'test_ema' in dense and 'routed' not in dense
    assert moe['routed'] != moe['dense'] and moe['robust'].keys() == dense['robust'].keys() and 'routed' not in learned
    assert moe['experts']['distance/blocks.0.mlp'][-1][1] > 0
    # exported, it is the same model
    assert lines['average']['test'] == pytest.approx(moe['test'], rel=1e-5)
    changed = s.train('dense', dict(variant='dense', seed=0), 200, 2, lr=0.5)
    with pytest.raises(ValueError, match=f'{changed.name} with other flags .lr, model-ema.'):
        run_stage('some', [changed], s.work, 1)
    bad = s.train('bad', dict(seed=0), 200, 2, lr='much')
    good = s.train('good', dict(seed=0), 200, 2)
    with pytest.raises(RuntimeError, match='1 of 2 runs failed, the first: bad'):
        run_stage('some', [bad, good], s.work, 1)
    assert [entry['name'] for entry in runner.read_results('some')][-1] == good.name
    folder = tmp_path / 'work' / 'some' / runs[1].name / 'last'
    assert score(folder, data / 'test.tar')['test'] == pytest.approx(moe['test'], rel=1e-5)
