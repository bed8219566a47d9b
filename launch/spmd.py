"""The loop over the ranks that `accelerate launch` or torchrun starts.

| rank | does |
|---|---|
| 0 | runs the loop: keeps the store, selects, asks judges, writes files, speaks |
| all, 0 too | generate: each a shard of prompts at a time, with an engine of its own |
| all, 0 too | train and score: one policy, whole on each rank or in ZeRO's shards |

Rank 0 says what comes next (`Lead`), the others make the same calls (`attend`). What ranks can only
do together (a training step, log-probs, saving what is sharded) they all call with the same
arguments; what each can do alone (a shard of prompts) is collected with its errors.

Who waits for whom: rank 0 for the slowest rank in each call; the others, between calls, for rank 0.
A rank that dies closes its connections, so whoever waits for it hears of it at once and ends too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launch.quiet import hush, hush_transformers
from launch.roles import Roles, Say
from rlhf.errors import InexactError, InputError, Interrupted, NonFiniteError, PairloopError
from rlhf.group import Group
from rlhf.interrupts import Interrupts, to_stderr
from rlhf.protocols import Generator, Job, Loaded, Published, Sampling
from rlhf.types import Completion, Prompt
from rollout import transfer
from rollout.judges.panel import Engines, InProcess

if TYPE_CHECKING:
    import polars as pl

    from launch.placement import Plan
    from rlhf.config import RunConfig
    from rlhf.config_judges import LlmSpec, RewardModelSpec
    from rlhf.config_offline import Trains
    from rlhf.learner import Learner
    from rlhf.policy import Policy
    from rlhf.protocols import OnStep
    from rlhf.sharding import Sharding
    from rlhf.types import Trained
    from rollout.judges.backends import Backend
    from rollout.judges.reward_engines import RewardEngine

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
        found = _collect(self.group, _alone(own, method, arguments[0]))
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
        return Failure(error)


def _collect(group: Group, answer: Any) -> list[Any]:
    """On rank 0, every rank's answer."""
    with leaving_together():
        return group.collect(answer)


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

    def reference_logps(self, table: pl.DataFrame, round_index: int) -> pl.DataFrame:
        """See `Learner.reference_logps`."""
        with self._together("reference_logps", table, round_index):
            return self._own.reference_logps(table, round_index)

    def plan(self, table: pl.DataFrame) -> int:
        """See `Learner.plan`."""
        return self._own.plan(table)

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
        """See `Generator.load`; what differs from rank 0's word is not what was published."""
        loaded: Loaded = _one_word(self._same("load", published))
        return loaded

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self._same("sleep")

    def wake(self) -> Loaded | None:
        """See `Generator.wake`."""
        loaded: Loaded | None = _one_word(self._same("wake"))
        return loaded

    def close(self) -> None:
        """Free rank 0's engine; the others free theirs when they are let go."""
        self._own.close()

    def _same(self, method: str, *arguments: Any) -> list[Any]:
        return self._each(method, [arguments] * self._lead.group.world)

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        return self._lead.each("generator", self._own, method, arguments)


def _one_word(said: Sequence[Any]) -> Any:
    """What all said, else one that differs: the caller compares it with what was published."""
    return next((word for word in said if word != said[0]), said[0])


class _OfRankZero(InProcess):
    """Judges' models in rank 0's process."""

    def language(self, spec: LlmSpec, field: str) -> Backend:
        """See `Engines.language`."""
        raise _no_engine_for(field, "an endpoint (backend openai)")

    def reward(self, spec: RewardModelSpec, field: str) -> RewardEngine:
        """See `Engines.reward`."""
        if spec.backend == "vllm":
            raise _no_engine_for(field, "backend transformers")
        return super().reward(spec, field)


def _no_engine_for(field: str, instead: str) -> InputError:
    return InputError(
        f"{field}.backend is vllm, whose engine would wait for all ranks of placement.kind spmd "
        f"where only rank 0 asks judges; use {instead}, or placement.kind ray"
    )


