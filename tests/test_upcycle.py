import warnings
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

import ewa
from ewa.exporting import write_folder
from ewa.ffn import find_ffns, read_ffn
from ewa.moe import MeanFormMoE, RandomPartitionMoE, TopKMoE, fuse_experts, moe_layers

SWIN = dict(depth=None, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2))
HOSTS = [
    ('vit_tiny_patch16_224', {}, 'blocks.1.mlp'),
    ('deit_tiny_distilled_patch16_224', {}, 'blocks.1.mlp'),
    ('deit3_small_patch16_224', {}, 'blocks.1.mlp'),
    ('vit_small_patch14_reg4_dinov2', {}, 'blocks.1.mlp'),
    ('vit_giant_patch14_dinov2', {}, 'blocks.1.mlp'),  # SwiGLUPacked
    ('vit_small_plus_patch16_dinov3', {}, 'blocks.1.mlp'),  # SwiGLU
    ('eva02_tiny_patch14_224', {}, 'blocks.1.mlp'),  # GluMlp
    ('eva02_base_patch14_224', {}, 'blocks.1.mlp'),  # SwiGLU with a norm over the hidden units
    ('beit_base_patch16_224', {}, 'blocks.1.mlp'),
    ('vit_base_patch16_rpn_224', {}, 'blocks.1.mlp'),  # norms after the branches
    ('vit_relpos_small_patch16_224', dict(num_heads=4), 'blocks.1.mlp'),
    ('vit_small_patch16_18x2_224', {}, 'blocks.1.ffns.0.mlp'),  # parallel branches
    ('swin_tiny_patch4_window7_224', SWIN, 'layers.0.blocks.1.mlp'),
]


