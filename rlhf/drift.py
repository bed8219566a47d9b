"""What canaries show of a judge: how it answers when asked again, and whether it has drifted.

An answer's score is a_1, a_2 in the baseline's two askings and b_1, b_2 in this round's. With
independent noise and a true change d, the mean square of the four differences b_j - a_i is d^2 plus
the two noise variances, and half of (a_1 - a_2)^2 + (b_1 - b_2)^2 estimates the same variances, so

    d^2 = (mean b - mean a)^2 - ((a_1 - a_2)^2 + (b_1 - b_2)^2) / 4

without bias. The root of its mean over answers is `moved`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rlhf import agreement
from rlhf.agreement import Metric
from rlhf.canaries import ASKINGS, WatchedJudge
from rlhf.config import RunConfig
from rlhf.statistics import Floats, Interval, cluster_mean

_ANSWER = ["set", "prompt_id", "sample"]
_PAIR = [*_ANSWER, "other"]
_ASKED = [f"asking {i}" for i in range(ASKINGS)]
_SAME = 1e-6
_FEWEST = 6
"""Clusters below which no change is sure: as many coins fall alike once in 32 times."""

_SAID = {
    "moved": "scores of the same answers moved by {value:.3f}",
    "shift": "scores of the same answers shifted by {value:+.3f} on average",
    "abstained": "the share of answers without a score rose by {value:.3f}",
    "accuracy": "agreement with gold within prompts fell by {value:.3f}",
    "consistency": "the share of pairs judged alike in both orders fell by {value:.3f}",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What canaries are compared with; see `rlhf.config_judges.Canaries` and `Thresholds`."""

    max_drift: float
    retest_share: float
    within_prompt_accuracy: float
    order_consistency: float

    @classmethod
    def of(cls, config: RunConfig) -> Limits:
        """Those of a run."""
        certified = config.calibration.thresholds
        return cls(
            config.judges.canaries.max_drift,
            certified.retest_share,
            certified.within_prompt_accuracy,
            certified.order_consistency,
        )


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn."""

    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """One judge's verdicts on one dimension."""

    scores: pl.DataFrame
    """One row an answer: `_ANSWER`, cluster, a column an asking."""
    orders: pl.DataFrame
    """One row a pair and asking that has a verdict in both orders: `_PAIR`, cluster, ab, ba."""
    ordered: pl.DataFrame
    """One row a pair of answers that gold orders: `_PAIR`, cluster, `right` (the share of askings
    that order it so; equal scores and abstentions do not)."""

    @property
    def runs(self) -> Floats:
        """Scores, shape [N, ASKINGS]; NaN where it abstains."""
        return _runs(self.scores, _ASKED)

    @property
    def consistent(self) -> pl.DataFrame:
        """Per pair, the share of askings with one verdict in both orders."""
        return self.orders.group_by(*_PAIR, "cluster", maintain_order=True).agg(
            share=(pl.col("ab") == pl.col("ba")).mean()
        )


