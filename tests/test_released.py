import re
import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import ewa
from ewa.exporting import write_folder
from ewa.moe import moe_layers
from ewa.released import load_released
from released_reference import SWIN, swin_moe, swin_moe_weights, v_moe, v_moe_weights, write_swin_moe, write_v_moe
from runs import fails, make_folder, run_convert

LAYOUTS = ('swin_moe', 'v_moe')


@pytest.fixture(scope='module')
def pictures():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def write(layout, folder):
    if layout == 'swin_moe':
        return write_swin_moe(folder, swin_moe_weights(), ranks=4)
    return write_v_moe(folder / 'checkpoint_7', v_moe_weights()).parent


@torch.no_grad()
def distance(model, expected, pictures):
    """Relative."""
    return float((model.eval()(pictures) - expected).norm() / expected.norm())


SPREAD = {
    'one a rank': dict(ranks=4),
    'two a rank': dict(ranks=2),
    'each over two ranks': dict(ranks=8),
    'trained output biases': dict(ranks=4, fc2_bias=True),
    'trained output biases, each expert over three ranks': dict(ranks=12, fc2_bias=True),
    'no master file': dict(ranks=4, master=False),
}


@pytest.mark.parametrize('spread', SPREAD.values(), ids=SPREAD)
def test_swin_moe_computes_what_its_description_says(tmp_path, pictures, spread):
    weights = swin_moe_weights(fc2_bias=spread.get('fc2_bias', False))
    model = load_released(write_swin_moe(tmp_path / 'swin', weights, **spread), 'swin_moe')
    assert distance(model, swin_moe(weights, pictures), pictures) < 1e-5
    assert [name for name, _ in moe_layers(model)] == ['layers.1.blocks.1.mlp', 'layers.2.blocks.1.mlp']


@pytest.mark.parametrize('top_k, renormalise', [(2, False), (2, True), (1, True)])
def test_swin_moe_with_two_experts_a_token(tmp_path, pictures, top_k, renormalise):
    weights = swin_moe_weights(seed=1)
    path = write_swin_moe(tmp_path / 'swin', weights, ranks=4)
    model = ewa.load(path, layout='swin_moe', top_k=top_k, renormalise=renormalise)
    # tutel leaves the gate of a single expert as it is
    expected = swin_moe(weights, pictures, top_k, normalise=renormalise and top_k > 1)
    assert distance(model, expected, pictures) < 1e-5


def test_swin_moe_with_cosine_routers(tmp_path, pictures):
    weights = swin_moe_weights(cosine=True)
    path = write_swin_moe(tmp_path / 'swin', weights, ranks=8)
    model = ewa.load(path, layout='swin_moe')
    assert distance(model, swin_moe(weights, pictures), pictures) < 1e-5
    write_folder(model, tmp_path / 'moe')
    assert torch.equal(ewa.load(tmp_path / 'moe').eval()(pictures), model(pictures))
    loss = model.train()(pictures).sum()
    (loss + sum(ewa.routing_losses(model).values())).backward()
    assert all(p.grad is not None for _, layer in moe_layers(model) for p in layer.router.parameters())
    with pytest.raises(ValueError, match='cosine routers, which can be read for top_k=1'):
        ewa.load(path, layout='swin_moe', top_k=2)


def test_the_position_bias_is_that_of_the_window_a_model_was_trained_with_before(tmp_path, pictures):
    # fine-tuned with another window: coordinates are divided by the former one's, which only the file's table knows
    weights = swin_moe_weights()
    for key in weights:
        if key.endswith('relative_coords_table'):
            weights[key] = weights[key] * 1.5
    model = load_released(write_swin_moe(tmp_path / 'swin', weights, ranks=4), 'swin_moe')
    block = 'layers.0.blocks.0.attn'
    table = model.state_dict()[f'{block}.relative_position_bias_table']
    coords = weights[f'{block}.relative_coords_table'].view(-1, 2)
    for row in (0, 17, 48):
        hidden = weights[f'{block}.cpb_mlp.0.weight'] @ coords[row] + weights[f'{block}.cpb_mlp.0.bias']
        torch.testing.assert_close(table[row], weights[f'{block}.cpb_mlp.2.weight'] @ hidden.relu())


