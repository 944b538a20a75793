"""Names under which `timm.create_model` builds MoE models. `import ewa` registers them.

`vit_ewa(host=NAME, ...)` makes a MoE model of any timm model with FFNs; the other names are that entry with host and
router fixed. Keyword arguments of the host and of `ewa.to_moe` both pass.
"""
import re
from typing import Any, Dict, Optional

import torch
from timm.models import (
    create_model,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    load_state_dict,
    load_state_dict_from_hf,
    register_model,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn

from .ffn import select_ffns
from .identity import WEIGHT_CFG
from .moe import moe_layers, pulled
from .stacked import unstack
from .upcycle import ARGUMENTS, to_moe

__all__ = []  # filled by register_model

HOSTS = {
    'vit_ewa': 'vit_small_patch16_224',
    'vit_tiny_ewa': 'vit_tiny_patch16_224',
    'vit_small_ewa': 'vit_small_patch16_224',
    'vit_base_ewa': 'vit_base_patch16_224',
    'vit_large_ewa': 'vit_large_patch16_224',
    'deit3_small_ewa': 'deit3_small_patch16_224',
    'deit3_base_ewa': 'deit3_base_patch16_224',
    'vit_tiny_moe': 'vit_tiny_patch16_224',
    'vit_small_moe': 'vit_small_patch16_224',
    'vit_base_moe': 'vit_base_patch16_224',
    'vit_small_moe_shared': 'vit_small_patch16_224',
}


def _cfg(host: str) -> Dict[str, Any]:
    # the host's input and classifier, without its weights
    cfg = get_pretrained_cfg(host)
    assert cfg is not None  # timm has all of HOSTS
    return {k: v for k, v in cfg.to_dict().items() if k not in WEIGHT_CFG and k != 'architecture'}


default_cfgs = generate_default_cfgs({name: _cfg(host) for name, host in HOSTS.items()})


def expert_layers(state_dict: Dict[str, Tensor]) -> Dict[str, str]:
    """Name of each MoE layer in a state dict to its form: `'experts'` or `'mean'`; empty for a dense model."""
    matches = (re.match(r'(.+?)\.(experts|deviations)\.\d', key) for key in state_dict)
    return {match[1]: 'experts' if match[2] == 'experts' else 'mean' for match in matches if match}


def has_experts(state_dict: Dict[str, Tensor]) -> bool:
    """Whether weights are those of a MoE model (rather than of a dense one, to be copied into the experts)."""
    return bool(expert_layers(state_dict))


def _given_weights(cfg: Dict[str, Any]) -> Optional[Dict[str, Tensor]]:
    """The weights a `pretrained_cfg` points at, or None where they are the host's own (which are dense)."""
    if cfg.get('source') == 'local-dir':
        state_dict = load_state_dict_from_path(cfg['file'])
    elif cfg.get('source') == 'hf-hub':
        state_dict = load_state_dict_from_hf(cfg['hf_hub_id'])
    elif cfg.get('state_dict'):
        state_dict = cfg['state_dict']
    elif cfg.get('file') and not cfg.get('custom_load'):
        state_dict = load_state_dict(cfg['file'])
    else:
        return None
    return unstack(state_dict)


def load_experts(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str = '') -> None:
    """Load the MoE layers of a model, and only these, from the state dict of a MoE model.

    Raises:
        ValueError: The layers of the model and of the state dict are not the same.
    """
    for name, layer in moe_layers(model):
        start = name.removeprefix(prefix) + '.'
        weights = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        router = getattr(layer, 'router', None)
        if 'router.bias' in weights and isinstance(router, nn.Linear) and router.bias is None:
            router.bias = nn.Parameter(torch.zeros_like(router.weight[:, 0]))
        try:
            layer.load_state_dict(weights)
        except RuntimeError as e:
            experts = len({key.split('.')[1] for key in weights if key.startswith(('experts.', 'deviations.'))})
            raise ValueError(
                f'The weights do not fit the MoE layer {name}: they have {experts} experts there, the model '
                f'{len(pulled(layer))}. Give the num_experts, layers, router, form, num_shared and expert_ratio they '
                f'were trained with. ({e})') from e
    expected = {name.removeprefix(prefix) for name, _ in moe_layers(model)}
    given = set(expert_layers(state_dict))
    if given - expected and not prefix:
        raise ValueError(
            f'The weights have experts in {", ".join(sorted(given))}, the model in {", ".join(sorted(expected))}: '
            f'layers differs.')


def _create(
        host: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Build the host with timm's own builder, then convert it.

    Loading goes through the host's builder too, so that everything it adapts (input channels, position embedding,
    another classifier) is adapted. Weights of a MoE model are split for that: the host loads what it knows, with
    stand-ins for the FFNs that became MoE layers, and these are loaded after the conversion.
    """
    if not is_model(host):
        raise ValueError(f'host={host!r} is not a model that timm knows; timm.list_models() lists them.')
    moe_args = {k: kwargs.pop(k) for k in ARGUMENTS if k in kwargs}
    builder_args = ('pretrained_model_args', 'features_only', 'out_indices', 'feature_cls')
    model_args = {k: v for k, v in kwargs.items() if k not in builder_args}
    host_args = dict(kwargs, cache_dir=cache_dir)
    cfg = resolve_pretrained_cfg(host, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    weights = _given_weights(cfg) if pretrained else None
    given_layers = expert_layers(weights or {})
    moe_weights = weights if given_layers else {}
    if given_layers:
        if moe_args.get('init') == 'auto':
            del moe_args['init']  # was a choice in version 0.1.0, and is written in folders of that time
        if moe_args.get('router', 'random') == 'random':
            # folders of versions that had one form do not name it
            moe_args.setdefault('form', next(iter(given_layers.values())))
    if weights is not None:
        if moe_weights:
            with torch.device('meta'):
                skeleton = create_model(host, **model_args).state_dict()
            replaced = tuple(f'{name}.' for name in given_layers)
            weights = {k: v for k, v in weights.items() if not k.startswith(replaced)}
            weights.update({k: torch.zeros(v.shape) for k, v in skeleton.items() if k.startswith(replaced)})
        cfg = {k: v for k, v in cfg.items() if k not in WEIGHT_CFG}
        host_args['pretrained_cfg'] = dict(cfg, state_dict=weights, architecture=host)
    elif pretrained or pretrained_cfg or pretrained_cfg_overlay:
        host_args['pretrained_cfg'] = dict(cfg, architecture=host)

    model = create_model(host, pretrained=pretrained, **host_args)
    prefix = ''
    if kwargs.get('features_only'):
        # feature extractors drop the last blocks, so blocks are counted on the whole host
        if not hasattr(model, 'model'):
            raise ValueError(f'features_only=True is not supported for host={host!r}.')
        prefix = 'model.'
        with torch.device('meta'):
            chosen = select_ffns(create_model(host, **model_args), moe_args.get('layers', 'every:2'))
        present = [name for name in chosen if any(name == n for n, _ in model.model.named_modules())]
        if not present:
            raise ValueError(
                f'features_only=True with out_indices={kwargs.get("out_indices")} keeps none of the FFNs that '
                f'layers={moe_args.get("layers", "every:2")!r} makes MoE layers.')
        to_moe(model, **{**moe_args, 'layers': '|'.join(f'^{prefix}{name}$'.replace('.', r'\.') for name in present)})
    else:
        to_moe(model, **moe_args)
    if moe_weights:
        load_experts(model, moe_weights, prefix)
    return model


@register_model
def vit_ewa(pretrained: bool = False, host: str = HOSTS['vit_ewa'], **kwargs) -> nn.Module:
    """A MoE model of any host, `vit_ewa(host='swin_tiny_patch4_window7_224', num_experts=4, layers='every:2', ...)`."""
    return _create(host, pretrained, **kwargs)


@register_model
def vit_tiny_ewa(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Ti/16 for EWA."""
    return _create(HOSTS['vit_tiny_ewa'], pretrained, **kwargs)


@register_model
def vit_small_ewa(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-S/16 for EWA."""
    return _create(HOSTS['vit_small_ewa'], pretrained, **kwargs)


@register_model
def vit_base_ewa(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-B/16 for EWA."""
    return _create(HOSTS['vit_base_ewa'], pretrained, **kwargs)


@register_model
def vit_large_ewa(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-L/16 for EWA."""
    return _create(HOSTS['vit_large_ewa'], pretrained, **kwargs)


@register_model
def deit3_small_ewa(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeiT-3-S/16 for EWA."""
    return _create(HOSTS['deit3_small_ewa'], pretrained, **kwargs)


@register_model
def deit3_base_ewa(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeiT-3-B/16 for EWA."""
    return _create(HOSTS['deit3_base_ewa'], pretrained, **kwargs)


@register_model
def vit_tiny_moe(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Ti/16 with gated MoE layers, 8 experts, 2 a token."""
    return _create(HOSTS['vit_tiny_moe'], pretrained, **dict(dict(num_experts=8, router='topk'), **kwargs))


@register_model
def vit_small_moe(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-S/16 with gated MoE layers, 8 experts, 2 a token."""
    return _create(HOSTS['vit_small_moe'], pretrained, **dict(dict(num_experts=8, router='topk'), **kwargs))


@register_model
def vit_base_moe(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-B/16 with gated MoE layers, 8 experts, 2 a token."""
    return _create(HOSTS['vit_base_moe'], pretrained, **dict(dict(num_experts=8, router='topk'), **kwargs))


@register_model
def vit_small_moe_shared(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-S/16 with fine-grained experts: 16 of a quarter of the hidden width, 3 a token, and a shared one."""
    fixed = dict(num_experts=16, router='topk', top_k=3, num_shared=1, expert_ratio=0.25)
    return _create(HOSTS['vit_small_moe_shared'], pretrained, **dict(fixed, **kwargs))
