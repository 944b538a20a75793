import warnings

import pytest
import torch
from torch import nn

import refit_reference as reference
from ewa import refit
from ewa.refit import Moments


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moments_of(activations, targets, chunks=3, weights=None):
    moments = Moments(activations.shape[1], targets.shape[1])
    weights = torch.ones(len(targets)) if weights is None else weights
    for part in zip(activations.chunk(chunks), targets.chunk(chunks), weights.chunk(chunks)):
        moments.add(*part)
    return moments


def error_of(outputs, targets):
    return refit.relative_error(outputs, targets, torch.ones(len(targets)))


def problem(tokens=60, candidates=12, width=4):
    """Correlated activations of mean far from zero, and targets that they explain in part."""
    activations = nn.functional.gelu(torch.randn(tokens, 5) @ torch.randn(5, candidates) + torch.randn(candidates))
    targets = activations @ torch.randn(candidates, width) + torch.randn(tokens, width) + 3
    return activations.double(), targets.double()


def experts_of(num_experts, hidden=6, width=4):
    """Up matrices and biases, down matrices and biases of `num_experts` plain FFNs, stacked."""
    return [torch.randn(num_experts, *shape).double() for shape in (
        (hidden, width), (hidden,), (width, hidden), (width,))]


def activations_of(up, up_bias, tokens):
    return torch.cat([nn.functional.gelu(tokens @ u.T + b) for u, b in zip(up, up_bias)], dim=1)


def refitted(activations, targets, count, ridge=1e-8):
    """What select and solve make of the candidates: outputs on the same tokens and the chosen ones."""
    chosen = refit.select(moments_of(activations, targets), count, ridge)
    down, bias = refit.solve(moments_of(activations[:, chosen], targets), ridge)
    return activations[:, chosen] @ down.T + bias, chosen


