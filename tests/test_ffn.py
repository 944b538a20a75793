import re
from collections import OrderedDict
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torchvision.models.vision_transformer import MLPBlock

from ewa.ffn import block_of, build_ffn, describe_ffn, find_ffns, is_ffn, layout_of, read_ffn, select_ffns
from ewa.gathering import take
from gated import scatter

FFNS = [  # a host for each layout
    'vit_tiny_patch16_224', 'vit_giant_patch14_dinov2', 'vit_small_plus_patch16_dinov3', 'eva02_base_patch14_224']


def test_parallel_branches_of_a_block_go_together(tiny):
    model = tiny('vit_small_patch16_18x2_224')
    assert select_ffns(model, [1]) == ['blocks.1.ffns.0.mlp', 'blocks.1.ffns.1.mlp']


def test_blocks_are_counted_over_stages(tiny):
    model = tiny('swin_tiny_patch4_window7_224', depth=None, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2),
                 num_heads=(2, 2))
    assert select_ffns(model, 'every:2') == ['layers.0.blocks.1.mlp', 'layers.1.blocks.1.mlp']
    assert select_ffns(model, [2]) == ['layers.1.blocks.0.mlp']


def test_blocks_in_nested_lists_are_counted_one_by_one():
    with torch.device('meta'):
        model = timm.create_model('twins_svt_small')  # blocks.<stage>.<block>
    assert select_ffns(model, 'last:2') == ['blocks.3.2.mlp', 'blocks.3.3.mlp']


@pytest.mark.parametrize('name, block', [
    ('blocks.1.mlp', 'blocks.1'), ('layers.0.blocks.1.mlp', 'layers.0.blocks.1'), ('blocks.0.2.mlp', 'blocks.0.2'),
    ('blocks.1.ffns.0.mlp', 'blocks.1'), ('head.mlp', ''), ('mlp', ''),
    ('encoder.layer.3.mlp', 'encoder.layer.3'),
    ('encoder.layers.encoder_layer_3.mlp', 'encoder.layers.encoder_layer_3'),
    ('features.1.0.mlp', 'features.1.0'), ('parallel_blocks.0.mlp2', 'parallel_blocks.0'), ('layers.0.1', 'layers.0'),
    ('network.0.3.mlp', 'network.0.3'), ('encoder.3.output.mlp', 'encoder.3'),
    ('blocks_token_only.0.mlp', ''), ('attn_pool.mlp', ''), ('cls_attn_blocks.0.mlp', ''), ('post_network.0.mlp', ''),
])
def test_the_block_of_an_ffn(name, block):
    assert block_of(name) == block


def test_only_token_wise_ffns_are_found(tiny):
    # the perceptron of a relative position bias is none
    assert list(find_ffns(tiny('vit_relpos_small_patch16_224', num_heads=4))) == [f'blocks.{i}.mlp' for i in range(4)]
    # depth-wise convolutions mix tokens
    assert not find_ffns(timm.create_model('pvt_v2_b0', num_classes=10))
    # channel attention sees one token an image
    with torch.device('meta'):
        assert not find_ffns(timm.create_model('gcresnet33ts'))
    # a relative position bias of two heads is made from two coordinates
    with torch.device('meta'):
        assert not any('rel_pos' in name for name in find_ffns(timm.create_model('maxvit_rmlp_tiny_rw_256')))


class SpatialGate(nn.Module):
    def forward(self, x):
        return x * x.mean(-2, keepdim=True)


class Chain(nn.Module):  # three maps one after the other, all of one width
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)).relu())


class GatedParts(nn.Module):  # as in LLaMA, DINOv3
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LLaMA(GatedParts):  # the output stands between the inputs
    def __init__(self):
        super().__init__()
        self.up_proj = self._modules.pop('up_proj')


class Scaled(timm.layers.Mlp):
    def __init__(self, *args):
        super().__init__(*args)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.gamma * super().forward(x)


