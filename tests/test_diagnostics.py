import math
from copy import deepcopy

import pytest
import torch
from torch import nn

import ewa
import reference
from ewa.diagnostics import (
    advise,
    cosines,
    distances_to_mean,
    error_figure,
    short_names,
    similarity_figure,
    usage_figure,
)
from ewa.moe import moe_layers
from gated import GLU, foreign, gated, hide, make_equal, permute, scatter, sequences


def unit_vector(expert):
    """What the cosines are of: weights and biases, but neither the output bias nor a norm."""
    state = expert.state_dict()
    return torch.cat([state[key].flatten().double() for key in state if key.startswith('fc1') or key == 'fc2.weight'])


def mean_over_pairs(values):
    pairs = [values[i][j] for i in range(len(values)) for j in range(len(values)) if i != j]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize('router', ['random', 'topk'])
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', GLU, 'eva02_base_patch14_224'])
def test_distance_and_cosine_by_hand(tiny, name, router):
    model = gated(tiny(name), router=router, num_experts=3)
    records = ewa.diagnose(model)
    assert [record['layer'] for record in records] == ['blocks.1.mlp', 'blocks.3.mlp']
    for record in records:
        layer = model.get_submodule(record['layer'])
        assert record['router'] == router and record['num_experts'] == 3
        assert ('change' in record) == (router == 'random')  # the rest depends on data
        vectors = [torch.cat([p.detach().flatten().double() for p in e.parameters()]) for e in layer.experts]
        mean = sum(vectors) / 3
        distance = math.sqrt(sum((v - mean).square().sum().item() for v in vectors) / 3) / mean.norm().item()
        assert record['distance'] == pytest.approx(distance, rel=1e-5)
        assert distances_to_mean(model)[record['layer']] == record['distance']
        expected = [[reference.cosine(unit_vector(a), unit_vector(b)) for b in layer.experts] for a in layer.experts]
        torch.testing.assert_close(torch.tensor(record['similarity']), torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert record['cosine'] == pytest.approx(mean_over_pairs(expected), abs=1e-5)


def test_distance_in_mean_form_is_the_size_of_deviations(tiny):
    model = scatter(ewa.to_moe(tiny(), form='mean', spread=.3))
    for record in ewa.diagnose(model):
        layer = model.get_submodule(record['layer'])
        deviations = [torch.cat([p.detach().flatten().double() for p in d.parameters()]) for d in layer.deviations]
        centre = sum(deviations) / 4
        size = .3 * math.sqrt(sum((d - centre).square().sum().item() for d in deviations) / 4)
        mean = torch.cat([p.detach().flatten().double() for p in layer.mean.parameters()])
        assert record['distance'] == pytest.approx(size / mean.norm().item(), rel=1e-4)
        assert record['router'] == 'random' and record['num_experts'] == 4 and record['change'] == 0


def test_equal_and_independent_experts(tiny):
    for record in ewa.diagnose(ewa.to_moe(tiny(), init='copy')):
        assert record['distance'] == 0 and record['change'] == 0
        assert record['cosine'] == pytest.approx(1) and record['cosine_aligned'] == pytest.approx(1)
    for record in ewa.diagnose(gated(tiny(), num_experts=5)):
        assert record['distance'] == pytest.approx(2, abs=.1) and abs(record['cosine']) < .1


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', GLU])
def test_permuted_copies_have_an_aligned_cosine_of_one(tiny, name):
    model = gated(tiny(name))
    for _, layer in moe_layers(model):
        make_equal(layer, permute)
    for record in ewa.diagnose(model):
        assert record['cosine'] < .5 and record['cosine_aligned'] == pytest.approx(1, abs=1e-5)
    assert torch.allclose(cosines(model.blocks[1].mlp, align=True), torch.ones(4, 4))


def test_usage_by_hand(tiny, images):
    model = gated(tiny(), top_k=1)
    hide(model.blocks[1].mlp, 2)
    seen = {}
    handles = [layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: layer.counts}))
               for name, layer in moe_layers(model)]
    model(images)
    [handle.remove() for handle in handles]
    for record in ewa.diagnose(model, [images[:2], images[2:]]):
        counts = seen[record['layer']].tolist()
        shares = [n / sum(counts) for n in counts]
        assert record['tokens'] == 51 and record['usage'] == pytest.approx(shares)
        assert record['entropy'] == pytest.approx(-sum(p * math.log(p) for p in shares if p) / math.log(4))
        assert record['dead'] == [e for e, n in enumerate(counts) if n == 0]
        assert 2 in record['dead'] or record['layer'] != 'blocks.1.mlp'


