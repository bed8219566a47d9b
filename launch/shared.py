"""The learner and the generators of all ranks, as one; see `launch.spmd`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ranks import Lead
from rlhf.interrupts import Interrupts
from rlhf.packing import TokenPair
from rlhf.protocols import Generator, Job, Loaded, Published, Sampling
from rlhf.types import Completion, Prompt
from rollout.weight_sync import word_of_all

if TYPE_CHECKING:
    import polars as pl

    from rlhf.config_offline import Trains
    from rlhf.learner import Learner
    from rlhf.protocols import OnStep
    from rlhf.types import Trained


class SharedLearner:
    """The learner of all ranks, as rank 0's loop calls it: see `rlhf.learner.Learner`."""

    def __init__(self, own: Learner, lead: Lead) -> None:
        self._own = own
        self._lead = lead

    @property
    def config(self) -> Trains:
        """The run's settings."""
        return self._own.config

    def restore(self, folder: Path | None) -> None:
        """See `Learner.restore`."""
        with self._together("restore", folder):
            self._own.restore(folder)

    def save(self, folder: Path, card: str) -> None:
        """See `Learner.save`."""
        with self._together("save", folder, card):
            self._own.save(folder, card)

    def save_merged(self, folder: Path) -> None:
        """See `Learner.save_merged`."""
        with self._together("save_merged", folder):
            self._own.save_merged(folder)

    def release(self) -> None:
        """See `Learner.release`."""
        with self._together("release"):
            self._own.release()

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """See `Learner.logps`."""
        with self._together("logps", completions, initial):
            return self._own.logps(completions, initial)

    def reference_logps(
        self, sequences: Sequence[TokenPair], state: Path, check: Any
    ) -> list[float]:
        """See `Learner.reference_logps`; a stop that one rank hears of stops all together."""
        with self._together("reference_logps", sequences, state):
            return self._own.reference_logps(sequences, state, check)

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
        on_step: OnStep,
        check: Any,
    ) -> Trained:
        """See `Learner.train`; a stop that one rank hears of stops all at the same step."""
        with self._together("train", table, reference, round_index, state):
            return self._own.train(table, reference, round_index, state, on_step, check)

    def _together(self, method: str, *arguments: Any) -> AbstractContextManager[None]:
        return self._lead.together("learner", method, *arguments)


class FollowingLearner:
    """The learner on a rank that follows: nobody watches its steps, its own signals count."""

    def __init__(self, own: Learner, interrupts: Interrupts) -> None:
        self._own = own
        self._interrupts = interrupts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def reference_logps(self, sequences: Sequence[TokenPair], state: Path) -> None:
        """See `Learner.reference_logps`."""
        self._own.reference_logps(sequences, state, self._interrupts.check)

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
    ) -> None:
        """See `Learner.train`."""
        self._own.train(
            table,
            reference,
            round_index,
            state,
            lambda _step, _values: None,
            self._interrupts.check,
        )


class SharedGenerator:
    """One generator a rank, all serving the same version (`rlhf.protocols.Pool`)."""

    def __init__(self, own: Generator, lead: Lead) -> None:
        self._own = own
        self._lead = lead
        self._published: Published | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See `Generator.generate`; by rank 0 alone."""
        return self._own.generate(prompts, sampling)

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, list[Completion]]]:
        """See `Pool.stream`: a job for each rank at a time."""
        world, done, coming = self._lead.group.world, 0, iter(jobs)
        while part := list(islice(coming, world)):
            padded = [*part, *[None] * (world - len(part))]
            for drawn in self._each("generate", padded)[: len(part)]:
                yield done, drawn
                done += 1

    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """See `Generator.logps`; by rank 0 alone."""
        return self._own.logps(completions)

    def all_logps(self, completions: Sequence[Completion]) -> list[list[list[float]]]:
        """See `Pool.all_logps`."""
        return self._same("logps", completions)

    def load(self, published: Published) -> Loaded:
        """See `Generator.load`."""
        self._published = published
        word = word_of_all(self._same("load", published), published)
        assert word is not None
        return word

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self._same("sleep")

    def wake(self) -> Loaded | None:
        """See `Generator.wake`."""
        return word_of_all(self._same("wake"), self._published)

    def close(self) -> None:
        """Free rank 0's engine; the others free theirs when they are let go."""
        self._own.close()

    def _same(self, method: str, *arguments: Any) -> list[Any]:
        return self._each(method, [arguments] * self._lead.group.world)

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        return self._lead.each("generator", self._own, method, arguments)
