import json
import math
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

import ewa
from ewa.distillation import TeacherView, benefit_kept, distillation_task, forward_flops
from ewa.gathering import METHODS
from ewa.moe import moe_layers
from gated import gated
from runs import FLAGS, SAMPLE, config_of, reset, run_convert, summary, train


@pytest.fixture
def pair(tiny):
    """A student in training, and a teacher of other weights and another normalisation, with dropout."""
    student, teacher = tiny(depth=2), tiny(depth=2, seed=1, proj_drop_rate=.5)
    with torch.no_grad():
        for model in (student, teacher):
            model.head.weight.mul_(100)
    student.pretrained_cfg = dict(student.pretrained_cfg, mean=(.5, .4, .3), std=(.2, .3, .4))
    teacher.pretrained_cfg = dict(teacher.pretrained_cfg, mean=(.1, .2, .3), std=(.6, .5, .4))
    return student.train(), teacher.eval().requires_grad_(False)


SPLITS = ['--train-split', 'train.tar', '--val-split', 'val.tar']


def for_teacher(images):
    """Undo the student's normalisation and apply the teacher's, pixel by pixel."""
    result = images.clone()
    for c, (m0, s0, m1, s1) in enumerate([(.5, .2, .1, .6), (.4, .3, .2, .5), (.3, .4, .3, .4)]):
        result[:, c] = (images[:, c] * s0 + m0 - m1) / s1
    return result


def by_hand(student_logits, teacher_logits, target, temperature):
    """Label loss and temperature^2 KL(teacher || student), both means over images, number by number."""
    def softmax(row, t):
        total = sum(math.exp(v / t) for v in row)
        return [math.exp(v / t) / total for v in row]

    label = kl = 0.
    for s, t, y in zip(student_logits.tolist(), teacher_logits.tolist(), target.tolist()):
        label -= math.log(softmax(s, 1)[y]) / len(target)
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl += temperature ** 2 * sum(a * math.log(a / b) for a, b in zip(p, q)) / len(target)
    return label, kl


@pytest.mark.parametrize('temperature', [1., 4.])
@pytest.mark.parametrize('weights, label_weight, kl_weight', [
    ({}, 1, 1), (dict(task_loss_weight=.3), .3, .7), (dict(distill_loss_weight=2.), 1, 2),
    (dict(task_loss_weight=.3, distill_loss_weight=2.), .3, 2)])
def test_loss_by_hand(pair, images, temperature, weights, label_weight, kl_weight):
    student, teacher = pair
    target = torch.tensor([3, 0, 9])
    task = distillation_task(student, teacher, nn.CrossEntropyLoss(), temperature, **weights)
    label, kl = by_hand(student(images), teacher(for_teacher(images)), target, temperature)
    assert label > 1 and kl > .1
    assert task(images, target)['loss'].item() == pytest.approx(label_weight * label + kl_weight * kl, rel=1e-4)


def test_nothing_to_distil_from_an_equal_teacher(tiny, images):
    student = tiny(depth=2)
    task = distillation_task(student, deepcopy(student).eval(), nn.CrossEntropyLoss(), task_loss_weight=0.)
    assert task(images, torch.tensor([0, 1, 2]))['loss'].item() == pytest.approx(0, abs=1e-6)


def test_the_student_learns_and_the_teacher_stays(pair, images):
    student, teacher = pair
    before = deepcopy(teacher.state_dict())
    start = deepcopy(student.state_dict())
    task = distillation_task(student, teacher, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(task.parameters(), 1e-5)  # the teacher's among them
    task.train()
    student.train()
    assert student.training and not any(module.training for module in teacher.modules())
    losses = []
    for _ in range(3):
        loss = task(images, torch.tensor([3, 0, 9]))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] and all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(torch.equal(p, start[key]) for key, p in student.named_parameters())


