"""An engine that runs out of memory works on half as many sequences at once, and goes on.

How much memory a batch takes shows only when it is worked on. That it was too much says nothing
against its data, so the same work is done again from its beginning; every other error is raised.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from rlhf.errors import PairloopError

T = TypeVar("T")

# vLLM's workers pass errors on as text, and torch has no type for a host that is short.
_SAID = ("out of memory", "can't allocate memory")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class MemoryShortError(PairloopError):
    """An engine ran out of memory, and can't work on less at once."""


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was lacking, on a card or a host, whoever wrapped that in another error."""
    while error is not None and not isinstance(error, PairloopError):
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


class Concurrency:
    """How many sequences an engine works on at once: halved when memory runs out, for good."""

    def __init__(self, most: int, engine: str) -> None:
        self.now = most
        self.say: Callable[[str], None] = _to_stderr
        """Told of each halving."""
        self._engine = engine

    def work(self, attempt: Callable[[], T], recover: Callable[[], None] = lambda: None) -> T:
        """What `attempt` gives; it looks at `now`. `recover` comes before each further one.

        Raises MemoryShortError where one sequence at a time is too much.
        """
        while True:
            try:
                return attempt()
            except Exception as error:
                if not ran_out(error):
                    raise
                if self.now == 1:
                    raise MemoryShortError(
                        f"{self._engine} ran out of memory with one sequence at a time: {error}; "
                        "use shorter prompts or answers (prompts.max_tokens, "
                        "rollout.max_new_tokens), or a device with more memory"
                    ) from error
                reason = str(error).split("\n", 1)[0]
            # The error has gone, and what its frames held on the device may go with it.
            before, self.now = self.now, self.now // 2
            self.say(
                f"{self._engine} ran out of memory with {before} sequences at once, and does the "
                f"same again with {self.now} ({reason})"
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            recover()
