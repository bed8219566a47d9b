"""Judges' models on all ranks, a share of the questions each; see `launch.spmd`.

The judges themselves (rubrics, cache, mapping) stay on rank 0, as they stay in the driver under
Ray. The other ranks make their models when rank 0 first needs them after it is listened to: before
that they can't hear it, and what must be asked so early rank 0 answers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.ranks import Lead
from rlhf.config_judges import LlmSpec, RewardModelSpec
from rlhf.errors import InputError
from rollout.judges.backends import Answer, Call, Keep, keep_all
from rollout.judges.backends.vllm import VllmBackend
from rollout.judges.panel import InProcess
from rollout.judges.reward_engines import Checkpoint, RewardEngine, Rows


class OnAllRanks:
    """`rollout.judges.panel.Engines` with a model on each rank."""

    def __init__(self, lead: Lead, inside: InProcess) -> None:
        """`inside` is how a rank holds its model."""
        self._lead = lead
        self._inside = inside

    def language(self, spec: LlmSpec, field: str) -> SharedBackend:
        """See `Engines.language`."""
        own = self._inside.language(spec, field)
        assert isinstance(own, VllmBackend), "a language model of one's own is in vLLM"
        return SharedBackend(own, spec, field, self._lead)

    def reward(self, spec: RewardModelSpec, field: str) -> SharedRewardEngine:
        """See `Engines.reward`."""
        if spec.backend == "vllm":
            raise InputError(
                f"{field}.backend is vllm, whose engine would start on all ranks of placement.kind "
                "spmd, where rank 0 tries a reward model before the others are there; use backend "
                "transformers, or placement.kind ray"
            )
        return SharedRewardEngine(self._inside.reward(spec, field), spec, field, self._lead)


class Followed:
    """The models of judges on a rank that follows; rank 0's calls reach them by their judge's
    field."""

    def __init__(self, device: str, targets: dict[str, Any]) -> None:
        self._inside = InProcess(device)
        self._targets = targets
        self._held: list[Any] = []

    def language(self, spec: LlmSpec, field: str) -> None:
        """Make one and start its engine, as rank 0 does."""
        backend: Any = self._inside.language(spec, field)
        self._hold(field, backend)
        backend.ready()

    def reward(self, spec: RewardModelSpec, field: str, checkpoint: Checkpoint) -> None:
        """Make one and read its weights."""
        engine = self._inside.reward(spec, field)
        self._hold(field, engine)
        engine.load(checkpoint)

    def close(self) -> None:
        """Free them."""
        for held in self._held:
            held.close()

    def _hold(self, field: str, made: Any) -> None:
        self._targets[field] = made
        self._held.append(made)


class SharedBackend:
    """`rollout.judges.backends.Backend` on all ranks."""

    beside = False

    def __init__(self, own: VllmBackend, spec: LlmSpec, field: str, lead: Lead) -> None:
        self.identity: Mapping[str, str] = own.identity
        self._own = own
        self._of = spec, field
        self._lead = lead
        self._shared = False

    def start(self, record: Path | None, probe: Call) -> None:
        """See `Backend.start`."""
        self._own.start(record, probe)

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        """See `Backend.ask`."""
        if not calls:
            return []
        if not self._shared:
            # An engine beside ranks starts on all of them at once.
            with self._lead.together("judges", "language", *self._of):
                self._own.ready()
            self._shared = True
        answers = _dealt(self._lead, self._of[1], self._own, "ask", calls)
        keep_all(answers, keep)
        return answers

    def news(self) -> None:
        """See `Backend.news`."""

    def sleep(self) -> None:
        """See `Backend.sleep`."""
        if self._shared:
            _all(self._lead, self._of[1], self._own, "sleep")

    def close(self) -> None:
        """Free rank 0's; the others free theirs when they are let go."""
        self._own.close()


class SharedRewardEngine:
    """`rollout.judges.reward_engines.RewardEngine` on all ranks."""

    beside = False

    def __init__(self, own: RewardEngine, spec: RewardModelSpec, field: str, lead: Lead) -> None:
        self._own = own
        self._of = spec, field
        self._lead = lead
        self._checkpoint: Checkpoint | None = None
        self._shared = False

    def load(self, checkpoint: Checkpoint) -> None:
        """See `RewardEngine.load`: rank 0's now, the others' when they are first asked."""
        self._own.load(checkpoint)
        self._checkpoint = checkpoint

    def raw(self, rows: Rows) -> list[tuple[float, ...]]:
        """See `RewardEngine.raw`."""
        if not self._lead.heard:
            return self._own.raw(rows)
        if not self._shared:
            spec, field = self._of
            made = spec, field, self._checkpoint
            self._lead.each("judges", _Nothing(), "reward", [made] * self._lead.group.world)
            self._shared = True
        return _dealt(self._lead, self._of[1], self._own, "raw", rows)

    def sleep(self) -> None:
        """See `RewardEngine.sleep`."""
        if self._shared:
            _all(self._lead, self._of[1], self._own, "sleep")
        else:
            self._own.sleep()

    def close(self) -> None:
        """Free rank 0's; the others free theirs when they are let go."""
        self._own.close()


class _Nothing:
    """Rank 0 has made its own already."""

    def reward(self, *_: Any) -> None:
        pass


def _dealt(lead: Lead, field: str, own: Any, method: str, asked: Sequence[Any]) -> list[Any]:
    """What the ranks' models give for a share of what is asked each, in its order."""
    world = lead.group.world
    cuts = [len(asked) * rank // world for rank in range(world + 1)]
    parts = [asked[a:b] for a, b in itertools.pairwise(cuts)]
    found = lead.each(field, own, method, [(part,) if part else None for part in parts])
    return [answer for answers in found for answer in answers or ()]


def _all(lead: Lead, field: str, own: Any, method: str) -> None:
    lead.each(field, own, method, [()] * lead.group.world)
