import math

import pytest
import torch

import gathering_reference as reference
from ewa import gathering
from ewa.gathering import FFNWeights

D = 6
METHODS = {
    'average': gathering.average, 'sum': gathering.total, 'top_kg': gathering.top_kg, 'svd_kg': gathering.svd_kg,
    'aligned': gathering.aligned, 'usage': lambda experts: gathering.usage(experts, [1] * len(experts)),
}
LAYOUTS = [
    dict(groups=1, bias=True), dict(groups=1, bias=False), dict(groups=2, bias=True), dict(groups=2, bias=False),
    dict(groups=2, bias=True, norm=2),
]


def make_expert(hidden=10, groups=1, bias=True, norm=0, width=D, dtype=torch.float64):
    tensors = dict(up=torch.randn(groups, hidden, width), down=torch.randn(width, hidden))
    if bias:
        tensors.update(up_bias=torch.randn(groups, hidden), down_bias=torch.randn(width))
    if norm:
        tensors.update(norm=torch.randn(norm, hidden))
    return FFNWeights(**{name: tensor.to(dtype) for name, tensor in tensors.items()})


def make_experts(num_experts, **kwargs):
    return [make_expert(**kwargs) for _ in range(num_experts)]


def as_dict(ffn):
    return {name: tensor for name, tensor in vars(ffn).items() if tensor is not None}


def as_dicts(experts):
    return [as_dict(expert) for expert in experts]


def assert_same(actual, expected, **tolerance):
    expected = expected if isinstance(expected, dict) else as_dict(expected)
    torch.testing.assert_close(as_dict(actual), expected, **tolerance)


