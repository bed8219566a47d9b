"""The processes that train one policy together, and the few things they say to each other.

One process alone is a group of one, so nothing else asks how many there are. Numbers and Python
objects travel over gloo, gradients over whatever connects the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.errors import Interrupted

T = TypeVar("T")


class Group:
    """This process among those that train together: `rank` of `world`.

    Every method but `main` is a collective: all ranks call it, in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1, objects: Any = None) -> None:
        """`objects` is the gloo group over which Python objects travel."""
        self.rank = rank
        self.world = world
        self._objects = objects

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._objects)
        return found

    def collect(self, value: T) -> list[T]:
        """Every rank's value on rank 0, nothing on the others."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(value, found, dst=0, group=self._objects)
        return found or []

    def first(self, value: T) -> T:
        """Rank 0's value; that of other ranks is not looked at."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self._objects)
        return held[0]

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over ranks of what stands under each name; ranks may have different names."""
        total: dict[str, float] = {}
        for found in self.gather(dict(values)):
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def scattered(self, planned: Sequence[Sequence[int]], found: Sequence[Sequence[T]]) -> list[T]:
        """Items by number, where this rank found `found[i]` for the numbers `planned[i]`.

        All numbers of all ranks together are 0, 1, 2, ...
        """
        own = {
            number: value
            for numbers, values in zip(planned, found, strict=True)
            for number, value in zip(numbers, values, strict=True)
        }
        items = {number: value for part in self.gather(own) for number, value in part.items()}
        return [items[number] for number in range(len(items))]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up every parameter's gradient over the ranks; None counts as 0."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat: Tensor = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        start = 0
        for parameter in parameters:
            assert parameter.grad is not None
            part = flat[start : start + parameter.numel()]
            parameter.grad.copy_(part.view_as(parameter))
            start += parameter.numel()

    def stop_together(self, check: Callable[[], None]) -> None:
        """Raises Interrupted on all ranks where `check` raises it on one."""
        if self.world == 1:
            check()
            return
        mine: str | None = None
        try:
            check()
        except Interrupted as error:
            mine = str(error)
        asked = [reason for reason in self.gather(mine) if reason is not None]
        if asked:
            raise Interrupted(asked[0])


ALONE = Group()
