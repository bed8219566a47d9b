"""Drawing and judging side by side: what is stored is the same, whoever comes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from fakes import run_values
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.answers import AT_ONCE
from rlhf.canaries import Items
from rlhf.config import RunConfig
from rlhf.errors import DataGateError, Interrupted
from rlhf.protocols import Job, Sampling
from rlhf.rounds import RunStore
from rlhf.stages import Stages
from rlhf.types import Completion, Prompt, Score, completions_table, scores_table
from rollout.prompts import prompt_table

SHARDS = tuple(f"p{i}" for i in range(0, 12, 2))
"""Each by its first prompt."""
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"Question {i}?"},)) for i in range(12)]
SAMPLING = Sampling(2, 0.7, 1.0, 8, 0)


def drawn(prompts: Sequence[Prompt], version: int) -> list[Completion]:
    return [
        Completion(p.prompt_id, s, f"{p.prompt_id} {s}", (s,), (1,), (0.0,), "stop", version)
        for p in prompts
        for s in range(SAMPLING.samples)
    ]


class Elsewhere:
    """Judges in another place, who answer when they are told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open: dict[str, Future[None]] = {}
        self.most = 0

    def ask(self, items: Items, audited: bool) -> _Asked:
        first = items[0][0].prompt_id
        self.asked.append(first)
        self.open[first] = Future()
        self.most = max(self.most, sum(not answer.done() for answer in self.open.values()))
        return _Asked(items, self.open[first])

    def answer(self, first: str) -> None:
        self.open[first].set_result(None)


class Ready(Elsewhere):
    """Those who answer at once."""

    def ask(self, items: Items, audited: bool) -> _Asked:
        asked = super().ask(items, audited)
        self.answer(items[0][0].prompt_id)
        return asked


@dataclass
class _Asked:
    items: Items
    answer: Future[None]

    @property
    def waiting(self) -> list[Future[None]]:
        return [] if self.answer.done() else [self.answer]

    @property
    def ready(self) -> bool:
        return not self.waiting

    def scores(self) -> pl.DataFrame:
        self.answer.result(timeout=20)
        return scores_table(
            Score.of(c.prompt_id, c.sample, "reader", "style", len(c.text) / 10)
            for _, c in self.items
        )


@contextmanager
def answering(judges: Elsewhere, order: Sequence[str], seconds: float = 0.0) -> Iterator[None]:
    """A thread that answers shards in this order, each once it was asked about."""

    def work() -> None:
        for first in order:
            end = time.monotonic() + 20
            while first not in judges.open:
                assert time.monotonic() < end, f"{first} was not asked about"
                time.sleep(0.001)
            # Whoever asks without bound has asked about the rest by then.
            time.sleep(seconds)
            judges.answer(first)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        yield
        working.result(timeout=20)


class Generators:
    """A pool that draws one shard after the other, or all and hands them over in some `order`."""

    def __init__(
        self,
        order: Sequence[int] | None = None,
        before: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.order, self.before = order, before
        self.version = 0

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, list[Completion]]]:
        numbered: Iterator[tuple[int, Job]] = enumerate(jobs)
        if self.order is not None:
            place = self.order.index
            numbered = iter(sorted(numbered, key=lambda job: place(job[0])))
        for number, (prompts, _) in numbered:
            self.before(number)
            yield number, drawn(prompts, self.version)

    def all_logps(self, completions: Sequence[Completion]) -> list[list[list[float]]]:
        raise AssertionError("not asked here")

    generate = logps = load = sleep = wake = close = all_logps


@contextmanager
def stages(
    folder: Path,
    generators: Generators,
    judges: Elsewhere,
    check: Callable[[], None] = lambda: None,
    **rounds: Any,
) -> Iterator[tuple[Stages, list[str]]]:
    values = run_values(
        folder,
        "org/model",
        rounds=rounds,
        rollout={"samples_per_prompt": SAMPLING.samples},
        judges={"canaries": {"answers": 0}},
    )
    if rounds.get("max_staleness"):
        values["placement"] = {"kind": "ray", "colocate": False}
    said: list[str] = []
    reporter = SimpleNamespace(
        say=said.append, stage=lambda _: None, progress=lambda *_: nullcontext(lambda _: None)
    )

    def at(version: int, policy: Path | None) -> Generators:
        generators.version = version
        return generators

    parts: Any = SimpleNamespace(
        ask=judges.ask,
        judges_beside=True,
        check_scores=lambda _: None,
        sample=lambda _: PROMPTS,
        serving=SimpleNamespace(at=at),
        reporter=reporter,
        trackers=SimpleNamespace(replay=lambda _: None, log=lambda *_: None, lost={}),
        interrupts=SimpleNamespace(check=check),
        watch=SimpleNamespace(judges=[], gold=[], ask=lambda _: pl.DataFrame()),
        prompt_table=prompt_table,
    )
    made = RunConfig.model_validate(values)
    with RunStore.open(made) as store:
        yield Stages(made, store, parts), said


