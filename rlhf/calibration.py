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
from rlhf.bounds import Bound, bounds, said
from rlhf.config import RunConfig
from rlhf.config_calibration import Calibration
from rlhf.judged import Judged, collect
from rlhf.judgements import Gold, Verdict
from rlhf.measures import is_ordinal, measure, outside_unit

Decision = Literal["granted", "refused"]
Metrics = dict[str, Metric]

LEFT_OUT: Mapping[str, str] = {
    "no_gold": "with a verdict but no gold label",
    "no_verdict": "with a gold label but no verdict",
    "abstained": "abstentions (wrong where shares are counted)",
    "no_majority": "without a majority",
}
"""Why an item does not count, in words."""


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
    bounds: tuple[Bound, ...]
    """What was asked of which metric."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready; ends that the data can't bound are infinite until written."""
        return asdict(self) | {"reasons": list(self.reasons), "bounds": [*map(asdict, self.bounds)]}


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
    return [
        finding_of(forms, use(forms[0].dimension), settings)
        for forms in compared(collect(verdicts, gold, settings.repeats))
    ]


def compared(judged: Sequence[Judged]) -> list[list[Judged]]:
    """By judge and dimension, in their order: answers before pairs, of the forms that have gold;
    one of them where none has."""
    by_judge: dict[tuple[str, str], list[Judged]] = {}
    for found in sorted(judged, key=lambda judged: judged.pairwise):
        by_judge.setdefault((found.judge, found.dimension), []).append(found)
    order = dict.fromkeys((found.judge, found.dimension) for found in judged)
    return [[j for j in by_judge[key] if len(j.values)] or by_judge[key][:1] for key in order]


def finding_of(forms: Sequence[Judged], use: Use, settings: Calibration) -> Finding:
    """What one judge's verdicts on one dimension are worth for this use.

    `forms` are its verdicts on answers, on pairs, or first the one and then the other.
    """
    metrics: Metrics = {}
    for judged in forms:
        metrics |= measure(judged, use.floor, settings.bootstrap)
    asked = bounds(forms, metrics, use.floor, settings.thresholds)
    reasons = decide(forms, metrics, asked, use.floor)
    purposes: dict[str, Decision] = {
        purpose: "refused" if reasons["any"] or reasons[purpose] else "granted"
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
        reasons=tuple(reasons["any"] + [reason for p in used for reason in reasons[p]]),
        purposes=purposes,
        floor=use.floor,
        votes=max(judged.votes for judged in forms),
        left_out=left_out,
        bounds=tuple(asked),
    )


def decide(
    forms: Sequence[Judged], metrics: Metrics, asked: Sequence[Bound], floor: float | None
) -> dict[str, list[str]]:
    """Why not: reasons against `any` use, against `pairs` and against the `floor`."""
    found: dict[str, list[str]] = {"any": [], "pairs": [], "floor": []}
    if not len(forms[0].values):
        found["any"].append("no item has both a verdict and a gold label")
        return found
    prefixes = {"any": "", "pairs": "pairs: ", "floor": f"floor {floor or 0:g}: "}
    for bound in asked:
        if reason := bound.failing(metrics.get(bound.metric)):
            found[bound.purpose].append(prefixes[bound.purpose] + reason)
    if not any(bound.purpose == "pairs" for bound in asked):
        found["pairs"].append(
            "pairs: within_prompt_accuracy can't be measured: no prompt_id has two items whose "
            "gold labels differ"
        )
    if floor is not None:
        found["floor"] += [prefixes["floor"] + why for why in _no_floor(forms[0], metrics, floor)]
    return found


def _no_floor(judged: Judged, metrics: Metrics, floor: float) -> Iterator[str]:
    """What no bound on a metric says."""
    if judged.pairwise:
        yield "verdicts on pairs don't say which answers pass a floor"
        return
    if outside := outside_unit(judged):
        yield f"a floor is a score in [0, 1], but {outside}"
        return
    precision, passing = metrics.get("precision"), float((judged.gold >= floor).mean())
    if precision is not None and not precision.low > passing:
        yield (
            f"precision may be as low as {precision.low:.3f} ({said(precision)}), no better than "
            f"letting every answer pass, which gives {passing:.3f}"
        )
