"""Scored completions -> single answers labelled good or bad, for objectives that want no pairs.

For each prompt, the mean value of its usable answers stands where the other answer of a pair would:
good is an answer that may be chosen and is admissible against that mean, bad one that the mean is
admissible against. Both are at least half of `min_margin` away from it, so a good and a bad answer
of one prompt differ by the margin that a pair would need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import polars as pl

from rlhf.candidates import DECIMALS, checked_candidates, chosen_steps
from rlhf.funnel import Step
from rlhf.noise import settled
from rlhf.rules import Rules
from rlhf.selection import SOURCE, Selected, Tables, noise_in
from rlhf.types import pairs_schema


def labels_schema(dimensions: Sequence[str]) -> pl.Schema:
    """The schema of a table of labels: one answer a row, `good` or not."""
    pairs = pairs_schema(dimensions)
    kept = ("prompt_id", "category", "cluster", "prompt", "prompt_token_ids")
    answer = {
        "sample": pl.Int32(),
        "completion": pl.String(),
        "completion_token_ids": pl.List(pl.Int32),
        "good": pl.Boolean(),
        "reward": pl.Float64(),
        "distance": pl.Float64(),
        "scores": pairs["scores_chosen"],
    }
    last = ("source", "policy_version")
    return pl.Schema({**{n: pairs[n] for n in kept}, **answer, **{n: pairs[n] for n in last}})


def select_labels(answered: Iterable[Tables], given: Rules) -> Selected:
    """Good and bad answers, with a funnel; tables and errors as those of `select_pairs`.

    All answers to a prompt are in one of `answered`, which is gone through once or twice.

    `distance` is how far an answer's value is from the mean of its prompt, and is positive. A text
    (stripped) or token ids that would be good here and bad there is neither. `max_pairs` keeps the
    largest distances, each label of a category in proportion. Strategies and the length ratio speak
    of two answers, so they don't apply.

    The table has the schema `labels_schema(rules.needed)`, sorted by prompt_id and sample. The
    funnel's `good` and `bad` list their steps, each with the answers left after it.
    """
    rules = settled(given, lambda: noise_in(answered, given))
    parts = [_labelled(tables, rules) for tables in answered]
    good_steps, bad_steps = (_added([part[side] for part in parts]) for side in ("good", "bad"))
    clear = pl.concat(part["labels"] for part in parts)
    kept = _capped(clear, rules.max_pairs)
    for steps, label in ((good_steps, pl.col("good")), (bad_steps, ~pl.col("good"))):
        steps.append({"step": "one label a text", "answers": clear.filter(label).height})
        steps.append({"step": "cap", "answers": kept.filter(label).height})
    return Selected(kept, {"good": good_steps, "bad": bad_steps, "min_margin": rules.min_margin})


class _Part(TypedDict):
    """What is labelled of some prompts before the cap, and the steps of each side."""

    labels: pl.DataFrame
    good: list[dict[str, Any]]
    bad: list[dict[str, Any]]


def _labelled(tables: Tables, rules: Rules) -> _Part:
    completions, scores, prompts = tables
    candidates = checked_candidates(completions, scores, prompts, rules)
    answers = completions[candidates["row"]]
    about = candidates.with_columns(
        text=answers["text"].str.strip_chars(),
        ids=answers["token_ids"],
        distance=(pl.col("value") - pl.col("value").filter("usable").mean().over("p")).round(
            DECIMALS
        ),
        **{f"{d} ahead": _ahead(d) for d in rules.protected},
    )
    good, good_steps = _fallen(about, [*chosen_steps(rules), *_distance_steps(rules, 1)])
    bad, bad_steps = _fallen(
        about,
        [Step("usable", "empty or not scored", pl.col("usable")), *_distance_steps(rules, -1)],
    )
    both = pl.concat([good.with_columns(good=True), bad.with_columns(good=False)])
    clear = both.filter(
        pl.col("good").n_unique().over("p", "text") == 1,
        pl.col("good").n_unique().over("p", "ids") == 1,
    )
    named = clear.join(prompts.select("prompt_id", "category", "cluster", "prompt"), on="prompt_id")
    labels = _table(named.with_columns(pl.col("distance").abs()), completions, rules)
    return {"labels": labels, "good": good_steps, "bad": bad_steps}


def _added(parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same steps of several parts."""
    return [
        {**same[0], "answers": sum(step["answers"] for step in same)}
        for same in zip(*parts, strict=True)
    ]


def _ahead(dimension: str) -> pl.Expr:
    """How far an answer is above the mean of its prompt on a dimension."""
    score = pl.col("scores").struct.field(dimension)
    return (score - score.filter("usable").mean().over("p")).round(DECIMALS)


def _distance_steps(rules: Rules, sign: int) -> list[Step]:
    """What an answer (sign 1: good, -1: bad) must satisfy against the mean of its prompt."""
    assert rules.min_margin != "auto", "min_margin is settled before labels are made"
    distance, half = sign * pl.col("distance"), round(rules.min_margin / 2, DECIMALS)
    protected = [
        Step(
            f"protected {d}",
            f"{d} more than {epsilon:g} on the wrong side of its prompt's mean",
            sign * pl.col(f"{d} ahead") >= -round(epsilon, DECIMALS),
        )
        for d, epsilon in sorted(rules.protected.items())
    ]
    far = (distance > 0) & (distance >= half)
    return [*protected, Step("margin", f"not {half:g} from its prompt's mean reward", far)]


def _fallen(
    candidates: pl.DataFrame, steps: Sequence[Step]
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Those that satisfy every step, and how many were left after each."""
    counts: list[dict[str, Any]] = [{"step": "generated", "answers": candidates.height, "why": ""}]
    for step in steps:
        candidates = candidates.filter(step.holds)
        counts.append({"step": step.name, "answers": candidates.height, "why": step.why})
    return candidates, counts


def _capped(labels: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    if limit is None:
        return labels.sort("prompt_id", "sample")
    group = ["category", "good"]
    return (
        labels.sort("distance", "prompt_id", "sample", descending=[True, False, False])
        .with_columns(place=(pl.int_range(pl.len()).over(group) + 0.5) / pl.len().over(group))
        .sort("place", *group, "prompt_id", "sample")
        .head(limit)
        .sort("prompt_id", "sample")
        .select(labels.columns)
    )


def _table(labels: pl.DataFrame, completions: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    answers = completions[labels["row"]]
    return labels.with_columns(
        answers["prompt_token_ids"],
        answers["policy_version"],
        answers["text"].alias("completion"),
        answers["token_ids"].alias("completion_token_ids"),
        pl.lit(SOURCE).alias("source"),
    ).select(pl.col(name).cast(dtype) for name, dtype in labels_schema(rules.needed).items())
