"""Latency, throughput, memory and file size of a MoE in eval(), the same gathered, and exported; against the plain ViT.

    python -m benchmarks.inference
    python -m benchmarks.inference --model vit_base_patch16_224 --batch-size 256 --ways eager compiled

The export is an ordinary timm model, so its ratio shows the noise.
"""
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict

import timm
import torch
from torch import nn

import ewa
from ewa.exporting import write_folder

from .common import DEVICE, arguments, build, images_for, interleave, milliseconds, peak, ratio, table

PLAIN = 'plain timm model'


def onnx_session(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """A call of a model in ONNX Runtime on these images, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / 'model.onnx')
        torch.onnx.export(model.cpu(), (images.cpu(),), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    return lambda: session.run(None, feed)


def models_of(name: str, experts: int, layers: str, folder: Path) -> Dict[str, nn.Module]:
    """The plain model, MoEs, and what is made of them, in `eval()`; written to `folder`."""
    models = {PLAIN: build(name)}
    for title, form in ('EWA', 'experts'), ('EWA in mean form', 'mean'):
        models[f'{title}, eval()'] = ewa.to_moe(build(name), num_experts=experts, layers=layers, form=form)
    models['gated, top 2'] = ewa.to_moe(
        build(name), num_experts=experts, layers=layers, router='topk', top_k=2)
    models['gathered'] = ewa.to_dense(models['EWA, eval()'])
    for title, model in models.items():
        write_folder(model, folder / title, verify=False)
    models['exported'] = timm.create_model(f'local-dir:{folder / "gathered"}', pretrained=True).to(DEVICE)
    write_folder(models['exported'], folder / 'exported', verify=False)
    return {title: model.eval() for title, model in models.items()}


def main() -> None:
    """Parse, time all models in turn, print a table for each way to run them."""
    parser = arguments(__doc__, rounds=10)
    parser.add_argument('--model', default='vit_small_patch16_224')
    parser.add_argument('--batch-size', type=int, default=32, help='of the throughput')
    parser.add_argument('--experts', type=int, default=4)
    parser.add_argument('--layers', default='every:2')
    parser.add_argument('--ways', nargs='+', default=['eager', 'ONNX'], choices=('eager', 'compiled', 'ONNX'))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        models = models_of(args.model, args.experts, args.layers, Path(folder))
        sizes = {name: (Path(folder) / name / 'model.safetensors').stat().st_size for name in models}
    batches = {count: images_for(models[PLAIN], count) for count in (1, args.batch_size)}
    for way in args.ways:
        times, peaks = {}, {}
        for count, images in batches.items():
            calls: Dict[str, Callable[[], Any]] = {}
            for name, model in models.items():
                if way == 'ONNX':
                    if name in (PLAIN, 'gathered', 'exported'):
                        calls[name] = onnx_session(model, images)
                    continue
                called = torch.compile(model) if way == 'compiled' else model
                calls[name] = lambda called=called, images=images: called(images)  # type: ignore[misc]
            with torch.inference_mode():
                times[count] = interleave(calls, args.rounds)
                peaks[count] = {name: peak(call) for name, call in calls.items()}
        latency, batch = times[1], times[args.batch_size]
        title = 'ONNX Runtime' if way == 'ONNX' else way
        table(f'Inference of {args.model}, {args.experts} experts, {args.layers}, {title}, float32',
              f'{"On its CPU. " * (way == "ONNX" and DEVICE.type == "cuda")}Medians of {args.rounds} rounds; '
              f'{PLAIN}: {milliseconds(latency[PLAIN]):.1f} ms at batch 1, '
              f'{1000 * args.batch_size / milliseconds(batch[PLAIN]):.0f} images/s at batch {args.batch_size}.',
              ('model', 'latency / plain', 'time of a batch / plain', 'memory of a batch (MiB)', 'file (MiB)'),
              [(name, f'{ratio(latency, name, PLAIN):.3f}', f'{ratio(batch, name, PLAIN):.3f}',
                peaks[args.batch_size][name] / 2 ** 20, sizes[name] / 2 ** 20) for name in batch])


if __name__ == '__main__':
    main()
