"""Metrics and every one of their resamples equal scipy's and scikit-learn's; intervals cover."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import cohen_kappa_score, f1_score

from rlhf import agreement
from rlhf.agreement import Metric, majority
from rlhf.statistics import Estimate, Statistic, cluster_bootstrap

Array = np.ndarray[Any, Any]
Measure = Callable[[Array, Array, Array, Array, int], Metric | None]
Reference = Callable[[Array, Array, Array], float]


def residuals(values: Array, given: Array) -> Array:
    ranks, column = stats.rankdata(values), stats.rankdata(given)[:, None]
    left: Array = ranks - LinearRegression().fit(column, ranks).predict(column)
    return left


def categories(values: Array) -> Array:
    return np.clip(np.round(values), -2, 2)


MEASURES: dict[str, tuple[Measure, Reference]] = {
    "pearson": (
        lambda x, y, z, c, b: agreement.pearson(x, y, c, b),
        lambda x, y, z: float(stats.pearsonr(x, y).statistic),
    ),
    "spearman": (
        lambda x, y, z, c, b: agreement.spearman(x, y, c, b),
        lambda x, y, z: float(stats.spearmanr(x, y).statistic),
    ),
    "kendall": (
        lambda x, y, z, c, b: agreement.kendall(x, y, c, b),
        lambda x, y, z: float(stats.kendalltau(x, y).statistic),
    ),
    "partial_spearman": (
        agreement.partial_spearman,
        lambda x, y, z: float(stats.pearsonr(residuals(x, z), residuals(y, z)).statistic),
    ),
    "kappa": (
        lambda x, y, z, c, b: agreement.kappa([(categories(x), categories(y))], c, b),
        lambda x, y, z: cohen_kappa_score(categories(x).astype(int), categories(y).astype(int)),
    ),
    "kappa_quadratic": (
        lambda x, y, z, c, b: agreement.kappa_quadratic(categories(x), categories(y), c, b),
        lambda x, y, z: cohen_kappa_score(
            categories(x).astype(int),
            categories(y).astype(int),
            labels=range(-2, 3),
            weights="quadratic",
        ),
    ),
    "share": (
        lambda x, y, z, c, b: agreement.share((x > 0) * 1.0, np.ones(len(x)), c, b, len(x)),
        lambda x, y, z: sum(value > 0 for value in x) / len(x),
    ),
    "f1": (
        lambda x, y, z, c, b: agreement.share(
            2.0 * ((x > 0) & (y > 0)), 1.0 * (x > 0) + (y > 0), c, b, len(x)
        ),
        lambda x, y, z: float(f1_score(y > 0, x > 0)),
    ),
    "within_sd": (
        lambda x, y, z, c, b: agreement.within_sd(np.column_stack([x, y, z]), c, b),
        lambda x, y, z: math.sqrt(
            sum(float(np.var(run, ddof=1)) for run in zip(x, y, z, strict=True)) / len(x)
        ),
    ),
}


def sample(seed: int, number: int = 60, prompts: int = 18) -> tuple[Array, ...]:
    """Values with ties that depend on one another, in clusters of different sizes."""
    rng = np.random.default_rng(seed)
    gold = rng.normal(0, 1, number).round(1)
    score = (gold + rng.normal(0, 1, number)).round(1)
    length = (0.5 * gold + 0.3 * score + rng.normal(0, 1, number)).round(1)
    clusters = np.concatenate([np.arange(prompts), rng.integers(0, prompts, number - prompts)])
    return score, gold, length, rng.permutation(clusters) * 7


@pytest.mark.parametrize("name", MEASURES)
def test_a_metric_and_its_resamples_equal_the_librarys(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, reference = MEASURES[name]
    x, y, z, clusters = sample(3)
    seen: list[tuple[Statistic, int]] = []

    def spy(statistic: Statistic, number: int, resamples: int, **rest: Any) -> Estimate:
        seen.append((statistic, number))
        return cluster_bootstrap(statistic, number, resamples, **rest)

    monkeypatch.setattr(agreement, "cluster_bootstrap", spy)
    found = measure(x, y, z, clusters, 100)
    assert found is not None
    assert found.value == pytest.approx(reference(x, y, z), abs=1e-12)
    ((statistic, number),) = seen
    distinct = np.unique(clusters)
    keep = ~np.isnan(x)
    if name == "f1":
        keep = (x > 0) | (y > 0)
        distinct = np.unique(clusters[keep])
    assert number == len(distinct)
    counts = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=20)
    drawn = statistic(counts.astype(np.float64))
    for row, value in zip(counts, drawn, strict=True):
        places = [
            place
            for cluster, times in zip(distinct, row, strict=True)
            for place in np.flatnonzero((clusters == cluster) & keep)
            for _ in range(times)
        ]
        assert value == pytest.approx(reference(x[places], y[places], z[places]), abs=1e-9)


def test_kendall_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _, clusters = sample(5)
    whole = agreement.kendall(x, y, clusters, 200)
    monkeypatch.setattr("rlhf.ranks._BLOCK_CELLS", 300)
    monkeypatch.setattr("rlhf.ranks._EXACT_IN_FLOAT32", 0)
    assert agreement.kendall(x, y, clusters, 200) == whole


def test_what_is_missing_does_not_enter() -> None:
    x, y, z, clusters = sample(4)
    x[::7], y[3::11], z[5::9] = math.nan, math.nan, math.nan
    both = ~np.isnan(x) & ~np.isnan(y)
    for name in ("pearson", "spearman", "kendall"):
        measure, reference = MEASURES[name]
        found = measure(x, y, z, clusters, 100)
        assert found is not None
        assert found.n == both.sum()
        assert found.value == pytest.approx(reference(x[both], y[both], z[both]), abs=1e-12)


def test_the_mean_kappa_is_over_pairs_of_raters() -> None:
    x, y, z, clusters = (sample(6)[i] for i in range(4))
    raters = [categories(values) for values in (x, y, z)]
    raters[1][:10] = math.nan
    pairs = [(raters[0], raters[1]), (raters[0], raters[2]), (raters[1], raters[2])]
    found = agreement.kappa(pairs, clusters, 200)
    by_pair = []
    for one, other in pairs:
        both = ~np.isnan(one) & ~np.isnan(other)
        by_pair.append(cohen_kappa_score(one[both].astype(int), other[both].astype(int)))
    assert found is not None
    assert found.value == pytest.approx(sum(by_pair) / 3, abs=1e-12)


def test_a_constant_has_no_correlation_and_no_kappa() -> None:
    same, y, z, clusters = np.full(60, 0.1), *sample(1)[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("pearson", "spearman", "kendall"):
            assert MEASURES[name][0](same, y, z, clusters, 100) is None
        assert agreement.kappa([(same, same)], clusters, 100) is None
        assert agreement.kappa_quadratic(same, same, clusters, 100) is None
        assert agreement.partial_spearman(y, same, z, clusters, 100) is None


def test_a_judge_that_is_gold_has_no_room_for_a_bias() -> None:
    _, gold, length, clusters = sample(2)
    found = agreement.partial_spearman(gold, length, gold, clusters, 200)
    assert found is not None
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_all_right_is_not_certain() -> None:
    """Of 30 items all right: the exact binomial bound, not the bootstrap's zero width."""
    found = agreement.share(np.ones(30), np.ones(30), np.arange(30), 200, 30)
    assert found is not None
    exact = stats.binomtest(30, 30).proportion_ci(0.95, method="exact")
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(exact.low, abs=1e-12)
    none = agreement.share(np.zeros(30), np.ones(30), np.arange(30), 200, 30)
    assert none is not None
    assert (none.low, none.high) == pytest.approx((0.0, 1 - exact.low), abs=1e-12)
    assert found.detectable > 0


