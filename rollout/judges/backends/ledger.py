"""What an endpoint was asked and what it cost, kept over all starts of a run."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rlhf.config_judges import Traffic
from rlhf.errors import Interrupted
from rlhf.files import read_json, write_json

_SECONDS_BETWEEN_WRITES = 1.0


class Ledger:
    """Calls, tokens and who answered. Where there is a budget no call that was sent is forgotten;
    else a kill costs what came since the last write, of which there is at most one a second.

    >>> ledger = Ledger(Traffic(max_calls=1), "reader")
    >>> ledger.charge(retry=False)
    >>> ledger.charge(retry=False)
    Traceback (most recent call last):
    rlhf.errors.Interrupted: judge reader: the budget of 1 calls is spent ...
    """

    def __init__(self, traffic: Traffic, judge: str) -> None:
        self.calls = 0
        self.retries = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.served: Counter[str] = Counter()
        """Model and fingerprint that the endpoint named -> answers."""
        self._traffic = traffic
        self._judge = judge
        self._path: Path | None = None
        self._written = 0.0

    def open(self, path: Path) -> None:
        """Go on from an earlier start's file, if there is one."""
        self._path = path
        if not path.exists():
            return
        before = read_json(path, "remove it to count from zero")
        self.calls += before["calls"]
        self.retries += before["retries"]
        self.prompt_tokens += before["prompt_tokens"]
        self.completion_tokens += before["completion_tokens"]
        self.served.update(before["served"])

    def charge(self, retry: bool) -> None:
        """One request is about to be sent. Raises Interrupted where the budget is spent."""
        calls, tokens = self._traffic.max_calls, self._traffic.max_total_tokens
        spent = None
        if calls is not None and self.calls >= calls:
            spent = f"{calls} calls is spent", "max_calls"
        elif tokens is not None and self.tokens >= tokens:
            spent = f"{tokens} tokens is spent ({self.tokens} used)", "max_total_tokens"
        if spent:
            raise Interrupted(
                f"judge {self._judge}: the budget of {spent[0]}; with a larger "
                f"traffic.{spent[1]} the same command goes on"
            )
        self.calls += 1
        self.retries += retry
        if calls is None and tokens is None:
            self._keep()
        else:
            self.write()

    def answered(self, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """An answer came; `model` is what the endpoint says it was."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.served[model] += 1
        self._keep()

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens

    def write(self) -> None:
        """Store it now."""
        if self._path is None:
            return
        self._written = time.monotonic()
        write_json(
            self._path,
            {
                "calls": self.calls,
                "retries": self.retries,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "served": dict(self.served),
            },
        )

    def _keep(self) -> None:
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.write()
