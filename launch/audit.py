"""`pairloop judge audit`: whether who trains nothing prefers what a run chose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.errors import InputError
from rlhf.files import finite_or_null
from rlhf.pair_audit import SHEETS, labelled
from rlhf.run_view import RoundView, RunView


def show(folder: Path, as_json: bool) -> int:
    """Print what audit judges and people said of each round's pairs; 0.

    Raises InputError where `folder` is no run, or none of its rounds was audited.
    """
    run = RunView(folder)
    found = [entry for round in run.rounds for entry in _of_round(run, round)]
    if not found:
        raise InputError(
            f"{folder} must have a round whose pairs were audited: it has no audit judge, or no "
            f"round has got that far; people's labels of {folder / SHEETS} are read with "
            "`pairloop judge gold`"
        )
    if as_json:
        print(json.dumps(finite_or_null(found), indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    table = Table(title="Who trains nothing prefers what was chosen in", title_justify="left")
    for column in ("round", "who", "on", "share of pairs", "95% interval", "pairs", "verdict"):
        table.add_column(column, overflow="fold")
    for entry in found:
        table.add_row(*_row(entry))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        # A file has no width: nothing in it is folded to fit one.
        console.width = 160
    console.print(table)
    print("0.5 is a coin's share; an equal score counts half")
    return 0


def _of_round(run: RunView, round: RoundView) -> Iterator[dict[str, Any]]:
    record, pairs = round.record("audit"), round.table("audit/pairs")
    if record is None or pairs is None:
        return
    sheet = run.folder / SHEETS / round.path.name
    people = labelled(sheet, pairs.collect(), run.config.evaluation.bootstrap)
    for entry in (*record["judges"], *people):
        yield {"round": round.index, **entry}


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    counted = sum(entry[name] for name in ("preferred", "equal", "against"))
    known = entry["value"] is not None
    return (
        str(entry["round"]),
        entry["judge"],
        entry["dimension"],
        f"{entry['value']:.3f}" if known else "",
        f"{entry['low']:.3f} to {entry['high']:.3f}" if known else "",
        str(counted),
        entry["verdict"],
    )
