"""What becomes of actors' work where one is lost or closed, without a cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from launch.actors import TRIES, ActorLostError
from launch.generator_actors import GeneratorActor, Generators
from launch.judge_actors import Held
from launch.learner_actors import Learners
from launch.ranks import RankLostError
from rlhf.errors import InputError


class Ranks(Learners):
    """Learner ranks whose starts and calls are written down."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self._say = self.done.append
        self._restored = Path("policy")
        self._again = lambda: self.done.append("trained again")
        self._ranks = []

    def _start(self, say: Any) -> None:
        self._ranks = ["a rank"]
        self.done.append("started")

    def _call(self, method: str, *arguments: Any) -> Any:
        self.done.append((method, *arguments))

    def _tell(self) -> None:
        pass

    def close(self) -> None:
        self._ranks = []


@pytest.mark.parametrize("lost", [ActorDiedError(), RankLostError("another rank ended")])
def test_ranks_that_are_lost_or_lose_each_other_are_made_anew_and_hold_what_they_held(
    lost: Exception, tmp_path: Path
) -> None:
    ranks, failing = Ranks(), [lost]
    (tmp_path / "begun").touch()

    def save(method: str, *arguments: Any) -> None:
        Ranks._call(ranks, method, *arguments)
        if method == "save":
            assert not [*tmp_path.iterdir()]
            (tmp_path / "begun").touch()
            if failing:
                raise failing.pop()

    ranks._call = save  # type: ignore[method-assign]
    ranks.save(tmp_path, "card")
    saved = ("save", tmp_path, "card")
    made = ["started", ("restore", Path("policy")), "trained again"]
    said = f"a learner rank died; all are made anew (1 of {TRIES})"
    assert ranks.done == [*made, saved, said, *made, saved]
    ranks.restore(None)
    ranks.close()
    ranks.done.clear()
    ranks.save_merged(tmp_path)
    assert ranks.done == ["started", ("save_merged", tmp_path)], "what was restored is not trained"


def test_ranks_that_died_have_nothing_to_release() -> None:
    ranks = Ranks()
    ranks.release()
    assert ranks.done == []

    def die(method: str, *arguments: Any) -> None:
        raise ActorDiedError

    ranks._ranks = ["a rank"]
    ranks._call = die  # type: ignore[method-assign]
    ranks.release()
    assert ranks.done == ["a learner rank died; all are made anew when they are needed"]
    assert ranks._ranks == []


def test_who_waits_for_a_judge_that_is_closed_is_not_answered() -> None:
    """A stop would else load the model again for every shard that was asked about."""
    made: list[Any] = []
    seat: Any = type("Seat", (), {"make": lambda self, *given: made.append(given)})()
    held = Held("reader", seat, dict, False, made.append)
    raised: list[Exception] = []

    def ask() -> None:
        try:
            held.call("ask", [])
        except ActorLostError as error:
            raised.append(error)

    waiting = [threading.Thread(target=ask) for _ in range(3)]
    with held._turn:
        for thread in waiting:
            thread.start()
        held.close()
    for thread in waiting:
        thread.join(timeout=60)
    assert [str(error) for error in raised] == ["judge reader was closed"] * 3
    assert made == []


def test_what_a_generator_can_not_be_made_of_is_no_death() -> None:
    actor = object.__new__(GeneratorActor)

    def missing() -> None:
        raise InputError("there is no model at m")

    actor._make = missing  # type: ignore[assignment]
    with pytest.raises(InputError, match="no model at m"):
        actor.call("generate")


def test_a_generator_is_made_anew_so_many_times_for_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those count that die as they start."""
    actors: list[int] = []

    def make(self: Any, at: int) -> Any:
        actors.append(at)
        return DyingActor()

    def answered(reference: Any) -> Any:
        raise ActorDiedError

    def started(references: Any) -> None:
        # Every second one lives until it is asked.
        if len(actors) % 2:
            raise ActorDiedError

    monkeypatch.setattr("launch.generator_actors.answered", answered)
    monkeypatch.setattr("launch.generator_actors.started", started)
    monkeypatch.setattr("ray.kill", lambda actor: None)
    monkeypatch.setattr(Generators, "_make", make)
    said: list[str] = []
    generators = object.__new__(Generators)
    generators._say, generators._turn = said.append, threading.Lock()
    generators._published = None
    generators._actors = [DyingActor()]
    with pytest.raises(ActorLostError, match=f"generator 0 died {TRIES + 1} times"):
        generators.generate([], None)  # type: ignore[arg-type]
    assert len(actors) == TRIES
    assert said == [
        f"generator 0 died and is made anew ({again} of {TRIES})" for again in range(1, TRIES + 1)
    ]


class DyingActor:
    """Takes calls; what they give is patched above."""

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *given: Any) -> Any:
        return self
