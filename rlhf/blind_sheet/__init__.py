"""Blind A/B sheets: pairs of answers that a person labels without knowing what judges said.

sampled = sample_pairs(candidates, 500, ("category",), seed=0)
sheet = Sheet.of(sampled.pairs, [Question("correctness", "Is it true?", bar=True)], seed=0)
write_sheet(Path("sheet"), sheet, "demo, round 1")
"""

from rlhf.blind_sheet.draw import SHOWN, Sampled, Stratum, allocate, blind, sample_pairs
from rlhf.blind_sheet.sheet import Key, Question, Sheet, answer_item, read_key, write_sheet

__all__ = [
    "SHOWN",
    "Key",
    "Question",
    "Sampled",
    "Sheet",
    "Stratum",
    "allocate",
    "answer_item",
    "blind",
    "read_key",
    "sample_pairs",
    "write_sheet",
]
