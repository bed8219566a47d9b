"""Ray actors around the plain classes: generators, and the ranks of the learner.

| who waits | for whom | if that one dies |
|---|---|---|
| driver, in `stream` | the first generator to finish its shard | made anew, shard done again |
| driver, in `load`, `logps` | every generator | made anew, call made again |
| driver, in a learner's call | every rank | at once all made anew, restored, call made again |
| its second thread, drawing ahead | as in `stream` | as there; one thread at a time |
| a learner rank | the others, in a collective | gloo raises; NCCL waits on, until it is killed |

A generator made anew is given the version that the others serve. Only actors that died are tried
again, a few times: an error that an actor raised is about the data
or the config, and is raised here. Nothing is kept before a call has returned, so what is done again
is counted once. A training goes on from its newest checkpoint; steps that are done again give the
same numbers, and are told once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ray.util.scheduling_strategies import (
    PlacementGroupSchedulingStrategy,
)

from launch.layout import Role
from launch.ranks import RankLostError
from rlhf.errors import PairloopError

if TYPE_CHECKING:
    pass

TRIES = 3
"""Times that an actor is made anew for one call before that ends the run."""
START_S = 1800.0
"""Seconds that an actor which is made anew has to find a place, where its node died perhaps another
one, and to load its model."""
GRACE_S = 60.0
"""Seconds that calls have that wait for each other, once one has failed: a death may be heard of
later than what it did to them."""
LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)
"""What Ray raises where an actor died, or its node with an answer that nobody had fetched."""


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


def started(references: Sequence[Any]) -> list[Any]:
    """First answers of new actors. Raises ActorLostError where they don't come in time."""
    try:
        return [ray.get(reference, timeout=START_S) for reference in references]
    except GetTimeoutError:
        raise ActorLostError(
            f"an actor was not there within {START_S:.0f} s; has the cluster lost the node that "
            "had its place? The same command goes on once there is room"
        ) from None


def all_of(references: Sequence[Any], within: float | None = None) -> list[Any]:
    """What calls gave that wait for each other, in their order.

    Raises one of LOST as soon as one's actor has died: the others may wait for it for good. Else,
    where one failed, what it raised, once the others have ended too or `GRACE_S` later; and
    ActorLostError where nobody failed and not all ended `within` seconds.
    """
    pending, errors = list(references), list[Exception]()
    end = math.inf if within is None else time.monotonic() + within
    while pending and (left := end - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, timeout=None if left == math.inf else left)
        for reference in ready:
            try:
                answered(reference)
            except LOST:
                raise
            except Exception as error:
                errors.append(error)
                end = min(end, time.monotonic() + GRACE_S)
    # One whose connection closed says less than the one who closed it.
    own = [error for error in errors if not isinstance(error, RankLostError)]
    if errors:
        raise (*own, *errors)[0]
    if pending:
        raise ActorLostError(f"actors did not end within {within:.0f} s, though none of them died")
    return [answered(reference) for reference in references]


def failed(reference: Any) -> bool:
    """Whether a call that has ended raised, or its actor died."""
    try:
        answered(reference)
    except Exception:
        return True
    return False


def answered(reference: Any) -> Any:
    """What a call gave. Raises what it raised, or one of LOST where its actor died."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