def sampled(do: Stages, index: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Completions and scores of a round, as they are stored."""
    round = do.store.round(index)
    do.keep(round, PROMPTS)
    shards = do.sample(round, PROMPTS).shards
    completions = [pl.read_parquet(path) for shard in shards for path in shard.completions]
    scores = [pl.read_parquet(path) for shard in shards for path in shard.scores]
    return pl.concat(completions), pl.concat(scores)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, pl.DataFrame]:
    with stages(tmp_path_factory.mktemp("plain"), Generators(), Ready()) as (do, _):
        return sampled(do, 1)


@settings(max_examples=10, deadline=None)
@given(drawing=st.permutations(range(6)), late=st.sampled_from(SHARDS))
def test_the_order_of_arrival_changes_nothing_and_a_late_shard_holds_no_other(
    drawing: list[int],
    late: str,
    expected: tuple[pl.DataFrame, pl.DataFrame],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    judges = Elsewhere()
    order = [SHARDS[number] for number in drawing if SHARDS[number] != late]
    folder = tmp_path_factory.mktemp("order")
    with (
        stages(folder, Generators(drawing), judges) as (do, _),
        answering(judges, [*order, late]),
    ):
        found = sampled(do, 1)
    for one, other in zip(found, expected, strict=True):
        assert one.equals(other)


def test_judges_are_asked_about_a_shard_before_the_next_is_drawn(tmp_path: Path) -> None:
    judges, seen = Ready(), list[int]()
    generators = Generators(before=lambda _: seen.append(len(judges.asked)))
    with stages(tmp_path, generators, judges) as (do, _):
        sampled(do, 1)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_drawing_waits_for_judges_that_fall_behind(tmp_path: Path) -> None:
    judges = Elsewhere()
    with stages(tmp_path, Generators(), judges) as (do, _), answering(judges, SHARDS, 0.1):
        sampled(do, 1)
    assert judges.most == AT_ONCE < len(SHARDS)


def test_scores_that_were_there_are_stored_before_a_stop(
    tmp_path: Path, expected: tuple[pl.DataFrame, pl.DataFrame]
) -> None:
    judges = Ready()

    def check() -> None:
        if len(judges.asked) == 3:
            raise Interrupted("a signal")

    with (
        stages(tmp_path, Generators(), judges, check) as (do, _),
        pytest.raises(Interrupted, match="a signal"),
    ):
        sampled(do, 1)
    assert len(list((tmp_path / "runs/trial/rounds/0001/scores").iterdir())) == 3
    again = Ready()
    with stages(tmp_path, Generators(), again) as (do, _):
        found = sampled(do, 1)
    assert again.asked == list(SHARDS[3:])
    assert all(one.equals(other) for one, other in zip(found, expected, strict=True))


def test_a_shard_that_was_drawn_before_is_judged_with_the_others(
    tmp_path: Path, expected: tuple[pl.DataFrame, pl.DataFrame]
) -> None:
    judges = Elsewhere()
    with stages(tmp_path, Generators(), judges) as (do, _):
        first = do.draw("completions", PROMPTS, 0).shards[0]
        shards = do.store.round(1).sharded("completions", 6)
        shards.write(0, completions_table(drawn(first, 0)))
        with answering(judges, ["p6", "p4", "p0", "p2", "p8", "p10"], 0.2):
            found = sampled(do, 1)
    assert sorted(judges.asked) == sorted(SHARDS)
    assert all(one.equals(other) for one, other in zip(found, expected, strict=True))


def test_a_round_that_was_begun_ahead_goes_on_with_the_newer_version(tmp_path: Path) -> None:
    judges, two_drawn, trained = Ready(), threading.Event(), threading.Event()

    def before(number: int) -> None:
        if number == 2 and not trained.is_set():
            two_drawn.set()
            assert trained.wait(20)

    with stages(tmp_path, Generators(before=before), judges, max_staleness=1) as (do, said):
        with do.ahead(2):
            assert two_drawn.wait(20)
            trained.set()
        completions, scores = sampled(do, 2)
    assert said[0] == "round 2: 3 of 6 shards drawn ahead"
    versions = completions.group_by("prompt_id").agg(pl.col("policy_version").unique())
    behind = versions.explode("policy_version").filter(pl.col("policy_version") == 0)
    assert behind["prompt_id"].sort().to_list() == [f"p{i}" for i in range(6)]
    assert versions.height == 12 and judges.asked == list(SHARDS)
    assert scores.height == completions.height == 24


def test_nothing_is_drawn_ahead_of_a_round_that_must_be_on_policy(tmp_path: Path) -> None:
    with stages(tmp_path, Generators(), Ready()) as (do, _):
        with do.ahead(2):
            pass
        completions, _ = sampled(do, 2)
    assert completions["policy_version"].unique().to_list() == [1]


def test_what_is_older_than_allowed_is_left_out_and_told(tmp_path: Path) -> None:
    with stages(tmp_path, Generators(), Ready(), max_staleness=1) as (do, said):
        old = do.draw("completions", PROMPTS, 0)
        shards = do.store.round(3).sharded("completions", 6)
        shards.write(4, completions_table(drawn(old.shards[4], 0)))
        completions, scores = sampled(do, 3)
    assert said == ["round 3: 4 completions are too old and left out"]
    assert completions["policy_version"].unique().to_list() == [2]
    assert completions.height == scores.height == 20


def test_a_round_whose_answers_are_all_too_old_trains_nothing(tmp_path: Path) -> None:
    with stages(tmp_path, Generators(), Ready(), max_staleness=1) as (do, _):
        old = do.draw("completions", PROMPTS, 0)
        shards = do.store.round(3).sharded("completions", 6)
        for number in range(6):
            shards.write(number, completions_table(drawn(old.shards[number], 0)))
        with pytest.raises(DataGateError, match="round 3: every completion is older than"):
            sampled(do, 3)


def test_a_failure_while_drawing_ahead_stops_the_run(tmp_path: Path) -> None:
    def fail(number: int) -> None:
        raise RuntimeError("the engine is gone")

    with (
        stages(tmp_path, Generators(before=fail), Ready(), max_staleness=1) as (do, _),
        pytest.raises(RuntimeError, match="the engine is gone"),
        do.ahead(2),
    ):
        pass
