import gc
import json
import math
import warnings
import weakref
from copy import deepcopy

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sklearn.datasets import load_digits
from timm.layers import Mlp
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import ewa
import reference
from ewa.moe import MeanFormMoE, RandomPartitionMoE, moe_layers, pulled
from ewa.pull import max_share_rate
from gated import REWEIGHTED

HALF = [torch.bfloat16, torch.float16]


def moe_layer(num_experts=4, width=8, hidden=16, dtype=None, seed=0):
    torch.manual_seed(seed)
    return RandomPartitionMoE(Mlp(width, hidden) for _ in range(num_experts)).to(dtype)


def mean_layer(num_experts=4, width=8, hidden=16, dtype=None, seed=0, spread=.3):
    """A layer in mean form whose deviations have a mean of their own, as training gives them."""
    layer = MeanFormMoE(moe_layer(num_experts, width, hidden, seed=seed).experts, spread)
    with torch.no_grad():
        for deviation in layer.deviations:
            for p in deviation.parameters():
                p.add_(.1)
    return layer.to(dtype)


def expert_parameters(layer):
    return [list(expert.parameters()) for expert in layer.experts]


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def deviation(layer):
    """Root mean square distance of the experts to their mean."""
    total, count = 0., 0
    for parameters in zip(*expert_parameters(layer)):
        stacked = torch.stack([p.detach().double() for p in parameters])
        total += (stacked - stacked.mean(0)).square().sum().item()
        count += stacked.numel()
    return math.sqrt(total / count)


def are_equal(layer):
    return all(torch.equal(parameters[0], p) for parameters in zip(*expert_parameters(layer)) for p in parameters)


