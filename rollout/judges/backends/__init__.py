"""What answers a model judge's calls: an engine in this process, or an endpoint elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.types import Message


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a model, at temperature 0, whose answer must fit a JSON schema.

    `alternatives` is how many of the likeliest tokens are wanted at each position; 0 for none.
    `nonce` marks what is judged in the messages, and differs from run to run.
    """

    messages: tuple[Message, ...]
    schema: Mapping[str, Any]
    max_tokens: int
    alternatives: int = 0
    nonce: str = ""

    @property
    def key(self) -> str:
        """SHA-256 of all that can change the answer, bar the back end (its `identity`): rubrics,
        wording, order, decoding, and every text shown."""
        asked = {
            "messages": self.messages,
            "schema": self.schema,
            "max_tokens": self.max_tokens,
            "alternatives": self.alternatives,
        }
        text = json.dumps(asked, ensure_ascii=False, sort_keys=True)
        text = text.replace(self.nonce, "") if self.nonce else text
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, and the likeliest at its place: text -> log-probability in nats."""

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: text, or a `failure` that says why there is none.

    >>> Answer.failed("cut off after 256 tokens").text is None
    True
    """

    text: str | None
    tokens: tuple[Token, ...] = ()
    failure: str | None = None

    @classmethod
    def failed(cls, reason: str) -> Answer:
        """No answer, and why."""
        return cls(None, (), reason)


Keep = Callable[[int, Answer], None]
"""Told of each answer as it comes, with its call's index, so that an interruption loses none."""


def keep_all(answers: Sequence[Answer], keep: Keep | None) -> None:
    """Hand answers that came together to whoever keeps them one by one."""
    if keep is not None:
        for index, answer in enumerate(answers):
            keep(index, answer)


class Backend(Protocol):
    """Answers calls in order. One call's failure is an `Answer`, never an exception."""

    identity: Mapping[str, str]
    """All of it that can change a verdict: where it is, model, revision, precision."""
    beside: bool
    """Whether the work is done elsewhere, and `ask` may be called by several threads."""

    def start(self, record: Path | None, probe: Call) -> Answer | None:
        """Check what can be checked before anything is generated, and go on with the record of an
        earlier start. Returns the probe's answer, where asking is cheap.

        Raises InputError where the backend can't be used as configured.
        """
        ...

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        """One answer for every call, in their order. Raises Interrupted where a budget is spent."""
        ...

    def news(self) -> str | None:
        """What it cost and who answered, in one line; None where there is nothing to tell."""
        ...

    def sleep(self) -> None:
        """Give the device back until the next `ask`."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
