import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import convert
import ewa
from ewa.checkpoint import checkpoints
from ewa.diagnostics import distances_to_mean
from ewa.exporting import write_folder
from gated import scatter
from runs import TINY, config_of, fails, files, folder, logits_and_labels, run_convert, summary, top1, trained  # noqa: F401  fixtures among them

BARE = ['--model', 'vit_ewa', '--model-kwargs', *(f'{k}={v}' for k, v in TINY.items() if k != 'num_classes')]


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'vit'


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('vit_ewa', **TINY)


def vanilla(directory):
    return timm.create_model(f'local-dir:{directory}', pretrained=True).eval()


def same_weights(directory, moe, **options):
    expected = ewa.to_dense(moe, **options).state_dict()
    written = load_file(directory / 'model.safetensors')
    return written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)


def test_the_vanilla_folder_computes_what_the_moe_computes(trained, folder, out, capsys):
    before = files(trained)
    run_convert(trained / 'last', '--output', out)
    moe = ewa.load(trained / 'last')
    logits, _ = logits_and_labels(vanilla(out), folder)
    assert torch.equal(logits, logits_and_labels(moe, folder)[0])
    config = config_of(out)
    assert config['architecture'] == 'vit_tiny_patch16_224' and config['num_classes'] == 10
    assert config['label_names'] == config_of(trained / 'last')['label_names']
    assert config['pretrained_cfg']['mean'] == [0.286] and config['pretrained_cfg']['input_size'] == [1, 28, 28]
    assert config['ewa']['updates'] == 10 and config['ewa']['method'] == 'average'
    assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors'] and files(trained) == before

    text = capsys.readouterr().out
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (moe, ewa.to_dense(moe))]
    assert f'{millions[0]:.2f} M parameters before, {millions[1]:.2f} M after' in text
    distance = distances_to_mean(moe)['blocks.1.mlp']
    (line,) = [line for line in text.splitlines() if 'blocks.1.mlp' in line]
    assert f'{distance:.4f}' in line and ' 4 ' in line


def test_the_printed_line_loads_the_folder_without_this_package(trained, out, capsys):
    run_convert(trained / 'last', '--output', out)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Load it with:')]
    call = line.removeprefix('Load it with:').strip()
    code = f'import sys; sys.modules["ewa"] = None; import timm; print({call}.head)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'out_features=10' in done.stdout


def test_accuracy_before_and_after(trained, folder, out, capsys):
    run_convert(trained / 'last', '--output', out, '--data-dir', folder, '--workers', 0, '--batch-size', 7)
    text = capsys.readouterr().out
    expected = summary(trained)[-1]['eval_top1']
    assert f'top-1 of 40 images: {expected:.2f} before' in text
    after = re.search(r'^ +average +([\d.]+)', text, re.M)
    assert float(after.group(1)) == pytest.approx(expected, abs=0.005)
    assert top1(vanilla(out), folder) == pytest.approx(expected)


def test_ema_weights_on_request(trained, tmp_path):
    for i, source in enumerate((trained / 'last', checkpoints(trained)[-1])):
        for ema in (False, True):
            out = tmp_path / f'{i}{ema}'
            run_convert(source, '--output', out, *['--use-ema'] * ema)
            assert same_weights(out, ewa.load(trained / 'last', ema=ema))
            assert not same_weights(out, ewa.load(trained / 'last', ema=not ema))
            assert config_of(out)['label_names'] == config_of(trained / 'last')['label_names']


def test_no_column_without_a_value(out, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model('vit_ewa', router='topk', **TINY).state_dict(), out.with_suffix('.safetensors'))
    run_convert(out.with_suffix('.safetensors'), *BARE, 'router=topk', '--output', out)
    header = next(line for line in capsys.readouterr().out.splitlines() if 'mean cosine' in line)
    assert 'change' not in header  # it takes images to know


def test_bare_safetensors(model, out):
    save_file(model.state_dict(), out.with_suffix('.safetensors'))
    run_convert(out.with_suffix('.safetensors'), *BARE, '--output', out)
    assert same_weights(out, model)


def test_size_and_channels_of_a_bare_file_as_flags(model, out):
    save_file(model.state_dict(), out.with_suffix('.safetensors'))
    kwargs = [f'{k}={v}' for k, v in TINY.items() if k not in ('img_size', 'in_chans', 'num_classes')]
    run_convert(out.with_suffix('.safetensors'), '--output', out, '--img-size', 28, '--in-chans', 1, '--model',
                'vit_ewa', '--model-kwargs', *kwargs)
    assert same_weights(out, model) and config_of(out)['pretrained_cfg']['input_size'] == [1, 28, 28]


