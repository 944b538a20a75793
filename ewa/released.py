"""MoE models that others released, as they are on disk, as MoE models on a timm host.

Axis legend: `E` experts, `D` width, `H` hidden width, `W` window size, `N` tokens of an image.

Swin-MoE (microsoft/Swin-Transformer, models/swin_transformer_moe.py) and V-MoE (google-research/vmoe,
vmoe/nn/vit_moe.py). A model computes what the public code computes when no token is dropped for lack of capacity.
Where timm's host differs from theirs it is adapted exactly or the file is refused, see docs/owners.md.
"""
import math
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor, nn

from .ffn import find_ffns
from .flax_shards import read_shards
from .foreign import foreign
from .moe import TopKMoE, register_router
from .routing import top_k_gates
from .stacked import unstack
from .upcycle import to_moe

Weights = Dict[str, Tensor]


class _File(Weights):
    """The tensors of a file, which is refused where one is missing that no such model is without."""

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f'It lacks {key}.')


class Host(NamedTuple):
    """What a file says of its model, in timm's terms."""
    name: str
    arguments: Dict[str, Any]  # for `timm.create_model`
    cfg: Dict[str, Any]  # how images are prepared, for `pretrained_cfg`
    weights: Weights  # by timm's keys, with `experts.<i>.` and `router.` in MoE layers


def _find_swin_moe(path: Path) -> Tuple[Path, List[Path]]:
    """The path all file names start with, `.../NAME.pth`, and the files of the ranks.

    Raises:
        ValueError: No or several checkpoints, or not all ranks.
    """
    if path.is_dir():
        names = sorted({re.sub(r'\.rank\d+$', '', p.name) for p in path.iterdir() if re.search(r'\.rank\d+$', p.name)})
        if len(names) != 1:
            raise ValueError(
                f'{path} must hold the files of one model, NAME.pth.rank0, NAME.pth.rank1, ... and NAME.pth.master, '
                f'and has {", ".join(names) or "none"}.')
        start = path / names[0]
    else:
        start = path.with_name(re.sub(r'\.(rank\d+|master)$', '', path.name))
    found = [p for p in start.parent.iterdir()
             if p.name.startswith(f'{start.name}.rank') and p.name[len(start.name) + 5:].isdigit()]
    ranks = [start.with_name(f'{start.name}.rank{r}') for r in range(len(found))]
    if not ranks:
        raise ValueError(f'{path} is no Swin-MoE: there is no {start.name}.rank0.')
    missing = next((p for p in ranks if p not in found), None)
    if missing is not None:
        raise ValueError(f'{missing} is missing.')
    return start, ranks


def _load_pickle(path: Path) -> Weights:
    """The tensors of a file by `torch.save`, mapped into memory; no code in it is run."""
    with foreign(f'{path} can\'t be read as tensors'):
        try:
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except RuntimeError:  # not the zip format, which alone can be mapped
            content = torch.load(path, map_location='cpu', weights_only=True)
    content = content.get('model', content) if isinstance(content, dict) else {}
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f'{path} holds no tensors.')
    return weights


@torch.no_grad()
def read_swin_moe(path: Path) -> Host:
    """A Swin-MoE as its repository's `save_checkpoint` writes it.

    Args:
        path: The folder with `NAME.pth.rank0`, `NAME.pth.rank1`, ... (experts) and `NAME.pth.master` (the rest), or
            `NAME.pth`. Without a master file the rest is taken from rank 0.

    Raises:
        ValueError: Files are missing, or hold what timm's Swin Transformer has not.
    """
    start, files = _find_swin_moe(path)
    ranks = [_load_pickle(file) for file in files]
    master = start.with_name(f'{start.name}.master')
    rest = _load_pickle(master) if master.is_file() else {k: v for k, v in ranks[0].items() if '.experts.' not in k}
    weights = _File(unstack(rest, ranks=[{k: v for k, v in rank.items() if '.experts.' in k} for rank in ranks]))
    if 'absolute_pos_embed' in weights or 'patch_embed.norm.weight' not in weights:
        raise ValueError(f'{start} has absolute position embeddings or no norm after its patch embedding; timm\'s '
                         'Swin Transformer has it the other way round.')

    embed_dim, in_chans, patch_size, _ = weights['patch_embed.proj.weight'].shape
    buffers = _File({key: weights.pop(key) for key in list(weights)
                     if key.endswith(('.relative_coords_table', '.relative_position_index', '.attn_mask'))})
    depths, windows, sizes = _stages(weights, buffers)

    renamed: Weights = {}
    for key, value in weights.items():
        if '.cpb_mlp.' in key:
            continue
        key = re.sub(r'^layers\.(\d+)\.downsample\.', lambda m: f'layers.{int(m.group(1)) + 1}.downsample.', key)
        renamed[re.sub(r'^head\.', 'head.fc.', key)] = value
    for key, value in buffers.items():
        if key.endswith('.relative_coords_table'):
            attn = key.rpartition('.')[0]
            first, bias, second = (
                weights[f'{attn}.cpb_mlp.{name}'].float() for name in ('0.weight', '0.bias', '2.weight'))
            hidden = nn.functional.linear(value.float().flatten(0, 2), first, bias).relu()
            renamed[f'{attn}.relative_position_bias_table'] = nn.functional.linear(hidden, second)
        else:
            renamed[key] = value  # compared with the host's
    for key in [key for key in renamed if key.endswith('.fc2.weight')]:
        bias = f'{key[:-len("weight")]}bias'
        renamed.setdefault(bias, renamed[key].new_zeros(len(renamed[key])))  # MLP_FC2_BIAS: False

    sizes_of_timm = {96: 'tiny' if depths == (2, 2, 6, 2) else 'small', 128: 'base', 192: 'large'}
    heads = tuple(len(weights[f'layers.{s}.blocks.0.attn.cpb_mlp.2.weight']) for s in range(len(depths)))
    return Host(
        f'swin_{sizes_of_timm.get(embed_dim, "small")}_patch4_window7_224',
        dict(img_size=sizes[0] * patch_size, window_size=max(windows), patch_size=patch_size, in_chans=in_chans,
             embed_dim=embed_dim, depths=depths, num_heads=heads, mlp_ratio=_hidden_over_width(weights),
             qkv_bias='layers.0.blocks.0.attn.qkv.bias' in weights, num_classes=len(weights['head.weight'])),
        dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, interpolation='bicubic', crop_pct=224 / 256,
             crop_mode='center'),
        renamed)


