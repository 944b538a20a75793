"""Gathering: from the FFNs of a mixture of experts to one dense FFN.

Axis legend: `E` experts, `H` hidden units, `D` width, `G` up matrices (1 plain FFN, 2 GLU: gate and value), `K`
parameters of a norm over the hidden units (weight, bias).

Pure tensor functions, from a sequence of `FFNWeights` to one `FFNWeights`; nothing is changed in place. Half precision
is computed in float32 and cast back at the end. `METHODS` has one record a method, the only list of them.

Sources: OneS (https://arxiv.org/abs/2201.10890) for sum, average, Top-KG and SVD-KG; DO-ACP
(https://arxiv.org/abs/2605.28207) for the scoring and the selection of experts.
"""
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .refit import choose_and_solve


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """Weights of one FFN: `down @ act(up @ x + up_bias) + down_bias`, where a norm may stand before `down`.

    Args:
        up: Matrices into the hidden units, (G, H, D).
        down: Matrix out of the hidden units, (D, H).
        up_bias: (G, H), or None.
        down_bias: (D,), or None.
        norm: Parameters of a norm over the hidden units, (K, H), or None.

    Raises:
        ValueError: When the shapes do not fit each other.
    """
    up: Tensor
    down: Tensor
    up_bias: Optional[Tensor] = None
    down_bias: Optional[Tensor] = None
    norm: Optional[Tensor] = None

    def __post_init__(self):
        if self.up.ndim != 3:
            raise ValueError(f'up must be (G, H, D), got {tuple(self.up.shape)}; a plain FFN has G = 1: use up[None].')
        groups, hidden, width = self.up.shape
        norms = len(self.norm) if self.norm is not None and self.norm.ndim else 0
        expected = dict(down=(width, hidden), up_bias=(groups, hidden), down_bias=(width,), norm=(norms, hidden))
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f'{name} must be {shape} beside up {tuple(self.up.shape)} = (G, H, D), got {tuple(tensor.shape)}.')

    @property
    def hidden(self) -> int:
        """Number of hidden units, H."""
        return self.up.shape[1]

    @property
    def width(self) -> int:
        """Width of input and output, D."""
        return self.up.shape[2]

    def units(self) -> Tensor:
        """Joint vector of each hidden unit: its up rows, up biases and down column (not the norm), (H, F)."""
        parts = [self.up.transpose(0, 1).flatten(1), self.down.T]
        if self.up_bias is not None:
            parts.insert(1, self.up_bias.T)
        return torch.cat(parts, dim=1)


def take(weights: FFNWeights, index: Union[Tensor, Sequence[int]]) -> FFNWeights:
    """Pick hidden units by index, in the order of `index` (n,); the down bias stays: H -> n hidden units."""
    index = torch.as_tensor(index, dtype=torch.long, device=weights.up.device)
    return _map_fields([weights], lambda name, t: t[0] if name == 'down_bias' else t[0].index_select(1, index))


def concatenate(parts: Sequence[FFNWeights]) -> FFNWeights:
    """Put FFNs side by side along the hidden units; the result computes the sum of their outputs.

    Matrices and up biases are concatenated, down biases summed. Widths H may differ.

    Raises:
        ValueError: When the parts do not fit each other, or more than one has a norm over its hidden units.
    """
    wide = _check(parts, equal_hidden=False)
    if len(parts) > 1 and parts[0].norm is not None:
        raise ValueError(
            f'{len(parts)} FFNs with a norm over the hidden units cannot be put side by side: the norm would run over '
            f'all of their units. Use average, or keep one expert with prune.')
    result = _map_fields(wide, lambda name, ts: _sum(ts) if name == 'down_bias' else torch.cat(ts, dim=1))
    return _like(result, parts[0])


