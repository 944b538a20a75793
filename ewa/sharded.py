"""Models whose parameters are sharded among processes (FSDP2), and what train.py needs of them in one piece.

All functions are called on all processes, and do with models that are not sharded what one would do without them.
"""
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

import torch
from torch import nn

from .ffn import block_of, find_ffns
from .moe import moe_layers

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDS = 'pytorch_model_fsdp_0'  # the folder in which accelerate keeps sharded weights


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are shards, DTensors."""
    return any(hasattr(p, 'to_local') for p in module.parameters())


def shard_by_blocks(accelerator: 'Accelerator', model: nn.Module) -> None:
    """Have accelerate shard a model block by block: what is gathered as one while it computes.

    An FFN must not be gathered in parts, as a layer in mean form computes with all weights of its experts at once.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    blocks = {block_of(name) for name, _ in moe_layers(model)} or {block_of(name) for name in find_ffns(model)}
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(
        {type(model.get_submodule(name)).__name__ for name in blocks if name})
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # of another type, if that was asked for
    plugin.set_state_dict_type('SHARDED_STATE_DICT')
    # every process has made the model; and accelerate's way fails at parameters of the model itself, as cls_token
    plugin.cpu_ram_efficient_loading = False


def full_state(module: nn.Module) -> Dict[str, Any]:
    """The weights of a module; of a sharded one on the CPU of the main process, and nothing on the others."""
    if not is_sharded(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(module: nn.Module, state: Dict[str, Any]) -> None:
    """Load weights, which every process has in whole."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def shard_alike(module: nn.Module, accelerator: 'Accelerator') -> None:
    """Shard a module that is not trained as accelerate shards the one that is; nothing without FSDP2."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        fsdp2_prepare_model(accelerator, module)


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load what FSDP2 saved into a model that is not sharded, and its optimizer."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    weights: Dict[str, Any] = {'model': get_model_state_dict(model)}
    load(weights, storage_reader=FileSystemReader(checkpoint / SHARDS))
    set_model_state_dict(model, weights['model'])
    moments: Dict[str, Any] = {'optimizer': get_optimizer_state_dict(model, optimizer)}
    load(moments, storage_reader=FileSystemReader(checkpoint / 'optimizer_0'))
    set_optimizer_state_dict(model, optimizer, moments['optimizer'])
