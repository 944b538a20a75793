import pytest
import torch

import reference
from ewa.routing import dispatch, load_balancing_loss, top_k_gates, z_loss


def random_logits(tokens=13, experts=5):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize('renormalise', [True, False])
@pytest.mark.parametrize('top_k', [1, 2, 5])
def test_gates_are_those_of_the_reference(top_k, renormalise):
    logits = random_logits()
    gates, experts = top_k_gates(logits, top_k, renormalise)
    for row, chosen, expected in zip(gates, experts.tolist(), reference.gates(logits, top_k, renormalise)):
        assert chosen == sorted(expected, key=expected.get, reverse=True)
        torch.testing.assert_close(row, torch.tensor([expected[e] for e in chosen]))


def test_gates_sum_to_one_when_renormalised_or_complete():
    logits = random_logits()
    for gates in (top_k_gates(logits, 2)[0], top_k_gates(logits, 5, renormalise=False)[0]):
        torch.testing.assert_close(gates.sum(-1), torch.ones(13))
    assert (top_k_gates(logits, 2, renormalise=False)[0].sum(-1) < 1).all()


def test_gates_survive_huge_logits():
    for renormalise in (True, False):
        gates, _ = top_k_gates(random_logits() * 1e4, 2, renormalise)
        assert gates.isfinite().all()


def test_raw_gates_train_the_router_at_top_1():
    logits = random_logits().requires_grad_()
    top_k_gates(logits, 1, renormalise=False)[0].sum().backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize('top_k', [1, 3])
def test_dispatch_sorts_all_assignments_by_expert(top_k):
    _, experts = top_k_gates(random_logits(), top_k)
    order, sizes = dispatch(experts, 5)
    assert sorted(order.tolist()) == list(range(13 * top_k)) and sum(sizes) == 13 * top_k
    for e, segment in enumerate(order.split(sizes)):
        assert (experts.flatten()[segment] == e).all()
        assert segment.tolist() == sorted(segment.tolist())


def test_dispatch_without_tokens():
    order, sizes = dispatch(torch.zeros(0, 2, dtype=torch.long), 3)
    assert len(order) == 0 and sizes == [0, 0, 0]


@pytest.mark.parametrize('top_k', [1, 2])
def test_load_balancing_loss_is_that_of_the_reference(top_k):
    logits = random_logits()
    loss = load_balancing_loss(logits, top_k_gates(logits, top_k)[1])
    assert loss.item() == pytest.approx(reference.load_balancing_loss(logits, top_k), rel=1e-5)


def test_load_balancing_loss_is_one_when_uniform_and_e_when_collapsed():
    experts = torch.arange(8)[:, None] % 4
    assert load_balancing_loss(torch.zeros(8, 4), experts).item() == pytest.approx(1)
    collapsed = torch.tensor([[50., 0, 0, 0]]).expand(8, 4)
    assert load_balancing_loss(collapsed, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4)


def test_descending_the_load_balancing_loss_unloads_the_busy_expert():
    logits = (random_logits() + torch.tensor([3., 0, 0, 0, 0])).requires_grad_()
    load_balancing_loss(logits, top_k_gates(logits, 1)[1]).backward()
    assert logits.grad[:, 0].sum() > 0


def test_z_loss_is_the_mean_squared_log_partition():
    logits = random_logits()
    expected = sum(row.exp().sum().log().item() ** 2 for row in logits) / 13
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-5)
