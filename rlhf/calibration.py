"""Whether a judge's agreement with gold labels earns it a certificate, per dimension and use.

`calibrate` measures and decides. What is measured, and when, `rlhf.measures` says; what is asked
for, `rlhf.config.Thresholds`; a bound is always compared with the unfavourable end of the interval.
A judge is certified for what its dimension is used for: to build pairs it must order two answers to
one prompt, to be a floor its scores must mean at that floor what gold means.

Gold on answers can decide both. Gold on pairs says nothing of a floor, but people compare more
surely than they grade; where there is gold of both forms, that on pairs decides about pairs and
that on answers about the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rlhf.agreement import Metric, majority
from rlhf.config import RunConfig
from rlhf.config_calibration import Calibration, Thresholds
from rlhf.judged import Judged, collect
from rlhf.judgements import Gold, Verdict
from rlhf.measures import is_ordinal, measure, outside_unit

Decision = Literal["granted", "refused"]
Metrics = dict[str, Metric]


@dataclass(frozen=True, slots=True)
class Use:
    """What a run uses a dimension for: to build pairs, as a floor on chosen answers, or both."""

    pairs: bool = True
    floor: float | None = None

    @classmethod
    def of(cls, config: RunConfig, dimension: str) -> Use:
        """Rewards and protection compare answers; what is used for nothing would build pairs."""
        floor = config.floors.get(dimension)
        compares = dimension in config.weights or dimension in config.protected
        return cls(pairs=compares or floor is None, floor=floor)


@dataclass(frozen=True, slots=True)
class Finding:
    """What calibration found for one judge and dimension; `as_json` is its public form."""

    judge: str
    dimension: str
    n: int
    """Items, answers and pairs together."""
    metrics: Metrics
    verdict: Decision
    reasons: tuple[str, ...]
    purposes: Mapping[str, Decision]
    """The verdict by use: `pairs`, and `floor` where there is one."""
    floor: float | None
    votes: int
    """Runs whose mean (or majority) the figures are about."""
    left_out: Mapping[str, int]
    """Items that did not count, by reason."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready; ends that the data can't bound are infinite until written."""
        return asdict(self) | {"reasons": list(self.reasons)}


def calibrate(
    verdicts: Sequence[Verdict],
    gold: Sequence[Gold],
    settings: Calibration,
    use: Callable[[str], Use],
) -> list[Finding]:
    """A finding for every judge and dimension with verdicts, in the order of the verdicts.

    `use` says what a dimension is for. A metric that verdicts on pairs and on answers both have is
    that on pairs. The same arguments always give the same findings.
    """
    by_judge: dict[tuple[str, str], list[Judged]] = {}
    for judged in collect(verdicts, gold, settings.repeats):
        by_judge.setdefault((judged.judge, judged.dimension), []).append(judged)
    return [
        _finding(_compared(forms), use(dimension), settings)
        for (_, dimension), forms in by_judge.items()
    ]


def _compared(forms: Sequence[Judged]) -> list[Judged]:
    """Answers before pairs, of the forms that have gold; one of them where none has."""
    found = sorted(forms, key=lambda judged: judged.pairwise)
    return [judged for judged in found if len(judged.values)] or found[:1]


def _finding(forms: Sequence[Judged], use: Use, settings: Calibration) -> Finding:
    metrics: Metrics = {}
    for judged in forms:
        metrics |= measure(judged, use.floor, settings.bootstrap)
    reasons = decide(forms, metrics, use, settings.thresholds)
    purposes: dict[str, Decision] = {
        purpose: "refused" if reasons["both"] or reasons[purpose] else "granted"
        for purpose in ("pairs", "floor")
        if purpose == "pairs" or use.floor is not None
    }
    used = [p for p in purposes if p == "floor" or use.pairs]
    left_out = {
        "no_gold": sum(judged.without_gold for judged in forms),
        "no_verdict": sum(judged.without_verdict for judged in forms),
        "abstained": sum(int(np.isnan(judged.values).sum()) for judged in forms),
    }
    voted = [judged.labels for judged in forms if judged.pairwise or is_ordinal(judged.labels)]
    if voted:
        left_out["no_majority"] = sum(int(np.isnan(majority(labels)).sum()) for labels in voted)
    return Finding(
        judge=forms[0].judge,
        dimension=forms[0].dimension,
        n=sum(len(judged.values) for judged in forms),
        metrics=metrics,
        verdict="granted" if all(purposes[p] == "granted" for p in used) else "refused",
        reasons=tuple(reasons["both"] + [reason for p in used for reason in reasons[p]]),
        purposes=purposes,
        floor=use.floor,
        votes=max(judged.votes for judged in forms),
        left_out=left_out,
    )


