"""What the experts of a model are doing, and what conversion to one FFN changes.

Axis legend: `E` experts.
"""
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import gathering
from .calibration import measure_statistics
from .ffn import is_ffn, read_ffn
from .moe import MoELayer, are_alike, check_plain, is_gated, kind, mean_state, moe_layers, pulled

ORTHOGONAL = 0.1  # mean pairwise cosine under which experts are called nearly orthogonal
ROUTER_NAMES = {'random': 'random', 'gated': 'topk', 'unknown': 'unknown'}


@torch.no_grad()
def distances_to_mean(model: nn.Module) -> Dict[str, float]:
    """How far the experts of each MoE layer are from their mean.

    Returns:
        Layer name to `sqrt(mean_e |W_e - W_mean|^2) / |W_mean|` over all parameters of an expert: 0 for equal experts,
        about `sqrt(E-1)` for independent ones. Layers whose experts are of unequal widths are left out.

    Raises:
        ValueError: Experts have weights that are no plain parameters, see `ewa.moe.check_plain`.
    """
    result = {}
    for name, layer in moe_layers(model):
        experts = layer.experts
        check_plain(experts)
        if not are_alike(experts):
            continue
        mean = mean_state(experts)
        squares = [
            torch.stack([(p.float() - mean[key].float()).square().sum() for key, p in expert.named_parameters()]).sum()
            for expert in experts
        ]
        norm = torch.stack([mean[key].float().square().sum() for key, _ in experts[0].named_parameters()]).sum()
        result[name] = float((torch.stack(squares).mean() / norm.clamp(min=1e-30)).sqrt())
    return result


def _cosines(vectors: List[Tensor]) -> Tensor:
    stack = torch.stack([vector.flatten().float() for vector in vectors])
    stack = stack / stack.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (stack @ stack.T).cpu()


def _mean_pairwise(matrix: Tensor) -> float:
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))


def cosines(layer: MoELayer, align: bool = False) -> Tensor:
    """Pairwise cosine of the experts' weights, `(E, E)`.

    Args:
        layer: A MoE layer with FFNs of a known layout.
        align: Permute the hidden units of each expert to match the first one before.
    """
    experts = [read_ffn(expert) for expert in layer.experts]
    if align:
        experts = [experts[0], *(gathering.align(expert, experts[0]) for expert in experts[1:])]
    return _cosines([expert.units() for expert in experts])


@torch.no_grad()
def diagnose(model: nn.Module, batches: Optional[Iterable] = None, align: bool = True) -> List[Dict[str, Any]]:
    """One record for each MoE layer.

    Args:
        model: A MoE model; left as it was.
        batches: Images (batches, or tuples that start with one) for what depends on data; only gated layers do.
        align: Also align the experts (one linear assignment an expert: seconds for wide layers).

    Returns:
        Records with `layer`, `router` (`'random'`, `'topk'` for all gated layers, `'unknown'`), `num_experts`,
        `distance` (to the mean, see `distances_to_mean`), `cosine` and `cosine_aligned` (mean over pairs), `similarity`
        (`(E, E)` raw cosines). With `batches`, gated layers also have `tokens`, `usage` (share of assignments of each
        expert), `entropy` (of usage, 1 when uniform), `dead` (experts that no token was sent to), and `change`: the
        relative change `sqrt(E|y' - y|^2 / E|y|^2)` of the routed output if the experts are averaged. Random-partition
        layers compute with the mean in `eval()`: their `change` is 0; of unknown layers none is claimed. Experts of
        unequal widths have no mean and no pairwise cosine: records of their layers lack these.

    Raises:
        ValueError: As `distances_to_mean`.
    """
    gated = any(is_gated(layer) for _, layer in moe_layers(model))
    statistics = measure_statistics(model, batches) if batches is not None and gated else {}
    distances = distances_to_mean(model)
    records = []
    for name, layer in moe_layers(model):
        record: Dict[str, Any] = dict(
            layer=name, router=ROUTER_NAMES[kind(layer)], num_experts=len(pulled(layer)))
        if name in distances:
            record['distance'] = distances[name]
        if name in distances and all(is_ffn(expert) for expert in layer.experts):
            similarity = cosines(layer)
            record.update(cosine=_mean_pairwise(similarity), similarity=similarity.tolist())
            if align:
                record['cosine_aligned'] = _mean_pairwise(cosines(layer, align=True))
        if kind(layer) == 'random':
            record['change'] = 0.
        elif name in statistics:
            share = statistics[name].counts / statistics[name].counts.sum()
            entropy = -(share * share.clamp(min=1e-30).log()).sum() / torch.tensor(float(len(share))).log()
            record.update(
                tokens=statistics[name].tokens, usage=share.tolist(), entropy=float(entropy),
                dead=[i for i, count in enumerate(statistics[name].counts) if count == 0])
            if name in distances:
                record['change'] = statistics[name].change
        records.append(record)
    return records


