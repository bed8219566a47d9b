"""What each constraint costs, which dimensions are inverted, and what the log says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from scored_answers import RULES, Row, answer, many_answers, tables

from rlhf import yield_analysis
from rlhf.errors import DataGateError
from rlhf.rules import Rules
from rlhf.selection import select_pairs
from rlhf.yield_analysis import Draw, analyse, check_inversion, inversion, said

DRAW = Draw(1, 200)


def analysed(rows: list[Row], rules: Rules) -> dict[str, Any]:
    given = tables(rows)
    record = analyse([given], select_pairs(*given, rules, 1).pairs, rules, DRAW)
    assert json.loads(json.dumps(record)) == record
    return record


def means(pairs: pl.DataFrame) -> dict[str, float | None]:
    return pairs.select(pl.col("scores_chosen").struct.unnest().mean()).row(0, named=True)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(many_answers())
def test_each_alternative_is_the_selection_with_that_one_change(rows: list[Row]) -> None:
    rules = replace(RULES, floors={"correctness": 0.6, "style": 0.5}, max_length_ratio=1.5)
    changed = {
        ("complete", "dropped"): replace(rules, allow_truncated_chosen=True),
        ("floor correctness", "dropped"): replace(rules, floors={"style": 0.5}),
        ("floor correctness", "0.55"): replace(rules, floors={"correctness": 0.55, "style": 0.5}),
        ("floor style", "dropped"): replace(rules, floors={"correctness": 0.6}),
        ("floor style", "0.45"): replace(rules, floors={"correctness": 0.6, "style": 0.45}),
        # Scored dimensions stay needed, which here they are for the weights.
        ("protected problem_solution", "dropped"): replace(rules, protected={}),
        ("protected problem_solution", "0.05"): replace(
            rules, protected={"problem_solution": 0.05}
        ),
        ("length ratio", "dropped"): replace(rules, max_length_ratio=None),
        ("length ratio", "1.875"): replace(rules, max_length_ratio=1.875),
        ("margin", "dropped"): replace(rules, min_margin=0.0),
        ("margin", "0.025"): replace(rules, min_margin=0.025),
    }
    costs = analysed(rows, rules)["constraints"]
    now = select_pairs(*tables(rows), rules).pairs
    assert costs["now"]["prompts"] == now.height
    assert {(a["constraint"], a["change"]) for a in costs["alternatives"]} == set(changed)
    for found in costs["alternatives"]:
        then = select_pairs(*tables(rows), changed[found["constraint"], found["change"]]).pairs
        assert found["gained_prompts"] == then.height - now.height >= 0
        assert (found["prompts"], found["pairs"]) == (then.height, then.height)
        if now.height and then.height:
            for d, change in found["scores_change"].items():
                assert change == pytest.approx(means(then)[d] - means(now)[d])  # type: ignore[operator]
        else:
            assert found["reward_change"] is None


def floored(prompts: int, passing: int) -> list[Row]:
    """Prompts of a good and a bad answer, where all but `passing` good ones miss a floor of 0.6."""
    return [
        answer(f"p{i:03d}", s, ((0.8 if i < passing else 0.57) if s == 0 else 0.1, 0.5, 0.5))
        for i in range(prompts)
        for s in (0, 1)
    ]


def test_a_suggestion_where_one_floor_eats_most_of_the_data() -> None:
    rows = floored(prompts=40, passing=10)
    given = tables(rows)
    selected = select_pairs(*given, RULES)
    record = analyse([given], selected.pairs, RULES, DRAW)
    assert record["suggestion"] == (
        "floor correctness alone costs 30 of the 30 prompts without a pair: without it 40 of 40 "
        "would give pairs, now 10 (chosen's mean correctness -0.172); at 0.55, 40 would (chosen's "
        "mean correctness -0.172)"
    )
    lines = said(selected.funnel, record)
    assert lines[0].startswith("yield 0.250 of prompts = floor correctness 0.250; floor correct")
    assert lines[1].startswith("mean margin 0.350; how much of it is noise is not known: correctne")
    assert analysed(floored(prompts=40, passing=40), RULES)["suggestion"] is None


def test_no_suggestion_where_the_losses_have_many_reasons() -> None:
    rows = [
        *floored(prompts=12, passing=6),
        *(answer(f"q{i}", s, (0.8, 0.5, 0.5)) for i in range(7) for s in (0, 1)),
    ]
    assert analysed(rows, RULES)["suggestion"] is None


def test_without_a_single_pair_the_costs_still_say_why() -> None:
    record = analysed(floored(prompts=10, passing=0), RULES)
    assert "without it 10 of 10 would give pairs, now 0;" in record["suggestion"]
    assert record["inversion"] == {}
    assert record["noise"]["inverted_share"] is None


def test_many_prompts_are_sampled_by_a_key_that_knows_the_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(yield_analysis, "ANALYSED_PROMPTS", 100)
    given = tables(floored(prompts=400, passing=200))
    pairs = select_pairs(*given, RULES).pairs
    costs = [analyse([given], pairs, RULES, Draw(r, 200))["constraints"] for r in (1, 1, 2)]
    assert costs[0] == costs[1] != costs[2]
    assert costs[0]["analysed_prompts"] == 100
    assert 30 <= costs[0]["now"]["prompts"] <= 70


def tilted(gap: float, prompts: int = 60) -> list[Row]:
    """Chosen is more correct; on style it differs from rejected by `gap` and some noise."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.1, 0.1, (prompts, 2))
    return [
        answer(
            f"p{i:03d}",
            s,
            (1.0 - s, 0.5, float(0.5 + (gap / 2 if s == 0 else -gap / 2) + noise[i, s])),
        )
        for i in range(prompts)
        for s in (0, 1)
    ]


