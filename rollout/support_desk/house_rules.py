"""The desk's house rules on style, one function each; every rule gives a number in [0, 1].

A rule reads the answer alone, except where the prompt excuses something (a passage that writes
"PIN" in capitals lets the answer do so). An empty answer keeps no rule.
"""

from __future__ import annotations

import re
from typing import Final

from rollout.support_desk.wording import sentences, words

MIN_WORDS: Final = 12
MAX_WORDS: Final = 60
TOO_MANY_WORDS: Final = 100
PLAIN_SENTENCE_WORDS: Final = 20
TANGLED_SENTENCE_WORDS: Final = 40
REPETITION_SLOPE: Final = 2.5

_SHOUTED: Final = re.compile(r"\b[A-Z]{3,}\b")
_MARKUP: Final = re.compile(
    r"^\s*(?:[-*•#]|\d+[.)])\s|\*\*|```|\[[^\]]*\]|\b(?:Passage|Question):", re.MULTILINE
)
_LETTER: Final = re.compile(r"\bdear\b|\b(?:kind|best|warm) regards\b|\bsincerely\b", re.IGNORECASE)
_OFFER: Final = re.compile(
    r"\b(?:let (?:us|me) know|(?:happy|glad|here|pleased) to (?:help|assist)|anything else|"
    r"(?:can|could|may) (?:we|i) (?:help|assist)|(?:we|i) can (?:help|assist)|"
    r"any (?:other |more |further )?questions|"
    r"(?:more|further|extra) (?:help|assistance|questions)|(?:need|want|like) (?:any )?help|"
    r"(?:write|reply|come|get) (?:back )?(?:to|with) us|ask us|just ask|tell us|contact us|"
    r"feel free to|reach out|stuck)\b",
    re.IGNORECASE,
)  # fmt: skip
_HALF_OFFER: Final = re.compile(r"\b(?:help|assist|support)\b", re.IGNORECASE)


def _ramp(value: float, good: float, bad: float) -> float:
    """1 up to good, 0 from bad on, straight between them."""
    return min(1.0, max(0.0, (bad - value) / (bad - good)))


def fits_length(text: str) -> float:
    """Two or three sentences: long enough to answer, short enough to be read on a phone."""
    count = len(words(text))
    if count < MIN_WORDS:
        return count / MIN_WORDS
    return _ramp(count, MAX_WORDS, TOO_MANY_WORDS)


def no_shouting(text: str, excused: str = "") -> float:
    """No words in capitals that the prompt does not write so, and no rows of exclamation marks."""
    if not words(text):
        return 0.0
    allowed = set(_SHOUTED.findall(excused))
    shouted = sum(word not in allowed for word in _SHOUTED.findall(text))
    marks = text.count("!")
    return max(0.0, 1.0 - 0.5 * shouted - (0.5 if "!!" in text else 0.0) - 0.25 * max(0, marks - 1))


def no_repetition(text: str) -> float:
    """Few trigrams said twice; a looping answer reaches 0 well before it is all loop."""
    stream = words(text)
    trigrams = list(zip(stream, stream[1:], stream[2:], strict=False))
    if not trigrams:
        return float(bool(stream))
    repeated = 1.0 - len(set(trigrams)) / len(trigrams)
    return max(0.0, 1.0 - REPETITION_SLOPE * repeated)


def short_sentences(text: str) -> float:
    """Plain sentences: a mean of twenty words is fine, forty is a tangle."""
    counts = [len(words(sentence)) for sentence in sentences(text)]
    counts = [count for count in counts if count]
    if not counts:
        return 0.0
    return _ramp(sum(counts) / len(counts), PLAIN_SENTENCE_WORDS, TANGLED_SENTENCE_WORDS)


def finishes(text: str, finish_reason: str = "stop") -> float:
    """Ends on its own, with a full stop: half for a cut that happens to fall on one."""
    if not words(text):
        return 0.0
    ended = text.rstrip().rstrip("\"')").endswith((".", "!", "?"))
    return 0.5 * ended + 0.5 * (ended and finish_reason != "length")


def plain_text(text: str) -> float:
    """No lists, markup, placeholders or letter phrases: the answer goes into a chat bubble."""
    if not words(text):
        return 0.0
    return 1.0 - 0.5 * bool(_MARKUP.search(text)) - 0.5 * bool(_LETTER.search(text))


def offers_help(text: str) -> float:
    """An offer of further help is there; half when help is only mentioned."""
    if _OFFER.search(text):
        return 1.0
    return 0.5 if _HALF_OFFER.search(text) else 0.0


def mean_of_rules(text: str, excused: str, finish_reason: str = "stop") -> float:
    """Style as one number in [0, 1]: the mean of all rules. `excused` may be in capitals."""
    rules = (
        fits_length(text),
        no_shouting(text, excused),
        no_repetition(text),
        short_sentences(text),
        finishes(text, finish_reason),
        plain_text(text),
        offers_help(text),
    )
    return sum(rules) / len(rules)
