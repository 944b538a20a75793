"""Refit: hidden units chosen, and the matrix behind them solved, so that one FFN computes what a MoE layer computes.

Axis legend: `T` tokens, `D` width, `C` candidates (hidden units of all experts), `H` hidden units that are kept.

With `a_t` (C,) the activations of the candidates on calibration token `t`, `y_t` (D,) its target and `w_t` its weight
(of mean 1), find `H` candidates `S` and

    min_{S, W, b}  mean_t w_t |W a_tS + b - y_t|^2 + l |W|^2,      l = ridge * mean over candidates of the variance of a

greedily in `S`, exactly in `W` and `b`. Only means over tokens are needed, of `A`, `Y`, `A^T A` and `A^T Y` with their
rows weighted: they are accumulated over chunks of tokens, in float64. Pure tensor functions; labels are never seen.

`y` is what the MoE layer computes, and what brings the residual stream back to that of the MoE model (`toward`).

What a change `d` of the output at a token does to the model's outputs is `J_t d` to first order, so tokens are weighted
by `|J_t|^2`, estimated by one random projection `|J_t^T r|^2`, `r ~ N(0, I)` (`token_weights`).

Sources: the least squares is that of MergeMoE (https://arxiv.org/abs/2510.14436) for whole experts and of CORP
(https://arxiv.org/abs/2602.05243), ridge with a bias, for pruned ViTs; the choice of single units is orthogonal
matching pursuit for several outputs (Tropp, Gilbert and Strauss, Algorithms for simultaneous sparse approximation,
2006).
"""
import math
import warnings
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

_CHUNK = 1024  # tokens whose activations are held at once
_DEPENDENT = 1e-12  # share of a candidate's variance under which it counts as a combination of the chosen ones


