import json
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import VisionTransformer

import ewa
import ewa.exporting
from ewa.exporting import write_folder
from ewa.model_card import OURS
from ewa.moe import moe_layers
from gated import scatter

SWIN = dict(depth=None, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2))


@pytest.fixture
def vit(tiny):
    return ewa.to_dense(ewa.to_moe(tiny(), init='independent')).eval()


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def config_of(directory):
    return json.loads((directory / 'config.json').read_text())


def test_folder_is_vanilla_and_complete(vit, images, tmp_path):
    before, text = deepcopy(vit.state_dict()), repr(vit)
    cfg, args = deepcopy(vit.pretrained_cfg), deepcopy(vit._model_args)
    names = [f'class {i}' for i in range(10)]
    data_config = dict(
        input_size=(3, 32, 32), mean=(.1, .2, .3), std=(.4, .5, .6), interpolation='bilinear', crop_pct=.8,
        crop_mode='squash')
    ewa.export(vit, tmp_path / 'deep' / 'out', names, data_config, provenance={'method': 'average', 'seed': 3})

    out = tmp_path / 'deep' / 'out'
    assert sorted(contents(out)) == ['README.md', 'config.json', 'model.safetensors']
    assert os.listdir(tmp_path / 'deep') == ['out']
    config = config_of(out)
    assert config['architecture'] == 'vit_tiny_patch16_224' and config['num_classes'] == 10
    assert config['label_names'] == names
    for key, value in data_config.items():
        value = list(value) if isinstance(value, tuple) else value
        assert config['pretrained_cfg'][key] == value
    assert not config['pretrained_cfg'].get('tag') and not config['pretrained_cfg'].get('license')
    assert not any(config['pretrained_cfg'].get(k) for k in ('url', 'hf_hub_id', 'file', 'origin_url', 'paper_ids'))
    assert config['ewa']['method'] == 'average' and config['ewa']['seed'] == 3
    assert config['ewa']['versions'] == {'ewa': ewa.__version__, 'timm': timm.__version__, 'torch': torch.__version__}
    assert not {'host', 'num_experts', 'layers', 'router', 'num_classes'} & config['model_args'].keys()
    assert list(load_file(out / 'model.safetensors')) == sorted(before)

    loaded = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert torch.equal(loaded(images), vit(images))
    resolved = timm.data.resolve_model_data_config(loaded)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in resolved.items()} == data_config
    assert loaded.pretrained_cfg['label_names'] == names

    assert repr(vit) == text and (vit.pretrained_cfg, vit._model_args) == (cfg, args)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


def test_the_mode_of_the_model_stays(vit, tmp_path):
    vit.train()
    vit.blocks[2].eval()
    modes = [module.training for module in vit.modules()]
    ewa.export(vit, tmp_path / 'out')
    assert [module.training for module in vit.modules()] == modes


@pytest.mark.parametrize('name, kwargs', [
    ('vit_tiny_patch16_224', dict(in_chans=1)),
    ('vit_tiny_patch16_224', dict(in_chans=5)),
    ('vit_tiny_patch16_224', dict(num_classes=0)),
    ('vit_tiny_patch16_224', dict(img_size=(32, 48), class_token=False, global_pool='avg', reg_tokens=2)),
    ('vit_tiny_patch16_224', dict(dynamic_img_size=True, drop_path_rate=.1)),
    ('deit_tiny_distilled_patch16_224', {}),
    ('deit3_small_patch16_224', {}),
    ('eva02_base_patch14_224', {}),
    ('swin_tiny_patch4_window7_224', SWIN),
])
def test_hosts_load_again_to_equal_outputs(tiny, tmp_path, name, kwargs):
    model = ewa.to_moe(tiny(name, **kwargs), init='independent').eval()
    vit = ewa.to_dense(model)
    ewa.export(vit, tmp_path / 'out')
    size = kwargs.get('img_size', (32, 32))
    x = torch.randn(2, kwargs.get('in_chans', 3), *size)
    loaded = ewa.load(tmp_path / 'out').eval()
    assert torch.equal(loaded(x), model(x))
    if not kwargs.get('dynamic_img_size'):
        assert timm.data.resolve_model_data_config(loaded)['input_size'] == x.shape[1:]