def average(experts: Sequence[FFNWeights], weights: Optional[Union[Tensor, Sequence[float]]] = None) -> FFNWeights:
    """Average of the experts (OneS): `W = sum_e w_e W_e`, computed as `W_0 + sum_e w_e (W_e - W_0)`.

    The second form returns the expert itself when all experts are equal, in any dtype.

    Args:
        experts: E experts of equal shapes.
        weights: Non-negative weights (E,), divided here by their sum; 1/E each by default.

    Raises:
        ValueError: When the experts do not fit each other, or the weights are negative, all zero or not E in number.
    """
    return _average(experts, weights, 'weights')


def usage(experts: Sequence[FFNWeights], counts: Union[Tensor, Sequence[float]]) -> FFNWeights:
    """Average weighted by usage: `W = sum_e n_e W_e / sum_e n_e`, as M-SMoE merges (arXiv 2310.01334).

    Args:
        experts: E experts of equal shapes.
        counts: Tokens each expert got, or any other measure of usage, (E,), non-negative.

    Raises:
        ValueError: When the experts do not fit each other, or the counts are negative, all zero or not E in number.
    """
    return _average(experts, counts, 'counts')


def total(experts: Sequence[FFNWeights], rescale: bool = False) -> FFNWeights:
    """Sum of the experts (OneS): `W = sum_e W_e` for matrices and biases; norm parameters are averaged.

    As published the weights of E nearly equal experts come out E times as large.

    Args:
        experts: E experts of equal shapes.
        rescale: Ours, not in the paper: multiply each up matrix, the down matrix and each bias by one scalar, so that
            its Frobenius norm is the mean of the experts' (a zero tensor stays zero).

    Raises:
        ValueError: When the experts do not fit each other.
    """
    wide = _check(experts)
    result = _map_fields(wide, lambda name, ts: mean(ts) if name == 'norm' else _sum(ts))
    if rescale:
        result = _rescale(result, wide, ('up', 'up_bias', 'down', 'down_bias'))
    return _like(result, experts[0])


def top_kg(experts: Sequence[FFNWeights], rescale: bool = False) -> FFNWeights:
    """Top-KG (OneS): the H/E hidden units of highest score from each expert, side by side, H in all.

    As published the score is the l2 norm of the unit's row of the up matrix (in a GLU: of both) plus that of its column
    of the down matrix. The units of an expert keep their order, their biases and norm parameters; the down bias is
    averaged. Where E does not divide H the first H % E experts give one unit more.

    Args:
        experts: E experts of equal shapes.
        rescale: Ours, not in the paper: multiply each up matrix and bias and the down matrix by one scalar, so that its
            Frobenius norm is the mean of the experts' (a zero tensor stays zero).

    Raises:
        ValueError: When the experts do not fit each other.
    """
    wide = _check(experts)
    shares = _shares(wide[0].hidden, len(wide))
    scores = [expert.up.transpose(0, 1).flatten(1).norm(dim=1) + expert.down.norm(dim=0) for expert in wide]
    parts = [take(expert, _largest(score, n)) for expert, score, n in zip(wide, scores, shares)]
    result = _map_fields(parts, lambda name, ts: mean(ts) if name == 'down_bias' else torch.cat(ts, dim=1))
    if rescale:
        result = _rescale(result, wide, ('up', 'up_bias', 'down'))
    return _like(result, experts[0])