def assert_identical(actual, expected):
    assert_same(actual, expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('num_experts', [1, 2, 3, 4, 7, 12])
def test_methods_equal_the_reference(layout, num_experts):
    experts = make_experts(num_experts, **layout)
    dicts = as_dicts(experts)
    counts = torch.randint(0, 9, (num_experts,)) + torch.eye(num_experts, dtype=torch.long)[0]
    assert_same(gathering.average(experts), reference.average(dicts))
    assert_same(gathering.average(experts, counts / 7), reference.average(dicts, counts))
    assert_same(gathering.usage(experts, counts), reference.average(dicts, counts))
    for rescale in (False, True):
        assert_same(gathering.total(experts, rescale=rescale), reference.total(dicts, rescale))
        assert_same(gathering.top_kg(experts, rescale=rescale), reference.top_kg(dicts, rescale))
        for share in (.3, .5, 1.):
            assert_same(gathering.svd_kg(experts, rescale, share), reference.svd_kg(dicts, rescale, share))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_alignment_equals_trying_every_permutation(layout):
    experts = make_experts(3, hidden=6, **layout)
    dicts = as_dicts(experts)
    assert_identical(gathering.align(experts[1], experts[0]), reference.align(dicts[1], dicts[0]))
    for index in range(3):
        assert_same(gathering.aligned(experts, reference=index), reference.aligned(dicts, index))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('method', METHODS)
def test_one_expert_is_reproduced(method, layout):
    expert = make_expert(dtype=torch.float32, **layout)
    if method == 'svd_kg':
        assert_same(gathering.svd_kg([expert], share=1.), expert, rtol=1e-5, atol=1e-5)
    else:
        assert_identical(METHODS[method]([expert]), expert)


@pytest.mark.parametrize('method', ['sum', 'top_kg'])
def test_rescaling_leaves_one_expert_alone(method):
    expert = make_expert(dtype=torch.float32)
    assert_identical(METHODS[method]([expert], rescale=True), expert)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('num_experts', [2, 3, 7])
def test_mean_of_equal_experts_is_the_expert_bit_for_bit(num_experts, dtype):
    expert = make_expert(hidden=64, groups=2, norm=2, dtype=dtype)
    assert_identical(gathering.average([expert] * num_experts), expert)
    assert_identical(gathering.average([expert] * num_experts, torch.rand(num_experts)), expert)
    assert_identical(gathering.usage([expert] * num_experts, list(range(num_experts))), expert)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('index', [0, 2])
def test_aligned_undoes_permutations(layout, index):
    expert = make_expert(hidden=32, dtype=torch.float32, **layout)
    experts = [gathering.take(expert, torch.randperm(32)) for _ in range(4)]
    assert_identical(gathering.aligned(experts, reference=index), experts[index])


def test_alignment_does_not_change_what_an_expert_computes():
    experts, x = make_experts(2, groups=2, norm=2), torch.randn(5, D, dtype=torch.float64)
    permuted = gathering.align(experts[1], experts[0])
    assert not torch.equal(permuted.up, experts[1].up)
    torch.testing.assert_close(reference.forward(as_dict(permuted), x), reference.forward(as_dict(experts[1]), x))


def test_sum_of_equal_experts_is_a_multiple_and_rescaling_undoes_it():
    expert = make_expert(groups=2)
    for name, tensor in as_dict(gathering.total([expert] * 3)).items():
        torch.testing.assert_close(tensor, 3 * getattr(expert, name))
    assert_same(gathering.total([expert] * 3, rescale=True), expert)


@pytest.mark.parametrize('method,fields', [
    ('sum', ['up', 'up_bias', 'down', 'down_bias']), ('top_kg', ['up', 'up_bias', 'down']), ('svd_kg', ['up', 'down'])])
def test_rescaling_gives_the_mean_norm_of_the_experts(method, fields):
    experts = make_experts(3, groups=2, norm=1)
    plain, rescaled = METHODS[method](experts), METHODS[method](experts, rescale=True)
    for name, tensor in as_dict(rescaled).items():
        if name not in fields:
            assert torch.equal(tensor, getattr(plain, name))
            continue
        groups = range(2) if name in ('up', 'up_bias') else [slice(None)]
        for g in groups:
            mean = sum(getattr(expert, name)[g].norm() for expert in experts) / 3
            torch.testing.assert_close(tensor[g].norm(), mean)
            assert (getattr(plain, name)[g].norm() - mean).abs() > 1e-3


def test_rescaling_leaves_zeros():
    expert = make_expert()
    expert.up_bias.zero_()
    opposite = FFNWeights(expert.up, -expert.down, expert.up_bias, expert.down_bias)
    gathered = gathering.total([expert, opposite], rescale=True)
    assert gathered.down.eq(0).all() and gathered.up_bias.eq(0).all()
    torch.testing.assert_close(gathered.up, expert.up)


@pytest.mark.parametrize('method', METHODS)
def test_half_precision_is_computed_in_float32(method):
    experts = make_experts(3, dtype=torch.bfloat16)
    exact = METHODS[method]([FFNWeights(**{k: v.float() for k, v in as_dict(e).items()}) for e in experts])
    assert_identical(METHODS[method](experts), {name: tensor.bfloat16() for name, tensor in as_dict(exact).items()})


@pytest.mark.parametrize('method', METHODS)
def test_inputs_stay_as_they_were(method):
    experts = make_experts(3, dtype=torch.float32)
    before = [{name: tensor.clone() for name, tensor in as_dict(e).items()} for e in experts]
    gathered = METHODS[method](experts)
    for tensor in as_dict(gathered).values():
        tensor.zero_()
    for expert, copy in zip(experts, before):
        assert_identical(expert, copy)


@pytest.mark.parametrize('layout', LAYOUTS[:4])
def test_top_kg_keeps_strong_units_in_order(layout):
    weak, strong = make_experts(2, hidden=5, **layout)
    strong.down[:, [1, 4]] *= 100
    gathered = gathering.top_kg([weak, strong])
    assert torch.equal(gathered.down[:, 3:], strong.down[:, [1, 4]])
    assert torch.equal(gathered.up[:, 3:], strong.up[:, [1, 4]])


def test_top_kg_scores_rows_and_columns_by_the_sum_of_their_norms():
    ffn = FFNWeights(torch.zeros(1, 4, 2), torch.zeros(2, 4))
    ffn.up[0, :, 0] = torch.tensor([3., 3., 4., 0.])
    ffn.down[0] = torch.tensor([3., 2.9, 0., 5.])  # sums 6, 5.9, 4, 5; joint norms 4.2, 4.2, 4, 5
    kept = gathering.top_kg([ffn, ffn])
    assert kept.down[0].tolist() == pytest.approx([3, 2.9] * 2)


def test_svd_kg_keeps_as_many_triplets_as_hold_the_share():
    values = torch.tensor([4., 3., 2., 1.])
    expert = FFNWeights(torch.diag(values)[None], torch.eye(4))
    for share, rank in ((.4, 1), (.41, 2), (.7, 2), (.71, 3), (1., 4)):
        kept = gathering.svd_kg([expert], share=share).up[0]
        torch.testing.assert_close(kept, torch.diag(values * (torch.arange(4) < rank)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='share must be > 0 and <= 1, got 0'):
        gathering.svd_kg([expert], share=0)


def test_units_hold_rows_bias_and_column():
    ffn = make_expert(groups=2, norm=2)
    units = ffn.units()
    assert (ffn.hidden, ffn.width, units.shape) == (10, D, (10, 3 * D + 2))
    for h in range(ffn.hidden):
        assert sorted(units[h].tolist()) == sorted(reference.unit(as_dict(ffn), h))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_take_picks_hidden_units(layout):
    ffn = make_expert(**layout)
    assert_identical(gathering.take(ffn, [3, 0, 7]), reference.pick(as_dict(ffn), [3, 0, 7]))


@pytest.mark.parametrize('layout', LAYOUTS[:4])
def test_concatenation_computes_the_sum_of_outputs(layout):
    parts, x = [make_expert(hidden=h, **layout) for h in (3, 10, 1)], torch.randn(5, D, dtype=torch.float64)
    joined = gathering.concatenate(parts)
    assert joined.hidden == 14
    torch.testing.assert_close(
        reference.forward(as_dict(joined), x), sum(reference.forward(as_dict(part), x) for part in parts))


@pytest.mark.parametrize('layout', LAYOUTS[:4])
@pytest.mark.parametrize('num_shared', [0, 1, 2])
def test_combine_is_the_layer_with_constant_gates(layout, num_shared):
    shared = [make_expert(hidden=7, **layout) for _ in range(num_shared)]
    routed, scales = [make_expert(hidden=h, **layout) for h in (4, 4, 5)], torch.tensor([.5, .3, -.2])
    x = torch.randn(5, D, dtype=torch.float64)
    expected = sum(reference.forward(as_dict(ffn), x) for ffn in shared)
    expected = expected + sum(s.double() * reference.forward(as_dict(f), x) for f, s in zip(routed, scales))
    dense = gathering.combine(routed, scales, shared)
    torch.testing.assert_close(reference.forward(as_dict(dense), x), expected)
    torch.testing.assert_close(dense.up, torch.cat([ffn.up for ffn in shared + routed], dim=1))


def test_one_ffn_with_a_norm_can_be_combined():
    ffn, x = make_expert(norm=2), torch.randn(5, D, dtype=torch.float64)
    combined = gathering.combine([ffn], [.25])
    torch.testing.assert_close(reference.forward(as_dict(combined), x), .25 * reference.forward(as_dict(ffn), x))


def test_select_and_prune_take_the_highest_scores():
    experts = [make_expert(hidden=h) for h in (2, 3, 4, 5)]
    assert gathering.select([.1, .9, .2, .9], 1) == [1]
    assert gathering.select(torch.tensor([.5, .9, .2, .9]), 3) == [0, 1, 3]
    assert gathering.select([1] * 5000, 3) == [0, 1, 2]
    assert gathering.prune(experts, [.1, .9, .2, .9]) is experts[1]


@pytest.mark.parametrize('trial', range(10))
@pytest.mark.parametrize('lam', [None, .01, 10.])
def test_do_acp_equals_recomputing_the_determinant(trial, lam):
    torch.manual_seed(trial)
    num_experts = 3 + trial
    # outputs mix four directions, so what an expert adds depends on all that were chosen before
    outputs = torch.randn(num_experts, 4, dtype=torch.float64) @ torch.randn(4, 40 * D, dtype=torch.float64)
    moment = outputs @ outputs.T / 40
    acp = gathering.average_contribution(torch.rand(num_experts), moment)
    for k in range(1, num_experts + 1):
        assert gathering.do_acp_select(acp, moment, k, lam) == reference.do_acp_select(acp, moment, k, lam)


def test_do_acp_does_not_choose_a_duplicate():
    outputs = torch.eye(3, 8)[[0, 0, 1, 2]] * torch.tensor([3., 3., 2., 1.])[:, None]
    moment, acp = outputs @ outputs.T, torch.ones(4)
    assert gathering.select(acp * moment.diagonal(), 2) == [0, 1]
    assert gathering.do_acp_select(acp, moment, 2, lam=.1) == [0, 2]
    assert gathering.do_acp_select(acp, moment, 3, lam=0) == [0, 2, 3]
    assert gathering.do_acp_select(acp, moment, 4, lam=0) == [0, 1, 2, 3]


def test_do_acp_takes_experts_without_any_contribution():
    assert gathering.do_acp_select(torch.zeros(3), torch.zeros(3, 3), 2) == [0, 1]


def test_average_contribution_by_hand():
    acp = gathering.average_contribution(torch.tensor([.5, .25]), torch.tensor([[4., 1.], [1., 16.]]))
    assert acp.tolist() == [1., 1.]


@pytest.mark.parametrize('method', METHODS)
def test_errors_of_every_method(method):
    gather = METHODS[method]
    with pytest.raises(ValueError, match='no experts'):
        gathering.average([])
    with pytest.raises(ValueError, match=r'\[10, 8\].*prune and do_acp'):
        gather([make_expert(), make_expert(hidden=8)])
    for name, kwargs in [
            ('up', dict(groups=2)), ('up', dict(width=4)), ('up_bias', dict(bias=False)), ('norm', dict(norm=2)),
            ('up', dict(dtype=torch.float32))]:
        with pytest.raises(ValueError, match=rf'^{name} of expert 1 is .*, of expert 0 '):
            gather([make_expert(), make_expert(**kwargs)])
    for name in ('up', 'down', 'up_bias', 'down_bias', 'norm'):
        experts = make_experts(3, norm=2)
        getattr(experts[2], name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match=f'{name} of expert 2 .*not finite'):
            gather(experts)


@pytest.mark.parametrize('gather', [
    gathering.concatenate, lambda e: gathering.combine(e, [1] * len(e)), lambda e: gathering.prune(e, [1] * len(e))])
def test_errors_where_hidden_widths_may_differ(gather):
    with pytest.raises(ValueError, match='no experts'):
        gather([])
    with pytest.raises(ValueError, match=r'up of expert 1 is \(1, 10, 4\)'):
        gather([make_expert(), make_expert(width=4)])
    experts = make_experts(2)
    experts[1].down[0, 0] = math.inf
    with pytest.raises(ValueError, match='down of expert 1'):
        gather(experts)


@pytest.mark.parametrize('gather', [gathering.concatenate, lambda e: gathering.combine(e, [1] * len(e))])
def test_norms_cannot_be_put_side_by_side(gather):
    with pytest.raises(ValueError, match='norm over the hidden units'):
        gather(make_experts(2, norm=2))


@pytest.mark.parametrize('gather,name', [(gathering.average, 'weights'), (gathering.usage, 'counts')])
def test_errors_in_weights(gather, name):
    experts = make_experts(3)
    for bad, message in [
            ([1, 2], r'\(3,\), got \(2,\)'), ([[1, 2, 3]], r'got \(1, 3\)'), ([1, -1, 2], '>= 0'),
            ([0, 0, 0], 'all be zero'), ([1, math.nan, 0], 'finite')]:
        with pytest.raises(ValueError, match=f'{name} must .*{message}'):
            gather(experts, bad)


@pytest.mark.parametrize('index', [-1, 3])
def test_errors_in_the_reference_expert(index):
    with pytest.raises(ValueError, match=rf'reference must be .*\[0, 3\), got {index}'):
        gathering.aligned(make_experts(3), reference=index)


def test_errors_in_scores_and_scales():
    experts = make_experts(3)
    with pytest.raises(ValueError, match=r'scores must .*\(3,\), got \(2,\)'):
        gathering.prune(experts, [1, 2])
    with pytest.raises(ValueError, match='scores must be finite'):
        gathering.select([1, math.nan], 1)
    with pytest.raises(ValueError, match=r'scales must .*\(3,\), got \(2,\)'):
        gathering.combine(experts, [1, 2])
    with pytest.raises(ValueError, match='scales must be finite'):
        gathering.combine(experts, [1, 2, math.inf], shared=experts)


@pytest.mark.parametrize('k', [0, 4])
def test_errors_in_the_number_of_experts_to_keep(k):
    with pytest.raises(ValueError, match=rf'k must be in \[1, 3\].*got {k}'):
        gathering.select([1, 2, 3], k)
    with pytest.raises(ValueError, match=rf'k must be in \[1, 3\].*got {k}'):
        gathering.do_acp_select(torch.ones(3), torch.eye(3), k)


def test_errors_in_contributions():
    with pytest.raises(ValueError, match=r'second_moment must have shape \(3, 3\), got \(3, 2\)'):
        gathering.do_acp_select(torch.ones(3), torch.ones(3, 2), 2)
    with pytest.raises(ValueError, match='diagonal of second_moment must be finite and >= 0'):
        gathering.average_contribution(torch.ones(2), -torch.eye(2))
    with pytest.raises(ValueError, match='second_moment must be finite'):
        gathering.do_acp_select(torch.ones(2), torch.tensor([[1., math.nan], [0., 1.]]), 1)
    with pytest.raises(ValueError, match='acp must be finite and >= 0'):
        gathering.do_acp_select([1, -1], torch.eye(2), 1)
    with pytest.raises(ValueError, match='cp must be finite and >= 0'):
        gathering.average_contribution([1, -1], torch.eye(2))
    for lam in (-1, math.nan):
        with pytest.raises(ValueError, match=f'lam must be finite and >= 0, got {lam}'):
            gathering.do_acp_select(torch.ones(2), torch.eye(2), 1, lam=lam)


@pytest.mark.parametrize('name,shape', [('down', (10, D)), ('up_bias', (10,)), ('down_bias', (10,)), ('norm', (10,))])
def test_errors_in_the_shapes_of_one_ffn(name, shape):
    tensors = dict(as_dict(make_expert(norm=2)))
    tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f'^{name} must be'):
        FFNWeights(**tensors)
    with pytest.raises(ValueError, match='^up must be'):
        FFNWeights(up=torch.zeros(10, D), down=torch.zeros(D, 10))
