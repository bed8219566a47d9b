"""What the report says, as numbers: read from a run's folder, arithmetic on tables only.

Every function takes whatever is finished and leaves out what is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl

from rlhf.evaluation import AUDIT_PREFIX
from rlhf.gates import LIMITS, NORMAL_975
from rlhf.run_view import RoundView, RunView
from rlhf.statistics import standard_error

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CURVES = (
    "loss", "accuracy", "margin", "logratio_chosen", "logratio_rejected", "logratio_good",
    "logratio_bad", "kl_baseline", "nll", "grad_norm",
)  # fmt: skip
CURVE_POINTS = 240


@dataclass(frozen=True, slots=True)
class Point:
    """A value of one round with its 95% interval; None at an end means unbounded.

    >>> Point(1, 0.1, 0.05, None).high is None
    True
    """

    round: int
    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, round: int, found: Mapping[str, Any], key: str) -> Point:
        """From a summary or a comparison of `rlhf.evaluation`."""
        return cls(round, found[key], found["low"], found["high"])


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension round by round: its scores, and its change against the start."""

    key: str
    scores: tuple[Point, ...]
    changes: tuple[Point, ...]

    @property
    def audit(self) -> bool:
        """Whether a judge that trains nothing scored it."""
        return self.key.startswith(AUDIT_PREFIX)

    @property
    def name(self) -> str:
        """Without the mark of an audit."""
        return self.key.removeprefix(AUDIT_PREFIX)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A later version against the start: which, on which prompts, and each dimension's change."""

    round: int
    split: str
    start: Mapping[str, Mapping[str, Any]]
    now: Mapping[str, Mapping[str, Any]]
    change: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A round's pairs in numbers; quantiles are those of `QUANTILES`, lengths are in tokens."""

    round: int
    count: int
    margin: tuple[float, ...]
    chosen_tokens: tuple[float, ...]
    rejected_tokens: tuple[float, ...]
    chosen_longer: float
    """Share of pairs."""
    dimensions: Mapping[str, Point]
    """Mean of chosen minus rejected."""
    inverted: Mapping[str, float]
    """Share of pairs whose chosen answer scores lower than the rejected one."""
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage took, all rounds together, and in each."""

    name: str
    seconds: float
    tokens: int | None
    by_round: Mapping[int | None, float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went. `loop` is what passed between stages, None where it was not logged."""

    stages: tuple[Stage, ...]
    loop: float | None

    @property
    def wall(self) -> float:
        """Seconds from the start of each process's loop to the end of its last stage."""
        return sum(stage.seconds for stage in self.stages) + (self.loop or 0.0)


def rank(key: str) -> tuple[bool, bool, str]:
    """Sorts the reward first and audits last."""
    return key != "reward", key.startswith(AUDIT_PREFIX), key


def dimensions(run: RunView) -> list[Dimension]:
    """Every dimension that was evaluated, the reward first, audits last."""
    found = {r.index: r.record("evaluation") or {} for r in run.evaluated}
    keys = sorted({k for evaluation in found.values() for k in evaluation["scores"]}, key=rank)
    return [
        Dimension(
            key,
            tuple(
                Point.of(i, e["scores"][key], "value")
                for i, e in found.items()
                if i is not None and key in e["scores"]
            ),
            tuple(
                Point.of(i, e["against"]["start"]["change"][key], "difference")
                for i, e in found.items()
                if i and key in e["against"]["start"]["change"]
            ),
        )
        for key in keys
    ]


def comparison(run: RunView) -> Comparison | None:
    """The claim where there is one; else, on the gate split, the best promoted round or the last
    that was evaluated."""
    if claim := run.final.record("evaluation"):
        return Comparison(
            claim["best_round"], "final", claim["start"], claim["best"], claim["change"]
        )
    version = reader_version(run)
    scores = {r.index: r.record("evaluation") or {} for r in run.evaluated}
    if not version:
        return None
    change = scores[version]["against"]["start"]["change"]
    return Comparison(version, "gate", scores[0]["scores"], scores[version]["scores"], change)


def reader_version(run: RunView) -> int:
    """The version that a reader compares with the start: the best promoted one, else the last that
    was evaluated; 0 where there is only the start."""
    evaluated = [r.index or 0 for r in run.evaluated]
    best = run.status.get("best_round")
    return best if best in evaluated else max(evaluated, default=0)


def gate_rows(run: RunView) -> list[dict[str, Any]]:
    """Every gate of every round, with `round`, `against` and `promoted` of that round."""
    rows = []
    for round in run.judged:
        verdict = round.record("gates") or {}
        for gate in verdict["gates"]:
            about = {"round": round.index, "against": verdict["against"]}
            rows.append({**gate, **about, "promoted": verdict["promoted"]})
    return rows


def is_limit(gate: Mapping[str, Any]) -> bool:
    """Whether a gate bounds the policy's drift, and its value is no change of a score."""
    return gate["name"] in LIMITS