def svd_kg(experts: Sequence[FFNWeights], rescale: bool = False, share: float = 0.5) -> FFNWeights:
    """SVD-KG (OneS): `W = sum_e U_e[:, :n_e] S_e[:n_e] V_e[:, :n_e]^T`, the leading triplets of each expert.

    As published `n_e` adapts: the fewest triplets that hold a given share of the sum of the singular values of `W_e`.
    Done for each of the G up matrices and for the down matrix; biases and norm parameters are averaged.

    Args:
        experts: E experts of equal shapes.
        rescale: Ours, not in the paper: multiply each matrix by one scalar, so that its Frobenius norm is the mean of
            the experts' (a zero matrix stays zero).
        share: Of the sum of the singular values, over 0 and at most 1. The paper's value is not known to us.

    Raises:
        ValueError: When the experts do not fit each other, or a share out of its range.
    """
    wide = _check(experts)
    if not 0 < share <= 1:
        raise ValueError(f'share must be > 0 and <= 1, got {share}: it is what the kept singular values add up to.')

    def truncated_sum(matrices: Sequence[Tensor]) -> Tensor:
        result = torch.zeros_like(matrices[0])
        for matrix in matrices:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            before = s.cumsum(-1) - s  # the sum of those in front of each
            kept = s * (before < share * s.sum(-1, keepdim=True))
            result = result + (u * kept[..., None, :]) @ vh
        return result

    result = _map_fields(wide, lambda name, ts: truncated_sum(ts) if name in ('up', 'down') else mean(ts))
    if rescale:
        result = _rescale(result, wide, ('up', 'down'))
    return _like(result, experts[0])


def align(expert: FFNWeights, reference: FFNWeights) -> FFNWeights:
    """Permute the hidden units of `expert` to match those of `reference`; what it computes stays the same.

    `p = arg max_p sum_h <u_h(reference), u_p(h)(expert)>`, u_h the joint vector of `FFNWeights.units`: a linear
    assignment, the weight matching of Git Re-Basin (arXiv 2209.04836) within one FFN. Norm parameters move along.

    Raises:
        ValueError: When the two do not fit each other.
    """
    from scipy.optimize import linear_sum_assignment

    wide_reference, wide_expert = _check([reference, expert])
    similarity = wide_reference.units() @ wide_expert.units().T
    return take(expert, linear_sum_assignment(similarity.detach().cpu().numpy(), maximize=True)[1])


def aligned(experts: Sequence[FFNWeights], reference: int = 0) -> FFNWeights:
    """Average of the experts after `align` of each to the expert with index `reference`.

    Args:
        experts: E experts of equal shapes.
        reference: Index of the expert whose order of hidden units is kept, 0 <= reference < E.

    Raises:
        ValueError: When the experts do not fit each other, or there is no expert `reference`.
    """
    _check(experts)
    if not 0 <= reference < len(experts):
        raise ValueError(f'reference must be an expert index in [0, {len(experts)}), got {reference}.')
    return average([
        expert if e == reference else align(expert, experts[reference]) for e, expert in enumerate(experts)])


def select(scores: Union[Tensor, Sequence[float]], k: int) -> List[int]:
    """Indices of the k largest of `scores` (E,), ascending; among equal scores the lowest index wins.

    Raises:
        ValueError: When a score is not finite or k is not in [1, E].
    """
    scores = _vector('scores', scores)
    _check_k(k, len(scores))
    return _largest(scores, k).tolist()


def prune(experts: Sequence[FFNWeights], scores: Union[Tensor, Sequence[float]]) -> FFNWeights:
    """The expert with the highest score, itself and not a copy; among equal scores the lowest index wins.

    Args:
        experts: E experts, whose hidden widths may differ.
        scores: (E,), e.g. usage, or the mean over routed tokens of `gate * ||f_e||`.

    Raises:
        ValueError: When the experts do not fit each other, or the scores are not finite or not E in number.
    """
    _check(experts, equal_hidden=False)
    return experts[select(_vector('scores', scores, len(experts)), 1)[0]]


def average_contribution(cp: Union[Tensor, Sequence[float]], second_moment: Tensor) -> Tensor:
    """Average contribution of each expert (DO-ACP): `ACP_e = CP_e sqrt(E||f_e(x)||^2)`, (E,) in float64.

    Args:
        cp: Mean router probability over the tokens that chose the expert, (E,), non-negative.
        second_moment: Inner products of expert outputs, `E<f_i(x), f_j(x)>`, (E, E).

    Raises:
        ValueError: When shapes do not fit, or an entry is not finite or negative where it cannot be.
    """
    cp = _vector('cp', cp, non_negative=True)
    return cp * _second_moment(second_moment, len(cp)).diagonal().sqrt()


