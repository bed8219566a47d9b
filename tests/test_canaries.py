"""Canaries: drift is told from noise, whoever says the same again never stops, who drifts does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from rlhf.canaries import ASKINGS, VERDICTS, WatchedJudge, draw_answers
from rlhf.drift import Bootstrap, Limits, examine
from rlhf.errors import DataGateError
from rlhf.pair_audit import audited, check_audit, draw_pairs, sheet_of
from rlhf.types import COMPLETIONS, SCORES, pairs_schema

Floats = NDArray[np.float64]
PROMPTS = 16
LIMITS = Limits(max_drift=0.05, retest_share=0.5, within_prompt_accuracy=0.6, order_consistency=0.6)
DRAW = Bootstrap(200, 0)
READER = WatchedJudge("reader", "style", fixed=False, trains=True, certified=True)
NO_GOLD = pl.DataFrame(
    schema={"prompt_id": pl.String, "sample": pl.Int32, "dimension": pl.String, "gold": pl.Float64}
)
IDS = [(f"p{i:02d}", sample) for i in range(PROMPTS) for sample in (0, 1)]
TRUE = np.random.default_rng(1).uniform(0.2, 0.8, len(IDS))


def verdicts(
    score: Callable[[], Floats],
    order: Callable[[], list[tuple[float, float]]] | None = None,
    name: str = "start",
) -> pl.DataFrame:
    """What a judge says in one round; `score` gives all answers' scores (NaN abstains) each time it
    is asked, `order` each prompt's verdicts on its two answers, in both orders."""
    rows: list[tuple[Any, ...]] = []
    for asking in range(ASKINGS):
        for (prompt_id, sample), value in zip(IDS, score(), strict=True):
            said = None if np.isnan(value) else float(value)
            at = (asking, name, prompt_id, prompt_id, sample)
            rows.append((*at, None, None, "reader", "style", said, None))
        for i, both in enumerate(order() if order else []):
            for shown, value in zip(("ab", "ba"), both, strict=True):
                at = (asking, name, f"p{i:02d}", f"p{i:02d}", 0)
                rows.append((*at, 1, shown, "reader", "style", value, None))
    return pl.DataFrame(rows, schema=VERDICTS, orient="row")


def found(
    now: pl.DataFrame,
    before: pl.DataFrame | None,
    judge: WatchedJudge = READER,
    gold: pl.DataFrame = NO_GOLD,
) -> dict[str, Any]:
    return examine(now, before, gold, [judge], LIMITS, DRAW)


def steady(values: Floats) -> Callable[[], Floats]:
    return lambda: values


def noisy(values: Floats, sd: float, seed: int) -> Callable[[], Floats]:
    rng = np.random.default_rng(seed)
    return lambda: values + sd * rng.standard_normal(len(values))


def test_who_says_the_same_again_has_drifted_by_exactly_nothing() -> None:
    same = verdicts(lambda: TRUE)
    result = found(same, same)
    (judge,) = result["judges"]
    for name in ("moved", "shift", "abstained"):
        drift = judge["drift"][name]
        assert (drift["value"], drift["low"], drift["high"]) == (0, 0, 0)
        assert drift["verdict"] == "holds"
    assert judge["figures"]["retest_sd"]["value"] == 0
    assert result["stops"] == result["warnings"] == []


@pytest.mark.slow
def test_a_noisy_judge_that_stays_as_it_is_hardly_ever_stops_a_run() -> None:
    stops = 0
    for seed in range(60):
        before = verdicts(noisy(TRUE, 0.1, 2 * seed))
        now = verdicts(noisy(TRUE, 0.1, 2 * seed + 1))
        drift = found(now, before)["judges"][0]["drift"]
        stops += any(d["verdict"] == "drifted" for d in drift.values())
    assert stops == 0


@pytest.mark.parametrize(("shift", "least", "most"), [(0.1, 0.7, 1), (0.2, 1, 1), (0.03, 0, 0.02)])
def test_a_shift_is_found_as_the_help_text_says(shift: float, least: float, most: float) -> None:
    stopped = 0
    for seed in range(30):
        before = verdicts(noisy(TRUE, 0.1, 2 * seed))
        now = verdicts(noisy(TRUE + shift, 0.1, 2 * seed + 1))
        stopped += bool(found(now, before)["stops"])
    assert least <= stopped / 30 <= most


def test_without_noise_a_shift_within_the_limit_passes_and_one_beyond_it_stops() -> None:
    before = verdicts(lambda: TRUE)
    assert found(verdicts(lambda: TRUE + 0.049), before)["stops"] == []
    moved, shifted = found(verdicts(lambda: TRUE - 0.06), before)["stops"]
    assert "reader on style: scores of the same answers moved by 0.060" in moved
    assert "shifted by -0.060" in shifted