@pytest.mark.parametrize('ema', [False, True])
def test_checkpoint_of_timms_train_script(model, out, ema):
    average = timm.create_model('vit_ewa', **TINY)
    prefixed = {f'module.{key}': value for key, value in model.state_dict().items()}
    torch.save(dict(
        epoch=3, arch='vit_ewa', state_dict=prefixed, state_dict_ema=average.state_dict(), optimizer={}, version=2,
        args=argparse.Namespace(model='vit_ewa', lr=None, betas=[0.9, 0.99]), metric=1.5), out.with_suffix('.pth'))
    run_convert(out.with_suffix('.pth'), *BARE, '--output', out, *['--use-ema'] * ema)
    assert same_weights(out, average if ema else model)


def test_onnx(trained, folder, out, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    run_convert(trained / 'last', '--output', out, '--onnx')
    assert 'model.onnx: checked with onnxruntime' in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / 'model.onnx', providers=['CPUExecutionProvider'])
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        expected = vanilla(out)(images)
    assert torch.allclose(torch.from_numpy(session.run(None, {'image': images.numpy()})[0]), expected, atol=1e-4)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('write, read', [
    (lambda payload, path: torch.save(dict(state_dict={'a.experts.0': payload}), path),
     lambda path: torch.load(path, weights_only=False)),
    (lambda payload, path: path.write_bytes(pickle.dumps(payload, protocol=2)),
     lambda path: pickle.loads(path.read_bytes())),
], ids=['torch', 'pickle'])
def test_a_pickle_is_never_run(write, read, out):
    ran, path = out.with_name('ran'), out.with_suffix('.pth')
    write(Malicious(ran), path)
    code, lines = fails(run_convert, path, *BARE, '--output', out)
    assert code == 2 and str(path) in lines[-1] and "can't be read as tensors" in lines[-1]
    assert not ran.exists() and not out.exists()
    read(path)
    assert ran.exists()  # what a plain load of this file does


MISTAKES = {
    'nothing there': (['{}/nope'], 'nope does not exist'),
    'empty folder': (['{}/empty'], 'neither a model folder nor a checkpoint folder'),
    'experiment': (['{run}'], 'did you mean', 'run/best'),
    'dense model': (['{}/dense'], 'dense model', 'nothing to convert'),
    'no ema': (['{}/noema', '--use-ema'], 'no EMA weights'),
    'bare file': (['{}/moe.pth'], 'name their architecture with --model'),
    'bare file without ema': (['{}/moe.pth', '--use-ema', *BARE], 'no EMA weights'),
    'dense bare file': (['{}/dense.pth', *BARE], 'no experts'),
    'unknown model': (['{}/moe.pth', '--model', 'nope'], 'nope is not a model'),
    'wrong model': (['{}/moe.pth', '--model', 'vit_small_ewa'], 'moe.pth', 'vit_small_ewa'),
    'other experts': (['{}/moe.pth', *BARE, 'num_experts=3'], 'moe.pth', 'num_experts'),
    'images for nothing': (['{run}/best', '--calibration-images', '5'], '--calibration-images 5 does nothing without'),
    'a folder for nothing': (
        ['{run}/best', '--calibration-dir', '{}'], '--calibration-dir', 'does nothing without a router'),
    'no tensors': (['{}/text.pth', *BARE], 'text.pth', "can't be read as tensors"),
    'unknown method': (['{run}/best', '--method', 'nope'], 'nope', 'average'),
    'unknown flag': (['{run}/best', '--methd', 'sum'], 'nearest flag is --method'),
    'lost source': (['--model-kwargs', 'a=1', '{run}/best'], 'run/best is not KEY=VALUE'),
    'no data': (['{run}/best', '--data-dir', '{}/missing'], 'missing does not exist'),
    'option of another method': (['{run}/best', '--lam', '1'], '--lam is an option of do_acp', 'not of average'),
    'no such expert': (['{run}/best', '--method', 'aligned', '--reference', '9'], 'blocks.1.mlp', '9'),
    'damaged state': (['{}/damaged'], 'state.json is damaged'),
    'damaged weights': (['{}/half'], 'half can\'t be loaded'),
    'class count': (['{run}/best', '--data-dir', '{}/two'], '2 classes, the model 10'),
    'class names': (['{run}/best', '--data-dir', '{}/other'], 'not those the model was trained on'),
}


