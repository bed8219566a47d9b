"""Who works on a run, wherever they stand: its learner and its generators, made from the config."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf import protocols
from rlhf.config import RunConfig
from rlhf.config_offline import Trains
from rlhf.protocols import Generator
from rollout.imports import resolve_path
from rollout.judges.panel import Engines, InProcess
from rollout.transfer import shared_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from launch.placement import Plan
    from rlhf.learner import Learner
    from rlhf.policy import Policy
    from rlhf.sharding import Sharding
    from rollout.transformers_generator import TransformersGenerator
    from rollout.vllm_generator import VllmGenerator

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cards:
    """What an engine has for itself."""

    count: int
    share: float
    """Of each one's memory."""


@dataclass(frozen=True)
class Roles:
    """Makes them; travels to other processes as config and plan."""

    config: RunConfig
    plan: Plan

    @cached_property
    def path(self) -> str:
        """See `model_path`."""
        return model_path(self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        from rlhf.model_files import load_tokenizer

        return load_tokenizer(self.config.model, self.path)

    @cached_property
    def version_bytes(self) -> int:
        """What a version's whole weights take as they are published; no weight is read."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from rlhf.policy import DTYPES

        model = self.config.model
        trusted = {"trust_remote_code": model.trust_remote_code}
        described = AutoConfig.from_pretrained(self.path, revision=model.revision, **trusted)
        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(
                described, dtype=DTYPES[model.precision], **trusted
            )
        return sum(p.numel() * p.element_size() for p in empty.parameters())

    def learner(
        self, say: Say, shard: Callable[[Policy, Trains], Sharding] | None = None
    ) -> Learner:
        """The learner, or one rank of it where `shard` says how the policy lies over ranks, which
        have met."""
        from rlhf.learner import Learner
        from rlhf.partition import WHOLE, Split
        from rlhf.policy import Policy

        config, placement = self.config, self.config.placement
        split = shard is not None and placement.zero == 3
        partition = Split(placement.offload) if split else WHOLE
        policy = Policy(config.model, self.path, self.plan.device, config.run.seed, partition)
        return Learner(policy, config, say, shard)

    def generator(
        self, longest: int, cards: Cards | None = None
    ) -> TransformersGenerator | VllmGenerator:
        """A generator of the policy's versions, for prompts of at most `longest` tokens; on the
        first card that this process sees, unless `cards` says otherwise."""
        from rlhf.model_files import stop_token_ids
        from rlhf.policy import DTYPES

        config, rollout = self.config, self.config.rollout
        dtype = DTYPES[config.model.precision]
        revision = config.model.revision
        stop_ids = stop_token_ids(self.path, self.tokenizer, revision)
        if self.plan.engine == "transformers":
            from rollout.transformers_generator import TransformersGenerator

            made = TransformersGenerator(
                self.path,
                self.tokenizer,
                stop_ids,
                dtype,
                self.plan.device,
                rollout.max_concurrency,
            )
            made.revision = revision
            return made
        from rlhf.adapters import highest_rank
        from rollout.vllm_engine import EngineOptions
        from rollout.vllm_generator import Served, VllmGenerator

        cards = cards or Cards(1, rollout.gpu_memory_share)
        adapter = config.model.adapter
        rank = config.model.lora.rank if adapter is None else highest_rank(Path(adapter))
        return VllmGenerator(
            Served(
                base=self.path,
                stop_ids=stop_ids,
                lora_rank=rank,
                quantised=config.model.tuning == "qlora",
                revision=None if Path(self.path).exists() else revision,
                trusted=config.model.trust_remote_code,
            ),
            EngineOptions(
                dtype=dtype,
                device=self.plan.device,
                # One more: scoring a full-length sequence asks the engine for one token.
                max_length=longest + rollout.max_new_tokens + 1,
                max_concurrency=rollout.max_concurrency,
                memory_gib=rollout.memory_gib,
                gpu_memory_share=cards.share,
                seed=config.run.seed,
                tensor_parallel=cards.count,
                receives=rollout.transfer == "network",
            ),
        )


class Team(Protocol):
    """Where the work of a run is done: in this process, or in more of them."""

    def learner(self, roles: Roles, say: Say) -> protocols.Learner:
        """The learner that the loop calls."""
        ...

    def generator(self, roles: Roles, longest: int) -> Generator:
        """The generator that the loop calls; prompts have at most `longest` tokens."""
        ...

    def engines(self, device: str) -> Engines:
        """Where the models of judges are held."""
        ...

    def memories(self) -> list[str | None]:
        """What `rollout.transfer.shared_memory` says in each process that writes or loads weights;
        asked once the learner is there."""
        ...


class Alone:
    """All of it in this process."""

    def learner(self, roles: Roles, say: Say) -> protocols.Learner:
        """See `Team.learner`."""
        return roles.learner(say)

    def generator(self, roles: Roles, longest: int) -> Generator:
        """See `Team.generator`."""
        return roles.generator(longest)

    def engines(self, device: str) -> Engines:
        """See `Team.engines`."""
        return InProcess(device)

    def memories(self) -> list[str | None]:
        """See `Team.memories`."""
        return [shared_memory()]


def model_path(config: Trains) -> str:
    """Where Transformers loads the policy's model from; a .gguf file is converted once."""
    from rlhf.model_files import materialise

    given = config.model.path
    local = given.startswith("package:") or os.path.exists(given)
    return materialise(str(resolve_path(given)) if local else given)