def decide(
    forms: Sequence[Judged], metrics: Metrics, use: Use, thresholds: Thresholds
) -> dict[str, list[str]]:
    """Why not: reasons against any use (`both`), against `pairs` and against the `floor`.

    `forms` are one judge's verdicts on answers, on pairs, or first the one and then the other.
    """
    answers, pairs = forms[0], forms[-1]
    if not len(answers.values):
        nothing = "no item has both a verdict and a gold label"
        return {"both": [nothing], "pairs": [], "floor": []}
    return {
        "both": list(_against_any(answers, metrics, thresholds)),
        "pairs": list(_against_pairs(pairs, metrics, thresholds)),
        "floor": list(_against_floor(answers, metrics, use.floor, thresholds)),
    }


def _against_any(judged: Judged, metrics: Metrics, thresholds: Thresholds) -> Iterator[str]:
    for name, least in sorted(thresholds.agreement.items()):
        yield from _too_low(metrics, name, least)
    if "order_consistency" in metrics:
        yield from _too_low(metrics, "order_consistency", thresholds.order_consistency)
    first = metrics.get("first_position_rate")
    shift = thresholds.first_position_shift
    if first is not None and not (0.5 - shift <= first.low and first.high <= 0.5 + shift):
        yield (
            f"first_position_rate may be {_far(first, 0.5):.3f} ({_interval(first)}); "
            f"{0.5 - shift:.3f} to {0.5 + shift:.3f} is needed"
        )
    retest = metrics.get("retest_sd")
    if retest is not None:
        spread = float(np.nanstd(judged.runs))
        most = thresholds.retest_share * spread
        if not retest.high <= most:
            yield (
                f"retest_sd may be as high as {retest.high:.3f} ({_interval(retest)}); at most "
                f"{most:.3f} is needed, {thresholds.retest_share:g} of the scores' own standard "
                f"deviation of {spread:.3f}"
            )
    length = metrics.get("length_bias")
    if length is not None and not abs(_far(length, 0.0)) <= thresholds.length_bias:
        yield (
            f"length_bias may be {_far(length, 0.0):+.3f} ({_interval(length)}); at most "
            f"{thresholds.length_bias:.3f} either way is needed"
        )


def _against_pairs(judged: Judged, metrics: Metrics, thresholds: Thresholds) -> Iterator[str]:
    name = "within_prompt_accuracy"
    if name in metrics or judged.pairwise:
        found = _too_low(metrics, name, thresholds.within_prompt_accuracy)
        yield from (f"pairs: {reason}" for reason in found)
    else:
        yield (
            f"pairs: {name} can't be measured: no prompt_id has two items whose gold labels differ"
        )


def _against_floor(
    judged: Judged, metrics: Metrics, floor: float | None, thresholds: Thresholds
) -> Iterator[str]:
    if floor is None:
        return
    at = f"floor {floor:g}"
    if judged.pairwise:
        yield f"{at}: verdicts on pairs don't say which answers pass a floor"
        return
    if outside := outside_unit(judged):
        yield f"{at}: a floor is a score in [0, 1], but {outside}"
        return
    for name, least in (("precision", thresholds.precision), ("recall", thresholds.recall)):
        yield from (f"{at}: {reason}" for reason in _too_low(metrics, name, least))
    precision, passing = metrics.get("precision"), float((judged.gold >= floor).mean())
    if precision is not None and not precision.low > passing:
        yield (
            f"{at}: precision may be as low as {precision.low:.3f} ({_interval(precision)}), no "
            f"better than letting every answer pass, which gives {passing:.3f}"
        )


def _too_low(metrics: Metrics, name: str, least: float) -> Iterator[str]:
    metric = metrics.get(name)
    if metric is None:
        yield f"{name} can't be measured on these items; at least {least:.3f} is needed"
    elif not metric.low >= least:
        yield (
            f"{name} may be as low as {metric.low:.3f} ({_interval(metric)}); at least "
            f"{least:.3f} is needed"
        )


def _far(metric: Metric, middle: float) -> float:
    """The end of the interval that lies further from `middle`."""
    return max(metric.low, metric.high, key=lambda end: abs(end - middle))


def _interval(metric: Metric) -> str:
    return f"{metric.value:.3f}, 95% interval {metric.low:.3f} to {metric.high:.3f}, n {metric.n}"
