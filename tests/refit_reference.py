"""Slow, obvious versions of ewa/refit.py: all activations at once, every least squares solved anew.

Axis legend: `T` tokens, `D` width, `C` candidates.
"""
import torch


def problem(activations, bias):
    """The matrix of the least squares: activations and, for a bias, a column of ones; float64 (T, C) or (T, C + 1)."""
    activations = activations.double()
    return torch.cat([activations, torch.ones(len(activations), 1).double()], dim=1) if bias else activations


def penalty(activations, ridge, bias):
    """`ridge` times the mean over candidates of the variance (without a bias: the mean square)."""
    activations = activations.double()
    centre = activations.mean(0) if bias else 0
    return ridge * (activations - centre).square().mean().item()


def solve(activations, targets, weight, bias):
    """Minimise `|A W + b - Y|^2 / T + weight |W|^2` with the penalty stacked under the tokens: (D, C), (D,)."""
    matrix = problem(activations, bias) / len(activations) ** .5
    right = targets.double() / len(activations) ** .5
    rows = torch.zeros(activations.shape[1], matrix.shape[1]).double()
    rows[:, :activations.shape[1]] = weight ** .5 * torch.eye(activations.shape[1])
    solution = torch.linalg.lstsq(
        torch.cat([matrix, rows]), torch.cat([right, torch.zeros(len(rows), right.shape[1]).double()]),
        driver='gelsd').solution
    down = solution[:activations.shape[1]].T
    return down, solution[-1] if bias else None


def objective(activations, targets, weight, bias):
    down, offset = solve(activations, targets, weight, bias)
    error = activations.double() @ down.T + (offset if bias else 0) - targets.double()
    return (error.square().sum() / len(activations) + weight * down.square().sum()).item()


def select(activations, targets, count, ridge, bias):
    """Try every candidate beside the chosen ones, keep the best, `count` times."""
    weight = penalty(activations, ridge, bias)
    chosen = []
    for _ in range(count):
        others = [c for c in range(activations.shape[1]) if c not in chosen]
        values = [objective(activations[:, [*chosen, c]], targets, weight, bias) for c in others]
        chosen.append(others[values.index(min(values))])
    return chosen


def correction(missing, scale):
    """For every token and channel the `c` of least `(s c - missing)^2 + mean(s^2) c^2`, from a problem of two rows."""
    rows = [torch.stack([s, scale.square().mean().sqrt()])[:, None] for s in scale]
    return torch.stack([
        torch.stack([torch.linalg.lstsq(row, torch.stack([value, value * 0])[:, None]).solution[0, 0]
                     for row, value in zip(rows, token)]) for token in missing])