def do_acp_select(
        acp: Union[Tensor, Sequence[float]],
        second_moment: Tensor,
        k: int,
        lam: Optional[float] = None,
) -> List[int]:
    """Choose k experts that contribute much and differ from each other (DO-ACP).

    Greedy arg max of `log det(K_S + lam I)` with `K_ij = sqrt(ACP_i ACP_j) E<f_i, f_j>`. Taking expert j multiplies the
    determinant by the variance of j that the chosen experts leave unexplained: a pivoted Cholesky factorisation,
    O(E k^2), in float64. Among equal gains the lowest index wins.

    Args:
        acp: Contribution of each expert, see `average_contribution`, (E,), non-negative.
        second_moment: Inner products of expert outputs, `E<f_i(x), f_j(x)>`, symmetric, (E, E).
        k: Number of experts to keep, 1 <= k <= E.
        lam: Non-negative regularisation, `mean(diag K) / k` by default.

    Returns:
        Indices of the chosen experts, ascending.

    Raises:
        ValueError: When shapes do not fit, an entry is not finite or negative where it cannot be, or k is out of range.
    """
    acp = _vector('acp', acp, non_negative=True)
    num_experts = len(acp)
    _check_k(k, num_experts)
    kernel = torch.outer(acp.sqrt(), acp.sqrt()) * _second_moment(second_moment, num_experts)
    lam = kernel.diagonal().mean().item() / k if lam is None else lam
    if not 0 <= lam < float('inf'):
        raise ValueError(f'lam must be finite and >= 0, got {lam}; leave it out for mean(diag K) / k.')
    kernel = kernel + lam * torch.eye(num_experts, dtype=kernel.dtype)

    left = kernel.diagonal().clone()
    factor = kernel.new_zeros(k, num_experts)
    chosen: List[int] = []
    for step in range(k):
        gain = left.clone()
        gain[chosen] = -float('inf')
        best = int(gain.argmax())
        chosen.append(best)
        # With lam = 0 an expert that is a combination of the chosen ones has nothing left to explain.
        if left[best] > 0:
            factor[step] = (kernel[best] - factor[:step, best] @ factor[:step]) / left[best].sqrt()
            left = left - factor[step].square()
    return sorted(chosen)


def combine(
        routed: Sequence[FFNWeights],
        scales: Union[Tensor, Sequence[float]],
        shared: Sequence[FFNWeights] = (),
) -> FFNWeights:
    """Shared and scaled routed experts as one FFN: `f(x) = sum_i shared_i(x) + sum_j scales_j routed_j(x)`, exactly.

    FFNs add up over hidden units, so they are put side by side, shared ones first and whole, the routed ones with their
    down matrix and bias multiplied by their scale. This is the MoE layer itself if its gates are constant.

    Args:
        routed: Routed experts, k of them; hidden widths may differ.
        scales: Gate constant of each, (k,).
        shared: Experts that are always on.

    Raises:
        ValueError: When the FFNs do not fit each other (numbered shared first), there is not one finite scale for each
            routed one, or more than one FFN has a norm over its hidden units.
    """
    parts = [*shared, *routed]
    wide = _check(parts, equal_hidden=False)
    scales = [1.] * len(shared) + _vector('scales', scales, len(routed)).tolist()
    scaled = [
        replace(part, down=part.down * scale, down_bias=None if part.down_bias is None else part.down_bias * scale)
        for part, scale in zip(wide, scales)
    ]
    return _like(concatenate(scaled), parts[0])


_FIELDS = tuple(field.name for field in fields(FFNWeights))


def _map_fields(experts: Sequence[FFNWeights], function: Callable[[str, List[Tensor]], Tensor]) -> FFNWeights:
    """Apply `function(name, tensors)` to each field the experts have."""
    return FFNWeights(**{
        name: function(name, [getattr(expert, name) for expert in experts])
        for name in _FIELDS if getattr(experts[0], name) is not None
    })