class Moments:
    """Means over calibration tokens of what the least squares needs, in float64.

    Args:
        candidates: `C`.
        width: `D`.
        device: Where to accumulate.

    Attributes:
        tokens: `T`, so far.
        mass: `sum w`.
        gram: `sum w a a^T`, (C, C).
        cross: `sum w a y^T`, (C, D).
        activation: `sum w a`, (C,).
        target: `sum w y`, (D,).
    """

    def __init__(self, candidates: int, width: int, device: Optional[torch.device] = None) -> None:
        self.tokens, self.mass = 0, 0.
        self.gram = torch.zeros(candidates, candidates, dtype=torch.float64, device=device)
        self.cross = torch.zeros(candidates, width, dtype=torch.float64, device=device)
        self.activation = torch.zeros(candidates, dtype=torch.float64, device=device)
        self.target = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, activations: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add a chunk of tokens: `activations` (t, C), `targets` (t, D) and `weights` (t,).

        Raises:
            ValueError: Values that are not finite.
        """
        for name, values in (('activations', activations), ('outputs', targets)):
            if not values.isfinite().all():
                raise ValueError(
                    f'the calibration images give {name} that are not finite; look for broken images, or take a '
                    f'checkpoint from before training diverged.')
        activations, targets, weights = activations.double(), targets.double(), weights.double()
        weighted = activations * weights[:, None]
        self.tokens += len(activations)
        self.mass += float(weights.sum())
        self.gram.addmm_(weighted.T, activations)
        self.cross.addmm_(weighted.T, targets)
        self.activation += weighted.sum(0)
        self.target += weights @ targets

    def take(self, index: Sequence[int]) -> 'Moments':
        """Those of some of the candidates."""
        part = Moments(0, 0)
        part.tokens, part.mass, part.target = self.tokens, self.mass, self.target
        part.gram, part.cross, part.activation = (
            self.gram[index][:, index], self.cross[index], self.activation[index])
        return part

    def normal(self, ridge: float, bias: bool = True) -> Tuple[Tensor, Tensor]:
        """Matrix and right-hand side of the normal equations, (C, C) and (C, D).

        Means of `a a^T` and `a y^T`, with a bias covariances; the bias is not shrunk. To the diagonal of the matrix
        `ridge` times its mean is added.
        """
        gram, cross = self.gram / self.mass, self.cross / self.mass
        if bias:
            gram.addr_(self.activation / self.mass, self.activation / self.mass, alpha=-1)
            cross.addr_(self.activation / self.mass, self.target / self.mass, alpha=-1)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        return gram, cross


def check_tokens(tokens: int, hidden: int, ridge: float) -> None:
    """Compare the number of calibration tokens with that of unknowns an output, `H + 1`; warn under 10 tokens each.

    Raises:
        ValueError: A ridge that is negative or not finite; with ridge 0, fewer tokens than unknowns.
    """
    if not 0 <= ridge < float('inf'):
        raise ValueError(f'ridge must be finite and >= 0, got {ridge}; 1e-4 is the default.')
    unknowns = hidden + 1
    if ridge == 0 and tokens < unknowns:
        raise ValueError(
            f'{tokens} calibration tokens do not determine {unknowns} unknowns an output: give more images, or a ridge '
            f'> 0.')
    if tokens < 10 * unknowns:
        warnings.warn(
            f'{tokens} calibration tokens for {unknowns} unknowns an output: with fewer than {10 * unknowns} the fit '
            f'may not hold on other images; give more.', stacklevel=2)


def preselect(contributions: Sequence[Tensor], limit: int, least: int, whole: int = 0) -> Tensor:
    """The candidates worth looking at, before any product of two of them is computed.

    Where there are more than `limit`, all units of the first `whole` experts (shared ones) and of the expert that
    contributes most, so that experts which are nearly copies of each other leave a complete FFN among the candidates;
    then single units by contribution. An expert that no token was sent to contributes nothing and is left out.

    Args:
        contributions: For each expert what its hidden units contribute, e.g. mean over tokens of
            `gate^2 activation^2 |down column|^2`, (h_e,).
        limit: Candidates to keep, unless the complete experts have more.
        least: Candidates that are needed; so many are kept even if some contribute nothing.
        whole: Experts that are kept whole.

    Returns:
        Indices into the concatenated units, ascending, (C,).
    """
    totals = torch.stack([units.sum() for units in contributions])
    kept = {*range(whole), int(totals.argmax())}
    priority = torch.cat([
        torch.full_like(units, float('inf')) if e in kept else units for e, units in enumerate(contributions)])
    limit = max(limit, sum(len(contributions[e]) for e in kept))
    count = max(least, min(limit, int((priority > 0).sum())))
    return priority.sort(descending=True, stable=True).indices[:count].sort().values


def select(moments: Moments, count: int, ridge: float, bias: bool = True) -> List[int]:
    """Choose hidden units greedily, each the one that lowers the ridge objective most (orthogonal matching pursuit).

    With `G`, `B` of `Moments.normal` and `L` the rows of a Cholesky factorisation of `G` whose pivots are the chosen
    units, `Z = L_S^-1 B_S`: what the chosen ones leave of `B` is `R = B - L^T Z`, of the diagonal of `G`
    `d = diag G - sum L^2`, and unit `j` lowers the objective by `|R_j|^2 / d_j`. O(C H (H + D)). Among equal gains the
    lowest index wins.

    Args:
        moments: Of all candidates.
        count: `H`.
        ridge: Relative to the mean of the diagonal.
        bias: Whether the FFN has a bias behind the hidden units.

    Returns:
        At most `count` indices in the order of choice. They are fewer where all others are combinations of them.
    """
    gram, cross = moments.normal(ridge, bias)
    diagonal = gram.diagonal().clone()
    left, threshold = diagonal.clone(), _DEPENDENT * diagonal
    factor = gram.new_zeros(min(count, len(gram)), len(gram))
    chosen: List[int] = []
    for step in range(len(factor)):
        free = left > threshold
        free[chosen] = False
        gain = torch.where(free, torch.linalg.vector_norm(cross, dim=1).square() / left, -1.)
        best = int(gain.argmax())
        if gain[best] < 0:
            break
        chosen.append(best)
        row = torch.addmv(gram[best], factor[:step].T, factor[:step, best], alpha=-1) / left[best].sqrt()
        factor[step] = row
        cross.addr_(row, cross[best] / left[best].sqrt(), alpha=-1)
        left -= row.square()
    return chosen


def solve(moments: Moments, ridge: float, bias: bool = True) -> Tuple[Tensor, Optional[Tensor]]:
    """The matrix and the bias behind the hidden units, `(G + l I) W = B`, `b = y - W^T a`, in float64.

    Args:
        moments: Of the hidden units that are kept.
        ridge: Relative to the mean of the diagonal.
        bias: Whether the FFN has a bias behind the hidden units.

    Returns:
        Down matrix (D, H) and down bias (D,), None without one.

    Raises:
        ValueError: The units depend on each other and the ridge does not make up for it.
    """
    gram, cross = moments.normal(ridge, bias)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info != 0 or not factor.isfinite().all():
        raise ValueError(
            f'the {len(gram)} hidden units depend on each other on {moments.tokens} calibration tokens: give more '
            f'images, or a ridge > 0.')
    down = torch.cholesky_solve(cross, factor).T
    return down, (moments.target - down @ moments.activation) / moments.mass if bias else None


def choose_and_solve(
        activations: Callable[[Tensor], Tensor],
        count: int,
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        hidden: int,
        ridge: float = 1e-4,
        bias: bool = True,
) -> Tuple[List[int], Tensor, Optional[Tensor]]:
    """The `H` hidden units to keep, and the matrix and the bias behind them.

    Args:
        activations: Of the candidates, (t, D) -> (t, C).
        count: `C`.
        inputs, targets: What the layer is given and what the FFN is to make of it, (T, D).
        weights: Of the tokens, (T,).
        hidden: `H`.
        ridge: Relative to the mean of the diagonal.
        bias: Whether the FFN has a bias behind the hidden units.

    Returns:
        `H` indices, down matrix (D, H) and down bias (D,), None without one. Where fewer units explain all that the
        candidates can, others fill the places, with zeros behind them.

    Raises:
        ValueError: Values that are not finite; too few tokens for a ridge of 0.
    """
    check_tokens(len(inputs), hidden, ridge)
    moments = Moments(count, targets.shape[1], inputs.device)
    for x, y, w in zip(*(tensor.split(_CHUNK) for tensor in (inputs, targets, weights))):
        moments.add(activations(x), y, w)
    chosen = select(moments, hidden, ridge, bias)
    down, down_bias = solve(moments.take(chosen), ridge, bias)
    others = sorted(set(range(count)) - set(chosen))[:hidden - len(chosen)]
    return chosen + others, nn.functional.pad(down, (0, len(others))), down_bias


def fit(
        ffn: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        steps: int,
        batch_size: int = 1024,
) -> None:
    """Train an FFN in place to give `targets` (T, D) for `inputs` (T, D): Adam, a tenth of warm-up, a cosine to 0.

    The largest learning rate, `0.02 / sqrt(D)`, suits weights of the usual scale `1 / sqrt(D)`.

    The loss is `|ffn(x) - y|^2` relative to the mean `|y|^2`; tokens are drawn in proportion to their weights, by a
    generator of their own: the same tensors give the same result, and no other stream of random numbers moves.

    Args:
        ffn: A module that maps (t, D) to (t, D).
        inputs, targets: The tokens.
        weights: Of the tokens, (T,).
        steps: Optimizer steps.
        batch_size: Tokens a step.
    """
    generator = torch.Generator().manual_seed(0)
    scale = targets.float().square().mean().clamp(min=1e-30)
    ends = weights.double().cpu().cumsum(0) / weights.double().cpu().sum()
    ends[-1] = 1.
    optimizer, schedule = _adam(list(ffn.parameters()), 0.02 / inputs.shape[1] ** 0.5, steps)
    with torch.enable_grad():
        for _ in range(steps):
            batch = torch.searchsorted(ends, torch.rand(batch_size, generator=generator).double()).to(inputs.device)
            loss = (ffn(inputs[batch]) - targets[batch]).float().square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()


def fit_outputs(
        model: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        teacher: Callable[[Tensor], Tensor],
        images: Tensor,
        steps: int,
        batch_size: int = 64,
) -> None:
    """Train some parameters of a model so that its outputs are those of another: Adam, warm-up and cosine as in `fit`.

    A few hundred images are soon learnt by heart, so a rectangle of each one is replaced by that of another, both moved
    by up to an eighth of their sides, and what is asked for is what the other model makes of the result. The loss is
    `L = |model(x) - teacher(x)|^2` relative to the variance of the teacher's outputs over the images. All is drawn by a
    generator of its own.

    The largest learning rate is `L / |g|_1` of a first batch, `g` the gradient by all parameters: a step of Adam moves
    each by about the rate against the sign of its gradient, and that step would make up for `L` if it went on as it
    begins (Polyak's step size, in the norm of such steps). So models whose outputs move much with small changes of
    their weights, as wide and deep ones do, take small steps.

    Args:
        model, teacher: Map images to outputs (B, ...).
        parameters: Changed in place; those that the outputs do not depend on are left alone.
        images: Calibration images, (N, C, H, W).
        steps: Optimizer steps.
        batch_size: Images a step; all of them, if there are fewer. No more pixels than 16 images of 224 x 224 have go
            through the models at once.

    Sources: the rectangles are those of CutMix (1905.04899); mixing in distillation without labels, function matching
    (2106.05237).
    """
    generator = torch.Generator().manual_seed(0)
    device = parameters[0].device
    at_once = max(1, 16 * 224 ** 2 // images[0, 0].numel())
    with torch.no_grad():
        outputs = torch.cat([teacher(some.to(device)).float() for some in images.split(at_once)])
        scale = outputs.var(0, correction=0).mean().clamp(min=1e-30)
    batch_size = min(batch_size, len(images))

    def add_gradients() -> Tensor:
        first, second = (
            _moved(images[torch.randperm(len(images), generator=generator)[:batch_size]], generator) for _ in range(2))
        mixed = torch.where(_rectangles(first, generator).to(first.device), second, first)
        total = torch.zeros((), device=device)
        for some in mixed.to(device).split(at_once):
            with torch.no_grad():
                wanted = teacher(some)
            with torch.enable_grad():
                loss = (model(some) - wanted).float().square().mean() / scale * (len(some) / batch_size)
            total += loss.detach()
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient
        return total

    for p in parameters:
        p.grad = None
    loss = float(add_gradients())
    slope = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
    optimizer, schedule = _adam(parameters, loss / max(slope, 1e-30), steps)
    for _ in range(steps):
        optimizer.zero_grad()
        add_gradients()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) moved together by up to an eighth of their sides; pixels of the edges fill the gap."""
    height, width = images.shape[2:]
    down, right = height // 8, width // 8
    top, left = (int(torch.randint(2 * most + 1, (), generator=generator)) for most in (down, right))
    padded = nn.functional.pad(images, (right, right, down, down), mode='replicate')
    return padded[:, :, top:top + height, left:left + width]


def _rectangles(images: Tensor, generator: torch.Generator) -> Tensor:
    """A mask (B, 1, H, W) of one rectangle in each image, of sides and place uniform in what there is room for."""
    masks = []
    for side in images.shape[2:]:
        length = torch.rand(len(images), 1, generator=generator)
        start = torch.rand(len(images), 1, generator=generator) * (1 - length)
        middle = (torch.arange(side) + 0.5) / side
        masks.append((middle >= start) & (middle < start + length))
    return masks[0][:, None, :, None] & masks[1][:, None, None, :]


def _adam(
        parameters: Sequence[nn.Parameter],
        lr: float,
        steps: int,
) -> Tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, a tenth of warm-up, a cosine to 0."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    warmup = steps // 10

    def factor(step: int) -> float:
        return min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def token_weights(sensitivity: Tensor, floor: float = 0.1) -> Tensor:
    """Weights of mean 1 from the sensitivities `|J_t^T r|^2` of tokens (T,): `floor + (1 - floor) s_t / mean s`.

    The floor stands for what the first order does not see, and keeps every token in; where nothing is known of any
    token, all weigh alike.

    Raises:
        ValueError: Values that are not finite.
    """
    if not sensitivity.isfinite().all():
        raise ValueError(
            'the calibration images give derivatives that are not finite; look for broken images, or take a checkpoint '
            'from before training diverged.')
    sensitivity = sensitivity.double()
    mean = sensitivity.mean()
    return floor + (1 - floor) * sensitivity / mean if mean > 0 else torch.ones_like(sensitivity)


def draw(weights: Tensor, limit: int) -> Tuple[Tensor, Tensor]:
    """About `limit` of the tokens, in proportion to their weights `w` (T,), so that none of the heavy ones is left out.

    Token `t` is kept with probability `p_t = min(1, c w_t)`, `sum p = limit`, and weighs `w_t / p_t` then: sums over
    tokens are what they were in expectation. The draw has a generator of its own.

    Returns:
        Indices of the tokens, ascending, and their weights, (n,).
    """
    if len(weights) <= limit:
        return torch.arange(len(weights), device=weights.device), weights
    ordered = weights.double().cpu().sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    factors = (limit - torch.arange(len(ordered))) / rest  # c, if the first 0, 1, 2, ... tokens are kept for certain
    factor = factors[(factors * ordered <= 1).nonzero()[0]]
    probability = (factor * weights.double().cpu()).clamp(max=1)
    uniform = torch.rand(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = (uniform < probability).nonzero()[:, 0]
    return index.to(weights.device), weights[index.to(weights.device)] / probability[index].to(weights)


def toward(outputs: Tensor, stream: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Targets `y + c` that bring the residual stream half the way back to that of the MoE model.

    A layer whose output `y` is added to the stream with a scale `s` (D,), `z = x + s * y`, could make up for what the
    layers before it did to the stream: of `c` with `s c = wanted - z`, a half. Channels in which the scale is small
    would need a large `c`, so it is `min_c |s c - (wanted - z)|^2 + mean(s^2) |c|^2`: a half at equal scales.

    Args:
        outputs: `y`, (T, D).
        stream: `z`, behind the layer, of the model converted so far, (T, D).
        wanted: The same of the MoE model, (T, D).
        scale: `s`, (D,).
    """
    damped = scale.square() + scale.square().mean().clamp(min=1e-30)
    return torch.cat([  # no copies of everything in float64
        y + ((w.double() - z.double()) * scale / damped).to(y.dtype)
        for y, z, w in zip(*(tensor.split(_CHUNK) for tensor in (outputs, stream, wanted)))])


@torch.no_grad()
def relative_error(outputs: Tensor, targets: Tensor, weights: Tensor) -> float:
    """`sqrt(sum w |y' - y|^2 / sum w |y|^2)` of outputs `y'` (T, D) for targets `y` (T, D) at weights `w` (T,)."""
    targets, weights = targets.double(), weights.double()
    left, whole = (weights @ values.square().sum(1) for values in (outputs.double() - targets, targets))
    return float((left / whole.clamp(min=1e-300)).sqrt())
