"""How well a judge agrees with gold labels: metrics with 95% intervals over clusters.

Every metric is one function of how often each cluster counts: counted once it is the value, counted
as a bootstrap draws them it is a resample. All resamples are computed at once, and what a table
shows and what its interval covers are the same arithmetic.

Arrays are over items (shape [N]); NaN is an abstention or a missing label, and such an item does
not enter. `clusters` are codes, whose values mean nothing. None stands for a metric that the data
leave undefined, such as the correlation of a constant.

Shapes: N items, C clusters, B samples, K categories, R runs or annotators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlhf.ranks import Codes, Ranks, concordance, divide, weighted_correlation
from rlhf.statistics import Estimate, Floats, cluster_bootstrap

_DETECTABLE = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.80))
# Below this share of its variance a standardised variable is constant up to rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True, slots=True)
class Metric:
    """A value with its 95% interval, the `n` units behind it, and what they could have shown.

    `detectable` is the smallest true difference that would be noticed: (z_.975 + z_.80) standard
    errors, 80% power in a two-sided test at 5%.

    >>> Metric(0.8, 0.7, 0.9, n=64, detectable=0.14).low
    0.7
    """

    value: float
    low: float
    high: float
    n: int
    detectable: float


def share(hits: Floats, asked: Floats, clusters: Codes, resamples: int, n: int) -> Metric | None:
    """Sum of `hits` / sum of `asked`; `n` says how many units these sums count.

    Where nothing or everything hits, every resample agrees, yet unseen clusters may not. The far
    end is then the exact binomial one over the C clusters: at a true share below .025^(1 / C), C
    clusters without a miss come up less than once in forty times (Clopper and Pearson 1934).
    """
    kept = asked > 0
    if not kept.any():
        return None
    codes, number = _codes(clusters[kept])
    table = _sums(codes, number, hits[kept], asked[kept])

    def statistic(counts: Floats) -> Floats:
        hit, all_asked = (counts @ table).T
        return divide(hit, all_asked)

    found = _metric(cluster_bootstrap(statistic, number, resamples), n, 0.0, 1.0)
    if found is None or 0 < found.value < 1:
        return found
    bound = 0.025 ** (1 / number)
    low, high = (bound, 1.0) if found.value == 1 else (0.0, 1 - bound)
    # The binomial's own standard error half-way to that bound, where the sample's is zero.
    middle = (1 + bound) / 2
    detectable = _DETECTABLE * math.sqrt(middle * (1 - middle) / number)
    return Metric(found.value, low, high, n, detectable)


def kappa(
    ratings: Sequence[tuple[Floats, Floats]], clusters: Codes, resamples: int
) -> Metric | None:
    """Mean of Cohen's kappa over pairs of raters (two arrays [N] of categories each).

    kappa = (p_o - p_e) / (1 - p_e) with p_o the share of equal ratings and p_e the share that the
    two raters' own frequencies give by chance (Cohen 1960). A pair whose kappa is undefined (both
    raters always say the same one thing) is left out of the mean.
    """
    rated = np.zeros(len(clusters), dtype=bool)
    for one, other in ratings:
        rated |= ~np.isnan(one) & ~np.isnan(other)
    if not rated.any():
        return None
    codes, number = _codes(clusters[rated])
    tables = [_cross_table(one[rated], other[rated], codes, number) for one, other in ratings]

    def statistic(counts: Floats) -> Floats:
        values = np.stack([_kappas(counts @ table) for table in tables])
        defined = ~np.isnan(values)
        return divide(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))

    estimate = cluster_bootstrap(
        statistic, number, resamples, width=max(table.shape[1] for table in tables)
    )
    return _metric(estimate, int(rated.sum()), -1.0, 1.0)


def kappa_quadratic(one: Floats, other: Floats, clusters: Codes, resamples: int) -> Metric | None:
    """Cohen's weighted kappa with weights (one - other)^2 (Cohen 1968), grades being numbers.

    1 - E[(x - y)^2] / (E[x^2] + E[y^2] - 2 E[x] E[y]): what is left of the squared difference that
    independent raters with the same frequencies would have.
    """
    rated = ~np.isnan(one) & ~np.isnan(other)
    if not rated.any():
        return None
    codes, number = _codes(clusters[rated])
    grades = np.stack([one[rated], other[rated]])
    # On a scale from 0 to 1 a constant can be told from rounding.
    x, y = (grades - grades.min()) / (np.ptp(grades) or 1.0)
    table = _sums(codes, number, np.ones_like(x), x, y, x * x + y * y, (x - y) ** 2)

    def statistic(counts: Floats) -> Floats:
        n, sum_x, sum_y, squares, differences = (counts @ table).T
        chance = squares - 2 * sum_x * sum_y / n
        return 1 - divide(differences, np.where(chance > _CONSTANT * n, chance, 0.0))

    estimate = cluster_bootstrap(statistic, number, resamples)
    return _metric(estimate, int(rated.sum()), -1.0, 1.0)


def pearson(x: Floats, y: Floats, clusters: Codes, resamples: int) -> Metric | None:
    """Pearson's correlation."""
    both = ~np.isnan(x) & ~np.isnan(y)
    if both.sum() < 2 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return None
    codes, number = _codes(clusters[both])
    x, y = (stats.zscore(values[both]) for values in (x, y))
    table = _sums(codes, number, np.ones_like(x), x, y, x * x, y * y, x * y)

    def statistic(counts: Floats) -> Floats:
        n, sum_x, sum_y, xx, yy, xy = (counts @ table).T
        spread = _spread(xx - sum_x**2 / n, n) * _spread(yy - sum_y**2 / n, n)
        return divide(xy - sum_x * sum_y / n, np.sqrt(spread))

    return _metric(cluster_bootstrap(statistic, number, resamples), int(both.sum()), -1.0, 1.0)