def test_vanilla_timm_loads_it_where_ewa_is_not_installed(tiny, images, tmp_path):
    cases = {
        'vit_tiny_patch16_224': {},
        'swin_tiny_patch4_window7_224': SWIN,
    }
    expected = {}
    for name, kwargs in cases.items():
        model = ewa.to_moe(tiny(name, **kwargs), num_experts=3, init='independent').eval()
        vit = ewa.to_dense(model)
        ewa.export(vit, tmp_path / name)
        expected[name] = (model(images).detach(), vit._model_args)
    torch.save((images, expected), tmp_path / 'expected.pt')
    script = """if True:
        import sys
        sys.modules['ewa'] = None
        import timm, torch
        torch.set_num_threads(1)
        images, expected = torch.load('expected.pt')
        for name, (logits, kwargs) in expected.items():
            first = timm.create_model(f'local-dir:{name}', pretrained=True).eval()
            second = timm.create_model(name, checkpoint_path=f'{name}/model.safetensors', **kwargs).eval()
            for model in (first, second):
                assert type(model).__module__.startswith('timm.')
                assert torch.equal(model(images), logits), name
        assert not any(module.startswith('ewa.') for module in sys.modules)
        """
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_channels_last_is_written(tiny, images, tmp_path):
    moe = ewa.to_moe(tiny(), init='independent').to(memory_format=torch.channels_last).eval()
    ewa.export(ewa.to_dense(moe), tmp_path / 'vit')
    write_folder(moe, tmp_path / 'moe')
    assert not moe.patch_embed.proj.weight.is_contiguous()
    for name in ('vit', 'moe'):
        assert torch.allclose(ewa.load(tmp_path / name).eval()(images), moe(images), atol=1e-5)


def test_half_precision_weights_stay_half(vit, images, tmp_path):
    vit.bfloat16()
    ewa.export(vit, tmp_path / 'out')
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / 'out' / 'model.safetensors').values())
    loaded, images = ewa.load(tmp_path / 'out', dtype=torch.bfloat16).eval(), images.bfloat16()
    assert torch.equal(loaded(images), vit(images))


class TestExistingFolder:
    @pytest.fixture
    def out(self, tiny, tmp_path):
        ewa.export(tiny(seed=7), tmp_path / 'out', provenance={'which': 'first'})
        (tmp_path / 'out' / 'notes.txt').write_text('mine')
        return tmp_path / 'out'

    def check_untouched(self, out, before):
        assert contents(out) == before and os.listdir(out.parent) == ['out']

    def test_is_refused(self, vit, out):
        before = contents(out)
        with pytest.raises(FileExistsError, match='out exists; give another folder, or overwrite=True'):
            ewa.export(vit, out)
        self.check_untouched(out, before)

    def test_is_replaced_as_a_whole_when_asked(self, vit, out):
        (out / 'ema.safetensors').write_text('of the old model')
        (out / '.git').mkdir()
        (out / '.git' / 'HEAD').write_text('main')
        ewa.export(vit, out, overwrite=True)
        # what others put there stays
        assert sorted(os.listdir(out)) == ['.git', 'README.md', 'config.json', 'model.safetensors', 'notes.txt']
        assert (out / '.git' / 'HEAD').read_text() == 'main' and (out / 'notes.txt').read_text() == 'mine'
        assert 'which' not in config_of(out)['ewa'] and os.listdir(out.parent) == ['out']
        # also where the folder is somewhere else
        (out.parent / 'link').symlink_to('out')
        ewa.export(vit, out.parent / 'link', overwrite=True)
        assert (out / 'notes.txt').exists() and sorted(os.listdir(out.parent)) == ['link', 'out']
        read = load_file(out / 'model.safetensors')
        assert all(torch.equal(read[key], value) for key, value in vit.state_dict().items())

    def test_a_card_is_replaced_unless_somebody_made_it_theirs(self, vit, out):
        first = (out / 'README.md').read_text()
        ewa.export(vit, out, ['new'] * 10, overwrite=True)
        assert first != (out / 'README.md').read_text() and 'new, new' in (out / 'README.md').read_text()
        mine = (out / 'README.md').read_text().replace(OURS + '\n', '') + 'and more'
        (out / 'README.md').write_text(mine)
        ewa.export(vit, out, overwrite=True)
        assert (out / 'README.md').read_text() == mine

    def test_survives_a_failing_write(self, vit, out, monkeypatch):
        def fail(model, directory, **kwargs):
            (Path(directory) / 'model.safetensors').write_bytes(b'half')
            raise OSError('no space left')

        before = contents(out)
        monkeypatch.setattr(ewa.exporting, 'save_for_hf', fail)
        with pytest.raises(OSError, match='no space left'):
            ewa.export(vit, out, overwrite=True)
        self.check_untouched(out, before)
        with pytest.raises(OSError, match='no space left'):
            ewa.export(vit, out.parent / 'new')
        self.check_untouched(out, before)

    @pytest.mark.parametrize('wrong', ['weights', 'outputs'])
    def test_survives_a_wrong_write(self, vit, tiny, out, monkeypatch, wrong):
        save = ewa.exporting.save_for_hf

        def save_wrong(model, directory, **kwargs):
            model = deepcopy(model)
            with torch.no_grad():
                if wrong == 'weights':
                    model.blocks[1].mlp.fc1.weight[0, 0] += 1
                else:
                    kwargs['model_args'] = dict(act_layer='relu')
            save(model, directory, **kwargs)

        before = contents(out)
        monkeypatch.setattr(ewa.exporting, 'save_for_hf', save_wrong)
        message = 'does not load to the weights' if wrong == 'weights' else 'does not compute the outputs'
        with pytest.raises(RuntimeError, match=message):
            ewa.export(vit, out, overwrite=True)
        self.check_untouched(out, before)

    def test_survives_a_failing_rename(self, vit, out, monkeypatch):
        rename, before = os.rename, contents(out)

        def fail_to_place(source, target):
            if '.new-' in os.fspath(source):
                raise OSError('disk gone')
            rename(source, target)

        monkeypatch.setattr(os, 'rename', fail_to_place)
        with pytest.raises(OSError, match='disk gone'):
            ewa.export(vit, out, overwrite=True)
        self.check_untouched(out, before)


