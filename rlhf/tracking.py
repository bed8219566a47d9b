"""Trackers: metrics.jsonl and sample tables told to wandb, TensorBoard or your own, each once.

metrics.jsonl is the truth; a tracker is a copy of it that can only be appended to. So what was told
is kept beside the run (`trackers/<name>.jsonl`), written before it is told: whatever kills the run,
a tracker gets no line twice and none that goes back, and at most lacks the one under way. A step
that is done again after a kill stays as it was told first. What a tracker missed, because it was
lost or was switched on later, it is told at the next start.
"""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

from rlhf.config import Tracking
from rlhf.errors import InputError, PairloopError
from rlhf.files import make_folder, read_json, write_json
from rlhf.metrics import Log, Metrics
from rlhf.protocols import TrackedRun, Tracker
from rlhf.redaction import mask
from rlhf.types import Prompt

KNOWN = {
    "tensorboard": "rlhf.trackers.tensorboard:TensorBoard",
    "wandb": "rlhf.trackers.wandb:Wandb",
}
"""Name in `tracking.trackers` -> class, made with the `tracking` section. One line a tracker."""

Rows = Sequence[Mapping[str, str | float]]


def build(settings: Tracking) -> dict[str, Tracker]:
    """The trackers that were asked for, not yet started and without a heavy import.

    Raises InputError for a name that is not known, or a package that is not installed.
    """
    made = {}
    for name in settings.trackers:
        if name not in KNOWN:
            raise InputError(
                f"tracking.trackers must name {' or '.join(sorted(KNOWN))}, got {name!r}; "
                "leave it out"
            )
        module, _, kind = KNOWN[name].partition(":")
        made[name] = getattr(importlib.import_module(module), kind)(settings)
    return made


def need(package: str) -> None:
    """Raise InputError, with the command that helps, where a tracker's package is missing.

    Asked by its distribution: wandb leaves folders called `wandb`, which Python would import.
    """
    try:
        version(package)
    except PackageNotFoundError:
        raise InputError(
            f"tracking.trackers names {package}, which is not installed: "
            f"pip install 'pairloop[{package}]', or leave it out"
        ) from None


@dataclass(slots=True)
class _Member:
    tracker: Tracker
    journal: Metrics
    told: set[tuple[int | None, str, int]]


