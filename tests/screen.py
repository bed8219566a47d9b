"""A command on a real pseudo-terminal, and what a person would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

COLUMNS, LINES = 100, 45
DEADLINE = 600.0
_CODE = re.compile(rb"\x1b\[([?\d;]*)([A-Za-z])")


def environment() -> dict[str, str]:
    """Of a run from this checkout that may name `fakes`."""
    # Readers of a terminal must not be told by the machine that runs the tests what it can do.
    unset = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    tests = str(Path(__file__).parent)
    return {**kept, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}


class Screen:
    """Lines of a terminal, those that scrolled off included; knows the few codes that rich sends.

    >>> screen = Screen()
    >>> screen.feed("one\\r\\ntwo\\r\\x1b[2Kthree".encode())
    >>> screen.text
    'one\\nthree'
    """

    def __init__(self) -> None:
        self._lines: list[str] = [""]
        self._row = self._column = 0
        self._rest = b""

    @property
    def text(self) -> str:
        """Everything, without spaces at the end of a line unless it goes on in the next."""
        shown = (line if len(line) == COLUMNS else line.rstrip() for line in self._lines)
        return "\n".join(shown)

    def feed(self, data: bytes) -> None:
        """Show what a program wrote; what is cut off in the middle waits for the next call."""
        data = self._rest + data
        at = 0
        while at < len(data):
            if data[at] == 0x1B:
                code = _CODE.match(data, at)
                if code is None:
                    assert len(data) - at < 16, data[at : at + 16]
                    break
                self._obey(code[1].decode(), code[2].decode())
                at = code.end()
                continue
            size = 1 + sum(data[at] >= bound for bound in (0xC0, 0xE0, 0xF0))
            if at + size > len(data):
                break
            self._put(data[at : at + size].decode())
            at += size
        self._rest = data[at:]

    def _obey(self, given: str, code: str) -> None:
        count = int(given) if given.isdecimal() else 1
        if code == "A":
            self._row = max(self._top, self._row - count)
        elif code == "K":
            assert given == "2", f"unknown: erase {given}"
            self._lines[self._row] = ""
        else:
            assert code in "mhl", f"unknown: {given}{code}"

    @property
    def _top(self) -> int:
        return max(0, len(self._lines) - LINES)

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._down()
        else:
            if self._column == COLUMNS:
                self._down()
                self._column = 0
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append("")


class Session:
    """`python ARGUMENTS` on a terminal of its own."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.screen = Screen()
        self.raw = b""
        self.status: int | None = None
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, *arguments], environment())
        size = struct.pack("HHHH", LINES, COLUMNS, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.status is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._terminal)

    @property
    def cursor_hidden(self) -> bool:
        """Whether the program last hid the cursor."""
        return self.raw.rfind(b"\x1b[?25l") > self.raw.rfind(b"\x1b[?25h")

    def press_ctrl_c(self) -> None:
        """As a person does: the terminal sends the signal."""
        os.write(self._terminal, b"\x03")

    def frames(self) -> Iterator[str]:
        """What the screen shows, after each piece of output until the program ends."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            readable, _, _ = select.select([self._terminal], [], [], end - time.monotonic())
            if not readable:
                break
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # Linux says so when the other side has closed.
                data = b""
            if not data:
                _, status = os.waitpid(self._pid, 0)
                self.status = os.waitstatus_to_exitcode(status)
                return
            self.raw += data
            self.screen.feed(data)
            yield self.screen.text
        raise AssertionError(f"not done within {DEADLINE:.0f} s:\n{self.screen.text}")

    def wait_for(self, pattern: str) -> None:
        """Go on until the screen shows it."""
        for frame in self.frames():
            if re.search(pattern, frame):
                return
        raise AssertionError(f"the program ended before {pattern}:\n{self.screen.text}")
