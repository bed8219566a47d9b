"""The learner's ranks as Ray actors; who waits for whom is told in `launch.actors`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
)

from launch.actors import LOST, TRIES, ActorLostError, Seats, all_of, answered, failed, started
from launch.quiet import hush, hush_transformers
from launch.ranks import RankLostError
from launch.roles import Roles, Say
from rlhf.errors import Interrupted
from rlhf.files import remove
from rlhf.packing import TokenPair
from rlhf.protocols import OnStep
from rlhf.types import Completion, Trained

if TYPE_CHECKING:
    import polars as pl

    from rollout.transfer import Meeting

POLL_S = 0.2
"""Seconds between looks at a training's steps."""


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
        from launch import ranks, spmd

        host, port = address
        os.environ |= {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._world),
            # Ray shows an actor its own GPUs only.
            "LOCAL_RANK": "0",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        group = ranks.join(self._roles.plan.device).group
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
        from launch.ranks import leaving_together

        with leaving_together():
            found = getattr(self._learner, method)(*arguments)
        return found if self._rank == 0 else None

    def described(self) -> dict[str, Any]:
        """The weights that it would send, as generators are told them."""
        from rollout.vllm_transfer import described

        return described(self._learner.policy)

    def send(self, meeting: Meeting) -> str:
        """Send whole weights to all generators, with the other ranks; the digest of what the first
        rank sent."""
        from launch.ranks import leaving_together
        from rollout.vllm_transfer import send

        with leaving_together():
            return send(self._learner.policy, self._rank, meeting)

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
        steps: Queue | None,
    ) -> Trained:
        """See `Learner.train`; tells `steps` of each."""
        from launch.ranks import leaving_together

        def on_step(step: int, values: dict[str, float]) -> None:
            if steps is not None:
                steps.put((step, values))

        with leaving_together():
            return self._learner.train(table, reference, round_index, state, on_step, self._check)

    def reference_logps(self, sequences: Sequence[TokenPair], state: Path) -> list[float]:
        """See `Learner.reference_logps`."""
        from launch.ranks import leaving_together

        with leaving_together():
            found = self._learner.reference_logps(sequences, state, self._check)
        return found if self._rank == 0 else []

    def stop(self, reason: str) -> None:
        """Ask a training to stop after its step, or a reference's pass after its micro-batch; heard
        while it runs."""
        self._asked = reason

    def _check(self) -> None:
        if self._asked is not None:
            raise Interrupted(self._asked)


