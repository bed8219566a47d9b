"""TensorBoard: event files in the run's folder. Nothing leaves the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.config import Tracking
from rlhf.protocols import TrackedRun
from rlhf.tracking import need

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """`rlhf.protocols.Tracker` over torch's SummaryWriter. Every start adds an event file."""

    def __init__(self, settings: Tracking) -> None:
        need("tensorboard")
        self._writer: SummaryWriter

    def start(self, run: TrackedRun) -> str:
        """See `Tracker.start`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder))
        if not run.told:
            settings = [{"setting": name, "value": str(value)} for name, value in _flat(run.config)]
            self._text("config", settings, 0)
        return f"tensorboard --logdir {run.folder}"

    def log(self, round: int | None, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)
        # Killed the next moment, nothing told is lost.
        self._writer.flush()

    def table(self, round: int, name: str, rows: Sequence[Mapping[str, str | float]]) -> None:
        """See `Tracker.table`."""
        self._text(f"{name}/round {round:04d}", rows, round)

    def finish(self, state: str) -> None:
        """See `Tracker.finish`."""
        self._writer.close()

    def _text(self, tag: str, rows: Sequence[Mapping[str, str | float]], step: int) -> None:
        lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        table = ["|".join(map(_cell, line)) for line in lines]
        table[1] = "|".join(["---"] * len(rows[0]))
        self._writer.add_text(tag, "\n".join(f"|{line}|" for line in table), step)
        self._writer.flush()


def _cell(value: str | float) -> str:
    """Text as it stands: TensorBoard reads Markdown, so punctuation is written as entities."""
    text = f"{value:.4g}" if isinstance(value, float) else value
    literal = re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)
    return literal.replace("\n", "<br>")


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        inner = isinstance(value, Mapping) and value
        found += _flat(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return found
