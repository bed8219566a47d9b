"""Which of a prompt's admissible pairs are taken.

Admissible pairs come with one row a pair: `p` the prompt's number, `c` and `r` the places of chosen
and rejected among candidates, `margin`, `value_c` the chosen one's value, and `draw_r`, a hash of
the rejected one keyed by seed, round, prompt and sample. They are sorted by `c`, then `r`, which is
by prompt, chosen sample, rejected sample; so the first of equals has the lowest samples.

| strategy | pairs of a prompt |
|---|---|
| `largest_margin` | the one with the largest margin |
| `best_random` | the best answer with an admissible partner, against one of them drawn |
| `adjacent` | each chosen answer against the admissible one just below it, best first |
| `all_pairs` | all, largest margins first |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import polars as pl

from rlhf.rules import Rules, Strategy

COLUMNS = ("p", "c", "r", "margin", "value_c", "draw_r")


def taken(pairs: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """The pairs that the strategy takes, at most `pairs_per_prompt` a prompt; sorted as given."""
    return _TAKEN[rules.strategy](pairs, rules.pairs_per_prompt).sort("c", "r")


def why_not(rules: Rules) -> tuple[str, str]:
    """The funnel's step for a strategy: its name, and why a chosen answer falls at it."""
    if rules.strategy in ("largest_margin", "best_random"):
        return "one pair a prompt", "another pair of the prompt comes first"
    limit = rules.pairs_per_prompt
    return f"at most {limit} pairs a prompt", f"{limit} other pairs of the prompt come first"


def _largest_margin(pairs: pl.DataFrame, _: int) -> pl.DataFrame:
    return _first(pairs.filter(pl.col("margin") == pl.col("margin").max().over("p")), "p")


def _best_random(pairs: pl.DataFrame, _: int) -> pl.DataFrame:
    best = pairs.filter(pl.col("value_c") == pl.col("value_c").max().over("p"))
    of_one = best.filter(pl.col("c") == pl.col("c").min().over("p"))
    return _first(of_one.filter(pl.col("draw_r") == pl.col("draw_r").min().over("p")), "p")


def _adjacent(pairs: pl.DataFrame, limit: int) -> pl.DataFrame:
    nearest = _first(pairs.filter(pl.col("margin") == pl.col("margin").min().over("c")), "c")
    return _capped(nearest, "value_c", limit)


def _all_pairs(pairs: pl.DataFrame, limit: int) -> pl.DataFrame:
    return _capped(pairs, "margin", limit)


def _first(pairs: pl.DataFrame, of: str) -> pl.DataFrame:
    return pairs.unique(of, keep="first", maintain_order=True)


def _capped(pairs: pl.DataFrame, by: str, limit: int) -> pl.DataFrame:
    ordered = pairs.sort("p", by, "c", "r", descending=[False, True, False, False])
    return ordered.filter(pl.int_range(pl.len()).over("p") < limit)


_TAKEN: Mapping[Strategy, Callable[[pl.DataFrame, int], pl.DataFrame]] = {
    "largest_margin": _largest_margin,
    "best_random": _best_random,
    "adjacent": _adjacent,
    "all_pairs": _all_pairs,
}
