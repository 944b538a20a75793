"""EWA in transformers' Trainer: the lines with `ewa` are all that is added.

    pip install transformers
    python examples/trainer_loop.py --steps 200 --output vit
"""
import argparse
import os
import tempfile

import torch
from timm.data import create_dataset, create_transform
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import ewa
from ewa.integrations.transformers import EWACallback

parser = argparse.ArgumentParser()
parser.add_argument('--steps', type=int, default=200)
parser.add_argument('--data', default='data/fashion_mini', help='folder with train.tar')
parser.add_argument('--output', default='vit')
args = parser.parse_args()
if os.path.exists(args.output):  # before the training, not after it
    parser.error(f'{args.output} exists: give another --output')

transform = create_transform((1, 28, 28), is_training=True, no_aug=True, mean=(0.286,), std=(0.353,))
dataset = create_dataset('', root=f'{args.data}/train.tar', input_img_mode='L', transform=transform)


def collate(items):
    """A batch as the Trainer wants it."""
    return dict(pixel_values=torch.stack([image for image, _ in items]), labels=torch.tensor([y for _, y in items]))


torch.manual_seed(0)
config = ViTConfig(
    image_size=28, patch_size=7, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=256)
config.num_labels = 10
model = ViTForImageClassification(config)
ewa.to_moe(model, num_experts=4, layers='every:2')

with tempfile.TemporaryDirectory() as checkpoints:
    arguments = TrainingArguments(
        checkpoints, max_steps=args.steps, per_device_train_batch_size=64, learning_rate=2e-3, logging_steps=50,
        save_strategy='no', report_to='none', use_cpu=True)
    trainer = Trainer(
        model, arguments, train_dataset=dataset, data_collator=collate, callbacks=[EWACallback(share_rate=1e-3)])
    trainer.train()

ewa.export(ewa.to_dense(model), args.output)
print(f"ViTForImageClassification.from_pretrained('{args.output}')")