@pytest.mark.parametrize('whole', [False, True], ids=['parameters', 'training state'])
@pytest.mark.parametrize('shards', [1, 3])
def test_v_moe_computes_what_its_description_says(tmp_path, pictures, whole, shards):
    weights = v_moe_weights()
    arrays = weights
    if whole:
        arrays = {f'params/{key}': value for key, value in weights.items()}
        arrays.update({f'opt_state/0/mu/{key}': value * 0 for key, value in weights.items()}, step=torch.tensor(7))
    prefix = write_v_moe(tmp_path / 'checkpoint_7', arrays, shards)
    expected = v_moe(weights, pictures)
    for path in (prefix, tmp_path, f'{prefix}.index'):
        assert distance(ewa.load(path, layout='v_moe'), expected, pictures) < 1e-5
    assert distance(ewa.load(prefix, layout='v_moe', top_k=1), v_moe(weights, pictures, top_k=1), pictures) < 1e-5


def test_v_moe_with_a_tanh_layer_is_loaded_whole_and_not_converted(tmp_path, pictures):
    weights = v_moe_weights(tanh=True)
    prefix = write_v_moe(tmp_path / 'checkpoint_7', weights)
    assert distance(ewa.load(prefix, layout='v_moe'), v_moe(weights, pictures), pictures) < 1e-5
    flags = (prefix, '--from', 'v_moe', '--output', tmp_path / 'vit')
    code, lines = fails(run_convert, *flags)
    assert code == 2 and len(lines) == 1 and 'tanh layer before its classifier' in lines[0]
    run_convert(*flags, '--model-kwargs', 'num_classes=0')
    features = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()(pictures)
    plain = {key: value for key, value in weights.items() if 'pre_logits' not in key}
    plain.update({'head/kernel': torch.eye(16), 'head/bias': torch.zeros(16)})
    expected = ewa.to_dense(ewa.load(write_v_moe(tmp_path / 'plain', plain), layout='v_moe')).eval()
    torch.testing.assert_close(features, expected(pictures))


def test_half_precision_arrays(tmp_path, pictures):
    weights = {key: value.bfloat16() for key, value in v_moe_weights().items()}
    model = ewa.load(write_v_moe(tmp_path / 'checkpoint_7', weights), layout='v_moe')
    assert model.pos_embed.dtype == torch.float32
    assert distance(model, v_moe(weights, pictures), pictures) < 1e-5


@pytest.mark.parametrize('layout', LAYOUTS)
def test_another_classifier(tmp_path, pictures, layout):
    path = write(layout, tmp_path / layout)
    model, other = (ewa.load(path, layout=layout, **kwargs).eval() for kwargs in ({}, dict(num_classes=3)))
    assert other(pictures).shape == (2, 3)
    assert torch.equal(model.forward_features(pictures), other.forward_features(pictures))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_saved_moe_is_loaded_without_the_released_files(tmp_path, pictures, layout):
    model = ewa.load(write(layout, tmp_path / layout), layout=layout).eval()
    write_folder(model, tmp_path / 'moe')
    assert torch.equal(ewa.load(tmp_path / 'moe').eval()(pictures), model(pictures))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Five of the sample's classes, as many as the models have."""
    root = make_folder(tmp_path_factory.mktemp('photos'))
    for split in root.iterdir():
        for folder in sorted(split.iterdir())[5:]:
            for image in folder.iterdir():
                image.unlink()
            folder.rmdir()
    return root


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('method', ['average', 'refit'])
def test_conversion_makes_a_folder_that_timm_loads(tmp_path, pictures, photos, capsys, layout, method):
    path = write(layout, tmp_path / layout)
    run_convert(path, '--from', layout, '--output', tmp_path / 'vit', '--method', method, '--data-dir', photos,
                '--workers', 0)
    model = ewa.load(path, layout=layout).eval()
    vit = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    assert not [key for key in vit.state_dict() if 'expert' in key] and 'ewa' not in vit.pretrained_cfg['architecture']
    if method == 'average':
        assert torch.equal(vit(pictures), ewa.to_dense(model).eval()(pictures))
    scores = dict(re.findall(rf'(?m)^  ({method}) +\S+  (\S+)$', capsys.readouterr().out))
    assert 0 < float(scores[method]) < 2
    config = timm.data.resolve_model_data_config(vit)
    assert config['input_size'] == (3, 32, 32) and config['mean'][0] == (0.485 if layout == 'swin_moe' else 0.5)


