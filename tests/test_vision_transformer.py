import re
from copy import deepcopy

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import ewa
from ewa.exporting import write_folder
from ewa.moe import RandomPartitionMoE, TopKMoE, moe_layers

NAMES = {
    'vit_ewa': 'vit_small_patch16_224',
    'vit_tiny_ewa': 'vit_tiny_patch16_224',
    'vit_small_ewa': 'vit_small_patch16_224',
    'vit_base_ewa': 'vit_base_patch16_224',
    'vit_large_ewa': 'vit_large_patch16_224',
    'deit3_small_ewa': 'deit3_small_patch16_224',
    'deit3_base_ewa': 'deit3_base_patch16_224',
    'vit_tiny_moe': 'vit_tiny_patch16_224',
    'vit_small_moe': 'vit_small_patch16_224',
    'vit_base_moe': 'vit_base_patch16_224',
}
SWIN = dict(depth=None, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2))


def dense_key(key):
    return re.sub(r'\.(experts\.\d+|deviations\.\d+|mean)\.', '.', key)


def trained(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * .02)
    return model.eval()


@pytest.fixture
def vanilla_file(tiny, tmp_path):
    model = trained(tiny())
    save_file(model.state_dict(), tmp_path / 'vanilla.safetensors')
    return model, str(tmp_path / 'vanilla.safetensors')


@pytest.mark.parametrize('name, host', NAMES.items())
def test_names_are_registered_with_the_input_of_their_host(name, host):
    assert timm.is_model(name) and name in timm.list_models(module='vision_transformer')
    cfg, expected = timm.get_pretrained_cfg(name).to_dict(), timm.get_pretrained_cfg(host).to_dict()
    for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'num_classes', 'classifier', 'first_conv'):
        assert cfg[key] == expected[key]
    assert not any(cfg.get(key) for key in ('url', 'hf_hub_id', 'file', 'license'))


@pytest.mark.parametrize('name, host', NAMES.items())
def test_model_is_its_host_with_every_second_ffn_a_moe(tiny, images, name, host):
    model, dense = tiny(name), tiny(host)
    layers = dict(moe_layers(model))
    assert list(layers) == ['blocks.1.mlp', 'blocks.3.mlp']
    for layer in layers.values():
        assert isinstance(layer, TopKMoE if name.endswith('_moe') else RandomPartitionMoE)
        assert len(layer.experts) == (8 if name.endswith('_moe') else 4)
    assert repr(ewa.to_dense(model)) == repr(dense)
    for key, value in model.state_dict().items():
        if '.experts.' not in key and '.router.' not in key:
            assert torch.equal(value, dense.state_dict()[key])
    assert model(images).shape == (3, 10)


def test_arguments_of_host_and_conversion_both_pass(tiny):
    model = tiny('vit_small_ewa', drop_path_rate=.3, reg_tokens=2, num_experts=2, layers='last:1', init='copy')
    (name, layer), = moe_layers(model)
    assert name == 'blocks.3.mlp' and len(layer.experts) == 2 and model.reg_token.shape[1] == 2
    assert model.blocks[3].drop_path2.drop_prob == pytest.approx(.3)
    assert torch.equal(layer.experts[0].fc1.weight, layer.experts[1].fc1.weight)
    with pytest.raises(TypeError, match='unknown_argument'):
        tiny('vit_small_ewa', unknown_argument=1)
    with pytest.raises(ValueError, match='num_experts'):
        tiny('vit_small_ewa', num_experts=1)


def test_generic_entry_takes_any_host(tiny, images):
    model = tiny('vit_ewa', host='swin_tiny_patch4_window7_224', num_experts=3, **SWIN)
    assert [name for name, _ in moe_layers(model)] == ['layers.0.blocks.1.mlp', 'layers.1.blocks.1.mlp']
    assert model(images).shape == (3, 10)
    with pytest.raises(ValueError, match="host='vit_nothing' is not a model that timm knows"):
        tiny('vit_ewa', host='vit_nothing')


def test_converted_and_created_models_describe_themselves_alike(tiny):
    created = tiny('vit_tiny_ewa', num_experts=3, layers=[1])
    converted = ewa.to_moe(tiny(), num_experts=3, layers=[1])
    assert created.pretrained_cfg['architecture'] == converted.pretrained_cfg['architecture'] == 'vit_ewa'
    again = timm.create_model('vit_ewa', **converted._model_args)
    assert repr(again) == repr(converted) == repr(created)
    assert {**created._model_args, **converted._model_args} == created._model_args


