"""What tests send to actors. An actor imports all that the module imports: next to nothing."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.roles import Cards


class FewRoles:
    """Makes a generator that only remembers what cards it was given."""

    def generator(self, longest: int, cards: Cards) -> Any:
        return SimpleNamespace(concurrency=SimpleNamespace(say=print), cards=lambda: cards)


class BrokenRoles:
    """Makes a generator that raises, its engine having lost a worker or not."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken

    @property
    def plan(self) -> Any:
        from launch.placement import Plan

        return Plan("cpu", "vllm", "merged")

    def generator(self, longest: int, cards: Cards) -> Any:
        def fail() -> None:
            raise ValueError("as asked")

        concurrency = SimpleNamespace(say=print)
        return SimpleNamespace(concurrency=concurrency, broken=self.broken, fail=fail)


class Worker:
    """An actor that ends a call in one way or another."""

    def answer(self) -> int:
        return 7

    def hang(self) -> None:
        threading.Event().wait()

    def refuse(self) -> None:
        raise ValueError("as asked")

    def lose(self) -> None:
        from launch.ranks import RankLostError

        raise RankLostError("another rank ended")

    def die(self) -> None:
        os._exit(1)
