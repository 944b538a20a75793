import subprocess
import sys
from copy import deepcopy
from types import MethodType

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.layers import Mlp
from torch import nn

import ewa
import gathering_reference
import reference
from ewa import refit
from ewa.calibration import hold_out, sensitivities
from ewa.dense import group_similar
from ewa.exporting import write_folder
from ewa.ffn import read_ffn
from ewa.gathering import METHODS
from ewa.moe import fuse_experts, moe_layers
from gated import GLU, foreign, gated, hide, make_equal, permute, scatter, sequences
from test_upcycle import HOSTS, SWIN

LAYOUTS = {  # the FFNs of timm
    'Mlp': 'vit_tiny_patch16_224', 'GluMlp': GLU, 'SwiGLUPacked': 'vit_giant_patch14_dinov2',
    'SwiGLU with norm': 'eva02_base_patch14_224',
}
NEEDS_DATA = [method.name for method in METHODS.values() if method.needs_data]
WHOLE = dict(svd_kg=dict(share=1.))  # options with which one expert stays what it is
FROM_WEIGHTS = [method.name for method in METHODS.values() if method.kind != 'fit']
FINE = dict(router='topk', num_experts=8, expert_ratio=.25, num_shared=1, top_k=3)


@pytest.mark.parametrize('form', ['experts', 'mean'])
@pytest.mark.parametrize('name, kwargs', [host[:2] for host in HOSTS], ids=[host[0] for host in HOSTS])
def test_average_computes_what_the_model_does_in_eval(tiny, images, name, kwargs, form):
    model = ewa.to_moe(tiny(name, **kwargs), init='independent', form=form).eval()
    vit = ewa.to_dense(model)
    assert torch.equal(vit(images), model(images))
    dense = tiny(name, **kwargs)
    assert type(vit) is type(dense) and repr(vit) == repr(dense.eval())
    assert [(key, value.shape) for key, value in vit.state_dict().items()] == [
        (key, value.shape) for key, value in dense.state_dict().items()]


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('kwargs', [dict(), dict(form='mean'), dict(router='topk')])
def test_average_is_the_mean_and_leaves_the_input_as_it_was(tiny, images, mode, kwargs):
    model = ewa.to_moe(tiny(), init='independent', **kwargs).train(mode)
    model.blocks[0].eval()
    model(images)  # a gated layer then holds losses
    before, text = deepcopy(model.state_dict()), repr(model)
    modes = [module.training for module in model.modules()]
    described = deepcopy((model._model_args, model.pretrained_cfg))

    vit = ewa.to_dense(model)
    for name, layer in moe_layers(model):
        for key, value in vit.get_submodule(name).state_dict().items():
            mean = reference.mean([expert.state_dict()[key] for expert in layer.experts])
            torch.testing.assert_close(value.double(), mean, atol=1e-7, rtol=0)
    assert vit.training == mode and vit.blocks[1].mlp.training == mode and not vit.blocks[0].training
    assert not list(moe_layers(vit))

    with torch.no_grad():
        for p in vit.parameters():
            p.zero_()
    assert repr(model) == text and [module.training for module in model.modules()] == modes
    assert (model._model_args, model.pretrained_cfg) == described
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_copies_come_back_as_the_dense_model_to_the_bit(tiny):
    vit = ewa.to_dense(ewa.to_moe(tiny(), num_experts=3, layers='all', init='copy'))
    assert all(torch.equal(value, vit.state_dict()[key]) for key, value in tiny().state_dict().items())
    assert vit._model_args == tiny()._model_args
    assert vit.pretrained_cfg['architecture'] == tiny().pretrained_cfg['architecture']


def test_experts_and_their_mean_after_the_largest_pull_are_one(tiny, images):
    model = ewa.to_moe(tiny(), init='independent').eval()
    vit = ewa.to_dense(model)
    ewa.ExpertAverager(model, .75).step()
    torch.testing.assert_close(model(images), vit(images))
    for _, layer in moe_layers(model):
        x = torch.randn(5, 32)
        assert all(torch.equal(expert(x), layer(x)) for expert in layer.experts)


def test_dense_models_can_be_converted_again(tiny, images):
    vit = ewa.to_dense(ewa.to_moe(tiny(), init='independent')).eval()
    model = ewa.to_moe(deepcopy(vit), init='copy')
    assert torch.equal(model(images), vit(images))


def test_wrappers_are_taken_off(tiny, images):
    model = ewa.to_moe(tiny(), init='independent').eval()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        vit = ewa.to_dense(wrapped)
        assert type(vit) is type(model) and torch.equal(vit(images), model(images))


@pytest.mark.parametrize('form', ['experts', 'mean'])
def test_parts_that_were_compiled_by_themselves_come_back_vanilla(tiny, images, tmp_path, form):
    model = ewa.to_moe(tiny(depth=2), layers='all', init='independent', form=form)
    for block in model.blocks:
        block.mlp = torch.compile(block.mlp, backend='eager')
    model.blocks[1] = torch.compile(model.blocks[1], backend='eager')
    assert len(list(moe_layers(model))) == 2  # the averager pulls none of them twice
    dense = ewa.to_dense(model.eval())
    assert list(dense.state_dict()) == list(tiny(depth=2).state_dict())
    assert dense.conversion['layers'] == ['blocks.0.mlp', 'blocks.1.mlp']
    with torch.no_grad():
        assert torch.equal(dense(images), model(images))
    ewa.export(dense, tmp_path / 'vit')