@pytest.mark.parametrize('name', ['vit_tiny_ewa', 'vit_tiny_moe'])
def test_experts_from_scratch_start_as_copies_unless_asked_otherwise(tiny, name):
    def equal(**kwargs):
        experts = tiny(name, **kwargs).blocks[1].mlp.experts
        return all(torch.equal(expert.fc1.weight, experts[0].fc1.weight) for expert in experts)

    assert equal() and equal(init='copy')
    assert not equal(init='independent')


class TestPretrained:
    @pytest.mark.parametrize('name', ['vit_tiny_ewa', 'vit_tiny_moe'])
    def test_vanilla_weights_are_copied_into_the_experts(self, tiny, images, vanilla_file, name):
        dense, file = vanilla_file
        model = tiny(name, seed=3, pretrained=True, pretrained_cfg_overlay=dict(file=file, num_classes=10)).eval()
        for key, value in model.state_dict().items():
            if '.router.' not in key:
                assert torch.equal(value, dense.state_dict()[dense_key(key)])
        torch.testing.assert_close(model(images), dense(images))

    def test_vanilla_weights_of_another_classifier_size_and_input(self, tiny, vanilla_file):
        dense, file = vanilla_file
        kwargs = dict(num_classes=4, img_size=48, in_chans=1, pretrained=True)
        overlay = dict(file=file, num_classes=10, input_size=(3, 32, 32))
        model = tiny('vit_tiny_ewa', pretrained_cfg_overlay=overlay, **kwargs)
        expected = tiny(pretrained_cfg_overlay=overlay, **kwargs).state_dict()
        for key, value in model.state_dict().items():
            if not key.startswith('head.'):
                assert torch.equal(value, expected[dense_key(key)])
        assert model.head.weight.shape == (4, 32)
        assert torch.equal(model.blocks[1].mlp.experts[2].fc1.weight, dense.blocks[1].mlp.fc1.weight)

    def test_independent_experts_can_still_be_asked_for(self, tiny, vanilla_file):
        dense, file = vanilla_file
        overlay = dict(file=file, num_classes=10)
        layer = tiny('vit_tiny_ewa', pretrained=True, pretrained_cfg_overlay=overlay, init='independent').blocks[1].mlp
        assert torch.equal(layer.experts[0].fc1.weight, dense.blocks[1].mlp.fc1.weight)
        assert not torch.equal(layer.experts[1].fc1.weight, dense.blocks[1].mlp.fc1.weight)

    @pytest.mark.parametrize('form', ['file', 'state_dict'])
    @pytest.mark.parametrize('name, kwargs', [
        ('vit_tiny_ewa', dict(num_experts=3, layers=[0, 3])),
        ('vit_tiny_ewa', dict(num_experts=3, layers=[0, 3], form='mean')),
        ('vit_tiny_moe', dict(num_experts=5, num_shared=1, expert_ratio=.5)),
    ])
    def test_moe_weights_go_where_they_belong(self, tiny, images, tmp_path, name, kwargs, form):
        source = trained(tiny(name, **kwargs))
        save_file(source.state_dict(), tmp_path / 'moe.safetensors')
        weights = str(tmp_path / 'moe.safetensors') if form == 'file' else source.state_dict()
        overlay = {form: weights, 'num_classes': 10}
        model = tiny(name, seed=3, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())
        assert torch.equal(model(images), source(images))

    @pytest.mark.parametrize('form', ['experts', 'mean'])
    def test_folders_of_either_form_load_as_what_they_are(self, tiny, images, tmp_path, form):
        source = trained(tiny('vit_tiny_ewa', form=form, **dict(spread=.7) if form == 'mean' else {}))
        write_folder(source, tmp_path / 'out')
        model = ewa.load(tmp_path / 'out').eval()
        assert repr(model) == repr(source) and torch.equal(model(images), source(images))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())

    def test_weights_of_an_unnamed_form_tell_it_themselves(self, tiny, images):
        source = trained(tiny('vit_tiny_ewa', form='mean'))
        overlay = dict(state_dict=source.state_dict(), num_classes=10)
        model = tiny('vit_tiny_ewa', seed=3, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(model(images), source(images))

    def test_a_checkpoint_file_of_moe_weights(self, tiny, images, tmp_path):
        source = trained(tiny('vit_tiny_ewa'))
        save_file(source.state_dict(), tmp_path / 'moe.safetensors')
        model = tiny('vit_tiny_ewa', seed=3, checkpoint_path=str(tmp_path / 'moe.safetensors')).eval()
        assert torch.equal(model(images), source(images))

    @pytest.mark.parametrize('kwargs, message', [
        (dict(num_experts=2), 'blocks.1.mlp: they have 4 experts there, the model 2. Give the num_experts'),
        (dict(num_experts=6), 'they have 4 experts there, the model 6'),
        (dict(layers='all'), 'blocks.0.mlp: they have 0 experts there, the model 4'),
        (dict(layers=[1]), 'experts in blocks.1.mlp, blocks.3.mlp, the model in blocks.1.mlp: layers differs'),
        (dict(layers=[0, 2]), 'blocks.0.mlp'),
        (dict(router='topk'), 'router'),
        (dict(form='mean'), 'blocks.1.mlp: .* form'),
    ])
    def test_weights_of_another_moe_are_refused(self, tiny, tmp_path, kwargs, message):
        write_folder(tiny('vit_tiny_ewa'), tmp_path / 'out')
        with pytest.raises(ValueError, match=message):
            timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, **kwargs)

    @pytest.mark.parametrize('kwargs', [
        dict(num_shared=0), dict(num_shared=2), dict(expert_ratio=.5),
        dict(router='random', num_shared=0, expert_ratio=1.)])
    def test_gated_weights_of_another_form_are_refused(self, tiny, tmp_path, kwargs):
        source = tiny('vit_tiny_moe', num_experts=4, num_shared=1, expert_ratio=.25)
        write_folder(source, tmp_path / 'out')
        words = "top_k=2 does nothing with router='random'.* give router='topk'" if 'router' in kwargs else (
            'do not fit the MoE layer blocks.1.mlp')
        with pytest.raises(ValueError, match=words):
            timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, **kwargs)

    def test_loading_does_not_change_the_given_weights(self, tiny):
        source = tiny('vit_tiny_ewa').state_dict()
        before = deepcopy(source)
        overlay = dict(state_dict=source, num_classes=10)
        tiny('vit_tiny_ewa', num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
        assert source.keys() == before.keys() and all(torch.equal(source[key], before[key]) for key in before)

    def test_a_tagged_host_exports_under_its_plain_name(self, tiny, images, vanilla_file, tmp_path):
        _, file = vanilla_file
        model = tiny(
            'vit_ewa', host='vit_tiny_patch16_224.augreg_in21k', pretrained=True,
            pretrained_cfg_overlay=dict(file=file, num_classes=10)).eval()
        vit = ewa.to_dense(model)
        assert vit.pretrained_cfg['architecture'] == 'vit_tiny_patch16_224'
        ewa.export(vit, tmp_path / 'out')
        assert torch.equal(ewa.load(tmp_path / 'out').eval()(images), model(images))


class TestTimmFeatures:
    @pytest.mark.parametrize('kwargs', [dict(), dict(feature_cls='getter')])
    def test_features_only_counts_blocks_on_the_whole_host(self, tiny, images, tmp_path, kwargs):
        source = trained(tiny('vit_tiny_ewa'))
        save_file(source.state_dict(), tmp_path / 'moe.safetensors')
        overlay = dict(file=str(tmp_path / 'moe.safetensors'), num_classes=10)
        model = tiny(
            'vit_tiny_ewa', num_classes=None, features_only=True, out_indices=(1, 2), pretrained=True,
            pretrained_cfg_overlay=overlay, **kwargs).eval()
        assert [name for name, _ in moe_layers(model)] == ['model.blocks.1.mlp']  # blocks 0 to 2 are left
        expected = source.forward_intermediates(images, indices=(1, 2), intermediates_only=True)
        for out, other in zip(model(images), expected, strict=True):
            assert torch.equal(out, other)

    def test_features_only_of_vanilla_weights(self, tiny, images, vanilla_file):
        dense, file = vanilla_file
        model = tiny(
            'vit_tiny_ewa', num_classes=None, features_only=True, out_indices=(3,), pretrained=True,
            pretrained_cfg_overlay=dict(file=file, num_classes=10)).eval()
        assert len(list(moe_layers(model))) == 2
        expected = dense.forward_intermediates(images, indices=(3,), intermediates_only=True)
        torch.testing.assert_close(model(images)[0], expected[0])

    def test_features_only_without_a_chosen_block_is_refused(self, tiny):
        with pytest.raises(ValueError, match=r"out_indices=\[0\] keeps none of the FFNs that layers='every:2'"):
            tiny('vit_tiny_ewa', features_only=True, out_indices=[0])

    def test_features_only_is_refused_where_timm_flattens_the_host(self, tiny):
        with pytest.raises(ValueError, match='features_only=True is not supported'):
            tiny('vit_ewa', host='swin_tiny_patch4_window7_224', features_only=True, **SWIN)

    def test_reset_classifier(self, tiny, images, tmp_path):
        model = tiny('vit_tiny_ewa')
        model.reset_classifier(4)
        assert model(images).shape == (3, 4)
        vit = ewa.to_dense(model.eval())
        ewa.export(vit, tmp_path / 'out')
        assert torch.equal(ewa.load(tmp_path / 'out').eval()(images), model(images))

    @pytest.mark.parametrize('form', ['experts', 'mean'])
    def test_set_grad_checkpointing(self, tiny, images, form):
        model = tiny('vit_tiny_ewa', form=form).train()
        model.set_grad_checkpointing()
        model(images).sum().backward()
        assert all(p.grad is not None for _, layer in moe_layers(model) for p in layer.parameters())

    @pytest.mark.parametrize('name', ['vit_tiny_ewa', 'vit_tiny_moe', 'deit3_small_ewa'])
    def test_layer_decay_gives_experts_the_scale_of_their_block(self, tiny, name):
        def scales(model):
            names = {id(p): n for n, p in model.named_parameters()}
            groups = param_groups_layer_decay(model, weight_decay=.05, layer_decay=.5)
            return {names[id(p)]: (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}

        expected, got = scales(tiny(NAMES[name])), scales(tiny(name))
        assert len({scale for scale, _ in expected.values()}) >= 5
        for key, value in got.items():
            if '.router.' in key:
                assert value[0] == expected[key.replace('router', 'fc1')][0]
            else:
                assert value == expected[dense_key(key)]
        assert got['blocks.1.mlp.experts.3.fc1.weight'][0] < got['blocks.3.mlp.experts.0.fc1.bias'][0]

    @pytest.mark.parametrize('form', ['experts', 'mean'])
    def test_weight_decay_is_that_of_the_host(self, tiny, form):
        def decays(model):
            names = {id(p): n for n, p in model.named_parameters()}
            groups = param_groups_weight_decay(model, .05, model.no_weight_decay())
            return {names[id(p)]: g['weight_decay'] for g in groups for p in g['params']}

        model, dense = tiny('vit_tiny_ewa', form=form), tiny()
        assert model.no_weight_decay() == dense.no_weight_decay()
        expected = decays(dense)
        assert decays(model) == {key: expected[dense_key(key)] for key, _ in model.named_parameters()}


def test_folders_with_shared_and_fine_grained_experts_adapt(tiny, tmp_path):
    source = trained(tiny('vit_tiny_moe', num_experts=6, top_k=3, num_shared=1, expert_ratio=.25))
    write_folder(source, tmp_path / 'out')
    changes = dict(num_classes=4), dict(img_size=48), dict(in_chans=1), dict(num_classes=2, img_size=64, in_chans=4)
    for kwargs in changes:
        model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, **kwargs)
        size, channels = kwargs.get('img_size', 32), kwargs.get('in_chans', 3)
        assert model(torch.randn(2, channels, size, size)).shape == (2, kwargs.get('num_classes', 10))
        for name, layer in moe_layers(source):
            loaded = model.get_submodule(name).state_dict()
            assert all(torch.equal(value, loaded[key]) for key, value in layer.state_dict().items())
        assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
        assert ('num_classes' in kwargs) != torch.equal(model.head.weight[:1], source.head.weight[:1])
