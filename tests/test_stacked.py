import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ewa
from ewa.moe import moe_layers
from ewa.stacked import Stacked, unstack
from gated import gated
from runs import fails, run_convert
from test_upcycle import SWIN

HOSTS = {
    'vit_tiny_patch16_224': dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    'swin_tiny_patch4_window7_224': {k: v for k, v in dict(SWIN, img_size=32).items() if v is not None},
}
MOE = dict(num_experts=3, router='topk', top_k=1, renormalise=False)


def make(tiny, host):
    return gated(tiny(host, **(dict(HOSTS[host], depth=None) if 'swin' in host else HOSTS[host])), **MOE)


def stack(model):
    """The state dict of a gated model as Swin-MoE writes it: both matrices of tutel's experts are (E, H, D)."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name, layer in list(moe_layers(model)):
        ours = {key: state.pop(key) for key in list(state) if key.startswith(f'{name}.')}
        assert ours
        state[f'{name}._moe_layer.gates.0.wg.weight'] = layer.router.weight.detach().clone()
        state[f'{name}._moe_layer._num_global_experts'] = torch.tensor(len(layer.experts))
        for key, tensors in {
            'fc1_w': [expert.fc1.weight for expert in layer.experts],
            'fc1_bias': [expert.fc1.bias for expert in layer.experts],
            'fc2_w': [expert.fc2.weight.T for expert in layer.experts],
            'fc2_bias': [expert.fc2.bias for expert in layer.experts],
        }.items():
            state[f'{name}._moe_layer.experts.batched_{key}'] = torch.stack(tensors).detach()
    return state


@pytest.fixture
def save(tmp_path):
    def write(state, name='weights.pth', **more):
        path = tmp_path / name
        torch.save({'model': state, **more}, path) if path.suffix == '.pth' else save_file(state, path)
        return path

    return write


def load(path, host, **kwargs):
    return timm.create_model(
        'vit_ewa', pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10), num_classes=10,
        **{**dict(host=host), **HOSTS[host], **MOE, **kwargs}).eval()


def flags(host, **kwargs):
    given = {**dict(host=host), **HOSTS[host], **MOE, **kwargs}
    return ['--model', 'vit_ewa', '--model-kwargs', *(f'{k}={v}'.replace(' ', '') for k, v in given.items())]


def test_slices_compute_what_tutel_computes(tiny):
    model = make(tiny, 'vit_tiny_patch16_224')
    state, x = stack(model), torch.randn(5, 32)
    split = unstack(state)
    w1, b1, w2, b2 = (state[f'blocks.1.mlp._moe_layer.experts.batched_{n}'] for n in
                      ('fc1_w', 'fc1_bias', 'fc2_w', 'fc2_bias'))
    assert w1.shape == w2.shape == (3, 128, 32) and b1.shape == (3, 128) and b2.shape == (3, 32)
    for e, expert in enumerate(model.blocks[1].mlp.experts):
        y = nn.functional.gelu(x @ w1[e].T + b1[e]) @ w2[e] + b2[e]
        torch.testing.assert_close(expert(x), y)
        expert.load_state_dict({
            key: split[f'blocks.1.mlp.experts.{e}.{key}'] for key in expert.state_dict()})
        torch.testing.assert_close(expert(x), y)


@pytest.mark.parametrize('host', HOSTS)
def test_unstacking_undoes_stacking(tiny, host):
    model = make(tiny, host)
    result = unstack(stack(model))
    assert result.keys() == model.state_dict().keys()
    assert all(torch.equal(value, result[key]) and result[key].is_contiguous()
               for key, value in model.state_dict().items())


def test_other_weights_stay_as_they_are(tiny):
    for state in (tiny().state_dict(), make(tiny, 'vit_tiny_patch16_224').state_dict(), {}):
        result = unstack(state)
        assert list(result) == list(state) and all(result[key] is state[key] for key in state)


@pytest.mark.parametrize('host', HOSTS)
@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
def test_timm_loads_the_file(tiny, images, save, host, name):
    model = make(tiny, host)
    assert torch.equal(load(save(stack(model), name), host)(images), model(images))


@pytest.mark.parametrize('host', HOSTS)
def test_convert_reads_the_file(tiny, images, save, tmp_path, host):
    model = make(tiny, host)
    run_convert(save(stack(model)), '--output', tmp_path / 'vit', *flags(host))
    written, expected = load_file(tmp_path / 'vit' / 'model.safetensors'), ewa.to_dense(model)
    assert written.keys() == expected.state_dict().keys()
    assert all(torch.equal(written[key], value) for key, value in expected.state_dict().items())
    loaded = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    assert torch.equal(loaded(images), expected(images)) and loaded.pretrained_cfg['architecture'] == host


def test_ema_weights_of_the_file(tiny, save, tmp_path):
    host = 'vit_tiny_patch16_224'
    model = make(tiny, host)
    raw = stack(model)
    ema = {key: value + 1 if value.is_floating_point() else value for key, value in raw.items()}
    run_convert(save(raw, 'both.pth', model_ema=ema), '--output', tmp_path / 'vit', '--use-ema', *flags(host))
    written = load_file(tmp_path / 'vit' / 'model.safetensors')
    for key, value in ewa.to_dense(model).state_dict().items():
        torch.testing.assert_close(written[key], value + 1)
    code, lines = fails(run_convert, save(raw), '--output', tmp_path / 'no', '--use-ema', *flags(host))
    assert code == 2 and len(lines) == 1 and 'has no EMA weights' in lines[0]


def test_experts_without_biases(tiny):
    state = {key: value for key, value in stack(make(tiny, 'vit_tiny_patch16_224')).items() if 'bias' not in key}
    result = unstack(state)
    assert {key for key in result if '.experts.' in key} == {
        f'blocks.1.mlp.experts.{e}.{fc}.weight' for e in range(3) for fc in ('fc1', 'fc2')}


def rename(state, names, arrange=lambda key, value: value):
    """A state dict of tutel's layout in another one's names."""
    result = {}
    for key, value in state.items():
        for old, new in names.items():
            if key.endswith(old):
                key, value = key.removesuffix(old) + new, arrange(new, value)
        result[key] = value
    return {key: value for key, value in result.items() if not key.endswith('_num_global_experts')}


OTHERS = {
    'tutel with biases (E, 1, H)': ({}, lambda key, value: value),
    'tutel as the FFN itself': ({f'._moe_layer.{name}': f'.{name}' for name in (
        'experts.batched_fc1_w', 'experts.batched_fc1_bias', 'experts.batched_fc2_w', 'experts.batched_fc2_bias',
        'gates.0.wg.weight')}, lambda key, value: value),
    'fastmoe': ({
        '._moe_layer.experts.batched_fc1_w': '.experts.htoh4.weight',
        '._moe_layer.experts.batched_fc1_bias': '.experts.htoh4.bias',
        '._moe_layer.experts.batched_fc2_w': '.experts.h4toh.weight',
        '._moe_layer.experts.batched_fc2_bias': '.experts.h4toh.bias',
        '._moe_layer.gates.0.wg.weight': '.gate.gate.weight',
    }, lambda key, value: value.transpose(1, 2) if key == '.experts.h4toh.weight' else value),
    'v_moe': ({
        '._moe_layer.experts.batched_fc1_w': '.Moe.Mlp.Dense_0.kernel',
        '._moe_layer.experts.batched_fc1_bias': '.Moe.Mlp.Dense_0.bias',
        '._moe_layer.experts.batched_fc2_w': '.Moe.Mlp.Dense_1.kernel',
        '._moe_layer.experts.batched_fc2_bias': '.Moe.Mlp.Dense_1.bias',
        '._moe_layer.gates.0.wg.weight': '.Moe.Router.dense.kernel',
    }, lambda key, value: value.transpose(-1, -2) if 'Dense_0.kernel' in key or 'Router' in key else value),
}


@pytest.mark.parametrize('names, arrange', OTHERS.values(), ids=OTHERS)
def test_layouts_of_other_libraries(tiny, names, arrange):
    model = make(tiny, 'vit_tiny_patch16_224')
    state = stack(model)
    if not names:
        state = {key: value[:, None] if key.endswith('_bias') else value for key, value in state.items()}
    result = unstack(rename(state, names, arrange))
    assert result.keys() == model.state_dict().keys()
    assert all(torch.equal(value, result[key]) and result[key].is_contiguous()
               for key, value in model.state_dict().items())


def test_fastmoe_gates_have_a_bias(tiny, images, save):
    model = make(tiny, 'vit_tiny_patch16_224')
    state = rename(stack(model), *OTHERS['fastmoe'])
    bias = torch.tensor([0., 9., -9.])  # all tokens to the second expert
    loaded = load(save({**state, 'blocks.1.mlp.gate.gate.bias': bias}), 'vit_tiny_patch16_224')
    layer = loaded.blocks[1].mlp
    tokens = torch.randn(20, 32)
    gates, experts, logits = layer.route(tokens)
    torch.testing.assert_close(logits, tokens @ model.blocks[1].mlp.router.weight.T + bias)
    assert (experts == 1).all()
    torch.testing.assert_close(gates[:, 0], logits.softmax(1)[:, 1])
    again = load(save(loaded.state_dict(), 'ours.pth'), 'vit_tiny_patch16_224')
    assert torch.equal(again(images), loaded(images)) and not torch.equal(model(images), loaded(images))


@pytest.mark.parametrize('ranks', [1, 3, 6])
def test_experts_on_ranks_are_joined(tiny, ranks):
    model = make(tiny, 'vit_tiny_patch16_224')  # three experts of hidden width 128
    state = stack(model)
    expert = {key: state.pop(key) for key in list(state) if '.experts.' in key}
    cut = max(ranks // 3, 1)

    def of_rank(r, key, value):
        value = value[r * 3 // ranks:(r + 1) * 3 // ranks] if ranks <= 3 else value[r // cut][None]
        return value.chunk(cut, 1)[r % cut] if cut > 1 else value

    result = unstack(state, ranks=[{key: of_rank(r, key, v) for key, v in expert.items()} for r in range(ranks)])
    assert all(torch.equal(value, result[key]) for key, value in model.state_dict().items())


def test_a_table_for_another_library():
    # (D, E, H) under one name a block, the router beside them, and a counter nobody needs
    layout = {
        r'(encoder\.\d+)\.w1': Stacked('fc1.weight', ('EDH', 'D1EH')),
        r'(encoder\.\d+)\.gate': Stacked('router.weight', ('DE',)),
        r'(encoder\.\d+)\.steps': Stacked(None),
    }
    w1, gate, norm = torch.randn(4, 1, 2, 3), torch.randn(4, 2), torch.randn(3)
    result = unstack(
        {'encoder.7.w1': w1, 'encoder.7.gate': gate, 'encoder.7.steps': norm, 'norm': norm}, {'mine': layout})
    assert list(result) == [*(f'encoder.7.experts.{e}.fc1.weight' for e in (0, 1)), 'encoder.7.router.weight', 'norm']
    assert torch.equal(result['encoder.7.experts.1.fc1.weight'], w1[:, 0, 1].T) and result['norm'] is norm
    assert torch.equal(result['encoder.7.router.weight'], gate.T)


@pytest.mark.parametrize('state, words', [
    ({'mlp.experts.w13': torch.ones(4, 6, 3)}, r'mlp.experts.w13 \(4, 6, 3\) looks like .* not known.*tutel, fastmoe'),
    ({'mlp.experts.htoh4.weight': torch.ones(6, 3)}, r'shape \(6, 3\); the layout fastmoe has \(E, H, D\) there'),
    ({'mlp.experts.batched_fc1_bias': torch.ones(4, 2, 6)}, r'layout tutel has \(E, H\) or \(E, 1, H\) '),
    ({'mlp.experts.htoh4.weight': torch.ones(4, 6, 3), 'mlp.experts.h4toh.weight': torch.ones(4, 6, 3)},
     r'do not fit each other: mlp.experts.htoh4.weight \(4, 6, 3\), mlp.experts.h4toh.weight \(4, 6, 3\)'),
], ids=['unknown names', 'too few axes', 'a wrong axis', 'a wrong order of axes'])
def test_what_fits_no_layout_is_refused_with_what_was_found(tiny, save, tmp_path, state, words):
    with pytest.raises(ValueError, match=words):
        unstack(state)
    path = save({**tiny().state_dict(), **state})
    code, lines = fails(run_convert, path, '--output', tmp_path / 'vit', *flags('vit_tiny_patch16_224'))
    assert code == 2 and len(lines) == 1 and re.search(words, lines[0]) and str(path) in lines[0]


FC1, BLOCK = 'blocks.1.mlp._moe_layer.experts.batched_fc1_w', 'blocks.1.mlp._moe_layer'
BROKEN = {
    'unequal stacks': (lambda s: s.update({FC1: s[FC1][:2]}), {}, 'stacks .* experts, other tensors of blocks.1.mlp'),
    'a missing layer': (lambda s: [s.pop(k) for k in list(s) if k.startswith(BLOCK)], {}, ''),
    'a missing bias': (lambda s: s.pop(f'{BLOCK}.experts.batched_fc2_bias'), {}, 'do not fit the MoE layer blocks.1'),
    'another router': (lambda s: s.update({f'{BLOCK}.gates.0.cosine_projector.weight': s.pop(
        f'{BLOCK}.gates.0.wg.weight')}), {}, 'do not fit the MoE layer blocks.1.mlp.*router'),
    'other experts': (lambda s: None, dict(num_experts=4), 'they have 3 experts there, the model 4.*num_experts'),
    'other layers': (lambda s: None, dict(layers='all'), 'MoE layer blocks.0.mlp: they have 0 experts'),
    'fewer layers': (lambda s: None, dict(layers='[0]'), 'blocks'),
}


@pytest.mark.parametrize('breaks, kwargs, words', BROKEN.values(), ids=BROKEN)
def test_files_that_do_not_fit_are_refused(tiny, save, tmp_path, breaks, kwargs, words):
    host = 'vit_tiny_patch16_224'
    state = stack(make(tiny, host))
    breaks(state)
    path = save(state)
    with pytest.raises((ValueError, RuntimeError), match=f'(?s){words}'):
        load(path, host, **{k: [0] if k == 'layers' and v == '[0]' else v for k, v in kwargs.items()})
    code, lines = fails(run_convert, path, '--output', tmp_path / 'vit', *flags(host, **kwargs))
    assert code == 2 and len(lines) == 1 and str(path) in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ['weights.pth']
