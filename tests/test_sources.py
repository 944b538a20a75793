import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import ewa
import ewa.vision_transformer
from ewa.checkpoint import checkpoints
from ewa.distillation import forward_flops
from ewa.exporting import write_folder
from ewa.moe import moe_layers
from ewa.options import train_parser
from ewa.sources import build_model, load_source, load_teacher
from gated import gated
from runs import FLAGS, TINY, fails, folder, run_convert, trained  # noqa: F401  fixtures among them

DENSE = {k: v for k, v in TINY.items() if k != 'host'}
NAMED = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'patch_size=7', 'embed_dim=32', 'depth=2', 'num_heads=2']


def build(*flags, named=FLAGS):
    torch.manual_seed(0)
    return build_model(train_parser().parse_args([*named, '--num-classes', '10', *map(str, flags)]))


def same(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# folders

@pytest.fixture
def vit(tiny):
    return ewa.to_dense(ewa.to_moe(tiny(), init='independent')).eval()


def test_load(vit, images, tmp_path):
    ewa.export(vit, tmp_path / 'out')
    assert torch.equal(ewa.load(tmp_path / 'out').eval()(images), vit(images))
    assert ewa.load(tmp_path / 'out', num_classes=3)(images).shape == (3, 3)
    with pytest.raises(FileNotFoundError, match='is not a model folder: it has no config.json'):
        ewa.load(tmp_path)
    with pytest.raises(ValueError, match='model.safetensors is a file of a model folder: load .*out.$'):
        ewa.load(tmp_path / 'out' / 'model.safetensors')
    (tmp_path / 'out' / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='it has no model.safetensors'):
        ewa.load(tmp_path / 'out')


@pytest.mark.parametrize('ema', [False, True])
def test_a_checkpoint_folder_loads_as_the_model_folder_of_its_epoch(trained, ema):
    checkpoint = checkpoints(trained)[-1]
    model, expected = (ewa.load(path, ema=ema) for path in (checkpoint, trained / 'last'))
    assert same(model, expected) and model.pretrained_cfg['mean'] == expected.pretrained_cfg['mean'] == [0.286]
    assert list(dict(moe_layers(model))) == ['blocks.1.mlp']
    adapted = ewa.load(checkpoint, ema=ema, num_classes=3)
    assert adapted.num_classes == 3 and torch.equal(adapted.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_a_checkpoint_folder_without_weights(trained, tmp_path):
    shutil.copytree(checkpoints(trained)[-1], tmp_path / 'checkpoint')
    (tmp_path / 'checkpoint' / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='has no model.safetensors: give the model folder of its run, last/ or best/'):
        ewa.load(tmp_path / 'checkpoint')


def test_ema_weights_that_are_not_there(trained, vit, tmp_path):
    ewa.export(vit, tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match='out has no EMA weights'):
        ewa.load(tmp_path / 'out', ema=True)


@pytest.mark.parametrize('file, text, words', [
    ('config.json', b'{"architecture": ', 'config.json is damaged, it is not JSON'),
    ('config.json', b'\xff\xfe', 'config.json is damaged, it is not JSON'),
    ('config.json', b'[1]', 'config.json names no architecture'),
    ('config.json', b'{"architecture": 3}', 'config.json names no architecture'),
    ('config.json', b'{"architecture": "vit_nothing"}', 'out can\'t be loaded: .*vit_nothing'),
    ('model.safetensors', b'half a file', 'out can\'t be loaded: .*header'),
], ids=['cut off', 'not text', 'list', 'number', 'unknown', 'weights'])
def test_a_damaged_model_folder_is_one_line(vit, tmp_path, file, text, words):
    ewa.export(vit, tmp_path / 'out')
    (tmp_path / 'out' / file).write_bytes(text)
    for read in (ewa.load, load_source):
        with pytest.raises(ValueError, match=words) as e:
            read(tmp_path / 'out')
        assert '\n' not in str(e.value)


def test_weights_of_another_model_in_a_folder(vit, tmp_path):
    ewa.export(vit, tmp_path / 'out')
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    save_file({key: value for key, value in weights.items() if 'head' not in key},
              tmp_path / 'out' / 'model.safetensors')
    with pytest.raises(ValueError, match="out can't be loaded: .*head.weight"):
        ewa.load(tmp_path / 'out')


def test_a_folder_from_when_there_was_an_automatic_choice_of_initial_weights(tiny, images, tmp_path):
    model = ewa.to_moe(tiny(), init='independent').eval()
    write_folder(model, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    config['model_args']['init'] = 'auto'
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(config))
    for loaded in (ewa.load(tmp_path / 'out'), load_source(tmp_path / 'out')[0]):
        assert same(loaded, model) and torch.equal(loaded.eval()(images), model(images))


def test_what_is_known_of_a_source(trained):
    expected = json.loads((trained / 'last' / 'config.json').read_text())
    for path in (trained / 'last', checkpoints(trained)[-1]):
        _, known = load_source(path)
        assert known['class_names'] == expected['label_names']
        assert known['provenance']['updates'] == 10 and known['provenance']['top1'] == expected['ewa']['top1']


# teachers

class TestTeacher:
    @pytest.mark.parametrize('moe', [True, False])
    def test_is_frozen_and_in_eval(self, tiny, images, tmp_path, moe):
        model = gated(tiny(depth=2)) if moe else tiny(depth=2).eval()
        write_folder(model, tmp_path / 'teacher')
        teacher, flops = load_teacher(f'local-dir:{tmp_path / "teacher"}', 10, (3, 32, 32))
        assert flops == forward_flops(model, (3, 32, 32))
        assert torch.equal(teacher(images), model(images))
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())

    @pytest.mark.parametrize('classes, channels, words', [
        (7, 3, 'has 10 classes, the student 7'), (10, 1, 'has 3 input channels, the student 1')])
    def test_must_have_the_students_form(self, tiny, tmp_path, classes, channels, words):
        write_folder(tiny(depth=2), tmp_path / 'teacher')
        with pytest.raises(ValueError, match=f'--teacher local-dir:.*{words}'):
            load_teacher(f'local-dir:{tmp_path / "teacher"}', classes, (channels, 32, 32))

    @pytest.mark.parametrize('name', ['local-dir:/no/such/folder', 'no_such_model', 'local-dir:'])
    def test_must_exist(self, name):
        with pytest.raises(ValueError, match=f'--teacher {name} can.t be loaded'):
            load_teacher(name, 10, (3, 32, 32))

    def test_must_take_the_students_images(self, tiny, tmp_path):
        write_folder(tiny(depth=2), tmp_path / 'teacher')
        with pytest.raises(ValueError, match=r"can't take the images of the student: Images of 3 x 64 x 64"):
            load_teacher(f'local-dir:{tmp_path / "teacher"}', 10, (3, 64, 64))


# by name and flags

def test_flags_reach_the_model():
    model = build('--num-experts', 3, '--moe-layers', 'all', '--drop-path', 0.5, '--img-size', 35, '--in-chans', 2,
                  '--gp', 'avg', '--num-classes', 6)
    assert [len(layer.experts) for _, layer in moe_layers(model)] == [3, 3]
    assert model.blocks[-1].drop_path1.drop_prob == 0.5 and model.global_pool == 'avg' and model.num_classes == 6
    assert model(torch.randn(1, 2, 35, 35)).shape == (1, 6)


def test_a_dense_name_is_dense_or_a_moe():
    dense = build(*NAMED)
    assert type(dense) is timm.models.VisionTransformer and not any(moe_layers(dense))
    moe = build(*NAMED, '--num-experts', 3)
    assert moe.pretrained_cfg['architecture'] == 'vit_ewa' and [n for n, _ in moe_layers(moe)] == ['blocks.1.mlp']
    with pytest.raises(ValueError, match='is dense; give --num-experts N'):
        build(*NAMED, '--top-k', 2)


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model('vit_tiny_patch16_224', **DENSE)
    torch.nn.init.uniform_(model.norm.weight)  # else equal to those of any fresh model
    timm.models.save_for_hf(model, tmp_path / 'dense', safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    return model.state_dict()


@pytest.mark.parametrize('name', ['dense', 'dense.pth'])
def test_initial_checkpoint_is_copied_into_the_experts(dense, tmp_path, name):
    model = build('--initial-checkpoint', tmp_path / name)
    (layer,) = [layer for _, layer in moe_layers(model)]
    for expert in layer.experts:
        for key, value in expert.state_dict().items():
            assert torch.equal(value, dense[f'blocks.1.mlp.{key}'])
    rest = {k: v for k, v in model.state_dict().items() if '.experts.' not in k}
    assert all(torch.equal(value, dense[key]) for key, value in rest.items()) and 'head.weight' in rest


def test_initial_checkpoint_of_a_moe_goes_where_it_belongs(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model('vit_ewa', **TINY)
    ewa.exporting.write_folder(model, tmp_path / 'moe')
    built = build('--initial-checkpoint', tmp_path / 'moe')
    assert all(torch.equal(value, built.state_dict()[key]) for key, value in model.state_dict().items())


def test_pretrained_weights_get_another_classifier(dense, tmp_path):
    model = build(*NAMED, '--pretrained-path', tmp_path / 'dense.pth')
    for key, value in model.state_dict().items():
        assert torch.equal(value, dense[key]) == (key != 'head.weight')  # biases are zero in both
    assert build(*NAMED, '--pretrained-path', tmp_path / 'dense.pth', '--num-classes', 4).num_classes == 4


def test_a_folder_as_the_model(dense, tmp_path):
    model = build('--in-chans', 1, named=['--model', f'local-dir:{tmp_path / "dense"}'])
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('flags, message', [
    (['--model', 'vit_smal_ewa'], 'not a model; the nearest are vit_small_ewa'),
    (['--model-kwargs', 'host=nope'], "host='nope'"),
    (['--model-kwargs', 'patch_sise=7'], "can't be made with .*patch_sise"),
    (['--initial-checkpoint', 'nope.pth'], 'nope.pth does not exist'),
])
def test_mistakes_name_the_way_out(flags, message):
    with pytest.raises(ValueError, match=message):
        build(*flags)


def test_a_name_with_a_host_of_its_own_takes_no_other():
    words = 'vit_tiny_ewa has the host vit_tiny_patch16_224; for host=x give --model vit_ewa'
    with pytest.raises(ValueError, match=words):
        build('--model', 'vit_tiny_ewa', '--model-kwargs', 'host=x')


# complaints of others, mistakes of ours

@pytest.mark.parametrize('name', ['to_moe', 'load_experts'])
@pytest.mark.parametrize('error', [TypeError, RuntimeError, KeyError])
def test_a_mistake_of_ours_inside_a_call_of_timm_stays_what_it_is(tiny, tmp_path, monkeypatch, name, error):
    write_folder(ewa.to_moe(tiny()), tmp_path / 'out')

    def broken(*args, **kwargs):
        raise error('None + 1')

    monkeypatch.setattr(ewa.vision_transformer, name, broken)
    with pytest.raises(error, match='None . 1'):
        ewa.load(tmp_path / 'out')
    if name == 'to_moe':
        with pytest.raises(error, match='None . 1'):
            build()


@pytest.mark.parametrize('key, value', [
    ('ewa', ['x']), ('label_names', 3), ('label_names', ['bag', 3]), ('pretrained_cfg', 'x'), ('model_args', [1]),
    ('pretrained_cfg', {'mean': [None]}), ('pretrained_cfg', {'std': 'x'})])
def test_entries_of_another_type_are_named(trained, tmp_path, key, value):
    folder = Path(shutil.copytree(trained / 'best', tmp_path / 'best'))
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, key: value}))
    code, lines = fails(run_convert, folder, '--output', tmp_path / 'vit')
    assert code == 2 and len(lines) == 1 and 'is damaged: ' in lines[0] and key in lines[0]
    assert not (tmp_path / 'vit').exists()


@pytest.mark.parametrize('key, value', [
    ('depth', 10 ** 9), ('num_experts', 10 ** 9), ('embed_dim', 10 ** 9), ('img_size', [10 ** 9, 28]),
    ('num_classes', 10 ** 9), ('patch_size', True), ('num_heads', -1)])
def test_counts_are_bound_by_the_weights(trained, folder, tmp_path, key, value):
    run = Path(shutil.copytree(trained, tmp_path / 'run'))
    checkpoint = checkpoints(run)[-1]
    for path, part in ((run / 'best' / 'config.json', 'model_args'), (checkpoint / 'state.json', 'model')):
        entries = json.loads(path.read_text())
        (entries if key in entries else entries[part])[key] = value
        path.write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=f'{path} is damaged: its {key} is .*safetensors has [0-9]* tensors'):
            ewa.load(path.parent)
    name = f'local-dir:{run / "best"}'
    with pytest.raises(ValueError, match=f'is damaged: its {key} is'):
        load_teacher(name, 10, (1, 28, 28))
    with pytest.raises(ValueError, match=f'is damaged: its {key} is'):
        build_model(train_parser().parse_args(['--model', name, '--in-chans', '1']))