def advise(records: Sequence[Mapping[str, Any]]) -> List[str]:
    """Warnings before experts are averaged, and the method that would serve, in words."""
    warnings = []
    for record in records:
        if record['router'] == 'topk' and record.get('cosine', 1.) < ORTHOGONAL:
            aligned = record.get('cosine_aligned', float('nan'))  # not a number: never measured
            better = 'refit'
            if 'tokens' not in record:
                other = 'aligned' if aligned > 2 * ORTHOGONAL else 'prune or do_acp'
                better += f', with calibration images, or {other}'
            warnings.append(
                f'{record["layer"]}: the experts are nearly orthogonal (mean cosine {record["cosine"]:.3f}, '
                f'{aligned:.3f} aligned); their average keeps little of them. Try {better}.')
        if record.get('dead'):
            warnings.append(f'{record["layer"]}: no calibration token was sent to expert(s) {record["dead"]}.')
    return warnings


def short_names(names: Sequence[str]) -> List[str]:
    """Names of layers without the parts that all begin and end with: `blocks.1.mlp` is `1` beside `blocks.3.mlp`."""
    parts = [name.split('.') for name in names]
    if len(set(names)) == 1:
        return list(names)
    for end in (0, -1):
        while parts and min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            for part in parts:
                part.pop(end)
    return ['.'.join(part) for part in parts]


def _write_cells(axis: Any, image: Any, values: Any, digits: int, fontsize: float) -> None:
    """Write the values of a heat map into its cells, in white or black, whichever is seen there."""
    for (i, j), value in np.ndenumerate(values):
        if not np.ma.is_masked(values[i, j]) and np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f'{value:.{digits}f}'.replace('0.', '.', 1)
            axis.text(j, i, text, ha='center', va='center', fontsize=fontsize, color='white' if dark else 'black')


def similarity_figure(records: Sequence[Mapping[str, Any]], width: float = 3.4):
    """Heat maps of the pairwise cosine, one a layer, as a matplotlib figure.

    One scale of colours for all, from the smallest to the largest cosine of two experts; that of an expert with itself,
    always 1, is left out.

    Args:
        records: Of `diagnose`; some of them have `similarity`.
        width: In inches; numbers are written where there is room for them.
    """
    from matplotlib.figure import Figure

    records = [record for record in records if 'similarity' in record]
    maps = [np.ma.masked_array(record['similarity'], np.eye(len(record['similarity']), dtype=bool))
            for record in records]
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    middle, half = (low + high) / 2, max(high - low, 1e-4) / 2
    columns = min(len(records), 3 if len(records) <= 9 else 4 if len(records) <= 16 else 6)
    rows = -(-len(records) // columns)
    side = (width - 0.8) / columns
    figure = Figure(figsize=(width, (side + 0.1) * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(records):]:
        axis.set_axis_off()
    digits = 2 if half > 0.05 else 3 if half > 0.005 else 4
    for axis, name, values in zip(axes.flat, short_names([record['layer'] for record in records]), maps):
        image = axis.imshow(values, vmin=middle - half, vmax=middle + half, cmap='viridis')
        axis.set_facecolor('0.92')
        axis.set_title(name, fontsize=9, pad=3)
        axis.set_xticks([]), axis.set_yticks([])
        if side / len(values) > 0.07 * (digits + 1):
            _write_cells(axis, image, values, digits, fontsize=7)
    scale = figure.colorbar(image, ax=axes, label='cosine')
    scale.formatter.set_useOffset(False)  # type: ignore[attr-defined]  # 0.9999, not -0.0001 under a +1
    scale.ax.tick_params(labelsize=8)
    return figure


def usage_figure(records: Sequence[Mapping[str, Any]], width: float = 3.4):
    """Heat map of the share of tokens of each expert in each gated layer, as a matplotlib figure; None without any."""
    from matplotlib.figure import Figure

    records = [record for record in records if 'usage' in record]
    if not records:
        return None
    count = max(record['num_experts'] for record in records)
    shares = np.array([record['usage'] + [float('nan')] * (count - record['num_experts']) for record in records])
    figure = Figure(figsize=(width, 1 + 0.3 * len(records)), layout='constrained')
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, cmap='viridis', aspect='auto')
    axis.set_yticks(range(len(records)), short_names([record['layer'] for record in records]))
    axis.set_ylabel('layer')
    axis.set_xticks(range(0, count, -(-count // 16)))
    axis.set_xlabel('expert')
    if (width - 1.5) / count > 0.3:
        _write_cells(axis, image, shares, 2, fontsize=7)
    figure.colorbar(image, label='share')
    return figure


def error_figure(errors: Mapping[str, Mapping[str, Mapping[str, float]]], width: float = 3.4):
    """What fitting left of each layer's target, on the images it was fitted to and on others, as a matplotlib figure.

    Args:
        errors: By method and layer, `fitted` and perhaps `held_out` relative errors, as in the `conversion` of a model.
        width: In inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.4 * width), layout='constrained')
    axis = figure.subplots()
    for i, (method, layers) in enumerate(errors.items()):
        for key, style, where in (('fitted', 'o-', 'calibration'), ('held_out', 's--', 'held out')):
            points = [(x, error[key]) for x, error in enumerate(layers.values()) if key in error]
            if points:
                axis.plot(*zip(*points), style, color=f'C{i}', mfc='white' if key == 'held_out' else None,
                          label=f'{method}, {where}')
        axis.set_xticks(range(len(layers)), short_names(list(layers)), rotation=90 if len(layers) > 12 else 0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel('layer')
    axis.set_ylabel('relative error')
    axis.grid(axis='y', alpha=0.3)
    axis.legend(fontsize=8)
    return figure
