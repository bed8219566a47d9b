"""Publish a policy version to a generator, and prove that it arrived.

A stale generator is the field's most expensive silent bug, so after every publish three things are
checked: the version and the SHA-256 that the generator says it loaded; the mean log-prob gap to
the learner on probe completions; and, where old and new policy differ most, that the engine
followed the change (slope near 1) rather than stayed (slope near 0).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from rlhf.config import RunConfig
from rlhf.errors import ParityError
from rlhf.files import atomic_folder, sha256_file
from rlhf.protocols import Generator, Learner, Loaded, Pool, Published, Receiver, Sampling
from rlhf.types import Completion, Prompt

Log = Callable[[dict[str, Any]], None]

TOLERANCE = {"fp32": 0.002, "bf16": 0.08, "fp16": 0.04}
"""Mean absolute log-prob gap a token, in nats: about twice the gap of a fresh engine."""

FRESH_SLOPE = (0.5, 1.5)
STALE_SLOPE = 0.25
"""A stale engine has slope 0, a fresh one 1. Rounding a small update into bf16 weights blurs it: a
slope between the two bounds is neither passed nor fatal."""


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the names and hashes of a folder's weight files, in name order."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"{folder} has no weights"
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


Verdict = Literal["pass", "fail", "indistinguishable"]


@dataclass(frozen=True, slots=True)
class Parity:
    """How well a generator follows the learner. Gaps are nats a token."""

    gap: float
    tolerance: float
    change: float | None
    """Mean |new - old| of the learner on the tokens the slope is taken from."""
    slope: float | None
    slope_error: float | None
    """Standard error of the slope, from the engine's noise before the change."""
    verdict: Verdict


