"""What every stage of the loop stands on: drawing and scoring in shards, timed and stored once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl

from rlhf.canaries import Items, Watch
from rlhf.config import RunConfig
from rlhf.errors import DataGateError
from rlhf.interrupts import Interrupts
from rlhf.protocols import Learner, Reporter, Sampling, Serving, stream
from rlhf.rounds import Round, RunStore
from rlhf.selection import Rules
from rlhf.tracking import Trackers, tracked_metrics
from rlhf.types import Completion, Prompt, completions_of, completions_table


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop is wired to; `launch` builds it."""

    serving: Serving
    learner: Learner
    sample: Callable[[int], list[Prompt]]
    """Training prompts of a round (from 1)."""
    gate: Sequence[Prompt]
    final: Sequence[Prompt]
    score: Callable[[Items, bool], pl.DataFrame]
    """Scores of the panel; with True, of the audit judges too."""
    check_scores: Callable[[pl.DataFrame], None]
    """Raises DataGateError where judges abstained too often."""
    watch: Watch
    """How judges are watched while they train."""
    prompt_table: Callable[[Sequence[Prompt]], pl.DataFrame]
    counts: Mapping[str, Mapping[str, int]]
    """What became of the prompts that were read, per split."""
    reporter: Reporter
    trackers: Trackers
    interrupts: Interrupts


class StageBase:
    """Draws, scores and times for the loop's stages."""

    def __init__(self, config: RunConfig, store: RunStore, parts: Parts) -> None:
        self.config = config
        self.store = store
        self.parts = parts
        self.rules = Rules.of(config)
        self._last_ended = time.perf_counter()
        self.metrics = tracked_metrics(store.folder / "metrics.jsonl", parts.trackers, self._show)

    def generate(
        self,
        round: Round,
        name: str,
        prompts: Sequence[Prompt],
        version: int,
        sampling: Sampling | None = None,
    ) -> pl.DataFrame:
        """Completions of `prompts` from policy `version`, shard by shard."""
        base = sampling or self.sampling(self.config.rollout.samples_per_prompt)
        shards = self.shards(prompts)

        def compute(missing: Sequence[int]) -> Iterator[tuple[int, pl.DataFrame]]:
            generator = self.parts.serving.at(version, self.policy(version))
            # Every shard has a seed of its own, so that a resumed run draws what a whole one does.
            seeds = [
                np.random.SeedSequence((base.seed, version, _stage_key(name), shard))
                for shard in missing
            ]
            jobs = [
                (shards[shard], replace(base, seed=int(seed.generate_state(1)[0]) % 2**31))
                for shard, seed in zip(missing, seeds, strict=True)
            ]
            done = len(shards) - len(missing)
            for finished, (number, drawn) in enumerate(stream(generator, jobs), start=1):
                shard = missing[number]
                _check_drawn(shards[shard], drawn, base.samples, version)
                advance(done + finished)
                yield shard, completions_table(drawn)

        with (
            self.timed(round, name) as note,
            self.parts.reporter.progress(f"{title(round)} {name}", len(shards)) as advance,
        ):
            table = round.streamed(name, len(shards), compute, self.parts.interrupts.check)
            note["completions"] = table.height
            note["tokens"] = int(table["token_ids"].list.len().sum())
        return table

    def score(
        self,
        round: Round,
        name: str,
        prompts: Sequence[Prompt],
        completions: pl.DataFrame,
        audit: bool,
    ) -> pl.DataFrame:
        """Scores of completions, shard by shard. Raises DataGateError on too many abstentions."""
        table = self.scored(round, name, prompts, completions, audit)
        try:
            self.parts.check_scores(table)
        except DataGateError:
            # Once the judge is mended, the same command scores these answers again.
            round.drop(name)
            raise
        return table

    def scored(
        self,
        round: Round,
        name: str,
        prompts: Sequence[Prompt],
        completions: pl.DataFrame,
        audit: bool,
    ) -> pl.DataFrame:
        """Scores of completions, shard by shard, however many are abstentions."""
        shards = self.shards(prompts)

        def compute(shard: int) -> pl.DataFrame:
            known = {p.prompt_id: p for p in shards[shard]}
            part = completions_of(completions.filter(pl.col("prompt_id").is_in(list(known))))
            scores = self.parts.score([(known[c.prompt_id], c) for c in part], audit)
            advance(shard + 1)
            return scores

        with (
            self.timed(round, name),
            self.parts.reporter.progress(f"{title(round)} {name}", len(shards)) as advance,
        ):
            return round.shards(name, len(shards), compute, self.parts.interrupts.check)

    def keep(self, round: Round, prompts: Sequence[Prompt]) -> None:
        """The prompts that a round's own completions answer, as a table for whoever reads them."""
        round.table("prompts", lambda: self.parts.prompt_table(prompts))

    def policy(self, version: int) -> Path | None:
        """Where a version is stored; None for the start."""
        return None if version == 0 else self.store.round(version).path / "policy"

    def _show(self, round: int | None, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if stage in ("train", "held_out"):
            shown = {k: v for k, v in values.items() if isinstance(v, float)}
            self.parts.reporter.metrics(f"round {round} {stage}", shown)

    def shards(self, prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
        size = self.config.rollout.shard_prompts
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def sampling(self, samples: int) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            samples,
            rollout.temperature,
            rollout.top_p,
            rollout.max_new_tokens,
            self.config.run.seed,
        )

    @contextmanager
    def timed(
        self, round: Round, name: str, artifact: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Log a stage's seconds, unless what it makes (`artifact`, else `name`) was stored.

        `loop_seconds` are those since the last stage ended, or the loop began, in this process:
        what storing, hashing and reporting take, whoever was killed before.
        """
        note: dict[str, Any] = {}
        stored = round.done(artifact or name)
        if not stored:
            self.parts.reporter.stage(f"{title(round)} {name}")
        started = time.perf_counter()
        yield note
        if not stored:
            ended = time.perf_counter()
            times = {"seconds": ended - started, "loop_seconds": started - self._last_ended}
            self._last_ended = ended
            self.metrics.rewind(round.index, name)
            self.metrics.log(round.index, name, 1, {**times, **note})


def _check_drawn(
    prompts: Sequence[Prompt], drawn: Sequence[Completion], samples: int, version: int
) -> None:
    """A generator answers each prompt, in order, from the version that was asked for."""
    expected = [(p.prompt_id, s, version) for p in prompts for s in range(samples)]
    found = [(c.prompt_id, c.sample, c.policy_version) for c in drawn]
    assert found == expected, "the generator answered other prompts, samples or versions"


def _stage_key(name: str) -> int:
    return int.from_bytes(name.encode()[-8:], "big")


def title(round: Round) -> str:
    return "final" if round.index is None else f"round {round.index}"


def unreachable(_: Path | int) -> NoReturn:
    """Computes what is stored already."""
    raise AssertionError("stored already")
