"""What a training on a file did to held-out answers: each before and after, with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl

from rlhf.learner import Learner
from rlhf.statistics import cluster_mean
from rlhf.tracking import spread

RESAMPLES = 2000


def answer_logps(learner: Learner, held: pl.DataFrame) -> pl.DataFrame:
    """Log-probs (nats) of each row's answers under the policy as it stands.

    `held` has token ids of pairs or labels. Columns: prompt_id, cluster, and `chosen` and
    `rejected`, or `good` and `completion`.
    """
    names = _answers(held)
    prompts = [tuple(ids) for ids in held["prompt_token_ids"]]
    columns = [[tuple(ids) for ids in held[f"{name}_token_ids"]] for name in names]
    sequences = [put for column in columns for put in zip(prompts, column, strict=True)]
    found = np.split(np.array(learner.answer_logps(sequences)), len(names))
    about = held.select("prompt_id", "cluster", *(["good"] if "good" in held.columns else []))
    return about.with_columns(
        pl.Series(name, values) for name, values in zip(names, found, strict=True)
    )


def compare(before: pl.DataFrame, after: pl.DataFrame, seed: int) -> dict[str, Any]:
    """Share of held-out rows that are right, before and after, from two of `answer_logps`.

    Of pairs (`preferred`), those whose chosen answer is likelier than the rejected one; of labels
    (`moved`), the answers that went their way, good ones up and bad ones down, which is half by
    definition before anything moved. `low` and `high` are the 95% interval of the paired change,
    over clusters.
    """
    if "good" in before.columns:
        moved = np.sign((after["completion"] - before["completion"]).to_numpy())
        was, now = np.full(len(moved), 0.5), 0.5 + 0.5 * moved * _side(before)
    else:
        was, now = ((t["chosen"] > t["rejected"]).cast(float).to_numpy() for t in (before, after))
    clusters = before["cluster"].to_list()
    change = cluster_mean(now - was, clusters, RESAMPLES, seed)
    return {
        "measure": "moved" if "good" in before.columns else "preferred",
        "examples": before.height,
        "clusters": len(set(clusters)),
        "before": float(was.mean()),
        "after": float(now.mean()),
        "change": change.value,
        "low": change.low,
        "high": change.high,
    }


def sample_rows(
    held: pl.DataFrame,
    before: pl.DataFrame,
    after: pl.DataFrame,
    text: Callable[[Sequence[int]], str],
    count: int,
) -> list[dict[str, str | float]]:
    """At most `count` held-out rows for trackers, from those that went most their way to those
    that went least; log-probs in nats."""
    names = _answers(held)
    columns = [
        {"prompt": [text(ids) for ids in held["prompt_token_ids"]]},
        {name: [text(ids) for ids in held[f"{name}_token_ids"]] for name in names},
    ]
    if "good" in held.columns:
        columns.append({"label": ["good" if good else "bad" for good in held["good"]]})
    columns += [
        {f"margin {when}": _margin(t).tolist()}
        for when, t in (("before", before), ("after", after))
    ]
    table = pl.DataFrame({name: values for part in columns for name, values in part.items()})
    order = np.argsort(-(_margin(after) - _margin(before)), kind="stable")
    rows: list[dict[str, str | float]] = table[order[spread(len(order), count)]].to_dicts()
    return rows


def _answers(held: pl.DataFrame) -> tuple[str, ...]:
    return ("completion",) if "good" in held.columns else ("chosen", "rejected")


def _side(labels: pl.DataFrame) -> np.ndarray:
    return np.where(labels["good"].to_numpy(), 1.0, -1.0)


def _margin(logps: pl.DataFrame) -> np.ndarray:
    """What should grow: chosen less rejected, or a good answer's log-prob and a bad one's less."""
    if "good" in logps.columns:
        return np.asarray(logps["completion"].to_numpy() * _side(logps))
    return (logps["chosen"] - logps["rejected"]).to_numpy()
