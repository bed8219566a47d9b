"""The funnel: how many candidates each selection step kept, and why the others fell.

Frames are those of `rlhf.selection`. Candidates have one row a completion; pairs have one row for
each two answers of a prompt, `p` its number, `c` the chosen one's candidate, each pair step's
outcome under the step's `flag`, and `depth`, how many pair steps hold before the first that fails.
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


class Count(NamedTuple):
    """One line of the funnel, before it is compared with the one above."""

    name: str
    why: str
    completions: int
    prompts: int


def is_score() -> pl.Expr:
    """Whether a row of scores holds one: no abstention, finite and in [0, 1]."""
    in_range = pl.col("score").is_finite() & pl.col("score").is_between(0, 1)
    return (~pl.col("abstained") & in_range).fill_null(False)


def depth(steps: Sequence[Step]) -> pl.Expr:
    """How many steps hold before the first that fails, of pairs with their flags."""
    flags = [step.flag for step in steps]
    upto = (pl.all_horizontal(flags[: i + 1]) for i in range(len(flags)))
    return pl.sum_horizontal(held.cast(pl.UInt8) for held in upto)


def kept_pairs(pairs: pl.DataFrame, steps: Sequence[Step]) -> pl.DataFrame:
    """One row: for each step, chosen answers and prompts with a pair that holds up to there."""
    chosen = pairs.group_by("c").agg(pl.col("p").first(), pl.col("depth").max())
    prompts = chosen.group_by("p").agg(pl.col("depth").max())
    counts = {
        f"{what} {step.flag}": (reached["depth"] > i).sum()
        for what, reached in (("completions", chosen), ("prompts", prompts))
        for i, step in enumerate(steps)
    }
    return pl.DataFrame(counts, schema=dict.fromkeys(counts, pl.Int64))


def failed_pairs(pairs: pl.DataFrame, steps: Sequence[Step]) -> pl.DataFrame:
    """One row: pairs whose eligible answer has no smaller value, and how many fail each step."""
    ahead = pl.col("margin") >= 0
    return pairs.select(
        ahead.sum().cast(pl.Int64).alias("considered"),
        *((ahead & ~pl.col(s.flag)).sum().cast(pl.Int64).alias(s.name) for s in steps),
    )


def failed_completions(candidates: pl.DataFrame, steps: Sequence[Step]) -> dict[str, int]:
    """How many of all completions fail each step; a floor is not failed where no score is."""
    return candidates.select(
        pl.len().alias("considered"),
        *((~step.holds).sum().alias(step.name) for step in steps),
    ).row(0, named=True)


def count_steps(
    candidates: pl.DataFrame, kept: pl.DataFrame, constraints: Constraints, last: Sequence[Count]
) -> list[dict[str, Any]]:
    """The funnel in order: chosen answers and prompts left after each step, and why others fell.

    Each step says what share it kept of what it got, in completions and in prompts (None where it
    got nothing); their product over the steps is the share that is left of all.

    Args:
        candidates: all of them.
        kept: the sum of `kept_pairs` over all pairs.
        constraints: what `kept` and the first steps count.
        last: the steps after those, counted already.
    """
    rows = [Count("generated", "", candidates.height, candidates["p"].n_unique())]
    for step in constraints.chosen:
        candidates = candidates.filter(step.holds)
        left = candidates.height, candidates["p"].n_unique()
        rows.append(Count(step.name, step.why, *left))
    counts = kept.row(0, named=True)
    rows += [
        Count(s.name, s.why, counts[f"completions {s.flag}"], counts[f"prompts {s.flag}"])
        for s in constraints.pair
    ]
    rows += last
    return [
        {
            "step": now.name,
            "completions": now.completions,
            "prompts": now.prompts,
            "lost_completions": before.completions - now.completions,
            "lost_prompts": before.prompts - now.prompts,
            "kept_completions": _share(now.completions, before.completions),
            "kept_prompts": _share(now.prompts, before.prompts),
            "why": now.why,
        }
        for now, before in zip(rows, rows[:1] + rows, strict=False)
    ]


def _share(now: int, before: int) -> float | None:
    return now / before if before else None


def unusable_scores(
    scores: pl.DataFrame, dimensions: Sequence[str], completions: int
) -> dict[str, dict[str, int]]:
    """Dimension -> completions abstained on, given a value that is no score, given none."""
    judged = scores.select("dimension", "abstained", invalid=~pl.col("abstained") & ~is_score())
    counts = {}
    for d in dimensions:
        of = judged.filter(pl.col("dimension") == d)
        counts[d] = {
            "abstained": int(of["abstained"].sum()),
            "invalid": int(of["invalid"].sum()),
            "missing": completions - of.height,
        }
    return counts