def pretrained_like(model):
    """Move every norm away from its initial value, as training does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * .02)
    return model


def dense_key(key):
    parts = key.split('.')
    return '.'.join(parts[:parts.index('experts')] + parts[parts.index('experts') + 2:]) if 'experts' in parts else key


@pytest.mark.parametrize('name, kwargs, first', HOSTS, ids=[host[0] for host in HOSTS])
class TestHosts:
    def test_from_pretrained_weights_it_computes_what_the_dense_model_does(self, tiny, images, name, kwargs, first):
        dense = pretrained_like(tiny(name, **kwargs)).eval()
        model = ewa.to_moe(deepcopy(dense))
        assert next(moe_layers(model))[0] == first
        assert torch.equal(model(images), dense(images))
        for key, value in model.state_dict().items():
            assert torch.equal(value, dense.state_dict()[dense_key(key)])
        assert list(dict.fromkeys(dense_key(key) for key in model.state_dict())) == list(dense.state_dict())
        assert len(find_ffns(dense)) == 2 * len(list(moe_layers(model)))

    def test_independent_experts_differ_and_the_rest_is_the_dense_model(self, tiny, name, kwargs, first):
        dense, model = tiny(name, **kwargs), ewa.to_moe(tiny(name, **kwargs), init='independent')
        expected = dense.state_dict()
        for key, value in model.state_dict().items():
            if '.experts.' not in key or '.experts.0.' in key:
                assert torch.equal(value, expected[dense_key(key)])
        for layer_name, layer in moe_layers(model):
            ffn = dense.get_submodule(layer_name)
            for expert in layer.experts[1:]:
                assert type(expert) is type(ffn)
                for p_name, p in expert.named_parameters():
                    other = ffn.get_parameter(p_name)
                    assert p.shape == other.shape and p.requires_grad
                    if p.ndim == 2:
                        assert (p != other).float().mean() > .9

    @pytest.mark.parametrize('router', ['random', 'topk'])
    def test_trains_with_a_gradient_for_every_parameter(self, tiny, images, name, kwargs, first, router):
        model = ewa.to_moe(tiny(name, **kwargs), router=router, init='independent').train()
        out = model(images)
        assert out.shape == (3, 10) and out.isfinite().all()
        out.square().sum().backward()
        assert all(p.grad is not None for _, layer in moe_layers(model) for p in layer.parameters())


def test_state_dict_keys_insert_the_expert(tiny):
    keys = ewa.to_moe(tiny(), num_experts=2, layers=[1]).state_dict().keys()
    dense = tiny().state_dict().keys()
    assert keys - dense == {
        f'blocks.1.mlp.experts.{i}.{layer}.{kind}'
        for i in range(2) for layer in ('fc1', 'fc2') for kind in ('weight', 'bias')}
    assert dense - keys == {f'blocks.1.mlp.{layer}.{kind}' for layer in ('fc1', 'fc2') for kind in ('weight', 'bias')}


def test_converts_in_place_and_returns_the_model(tiny):
    model = tiny()
    ffn = model.blocks[1].mlp
    assert ewa.to_moe(model) is model and model.blocks[1].mlp.experts[0] is ffn


@pytest.mark.parametrize('name, kwargs, first', HOSTS, ids=[host[0] for host in HOSTS])
class TestMeanForm:
    def test_copies_keep_the_ffn_of_the_host_as_their_mean(self, tiny, images, name, kwargs, first):
        dense = pretrained_like(tiny(name, **kwargs)).eval()
        model = deepcopy(dense)
        ffn = model.get_submodule(first)
        ewa.to_moe(model, num_experts=3, form='mean', spread=.5)
        layer = model.get_submodule(first)
        assert type(layer) is MeanFormMoE and layer.mean is ffn and layer.spread == .5 and len(layer.deviations) == 3
        assert torch.equal(model(images), dense(images))
        for key, value in dense.get_submodule(first).state_dict().items():
            assert torch.equal(model.state_dict()[f'{first}.mean.{key}'], value)
            assert all(not model.state_dict()[f'{first}.deviations.{i}.{key}'].any() for i in range(3))

    def test_independent_experts_are_those_of_the_published_form(self, tiny, name, kwargs, first):
        models = []
        for form in ('experts', 'mean'):
            model = tiny(name, **kwargs)
            torch.manual_seed(1)
            models.append(ewa.to_moe(model, init='independent', form=form))
        (_, published), (_, layer) = (next(moe_layers(model)) for model in models)
        for expert, expected in zip(layer.experts, published.experts):
            for key, p in expert.named_parameters():
                torch.testing.assert_close(p, expected.get_parameter(key))


@pytest.mark.parametrize('layers, expected', [
    ('every:2', [1, 3]), ('every:1', [0, 1, 2, 3]), ('every:3', [2]), ('every:4', [3]), ('last:1', [3]),
    ('last:3', [1, 2, 3]), ('all', [0, 1, 2, 3]), ([0, 2], [0, 2]), ((3, 0), [0, 3]), (r'blocks\.[02]\.', [0, 2]),
])
def test_layers(tiny, layers, expected):
    model = ewa.to_moe(tiny(), layers=layers)
    assert [name for name, _ in moe_layers(model)] == [f'blocks.{i}.mlp' for i in expected]


def test_an_ffn_in_two_places_is_refused(tiny):
    with torch.device('meta'):
        model = timm.create_model('coat_tiny')
    with pytest.raises(ValueError, match='mlp2 is used in several places'):
        ewa.to_moe(model, layers=r'parallel_blocks\.0\.mlp2')
    # a block in two places may have one: its place is the block
    vit = tiny()
    vit.blocks.append(vit.blocks[1])
    assert [name for name, _ in moe_layers(ewa.to_moe(vit))] == ['blocks.1.mlp', 'blocks.3.mlp']


@pytest.mark.parametrize('name, kwargs, words', [
    ('vit_tiny_patch16_224', dict(top_k=1), 'the task does not train the router'),
    ('vit_tiny_patch16_224', dict(num_shared=1), 'leave no room for routed ones'),
    ('vit_tiny_patch16_224', dict(num_shared=4, expert_ratio=.25), 'leave no room for routed ones'),
    ('eva02_base_patch14_224', dict(num_shared=1), 'has a norm over its hidden units'),
    ('vit_tiny_patch16_224', dict(top_k=1, renormalise=False), ''),
    ('vit_tiny_patch16_224', dict(num_shared=1, layers='all'), ''),
    ('vit_tiny_patch16_224', dict(num_shared=1, expert_ratio=.5), ''),
], ids=str)
def test_a_moe_that_would_disappoint_is_warned_of(tiny, name, kwargs, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ewa.to_moe(tiny(name), router='topk', **kwargs)
    messages = [str(warning.message) for warning in caught]
    assert words in messages[0] if words else not messages


class TestInit:
    def test_copy_makes_equal_experts(self, tiny):
        model, dense = ewa.to_moe(tiny(), init='copy'), tiny()
        for key, value in model.state_dict().items():
            assert torch.equal(value, dense.state_dict()[dense_key(key)])

    def test_independent_experts_are_further_draws_of_the_same_distribution(self, tiny):
        layer = ewa.to_moe(pretrained_like(tiny()), init='independent').blocks[1].mlp
        for name, first in layer.experts[0].named_parameters():
            values = [expert.get_parameter(name) for expert in layer.experts]
            for value in values[1:]:
                assert torch.equal(value.flatten().sort().values, first.flatten().sort().values)
            assert len({tuple(value.flatten().tolist()) for value in values}) == 4

    @pytest.mark.parametrize('name', ['vit_giant_patch14_dinov2', 'vit_small_plus_patch16_dinov3'])
    def test_gate_and_value_of_a_glu_keep_their_own_distributions(self, tiny, name):
        model = tiny(name)
        with torch.no_grad():
            next(model.blocks[1].mlp.parameters())[:9] *= 50
        dense = [group.flatten().sort().values for group in read_ffn(model.blocks[1].mlp).up]
        for expert in ewa.to_moe(model, init='independent').blocks[1].mlp.experts:
            for group, expected in zip(read_ffn(expert).up, dense):
                assert torch.equal(group.flatten().sort().values, expected)

    def test_copies_are_the_default_whatever_the_weights(self, tiny):
        for model in (tiny(), pretrained_like(tiny())):
            first, second = ewa.to_moe(model).blocks[1].mlp.experts[:2]
            assert torch.equal(first.fc1.weight, second.fc1.weight)
        with pytest.raises(ValueError, match="init must be 'copy' or 'independent', got 'auto'"):
            ewa.to_moe(tiny(), init='auto')

    def test_a_seed_fixes_the_experts(self, tiny):
        first, second = (ewa.to_moe(tiny(), init='independent').state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


class TestFineGrained:
    @pytest.mark.parametrize('name', [
        'vit_tiny_patch16_224', 'vit_giant_patch14_dinov2', 'vit_small_plus_patch16_dinov3'])
    @pytest.mark.parametrize('num_experts, num_shared', [(4, 0), (3, 1), (2, 2)])
    def test_slices_add_up_to_the_dense_ffn(self, tiny, name, num_experts, num_shared):
        dense = pretrained_like(tiny(name, mlp_ratio=4)).eval()
        layer = ewa.to_moe(
            deepcopy(dense), num_experts, router='topk', expert_ratio=.25, num_shared=num_shared).blocks[1].mlp
        experts = [*layer.experts, *getattr(layer, 'shared', ())]
        x = torch.randn(7, 32)
        torch.testing.assert_close(sum(expert(x) for expert in experts), dense.blocks[1].mlp(x), atol=1e-6, rtol=1e-5)
        assert all(4 * e.fc2.in_features == dense.blocks[1].mlp.fc2.in_features for e in experts)

    def test_slices_repeat_cyclically(self, tiny):
        layer = ewa.to_moe(
            pretrained_like(tiny()), 5, router='topk', expert_ratio=.5, num_shared=1, init='copy').blocks[1].mlp
        experts = [*layer.experts, *layer.shared]
        for i, expert in enumerate(experts):
            for key, value in expert.state_dict().items():
                assert torch.equal(value, experts[i % 2].state_dict()[key])
        assert not torch.equal(experts[0].fc1.weight, experts[1].fc1.weight)

    def test_independent_slices_are_shuffled_but_the_first(self, tiny):
        copies, others = (
            ewa.to_moe(tiny(), 4, router='topk', expert_ratio=.5, init=init).blocks[1].mlp.experts
            for init in ('copy', 'independent'))
        for i in range(4):
            for key, value in copies[i].state_dict().items():
                other = others[i].state_dict()[key]
                assert torch.equal(value.flatten().sort().values, other.flatten().sort().values)
                assert torch.equal(value, other) == (i == 0 or not value.any())

    def test_ratio_one_with_shared_experts(self, tiny):
        layer = ewa.to_moe(tiny(), 3, router='topk', num_shared=2, init='copy').blocks[1].mlp
        assert len(layer.experts) == 3 and len(layer.shared) == 2
        assert torch.equal(layer.shared[1].fc1.weight, layer.experts[0].fc1.weight)

    def test_gating_arguments_arrive(self, tiny):
        layer = ewa.to_moe(tiny(), 5, router='topk', top_k=3, renormalise=False).blocks[1].mlp
        assert isinstance(layer, TopKMoE) and (layer.top_k, layer.renormalise) == (3, False)
        assert layer.router.weight.shape == (5, 32)


ERRORS = [
    (dict(router=lambda experts: experts[0]), 'must return a module that holds its experts in .* got Mlp'),
    (dict(num_experts=1), 'num_experts must be .* at least 2, got 1'),
    (dict(num_experts=0), 'num_experts'),
    (dict(num_experts=2.5), 'num_experts'),
    (dict(num_experts=True), 'num_experts'),
    (dict(layers=[0, 4]), '4 is not a block index between 0 and 3'),
    (dict(layers=[-1]), '-1 is not a block index'),
    (dict(layers=[]), 'an empty list'),
    (dict(layers=['blocks.1']), 'blocks.1 can.t become a MoE layer: it is not made of maps'),
    (dict(layers=['blocks.9.mlp']), 'has no module blocks.9.mlp'),
    (dict(layers=['']), 'has no module '),
    (dict(layers=3), 'layers=3'),
    (dict(layers='every:0'), 'K must be between 1 and the number of blocks 4'),
    (dict(layers='every:5'), 'K must be'),
    (dict(layers='last:x'), 'K must be'),
    (dict(layers='nothing'), r'matches no FFN. There are: blocks.0.mlp, blocks.1.mlp, blocks.2.mlp, blocks.3.mlp'),
    (dict(layers=''), 'matches no FFN'),
    (dict(layers='('), 'regular expression'),
    # between them what others have registered
    (dict(router=[]), 'router must be .* got \\[\\]'),
    (dict(router='hash'), "router must be 'random', 'topk'(, '[^']+')* or a function .* got 'hash'"),
    (dict(init='zeros'), 'init must be'),
    (dict(router='topk', top_k=0), 'top_k must be between 1 and num_experts=4, got 0'),
    (dict(router='topk', top_k=5), 'top_k'),
    (dict(router='topk', num_shared=-1), 'num_shared'),
    (dict(router='topk', expert_ratio=.3), 'expert_ratio must be 1/m'),
    (dict(router='topk', expert_ratio=0), 'expert_ratio'),
    (dict(router='topk', expert_ratio=2.), 'expert_ratio'),
    (dict(router='topk', expert_ratio=1 / 3), 'does not divide the hidden width 128'),
    (dict(num_shared=1), "router='random' has neither shared nor fine-grained"),
    (dict(expert_ratio=.5), "router='random' has neither"),
    (dict(form='median'), "form must be 'experts' or 'mean', got 'median'"),
    (dict(form='mean', spread=-1.), 'spread must be at least 0.* got -1'),
    (dict(form='mean', spread=0., init='independent'), "above with init='independent', got 0"),
    (dict(form='mean', router='topk'), "form='mean' is a form of router='random', not of 'topk'"),
]


@pytest.mark.parametrize('kwargs, message', ERRORS)
def test_errors_are_clear_and_leave_the_model_untouched(tiny, kwargs, message):
    model = tiny()
    before, text = deepcopy(model.state_dict()), repr(model)
    args = dict(model._model_args), dict(model.pretrained_cfg)
    with pytest.raises(ValueError, match=message):
        ewa.to_moe(model, **kwargs)
    assert repr(model) == text and (model._model_args, model.pretrained_cfg) == args
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_failure_half_way_leaves_the_model_as_it_was(tiny):
    made = []

    def factory(experts):
        if made:
            raise RuntimeError('out of memory')
        made.append(RandomPartitionMoE(experts))
        return made[0]

    model = tiny()
    before, text = deepcopy(model.state_dict()), repr(model)
    args = dict(model._model_args), dict(model.pretrained_cfg)
    with pytest.raises(RuntimeError, match='out of memory'):
        ewa.to_moe(model, router=factory)
    assert made and repr(model) == text and (model._model_args, model.pretrained_cfg) == args
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize('tie', ['parameter', 'data'])
def test_ffns_that_share_parameters_are_refused(tiny, tie):
    model = tiny()
    if tie == 'parameter':
        model.blocks[3].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    else:
        model.blocks[3].mlp.fc1.weight.data = model.blocks[1].mlp.fc1.weight.data
    text = repr(model)
    with pytest.raises(ValueError, match='blocks.1.mlp.fc1.weight and blocks.3.mlp.fc1.weight are one parameter'):
        ewa.to_moe(model)
    assert repr(model) == text
    ewa.to_moe(model, layers=[0])
    model = tiny()
    model.blocks[3].mlp.fc1 = model.blocks[1].mlp.fc1
    with pytest.raises(ValueError, match='blocks.1.mlp.fc1 is used in several places of the model, so blocks.1'):
        ewa.to_moe(model)
    model = tiny()
    model.blocks[3].mlp.act = model.blocks[1].mlp.act
    ewa.to_moe(model)


def test_ffns_that_were_compiled_by_themselves_are_refused(tiny):
    model = tiny()
    model.blocks[1].mlp = torch.compile(model.blocks[1].mlp, backend='eager')
    text = repr(model)
    for layers in ('every:2', ['blocks.1.mlp']):
        with pytest.raises(ValueError, match=r'blocks.1.mlp can.t become a MoE layer: it is compiled by itself'):
            ewa.to_moe(model, layers=layers)
    assert repr(model) == text


@pytest.mark.parametrize('where, hook', [
    ('it', lambda ffn: ffn.register_forward_hook(lambda module, args, out: 2 * out)),
    ('act', lambda ffn: ffn.act.register_forward_pre_hook(lambda module, args: None)),
    ('fc2', lambda ffn: ffn.fc2.register_full_backward_hook(lambda module, inputs, outputs: None)),
    ('fc1.weight', lambda ffn: ffn.fc1.weight.register_hook(lambda gradient: gradient / 2)),
])
def test_ffns_with_hooks_are_refused(tiny, where, hook):
    model = tiny()
    handle = hook(model.blocks[3].mlp)
    with pytest.raises(ValueError, match=f'^blocks.3.mlp: {where} has hooks, .* again after ewa.to_moe'):
        ewa.to_moe(model)
    assert not list(moe_layers(model))
    handle.remove()
    ewa.to_moe(model)


class Checkpointed(timm.layers.Mlp):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize('checkpointed', [False, True])
def test_in_mean_form_ffns_that_run_again_in_the_backward_pass_are_refused(tiny, checkpointed):
    model = tiny(proj_drop_rate=.5)
    if checkpointed:
        model.blocks[3].mlp = Checkpointed(32, 128)
        with pytest.raises(ValueError, match="^blocks.3.mlp runs its forward pass again .* or use form='experts'"):
            ewa.to_moe(model, form='mean')
    ewa.to_moe(model, form='experts' if checkpointed else 'mean')


def test_ffns_inside_one_another_are_refused(tiny):
    model = tiny()
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp)
    for layers in (['blocks.1.mlp', 'blocks.1.mlp.0'], ['blocks.1.mlp.0', 'blocks.1.mlp']):
        with pytest.raises(ValueError, match='blocks.1.mlp.0 is part of blocks.1.mlp; give one of them'):
            ewa.to_moe(model, layers=layers)
    assert not list(moe_layers(model))


def test_models_that_were_wrapped_for_several_processes_are_refused(tiny):
    class DistributedDataParallel(nn.Sequential):  # known by its name, so that torch may be built without it
        pass

    for wrapped, where in ((DistributedDataParallel(tiny()), 'The model'),
                           (nn.Sequential(DistributedDataParallel(tiny())), '0')):
        with pytest.raises(ValueError, match=f'^{where} was wrapped already .DistributedDataParallel.*to_moe before'):
            ewa.to_moe(wrapped)
        assert not list(moe_layers(wrapped))


class Halved(RandomPartitionMoE):
    def forward(self, x):
        return super().forward(x) / 2


class TestRouters:
    def test_a_factory_makes_the_layers(self, tiny, images):
        model = ewa.to_moe(tiny(), 3, router=Halved, init='independent')
        layers = [layer for _, layer in moe_layers(model)]
        assert [type(layer) for layer in layers] == [Halved] * 2 and len(layers[0].experts) == 3
        assert model._model_args['router'] == 'Halved'
        x = torch.randn(2, 5, 32)
        expected = fuse_experts(layers[0].experts)(x) / 2
        torch.testing.assert_close(layers[0].eval()(x), expected)

    def test_a_registered_name_serves_timm_too(self, monkeypatch, tmp_path):
        monkeypatch.setattr(ewa.moe, 'ROUTERS', dict(ewa.moe.ROUTERS))
        monkeypatch.setattr(ewa.upcycle, 'ROUTERS', ewa.moe.ROUTERS)
        ewa.moe.register_router('halved', Halved)
        ewa.moe.register_router('halved', Halved)  # again by the same module: nothing changes
        with pytest.raises(ValueError, match="a router 'random' already: RandomPartitionMoE"):
            ewa.moe.register_router('random', Halved)
        model = timm.create_model('vit_ewa', host='test_vit', router='halved', num_experts=2)
        assert type(next(moe_layers(model))[1]) is Halved
        write_folder(model, tmp_path / 'moe')
        assert type(next(moe_layers(ewa.load(tmp_path / 'moe')))[1]) is Halved

    def test_gated_options_are_refused_for_other_layers(self, tiny):
        with pytest.raises(ValueError, match='neither shared nor fine-grained experts'):
            ewa.to_moe(tiny(), router=Halved, num_shared=1)

    @pytest.mark.parametrize('given, words', [
        (dict(top_k=3), "top_k=3 does nothing with router='random'.* router='topk'"),
        (dict(spread=.5), "spread=0.5 does nothing with form='experts'.* form='mean'")])
    def test_options_in_vain_are_refused(self, tiny, given, words):
        with pytest.raises(ValueError, match=words):
            ewa.to_moe(tiny(), **given)


def test_a_converted_model_is_refused(tiny):
    model = ewa.to_moe(tiny())
    text = repr(model)
    with pytest.raises(ValueError, match=r'already has MoE layers \(.*\): blocks.1.mlp, blocks.3.mlp. Convert'):
        ewa.to_moe(model, layers=[0])
    assert repr(model) == text
    ensemble = tiny()
    ensemble.experts = nn.ModuleList([ensemble.head])
    with pytest.raises(ValueError, match=r'holds an nn.ModuleList called experts\): VisionTransformer. Convert'):
        ewa.to_moe(ensemble)


def test_a_model_without_ffns_is_refused(tiny):
    with pytest.raises(ValueError, match='ResNet has no FFN to convert'):
        ewa.to_moe(timm.create_model('test_resnet'))
    with pytest.raises(ValueError, match='has no FFN'):  # one fused projection for attention and FFN
        ewa.to_moe(tiny('vit_base_patch16_xp_224'))


def test_a_norm_over_the_hidden_units_is_not_cut(tiny):
    model = tiny('eva02_base_patch14_224', mlp_ratio=4)
    with pytest.raises(ValueError, match='blocks.1.mlp has a norm over its hidden units'):
        ewa.to_moe(model, router='topk', expert_ratio=.5)
    assert not list(moe_layers(model))


def test_any_module_with_ffns_will_do():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = timm.layers.Mlp(8, 16)

        def forward(self, x):
            return x + self.ffn(x)

    model = nn.ModuleDict(dict(a=Block(), b=Block()))
    with pytest.raises(ValueError, match='no numbered blocks.*There are: a.ffn, b.ffn'):
        ewa.to_moe(model)
    ewa.to_moe(model, layers=['b.ffn'])
    assert isinstance(model['b'].ffn, RandomPartitionMoE) and not list(moe_layers(model['a']))
    model = nn.Sequential(Block(), Block())
    ewa.to_moe(model)
    assert isinstance(model[1].ffn, RandomPartitionMoE) and not list(moe_layers(model[0]))


@pytest.mark.parametrize('form', ['experts', 'mean'])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_models_are_converted_where_nothing_is_differentiated(tiny, monkeypatch, mode, form):
    monkeypatch.setattr('ewa.ffn._TRIED', {})
    with mode():
        model = ewa.to_moe(tiny(), form=form).eval()
        assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
