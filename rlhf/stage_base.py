"""What every stage of the loop stands on: drawing and scoring in shards, timed and stored once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import polars as pl

from rlhf.answers import AT_ONCE, Draw, Judged
from rlhf.canaries import Items, Watch
from rlhf.config import RunConfig
from rlhf.errors import DataGateError
from rlhf.interrupts import Interrupts
from rlhf.protocols import Asked, Learner, Reporter, Sampling, Serving, stream
from rlhf.rounds import Round, RunStore, Shards
from rlhf.selection import Rules
from rlhf.tracking import Trackers, tracked_metrics
from rlhf.types import Completion, Prompt, completions_table


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop is wired to; `launch` builds it."""

    serving: Serving
    learner: Learner
    sample: Callable[[int], list[Prompt]]
    """Training prompts of a round (from 1)."""
    gate: Sequence[Prompt]
    final: Sequence[Prompt]
    ask: Callable[[Items, bool], Asked]
    """Asks the panel for scores; with True, the audit judges too."""
    judges_beside: bool
    """Whether judges work by themselves, while a generator or this process does other things."""
    check_scores: Callable[[Iterable[pl.DataFrame]], None]
    """Raises DataGateError where judges abstained too often in these tables together."""
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
        self._ahead: dict[tuple[int | None, str], dict[int, Asked]] = {}
        self._last_ended = time.perf_counter()
        self.metrics = tracked_metrics(store.folder / "metrics.jsonl", parts.trackers, self._show)

    def draw(
        self,
        name: str,
        prompts: Sequence[Prompt],
        version: int,
        sampling: Sampling | None = None,
        audit: bool = False,
    ) -> Draw:
        """What `generate` and `answer` are told; by default sampled as in training."""
        used = sampling or self.sampling(self.config.rollout.samples_per_prompt)
        return Draw(name, self.shards(prompts), version, used, audit)

    def generate(self, round: Round, draw: Draw) -> Shards:
        """Completions, shard by shard."""
        completions = round.sharded(draw.name, len(draw.shards))
        self._generate(round, draw, completions, None)
        return completions

    def answer(self, round: Round, draw: Draw) -> tuple[Shards, Shards]:
        """Completions and their scores, however many are abstentions. Where judges work by
        themselves, a shard is judged while others are drawn."""
        count = len(draw.shards)
        completions, scores = round.sharded(draw.name, count), round.sharded(draw.scores, count)
        ahead = self._ahead.pop((round.index, draw.name), {})
        judged = Judged(draw, scores, self.parts.ask, ahead)
        beside = judged if self.parts.judges_beside else None
        self._generate(round, draw, completions, beside)
        check = self.parts.interrupts.check
        with (
            self.timed(round, draw.scores),
            self.parts.reporter.progress(f"{title(round)} {draw.scores}", count) as advance,
        ):
            for number in [*scores.missing]:
                check()
                judged.offer(number, completions.read(number))
                advance(count - len(scores.missing))
            while judged.store_next():
                advance(count - len(scores.missing))
                check()
            scores.finish()
        return completions, scores

    def trusted(self, round: Round, draw: Draw) -> Shards:
        """The scores of `answer`, where something depends on them. Raises DataGateError on too many
        abstentions."""
        _, scores = self.answer(round, draw)
        try:
            self.parts.check_scores(scores)
        except DataGateError:
            # Once the judge is mended, the same command scores these answers again.
            round.drop(draw.scores)
            raise
        return scores

    @contextmanager
    def drawing_ahead(self, round: Round, draw: Draw) -> Iterator[None]:
        """Within it generators and judges that work by themselves begin with `draw`; what they
        have when it ends is kept."""
        completions = round.sharded(draw.name, len(draw.shards))
        wanted = [*completions.missing]
        if not wanted:
            yield
            return
        generator = self.parts.serving.at(draw.version, self.policy(draw.version))
        ended = Event()
        asked = self._ahead.setdefault((round.index, draw.name), {})
        scores = round.sharded(draw.scores, len(draw.shards))

        def work() -> None:
            jobs = draw.jobs(takewhile(lambda _: not ended.is_set(), wanted))
            for at, drawn in stream(generator, jobs):
                table = _checked(draw, wanted[at], drawn)
                completions.write(wanted[at], table)
                # A user's function may need the main thread: the loop asks it.
                for number in [n for n, found in asked.items() if found.ready]:
                    scores.write(number, asked.pop(number).scores())
                # Those of this round come first where judges are slow.
                if (
                    self.parts.judges_beside
                    and sum(bool(found.waiting) for found in asked.values()) < AT_ONCE
                ):
                    items = draw.items(wanted[at], table)
                    asked[wanted[at]] = self.parts.ask(items, draw.audit)

        with ThreadPoolExecutor(1) as beside:
            working = beside.submit(work)
            try:
                yield
            finally:
                ended.set()
        working.result()
        done = len(wanted) - len(completions.missing)
        self.parts.reporter.say(f"{title(round)}: {done} of {len(wanted)} shards drawn ahead")

    def forget_ahead(self, round: int, name: str) -> None:
        """What judges are being asked about a round's draw is not wanted any more."""
        for asked in self._ahead.pop((round, name), {}).values():
            asked.cancel()

    def _generate(
        self, round: Round, draw: Draw, completions: Shards, judged: Judged | None
    ) -> None:
        """Draw what is missing; `judged` is offered each shard."""
        check = self.parts.interrupts.check
        count, tokens = 0, 0
        with (
            self.timed(round, draw.name) as note,
            self.parts.reporter.progress(
                f"{title(round)} {draw.name}", len(draw.shards)
            ) as advance,
        ):
            for number, drawn in self._missing(draw, [*completions.missing]):
                completions.write(number, drawn)
                advance(len(draw.shards) - len(completions.missing))
                count += drawn.height
                tokens += int(drawn["token_ids"].list.len().sum())
                if judged is not None:
                    judged.offer(number, drawn)
                    judged.store_ready()
                if completions.missing:
                    check()
            note.update(completions=count, tokens=tokens)
            completions.finish()

    def _missing(self, draw: Draw, wanted: Sequence[int]) -> Iterator[tuple[int, pl.DataFrame]]:
        if not wanted:
            return
        self.parts.interrupts.check()
        generator = self.parts.serving.at(draw.version, self.policy(draw.version))
        for at, drawn in stream(generator, draw.jobs(wanted)):
            yield wanted[at], _checked(draw, wanted[at], drawn)

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


def _checked(draw: Draw, number: int, drawn: Sequence[Completion]) -> pl.DataFrame:
    draw.check(number, drawn)
    return completions_table(drawn)


def title(round: Round) -> str:
    return "final" if round.index is None else f"round {round.index}"


def unreachable(_: Path | int) -> NoReturn:
    """Computes what is stored already."""
    raise AssertionError("stored already")
