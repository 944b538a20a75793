import pytest
import timm
import torch

import ewa  # noqa: F401  registers the model names

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """A maker of small seeded models of 32x32 images, 17 tokens: `tiny(name='vit_tiny_patch16_224', **kwargs)`."""
    def make(name='vit_tiny_patch16_224', seed=0, **kwargs):
        torch.manual_seed(seed)
        small = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10)
        return timm.create_model(name, **{**small, **kwargs})

    return make


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
