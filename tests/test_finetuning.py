"""Fine-tuning as people do it, and what comes after the export."""
import copy
import warnings

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import ewa
from ewa.ffn import block_of, find_ffns
from ewa.moe import moe_layers
from gated import scatter
from runs import folder, run_convert, train  # noqa: F401  a fixture among them

SMALL = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2)


def test_fine_tuning_from_real_weights_with_layer_decay(tiny, folder, tmp_path):
    """Head replaced, position embedding resized, experts start as the pretrained FFN, the export is vanilla."""
    pretrained = scatter(tiny(img_size=48, num_classes=21))
    ewa.export(pretrained, tmp_path / 'pretrained')
    kwargs = [f'{key}={value}' for key, value in SMALL.items()]
    train.main([
        '--model', 'vit_tiny_patch16_224', '--model-kwargs', *kwargs, '--img-size', '32', '--num-experts', '2',
        '--pretrained-path', str(tmp_path / 'pretrained' / 'model.safetensors'), '--layer-decay', '.75', '--lr', '1e-3',
        '--share-rate', '.1', '--epochs', '1', '--warmup-epochs', '0', '--data-dir', str(folder), '-b', '8',
        '--output', str(tmp_path), '--experiment', 'tuned', '--workers', '0'])
    model = ewa.load(tmp_path / 'tuned' / 'last')
    assert model.pos_embed.shape[1] == 17 != pretrained.pos_embed.shape[1] and model.num_classes == 10
    start, tuned = pretrained.state_dict(), ewa.to_dense(model).state_dict()
    for key in ('blocks.1.mlp.fc1.weight', 'blocks.0.attn.qkv.weight', 'patch_embed.proj.weight'):
        moved = (tuned[key] - start[key]).norm() / start[key].norm()
        assert 0 < moved < .2
    # lower layers learn less
    moves = [float((tuned[key] - start[key]).abs().mean()) for key in
             (f'blocks.{i}.attn.qkv.weight' for i in (0, 3))]
    assert moves[0] < moves[1]
    run_convert(tmp_path / 'tuned' / 'last', '--output', tmp_path / 'vit')
    vit = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(images), model.eval()(images))


def test_head_and_position_embedding_are_replaced_by_timm_in_a_loop_of_ones_own(tiny, tmp_path):
    pretrained = scatter(tiny(img_size=48, num_classes=21))
    ewa.export(pretrained, tmp_path / 'pretrained')
    overlay = dict(file=str(tmp_path / 'pretrained' / 'model.safetensors'), num_classes=-1)
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    ewa.to_moe(model)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-2, weight_decay=.05, layer_decay=.5)
    ewa.ExpertAverager(model, .1).attach(optimizer)
    scales = {group['lr_scale'] for group in optimizer.param_groups}
    assert len(scales) > 4
    nn.functional.cross_entropy(model.train()(torch.randn(6, 3, 32, 32)), torch.arange(6) % 3).backward()
    optimizer.step()
    dense = ewa.to_dense(model)
    ewa.export(dense, tmp_path / 'tuned', ['a', 'b', 'c'])
    fresh = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=3, **SMALL)
    fresh.load_state_dict(dense.state_dict())


