"""Scored answers for the tests of selection, and the definition of a pair in plain Python."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
from hypothesis import strategies as st

from rlhf.selection import Rules
from rlhf.types import Completion, Score, completions_table, scores_table

DIMENSIONS = ("correctness", "problem_solution", "style")
RULES = Rules(
    weights={"correctness": 0.5, "problem_solution": 0.3, "style": 0.2},
    floors={"correctness": 0.6},
    protected={"problem_solution": 0.0},
)
Row = dict[str, Any]


def answer(
    prompt: str,
    sample: int,
    scores: tuple[float | None, ...],
    text: str | None = None,
    finish: str = "stop",
    ids: tuple[int, ...] | None = None,
) -> Row:
    """One completion and its scores, as the reference sees it."""
    return {
        "prompt_id": prompt,
        "sample": sample,
        "text": f"answer {sample}" if text is None else text,
        "ids": (7, sample) if ids is None else ids,
        "finish": finish,
        "scores": dict(zip(DIMENSIONS, scores, strict=True)),
    }


def tables(rows: list[Row]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Completions, scores and prompts of some answers; None is an abstention."""
    completions = completions_table(
        Completion(
            r["prompt_id"],
            r["sample"],
            r["text"],
            r["ids"],
            (1, 2),
            (-0.5,) * len(r["ids"]),
            r["finish"],
            3,
        )
        for r in rows
    )
    scores = scores_table(
        Score.abstain(r["prompt_id"], r["sample"], "house", d, "none")
        if value is None
        else Score.of(r["prompt_id"], r["sample"], "house", d, value)
        for r in rows
        for d, value in r["scores"].items()
    )
    names = sorted({r["prompt_id"] for r in rows})
    prompts = pl.DataFrame(
        {
            "prompt_id": names,
            "category": [n[0] for n in names],
            "cluster": names,
            "prompt": [f"question {n}" for n in names],
        },
        schema=dict.fromkeys(("prompt_id", "category", "cluster", "prompt"), pl.String),
    )
    return completions, scores, prompts


def usable(row: Row, rules: Rules) -> bool:
    values = [row["scores"][d] for d in rules.needed]
    scored = all(v is not None and math.isfinite(v) and 0 <= v <= 1 for v in values)
    return bool(row["text"].strip()) and scored


def reward(row: Row, rules: Rules) -> float:
    total: float = sum(w * row["scores"][d] for d, w in sorted(rules.weights.items()))
    return round(total, 12)


def eligible(row: Row, rules: Rules) -> bool:
    return (
        usable(row, rules)
        and (row["finish"] == "stop" or rules.allow_truncated_chosen)
        and all(round(row["scores"][d], 12) >= f for d, f in rules.floors.items())
    )


def alike(one: str, other: str) -> float:
    """Jaccard similarity of the runs of five characters."""
    a, b = (
        {padded[i : i + 5] for i in range(len(padded) - 4)}
        for text in (one, other)
        for padded in [" ".join(text.lower().split()).ljust(5)]
    )
    return len(a & b) / len(a | b)


def admissible(c: Row, r: Row, rules: Rules) -> bool:
    if c is r or not eligible(c, rules) or not usable(r, rules):
        return False
    if c["text"].strip() == r["text"].strip() or c["ids"] == r["ids"]:
        return False
    if rules.max_length_ratio and len(c["ids"]) > rules.max_length_ratio * len(r["ids"]):
        return False
    if rules.max_similarity and alike(c["text"], r["text"]) > rules.max_similarity:
        return False
    margin = round(reward(c, rules) - reward(r, rules), 12)
    assert rules.min_margin != "auto"
    return (
        margin > 0
        and margin >= rules.min_margin
        and all(
            round(c["scores"][d] - r["scores"][d], 12) >= -e for d, e in rules.protected.items()
        )
    )


# Few distinct values, so that ties, equal texts and margins on the threshold are common.
grid = st.sampled_from([0.0, 0.2, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 1.0])
bad = st.sampled_from([None, math.nan, math.inf, 1.7, -0.1])
value = st.integers(0, 19).flatmap(lambda i: bad if i == 0 else grid)


@st.composite
def many_answers(draw: st.DrawFn, values: st.SearchStrategy[float | None] = value) -> list[Row]:
    rows = []
    for prompt in draw(st.lists(st.sampled_from(["a1", "a2", "b1", "c1"]), unique=True)):
        for sample in draw(st.lists(st.integers(0, 7), unique=True, min_size=2)):
            text = draw(st.sampled_from(["", " \n", "yes", " yes ", "Yes", *"abcdefghijk"]))
            ids = draw(st.sampled_from([(1,), (3, 4), *((9, i) for i in range(9))]))
            finish = draw(st.sampled_from(["stop", "stop", "stop", "length"]))
            scores = tuple(draw(values) for _ in DIMENSIONS)
            rows.append(answer(prompt, sample, scores, text, finish, ids))
    return rows
