"""Turn a MoE model into a dense one and export it as a vanilla timm folder.

    python convert.py output/demo/best --output vit                             # a run of train.py
    python convert.py output/demo/best --output vit --data-dir imagenet         # ... and compare accuracies
    python convert.py output/moe/best --output vit --data-dir imagenet --method all    # gated MoE: compare gatherings
    python convert.py weights.safetensors --model vit_small_ewa --output vit    # bare weights, also of timm's train.py
    python convert.py swin_moe_small/ --from swin_moe --output vit --data-dir imagenet --method refit  # docs/owners.md
"""
import argparse
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ewa
from ewa.data import (
    UNREADABLE,
    calibration_batches,
    class_names,
    complaint,
    eval_loader,
    open_dataset,
    open_unlabelled,
    preparation,
)
from ewa.diagnostics import advise
from ewa.exporting import NotVerified, require_onnx, versions
from ewa.ffn import layout_of
from ewa.gathering import METHODS
from ewa.moe import is_gated, moe_layers, pulled
from ewa.options import check_images_used, convert_parser, gathering_options, has_images
from ewa.report import write_report
from ewa.sources import load_source


def check_folders(args: argparse.Namespace) -> None:
    """What can be known of the output before any work.

    Raises:
        ValueError: Something is in the way, or a package is missing that `--onnx` needs.
    """
    output, source = Path(args.output), Path(args.source)
    if output.exists() and not args.overwrite:
        raise ValueError(f'{output} exists: give another --output, or --overwrite to replace it.')
    if output.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else None):
        raise ValueError(f'--output {output} is where the MoE model itself is: give another folder.')
    if args.onnx:
        require_onnx()
    if args.report and Path(args.report).exists():
        raise ValueError(f'{args.report} exists: give another --report.')
    if args.method == 'all' and not (args.data_dir or args.dataset):
        raise ValueError('--method all compares accuracies: give --data-dir.')


def open_images(
        args: argparse.Namespace,
        model: nn.Module,
        data_config: Dict[str, Any],
        trained_on: Optional[Sequence[str]],
        gated: bool,
) -> Tuple[Optional[DataLoader], Optional[List[Tensor]]]:
    """Validation batches, and for gated models calibration images, if there is data.

    Args:
        args: Options of the script.
        model: Its classes must be those of the data.
        data_config: How images are prepared.
        trained_on: Names of the classes, if they are known.
        gated: Whether to open images for calibration. Methods may look at these only: the validation images measure
            what came out.

    Raises:
        ValueError: There are no such images, or they are of other classes.
    """
    channels = data_config['input_size'][0]
    validation, calibration = None, None
    if args.data_dir or args.dataset:
        images = open_dataset(args, args.val_split, is_training=False, in_chans=channels)
        names = class_names(images)
        if names is not None and len(names) != model.num_classes:
            raise ValueError(
                f'The data has {len(names)} classes, the model {model.num_classes}: give data with its classes, or '
                f'images alone by --calibration-dir.')
        if names is not None and trained_on and names != list(trained_on):
            pair = next(pair for pair in zip(names, trained_on) if pair[0] != pair[1])
            raise ValueError(
                f'The classes of the data are not those the model was trained on: where it had {pair[1]!r}, there is '
                f'{pair[0]!r}. Give data with its classes, or images alone by --calibration-dir.')
        validation = eval_loader(images, args, data_config)
    if gated and has_images(args):
        images = (open_unlabelled(args, channels) if args.calibration_dir else
                  open_dataset(args, args.train_split, is_training=False, in_chans=channels))
        calibration = calibration_batches(images, args, data_config)
        if complaint(images):
            print(f'warning: calibration: {complaint(images)}')
    return validation, calibration


