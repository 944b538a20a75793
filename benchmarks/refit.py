"""Time and memory of turning a gated MoE into a dense model by refit, of random weights and images.

    python benchmarks/refit.py --model vit_small_patch16_224 --threads 2
    python benchmarks/refit.py --model vit_base_patch16_224 --threads 2

"Fit": choosing hidden units and solving, of all layers; the rest are forward and backward passes. CPU seconds are those
of all threads together, which a machine that others use leaves alone; memory is the largest of the process.
"""
import argparse
import cProfile
import platform
import pstats
import resource
import time
from pathlib import Path

import timm
import torch

import ewa


def main() -> None:
    """Parse, convert once, print one row."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default='vit_small_patch16_224')
    parser.add_argument('--experts', type=int, default=8)
    parser.add_argument('--layers', default='every:2')
    parser.add_argument('--images', type=int, default=512)
    parser.add_argument('--steps', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    model = ewa.to_moe(
        timm.create_model(args.model), num_experts=args.experts, layers=args.layers, router='topk', init='independent')
    model = model.to(device).eval()
    images = torch.randn(args.images, *timm.data.resolve_model_data_config(model)['input_size'])
    with torch.no_grad():
        started = time.process_time()
        model(images[:16].to(device))
        forward = (time.process_time() - started) * args.images / 16

    wall, cpu = time.perf_counter(), time.process_time()
    profile = cProfile.Profile(timer=time.process_time)
    vit = profile.runcall(ewa.to_dense, model, 'refit', images.split(16), steps=args.steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    fit = pstats.Stats(profile).get_stats_profile().func_profiles['_refit_layer'].cumtime
    memory = (torch.cuda.max_memory_allocated() if device.type == 'cuda'
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    machine = torch.cuda.get_device_name() if device.type == 'cuda' else (names or [platform.machine()])[0]
    print('| model | experts | images | tokens a layer | steps | fit, CPU s | passes, CPU s | one forward pass, CPU s '
          '| wall, s | memory, GB | machine |\n' + '|---' * 11 + '|')
    print(f'| {args.model} | {args.experts}, {args.layers} | {args.images} | '
          f'{vit.conversion["calibration_tokens"]:,} | {args.steps} | {fit:.0f} | {cpu - fit:.0f} | {forward:.0f} | '
          f'{wall:.0f} | {memory / 1e9:.1f} | {machine}, {args.threads} CPU thread(s), torch {torch.__version__} |')


if __name__ == '__main__':
    main()
