"""Judges' models in Ray actors; the judges themselves (rubrics, cache, mapping) stay in the driver.

An actor is made when its model is first needed. One that dies is made anew, opened as before, and
asked again, a few times: the driver keeps nothing of an answer that did not come whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import ray

from launch.actors import LOST, TRIES, ActorLostError, Seat, Seats, answered, started
from launch.quiet import hush, hush_transformers
from launch.roles import Say
from rlhf.config_judges import LlmSpec, RewardModelSpec
from rollout.judges.backends import Answer, Backend, Call, Keep, keep_all
from rollout.judges.panel import InProcess
from rollout.judges.reward_engines import Checkpoint, RewardEngine, Rows


class JudgeActor:
    """One judge's model in a process of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        hush()
        hush_transformers()
        self._make = make
        self._said: list[str] = []

    @cached_property
    def _held(self) -> Any:
        # Made with the first call: what a constructor raises counts as a death.
        held = self._make()
        held.concurrency.say = self._said.append
        return held

    def alive(self) -> bool:
        """Answers once it has its place."""
        return True

    def call(self, method: str, *arguments: Any) -> tuple[Any, list[str]]:
        """What the model's method gives, and what the engine had to say meanwhile."""
        found = getattr(self._held, method)(*arguments)
        news, self._said[:] = [*self._said], []
        return found, news


class JudgeActors:
    """`rollout.judges.panel.Engines` with an actor for each model."""

    def __init__(self, seats: Seats, inside: InProcess, say: Say) -> None:
        """`inside` is how an actor holds its model."""
        self._seats = seats
        self._inside = inside
        self._say = say

    def language(self, spec: LlmSpec, field: str) -> Backend:
        """See `Engines.language`."""
        # Not started here: it refuses what can't be had, and says what can change a verdict.
        plain = self._inside.language(spec, field)
        held = self._held(spec.name, partial(self._inside.language, spec, field))
        return RemoteBackend(held, plain.identity)

    def reward(self, spec: RewardModelSpec, field: str) -> RewardEngine:
        """See `Engines.reward`."""
        self._inside.reward(spec, field)
        return RemoteRewardEngine(self._held(spec.name, partial(self._inside.reward, spec, field)))

    def _held(self, name: str, make: Callable[[], Any]) -> Held:
        return Held(name, self._seats.judges[name], make, self._seats.colocated, self._say)


class Held:
    """An actor and how it is made again. Threads take turns, as the model does."""

    def __init__(
        self, name: str, seat: Seat, make: Callable[[], Any], colocated: bool, say: Say
    ) -> None:
        self._name = name
        self._seat = seat
        self._make = make
        self._colocated = colocated
        self._say = say
        self._turn = Lock()
        self._actor: Any = None
        self._opened: tuple[Any, ...] = ()
        self._closed = False

    def open(self, *call: Any) -> None:
        """Make a call that every new actor must be given first."""
        self._opened = ()
        self.call(*call)
        self._opened = call

    def call(self, method: str, *arguments: Any) -> Any:
        """What the model's method gives. Raises what it raises, or ActorLostError."""
        with self._turn:
            for again in range(TRIES + 1):
                # Whoever waited for this turn is not answered any more.
                if self._closed:
                    raise ActorLostError(f"judge {self._name} was closed")
                try:
                    found, news = answered(self._living().call.remote(method, *arguments))
                    for line in news:
                        self._say(line)
                    return found
                except LOST as error:
                    self._actor = None
                    if again == TRIES or self._closed:
                        raise ActorLostError(
                            f"judge {self._name} died {again + 1} times: {error}"
                        ) from error
                    self._say(f"judge {self._name} died and is made anew ({again + 1} of {TRIES})")
        raise AssertionError("the last failure is raised")

    def sleep(self) -> None:
        """Give the device to the learner, where it is shared."""
        if self._colocated and self._actor is not None:
            self.call("sleep")

    def close(self) -> None:
        """End the actor, and whoever waits for it."""
        self._closed = True
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _living(self) -> Any:
        if self._actor is None:
            self._actor = self._seat.make(JudgeActor, self._make)
            started([self._actor.alive.remote()])
            if self._opened:
                answered(self._actor.call.remote(*self._opened))
        return self._actor


class RemoteBackend:
    """`rollout.judges.backends.Backend` in an actor."""

    beside = True

    def __init__(self, held: Held, identity: Mapping[str, str]) -> None:
        self.identity = identity
        self._held = held

    def start(self, record: Path | None, probe: Call) -> Answer | None:
        """See `Backend.start`; the model is loaded with the first question."""
        return None

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        """See `Backend.ask`."""
        answers: list[Answer] = self._held.call("ask", list(calls)) if calls else []
        keep_all(answers, keep)
        return answers

    def news(self) -> None:
        """See `Backend.news`."""

    def sleep(self) -> None:
        """See `Backend.sleep`."""
        self._held.sleep()

    def close(self) -> None:
        """See `Backend.close`."""
        self._held.close()


class RemoteRewardEngine:
    """`rollout.judges.reward_engines.RewardEngine` in an actor."""

    beside = True

    def __init__(self, held: Held) -> None:
        self._held = held

    def load(self, checkpoint: Checkpoint) -> None:
        """See `RewardEngine.load`."""
        self._held.open("load", checkpoint)

    def raw(self, rows: Rows) -> list[tuple[float, ...]]:
        """See `RewardEngine.raw`."""
        found: list[tuple[float, ...]] = self._held.call("raw", [list(row) for row in rows])
        return found

    def sleep(self) -> None:
        """See `RewardEngine.sleep`."""
        self._held.sleep()

    def close(self) -> None:
        """See `RewardEngine.close`."""
        self._held.close()
