"""EWA in an accelerate loop with gradient accumulation: the averager is attached and goes into checkpoints.

    accelerate launch examples/accelerate_loop.py --steps 100 --output vit
"""
import argparse
import os

import timm
import torch
from accelerate import Accelerator
from timm.data import create_dataset, create_loader

import ewa

parser = argparse.ArgumentParser()
parser.add_argument('--steps', type=int, default=100, help='optimizer steps')
parser.add_argument('--data', default='data/fashion_mini', help='folder with train.tar')
parser.add_argument('--output', default='vit')
args = parser.parse_args()
if os.path.exists(args.output):  # before the training, not after it
    parser.error(f'{args.output} exists: give another --output')

accelerator = Accelerator(gradient_accumulation_steps=2)
dataset = create_dataset('', root=f'{args.data}/train.tar', input_img_mode='L')
loader = create_loader(
    dataset, (1, 28, 28), batch_size=32, is_training=True, no_aug=True, mean=(0.286,), std=(0.353,), num_workers=0,
    use_prefetcher=False, persistent_workers=False)

model = timm.create_model(
    'vit_ewa', host='vit_tiny_patch16_224', img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=4, num_heads=4,
    num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

averager = ewa.ExpertAverager(accelerator.unwrap_model(model), share_rate=1e-3)
averager.attach(optimizer)
accelerator.register_for_checkpointing(averager)

while averager.steps < args.steps:
    for images, target in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(images), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if averager.steps == args.steps:
            break
    accelerator.print(f'step {averager.steps}: loss {loss.item():.3f}')

if accelerator.is_main_process:
    # what it was trained on is told to those who load it
    images = dict(input_size=(1, 28, 28), mean=(0.286,), std=(0.353,), crop_pct=1.)
    ewa.export(ewa.to_dense(accelerator.unwrap_model(model)), args.output, data_config=images)
