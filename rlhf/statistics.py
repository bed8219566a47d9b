"""Intervals and error sizes for means over prompts that come in clusters.

Prompts of one cluster share a source, so their scores err together: everything here resamples or
sums whole clusters, never single prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FEW_CLUSTERS = 10
_RESAMPLED_CELLS = 4_000_000

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% interval; an end that the data can't bound is infinite.

    >>> Interval(0.02, -0.01, 0.05).low
    -0.01
    """

    value: float
    low: float
    high: float


def cluster_mean(values: Floats, clusters: Sequence[str], resamples: int, seed: int) -> Interval:
    """Mean of `values` (shape [N]) with a 95% bootstrap interval over `clusters` (length N).

    Clusters are drawn with replacement; the statistic is sum of sums / sum of counts, so that
    clusters weigh by their size. The percentile interval is taken at the expanded level
    Phi(-sqrt(C / (C - 1)) t_{C-1, .975}) a side (Hesterberg 2015, the expanded percentile interval,
    https://doi.org/10.1080/00031305.2015.1089789), since the plain one is too narrow with few
    clusters. Coverage in simulations with 12 to 30 clusters (3000 trials, 600 resamples):

    | differences         | this         | plain percentile | BCa          | expanded BCa |
    |---------------------|--------------|------------------|--------------|--------------|
    | normal and discrete | 0.94         | 0.90 to 0.94     | 0.90 to 0.93 | 0.93 to 0.94 |
    | long-tailed         | 0.87 to 0.91 | 0.83 to 0.90     | 0.85 to 0.91 | 0.89 to 0.92 |

    Expanded BCa does better on long tails, but is undefined for some degenerate samples.

    No resample reaches beyond the most extreme cluster, so below `FEW_CLUSTERS` clusters the
    interval is Student's t with the clustered standard error: with 5 clusters it covers 0.94
    (expanded percentile 0.92), and 0.83 (0.82) with long tails.
    One cluster says nothing about the others: the interval is (-inf, inf). Equal values give a
    zero-width interval. The same arguments always give the same interval.

    Raises:
        ValueError: no values, a value that isn't finite, lengths that differ, no resamples.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    sums, counts = _per_cluster(values, clusters)
    if len(sums) == 1:
        return Interval(float(np.mean(values)), -math.inf, math.inf)
    if np.all(values == values[0]):
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    value = float(np.mean(values))
    t = float(stats.t.ppf(0.975, len(sums) - 1))
    if len(sums) < FEW_CLUSTERS:
        half = t * standard_error(values, clusters)
        return Interval(value, value - half, value + half)
    tail = float(stats.norm.cdf(-math.sqrt(len(sums) / (len(sums) - 1)) * t))
    bounds = stats.bootstrap(
        (sums, counts),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _RESAMPLED_CELLS // len(sums)),
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(bounds.low), float(bounds.high))


def standard_error(values: Floats, clusters: Sequence[str]) -> float:
    """Clustered standard error of the mean of `values` (shape [N]).

    sqrt(C / (C - 1) * sum over clusters of (sum_c - n_c * mean)^2) / N, the linearised variance of
    a ratio (Cochran, Sampling Techniques, 1977). Infinite with one cluster.

    Raises:
        ValueError: no values, a value that isn't finite, lengths that differ.
    """
    sums, counts = _per_cluster(values, clusters)
    number = len(sums)
    if number == 1:
        return math.inf
    residuals = sums - counts * np.mean(values)
    return math.sqrt(number / (number - 1) * float(residuals @ residuals)) / len(values)


def smallest_detectable(values: Floats, clusters: Sequence[str]) -> float:
    """Smallest true mean difference that this many prompts would show.

    `values` (shape [N]) are paired differences. (z_.975 + z_.80) * clustered standard error, that
    is 2.80 of them: 80% power in a two-sided test at 5%. Infinite with one cluster.

    Raises:
        ValueError: no values, a value that isn't finite, lengths that differ.
    """
    return float(stats.norm.ppf(0.975) + stats.norm.ppf(0.80)) * standard_error(values, clusters)


def false_stop_rate(se: float, max_drop: float) -> float:
    """Chance that the plain point rule stops a round that changed nothing: Phi(-max_drop / se).

    The estimate of a zero difference is taken as normal with standard error `se`. Without error
    (`se` 0) it never stops; where the error is unbounded it is a coin toss.

    >>> round(false_stop_rate(0.02, 0.02), 3)
    0.159

    Raises:
        ValueError: `se` or `max_drop` is negative or NaN.
    """
    if not (se >= 0 and max_drop >= 0):
        raise ValueError(f"se and max_drop must be at least 0, got {se} and {max_drop}")
    return 0.0 if se == 0 else float(stats.norm.cdf(-max_drop / se))


def _ratio(sums: Floats, counts: Floats, axis: int = -1) -> Any:
    return sums.sum(axis=axis) / counts.sum(axis=axis)


def _per_cluster(values: Floats, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """Sum and count of each cluster, in the order of their names (both shape [C])."""
    if values.ndim != 1 or len(values) == 0 or len(values) != len(clusters):
        raise ValueError(
            "values must be a non-empty vector with one cluster a value, "
            f"got shape {values.shape} and {len(clusters)} clusters"
        )
    if not np.all(np.isfinite(values)):
        raise ValueError(f"values must be finite, {int((~np.isfinite(values)).sum())} are not")
    _, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums: Floats = np.bincount(codes, weights=values).astype(np.float64)
    return sums, np.bincount(codes).astype(np.float64)