def test_a_moe_model_is_refused_with_the_way_out(tiny, tmp_path):
    with pytest.raises(ValueError, match=r'blocks.1.mlp, blocks.3.mlp.*export ewa.to_dense\(model\) instead'):
        ewa.export(ewa.to_moe(tiny()), tmp_path / 'out')
    assert not os.listdir(tmp_path)


def test_a_model_that_timm_did_not_build_is_refused(tmp_path):
    with pytest.raises(ValueError, match='Linear does not carry the name of a timm architecture'):
        ewa.export(torch.nn.Linear(2, 2), tmp_path / 'out')
    assert not os.listdir(tmp_path)


def test_a_model_of_features_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match='created with features_only=True and is no whole vit_tiny_patch16_224'):
        ewa.export(tiny(features_only=True), tmp_path / 'vit')
    assert not list(tmp_path.iterdir())


def test_a_model_in_float64_is_refused(vit, tmp_path):
    with pytest.raises(ValueError, match=r'has weights in float64, but timm loads float32: export model.float\(\)'):
        ewa.export(vit.double(), tmp_path / 'out')
    assert not os.listdir(tmp_path)


def test_class_names_must_be_as_many_as_classes(vit, tmp_path):
    with pytest.raises(ValueError, match='3 class names were given for a model of 10 classes'):
        ewa.export(vit, tmp_path / 'out', class_names=['a', 'b', 'c'])
    assert not os.listdir(tmp_path)


class TestMoEFolder:
    @pytest.mark.parametrize('kwargs', [
        dict(num_experts=3, layers=[0, 3]),
        dict(router='topk', top_k=1, renormalise=False),
        dict(router='topk', num_experts=6, top_k=3, num_shared=1, expert_ratio=.25),
    ])
    def test_loads_again(self, tiny, images, tmp_path, kwargs):
        model = ewa.to_moe(tiny(), init='independent', **kwargs).eval()
        write_folder(model, tmp_path / 'out')
        config = config_of(tmp_path / 'out')
        assert config['architecture'] == 'vit_ewa' and config['model_args']['host'] == 'vit_tiny_patch16_224'
        loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        assert repr(loaded) == repr(model)
        assert torch.equal(loaded(images), model(images))

    def test_adapts_as_a_vanilla_folder_does(self, tiny, tmp_path):
        # experts that are copies make the MoE model and the dense one equal in everything
        dense = tiny()
        with torch.no_grad():
            for p in dense.parameters():
                p.add_(.02 * torch.randn(p.shape))
        write_folder(ewa.to_moe(deepcopy(dense), init='copy'), tmp_path / 'moe')
        ewa.export(dense, tmp_path / 'dense')
        changes = dict(num_classes=5), dict(img_size=48), dict(in_chans=1), dict(
            num_classes=3, img_size=(64, 32), in_chans=4)
        for kwargs in changes:
            model, vit = (
                timm.create_model(f'local-dir:{tmp_path / kind}', pretrained=True, **kwargs)
                for kind in ('moe', 'dense'))
            converted = ewa.to_dense(model).state_dict()
            for key, value in vit.state_dict().items():
                assert value.shape == converted[key].shape
                if not ('num_classes' in kwargs and key.startswith('head.')):
                    assert torch.equal(converted[key], value), (kwargs, key)

    def test_ema_weights_lie_beside_the_raw_ones(self, tiny, tmp_path):
        model, other = ewa.to_moe(tiny(), init='independent'), ewa.to_moe(tiny(seed=1), init='independent')
        write_folder(model, tmp_path / 'out', ema=other.state_dict())
        for file, source in (('model', model), ('ema', other)):
            read = load_file(tmp_path / 'out' / f'{file}.safetensors')
            assert read.keys() == source.state_dict().keys()
            assert all(torch.equal(read[key], value) for key, value in source.state_dict().items())
        assert torch.equal(ewa.load(tmp_path / 'out').head.weight, model.head.weight)

    def test_without_pretrained_has_the_architecture_only(self, tiny, tmp_path):
        model = ewa.to_moe(tiny(), num_experts=3, init='independent')
        write_folder(model, tmp_path / 'out')
        fresh = timm.create_model(f'local-dir:{tmp_path / "out"}')
        assert repr(fresh) == repr(model) and len(list(moe_layers(fresh))) == 2
        assert not torch.equal(fresh.head.weight, model.head.weight)