@pytest.mark.slow
def test_the_movement_of_scores_is_estimated_without_their_noise() -> None:
    true_change = np.random.default_rng(3).normal(0, 0.15, len(IDS))
    squares = []
    for seed in range(100):
        before = verdicts(noisy(TRUE, 0.1, 2 * seed))
        now = verdicts(noisy(TRUE + true_change, 0.1, 2 * seed + 1))
        squares.append(found(now, before)["judges"][0]["drift"]["moved"]["value"] ** 2)
    assert np.mean(squares) == pytest.approx(np.mean(true_change**2), rel=0.1)


def test_other_scores_with_the_same_mean_are_drift_too() -> None:
    turned = 2 * TRUE.mean() - TRUE
    result = found(verdicts(lambda: turned), verdicts(lambda: TRUE))
    assert result["judges"][0]["drift"]["shift"]["verdict"] != "drifted"
    assert any("moved" in text for text in result["stops"])


def gold_of(values: Floats) -> pl.DataFrame:
    rows = [(p, s, "style", float(v)) for (p, s), v in zip(IDS, values, strict=True)]
    return pl.DataFrame(rows, schema=NO_GOLD.schema, orient="row")


def test_agreement_with_gold_falls_with_a_judge_that_turns_round() -> None:
    before, turned = (verdicts(steady(v), name="gold") for v in (TRUE, 1 - TRUE))
    gold = gold_of(10 * TRUE)
    (judge,) = found(before, None, gold=gold)["judges"]
    assert judge["figures"]["within_prompt_accuracy"]["value"] == 1
    assert judge["figures"]["within_prompt_accuracy"]["n"] == PROMPTS
    result = found(turned, before, gold=gold)
    assert result["judges"][0]["drift"]["accuracy"]["value"] == 1
    assert any("agreement with gold within prompts fell by 1.000" in s for s in result["stops"])
    assert any("within_prompt_accuracy is 0.000" in s for s in result["stops"])


