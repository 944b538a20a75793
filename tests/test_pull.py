import math
from copy import deepcopy

import pytest
import torch

import reference
from ewa.pull import max_share_rate, pull_, stochastic_round

HALF = (torch.bfloat16, torch.float16)


def experts(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 5), (8,))] for _ in range(count)]


@pytest.mark.parametrize('num_experts', range(2, 9))
@pytest.mark.parametrize('part', [0, .01, .3, 1])
def test_follows_the_equation(num_experts, part):
    rate = part * max_share_rate(num_experts)
    tensors = experts(num_experts)
    expected = reference.pull(tensors, rate)
    pull_(tensors, rate, seed=0)
    for got, want in zip(tensors, expected):
        for tensor, value in zip(got, want):
            torch.testing.assert_close(tensor.double(), value, atol=1e-6, rtol=0)


@pytest.mark.parametrize('dtype', HALF)
def test_random_bits_come_from_the_seed(dtype):
    first, second, third = (experts(3, dtype) for _ in range(3))
    torch.manual_seed(1)
    pull_(first, .01, seed=5)
    torch.manual_seed(2)
    pull_(second, .01, seed=5)
    pull_(third, .01, seed=6)
    assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))
    assert not all(torch.equal(a, b) for x, y in zip(first, third) for a, b in zip(x, y))


def test_tensors_are_changed_in_place():
    tensors = experts(2)
    pointers, before = [t.data_ptr() for t in tensors[0]], deepcopy(tensors)
    pull_(tensors, .1, seed=0)
    assert [t.data_ptr() for t in tensors[0]] == pointers and not torch.equal(tensors[0][0], before[0][0])


@pytest.mark.parametrize('dtype', HALF)
def test_rounds_to_a_neighbour_without_bias(dtype):
    torch.manual_seed(0)
    values = torch.randn(200, 1).expand(200, 4000).contiguous()
    rounded = stochastic_round(values, dtype, torch.rand(values.shape)).float()
    unit = 2. ** (torch.frexp(values).exponent - {torch.bfloat16: 8, torch.float16: 11}[dtype])
    error = (rounded - values) / unit
    assert error.abs().max() < 1
    assert (error.mean(1).abs() < 5 * .5 / math.sqrt(4000)).all()


@pytest.mark.parametrize('dtype', HALF)
def test_representable_values_are_not_rounded(dtype):
    limits = torch.finfo(dtype)
    values = torch.cat([
        torch.randn(100000), torch.tensor([0., limits.max, limits.min, limits.tiny, limits.smallest_normal / 2])])
    values = values.to(dtype)
    for noise in (torch.rand(values.shape), torch.full(values.shape, 1 - 2 ** -24), torch.zeros(values.shape)):
        assert torch.equal(stochastic_round(values.float(), dtype, noise), values)


def test_large_and_strided_tensors_follow_the_equation_too():
    torch.manual_seed(0)
    shapes = ((2 ** 17 * 2 + 3,), (5,), (400, 500), (2 ** 17,), (7, 3))  # several goes each, one, and several in one
    tensors = [[torch.randn(*shape) for shape in shapes] + [torch.randn(400, 500).t()] for _ in range(3)]
    expected = reference.pull(tensors, .2)
    pointers = [t.data_ptr() for t in tensors[1]]
    pull_(tensors, .2, seed=0)
    assert [t.data_ptr() for t in tensors[1]] == pointers
    for got, want in zip(tensors, expected):
        for tensor, value in zip(got, want):
            torch.testing.assert_close(tensor.double(), value, atol=1e-6, rtol=0)


def test_what_a_pull_allocates_does_not_grow_with_the_model():
    def peak(layers):
        tensors = [[torch.zeros(2 ** 18) for _ in range(layers)] for _ in range(2)]
        with torch.profiler.profile(profile_memory=True) as profile:
            pull_(tensors, .2, seed=0)
        held = most = 0
        for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]'),
                            key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most

    assert 0 < peak(8) <= 1.5 * peak(2)
