"""Held-out means and paired differences, against arithmetic written out."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from rlhf.errors import DataGateError, InputError
from rlhf.evaluation import compare, per_prompt, summarise
from rlhf.statistics import cluster_mean, smallest_detectable, standard_error
from rlhf.types import Score, scores_table

WEIGHTS = {"correctness": 0.75, "style": 0.25}
Values = dict[str, list[tuple[float | None, float | None]]]


def scores_of(values: Values, audit: float | None = 0.5) -> pl.DataFrame:
    """Prompt -> (correctness, style) of each sample; every answer gets the same audit score."""
    rows = []
    for prompt, samples in values.items():
        for sample, pair in enumerate(samples):
            named = [
                ("house", "correctness", pair[0]),
                ("house", "style", pair[1]),
                ("chrf", "correctness", audit),
            ]
            rows += [
                Score.abstain(prompt, sample, judge, dimension, "none")
                if value is None
                else Score.of(prompt, sample, judge, dimension, value)
                for judge, dimension, value in named
            ]
    return scores_table(rows)


def prompts_of(*names: str) -> pl.DataFrame:
    """Prompts whose first letter is their cluster."""
    return pl.DataFrame(
        {"prompt_id": names, "cluster": [n[0] for n in names]},
        schema={"prompt_id": pl.String, "cluster": pl.String},
    )


def table(values: Values, audit: float | None = 0.5) -> pl.DataFrame:
    return per_prompt(scores_of(values, audit), prompts_of(*values), WEIGHTS, audit=["chrf"])


def random_values(seed: int, clusters: int = 12) -> Values:
    rng = np.random.default_rng(seed)
    return {
        f"{chr(97 + c)}{i}": [tuple(rng.random(2)) for _ in range(3)]
        for c in range(clusters)
        for i in range(1 + c % 3)
    }


def test_means_are_over_answers_and_the_reward_is_taken_per_answer_first() -> None:
    result = table({"a1": [(1.0, 0.0), (0.5, None), (0.0, 1.0)], "b1": [(0.2, 0.4)]})
    rows = {r["prompt_id"]: r for r in result.iter_rows(named=True)}
    # a1: correctness (1 + .5 + 0) / 3; style of the two scored; rewards .75 and .25 of the two
    # answers that have both.
    assert rows["a1"] == {
        "prompt_id": "a1",
        "cluster": "a",
        "completions": 3,
        "unrewarded": 1,
        "audit.correctness": 0.5,
        "correctness": 0.5,
        "style": 0.5,
        "reward": 0.5,
    }
    assert rows["b1"]["reward"] == pytest.approx(0.75 * 0.2 + 0.25 * 0.4)


def test_the_audit_judge_never_changes_the_reward() -> None:
    values = random_values(0)
    low, high = (table(values, audit=a) for a in (0.0, 1.0))
    assert low["reward"].equals(high["reward"])
    assert low["correctness"].equals(high["correctness"])
    assert not low["audit.correctness"].equals(high["audit.correctness"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.7, -0.1])
def test_what_is_no_score_enters_no_mean(bad: float) -> None:
    result = table({"a1": [(0.4, 0.4), (bad, 1.0)]})
    row = result.row(0, named=True)
    assert (row["correctness"], row["reward"], row["unrewarded"]) == (0.4, pytest.approx(0.4), 1)


def test_row_order_changes_nothing() -> None:
    scores, prompts = scores_of(random_values(1)), prompts_of(*random_values(1))
    straight = per_prompt(scores, prompts, WEIGHTS, ["chrf"])
    shuffled = per_prompt(
        scores.sample(fraction=1, shuffle=True, seed=5),
        prompts.sample(fraction=1, shuffle=True, seed=6),
        WEIGHTS,
        ["chrf"],
    )
    assert straight.equals(shuffled)


def test_a_prompt_without_answers_is_missing_not_zero() -> None:
    scores = scores_of({"a1": [(1.0, 1.0)], "b1": [(1.0, 1.0)]})
    result = per_prompt(scores, prompts_of("a1", "b1", "c1"), WEIGHTS, ["chrf"])
    assert result.row(2, named=True)["reward"] is None
    assert result.row(2, named=True)["completions"] == 0
    summary = summarise(result, 100, 0)["reward"]
    assert (summary["value"], summary["n_prompts"], summary["n_missing"]) == (1.0, 2, 1)


def test_summary_is_the_clustered_mean_over_prompts() -> None:
    result = table(random_values(2))
    summary = summarise(result, 300, 9)
    assert set(summary) == {"audit.correctness", "correctness", "style", "reward"}
    for name, found in summary.items():
        expected = cluster_mean(result[name].to_numpy(), result["cluster"].to_list(), 300, 9)
        assert (found["value"], found["low"], found["high"]) == (
            expected.value,
            expected.low,
            expected.high,
        )
        assert found["value"] == pytest.approx(float(np.mean(result[name].to_numpy())))
        assert (found["n_prompts"], found["n_clusters"]) == (result.height, 12)


def test_comparison_is_paired_by_prompt_whatever_the_row_order() -> None:
    now, before = table(random_values(3)), table(random_values(4))
    found = compare(now, before.sample(fraction=1, shuffle=True, seed=1), 300, 9)
    differences = now["reward"].to_numpy() - before["reward"].to_numpy()
    clusters = now["cluster"].to_list()
    interval = cluster_mean(differences, clusters, 300, 9)
    assert found["reward"] == {
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "se": standard_error(differences, clusters),
        "smallest_detectable": smallest_detectable(differences, clusters),
        "n_prompts": now.height,
        "n_clusters": 12,
        "n_missing": 0,
    }


def test_swapping_the_sides_negates_the_difference_and_a_table_equals_itself() -> None:
    now, before = table(random_values(3)), table(random_values(4))
    forth, back = compare(now, before, 300, 0), compare(before, now, 300, 0)
    same = compare(now, now, 300, 0)
    for name in forth:
        assert forth[name]["difference"] == pytest.approx(-back[name]["difference"])
        assert forth[name]["se"] == pytest.approx(back[name]["se"])
        assert (same[name]["low"], same[name]["difference"], same[name]["high"]) == (0, 0, 0)


def test_pairing_removes_what_prompts_share() -> None:
    rng = np.random.default_rng(0)
    base = {f"{chr(97 + c)}1": float(rng.uniform(0.1, 0.8)) for c in range(20)}
    before = table({p: [(v, v)] for p, v in base.items()})
    now = table({p: [(v + 0.1, v + 0.1)] for p, v in base.items()})
    found = compare(now, before, 300, 0)["reward"]
    assert found["difference"] == pytest.approx(0.1)
    assert found["high"] - found["low"] < 1e-9
    wide = summarise(now, 300, 0)["reward"]
    assert wide["high"] - wide["low"] > 0.1


def test_a_prompt_missing_on_one_side_is_left_out_and_counted() -> None:
    before = table({"a1": [(0.5, 0.5)], "b1": [(0.5, 0.5)], "c1": [(0.5, None)]})
    now = table({"a1": [(0.7, 0.5)], "b1": [(0.7, 0.5)], "c1": [(0.9, 0.5)]})
    found = compare(now, before, 100, 0)
    assert (found["reward"]["n_prompts"], found["reward"]["n_missing"]) == (2, 1)
    assert found["reward"]["difference"] == pytest.approx(0.15)
    assert found["correctness"]["n_missing"] == 0


def test_what_can_not_be_compared_is_refused() -> None:
    now = table({"a1": [(0.5, 0.5)], "b1": [(0.5, 0.5)]})
    fewer = table({"a1": [(0.5, 0.5)]})
    moved = now.with_columns(cluster=pl.lit("z"))
    for other in (fewer, moved):
        with pytest.raises(ValueError, match="differ in prompts"):
            compare(now, other, 100, 0)
    with pytest.raises(ValueError, match="differ in dimensions"):
        compare(now, now.drop("style"), 100, 0)


def test_a_dimension_that_always_abstains_is_an_error_not_a_number() -> None:
    silent = table({"a1": [(0.5, 0.5)], "b1": [(0.5, 0.5)]}, audit=None)
    with pytest.raises(DataGateError, match=r"audit\.correctness"):
        summarise(silent, 100, 0)
    with pytest.raises(DataGateError, match=r"audit\.correctness"):
        compare(silent, silent, 100, 0)


def test_broken_tables_are_refused() -> None:
    scores = scores_of({"a1": [(0.5, 0.5)]})
    cases = {
        "not evaluated": (scores, prompts_of("b1"), WEIGHTS, ["chrf"]),
        "must differ": (scores, prompts_of("a1", "a1"), WEIGHTS, ["chrf"]),
        "two scores": (scores, prompts_of("a1"), WEIGHTS, []),
        "which the reward needs": (scores, prompts_of("a1"), {"novelty": 1.0}, ["chrf"]),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            per_prompt(*arguments)
    for name in ("reward", "cluster"):
        renamed = scores.with_columns(dimension=pl.col("dimension").replace({"style": name}))
        with pytest.raises(InputError, match=name):
            per_prompt(renamed, prompts_of("a1"), {"correctness": 1.0}, ["chrf"])