def train_step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    model.train()(torch.randn(8, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('form', [moe_layer, mean_layer])
@pytest.mark.parametrize('num_experts', range(2, 9))
@pytest.mark.parametrize('part', [0, .001, .3, .77, 1])
def test_pull_is_the_equation(num_experts, part, form):
    share_rate = part * (num_experts - 1) / num_experts
    layer = form(num_experts)
    expected = reference.pull(expert_parameters(layer), share_rate)
    means = [reference.mean(p) for p in zip(*expert_parameters(layer))]
    before = deviation(layer)
    ewa.ExpertAverager(layer, share_rate).step()
    for parameters, values in zip(expert_parameters(layer), expected):
        for p, value in zip(parameters, values):
            torch.testing.assert_close(p.double(), value, atol=2e-7, rtol=0)
    for parameters, mean in zip(zip(*expert_parameters(layer)), means):
        torch.testing.assert_close(reference.mean(parameters), mean, atol=1e-7, rtol=0)
    assert deviation(layer) == pytest.approx((1 - share_rate * num_experts / (num_experts - 1)) * before, abs=1e-7)


def test_layers_of_different_numbers_of_experts_are_pulled_by_their_own_equation():
    model = nn.ModuleList([moe_layer(2), moe_layer(5), moe_layer(2, seed=1)])
    expected = [reference.pull(expert_parameters(layer), .4) for layer in model]
    ewa.ExpertAverager(model, .4).step()
    for layer, experts in zip(model, expected):
        for parameters, values in zip(expert_parameters(layer), experts):
            for p, value in zip(parameters, values):
                torch.testing.assert_close(p.double(), value, atol=2e-7, rtol=0)


@pytest.mark.parametrize('kwargs', [
    dict(), dict(form='mean'), dict(router='topk'), dict(router='topk', num_shared=1, expert_ratio=.25)])
def test_pull_touches_experts_only(tiny, images, kwargs):
    model = ewa.to_moe(tiny(), init='independent', **kwargs).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(images).square().sum().backward()
    optimizer.step()
    before, pointers = snapshot(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = deepcopy(optimizer.state_dict())
    torch.manual_seed(0)
    rng = torch.get_rng_state()

    ewa.ExpertAverager(model, .5).step()
    assert torch.equal(torch.get_rng_state(), rng)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ('.experts.' not in name and '.deviations.' not in name), name
        assert p.data_ptr() == pointers[name] and torch.equal(p.grad, grads[name]) and p.requires_grad
    after = optimizer.state_dict()
    assert after['param_groups'] == state['param_groups']
    for i, values in state['state'].items():
        assert all(torch.equal(value, after['state'][i][key]) for key, value in values.items())


@pytest.mark.parametrize('num_experts', range(2, 9))
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALF])
def test_the_largest_rate_makes_experts_equal_to_the_bit(num_experts, dtype):
    layer = moe_layer(num_experts, dtype=dtype)
    ewa.ExpertAverager(layer, max_share_rate(num_experts)).step()
    assert are_equal(layer)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize('share_rate', [1e-4, .1, .5, .75])
def test_equal_experts_stay_as_they_are(dtype, share_rate):
    torch.manual_seed(0)
    ffn = Mlp(64, 256)
    layer = RandomPartitionMoE(deepcopy(ffn) for _ in range(4)).to(dtype)
    before = snapshot(layer)
    averager = ewa.ExpertAverager(layer, share_rate)
    for _ in range(10):
        averager.step()
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_without_spread_the_mean_form_trains_as_the_dense_model(tiny, images):
    dense = tiny().train()
    model = ewa.to_moe(deepcopy(dense), layers='all', form='mean', spread=0.).train()
    target = torch.tensor([1, 2, 3])
    # the eps keeps Adam from making whole steps of gradients that are rounding errors
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=.1, eps=1e-4) for m in (dense, model)]
    ewa.ExpertAverager(model, .1).attach(optimizers[1])
    for _ in range(10):
        losses = []
        for m, optimizer in zip((dense, model), optimizers):
            losses.append(nn.functional.cross_entropy(m(images), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
    assert losses[0] < 2
    trained = ewa.to_dense(model).state_dict()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=1e-6)


def test_an_optimizer_without_the_deviations_is_refused(tiny):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    ewa.to_moe(model, form='mean')
    with pytest.raises(ValueError, match='holds 0 of the 16 trainable expert parameters of blocks.1.mlp'):
        ewa.ExpertAverager(model, .1).attach(optimizer)


def test_the_mean_of_mean_forms_over_time_is_the_mean_of_their_experts():
    first, second = mean_layer(), mean_layer(seed=1)
    ema = ModelEmaV3(first, decay=.7)
    ema.update(second)
    for averaged, a, b in zip(ema.module.experts, first.experts, second.experts):
        for key, value in averaged.named_parameters():
            torch.testing.assert_close(value, .7 * a.get_parameter(key) + .3 * b.get_parameter(key))


def test_under_sgd_the_spread_acts_squared():
    x, moves = torch.randn(8, 8), []
    for spread in (.2, .4):
        layer = mean_layer(spread=1.)
        layer.spread = spread
        with torch.no_grad():
            for deviation in layer.deviations:
                for p in deviation.parameters():
                    p.zero_()
        torch.manual_seed(1)
        layer.train()(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1.).step()
        moves.append(layer.experts[0].fc1.weight - layer.mean.fc1.weight)
    torch.testing.assert_close(moves[1], 4 * moves[0], rtol=1e-4, atol=1e-6)


def test_zero_rate_changes_nothing():
    layer = moe_layer()
    before = snapshot(layer)
    averager = ewa.ExpertAverager(layer, 0)
    averager.step()
    assert averager.pulls == 1 and all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_training_with_the_hook_is_training_with_the_equation(tiny):
    data, labels = load_digits(return_X_y=True)
    data = torch.tensor(data, dtype=torch.float64).reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    results = []
    for attach in (True, False):
        model = tiny(img_size=8, patch_size=2, in_chans=1, depth=2).double()
        ewa.to_moe(model, layers='all', init='independent').train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        averager = ewa.ExpertAverager(model, .2, schedule='linear', total_steps=60)
        if attach:
            averager.attach(optimizer)
        layers, losses, start = [layer for _, layer in moe_layers(model)], [], deviation(model.blocks[0].mlp)
        for step in range(100):
            torch.manual_seed(step)
            chosen = torch.randint(len(data), (32,))
            loss = nn.functional.cross_entropy(model(data[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not attach:
                reference.pull_layers(layers, .2 * min(1, (step + 1) / 60))
            losses.append(loss.item())
        results.append((snapshot(model), losses))
        assert sum(losses[-10:]) < .8 * sum(losses[:10])
        assert deviation(model.blocks[0].mlp) < .1 * start
    for name, p in results[0][0].items():
        torch.testing.assert_close(p, results[1][0][name], atol=1e-8, rtol=0)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-8)


class TestSchedule:
    @pytest.mark.parametrize('schedule, rate', [
        ('constant', lambda t: .3),
        ('linear', lambda t: .3 * min(1, t / 5)),
        ('cosine', lambda t: .3 * (1 - math.cos(math.pi * min(1, t / 5))) / 2),
    ])
    def test_rate_at_pull_t(self, schedule, rate):
        layer = moe_layer(2)
        averager = ewa.ExpertAverager(layer, .3, schedule, total_steps=None if schedule == 'constant' else 5)
        for t in range(1, 9):
            assert averager.share_rate == pytest.approx(rate(t), abs=1e-12)
            before = deviation(layer)
            averager.step()
            assert deviation(layer) == pytest.approx((1 - 2 * rate(t)) * before, rel=1e-4, abs=1e-7)

    def test_every_pulls_at_each_nth_step(self):
        layer = moe_layer(2)
        averager = ewa.ExpertAverager(layer, .3, 'linear', total_steps=6, every=3)
        factors = []
        for _ in range(9):
            before = deviation(layer)
            averager.step()
            factors.append(deviation(layer) / before)
        assert factors == pytest.approx([1, 1, .7, 1, 1, .4, 1, 1, .4], rel=1e-4)
        assert (averager.steps, averager.pulls) == (9, 3)

    def test_stop_after(self):
        layer = moe_layer(2)
        averager = ewa.ExpertAverager(layer, .25, stop_after=2)
        before = deviation(layer)
        for _ in range(5):
            averager.step()
        assert deviation(layer) == pytest.approx(before / 4, rel=1e-4) and averager.share_rate == 0

    def test_a_policy_sets_the_rate_of_each_layer_and_pull(self):
        model = nn.ModuleList([moe_layer(), moe_layer()])
        seen = []

        def policy(layer, t):
            seen.append((list(model).index(layer), t))
            return .3 / t if layer is model[0] else 0.

        averager = ewa.ExpertAverager(model, policy, every=2)
        start, untouched = deviation(model[0]), snapshot(model[1])
        for _ in range(4):
            averager.step()
        assert seen == [(0, 1), (1, 1), (0, 2), (1, 2)]
        assert deviation(model[0]) == pytest.approx(start * (1 - .3 * 4 / 3) * (1 - .15 * 4 / 3), rel=1e-4)
        assert all(torch.equal(p, untouched[name]) for name, p in model[1].named_parameters())
        assert averager.share_rate == pytest.approx(.1)  # of the third pull; the largest over layers

    def test_a_policy_out_of_range_is_named(self):
        averager = ewa.ExpertAverager(nn.Sequential(moe_layer()), lambda layer, t: .8)
        with pytest.raises(ValueError, match='share rate of 0 at pull 1 is 0.8, not between 0 and .* 0.75'):
            averager.step()
        with pytest.raises(ValueError, match='leave schedule'):
            ewa.ExpertAverager(moe_layer(), lambda layer, t: .1, schedule='linear', total_steps=3)

    def test_state_dict_round_trip(self):
        averager = ewa.ExpertAverager(moe_layer(), .3, 'cosine', total_steps=9, every=2)
        for _ in range(7):
            averager.step()
        other = ewa.ExpertAverager(moe_layer(), .3, 'cosine', total_steps=9, every=2)
        assert other.share_rate != averager.share_rate
        other.load_state_dict(json.loads(json.dumps(averager.state_dict())))
        for _ in range(3):
            assert other.share_rate == averager.share_rate
            averager.step()
            other.step()
            assert other.state_dict() == averager.state_dict()


@pytest.mark.parametrize('kwargs, message', [
    (dict(share_rate=-.1), r'share_rate must be between 0 and \(E-1\)/E = 0.75 for 4 experts, got -0.1'),
    (dict(share_rate=.751), r'0.75 for 4 experts, got 0.751'),
    (dict(share_rate=float('nan')), 'share_rate'),
    (dict(share_rate=.1, schedule='step'), "schedule must be one of constant, linear, cosine, got 'step'"),
    (dict(share_rate=.1, schedule='linear'), 'needs total_steps >= 1, got None'),
    (dict(share_rate=.1, schedule='cosine', total_steps=0), 'needs total_steps'),
    (dict(share_rate=.1, every=0), 'every must be at least 1'),
    (dict(share_rate=.1, stop_after=-1), 'stop_after'),
])
def test_arguments_are_checked_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ewa.ExpertAverager(moe_layer(), **kwargs)


def test_the_smallest_layer_limits_the_rate():
    model = nn.ModuleList([moe_layer(8), moe_layer(2)])
    ewa.ExpertAverager(model, .5)
    with pytest.raises(ValueError, match='0.5 for 2 experts'):
        ewa.ExpertAverager(model, .6)


def test_a_dense_model_is_refused(tiny):
    with pytest.raises(ValueError, match='no MoE layer to average.*ewa.to_moe'):
        ewa.ExpertAverager(tiny(), .1)


def test_experts_of_different_shapes_are_refused():
    layer = RandomPartitionMoE([Mlp(8, 16), Mlp(8, 32)])
    with pytest.raises(ValueError, match='differ in shape'):
        ewa.ExpertAverager(layer, .1).step()


def test_frozen_experts_are_not_pulled():
    layer = moe_layer()
    for expert in layer.experts:
        expert.fc1.requires_grad_(False)
    before = snapshot(layer)
    ewa.ExpertAverager(layer, .3).step()
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name]) == ('fc1' in name)
    layer.experts[2].fc1.requires_grad_(True)
    with pytest.raises(ValueError, match='fc1.weight is frozen in some experts'):
        ewa.ExpertAverager(layer, .3).step()
    layer.requires_grad_(False)
    before = snapshot(layer)
    ewa.ExpertAverager(layer, .3).step()
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_experts_that_share_a_parameter_are_not_pulled():
    layer = moe_layer()
    layer.experts[2].fc1.weight = layer.experts[0].fc1.weight
    with pytest.raises(ValueError, match='fc1.weight is one parameter in several experts'):
        ewa.ExpertAverager(layer, .3).step()


@pytest.mark.parametrize('change, words', REWEIGHTED)
def test_weights_that_are_no_plain_parameters_are_not_pulled(change, words):
    layer = moe_layer()
    change(layer.experts[2])
    with pytest.raises(ValueError, match=words):
        ewa.ExpertAverager(layer, .3).step()
    with pytest.raises(ValueError, match=words):
        ewa.ExpertAverager(layer, .3).attach(torch.optim.SGD(layer.parameters(), lr=.1))


class TestAttach:
    def test_pulls_once_a_step_until_removed(self):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0)
        averager = ewa.ExpertAverager(layer, .3)
        handle = averager.attach(optimizer)
        start = deviation(layer)
        train_step(layer, optimizer)
        train_step(layer, optimizer)
        assert averager.pulls == 2 and deviation(layer) == pytest.approx(.36 * start, rel=1e-5)
        handle.remove()
        train_step(layer, optimizer)
        assert averager.pulls == 2 and deviation(layer) == pytest.approx(.36 * start, rel=1e-5)

    def test_a_second_time_is_refused_until_detached(self):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0)
        averager = ewa.ExpertAverager(layer, .3)
        handle = averager.attach(optimizer)
        for other in (optimizer, torch.optim.SGD(layer.parameters(), lr=0)):
            with pytest.raises(RuntimeError, match='attached already.*remove'):
                averager.attach(other)
        handle.remove()
        averager.attach(optimizer)
        train_step(layer, optimizer)
        assert averager.pulls == 1

    def test_another_averager_of_the_same_layers_is_refused(self):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0)
        handle = ewa.ExpertAverager(layer, .3).attach(optimizer)
        start = deviation(layer)
        with pytest.raises(RuntimeError, match='Another ExpertAverager pulls  already'):
            ewa.ExpertAverager(nn.Sequential(layer)[0], .3).attach(optimizer)
        optimizer.step()
        assert deviation(layer) == pytest.approx(.6 * start, rel=1e-5)
        handle.remove()
        ewa.ExpertAverager(layer, .3).attach(optimizer)

    def test_removing_leaves_no_hook_behind(self):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0)
        handle = ewa.ExpertAverager(layer, .3).attach(optimizer)
        handle.remove()
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        with ewa.ExpertAverager(layer, .3).attach(optimizer):
            assert len(optimizer._optimizer_step_post_hooks) == 1
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks

    def test_an_optimizer_that_lacks_experts_is_refused(self, tiny):
        model = tiny()
        early = torch.optim.SGD(model.parameters(), lr=.1)
        ewa.to_moe(model)
        with pytest.raises(ValueError, match='holds 4 of the 16 trainable expert parameters of blocks.1.mlp: make'):
            ewa.ExpertAverager(model, .1).attach(early)
        part = torch.optim.SGD(model.blocks[1].parameters(), lr=.1)
        with pytest.raises(ValueError, match='0 of the 16 .* of blocks.3.mlp'):
            ewa.ExpertAverager(model, .1).attach(part)
        model.blocks[3].requires_grad_(False)  # nothing there has to be trained, or pulled
        ewa.ExpertAverager(model, .1).attach(part)

    def test_an_optimizer_with_other_steps_is_refused(self):
        class SAM(torch.optim.SGD):
            def first_step(self):
                pass

            def second_step(self):
                super().step()

        layer = moe_layer()
        with pytest.raises(TypeError, match='SAM does not run step hooks reliably.*averager.step'):
            ewa.ExpertAverager(layer, .1).attach(SAM(layer.parameters(), lr=.1))

    @pytest.mark.parametrize('where', ['state', 'masters'])
    def test_an_optimizer_that_keeps_weights_of_its_own_is_named_once(self, where):
        class Master(torch.optim.SGD):
            @torch.no_grad()
            def step(self):
                for p in self.param_groups[0]['params']:
                    kept = self.state if where == 'state' else self.__dict__.setdefault('masters', {p: {}})
                    master = kept.setdefault(p, {}).setdefault('master', p.clone())
                    p.copy_(master.sub_(p.grad, alpha=1e-3))

        layer = moe_layer()
        optimizer = Master(layer.parameters(), lr=.1)
        ewa.ExpertAverager(layer, .1).attach(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(30):
                train_step(layer, optimizer)
        assert len(caught) == 1
        key = 'master' if where == 'state' else where
        assert f'Master keeps a copy of the weights of  (its {key!r}): it may undo' in str(caught[0].message)

    @pytest.mark.parametrize('kept', [False, True])
    @pytest.mark.parametrize('kwargs', [{}, dict(form='mean'), dict(router='topk')], ids=str)
    def test_a_model_that_calls_an_ffn_it_kept_is_named(self, tiny, images, kept, kwargs):
        class Kept(nn.Module):
            def __init__(self, vit):
                super().__init__()
                self.vit, self.ffns = vit, [vit.blocks[1].mlp]

            def forward(self, x):
                block = self.vit.blocks[1]
                return (self.ffns[0] if kept else block.mlp)(block.norm2(self.vit.patch_embed(x)))

        model = Kept(tiny())
        ewa.to_moe(model, **kwargs)
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        ewa.ExpertAverager(model, .1).attach(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(2):
                optimizer.zero_grad()
                model(images).square().sum().backward()
                optimizer.step()
        assert len(caught) == kept
        assert all('vit.blocks.1.mlp was not called, only an FFN in it' in str(w.message) for w in caught)

    @pytest.mark.parametrize('form', [moe_layer, mean_layer])
    @pytest.mark.parametrize('mode', ['train', 'eval'])
    def test_training_in_eval_mode_is_named(self, form, mode):
        layer = getattr(form(), mode)()
        optimizer = torch.optim.SGD(layer.parameters(), lr=.1)
        ewa.ExpertAverager(layer, .1).attach(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(2):
                layer(torch.randn(8, 8)).square().mean().backward()
                optimizer.step()
        assert len(caught) == (mode == 'eval')
        assert all('is in eval mode' in str(w.message) and 'model.train()' in str(w.message) for w in caught)

    @pytest.mark.parametrize('use', [
        'none', 'attach', 'step', 'resume', 'no averager', 'equal experts', 'two, one attached'])
    def test_an_averager_that_was_never_used_is_named_when_experts_become_one(self, tiny, use):
        model = ewa.to_moe(tiny(), init='copy' if use == 'equal experts' else 'independent')
        if use != 'no averager':
            averager = ewa.ExpertAverager(model, .1)
        if 'attach' in use:
            averager.attach(torch.optim.SGD(model.parameters(), lr=.1))
        elif use == 'step':
            averager.step()
        elif use == 'resume':
            averager.load_state_dict(dict(steps=3, pulls=3))
        if use.startswith('two'):
            averager = ewa.ExpertAverager(model, .2)
        averager = None  # what is warned of does not depend on whether it is kept
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            ewa.to_dense(model)
        assert [str(w.message).split(':')[0] for w in caught] == [
            'An ExpertAverager was made for blocks.1.mlp and pulled nothing'] * (use == 'none')

    def test_parameters_may_be_replaced_or_moved_afterwards(self):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0)
        averager = ewa.ExpertAverager(layer, max_share_rate(4))
        averager.attach(optimizer)
        other = moe_layer(seed=1).double()
        for expert, new in zip(layer.experts, other.experts):
            for linear in ('fc1', 'fc2'):
                setattr(expert, linear, getattr(new, linear))
        assert not are_equal(layer)
        optimizer.step()
        assert are_equal(layer) and layer.experts[0].fc1.weight.dtype == torch.float64

    def test_not_part_of_copies_of_the_optimizer(self):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0)
        averager = ewa.ExpertAverager(layer, .3)
        averager.attach(optimizer)
        assert 'hook' not in str(optimizer.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        train_step(layer, optimizer)
        assert averager.pulls == 1

    def test_the_pull_comes_after_the_update(self):
        layer, by_hand = moe_layer(), moe_layer()
        optimizer, other = (torch.optim.SGD(m.parameters(), lr=.5, momentum=.9) for m in (layer, by_hand))
        ewa.ExpertAverager(layer, .3).attach(optimizer)
        for seed in range(3):
            train_step(layer, optimizer, seed)
            train_step(by_hand, other, seed)
            reference.pull_layers([by_hand], .3)
        for p, q in zip(layer.parameters(), by_hand.parameters()):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


AVAILABLE = timm.optim.list_optimizers(exclude_filters=['bnb*', 'fused*'])  # those need other packages and a GPU


@torch.compiler.set_stance('force_eager')
@pytest.mark.parametrize('name', AVAILABLE)
def test_every_optimizer_of_timm_runs_the_hook(name):
    results = []
    for attach in (True, False):
        layer = moe_layer()
        optimizer = create_optimizer_v2(layer, opt=name, lr=1e-2, weight_decay=.01)
        averager = ewa.ExpertAverager(layer, .3)
        if attach:
            averager.attach(optimizer)
        for seed in range(3):
            torch.manual_seed(seed)
            loss = layer.train()(torch.randn(8, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward(create_graph=name == 'adahessian')
            optimizer.step()
            if not attach:
                averager.step()
        assert averager.pulls == 3
        results.append(snapshot(layer))
    start = snapshot(moe_layer())
    assert all(torch.equal(p, results[1][key]) for key, p in results[0].items())
    assert not any(torch.equal(p, start[key]) for key, p in results[0].items())


def test_a_step_that_calls_its_parents_step_is_one_step():
    class Mine(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from here on torch runs hooks in the parent's step() too
    layer = moe_layer()
    optimizer = Mine(layer.parameters(), lr=.1)
    averager = ewa.ExpertAverager(layer, .3)
    averager.attach(optimizer)
    for _ in range(3):
        layer.train()(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
    assert (averager.steps, averager.pulls) == (3, 3)


def test_an_optimizer_without_hooks_is_refused_with_the_way_out():
    layer = moe_layer()
    optimizer = create_optimizer_v2(layer, opt='lookahead_adamw', lr=0, weight_decay=0)
    optimizer.zero_grad()  # torch patches the class here, so that later instances look as if they ran hooks
    averager = ewa.ExpertAverager(layer, .3)
    with pytest.raises(TypeError, match=r'Lookahead does not run step hooks reliably.*averager.step\(\) after each'):
        averager.attach(optimizer)
    start = deviation(layer)
    train_step(layer, optimizer)
    averager.step()
    assert deviation(layer) == pytest.approx(.6 * start, rel=1e-5)


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def fresh_state(self):
        AcceleratorState._reset_state(True)
        yield
        AcceleratorState._reset_state(True)

    @pytest.mark.parametrize('when', ['before', 'after'])
    def test_accumulated_gradients_are_one_pull(self, when):
        layer = moe_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=.1)
        averager = ewa.ExpertAverager(layer, .3)
        if when == 'before':
            averager.attach(optimizer)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        model, optimizer = accelerator.prepare(layer, optimizer)
        if when == 'after':
            averager.attach(optimizer)
        by_hand = moe_layer()
        other = torch.optim.SGD(by_hand.parameters(), lr=.1)
        for step in range(1, 10):
            with accelerator.accumulate(model):
                torch.manual_seed(step)
                accelerator.backward(model.train()(torch.randn(8, 8)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            assert averager.pulls == step // 3
            torch.manual_seed(step)
            (by_hand.train()(torch.randn(8, 8)).square().mean() / 3).backward()
            if step % 3 == 0:
                other.step()
                other.zero_grad()
                reference.pull_layers([by_hand], .3)
        for p, q in zip(layer.parameters(), by_hand.parameters()):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)

    def test_is_checkpointed_by_accelerate(self, tmp_path):
        accelerator = Accelerator(cpu=True)
        averager = ewa.ExpertAverager(moe_layer(), .3, 'linear', total_steps=10)
        accelerator.register_for_checkpointing(averager)
        averager.step()
        accelerator.save_state(tmp_path)
        averager.step()
        accelerator.load_state(tmp_path)
        assert averager.pulls == 1


@pytest.mark.parametrize('fused', [False, True])
def test_steps_skipped_by_the_loss_scaler_are_not_pulled(fused):
    layer = moe_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=.01, fused=fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    averager = ewa.ExpertAverager(layer, .3)
    averager.attach(optimizer)
    pulls = []
    for step in range(6):
        before = snapshot(layer)
        scaler.scale(layer.train()(torch.randn(8, 8)).square().mean()).backward()
        if step in (0, 3):
            layer.experts[0].fc1.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pulls.append(averager.pulls)
        changed = [not torch.equal(p, before[name]) for name, p in layer.named_parameters()]
        assert not any(changed) if step in (0, 3) else all(changed)
    assert pulls == [0, 1, 2, 2, 3, 4]


class TestHalfPrecision:
    @pytest.mark.parametrize('form', [moe_layer, mean_layer])
    @pytest.mark.parametrize('dtype', HALF)
    def test_small_rates_shrink_deviations_at_their_speed_and_keep_the_mean(self, dtype, form):
        pulls, share_rate, num_experts = 1000, 1e-4, 4
        layer = form(num_experts, width=32, hidden=128, dtype=dtype)
        weights = [ffn.fc1.weight for ffn in pulled(layer)]

        def split():
            stacked = torch.stack([w.detach().double() for w in weights])
            return stacked.mean(0), stacked - stacked.mean(0)

        mean, start = split()
        averager = ewa.ExpertAverager(layer, share_rate)
        for _ in range(pulls):
            averager.step()
        new_mean, end = split()
        expected = (1 - share_rate * num_experts / (num_experts - 1)) ** pulls
        assert expected == pytest.approx(.875, abs=.01)
        # what is left of the first deviation; rounding noise is not correlated with it
        assert ((start * end).sum() / start.square().sum()).item() == pytest.approx(expected, abs=.01)
        drift = new_mean - mean
        assert abs(drift.mean()) < 5 * drift.std() / math.sqrt(drift.numel())
        assert drift.std() < .1 * start.std()

    @pytest.mark.parametrize('dtype', HALF)
    def test_replicas_stay_equal(self, dtype):
        first, second = moe_layer(dtype=dtype), moe_layer(dtype=dtype)
        averagers = [ewa.ExpertAverager(layer, 1e-3) for layer in (first, second)]
        before = snapshot(first)
        for seed in range(20):
            torch.manual_seed(seed)  # the ranks' own random streams play no part
            averagers[0].step()
            averagers[1].step()
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
        assert not any(torch.equal(p, before[name]) for name, p in first.named_parameters())

    def test_resumes_to_the_bit(self):
        whole, resumed = moe_layer(dtype=torch.bfloat16), moe_layer(dtype=torch.bfloat16)
        averager, first = ewa.ExpertAverager(whole, .01), ewa.ExpertAverager(resumed, .01)
        for _ in range(10):
            averager.step()
        for _ in range(5):
            first.step()
        second = ewa.ExpertAverager(resumed, .01)
        second.load_state_dict(first.state_dict())
        for _ in range(5):
            second.step()
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))

    def test_full_precision_parameters_beside_half_ones_follow_the_equation(self):
        layer = moe_layer()
        for expert in layer.experts:
            expert.fc1.bfloat16()
        expected = reference.pull([list(expert.fc2.parameters()) for expert in layer.experts], .3)
        ewa.ExpertAverager(layer, .3).step()
        for expert, values in zip(layer.experts, expected):
            for p, value in zip(expert.fc2.parameters(), values):
                torch.testing.assert_close(p.double(), value, atol=2e-7, rtol=0)


def test_steps_by_hand_beside_an_optimizer_are_refused():
    layer = moe_layer()
    averager = ewa.ExpertAverager(layer, 0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.)
    handle = averager.attach(optimizer)
    with pytest.raises(RuntimeError, match=r'attached and pulls after each step .* leave averager.step\(\) out'):
        averager.step()
    assert averager.state_dict() == dict(steps=0, pulls=0)
    handle.remove()
    averager.step()
    assert averager.state_dict() == dict(steps=1, pulls=1)


@pytest.mark.parametrize('method', ['step', 'descend'])
def test_an_optimizer_that_never_steps_is_named_once(tiny, method):
    class Other(torch.optim.SGD):
        def descend(self):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group['params']:
                        p -= 1e-3 * p.grad

    model = ewa.to_moe(tiny())
    optimizer = Other(model.parameters(), lr=1e-3)
    ewa.ExpertAverager(model, 0.1).attach(optimizer)
    parameter = model.blocks[1].mlp.experts[0].fc1.weight
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(220):
            sum(p.sum() for p in model.parameters()).backward()
            getattr(optimizer, method)()
    said = [str(w.message) for w in caught]
    assert said == ['After 100 backward passes Other.step() was not called, so no expert was pulled. If it trains by '
                    'another method, call averager.step() after that instead of attaching.'] * (method == 'descend')
    assert not parameter._post_accumulate_grad_hooks  # nothing is left to be called


@pytest.mark.parametrize('form', ['experts', 'mean'])
def test_nothing_keeps_a_model_alive(tiny, form):
    model = ewa.to_moe(tiny(), form=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewa.ExpertAverager(model, 0.1).attach(optimizer)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    ewa.to_dense(model)
    alive = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert alive() is None