def test_the_view_of_the_teacher_normalises_and_stays_in_eval(pair, images):
    student, teacher = pair
    view = TeacherView(distillation_task(student, teacher, nn.CrossEntropyLoss()))
    expected = teacher(for_teacher(images))
    for mode in (True, False):
        assert view.train(mode) is view and view.eval() is view
        assert student.training and not teacher.training
        torch.testing.assert_close(view(images), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(teacher(images), expected, atol=1e-2)


def matmul(rows, inner, columns):
    return 2 * rows * inner * columns


def vit_flops(ffn, depth=4, tokens=17, width=32):
    """Of `tiny()`: patches, blocks with an FFN of that cost, and the classifier of the class token."""
    block = (
        matmul(tokens, width, 3 * width)
        + 2 * matmul(tokens, width // 2, tokens) + 2 * matmul(tokens, tokens, width // 2)  # two heads
        + matmul(tokens, width, width))
    return matmul(16, 3 * 8 * 8, width) + depth * block + sum(ffn) + matmul(1, width, 10)


class TestFlops:
    dense = matmul(17, 32, 128) + matmul(17, 128, 32)

    def test_of_a_vit(self, tiny):
        assert forward_flops(tiny(), (3, 32, 32)) == vit_flops([self.dense] * 4)

    def test_a_random_partition_costs_what_its_host_does(self, tiny):
        assert forward_flops(ewa.to_moe(tiny()), (3, 32, 32)) == vit_flops([self.dense] * 4)

    @pytest.mark.parametrize('top_k', [1, 2, 4])
    def test_a_gated_layer_costs_its_chosen_experts(self, tiny, top_k):
        router = matmul(17, 32, 4)
        assert forward_flops(gated(tiny(), top_k=top_k), (3, 32, 32)) == vit_flops(
            2 * [self.dense, router + top_k * self.dense])

    def test_fine_grained_experts_and_shared_ones(self, tiny):
        model = gated(tiny(), layers='all', num_experts=8, expert_ratio=.25, num_shared=2, top_k=3)
        ffn = matmul(17, 32, 8) + (2 + 3) * self.dense // 4
        assert forward_flops(model, (3, 32, 32)) == vit_flops([ffn] * 4)
        assert forward_flops(ewa.to_dense(model), (3, 32, 32)) == vit_flops([self.dense] * 4)

    @pytest.mark.parametrize('training', [True, False])
    def test_counting_leaves_the_model_as_it_was(self, tiny, training):
        model = gated(tiny()).train(training)
        model.blocks[0].train(not training)
        before, modes = deepcopy(model.state_dict()), [module.training for module in model.modules()]
        forward_flops(model, (3, 32, 32))
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_benefit_kept():
    assert benefit_kept(student=78., dense=74., teacher=80.) == pytest.approx(4 / 6)
    assert benefit_kept(80., 74., 80.) == 1 and benefit_kept(74., 74., 80.) == 0 and benefit_kept(70., 74., 78.) == -1
    assert math.isnan(benefit_kept(78., 74., 74.)) and math.isnan(benefit_kept(78., 74., 73.))


@pytest.mark.slow
def test_a_gated_model_is_gathered_and_distilled_on_the_sample(tmp_path, capsys):
    common = [*FLAGS[FLAGS.index('--img-size'):], '--epochs', '1', '--no-aug', '--data-dir', str(SAMPLE), *SPLITS,
              '--output', str(tmp_path)]
    reset()
    train.main([*FLAGS[:FLAGS.index('--img-size')], *common, '--router', 'topk', '--num-experts', '4',
                '--moe-layers', 'all', '--experiment', 'moe'])
    moe = tmp_path / 'moe' / 'best'
    before = ewa.load(moe).state_dict()
    run_convert(moe, '--output', tmp_path / 'gathered', '--method', 'all', '--report', tmp_path / 'report',
                '--data-dir', SAMPLE, *SPLITS, '--workers', 0, '--calibration-images', 100)
    text = capsys.readouterr().out
    scores = {name: float(score) for name, score in re.findall(r'^  (\S.*?) +(\d+\.\d\d)  \S+$', text, re.M)}
    assert set(scores) == {*METHODS, 'refit, 300 steps'} and f'(calibration: {100 * 17} tokens a layer' in text
    best = re.search(r'Recommended: (.+), the highest', text).group(1)
    assert scores[best] == max(scores.values())
    config = config_of(tmp_path / 'gathered')
    assert config['ewa']['method'] == best.split(',')[0] and config['architecture'] == 'vit_tiny_patch16_224'
    assert {path.name for path in (tmp_path / 'report').iterdir()} == {
        'report.html', 'report.md', 'similarity.png', 'usage.png', 'error.png'}

    reset()
    train.main(['--model', f'local-dir:{tmp_path / "gathered"}', *common, '--teacher', f'local-dir:{moe}',
                '--experiment', 'student', '--dense-top1', '1'])
    text = capsys.readouterr().out
    (row,) = summary(tmp_path / 'student')
    teacher = summary(tmp_path / 'moe')[-1]['eval_top1']
    assert f'top-1 {teacher:.2f}' in text and 'PFLOP' in text
    assert f'{100 * benefit_kept(row["eval_top1"], 1, teacher):.1f} % of the benefit' in text
    assert row['eval_top1'] > scores[best]
    assert all(torch.equal(value, before[key]) for key, value in ewa.load(moe).state_dict().items())

    student = ewa.load(tmp_path / 'student' / 'best').eval()
    assert not list(moe_layers(student))
    ewa.export(student, tmp_path / 'vit')
    images = torch.randn(2, 1, 28, 28)
    torch.save((images, student(images).detach()), tmp_path / 'expected.pt')
    script = """if True:
        import sys
        sys.modules['ewa'] = None
        import timm, torch
        torch.set_num_threads(1)
        images, logits = torch.load('expected.pt')
        model = timm.create_model('local-dir:vit', pretrained=True).eval()
        assert type(model).__module__.startswith('timm.') and torch.equal(model(images), logits)
        """
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'vit' / 'config.json').read_text())['num_classes'] == timm.create_model(
        f'local-dir:{tmp_path / "vit"}').num_classes == 10
