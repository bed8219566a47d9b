"""What crosses a process boundary: a generator, a judge, a learner.

Each has more than one implementation behind it; the loop knows only these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import polars as pl

from rlhf.packing import TokenPair
from rlhf.types import Completion, Prompt, Score, Trained


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. `seed` fixes a shard's draws where the engine allows it.

    Temperature 0 takes the likeliest token each time; the log-probs kept with such a completion
    are those of temperature 1, without top-p.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Published:
    """A policy version as it travels to generators.

    `kind` is `merged` (a whole Hugging Face folder), `adapter` (a PEFT folder over the base that
    the generator already holds) or `stored` (a whole folder as a round keeps it, its weights in
    fp32). `sha256` covers the weight files in `path`, in name order; of what is stored it is
    `rlhf.weights.Digest`, which weights that were sent without a file have too.
    """

    version: int
    path: Path
    kind: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A generator's own word on what it serves: compared with `Published` after every publish."""

    version: int
    sha256: str
    held: str | None = field(default=None, compare=False)
    """The engine's own checksums of the weights in its memory, in one word, where it has any: equal
    among engines side by side."""


class Generator(Protocol):
    """Samples from one policy version at a time."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """`sampling.samples` completions a prompt, ordered by prompt, then sample from 0."""
        ...

    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """Log-probabilities (nats, temperature 1, no top-p) of each completion's tokens."""
        ...

    def load(self, published: Published) -> Loaded:
        """Serve this version from now on; hashes what it read, not what it was told."""
        ...

    def sleep(self) -> None:
        """Give device memory back while the learner works (nothing to give on a CPU)."""
        ...

    def wake(self) -> Loaded | None:
        """Serve again; says what is served, or None if nothing was loaded yet."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


Job = tuple[Sequence[Prompt], Sampling]
"""Prompts of one call of `Generator.generate`, and how to answer them."""


@runtime_checkable
class Pool(Generator, Protocol):
    """Generators side by side that serve the same version."""

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, list[Completion]]]:
        """What `generate` gives for each job, with the job's number, as they are finished. A job
        is taken when a generator is free for it."""
        ...

    def all_logps(self, completions: Sequence[Completion]) -> list[list[list[float]]]:
        """What `logps` gives for the same completions, for every generator."""
        ...


@runtime_checkable
class Receiver(Generator, Protocol):
    """A generator, or a pool, that a learner can send whole weights to."""

    def receive(self, learner: Learner, version: int, stored: Path) -> tuple[Published, Loaded]:
        """Serve what the learner holds, which a round has `stored`: what was sent, by the learner's
        own word, and what came. The generator has served a version before."""
        ...


def stream(generator: Generator, jobs: Iterable[Job]) -> Iterator[tuple[int, list[Completion]]]:
    """What `generate` gives for each job, with the job's number, as they are finished: from a pool
    side by side, else one after the other, each begun when it is asked for."""
    if isinstance(generator, Pool):
        yield from generator.stream(jobs)
        return
    for number, (prompts, sampling) in enumerate(jobs):
        yield number, generator.generate(prompts, sampling)


class Judge(Protocol):
    """Scores completions on its dimensions. Never raises for one bad completion: it abstains."""

    name: str
    dimensions: tuple[str, ...]

    def score(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """One `Score` for every item and dimension, in that order."""
        ...


@runtime_checkable
class ModelJudge(Judge, Protocol):
    """A judge with a model behind it: it holds a device or spends a budget."""

    def start(self, folder: Path | None) -> list[str]:
        """Check what can be checked before anything is generated; lines worth saying. `folder`
        keeps what a run remembers of its judges. Raises InputError."""
        ...

    def news(self) -> str | None:
        """What it cost so far and who answered; None where there is nothing to tell."""
        ...

    def sleep(self) -> None:
        """Give the device back until the next `score`."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Asked(Protocol):
    """Scores that judges were asked for."""

    @property
    def waiting(self) -> Sequence[Future[Any]]:
        """Answers of judges that work by themselves and are not there yet."""
        ...

    @property
    def ready(self) -> bool:
        """Whether all scores are there, and nobody has to be asked in this thread."""
        ...

    def scores(self) -> pl.DataFrame:
        """All scores, once they are there; judges that work in this thread are asked now."""
        ...

    def cancel(self) -> None:
        """They are not wanted any more: what was not begun is left off."""
        ...


class Learner(Protocol):
    """Trains the policy; `rlhf.learner.Learner`, or many of it side by side."""

    @property
    def config(self) -> Any:
        """The run's settings."""
        ...

    def restore(self, folder: Path | None) -> None:
        """Trained weights that `save` wrote; None goes back to the start of the run."""
        ...

    def save(self, folder: Path, card: str) -> None:
        """A Hugging Face folder of the policy, with its model card."""
        ...

    def save_merged(self, folder: Path) -> None:
        """A whole model folder in compute precision, as generators load it."""
        ...

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """Token log-probs (nats) under the policy, or under the run's initial policy."""
        ...

    def reference_logps(
        self, sequences: Sequence[TokenPair], state: Path, check: Callable[[], None]
    ) -> list[float]:
        """Sum of each answer's log-probs (nats) under the objective's reference."""
        ...

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
        on_step: OnStep,
        check: Callable[[], None],
    ) -> Trained:
        """Train in place, from the current weights or the newest checkpoint in `state`."""
        ...

    def release(self) -> None:
        """Give back what only training needed."""
        ...


OnStep = Callable[[int, dict[str, float]], None]
"""Told a step's number (from 1) and its metrics."""


class Serving(Protocol):
    """A generator and the policy version that it serves."""

    def at(self, version: int, policy: Path | None) -> Generator:
        """The generator serving `version` (stored in `policy`; None is the start of the run).

        Raises ParityError if it does not serve what was published.
        """
        ...

    def sleep(self) -> None:
        """The learner needs the device."""
        ...

    def wake(self) -> None:
        """The generator may have it again. Raises ParityError if it woke with other weights."""
        ...


class Reporter(Protocol):
    """What a person sees while it runs. Nothing it does changes a result."""

    def say(self, text: str) -> None:
        """One line."""
        ...

    def stage(self, label: str) -> None:
        """What is being done from now on."""
        ...

    def metrics(self, label: str, values: Mapping[str, float]) -> None:
        """The latest numbers, such as a training step's; they replace those before."""
        ...

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A stage of `total` units; yields a function that says how many are done."""
        ...

    def table(self, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """A small table, columns as in the first row."""
        ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of the run that it will follow."""

    name: str
    identity: str
    """The same at every start of this run, and of no other."""
    folder: Path
    """For the tracker's own files, inside the run's folder."""
    config: Mapping[str, Any]
    """Resolved settings; they hold no secret."""
    told: int
    """Lines and tables that it was told at earlier starts; 0 for a new run."""


class Tracker(Protocol):
    """Keeps a run's numbers where people look at them. `rlhf.tracking` sees to it that nothing is
    told twice and no step goes back; what a tracker raises after its start never stops a run."""

    def start(self, run: TrackedRun) -> str:
        """Begin, or go on; called before a model is loaded. Returns where to look, as one line."""
        ...

    def log(self, round: int | None, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a stage. `step` counts optimizer steps over all rounds."""
        ...

    def table(self, round: int, name: str, rows: Sequence[Mapping[str, str | float]]) -> None:
        """Samples of a round, one row or more, columns as in the first; kept beside those of other
        rounds. Text is a model's or a user's: to be shown as it stands."""
        ...

    def finish(self, state: str) -> None:
        """The run is over or stopped for now; `state` as in status.json."""
        ...