class Trackers:
    """Tells every tracker the same things, in the same order, once.

    A tracker that can't start is an `InputError`: what was asked for can't be had. One that fails
    later (a network, a server) must not cost a training run: it is said, kept in `lost`, and the
    run goes on without it.
    """

    def __init__(self, members: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._waiting = dict(members)
        self._members: dict[str, _Member] = {}
        self._say = say
        self._steps: dict[int, int] = {}
        self.lost: dict[str, str] = {}
        """Name and reason of each tracker that failed."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """Start each tracker for the run `name`, or go on under the identity it had.

        Their files lie in `folder`. Raises InputError, saying what to do, where one can't start.
        """
        if not self._waiting:
            return
        identity = _identity(make_folder(folder) / "id.json")
        for member, tracker in self._waiting.items():
            journal = Metrics(folder / f"{member}.jsonl")
            told = {(line["round"], line["stage"], line["step"]) for line in journal.read()}
            run = TrackedRun(name, identity, make_folder(folder / member), config, len(told))
            try:
                where = tracker.start(run)
            except PairloopError:
                raise
            # Another's code, often over a network: it may raise anything.
            except Exception as error:
                raise InputError(
                    f"tracking.trackers names {member}, which can't start: {_told(error)}. Mend "
                    "that, or leave it out"
                ) from error
            self._say(f"{member}: {where}")
            self._members[member] = _Member(tracker, journal, told)
        self._waiting = {}

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Tell what metrics.jsonl holds and some tracker has not heard."""
        for line in lines:
            values = {k: v for k, v in line.items() if k not in ("round", "stage", "step")}
            self.log(line["round"], line["stage"], line["step"], values)

    def log(self, round: int | None, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. Trackers hear its numbers, at the run's optimizer step so far.

        For training that is the step itself, counted over all rounds; it never goes back.
        """
        if stage == "train" and round is not None:
            self._steps[round] = max(step, self._steps.get(round, 0))
        before = [n for r, n in self._steps.items() if round is None or r < round]
        now = step if stage == "train" else self._steps.get(round or 0, 0)
        so_far = sum(before) + now
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        if not numbers:
            return
        key = (round, stage, step)
        self._tell(key, lambda tracker: tracker.log(round, stage, so_far, numbers))

    def table(self, round: int, name: str, rows: Callable[[], Rows]) -> None:
        """A table of this round under its own name; made only if some tracker has not heard it."""

        def tell(tracker: Tracker) -> None:
            if found := rows():
                tracker.table(round, name, found)

        self._tell((round, f"table {name}", 1), tell)

    def finish(self, state: str) -> None:
        """The run ended, or stopped for now, in this state (of status.json)."""
        for name, member in list(self._members.items()):
            self._guarded(name, lambda member=member: member.tracker.finish(state))  # type: ignore[misc]
        self._members = {}

    def _tell(self, key: tuple[int | None, str, int], tell: Callable[[Tracker], None]) -> None:
        for name, member in list(self._members.items()):
            if key in member.told:
                continue
            member.told.add(key)
            member.journal.log(*key, {})
            self._guarded(name, lambda member=member: tell(member.tracker))  # type: ignore[misc]

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        # Another's code, often over a network: it may raise anything, and none of it may stop
        # training.
        except Exception as error:
            del self._members[name]
            self.lost[name] = _told(error)
            self._say(
                f"WARNING: tracker {name} is lost: {self.lost[name]}. The run goes on without it; "
                "metrics.jsonl has everything, and the next start tells it what it missed"
            )


def tracked_metrics(path: Path, trackers: Trackers, show: Log = lambda *_: None) -> Metrics:
    """metrics.jsonl, each line of which `show` and then the trackers hear too; which of them that
    cost is noted there. They are told at once what they missed so far."""
    noted: set[str] = set()

    def tell(round: int | None, stage: str, step: int, values: Mapping[str, Any]) -> None:
        show(round, stage, step, values)
        trackers.log(round, stage, step, values)
        for name in sorted(trackers.lost.keys() - noted):
            noted.add(name)
            lines = [line for line in metrics.read() if line["stage"] == "lost_tracker"]
            why = {"tracker": name, "reason": trackers.lost[name]}
            metrics.log(round, "lost_tracker", len(lines) + 1, why)

    metrics = Metrics(path, tell)
    trackers.replay(metrics.read())
    return metrics


def pair_rows(pairs: pl.DataFrame, count: int) -> list[dict[str, str | float]]:
    """At most `count` of a round's pairs (schema `pairs_schema`), from largest margin to smallest.

    Evenly spaced in that order, ties by prompt_id, so that the same pairs give the same rows.
    """
    ordered = pairs.sort("margin", "prompt_id", descending=[True, False])
    some = ordered[spread(ordered.height, count)]
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "margin": row["margin"],
            **{
                f"{dimension} ({side})": value
                for side in ("chosen", "rejected")
                for dimension, value in row[f"scores_{side}"].items()
            },
        }
        for row in some.iter_rows(named=True)
    ]


def answer_rows(
    prompts: Sequence[Prompt], start: pl.DataFrame, now: pl.DataFrame
) -> list[dict[str, str | float]]:
    """The answers (schema `COMPLETIONS`, one a prompt) to these prompts, before and after."""
    before, after = (dict(t.select("prompt_id", "text").iter_rows()) for t in (start, now))
    return [
        {
            "prompt": "\n\n".join(message["content"] for message in prompt.messages),
            "start": before[prompt.prompt_id],
            "now": after[prompt.prompt_id],
        }
        for prompt in prompts
    ]


def spread(length: int, count: int) -> list[int]:
    """`count` positions, evenly from first to last; all where there are no more."""
    if length <= count:
        return list(range(length))
    return [i * (length - 1) // max(1, count - 1) for i in range(count)]


def _identity(path: Path) -> str:
    """The run's identity with its trackers, drawn once."""
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(8)})
    return str(read_json(path, "delete it: trackers then start a new run")["id"])


def _told(error: Exception) -> str:
    return mask(f"{type(error).__name__}: {error}")
