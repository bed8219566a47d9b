"""What a run's folder says of its judges: who they are, what stands behind them, how they did.

Read like everything of `rlhf.run_view`: what is not there yet, or was never kept, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from rlhf.agreement import Metric, spearman_within
from rlhf.candidates import reward_expression, score_wide
from rlhf.config_judges import EnsembleSpec, JudgeSpec, LlmSpec, RewardModelSpec, VerifierSpec
from rlhf.files import read_json
from rlhf.run_view import RoundView, RunView
from rlhf.types import SUSPICIOUS
from rlhf.verdict import STANDINGS

REWARD = "reward"
_KEY = ["prompt_id", "sample"]
_REDO = "it belongs to a run: put back what was changed"
_KINDS = {
    "verifier": "verifier",
    "llm": "language model",
    "reward_model": "reward model",
    "recorded": "verdicts from a file",
    "ensemble": "ensemble",
}


@dataclass(frozen=True, slots=True)
class Role:
    """One judge on one dimension: what it is, what it decides, what stands behind it."""

    judge: str
    kind: str
    source: str
    """The function, model and revision, file or members that its scores come from."""
    dimension: str
    uses: tuple[str, ...]
    status: str
    """`granted`, `missing`, `refused`, ...; `not needed`; or `not recorded`."""
    reason: str
    figures: Mapping[str, Any] | None
    """Of its certificate."""

    @property
    def stamped(self) -> bool:
        """Whether it trains although nothing vouches for it."""
        return self.status not in ("granted", "not needed")


@dataclass(frozen=True, slots=True)
class Asked:
    """How often a judge was asked about a dimension at one place of the run, and had no score."""

    round: int | None
    """None for the final split."""
    split: str
    judge: str
    dimension: str
    scores: int
    abstained: int
    flagged: int
    """Completions that look like an attempt on the judge."""


@dataclass(frozen=True, slots=True)
class Alike:
    """How far two rank the answers to one prompt alike, in one round or (None) in all."""

    round: int | None
    one: str
    other: str
    metric: Metric


def roles(run: RunView) -> list[Role]:
    """Every judge and dimension, the panel's first."""
    standings = {(s["judge"], s["dimension"]): s for s in _standings(run)}
    config = run.config
    found = []
    for spec in config.judges.panel:
        for dimension in spec.dimensions:
            status, reason, figures = _standing(run, spec, dimension, standings)
            uses = tuple(_uses(run, dimension))
            found.append(Role(spec.name, _KINDS[spec.kind], source_of(spec), dimension, uses,
                              status, reason, figures))  # fmt: skip
    for spec in config.judges.audit:
        for dimension in spec.dimensions:
            found.append(Role(spec.name, _KINDS[spec.kind], source_of(spec), dimension, ("audit",),
                              "not needed", "it trains nothing", None))  # fmt: skip
    return found


def source_of(spec: JudgeSpec) -> str:
    """Where a judge's scores come from."""
    if isinstance(spec, VerifierSpec):
        return spec.function
    if isinstance(spec, EnsembleSpec):
        members = "; ".join(f"{member.name}: {source_of(member)}" for member in spec.members)
        return f"{spec.combine} of {len(spec.members)}: {members}"
    if isinstance(spec, LlmSpec):
        served = f" at {spec.base_url}" if spec.backend == "openai" else ""
        revision = f", revision {spec.revision}" if spec.revision else ""
        return f"{spec.model}{revision}{served} ({spec.mode})"
    if isinstance(spec, RewardModelSpec):
        revision = f", revision {spec.revision}" if spec.revision else ""
        return f"{spec.model}{revision} ({spec.mapping})"
    return spec.verdicts


def asked(run: RunView) -> list[Asked]:
    """Scores, abstentions and flagged completions, by round, split, judge and dimension."""
    found: list[Asked] = []
    for round in (*run.rounds, run.final):
        final = round.index is None
        places = ("start/scores", "best/scores") if final else ("scores", "evaluation/scores")
        for place in places:
            if (table := round.table(place)) is None:
                continue
            split = "final" if final else "training" if place == "scores" else "gate"
            version = f"final, {place.split('/')[0]}" if final else split
            found += _counted(round.index, version, table)
    return found


def _counted(index: int | None, split: str, table: pl.LazyFrame) -> Iterator[Asked]:
    flagged = pl.col("reason").str.starts_with(f"{SUSPICIOUS} (").fill_null(False)
    rows = (
        table.group_by("judge", "dimension", maintain_order=True)
        .agg(pl.len(), pl.col("abstained").sum(), flagged.sum().alias("flagged"))
        .collect()
    )
    for judge, dimension, scores, abstained, suspicious in rows.iter_rows():
        yield Asked(index, split, judge, dimension, scores, abstained, suspicious)