def test_ties_and_abstentions_agree_with_no_gold() -> None:
    half = np.where([s == 0 for _, s in IDS], 0.5, np.nan)
    half[: len(IDS) // 2] = 0.5
    (judge,) = found(verdicts(lambda: half, name="gold"), None, gold=gold_of(TRUE))["judges"]
    assert judge["figures"]["within_prompt_accuracy"]["value"] == 0


def test_a_random_judge_is_refused_where_a_certificate_claims_otherwise() -> None:
    rng = np.random.default_rng(5)
    rounds = [verdicts(lambda: rng.uniform(0, 1, len(IDS))) for _ in range(2)]
    (text,) = found(rounds[0], None)["stops"]
    assert "asked again, its scores vary by" in text and "retest_share" in text
    uncertified = found(rounds[0], None, replace(READER, certified=False))
    assert uncertified["stops"] == [] and uncertified["warnings"] == [text]
    # It is as random as before.
    drift = found(rounds[1], rounds[0])["judges"][0]["drift"]
    assert all(d["verdict"] != "drifted" for d in drift.values())


def test_what_is_a_function_or_a_file_must_say_the_same_each_time() -> None:
    checker = replace(READER, fixed=True, certified=None)
    same = verdicts(lambda: TRUE)
    assert found(same, same, checker)["stops"] == []
    flaky = iter([TRUE, np.where(np.arange(len(IDS)) == 3, 0.0, TRUE)])
    (text,) = found(verdicts(lambda: next(flaky)), None, checker)["stops"]
    assert "asked twice about the same 32 answers, it scored 1 of them differently" in text
    silent = np.where(np.arange(len(IDS)) < 2, np.nan, TRUE)
    (text,) = found(verdicts(lambda: silent), same, checker)["stops"]
    assert "2 of 32 answers are scored otherwise than in the first round" in text


def test_a_judge_that_begins_to_abstain_has_drifted() -> None:
    silent = np.where(np.arange(len(IDS)) % 2, np.nan, TRUE)
    stops = found(verdicts(lambda: silent), verdicts(lambda: TRUE))["stops"]
    assert any("the share of answers without a score rose by 0.500" in text for text in stops)


def test_a_judge_that_begins_to_read_the_order_has_drifted() -> None:
    def fair() -> list[tuple[float, float]]:
        return [(1.0, 1.0) if i % 2 else (-1.0, -1.0) for i in range(PROMPTS)]

    def first() -> list[tuple[float, float]]:
        return [(1.0, -1.0)] * PROMPTS

    before = verdicts(lambda: TRUE, fair)
    figures = found(before, None)["judges"][0]["figures"]
    assert figures["order_consistency"]["value"] == 1
    assert figures["first_position_rate"]["value"] == 0.5
    result = found(verdicts(lambda: TRUE, first), before)
    assert result["judges"][0]["figures"]["first_position_rate"]["value"] == 1
    assert any("judged alike in both orders fell by 1.000" in s for s in result["stops"])


def test_an_audit_judge_that_drifts_is_told_and_stops_nothing() -> None:
    onlooker = replace(READER, trains=False, certified=None)
    result = found(verdicts(lambda: TRUE + 0.2), verdicts(lambda: TRUE), onlooker)
    assert result["stops"] == [] and len(result["warnings"]) == 2


def test_too_few_prompts_are_sure_of_nothing() -> None:
    few = {f"p{i:02d}" for i in range(3)}
    before, now = (
        verdicts(steady(v)).filter(pl.col("prompt_id").is_in(few)) for v in (TRUE, TRUE + 0.5)
    )
    result = found(now, before)
    assert result["judges"][0]["drift"]["shift"]["verdict"] == "unclear"
    assert result["stops"] == []


def completions(texts: dict[str, list[str]]) -> pl.DataFrame:
    rows = [
        (p, s, text, [1, s], [1], [0.0, 0.0], "stop", 0)
        for p, answers in texts.items()
        for s, text in enumerate(answers)
    ]
    return pl.DataFrame(rows, schema=COMPLETIONS, orient="row")


def test_canaries_are_two_different_answers_of_a_prompt_whatever_the_rows_order() -> None:
    texts = {f"p{i}": ["", "same", "same", f"other {i}", f"third {i}"] for i in range(40)}
    table = completions({**texts, "collapsed": ["same", "same", " "]})
    drawn = draw_answers([table], 32, seed=7)
    assert drawn.height == 32
    by_prompt = drawn.group_by("prompt_id").agg(pl.col("text").n_unique(), pl.len())
    assert by_prompt["len"].unique().to_list() == by_prompt["text"].unique().to_list() == [2]
    assert "" not in drawn["text"].to_list() and "collapsed" not in drawn["prompt_id"].to_list()
    assert drawn.equals(draw_answers([table.sample(fraction=1, shuffle=True, seed=1)], 32, seed=7))
    assert not drawn.equals(draw_answers([table], 32, seed=8))
    assert draw_answers([table.filter(prompt_id="collapsed")], 32, seed=7).is_empty()


def pairs_of(count: int) -> pl.DataFrame:
    schema = pairs_schema(["style"])
    rows = [
        {
            "prompt_id": f"p{i:02d}", "category": "all", "cluster": f"p{i:02d}", "prompt": "why",
            "chosen": f"good {i}", "rejected": f"bad {i}", "chosen_sample": 1, "rejected_sample": 0,
        }
        for i in range(count)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def audit_scores(margins: list[float | None]) -> pl.DataFrame:
    rows = []
    for i, margin in enumerate(margins):
        for sample in (0, 1):
            score = None if margin is None else 0.5 + margin * sample
            at = (f"p{i:02d}", sample, "onlooker", "wit")
            rows.append((*at, score, [] if score is None else [score], 0.0, score is None, None))
    return pl.DataFrame(rows, schema=SCORES, orient="row")


def audit_of(margins: list[float | None]) -> dict[str, Any]:
    table = pairs_of(len(margins))
    return audited(table, audit_scores(margins), [("onlooker", "wit")], 300)


@pytest.mark.parametrize(
    ("margins", "value", "verdict"),
    [
        ([0.1] * 20, 1.0, "agrees"),
        ([-0.1] * 20, 0.0, "inverted"),
        ([0.1, -0.1] * 10, 0.5, "unclear"),
        ([0.0] * 20, 0.5, "unclear"),
        ([-0.1] * 2, 0.0, "unclear"),
        ([None] * 20, None, "unclear"),
    ],
)
def test_an_audit_says_how_often_it_prefers_what_was_chosen(
    margins: list[float | None], value: float | None, verdict: str
) -> None:
    record = audit_of(margins)
    (entry,) = record["judges"]
    assert (entry["value"], entry["verdict"]) == (value, verdict)
    counted = sum(entry[k] for k in ("preferred", "equal", "against", "abstained"))
    assert counted == record["pairs"] == len(margins)
    assert bool(record["inverted"]) == (verdict == "inverted")
    assert check_audit(record, "warn") == record["inverted"]
    if verdict == "inverted":
        with pytest.raises(DataGateError, match="onlooker on wit"):
            check_audit(record, "error")


def test_a_sheet_of_the_drawn_pairs_hides_which_answer_was_chosen() -> None:
    table = pairs_of(40)
    drawn = draw_pairs(table, 20, seed=3)
    assert drawn.height == 20 and drawn.equals(draw_pairs(table.reverse(), 20, 3).sort("prompt_id"))
    about = table.select(
        "prompt_id", "prompt", context=pl.lit(None, pl.String), reference=pl.lit(None, pl.String)
    )
    sheet = sheet_of(drawn, about, seed=3)
    on_a = sheet.pairs.filter(side_x="a")
    assert on_a.height == 10
    assert on_a["answer_a"].str.starts_with("good").all()
    assert sheet.pairs.filter(side_x="b")["answer_b"].str.starts_with("good").all()