@pytest.fixture(scope='session')
def mistakes(trained, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp('mistakes')
    (root / 'empty').mkdir()
    moe = timm.create_model('vit_ewa', **TINY)
    torch.save(moe.state_dict(), root / 'moe.pth')
    torch.save(ewa.to_dense(moe).state_dict(), root / 'dense.pth')
    ewa.export(ewa.to_dense(moe), root / 'dense')
    ewa.exporting.write_folder(moe, root / 'noema')
    (root / 'text.pth').write_text('not tensors')
    for name, file in (('damaged', 'state.json'), ('half', 'model.safetensors')):
        shutil.copytree(checkpoints(trained)[-1] if name == 'damaged' else trained / 'best', root / name)
        (root / name / file).write_bytes(b'half')
    for name, classes in (('two', 2), ('other', 10)):
        for split in ('train', 'val'):
            (root / name / split).mkdir(parents=True)
            for i, path in enumerate(sorted((folder / split).iterdir())[:classes]):
                os.symlink(path, root / name / split / f'class{i}')
    return root


@pytest.mark.parametrize('flags, words', [(flags, words) for flags, *words in MISTAKES.values()], ids=list(MISTAKES))
def test_a_mistake_gives_one_line_and_exit_code_2(mistakes, trained, out, capsys, flags, words):
    given = [flag.replace('{run}', str(trained)).replace('{}', str(mistakes)) for flag in flags]
    code, lines = fails(run_convert, '--output', out, *given)
    errors = [line for line in lines if line.startswith('convert.py: error: ')]
    assert code == 2 and len(errors) == 1 and lines[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    assert not list(out.parent.iterdir()) and not capsys.readouterr().out


def test_what_is_not_verified_is_one_line(trained, out, monkeypatch):
    monkeypatch.setattr(torch, 'equal', lambda *tensors: False)
    code, lines = fails(run_convert, trained / 'last', '--output', out)
    assert code == 2 and 'was not written: The exported folder does not load' in lines[-1]
    assert not list(out.parent.iterdir())


def test_output_that_exists_stays(trained, out):
    run_convert(trained / 'last', '--output', out, '--use-ema')
    before = files(out)
    code, lines = fails(run_convert, trained / 'last', '--output', out)
    assert code == 2 and f'{out} exists' in lines[-1] and files(out) == before
    run_convert(trained / 'last', '--output', out, '--overwrite')
    assert files(out) != before and same_weights(out, ewa.load(trained / 'last'))


def test_the_source_is_not_overwritten(trained):
    before = files(trained)
    for source in (trained / 'last', trained / 'last' / 'model.safetensors'):
        code, lines = fails(run_convert, source, '--output', trained / 'x' / '..' / 'last', '--overwrite', *BARE)
        assert code == 2 and 'last is where the MoE model itself is' in lines[-1] and files(trained) == before


def test_missing_onnx_is_found_out_before_work(trained, folder, out, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    code, lines = fails(run_convert, trained / 'last', '--output', out, '--onnx', '--data-dir', folder)
    assert code == 2 and 'pip install onnx onnxruntime onnxscript' in lines[-1]
    assert not capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_only_a_model_folder_is_overwritten(trained, out, kind):
    if kind == 'folder':
        out.mkdir()
    precious = out / 'thesis.tex' if kind == 'folder' else out
    precious.write_text('mine')
    code, lines = fails(run_convert, trained / 'last', '--output', out, '--overwrite')
    assert code == 2 and f'{out} is not a model folder' in lines[-1]
    assert precious.read_text() == 'mine' and os.listdir(out.parent) == ['vit']


@pytest.mark.slow
def test_timms_own_validation_agrees(trained, folder, out, capsys):
    """Needs timm's validate.py, which is not part of its package: EWA_TIMM_VALIDATE=/path/to/validate.py."""
    script = os.environ.get('EWA_TIMM_VALIDATE')
    if not script:
        pytest.skip('EWA_TIMM_VALIDATE does not name timm\'s validate.py')
    run_convert(trained / 'last', '--output', out, '--data-dir', folder, '--workers', 0)
    printed = float(re.search(r'^ +average +([\d.]+)', capsys.readouterr().out, re.M).group(1))
    done = subprocess.run(
        [sys.executable, script, '--data-dir', str(folder), '--model', f'local-dir:{out}', '--pretrained', '--device',
         'cpu', '-j', '1', '--batch-size', '8', '--input-img-mode', 'L', '--in-chans', '1', '--num-classes', '10',
         '--results-file', str(out.with_suffix('.json')), '--results-format', 'json'],
        capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index('{'):])
    assert result['top1'] == pytest.approx(printed, abs=0.01)


def _broken(*args, **kwargs):
    return None + 1


@pytest.mark.parametrize('where', [
    'convert.load_source', 'ewa.to_dense', 'ewa.diagnose', 'ewa.moe.fuse_experts', 'ewa.moe.mean_state',
    'ewa.exporting.versions', 'ewa.vision_transformer.load_experts'])
def test_a_mistake_of_ours_is_a_traceback(trained, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, _broken)
    with pytest.raises(TypeError, match='NoneType'):
        run_convert(trained / 'best', '--output', tmp_path / 'vit')


def test_k_experts_of_a_folder_make_a_wider_vanilla_model(out, tmp_path):
    write_folder(scatter(timm.create_model('vit_ewa', router='topk', layers='all', **TINY)), tmp_path / 'moe')
    run_convert(tmp_path / 'moe', '--output', out, '--k', 2)  # other than 1,000 classes, which timm's loader remembers
    wide = vanilla(out)
    assert wide.num_classes == 10 and {block.mlp.fc1.out_features for block in wide.blocks} == {2 * 4 * 32}
    assert same_weights(out, ewa.load(tmp_path / 'moe'), k=2)


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
def test_refit_says_what_it_saw_and_what_is_left(folder, out, tmp_path, capsys):
    torch.manual_seed(0)
    moe = scatter(timm.create_model('vit_ewa', router='topk', **TINY))
    write_folder(moe, tmp_path / 'moe')
    run_convert(tmp_path / 'moe', '--output', out, '--method', 'refit', '--refit-steps', 3, '--data-dir', folder,
                '--calibration-images', 40, '--workers', 0, '--report', tmp_path / 'report')
    text = capsys.readouterr().out
    page = (tmp_path / 'report' / 'report.md').read_text(encoding='utf-8')
    before = re.search(r'([\d.]+) before conversion', text)[1]
    after = re.search(r'^  refit, 3 steps +([\d.]+)', text, re.M)[1]
    assert f'| before conversion | {before} |' in page and f'| refit, 3 steps (written) | {after} |' in page
    assert f'python convert.py {tmp_path / "moe"} --output {out} --method refit --refit-steps 3' in page
    units = moe.blocks[1].mlp.experts[0].fc1.out_features
    assert f'| blocks.1.mlp | topk | 4 x {units} → {units} |' in page
    record = config_of(out)['ewa']
    assert record['method'] == 'refit' and record['steps'] == 3 and record['calibration_images'] == 40
    assert (f'refit, 3 steps: 40 images, an eighth of them held out, {35 * 17} tokens a layer, '
            f'{record["seconds"]:.1f} s') in text
    for layer, error in record['error'].items():
        assert re.search(rf'{layer} +{error["fitted"]:.4f} +{error["held_out"]:.4f}\n', text)
        assert f'| {layer} | {error["fitted"]:.4f} | {error["held_out"]:.4f} |' in page
    assert vanilla(out).blocks[1].mlp.fc1.out_features == moe.blocks[1].mlp.experts[0].fc1.out_features
    (tmp_path / 'empty').mkdir()
    for flags, words in (
            (['--method', 'refit'], 'refit needs calibration images'),
            (['--calibration-dir', '{}/nowhere'], '--calibration-dir {}/nowhere does not exist.'),
            (['--calibration-dir', '{}/empty'], "--calibration-dir {}/empty can't be read: "),
            (['--calibration-images', '5'], '--calibration-images 5 does nothing without images: leave it out, or'),
            (['--refit-steps', 3], '--refit-steps is an option of refit, not of average')):
        flags, words = [str(flag).replace('{}', str(tmp_path)) for flag in flags], words.replace('{}', str(tmp_path))
        code, lines = fails(run_convert, tmp_path / 'moe', '--output', tmp_path / 'x', *flags)
        assert code == 2 and words in lines[-1]


def test_what_is_recommended():
    scores = {'average': (17.5, 0.), 'top_kg': (22.5, .7), 'aligned': (22.5, .4)}
    assert convert.recommended(scores, gated=True) == 'aligned'
    assert convert.recommended(scores, gated=False) == 'average'  # exact; the others' lead is noise


def test_what_the_moe_had_is_not_told_of_the_dense_model(folder, out, tmp_path, capsys):
    torch.manual_seed(0)
    moe = scatter(timm.create_model('vit_ewa', router='topk', **TINY))
    write_folder(moe, tmp_path / 'moe', provenance=dict(epochs=3, loss=0.5, top1=97., top5=99., ema_top1=98.))
    run_convert(tmp_path / 'moe', '--output', out, '--method', 'svd_kg')
    record = config_of(out)['ewa']
    assert record['epochs'] == 3 and record['moe'] == dict(loss=0.5, top1=97., top5=99., ema_top1=98.)
    assert not {'loss', 'top1', 'top5', 'ema_top1'} & set(record) and 'Top-1' not in (out / 'README.md').read_text()
    run_convert(tmp_path / 'moe', '--output', out, '--method', 'svd_kg', '--data-dir', folder, '--workers', 0,
                '--overwrite')
    record = config_of(out)['ewa']
    measured = re.search(r'^  svd_kg +([\d.]+)', capsys.readouterr().out, re.M)[1]
    assert f'{record["top1"]:.2f}' == measured and record['top1_images'] == 40
    assert f'- Top-1: {measured} % of 40 validation images' in (out / 'README.md').read_text()


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('kind', ['flat', 'deep', 'tar'])
def test_calibration_images_need_neither_classes_nor_labels(folder, out, tmp_path, capsys, kind):
    write_folder(scatter(timm.create_model('vit_ewa', router='topk', **TINY)), tmp_path / 'moe')
    images, root = sorted((folder / 'train').rglob('*.png'))[::2], tmp_path / 'images'
    for i, path in enumerate(images):
        target = root / ('some/where' if kind == 'deep' and i % 2 else '') / f'{i:03}.png'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    if kind == 'tar':
        root = shutil.make_archive(str(root), 'tar', root)
    (tmp_path / 'images' / '000.png').write_bytes(b'no image')  # in a tar it still is one
    run_convert(tmp_path / 'moe', '--output', out, '--calibration-dir', root, '--calibration-images', 20,
                '--workers', 0, '--report', tmp_path / 'report')
    text = capsys.readouterr().out
    readable = 20 - (kind != 'tar')
    assert config_of(out)['ewa']['method'] == 'refit' and config_of(out)['ewa']['calibration_images'] == readable
    assert f'refit: {readable} images' in text and 'top-1' not in text
    assert ("warning: calibration: 1 of 30 images can't be read" in text) == (kind != 'tar')
    run_convert(tmp_path / 'moe', '--output', tmp_path / 'with', '--calibration-dir', root, '--data-dir', folder,
                '--calibration-images', 20, '--workers', 0)
    assert 'top-1 of' in capsys.readouterr().out
    weights = [load_file(path / 'model.safetensors') for path in (out, tmp_path / 'with')]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.filterwarnings('ignore:.*calibration tokens for')
@pytest.mark.parametrize('router, images, method', [
    ('topk', True, 'refit'), ('topk', False, 'average'), ('random', True, 'average')])
def test_the_method_that_people_get_first(folder, out, tmp_path, router, images, method):
    write_folder(scatter(timm.create_model('vit_ewa', router=router, **TINY)), tmp_path / 'moe')
    run_convert(tmp_path / 'moe', '--output', out, *(['--data-dir', folder, '--workers', 0] * images))
    assert config_of(out)['ewa']['method'] == method


def test_layers_of_both_kinds_are_averaged_unless_it_is_said_otherwise(folder, out, tmp_path, monkeypatch):
    moe = timm.create_model('vit_tiny_patch16_224', **{k: v for k, v in TINY.items() if k in (
        'img_size', 'patch_size', 'in_chans', 'embed_dim', 'depth', 'num_heads', 'num_classes')})
    for block, router in zip(moe.blocks, ('random', 'topk')):
        ewa.to_moe(block, layers='mlp', router=router)
    monkeypatch.setattr(convert, 'load_source', lambda *args: (moe, {}))
    (tmp_path / 'moe').mkdir()
    run_convert(tmp_path / 'moe', '--output', out, '--data-dir', folder, '--workers', 0)
    assert config_of(out)['ewa']['method'] == 'average'


def test_all_methods_have_refit_without_and_with_steps():
    def titles(*flags, gated=True):
        args = convert.convert_parser().parse_args(['moe', '--output', 'vit', *flags])
        return convert.conversions(args, gated)

    everything = titles('--method', 'all', '--ridge', '0.01')
    assert {title: value for title, value in everything.items() if value[0] == 'refit'} == {
        'refit': ('refit', dict(ridge=.01)), 'refit, 300 steps': ('refit', dict(ridge=.01, steps=300))}
    assert titles('--method', 'all', '--refit-steps', '7')['refit, 7 steps'] == ('refit', dict(steps=7))
    both = titles('--method', 'all', '--refit-steps', '7', '--refit-joint-steps', '2')
    assert both['refit, 7 and 2 joint steps'] == ('refit', dict(steps=7, joint_steps=2))
    assert titles('--method', 'refit', '--refit-steps', '7') == {'refit, 7 steps': ('refit', dict(steps=7))}
    assert not any('refit' in title for title in titles('--method', 'all', gated=False))
