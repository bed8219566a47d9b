"""`pairloop judge cache`: the verdicts that are kept, by judge and model."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.errors import InputError
from rollout.judges.cache import Chosen, Held, open_existing

_SECONDS_A_DAY = 86_400


def show(
    path: Path, judge: str | None, model: str | None, older_than: float | None, prune: bool
) -> int:
    """Print what is meant, and remove it with `prune`; 0. `older_than` is in days.

    Raises InputError where there is no cache at `path`.
    """
    if older_than is not None and older_than < 0:
        raise InputError(f"--older-than must be at least 0 days, got {older_than:g}")
    before = None if older_than is None else time.time() - older_than * _SECONDS_A_DAY
    chosen = Chosen(judge, model, before)
    cache = open_existing(path)
    try:
        _print(cache.held(chosen))
        if prune:
            print(f"removed {cache.prune(chosen)} verdicts")
    finally:
        cache.close()
    return 0


def _print(held: list[Held]) -> None:
    if not held:
        print("no verdicts")
        return
    table = Table()
    for column in ("judge", "model", "oldest", "newest"):
        table.add_column(column, overflow="fold")
    for column in ("verdicts", "MB"):
        table.add_column(column, justify="right")
    for line in held:
        table.add_row(
            line.judge,
            line.model,
            _day(line.oldest),
            _day(line.newest),
            str(line.verdicts),
            f"{line.size / 1e6:.1f}",
        )
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d")
