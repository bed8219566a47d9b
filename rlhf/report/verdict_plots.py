"""One judge's verdicts on one dimension as a reader sees them: against gold, within prompts, run
against run, and order against order. What does not apply is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from rlhf.calibration import Finding
from rlhf.judged import Judged
from rlhf.ranks import Codes
from rlhf.report.calibration_charts import POINTS, Points, scatter
from rlhf.report.crosstabs import WINNER_NAMES, Heat, Sides, few_values, heat
from rlhf.report.tables import Table, table
from rlhf.statistics import Floats, cluster_mean
from rlhf.verdict import number

_FIFTHS = (0.2, 0.4, 0.6, 0.8)
_RESAMPLES = 500
_ORDERED = {1.0: "as gold", 0.0: "equal", -1.0: "reversed"}


@dataclass(frozen=True, slots=True)
class Exhibit:
    """What is shown of one question: a plot with its numbers, or counts that are both."""

    title: str
    lead: str
    svg: Markup | None = None
    heat: Heat | None = None
    numbers: Table | None = None


class _Drawn(NamedTuple):
    """Points as they are drawn, and what was done to them, in words."""

    x: Floats
    y: Floats
    note: str


def exhibits(finding: Finding, judged: Judged) -> list[Exhibit]:
    """All that apply, the first question first."""
    about = f"{finding.judge} on {finding.dimension}"
    found = (
        against_gold(judged, finding.floor, about),
        within_prompts(judged, about),
        run_against_run(judged, about),
        order_flips(judged),
    )
    return [exhibit for exhibit in found if exhibit is not None]


def against_gold(judged: Judged, floor: float | None, about: str) -> Exhibit | None:
    """Verdicts by what gold says of the same item."""
    title = "Verdict against gold" if judged.pairwise else "Score against gold"
    values, gold = judged.values, judged.gold
    if not len(values):
        return None
    if judged.pairwise:
        lead = (
            "Rows are gold (the annotators' majority), columns the judge; a share is of its row. "
            "Framed is what agrees; “none” is an abstention, or gold without a majority."
        )
        sides = Sides(title, "", "gold", "judge")
        return Exhibit(title, lead, heat=heat(sides, gold, values, WINNER_NAMES))
    if few_values(values, gold):
        lead = (
            "Rows are gold, columns the judge; a share is of its row. Framed is what agrees; "
            "“none” is an abstention."
        )
        sides = Sides(title, "", "gold", "judge")
        return Exhibit(title, lead, heat=heat(sides, gold, values))
    known = ~np.isnan(values) & ~np.isnan(gold)
    if not known.any():
        return None
    groups = _fifths(values[known])
    rows, middles = [], []
    for group in np.unique(groups):
        picked = np.flatnonzero(known)[groups == group]
        codes = [str(code) for code in judged.clusters[picked]]
        mean = cluster_mean(gold[picked], codes, _RESAMPLES, 0)
        middles.append((mean.value, float(values[picked].mean())))
        rows.append(
            {
                "scores": f"{values[picked].min():.3f} to {values[picked].max():.3f}",
                "items": str(len(picked)),
                "mean score": number(middles[-1][1]),
                "mean gold": number(mean.value),
                "95% interval of gold": _ends(mean.low, mean.high),
            }
        )
    drawn = _sampled(gold[known], values[known], jitter=True)
    floor = floor if floor is not None and 0 <= values[known].min() <= values[known].max() <= 1 \
        else None  # fmt: skip
    points = Points(drawn.x, drawn.y, "gold", "score", middles, floor)
    lead = (
        f"{drawn.note} ◆ are fifths of the items by score: their mean score and mean gold; a line "
        "that rises steeply tells answers apart."
    )
    if floor is not None:
        lead += (
            f" Dashed: the floor of {floor:g}. Upper left is what the floor lets pass and gold "
            "would not, lower right what it costs."
        )
    label = f"{about}: score against gold"
    return Exhibit(
        title, lead, scatter(points, label), numbers=table("Fifths of the items by score", rows)
    )


def within_prompts(judged: Judged, about: str) -> Exhibit | None:
    """Whether the judge orders the answers to one prompt as gold does: what selection asks."""
    if judged.pairwise:
        return None
    by_gold, by_judge = _within(judged)
    if not len(by_gold):
        return None
    title = "Within prompts"
    if few_values(by_gold):
        lead = (
            "Every two answers to one prompt that gold tells apart: by how far (rows), and how the "
            "judge orders them (columns); a share is of its row."
        )
        sides = Sides(title, "", "gold apart by", "judge", comparable=False)
        signs = np.sign(by_judge)
        return Exhibit(title, lead, heat=heat(sides, by_gold, signs, None, _ORDERED))
    counts = {
        "ordered as gold does": by_judge > 0,
        "equal scores": by_judge == 0,
        "the other way round": by_judge < 0,
        "no score": np.isnan(by_judge),
    }
    rows = [
        {"two answers to one prompt": name, "pairs": f"{int(hit.sum()):,}",
         "share": f"{hit.mean():.1%}", "mean difference in gold":
         number(float(by_gold[hit].mean())) if hit.any() else ""}
        for name, hit in counts.items()
    ]  # fmt: skip
    known = ~np.isnan(by_judge)
    numbers = table("Two answers to one prompt that gold tells apart", rows)
    if not known.any():
        return Exhibit(title, "The judge scored no two answers to one prompt.", numbers=numbers)
    drawn = _sampled(by_gold[known], by_judge[known], jitter=False)
    points = Points(drawn.x, drawn.y, "gold: better less worse", "score: the same two", (), None,
                    centred=True)  # fmt: skip
    lead = (
        f"Every two answers to one prompt that gold tells apart, the better one first. {drawn.note}"
        " Above the line the judge agrees; on it and below, a pair is lost or taught the wrong way "
        "round."
    )
    svg = scatter(points, f"{about}: differences within prompts, score against gold")
    return Exhibit(title, lead, svg, numbers=numbers)


def run_against_run(judged: Judged, about: str) -> Exhibit | None:
    """The same items asked again: every two runs of an item."""
    runs = judged.runs
    twos = list(combinations(range(runs.shape[1]), 2)) if len(runs) else []
    if not twos:
        return None
    one = np.concatenate([runs[:, i] for i, _ in twos])
    other = np.concatenate([runs[:, j] for _, j in twos])
    both = ~np.isnan(one) & ~np.isnan(other)
    one, other = one[both], other[both]
    if not len(one):
        return None
    gaps = np.abs(one - other)
    title = "Run against run"
    numbers = table(
        "Every two runs of one item",
        [
            {
                "runs": str(runs.shape[1]),
                "compared": f"{len(one):,}",
                "equal": f"{(gaps == 0).mean():.1%}",
                "mean difference": number(float(gaps.mean())),
                "largest": number(float(gaps.max())),
            }
        ],
    )
    lead = f"{(gaps == 0).mean():.0%} of {len(one):,} repeated verdicts are equal."
    if judged.pairwise or few_values(one, other):
        names = WINNER_NAMES if judged.pairwise else None
        lead += " Rows are the earlier run, columns the later; a share is of its row."
        sides = Sides(title, "", "earlier", "later")
        return Exhibit(title, lead, heat=heat(sides, one, other, names), numbers=numbers)
    drawn = _sampled(one, other, jitter=False)
    ends = float(min(one.min(), other.min())), float(max(one.max(), other.max()))
    diagonal = [(ends[0], ends[0]), (ends[1], ends[1])]
    points = Points(drawn.x, drawn.y, "score, earlier run", "later run", diagonal)
    lead += f" {drawn.note} On the line both runs say the same."
    return Exhibit(title, lead, scatter(points, f"{about}: run against run"), numbers=numbers)


def order_flips(judged: Judged) -> Exhibit | None:
    """Verdicts on the same pair with either answer shown first."""
    if not len(judged.swapped):
        return None
    ab, ba = judged.swapped.T
    counts = {
        "the same verdict both times": ab == ba,
        "whichever was shown first wins": (ab == 1) & (ba == -1),
        "whichever was shown last wins": (ab == -1) & (ba == 1),
        "a tie in one order only": (np.isnan(ab) == np.isnan(ba)) & (ab != ba) & (ab * ba == 0),
        "no verdict in one order or both": np.isnan(ab) | np.isnan(ba),
    }
    rows = [
        {"asked in both orders": name, "pairs": f"{int(hit.sum()):,}", "share": f"{hit.mean():.1%}"}
        for name, hit in counts.items()
    ]
    title = "Order flips"
    flips = int(counts["whichever was shown first wins"].sum()
                + counts["whichever was shown last wins"].sum())  # fmt: skip
    lead = (
        f"{flips:,} of {len(ab):,} verdicts ({flips / len(ab):.0%}) turn round with the order of "
        "the answers, and count as ties. Rows: the verdict with a shown first; columns: with b "
        "shown first; a share is of its row."
    )
    sides = Sides(title, "", "a first", "b first")
    return Exhibit(
        title,
        lead,
        heat=heat(sides, ab, ba, WINNER_NAMES),
        numbers=table("Verdicts on a pair asked in both orders", rows),
    )


def _within(judged: Judged) -> tuple[Floats, Floats]:
    """Differences of every two answers to one prompt that gold tells apart, the better first:
    gold's and the judge's (both shape [pairs])."""
    places = judged.prompted[np.argsort(judged.clusters[judged.prompted], kind="stable")]
    starts = np.unique(judged.clusters[places], return_index=True)[1]
    gold, values = judged.gold, judged.values
    by_gold, by_judge = [np.zeros(0)], [np.zeros(0)]
    for items in np.split(places, starts)[1:]:
        differs = gold[items, None] - gold[items]
        better = differs > 0
        by_gold.append(differs[better])
        by_judge.append((values[items, None] - values[items])[better])
    return np.concatenate(by_gold), np.concatenate(by_judge)


def _sampled(x: Floats, y: Floats, jitter: bool) -> _Drawn:
    """At most `POINTS` of the points, drawn by a fixed seed; values that recur are spread a
    little where `jitter`."""
    rng = np.random.default_rng(0)
    note = f"All {len(x):,} are drawn."
    if len(x) > POINTS:
        note = f"{POINTS:,} of {len(x):,} are drawn, taken at random."
        picked = np.sort(rng.choice(len(x), POINTS, replace=False))
        x, y = x[picked], y[picked]
    if jitter:
        spread = [few_values(values) for values in (x, y)]
        x, y = (_spread(v, rng) if s else v for v, s in zip((x, y), spread, strict=True))
        if any(spread):
            note += " Equal values are spread a little, so that they can be seen."
    return _Drawn(x, y, note)


def _spread(values: Floats, rng: np.random.Generator) -> Floats:
    steps = np.diff(np.unique(values))
    width = 0.25 * float(steps.min()) if len(steps) else 0.01
    moved: Floats = values + rng.uniform(-width, width, len(values))
    return moved


def _fifths(values: Floats) -> Codes:
    """Each value's fifth; equal values share one."""
    edges = np.unique(np.quantile(values, _FIFTHS))
    found: Codes = np.searchsorted(edges, values, side="left")
    return found


def _ends(low: float, high: float) -> str:
    known: Sequence[float | None] = [e if np.isfinite(e) else None for e in (low, high)]
    return f"{number(known[0])} to {number(known[1])}"
