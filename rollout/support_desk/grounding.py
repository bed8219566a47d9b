"""What an answer states that can be looked up in the prompt: numbers, names, contact details."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from rollout.support_desk.wording import (
    FUNCTION_WORDS,
    IMPERATIVES,
    Quantity,
    Tokens,
    fold,
    quantities,
    sentences,
    tidy,
    tokens,
    vocabulary,
)

COMPANY: Final = "Quillmere"
# What a capital letter in mid-sentence does not make a name: the company, the desk, courtesies.
ALLOWED_NAMES: Final = vocabulary(
    f"{COMPANY.lower()} i faq dear please thank thanks sorry hello hi regards sir madam customer "
    "support service team desk help app ok okay uk step note answer yes no"
)
MONTHS_AND_DAYS: Final = vocabulary(
    "january february april june july august september october november december monday tuesday "
    "wednesday thursday friday saturday sunday"
)
# The number of a list item is no statement.
LIST_MARK: Final = re.compile(r"^\s*\d{1,2}[.)]\s", re.MULTILINE)
_CONTACT: Final = re.compile(
    r"\S+@\S+|https?://\S+|\bwww\.\S+|\b[\w-]+\.(?:com|org|net|co\.uk|io)\b"
)
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z'&]*")


def ungrounded_names(text: str, known: str) -> list[str]:
    """Names in the text that the known text lacks.

    A name is a capitalised word inside a sentence. A sentence's first word is capitalised anyway,
    so it is taken as a name only when another unknown capitalised word follows it ("Sarah Jones
    will ring"). Months and weekdays are names wherever they stand, "May" and "March" as any word.
    """
    seen = {fold(w) for w in _WORD.findall(tidy(known).lower())}

    def unknown(word: str) -> bool:
        plain = word.lower().removesuffix("'s")
        if fold(plain) in seen or plain in ALLOWED_NAMES:
            return False
        return plain not in FUNCTION_WORDS

    names = []
    for sentence in sentences(_CONTACT.sub(" ", text)):
        found = [match.group() for match in _WORD.finditer(sentence)]
        for place, word in enumerate(found):
            if not unknown(word):
                continue
            before = re.search(r"[:\"(]\s*" + re.escape(word), sentence)
            follower = found[place + 1] if place + 1 < len(found) else ""
            first = place == 0 or before is not None
            # A verb that opens the sentence is no first name, whatever follows it.
            opens = word.lower() in IMPERATIVES or not (
                follower[:1].isupper() and unknown(follower)
            )
            capital = word[0].isupper()
            if word.lower() in MONTHS_AND_DAYS or (capital and not (first and opens)):
                names.append(word)
    return names


def checkable_items(text: str, known: Tokens, known_text: str) -> list[bool]:
    """Every checkable item of an answer, True where it is grounded."""
    lowered = known_text.lower()
    contacts = [match.group().rstrip(".,;").lower() in lowered for match in _CONTACT.finditer(text)]
    bare = LIST_MARK.sub("", _CONTACT.sub(" ", text))
    grounded = quantities(known)
    numbers = [_grounded(q, grounded) for q in quantities(tokens(bare))]
    codes = {token.text for token in known}
    # Model names and error codes ("E24") are letters and digits in one token.
    mixed = [
        token.text in codes
        for token in tokens(bare)
        if token.text[0].isalpha() and any(char.isdigit() for char in token.text)
    ]
    names = [False] * len(ungrounded_names(text, known_text))
    return contacts + numbers + mixed + names


def _grounded(quantity: Quantity, known: Sequence[Quantity]) -> bool:
    """Whether a number is known in its unit; "one of our team" counts nothing and is let pass."""
    if quantity.value == "1" and quantity.unit is None:
        return True
    return any(
        (quantity.value == other.value and (quantity.unit == other.unit or quantity.unit is None))
        or (quantity.value == other.value and other.unit is None and quantity.unit != "£")
        for other in known
    )