@pytest.mark.parametrize('module, inputs, output, norm, others', [
    (MLPBlock(8, 20, 0.), ('0',), '3', '', ()),  # torchvision's
    (nn.Sequential(nn.Linear(8, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 8)), ('0',), '3', '', ('1',)),
    (nn.Sequential(OrderedDict(c_fc=nn.Linear(8, 20), act=nn.GELU(), c_proj=nn.Linear(20, 8))), ('c_fc',), 'c_proj', '',
     ()),
    (nn.Sequential(OrderedDict(norm=nn.LayerNorm(8), fc1=nn.Linear(8, 20), act=nn.GELU(), fc2=nn.Linear(20, 8))),
     ('fc1',), 'fc2', '', ('norm',)),
    (GatedParts(), ('gate_proj', 'up_proj'), 'down_proj', '', ()),
    (LLaMA(), ('gate_proj', 'up_proj'), 'down_proj', '', ()),
    (Scaled(8, 20), ('fc1',), 'fc2', '', ('gamma',)),
    (timm.layers.SwiGLU(8, 20, norm_layer=nn.LayerNorm), ('fc1_g', 'fc1_x'), 'fc2', 'norm', ()),
    (timm.layers.ConvMlp(8, 20), ('fc1',), 'fc2', '', ()),
    (timm.layers.ConvMlp(8, 20, act_layer=partial(nn.ReLU, inplace=True)), ('fc1',), 'fc2', '', ()),
    (nn.Sequential(nn.Conv2d(8, 20, 1, bias=False), timm.models.metaformer.StarReLU(), nn.Conv2d(20, 8, 1, bias=False)),
     ('0',), '2', '', ('1',)),
], ids=str)
def test_ffns_are_found_by_what_they_do(module, inputs, output, norm, others):
    layout = layout_of(module)
    assert (layout.inputs, layout.output, layout.norm, layout.others) == (inputs, output, norm, others)
    assert (layout.width, layout.hidden) == (8, 20) and is_ffn(module) == (not others)
    assert layout.channels_first == any(isinstance(part, nn.Conv2d) for part in module.modules())
    assert list(find_ffns(nn.Sequential(nn.Sequential(module)))) == ['0.0']  # the innermost
    if not others:
        weights = read_ffn(module)
        rebuilt = build_ffn(deepcopy(module), weights if norm else take(weights, range(19, -1, -1)))
        x = torch.randn((2, 8, 3, 3) if layout.channels_first else (2, 3, 8))
        torch.testing.assert_close(rebuilt(x), module(x))


def test_ffns_are_found_in_whatever_surroundings():
    with torch.device('meta'), torch.autocast('cpu', torch.bfloat16):
        assert layout_of(timm.layers.Mlp(8, 23)).hidden == 23
        assert layout_of(timm.layers.ConvMlp(8, 23)).channels_first
    with torch.inference_mode():
        assert layout_of(timm.layers.Mlp(8, 24).bfloat16()).hidden == 24
    torch.manual_seed(0)
    module, state = timm.layers.Mlp(8, 25), torch.get_rng_state()
    assert layout_of(module) and torch.equal(torch.get_rng_state(), state)


class Shifting(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.fc1, self.act, self.fc2, self.shift = nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8), shift

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x.roll(1, -2) if self.shift else x)))


def test_modules_of_one_class_and_text_are_told_apart():
    assert layout_of(Shifting(False)) and not layout_of(Shifting(True)) and layout_of(Shifting(False))
    module = Shifting(False)
    module.forward = module.forward  # of a copy it is the copy's
    assert layout_of(module)
    module.forward = lambda x, forward=module.forward: 2 * forward(x)  # of every copy it is the one of this module
    assert not layout_of(module) and 'such as a replaced forward' in describe_ffn(module)
    assert 'compiled by itself' in describe_ffn(torch.compile(Shifting(False), backend='eager'))


class Functional(timm.layers.Mlp):
    def forward(self, x):
        return self.fc2(nn.functional.linear(x, self.fc1.weight, self.fc1.bias).relu())


class Closed(timm.layers.Mlp):  # copies call the parts of the original
    def __init__(self, *args):
        super().__init__(*args)
        self.up = lambda x: self.fc1(x).relu()

    def forward(self, x):
        return self.fc2(self.up(x))


class Single(timm.layers.Mlp):
    def __deepcopy__(self, memo):
        return self


def test_an_ffn_that_is_its_own_copy_stays_as_it_is():
    module = Single(8, 20)
    weight = module.fc1.weight.clone()
    assert not layout_of(module) and 'its copy shares parameters with it' in describe_ffn(module)
    assert torch.equal(module.fc1.weight, weight)


class Tuple(timm.layers.Mlp):
    def forward(self, x):
        return super().forward(x), None


class Residual(timm.layers.Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Standardised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.std(1, keepdim=True), self.bias)


class WithBuffer(timm.layers.Mlp):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer('scale', torch.rand(20))

    def forward(self, x):
        return self.fc2(self.scale * self.act(self.fc1(x)))


class Interleaved(nn.Module):  # a GLU whose two matrices take turns by rows
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 40), nn.Linear(20, 8)

    def forward(self, x):
        gate, x = self.fc1(x).unflatten(-1, (20, 2)).unbind(-1)
        return self.fc2(gate.sigmoid() * x)


one_bias = GatedParts()
one_bias.up_proj.bias = None