def test_one_prompt_bounds_nothing() -> None:
    x, y, _, _ = sample(8)
    found = agreement.pearson(x, y, np.zeros(60, dtype=int), 200)
    assert found is not None
    assert (found.low, found.high, found.detectable) == (-1.0, 1.0, math.inf)


def test_a_majority_is_more_than_half() -> None:
    nan = math.nan
    labels = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, nan, nan], [nan, 0, nan, nan]])
    np.testing.assert_array_equal(majority(labels), [nan, 1, nan, 0])


def judged_prompts(rng: np.random.Generator, prompts: int) -> tuple[Array, Array, Array]:
    """Two to four answers a prompt; a prompt's answers share part of the judge's error."""
    clusters = np.repeat(np.arange(prompts), rng.integers(2, 5, prompts))
    gold = rng.normal(0, 1, len(clusters))
    shared = rng.normal(0, 0.7, prompts)[clusters]
    return gold, gold + shared + rng.normal(0, 0.7, len(clusters)), clusters


def truth(measure: Measure, prompts: int = 40_000) -> float:
    gold, score, clusters = judged_prompts(np.random.default_rng(99), prompts)
    found = measure(score, gold, score, clusters, 1)
    assert found is not None
    return found.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prompts"),
    [("share", 120), ("pearson", 120), ("spearman", 50), ("kappa", 120), ("f1", 120)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    name: str, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, _ = MEASURES[name]
    real = truth(measure)
    rng = np.random.default_rng(2024)
    trials, covered = 800, 0
    for trial in range(trials):
        # Few resamples suffice where their error differs from trial to trial.
        monkeypatch.setattr(agreement, "cluster_bootstrap", partial(cluster_bootstrap, seed=trial))
        gold, score, clusters = judged_prompts(rng, prompts)
        found = measure(score, gold, score, clusters, 400)
        assert found is not None
        covered += found.low <= real <= found.high
    assert 0.93 <= covered / trials <= 0.97, covered
