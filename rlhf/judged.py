"""One judge's verdicts on one dimension beside the gold labels, as arrays over items.

Here it is decided what an item's verdict is when it was asked for more than once: both orders of a
pair that disagree are a tie, an abstention among them is an abstention, runs are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf.agreement import majority
from rlhf.judgements import Gold, Verdict
from rlhf.ranks import Codes
from rlhf.statistics import Floats

Repeats = Literal["mean", "first"]
# Runs of an item: verdicts by the order they were asked in, None being a judge's own only order.
_Runs = Mapping[str | None, Mapping[str | None, float | None]]


@dataclass(frozen=True, slots=True)
class Judged:
    """N items that have both a verdict and a gold label; NaN is an abstention or nothing known."""

    judge: str
    dimension: str
    pairwise: bool
    values: Floats
    """Each item's verdict (shape [N]): a score, or +1, 0, -1 for a pair."""
    labels: Floats
    """Gold by annotator (shape [N, A]), in the form of `values`."""
    clusters: Codes
    """Items of one prompt share a code; an item without prompt_id has its own (shape [N])."""
    prompted: Codes
    """Places of the items whose prompt is known."""
    lengths: Floats
    """Length of the answer, or how much longer `a` is (shape [N])."""
    runs: Floats
    """Scores by run (shape [N, R]); of pairs, verdicts by run."""
    swapped: Floats
    """Verdicts of each item and run that was asked in both orders: ab, ba (shape [M, 2])."""
    swapped_items: Codes
    """The item of each row of `swapped` (shape [M])."""
    votes: int
    """Runs behind an item's verdict."""
    without_gold: int
    """Items with a verdict and no gold label."""
    without_verdict: int
    """Items with a gold label and no verdict."""

    @property
    def gold(self) -> Floats:
        """Gold by item (shape [N]): the majority's verdict on a pair, the mean of scores."""
        return majority(self.labels) if self.pairwise else _mean(self.labels)


def collect(verdicts: Sequence[Verdict], gold: Sequence[Gold], repeats: Repeats) -> list[Judged]:
    """Verdicts by judge, dimension and form, in the order in which these first occur."""
    labels: dict[tuple[str, bool], dict[str, dict[str | None, float]]] = {}
    for label in gold:
        items = labels.setdefault((label.dimension, label.pairwise), {})
        items.setdefault(label.item_id, {})[label.annotator] = label.value
    grouped: dict[tuple[str, str, bool], list[Verdict]] = {}
    for verdict in verdicts:
        form = (verdict.judge, verdict.dimension, verdict.pairwise)
        grouped.setdefault(form, []).append(verdict)
    prompts = {v.item_id: v.prompt_id for v in verdicts if v.prompt_id is not None}
    # An answer and a pair may have one name, each on a dimension of its own.
    lengths = {
        kind: {v.item_id: v.length for v in verdicts if v.pairwise == kind and v.length is not None}
        for kind in (False, True)
    }
    return [
        _judged(group, labels.get((dimension, pairwise), {}), prompts, lengths[pairwise], repeats)
        for (_, dimension, pairwise), group in grouped.items()
    ]


def _judged(
    verdicts: Sequence[Verdict],
    labels: Mapping[str, Mapping[str | None, float]],
    prompts: Mapping[str, str],
    lengths: Mapping[str, float],
    repeats: Repeats,
) -> Judged:
    asked: dict[str, dict[str | None, dict[str | None, float | None]]] = {}
    for verdict in verdicts:
        runs = asked.setdefault(verdict.item_id, {})
        runs.setdefault(verdict.run, {})[verdict.order] = verdict.value
    first, items = verdicts[0], [item for item in asked if item in labels]
    by_run = [_run_values(asked[item]) for item in items]
    swapped = [
        (place, run["ab"], run["ba"])
        for place, item in enumerate(items)
        for run in asked[item].values()
        if "ab" in run and "ba" in run
    ]
    annotators = list(dict.fromkeys(a for item in items for a in labels[item]))
    values = [_combined(runs, first.pairwise, repeats) for runs in by_run]
    keys = [(item in prompts, prompts.get(item, item)) for item in items]
    codes: dict[tuple[bool, str], int] = {}
    return Judged(
        judge=first.judge,
        dimension=first.dimension,
        pairwise=first.pairwise,
        values=np.array(values, dtype=np.float64),
        labels=_matrix([[labels[item].get(a) for a in annotators] for item in items]),
        clusters=np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64),
        prompted=np.flatnonzero([known for known, _ in keys]),
        lengths=_matrix([[lengths.get(item)] for item in items])[:, 0],
        runs=_matrix(by_run),
        swapped=_matrix([[ab, ba] for _, ab, ba in swapped], width=2),
        swapped_items=np.array([place for place, _, _ in swapped], dtype=np.int64),
        votes=1 if repeats == "first" else max(map(len, by_run), default=1),
        without_gold=len(asked) - len(items),
        without_verdict=len(labels) - len(items),
    )


def _run_values(runs: _Runs) -> list[float]:
    """An item's verdict in each run, NaN for an abstention in either order."""
    found = []
    for orders in runs.values():
        said = [math.nan if value is None else value for value in orders.values()]
        agreed = len(set(said)) == 1 or any(map(math.isnan, said))
        found.append(sum(said) / len(said) if agreed else 0.0)
    return found


def _combined(runs: Sequence[float], pairwise: bool, repeats: Repeats) -> float:
    """One verdict of several runs; runs that abstain don't vote."""
    if repeats == "first":
        return runs[0]
    said = np.array([[value for value in runs if not math.isnan(value)]])
    if not said.size:
        return math.nan
    found = float((majority(said) if pairwise else _mean(said))[0])
    # No majority for either answer of a pair: the runs disagree as two orders may.
    return 0.0 if math.isnan(found) else found


def _mean(values: Floats) -> Floats:
    """Mean of each row's known values (shape [N, R] -> [N]).

    Means of several are rounded at the twelfth digit: what is a tie must not hang on the order in
    which they are added.
    """
    number = (~np.isnan(values)).sum(axis=1)
    means = np.nansum(values, axis=1) / number
    return np.where(number > 1, np.round(means, 12), means)


def _matrix(rows: Sequence[Sequence[float | None]], width: int = 1) -> Floats:
    """Rows as one matrix, NaN where a value is None or a row is short."""
    matrix = np.full((len(rows), max(map(len, rows), default=width)), math.nan)
    for place, row in enumerate(rows):
        matrix[place, : len(row)] = [math.nan if value is None else value for value in row]
    return matrix