def parity(
    engine: np.ndarray,
    new: np.ndarray,
    old: np.ndarray | None,
    engine_old: np.ndarray | None,
    tolerance: float,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> Parity:
    """Compare token log-probs, each of shape [tokens], of generator and learner.

    gap = mean |engine - new|, taken on `drawn` (engine, new): tokens sampled from the version
    itself, since tokens that it has come to find unlikely differ by more; by default on the same
    tokens as the slope. On the quarter of tokens where |new - old| is largest,
    slope = sum((engine - old)(new - old)) / sum((new - old)^2). Its standard error is
    noise / sqrt(sum((new - old)^2)), noise being the larger of sd(engine_old - old) and the
    residual's. Where six such errors span more than the step from stale to fresh, the two can't
    be told apart, and that is said.
    """
    served, held = drawn or (engine, new)
    gap = float(np.abs(served - held).mean())
    good = bool(np.isfinite(gap)) and gap <= tolerance
    if old is None or engine_old is None:
        return Parity(gap, tolerance, None, None, None, "pass" if good else "fail")
    most = np.argsort(-np.abs(new - old), kind="stable")[: max(1, len(new) // 4)]
    change, followed = (new - old)[most], (engine - old)[most]
    moved = float(np.abs(change).mean())
    power = float((change**2).sum())
    if not good or power == 0:
        return Parity(gap, tolerance, moved, None, None, "indistinguishable" if good else "fail")
    slope = float((followed * change).sum() / power)
    noise = max((engine_old - old).std(), (followed - slope * change).std())
    error = float(noise / np.sqrt(power))
    return Parity(gap, tolerance, moved, slope, error, _follows(slope, error))


def _follows(slope: float, error: float) -> Verdict:
    if 6 * error > 1:
        return "indistinguishable"
    if slope < STALE_SLOPE:
        return "fail"
    return "pass" if FRESH_SLOPE[0] <= slope <= FRESH_SLOPE[1] else "indistinguishable"


def check_loaded(published: Published, loaded: Loaded | None) -> None:
    """Raises ParityError unless the generator serves what was published to it."""
    if loaded is None:
        raise ParityError(
            f"published version {published.version}, but the generator serves nothing"
        )
    if (loaded.version, loaded.sha256) != (published.version, published.sha256):
        raise ParityError(
            f"published version {published.version} (SHA-256 {published.sha256[:12]}), but the "
            f"generator serves version {loaded.version} ({loaded.sha256[:12]})"
        )


def word_of_all(said: Sequence[Loaded | None], published: Published | None) -> Loaded | None:
    """What generators side by side say they serve: of those whose word is not what was published
    (None: nothing yet) the first one's, so that one that is wrong is never spoken for.

    Raises ParityError where their engines' own checksums differ.
    """
    held = [word.held for word in said if word is not None and word.held is not None]
    if len({*held}) > 1:
        raise ParityError(
            f"generators that were given the same version hold different weights: their engines' "
            f"checksums are {', '.join(word[:12] for word in held)}"
        )
    expected = None if published is None else Loaded(published.version, published.sha256)
    return next((word for word in said if word != expected), expected)


class Serving:
    """A generator and the version it serves. The engine starts when a version is first asked for.

    The learner must hold no unsaved training when a version is asked for: it is restored from the
    stored policy, so that what is served is what was stored.
    """

    def __init__(
        self,
        build: Callable[[], Generator],
        learner: Learner,
        kind: str,
        folder: Path,
        probes: Sequence[Prompt],
        log: Log,
    ) -> None:
        self._build = build
        self._learner = learner
        self._kind = kind
        self._folder = folder
        self._prompts = probes
        self._log = log
        self._generator: Generator | None = None
        self._served: Published | None = None
        self._probes: list[Completion] = []
        self._old: np.ndarray | None = None
        self._engines_old: list[np.ndarray | None] | None = None

    def at(self, version: int, policy: Path | None) -> Generator:
        """The generator serving `version`, whose stored policy is `policy` (None: the start).

        Raises ParityError, with the numbers, if it does not.
        """
        if self._generator is None:
            self._generator = self._build()
        if self._served is None or self._served.version != version:
            self._publish(self._generator, version, policy)
        return self._generator

    def sleep(self) -> None:
        """The learner needs the device."""
        if self._generator is not None:
            self._generator.sleep()

    def wake(self) -> None:
        """The generator may have the device again; what it serves is checked."""
        if self._generator is None:
            return
        self._learner.release()
        loaded = self._generator.wake()
        if self._served is not None:
            check_loaded(self._served, loaded)

    def close(self) -> None:
        """Free the engine and the published copy."""
        if self._generator is not None:
            self._generator.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _publish(self, generator: Generator, version: int, policy: Path | None) -> None:
        self._learner.restore(policy)
        if policy is not None and self._served is not None and self._sends(generator):
            self._clear()
            published, loaded = generator.receive(self._learner, version, policy)
        else:
            published = self._write(version)
            loaded = generator.load(published)
        check_loaded(published, loaded)
        drawn = self._sample(generator, version)
        self._probes = self._probes or drawn
        engines, new = _every(generator, self._probes), _flat(self._learner.logps(self._probes))
        served, held = engines, new
        # The first version's own samples are the probes. Later ones are scored by themselves, so
        # that the probes always lie in the same batch, and differ by what was learnt alone.
        if drawn is not self._probes:
            served, held = _every(generator, drawn), _flat(self._learner.logps(drawn))
        before = self._engines_old or [None] * len(engines)
        for number, engine in enumerate(engines):
            own = served[number], held
            result = parity(engine, new, self._old, before[number], self._tolerance, own)
            of = {"generator": number} if len(engines) > 1 else {}
            self._log({"version": version, **of, **asdict(result)})
            if result.verdict == "fail":
                raise ParityError(_explain(version, result))
        self._served, self._old, self._engines_old = published, new, [*engines]

    def _sends(self, generator: Generator) -> TypeGuard[Receiver]:
        """Whether weights are sent to it: later versions, since its engine starts from a folder."""
        return self._config.rollout.transfer == "network" and isinstance(generator, Receiver)

    def _clear(self) -> None:
        for other in [*self._folder.iterdir()] if self._folder.exists() else []:
            shutil.rmtree(other)

    def _write(self, version: int) -> Published:
        path = self._folder / f"version-{version:04d}"
        # First, so that there is never room for two needed: in memory it may be dear.
        self._clear()
        with atomic_folder(path) as staging:
            if self._kind == "adapter":
                self._learner.save(staging, "A version on its way to a generator.\n")
            else:
                self._learner.save_merged(staging)
        return Published(version, path, self._kind, weights_sha256(path))

    def _sample(self, generator: Generator, version: int) -> list[Completion]:
        config = self._config
        count = config.rollout.parity_completions
        sampling = Sampling(
            1, 1.0, 1.0, min(64, config.rollout.max_new_tokens), config.run.seed + version
        )
        return generator.generate(self._prompts[:count], sampling)

    @property
    def _config(self) -> RunConfig:
        config = self._learner.config
        assert isinstance(config, RunConfig), "offline training serves nothing"
        return config

    @property
    def _tolerance(self) -> float:
        config = self._config
        return config.rollout.parity_tolerance or TOLERANCE[config.model.precision]


def _every(generator: Generator, completions: Sequence[Completion]) -> list[np.ndarray]:
    """Token log-probs of each generator behind this one."""
    if isinstance(generator, Pool):
        return [_flat(rows) for rows in generator.all_logps(completions)]
    return [_flat(generator.logps(completions))]


def _flat(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([value for row in rows for value in row], dtype=np.float64)


def _explain(version: int, result: Parity) -> str:
    slope = (
        ""
        if result.slope is None
        else f"; slope {result.slope:.2f} +- {result.slope_error:.2f} (1 fresh, 0 stale, "
        f"below {STALE_SLOPE} fails) where the policy moved by {result.change:.3f} nats"
    )
    return (
        f"the generator does not serve version {version}: mean log-prob gap to the learner "
        f"{result.gap:.4f} nats a token, {result.tolerance} allowed (rollout.parity_tolerance)"
        f"{slope}"
    )