class Learners:
    """`rlhf.protocols.Learner`: ranks that train one policy together."""

    def __init__(self, seats: Seats, roles: Roles, say: Say) -> None:
        self._seats = seats.of["learner"]
        self._roles = roles
        self._say = say
        self._restored: Path | None = None
        # Trains again what has been trained since, from its newest checkpoint.
        self._again: Callable[[], object] = lambda: None
        self._ranks: list[Any] = []
        self._together(lambda: None, hear=say)

    @property
    def config(self) -> Any:
        """The run's settings."""
        return self._roles.config

    def restore(self, folder: Path | None) -> None:
        """See `Learner.restore`."""
        self._restored, self._again = folder, lambda: None
        self._together(lambda: self._call("restore", folder))

    def save(self, folder: Path, card: str) -> None:
        """See `Learner.save`; where a rank dies, what was trained since its newest checkpoint is
        trained again."""
        self._write("save", folder, card)

    def save_merged(self, folder: Path) -> None:
        """See `Learner.save_merged`."""
        self._write("save_merged", folder)

    def release(self) -> None:
        """See `Learner.release`; ranks that died have nothing to give back."""
        try:
            if self._ranks:
                self._call("release")
        except LOST:
            self._say("a learner rank died; all are made anew when they are needed")
            self.close()

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """See `Learner.logps`."""
        found: list[list[float]] = self._together(lambda: self._call("logps", completions, initial))
        return found

    def reference_logps(
        self, sequences: Sequence[TokenPair], state: Path, check: Callable[[], None]
    ) -> list[float]:
        """See `Learner.reference_logps`; a signal that the driver hears stops all ranks."""

        def ask() -> Any:
            # Once for all ranks of a node.
            given = ray.put(sequences)
            calls = [rank.reference_logps.remote(given, state) for rank in self._ranks]
            return self._watched(calls, check, lambda: None)

        found: list[float] = self._together(ask)
        return found

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

        def tell(steps: Queue) -> None:
            nonlocal last
            for step, values in _drained(steps):
                if step > last:
                    last = step
                    on_step(step, values)

        def train(told: Queue | None = None) -> Any:
            calls = [
                rank.train.remote(table, reference, round_index, state, None if at else told)
                for at, rank in enumerate(self._ranks)
            ]
            return self._watched(calls, check, lambda: None if told is None else tell(told))

        def watched() -> Any:
            # Beside the driver, whose end is the run's: a node that dies must not take it along.
            here = ray.get_runtime_context().get_node_id()
            beside = NodeAffinitySchedulingStrategy(here, soft=False)
            steps = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": beside})
            try:
                return train(steps)
            finally:
                steps.shutdown()

        trained: Trained = self._together(watched)
        self._again = train
        return trained

    def described(self) -> dict[str, Any]:
        """The weights that would be sent, as generators are told them."""
        found: dict[str, Any] = self._together(lambda: answered(self._ranks[0].described.remote()))
        return found

    def address(self) -> tuple[str, int]:
        """Where others may meet the first rank."""
        host, port = self._together(lambda: answered(self._ranks[0].address.remote()))
        return host, port

    def send(self, meeting: Meeting) -> list[Any]:
        """Let all ranks send the policy's weights; references to their answers, the first rank's
        digest first."""
        return [rank.send.remote(meeting) for rank in self._ranks]

    def renew(self) -> None:
        """Make all ranks anew, with the policy that was restored last: one may wait for good for
        whom it sent to."""
        self.close()
        self._together(lambda: None)

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _call(self, method: str, *arguments: Any) -> Any:
        return all_of([rank.call.remote(method, *arguments) for rank in self._ranks])[0]

    def _write(self, method: str, folder: Path, *arguments: Any) -> None:
        """Let the first rank write into an empty folder."""

        def ask() -> None:
            # One that died may have begun.
            for left in folder.iterdir():
                remove(left)
            self._call(method, folder, *arguments)

        self._together(ask)

    def _watched(
        self, calls: Sequence[Any], check: Callable[[], None], tell: Callable[[], None]
    ) -> Any:
        """What the first rank's call gives, with `tell` now and then until all end; where `check`
        raises Interrupted, ranks are asked to stop."""
        asked, pending, running = False, list(calls), True
        while running:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            running = bool(pending) and not any(map(failed, ready))
            tell()
            if not asked and (reason := _reason(check)) is not None:
                asked = True
                for rank in self._ranks:
                    rank.stop.remote(reason)
        try:
            return all_of(calls)[0]
        finally:
            tell()

    def _together(self, ask: Callable[[], Any], hear: Say = lambda _: None) -> Any:
        """What `ask` gives; what ranks that have to be made first have to say is for `hear`."""
        for again in range(TRIES + 1):
            try:
                if not self._ranks:
                    self._start(hear)
                    # New ones are at the run's start.
                    if self._restored is not None:
                        self._call("restore", self._restored)
                    self._again()
                found = ask()
                self._tell()
            except (*LOST, RankLostError) as error:
                # Or ranks lost each other, and none of them died.
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
        started([rank.identity.remote() for rank in self._ranks])
        # Last, so that nobody takes the port meanwhile.
        address = answered(self._ranks[0].address.remote())
        all_of([rank.meet.remote(address) for rank in self._ranks])
        for line in answered(self._ranks[0].news.remote()):
            say(line)


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
