"""A grid over settings of a training on a file: its points, and what each gained at what drift."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from rlhf.config_io import load_as
from rlhf.config_offline import OfflineConfig
from rlhf.errors import InputError

_UNPARTED = r"""\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,]"""
_OWN = ("run.name", "run.directory")


@dataclass(frozen=True, slots=True)
class Point:
    """One training of a sweep."""

    settings: Mapping[str, str]
    """What the sweep varies -> its value here, as it was given."""
    config: OfflineConfig

    @property
    def name(self) -> str:
        return self.config.run.name


@dataclass(frozen=True, slots=True)
class Change:
    """How a held-out score changed from the start's, with its 95% interval over clusters."""

    value: float
    low: float | None
    high: float | None
    """An end that the clusters don't bound is None."""

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Of the interval."""
        return self.low, self.high


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of a point's answers to held-out prompts."""

    kl: float
    """KL to the start on fresh samples, nats an answer."""
    changes: Mapping[str, Change]
    """Dimension, `reward` or `audit.` dimension -> change."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a point came to. Numbers are of its best epoch, on held-out examples."""

    name: str
    settings: Mapping[str, str]
    failure: str | None = None
    """Why it has no numbers."""
    measure: str | None = None
    """What `before` and `after` are shares of: see `rlhf.held_out.compare`."""
    examples: int | None = None
    before: float | None = None
    after: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the gain's 95% interval over clusters; None where the clusters don't bound it."""
    drift: float | None = None
    """Mean over both kinds of answers of |mean log pi - log ref|, nats an answer; None where the
    objective has no reference."""
    logratios: Mapping[str, float] | None = None
    best_epoch: int | None = None
    advice: tuple[str, ...] = ()
    answers: Answers | None = None
    """To held-out prompts, where a sweep has them."""

    def record(self) -> dict[str, Any]:
        """As `sweep.json` has it."""
        return {**asdict(self), "settings": dict(self.settings)}


def values_of(key: str, text: str) -> list[str]:
    """The values of a flag, parted by commas that are in no bracket and no quotes.

    >>> values_of("objective.beta", "0.1, 0.2")
    ['0.1', '0.2']
    >>> values_of("model.lora.target_modules", "[q_proj,v_proj],all-linear")
    ['[q_proj,v_proj]', 'all-linear']
    """
    pieces = re.findall(rf"((?:{_UNPARTED})*),", f"{text},")
    found = [piece.strip() for piece in pieces]
    if not all(found):
        raise InputError(f"--{key} has an empty value in {text!r}; write it as 0.05,0.1")
    if twice := sorted({value for value in found if found.count(value) > 1}):
        raise InputError(f"--{key} must have each value once, got {twice[0]} again in {text!r}")
    return found


def grid(paths: Sequence[Path], overrides: Sequence[tuple[str, str]]) -> tuple[Path, list[Point]]:
    """The sweep's folder, and every combination of the flags that have several values.

    Raises InputError, before anything runs, for a value that its setting doesn't take, for a grid
    of one, and where the folder holds a run.
    """
    keys = [key for key, _ in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"--{key} is given twice; write all its values as --{key} A,B")
    options = {key: values_of(key, text) for key, text in overrides}
    varied = [key for key, values in options.items() if len(values) > 1]
    if own := [key for key in varied if key in _OWN]:
        raise InputError(f"--{own[0]} can't be varied: a sweep names its points itself")
    if not varied:
        raise InputError(
            "a sweep needs a setting with several values, as --objective.beta 0.05,0.1,0.2,0.5; "
            "one training is `pairloop dpo`"
        )
    combined = [list(zip(options, values, strict=True)) for values in product(*options.values())]
    configs = [load_as(OfflineConfig, paths, settings) for settings in combined]
    folder = Path(configs[0].run.directory) / configs[0].run.name
    if (folder / "config.json").exists():
        raise InputError(
            f"run.name: {folder} holds a run, and a sweep needs a folder of its own; give another "
            "run.name"
        )
    points = []
    for config, settings in zip(configs, combined, strict=True):
        own_settings = {key: value for key, value in settings if key in varied}
        name = "--".join(f"{key}-{_plain(value)}" for key, value in own_settings.items())
        run = config.run.model_copy(update={"name": name, "directory": str(folder)})
        points.append(Point(own_settings, config.model_copy(update={"run": run})))
    return folder, points


def _plain(value: str) -> str:
    """The value as a folder's name takes it; told apart by a hash where that is not the value."""
    if re.fullmatch(r"[A-Za-z0-9._+-]+", value) and "+" not in value:
        return value
    digest = sha256(value.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', value)[:40]}-{digest}"


def outcome(point: Point, stats: Mapping[str, Any]) -> Outcome:
    """What a finished point's `stats.json` says."""
    held, best = stats["held_out"], stats["epochs"][stats["best_epoch"] - 1]
    ratios = {
        name.removeprefix("validation_logratio_"): float(value)
        for name, value in best.items()
        if name.startswith("validation_logratio_")
    }
    return Outcome(
        point.name,
        point.settings,
        measure=held["measure"],
        examples=held["examples"],
        before=held["before"],
        after=held["after"],
        gain=held["change"],
        low=held["low"],
        high=held["high"],
        drift=sum(map(abs, ratios.values())) / len(ratios) if ratios else None,
        logratios=ratios,
        best_epoch=int(stats["best_epoch"]),
        advice=tuple(stats["advice"]),
    )


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The table, a row a point, in the order of the grid."""
    return [{**found.settings, **_cells(found)} for found in outcomes]


def answer_rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The table of held-out answers, a row for each point that gave some."""
    return [
        {
            **found.settings,
            "KL": f"{found.answers.kl:.2f}",
            **{name: _changed(change) for name, change in found.answers.changes.items()},
        }
        for found in outcomes
        if found.answers is not None
    ]


def _changed(change: Change) -> str:
    if change.low is None or change.high is None:
        return f"{change.value:+.3f}"
    return f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"


def _cells(found: Outcome) -> dict[str, str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    said = "; ".join(line.split(":")[0] for line in found.advice)
    bounded = found.low is not None and found.high is not None
    interval = f"{found.low:+.3f} to {found.high:+.3f}" if bounded else ""
    drift = number(found.drift, ".2f") or ("" if found.failure else "no reference")
    return {
        "held out": number(found.examples, ","),
        "before": number(found.before, ".3f"),
        "after": number(found.after, ".3f"),
        "gained": number(found.gain, "+.3f"),
        "95% interval": interval,
        "drift": drift,
        "epoch": number(found.best_epoch, "d"),
        "said": f"failed: {found.failure}" if found.failure else said,
    }
