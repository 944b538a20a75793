import pytest
import timm
import torch

from ewa.ffn import block_of, build_ffn, find_ffns, is_ffn, read_ffn, select_ffns
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
    ('blocks.1.ffns.0.mlp', 'blocks.1'), ('head.mlp', ''), ('myblocks.1.mlp', ''),
])
def test_the_block_of_an_ffn(name, block):
    assert block_of(name) == block


def test_only_token_wise_ffns_are_found(tiny):
    # the perceptron of a relative position bias is none
    assert list(find_ffns(tiny('vit_relpos_small_patch16_224', num_heads=4))) == [f'blocks.{i}.mlp' for i in range(4)]
    # its norm stands before the hidden units
    assert not find_ffns(timm.create_model('tiny_vit_5m_224', num_classes=10))
    # depth-wise convolutions mix tokens
    assert not find_ffns(timm.create_model('pvt_v2_b0', num_classes=10))
    # a relative position bias of two heads is made from two coordinates
    with torch.device('meta'):
        assert not any('rel_pos' in name for name in find_ffns(timm.create_model('maxvit_rmlp_tiny_rw_256')))


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