@dataclass(frozen=True, slots=True)
class Leading:
    """The team that `launch.local` wires on rank 0: all ranks."""

    lead: Lead

    def learner(self, roles: Roles, say: Say) -> SharedLearner:
        """See `Team.learner`: that of all ranks."""
        group = self.lead.group
        own = roles.learner(say, lambda policy, _: shard(policy, roles.config, group))
        self.lead.listened_to()
        return SharedLearner(own, self.lead)

    def engines(self, device: str) -> Engines:
        """See `Team.engines`."""
        return _OfRankZero(device)

    def generator(self, roles: Roles, longest: int) -> SharedGenerator:
        """See `Team.generator`: one a rank."""
        with self.lead.together("following", "make_generator", longest):
            return SharedGenerator(roles.generator(longest), self.lead)

    def memories(self) -> list[str | None]:
        """See `Team.memories`: a rank each."""
        nothing: list[tuple[Any, ...]] = [()] * self.lead.group.world
        return self.lead.each("transfer", transfer, "shared_memory", nothing)


class Following:
    """What the other ranks hold; rank 0's calls reach it by name."""

    def __init__(self, roles: Roles, interrupts: Interrupts, group: Group) -> None:
        self._roles = roles
        own = roles.learner(lambda _: None, lambda policy, _: shard(policy, roles.config, group))
        self.targets: dict[str, Any] = {
            "following": self,
            "transfer": transfer,
            "learner": FollowingLearner(own, interrupts),
        }

    def make_generator(self, longest: int) -> None:
        """As rank 0 does."""
        self.targets["generator"] = self._roles.generator(longest)

    def close(self) -> None:
        """Free the engine."""
        if "generator" in self.targets:
            self.targets["generator"].close()


def shard(policy: Policy, config: RunConfig, group: Group) -> Sharding:
    """The policy over the group's ranks, as `placement.zero` says."""
    from rlhf.sharding import Replicated, Zero

    stage = config.placement.zero
    if stage == 0:
        return Replicated(policy, config.learner, config.model.precision, group)
    return Zero(policy, config.learner, group, stage, config.placement.offload)


def train(config: RunConfig) -> int:
    """Run the loop to its end, or go on with it, on every rank; the exit status of this one.

    Raises PairloopError as `launch.local.run` does.
    """
    from launch import local
    from launch.machines import this_machine
    from launch.placement import place_on, settle
    from rlhf.config import check_zero

    hush()
    machine = this_machine()
    config = with_launchers_zero(settle(config, machine))
    check_zero(config)
    plan = place_on(config, machine)
    # A rank that follows listens before it meets the others, as rank 0 does before it opens the
    # run: from then on a signal that killed one of them would make the run a failed one.
    interrupts = Interrupts(lambda _: None)
    with nullcontext() if os.environ.get("RANK") == "0" else interrupts:
        met = join(plan.device)
        try:
            if met.group.main:
                lead = Lead(met)
                try:
                    return local.train(config, Leading(lead), plan)
                finally:
                    lead.end()
            return _follow(config, plan, met, interrupts)
        finally:
            dist.destroy_process_group()


def _follow(config: RunConfig, plan: Plan, met: Met, interrupts: Interrupts) -> int:
    rank = met.group.rank
    hush_transformers()
    try:
        with leaving_together():
            following = Following(Roles(config, plan), interrupts, met.group)
        try:
            attend(met, following.targets)
        finally:
            following.close()
    except RankLostError as error:
        to_stderr(f"rank {rank}: {error}")
        return error.exit_status
    except PairloopError as error:
        to_stderr(f"rank {rank}: error: {error}")
        return error.exit_status
    return 0


def with_launchers_zero(config: RunConfig) -> RunConfig:
    """The config with the ZeRO stage and offloading that `accelerate launch` was told of.

    Raises InputError where the config asks for another stage.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return config
    from accelerate.utils import DeepSpeedPlugin

    told = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    stage = int(told["stage"])
    devices = [told.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")]
    placement = config.placement
    if placement.zero not in (0, stage):
        raise InputError(
            f"placement.zero is {placement.zero}, but accelerate's config file asks for ZeRO stage "
            f"{stage}; leave one of them out"
        )
    offload = placement.offload or "cpu" in devices
    settled = placement.model_copy(update={"zero": stage, "offload": offload})
    return config.model_copy(update={"placement": settled})
