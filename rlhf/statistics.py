"""Intervals and error sizes for means, and other statistics, over prompts that come in clusters.

Prompts of one cluster share a source, so their scores err together: everything here resamples or
sums whole clusters, never single prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FEW_CLUSTERS = 10
_RESAMPLED_CELLS = 4_000_000

Floats = NDArray[np.floating[Any]]
Statistic = Callable[[Floats], Floats]
"""How often each cluster counts (shape [B, C]) -> the statistic of each such sample (shape [B])."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% interval; an end that the data can't bound is infinite.

    >>> Interval(0.02, -0.01, 0.05).low
    -0.01
    """

    value: float
    low: float
    high: float


def exact_sum(values: Iterable[float]) -> tuple[float, ...]:
    """The exact sum of finite values, as the few floats that it is the sum of, largest first.

    Sums of parts, taken together, are the sum of the whole to the last bit: `math.fsum` rounds once
    (Shewchuk 1997, Adaptive Precision Floating-Point Arithmetic,
    https://doi.org/10.1007/PL00009321), and what it rounds off is summed again until nothing is.

    >>> exact_sum([1e16, 1.0, 1e-16])
    (1e+16, 1.0, 1e-16)
    """
    known = list(values)
    assert all(map(math.isfinite, known)), "only finite values have a sum"
    parts: list[float] = []
    while rest := math.fsum([*known, *(-part for part in parts)]):
        parts.append(rest)
    return tuple(parts)


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
    tail = _expanded_tail(len(sums))
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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic, its 95% interval, and its standard error; what the data can't bound is infinite.

    >>> Estimate(0.7, 0.6, 0.8, 0.05).standard_error
    0.05
    """

    value: float
    low: float
    high: float
    standard_error: float


def cluster_bootstrap(
    statistic: Statistic, clusters: int, resamples: int, *, width: int = 0, seed: int = 0
) -> Estimate:
    """Any statistic of `clusters` clusters with a 95% bootstrap interval over them.

    The interval is the expanded percentile one of `cluster_mean`, the standard error the standard
    deviation over resamples. Below `FEW_CLUSTERS` clusters the error is the jackknife's and the
    interval Student's t with it; with one cluster both are infinite. A resample whose statistic is
    undefined (NaN) may lie at either end: an end is infinite once more than its tail is undefined.
    A statistic that is undefined on the data itself is NaN all through. `width` is the widest row
    that the statistic expands a sample to, for memory. The same arguments give the same result.

    >>> bool(cluster_bootstrap(lambda counts: counts @ [1.0, 3.0] / 2, 2, 100).value == 2.0)
    True

    Raises:
        ValueError: no clusters or no resamples.
    """
    if clusters < 1 or resamples < 1:
        raise ValueError(
            f"clusters and resamples must be at least 1, got {clusters} and {resamples}"
        )
    value = float(statistic(np.ones((1, clusters)))[0])
    if not math.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    if clusters == 1:
        return Estimate(value, -math.inf, math.inf, math.inf)
    if clusters < FEW_CLUSTERS:
        without_one = statistic(1 - np.eye(clusters))
        error = math.sqrt((clusters - 1) * float(np.var(without_one)))
        error = error if math.isfinite(error) else math.inf
        half = float(stats.t.ppf(0.975, clusters - 1)) * error
        return Estimate(value, value - half, value + half, error)
    rows = max(1, _RESAMPLED_CELLS // max(clusters, width))
    values = np.concatenate(
        [statistic(counts) for counts in _cluster_counts(clusters, resamples, rows, seed)]
    )
    tail, undefined = _expanded_tail(clusters), np.isnan(values)
    low = np.quantile(np.where(undefined, -math.inf, values), tail, method="lower")
    high = np.quantile(np.where(undefined, math.inf, values), 1 - tail, method="higher")
    error = math.inf if undefined.all() else float(np.std(values[~undefined]))
    return Estimate(value, float(low), float(high), error)


def _cluster_counts(clusters: int, resamples: int, rows: int, seed: int) -> Iterator[Floats]:
    """How often each cluster is drawn, in blocks of at most `rows` resamples."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, rows):
        block = min(rows, resamples - start)
        drawn = rng.integers(clusters, size=(block, clusters))
        drawn += clusters * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * clusters)
        yield counts.reshape(block, clusters).astype(np.float64)


def _expanded_tail(clusters: int) -> float:
    """Share of resamples beyond each end of the expanded percentile interval."""
    t = float(stats.t.ppf(0.975, clusters - 1))
    return float(stats.norm.cdf(-math.sqrt(clusters / (clusters - 1)) * t))


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
