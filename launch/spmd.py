"""The loop over the ranks that `accelerate launch` or torchrun starts.

| rank | does |
|---|---|
| 0 | runs the loop: keeps the store, selects, judges, writes files, speaks |
| all, 0 too | generate: each a shard of prompts at a time, with an engine of its own |
| all, 0 too | answer for judges with models of their own: each a share of the questions |
| all, 0 too | train and score: one policy, whole on each rank or in ZeRO's shards |

Rank 0 says what comes next (`launch.ranks.Lead`), the others make the same calls (`attend`). What
ranks can only do together (a training step, log-probs, saving what is sharded) they all call with
the same arguments; what each can do alone (a shard of prompts) is collected with its errors.

Who waits for whom: rank 0 for the slowest rank in each call; the others, between calls, for rank 0.
A rank that dies closes its connections, so whoever waits for it hears of it at once and ends too.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.quiet import hush, hush_transformers
from launch.ranks import Lead, Met, RankLostError, attend, leaving_together, met
from launch.roles import Roles, Say
from launch.shared import FollowingLearner, SharedGenerator, SharedLearner
from launch.shared_judges import Followed, OnAllRanks
from rlhf.errors import InputError, PairloopError
from rlhf.group import Group
from rlhf.interrupts import Interrupts, to_stderr
from rollout import transfer
from rollout.judges.panel import Engines, InProcess

if TYPE_CHECKING:
    from launch.placement import Plan
    from rlhf.config import RunConfig
    from rlhf.policy import Policy
    from rlhf.sharding import Sharding


@dataclass(frozen=True, slots=True)
class Leading:
    """The team that `launch.local` wires on rank 0: all ranks."""

    lead: Lead

    def learner(self, roles: Roles, say: Say) -> SharedLearner:
        """See `Team.learner`: that of all ranks."""
        group = self.lead.group
        with leaving_together():
            own = roles.learner(say, lambda policy, _: shard(policy, roles.config, group))
        self.lead.listened_to()
        return SharedLearner(own, self.lead)

    def engines(self, device: str) -> Engines:
        """See `Team.engines`."""
        return OnAllRanks(self.lead, InProcess(device))

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
        self.targets["judges"] = Followed(roles.plan.device, self.targets)

    def make_generator(self, longest: int) -> None:
        """As rank 0 does."""
        self.targets["generator"] = self._roles.generator(longest)

    def close(self) -> None:
        """Free the engines."""
        self.targets["judges"].close()
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
    alone = nullcontext() if os.environ.get("RANK") == "0" else interrupts
    with alone, met(plan.device) as others:
        _check_alike(others.group, config, plan)
        if others.group.main:
            lead = Lead(others)
            try:
                return local.train(config, Leading(lead), plan)
            finally:
                lead.end()
        return _follow(config, plan, others, interrupts)


def _check_alike(group: Group, config: RunConfig, plan: Plan) -> None:
    """Raises InputError, on all ranks, where their machines make `auto` mean different things."""
    found = group.gather((config.model.precision, plan.engine, plan.device, plan.sync))
    if len(set(found)) > 1:
        told = "; ".join(f"rank {rank}: {', '.join(own)}" for rank, own in enumerate(found))
        raise InputError(
            "ranks must work alike, but their machines give another model.precision, "
            f"rollout.engine or device to each ({told}); say what all of them shall have instead "
            "of auto"
        )


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