def usage(run: RunView) -> dict[str, dict[str, Any]]:
    """Judge (or an ensemble's member) -> what its ledger holds: calls, retries, tokens, who
    answered."""
    found = {}
    for spec in _each(run.config.judges.panel + run.config.judges.audit):
        path = run.folder / "judges" / f"{spec.name}-usage.json"
        if path.exists():
            found[spec.name] = read_json(path, _REDO)
    return found


def agreement(run: RunView) -> list[Alike]:
    """How far the reward and each dimension rank a prompt's held-out answers as the audit judges
    do: all rounds together (first), then each. What can't be measured is left out."""
    wide = [_held_out(run, round) for round in run.evaluated]
    tables = [table for table in wide if table is not None]
    if not tables:
        return []
    whole = pl.concat(tables, how="diagonal")
    audits = [f"{j.name}: {d}" for j in run.config.judges.audit for d in j.dimensions]
    panel = [REWARD, *run.config.judges.dimensions]
    found = []
    for other in audits:
        for one in panel:
            for index, table in [(None, whole), *((int(t["round"][0]), t) for t in tables)]:
                metric = _within(table, one, other, run.config.evaluation.bootstrap)
                if metric is not None:
                    found.append(Alike(index, one, other, metric))
    return found


def _held_out(run: RunView, round: RoundView) -> pl.DataFrame | None:
    """A round's answers to the gate split: round, cluster, a column for the reward, each dimension
    and each audit dimension; None where they are gone."""
    scores = round.table("evaluation/scores")
    prompts = round.table("evaluation/per_prompt")
    if scores is None or prompts is None:
        return None
    stored = scores.collect()
    clusters = prompts.select("prompt_id", "cluster").collect()
    dimensions = list(run.config.judges.dimensions)
    names = {judge.name for judge in run.config.judges.panel}
    wide = score_wide(stored.filter(pl.col("judge").is_in(names)), dimensions)
    wide = wide.with_columns(reward_expression(run.config.weights).alias(REWARD))
    for judge in run.config.judges.audit:
        own = score_wide(stored.filter(judge=judge.name), judge.dimensions)
        own = own.rename({d: f"{judge.name}: {d}" for d in judge.dimensions})
        wide = wide.join(own, on=_KEY, how="left", maintain_order="left")
    return wide.join(clusters, on="prompt_id", how="left", maintain_order="left").with_columns(
        round=pl.lit(round.index)
    )


def _within(table: pl.DataFrame, one: str, other: str, resamples: int) -> Metric | None:
    if table.height == 0 or other not in table.columns:
        return None
    # Only answers of one version stand beside each other.
    prompts = table.select(pl.struct("round", "prompt_id").rank("dense")).to_series().to_numpy()
    clusters = table["cluster"].rank("dense").to_numpy()
    x, y = (table[name].cast(pl.Float64).fill_null(math.nan).to_numpy() for name in (one, other))
    return spearman_within(x, y, prompts.astype(np.int64), clusters.astype(np.int64), resamples)


def _standing(
    run: RunView,
    spec: JudgeSpec,
    dimension: str,
    standings: Mapping[tuple[str, str], Mapping[str, Any]],
) -> tuple[str, str, Mapping[str, Any] | None]:
    if isinstance(spec, VerifierSpec):
        return "not needed", "a verifier's tests are its certificate", None
    if dimension not in run.config.needed:
        return "not needed", "no reward, floor or protection uses it", None
    found = standings.get((spec.name, dimension))
    if found is None:
        return "not recorded", "the run has not said how it stands", None
    return found["status"], found["reason"], found.get("shown")


def _uses(run: RunView, dimension: str) -> Iterator[str]:
    config = run.config
    if dimension in config.weights:
        yield f"reward {config.weights[dimension]:.2f}"
    if dimension in config.floors:
        yield f"floor {config.floors[dimension]:g}"
    if dimension in config.protected:
        yield f"protected {config.protected[dimension]:g}"
    if dimension in config.gated:
        yield "gate"


def _standings(run: RunView) -> list[dict[str, Any]]:
    path = run.folder / "judges" / STANDINGS
    found: list[dict[str, Any]] = read_json(path, _REDO)["standings"] if path.exists() else []
    return found


def _each(specs: Sequence[JudgeSpec]) -> Iterator[JudgeSpec]:
    """Those that may keep a ledger, members of ensembles among them."""
    for spec in specs:
        yield spec
        if isinstance(spec, EnsembleSpec):
            yield from spec.members