def _stages(weights: Weights, buffers: Weights) -> Tuple[Tuple[int, ...], List[int], List[int]]:
    """Depth, window and side of the feature maps by stage, in tokens."""
    blocks = [re.match(r'layers\.(\d+)\.blocks\.\d+\.norm1\.weight$', key) for key in weights]
    stage_of_block = [int(match[1]) for match in blocks if match]
    depths = tuple(stage_of_block.count(s) for s in range(max(stage_of_block, default=0) + 1))
    windows, sizes = [], []
    for s in range(len(depths)):
        windows.append((buffers[f'layers.{s}.blocks.0.attn.relative_coords_table'].shape[1] + 1) // 2)
        # every second block is shifted, with a mask (windows, W * W, W * W), where there is more than one window
        mask = buffers.get(f'layers.{s}.blocks.1.attn_mask')
        sizes.append(windows[s] * (1 if mask is None else math.isqrt(len(mask))))
    if any(size << s != sizes[0] for s, size in enumerate(sizes)) or any(
            window != min(size, max(windows)) for window, size in zip(windows, sizes)):
        raise ValueError(
            f'It does not fit together: by stage, windows of {windows} and feature maps of {sizes} tokens.')
    return depths, windows, sizes


def _hidden_over_width(weights: Weights) -> float:
    ratios = {len(value) / value.shape[1] for key, value in weights.items() if key.endswith('.fc1.weight')}
    if len(ratios) != 1:
        raise ValueError(f'It has FFNs of different hidden widths, {sorted(ratios)} times the width.')
    return ratios.pop()


def read_v_moe(path: Path) -> Host:
    """A V-MoE as its repository's `save_checkpoint` writes it, the parameters or a training state.

    Args:
        path: The prefix of `NAME.index` and `NAME.data-00000-of-...`, or a folder with them.

    Raises:
        ValueError: Files are missing, or hold what timm's Vision Transformer has not.
    """
    if path.name.startswith('eee_'):
        raise ValueError(f'{path} is an E3 ensemble, which computes something else than a V-MoE.')
    arrays = _File(read_shards(path))
    needed = ('embedding/kernel', 'cls', 'Encoder/posembed_input/pos_embedding', 'Encoder/encoder_norm/scale')
    lacking = [name for name in needed if name not in arrays]
    if lacking:
        raise ValueError(f'{path} has no {lacking[0]}: only models with a class token and learned position embeddings '
                         'can be read.')
    patch_h, patch_w, in_chans, width = arrays['embedding/kernel'].shape
    grid = math.isqrt(arrays['Encoder/posembed_input/pos_embedding'].shape[1] - 1)
    if patch_h != patch_w or grid * grid + 1 != arrays['Encoder/posembed_input/pos_embedding'].shape[1]:
        raise ValueError(f'{path} is not for square images in square patches.')
    query = arrays['Encoder/encoderblock_0/SelfAttention/query/kernel']

    weights: Weights = {}
    for name, value in arrays.items():
        name = name.replace('/', '.')
        name = re.sub(r'^Encoder\.encoderblock_(\d+)\.(Moe\.)', r'blocks.\1.mlp.\2', name)
        name = re.sub(r'^Encoder\.encoderblock_(\d+)\.', r'blocks.\1.', name)
        if '.Moe.' in name:
            weights[name] = value
            continue
        for old, new in _V_MOE_NAMES:
            name = re.sub(old, new, name)
        if name.endswith('.kernel'):
            name = f'{name[:-len("kernel")]}weight'
            if name == 'patch_embed.proj.weight':
                value = value.permute(3, 2, 0, 1)  # (P, P, C, D)
            elif '.attn.proj.' in name:
                value = value.flatten(0, 1).T  # (heads, D / heads, D)
            else:
                value = value.flatten(1).T  # (D, heads, D / heads) or (in, out)
        elif '.attn.' in name:
            value = value.flatten()
        weights[name] = value
    depth = len({key.split('.')[1] for key in weights if key.startswith('blocks.')})
    for i in range(depth):
        for kind in ('weight', 'bias'):
            names = [f'blocks.{i}.attn.{name}.{kind}' for name in ('query', 'key', 'value')]
            if all(name in weights for name in names):
                weights[f'blocks.{i}.attn.qkv.{kind}'] = torch.cat([weights.pop(name) for name in names])
    weights = unstack(weights)
    if query.shape[1] * query.shape[2] != width:
        raise ValueError(f'{path} has {query.shape[1]} heads of {query.shape[2]} for width {width}.')
    size = grid * patch_h
    # config files of the paper: at 224 pixels the centre of an image, else the whole image
    crop = dict(crop_pct=224 / 256, crop_mode='center') if size == 224 else dict(crop_pct=1., crop_mode='squash')
    return Host(
        'vit_base_patch16_224' if width == 768 else 'vit_small_patch32_224',
        dict(img_size=size, patch_size=patch_h, in_chans=in_chans, embed_dim=width, depth=depth,
             num_heads=query.shape[1], mlp_ratio=_hidden_over_width(weights), act_layer='gelu_tanh',
             num_classes=len(weights['head.bias']) if 'head.bias' in weights else 0),
        dict(mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD, interpolation='bilinear', **crop),
        weights)


_V_MOE_NAMES = (
    (r'^embedding\.', 'patch_embed.proj.'),
    (r'^cls$', 'cls_token'),
    (r'^Encoder\.posembed_input\.pos_embedding$', 'pos_embed'),
    (r'^Encoder\.encoder_norm\.', 'norm.'),
    (r'\.LayerNorm_0\.', '.norm1.'),
    (r'\.LayerNorm_1\.', '.norm2.'),
    (r'(norm\d?)\.scale$', r'\1.weight'),
    (r'\.SelfAttention\.out\.', '.attn.proj.'),
    (r'\.SelfAttention\.', '.attn.'),
    (r'\.Mlp\.Dense_0\.', '.mlp.fc1.'),
    (r'\.Mlp\.Dense_1\.', '.mlp.fc2.'),
)
READERS: Dict[str, Callable[[Path], Host]] = {'swin_moe': read_swin_moe, 'v_moe': read_v_moe}
# experts a token in the released models; the files do not say
TOP_K = {'swin_moe': 1, 'v_moe': 2}


class CosineMoE(TopKMoE):
    """Swin-MoE's layer with a cosine router: each token to one expert, by the softmax over all of them."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        width = experts[0].fc2.out_features
        super().__init__(experts, width, top_k=1, renormalise=False)
        weight = self.router.weight
        self.router = CosineRouter(width, len(experts)).to(device=weight.device, dtype=weight.dtype)

    def route(self, tokens: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.router(tokens)
            gates, experts = top_k_gates(logits, self.top_k, self.renormalise)
        return gates, experts, logits


class CosineRouter(nn.Module):
    """tutel's cosine router (gates/cosine_top.py): logits `scale * cos(P x, s_e)`, in float32.

    Args:
        width: `D`.
        num_experts: `E`.
        projected: Width in which tokens and experts are compared.
    """

    def __init__(self, width: int, num_experts: int, projected: int = 256) -> None:
        super().__init__()
        self.projection = nn.Linear(width, projected)
        self.directions = nn.Parameter(torch.randn(projected, num_experts) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor([math.log(2)]))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(T, D) -> (T, E)`."""
        projected = nn.functional.linear(
            tokens.float(), self.projection.weight.float(), self.projection.bias.float())
        cosines = nn.functional.normalize(projected, dim=1) @ nn.functional.normalize(self.directions.float(), dim=0)
        return cosines * self.log_scale.float().clamp(max=math.log(100)).exp()


register_router('cosine', CosineMoE)


def load_released(
        path: Path,
        layout: str,
        top_k: Optional[int] = None,
        renormalise: bool = False,
        num_classes: Optional[int] = None,
) -> nn.Module:
    """A released MoE model on its timm host, with its weights.

    Args:
        path: See `read_swin_moe` and `read_v_moe`.
        layout: `'swin_moe'` or `'v_moe'`.
        top_k: Experts a token. Default: that of the released models, 1 for Swin-MoE and 2 for V-MoE; files do not say.
        renormalise: Make the gates of two and more experts sum to 1; no published configuration does.
        num_classes: Another classifier than the file's, a new one, or 0 for none. This also leaves out the tanh layer
            (`pre_logits`) that some V-MoE have before it.

    Returns:
        A model in `train()` mode as timm makes them. A V-MoE with a tanh layer has it in `head`, so it computes what
        its file says, but has no name in timm: it can't be exported.

    Raises:
        ValueError: An unknown layout, files that are missing or damaged, weights that the host has no place for.
    """
    if layout not in READERS:
        raise ValueError(f'layout must be one of {", ".join(READERS)}, got {layout!r}.')
    try:
        host = READERS[layout](Path(path))
    except ValueError as e:
        raise ValueError(str(e) if str(path) in str(e) else f'{path}: {e}') from e
    weights = host.weights
    experts: Dict[str, int] = {}
    for key in weights:
        if key.endswith('.fc1.weight') and '.experts.' in key:
            experts[key.split('.experts.')[0]] = experts.get(key.split('.experts.')[0], 0) + 1
    if not experts:
        raise ValueError(f'{path} has no experts: these are the weights of a dense model.')
    num_experts = next(iter(experts.values()))
    if any(count != num_experts for count in experts.values()):
        raise ValueError(f'{path} has layers of different numbers of experts: {experts}.')
    top_k = TOP_K[layout] if top_k is None else top_k
    cosine = any(key.endswith('.router.directions') for key in weights)
    if cosine and top_k != 1:
        raise ValueError(f'{path} has cosine routers, which can be read for top_k=1, got {top_k}.')
    arguments = dict(host.arguments)
    if num_classes is not None:
        arguments['num_classes'] = num_classes
        weights = {key: value for key, value in weights.items() if not re.match(r'(head|pre_logits)\.', key)}
    cfg = dict(host.cfg, num_classes=arguments['num_classes'],
               input_size=(arguments['in_chans'], arguments['img_size'], arguments['img_size']))
    with foreign(f'{path} can\'t be built with {arguments}'):
        model = timm.create_model(host.name, pretrained_cfg_overlay=cfg, **arguments)
    layers = [name for name in find_ffns(model) if name in experts]
    if cosine:
        to_moe(model, num_experts, layers, 'cosine')
    else:
        to_moe(model, num_experts, layers, 'topk', top_k=top_k, renormalise=renormalise and top_k > 1)
    if 'pre_logits.weight' in weights:
        first, last = weights['pre_logits.weight'], weights['head.weight']
        model.head = nn.Sequential(
            nn.Linear(first.shape[1], len(first)), nn.Tanh(), nn.Linear(last.shape[1], len(last)))
        names = {'pre_logits': 'head.0', 'head': 'head.2'}
        weights = {re.sub(r'^(pre_logits|head)(?=\.)', lambda m: names[m[1]], k): v for k, v in weights.items()}
    _fill(model, weights, path, new_head=num_classes is not None)
    return model


def _fill(model: nn.Module, weights: Weights, path: Path, new_head: bool) -> None:
    """Copy weights into a model, all of them and nothing else; buffers must be the model's own.

    Raises:
        ValueError: The keys, shapes or buffers of the two differ.
    """
    buffers = dict(model.named_buffers())
    for key in [key for key in weights if key.endswith(('.attn_mask', '.relative_position_index'))]:
        value = weights.pop(key)
        if key not in buffers or not torch.equal(value.to(buffers[key].dtype), buffers[key]):
            raise ValueError(f'{path}: {key} is not what timm computes with.')
    expected = {key: value for key, value in model.state_dict().items() if not (new_head and key.startswith('head.'))}
    lacking = [key for key in expected if key not in weights]
    unknown = [f'{key} {tuple(value.shape)}' for key, value in weights.items()
               if key not in expected or value.shape != expected[key].shape]
    if lacking or unknown:
        raise ValueError(
            f'{path} does not fit timm\'s host.' + f' It has {", ".join(unknown[:3])}.' * bool(unknown)
            + f' It lacks {", ".join(lacking[:3])}.' * bool(lacking))
    model.load_state_dict(weights, strict=not new_head)


def has_tanh_head(model: nn.Module) -> bool:
    """Whether a model ends in V-MoE's tanh layer and classifier, which no timm architecture does."""
    head = getattr(model, 'head', None)
    return isinstance(head, nn.Sequential) and any(isinstance(module, nn.Tanh) for module in head)
