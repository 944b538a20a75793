from copy import deepcopy

import pytest
import torch
from torch import nn

import ewa
import reference
from ewa.moe import moe_layers
from test_upcycle import HOSTS


@pytest.mark.parametrize('name, kwargs', [host[:2] for host in HOSTS], ids=[host[0] for host in HOSTS])
def test_average_computes_what_the_model_does_in_eval(tiny, images, name, kwargs):
    model = ewa.to_moe(tiny(name, **kwargs), init='independent').eval()
    vit = ewa.to_dense(model)
    assert torch.equal(vit(images), model(images))
    dense = tiny(name, **kwargs)
    assert type(vit) is type(dense) and repr(vit) == repr(dense.eval())
    assert [(key, value.shape) for key, value in vit.state_dict().items()] == [
        (key, value.shape) for key, value in dense.state_dict().items()]


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('router', ['random', 'topk'])
def test_average_is_the_mean_and_leaves_the_input_as_it_was(tiny, images, mode, router):
    model = ewa.to_moe(tiny(), router=router, init='independent').train(mode)
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


def test_half_precision(tiny, images):
    model = ewa.to_moe(tiny(), init='independent').bfloat16().eval()
    vit = ewa.to_dense(model)
    assert vit.blocks[1].mlp.fc1.weight.dtype == torch.bfloat16
    assert torch.equal(vit(images.bfloat16()), model(images.bfloat16()))


def test_a_dense_model_is_refused(tiny):
    with pytest.raises(ValueError, match='has no MoE layer: it is dense already'):
        ewa.to_dense(tiny())