def test_models_without_values_or_that_torch_cant_copy_are_refused(tiny, images):
    with torch.device('meta'):
        model = ewa.to_moe(tiny())
    with pytest.raises(ValueError, match='blocks.1.mlp: experts.0.fc1.weight is on the meta device'):
        ewa.to_dense(model)
    model = ewa.to_moe(tiny())
    torch.nn.utils.prune.l1_unstructured(model.head, 'weight', .5)
    model(images)
    with pytest.raises(ValueError, match='VisionTransformer can.t be copied: .*deepcopy'):
        ewa.to_dense(model)
    for form in ('experts', 'mean'):
        model = ewa.to_moe(tiny(), form=form)
        layer = model.blocks[1].mlp
        (layer.mean if form == 'mean' else layer.experts[0]).kept = model(images)
        with pytest.raises(ValueError, match='blocks.1.mlp: Mlp can.t be copied: .*deepcopy'):
            ewa.to_dense(model)


class Unchanging(nn.Sequential):
    def __deepcopy__(self, memo):
        return Unchanging(*self)


def test_copies_that_hold_on_to_the_model_are_refused(tiny, images):
    model = ewa.to_moe(tiny())
    with pytest.raises(ValueError, match='Unchanging has a __deepcopy__ of its own that keeps MoE layers'):
        ewa.to_dense(Unchanging(model))
    for part, where in ((model.blocks[0], 'blocks.0'), (model, 'VisionTransformer')):
        part.forward = lambda x, forward=part.forward: 2 * forward(x)
        with pytest.raises(ValueError, match=f'The forward of {where} was replaced by a function, which belongs to'):
            ewa.to_dense(model)
        forward = type(part).forward
        part.forward = MethodType(lambda self, x, forward=forward: 2 * forward(self, x), part)
    dense = ewa.to_dense(model.eval())
    expected = model(images)
    for p in model.parameters():
        p.detach().zero_()
    assert torch.equal(dense(images), expected)


def test_hooks_of_layers_are_left_behind_with_a_word(tiny, images):
    model = ewa.to_moe(tiny()).eval()
    handle = model.blocks[3].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(UserWarning, match='Hooks of blocks.3.mlp stay with the MoE model'):
        dense = ewa.to_dense(model)
    handle.remove()
    assert torch.equal(dense(images), model(images))


def test_forward_of_mixed_precision_is_left_behind(tiny, images, tmp_path):
    model = ewa.to_moe(tiny(), init='independent').eval()
    expected = ewa.to_dense(model)(images)
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared = Accelerator(mixed_precision='bf16', cpu=True).prepare(model)
    assert not torch.equal(prepared(images), expected)
    vit = ewa.to_dense(prepared)
    assert torch.equal(vit(images), expected)
    ewa.export(vit, tmp_path / 'vit')
    write_folder(prepared, tmp_path / 'moe')
    # a forward of the user's own goes along
    own = ewa.to_moe(tiny(), init='independent').eval()
    own.forward = MethodType(lambda self, x: type(self).forward(self, 2 * x), own)
    assert torch.equal(ewa.to_dense(own)(images), own(images))
    assert '_original_forward' in vars(prepared)  # which stays as it was
    AcceleratorState._reset_state(reset_partial_state=True)


def test_half_precision(tiny, images):
    model = ewa.to_moe(tiny(), init='independent').bfloat16().eval()
    vit = ewa.to_dense(model)
    assert vit.blocks[1].mlp.fc1.weight.dtype == torch.bfloat16
    assert torch.equal(vit(images.bfloat16()), model(images.bfloat16()))


def test_a_dense_model_is_refused(tiny):
    with pytest.raises(ValueError, match='has no MoE layer: it is dense already'):
        ewa.to_dense(tiny())


# gated models, experts as wide as the dense FFN


def assert_ffn(ffn, expected, message):
    actual = reference.ffn_weights(ffn)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-5, msg=f'{message}: {name}')


@pytest.mark.parametrize('name', LAYOUTS.values(), ids=LAYOUTS)
def test_every_method_equals_its_reference_on_random_experts(tiny, images, name):
    model = gated(tiny(name, mlp_ratio=(12.1 if 'giant' in name else 6.1) / 32), top_k=2)  # 6 hidden units, 4 experts
    rescaled = METHODS['sum'].options
    options = {
        method: [{}] + [{'rescale': True}] * (METHODS[method].options[:1] == rescaled) for method in FROM_WEIGHTS}
    options['aligned'] += [dict(reference=2)]
    options['prune'] += [dict(score='norm')]
    options['do_acp'] += [dict(lam=0.)]
    for key, layer in moe_layers(model):
        tokens = reference.inputs_of(model, layer, [images])
        seen = reference.usage(tokens, layer.experts, tokens @ layer.router.weight.T, 2)
        experts = [{k: v.double() for k, v in reference.ffn_weights(e).items()} for e in layer.experts]
        assert experts[0]['up'].shape[1] == 6
        acp = [p * seen['second_moment'][e][e] ** .5 for e, p in enumerate(seen['probability'])]

        def expected(method, rescale=False, reference=0, score='usage', lam=None):
            if method in ('average', 'usage'):
                return gathering_reference.average(experts, seen['counts'] if method == 'usage' else None)
            if method == 'aligned':
                return gathering_reference.aligned(experts, reference)
            if method == 'prune':
                return experts[max(range(4), key=seen['counts' if score == 'usage' else 'contribution'].__getitem__)]
            if method == 'do_acp':
                moment = torch.tensor(seen['second_moment'], dtype=torch.float64)
                return experts[gathering_reference.do_acp_select(acp, moment, 1, lam)[0]]
            return dict(sum=gathering_reference.total, top_kg=gathering_reference.top_kg,
                        svd_kg=gathering_reference.svd_kg)[method](experts, rescale)

        for method, choices in options.items():
            for kwargs in choices:
                vit = ewa.to_dense(model, method, [images], **kwargs)
                assert_ffn(vit.get_submodule(key), expected(method, **kwargs), (key, method, kwargs))