def _check(experts: Sequence[FFNWeights], equal_hidden: bool = True) -> List[FFNWeights]:
    """Validate the experts and return them in float32 or better."""
    if not len(experts):
        raise ValueError('Got no experts; pass at least one.')
    for e, expert in enumerate(experts):
        for name in _FIELDS:
            tensor, first = getattr(expert, name), getattr(experts[0], name)
            if _layout(name, tensor) != _layout(name, first):
                raise ValueError(
                    f'{name} of expert {e} is {_shape_text(tensor)}, of expert 0 {_shape_text(first)}; experts must '
                    f'agree in width, number of up matrices, biases, norm and dtype: gather each MoE layer by itself.')
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(
                    f'{name} of expert {e} has values that are not finite; take a checkpoint from before it diverged.')
    hidden = [expert.hidden for expert in experts]
    if equal_hidden and len(set(hidden)) > 1:
        raise ValueError(
            f'Experts must have equal hidden widths here, got {hidden}; prune and do_acp take unequal ones.')
    return [
        _map_fields([expert], lambda name, t: t[0].to(torch.promote_types(t[0].dtype, torch.float32)))
        for expert in experts
    ]


def _like(result: FFNWeights, expert: FFNWeights) -> FFNWeights:
    """Cast each field of `result` to the dtype it has in `expert`."""
    return _map_fields([result, expert], lambda name, t: t[0].to(t[1].dtype))


def _layout(name: str, tensor: Optional[Tensor]) -> Optional[tuple]:
    """What experts must agree in: dtype, and shape without the hidden axis (1 in all but the down bias)."""
    if tensor is None:
        return None
    return tensor.dtype, *(size for axis, size in enumerate(tensor.shape) if axis != 1 or name == 'down_bias')


def _shape_text(tensor: Optional[Tensor]) -> str:
    return 'absent' if tensor is None else f'{tuple(tensor.shape)} {tensor.dtype}'


def _check_k(k: int, num_experts: int):
    if not 1 <= k <= num_experts:
        raise ValueError(f'k must be in [1, {num_experts}], the number of experts, got {k}.')


def _vector(name: str, values, length: Optional[int] = None, non_negative: bool = False) -> Tensor:
    """Validate one number an expert; return it in float64 on the CPU, (E,)."""
    values = torch.as_tensor(values, dtype=torch.float64, device='cpu').detach()
    if values.ndim != 1 or (length is not None and len(values) != length):
        expected = 'E' if length is None else length
        raise ValueError(f'{name} must be one number an expert, shape ({expected},), got {tuple(values.shape)}.')
    if not values.isfinite().all() or (non_negative and (values < 0).any()):
        raise ValueError(f'{name} must be finite{" and >= 0" if non_negative else ""}, got {values.tolist()}.')
    return values


def _second_moment(values: Tensor, num_experts: int) -> Tensor:
    """Validate inner products of expert outputs; return their symmetric part in float64 on the CPU, (E, E)."""
    values = torch.as_tensor(values, dtype=torch.float64, device='cpu').detach()
    if values.shape != (num_experts, num_experts):
        raise ValueError(f'second_moment must have shape {(num_experts, num_experts)}, got {tuple(values.shape)}.')
    _vector('the diagonal of second_moment', values.diagonal(), non_negative=True)
    _vector('second_moment', values.flatten())
    return (values + values.T) / 2


def _average(experts: Sequence[FFNWeights], weights, name: str) -> FFNWeights:
    wide = _check(experts)
    if weights is not None:
        weights = _vector(name, weights, len(wide), non_negative=True)
        if not weights.sum() > 0:
            raise ValueError(f'{name} must not all be zero; leave them out for the plain average.')
        # mean() starts from the first: one of weight 0 would leave its rounding errors behind
        wide = [expert for expert, weight in zip(wide, weights) if weight > 0]
        weights = (weights[weights > 0] / weights.sum()).tolist()
    return _like(_map_fields(wide, lambda name, ts: mean(ts, weights)), experts[0])


