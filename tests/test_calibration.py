from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

import ewa
import reference
from ewa import calibration
from ewa.calibration import Tap, measure_statistics, read_tokens, residual_stream, sensitivities
from ewa.moe import moe_layers
from gated import GLU, foreign, gated, hide, scatter, sequences


def assert_same(measured, expected):
    assert set(vars(measured)) == set(expected)
    for name, value in expected.items():
        actual = torch.as_tensor(getattr(measured, name), dtype=torch.float64)
        torch.testing.assert_close(actual, torch.tensor(value, dtype=torch.float64), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize('renormalise', [True, False])
@pytest.mark.parametrize('name, top_k, num_shared', [('vit_tiny_patch16_224', 1, 0), (GLU, 2, 1)])
def test_equals_counting_token_by_token(tiny, images, monkeypatch, name, top_k, num_shared, renormalise):
    monkeypatch.setattr(calibration, '_CHUNK', 7)  # 17 tokens an image: chunks end within images
    model = gated(tiny(name), top_k=top_k, num_shared=num_shared, renormalise=renormalise)
    measured = measure_statistics(model, iter([images[:2], (images[2:], 'labels')]))
    layers = dict(moe_layers(model))
    assert list(measured) == list(layers) and len(layers) == 2
    for key, layer in layers.items():
        tokens = reference.inputs_of(model, layer, [images])
        expected = reference.usage(tokens, layer.experts, tokens @ layer.router.weight.T, top_k, renormalise)
        assert_same(measured[key], expected)
        assert expected['tokens'] == 51 and sum(expected['counts']) == 51 * top_k


@pytest.mark.parametrize('top_k, renormalise', [(1, False), (2, True)])
def test_reads_layers_that_are_not_ours(top_k, renormalise):
    model = foreign(top_k=top_k, renormalise=renormalise)
    tokens = reference.inputs_of(model, model.moe, sequences())
    expected = reference.usage(tokens, model.moe.experts, model.moe.router(tokens), top_k, renormalise)
    assert_same(measure_statistics(model, sequences())['moe'], expected)


def test_takes_a_layers_own_word_on_its_routing():
    model = foreign()

    def route(tokens):  # the fourth expert and a gate of 0.7 for everyone
        gates, experts = torch.full((len(tokens), 1), .7), torch.full((len(tokens), 1), 3)
        return gates, experts, torch.zeros(len(tokens), 4)

    model.moe.route = route
    measured = measure_statistics(model, sequences())['moe']
    assert measured.counts.tolist() == [0, 0, 0, 42] and measured.mass == pytest.approx(.7)
    assert measured.probability.tolist() == [0, 0, 0, .25]


def test_a_router_of_another_form_is_refused_with_the_way_out():
    model = foreign()
    model.moe.router = nn.Linear(8, 5)
    model.moe.forward = lambda x: x
    with pytest.raises(TypeError, match=r'HandMadeMoE.router must map \(T, D\) to logits.*E = 4.*route'):
        measure_statistics(model, sequences())


def test_experts_that_nobody_chooses_count_nothing(tiny, images):
    model = gated(tiny(), top_k=1)
    hide(model.blocks[1].mlp, 2)
    measured = measure_statistics(model, [images])['blocks.1.mlp']
    for values in (measured.counts, measured.probability, measured.contribution):
        assert values[2] == 0 and values.isfinite().all()
    assert measured.second_moment[2, 2] > 0


def test_experts_of_unequal_width_have_no_average_to_compare_with():
    model = foreign(hidden=(4, 12, 20))
    measured = measure_statistics(model, sequences())['moe']
    assert measured.counts.sum() == 84 and measured.change != measured.change


@pytest.mark.parametrize('training', [True, False])
def test_leaves_the_model_as_it_was_and_looks_at_it_in_eval(tiny, images, training):
    def make():
        return gated(tiny(proj_drop_rate=.5, drop_path_rate=.5), top_k=1)

    model = make().train(training)
    model.blocks[0].train(not training)
    before, modes = deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    measured = measure_statistics(model, [images])

    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for key, expected in measure_statistics(make().eval(), [images]).items():
        assert expected.change == measured[key].change and torch.equal(expected.counts, measured[key].counts)


def test_leaves_the_model_as_it_was_when_a_batch_fails(tiny, images):
    model = gated(tiny()).train()
    with pytest.raises(AssertionError):
        measure_statistics(model, [images, images[:, :, :8]])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_random_partition_has_no_usage(tiny, images):
    assert measure_statistics(ewa.to_moe(tiny()), [images]) == {}


@pytest.mark.parametrize('batches', [[], [torch.zeros(0, 3, 32, 32)]])
def test_no_images_are_refused(tiny, batches):
    with pytest.raises(ValueError, match='has no batches'):
        measure_statistics(gated(tiny()), batches)


def test_a_layer_that_no_token_reaches_is_refused(tiny, images):
    model = gated(tiny())
    model.aside = deepcopy(model.blocks[1])
    with pytest.raises(ValueError, match='aside.mlp got no tokens'):
        measure_statistics(model, [images])


def test_routing_losses_change_nothing(tiny, images):
    model = scatter(ewa.to_moe(tiny(), router='topk')).train()
    model(images)
    before = deepcopy(model.state_dict())
    losses = [ewa.routing_losses(model) for _ in range(2)]
    assert losses[0] == losses[1] and losses[0]['load_balance'].requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    losses[0]['load_balance'].backward()  # the graph of the pass is still whole
    assert model.blocks[1].mlp.router.weight.grad.abs().sum() > 0


def test_sensitivities_are_squared_derivatives_of_a_random_sum_of_the_outputs():
    model = foreign().double()
    (batch,) = [batch.double() for batch in sequences()[:1]]
    (measured,) = sensitivities(model, [batch])['moe']
    draw = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))  # 4 sequences, 3 outputs

    def outputs(nudge):
        handle = model.moe.register_forward_hook(lambda module, args, output: output + nudge)
        result = model(batch)
        handle.remove()
        return (result * draw).sum().item()

    expected = torch.zeros(4, 6)
    for sequence in range(4):
        for token in range(6):
            for unit in range(8):
                nudge = torch.zeros(4, 6, 8).double()
                nudge[sequence, token, unit] = 1e-4
                expected[sequence, token] += ((outputs(nudge) - outputs(-nudge)) / 2e-4) ** 2
    torch.testing.assert_close(measured, expected.flatten(), rtol=1e-3, atol=1e-8)