def spearman(x: Floats, y: Floats, clusters: Codes, resamples: int) -> Metric | None:
    """Spearman's correlation: Pearson's of the mid-ranks, which each resample ranks anew."""
    both = ~np.isnan(x) & ~np.isnan(y)
    if not both.any():
        return None
    codes, number = _codes(clusters[both])
    ranks_x, ranks_y = Ranks.of(x[both]), Ranks.of(y[both])

    def statistic(counts: Floats) -> Floats:
        weights = counts[:, codes]
        return weighted_correlation(weights, ranks_x(weights), ranks_y(weights))

    estimate = cluster_bootstrap(statistic, number, resamples, width=len(codes))
    return _metric(estimate, len(codes), -1.0, 1.0)


def spearman_within(
    x: Floats, y: Floats, prompts: Codes, clusters: Codes, resamples: int
) -> Metric | None:
    """Spearman's correlation within prompts: how far `x` and `y` order one prompt's answers alike.

    Mid-ranks within each prompt, less their mean there; then sum of products over the root of the
    sums of squares, all prompts together. What sets prompts apart does not enter. `n` counts the
    answers of prompts with two or more that have both scores.
    """
    both = ~np.isnan(x) & ~np.isnan(y)
    if not both.any():
        return None
    own, number_of_prompts = _codes(prompts[both])
    codes, number = _codes(clusters[both])
    counted = np.bincount(own, minlength=number_of_prompts)
    centred = []
    for values in (x[both], y[both]):
        _, places = np.unique(values, return_inverse=True)
        # Ranks in the order of prompts, then values: less the prompt's mean they are its own ranks.
        ranks = stats.rankdata(own * (places.max() + 1) + places)
        centred.append(ranks - (np.bincount(own, weights=ranks) / counted)[own])
    rank_x, rank_y = centred
    table = _sums(codes, number, rank_x * rank_x, rank_y * rank_y, rank_x * rank_y)

    def statistic(counts: Floats) -> Floats:
        xx, yy, xy = (counts @ table).T
        return divide(xy, np.sqrt(xx * yy))

    several = int(counted[counted > 1].sum())
    return _metric(cluster_bootstrap(statistic, number, resamples), several, -1.0, 1.0)


def partial_spearman(
    x: Floats, y: Floats, given: Floats, clusters: Codes, resamples: int
) -> Metric | None:
    """Spearman's correlation of `x` and `y` with `given` held fixed.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)) over the rank correlations. Where `given`
    orders `x` fully there is nothing left of `x` for `y` to explain: 0.
    """
    known = ~np.isnan(x) & ~np.isnan(y) & ~np.isnan(given)
    if not known.any():
        return None
    codes, number = _codes(clusters[known])
    ranked = [Ranks.of(values[known]) for values in (x, y, given)]

    def statistic(counts: Floats) -> Floats:
        weights = counts[:, codes]
        rank_x, rank_y, rank_z = (ranks(weights) for ranks in ranked)
        xy = weighted_correlation(weights, rank_x, rank_y)
        xz = weighted_correlation(weights, rank_x, rank_z)
        yz = weighted_correlation(weights, rank_y, rank_z)
        left_x, left_y = 1 - xz**2, 1 - yz**2
        room = np.where((left_x > _CONSTANT) & (left_y > _CONSTANT), left_x * left_y, 0.0)
        values = divide(xy - xz * yz, np.sqrt(room))
        return np.where((left_x <= _CONSTANT) & (left_y > _CONSTANT), 0.0, values)

    estimate = cluster_bootstrap(statistic, number, resamples, width=len(codes))
    return _metric(estimate, len(codes), -1.0, 1.0)


