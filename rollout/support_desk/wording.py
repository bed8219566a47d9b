"""How the verifiers read text: tokens, clauses, quantities and the matching of short phrases.

Everything here is deterministic string work on English as a customer desk writes it. Two
spellings of one fact ("£1,200.00" and "1200 pounds", "thirty-day" and "30 days") come out as the
same tokens, so the verifiers above can compare tokens and never need to know about spelling.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final


def vocabulary(text: str) -> frozenset[str]:
    """A set of words, written as running text."""
    return frozenset(text.split())


_WORD_VALUES: Final[dict[str, int]] = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SCALES: Final[dict[str, int]] = {"hundred": 100, "thousand": 1000}
_ALIASES: Final[dict[str, str]] = {
    "hr": "hour", "min": "minute", "sec": "second", "wk": "week", "yr": "year", "mth": "month",
    "percent": "%", "pence": "p", "penny": "p", "kilo": "kg", "kilogram": "kg", "metre": "m",
    "meter": "m", "centimetre": "cm", "litre": "l", "gigabyte": "gb",
}  # fmt: skip
UNITS: Final = vocabulary(
    "day hour minute second week month year £ % p am pm kg m cm l gb mbps mile degree time attempt "
    "photo item device instalment letter character digit litre payment visit call"
)
_BETWEEN: Final = vocabulary("working calendar business full clear more extra or to and")
NEGATORS: Final = vocabulary("not never no cannot neither nor unable nothing none")
# "no more than 30 days" states a limit and does not deny it.
_LIMITS: Final = vocabulary("more longer later less fewer only just further matter problem")
_CONNECTIVES: Final = vocabulary(
    "but if when because unless so although while and then once until which after before"
)
FUNCTION_WORDS: Final = vocabulary(
    """a an the this that these those it its they them their there here i me my we us our ours you
    your yours he she his her who what when where which why how is are was were be been being am do
    does did done have has had having can could will would shall should may might must cannot not
    no nor and or but if then than so as at by for from in into of off on onto out over to too up
    with within without about after again against all any both before between every during each
    few further just more most only other own same some such through under until very while also
    yes please thank thanks hello hi sorry sure ok okay once because unless don't can't won't isn't
    doesn't didn't aren't it's you'll we'll i'm you're we're let's i'll that's"""
)
IMPERATIVES: Final = vocabulary(
    """add allow apply ask book bring call cancel change check choose clean click close collect
    complete confirm contact download email enter fill find follow give go hand hold keep leave let
    log make move open order pack pay photograph place plug post press print put read register
    remove reply report request reset restart return run save scan select send set show sign speak
    switch take tap tell text transfer try turn type unplug update upload use visit wait write
    make bring attach drop empty fit pick pull push rinse screw start stop submit swap tick wipe
    do don't"""
)
_DETERMINERS: Final = vocabulary("a an the your our my their its this that these those")
_TOKEN: Final = re.compile(
    r"£\d+(?:\.\d+)?|\d+(?:[:.]\d+)*|%|[a-z]+\d+[a-z\d]*|[a-z]+(?:'[a-z]+)*|[,;:()!?.\n]"
)
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_MAX_GAP: Final = 2
_NEGATION_REACH: Final = 6
SHORT: Final = 8
SENTENCE_PROSE: Final = 0.12
ANSWER_PROSE: Final = 0.2


@dataclass(frozen=True, slots=True)
class Token:
    """One comparable word or number, and the clause of the text it stands in."""

    text: str
    clause: int


