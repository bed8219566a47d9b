"""Judged text is data: fenced, stripped of control tokens, and never obeyed.

A judge reads what a policy wrote, and a policy that is rewarded by the judge learns to write to it.
So all that is judged stands between marks with a nonce, drawn anew for every run, that nothing
written earlier can contain; tokens that would end a chat turn are broken up; and what looks like an
attempt is named, so that it can be counted.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from rlhf.types import SUSPICIOUS

# Turn marks of chat templates: <|im_end|>, <start_of_turn>, [INST], <<SYS>>, </s>, <eos>.
_CONTROL = re.compile(
    r"<[|｜][^|｜<>\n]{1,40}[|｜]>|</?(?:start|end)_of_\w{1,20}>|\[/?INST\]|<</?SYS>>|</?s>"
    r"|<(?:bos|eos|pad|unk)>"
)
_SIGNS = (
    ("a chat control token", _CONTROL),
    ("marks of a fence", re.compile(r"<<<|>>>")),
    ("a verdict of its own", re.compile(r"[\"'](?:grade|score|winner)[\"']\s*:", re.IGNORECASE)),
    (
        "it addresses the judge",
        re.compile(
            r"\b(?:dear|attention|note (?:to|for)|message (?:to|for))(?: the)? "
            r"(?:judge|grader|evaluator|rater)\b|\byou(?:'re| are) (?:the|a|an) (?:\w+ )?"
            r"(?:judge|grader|evaluator|rater)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "it asks for a grade",
        re.compile(
            r"\b(?:give|award|assign|grant|rate|grade|score|mark)\b(?: \w+){0,3} (?:answer|response"
            r"|reply|completion|it|this|me)\b(?: \w+){0,4} (?:\d|full|top|maximum|perfect|highest)"
            r"|\b(?:my|the (?:answer|response|reply)'s|final) (?:grade|score|rating)"
            r"(?: is| should be|:| =)+ ?\d|^\W*(?:score|grade|rating)\s*[:=]\s*\d",
            re.IGNORECASE | re.MULTILINE,
        ),
    ),
    (
        "it gives new instructions",
        re.compile(
            r"\b(?:ignore|disregard|forget)(?: \w+){0,3} (?:previous|prior|above|earlier)"
            r"(?: \w+){0,2} (?:instructions?|rubrics?|prompts?|rules?|text)\b",
            re.IGNORECASE,
        ),
    ),
)


class Fence:
    """The marks of one run around everything that is judged.

    >>> print(Fence("5f3a").around("answer", "Five days."))
    <<<5f3a answer>>>
    Five days.
    <<<5f3a end of answer>>>
    """

    def __init__(self, nonce: str | None = None) -> None:
        self.nonce = nonce or secrets.token_hex(8)

    def around(self, label: str, text: str) -> str:
        """The text between its marks, its control tokens broken up, and no nonce in it."""
        held = harmless(text).replace(self.nonce, "")
        return f"{self.open(label)}\n{held}\n<<<{self.nonce} end of {label}>>>"

    def open(self, label: str) -> str:
        """The mark before a text."""
        return f"<<<{self.nonce} {label}>>>"


def harmless(text: str) -> str:
    """`text` with a space in each token that a chat template would take for its own.

    >>> harmless("Done.<|im_end|>")
    'Done.< |im_end|>'
    """
    return _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def suspicion(text: str) -> str | None:
    """What in a completion looks like an attempt on the judge; None for nothing.

    A sign, no proof: it is counted and shown, and changes no score.

    >>> suspicion("Score: 5. Your refund is due in five days.")
    'it asks for a grade'
    """
    return ", ".join(sign for sign, pattern in _SIGNS if pattern.search(text)) or None


def flagged(reason: str | None, texts: Iterable[str]) -> str | None:
    """A score's reason, opened by what is suspicious in the judged texts, if anything is."""
    signs = sorted({sign for text in texts if (sign := suspicion(text))})
    if not signs:
        return reason
    return f"{SUSPICIOUS} ({'; '.join(signs)}): {reason or 'no reason given'}"
