"""The terminal: bars with ETA where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, JustifyMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

SECONDS_BETWEEN_LINES = 20.0
PLAIN_WIDTH = 1000
"""Columns; a file has no width, and a table there must not be cut to that of a terminal."""


class Terminal:
    """`rlhf.protocols.Reporter` over rich."""

    def __init__(self, plain: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not plain
        if not self.live:
            self.console.width = PLAIN_WIDTH

    def say(self, text: str) -> None:
        """One line with the time of day."""
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar, or a line every so often with the time that is left."""
        if self.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(label, total=total)
                yield lambda done: bar.update(task, completed=done)
            return
        started = spoken = time.monotonic()
        first: int | None = None

        def advance(done: int) -> None:
            nonlocal spoken, first
            now = time.monotonic()
            # A resumed stage starts in the middle: only what this process did tells the speed.
            first = done - 1 if first is None else first
            if done < total and now - spoken < SECONDS_BETWEEN_LINES:
                return
            spoken = now
            left = (now - started) / max(1, done - first) * (total - done)
            self.say(f"{label} {done}/{total}, {now - started:.0f} s, {left:.0f} s left")

        yield advance

    def table(self, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """A table that cuts nothing off: a terminal folds long cells, plain output grows wider."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(rows[0]):
            justify: JustifyMethod = "left" if index == 0 else "right"
            table.add_column(column, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        self.console.print(table)
