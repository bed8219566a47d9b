"""Ray actors around the plain classes: generators, and the ranks of the learner.

| who waits | for whom | if that one dies |
|---|---|---|
| driver, in `stream` | the first generator to finish its shard | made anew, shard done again |
| driver, in `load`, `logps` | every generator | made anew, call made again |
| driver, in a learner's call | every rank | all made anew, restored, call made again |
| its second thread, drawing ahead | as in `stream` | as there; one thread at a time |
| a learner rank | the others, in a collective | its connection closes: the call ends |

A generator made anew is given the version that the others serve. Only actors that died are tried
again, a few times: an error that an actor raised is about the data
or the config, and is raised here. Nothing is kept before a call has returned, so what is done again
is counted once. A training goes on from its newest checkpoint; steps that are done again give the
same numbers, and are told once.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from launch.layout import Role
from launch.quiet import hush, hush_transformers
from launch.roles import Cards, Roles, Say
from rlhf.errors import Interrupted, PairloopError
from rlhf.protocols import Job, Loaded, OnStep, Published, Sampling
from rlhf.types import Completion, Prompt, Trained
from rollout.weight_sync import check_loaded

if TYPE_CHECKING:
    import polars as pl

TRIES = 3
"""Times that an actor is made anew for one call before that ends the run."""
START_S = 1800.0
"""Seconds that an actor which is made anew has to find a place, where its node died perhaps another
one, and to load its model."""
LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)
"""What Ray raises where an actor died, or its node with an answer that nobody had fetched."""
POLL_S = 0.2
"""Seconds between looks at a training's steps."""


class ActorLostError(PairloopError):
    """An actor died each time that it was made anew."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where an actor is made: a bundle of a placement group, and its part of it."""

    group: PlacementGroup
    bundle: int
    cpus: float
    gpus: float
    share: float = 0.0
    """Of its card's memory, that an engine takes."""
    beside: tuple[int, ...] = ()
    """Bundles of the group, of the same node, where the same engine has as large a part."""

    def make(self, kind: type, *arguments: Any, concurrency: int = 1) -> Any:
        """An actor of a plain class."""
        return (
            ray.remote(kind)
            .options(
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                max_concurrency=concurrency,
                scheduling_strategy=self._here,
            )
            .remote(*arguments)
        )

    def ask(self, function: Callable[[], Any]) -> Any:
        """A reference to what a function gives in a process at this place."""
        return ray.remote(function).options(num_cpus=0, scheduling_strategy=self._here).remote()

    @property
    def others(self) -> list[Seat]:
        """The places beside it, one each."""
        return [replace(self, bundle=bundle, beside=()) for bundle in self.beside]

    @property
    def _here(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=self.bundle
        )


@dataclass(frozen=True, slots=True)
class Seats:
    """Where everybody of a run sits."""

    of: Mapping[Role, Sequence[Seat]]
    judges: Mapping[str, Seat]
    """Judge with a model of its own -> its seat."""
    colocated: bool
    """Whether engines and learner take turns."""


class Holder:
    """Keeps a place's part of a GPU for an engine that another actor runs."""

    def gpus(self) -> list[str]:
        """What Ray calls the GPU."""
        return _own_gpus()


