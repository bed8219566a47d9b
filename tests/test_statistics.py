"""Intervals cover what they claim, and error sizes follow their closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.statistics import (
    FEW_CLUSTERS,
    Interval,
    cluster_mean,
    false_stop_rate,
    smallest_detectable,
    standard_error,
)


def clustered(
    rng: np.random.Generator, number: int, effect: float = 0.1
) -> tuple[np.ndarray, list[str]]:
    """Values with true mean 0 whose clusters (2 to 8 values each) share half their variation."""
    codes = np.repeat(np.arange(number), rng.integers(2, 9, number))
    values = rng.normal(0, effect, number)[codes] + rng.normal(0, 0.1, len(codes))
    return values, [f"c{c}" for c in codes]


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 20])
def test_interval_covers_the_truth_as_often_as_it_says(number: int) -> None:
    rng = np.random.default_rng(7)
    trials = 1000
    intervals = [cluster_mean(*clustered(rng, number), 400, trial) for trial in range(trials)]
    covered = sum(i.low <= 0 <= i.high for i in intervals)
    assert 0.91 <= covered / trials <= 0.98


def test_ignoring_clusters_would_not_cover() -> None:
    rng = np.random.default_rng(7)
    trials = 300
    covered = 0
    for trial in range(trials):
        values, _ = clustered(rng, 20)
        interval = cluster_mean(values, [str(i) for i in range(len(values))], 400, trial)
        covered += interval.low <= 0 <= interval.high
    assert covered / trials < 0.85


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(-1, 1), st.sampled_from([f"c{i}" for i in range(14)])),
        min_size=1,
        max_size=60,
    )
)
def test_value_is_the_plain_mean_and_lies_in_its_finite_or_unbounded_interval(
    rows: list[tuple[float, str]],
) -> None:
    values, clusters = np.array([v for v, _ in rows]), [c for _, c in rows]
    interval = cluster_mean(values, clusters, 100, 0)
    assert interval.value == pytest.approx(float(np.mean(values)), abs=1e-12)
    assert not any(math.isnan(x) for x in (interval.value, interval.low, interval.high))
    assert interval.low <= interval.high
    assert math.isinf(interval.low) == math.isinf(interval.high) == (len(set(clusters)) == 1)


def test_same_arguments_give_the_same_interval_and_another_seed_another() -> None:
    values, clusters = clustered(np.random.default_rng(0), 20)
    first = cluster_mean(values, clusters, 500, 3)
    assert first == cluster_mean(values, clusters, 500, 3)
    assert first != cluster_mean(values, clusters, 500, 4)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = clustered(np.random.default_rng(0), 20)
    whole = cluster_mean(values, clusters, 500, 3)
    monkeypatch.setattr("rlhf.statistics._RESAMPLED_CELLS", 140)
    assert cluster_mean(values, clusters, 500, 3) == whole


def test_one_cluster_bounds_nothing() -> None:
    values = np.array([0.1, 0.3])
    assert cluster_mean(values, ["a", "a"], 100, 0) == Interval(0.2, -math.inf, math.inf)
    assert standard_error(values, ["a", "a"]) == math.inf
    assert smallest_detectable(values, ["a", "a"]) == math.inf


@pytest.mark.parametrize("number", [2, FEW_CLUSTERS, 30])
def test_equal_values_have_a_zero_width_interval(number: int) -> None:
    values, clusters = np.full(2 * number, 0.1), [str(i % number) for i in range(2 * number)]
    assert cluster_mean(values, clusters, 100, 0) == Interval(0.1, 0.1, 0.1)


def test_few_clusters_take_student_t() -> None:
    # One value a cluster: the textbook interval of a mean, t_{2, .975} = 4.302653 (tables).
    values = np.array([0.1, 0.2, 0.6])
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
    interval = cluster_mean(values, ["a", "b", "c"], 100, 0)
    assert (interval.low, interval.high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)


def test_bootstrap_has_the_width_of_student_t_on_normal_data() -> None:
    # Resampling C clusters shrinks the spread by sqrt((C - 1) / C), 0.95 here; the expanded level
    # gives it back. t_{9, .975} = 2.262157 (tables).
    values = np.array([NormalDist().inv_cdf((i + 0.5) / 10) for i in range(10)])
    names = [str(i) for i in range(10)]
    interval = cluster_mean(values, names, 20_000, 0)
    width = 2 * 2.262157 * standard_error(values, names)
    assert interval.high - interval.low == pytest.approx(width, rel=0.03)


def test_standard_error_is_the_textbook_one_for_clusters_of_one() -> None:
    values = np.random.default_rng(1).normal(size=40)
    plain = np.std(values, ddof=1) / math.sqrt(40)
    assert standard_error(values, [str(i) for i in range(40)]) == pytest.approx(plain)


def test_copies_of_a_prompt_in_its_cluster_add_no_evidence() -> None:
    values = np.random.default_rng(1).normal(size=15)
    names = [str(i) for i in range(15)]
    once = standard_error(values, names)
    assert standard_error(np.repeat(values, 4), sorted(names * 4, key=int)) == pytest.approx(once)


def test_standard_error_matches_the_spread_of_repeated_experiments() -> None:
    rng = np.random.default_rng(2)
    runs = [clustered(rng, 30) for _ in range(2000)]
    spread = np.std([v.mean() for v, _ in runs])
    assert np.mean([standard_error(v, c) for v, c in runs]) == pytest.approx(spread, rel=0.06)


def test_smallest_detectable_is_found_four_times_in_five() -> None:
    normal = NormalDist()
    values, clusters = clustered(np.random.default_rng(3), 25)
    se = standard_error(values, clusters)
    effect = smallest_detectable(values, clusters)
    assert effect == pytest.approx((normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * se)
    # Closed form of the power: an estimate N(effect, se) beyond 1.96 se from zero.
    assert 1 - normal.cdf(normal.inv_cdf(0.975) - effect / se) == pytest.approx(0.8)


def test_false_stop_rate_is_how_often_an_unchanged_round_falls_below() -> None:
    rng = np.random.default_rng(4)
    stopped = np.mean(rng.normal(0, 0.03, 100_000) < -0.02)
    assert false_stop_rate(0.03, 0.02) == pytest.approx(stopped, abs=0.005)
    assert false_stop_rate(0.0, 0.0) == 0.0
    assert false_stop_rate(math.inf, 0.02) == 0.5
    for se, drop in ((-0.1, 0.02), (math.nan, 0.02), (0.1, -0.02)):
        with pytest.raises(ValueError, match="at least 0"):
            false_stop_rate(se, drop)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "non-empty"),
        ([0.1, 0.2], ["a"], "one cluster a value"),
        ([0.1, math.nan], ["a", "b"], "finite, 1 are not"),
        ([0.1, math.inf], ["a", "b"], "finite, 1 are not"),
    ],
)
def test_what_has_no_mean_is_refused(
    values: list[float], clusters: list[str], message: str
) -> None:
    for function in (standard_error, smallest_detectable):
        with pytest.raises(ValueError, match=message):
            function(np.array(values), clusters)
    with pytest.raises(ValueError, match=message):
        cluster_mean(np.array(values), clusters, 100, 0)


def test_no_resamples_is_refused() -> None:
    with pytest.raises(ValueError, match="resamples"):
        cluster_mean(np.array([0.1, 0.2]), ["a", "b"], 0, 0)