def test_tokens_that_the_outputs_do_not_depend_on_have_no_sensitivity(tiny, images):
    model = gated(tiny())  # the class token alone leaves the last block
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    measured = sensitivities(model, [images[:1], images[1:]])
    assert [len(values) for values in measured['blocks.3.mlp']] == [17, 34]
    last = torch.cat(measured['blocks.3.mlp']).view(3, 17)
    assert (last[:, 0] > 0).all() and (last[:, 1:] == 0).all()
    assert (torch.cat(measured['blocks.1.mlp']) > 0).all()
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled() == grad
    assert all(p.grad is None for p in model.parameters())


def test_outputs_that_are_no_tensor_have_no_sensitivities():
    model = foreign()
    model.head = nn.LSTM(8, 3)
    with pytest.raises(ValueError, match='Foreign returns a tuple: wrap it'):
        sensitivities(model, sequences())


def test_tokens_are_counted_over_batches_at_each_place(tiny, images):
    model = gated(tiny())
    layer, index = model.blocks[1].mlp, torch.tensor([0, 5, 16, 17, 33])
    for block, other in ((model.blocks[1], index), (model.blocks[2], index[1:4])):
        kept = []
        handle = block.register_forward_hook(lambda module, args, output: kept.append(output.flatten(0, 1)))
        model(images)
        handle.remove()
        taps = [Tap(block, False, other), Tap(layer, False, index), Tap(layer, False, index, inputs=True)]
        stream, outputs, inputs = read_tokens(model, taps, [images[:1], images[1:]])
        expected = reference.inputs_of(model, layer, [images])[index]
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(outputs, layer(expected))
        torch.testing.assert_close(stream, kept[0][other])
        assert not layer._forward_hooks and not block._forward_hooks


