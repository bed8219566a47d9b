"""Which metrics of agreement apply to one judge's verdicts on one dimension, and what they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rlhf import agreement
from rlhf.agreement import Metric, majority
from rlhf.judged import Judged
from rlhf.ranks import Codes
from rlhf.statistics import Floats

# A scale with more grades than 0 to 10 is a number rather than a category.
_MOST_GRADES = 11
_ROUNDING = 1e-6


def measure(judged: Judged, floor: float | None, resamples: int) -> dict[str, Metric]:
    """Every metric that applies, by name.

    Pairs: `accuracy` (share of items whose verdict is the majority's: a tie against a decided gold
    and an abstention are wrong) and `within_prompt_accuracy` (the same where gold is decided);
    `order_consistency` (share of pairs, asked and answered in both orders, with equal verdicts) and
    `first_position_rate` (among the decided verdicts on pairs asked in both orders, share for the
    answer shown first).

    Scores: `pearson`, `spearman`, `kendall` (tau-b) with the mean gold; `within_prompt_accuracy`
    (share of the pairs of items of one prompt whose gold differs that the scores order the same
    way; equal scores and abstentions do not); `precision`, `recall`, `f1` of "at least the floor"
    (an abstention does not pass), where all scores and labels lie in [0, 1] as floors do;
    `kappa_quadratic` where scores and labels are grades of one scale; `retest_sd` over runs.

    Categories (winners, grades): `kappa` with the majority; with several annotators also
    `human_kappa`, the mean over pairs of annotators, `human_vs_rest`, the mean over annotators of
    their kappa with the majority of the others, and `kappa_vs_rest`, the judge's mean kappa with
    those same majorities. Abstentions, and items without a majority, do not enter a kappa, nor do
    means of several runs, which are no grades.

    Both: `length_bias`, the partial Spearman correlation of verdict and length given gold.
    """
    if not len(judged.values):
        return {}
    found = _of_pairs(judged, resamples) if judged.pairwise else _of_scores(judged, resamples)
    found |= _of_categories(judged, resamples)
    if floor is not None and not judged.pairwise and not outside_unit(judged):
        found |= _at_floor(judged, floor, resamples)
    found["length_bias"] = agreement.partial_spearman(
        judged.values, judged.lengths, judged.gold, judged.clusters, resamples
    )
    return {name: metric for name, metric in found.items() if metric is not None}


def outside_unit(judged: Judged) -> str:
    """Which scores or labels lie outside [0, 1], where floors lie; empty if none does."""
    for what, values in (("scores", judged.values), ("gold labels", judged.labels)):
        known = values[~np.isnan(values)]
        if known.size and (known.min() < 0 or known.max() > 1):
            return f"{what} run from {known.min():g} to {known.max():g}"
    return ""


def is_ordinal(values: Floats) -> bool:
    """Whether these are grades: at most eleven places of one evenly spaced scale."""
    grades = np.unique(values[~np.isnan(values)])
    steps = np.diff(grades)
    if not len(steps):
        return len(grades) == 1
    if len(grades) > _MOST_GRADES or steps.min() < _ROUNDING:
        return False
    places = (grades - grades[0]) / steps.min()
    even = np.abs(places - np.round(places)).max() < _ROUNDING
    return bool(even and math.ceil(places[-1] - _ROUNDING) < _MOST_GRADES)


def _of_pairs(judged: Judged, resamples: int) -> dict[str, Metric | None]:
    gold, clusters = judged.gold, judged.clusters
    right, settled = judged.values == gold, ~np.isnan(gold)
    decided = settled & (gold != 0)
    ab, ba = judged.swapped.T
    both = ~np.isnan(ab) & ~np.isnan(ba)
    asked = clusters[judged.swapped_items]
    first = np.concatenate([ab, -ba])
    chosen = ~np.isnan(first) & (first != 0)
    return {
        "accuracy": _share(right[settled], clusters[settled], resamples),
        "within_prompt_accuracy": _share(right[decided], clusters[decided], resamples),
        "order_consistency": _share((ab == ba)[both], asked[both], resamples),
        "first_position_rate": _share(
            first[chosen] > 0, np.concatenate([asked, asked])[chosen], resamples
        ),
    }


def _of_scores(judged: Judged, resamples: int) -> dict[str, Metric | None]:
    values, gold, clusters = judged.values, judged.gold, judged.clusters
    right, pairs, prompts = _ordered_pairs(judged)
    return {
        "within_prompt_accuracy": agreement.share(
            right, pairs, prompts, resamples, int(pairs.sum())
        ),
        "pearson": agreement.pearson(values, gold, clusters, resamples),
        "spearman": agreement.spearman(values, gold, clusters, resamples),
        "kendall": agreement.kendall(values, gold, clusters, resamples),
        "retest_sd": agreement.within_sd(judged.runs, clusters, resamples),
    }


def _ordered_pairs(judged: Judged) -> tuple[Floats, Floats, Codes]:
    """By prompt: pairs of its items that the scores order as gold does, pairs that gold orders."""
    by_prompt = judged.prompted[np.argsort(judged.clusters[judged.prompted], kind="stable")]
    prompts, starts = np.unique(judged.clusters[by_prompt], return_index=True)
    right, pairs = np.zeros(len(prompts)), np.zeros(len(prompts))
    gold = judged.gold
    for place, items in enumerate(np.split(by_prompt, starts)[1:]):
        by_gold = np.sign(gold[items, None] - gold[items])
        by_judge = np.sign(judged.values[items, None] - judged.values[items])
        # Each pair stands twice, once in each direction.
        right[place] = ((by_gold == by_judge) & (by_gold != 0)).sum() / 2
        pairs[place] = (by_gold != 0).sum() / 2
    return right, pairs, prompts


def _of_categories(judged: Judged, resamples: int) -> dict[str, Metric | None]:
    values, labels, clusters = judged.values, judged.labels, judged.clusters
    if not judged.pairwise and not is_ordinal(labels):
        return {}
    annotators = labels.T
    rest = [majority(np.delete(labels, place, axis=1)) for place in range(len(annotators))]
    found: dict[str, Metric | None] = {}
    # The mean of several runs is no grade.
    graded = judged.votes == 1 and is_ordinal(np.column_stack([labels, values]))
    comparable = judged.pairwise or graded
    if comparable:
        gold = majority(labels)
        found["kappa"] = agreement.kappa([(values, gold)], clusters, resamples)
        if not judged.pairwise:
            found["kappa_quadratic"] = agreement.kappa_quadratic(values, gold, clusters, resamples)
    if len(annotators) < 2:
        return found
    twos = [(a, b) for place, a in enumerate(annotators) for b in annotators[place + 1 :]]
    found["human_kappa"] = agreement.kappa(twos, clusters, resamples)
    each = list(zip(annotators, rest, strict=True))
    found["human_vs_rest"] = agreement.kappa(each, clusters, resamples)
    if comparable:
        against = [(values, others) for others in rest]
        found["kappa_vs_rest"] = agreement.kappa(against, clusters, resamples)
    return found


def _at_floor(judged: Judged, floor: float, resamples: int) -> dict[str, Metric | None]:
    passed, good = judged.values >= floor, judged.gold >= floor
    hits, clusters = passed & good, judged.clusters
    # 2 precision recall / (precision + recall) = 2 hits / (passed + good), again a share of sums.
    either = passed | good
    return {
        "precision": _share(hits[passed], clusters[passed], resamples),
        "recall": _share(hits[good], clusters[good], resamples),
        "f1": agreement.share(
            2.0 * hits[either],
            (1.0 * passed + good)[either],
            clusters[either],
            resamples,
            int(either.sum()),
        ),
    }


def _share(hits: Any, clusters: Codes, resamples: int) -> Metric | None:
    """Share of these items that are hits."""
    return agreement.share(hits * 1.0, np.ones(len(hits)), clusters, resamples, len(hits))
