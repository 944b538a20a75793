"""Train a Vision Transformer as a mixture of experts, ship it as a plain ViT."""
from . import version, vision_transformer
from .averaging import ExpertAverager
from .dense import to_dense
from .diagnostics import diagnose
from .exporting import export
from .moe import RandomPartitionMoE, TopKMoE, routing_losses
from .sources import load
from .upcycle import to_moe

__version__ = version.__version__