def test_entropy_is_one_when_experts_are_used_alike(tiny, images):
    model = gated(tiny(), top_k=4)
    assert all(record['entropy'] == pytest.approx(1) and not record['dead'] for record in ewa.diagnose(model, [images]))


@pytest.mark.parametrize('num_shared', [0, 1])
@pytest.mark.parametrize('renormalise', [True, False])
def test_change_is_what_conversion_does_to_the_routed_output(tiny, images, renormalise, num_shared):
    model = gated(tiny(), num_shared=num_shared, renormalise=renormalise)
    seen = {}
    handles = [layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
               for name, layer in moe_layers(model)]
    model(images)
    [handle.remove() for handle in handles]
    for record in ewa.diagnose(model, [images]):
        layer = model.get_submodule(record['layer'])
        x, y = seen[record['layer']]
        y = y - sum(expert(x) for expert in getattr(layer, 'shared', ()))
        after = reference.fused(layer.experts)(x)
        assert record['change'] == pytest.approx(((after - y).norm() / y.norm()).item(), rel=1e-4)
        assert record['change'] > .1
    for _, layer in moe_layers(model):
        make_equal(layer)
    if renormalise:
        assert all(record['change'] < 1e-5 for record in ewa.diagnose(model, [images]))


def test_layers_that_are_not_ours():
    (record,) = ewa.diagnose(foreign(), sequences())
    assert record['layer'] == 'moe' and record['tokens'] == 42 and sum(record['usage']) == pytest.approx(1)

    class Linears(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    (record,) = ewa.diagnose(nn.Sequential(Linears()))  # no hidden units that are known
    assert record['distance'] > 0 and not {'cosine', 'similarity', 'usage'} & set(record)


def test_experts_of_unequal_width_have_no_mean():
    (record,) = records = ewa.diagnose(foreign(hidden=(4, 12, 20)), sequences())
    assert set(record) == {'layer', 'router', 'num_experts', 'tokens', 'usage', 'entropy', 'dead'}
    assert advise(records) == [] and distances_to_mean(foreign(hidden=(4, 12))) == {}


@pytest.mark.parametrize('training', [True, False])
def test_the_model_stays_as_it_was(tiny, images, training):
    model = gated(tiny(proj_drop_rate=.5)).train(training)
    before, random = deepcopy(model.state_dict()), torch.get_rng_state()
    records = ewa.diagnose(model, [images])
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert records == ewa.diagnose(model.train(not training), [images])


def test_a_dense_model_has_nothing_to_diagnose(tiny, images):
    assert ewa.diagnose(tiny(), [images]) == []


class TestAdvice:
    def test_names_alignment_for_permuted_copies(self, tiny):
        model = gated(tiny())
        for _, layer in moe_layers(model):
            make_equal(layer, permute)
            for expert in layer.experts:  # without the part that no permutation moves
                expert.fc1.bias.data.zero_(), expert.fc2.bias.data.zero_()
        first, second = advise(ewa.diagnose(model))
        assert 'blocks.1.mlp: the experts are nearly orthogonal' in first and first.endswith('images, or aligned.')
        assert second.startswith('blocks.3.mlp')

    def test_names_refit_and_selection_for_unrelated_experts(self, tiny, images):
        for align in (True, False):
            for line in advise(ewa.diagnose(gated(tiny()), align=align)):
                assert 'nearly orthogonal' in line and line.endswith(
                    'Try refit, with calibration images, or prune or do_acp.')
            assert line
        assert all(line.endswith('Try refit.') for line in advise(ewa.diagnose(gated(tiny()), [images], align=False)))

    def test_is_silent_on_similar_experts_and_on_random_partitions(self, tiny):
        model = gated(tiny())
        for _, layer in moe_layers(model):
            make_equal(layer, lambda expert: scatter(expert, std=.01))
        assert advise(ewa.diagnose(model)) == []
        assert advise(ewa.diagnose(gated(tiny(), router='random'))) == []

    def test_names_dead_experts(self, tiny, images):
        model = gated(tiny(), layers=[1], top_k=1)
        make_equal(model.blocks[1].mlp)
        hide(model.blocks[1].mlp, 3)
        (line,) = advise(ewa.diagnose(model, [images]))
        assert line.startswith('blocks.1.mlp: no calibration token') and '3]' in line


def test_usage_of_layers_of_unequal_numbers_of_experts(tiny, images):
    records = ewa.diagnose(gated(tiny(), top_k=1, layers=[1, 3]), [images])
    more = ewa.diagnose(foreign(), sequences()) + ewa.diagnose(foreign(hidden=(4, 12)), sequences())
    shown = usage_figure(records + more).axes[0].images[0].get_array()
    assert shown.shape == (4, 4) and shown[3, :2].tolist() == pytest.approx(more[1]['usage'])
    assert usage_figure(ewa.diagnose(ewa.to_moe(tiny()))) is None


def test_models_without_a_router_are_not_run(tiny, monkeypatch):
    model = ewa.to_moe(tiny('vit_tiny_patch16_224'), 2, init='independent')
    expected = ewa.diagnose(model)
    monkeypatch.setattr(model, 'forward', None)
    assert ewa.diagnose(model, [torch.zeros(1)]) == expected


@pytest.mark.parametrize('std, router', [(0.001, 'random'), (0.05, 'random'), (1., 'topk')])
def test_similarity_is_readable_in_the_heat_map(tiny, std, router):
    model = gated(tiny('vit_tiny_patch16_224'), router=router, num_experts=3)
    for _, layer in moe_layers(model):
        make_equal(layer, lambda expert: scatter(expert, std=std))
    records = ewa.diagnose(model)
    axes = [axis for axis in similarity_figure(records, 7.5).axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == ['1', '3']
    pairs = [[record['similarity'][i][j] for i in range(3) for j in range(3) if i != j] for record in records]
    for axis, expected in zip(axes, pairs, strict=True):
        written = [float(text.get_text()) for text in axis.texts]  # an expert with itself is always 1
        assert written == pytest.approx(expected, abs=(max(sum(pairs, [])) - min(sum(pairs, []))) / 8 + 1e-4)
        low, high = axis.images[0].get_clim()
        assert (low, high) == pytest.approx((min(sum(pairs, [])), max(sum(pairs, []))), abs=1e-4)


@pytest.mark.parametrize('width', [3.4, 7.5])
@pytest.mark.parametrize('depth', [1, 2, 12])
def test_all_that_is_written_beside_a_heat_map_is_seen(width, depth):
    record = dict(num_experts=4, similarity=[[1. - 1e-5 * abs(i - j) for j in range(4)] for i in range(4)],
                  usage=[.1, .2, .3, .4])
    records = [dict(record, layer=f'blocks.{i}.mlp') for i in range(depth)]
    for figure in (similarity_figure(records, width), usage_figure(records, width)):
        figure.canvas.draw()
        label, frame = figure.axes[-1].yaxis.label.get_window_extent(), figure.bbox
        assert frame.y0 <= label.y0 and label.y1 <= frame.y1 and label.x1 <= frame.x1
        assert figure.axes[-1].yaxis.get_offset_text().get_text() == ''


def test_errors_of_each_layer_are_shown():
    errors = {'refit': {'blocks.1.mlp': dict(fitted=.1, held_out=.3), 'blocks.3.mlp': dict(fitted=.2)}}
    axis, = error_figure(errors).axes
    fitted, held = axis.lines
    assert list(fitted.get_ydata()) == [.1, .2] and list(held.get_ydata()) == [.3]
    assert [text.get_text() for text in axis.get_xticklabels()] == ['1', '3']


@pytest.mark.parametrize('names, short', [
    (['blocks.1.mlp', 'blocks.11.mlp'], ['1', '11']), (['blocks.1.mlp'], ['blocks.1.mlp']), ([], []),
    (['layers.0.blocks.1.mlp', 'layers.2.blocks.1.mlp'], ['0', '2']), (['a.mlp', 'b.b.mlp'], ['a', 'b.b']),
    (['moe', 'moe'], ['moe', 'moe']), (['a.a', 'a'], ['a.a', 'a'])])
def test_names_of_layers_are_short(names, short):
    assert short_names(names) == short


def test_of_a_layer_that_does_not_say_how_it_combines_experts_nothing_is_claimed():
    model = foreign()
    model.moe.gate = model.moe.router
    del model.moe.router
    record, = ewa.diagnose(model, sequences())
    assert record['router'] == 'unknown' and 'change' not in record and record['distance'] > 0