@pytest.mark.parametrize('method, name', [
    *((method, GLU) for method in METHODS), *(('top_kg', name) for name in LAYOUTS.values() if name != GLU)])
def test_every_method_makes_the_vanilla_model(tiny, images, tmp_path, method, name):
    model = gated(tiny(name, depth=2))
    vit = ewa.to_dense(model, method, [images]).eval()
    assert repr(vit) == repr(tiny(name, depth=2).eval()) and vit._model_args == tiny(name, depth=2)._model_args
    ewa.export(vit, tmp_path / 'vit')
    loaded = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    assert type(loaded).__module__.startswith('timm.') and torch.equal(loaded(images), vit(images))


@pytest.mark.parametrize('name, kwargs', [
    ('vit_tiny_patch16_224', {}), (GLU, {}), ('swin_tiny_patch4_window7_224', SWIN)])
@pytest.mark.parametrize('top_k', [1, 2])
def test_average_of_equal_experts_is_the_gated_model(tiny, images, name, kwargs, top_k):
    model = gated(tiny(name, **kwargs), top_k=top_k)
    assert not torch.allclose(ewa.to_dense(model)(images), model(images), atol=1e-2)
    for _, layer in moe_layers(model):
        make_equal(layer)
    for method in ('average', 'usage', 'aligned', 'prune', 'do_acp'):
        torch.testing.assert_close(ewa.to_dense(model, method, [images])(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', GLU])
def test_aligned_finds_permuted_copies(tiny, images, name):
    model = gated(tiny(name))
    for _, layer in moe_layers(model):
        make_equal(layer, permute)
    for index in (0, 3):
        vit = ewa.to_dense(model, 'aligned', reference=index)
        torch.testing.assert_close(vit(images), model(images), rtol=1e-5, atol=1e-5)
        for key, layer in moe_layers(model):
            for mine, expert in zip(vit.get_submodule(key).parameters(), layer.experts[index].parameters()):
                assert torch.equal(mine, expert)
    assert not torch.allclose(ewa.to_dense(model)(images), model(images), atol=1e-2)


@pytest.mark.parametrize('method', FROM_WEIGHTS)
def test_one_expert_is_reproduced(method):
    model = foreign(hidden=(12,), top_k=1)
    x = sequences()[0]
    dense = ewa.to_dense(model, method, sequences(), **WHOLE.get(method, {}))
    torch.testing.assert_close(dense(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_input_of_methods_with_data_stays_as_it_was(tiny, images):
    model = gated(tiny()).train()
    before, text = deepcopy(model.state_dict()), repr(model)
    with torch.no_grad():
        for p in ewa.to_dense(model, 'prune', [images]).parameters():
            p.zero_()
    assert repr(model) == text and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_conversion_is_on_record(tiny, images):
    model = gated(tiny())
    batches = (images[i:i + 1] for i in range(3))
    assert ewa.to_dense(model, 'prune', batches, score='norm').conversion == dict(
        method='prune', score='norm', num_experts=4, layers=['blocks.1.mlp', 'blocks.3.mlp'], router='topk',
        calibration_tokens=51)
    assert 'calibration_tokens' not in ewa.to_dense(model, 'average', [images]).conversion
    assert ewa.to_dense(gated(tiny(), layers='all'), k=2).conversion['k'] == 2


def test_a_wider_model_has_the_classes_that_its_classifier_has_now(tiny, tmp_path):
    model = gated(tiny(), layers='all')
    model.reset_classifier(7)
    ewa.export(ewa.to_dense(model, k=2), tmp_path / 'vit')
    vit = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True)
    assert vit.num_classes == vit.head.out_features == 7 and vit.blocks[0].mlp.fc1.out_features == 256


# dead experts


def test_experts_that_nobody_chooses_get_no_weight(tiny, images):
    model = gated(tiny(), top_k=1, layers=[1])
    layer = model.blocks[1].mlp
    hide(layer, 0)
    before = {method: ewa.to_dense(model, method, [images]) for method in ('usage', 'prune', 'do_acp')}
    scatter(layer.experts[0], std=9.)
    for method, vit in before.items():
        after = ewa.to_dense(model, method, [images])
        for a, b in zip(vit.parameters(), after.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=method)
    for score in ('usage', 'norm'):
        kept = ewa.to_dense(model, 'prune', [images], score=score).blocks[1].mlp.fc1.weight
        assert not torch.equal(kept, layer.experts[0].fc1.weight)


def test_a_group_that_nobody_chooses_has_no_share(tiny, images):
    model = gated(tiny(), layers=[1], top_k=1, **{k: v for k, v in FINE.items() if k not in ('router', 'top_k')})
    layer = model.blocks[1].mlp
    make_equal(layer, lambda expert: scatter(expert, std=.01))
    scatter(layer.experts[5], std=9.)  # far from all others: a group of its own
    hide(layer, 5)
    vit = ewa.to_dense(model, 'usage', [images])
    assert all(torch.isfinite(p).all() for p in vit.parameters())
    columns = vit.blocks[1].mlp.fc2.weight.split(32, dim=1)
    assert [bool((column == 0).all()) for column in columns].count(True) == 1


# shared and fine-grained experts


def zero_router(model):
    with torch.no_grad():
        for _, layer in moe_layers(model):
            layer.router.weight.zero_()
    return model


@pytest.mark.parametrize('method, num_shared, name, pieces', [
    *((method, 1, 'vit_tiny_patch16_224', 4) for method in FROM_WEIGHTS), ('average', 0, 'vit_tiny_patch16_224', 4),
    ('average', 0, GLU, 5), ('do_acp', 2, GLU, 5), ('average', 1, 'vit_giant_patch14_dinov2', 5)])
def test_all_experts_at_constant_gates_are_the_model(tiny, images, tmp_path, method, num_shared, name, pieces):
    model = zero_router(gated(
        tiny(name, depth=2), layers='all', num_experts=6, top_k=6, num_shared=num_shared, expert_ratio=1 / pieces))
    vit = ewa.to_dense(model, method, [images], k=6, **WHOLE.get(method, {})).eval()
    torch.testing.assert_close(vit(images), model(images), rtol=1e-5, atol=1e-5)
    hidden = tiny(name).blocks[0].mlp.fc2.in_features // pieces * (6 + num_shared)
    assert vit.blocks[1].mlp.fc2.in_features == hidden
    ewa.export(vit, tmp_path / 'vit')
    loaded = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    assert repr(loaded) == repr(vit) and torch.equal(loaded(images), vit(images))


def test_another_width_loads_where_ewa_is_not_installed(tiny, images, tmp_path):
    vit = ewa.to_dense(gated(tiny(depth=2), layers='all', **FINE), k=5).eval()
    ewa.export(vit, tmp_path / 'vit')
    torch.save((images, vit(images).detach()), tmp_path / 'expected.pt')
    script = """if True:
        import sys
        sys.modules['ewa'] = None
        import timm, torch
        torch.set_num_threads(1)
        images, logits = torch.load('expected.pt')
        model = timm.create_model('local-dir:vit', pretrained=True).eval()
        assert model.blocks[0].mlp.fc1.out_features == 192 and torch.equal(model(images), logits)
        """
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('renormalise', [True, False])
@pytest.mark.parametrize('method, k', [
    ('average', None), ('usage', None), ('aligned', 2), ('sum', 5), ('prune', None), ('do_acp', 4)])
def test_ffn_is_the_shared_experts_beside_scaled_routed_ones(tiny, images, method, k, renormalise):
    model = gated(tiny(mlp_ratio=.75), layers='all', renormalise=renormalise, **FINE)  # 6 hidden units an expert
    vit = ewa.to_dense(model, method, [images], k=k)
    for key, layer in moe_layers(model):
        tokens = reference.inputs_of(model, layer, [images])
        seen = reference.usage(tokens, layer.experts, tokens @ layer.router.weight.T, 3, renormalise)
        mass = 1 if renormalise else seen['mass']
        assert mass < .9 or renormalise
        experts = [{n: v.double() for n, v in reference.ffn_weights(e).items()} for e in layer.experts]
        count = k or 3
        if method == 'prune':
            groups = [[e] for e in sorted(range(8), key=lambda e: -seen['counts'][e])[:count]]
        elif method == 'do_acp':
            acp = [p * seen['second_moment'][e][e] ** .5 for e, p in enumerate(seen['probability'])]
            moment = torch.tensor(seen['second_moment'], dtype=torch.float64)
            groups = [[e] for e in gathering_reference.do_acp_select(acp, moment, count)]
        else:
            groups = reference.group_similar([
                torch.cat([value.flatten() for name, value in expert.items() if name != 'down_bias'])
                for expert in experts], count)
        expected = sum(expert(tokens).double() for expert in layer.shared)
        for group in groups:
            members = [experts[e] for e in group]
            merged = gathering_reference.average(members)
            scale = mass * (len(group) / 8 if method in ('average', 'sum', 'aligned') else 1 / count)
            if method == 'usage':
                counts = [seen['counts'][e] for e in group]
                scale = mass * sum(counts) / sum(seen['counts'])
                merged = gathering_reference.average(members, counts) if sum(counts) else merged
            elif method == 'sum':
                merged = gathering_reference.total(members)
            elif method == 'aligned':
                merged = gathering_reference.aligned(members)
            expected = expected + scale * gathering_reference.forward(merged, tokens.double())
        assert len(groups) == count and vit.get_submodule(key).fc1.out_features == 6 * (count + 1)
        torch.testing.assert_close(vit.get_submodule(key)(tokens).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('method', ['average', 'sum', 'aligned', 'do_acp'])
def test_default_number_of_routed_experts_makes_the_vanilla_width(tiny, images, tmp_path, method):
    model = gated(tiny(), **FINE)
    vit = ewa.to_dense(model, method, [images])
    assert repr(vit) == repr(tiny().eval()) and vit._model_args == tiny()._model_args
    shared = model.blocks[1].mlp.shared[0]
    assert torch.equal(vit.blocks[1].mlp.fc1.weight[:32], shared.fc1.weight)  # whole and unscaled
    assert torch.equal(vit.blocks[1].mlp.fc2.weight[:, :32], shared.fc2.weight)
    ewa.export(vit, tmp_path / 'vit')


def test_hosts_that_were_not_made_by_timms_factory(images):
    host = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    model = gated(host, layers='all', **FINE)
    assert ewa.to_dense(model).blocks[0].mlp.fc1.out_features == 128
    assert ewa.to_dense(model, k=1).blocks[0].mlp.fc1.out_features == 64


def test_similar_experts_are_grouped():
    torch.manual_seed(0)
    experts = [Mlp(4, 5) for _ in range(7)]
    ffns = [read_ffn(expert) for expert in experts]
    vectors = [ffn.units().flatten() for ffn in ffns]
    for k in range(1, 8):
        assert group_similar(ffns, k) == reference.group_similar(vectors, k)
    experts[4].load_state_dict(experts[1].state_dict())
    experts[6].load_state_dict(experts[3].state_dict())
    assert group_similar([read_ffn(expert) for expert in experts], 5) == [[0], [1, 4], [2], [3, 6], [5]]


# layers that are not ours


@pytest.mark.parametrize('shared', [0, 1])
@pytest.mark.parametrize('method', FROM_WEIGHTS)
def test_layers_that_are_not_ours(method, shared):
    model = foreign(shared=shared)
    vit = ewa.to_dense(model, method, sequences(), k=1 if shared else None)
    assert type(vit.moe) is Mlp and vit.moe.fc1.out_features == 12 * (1 + shared)
    for expert in model.moe.experts[1:]:
        expert.load_state_dict(model.moe.experts[0].state_dict())
    x = sequences()[0]
    vit = ewa.to_dense(model, method, sequences(), k=1 if shared else None)
    if method not in ('sum', 'top_kg', 'svd_kg'):  # these count what experts have in common several times
        torch.testing.assert_close(vit(x), model(x), rtol=1e-5, atol=1e-5)
    assert type(model.moe).__name__ == 'HandMadeMoE'


def test_experts_of_an_unknown_layout_can_be_averaged_only(images):
    class Linears(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def fuse(self):
            return fuse_experts(self.experts)

    model = nn.Sequential(Linears())
    mean = reference.mean([expert.weight.detach() for expert in model[0].experts])
    torch.testing.assert_close(ewa.to_dense(model)[0].weight.double(), mean, atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match='0: top_kg can.t read experts of type Linear; use average'):
        ewa.to_dense(model, 'top_kg')


@pytest.mark.parametrize('method', METHODS)
def test_a_layer_that_does_not_say_how_it_combines_experts_is_refused(method):
    model = foreign()
    model.moe.gate = model.moe.router
    del model.moe.router
    with pytest.raises(ValueError, match='moe is a HandMadeMoE with experts but no router, so what it computes is not'):
        ewa.to_dense(model, method, sequences())


@pytest.mark.parametrize('method', FROM_WEIGHTS)
def test_experts_of_unequal_width(method):
    model = foreign(hidden=(4, 12, 20))
    if method in ('prune', 'do_acp'):
        vit = ewa.to_dense(model, method, sequences())
        (kept,) = [e for e in model.moe.experts if e.fc1.weight.shape == vit.moe.fc1.weight.shape]
        assert torch.equal(vit.moe.fc1.weight, kept.fc1.weight)
        assert ewa.to_dense(model, method, sequences(), k=3).moe.fc1.out_features == 36
    else:
        for k in (None, 2):
            with pytest.raises(ValueError, match='moe: Experts .*equal.*; prune and do_acp take'):
                ewa.to_dense(model, method, sequences(), k=k)


# refit


def many_images(count=24):
    return list(torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(7))


def many_sequences(count=60):
    return list(torch.randn(count, 6, 5, generator=torch.Generator().manual_seed(2)).split(16))


def errors_of(vit):
    return [error['held_out'] for error in vit.conversion['error'].values()]


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('change', [lambda expert: expert, permute], ids=['equal', 'permuted'])
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', GLU])
def test_refit_of_copies_is_the_gated_model(tiny, images, name, change):
    model = gated(tiny(name), renormalise=True)
    for _, layer in moe_layers(model):
        make_equal(layer, change)
    vit = ewa.to_dense(model, 'refit', many_images(), ridge=1e-8)
    torch.testing.assert_close(vit(images), model(images), rtol=1e-5, atol=1e-5)
    assert max(errors_of(vit)) < 1e-5


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('renormalise', [True, False])
@pytest.mark.parametrize('num_shared, name, pieces', [
    (1, 'vit_tiny_patch16_224', 4), (0, GLU, 5), (2, GLU, 5), (1, 'vit_giant_patch14_dinov2', 5)])
def test_refit_at_constant_gates_is_the_model(tiny, images, num_shared, name, pieces, renormalise):
    model = zero_router(gated(
        tiny(name, depth=2), layers='all', num_experts=6, top_k=6, num_shared=num_shared, expert_ratio=1 / pieces,
        renormalise=renormalise))
    vit = ewa.to_dense(model, 'refit', many_images(60), k=6, ridge=1e-8).eval()
    torch.testing.assert_close(vit(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('name, host, kwargs', [
    ('vit_tiny_patch16_224', {}, dict(top_k=1, renormalise=False)), ('vit_tiny_patch16_224', {}, FINE),
    ('vit_tiny_patch16_224', {}, dict(FINE, renormalise=False, num_shared=2)), (GLU, {}, {}),
    (GLU, {}, dict(FINE, expert_ratio=.2)), ('vit_giant_patch14_dinov2', {}, {}),
    ('swin_tiny_patch4_window7_224', SWIN, {})])
def test_refit_is_closer_to_the_layers_than_every_gathering(tiny, name, host, kwargs):
    model = gated(tiny(name, **host), **kwargs)
    batches = many_images()
    vit = ewa.to_dense(model, 'refit', batches).eval()
    assert repr(vit) == repr(tiny(name, **host).eval())
    first = vit.conversion['layers'][0]
    tokens = reference.inputs_of(model, model.get_submodule(first), batches)
    outputs = model.get_submodule(first)(tokens)
    others = [ewa.to_dense(model, method, batches).get_submodule(first)(tokens) for method in FROM_WEIGHTS]
    error = (vit.get_submodule(first)(tokens) - outputs).norm()
    assert error < .9 * min((other - outputs).norm() for other in others)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_refit_sees_the_errors_of_the_layers_before(tiny):
    model = gated(tiny())
    model.norm = nn.Identity()
    batches = many_images()
    vit = ewa.to_dense(model, 'refit', batches).eval()
    _, held = hold_out(batches)
    assert torch.equal(torch.cat(list(held)), torch.cat(batches)[1::8])
    partly = deepcopy(model)
    partly.blocks[1].mlp = vit.blocks[1].mlp
    tokens = reference.inputs_of(partly, partly.blocks[3].mlp, held)
    own, wanted = (torch.cat([m.forward_features(batch) for batch in held]) for m in (partly, model))
    outputs = model.blocks[3].mlp(tokens)
    outputs = outputs + (wanted - own).flatten(0, 1) / 2  # no norm behind the last block
    changes = (vit.blocks[3].mlp(tokens) - outputs).square().sum(1)
    weights = refit.token_weights(torch.cat(sensitivities(model, held)['blocks.3.mlp']))
    error = float((weights @ changes.double() / (weights @ outputs.square().sum(1).double())).detach().sqrt())
    assert vit.conversion['error']['blocks.3.mlp']['held_out'] == pytest.approx(error, rel=1e-4)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('name, host', [
    ('vit_tiny_patch16_224', {}), ('vit_tiny_patch16_224', dict(init_values=.5)),
    ('swin_tiny_patch4_window7_224', SWIN)])
def test_refit_brings_the_stream_back_to_that_of_the_model(tiny, monkeypatch, name, host):
    model = gated(tiny(name, **host), layers='all')
    batches = many_images(200)
    closer, own = [], torch.cat([model.forward_features(images) for images in batches])
    for toward in (refit.toward, lambda outputs, *args: outputs):
        monkeypatch.setattr(refit, 'toward', toward)
        vit = ewa.to_dense(model, 'refit', batches).eval()
        closer.append((torch.cat([vit.forward_features(images) for images in batches]) - own).norm())
    assert closer[0] < .97 * closer[1]


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_steps_that_bring_nothing_are_named(tiny, monkeypatch):
    model = gated(tiny())
    monkeypatch.setattr('ewa.refit.fit', lambda *args: None)
    plain, same = (ewa.to_dense(model, 'refit', many_images(), steps=steps) for steps in (0, 1))
    assert same.conversion['steps_in_vain'] == same.conversion['layers'] and 'steps_in_vain' not in plain.conversion
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters()))


def test_calibration_images_that_are_one_tensor_are_refused(tiny, images):
    for method in ('refit', 'usage'):
        with pytest.raises(ValueError, match=r'list of batches, got one tensor of shape .*: give \[it\]'):
            ewa.to_dense(gated(tiny()), method, images)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_steps_bring_refit_closer(tiny):
    model = gated(tiny())
    plain, trained = [
        ewa.to_dense(model, 'refit', many_images(), steps=steps).conversion['error'] for steps in (0, 200)]
    assert trained['blocks.1.mlp']['fitted'] < .95 * plain['blocks.1.mlp']['fitted']
    assert trained['blocks.3.mlp']['fitted'] < plain['blocks.3.mlp']['fitted']


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('steps', [dict(), dict(steps=5), dict(joint_steps=5)])
@pytest.mark.parametrize('trainable', [False, True])
def test_refit_gives_the_same_bits_again_and_leaves_the_model_as_it_was(tiny, steps, trainable):
    model = gated(tiny()).train().requires_grad_(trainable)
    model.blocks[0].eval()
    modes, before = [module.training for module in model.modules()], deepcopy(model.state_dict())
    first, second = [ewa.to_dense(model, 'refit', many_images(), **steps) for _ in range(2)]
    assert all(p.requires_grad == trainable and p.grad is None for p in [*model.parameters(), *first.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert [module.training for module in model.modules()] == modes
    assert first.blocks[1].mlp.training and not first.blocks[0].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('frozen', ['nothing', 'all', 'part'])
def test_joint_steps_bring_the_outputs_closer(tiny, frozen):
    model = gated(tiny())
    model.unused = nn.Parameter(torch.ones(3))
    model.requires_grad_(frozen == 'nothing').head.requires_grad_(frozen != 'all')
    plain, trained = [ewa.to_dense(model, 'refit', many_images(), joint_steps=steps) for steps in (0, 120)]
    error = trained.conversion['outputs_error']
    assert error['after'] < .95 * error['before'] and 'outputs_error' not in plain.conversion
    assert 'joint_steps_in_vain' not in trained.conversion
    held = hold_out(many_images())[1]
    with torch.no_grad():
        pairs = [(trained.eval()(images), model.eval()(images)) for images in held]
    ours, theirs = (torch.cat(part) for part in zip(*pairs))
    assert ((ours - theirs).norm() / theirs.norm()).item() == pytest.approx(error['after'], rel=1e-4)
    still = {key for key, value in plain.state_dict().items() if torch.equal(value, trained.state_dict()[key])}
    ffns = {key for key in plain.state_dict() if key.startswith(('blocks.1.mlp', 'blocks.3.mlp', 'head'))}
    assert still == (plain.state_dict().keys() - ffns if frozen == 'part' else {'unused'})
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in trained.parameters()]


def test_joint_steps_that_do_not_help_are_not_taken(tiny):
    model = gated(tiny())
    for layer in (model.blocks[1].mlp, model.blocks[3].mlp):
        for expert in layer.experts:
            expert.load_state_dict(layer.experts[0].state_dict())
    plain, trained = [
        ewa.to_dense(model, 'refit', many_images(200), joint_steps=steps, ridge=1e-8) for steps in (0, 1)]
    error = trained.conversion['outputs_error']
    assert error['before'] < 1e-3 and error['before'] < error['after'] and trained.conversion['joint_steps_in_vain']
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), trained.state_dict().values()))


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_refit_is_on_record(tiny):
    vit = ewa.to_dense(gated(tiny()), 'refit', many_images(), steps=2)
    record = dict(vit.conversion)
    assert record.pop('seconds') > 0
    plain = ewa.to_dense(gated(tiny()), 'refit', many_images()).conversion['error']
    vain = record.pop('steps_in_vain', [])
    assert all((record['error'][name]['fitted'] == plain[name]['fitted']) == (name in vain) for name in plain
               if name == 'blocks.1.mlp')  # the layer after it is fed by it
    assert set(record.pop('error')) == {'blocks.1.mlp', 'blocks.3.mlp'}
    assert record == dict(
        method='refit', steps=2, num_experts=4, layers=['blocks.1.mlp', 'blocks.3.mlp'], router='topk',
        calibration_images=24, calibration_tokens=21 * 17)
    single = ewa.to_dense(gated(tiny()), 'refit', many_images(1)).conversion['error']['blocks.1.mlp']
    assert set(single) == {'fitted'}


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_refit_in_half_precision(tiny):
    model = gated(tiny()).bfloat16()
    batches = [batch.bfloat16() for batch in many_images()]
    for steps in (dict(), dict(steps=3), dict(joint_steps=3)):
        vit = ewa.to_dense(model, 'refit', batches, **steps)
        assert vit.blocks[1].mlp.fc2.weight.dtype == torch.bfloat16 and max(errors_of(vit)) < 1


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_refit_leaves_experts_alone_that_nobody_chooses(tiny):
    model = gated(tiny(), top_k=1, layers=[1])
    layer = model.blocks[1].mlp
    hide(layer, 0)
    hide(layer, 3)
    kept = ewa.to_dense(model, 'refit', many_images()).blocks[1].mlp.fc1.weight

    def rows(weight):
        return {row.tobytes() for row in weight.detach().numpy()}

    assert rows(kept) <= rows(layer.experts[1].fc1.weight) | rows(layer.experts[2].fc1.weight)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('shared', [0, 1])
def test_refit_of_layers_that_are_not_ours(shared):
    model = foreign(shared=shared)
    for expert in model.moe.experts[1:]:
        expert.load_state_dict(model.moe.experts[0].state_dict())
    vit = ewa.to_dense(model, 'refit', many_sequences(), k=1 if shared else None, ridge=1e-8)
    assert type(vit.moe) is Mlp and vit.moe.fc1.out_features == 12 * (1 + shared)
    x = sequences()[0]
    torch.testing.assert_close(vit(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_refit_takes_experts_of_unequal_width():
    model = foreign(hidden=(4, 12, 20))
    for k, hidden in ((None, 20), (2, 32), (3, 36)):
        assert ewa.to_dense(model, 'refit', many_sequences(), k=k).moe.fc1.out_features == hidden


def test_layers_are_taken_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = foreign(), foreign()

        def forward(self, x):
            return self.last(nn.functional.pad(self.first.stem(x) + self.first.moe(self.first.stem(x)), (0, -3)))

    vit = ewa.to_dense(Backwards().eval(), 'refit', many_sequences(), ridge=1e-3)
    assert list(vit.conversion['error']) == ['first.moe', 'last.moe']


class TestRefitRefuses:
    def test_a_norm_over_hidden_units(self, tiny, images):
        with pytest.raises(ValueError, match='blocks.1.mlp: the experts have a norm over .*use average, aligned'):
            ewa.to_dense(gated(tiny('eva02_base_patch14_224')), 'refit', [images])

    def test_ffns_of_an_unknown_kind(self):
        model = foreign()
        model.moe.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        with pytest.raises(ValueError, match='moe: refit can.t read experts of type Linear: use average'):
            ewa.to_dense(model, 'refit', sequences())

    def test_experts_that_compute_differently(self):
        model = foreign()
        model.moe.experts[1].act = nn.ReLU()
        with pytest.raises(ValueError, match='moe: hidden units of unlike experts .*ReLU.*use prune'):
            ewa.to_dense(model, 'refit', sequences())

    def test_a_layer_that_runs_twice(self):
        model = foreign()
        model.head = nn.Sequential(model.moe, model.head)
        with pytest.raises(ValueError, match='moe: the forward pass of Foreign calls it 2 times'):
            ewa.to_dense(model, 'refit', sequences())

    @pytest.mark.parametrize('image', [1, 2], ids=['held out', 'fitted'])
    @pytest.mark.filterwarnings('ignore:.*calibration tokens for')
    def test_images_that_give_no_numbers(self, tiny, image):
        batches = many_images()
        batches[image // 7][image % 7] = float('nan')
        with pytest.raises(ValueError, match='blocks.1.mlp: the calibration images give .*not finite'):
            ewa.to_dense(gated(tiny()), 'refit', batches)

    def test_fewer_tokens_than_unknowns_without_a_ridge(self, tiny, images):
        with pytest.raises(ValueError, match='blocks.1.mlp: 34 calibration tokens do not determine 129 unknowns'):
            ewa.to_dense(gated(tiny()), 'refit', [images], ridge=0.)

    def test_negative_steps(self, tiny, images):
        with pytest.raises(ValueError, match='steps must be >= 0, got -1'):
            ewa.to_dense(gated(tiny()), 'refit', [images], steps=-1)
        with pytest.raises(ValueError, match='joint_steps must be >= 0, got -1'):
            ewa.to_dense(gated(tiny()), 'refit', [images], joint_steps=-1)

    def test_nothing_and_warns_where_tokens_are_few(self, tiny, images):
        with pytest.warns(UserWarning, match='34 calibration tokens for 129 unknowns an output'):
            ewa.to_dense(gated(tiny()), 'refit', [images])


# refusals


@pytest.mark.parametrize('method', NEEDS_DATA)
def test_methods_that_need_data_refuse_without(tiny, method):
    with pytest.raises(ValueError, match=f'{method} needs calibration images.*batches.*--data-dir'):
        ewa.to_dense(gated(tiny()), method)
    with pytest.raises(ValueError, match='has no batches'):
        ewa.to_dense(gated(tiny()), method, [])


def test_raw_gates_of_shared_or_fine_grained_experts_need_data(tiny, images):
    model = gated(tiny(), renormalise=False, **FINE)
    with pytest.raises(ValueError, match='needs calibration images'):
        ewa.to_dense(model)
    assert ewa.to_dense(model, batches=[images]).conversion['calibration_tokens'] == 51


@pytest.mark.parametrize('method, where', [
    *((method, 'experts.2.fc1.weight') for method in METHODS), ('average', 'shared.0.fc2.bias'),
    ('do_acp', 'router.weight')])
def test_weights_that_are_not_finite_are_refused_by_name(tiny, images, method, where):
    model = gated(tiny(), **FINE)
    with torch.no_grad():
        model.blocks[3].mlp.get_parameter(where).view(-1)[3] = float('nan')
    with pytest.raises(ValueError, match=f'blocks.3.mlp: {where} is not finite'):
        ewa.to_dense(model, method, [images])


@pytest.mark.parametrize('method', NEEDS_DATA)
def test_a_random_partition_has_no_usage_to_go_by(tiny, images, method):
    with pytest.raises(ValueError, match=f'{method} looks at how a router uses the experts.*use average'):
        ewa.to_dense(ewa.to_moe(tiny()), method, [images])


@pytest.mark.parametrize('arguments, words', [
    (dict(method='mean'), 'method must be one of refit, average, .*got .mean.'),
    (dict(method='average', rescale=True), 'average has no option .rescale.; it has: k'),
    (dict(method='prune', score='size'), 'blocks.1.mlp: score must be .usage. or .norm., got .size.'),
    (dict(method='aligned', reference=4), r'blocks.1.mlp: reference must be an expert index in \[0, 4\), got 4'),
    (dict(k=0), 'blocks.1.mlp: 0 routed experts .*between 1 and 4'),
    (dict(method='prune', k=5), 'blocks.1.mlp: 5 routed experts .*between 1 and 4'),
    (dict(k=2), 'blocks.1.mlp would get another hidden width than blocks.0.mlp, and no timm .*layers="all"'),
])
def test_mistakes_are_refused(tiny, images, arguments, words):
    with pytest.raises(ValueError, match=words):
        ewa.to_dense(gated(tiny()), batches=[images], **arguments)


def test_more_shared_experts_than_the_vanilla_width_holds(tiny):
    model = gated(tiny(), num_shared=1)
    with pytest.raises(ValueError, match='0 routed experts can.t be kept of 4, beside 1 shared .*give k'):
        ewa.to_dense(model)


def test_a_width_that_the_architecture_has_no_name_for_is_refused(tiny):
    name = 'vit_small_plus_patch16_dinov3'  # its SwiGLU rounds the hidden width to a multiple of 8
    model = gated(tiny(name, depth=2, mlp_ratio=1), layers='all', num_experts=8, expert_ratio=1 / 8)
    with pytest.raises(ValueError, match=f'blocks.0.mlp would have 20 hidden units, and {name} has no mlp_ratio'):
        ewa.to_dense(model, k=5)
    assert ewa.to_dense(model, k=6)._model_args['mlp_ratio'] == 24 / 32


def test_a_norm_over_hidden_units_is_refused_where_ffns_are_put_side_by_side(tiny, images):
    model = gated(tiny('eva02_base_patch14_224'), layers='all')
    with pytest.raises(ValueError, match='blocks.0.mlp: 2 FFNs with a norm over the hidden units can.*Use average'):
        ewa.to_dense(model, 'prune', [images], k=2)


@pytest.mark.filterwarnings('ignore:.*calibration tokens')
@pytest.mark.parametrize('method', ['average', 'aligned', 'usage', 'do_acp', 'refit'])
def test_experts_of_1x1_convolutions_are_gathered_as_those_of_linear_maps(method):
    models = []
    for conv_mlp in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(
            'convnext_tiny', depths=(1, 2, 2, 2), dims=(8, 8, 16, 16), num_classes=10, conv_mlp=conv_mlp)
        models.append(scatter(ewa.to_moe(model, router='topk', top_k=1, renormalise=False)).eval())
    linear, conv = models
    keys = conv.state_dict()
    conv.load_state_dict({key: value.reshape(keys[key].shape) for key, value in linear.state_dict().items()})
    images = torch.randn(8, 3, 32, 32)
    batches = [images] if METHODS[method].needs_data else None
    dense = [ewa.to_dense(model, method, batches=batches) for model in models]
    torch.testing.assert_close(dense[1](images), dense[0](images), rtol=1e-4, atol=1e-4)