def test_moments_do_not_depend_on_the_chunks():
    activations, targets = problem()
    for a, b in zip(moments_of(activations, targets, 1).normal(.1), moments_of(activations, targets, 7).normal(.1)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('ridge', [0, 1e-3, .3])
def test_solution_equals_the_reference(ridge, bias):
    activations, targets = problem(candidates=8)
    down, offset = refit.solve(moments_of(activations, targets), ridge, bias)
    expected = reference.solve(activations, targets, reference.penalty(activations, ridge, bias), bias)
    torch.testing.assert_close(down, expected[0], rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(offset, expected[1], rtol=1e-6, atol=1e-8)
    else:
        assert offset is None


@pytest.mark.parametrize('bias', [True, False])
def test_a_weight_counts_a_token_so_many_times(bias):
    activations, targets = problem()
    counts = torch.randint(0, 4, (60,))
    weighted = moments_of(activations, targets, weights=counts)
    repeated = moments_of(activations.repeat_interleave(counts, 0), targets.repeat_interleave(counts, 0))
    assert refit.select(weighted, 7, 1e-3, bias) == refit.select(repeated, 7, 1e-3, bias)
    for a, b in zip(weighted.normal(1e-3, bias), repeated.normal(1e-3, bias)):
        torch.testing.assert_close(a, b)


def test_targets_are_the_least_squares_between_the_stream_and_the_output():
    outputs, stream, wanted = torch.randn(3, 5, 4).double()
    scale = torch.randn(4).double()
    expected = outputs + reference.correction(wanted - stream, scale)
    torch.testing.assert_close(refit.toward(outputs, stream, wanted, scale), expected)


def test_targets_bring_the_stream_half_the_way_where_all_channels_count_alike():
    outputs, own, wanted = torch.randn(3, 5, 4)
    for scale in (torch.ones(4), -3 * torch.ones(4)):
        target = refit.toward(outputs, own + scale * outputs, wanted, scale)
        torch.testing.assert_close(own + scale * target, (wanted + own + scale * outputs) / 2)
    scale = torch.tensor([1., 0., 1e-6, 1.])
    moved = refit.toward(outputs, own, wanted, scale) - outputs
    assert (moved[:, 1] == 0).all() and moved[:, 2].abs().max() < 1e-4
    assert torch.equal(refit.toward(outputs, own, wanted, torch.zeros(4)), outputs)


def test_token_weights_have_mean_one_and_a_floor():
    torch.testing.assert_close(
        refit.token_weights(torch.tensor([0., 0., 0., 4.])), torch.tensor([.1, .1, .1, 3.7]).double())
    assert refit.token_weights(torch.zeros(3)).tolist() == [1, 1, 1]


def test_draws_are_in_proportion_to_weights_and_sums_are_kept():
    weights = torch.rand(20000) ** 4
    weights[:3] = 1000.
    weights[3:5] = 0.
    index, drawn = refit.draw(weights, 2000)
    assert abs(len(index) - 2000) < 200 and (index.diff() > 0).all()
    assert index[:3].tolist() == [0, 1, 2] and index[3] > 4
    torch.testing.assert_close(drawn[:3], weights[:3])
    assert len(drawn.unique()) < 500 < len(index)  # all but the heaviest weigh alike
    values = torch.randn(20000) + 1
    rest = values * weights
    assert (drawn[3:] @ values[index[3:]]).item() == pytest.approx(rest[5:].sum().item(), rel=.1)
    assert refit.draw(weights, 20000)[0].tolist() == list(range(20000))


def test_sensitivities_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match='calibration images give derivatives that are not finite'):
        refit.token_weights(torch.tensor([1., float('nan')]))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('ridge', [0, 1e-3, .3])
@pytest.mark.parametrize('number', range(3))
def test_selection_equals_the_reference(ridge, bias, number):
    torch.manual_seed(number)
    activations, targets = problem()
    chosen = refit.select(moments_of(activations, targets), 7, ridge, bias)
    assert chosen == reference.select(activations, targets, 7, ridge, bias)


def test_greedy_choice_beats_the_largest_activations():
    activations, targets = problem(tokens=400, candidates=24)
    outputs, _ = refitted(activations, targets, 8)
    largest = activations.square().mean(0).topk(8).indices
    down, bias = refit.solve(moments_of(activations[:, largest], targets), 0.)
    assert error_of(outputs, targets) < error_of(activations[:, largest] @ down.T + bias, targets)


@pytest.mark.parametrize('permuted', [False, True])
def test_equal_experts_give_their_output_whatever_the_gates(permuted):
    up, up_bias, down, down_bias = [t.expand(4, *t.shape[1:]).clone() for t in experts_of(1)]
    tokens, gates = torch.randn(200, 4).double(), torch.rand(200, 4).double()
    gates /= gates.sum(1, keepdim=True)
    if permuted:
        for e in range(4):
            order = torch.randperm(6)
            up[e], up_bias[e], down[e] = up[e][order], up_bias[e][order], down[e][:, order]
    activations = activations_of(up, up_bias, tokens)
    single = activations.view(200, 4, 6)
    targets = sum(gates[:, e, None] * (single[:, e] @ down[e].T + down_bias[e]) for e in range(4))
    outputs, chosen = refitted(activations, targets, 6)
    torch.testing.assert_close(outputs, targets, rtol=1e-6, atol=1e-6)
    assert len(chosen) == 6


def test_a_copy_of_a_chosen_unit_is_never_chosen():
    activations, targets = problem(candidates=6)
    twice = torch.cat([activations, activations], dim=1)
    chosen = refit.select(moments_of(twice, targets), 12, 0.)
    assert sorted(unit % 6 for unit in chosen) == list(range(6))


def test_shared_and_fine_grained_experts_with_constant_gates_give_their_sum():
    up, up_bias, down, down_bias = experts_of(3, hidden=4)
    tokens = torch.randn(150, 4).double()
    activations = activations_of(up, up_bias, tokens)
    parts = activations.view(150, 3, 4)
    scales = (1., .7, .3)  # shared, routed, routed
    targets = sum(s * (parts[:, e] @ down[e].T + down_bias[e]) for e, s in enumerate(scales))
    outputs, _ = refitted(activations, targets, 12)
    torch.testing.assert_close(outputs, targets, rtol=1e-6, atol=1e-6)


def test_units_that_never_move_are_not_chosen_without_a_ridge():
    activations, targets = problem(candidates=6)
    activations[:, 2] = 5.  # the bias says that already
    assert 2 not in refit.select(moments_of(activations, targets), 6, 0.)


def test_same_tokens_same_bits():
    activations, targets = problem()
    first, second = [refit.solve(moments_of(activations, targets), 1e-3) for _ in range(2)]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_ridge_shrinks_the_matrix_and_not_the_bias():
    activations, targets = problem()
    down, bias = refit.solve(moments_of(activations, targets), 1e9)
    assert down.abs().max() < 1e-6
    torch.testing.assert_close(bias, targets.double().mean(0))


def test_dependent_units_are_refused_without_a_ridge():
    activations, targets = problem(candidates=4)
    moments = moments_of(torch.cat([activations, activations], dim=1), targets)
    with pytest.raises(ValueError, match='8 hidden units depend on each other on 60 calibration tokens'):
        refit.solve(moments, 0.)
    assert refit.solve(moments, 1e-6)[0].isfinite().all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_values_that_are_not_finite_are_refused(bad):
    activations, targets = problem()
    activations[3, 4] = bad
    with pytest.raises(ValueError, match='calibration images give activations that are not finite'):
        moments_of(activations, targets)


def test_number_of_tokens():
    with pytest.raises(ValueError, match='24 calibration tokens do not determine 25 unknowns'):
        refit.check_tokens(24, 24, 0.)
    with pytest.raises(ValueError, match='ridge must be finite'):
        refit.check_tokens(1000, 24, -1.)
    with pytest.warns(UserWarning, match='249 calibration tokens for 25 unknowns an output: with fewer than 250'):
        refit.check_tokens(249, 24, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refit.check_tokens(250, 24, 0.)


class TestPreselect:
    def test_keeps_shared_experts_and_the_one_that_contributes_most_whole(self):
        contributions = [torch.tensor(units) for units in ([.1, .1], [5., 0.], [4., 2.], [3., .2])]
        assert refit.preselect(contributions, 5, 2, whole=1).tolist() == [0, 1, 2, 4, 5]
        assert refit.preselect(contributions, 7, 2, whole=1).tolist() == [0, 1, 2, 4, 5, 6, 7]

    def test_keeps_complete_experts_beyond_the_limit(self):
        contributions = [torch.tensor([.1, .1]), torch.tensor([5., 0.])]
        assert refit.preselect(contributions, 1, 1, whole=1).tolist() == [0, 1, 2, 3]

    def test_an_expert_without_tokens_is_left_out_unless_its_units_are_needed(self):
        contributions = [torch.tensor(units) for units in ([0., 0.], [3., .1], [2., .1])]
        assert refit.preselect(contributions, 9, 2).tolist() == [2, 3, 4, 5]
        assert refit.preselect(contributions, 9, 5).tolist() == [0, 2, 3, 4, 5]


def test_fit_finds_the_ffn_behind_the_tokens_and_moves_no_other_random_numbers():
    def ffn():
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    teacher, students = ffn(), [ffn() for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    tokens = torch.randn(500, 4)
    targets = teacher(tokens).detach()
    before = error_of(students[0](tokens), targets)
    state = torch.get_rng_state()
    for student in students:
        refit.fit(student, tokens, targets, torch.ones(500), steps=400)
    assert torch.equal(torch.get_rng_state(), state)
    assert error_of(students[0](tokens), targets) < .2 * before
    assert all(p.grad is None for p in students[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters()))


def test_fit_draws_tokens_by_weight():
    ffn = nn.Linear(3, 3)
    before = ffn(torch.ones(1, 3)).detach()
    tokens = torch.stack([torch.ones(3), torch.full((3,), float('nan'))])
    refit.fit(ffn, tokens, torch.ones(2, 3), torch.tensor([1., 0.]), steps=20)
    assert (ffn(torch.ones(1, 3)) - 1).norm() < (before - 1).norm()


@pytest.mark.parametrize('scale', [1., 1000.])
def test_a_first_step_for_outputs_goes_as_far_as_the_slope_of_the_loss_says(scale):
    weight, unused = nn.Parameter(torch.tensor(1 / scale)), nn.Parameter(torch.tensor(5.))
    images = torch.randn(20, 3, 8, 8)

    def outputs(images, factor):
        return factor * images.mean((1, 2, 3))[:, None]

    refit.fit_outputs(
        lambda images: outputs(images, scale * weight), [weight, unused], lambda images: outputs(images, 3.), images, 1)
    assert (scale * weight).item() == pytest.approx(2.)  # of a parabola, half the way
    assert unused.item() == 5 and weight.grad is None


def test_relative_error_by_hand():
    assert error_of(torch.tensor([[3., 0.]]), torch.tensor([[3., 4.]])) == pytest.approx(.8)
    weighted = refit.relative_error(torch.tensor([[1.], [0.]]), torch.tensor([[2.], [1.]]), torch.tensor([1., 3.]))
    assert weighted == pytest.approx((4 / 7) ** .5)