@pytest.fixture
def transformers():
    return pytest.importorskip('transformers')


class TestTransformers:
    @pytest.fixture
    def hf(self, transformers):
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, num_labels=3)
        return scatter(ewa.to_moe(transformers.ViTForImageClassification(config), init='independent')).eval()

    @pytest.mark.parametrize('name, kwargs', [
        ('vit_tiny_patch16_224', {}), ('swin_tiny_patch4_window7_224', SWIN),
        ('deit_tiny_distilled_patch16_224', dict(in_chans=1)),
    ])
    def test_loads_a_folder_of_a_timm_model(self, transformers, tiny, tmp_path, name, kwargs):
        model = ewa.to_dense(scatter(ewa.to_moe(tiny(name, **kwargs)))).eval()
        names = [f'class {i}' for i in range(10)]
        ewa.export(model, tmp_path / 'out', names)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
        images = torch.randn(2, kwargs.get('in_chans', 3), 32, 32)
        assert torch.equal(loaded(images).logits, model(images))
        assert list(loaded.config.id2label.values()) == names
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'out')
        assert tuple(processor.data_config['input_size'][1:]) == (32, 32)
        # and back, out of the wrapper
        ewa.export(loaded, tmp_path / 'back')
        again = timm.create_model(f'local-dir:{tmp_path / "back"}', pretrained=True).eval()
        assert torch.equal(again(images), model(images)) and config_of(tmp_path / 'back')['label_names'] == names

    def test_a_model_of_its_own_gets_its_own_folder(self, transformers, hf, images, tmp_path):
        dense = ewa.to_dense(hf)
        ewa.export(dense, tmp_path / 'out', ['a', 'b', 'c'])
        assert sorted(os.listdir(tmp_path / 'out')) == ['README.md', 'config.json', 'model.safetensors']
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
        assert type(loaded) is type(dense) and list(loaded.state_dict()) == list(dense.state_dict())
        assert torch.equal(loaded(images).logits, hf(images).logits)
        assert loaded.config.id2label == {0: 'a', 1: 'b', 2: 'c'} and dense.config.id2label[0] == 'LABEL_0'
        card = (tmp_path / 'out' / 'README.md').read_text()
        assert 'library_name: transformers' in card and 'ViTForImageClassification' in card and 'a, b, c' in card
        with pytest.raises(FileExistsError):
            ewa.export(dense, tmp_path / 'out')
        with pytest.raises(ValueError, match='2 class names were given for a model of 3'):
            ewa.export(dense, tmp_path / 'new', ['a', 'b'])
        with pytest.raises(ValueError, match='is not of timm: leave data_config and onnx out'):
            ewa.export(dense, tmp_path / 'new', onnx=True)
        assert os.listdir(tmp_path) == ['out']

    def test_a_model_that_draws_in_its_forward_pass_is_checked_as_others(self, transformers, tmp_path):
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        config = transformers.ViTMAEConfig(
            image_size=32, patch_size=8, **sizes, **{f'decoder_{key}': value for key, value in sizes.items()})
        model = ewa.to_dense(scatter(ewa.to_moe(transformers.ViTMAEForPreTraining(config))))
        state = torch.get_rng_state()
        ewa.export(model, tmp_path / 'out')
        assert torch.equal(torch.get_rng_state(), state)
        loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / 'out')
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize('wrong', ['weights', 'outputs'])
    def test_its_folder_is_checked(self, hf, tmp_path, monkeypatch, wrong):
        load = type(hf).from_pretrained.__func__

        def load_wrong(cls, *args, **kwargs):
            loaded, info = load(cls, *args, **kwargs)
            if wrong == 'weights':
                loaded.classifier.bias.data[0] += 1
            else:
                loaded.classifier.register_forward_hook(lambda module, args, out: out + 1)
            return loaded, info

        monkeypatch.setattr(type(hf), 'from_pretrained', classmethod(load_wrong))
        with pytest.raises(ewa.exporting.NotVerified, match=wrong):
            ewa.export(ewa.to_dense(hf), tmp_path / 'out')
        assert not os.listdir(tmp_path)

    def test_a_moe_model_warns_when_it_is_saved_under_the_dense_name(self, hf, images, tmp_path):
        torch.save(hf, tmp_path / 'whole.pt')
        copied = deepcopy(hf)
        for model in (hf, copied):
            with pytest.warns(UserWarning, match='ViTForImageClassification has MoE layers.*from_pretrained would'):
                model.save_pretrained(tmp_path / 'moe')
        assert copied.save_pretrained.__self__ is copied
        other = ewa.to_moe(type(hf)(hf.config)).eval()
        other.load_state_dict(load_file(tmp_path / 'moe' / 'model.safetensors'))
        assert torch.equal(other(images).logits, hf(images).logits)
        assert torch.equal(torch.load(tmp_path / 'whole.pt', weights_only=False)(images).logits, hf(images).logits)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            ewa.to_dense(hf).save_pretrained(tmp_path / 'dense')
        with pytest.raises(ValueError, match='has MoE layers'):
            ewa.export(hf, tmp_path / 'out')


