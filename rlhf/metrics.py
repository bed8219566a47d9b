"""`metrics.jsonl`: one JSON object a line, appended as the run goes, rewound when it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.files import atomic_write, finite_or_null, make_folder, reports_full_disk

_KEYS = ("round", "stage", "step")

Log = Callable[[int | None, str, int, Mapping[str, Any]], None]
"""Round, stage, step, values."""


class Metrics:
    """An append-only log of `{"round", "stage", "step", ...}` lines.

    A stage that starts over, or goes on from a checkpoint, first calls `rewind`: so no step is in
    the file twice. A last line torn by a kill is dropped when the file is opened. `also` is told
    each line once it is in the file.
    """

    def __init__(self, path: Path, also: Log = lambda *_: None) -> None:
        self.path = path
        self._also = also
        make_folder(path.parent)
        with path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)

    def log(self, round: int | None, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; non-finite floats become null. Steps count from 1 in each stage.

        `round` is None for what belongs to no round. Raises `InputError` if the disk is full; the
        file then ends with the line before.
        """
        assert step >= 1, f"steps count from 1, got {step}"
        assert not set(_KEYS) & values.keys(), f"values may not name {_KEYS}"
        record = finite_or_null({"round": round, "stage": stage, "step": step, **values})
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with reports_full_disk(self.path), self.path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                # A nearly full disk takes a part of the line; the next write then says so.
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(start)
                raise
        self._also(round, stage, step, values)

    def settle(self, round: int | None, stage: str, values: Mapping[str, Any]) -> None:
        """The one line of a stage that is derived from stored results: there once, as they are."""
        line = finite_or_null({"round": round, "stage": stage, "step": 1, **values})
        if line not in self.read():
            self.rewind(round, stage)
            self.log(round, stage, 1, values)

    def rewind(self, round: int | None, stage: str, after_step: int = 0) -> None:
        """Drop the lines of this round and stage whose step is above `after_step`."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [
            line
            for line, record in zip(lines, self.read(), strict=True)
            if (record["round"], record["stage"]) != (round, stage) or record["step"] <= after_step
        ]
        if len(kept) < len(lines):
            atomic_write(self.path, b"".join(kept))

    def read(self) -> list[dict[str, Any]]:
        """Every line, in the order written. Raises `InputError` naming a line that is no record."""
        return read_metrics(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that may be growing, in the order written.

    Raises `InputError` naming a line that is no record.
    """
    content = path.read_bytes()
    records = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if (
            not isinstance(record, dict)
            or not set(_KEYS) <= record.keys()
            or not isinstance(record["step"], int)
        ):
            raise InputError(
                f"{path}:{number}: must be a JSON object with {', '.join(_KEYS)}, got "
                f"{line[:60].decode(errors='replace')!r}; delete that line"
            )
        records.append(record)
    return records
