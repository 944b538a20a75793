"""What the experts of a model are doing, and what conversion to one FFN changes.

Axis legend: `E` experts.
"""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor, nn

from . import gathering
from .calibration import measure_statistics
from .ffn import is_ffn, read_ffn
from .moe import MoELayer, are_alike, is_gated, kind, mean_state, moe_layers, pulled

ORTHOGONAL = 0.1  # mean pairwise cosine under which experts are called nearly orthogonal
ROUTER_NAMES = {'random': 'random', 'gated': 'topk', 'unknown': 'unknown'}


@torch.no_grad()
def distances_to_mean(model: nn.Module) -> Dict[str, float]:
    """How far the experts of each MoE layer are from their mean.

    Returns:
        Layer name to `sqrt(mean_e |W_e - W_mean|^2) / |W_mean|` over all parameters of an expert: 0 for equal experts,
        about `sqrt(E-1)` for independent ones. Layers whose experts are of unequal widths are left out.
    """
    result = {}
    for name, layer in moe_layers(model):
        experts = layer.experts
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


def advise(records: List[Dict[str, Any]]) -> List[str]:
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


def similarity_figure(records: List[Dict[str, Any]]):
    """Heat maps of the pairwise cosine, one a layer, as a matplotlib figure."""
    from matplotlib.figure import Figure

    records = [record for record in records if 'similarity' in record]
    columns = min(len(records), 6)
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(2.2 * columns + 0.8, 2.3 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(records):]:
        axis.set_axis_off()
    for axis, record in zip(axes.flat, records):
        image = axis.imshow(record['similarity'], vmin=-1, vmax=1, cmap='RdBu_r')
        axis.set_title(record['layer'], fontsize=8)
        axis.set_xticks(range(record['num_experts'])), axis.set_yticks(range(record['num_experts']))
        axis.tick_params(labelsize=6)
        if record['num_experts'] <= 8:  # numbers tell 0.9 from 1 where colours don't
            for i, row in enumerate(record['similarity']):
                for j, cosine in enumerate(row):
                    axis.text(j, i, f'{cosine:.2f}'.replace('0.', '.'), ha='center', va='center', fontsize=5,
                              color='white' if abs(cosine) > 0.6 else 'black')
    figure.colorbar(image, ax=axes, label='cosine of expert weights', shrink=0.8)
    return figure


def usage_figure(records: List[Dict[str, Any]]):
    """Heat map of the share of tokens of each expert in each gated layer, as a matplotlib figure; None without any."""
    from matplotlib.figure import Figure

    records = [record for record in records if 'usage' in record]
    if not records:
        return None
    width = max(record['num_experts'] for record in records)
    shares = [record['usage'] + [float('nan')] * (width - record['num_experts']) for record in records]
    figure = Figure(figsize=(1.5 + 0.45 * width, 1 + 0.4 * len(records)), layout='constrained')
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, cmap='viridis', aspect='auto')
    axis.set_yticks(range(len(records)), [record['layer'] for record in records], fontsize=7)
    axis.set_xticks(range(width))
    axis.set_xlabel('expert')
    figure.colorbar(image, label='share of assignments')
    return figure


def write_report(records: List[Dict[str, Any]], directory: Path, title: str) -> None:
    """One page, `directory/report.md`, with the numbers of `diagnose` and PNG figures beside it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    columns = ['layer', 'router', 'num_experts', 'distance', 'cosine', 'cosine_aligned', 'entropy', 'dead', 'change']
    columns = [column for column in columns if any(column in record for record in records)]

    def cell(value) -> str:
        return f'{value:.4f}' if isinstance(value, float) else '' if value is None else str(value)

    lines = [f'# {title}', '', '| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
    lines += ['| ' + ' | '.join(cell(record.get(column)) for column in columns) + ' |' for record in records]
    lines += [
        '', 'distance: of the experts to their mean, relative to its norm. cosine: mean over pairs of experts, '
        'aligned: after their hidden units were permuted to match. entropy: of usage, 1 when uniform. change: relative '
        'change of the routed output when the experts are averaged.', '']
    lines += [f'- {line}' for line in advise(records)]
    figures = {'similarity': similarity_figure(records) if any('similarity' in r for r in records) else None,
               'usage': usage_figure(records)}
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(directory / f'{name}.png', dpi=120)
            lines += ['', f'![{name}]({name}.png)']
    (directory / 'report.md').write_text('\n'.join(lines) + '\n')