def kendall(x: Floats, y: Floats, clusters: Codes, resamples: int) -> Metric | None:
    """Kendall's tau-b: (concordant - discordant) / sqrt((pairs - ties_x) (pairs - ties_y)).

    A resample's concordance is a quadratic form in how often each cluster was drawn, so the signs
    of all pairs are summed between clusters, in blocks, and multiplied with all resamples at once.
    """
    both = ~np.isnan(x) & ~np.isnan(y)
    if not both.any():
        return None
    order = np.argsort(clusters[both], kind="stable")
    codes, number = _codes(clusters[both][order])
    ranks_x, ranks_y = (Ranks.of(values[both][order]) for values in (x, y))
    concordant = partial(concordance, ranks_x, ranks_y, codes)

    def statistic(counts: Floats) -> Floats:
        weights = counts[:, codes]
        n = weights.sum(axis=1)
        pairs = n * (n - 1) / 2
        untied_x, untied_y = (pairs - ranks.ties(weights) for ranks in (ranks_x, ranks_y))
        return divide(concordant(counts), np.sqrt(untied_x * untied_y))

    estimate = cluster_bootstrap(statistic, number, resamples, width=len(codes))
    return _metric(estimate, len(codes), -1.0, 1.0)


def within_sd(runs: Floats, clusters: Codes, resamples: int) -> Metric | None:
    """Standard deviation of repeated scores of one item, pooled over items (`runs`: shape [N, R]).

    sqrt(sum of squared deviations from each item's mean / sum of (its runs - 1)): the within-item
    standard deviation of Bland and Altman (1996). NaN is a run that is missing.
    """
    counted = (~np.isnan(runs)).sum(axis=1)
    kept = counted >= 2
    if not kept.any():
        return None
    codes, number = _codes(clusters[kept])
    deviations = runs[kept] - np.nanmean(runs[kept], axis=1, keepdims=True)
    table = _sums(codes, number, np.nansum(deviations**2, axis=1), counted[kept] - 1)

    def statistic(counts: Floats) -> Floats:
        squares, degrees = (counts @ table).T
        return np.sqrt(divide(squares, degrees))

    estimate = cluster_bootstrap(statistic, number, resamples)
    return _metric(estimate, int(kept.sum()), 0.0, math.inf)


def majority(labels: Floats) -> Floats:
    """The label that more than half of an item's annotators gave, else NaN (shape [N, R] -> [N]).

    >>> majority(np.array([[1.0, 1.0, 0.0], [1.0, 0.0, np.nan], [1.0, np.nan, np.nan]]))
    array([ 1., nan,  1.])
    """
    given = (~np.isnan(labels)).sum(axis=1)
    found = np.full(len(labels), math.nan)
    for label in np.unique(labels[~np.isnan(labels)]):
        found[2 * (labels == label).sum(axis=1) > given] = label
    return found


def _cross_table(one: Floats, other: Floats, codes: Codes, number: int) -> Floats:
    """How often two raters gave each pair of categories, by cluster (shape [C, K * K])."""
    rated = ~np.isnan(one) & ~np.isnan(other)
    categories = np.unique(np.concatenate([one[rated], other[rated]]))
    k = max(1, len(categories))
    cells = k * np.searchsorted(categories, one[rated]) + np.searchsorted(categories, other[rated])
    counted = np.bincount(codes[rated] * k * k + cells, minlength=number * k * k)
    return counted.reshape(number, k * k).astype(np.float64)


def _kappas(tables: Floats) -> Floats:
    """Cohen's kappa of each row of cross tables (shape [B, K * K])."""
    k = math.isqrt(tables.shape[1])
    cross = tables.reshape(-1, k, k)
    n = cross.sum(axis=(1, 2))
    observed = np.trace(cross, axis1=1, axis2=2)
    expected = divide((cross.sum(axis=1) * cross.sum(axis=2)).sum(axis=1), n)
    return divide(observed - expected, n - expected)


def _codes(clusters: Codes) -> tuple[Codes, int]:
    """Clusters as 0 .. C - 1, and C."""
    distinct, codes = np.unique(clusters, return_inverse=True)
    return codes, len(distinct)


def _sums(codes: Codes, number: int, *columns: NDArray[Any]) -> Floats:
    """Each column summed by cluster (shape [C, columns])."""
    return np.stack([np.bincount(codes, weights=c, minlength=number) for c in columns], axis=1)


def _spread(variance: Floats, n: Floats) -> Floats:
    """A standardised variable's sum of squares, 0 where only rounding is left of it."""
    return np.where(variance > _CONSTANT * n, variance, 0.0)


def _metric(estimate: Estimate, n: int, least: float, most: float) -> Metric | None:
    """An estimate as a metric; its interval ends at the least and most that the metric can be."""
    if math.isnan(estimate.value):
        return None
    return Metric(
        value=estimate.value,
        low=max(least, estimate.low),
        high=min(most, estimate.high),
        n=n,
        detectable=_DETECTABLE * estimate.standard_error,
    )