def test_exported_folders_load_where_this_package_is_not(tmp_path, pictures):
    for layout in LAYOUTS:
        run_convert(write(layout, tmp_path / layout), '--from', layout, '--output', tmp_path / f'{layout}_vit')
    torch.save(pictures, tmp_path / 'pictures.pt')
    code = f"""
        import sys, timm, torch
        sys.modules['ewa'] = None
        x = torch.load('{tmp_path}/pictures.pt')
        for layout in {LAYOUTS}:
            vit = timm.create_model(f'local-dir:{tmp_path}/{{layout}}_vit', pretrained=True).eval()
            torch.save(vit(x).detach(), f'{tmp_path}/{{layout}}.pt')
    """
    subprocess.run([sys.executable, '-c', textwrap.dedent(code)], check=True)
    for layout in LAYOUTS:
        expected = ewa.to_dense(ewa.load(tmp_path / layout, layout=layout)).eval()(pictures)
        torch.testing.assert_close(torch.load(tmp_path / f'{layout}.pt'), expected)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_check_of_the_published_accuracy_is_printed(tmp_path, capsys, layout):
    path = write(layout, tmp_path / layout)
    run_convert(path, '--from', layout, '--output', tmp_path / 'vit')
    command, = re.findall(r'(?m)^ +python convert.py (.*)$', capsys.readouterr().out)
    run_convert(*command.split()[:-2])  # without --data-dir


def swin(change, **spread):
    def make(folder):
        weights = swin_moe_weights()
        change(weights)
        return write_swin_moe(folder, weights, **{**dict(ranks=4), **spread})

    return make


def vit(change, **changes):
    def make(folder):
        weights = v_moe_weights(**changes)
        change(weights)
        return write_v_moe(folder / 'x', weights)

    return make


def without(name):
    def make(folder):
        (write('swin_moe' if 'rank' in name else 'v_moe', folder) / name).unlink()
        return folder

    return make


FC1, COORDS = 'layers.2.blocks.1.mlp._moe_layer.experts.batched_fc1_w', 'layers.0.blocks.0.attn.relative_coords_table'
MASK = 'layers.0.blocks.1.attn_mask'
REFUSED = {
    'a rank is missing': (without('swin_moe.pth.rank1'), r'rank1 is missing'),
    'the last rank is missing': (
        without('swin_moe.pth.rank3'), r'batched_fc1_w stacks 3 experts.*ranks may be missing'),
    'another position of tokens': (swin(lambda w: w.update({MASK: w[MASK].flip(0)})), 'attn_mask is not what timm'),
    'no window': (swin(lambda w: w.pop(COORDS)), 'It lacks layers.0.blocks.0.attn.relative_coords_table'),
    'no masks': (swin(lambda w: w.pop(MASK)), 'does not fit together'),
    'absolute positions': (swin(lambda w: w.update(absolute_pos_embed=torch.ones(1, 64, 8))), 'position embeddings'),
    'a further tensor': (swin(lambda w: w.update({'layers.0.blocks.0.gamma': torch.ones(8)})), r'has .*gamma \(8,\)'),
    'a missing tensor': (swin(lambda w: w.pop('norm.bias')), 'It lacks norm.bias'),
    'experts of two widths': (
        swin(lambda w: w.update({FC1: w[FC1][:, :64]})), r'do not fit each other.*batched_fc1_w \(1, 64, 32\)'),
    'no experts': (swin(lambda w: [w.pop(k) for k in list(w) if '_moe_layer' in k]), ''),
    'no classifier': (swin(lambda w: w.pop('head.weight')), 'It lacks head.weight'),
    'another model': (
        swin(lambda w: [w.pop(k) for k in list(w) if 'layers' in k and 'moe' not in k]), 'It lacks layers.0'),
    'no array file': (without('checkpoint_7.data-00001-of-00002'), 'is missing'),
    'no class token': (vit(lambda w: w.pop('cls')), 'has no cls'),
    'attention pooling': (vit(lambda w: w.update({'MapHead/probe': torch.ones(1, 1, 16)})), r'has MapHead.probe'),
    'an ensemble': (vit(lambda w: w.update({'Encoder/encoderblock_1/Moe/Router/dense/kernel': torch.ones(16, 2, 2)})),
                    r'Router.dense.kernel has the shape \(16, 2, 2\); the layout v_moe has \(D, E\)'),
    'a dense ViT': (vit(lambda w: None, moe=()), 'has no experts'),
}