def test_a_torchvision_model_is_written_as_its_state_dict(images, tmp_path):
    def build():
        return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)

    torch.manual_seed(0)
    model = scatter(ewa.to_moe(build())).eval()
    ewa.export(ewa.to_dense(model), tmp_path / 'out')
    assert sorted(os.listdir(tmp_path / 'out')) == ['README.md', 'config.json', 'model.safetensors']
    loaded = build().eval()
    loaded.load_state_dict(load_file(tmp_path / 'out' / 'model.safetensors'))
    assert torch.equal(loaded(images), model(images))
    assert config_of(tmp_path / 'out')['model_class'] == 'torchvision.models.vision_transformer.VisionTransformer'
    with pytest.raises(ValueError, match='names no architecture'):
        ewa.load(tmp_path / 'out')
    with pytest.raises(ValueError, match='class_names of torchvision'):
        ewa.export(loaded, tmp_path / 'new', ['a', 'b', 'c'])


class TestWrappers:
    def module(self, **parts):
        lightning = pytest.importorskip('lightning')

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                for name, part in parts.items():
                    setattr(self, name, part)

        return Module()

    def test_the_model_inside_is_written(self, tiny, images, tmp_path):
        model = self.module(net=tiny(), loss=nn.CrossEntropyLoss())
        ewa.to_moe(model, init='independent').eval()
        dense = ewa.to_dense(model)
        ewa.export(dense, tmp_path / 'out')
        assert torch.equal(ewa.load(tmp_path / 'out').eval()(images), model.net(images))
        compiled = torch.compile(dense.net, backend='eager')
        ewa.export(compiled, tmp_path / 'compiled')
        assert contents(tmp_path / 'compiled')['model.safetensors'] == contents(tmp_path / 'out')['model.safetensors']

    def test_the_model_inside_may_have_been_converted_itself(self, tiny, images, tmp_path):
        model = self.module(net=ewa.to_moe(tiny(), init='independent'))
        ewa.export(ewa.to_dense(model), tmp_path / 'out')
        assert config_of(tmp_path / 'out')['architecture'] == 'vit_tiny_patch16_224'
        assert torch.equal(ewa.load(tmp_path / 'out').eval()(images), model.eval().net(images))

    def test_of_two_parts_with_weights_none_is_guessed(self, tiny, tmp_path):
        with pytest.raises(ValueError, match='Module has weights in student and teacher: export the part'):
            ewa.export(self.module(student=tiny(), teacher=tiny()), tmp_path / 'out')


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'convnext_atto'])
def test_a_model_that_is_loaded_is_not_drawn_first(name, tmp_path):
    """Parameters come from the file alone: loading draws nothing, as far as timm fills them by torch.nn.init."""
    model = timm.create_model(name, num_classes=3)
    ewa.export(model, tmp_path / 'dense')
    state = torch.get_rng_state()
    loaded = ewa.load(tmp_path / 'dense')
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    other = ewa.load(tmp_path / 'dense', num_classes=5)  # its new classifier is drawn
    assert other.get_classifier().weight.std() > 0
    assert not torch.equal(torch.get_rng_state(), state)
