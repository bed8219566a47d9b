"""How rank 0 has the other ranks of a launcher make the same calls; see `launch.spmd`."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhf.errors import InexactError, InputError, Interrupted, NonFiniteError, PairloopError
from rlhf.group import Group

PATIENCE = timedelta(hours=24)
"""How long a rank waits for one that lives: rank 0 may ask slow judges for hours in between."""

# Raised by all ranks at the same point: they agreed on what they found.
_AGREED = (Interrupted, NonFiniteError, InexactError)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class RankLostError(PairloopError):
    """Another rank ended while this one waited for it."""


@dataclass(frozen=True, slots=True)
class Met:
    """The ranks that a launcher started, once they have met."""

    group: Group
    calls: Any
    """The gloo group over which rank 0 says what comes next. One of its own: a rank that is still
    waiting for another's part of a call must not take the next call for it."""


def join(device: str) -> Met:
    """Meet the other ranks, as the launcher's environment says where.

    Raises InputError where it says nothing of the sort.
    """
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ["LOCAL_RANK"])
    except KeyError as error:
        raise InputError(
            f"placement.kind spmd needs the ranks of a launcher, but {error.args[0]} is not set: "
            "accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m launch train "
            "CONFIG, or torchrun --nproc-per-node N -m launch train CONFIG"
        ) from None
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    objects, calls = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    return Met(Group(rank, world, objects), calls)


@contextmanager
def met(device: str) -> Iterator[Met]:
    """The ranks, until the block ends.

    Who fails in it says why before its process ends, and only then do the others lose it: they
    point to what stands above. Raises InputError as `join` does.
    """
    found = join(device)
    try:
        yield found
    except _AGREED:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def leaving_together() -> Iterator[None]:
    """Turns a lost connection into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in _LOST):
            raise RankLostError(
                "another rank ended; what stopped it stands above. The same command goes on from "
                "what is stored"
            ) from error
        raise


@dataclass(frozen=True, slots=True)
class Call:
    """What all ranks do next."""

    target: str
    method: str
    arguments: tuple[Any, ...]
    collective: bool
    """Whether all make it together; else each has arguments of its own, or None for nothing."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank that worked alone raised."""

    error: Exception


class Lead:
    """Rank 0's side: says what comes next, and does its own part of it."""

    def __init__(self, met: Met) -> None:
        self.group = met.group
        self._calls = met.calls
        self._heard = False

    @property
    def heard(self) -> bool:
        """Whether the others wait for calls."""
        return self._heard

    def listened_to(self) -> None:
        """From now on the others wait for calls: all of them have made their part of the policy."""
        self._heard = True

    @contextmanager
    def together(self, target: str, method: str, *arguments: Any) -> Iterator[None]:
        """Have the others make the call that is made inside."""
        self._say(Call(target, method, arguments, collective=True))
        try:
            with leaving_together():
                yield
        except _AGREED:
            raise
        except BaseException:
            # The others wait inside the call for what will not come: they hear of it by our end.
            self._heard = False
            raise

    def each(
        self, target: str, own: Any, method: str, arguments: Sequence[tuple[Any, ...] | None]
    ) -> list[Any]:
        """Every rank's answer to its own arguments, None where it had none.

        Raises the first rank's error, if any had one; the others have finished by then.
        """
        self._say(Call(target, method, tuple(arguments), collective=False))
        try:
            found = _collect(self.group, _alone(own, method, arguments[0]))
        except BaseException:
            # The others wait for this rank's answer.
            self._heard = False
            raise
        for answer in found:
            if isinstance(answer, Failure):
                raise answer.error
        return found

    def end(self) -> None:
        """Let the others go, if they can hear it; else they see this rank go."""
        if self._heard:
            with suppress(RankLostError):
                self._say(None)

    def _say(self, call: Call | None) -> None:
        with leaving_together():
            dist.broadcast_object_list([call], src=0, group=self._calls)


def attend(met: Met, targets: dict[str, Any]) -> None:
    """The other ranks' side: make the calls that rank 0 says, until it lets go."""
    group = met.group
    while True:
        said: list[Any] = [None]
        with leaving_together():
            dist.broadcast_object_list(said, src=0, group=met.calls)
        call = said[0]
        if call is None:
            return
        target = targets[call.target]
        if call.collective:
            try:
                with leaving_together():
                    getattr(target, call.method)(*call.arguments)
            except _AGREED:
                # Rank 0 has the same, and decides.
                continue
        else:
            _collect(group, _alone(target, call.method, call.arguments[group.rank]))


def _alone(target: Any, method: str, arguments: tuple[Any, ...] | None) -> Any:
    if arguments is None:
        return None
    try:
        return getattr(target, method)(*arguments)
    except Exception as error:
        return Failure(sendable(error))


def sendable(error: Exception) -> Exception:
    """The error, or its words where it can't be sent to another process and be made again there."""
    try:
        # As the other process will; nothing but what was just written here is read.
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return PairloopError("".join(traceback.format_exception(error)).strip())


def _collect(group: Group, answer: Any) -> list[Any]:
    """On rank 0, every rank's answer."""
    with leaving_together():
        return group.collect(answer)