def test_a_forward_pass_ends_behind_the_last_place(tiny, images):
    model = gated(tiny())
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: calls.append(1))
    read_tokens(model, [Tap(model.blocks[1].mlp, False, torch.tensor([0])), Tap(
        model.blocks[2].norm1, False, torch.tensor([0]))], [images[:1], images[1:]])
    assert len(calls) == 4


def test_the_stream_is_read_behind_the_outermost_sum(tiny, images):
    model = gated(tiny(), layers='all')
    for number, block in enumerate(['blocks.0', 'blocks.1', 'blocks.2', 'blocks']):
        name, scale, form = residual_stream(model, f'blocks.{number}.mlp', images)
        assert name == block and not form
        torch.testing.assert_close(scale, torch.ones(32).double(), rtol=1e-3, atol=0)


def test_layer_scale_is_read_from_the_stream(tiny, images):
    model = gated(tiny(init_values=1.), layers=[1])
    with torch.no_grad():
        model.blocks[1].ls2.gamma.copy_(torch.linspace(-1, 2, 32))
    name, scale, _ = residual_stream(model, 'blocks.1.mlp', images)
    assert name == 'blocks.1'
    torch.testing.assert_close(scale, torch.linspace(-1, 2, 32).double(), rtol=1e-3, atol=1e-3)


def test_the_stream_of_a_block_that_returns_a_tuple_with_its_tokens_in_another_shape(tiny, images):
    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **kwargs):
            y = self.block.mlp(self.block.norm2(x))
            return (x + y)[:, None], y

    class Sum(nn.Module):
        def forward(self, x):
            return x[0][:, 0]

    model = gated(tiny(), layers=[1])
    model.blocks[1] = Block(model.blocks[1])
    model.blocks.insert(2, Sum())
    place = residual_stream(model, 'blocks.1.block.mlp', images)
    assert place.module == 'blocks.1'
    index = torch.tensor([3, 20])
    expected = model.blocks[:2](model._pos_embed(model.patch_embed(images)))[0].reshape(-1, 32)[index]
    stream, = read_tokens(model, [Tap(model.blocks[1], place.images, index)], [images])
    torch.testing.assert_close(stream, expected)


@pytest.mark.parametrize('conv_mlp', [False, True])
def test_the_stream_of_images(images, conv_mlp):
    model = gated(timm.create_model(
        'convnext_tiny', depths=(1, 2, 2, 2), dims=(8, 8, 16, 16), num_classes=10, conv_mlp=conv_mlp))
    for name, _ in moe_layers(model):
        block = model.get_submodule(name.rpartition('.')[0])
        place = residual_stream(model, name, images)
        assert place.images
        torch.testing.assert_close(place.scale, block.gamma.double(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('name, kwargs', [
    ('swinv2_tiny_window16_256', dict(window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2))),
    ('vit_tiny_patch16_224', dict(
        patch_size=8, embed_dim=32, num_heads=2, depth=2, block_fn=timm.models.vision_transformer.ResPostBlock))])
def test_behind_a_norm_there_is_no_stream(images, name, kwargs):
    model = gated(timm.create_model(name, img_size=32, **kwargs))
    assert all(residual_stream(model, name, images) is None for name, _ in moe_layers(model))


def test_the_stream_is_not_read_from_a_module_that_is_called_twice(tiny, images):
    class Twice(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, last=True, **kwargs):
            return self(x, last=False) * 1 if last else x + self.block.mlp(self.block.norm2(x))

    model = gated(tiny(), layers=[1])
    model.blocks[1] = Twice(model.blocks[1])
    assert residual_stream(model, 'blocks.1.block.mlp', images) is None
