"""What splits of one data set have in common: prompts, nearly the same prompts, clusters."""

from __future__ import annotations

import polars as pl

from rlhf.duplicates import similar_pairs


def leaking(table: pl.DataFrame) -> tuple[pl.Series, dict[str, int]]:
    """Why each row leaks (null where it doesn't), and how many rows share what.

    `table` has `where`, `split`, `cluster` and `prompt_key`, a prompt's normalised text. A row
    leaks where its prompt or cluster, or a prompt at least 0.8 like its own, stands in another
    split; rows without a split leak nothing.
    """
    kinds = {
        "a prompt": _other_split(table, "prompt_key", "the same prompt is in {}"),
        "a cluster": _other_split(table, "cluster", "its cluster is in {}"),
        "a near prompt": _near_split(table),
    }
    reasons = pl.select(pl.coalesce(list(kinds.values()))).to_series()
    return reasons, {kind: found.len() - found.null_count() for kind, found in kinds.items()}


def _other_split(table: pl.DataFrame, key: str, said: str) -> pl.Series:
    """For each row another split that holds its key, as a sentence; null where none does."""
    first, last = pl.col("split").min().over(key), pl.col("split").max().over(key)
    other = pl.when(first == pl.col("split")).then(last).otherwise(first)
    leaks = pl.col(key).is_not_null() & pl.col("split").is_not_null() & (first != last)
    return table.select(pl.when(leaks).then(pl.format(said, other))).to_series()


def _near_split(table: pl.DataFrame) -> pl.Series:
    """For each row the record of another split whose prompt is nearly its own."""
    prompts = (
        table.drop_nulls("split")
        .group_by("prompt_key", maintain_order=True)
        .agg(pl.col("split").unique(), pl.col("where").first())
    )
    pairs, splits = similar_pairs(prompts["prompt_key"]), prompts["split"]
    ends = [splits.gather(pairs[end]) for end in ("earlier", "later")]
    across = pairs.filter(ends[0].list.set_symmetric_difference(ends[1]).list.len() > 0)
    both = pl.concat(
        across.select(pl.col(me).alias("me"), pl.col(other).alias("other"), "similarity")
        for me, other in (("earlier", "later"), ("later", "earlier"))
    ).unique("me", keep="first", maintain_order=True)
    said = pl.format("its prompt is {} like that of {}", pl.col("similarity").round(2), "where")
    reasons = both.select(
        prompts["prompt_key"].gather(both["me"]),
        reason=pl.lit(both.select("similarity", prompts["where"].gather(both["other"]))
                      .select(said).to_series()),
    )  # fmt: skip
    keys = table.select("prompt_key", "split")
    found = keys.join(reasons, on="prompt_key", how="left", maintain_order="left")
    return found.select(pl.when(pl.col("split").is_not_null()).then("reason")).to_series()