def drift(run: RunView) -> dict[str, list[Point]]:
    """How far the policy moved, by round with 95% intervals from standard errors; the names are
    those of `LIMITS`."""
    found: dict[str, list[Point]] = {name: [] for name in LIMITS}
    for round in run.rounds:
        measured = round.record("drift") or {}
        for name, limit in LIMITS.items():
            if round.index is not None and limit.measured in measured:
                value, error = (measured[limit.measured][n] for n in ("value", "standard_error"))
                half = None if error is None else NORMAL_975 * error
                ends = (None, None) if half is None else (value - half, value + half)
                found[name].append(Point(round.index, value, *ends))
    return found


def pairs(run: RunView) -> list[Pairs]:
    """Each round's pairs in numbers."""
    found = []
    for round in run.rounds:
        table = round.table("pairs")
        if table is None or round.index is None:
            continue
        columns = table.select(
            "cluster",
            "margin",
            "scores_chosen",
            "scores_rejected",
            prompt=pl.col("prompt_token_ids").list.len().cast(pl.Int64),
            chosen=pl.col("chosen_token_ids").list.len().cast(pl.Int64),
            rejected=pl.col("rejected_token_ids").list.len().cast(pl.Int64),
        ).collect()
        if columns.height:
            found.append(_pairs(round.index, columns))
    return found


def _pairs(index: int, table: pl.DataFrame) -> Pairs:
    names = [field.name for field in table.schema["scores_chosen"].fields]  # type: ignore[attr-defined]
    clusters = table["cluster"].to_list()
    points, inverted = {}, {}
    for name in sorted(names):
        gaps = (
            table["scores_chosen"].struct.field(name) - table["scores_rejected"].struct.field(name)
        ).to_numpy()
        mean, half = float(gaps.mean()), NORMAL_975 * standard_error(gaps, clusters)
        bounded = math.isfinite(half)
        ends = (mean - half, mean + half) if bounded else (None, None)
        points[name] = Point(index, mean, *ends)
        # Scores are compared as selection does, to 12 decimals.
        inverted[name] = float((gaps.round(12) < 0).mean())
    return Pairs(
        round=index,
        count=table.height,
        margin=_quantiles(table["margin"]),
        chosen_tokens=_quantiles(table["chosen"]),
        rejected_tokens=_quantiles(table["rejected"]),
        chosen_longer=float((table["chosen"] > table["rejected"]).to_numpy().mean()),
        dimensions=points,
        inverted=inverted,
        trained_tokens=int((2 * table["prompt"] + table["chosen"] + table["rejected"]).sum()),
    )


def _quantiles(values: pl.Series) -> tuple[float, ...]:
    return tuple(float(q) for q in np.quantile(values.to_numpy(), QUANTILES))


def curves(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Training steps as rows of round, step, at (steps over all rounds) and the means of `CURVES`,
    and how many steps a row stands for (the last of a round may stand for fewer)."""
    lines = [line for line in metrics if line["stage"] == "train" and line["round"] is not None]
    lines.sort(key=lambda line: (line["round"], line["step"]))
    size = max(1, math.ceil(len(lines) / CURVE_POINTS))
    rows: list[dict[str, Any]] = []
    at = 0
    for number, steps in groupby(lines, key=lambda line: line["round"]):
        for chunk in _chunks(list(steps), size):
            at += len(chunk)
            row = {"round": number, "step": chunk[-1]["step"], "at": at}
            rows.append(row | {name: _mean([c.get(name) for c in chunk]) for name in CURVES})
    return rows, size


def _chunks(lines: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing or was not finite, so that a curve shows the gap."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def skipped_steps(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Optimizer steps that fp16 overflow left out."""
    return sum(int(line.get("skipped_steps") or 0) for line in metrics)


def timing(run: RunView, metrics: Sequence[Mapping[str, Any]], trained: Sequence[Pairs]) -> Timing:
    """Seconds and tokens of each stage, in the order they were first met."""
    epochs = run.config.learner.epochs
    # Where labels train, the pairs only inform.
    on_pairs = run.config.objective.needs.data == "pairs"
    passes = {p.round: p.trained_tokens for p in trained} if on_pairs else {}
    seconds: dict[str, dict[int | None, float]] = {}
    tokens: dict[str, int] = {}
    loop: float | None = None
    for line in metrics:
        if "seconds" not in line:
            continue
        name, number = line["stage"], line["round"]
        by_round = seconds.setdefault(name, {})
        by_round[number] = by_round.get(number, 0.0) + line["seconds"]
        if "loop_seconds" in line:
            loop = (loop or 0.0) + line["loop_seconds"]
        read = passes.get(number, 0) * {"training": epochs, "reference_logps": 1}.get(name, 0)
        if read or "tokens" in line:
            tokens[name] = tokens.get(name, 0) + line.get("tokens", read)
    return Timing(
        tuple(Stage(n, sum(by.values()), tokens.get(n), by) for n, by in seconds.items()), loop
    )


def pool_counts(run: RunView) -> dict[str, dict[str, int]]:
    """What became of the prompts that were read, per split."""
    start: RoundView | None = run.rounds[0] if run.rounds else None
    return {} if start is None else start.record("pools") or {}
