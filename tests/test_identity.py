import pytest
import timm
import torch
from accelerate.utils import convert_outputs_to_fp32

import ewa
from ewa.identity import architecture, describe_dense, describe_moe, plain_forward


def test_a_described_moe_is_built_again_by_timm(tiny):
    model = ewa.to_moe(tiny(), num_experts=3, layers=[0, 3], router='topk', num_shared=1, expert_ratio=.5)
    assert architecture(model) == 'vit_ewa' and model._model_args['host'] == 'vit_tiny_patch16_224'
    again = timm.create_model(architecture(model), **model._model_args)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_describing_a_model_as_dense_undoes_describing_it_as_moe(tiny):
    model = tiny()
    args, cfg = dict(model._model_args), dict(model.pretrained_cfg)
    describe_moe(model, dict(num_experts=2, layers='all'))
    assert model._model_args != args and architecture(model) == 'vit_ewa'
    assert not any(model.pretrained_cfg.get(key) for key in ('url', 'hf_hub_id', 'tag', 'license'))
    describe_dense(model, ['num_experts', 'layers', 'router'])
    assert model._model_args == args and architecture(model) == 'vit_tiny_patch16_224'
    assert model.pretrained_cfg['input_size'] == cfg['input_size'] and model.default_cfg == model.pretrained_cfg


def test_a_model_that_timm_does_not_know_is_left_without_a_description():
    model = torch.nn.Linear(2, 2)
    describe_moe(model, dict(num_experts=2))
    describe_dense(model, ['num_experts'])
    assert architecture(model) == '' and not hasattr(model, '_model_args') and not hasattr(model, 'pretrained_cfg')


def test_a_width_that_no_architecture_has_is_refused(tiny):
    model = ewa.to_moe(tiny(), layers='every:2', router='topk', num_experts=4, expert_ratio=.5)
    with pytest.raises(ValueError, match=r'blocks\.1\.mlp would get another hidden width than blocks\.0\.mlp'):
        ewa.to_dense(model, k=3)
    wide = ewa.to_dense(ewa.to_moe(tiny(), layers='all', router='topk', num_experts=4, expert_ratio=.5), k=3)
    again = timm.create_model(architecture(wide), **wide._model_args)
    assert again.blocks[0].mlp.fc1.out_features == wide.blocks[0].mlp.fc1.out_features == 1.5 * 4 * 32


def test_the_forward_of_mixed_precision_is_taken_off(tiny, images):
    model = tiny().eval()
    expected = model(images)
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast('cpu', dtype=torch.bfloat16)(model.forward))
    assert not torch.equal(model(images), expected)
    plain_forward(model)
    assert torch.equal(model(images), expected) and 'forward' not in vars(model)