def examine(
    now: pl.DataFrame,
    baseline: pl.DataFrame | None,
    gold: pl.DataFrame,
    judges: Sequence[WatchedJudge],
    limits: Limits,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """`judges`, `stops` and `warnings` of `canaries.json`, from verdicts (schema `VERDICTS`).

    `gold` has prompt_id, sample, dimension, gold. `baseline` are the first round's verdicts, None
    in that round itself. Drift of a judge that trains is a stop. So is a figure surely beyond what
    a certificate needs, where the judge has one; without, nobody claimed it.
    """
    entries: list[dict[str, Any]] = []
    stops: list[str] = []
    warnings: list[str] = []
    for judge in judges:
        found = _asked(judge, now, gold)
        before = None if baseline is None else _asked(judge, baseline, gold)
        figures = _figures(found, bootstrap.resamples)
        runs = found.runs
        spread = None if np.isnan(runs).all() else float(np.nanstd(runs))
        drift: dict[str, Any] = {}
        if before is not None and not judge.fixed:
            drift = _drifts(before, found, limits.max_drift, bootstrap)
        entries.append(
            {
                "judge": judge.judge,
                "dimension": judge.dimension,
                "fixed": judge.fixed,
                "trains": judge.trains,
                "certified": judge.certified,
                "figures": {name: asdict(figure) for name, figure in figures.items()},
                "score_sd": spread,
                "drift": drift,
            }
        )
        name = f"judge {judge.judge} on {judge.dimension}"
        changed = _changed(found, before) if judge.fixed else _drifted(drift)
        (stops if judge.trains else warnings).extend(f"{name}: {text}" for text in changed)
        beyond = () if judge.fixed else _beyond(figures, spread, limits)
        stop = judge.trains and judge.certified
        (stops if stop else warnings).extend(f"{name}: {text}" for text in beyond)
    return {"judges": entries, "stops": stops, "warnings": warnings}


def _asked(judge: WatchedJudge, verdicts: pl.DataFrame, gold: pl.DataFrame) -> _Asked:
    mine = verdicts.filter(judge=judge.judge, dimension=judge.dimension)
    scores = _spread(mine.filter(pl.col("other").is_null()), _ANSWER, "asking", range(ASKINGS))
    scores = scores.rename({str(i): name for i, name in enumerate(_ASKED)})
    compared = mine.filter(pl.col("other").is_not_null())
    orders = _spread(compared, [*_PAIR, "asking"], "order", ("ab", "ba"))
    labels = gold.filter(dimension=judge.dimension).select("prompt_id", "sample", "gold")
    return _Asked(
        scores,
        orders.drop_nulls(["ab", "ba"]),
        _ordered(scores.filter(set="gold").join(labels, on=["prompt_id", "sample"])),
    )


def _spread(
    table: pl.DataFrame, key: Sequence[str], by: str, names: Sequence[int | str]
) -> pl.DataFrame:
    """One row a key, sorted by it: cluster, and a column of values for each of `names`."""
    columns = [pl.col("value").filter(pl.col(by) == n).first().alias(str(n)) for n in names]
    return table.group_by(key).agg(pl.col("cluster").first(), *columns).sort(key)


def _ordered(labelled: pl.DataFrame) -> pl.DataFrame:
    values = pl.col("gold", *_ASKED)
    other = labelled.select(
        "set", "prompt_id", pl.col("sample").alias("other"), values.name.suffix(" other")
    )
    pairs = labelled.join(other, on=["set", "prompt_id"]).filter(
        pl.col("sample") < pl.col("other"), pl.col("gold") != pl.col("gold other")
    )
    better = (pl.col("gold") - pl.col("gold other")).sign()
    hits = [
        ((pl.col(name) - pl.col(f"{name} other")).sign() == better).fill_null(False)
        for name in _ASKED
    ]
    return pairs.select(*_PAIR, "cluster", right=pl.mean_horizontal(hits)).sort(_PAIR)


def _figures(found: _Asked, resamples: int) -> dict[str, Metric]:
    """What a round's askings show by themselves; what does not apply is absent."""
    runs, orders = found.runs, found.orders
    first = pl.concat(
        orders.select("cluster", lean=lean) for lean in (pl.col("ab"), -pl.col("ba"))
    ).filter(pl.col("lean") != 0)
    metrics = {
        "retest_sd": agreement.within_sd(runs, _codes(found.scores), resamples),
        "abstained": _share(found.scores, np.isnan(runs).mean(axis=1), resamples),
        "within_prompt_accuracy": _share(found.ordered, found.ordered["right"], resamples),
        "order_consistency": _share(orders, orders["ab"] == orders["ba"], resamples),
        "first_position_rate": _share(first, first["lean"] > 0, resamples),
    }
    return {name: metric for name, metric in metrics.items() if metric is not None}


def _drifts(before: _Asked, now: _Asked, limit: float, draw: Bootstrap) -> dict[str, Any]:
    """`drift` of `canaries.json`: what changed between two rounds, on what both were asked."""
    both = now.scores.join(before.scores, on=_ANSWER, suffix=" before")
    b, a = _runs(both, _ASKED), _runs(both, [f"{name} before" for name in _ASKED])
    changes = b.mean(axis=1) - a.mean(axis=1)
    noise = (np.ptp(a, axis=1) ** 2 + np.ptp(b, axis=1) ** 2) / 4
    missing = np.isnan(b).mean(axis=1) - np.isnan(a).mean(axis=1)
    falls = [
        _fell(before.ordered, now.ordered, "right"),
        _fell(before.consistent, now.consistent, "share"),
    ]
    measured: dict[str, tuple[pl.DataFrame, Floats]] = {
        "moved": (both, changes**2 - noise),
        "shift": (both, changes),
        "abstained": (both, missing),
        **dict(zip(("accuracy", "consistency"), falls, strict=True)),
    }
    found = {}
    for name, (table, values) in measured.items():
        known = ~np.isnan(values)
        if not known.any():
            continue
        clusters = table["cluster"].filter(pl.Series(known)).to_list()
        drift = cluster_mean(values[known], clusters, draw.resamples, draw.seed)
        if name == "moved":
            drift = Interval(*(math.sqrt(max(0.0, end)) for end in asdict(drift).values()))
        verdict = _verdict(drift, limit, either_way=name == "shift")
        if verdict == "drifted" and len(set(clusters)) < _FEWEST:
            verdict = "unclear"
        found[name] = {
            **asdict(drift), "n": int(known.sum()), "limit": limit, "verdict": verdict,
        }  # fmt: skip
    return found


def _fell(before: pl.DataFrame, now: pl.DataFrame, share: str) -> tuple[pl.DataFrame, Floats]:
    both = now.join(before.drop("cluster"), on=_PAIR, suffix=" before")
    return both, (both[f"{share} before"] - both[share]).to_numpy()


def _verdict(drift: Interval, limit: float, either_way: bool) -> str:
    near, far = drift.low, drift.high
    if either_way:
        near, far = max(drift.low, -drift.high), max(-drift.low, drift.high)
    if near > limit:
        return "drifted"
    return "holds" if far <= limit else "unclear"


def _drifted(drift: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, found in drift.items():
        if found["verdict"] == "drifted":
            yield (
                f"{_SAID[name].format(value=found['value'])} since the first round (95% interval "
                f"{found['low']:.3f} to {found['high']:.3f}; judges.canaries.max_drift is "
                f"{found['limit']:g})"
            )


def _changed(now: _Asked, before: _Asked | None) -> Iterator[str]:
    """Of what must say the same each time: a function that draws or counts, a file replaced."""
    apart = _apart(*now.runs.T)
    if apart.any():
        yield (
            f"asked twice about the same {len(apart)} answers, it scored {apart.sum()} of them "
            "differently, but what is a function or a file must say the same each time: its "
            "scores are taken as free of noise"
        )
    if before is None:
        return
    both = now.scores.join(before.scores, on=_ANSWER, suffix=" before")
    apart = _apart(*_runs(both, [_ASKED[0], f"{_ASKED[0]} before"]).T)
    if apart.any():
        yield (
            f"{apart.sum()} of {len(apart)} answers are scored otherwise than in the first round: "
            "it was changed while the run went on"
        )


def _apart(one: Floats, other: Floats) -> NDArray[np.bool_]:
    return ~np.isclose(one, other, rtol=0, atol=_SAME, equal_nan=True)


def _beyond(figures: Mapping[str, Metric], spread: float | None, limits: Limits) -> Iterator[str]:
    """Figures that are surely not what a certificate needs: both ends of the interval say so."""
    retest = figures.get("retest_sd")
    if retest is not None and spread is not None:
        most = limits.retest_share * spread
        if retest.low > most:
            yield (
                f"asked again, its scores vary by {retest.value:.3f} (95% interval "
                f"{retest.low:.3f} to {retest.high:.3f}); calibration.thresholds.retest_share "
                f"allows {most:.3f}, {limits.retest_share:g} of their own standard deviation"
            )
    for name, least in (
        ("within_prompt_accuracy", limits.within_prompt_accuracy),
        ("order_consistency", limits.order_consistency),
    ):
        figure = figures.get(name)
        if figure is not None and figure.high < least:
            yield (
                f"{name} is {figure.value:.3f} (95% interval {figure.low:.3f} to "
                f"{figure.high:.3f}); calibration.thresholds.{name} is {least:g}"
            )


def _runs(table: pl.DataFrame, columns: Sequence[str]) -> Floats:
    """Columns as an array, shape [N, columns]; NaN for null."""
    return table.select(pl.col(c).cast(pl.Float64).fill_null(math.nan) for c in columns).to_numpy()


def _codes(table: pl.DataFrame) -> Any:
    return table["cluster"].rank("dense").to_numpy().astype(np.int64)


def _share(table: pl.DataFrame, hits: Any, resamples: int) -> Metric | None:
    shares = np.asarray(hits, dtype=np.float64)
    return agreement.share(shares, np.ones(len(shares)), _codes(table), resamples, len(shares))
