"""Generators as Ray actors; who waits for whom is told in `launch.actors`."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import ray

from launch.actors import LOST, TRIES, ActorLostError, Seat, Seats, answered, started
from launch.quiet import hush, hush_transformers
from launch.roles import Cards, Roles, Say
from rlhf.protocols import Job, Learner, Loaded, Published, Sampling
from rlhf.types import Completion, Prompt
from rollout.transfer import drop_adapter, put_adapter
from rollout.weight_sync import check_loaded, word_of_all

if TYPE_CHECKING:
    from rollout.transfer import Coming


LEAVE_S = 60.0
"""Seconds that nodes have to remove what generators stored there."""


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

    def __init__(self, roles: Roles, longest: int, seat: Seat, number: int) -> None:
        hush()
        self._roles, self._number = roles, number
        self._holders = [other.make(Holder) for other in seat.others]
        held = ray.get([holder.gpus.remote() for holder in self._holders])
        if visible := [*_own_gpus(), *(gpu for gpus in held for gpu in gpus)]:
            # Before torch looks.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        hush_transformers()
        self._said: list[str] = []
        self._make = partial(roles.generator, longest, Cards(1 + len(held), seat.share))

    @cached_property
    def _generator(self) -> Any:
        # Made with the first call: what a constructor raises counts as a death.
        generator = self._make()
        generator.concurrency.say = self._said.append
        return generator

    def call(self, method: str, *arguments: Any) -> Any:
        """What the generator's method gives, or the one of this class that is named so."""
        generator = self._generator
        target = self if method in ("news", "load") else generator
        try:
            return getattr(target, method)(*arguments)
        except Exception:
            if generator.broken:
                # As a death of its own, after which another is made in its place.
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]
            raise

    def load(self, published: Published, files: Mapping[str, bytes] | None) -> Loaded:
        """See `Generator.load`; an adapter comes as its `files`."""
        if files is not None:
            # It stays there: an engine that is started anew reads it again.
            folder = put_adapter(_run(self._roles), self._number, files)
            published = replace(published, path=folder)
        loaded: Loaded = self._generator.load(published)
        return loaded

    def news(self) -> list[str]:
        """What was worth saying since the last time."""
        news, self._said[:] = [*self._said], []
        return news

    def identity(self) -> tuple[str, int]:
        """(node, process)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


class Generators:
    """`rlhf.protocols.Pool`: generators that serve the same version, a shard of prompts each."""

    def __init__(self, seats: Seats, roles: Roles, longest: int, say: Say) -> None:
        self._seats = seats.of["generator"]
        self._colocated = seats.colocated
        self._arguments = roles, longest
        self.device = roles.plan.device
        """cpu or cuda."""
        self._say = say
        self._published: Published | None = None
        self._said: Loaded | None = None
        """What a generator said when all had loaded it."""
        self._files: Any = None
        """Reference to those of the adapter that is served, if one is."""
        self._turn = Lock()
        self._actors = [self._make(at) for at in range(len(self._seats))]

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
                tried[number] = self._replace(at, actor, tried[number] + 1, error)
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
        self._files = ray.put(_files(published.path)) if published.kind == "adapter" else None
        said = self._all("load", published, self._files)
        self._published = published
        return self._word(said)

    def receive(self, learner: Learner, version: int, stored: Path) -> tuple[Published, Loaded]:
        """See `Receiver.receive`; from the ranks of `launch.learner_actors`. Where one of either
        side is lost on the way, all are made anew and read the version where it is stored."""
        from launch.learner_actors import Learners
        from launch.weight_network import transfer
        from rlhf.policy import DTYPES
        from rlhf.weights import stored_digest

        assert isinstance(learner, Learners), "one process sends nothing to itself"
        self._published = self._files = None
        try:
            sent, said = transfer(self, learner, version, stored)
        except LOST as error:
            self._say(
                f"version {version} was lost on its way: {error}; learner ranks and generators are "
                "made anew and read it where it is stored"
            )
            learner.renew()
            self._renew()
            digest = stored_digest(stored, DTYPES[learner.config.model.precision])
            published = Published(version, stored, "stored", digest)
            return published, self.load(published)
        self._published = Published(version, stored, "stored", sent)
        return self._published, self._word(said)

    def receiving(self, version: int, stored: Path, coming: Sequence[Coming]) -> list[Any]:
        """References to what each says once it has received."""
        return [
            actor.call.remote("take", version, stored, own)
            for actor, own in zip(self._actors, coming, strict=True)
        ]

    @property
    def workers(self) -> list[int]:
        """Processes that hold each one's weights."""
        return [1 + len(seat.beside) for seat in self._seats]

    def sleep(self) -> None:
        """See `Generator.sleep`; those with GPUs of their own need not."""
        if self._colocated:
            self._all("sleep")

    def wake(self) -> Loaded | None:
        """See `Generator.wake`."""
        return word_of_all(self._all("wake"), self._published)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        if self._files is not None:
            run = _run(self._arguments[0])
            leaving = [seat.ask(_leaving(run, at)) for at, seat in enumerate(self._seats)]
            ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        asked = [(actor, actor.call.remote(method, *arguments)) for actor in self._actors]
        return [self._ask(at, method, *arguments, first=given) for at, given in enumerate(asked)]

    def _ask(
        self, at: int, method: str, *arguments: Any, first: tuple[Any, Any] | None = None
    ) -> Any:
        """What an actor's method gives; `first` is the actor and the call that was made already."""
        tries = 0
        while True:
            actor = self._actors[at]
            actor, reference = first or (actor, actor.call.remote(method, *arguments))
            first = None
            try:
                return answered(reference)
            except LOST as error:
                tries = self._replace(at, actor, tries + 1, error)

    def _word(self, said: Sequence[Loaded]) -> Loaded:
        word = word_of_all(said, self._published)
        assert word is not None
        self._said = said[0]
        return word

    def _make(self, at: int) -> Any:
        seat = self._seats[at]
        return seat.make(GeneratorActor, *self._arguments, seat, at)

    def _renew(self) -> None:
        """All anew, serving nothing yet."""
        for again in range(TRIES):
            self.close()
            self._actors = [self._make(at) for at in range(len(self._seats))]
            try:
                started([actor.identity.remote() for actor in self._actors])
            except LOST as error:
                if again + 1 == TRIES:
                    raise ActorLostError(f"generators died {TRIES} times: {error}") from error
            else:
                return

    def _replace(self, at: int, lost: Any, tries: int, error: Exception) -> int:
        """In place of the actor that was `lost`, a new one that serves what the others serve; one
        thread at a time, since another may have lost the same. How many `tries` it has taken: a
        new one may die while it loads."""
        with self._turn:
            while True:
                if tries > TRIES:
                    raise ActorLostError(f"generator {at} died {tries} times: {error}") from error
                if self._actors[at] is not lost:
                    return tries
                self._say(f"generator {at} died and is made anew ({tries} of {TRIES})")
                ray.kill(lost)
                made = self._make(at)
                try:
                    started([made.identity.remote()])
                    if self._published is not None:
                        loaded = answered(made.call.remote("load", self._published, self._files))
                        check_loaded(
                            self._published, word_of_all([loaded, self._said], self._published)
                        )
                    self._actors[at] = made
                except LOST as again:
                    ray.kill(made)
                    tries, error = tries + 1, again


def _leaving(run: Path, generator: int) -> Callable[[], None]:
    # Ray takes nothing but a function.
    def leave() -> None:
        drop_adapter(run, generator)

    return leave


def _run(roles: Roles) -> Path:
    run = roles.config.run
    return Path(run.directory, run.name)


def _files(folder: Path) -> dict[str, bytes]:
    """What of an adapter's folder is served; its tokenizer is the generator's own."""
    served = [folder / "adapter_config.json", *sorted(folder.glob("*.safetensors"))]
    return {path.name: path.read_bytes() for path in served}


def _own_gpus() -> list[str]:
    return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])
