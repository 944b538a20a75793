"""Train a Vision Transformer as a mixture of experts, ship it as a plain ViT."""
__version__ = '0.1.0'

from . import vision_transformer  # noqa: F401  registers the model names
from .averaging import ExpertAverager
from .dense import to_dense
from .diagnostics import diagnose
from .exporting import export, load
from .moe import RandomPartitionMoE, TopKMoE, routing_losses
from .upcycle import to_moe