def conversions(args: argparse.Namespace, gated: bool) -> Dict[str, Tuple[str, Dict[str, Any]]]:
    """Methods and their options by the title they have in tables; `all` has refit without steps and with each kind."""
    if args.method != 'all':
        options = gathering_options(args, [args.method])[args.method]
        return {title(args.method, options.get('steps', 0), options.get('joint_steps', 0)): (args.method, options)}
    titled = {}
    given = gathering_options(args, [method.name for method in METHODS.values() if gated or not method.needs_data])
    for method, options in given.items():
        steps, joint_steps = options.pop('steps', 300), options.pop('joint_steps', 0)
        titled[method] = (method, options)
        if method == 'refit':
            options = dict(options, steps=steps)
            titled[title(method, steps)] = (method, options)
            if joint_steps:
                titled[title(method, steps, joint_steps)] = (method, dict(options, joint_steps=joint_steps))
    return titled


def title(method: str, steps: int = 0, joint_steps: int = 0) -> str:
    """What a conversion is called in tables."""
    both = [f'{steps} steps'] * (steps > 0 and not joint_steps) + [
        f'{steps} and {joint_steps} joint steps' if steps else f'{joint_steps} joint steps'] * (joint_steps > 0)
    return ', '.join([method, *both])


def gather(
        model: nn.Module,
        methods: Dict[str, Tuple[str, Dict[str, Any]]],
        calibration: Optional[List[Tensor]],
        k: Optional[int] = None,
) -> Dict[str, nn.Module]:
    """A dense model by each of the methods, which come with their options, by title."""
    dense = {}
    for name, (method, options) in methods.items():
        try:
            dense[name] = ewa.to_dense(model, method, calibration, k=k, **options)
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as e:
            raise ValueError(f'--method {method} can\'t be computed here: {e}') from e
    return dense


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Logits and labels of all images that can be read, (N, classes) and (N,), on the CPU."""
    model = model.to(device).eval()
    pairs = [(model(images.to(device)).float().cpu(), target) for images, target in batches]
    logits, labels = torch.cat([output for output, _ in pairs]), torch.cat([target for _, target in pairs])
    return logits[labels != UNREADABLE], labels[labels != UNREADABLE]


def top1(logits: Tensor, target: Tensor) -> float:
    """In per cent."""
    return 100 * (logits.argmax(1) == target).float().mean().item()


def print_layers(records: List[Dict[str, Any]], gated: bool) -> None:
    """A table of `ewa.diagnose`."""
    gated = gated and any('change' in record for record in records)  # without images nothing is known of it
    print(f'  {"layer":<24} experts  distance to mean  mean cosine' + '  change if averaged' * gated)
    for record in records:
        change = f'  {record["change"]:>18.4f}' if gated and 'change' in record else ''
        print(f'  {record["layer"]:<24} {record["num_experts"]:>7}  {record.get("distance", float("nan")):>16.4f}  '
              f'{record.get("cosine", float("nan")):>11.4f}{change}')


def print_fits(dense: Dict[str, nn.Module]) -> None:
    """What methods that fit layers have seen, how far from each layer they stay, and how long they took."""
    for name, vit in dense.items():
        record = vit.conversion
        if 'error' not in record:
            continue
        print(f'{name}: {record["calibration_images"]} images, an eighth of them held out, '
              f'{record["calibration_tokens"]} tokens a layer, {record["seconds"]:.1f} s')
        print(f'  {"layer":<24} relative error  on images held out')
        for layer, error in record['error'].items():
            print(f'  {layer:<24} {error["fitted"]:>14.4f}  {error.get("held_out", float("nan")):>18.4f}')
        if 'steps_in_vain' in record:
            print(f'  steps brought {", ".join(record["steps_in_vain"])} no closer and were left out')
        if 'outputs_error' in record:
            print('  relative error of the model\'s outputs: {before:.4f}, after joint steps {after:.4f}'.format(
                **record['outputs_error']) + ', so they were left out' * record.get('joint_steps_in_vain', False))


def compare(
        model: nn.Module,
        dense: Dict[str, nn.Module],
        batches: DataLoader,
        device: torch.device,
) -> Tuple[Dict[str, Tuple[float, float]], int]:
    """Print how accurate a model is and what conversions make of it.

    Returns:
        Top-1 in per cent and relative change of the logits by method, before them of the model itself; and of how many
        images.

    Raises:
        ValueError: No image can be read.
    """
    reference, target = logits_of(model, batches, device)
    left_out = complaint(batches.dataset)
    if left_out:
        print(f'warning: {left_out}')
    if not len(target):
        raise ValueError('no validation image can be read: leave --data-dir out to convert without them.')
    scores = {'before conversion': (top1(reference, target), 0.)}
    print(f'top-1 of {len(target)} images: {top1(reference, target):.2f} before conversion')
    width = max(16, *map(len, dense))
    print(f'  {"method":<{width}}  top-1  relative change of the logits')
    for method, vit in dense.items():
        logits, _ = logits_of(vit, batches, device)
        change = ((logits - reference).norm() / reference.norm()).item()
        scores[method] = top1(logits, target), change
        print(f'  {method:<{width}} {scores[method][0]:>6.2f}  {change:.4g}')
    tokens = [vit.conversion['calibration_tokens'] for vit in dense.values() if 'calibration_tokens' in vit.conversion]
    if tokens:
        print(f'  (calibration: {max(tokens)} tokens a layer)')
    return scores, len(target)


def recommended(scores: Dict[str, Tuple[float, float]], gated: bool) -> str:
    """The method with the highest top-1; of equal ones that which changes the logits least. Without a router: average.

    Args:
        scores: Top-1 and relative change of the logits by method.
        gated: Whether the model has MoE layers with a router.
    """
    return max(scores, key=lambda method: (scores[method][0], -scores[method][1])) if gated else 'average'


_shown: Set[str] = set()


def show_warning(message: Any, *where: Any, **more: Any) -> None:
    """In the form of the other lines, each once."""
    line = f'warning: {message}'
    if line not in _shown:
        print(line, file=sys.stderr)
    _shown.add(line)


def print_check(args: argparse.Namespace) -> None:
    """How to find out whether a released model was read as it was meant."""
    print('No released file could be read while this was written (docs/owners.md). Before you rely on the result,')
    if args.data_dir or args.dataset:
        print('compare "before conversion" above with the published top-1.')
    else:
        print('compare "before conversion" with the published top-1:')
        source, output = shlex.quote(args.source), shlex.quote(args.output)
        print(f'    python convert.py {source} --from {args.layout} --output {output} --overwrite --data-dir IMAGENET')


def of_training(known: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, float]]:
    """What is known of the training of the MoE, and apart from that how accurate the MoE was."""
    past = {k: v for k, v in (known.get('provenance') or {}).items() if k not in ('versions', 'error', 'layers')}
    of_moe = {k: past.pop(k) for k in list(past) if k.removeprefix('ema_') in ('loss', 'top1', 'top5')}
    return past, of_moe


def write(
        dense: nn.Module,
        output: Path,
        known: Dict[str, Any],
        data_config: Dict[str, Any],
        args: argparse.Namespace,
        measured: Dict[str, float],
) -> None:
    """The vanilla folder, with what is known of the training of the MoE, and what was `measured` of the dense model."""
    provenance, moe = of_training(known)
    if moe:
        provenance['moe'] = moe
    provenance.update(measured)
    try:
        ewa.export(dense, output, known.get('class_names'), data_config, provenance, args.overwrite, args.onnx)
    except NotVerified as e:
        raise ValueError(f'{output} was not written: {e}') from e


def write_page(
        args: argparse.Namespace,
        argv: Optional[Sequence[str]],
        model: nn.Module,
        known: Dict[str, Any],
        dense: Dict[str, nn.Module],
        best: str,
        records: List[Dict[str, Any]],
        scores: Dict[str, Tuple[float, float]],
        images: int,
) -> None:
    """The report: what was converted into what, and what it did to the model."""
    vit = dense[best]
    before, after = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, vit))
    past = {k: v for k, v in (known.get('provenance') or {}).items() if k not in ('error', 'layers')}
    written_by = past.pop('versions', None)
    facts = {
        'before': f'{args.source}' + ', EMA weights' * args.use_ema + f' ({model.pretrained_cfg["architecture"]}): '
                  f'{len(records)} MoE layers, {before:.2f} M parameters',
        'after': f'{args.output} ({vit.pretrained_cfg["architecture"]}): {after:.2f} M parameters; it loads strictly '
                 f'and gives the outputs of the converted model',
        'method': best,
        'training': ', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in past.items()) or None,
        'calibration': ', '.join(
            f'{vit.conversion[key]} {name}' for key, name in (
                ('calibration_images', 'images'), ('calibration_tokens', 'tokens a layer'))
            if key in vit.conversion) or None,
        'accuracy': f'of {images} validation images' if images else None,
        'trained with': ' '.join(f'{k} {v}' for k, v in written_by.items()) if written_by else None,
        'converted with': ' '.join(f'{k} {v}' for k, v in versions().items())}
    layers = dict(moe_layers(model))
    for record in records:
        became, were = (layout_of(m) for m in (
            vit.get_submodule(record['layer']), pulled(layers[record['layer']])[0]))
        if became is not None and were is not None:
            record['units'] = f'{record["num_experts"]} x {were.hidden} → {became.hidden}'
    write_report(
        records, args.report, f'{args.source} made dense', {key: fact for key, fact in facts.items() if fact},
        [(method + ' (written)' * (method == best), f'{score:.2f}', f'{change:.4g}' if method in dense else '')
         for method, (score, change) in scores.items()],
        {method: m.conversion['error'] for method, m in dense.items() if 'error' in m.conversion},
        f'python convert.py {shlex.join(sys.argv[1:] if argv is None else argv)}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Convert; a mistake of the user's ends in one line and exit code 2."""
    parser = convert_parser()
    args = parser.parse_args(argv)
    logging.getLogger('timm').setLevel(logging.ERROR)
    output = Path(args.output)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        check_folders(args)
        model, known = load_source(
            args.source, args.use_ema, args.model, args.model_kwargs, args.img_size, args.in_chans, args.layout)
        model = model.to(device).eval()
        layers = dict(moe_layers(model))
        if not layers:
            raise ValueError(f'{args.source} holds a dense model: there is nothing to convert.')
        gated = any(is_gated(layer) for layer in layers.values())
        if args.method is None:
            all_gated = all(map(is_gated, layers.values()))
            args.method = 'refit' if all_gated and has_images(args) else 'average'
        methods = conversions(args, gated)
        data_config = preparation(model, args)
        batches, calibration = open_images(args, model, data_config, known.get('class_names'), gated)
        dense = gather(model, methods, calibration, args.k)
        check_images_used(args, gated)
        records = ewa.diagnose(model, calibration)
    except (ValueError, OSError) as e:
        parser.error(str(e))

    print(f'{args.source}: {model.pretrained_cfg["architecture"]}, {len(layers)} MoE layers')
    print_layers(records, gated)
    for warning in advise(records) if gated and args.method in ('average', 'all') else ():
        print(f'warning: {warning}')
    print_fits(dense)
    best = next(iter(dense))
    try:
        scores, count = compare(model, dense, batches, device) if batches is not None else ({}, 0)
    except ValueError as e:
        parser.error(str(e))
    if args.method == 'all':
        best = recommended({method: scores[method] for method in dense}, gated)
        why = 'the highest top-1 right after gathering' if gated else 'which is exact'
        print(f'Recommended: {best}, {why}. It is what is written now'
              + '; distillation (train.py --teacher) can change the order.' * gated)
    try:
        measured = dict(top1=round(scores[best][0], 2), top1_images=count) if best in scores else {}
        write(dense[best].cpu(), output, known, data_config, args, measured)
        if args.report:
            write_page(args, argv, model, known, dense, best, records, scores, count)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    parameters = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, dense[best])]
    architecture = dense[best].pretrained_cfg['architecture']
    print(f'{parameters[0]:.2f} M parameters before, {parameters[1]:.2f} M after: a plain {architecture}')
    print(f'{output}: loaded strictly, same outputs'
          + f'; {output / "model.onnx"}: checked with onnxruntime' * args.onnx)
    if args.report:
        print(f'Report: {Path(args.report) / "report.html"}')
    print(f"Load it with:  timm.create_model('local-dir:{output}', pretrained=True)")
    print('(without pretrained=True, timm leaves the weights random and says nothing)')
    if args.layout:
        print_check(args)


if __name__ == '__main__':
    warnings.showwarning = show_warning
    main()
