"""Strategies, length control and labels against plain Python; what holds for every one of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from statistics import fmean, pstdev

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_answers import (
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
from rlhf.candidates import candidates_of
from rlhf.config_selection import Selection
from rlhf.labels import labels_schema, select_labels
from rlhf.selection import Rules, select_pairs

STRATEGIES = ("largest_margin", "best_random", "adjacent", "all_pairs")
Pair = tuple[str, int, int]


def select(rows: list[Row], rules: Rules, round: int = 1) -> selection.Selected:
    return select_pairs(*tables(rows), rules, round)


def pairs_of(selected: selection.Selected) -> list[Pair]:
    return selected.pairs.select("prompt_id", "chosen_sample", "rejected_sample").rows()


def all_admissible(rows: list[Row], rules: Rules) -> dict[str, list[tuple[Row, Row]]]:
    """Prompt -> its admissible pairs, by the samples of chosen and rejected."""
    found: dict[str, list[tuple[Row, Row]]] = {}
    ordered = sorted(rows, key=lambda r: (r["prompt_id"], r["sample"]))
    for c, r in product(ordered, ordered):
        if c["prompt_id"] == r["prompt_id"] and admissible(c, r, rules):
            found.setdefault(c["prompt_id"], []).append((c, r))
    return found


def names(pairs: list[tuple[Row, Row]]) -> list[Pair]:
    return sorted((c["prompt_id"], c["sample"], r["sample"]) for c, r in pairs)


def gap(pair: tuple[Row, Row], rules: Rules) -> float:
    return round(reward(pair[0], rules) - reward(pair[1], rules), 12)


many_rules = st.builds(
    Rules,
    weights=st.just(RULES.weights),
    floors=st.sampled_from([{}, {"correctness": 0.6}]),
    protected=st.sampled_from([{}, {"problem_solution": 0.05}]),
    min_margin=st.sampled_from([0.0, 0.05, 0.1]),
    strategy=st.sampled_from(STRATEGIES),
    pairs_per_prompt=st.integers(1, 5),
    max_length_ratio=st.sampled_from([None, 1.0, 1.5]),
    seed=st.integers(0, 3),
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(many_answers(), many_rules)
def test_what_each_strategy_takes(rows: list[Row], rules: Rules) -> None:
    expected: list[tuple[Row, Row]] = []
    for pairs in all_admissible(rows, rules).values():
        # `min` and `sorted` keep the first of equals: the lowest samples.
        if rules.strategy == "largest_margin":
            expected.append(min(pairs, key=lambda p: -gap(p, rules)))
        elif rules.strategy == "adjacent":
            chosen = {c["sample"]: c for c, _ in pairs}
            own = {s: [p for p in pairs if p[0] is c] for s, c in chosen.items()}
            nearest = [min(p, key=lambda p: gap(p, rules)) for p in own.values()]
            best_first = sorted(nearest, key=lambda p: -reward(p[0], rules))
            expected += best_first[: rules.pairs_per_prompt]
        elif rules.strategy == "all_pairs":
            expected += sorted(pairs, key=lambda p: -gap(p, rules))[: rules.pairs_per_prompt]
    found = pairs_of(select(rows, rules))
    if rules.strategy == "best_random":
        by_prompt = all_admissible(rows, rules)
        assert [p for p, _, _ in found] == sorted(by_prompt)
        for prompt, chosen_sample, rejected in found:
            best = min(by_prompt[prompt], key=lambda p: -reward(p[0], rules))[0]
            partners = [r["sample"] for c, r in by_prompt[prompt] if c is best]
            assert chosen_sample == best["sample"] and rejected in partners
    else:
        assert found == names(expected)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(many_answers(), many_rules, st.floats(0, 0.3))
def test_truths_of_every_pair(rows: list[Row], rules: Rules, penalty: float) -> None:
    """One prompt, only scores, no tie and no equal texts, whatever the strategy and penalty."""
    rules = replace(rules, length_penalty=penalty)
    selected = select(rows, rules)
    own = {(r["prompt_id"], r["sample"]): r for r in rows}
    assert selected.pairs.select("prompt_id", "chosen_sample", "rejected_sample").is_unique().all()
    assert max(Counter(selected.pairs["prompt_id"]).values(), default=0) <= rules.pairs_per_prompt
    for pair in selected.pairs.iter_rows(named=True):
        c, r = (own[pair["prompt_id"], pair[f"{role}_sample"]] for role in ("chosen", "rejected"))
        assert eligible(c, rules) and usable(r, rules)
        assert (pair["chosen"], pair["rejected"]) == (c["text"], r["text"])
        assert c["text"].strip() != r["text"].strip() and c["ids"] != r["ids"]
        assert pair["margin"] > 0 and pair["margin"] >= rules.min_margin
        assert (pair["reward_chosen"], pair["reward_rejected"]) == (
            reward(c, rules),
            reward(r, rules),
        )
        if penalty == 0:
            assert pair["margin"] == gap((c, r), rules)
    steps = selected.funnel["steps"]
    chosen = selected.pairs.select("prompt_id", "chosen_sample").n_unique()
    assert (steps[-1]["completions"], steps[-1]["prompts"]) == (
        chosen,
        selected.pairs["prompt_id"].n_unique(),
    )
    assert selected.funnel["pairs"] == selected.pairs.height
    for what in ("completions", "prompts"):
        left = 1.0
        for step in steps[1:]:
            left *= step[f"kept_{what}"] or 0.0
        first = steps[0][what]
        assert left == pytest.approx(steps[-1][what] / first if first else 0.0)
    assert json.loads(json.dumps(selected.funnel)) == selected.funnel


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(many_answers(), many_rules, st.integers(1, 30), st.integers(0, 99))
def test_neither_row_order_nor_chunks_change_a_strategy(
    rows: list[Row], rules: Rules, budget: int, seed: int
) -> None:
    rules = replace(rules, length_penalty=0.05, max_pairs=3)
    straight = select(rows, rules)
    mixed = [t.sample(fraction=1, shuffle=True, seed=seed) for t in tables(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairing, "_CHUNK_PAIRS", budget)
        shuffled = select_pairs(mixed[0], mixed[1], mixed[2], rules, 1)
    assert straight.pairs.equals(shuffled.pairs)
    assert straight.funnel == shuffled.funnel


@pytest.mark.slow
def test_random_rejected_answers_are_keyed_by_seed_round_and_prompt_and_spread_evenly() -> None:
    rows = [
        answer(f"p{i:04d}", s, ((1.0, 0.5, 0.5) if s == 0 else (0.0, 0.5, 0.5)))
        for i in range(600)
        for s in range(4)
    ]
    rules = Rules({"correctness": 1.0}, {}, {}, strategy="best_random")
    first = select(rows, rules).pairs["rejected_sample"].to_list()
    assert first == select(rows, rules).pairs["rejected_sample"].to_list()
    others = [select(rows, replace(rules, seed=1)), select(rows, rules, round=2)]
    for other in others:
        same = sum(a == b for a, b in zip(first, other.pairs["rejected_sample"], strict=True))
        # A third by chance: 200 of 600, standard deviation 11.5.
        assert 150 < same < 250
    counted = Counter(first)
    assert set(counted) == {1, 2, 3} and all(150 < n < 250 for n in counted.values())
    alone = select(rows[: 4 * 100], rules).pairs["rejected_sample"].to_list()
    assert alone == first[:100], "a prompt's draw does not depend on the others"


def test_a_chosen_answer_is_not_longer_than_the_ratio_allows() -> None:
    rows = [
        answer("a", 0, (1.0, 0.5, 0.5), ids=tuple(range(30))),
        answer("a", 1, (0.8, 0.5, 0.5), ids=tuple(range(15))),
        answer("a", 2, (0.2, 0.5, 0.5), ids=tuple(range(10, 20))),
    ]
    free = Rules({"correctness": 1.0}, {}, {})
    assert pairs_of(select(rows, free)) == [("a", 0, 2)]
    assert pairs_of(select(rows, replace(free, max_length_ratio=2.9))) == [("a", 1, 2)]
    assert pairs_of(select(rows, replace(free, max_length_ratio=3.0))) == [("a", 0, 2)]
    alone = select(rows, replace(free, max_length_ratio=1.4)).funnel["alone"]["pairs"]
    assert alone["length ratio"] == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(many_answers(grid), st.sampled_from([0.0, 0.05, 0.5]))
def test_the_length_penalty_is_the_documented_formula(rows: list[Row], penalty: float) -> None:
    rules = replace(RULES, length_penalty=penalty)
    completions, scores, _ = tables(rows)
    found = candidates_of(completions, scores, rules)
    for row in rows:
        if not usable(row, rules):
            continue
        own = [
            len(r["ids"]) for r in rows if r["prompt_id"] == row["prompt_id"] and usable(r, rules)
        ]
        z = (len(row["ids"]) - fmean(own)) / pstdev(own) if pstdev(own) > 0 else 0.0
        key = (pl.col("prompt_id") == row["prompt_id"]) & (pl.col("sample") == row["sample"])
        value = found.filter(key)["value"].item()
        assert value == pytest.approx(reward(row, rules) - penalty * z, abs=1e-9)


def test_the_length_penalty_turns_a_preference_for_length_round() -> None:
    rows = [
        answer("a", 0, (0.75, 0.5, 0.5), ids=tuple(range(90))),
        answer("a", 1, (0.70, 0.5, 0.5), ids=tuple(range(10))),
    ]
    rules = Rules({"correctness": 1.0}, {}, {}, min_margin=0.01)
    assert pairs_of(select(rows, rules)) == [("a", 0, 1)]
    shorter = select(rows, replace(rules, length_penalty=0.1))
    assert pairs_of(shorter) == [("a", 1, 0)]
    # z is 1 and -1, so the margin is 2 * 0.1 - 0.05; the rewards stay what the judges gave.
    assert shorter.pairs["margin"].to_list() == [0.15]
    assert shorter.pairs["reward_chosen"].to_list() == [0.7]


@pytest.mark.parametrize("strategy", ["largest_margin", "best_random"])
def test_strategies_of_one_pair_refuse_several(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"pairs_per_prompt must be 1 with strategy {strategy}"):
        Selection.model_validate({"strategy": strategy, "pairs_per_prompt": 2})
    Selection.model_validate({"strategy": "all_pairs", "pairs_per_prompt": 2})


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(many_answers(), many_rules)
def test_labels_by_their_definition(rows: list[Row], rules: Rules) -> None:
    labelled = select_labels([tables(rows)], rules)
    assert labelled.pairs.schema == labels_schema(rules.needed)
    marks: dict[tuple[str, int], bool] = {}
    assert rules.min_margin != "auto"
    for row in rows:
        own = [r for r in rows if r["prompt_id"] == row["prompt_id"] and usable(r, rules)]
        if not usable(row, rules):
            continue
        distance = reward(row, rules) - fmean(reward(r, rules) for r in own)
        for good, sign in ((True, 1), (False, -1)):
            ahead = {
                d: sign * (row["scores"][d] - fmean(r["scores"][d] for r in own))
                for d in rules.protected
            }
            far = sign * distance > 1e-9 and sign * distance >= rules.min_margin / 2 - 1e-9
            kept = all(ahead[d] >= -e - 1e-9 for d, e in rules.protected.items())
            if far and kept and (not good or eligible(row, rules)):
                marks[row["prompt_id"], row["sample"]] = good
    told = {(r["prompt_id"], r["sample"]): r for r in rows}

    def clear(key: tuple[str, int]) -> bool:
        return not any(
            other[0] == key[0]
            and marks[other] != marks[key]
            and (
                told[other]["text"].strip() == told[key]["text"].strip()
                or told[other]["ids"] == told[key]["ids"]
            )
            for other in marks
        )

    found = dict(
        zip(
            labelled.pairs.select("prompt_id", "sample").iter_rows(),
            labelled.pairs["good"],
            strict=True,
        )
    )
    assert found == {key: good for key, good in marks.items() if clear(key)}
    for name, good in (("good", True), ("bad", False)):
        steps = labelled.funnel[name]
        assert steps[0]["answers"] == len(rows)
        assert steps[-1]["answers"] == sum(mark is good for mark in found.values())
        counts = [s["answers"] for s in steps]
        assert counts == sorted(counts, reverse=True)
    mixed = [t.sample(fraction=1, shuffle=True, seed=3) for t in tables(rows)]
    assert select_labels([(mixed[0], mixed[1], mixed[2])], rules).pairs.equals(labelled.pairs)


def test_equal_answers_are_neither_good_nor_bad() -> None:
    rows = [answer("a", i, (0.9, 0.9, 0.9)) for i in range(4)]
    rules = replace(RULES, min_margin=0.0)
    assert select_labels([tables(rows)], rules).pairs.is_empty()


def test_the_cap_on_labels_keeps_the_clearest_of_both_kinds() -> None:
    rows = [
        answer(f"p{i}", s, (0.5 + sign * (0.1 + 0.02 * i), 0.5, 0.5))
        for i in range(4)
        for s, sign in enumerate((1, -1))
    ]
    rules = Rules({"correctness": 1.0}, {}, {}, max_pairs=4)
    kept = select_labels([tables(rows)], rules).pairs
    assert kept.select("prompt_id", "good").rows() == [
        ("p2", True), ("p2", False), ("p3", True), ("p3", False),
    ]  # fmt: skip