@pytest.mark.parametrize('make, words', REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_known_is_refused(tmp_path, make, words):
    path = make(tmp_path / 'files')
    layout = 'v_moe' if any('index' in p.name for p in (tmp_path / 'files').iterdir()) else 'swin_moe'
    with pytest.raises(ValueError, match=f'(?s){words}'):
        ewa.load(path, layout=layout)
    code, lines = fails(run_convert, path, '--from', layout, '--output', tmp_path / 'out')
    assert code == 2 and len(lines) == 1 and re.search(words, lines[0]) and str(tmp_path / 'files') in lines[0]
    assert not (tmp_path / 'out').exists()


def test_ensembles_are_known_by_their_name_alone(tmp_path):
    prefix = write_v_moe(tmp_path / 'eee_s32_last2_ilsvrc2012', v_moe_weights())
    with pytest.raises(ValueError, match='is an E3 ensemble'):
        ewa.load(prefix, layout='v_moe')


@pytest.mark.parametrize('content', [b'', b'PK', b'not a pickle' * 100])
def test_a_damaged_file_is_named(tmp_path, content):
    path = write('swin_moe', tmp_path / 'swin')
    (path / 'swin_moe.pth.rank1').write_bytes(content)
    with pytest.raises(ValueError, match=r'rank1 can\'t be read as tensors'):
        ewa.load(path, layout='swin_moe')


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ('run',)

    path = write('swin_moe', tmp_path / 'swin')
    torch.save({'model': {'x': torch.ones(1), 'trap': Trap()}}, path / 'swin_moe.pth.rank1')
    with pytest.raises(ValueError, match=r'rank1 can\'t be read as tensors'):
        ewa.load(path, layout='swin_moe')


@pytest.mark.parametrize('flags, words', [
    (['--model', 'vit_small_ewa'], 'leave --model and --use-ema out'),
    (['--model-kwargs', 'embed_dim=8'], 'embed_dim is found from the files'),
    (['--img-size', '64'], r'--img-size 64: .* is for 32 pixels'),
])
def test_flags_that_the_files_decide_are_refused(tmp_path, flags, words):
    path = write('v_moe', tmp_path / 'v_moe')
    code, lines = fails(run_convert, path, '--from', 'v_moe', '--output', tmp_path / 'out', *flags)
    assert code == 2 and len(lines) == 1 and re.search(words, lines[0])


def test_arguments_of_load(tmp_path):
    with pytest.raises(ValueError, match='layout must be one of swin_moe, v_moe'):
        ewa.load(tmp_path, layout='swin')
    with pytest.raises(ValueError, match='no EMA weights'):
        ewa.load(tmp_path, ema=True, layout='v_moe')
    with pytest.raises(ValueError, match='must hold the files of one model'):
        ewa.load(tmp_path, layout='swin_moe')
    with pytest.raises(ValueError, match='must hold one checkpoint'):
        ewa.load(tmp_path, layout='v_moe')
    assert SWIN['img_size'] == 32