class GeneratorActor:
    """One generator in a process of its own; a tensor-parallel one on GPUs of several bundles.

    An actor gets GPUs of one bundle, and of less than whole ones only one. So it takes the first
    place itself and has the others held by actors that end with it; vLLM's own processes, which are
    its children, then see the GPUs of all.
    """

    def __init__(self, roles: Roles, longest: int, seat: Seat) -> None:
        hush()
        self._holders = [other.make(Holder) for other in seat.others]
        held = ray.get([holder.gpus.remote() for holder in self._holders])
        if visible := [*_own_gpus(), *(gpu for gpus in held for gpu in gpus)]:
            # Before torch looks.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        hush_transformers()
        self._said: list[str] = []
        self._generator = roles.generator(longest, Cards(1 + len(held), seat.share))
        self._generator.concurrency.say = self._said.append

    def call(self, method: str, *arguments: Any) -> Any:
        """What the generator's method gives, or the one of this class that is named so."""
        target = self if method == "news" else self._generator
        return getattr(target, method)(*arguments)

    def news(self) -> list[str]:
        """What was worth saying since the last time."""
        news, self._said[:] = [*self._said], []
        return news

    def identity(self) -> tuple[str, int]:
        """(node, process)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


class LearnerActor:
    """One rank of the learner in a process of its own."""

    def __init__(self, roles: Roles, rank: int, world: int) -> None:
        hush()
        hush_transformers()
        self._roles = roles
        self._rank, self._world = rank, world
        self._asked: str | None = None
        self._said: list[str] = []

    def address(self) -> tuple[str, int]:
        """Where ranks may meet: this node, and a port of it that is free now."""
        with socket.socket() as found:
            found.bind(("", 0))
            host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            return host, found.getsockname()[1]

    def meet(self, address: tuple[str, int]) -> None:
        """Meet the other ranks and load the policy."""
        from launch import spmd

        host, port = address
        os.environ |= {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._world),
            # Ray shows an actor its own GPUs only.
            "LOCAL_RANK": "0",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        group = spmd.join(self._roles.plan.device).group
        config = self._roles.config
        self._learner = self._roles.learner(
            self._said.append, lambda policy, _: spmd.shard(policy, config, group)
        )

    def news(self) -> list[str]:
        """What it had to say since it was asked last."""
        news, self._said[:] = [*self._said], []
        return news

    def identity(self) -> tuple[str, int]:
        """(node, process)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the rank's method gives; the first's answer is all that is wanted."""
        from launch.spmd import leaving_together

        with leaving_together():
            found = getattr(self._learner, method)(*arguments)
        return found if self._rank == 0 else None

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
        steps: Queue | None,
    ) -> Trained:
        """See `Learner.train`; tells `steps` of each."""
        from launch.spmd import leaving_together

        def on_step(step: int, values: dict[str, float]) -> None:
            if steps is not None:
                steps.put((step, values))

        def check() -> None:
            if self._asked is not None:
                raise Interrupted(self._asked)

        with leaving_together():
            return self._learner.train(table, reference, round_index, state, on_step, check)

    def stop(self, reason: str) -> None:
        """Ask a training to stop after its step; heard while it runs."""
        self._asked = reason


class Generators:
    """`rlhf.protocols.Pool`: generators that serve the same version, a shard of prompts each."""

    def __init__(self, seats: Seats, roles: Roles, longest: int, say: Say) -> None:
        self._seats = seats.of["generator"]
        self._colocated = seats.colocated
        self._arguments = roles, longest
        self._say = say
        self._published: Published | None = None
        self._turn = Lock()
        self._actors = [self._make(seat) for seat in self._seats]

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, list[Completion]]]:
        """See `Pool.stream`: a job for whoever is free; each generator has one at a time, so none
        works ahead of what is stored."""
        coming, again, tried = enumerate(jobs), deque[tuple[int, Job]](), Counter[int]()
        free = deque(range(len(self._actors)))
        running: dict[Any, tuple[int, Any, int, Job]] = {}
        while True:
            while free and (given := again.popleft() if again else next(coming, None)):
                number, job = given
                at = free.popleft()
                actor = self._actors[at]
                running[actor.call.remote("generate", *job)] = at, actor, number, job
            if not running:
                break
            (ready,), _ = ray.wait(list(running), num_returns=1)
            at, actor, number, job = running.pop(ready)
            free.append(at)
            try:
                drawn = answered(ready)
            except LOST as error:
                tried[number] += 1
                self._replace(at, actor, tried[number], error)
                again.append((number, job))
                continue
            yield number, drawn
        for at, lines in enumerate(self._all("news")):
            for line in lines:
                self._say(f"generator {at}: {line}")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See `Generator.generate`; by the first."""
        found: list[Completion] = self._ask(0, "generate", prompts, sampling)
        return found

    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """See `Generator.logps`; by the first."""
        found: list[list[float]] = self._ask(0, "logps", completions)
        return found

    def all_logps(self, completions: Sequence[Completion]) -> list[list[list[float]]]:
        """See `Pool.all_logps`."""
        return self._all("logps", completions)

    def load(self, published: Published) -> Loaded:
        """See `Generator.load`."""
        self._published = None
        said = self._all("load", published)
        self._published = published
        # Any that differs will do: the caller compares it with what was published.
        loaded: Loaded = next((word for word in said if word != said[0]), said[0])
        return loaded

    def sleep(self) -> None:
        """See `Generator.sleep`; those with GPUs of their own need not."""
        if self._colocated:
            self._all("sleep")

    def wake(self) -> Loaded | None:
        """See `Generator.wake`."""
        said = self._all("wake")
        loaded: Loaded | None = next((word for word in said if word != said[0]), said[0])
        return loaded

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        asked = [(actor, actor.call.remote(method, *arguments)) for actor in self._actors]
        return [self._ask(at, method, *arguments, first=given) for at, given in enumerate(asked)]

    def _ask(
        self, at: int, method: str, *arguments: Any, first: tuple[Any, Any] | None = None
    ) -> Any:
        """What an actor's method gives; `first` is the actor and the call that was made already."""
        for again in range(TRIES + 1):
            actor = self._actors[at]
            actor, reference = first or (actor, actor.call.remote(method, *arguments))
            first = None
            try:
                return answered(reference)
            except LOST as error:
                self._replace(at, actor, again + 1, error)
        raise AssertionError("the last failure is raised by _replace")

    def _make(self, seat: Seat) -> Any:
        return seat.make(GeneratorActor, *self._arguments, seat)

    def _replace(self, at: int, lost: Any, tries: int, error: Exception) -> None:
        """In place of the actor that was `lost`, a new one that serves what the others serve; one
        thread at a time, since another may have lost the same."""
        with self._turn:
            while self._actors[at] is lost:
                if tries > TRIES:
                    raise ActorLostError(f"generator {at} died {tries} times: {error}") from error
                self._say(f"generator {at} died and is made anew ({tries} of {TRIES})")
                ray.kill(lost)
                made = self._make(self._seats[at])
                try:
                    started([made.identity.remote()])
                    if self._published is not None:
                        loaded = answered(made.call.remote("load", self._published))
                        check_loaded(self._published, loaded)
                    self._actors[at] = made
                except LOST as again:
                    ray.kill(made)
                    tries, error = tries + 1, again


