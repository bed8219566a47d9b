"""The terminal: a live display where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.table import Table

from launch.display import Display, Work, numbers
from rlhf.interrupts import to_stderr

SECONDS_BETWEEN_LINES = 20.0
PLAIN_WIDTH = 1000
"""Columns; a file has no width, and a table there must not be cut to that of a terminal."""


class Terminal:
    """`rlhf.protocols.Reporter` over rich. Lines are plain until, and unless, `showing` is entered
    on a terminal."""

    def __init__(self, plain: bool) -> None:
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
        self.live = sys.stdout.isatty() and not dumb and not plain
        width = None if self.live else PLAIN_WIDTH
        # Plain lines carry no styles, also on a terminal; in a notebook, where Rich would make each
        # an output of its own, they are lines as well.
        self.console = Console(
            highlight=False,
            # Cells may hold what users wrote.
            markup=False,
            emoji=False,
            force_terminal=self.live,
            force_jupyter=False,
            width=width,
        )
        self._display: Display | None = None
        self._metrics = ""

    @contextmanager
    def showing(self, overheard: Path) -> Iterator[None]:
        """The live display, on a terminal. Whatever else writes to it meanwhile (libraries, child
        processes, a user's verifier) is kept in the file `overheard` and scrolls by as lines."""
        if not self.live:
            yield
            return
        try:
            with Display(overheard) as self._display:
                yield
        finally:
            self._display = None

    def announce(self, text: str) -> None:
        """Say it at once, from within a signal handler."""
        if self._display is None:
            to_stderr(text)
        else:
            self._display.notice = text

    def say(self, text: str) -> None:
        """One line with the time of day."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        self._console.print(line, markup=False, soft_wrap=True)

    def stage(self, label: str) -> None:
        """What is being done from now on; plain lines tell of stages when there is progress."""
        self._metrics = ""
        if self._display is not None:
            self._display.work = Work(label)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar, or a line every so often, with the time that is left."""
        work = Work(label, total)
        spoken = work.started
        if self._display is not None:
            self._display.work = work
            yield work.advance
            self._display.work = Work(label)
            return

        def advance(done: int) -> None:
            nonlocal spoken
            work.advance(done)
            now = time.monotonic()
            if done < total and now - spoken < SECONDS_BETWEEN_LINES:
                return
            spoken = now
            passed, left = now - work.started, work.left(now)
            shown = f"; {self._metrics}" if self._metrics else ""
            self.say(f"{label} {done}/{total}, {passed:.0f} s, {left:.0f} s left{shown}")

        yield advance

    def metrics(self, label: str, values: Mapping[str, float]) -> None:
        """The latest numbers: in the display, or at the end of the next plain line."""
        self._metrics = numbers(values)
        if self._display is not None:
            self._display.metrics = f"{label}: {self._metrics}"

    def table(self, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """A table that cuts nothing off: a terminal folds long cells, plain output grows wider."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(rows[0]):
            justify: JustifyMethod = "left" if index == 0 else "right"
            table.add_column(column, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        if self._display is None:
            self.console.print(table)
        else:
            self._display.show_table(table)

    @property
    def _console(self) -> Console:
        return self.console if self._display is None else self._display.console
