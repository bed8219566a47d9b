"""Held-out scores as means with intervals: arithmetic on tables, no model is called here.

A prompt counts once, however many answers it got; intervals are over clusters of prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from rlhf.errors import DataGateError, InputError
from rlhf.selection import reward_expression, score_wide
from rlhf.statistics import Interval, cluster_mean, smallest_detectable, standard_error

AUDIT_PREFIX = "audit."
_BESIDE = ("prompt_id", "cluster", "completions", "unrewarded")


def per_prompt(
    scores: pl.DataFrame,
    prompts: pl.DataFrame,
    weights: Mapping[str, float],
    audit: Collection[str] = (),
) -> pl.DataFrame:
    """Mean score of each prompt's answers, one row a prompt, sorted by `prompt_id`.

    Columns: prompt_id, cluster, completions (answers with any score row), unrewarded (those of
    them without a reward, left out of its mean), one column per dimension, reward. The reward is
    taken per answer, then averaged; it exists only where every weighted dimension is scored. A
    prompt without any value has null, never a number.

    Args:
        scores: schema `SCORES`.
        prompts: prompt_id, cluster; every prompt that was evaluated.
        weights: dimension -> weight of the reward.
        audit: names of judges that train nothing. Their dimensions become columns
            `audit.<dimension>`, so that they never enter the reward.

    Raises:
        InputError: a dimension has the name of one of the other columns.
        ValueError: scores of an unknown prompt, a prompt twice, two scores of one dimension for
            one answer, a weighted dimension that nobody scored.
    """
    if prompts["prompt_id"].is_duplicated().any():
        raise ValueError("prompts must differ in prompt_id")
    stray = scores.join(prompts, on="prompt_id", how="anti")
    if stray.height:
        raise ValueError(f"scores of a prompt that was not evaluated: {stray['prompt_id'][0]!r}")
    named = scores.with_columns(
        pl.when(pl.col("judge").is_in(list(audit)))
        .then(AUDIT_PREFIX + pl.col("dimension"))
        .otherwise("dimension")
        .alias("dimension")
    )
    dimensions = sorted(named["dimension"].unique())
    for name in dimensions:
        if name in (*_BESIDE, "reward"):
            raise InputError(
                f"judges: a dimension may not be called {name!r}, which evaluation tables use "
                "for something else; rename it in the judge and in the config"
            )
    missing = sorted(set(weights) - set(dimensions))
    if missing:
        raise ValueError(f"no judge scored {missing}, which the reward needs")
    answers = score_wide(named, dimensions).with_columns(reward=reward_expression(weights))
    means = answers.group_by("prompt_id", maintain_order=True).agg(
        pl.len().alias("completions"),
        pl.col("reward").null_count().alias("unrewarded"),
        pl.col(*dimensions, "reward").mean(),
    )
    return (
        prompts.select("prompt_id", "cluster")
        .join(means, on="prompt_id", how="left")
        .with_columns(pl.col("completions", "unrewarded").fill_null(0))
        .sort("prompt_id")
    )


def summarise(table: pl.DataFrame, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Dimension (and `reward`) -> value, low, high, n_prompts, n_clusters, n_missing.

    `table` comes from `per_prompt`. Prompts without a value are left out and counted in
    `n_missing`; the interval is 95%, over clusters (`statistics.cluster_mean`).

    Raises:
        DataGateError: no prompt has a value in some dimension.
    """
    return {
        name: {
            **asdict(_interval(table.with_columns(_value=name), name, resamples, seed)),
            **_sizes(table.drop_nulls(name), table.height),
        }
        for name in _value_columns(table)
    }


def compare(
    now: pl.DataFrame, before: pl.DataFrame, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Paired change of every dimension (and `reward`) over the same prompts: now - before.

    Both tables come from `per_prompt`. Each value is a dict: difference, low, high (95% over
    clusters), se (clustered), smallest_detectable, n_prompts, n_clusters, n_missing (prompts
    without a value on either side, left out).

    Raises:
        ValueError: the tables differ in prompts, clusters or dimensions.
        DataGateError: no prompt has a value on both sides in some dimension.
    """
    names = _value_columns(now)
    if set(names) != set(_value_columns(before)):
        raise ValueError(f"evaluations differ in dimensions: {names}, {_value_columns(before)}")
    keys = [t.select("prompt_id", "cluster").sort("prompt_id") for t in (now, before)]
    if not keys[0].equals(keys[1]):
        raise ValueError(
            f"evaluations differ in prompts or their clusters ({now.height} and {before.height} "
            "prompts): only the same prompts can be compared in pairs"
        )
    joined = now.join(before, on="prompt_id", suffix="_before", validate="1:1").sort("prompt_id")
    result = {}
    for name in names:
        change = joined.with_columns(_value=pl.col(name) - pl.col(f"{name}_before"))
        interval = _interval(change, name, resamples, seed)
        paired = change.drop_nulls("_value")
        differences, clusters = paired["_value"].to_numpy(), paired["cluster"].to_list()
        result[name] = {
            "difference": interval.value,
            "low": interval.low,
            "high": interval.high,
            "se": standard_error(differences, clusters),
            "smallest_detectable": smallest_detectable(differences, clusters),
            **_sizes(paired, joined.height),
        }
    return result


def _value_columns(table: pl.DataFrame) -> list[str]:
    return [name for name in table.columns if name not in _BESIDE]


def _interval(table: pl.DataFrame, name: str, resamples: int, seed: int) -> Interval:
    """Interval of column `_value`, which holds `name`, over the rows that have it."""
    known = table.drop_nulls("_value")
    if known.is_empty():
        raise DataGateError(
            f"no held-out prompt has a value of {name!r}: its judge abstained on every answer; "
            "look at the reasons in the scores table"
        )
    values = known["_value"].to_numpy().astype(np.float64)
    return cluster_mean(values, known["cluster"].to_list(), resamples, seed)


def _sizes(known: pl.DataFrame, total: int) -> dict[str, int]:
    return {
        "n_prompts": known.height,
        "n_clusters": known["cluster"].n_unique(),
        "n_missing": total - known.height,
    }
