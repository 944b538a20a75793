"""What holds for every host: a model of each family of timm, and models of torchvision and transformers.

The families are those of docs/coverage.md, each by its smallest name; quick ones are made smaller still.
"""
import os
import re
import subprocess
import sys
import warnings
from copy import deepcopy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models import SwinTransformer, VisionTransformer

import ewa
from benchmarks.coverage import BUILT, PAGE, SMALLER, build, random_images, train_step, try_name
from ewa.moe import moe_layers
from gated import scatter

QUICK = {
    'test_vit': {}, 'test_vit3': {}, 'test_vit_relpos': {}, 'test_convnext': {}, 'test_coatnet': {},
    'beit_base_patch16_224': dict(depth=2, embed_dim=32, num_heads=2, img_size=32),
    'swin_tiny_patch4_window7_224': dict(
        img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
    'vit_tiny_patch16_dinov3_qkvb': dict(depth=2, embed_dim=32, num_heads=2, img_size=32),
    'cait_xxs24_224': dict(depth=2, embed_dim=32, num_heads=2, img_size=32),
    'xcit_nano_12_p8_224': dict(depth=2, embed_dim=32, num_heads=2),
    'edgenext_xx_small': {},
}
SLOW = [
    'coat_lite_tiny', 'convformer_s18', 'convit_tiny', 'crossvit_tiny_240', 'csatv2', 'davit_tiny',
    'deepseek_vit_412m', 'deit_tiny_patch16_224', 'efficientformer_l3', 'focalnet_tiny_srf', 'gcvit_xxtiny',
    'gemma4_vit_167m', 'gmixer_12_224', 'hiera_tiny_224', 'inception_next_atto', 'mobilenetv5_base', 'mobilevit_xxs',
    'mvitv2_tiny', 'naflexvit_base_patch16_parfac_gap', 'nest_tiny', 'nextvit_small', 'pit_ti_224', 'poolformerv2_s12',
    'qwen3_vit_88m', 'sam2_hiera_tiny', 'samvit_base_patch16_224', 'sequencer2d_s', 'swinv2_cr_tiny_224',
    'swinv2_tiny_window16_256', 'tiny_vit_5m_224', 'tnt_s_legacy_patch16_224', 'twins_svt_small', 'visformer_tiny',
    'vit_tiny_r_s16_p8_224', 'vitamin_small_224', 'volo_d1_224',
]


def vanilla(key):
    """The key that a key of a MoE model comes from."""
    return re.sub(r'\.(experts\.\d+|mean|deviations\.\d+)\.', '.', key)


def assert_what_holds(model, *inputs, **kwargs):
    """Convert a model, train it for a step, convert it back; it is changed."""
    plain = deepcopy(model)
    dense_keys = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        ewa.to_moe(model, **kwargs)
    assert {vanilla(key) for key in model.state_dict()} == set(dense_keys)

    if hasattr(model, 'group_matcher'):  # without one timm counts parameters, and experts are more
        decay = dict(weight_decay=.05, layer_decay=.5)
        scales = []
        for m in (plain, model):
            names = {id(p): name for name, p in m.named_parameters()}
            scales.append({names[id(p)]: (group['lr_scale'], group['weight_decay'])
                           for group in param_groups_layer_decay(m, **decay) for p in group['params']})
        assert {key: scales[0][vanilla(key)] for key in scales[1]} == scales[1]

    assert train_step(model, *inputs)
    outputs = tree_leaves(plain.train()(*inputs))
    sum((y.float() * torch.linspace(-1, 1, y.shape[-1])).mean() for y in outputs[:1]).backward()
    graded = {name for name, p in plain.named_parameters() if p.grad is not None}
    assert all((p.grad is not None) == (vanilla(name) in graded) for name, p in model.named_parameters())

    scatter(model, .02).eval()
    dense = ewa.to_dense(model)
    assert list(dense.state_dict()) == dense_keys
    with torch.no_grad():
        expected = tree_leaves(model(*inputs))
        plain.load_state_dict(dense.state_dict())
        for other in (dense, plain.eval()):
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(other(*inputs)), expected) if torch.is_tensor(a))
    return dense


@pytest.mark.parametrize('form', ['experts', 'mean'])
@pytest.mark.parametrize('name', QUICK)
def test_a_family_of_timm(name, form):
    if form == 'mean' and name not in ('test_vit', 'test_convnext'):
        pytest.skip('one of linear maps and one of convolutions are enough')
    model = build(name, **QUICK[name])
    assert_what_holds(model, random_images(model), form=form)


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_another_family_of_timm(name):
    model = build(name, **SMALLER.get(name, {}))
    assert_what_holds(model, random_images(model))


