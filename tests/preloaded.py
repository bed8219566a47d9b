"""Commands of the project as forks of a process that has imported its libraries.

A process of its own imports them for fifteen seconds, and then does for five what it is tested for.
Unlike a real process it has no plots, and imported before it had its environment. Tests of starting
start real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

IMPORTED = [
    "peft",
    "launch.local",
    "rlhf.learner",
    "rlhf.report",
    "rollout.transformers_generator",
]


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Fork:
    """A `pairloop` command that runs; what tests use of `subprocess.Popen[str]`."""

    def __init__(
        self, arguments: Sequence[str], variables: Mapping[str, str], cwd: Path, ranks: int = 0
    ) -> None:
        """`variables` are its whole environment. With `ranks`, so many processes run the command
        and find each other; nobody ends them where one fails, as a launcher would."""
        self.args = ["pairloop", *arguments]
        self._output = NamedTemporaryFile()  # noqa: SIM115 (there as long as this is)
        given = (list(arguments), str(cwd), self._output.name)
        before = dict(os.environ)
        # The server starts with the first process, and numbers of threads are read at import.
        os.environ.update(variables)
        try:
            self._processes = [
                _server().Process(target=_become, args=(*given, {**variables, **of_rank}))
                for of_rank in _ranks(ranks)
            ]
            for process in self._processes:
                process.start()
            # One that a failed test left would be waited for.
            atexit.register(self.kill)
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def pids(self) -> list[int]:
        """Of each rank."""
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def pid(self) -> int:
        """Of the first one."""
        return self.pids[0]

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it: minus the signal that ended it; of ranks, the first that failed.
        None while one runs."""
        found = [process.exitcode for process in self._processes]
        return None if None in found else next(filter(None, found), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the first one."""
        if self._processes[0].exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it wrote, on either stream, once it has ended."""
        end = None if timeout is None else time.monotonic() + timeout
        for process in self._processes:
            process.join(None if end is None else max(0, end - time.monotonic()))
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return Path(self._output.name).read_text(errors="replace"), None


def _ranks(count: int) -> list[dict[str, str]]:
    """Variables of each rank, as torchrun sets them; none for a process by itself."""
    if not count:
        return [{}]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**where, **sizes, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]


def without_plots(put: Callable[[Any, str, Any], None]) -> None:
    """`put` an empty plot in the place of each that a report has."""
    from rlhf.report import charts

    for name in vars(charts):
        if name.endswith(("_panel", "_forest")) and not name.startswith("_"):
            put(charts, name, lambda *_, **__: "")


def _become(arguments: list[str], cwd: str, output: str, variables: dict[str, str]) -> None:
    """In the fork: what `python -m launch` does, with these variables and in this folder."""
    with open(output, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(variables)
    path = [place for place in variables.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*path, *(place for place in sys.path if place not in path)]
    os.chdir(cwd)
    sys.argv = ["pairloop", *arguments]
    without_plots(setattr)
    from launch.cli import main

    if before := variables.get("RUN_BEFORE"):
        runpy.run_path(before)
    try:
        status = main(arguments)
    except Exception:
        traceback.print_exc()
        status = 1
    # A forked process leaves without them.
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    sys.exit(status)
