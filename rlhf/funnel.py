"""The funnel: how many candidates each selection step kept, and why the others fell.

Frames are those of `rlhf.selection`. Candidates have one row a completion; pairs have one row for
each two answers of a prompt, `p` its number, `c` the chosen one's candidate, each pair step's
outcome under the step's `flag`, and `depth`, how many pair steps hold before the first that fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


class Left(NamedTuple):
    """What is left after a step."""

    completions: int
    prompts: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What a funnel is made of; those of different prompts add up."""

    left: tuple[Left, ...]
    """Generated, then after each step but the cap."""
    completions: Mapping[str, int]
    """`failed_completions`."""
    pairs: Mapping[str, int]
    """The sums of `failed_pairs`."""
    best_and_worst: int
    """Prompts whose best and worst usable answers are an admissible pair."""
    unusable: Mapping[str, Mapping[str, int]]
    """`unusable_scores`."""

    def __add__(self, other: Counts) -> Counts:
        """The counts of both."""
        return Counts(
            tuple(
                Left(a.completions + b.completions, a.prompts + b.prompts)
                for a, b in zip(self.left, other.left, strict=True)
            ),
            _added(self.completions, other.completions),
            _added(self.pairs, other.pairs),
            self.best_and_worst + other.best_and_worst,
            {d: _added(counts, other.unusable[d]) for d, counts in self.unusable.items()},
        )


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: count + other[name] for name, count in one.items()}


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


def left_after(
    candidates: pl.DataFrame, kept: pl.DataFrame, constraints: Constraints
) -> list[Left]:
    """What is left at first and after each constraint; `kept` is the sum of `kept_pairs` over all
    pairs of these candidates."""
    found = [Left(candidates.height, candidates["p"].n_unique())]
    for step in constraints.chosen:
        candidates = candidates.filter(step.holds)
        found.append(Left(candidates.height, candidates["p"].n_unique()))
    counts = kept.row(0, named=True)
    pairs = (
        Left(counts[f"completions {s.flag}"], counts[f"prompts {s.flag}"]) for s in constraints.pair
    )
    return [*found, *pairs]


def as_steps(named: Sequence[tuple[str, str]], left: Sequence[Left]) -> list[dict[str, Any]]:
    """The funnel in order: chosen answers and prompts left after each step, and why others fell.

    Each step says what share it kept of what it got, in completions and in prompts (None where it
    got nothing); their product over the steps is the share that is left of all.

    Args:
        named: name and reason of each step after the first.
        left: what was there at first, then what each of them left.
    """
    rows = zip([("generated", ""), *named], left, [left[0], *left], strict=False)
    return [
        {
            "step": name,
            "completions": now.completions,
            "prompts": now.prompts,
            "lost_completions": before.completions - now.completions,
            "lost_prompts": before.prompts - now.prompts,
            "kept_completions": _share(now.completions, before.completions),
            "kept_prompts": _share(now.prompts, before.prompts),
            "why": why,
        }
        for (name, why), now, before in rows
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
