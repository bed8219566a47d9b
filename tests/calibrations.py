"""Verdicts made up for the page of a calibration, each with what calibration finds of it."""

from __future__ import annotations

import numpy as np

from rlhf.calibration import Finding, Use, compared, finding_of
from rlhf.config_calibration import Calibration
from rlhf.judged import Judged, collect
from rlhf.judgements import WINNERS, Gold, Verdict
from rlhf.report.calibration import Origin

SETTINGS = Calibration(bootstrap=100)
ORIGIN = Origin("verdicts.jsonl", "gold.jsonl", 100)


Found = list[tuple[Finding, list[Judged]]]


def found(verdicts: list[Verdict], gold: list[Gold], use: Use) -> Found:
    return [
        (finding_of(forms, use, SETTINGS), forms)
        for forms in compared(collect(verdicts, gold, SETTINGS.repeats))
    ]


def of_scores(offset: float = 0.0, number: int = 60, runs: int = 2) -> Found:
    """Prompts with four answers each, gold in [0, 1], scored `runs` times with a little noise."""
    rng = np.random.default_rng(0)
    verdicts, gold = [], []
    for i in range(4 * number):
        worth = float(rng.uniform(0.2, 0.65))
        gold.append(Gold(str(i), "style", False, worth))
        for run in range(runs):
            value = worth + offset + float(rng.normal(0, 0.03))
            verdicts.append(
                Verdict(str(i), "house", "style", False, value, f"p{i // 4}", run=str(run))
            )
    return found(verdicts, gold, Use(floor=0.45))


def of_pairs() -> Found:
    """60 pairs in both orders, three annotators: 10 always follow the order, 5 abstain in one."""
    verdicts, gold = [], []
    for i in range(60):
        better = "ab"[i % 2]
        for annotator in ("x", "y", "z"):
            said = better if (annotator, i % 5) != ("z", 0) else "tie"
            gold.append(Gold(str(i), "quality", True, WINNERS[said], annotator))
        for order in ("ab", "ba"):
            value: float | None = WINNERS[order[0] if i < 10 else better]
            value = None if 10 <= i < 15 and order == "ba" else value
            verdicts.append(Verdict(str(i), "pairs", "quality", True, value, f"p{i}", order))
    return found(verdicts, gold, Use())