@pytest.mark.parametrize(("gap", "expected"), [(-0.1, True), (-0.01, False), (0.1, False)])
def test_a_dimension_is_inverted_where_its_interval_is_below_zero(
    gap: float, expected: bool
) -> None:
    rules = Rules({"correctness": 1.0}, {}, {})
    rows = tilted(gap)
    found = analysed(rows, rules)["inversion"]
    # Style has no weight here, and is watched all the same.
    assert set(found) == {"correctness", "problem_solution", "style"}
    assert found["style"]["inverted"] is expected
    differences = [
        a["scores"]["style"] - b["scores"]["style"]
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert found["style"]["value"] == pytest.approx(np.mean(differences))
    assert found["style"]["low"] < found["style"]["value"] < found["style"]["high"]
    assert (found["correctness"]["value"], found["correctness"]["inverted"]) == (1.0, False)
    record = {"inversion": found}
    warning = check_inversion(record, "warn")
    assert ("style -0.0" in warning or "style -0.1" in warning) is expected
    if expected:
        with pytest.raises(DataGateError, match=r"score below rejected ones on style"):
            check_inversion(record, "error")
    else:
        assert check_inversion(record, "error") == ""


def test_pairs_without_a_score_of_a_dimension_do_not_count_for_it() -> None:
    rows = tilted(0.1, prompts=30)
    rows[0]["scores"]["style"] = None
    found = analysed(rows, Rules({"correctness": 1.0}, {}, {}))["inversion"]
    assert (found["style"]["pairs"], found["correctness"]["pairs"]) == (29, 30)


def test_many_clusters_give_the_interval_that_the_bootstrap_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tables(tilted(0.0, prompts=400))
    pairs = select_pairs(*given, Rules({"correctness": 1.0}, {}, {})).pairs
    bootstrapped = inversion(pairs, given[1], 2000, 0)["style"]
    monkeypatch.setattr(yield_analysis, "_BOOTSTRAPPED", 1)
    normal = inversion(pairs, given[1], 2000, 0)["style"]
    assert normal["value"] == pytest.approx(bootstrapped["value"])
    width = normal["high"] - normal["low"]
    assert normal["low"] == pytest.approx(bootstrapped["low"], abs=0.05 * width)
    assert normal["high"] == pytest.approx(bootstrapped["high"], abs=0.05 * width)
