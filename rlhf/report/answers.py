"""Answers as the browser of prompts shows them: text, scores, reasons, chosen or rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from rlhf.evaluation import AUDIT_PREFIX
from rlhf.run_view import RoundView, RunView
from rlhf.selection import Rules, candidates_of, chosen_steps, score_wide
from rlhf.types import SCORES

TEXT_LIMIT = 4000
"""Characters of one text that the page holds."""

_KEY = ["prompt_id", "sample"]
_DECIMALS = 12


def drawn(round: RoundView, place: str, what: str = "completions") -> pl.LazyFrame | None:
    """A round's completions (or scores): its own where `place` is empty."""
    return round.table(f"{place}/{what}" if place else what)


def answers_of(
    run: RunView, round: RoundView, place: str, ids: Sequence[str], training: bool
) -> dict[str, list[dict[str, Any]]]:
    """Prompt id -> its answers, by sample, each with scores, reward and what speaks against it."""
    sampled = drawn(round, place)
    if sampled is None:
        return {}
    wanted = pl.col("prompt_id").is_in(list(ids))
    completions = sampled.filter(wanted).collect()
    stored = drawn(round, place, "scores")
    judged = _judged(run, None if stored is None else stored.filter(wanted).collect(), completions)
    rules = Rules.of(run.config)
    steps = [step for step in chosen_steps(rules) if step.name != "scored"]
    against = [pl.when(~step.holds).then(pl.lit(step.why)) for step in steps] if training else []
    about = candidates_of(completions, judged, rules).select(
        *_KEY, "reward", against=pl.concat_list(against) if against else pl.lit([], pl.List(str))
    )
    keys = dimension_keys(run)
    values = score_wide(judged, keys).select(*_KEY, values=pl.concat_list(keys))
    said = judged.filter(pl.col("reason").is_not_null()).group_by(_KEY, maintain_order=True)
    reasons = said.agg(
        reasons=pl.format("{}: {}", pl.col("dimension").str.strip_prefix(AUDIT_PREFIX), "reason")
    )
    table = (
        completions.select(*_KEY, "text", "finish_reason", tokens=pl.col("token_ids").list.len())
        .join(about, on=_KEY, how="left")
        .join(values, on=_KEY, how="left")
        .join(reasons, on=_KEY, how="left")
        .sort(_KEY)
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.iter_rows(named=True):
        found.setdefault(row["prompt_id"], []).append(_answer(row))
    return found


def _judged(run: RunView, scores: pl.DataFrame | None, completions: pl.DataFrame) -> pl.DataFrame:
    """Scores whose audit dimensions carry their mark; no rows where nothing is scored yet."""
    if scores is None:
        return pl.DataFrame(schema=SCORES)
    audits = [judge.name for judge in run.config.judges.audit]
    return scores.join(completions.select(_KEY), on=_KEY, how="semi").with_columns(
        dimension=pl.when(pl.col("judge").is_in(audits))
        .then(AUDIT_PREFIX + pl.col("dimension"))
        .otherwise("dimension")
    )


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"sample": row["sample"], "tokens": row["tokens"]}
    found["text"] = shortened(row["text"])
    if row["finish_reason"] == "length":
        found["cut"] = True
    if row["reward"] is not None:
        found["reward"] = short(row["reward"])
    found["scores"] = [short(value) for value in row["values"] or ()]
    if against := [why for why in row["against"] or () if why]:
        found["against"] = against
    if row["reasons"]:
        found["reasons"] = [shortened(reason) for reason in row["reasons"]]
    return found


def pairs_of(round: RoundView, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Prompt id -> its pairs, the largest margin first."""
    table = round.table("pairs")
    if table is None:
        return {}
    rows = table.filter(pl.col("prompt_id").is_in(list(ids))).select(
        "prompt_id", "margin", "chosen_sample", "rejected_sample", "scores_chosen",
        "scores_rejected",
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.collect().sort("margin", descending=True).iter_rows(named=True):
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def mark_pairs(answers: list[dict[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tells each answer in how many pairs it was chosen and rejected; returns the number of pairs,
    the largest margin and the dimensions that some pair inverts."""
    if not pairs:
        return {}
    for answer in answers:
        for role in ("chosen", "rejected"):
            if times := sum(answer["sample"] == pair[f"{role}_sample"] for pair in pairs):
                answer[role] = times
    inverted = {
        dimension: None
        for pair in pairs
        for dimension, value in pair["scores_chosen"].items()
        if round(value - pair["scores_rejected"][dimension], _DECIMALS) < 0
    }
    return {"pairs": len(pairs), "margin": short(pairs[0]["margin"]), "inverted": [*inverted]}


def dimension_keys(run: RunView) -> list[str]:
    """Keys of the columns of scores: the panel's, then the audit judges'."""
    audits = [AUDIT_PREFIX + d for judge in run.config.judges.audit for d in judge.dimensions]
    return [*run.config.judges.dimensions, *audits]


def short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def shortened(text: str) -> str | list[Any]:
    """The text; where it is too long its beginning, and how many characters are left out."""
    if len(text) <= TEXT_LIMIT:
        return text
    return [text[:TEXT_LIMIT], len(text) - TEXT_LIMIT]
