"""The live display: where the run is, at the foot of the terminal, under the lines that scroll by.

Nothing may tear it. Libraries, child processes and a user's verifiers write to the terminal by its
file descriptors, whatever Python's streams say; so while it is shown, descriptors 1 and 2 lead into
a file, from which whole lines are shown above the display. It is a file, not a pipe, so that what a
crash says last is kept, and no child is ever blocked by it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LOOKS = 0.1
"""At the file with what others print; the display is drawn again after each, with an answer to
Ctrl-C if there was one."""


class Work:
    """What is under way; with a total, how much of it is done and how long the rest will take."""

    def __init__(self, label: str, total: int | None = None) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.started = time.monotonic()
        self._before: int | None = None

    def advance(self, done: int) -> None:
        """So many units are done."""
        # A resumed stage starts in the middle: only what this process did tells the speed.
        self._before = done - 1 if self._before is None else self._before
        self.done = done

    def left(self, now: float) -> float:
        """Seconds, at the speed so far. Only after the first `advance`."""
        assert self.total is not None and self._before is not None
        each = (now - self.started) / max(1, self.done - self._before)
        return each * (self.total - self.done)

    def shown(self, spinner: Spinner) -> RenderableType:
        """One line: what, how far, since when, how much longer."""
        now = time.monotonic()
        line = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [spinner, Text(self.label, style="bold")]
        if self.total is not None:
            cells += [
                ProgressBar(max(1, self.total), self.done, width=24),
                Text(f"{self.done}/{self.total}"),
            ]
        cells.append(Text(_clock(now - self.started), style="dim"))
        if self._before is not None:
            cells.append(Text(f"{_clock(self.left(now))} left", style="cyan"))
        line.add_row(*cells)
        return line


def numbers(values: Mapping[str, float]) -> str:
    """Names and values, four digits each, what people look for first: `loss 0.6931, margin 0.1`."""
    first = {name: place for place, name in enumerate(("loss", "accuracy", "margin", "reward"))}
    ordered = sorted(values.items(), key=lambda item: first.get(item[0], len(first)))
    return ", ".join(f"{name} {value:.4g}" for name, value in ordered)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Display:
    """Shown while entered. Its fields may be set at any time, `notice` by a signal handler too."""

    def __init__(self, overheard: Path) -> None:
        self.work = Work("starting")
        self.metrics = ""
        self.notice = ""
        self._table: Table | None = None
        self._spinner = Spinner("dots")
        # The terminal under a descriptor of its own, before 1 and 2 lead elsewhere.
        self._terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        self.console = _Screen(
            file=self._terminal, force_terminal=True, highlight=False, markup=False, emoji=False
        )
        self._live = Live(
            console=self.console,
            get_renderable=self._frame,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._overheard = _Overheard(overheard, self._repeat, self._draw)

    def show_table(self, table: Table) -> None:
        """Keep this table in the display; the one before scrolls up among the lines."""
        if self._table is not None:
            self.console.print(self._table)
        self._table = table

    def _frame(self) -> RenderableType:
        parts: list[RenderableType] = [Rule(style="dim"), self.work.shown(self._spinner)]
        if self.notice:
            parts.append(Text(self.notice, style="bold yellow"))
        if self.metrics:
            parts.append(Text(self.metrics))
        if self._table is not None:
            parts.append(self._table)
        return Group(*parts)

    def _repeat(self, line: str) -> None:
        self.console.print(Text.from_ansi(line), style="dim", soft_wrap=True)

    def _draw(self) -> None:
        with self.console.one_at_a_time:
            self._live.refresh()

    def __enter__(self) -> Self:
        self._overheard.start()
        with self.console.one_at_a_time:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._overheard.stop()
        with self.console.one_at_a_time:
            self._live.stop()
        if self._table is not None:
            self.console.print(self._table)
        self._terminal.close()


class _Screen(Console):
    """A console as wide as its own terminal; rich asks descriptors 0 to 2, which lead elsewhere.

    Rich decides how many lines of the display to clear, draws them anew, and writes, each under a
    lock of its own: of two threads, one may clear what the other has made taller since. Whoever
    writes here holds `one_at_a_time` from the first to the last of it.
    """

    def __init__(self, **options: Any) -> None:
        self.one_at_a_time = threading.RLock()
        super().__init__(**options)

    def print(self, *objects: Any, **options: Any) -> None:
        with self.one_at_a_time:
            super().print(*objects, **options)

    @property
    def size(self) -> ConsoleDimensions:
        width, height = os.get_terminal_size(self.file.fileno())
        return ConsoleDimensions(width or 80, height or 24)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        raise AssertionError("a terminal has the size that it has")


class _Overheard:
    """Leads descriptors 1 and 2 into a file and tells each whole line that arrives there."""

    def __init__(self, path: Path, tell: Callable[[str], None], looked: Callable[[], None]) -> None:
        self._path = path
        self._tell = tell
        self._looked = looked
        self._former: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="overheard")

    def start(self) -> None:
        self._file = self._path.open("ab+", buffering=0)
        self._seen = self._file.seek(0, os.SEEK_END)
        _flush()
        for descriptor in (1, 2):
            # One that was sent elsewhere, as in `2>errors`, stays so.
            if os.isatty(descriptor):
                self._former[descriptor] = os.dup(descriptor)
                os.dup2(self._file.fileno(), descriptor)
        self._thread.start()

    def stop(self) -> None:
        _flush()
        for descriptor, former in self._former.items():
            os.dup2(former, descriptor)
            os.close(former)
        self._stopped.set()
        self._thread.join()
        self._read(whole=False)
        self._file.close()

    def _listen(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
            self._read(whole=True)
            self._looked()

    def _read(self, whole: bool) -> None:
        """Tell what was written since the last look; with `whole`, up to the last line's end."""
        size = os.fstat(self._file.fileno()).st_size
        new = os.pread(self._file.fileno(), size - self._seen, self._seen)
        if whole:
            new = new[: new.rfind(b"\n") + 1]
        self._seen += len(new)
        for line in new.decode(errors="replace").splitlines():
            if line.strip():
                self._tell(line)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