@pytest.mark.parametrize('module, others', [
    (one_bias, 'unlike biases'),
    (Residual(8, 20), 'steps of its own'),
    (nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8), nn.ReLU()), 'steps of its own'),
    (nn.Sequential(nn.Linear(8, 20), nn.GELU(), Standardised(20, 8)), 'steps of its own'),
    (nn.Sequential(Standardised(8, 20), nn.GELU(), nn.Linear(20, 8)), 'steps of its own'),
    (nn.Sequential(nn.Linear(8, 20), nn.LayerNorm(20, elementwise_affine=False), nn.Linear(20, 8)), 'steps of its own'),
    (nn.Sequential(nn.Linear(8, 20), nn.Softmax(-1), nn.Linear(20, 8)), 'steps of its own'),
    (Interleaved(), 'steps of its own'),
    (Functional(8, 20), 'steps of its own'),
    (WithBuffer(8, 20), 'scale'),
], ids=str)
def test_what_is_no_sum_of_hidden_units_is_averaged_but_not_taken_apart(module, others):
    assert layout_of(module).others == (others,) and not is_ffn(module)
    with pytest.raises(ValueError, match=f"has {others} beside its maps, so its hidden units can't be taken apart"):
        read_ffn(module)


@pytest.mark.parametrize('module, reason', [
    (nn.Sequential(nn.Linear(8, 20), SpatialGate(), nn.Linear(20, 8)), 'does not treat each token by itself'),
    (timm.layers.GlobalResponseNormMlp(8, 20), 'does not treat each token by itself (it holds a GlobalResponseNorm)'),
    (nn.Sequential(nn.Conv2d(8, 20, 1), nn.BatchNorm2d(20), nn.Conv2d(20, 8, 1)), 'BatchNorm2d) takes statistics'),
    (nn.Sequential(nn.Conv2d(8, 20, 1), nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.Conv2d(20, 8, 1)),
     'its 1 is a convolution over neighbouring tokens'),
    (nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 6)), 'is not made of maps from its width to hidden units and back'),
    (Closed(8, 20), 'a copy of it does not compute with all of its own parameters and only them'),
    (Tuple(8, 20), 'it does not return a tensor'),
    (Chain(), 'does not treat each token by itself'),
    (nn.MultiheadAttention(8, 2), 'is not made of maps'),
], ids=str)
def test_what_is_no_ffn_says_why(module, reason):
    assert layout_of(module) is None and reason in describe_ffn(module)
    with pytest.raises(ValueError, match=re.escape(reason)):
        select_ffns(nn.ModuleDict(dict(ffn=module)), ['ffn'])


def test_an_encoder_layer_that_holds_its_linears_itself_is_named():
    with pytest.raises(ValueError, match='no FFN to convert: layers.0 holds the two linear layers of its FFN itself'):
        select_ffns(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), 'every:2')
    with pytest.raises(ValueError, match='no FFN to convert: layers.0 holds the two linear layers of its FFN itself'):
        select_ffns(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2), 'every:2')
    layer = nn.ModuleDict(dict(  # as of transformers' BERT
        attention=timm.layers.Attention(8, 2), intermediate=nn.Sequential(nn.Linear(8, 16), nn.GELU()),
        output=nn.ModuleDict(dict(dense=nn.Linear(16, 8), norm=nn.LayerNorm(8)))))
    with pytest.raises(ValueError, match='convert: 0 holds intermediate.0 and output.dense in no FFN module'):
        select_ffns(nn.ModuleList([layer]), 'every:2')
    with pytest.raises(ValueError, match=r'no FFN to convert: stages.0.blocks.0.mlp is none, since its dwconv'):
        select_ffns(timm.create_model('pvt_v2_b0'), 'every:2')


@pytest.mark.parametrize('name', FFNS)
def test_ffns_are_read_and_rebuilt(tiny, name):
    ffn = scatter(tiny(name)).blocks[0].mlp.eval()
    x = torch.randn(7, 32)
    rebuilt = build_ffn(tiny(name, seed=1).blocks[0].mlp.eval(), read_ffn(ffn))
    assert torch.equal(rebuilt(x), ffn(x)) and not {p.data_ptr() for p in rebuilt.parameters()} & {
        p.data_ptr() for p in ffn.parameters()}


@pytest.mark.parametrize('name', FFNS[:3])
def test_an_ffn_of_some_hidden_units_and_one_of_the_others_add_up(tiny, name):
    ffn = scatter(tiny(name)).blocks[0].mlp.eval()
    weights, x = read_ffn(ffn), torch.randn(7, 32)
    some, others = (build_ffn(ffn, take(weights, range(start, weights.hidden, 2))) for start in (0, 1))
    assert some.fc2.in_features == -(-weights.hidden // 2)
    torch.testing.assert_close(some(x) + others(x) - ffn.fc2.bias, ffn(x))


def test_the_width_of_an_ffn_with_a_norm_stays(tiny):
    ffn = tiny('eva02_base_patch14_224').blocks[0].mlp
    with pytest.raises(ValueError, match='norm over its hidden units'):
        build_ffn(ffn, take(read_ffn(ffn), range(4)))


def test_what_is_no_ffn_is_not_read(tiny):
    attention = tiny().blocks[0].attn
    assert not is_ffn(attention)
    with pytest.raises(ValueError, match='Attention is not an FFN'):
        read_ffn(attention)
