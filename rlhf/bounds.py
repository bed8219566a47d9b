"""What calibration asks of each metric, and whether an interval meets it.

A bound is compared with the unfavourable end of the 95% interval: the lower one where at least
something is asked, the upper one where at most, the one further out where both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf.agreement import Metric
from rlhf.config_calibration import Thresholds
from rlhf.judged import Judged
from rlhf.measures import outside_unit

Purpose = Literal["any", "pairs", "floor"]


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a metric must lie, and for which use: any, to build pairs, or as a floor.

    >>> Bound("recall", 0.5, None, "floor").failing(Metric(0.6, 0.4, 0.8, n=40, detectable=0.3))
    'recall may be as low as 0.400 (0.600, 95% interval 0.400 to 0.800, n 40); at least 0.500 is \
needed'
    """

    metric: str
    least: float | None
    most: float | None
    purpose: Purpose
    why: str = ""
    """Where the bound itself was computed: from what."""

    def unfavourable(self, found: Metric) -> float:
        """The end of the interval that the bound is compared with."""
        if self.least is None:
            return found.high
        if self.most is None:
            return found.low
        middle = (self.least + self.most) / 2
        return max(found.low, found.high, key=lambda end: abs(end - middle))

    def holds(self, found: Metric) -> bool:
        """Whether the whole interval lies within."""
        enough = self.least is None or found.low >= self.least
        return enough and (self.most is None or found.high <= self.most)

    @property
    def asked(self) -> str:
        """As a person says it."""
        because = f", {self.why}" if self.why else ""
        if self.most is None:
            return f"at least {self.least:.3f}{because}"
        if self.least is None:
            return f"at most {self.most:.3f}{because}"
        if self.least == -self.most:
            return f"at most {self.most:.3f} either way{because}"
        return f"{self.least:.3f} to {self.most:.3f}{because}"

    def failing(self, found: Metric | None) -> str | None:
        """Why the metric (None where it can't be measured) does not meet it, if it doesn't."""
        if found is None:
            return f"{self.metric} can't be measured on these items; {self._needed}"
        if self.holds(found):
            return None
        end, how = self.unfavourable(found), ""
        if self.least is None or self.most is None:
            how = "as high as " if self.least is None else "as low as "
        sign = "+" if self.least is not None and self.least == -(self.most or 0.0) else ""
        return f"{self.metric} may be {how}{end:{sign}.3f} ({said(found)}); {self._needed}"

    @property
    def _needed(self) -> str:
        asked, _, because = self.asked.partition(", ")
        return f"{asked} is needed" + (f", {because}" if because else "")


def said(found: Metric) -> str:
    """A value with its interval and size."""
    return f"{found.value:.3f}, 95% interval {found.low:.3f} to {found.high:.3f}, n {found.n}"


def bounds(
    forms: Sequence[Judged],
    metrics: Mapping[str, Metric],
    floor: float | None,
    thresholds: Thresholds,
) -> list[Bound]:
    """What is asked of these verdicts (on answers, on pairs, or first the one and then the other):
    for any use, to build pairs, and as a floor where they can hold one."""
    judged, pairs = forms[0], forms[-1]
    found = list(_for_any(judged, metrics, thresholds))
    if "within_prompt_accuracy" in metrics or pairs.pairwise:
        least = thresholds.within_prompt_accuracy
        found.append(Bound("within_prompt_accuracy", least, None, "pairs"))
    if floor is not None and not judged.pairwise and not outside_unit(judged):
        found.append(Bound("precision", thresholds.precision, None, "floor"))
        found.append(Bound("recall", thresholds.recall, None, "floor"))
    return found


def _for_any(
    judged: Judged, metrics: Mapping[str, Metric], thresholds: Thresholds
) -> Iterator[Bound]:
    for name, least in sorted(thresholds.agreement.items()):
        yield Bound(name, least, None, "any")
    if "order_consistency" in metrics:
        yield Bound("order_consistency", thresholds.order_consistency, None, "any")
    if "first_position_rate" in metrics:
        shift = thresholds.first_position_shift
        yield Bound("first_position_rate", 0.5 - shift, 0.5 + shift, "any")
    if "retest_sd" in metrics:
        share, spread = thresholds.retest_share, float(np.nanstd(judged.runs))
        why = f"{share:g} of the scores' own standard deviation of {spread:.3f}"
        yield Bound("retest_sd", None, share * spread, "any", why)
    if "length_bias" in metrics:
        yield Bound("length_bias", -thresholds.length_bias, thresholds.length_bias, "any")