Tokens = tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with the unit it is counted in (None when it has none) and its token position."""

    value: str
    unit: str | None
    index: int


def tidy(text: str) -> str:
    """Undo typographic variety but keep the case: quotes, thousands, currency, ranges, a.m."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text, flags=re.IGNORECASE)
    # A set phrase, which must not pass for the fact that something costs nothing.
    text = re.sub(r"\bfeel free\b", "feel welcome", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"£\s+(?=\d)", "£", text)
    text = re.sub(r"\bGBP\s?(?=\d)", "£", text)
    text = re.sub(r"(?<![£\d.])(\d+(?:\.\d+)?)\s+(?:pounds|GBP)\b", r"£\1", text)
    text = re.sub(r"\bper cent\b", "percent", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = re.sub(r"(?<=\d)\s*[-–]\s*(?=£?\d)", " to ", text)
    text = re.sub(r"\s+[-–—]+\s+|—", "; ", text)
    return re.sub(r"(?<=\w)[-–/](?=\w)", " ", text)


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, without the empty ones."""
    return [part.strip() for part in _SENTENCE_END.split(tidy(text)) if part.strip()]


def fold(word: str) -> str:
    """A word without its plural, and abbreviated units spelled out, so "30 day" is "30 days"."""
    plural = word.endswith("s") and not word.endswith(("ss", "'s", "us", "is"))
    if plural and len(word) > 2 and word not in FUNCTION_WORDS:
        word = word[:-1]
    return _ALIASES.get(word, word)


def stem(word: str) -> str:
    """A crude verb stem: "cancelled", "cancelling" and "cancel" all give "cancel"."""
    for suffix in ("ing", "ed", "es", "s", "e"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") else word


def _canonical_number(raw: str) -> str:
    """ "£7.50" as "£7.5", "05" left alone: a leading zero means a code or a phone number."""
    sign, digits = ("£", raw[1:]) if raw.startswith("£") else ("", raw)
    if digits.count(".") == 1 and ":" not in digits:
        digits = digits.rstrip("0").rstrip(".")
    return sign + digits


def _spelled(words: Sequence[str]) -> Iterator[str]:
    """Replace runs of number words by digits ("one hundred and twenty" by "120")."""
    position = 0
    while position < len(words):
        if words[position] not in _WORD_VALUES:
            yield words[position]
            position += 1
            continue
        total, current, last = 0, _WORD_VALUES[words[position]], _WORD_VALUES[words[position]]
        position += 1
        while position < len(words):
            word = words[position]
            joined = word == "and" and last >= 100 and words[position + 1 : position + 2] != []
            if joined and words[position + 1] in _WORD_VALUES:
                position += 1
                word = words[position]
            if word in _SCALES:
                current *= _SCALES[word]
                last = _SCALES[word]
                if word == "thousand":
                    total, current = total + current, 0
            elif word in _WORD_VALUES and _extends(last, _WORD_VALUES[word]):
                last = _WORD_VALUES[word]
                current += last
            else:
                break
            position += 1
        yield str(total + current)


def _extends(last: int, value: int) -> bool:
    """Whether a number word goes on the number before it: "forty" "five", "hundred" "twelve"."""
    return last >= 100 or (20 <= last < 100 and last % 10 == 0 and 0 < value < 10)


@lru_cache(maxsize=8192)
def tokens(text: str) -> tuple[Token, ...]:
    """The comparable tokens of a text; punctuation and connectives only move the clause on.

    Cached, since every answer is read against the same passage, fact and action forms again.
    """
    found: list[Token] = []
    clause = 0
    for word in _spelled(_TOKEN.findall(tidy(text).lower())):
        if not word[0].isalnum() and word[0] not in "£%":
            clause += 1
            continue
        if word in _CONNECTIVES:
            clause += 1
        number = word[0].isdigit() or word[0] == "£"
        found.append(Token(_canonical_number(word) if number else fold(word), clause))
    # "30 pounds" was turned into "£30" while the number was digits; do it for number words too.
    merged: list[Token] = []
    for token in found:
        if token.text == "pound" and merged and merged[-1].text.isdigit():
            merged[-1] = Token("£" + merged[-1].text, merged[-1].clause)
        else:
            merged.append(token)
    return tuple(merged)


def words(text: str) -> list[str]:
    """The tokens' texts alone."""
    return [token.text for token in tokens(text)]


def is_number(word: str) -> bool:
    """Whether a token is a number or an amount of money."""
    return word[:1].isdigit() or word[:1] == "£"


def quantities(stream: Sequence[Token]) -> list[Quantity]:
    """Every number of a token stream; in "30 or 60 working days" both are counted in days."""
    found = []
    for index, token in enumerate(stream):
        if not is_number(token.text):
            continue
        if token.text.startswith("£"):
            found.append(Quantity(token.text[1:], "£", index))
            continue
        unit = None
        for after in stream[index + 1 : index + 4]:
            if after.text in UNITS:
                unit = after.text
                break
            if after.text not in _BETWEEN and not is_number(after.text):
                break
        found.append(Quantity(token.text, unit, index))
    return found


def find(phrase: str, stream: Sequence[Token]) -> list[int]:
    """Where a phrase stands in a stream, by whole tokens ("30 days" is not in "130 days")."""
    wanted = words(phrase)
    texts = [token.text for token in stream]
    if not wanted:
        return []
    span = len(wanted)
    return [at for at in range(len(texts) - span + 1) if texts[at : at + span] == wanted]


def find_loose(phrase: str, stream: Sequence[Token]) -> list[int]:
    """Where the stems of a phrase stand in order, determiners dropped, two words apart at most."""
    wanted = [stem(word) for word in words(phrase) if word not in _DETERMINERS]
    kept = [
        (index, stem(token.text))
        for index, token in enumerate(stream)
        if token.text not in _DETERMINERS
    ]
    starts = []
    for begin, (index, word) in enumerate(kept):
        if not wanted or word != wanted[0]:
            continue
        at: int | None = begin
        for target in wanted[1:]:
            window = range((at or 0) + 1, min((at or 0) + 2 + _MAX_GAP, len(kept)))
            at = next((place for place in window if kept[place][1] == target), None)
            if at is None:
                break
        if at is not None:
            starts.append(index)
    return starts


def is_negator(word: str) -> bool:
    """Whether a token denies what follows it."""
    return word in NEGATORS or word.endswith("n't")


def negated(stream: Sequence[Token], index: int) -> bool:
    """Whether the token at index is denied by a negator shortly before it in its own clause."""
    for place in range(max(0, index - _NEGATION_REACH), index):
        token = stream[place]
        if token.clause == stream[index].clause and is_negator(token.text):
            following = stream[place + 1].text
            if following not in _LIMITS:
                return True
    return False


def content(stream: Sequence[Token]) -> set[str]:
    """The tokens that carry meaning: everything but function words."""
    return {stem(token.text) for token in stream if token.text not in FUNCTION_WORDS}


def is_prose(stream: Sequence[Token], share: float = SENTENCE_PROSE) -> bool:
    """Whether a stream reads as a sentence: a heap of keywords has no little words between them.

    One terse sentence may do with few ("Small parts cost £3.95 to post"), a whole answer may not.
    """
    if len(stream) < SHORT:
        return True
    return sum(token.text in FUNCTION_WORDS for token in stream) / len(stream) >= share
