"""Selection against a plain-Python reference, and the promises a pair makes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise, product

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_answers import (
    DIMENSIONS,
    RULES,
    Row,
    admissible,
    answer,
    eligible,
    grid,
    many_answers,
    reward,
    tables,
    usable,
)

from rlhf import pairing, selection
from rlhf.config import RunConfig
from rlhf.config_selection import ColdStart
from rlhf.errors import DataGateError
from rlhf.selection import Rules, check_cold_start, cold_start, score_wide, select_pairs
from rlhf.types import pairs_schema


def select(rows: list[Row], rules: Rules = RULES) -> selection.Selected:
    return select_pairs(*tables(rows), rules)


def reference(rows: list[Row], rules: Rules) -> list[tuple[str, int, int, float]]:
    """The definition, pair by pair: prompt, chosen, rejected, margin (no cap)."""
    found = []
    for prompt in sorted({r["prompt_id"] for r in rows}):
        own = [r for r in rows if r["prompt_id"] == prompt]
        pairs = [
            (-round(reward(c, rules) - reward(r, rules), 12), c["sample"], r["sample"])
            for c, r in product(own, own)
            if admissible(c, r, rules)
        ]
        if pairs:
            negated, chosen, rejected = min(pairs)
            found.append((prompt, chosen, rejected, -negated))
    return found


def picked(selected: selection.Selected) -> list[tuple[str, int, int, float]]:
    return selected.pairs.select("prompt_id", "chosen_sample", "rejected_sample", "margin").rows()


many_rules = st.builds(
    Rules,
    weights=st.sampled_from(
        [
            {"correctness": 0.5, "problem_solution": 0.3, "style": 0.2},
            {"style": 0.1, "correctness": 0.9},
            {"correctness": 1 / 3, "problem_solution": 1 / 3, "style": 1 / 3},
        ]
    ),
    floors=st.dictionaries(st.sampled_from(DIMENSIONS), st.sampled_from([0.5, 0.6])),
    protected=st.dictionaries(st.sampled_from(DIMENSIONS), st.sampled_from([0.0, 0.05, 0.1])),
    min_margin=st.sampled_from([0.0, 0.05, 0.1]),
    max_pairs=st.none(),
    allow_truncated_chosen=st.booleans(),
    max_similarity=st.sampled_from([None, 0.9]),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(many_answers(), many_rules)
def test_equals_the_definition_pair_by_pair(rows: list[Row], rules: Rules) -> None:
    assert picked(select(rows, rules)) == reference(rows, rules)


def test_answers_that_hardly_differ_are_no_pair_where_a_limit_says_so() -> None:
    """The next best pair is taken instead, and the funnel says what it cost."""
    text = "Your refund is due within five working days of its approval."
    rows = [
        answer("a1", 0, (1.0, 1.0, 1.0), text),
        answer("a1", 1, (0.6, 0.0, 0.0), text.replace("Your", "The").upper()),
        answer("a1", 2, (0.7, 0.5, 0.5), "Ask the desk."),
        answer("b1", 0, (1.0, 1.0, 1.0), text),
        answer("b1", 1, (0.6, 0.0, 0.0), text + " "),
        answer("b1", 2, (0.6, 0.0, 0.0), text + "!"),
    ]
    assert [pair[:3] for pair in picked(select(rows))] == [("a1", 0, 1), ("b1", 0, 2)]
    strict = replace(RULES, max_similarity=0.8)
    selected = select(rows, strict)
    assert picked(selected) == reference(rows, strict)
    assert [pair[:3] for pair in picked(selected)] == [("a1", 0, 2)]
    margin, alike = [
        s for s in selected.funnel["steps"] if s["step"] in ("margin", "near-duplicate")
    ]
    assert (margin["prompts"], alike["prompts"]) == (2, 1)
    assert "more than 0.8 alike" in alike["why"]
    assert selected.funnel["alone"]["pairs"]["near-duplicate"] == 2


def test_the_lowest_samples_win_a_tie() -> None:
    high, low = (1.0, 0.5, 0.5), (0.0, 0.5, 0.5)
    rows = [answer("a", i, high if i in (2, 5) else low) for i in (5, 4, 3, 2)]
    assert picked(select(rows)) == [("a", 2, 3, 0.5)]


def test_equal_rewards_tie_whatever_the_float_noise() -> None:
    # Both are 0.8, but their floating-point sums differ in the last bit, the second above.
    rows = [
        answer("a", 0, (0.7, 1.0, 0.75)),
        answer("a", 1, (0.6, 1.0, 1.0), finish="length"),
        answer("a", 2, (0.0, 0.0, 0.0)),
    ]
    assert select(rows).funnel["yield"]["best_and_worst_then_filter"] == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(many_answers(), st.data())
def test_row_order_changes_nothing(rows: list[Row], data: st.DataObject) -> None:
    completions, scores, prompts = tables(rows)
    seed = data.draw(st.integers(0, 99))
    rules = Rules(RULES.weights, RULES.floors, RULES.protected, max_pairs=2)
    straight = select_pairs(completions, scores, prompts, rules)
    mixed = [t.sample(fraction=1, shuffle=True, seed=seed) for t in (completions, scores, prompts)]
    shuffled = select_pairs(mixed[0], mixed[1], mixed[2], rules)
    assert straight.pairs.equals(shuffled.pairs)
    assert straight.funnel == shuffled.funnel


@settings(max_examples=30, deadline=None, derandomize=True)
@given(many_answers(), many_rules, st.integers(1, 30))
def test_chunks_change_nothing(rows: list[Row], rules: Rules, budget: int) -> None:
    whole = select(rows, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairing, "_CHUNK_PAIRS", budget)
        chunked = select(rows, rules)
    assert whole.pairs.equals(chunked.pairs)
    assert whole.funnel == chunked.funnel


@settings(max_examples=30, deadline=None, derandomize=True)
@given(many_answers(), many_rules)
def test_a_pair_answers_one_prompt_and_holds_only_scores(rows: list[Row], rules: Rules) -> None:
    pairs = select(rows, rules).pairs
    own = {(r["prompt_id"], r["sample"]): r for r in rows}
    assert pairs.schema == pairs_schema(rules.needed)
    assert not pairs["prompt_id"].is_duplicated().any()
    for pair in pairs.iter_rows(named=True):
        for role in ("chosen", "rejected"):
            row = own[pair["prompt_id"], pair[f"{role}_sample"]]
            assert pair[role] == row["text"]
            assert tuple(pair[f"{role}_token_ids"]) == row["ids"]
            assert pair[f"scores_{role}"] == {d: row["scores"][d] for d in rules.needed}
            assert all(0 <= v <= 1 for v in pair[f"scores_{role}"].values())
        assert pair["margin"] == round(pair["reward_chosen"] - pair["reward_rejected"], 12)
        assert pair["prompt"] == f"question {pair['prompt_id']}"
        assert pair["policy_version"] == 3


@settings(max_examples=30, deadline=None, derandomize=True)
@given(many_answers(), many_rules)
def test_funnel_adds_up_and_never_rises(rows: list[Row], rules: Rules) -> None:
    selected = select(rows, rules)
    steps = selected.funnel["steps"]
    assert json.loads(json.dumps(selected.funnel)) == selected.funnel
    assert steps[0]["completions"] == len(rows)
    assert steps[-1]["completions"] == steps[-1]["prompts"] == selected.pairs.height
    for before, now in pairwise(steps):
        for what in ("completions", "prompts"):
            assert now[what] <= before[what]
            assert now[f"lost_{what}"] == before[what] - now[what]
    counted = {s["step"]: s["completions"] for s in steps}
    last_floor = "complete" if not rules.floors else f"floor {max(rules.floors)}"
    assert counted[last_floor] == sum(eligible(r, rules) for r in rows)
    partners = {
        (c["prompt_id"], c["sample"])
        for c, r in product(rows, rows)
        if c["prompt_id"] == r["prompt_id"] and admissible(c, r, rules)
    }
    assert counted["margin"] == len(partners)
    gain = selected.funnel["yield"]
    assert gain["largest_admissible"] >= gain["best_and_worst_then_filter"]


def best_and_worst(rows: list[Row], rules: Rules) -> int:
    """Prompts that pair the highest with the lowest reward and then filter."""
    count = 0
    for prompt in {r["prompt_id"] for r in rows}:
        own = [r for r in rows if r["prompt_id"] == prompt and usable(r, rules)]
        if own:
            best = min(own, key=lambda r: (-reward(r, rules), r["sample"]))
            worst = min(own, key=lambda r: (reward(r, rules), r["sample"]))
            count += admissible(best, worst, rules)
    return count


@settings(max_examples=30, deadline=None, derandomize=True)
@given(many_answers(grid), many_rules)
def test_yield_of_best_and_worst_then_filter(rows: list[Row], rules: Rules) -> None:
    counted = select(rows, rules).funnel["yield"]["best_and_worst_then_filter"]
    assert counted == best_and_worst(rows, rules)


def test_protection_cures_a_rejected_answer_that_solves_the_problem_better() -> None:
    rows = [
        answer("a", 0, (1.0, 0.7, 1.0)),
        answer("a", 1, (0.0, 0.9, 0.0)),
        answer("a", 2, (0.3, 0.7, 0.0)),
    ]
    unprotected = Rules(RULES.weights, RULES.floors, {})
    assert picked(select(rows, unprotected))[0][:3] == ("a", 0, 1)
    selected = select(rows)
    assert picked(selected)[0][:3] == ("a", 0, 2)
    assert selected.funnel["yield"] == {"largest_admissible": 1, "best_and_worst_then_filter": 0}
    lenient = Rules(RULES.weights, RULES.floors, {"problem_solution": 0.2})
    assert picked(select(rows, lenient))[0][:3] == ("a", 0, 1)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1.7, -0.1])
def test_what_is_no_score_never_reaches_a_pair(bad: float | None) -> None:
    rows = [
        answer("a", 0, (1.0, 1.0, 1.0)),
        answer("a", 1, (0.7, 0.7, 0.7)),
        answer("a", 2, (0.0, bad, 0.0)),
        answer("a", 3, (1.0, 1.0, bad)),
    ]
    selected = select(rows)
    assert picked(selected) == [("a", 0, 1, 0.3)]
    kind = "abstained" if bad is None else "invalid"
    assert selected.funnel["unusable_scores"]["style"][kind] == 1
    assert selected.funnel["alone"]["completions"]["scored"] == 2


def test_an_abstention_that_carries_a_number_is_still_an_abstention() -> None:
    rows = [answer("a", 0, (1.0, 1.0, 1.0)), answer("a", 1, (0.0, 0.0, 0.0))]
    completions, scores, prompts = tables(rows)
    marked = scores.with_columns(
        abstained=(pl.col("sample") == 1) & (pl.col("dimension") == "style")
    )
    assert select_pairs(completions, marked, prompts, RULES).pairs.is_empty()


def test_a_dimension_that_nobody_scored_gives_no_reward() -> None:
    rows = [answer("a", 0, (1.0, 1.0, 1.0)), answer("a", 1, (0.0, 0.0, 0.0))]
    completions, scores, prompts = tables(rows)
    selected = select_pairs(
        completions, scores.filter(pl.col("dimension") != "style"), prompts, RULES
    )
    assert selected.pairs.is_empty()
    assert selected.funnel["unusable_scores"]["style"] == {
        "abstained": 0,
        "invalid": 0,
        "missing": 2,
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"text": "Yes."}, {"text": "  Yes.\n"}),
        ({"ids": (4, 5)}, {"ids": (4, 5)}),
        ({"text": ""}, {"text": "no"}),
    ],
)
def test_same_or_empty_answers_make_no_pair(first: Row, second: Row) -> None:
    rows = [
        answer("a", 0, (1.0, 1.0, 1.0), **first),
        answer("a", 1, (0.0, 0.0, 0.0), **second),
    ]
    assert select(rows).pairs.is_empty()


def test_a_tie_is_no_pair_even_without_a_least_margin() -> None:
    rows = [answer("a", i, (0.8, 0.8, 0.8)) for i in range(3)]
    rules = Rules(RULES.weights, RULES.floors, RULES.protected, min_margin=0.0)
    assert select(rows, rules).pairs.is_empty()


def test_a_cut_off_answer_may_be_rejected_but_not_chosen() -> None:
    rows = [
        answer("a", 0, (1.0, 1.0, 1.0), finish="length"),
        answer("a", 1, (0.8, 0.8, 0.8)),
        answer("a", 2, (0.1, 0.1, 0.1), finish="length"),
    ]
    assert picked(select(rows))[0][:3] == ("a", 1, 2)
    allowed = Rules(RULES.weights, RULES.floors, RULES.protected, allow_truncated_chosen=True)
    assert picked(select(rows, allowed))[0][:3] == ("a", 0, 2)


@pytest.mark.parametrize("low", [0.55, 0.65, 0.7])
def test_a_margin_on_the_threshold_counts_whatever_the_float_noise(low: float) -> None:
    rules = Rules({"correctness": 1.0}, {}, {}, min_margin=0.05)
    rows = [answer("a", 0, (low + 0.05, None, None)), answer("a", 1, (low, None, None))]
    assert picked(select(rows, rules)) == [("a", 0, 1, 0.05)]


def test_a_score_on_the_floor_passes_whatever_the_float_noise() -> None:
    just_below = 0.1 + 0.2 + 0.3 - 2e-16
    assert just_below < 0.6
    rows = [answer("a", 0, (just_below, 1.0, 1.0)), answer("a", 1, (0.0, 0.0, 0.0))]
    assert len(picked(select(rows))) == 1


def test_the_cap_takes_each_category_in_proportion_largest_margins_first() -> None:
    rows = []
    for category, count in (("a", 8), ("b", 4)):
        for i in range(count):
            # The b margins are all smaller: a plain cut at the largest six would keep no b.
            high = 1.0 - 0.01 * i if category == "a" else 0.8 - 0.01 * i
            rows += [
                answer(f"{category}{i}", 0, (high, 0.5, 0.5)),
                answer(f"{category}{i}", 1, (0.0, 0.5, 0.5)),
            ]
    capped = Rules(RULES.weights, RULES.floors, RULES.protected, max_pairs=6)
    selected = select(rows, capped)
    assert selected.pairs["prompt_id"].to_list() == ["a0", "a1", "a2", "a3", "b0", "b1"]
    cap = selected.funnel["steps"][-1]
    assert (cap["step"], cap["prompts"], cap["lost_prompts"]) == ("cap", 6, 6)


def test_the_cap_breaks_ties_by_category_then_prompt() -> None:
    completions, scores, prompts = tables(
        [
            answer(prompt, sample, (1.0 - sample, 0.5, 0.5))
            for prompt in ("p1", "p2", "p3", "p4")
            for sample in (0, 1)
        ]
    )
    named = prompts.with_columns(category=pl.Series(["y", "x", "y", "y"]))
    kept = [
        select_pairs(completions, scores, named, Rules(RULES.weights, {}, {}, max_pairs=n))
        for n in (1, 2, 3, 4)
    ]
    # All margins are equal. Places: y 1/6 (p1), x 1/2 (p2), y 1/2 (p3), y 5/6 (p4).
    assert [k.pairs["prompt_id"].to_list() for k in kept] == [
        ["p1"],
        ["p1", "p2"],
        ["p1", "p2", "p3"],
        ["p1", "p2", "p3", "p4"],
    ]
    named = prompts.with_columns(category=pl.Series(["y", "y", "x", "y"]))
    two = select_pairs(completions, scores, named, Rules(RULES.weights, {}, {}, max_pairs=2))
    assert two.pairs["prompt_id"].to_list() == ["p1", "p3"]


def test_each_constraint_is_also_counted_alone() -> None:
    rows = [
        answer("a", 0, (1.0, 0.7, 1.0)),
        answer("a", 1, (0.5, 0.9, 0.0), finish="length"),
        answer("a", 2, (0.5, 0.9, 1.0), text=""),
        answer("a", 3, (None, 0.9, 1.0)),
        answer("a", 4, (1.0, 0.7, 0.9), text="answer 0"),
    ]
    alone = select(rows).funnel["alone"]
    assert alone["completions"] == {
        "considered": 5,
        "non-empty": 1,
        "scored": 1,
        "complete": 1,
        "floor correctness": 2,
    }
    # Chosen 0 beats 1 and 4, chosen 4 beats 1.
    assert alone["pairs"] == {
        "considered": 3,
        "different answer": 1,
        "protected problem_solution": 2,
        "margin": 1,
    }


def test_broken_tables_are_refused() -> None:
    rows = [answer("a", 0, (1.0, 1.0, 1.0)), answer("a", 1, (0.0, 0.0, 0.0))]
    completions, scores, prompts = tables(rows)
    stale = completions.with_columns(
        policy_version=pl.when(pl.col("sample") == 1).then(2).otherwise(3).cast(pl.Int32)
    )
    mixed = completions.with_columns(
        prompt_token_ids=pl.when(pl.col("sample") == 1)
        .then(pl.lit([1, 3], dtype=pl.List(pl.Int32)))
        .otherwise("prompt_token_ids")
    )
    cases = {
        "sampled twice": (pl.concat([completions, completions[:1]]), scores, prompts),
        "two scores": (completions, pl.concat([scores, scores[:1]]), prompts),
        "policy_version": (stale, scores, prompts),
        "without a completion": (completions[:1], scores, prompts),
        "listed twice": (completions, scores, pl.concat([prompts, prompts])),
        "not listed": (completions, scores, prompts[:0]),
        "prompt_token_ids": (mixed, scores, prompts),
    }
    for message, broken in cases.items():
        with pytest.raises(ValueError, match=message):
            select_pairs(*broken, RULES)


def test_wide_scores_have_a_column_for_every_dimension_asked_for() -> None:
    _, scores, _ = tables([answer("a", 1, (0.5, None, 1.0)), answer("a", 0, (1.7, 0.0, 1.0))])
    wide = score_wide(scores, ["correctness", "problem_solution", "groundedness"])
    assert wide.rows() == [("a", 0, None, 0.0, None), ("a", 1, 0.5, None, None)]


def test_rules_of_a_config_and_their_weights() -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "model"},
            "prompts": {s: {"path": f"{s}.jsonl"} for s in ("train", "gate", "final")},
            "judges": {"panel": [{"name": "h", "function": "m:f", "dimensions": list(DIMENSIONS)}]},
            "selection": {"max_pairs": 7, "min_margin": 0.1, "allow_truncated_chosen": True},
        }
    )
    rules = Rules.of(config)
    assert sum(rules.weights.values()) == pytest.approx(1)
    assert rules.needed == config.needed == DIMENSIONS
    assert rules.floors == {"correctness": 0.6, "problem_solution": 0.6}
    assert rules.protected == {"correctness": 0.0, "problem_solution": 0.0}
    assert (rules.min_margin, rules.max_pairs, rules.allow_truncated_chosen) == (0.1, 7, True)
    with pytest.raises(ValueError, match="sum to 1"):
        Rules({"style": 0.5}, {}, {})


def test_cold_start_measures_passing_share_and_spread() -> None:
    rows = [
        answer("a", 0, (1.0, 1.0, 1.0)),
        answer("a", 1, (0.0, 0.0, 0.0)),
        answer("b", 0, (0.5, 0.5, 0.5)),
        answer("b", 1, (0.5, 0.5, 0.5)),
        answer("c", 0, (None, 1.0, 1.0)),
        answer("d", 0, (1.0, 1.0, 1.0), finish="length"),
    ]
    completions, scores, _ = tables(rows)
    result = cold_start([(completions, scores, completions)], RULES)
    # Passing: a alone of four. Standard deviations: a 0.5, b 0, d 0; c has no usable answer.
    assert result == {
        "passing_share": 0.25,
        "spread": pytest.approx(0.5 / 3),
        "prompts": 4,
        "usable_prompts": 3,
    }
    check_cold_start(result, ColdStart(min_passing_share=0.25, min_spread=0.16))
    with pytest.raises(DataGateError, match=r"0\.250 of 4.*0\.26.*warm up with SFT first"):
        check_cold_start(result, ColdStart(min_passing_share=0.26, min_spread=0.16))
    with pytest.raises(DataGateError, match=r"0\.1667.*0\.2: warm up with SFT first"):
        check_cold_start(result, ColdStart(min_passing_share=0.1, min_spread=0.2))


def test_cold_start_without_a_single_reward_stops() -> None:
    completions, scores, _ = tables([answer("a", i, (None, 1.0, 1.0)) for i in range(2)])
    result = cold_start([(completions, scores, completions)], RULES)
    assert (result["passing_share"], result["spread"]) == (0.0, None)
    with pytest.raises(DataGateError, match="none of 1 prompts has an answer with a reward"):
        check_cold_start(result, ColdStart(min_passing_share=0.0, min_spread=0.0))
