from collections import Counter

import pytest
import torch

import reference
from ewa.partition import part_sizes, random_partition

SHAPES = [(0, 2), (1, 4), (3, 4), (4, 4), (5, 4), (7, 3), (16, 4), (51, 8)]


@pytest.mark.parametrize('num_tokens, num_experts', SHAPES)
def test_part_sizes_differ_by_at_most_one(num_tokens, num_experts):
    sizes = part_sizes(num_tokens, num_experts)
    assert len(sizes) == num_experts and sum(sizes) == num_tokens
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('num_tokens, num_experts', SHAPES)
def test_every_token_has_one_expert_and_returns_to_its_place(num_tokens, num_experts, static):
    for seed in range(5):
        torch.manual_seed(seed)
        index, inverse, sizes = random_partition(num_tokens, num_experts, static=static)
        assert len(index) == sum(sizes) and len(sizes) == num_experts and len(inverse) == num_tokens
        assert len(set(inverse.tolist())) == num_tokens
        tokens = torch.arange(num_tokens)
        assert torch.equal(torch.cat(tokens[index].split(sizes))[inverse], tokens)
        load = Counter(reference.owners(index, inverse, sizes))
        loads = [load[e] for e in range(num_experts)]
        assert sum(loads) == num_tokens and max(loads) - min(loads) <= 1
        if not static:
            assert loads == sizes


@pytest.mark.parametrize('num_tokens, num_experts', SHAPES)
def test_static_parts_have_one_known_size(num_tokens, num_experts):
    _, _, sizes = random_partition(num_tokens, num_experts, static=True)
    assert sizes == [-(-num_tokens // num_experts)] * num_experts


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('num_tokens, num_experts, larger', [(10, 4, 2), (3, 4, 3), (17, 8, 1)])
def test_experts_get_the_larger_part_equally_often(num_tokens, num_experts, larger, static):
    torch.manual_seed(0)
    draws, count = 2000, Counter()
    for _ in range(draws):
        load = Counter(reference.owners(*random_partition(num_tokens, num_experts, static=static)))
        count.update(e for e in range(num_experts) if load[e] == num_tokens // num_experts + 1)
    p = larger / num_experts
    assert sum(count.values()) == draws * larger
    for e in range(num_experts):
        assert abs(count[e] - draws * p) < 4 * (draws * p * (1 - p)) ** .5


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('num_tokens', [3, 4])
def test_all_partitions_are_equally_likely(num_tokens, static):
    # 4 tokens, 2 experts: 4!/(2! 2!) = 6 partitions; 3 tokens: 3 for each choice of the larger part
    torch.manual_seed(0)
    draws = 3000
    count = Counter(tuple(reference.owners(*random_partition(num_tokens, 2, static=static))) for _ in range(draws))
    assert len(count) == 6
    chi_square = sum((n - draws / 6) ** 2 / (draws / 6) for n in count.values())
    assert chi_square < 20.5  # 99.9 % quantile at 5 degrees of freedom


@pytest.mark.parametrize('static', [False, True])
def test_draws_are_fresh_and_follow_the_seed(static):
    torch.manual_seed(0)
    first, second = random_partition(101, 4, static=static), random_partition(101, 4, static=static)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    again = random_partition(101, 4, static=static)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
