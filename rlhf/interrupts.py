"""Signals that ask a run to stop: heard at once, obeyed at the next safe point."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from rlhf.errors import Interrupted

# SIGTERM comes from schedulers and `kill`, SIGUSR1 from `sbatch --signal=B:USR1@60`.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def to_stderr(text: str) -> None:
    """One line on stderr, from within a signal handler."""
    # print() may be interrupted by this very handler and refuse to be entered twice.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class Interrupts:
    """While entered, SIGTERM, SIGUSR1 and SIGINT only ask: `check` raises at the next safe point.

    `announce` is told so at once, from within the signal handler: it may not print or wait. A
    second SIGINT raises KeyboardInterrupt at once. Python hears signals in its main thread alone,
    so entered elsewhere this changes nothing and `check` never raises.

    >>> with Interrupts() as interrupts:
    ...     interrupts.check()
    """

    def __init__(self, announce: Callable[[str], None] = to_stderr) -> None:
        self._announce = announce
        self._requested: signal.Signals | None = None
        self._sigints = 0
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """Name of the first signal that asked for a stop, such as SIGTERM; None if none did."""
        return self._requested.name if self._requested else None

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for. Call where the work done so far is kept."""
        if self._requested:
            raise Interrupted(
                f"stopped at a safe point by {self._requested.name}; run the same command to resume"
            )

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.getsignal(number) for number in _SIGNALS}
            for number in _SIGNALS:
                signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._requested:
            # What could not be obeyed any more, whoever listens around this block may.
            outer = getattr(self._former.get(self._requested), "__self__", None)
            if isinstance(outer, Interrupts):
                outer._requested = outer._requested or self._requested
        for number, former in self._former.items():
            # None stands for a handler that was not set from Python: it can't be put back.
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        heard = signal.Signals(number)
        self._requested = self._requested or heard
        if heard is signal.SIGINT:
            self._sigints += 1
            if self._sigints > 1:
                raise KeyboardInterrupt
        name, again = heard.name, ""
        if heard is signal.SIGINT:
            name, again = "Ctrl-C", "; Ctrl-C again stops now"
        self._announce(f"{name}: stopping after this shard or step{again}")
