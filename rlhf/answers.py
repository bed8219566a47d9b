"""Answers of a version and their scores: drawn in shards, judged beside, stored as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from rlhf.canaries import Items
from rlhf.protocols import Asked, Job, Sampling
from rlhf.rounds import Shards
from rlhf.types import Completion, Prompt, completions_of

AT_ONCE = 4
"""Shards that judges are asked about at the same time: one that is slow holds up no other, and
drawing waits where judges fall behind by more."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn, and the name (`.../completions`) that it is stored under."""

    name: str
    shards: Sequence[Sequence[Prompt]]
    version: int
    sampling: Sampling
    audit: bool
    """Whether audit judges are asked too."""

    @property
    def scores(self) -> str:
        """The name that scores are stored under."""
        return self.name.removesuffix("completions") + "scores"

    def jobs(self, numbers: Iterable[int]) -> Iterator[Job]:
        """Work for generators. Every shard has a seed of its own, so that a resumed run draws what
        a whole one does."""
        for number in numbers:
            key = (self.sampling.seed, self.version, _key(self.name), number)
            seed = int(np.random.SeedSequence(key).generate_state(1)[0]) % 2**31
            yield self.shards[number], replace(self.sampling, seed=seed)

    def items(self, number: int, drawn: pl.DataFrame) -> Items:
        """What judges are shown of a shard."""
        known = {prompt.prompt_id: prompt for prompt in self.shards[number]}
        return [(known[c.prompt_id], c) for c in completions_of(drawn)]

    def check(self, number: int, drawn: Sequence[Completion]) -> None:
        """A generator answers each prompt, in order, from the version that was asked for."""
        samples = range(self.sampling.samples)
        expected = [(p.prompt_id, s, self.version) for p in self.shards[number] for s in samples]
        found = [(c.prompt_id, c.sample, c.policy_version) for c in drawn]
        assert found == expected, "the generator answered other prompts, samples or versions"


def _key(name: str) -> int:
    return int.from_bytes(name.encode()[-8:], "big")


class Judged:
    """Scores of a draw's shards. What is stored does not depend on the order they come in."""

    def __init__(
        self,
        draw: Draw,
        scores: Shards,
        ask: Callable[[Items, bool], Asked],
        asked: dict[int, Asked],
    ) -> None:
        """`asked` are shards that judges were asked about before."""
        self._draw = draw
        self._scores = scores
        self._ask = ask
        self._asked = {n: found for n, found in asked.items() if n in scores.missing}

    def offer(self, number: int, drawn: pl.DataFrame) -> None:
        """Ask about a shard that was drawn; waits where too many are asked about already."""
        if number not in self._scores.missing or number in self._asked:
            return
        while len(self._asked) >= AT_ONCE:
            self.store_next()
        self._asked[number] = self._ask(self._draw.items(number, drawn), self._draw.audit)

    def store_ready(self) -> None:
        """Store what is there."""
        for number in [n for n, found in self._asked.items() if not found.waiting]:
            self._store(number)

    def store_next(self) -> bool:
        """Wait for the first shard that has all its scores, and store it; False if none is
        left."""
        while self._asked:
            for number, found in self._asked.items():
                if not found.waiting:
                    self._store(number)
                    return True
            left = [answer for found in self._asked.values() for answer in found.waiting]
            wait(left, return_when=FIRST_COMPLETED)
        return False

    def _store(self, number: int) -> None:
        self._scores.write(number, self._asked.pop(number).scores())