def mean(tensors: Sequence[Tensor], weights: Optional[Sequence[float]] = None) -> Tensor:
    """`t_0 + sum_e w_e (t_e - t_0)`, with `w_e` 1/E by default and of sum 1.

    In this form equal tensors have themselves as their mean, to the bit, and close ones lose no digits. Half precision
    is summed in float32.
    """
    weights = weights or [1 / len(tensors)] * len(tensors)
    first = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32))
    return (first + sum(w * (t.to(first.dtype) - first) for t, w in zip(tensors[1:], weights[1:]))).to(tensors[0].dtype)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors, tensors[0].new_zeros(()))


def _shares(count: int, num_experts: int) -> List[int]:
    """`count` in E parts that differ by one at most, the larger first."""
    return [count // num_experts + (e < count % num_experts) for e in range(num_experts)]


def _largest(scores: Tensor, k: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def _rescale(result: FFNWeights, experts: Sequence[FFNWeights], names: Sequence[str]) -> FFNWeights:
    """Give the named fields the experts' mean Frobenius norm, each of the G up matrices and biases by itself."""
    axes = {'up': (1, 2), 'up_bias': (1,), 'down': (0, 1), 'down_bias': (0,)}

    def rescaled(name: str, tensors: List[Tensor]) -> Tensor:
        if name not in names:
            return tensors[0]
        norm, *norms = [torch.linalg.vector_norm(t, dim=axes[name], keepdim=True) for t in tensors]
        return tensors[0] * torch.where(norm > 0, sum(norms) / len(norms) / norm, 1.)

    return _map_fields([result, *experts], rescaled)


@dataclass(frozen=True, eq=False)
class ExpertStatistics:
    """What a calibration set says about the experts of one gated layer (measured by `ewa.calibration`).

    Args:
        tokens: Number of tokens, `T`.
        counts: Tokens sent to each expert, (E,).
        probability: Mean router probability of each expert over the tokens that chose it, (E,); 0 where none did.
        contribution: Mean of `gate * ||f_e(x)||` over the tokens that chose the expert, (E,); 0 where none did.
        second_moment: `E<f_i(x), f_j(x)>` over all tokens, chosen or not, (E, E).
        mass: Mean sum of the gates of a token.
        change: `sqrt(E|y' - y|^2 / E|y|^2)` for the routed part of the layer's output `y` and the output `y'` of the
            plain average of its experts; not a number if the experts are of unequal widths and have no average.
    """
    tokens: int
    counts: Tensor
    probability: Tensor
    contribution: Tensor
    second_moment: Tensor
    mass: float
    change: float


def _by_usage(experts: Sequence[FFNWeights], counts: Tensor) -> FFNWeights:
    # a group that no calibration token was sent to has no usage to weigh by, and no share in the output
    return usage(experts, counts) if counts.sum() > 0 else average(experts)


def _best_experts(statistics: ExpertStatistics, k: int, score: str = 'usage') -> List[int]:
    if score not in ('usage', 'norm'):
        raise ValueError(f"score must be 'usage' or 'norm', got {score!r}.")
    return select(statistics.counts if score == 'usage' else statistics.contribution, k)


def _diverse_experts(statistics: ExpertStatistics, k: int, lam: Optional[float] = None) -> List[int]:
    acp = average_contribution(statistics.probability, statistics.second_moment)
    return do_acp_select(acp, statistics.second_moment, k, lam)


@dataclass(frozen=True)
class Option:
    """An option of a gathering method.

    Args:
        name: As an argument of `ewa.to_dense`.
        type: Of its value; bool for a switch.
        help: One line.
        choices: Values it may have; empty: any.
        flag: On the command line; default: the name.
    """
    name: str
    type: type
    help: str
    choices: Tuple[str, ...] = ()
    flag: str = ''

    def __post_init__(self):
        object.__setattr__(self, 'flag', self.flag or f'--{self.name.replace("_", "-")}')


@dataclass(frozen=True)
class Method:
    """A gathering method, as `ewa.to_dense`, the command line and the docs know it.

    Args:
        name: Of the method.
        kind: `'merge'`: `function(experts, **options)` makes one FFN of experts of equal shapes; with `needs_data` it
            is `function(experts, counts, **options)`, counts of tokens (E,). `'select'`: `function(statistics, k,
            **options)` returns the indices of the `k` experts to keep. `'fit'`: `function` is given what a layer's
            hidden units and the layer itself compute, see `ewa.refit.choose_and_solve`; `ewa.dense` takes one layer
            after the other.
        function: See `kind`.
        summary: What the FFN is, one line.
        source: Paper; empty for what is usual.
        needs_data: Whether calibration images are needed.
        options: What it takes.
    """
    name: str
    kind: str
    function: Callable[..., Any]
    summary: str
    source: str = ''
    needs_data: bool = False
    options: Tuple[Option, ...] = ()


_RESCALE = Option('rescale', bool, 'give matrices the norm of an expert\'s')
METHODS: Dict[str, Method] = {method.name: method for method in (
    Method('refit', 'fit', choose_and_solve, 'the `H` hidden units of all experts that explain most of what the layer '
           'computes, and the fc2 that brings them closest to it; `steps` then train each FFN on that',
           'ours; least squares as in MergeMoE (2510.14436), CORP (2602.05243)', needs_data=True, options=(
               Option('steps', int, 'optimizer steps for each FFN against its layer\'s outputs, without labels',
                      flag='--refit-steps'),
               Option('joint_steps', int, 'then optimizer steps for the whole dense model against the MoE\'s outputs '
                      'on mixed images, without labels', flag='--refit-joint-steps'),
               Option('ridge', float, 'of the least squares, relative to the mean of the diagonal; default: 1e-4'))),
    Method('average', 'merge', average, 'mean of the experts', 'OneS, EWA'),
    Method('sum', 'merge', total, 'sum of the experts', 'OneS', options=(_RESCALE,)),
    Method('top_kg', 'merge', top_kg, 'the `H/E` hidden units of each expert whose row of fc1 and column of fc2 have '
           'the largest norms (their sum), side by side; output bias averaged', 'OneS, Top-KG', options=(_RESCALE,)),
    Method('svd_kg', 'merge', svd_kg, 'per matrix, the sum over experts of the fewest leading singular triplets that '
           'hold a share of the sum of singular values; biases averaged', 'OneS, SVD-KG', options=(
               _RESCALE, Option('share', float, 'of the sum of singular values that is kept; default: 0.5'))),
    Method('usage', 'merge', _by_usage, 'mean weighted by the tokens each expert got',
           'the weighting of M-SMoE (2310.01334)', needs_data=True),
    Method('aligned', 'merge', aligned, 'hidden units of each expert permuted to match the first (linear assignment), '
           'then the mean', 'Git Re-Basin (2209.04836)',
           options=(Option('reference', int, 'index of the expert whose order of hidden units is kept; default: 0'),)),
    Method('prune', 'select', _best_experts, 'the most used expert, or with `--score norm` that of largest gate times '
           'output norm', needs_data=True,
           options=(Option('score', str, 'by tokens, or gate times output norm; default: usage', ('usage', 'norm')),)),
    Method('do_acp', 'select', _diverse_experts, 'the `k` experts that contribute much and differ, side by side, fc2 '
           'scaled to the gates\' mass; with full-width experts `k` is 1, a single expert, which is not the method as '
           'published', '2605.28207', needs_data=True,
           options=(Option('lam', float, 'regularisation of the determinant; default: mean of the diagonal over k'),)),
)}
