"""What the tables of the studies are made of: lines of results, picked, paired and written down as Markdown."""
import statistics
from textwrap import fill
from typing import Any, Callable, Dict, List, Sequence, Tuple, TypeVar

from scipy.stats import t as student

Lines = List[Dict[str, Any]]
T = TypeVar('T')


def mean_se(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """`mean ± standard error` of values, one a seed."""
    if not values:
        return ''
    mean = f'{statistics.mean(values):{"+" * sign}.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {standard_error(values):.{digits}f}'


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.


def interval(values: Sequence[float], level: float = 0.95) -> Tuple[float, float]:
    """Student's confidence interval of the mean of at least two values."""
    half = student.ppf(0.5 + level / 2, len(values) - 1) * standard_error(values)
    return statistics.mean(values) - half, statistics.mean(values) + half


def with_interval(values: Sequence[float], digits: int) -> str:
    """`mean (low to high)` of differences, one a seed; the bare mean of a single one."""
    if len(values) < 2:
        return ''.join(f'{value:+.{digits}f}' for value in values)
    low, high = interval(values)
    return f'{statistics.mean(values):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows])


def select(lines: Lines, **labels) -> Lines:
    """The lines with these labels, by seed."""
    found = [line for line in lines if all(line['labels'].get(k) == v for k, v in labels.items())]
    return sorted(found, key=lambda line: line['labels']['seed'])


def unique(lines: Lines, label: str) -> List[Any]:
    """The values of a label, in the order in which they first appear."""
    return list(dict.fromkeys(line['labels'][label] for line in lines if label in line['labels']))


def by_seed(lines: Lines, read: Callable[[Dict[str, Any]], T]) -> Dict[int, T]:
    """Seed to what is read of its line."""
    return {line['labels']['seed']: read(line) for line in lines}


def paired(lines: Dict[int, float], reference: Dict[int, float]) -> List[float]:
    """Differences of the seeds that both have."""
    return [lines[seed] - reference[seed] for seed in lines if seed in reference]


def scored(key: str, part: str = 'test') -> Callable[[Dict[str, Any]], float]:
    """A reader of one metric, for `by_seed`."""
    return lambda line: line[part][key]


def compared(lines: Lines, reference: Lines) -> List[str]:
    """Cells of a row: top-1 and its difference to that of a reference, paired over seeds, and the same of NLL."""
    cells = []
    for key, digits in (('top1', 2), ('nll', 3)):
        scores = by_seed(lines, scored(key))
        cells += [mean_se(list(scores.values()), digits), '' if lines == reference else with_interval(
            paired(scores, by_seed(reference, scored(key))), digits)]
    return cells


def provenance(lines: Lines, what: str = 'Mean ± standard error over seeds, test set.') -> str:
    """How many runs, which seeds, on which machines, how long; and what the cells are."""
    machines = list(dict.fromkeys(
        f'{line["machine"]["gpu"] or line["machine"]["cpu"]}, {line["machine"]["threads"]} thread(s) a run, torch '
        f'{line["machine"]["torch"]}, timm {line["machine"]["timm"]}' for line in lines))
    seeds = sorted({line['labels']['seed'] for line in lines})
    hours = sum(line['seconds'] for line in lines) / 3600
    return wrap(f'{len(lines)} runs, seeds {", ".join(map(str, seeds))}; {"; ".join(machines)}; {hours:.1f} hours of '
                f'runs. {what}')


def wrap(text: str) -> str:
    """A paragraph in lines of 120 columns."""
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def error_bars(axis, columns: Sequence[Any], groups: Dict[str, List[List[float]]], xlabel: str, ylabel: str) -> None:
    """Draw mean and standard error of each group over equally spaced columns."""
    for label, values in groups.items():
        points = [(i, statistics.mean(v), standard_error(v)) for i, v in enumerate(values) if v]
        if points:
            axis.errorbar(*zip(*points), marker='o', markersize=4, capsize=3, label=label)
    axis.set_xticks(range(len(columns)), [f'{column:g}' for column in columns], fontsize=8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