class Learners:
    """`rlhf.protocols.Learner`: ranks that train one policy together."""

    def __init__(self, seats: Seats, roles: Roles, say: Say) -> None:
        self._seats = seats.of["learner"]
        self._roles = roles
        self._say = say
        self._restored: Path | None = None
        self._ranks: list[Any] = []
        self._start(say)

    @property
    def config(self) -> Any:
        """The run's settings."""
        return self._roles.config

    def restore(self, folder: Path | None) -> None:
        """See `Learner.restore`."""
        self._together(lambda: self._call("restore", folder))
        self._restored = folder

    def save(self, folder: Path, card: str) -> None:
        """See `Learner.save`."""
        try:
            self._call("save", folder, card)
        except LOST as error:
            raise ActorLostError(
                f"a learner rank died with what it had trained: {error}; the same command goes on "
                "from the newest checkpoint"
            ) from error

    def save_merged(self, folder: Path) -> None:
        """See `Learner.save_merged`."""
        self._together(lambda: self._call("save_merged", folder))

    def release(self) -> None:
        """See `Learner.release`."""
        self._together(lambda: self._call("release"))

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """See `Learner.logps`."""
        found: list[list[float]] = self._together(lambda: self._call("logps", completions, initial))
        return found

    def reference_logps(self, table: pl.DataFrame, round_index: int) -> pl.DataFrame:
        """See `Learner.reference_logps`."""
        found: pl.DataFrame = self._together(
            lambda: self._call("reference_logps", table, round_index)
        )
        return found

    def plan(self, table: pl.DataFrame) -> int:
        """See `Learner.plan`."""
        steps: int = self._together(lambda: self._call("plan", table))
        return steps

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
        on_step: OnStep,
        check: Callable[[], None],
    ) -> Trained:
        """See `Learner.train`; a signal that the driver hears stops all ranks at the same step."""
        last = 0
        # With the driver, whose end is the run's: a node that dies must not take it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        steps = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

        def train() -> Trained:
            nonlocal last
            asked = False
            pending = [
                rank.train.remote(table, reference, round_index, state, None if at else steps)
                for at, rank in enumerate(self._ranks)
            ]
            given, running = list(pending), True
            while running:
                _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
                running = bool(pending)
                for step, values in _drained(steps):
                    if step > last:
                        last = step
                        on_step(step, values)
                if not asked and (reason := _reason(check)) is not None:
                    asked = True
                    for rank in self._ranks:
                        rank.stop.remote(reason)
            done: Trained = _agreed(given)
            return done

        try:
            trained: Trained = self._together(train)
        finally:
            steps.shutdown()
        return trained

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            ray.kill(rank)

    def _call(self, method: str, *arguments: Any) -> Any:
        return _agreed([rank.call.remote(method, *arguments) for rank in self._ranks])

    def _together(self, ask: Callable[[], Any]) -> Any:
        dead = False
        for again in range(TRIES + 1):
            try:
                if dead:
                    self._start(lambda _: None)
                    self._call("restore", self._restored)
                    dead = False
                found = ask()
                self._tell()
            except LOST as error:
                dead = True
                self.close()
                if again == TRIES:
                    raise ActorLostError(
                        f"learner ranks died {again + 1} times: {error}"
                    ) from error
                self._say(f"a learner rank died; all are made anew ({again + 1} of {TRIES})")
            else:
                return found
        raise AssertionError("the last failure is raised")

    def _tell(self) -> None:
        """Say what the first rank had to say."""
        for line in answered(self._ranks[0].news.remote()):
            self._say(line)

    def _start(self, say: Say) -> None:
        world = len(self._seats)
        self._ranks = [
            seat.make(LearnerActor, self._roles, rank, world, concurrency=2)
            for rank, seat in enumerate(self._seats)
        ]
        (address, *_) = started([rank.address.remote() for rank in self._ranks])
        _agreed([rank.meet.remote(address) for rank in self._ranks])
        for line in answered(self._ranks[0].news.remote()):
            say(line)


