"""Turn a MoE model into a dense one and export it as a vanilla timm folder.

    python convert.py output/demo/best --output vit                             # a run of train.py
    python convert.py output/demo/best --output vit --data-dir imagenet         # ... and compare accuracies
    python convert.py weights.safetensors --model vit_small_ewa --output vit    # bare weights, also of timm's train.py
"""
import json
import logging
from pathlib import Path

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.models import load_state_dict

import ewa
from ewa.checkpoint import load_ema, read_state
from ewa.data import class_names, eval_loader, open_dataset
from ewa.diagnostics import distances_to_mean
from ewa.moe import moe_layers
from ewa.options import convert_parser
from ewa.vision_transformer import has_experts


def load_source(args):
    """The MoE model of SRC and what is known of its training: class names, data config, provenance."""
    source = Path(args.source)
    if (source / 'config.json').is_file():
        config = json.loads((source / 'config.json').read_text())
        known = dict(class_names=config.get('label_names'), provenance=config.get('ewa', {}))
        return ewa.load(source, ema=args.use_ema), known
    if (source / 'state.json').is_file():
        state = read_state(source)
        if args.use_ema and not (source / 'ema.safetensors').is_file():
            raise ValueError(f'{source} has no EMA weights; the run was not trained with --model-ema.')
        weights = load_ema(source) if args.use_ema else load_state_dict(str(source / 'model.safetensors'))
        kwargs = {k: v for k, v in state['model'].items() if k != 'architecture'}
        model = timm.create_model(
            state['model']['architecture'], pretrained=True, pretrained_cfg_overlay=dict(
                state_dict=weights, num_classes=kwargs.get('num_classes'), **state['data_config']), **kwargs)
        return model, dict(class_names=state['class_names'], provenance=state['provenance'])
    if source.is_dir():
        inside = [name for name in ('best', 'last') if (source / name / 'config.json').is_file()]
        raise ValueError(f'{source} is neither a model folder nor a checkpoint folder'
                         + (f'; did you mean {source / inside[0]}?' if inside else ': it has no config.json or state.json.'))
    if not source.is_file():
        raise ValueError(f'{source} does not exist.')

    if not args.model:
        raise ValueError(f'{source} is a bare file of weights: name their architecture with --model, e.g. vit_small_ewa.')
    if not timm.is_model(args.model.split('.')[0]):
        raise ValueError(f'--model {args.model} is not a model.')
    try:
        weights = load_state_dict(str(source), use_ema=args.use_ema)
    except Exception as e:  # whatever a broken or foreign file makes of the readers
        raise ValueError(f'{source} can\'t be read as tensors: {e}') from e
    if not has_experts(weights):
        raise ValueError(f'{source} has no experts: these are the weights of a dense model.')
    cfg = timm.models.get_pretrained_cfg(args.model.split('.')[0])
    classifier = weights.get(f'{cfg.classifier}.weight')
    kwargs = dict(args.model_kwargs)
    if classifier is not None:
        kwargs.setdefault('num_classes', len(classifier))
    for key in ('img_size', 'in_chans'):
        if getattr(args, key) is not None:
            kwargs.setdefault(key, getattr(args, key))
    overlay = dict(state_dict=weights, num_classes=kwargs.get('num_classes'))
    return timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs), {}


@torch.no_grad()
def logits_of(model, batches, device):
    """Logits and labels of all images, (N, classes) and (N,), on the CPU."""
    model = model.to(device).eval()
    pairs = [(model(images.to(device)).float().cpu(), target) for images, target in batches]
    return torch.cat([output for output, _ in pairs]), torch.cat([target for _, target in pairs])


def main(argv=None):
    parser = convert_parser()
    args = parser.parse_args(argv)
    logging.getLogger('timm').setLevel(logging.ERROR)
    output = Path(args.output)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        if output.exists() and not args.overwrite:
            raise ValueError(f'{output} exists: give another --output, or --overwrite to replace it.')
        model, known = load_source(args)
        model.eval()
        if not any(moe_layers(model)):
            raise ValueError(f'{args.source} holds a dense model: there is nothing to convert.')
        data_config = resolve_input_data_config(model, vars(args))
        batches = None
        if args.data_dir or args.dataset:
            images = open_dataset(args, args.val_split, is_training=False, in_chans=data_config['input_size'][0])
            names = class_names(images)
            if names is not None and len(names) != model.num_classes:
                raise ValueError(f'The data has {len(names)} classes, the model {model.num_classes}.')
            if names is not None and known.get('class_names') and names != list(known['class_names']):
                raise ValueError('The classes of the data are not those the model was trained on.')
            batches = eval_loader(images, args, data_config)
        dense = ewa.to_dense(model, args.method)
    except (ValueError, TypeError, RuntimeError, OSError) as e:
        parser.error(e)

    layers = dict(moe_layers(model))
    distances = distances_to_mean(model)
    print(f'{args.source}: {model.pretrained_cfg["architecture"]}, {len(layers)} MoE layers')
    print(f'  {"layer":<24} experts   distance to their mean, relative to its norm')
    for name, layer in layers.items():
        print(f'  {name:<24} {len(layer.experts):>7}   {distances[name]:.4f}')
    if batches is not None:
        before, target = logits_of(model, batches, device)
        after, _ = logits_of(dense, batches, device)
        top1 = [100 * (logits.argmax(1) == target).float().mean().item() for logits in (before, after)]
        print(f'top-1 of {len(target)} images: {top1[0]:.2f} before, {top1[1]:.2f} after conversion; largest change of a '
              f'logit {(before - after).abs().max().item():.3g}')
    try:
        ewa.export(
            dense.cpu(), output, known.get('class_names'), data_config,
            {k: v for k, v in known.get('provenance', {}).items() if k != 'versions'}, args.overwrite, args.onnx)
    except (ValueError, RuntimeError, OSError) as e:
        parser.error(e)
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, dense)]
    print(f'{count[0]:.2f} M parameters before, {count[1]:.2f} M after: a plain {dense.pretrained_cfg["architecture"]}')
    print(f'{output}: loaded strictly, same outputs' + (f'; {output / "model.onnx"}: checked with onnxruntime' * args.onnx))
    print(f"Load it with:  timm.create_model('local-dir:{output}', pretrained=True)")
    print('(without pretrained=True, timm leaves the weights random and says nothing)')


if __name__ == '__main__':
    main()