def test_every_family_of_the_table_is_tried():
    table = re.findall(r'(?m)^\| (\w+) \| \d+ \| \d+ \| [^|]+ \| (\w+) \|', PAGE.read_text().partition('## What')[0])
    families = {timm.model_entrypoint(name).__module__.rpartition('.')[2] for name in [*QUICK, *SLOW]}
    assert {family for family, _ in table} == families and len(table) > 40


@pytest.mark.slow
def test_the_table_is_what_the_script_writes():
    done = subprocess.run([sys.executable, 'benchmarks/coverage.py', '--check'], cwd=PAGE.parents[1],
                          env=dict(os.environ, PYTHONPATH='.', OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize('name, ffn, reason', [
    ('test_vit', 'Mlp', ''), ('cait_xxs24_224', 'Mlp', ''), ('convnext_atto', 'Mlp (1x1 convolutions)', ''),
    ('convnextv2_atto', '', 'it does not treat each token by itself (it holds a GlobalResponseNorm)'),
    ('pvt_v2_b0', '', 'its dwconv is a convolution over neighbouring tokens'),
    ('levit_128s', '', 'its ln1.bn (BatchNorm1d) takes statistics over tokens'),
    ('gmlp_s16_224', '', 'blocks.0.mlp_channels is none'),
    ('vit_pwee_patch16_reg1_gap_256', '', 'blocks.0 holds the linear layers of its FFN itself'),
    ('resnet18', '', 'ResNet has no FFN to convert.'), ('seresnet50', '', 'ResNet has no FFN to convert.'),
])
def test_lines_of_the_table(name, ffn, reason):
    entry = try_name(name)
    assert entry.ffn == ffn and reason in entry.reason and bool(entry.reason) == bool(reason)
    assert name not in BUILT


@pytest.mark.parametrize('name, names', [
    ('cait_xxs24_224', r'blocks_token_only.0.mlp, blocks_token_only.1.mlp stay dense'),
    ('test_vit3', r'attn_pool.mlp stay dense'), ('volo_d1_224', r'post_network.0.mlp, post_network.1.mlp stay dense'),
])
def test_ffns_that_see_one_token_an_image_are_named(name, names):
    with torch.device('meta'):
        model = timm.create_model(name)
    with pytest.warns(UserWarning, match=names):
        ewa.to_moe(model)
    assert all('blocks_token_only' not in layer and 'pool' not in layer for layer, _ in moe_layers(model))


@pytest.mark.parametrize('make', [
    lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
    lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5),
], ids=['vit', 'swin'])
def test_torchvision(make):
    torch.manual_seed(0)
    assert_what_holds(make(), torch.randn(2, 3, 32, 32))


def test_an_encoder_of_torch_is_refused_by_name():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    with pytest.raises(ValueError, match='layers.0 holds the two linear layers of its FFN itself'):
        ewa.to_moe(model)


SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
OF_TRANSFORMERS = {
    'ViTForImageClassification': SIZES,
    'DeiTForImageClassification': SIZES,
    'BeitForImageClassification': SIZES,
    'SwinForImageClassification': dict(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
    'Dinov2ForImageClassification': {**SIZES, 'mlp_ratio': 2},
    'Dinov2ForImageClassification SwiGLU': {**SIZES, 'mlp_ratio': 2, 'use_swiglu_ffn': True},
    'DINOv3ViTModel': SIZES,
    'DINOv3ViTModel gated': {**SIZES, 'use_gated_mlp': True},
    'SiglipVisionModel': SIZES,
    'CLIPVisionModel': SIZES,
}


@pytest.mark.parametrize('name', OF_TRANSFORMERS)
def test_transformers(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model_class = getattr(transformers, name.split()[0])
    kwargs = OF_TRANSFORMERS[name]
    if 'ImageClassification' in name:
        kwargs = dict(kwargs, num_labels=5)

    class First(nn.Module):
        """Images in, one tensor out."""

        def __init__(self, host):
            super().__init__()
            self.host = host

        def forward(self, images):
            out = self.host(pixel_values=images)
            return out.logits if hasattr(out, 'logits') else out.last_hidden_state

    model = First(model_class(model_class.config_class(**kwargs)))
    images = torch.randn(2, 3, 32, 32)
    dense = assert_what_holds(model, images)
    ewa.export(dense.host, tmp_path / 'out')
    again = First(model_class.from_pretrained(tmp_path / 'out')).eval()
    assert torch.equal(again(images), dense(images))


def test_a_timm_model_inside_transformers(tiny):
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture='test_vit', num_labels=5)
    torch.manual_seed(0)
    model = transformers.TimmWrapperForImageClassification(config)
    model.forward = lambda images, forward=model.forward: forward(images).logits
    ewa.to_moe(model)
    assert [name for name, _ in moe_layers(model)] == [f'timm_model.blocks.{i}.mlp' for i in (1, 3, 5)]
    assert train_step(model, torch.randn(2, 3, 160, 160))
