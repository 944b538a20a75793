"""Turn a MoE model into a dense one and export it as a vanilla timm folder.

    python convert.py output/demo/best --output vit                             # a run of train.py
    python convert.py output/demo/best --output vit --data-dir imagenet         # ... and compare accuracies
    python convert.py output/moe/best --output vit --data-dir imagenet --method all    # gated MoE: compare gatherings
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
from ewa.data import calibration_batches, class_names, eval_loader, open_dataset
from ewa.diagnostics import advise, write_report
from ewa.exporting import require_onnx
from ewa.gathering import METHODS
from ewa.moe import is_gated, moe_layers
from ewa.options import convert_parser
from ewa.stacked import unstack
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
                         + (f'; did you mean {source / inside[0]}?' if inside else
                            ': it has no config.json or state.json.'))
    if not source.is_file():
        raise ValueError(f'{source} does not exist.')

    if not args.model:
        raise ValueError(
            f'{source} is a bare file of weights: name their architecture with --model, e.g. vit_small_ewa.')
    if not timm.is_model(args.model.split('.')[0]):
        raise ValueError(f'--model {args.model} is not a model.')
    try:
        weights = unstack(load_state_dict(str(source), use_ema=args.use_ema))
    except Exception as e:  # whatever a broken or foreign file makes of the readers
        raise ValueError(f'{source} can\'t be read as tensors: {e}') from e
    if args.use_ema:
        raw = unstack(load_state_dict(str(source), use_ema=False))
        if all(torch.equal(raw[key], value) for key, value in weights.items()):
            raise ValueError(f'{source} has no EMA weights.')
    if not has_experts(weights):
        raise ValueError(f'{source} has no experts: these are the weights of a dense model.')
    cfg = timm.models.get_pretrained_cfg(args.model_kwargs.get('host') or args.model.split('.')[0])
    classifier = getattr(cfg, 'classifier', None) or ''
    classifier = weights.get(f'{classifier if isinstance(classifier, str) else classifier[0]}.weight')
    kwargs = dict(args.model_kwargs)
    if classifier is not None:
        kwargs.setdefault('num_classes', len(classifier))
    for key in ('img_size', 'in_chans'):
        if getattr(args, key) is not None:
            kwargs.setdefault(key, getattr(args, key))
    overlay = dict(state_dict=weights, num_classes=kwargs.get('num_classes'))
    try:
        return timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs), {}
    except (RuntimeError, ValueError, TypeError) as e:
        raise ValueError(
            f'{source} can\'t be loaded into {args.model} with --model-kwargs {args.model_kwargs}: '
            f'{str(e)[:300]}') from e


@torch.no_grad()
def logits_of(model, batches, device):
    """Logits and labels of all images, (N, classes) and (N,), on the CPU."""
    model = model.to(device).eval()
    pairs = [(model(images.to(device)).float().cpu(), target) for images, target in batches]
    return torch.cat([output for output, _ in pairs]), torch.cat([target for _, target in pairs])


def method_options(method, args):
    """The options among the flags that a method takes."""
    given = dict(rescale=args.rescale or None, score=args.score)
    return {name: value for name, value in given.items() if value is not None and name in [option.name for option in METHODS[method].options]}


def main(argv=None):
    parser = convert_parser()
    args = parser.parse_args(argv)
    logging.getLogger('timm').setLevel(logging.ERROR)
    output = Path(args.output)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        if output.exists() and not args.overwrite:
            raise ValueError(f'{output} exists: give another --output, or --overwrite to replace it.')
        source = Path(args.source)
        if output.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else None):
            raise ValueError(f'--output {output} is where the MoE model itself is: give another folder.')
        if args.onnx:
            require_onnx()
        if args.report and Path(args.report).exists():
            raise ValueError(f'{args.report} exists: give another --report.')
        if args.method == 'all' and not (args.data_dir or args.dataset):
            raise ValueError('--method all compares accuracies: give --data-dir.')
        model, known = load_source(args)
        model.eval()
        layers = dict(moe_layers(model))
        if not layers:
            raise ValueError(f'{args.source} holds a dense model: there is nothing to convert.')
        gated = any(is_gated(layer) for layer in layers.values())
        data_config = resolve_input_data_config(model, vars(args))
        batches, calibration = None, None
        if args.data_dir or args.dataset:
            images = open_dataset(args, args.val_split, is_training=False, in_chans=data_config['input_size'][0])
            names = class_names(images)
            if names is not None and len(names) != model.num_classes:
                raise ValueError(f'The data has {len(names)} classes, the model {model.num_classes}.')
            if names is not None and known.get('class_names') and names != list(known['class_names']):
                raise ValueError('The classes of the data are not those the model was trained on.')
            batches = eval_loader(images, args, data_config)
            if gated:
                # methods may look at training images only: the others measure what came out
                training = open_dataset(
                    args, args.train_split, is_training=False, in_chans=data_config['input_size'][0])
                calibration = calibration_batches(training, args, data_config)
        model = model.to(device)
        methods = [args.method] if args.method != 'all' else [
            method.name for method in METHODS.values() if gated or not method.needs_data]
        dense = {
            method: ewa.to_dense(model, method, calibration, k=args.k, **method_options(method, args))
            for method in methods
        }
        records = ewa.diagnose(model, calibration)
    except (ValueError, TypeError, RuntimeError, OSError) as e:
        parser.error(e)

    print(f'{args.source}: {model.pretrained_cfg["architecture"]}, {len(layers)} MoE layers')
    print(f'  {"layer":<24} experts  distance to mean  mean cosine' + '  change if averaged' * gated)
    for record in records:
        change = f'  {record["change"]:>18.4f}' if gated and 'change' in record else ''
        print(f'  {record["layer"]:<24} {record["num_experts"]:>7}  {record.get("distance", float("nan")):>16.4f}  '
              f'{record.get("cosine", float("nan")):>11.4f}{change}')
    for warning in advise(records) if gated and args.method in ('average', 'all') else ():
        print(f'warning: {warning}')

    best = args.method
    if batches is not None:
        reference, target = logits_of(model, batches, device)

        def top1(logits):
            return 100 * (logits.argmax(1) == target).float().mean().item()

        print(f'top-1 of {len(target)} images: {top1(reference):.2f} before conversion')
        print('  method    top-1  relative change of the logits')
        scores = {}
        for method in methods:
            logits, _ = logits_of(dense[method], batches, device)
            scores[method] = top1(logits)
            change = ((logits - reference).norm() / reference.norm()).item()
            print(f'  {method:<8} {scores[method]:>6.2f}  {change:.4g}')
        tokens = {m.conversion['calibration_tokens'] for m in dense.values() if 'calibration_tokens' in m.conversion}
        if tokens:
            print(f'  (calibration: {max(tokens)} tokens a layer from training images)')
        if args.method == 'all':
            best = max(scores, key=scores.get)
            print(f'Recommended: {best}, the highest top-1 right after gathering. It is what is written now; '
                  f'distillation (train.py --teacher) can change the order.')
    try:
        ewa.export(
            dense[best].cpu(), output, known.get('class_names'), data_config,
            {k: v for k, v in known.get('provenance', {}).items() if k != 'versions'}, args.overwrite, args.onnx)
        if args.report:
            write_report(records, args.report, f'Experts of {args.source}')
    except (ValueError, RuntimeError, OSError) as e:
        parser.error(e)
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, dense[best])]
    architecture = dense[best].pretrained_cfg['architecture']
    print(f'{count[0]:.2f} M parameters before, {count[1]:.2f} M after: a plain {architecture}')
    print(f'{output}: loaded strictly, same outputs'
          + f'; {output / "model.onnx"}: checked with onnxruntime' * args.onnx)
    if args.report:
        print(f'Report: {Path(args.report) / "report.md"}')
    print(f"Load it with:  timm.create_model('local-dir:{output}', pretrained=True)")
    print('(without pretrained=True, timm leaves the weights random and says nothing)')


if __name__ == '__main__':
    main()
