"""EWA in a plain PyTorch loop: the lines with `ewa` are all that is added.

    python examples/plain_loop.py --steps 200 --output vit
"""
import argparse
import os

import timm
import torch
from timm.data import create_dataset, create_loader

import ewa

parser = argparse.ArgumentParser()
parser.add_argument('--steps', type=int, default=200)
parser.add_argument('--data', default='data/fashion_mini', help='folder with train.tar')
parser.add_argument('--output', default='vit')
args = parser.parse_args()
if os.path.exists(args.output):  # before the training, not after it
    parser.error(f'{args.output} exists: give another --output')

torch.manual_seed(0)
dataset = create_dataset('', root=f'{args.data}/train.tar', input_img_mode='L')
loader = create_loader(
    dataset, (1, 28, 28), batch_size=64, is_training=True, no_aug=True, mean=(0.286,), std=(0.353,), num_workers=0,
    use_prefetcher=False, persistent_workers=False)

model = timm.create_model(
    'vit_tiny_patch16_224', img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=10)
ewa.to_moe(model, num_experts=4, layers='every:2')
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
ewa.ExpertAverager(model, share_rate=1e-3).attach(optimizer)

step = 0
while step < args.steps:
    for images, target in loader:
        loss = torch.nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f'step {step}: loss {loss.item():.3f}')
        if step == args.steps:
            break

# what it was trained on is told to those who load it
images = dict(input_size=(1, 28, 28), mean=(0.286,), std=(0.353,), crop_pct=1.)
ewa.export(ewa.to_dense(model), args.output, data_config=images)
print(f"timm.create_model('local-dir:{args.output}', pretrained=True)")
