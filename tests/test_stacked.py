import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ewa
from ewa.moe import moe_layers
from ewa.stacked import Target, unstack
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


def test_a_table_for_another_library():
    # (E, H, D) under one name a block, the router beside them, and a counter nobody needs
    layout = {
        r'encoder\.(\d+)\.w1': Target(r'blocks.\1.mlp.experts.{e}.fc1.weight', transpose=True),
        r'encoder\.(\d+)\.gate': Target(r'blocks.\1.mlp.router.weight'),
        r'encoder\.\d+\.steps': Target(None),
    }
    w1, gate, norm = torch.randn(2, 3, 4), torch.randn(2, 3), torch.randn(3)
    result = unstack({'encoder.7.w1': w1, 'encoder.7.gate': gate, 'encoder.7.steps': norm, 'norm': norm}, layout)
    assert list(result) == [
        *(f'blocks.7.mlp.experts.{e}.fc1.weight' for e in (0, 1)), 'blocks.7.mlp.router.weight', 'norm']
    assert torch.equal(result['blocks.7.mlp.experts.1.fc1.weight'], w1[1].T) and result['norm'] is norm


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
