import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import ewa
import ewa.exporting
from ewa.exporting import write_folder
from ewa.moe import moe_layers

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
    assert sorted(contents(out)) == ['config.json', 'model.safetensors']
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
    assert not {'host', 'num_experts', 'layers', 'router'} & config['model_args'].keys()
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
        with pytest.raises(FileExistsError, match='out exists; give another folder or ask to overwrite'):
            ewa.export(vit, out)
        self.check_untouched(out, before)

    def test_is_replaced_as_a_whole_when_asked(self, vit, out):
        (out / 'ema.safetensors').write_text('of the old model')
        (out / '.git').mkdir()
        (out / '.git' / 'HEAD').write_text('main')
        ewa.export(vit, out, overwrite=True)
        # what others put there stays
        assert sorted(os.listdir(out)) == ['.git', 'config.json', 'model.safetensors', 'notes.txt']
        assert (out / '.git' / 'HEAD').read_text() == 'main' and (out / 'notes.txt').read_text() == 'mine'
        assert 'which' not in config_of(out)['ewa'] and os.listdir(out.parent) == ['out']
        # also where the folder is somewhere else
        (out.parent / 'link').symlink_to('out')
        ewa.export(vit, out.parent / 'link', overwrite=True)
        assert (out / 'notes.txt').exists() and sorted(os.listdir(out.parent)) == ['link', 'out']
        read = load_file(out / 'model.safetensors')
        assert all(torch.equal(read[key], value) for key, value in vit.state_dict().items())

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