class TestLoRA:
    def adapt(self, model, targets, whole=()):
        peft = pytest.importorskip('peft')
        config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=['head', *whole], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return peft.get_peft_model(model, config)

    @pytest.mark.parametrize('first', ['adapters', 'experts'])
    @pytest.mark.parametrize('form', ['experts', 'mean'])
    def test_on_attention_beside_experts(self, tiny, images, first, form):
        model = tiny()
        if first == 'experts':
            ewa.to_moe(model, form=form)
        adapted = self.adapt(model, ['qkv'])
        if first == 'adapters':
            ewa.to_moe(adapted, form=form)
        layers = dict(moe_layers(adapted))
        assert len(layers) == 2
        for layer in layers.values():  # PEFT freezes what it does not adapt
            for _, p in layer.named_parameters():
                p.requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=.1)
        averager = ewa.ExpertAverager(adapted, .1)
        averager.attach(optimizer)
        before = copy.deepcopy(adapted.state_dict())
        adapted.train()(images).square().mean().backward()
        optimizer.step()
        moved = {key for key, value in adapted.state_dict().items() if not torch.equal(value, before[key])}
        assert any('lora_A' in key for key in moved) and any('mlp' in key for key in moved)
        assert not any('qkv.base_layer' in key or 'patch_embed' in key for key in moved) and averager.pulls == 1
        merged = ewa.to_dense(adapted).merge_and_unload().eval()
        torch.testing.assert_close(merged(images), adapted.eval()(images), rtol=1e-4, atol=1e-5)
        assert list(merged.state_dict()) == list(tiny().state_dict())

    def test_on_an_ffn_is_refused_and_its_block_still_counts(self, tiny):
        adapted = self.adapt(tiny(), ['fc1'])
        names = list(find_ffns(adapted))
        assert len(names) == 4 and len({block_of(name) for name in names}) == 4
        with pytest.raises(ValueError, match=r'blocks.1.mlp: .*adapter in fc1.*merge'):
            ewa.to_moe(adapted)
        # adapters on some of the blocks only: the others are counted as they were
        some = self.adapt(tiny(), r'.*blocks\.0\.mlp\.fc1')
        ewa.to_moe(some)
        assert [name.rpartition('blocks.')[2] for name, _ in moe_layers(some)] == ['1.mlp', '3.mlp']

    def test_beside_ffns_that_are_trained_whole(self, tiny, images):
        model = self.adapt(tiny(), ['qkv'], ['mlp'])  # PEFT keeps the FFN of the host beside the one that is trained
        ewa.to_moe(model)
        kept = ('original_module', 'modules_to_save.default')
        assert [name.partition('blocks.')[2] for name, _ in moe_layers(model)] == [
            f'{i}.mlp.{name}' for i in (1, 3) for name in kept]
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        ewa.ExpertAverager(model, .1).attach(optimizer)
        model.train()(images).square().mean().backward()
        optimizer.step()
        merged = ewa.to_dense(model).merge_and_unload().eval()
        torch.testing.assert_close(merged(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        assert list(merged.state_dict()) == list(tiny().state_dict())

    def test_on_experts_is_refused_where_they_are_averaged(self, tiny):
        adapted = self.adapt(ewa.to_moe(tiny()), ['fc1'])
        with pytest.raises(ValueError, match='adapter in fc1'):
            ewa.to_dense(adapted)
        with pytest.raises(ValueError, match='adapter in fc1'):
            ewa.ExpertAverager(adapted, .1).attach(torch.optim.SGD(adapted.parameters(), lr=.1))


class TestAfterExport:
    @pytest.fixture
    def vit(self, tiny, tmp_path):
        ewa.export(ewa.to_dense(scatter(ewa.to_moe(tiny()))), tmp_path / 'vit')
        return timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True).eval()

    @pytest.mark.slow
    def test_onnxruntime(self, tiny, images, tmp_path):
        onnxruntime = pytest.importorskip('onnxruntime')
        model = scatter(ewa.to_moe(tiny())).eval()
        ewa.export(ewa.to_dense(model), tmp_path / 'vit', onnx=True)
        session = onnxruntime.InferenceSession(str(tmp_path / 'vit' / 'model.onnx'), providers=['CPUExecutionProvider'])
        logits = torch.from_numpy(session.run(None, {'image': images.numpy()})[0])
        torch.testing.assert_close(logits, model(images), rtol=1e-3, atol=1e-4)

    def test_torch_export(self, vit, images):
        program = torch.export.export(vit, (images,))
        torch.testing.assert_close(program.module()(images), vit(images))

    @pytest.mark.filterwarnings('ignore')
    def test_dynamic_int8(self, vit, images):
        if not torch.backends.quantized.supported_engines:
            pytest.skip('torch has no engine for int8 here')
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(vit), {nn.Linear}, dtype=torch.qint8)
        assert 'quantized' in type(small.blocks[1].mlp.fc1).__module__
        change = (small(images) - vit(images)).norm() / vit(images).norm()
        assert 0 < change < .1

    @pytest.mark.slow
    @pytest.mark.filterwarnings('ignore')
    def test_torchao(self, vit, images):
        quantization = pytest.importorskip('torchao.quantization')
        small = copy.deepcopy(vit)
        quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
        assert 'ao' in type(small.blocks[1].mlp.fc1.weight).__module__
        change = (small(images) - vit(images)).norm() / vit(images).norm()
        assert 0 < change < .1
