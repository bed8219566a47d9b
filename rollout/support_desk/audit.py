"""The audit judge: an outside measure of the answers that no training signal is made from.

It reads the reference answer, which the verifiers never do, so a policy that learned to please
the verifiers without answering better shows up as a gap between the two.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from sacrebleu.metrics.chrf import CHRF


class _HasReference(Protocol):
    @property
    def reference(self) -> str | None: ...


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


@cache
def _chrf() -> CHRF:
    return CHRF()


def overlap(prompt: _HasReference, completion: _HasText) -> dict[str, float | None]:
    """Character n-gram F-score (chrF) of the answer against the reference, scaled to [0, 1]."""
    if not prompt.reference:
        return {"reference_overlap": None}
    score = _chrf().sentence_score(completion.text, [prompt.reference]).score
    return {"reference_overlap": min(1.0, max(0.0, float(score) / 100.0))}