def _own_gpus() -> list[str]:
    return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])


def started(references: Sequence[Any]) -> list[Any]:
    """First answers of new actors. Raises ActorLostError where they don't come in time."""
    try:
        return [ray.get(reference, timeout=START_S) for reference in references]
    except GetTimeoutError:
        raise ActorLostError(
            f"an actor was not there within {START_S:.0f} s; has the cluster lost the node that "
            "had its place? The same command goes on once there is room"
        ) from None


def answered(reference: Any) -> Any:
    """What a call gave. Raises what it raised, or one of LOST where its actor died."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error


def _agreed(references: Sequence[Any]) -> Any:
    """The first rank's answer, once all are there.

    Raises one of LOST where a rank died, whatever the others then met; else the first's error.
    """
    from launch.spmd import RankLostError

    errors: list[Exception] = []
    answers: list[Any] = []
    for reference in references:
        try:
            answers.append(answered(reference))
        except Exception as error:
            errors.append(error)
    lost = [error for error in errors if isinstance(error, LOST)]
    own = [error for error in errors if not isinstance(error, RankLostError)]
    if errors:
        raise (*lost, *own, *errors)[0]
    return answers[0]


def _drained(steps: Queue) -> Iterator[tuple[int, dict[str, float]]]:
    while True:
        try:
            yield steps.get_nowait()
        except Empty:
            return


def _reason(check: Callable[[], None]) -> str | None:
    """Why a stop was asked for, if it was."""
    try:
        check()
    except Interrupted as error:
        return str(error)
    return None
