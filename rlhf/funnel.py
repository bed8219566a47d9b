"""The funnel: how many candidates each selection step kept, and why the others fell.

Frames are those of `rlhf.selection`. Candidates have one row a completion; pairs have one row for
each two answers of a prompt, `p` its number, `row_c` the chosen one's completion, and each pair
step's outcome under the step's `flag`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl


class Step(NamedTuple):
    """One constraint: what it is called, why an answer falls, what holds for those that stay."""

    name: str
    why: str
    holds: pl.Expr

    @property
    def flag(self) -> str:
        """Column that holds its outcome."""
        return f"holds {self.name}"


class Constraints(NamedTuple):
    """What makes an admissible pair, each in order."""

    chosen: Sequence[Step]
    """What a chosen answer must satisfy by itself: expressions over candidates."""
    pair: Sequence[Step]
    """What chosen and rejected must satisfy together: expressions over pairs."""


def is_score() -> pl.Expr:
    """Whether a row of scores holds one: no abstention, finite and in [0, 1]."""
    in_range = pl.col("score").is_finite() & pl.col("score").is_between(0, 1)
    return (~pl.col("abstained") & in_range).fill_null(False)


def kept_pairs(pairs: pl.DataFrame, steps: Sequence[Step]) -> pl.DataFrame:
    """One row: for each step, chosen answers and prompts with a pair that holds up to there."""
    flags = [step.flag for step in steps]
    chosen = pairs.group_by("row_c").agg(
        pl.col("p").first(),
        *(pl.all_horizontal(flags[: i + 1]).any().alias(f) for i, f in enumerate(flags)),
    )
    return chosen.select(
        *(pl.col(f).sum().cast(pl.Int64).alias(f"completions {f}") for f in flags),
        *(pl.col("p").filter(f).n_unique().cast(pl.Int64).alias(f"prompts {f}") for f in flags),
    )


def failed_pairs(pairs: pl.DataFrame, steps: Sequence[Step]) -> pl.DataFrame:
    """One row: pairs whose eligible answer has no smaller reward, and how many fail each step."""
    ahead = pairs.filter(pl.col("margin") >= 0)
    return ahead.select(
        pl.len().cast(pl.Int64).alias("considered"),
        *((~pl.col(step.flag)).sum().cast(pl.Int64).alias(step.name) for step in steps),
    )


def failed_completions(candidates: pl.DataFrame, steps: Sequence[Step]) -> dict[str, int]:
    """How many of all completions fail each step; a floor is not failed where no score is."""
    return candidates.select(
        pl.len().alias("considered"),
        *((~step.holds).sum().alias(step.name) for step in steps),
    ).row(0, named=True)


def count_steps(
    candidates: pl.DataFrame,
    kept: pl.DataFrame,
    constraints: Constraints,
    admissible: int,
    capped: int,
    max_pairs: int | None,
) -> list[dict[str, Any]]:
    """The funnel in order: chosen answers and prompts left after each step, and why others fell.

    Args:
        candidates: all of them.
        kept: the sum of `kept_pairs` over all pairs.
        constraints: what `kept` and the first steps count.
        admissible: prompts with a pair that satisfies everything.
        capped: those of them that `max_pairs` leaves.
        max_pairs: the cap, None for none.
    """
    rows = [("generated", "", candidates.height, candidates["prompt_id"].n_unique())]
    for step in constraints.chosen:
        candidates = candidates.filter(step.holds)
        rows.append((step.name, step.why, candidates.height, candidates["prompt_id"].n_unique()))
    counts = kept.row(0, named=True)
    rows += [
        (s.name, s.why, counts[f"completions {s.flag}"], counts[f"prompts {s.flag}"])
        for s in constraints.pair
    ]
    cap = "no cap is set" if max_pairs is None else f"more than {max_pairs} pairs"
    rows += [
        ("one pair a prompt", "another pair of the prompt comes first", admissible, admissible),
        ("cap", cap, capped, capped),
    ]
    return [
        {
            "step": name,
            "completions": completions,
            "prompts": prompts,
            "lost_completions": before[2] - completions,
            "lost_prompts": before[3] - prompts,
            "why": why,
        }
        for (name, why, completions, prompts), before in zip(rows, rows[:1] + rows, strict=False)
    ]


def unusable_scores(
    scores: pl.DataFrame, dimensions: Sequence[str], completions: int
) -> dict[str, dict[str, int]]:
    """Dimension -> completions abstained on, given a value that is no score, given none."""
    by_kind = scores.group_by("dimension").agg(
        pl.col("abstained").sum(),
        invalid=(~pl.col("abstained") & ~is_score()).sum(),
        missing=completions - pl.len().cast(pl.Int64),
    )
    known = {row.pop("dimension"): row for row in by_kind.to_dicts()}
    nothing = {"abstained": 0, "invalid": 0, "missing": completions}
    return {d: known.get(d, nothing) for d in dimensions}
