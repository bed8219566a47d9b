"""Every setting once: typed, with its default, the reason for it, and the rule it must keep.

The YAML sections are the fields of `RunConfig`. Loading, merging and overriding live in
`rlhf.config_io`; nothing else reads YAML. `rlhf.config_help` prints what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config_base import Section, Share
from rlhf.config_calibration import Calibration
from rlhf.config_judges import Judges
from rlhf.config_learner import Learner, Model
from rlhf.config_objective import Objective
from rlhf.config_rollout import Prompts, Rollout
from rlhf.config_selection import (
    STANDARD_FLOORS,
    STANDARD_PROTECTED,
    STANDARD_WEIGHTS,
    Selection,
)
from rlhf.errors import InputError
from rlhf.redaction import secret_in


class Run(Section):
    """Where a run lives and what fixes its randomness."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `directory/name`."""
    directory: str = "runs"
    """Folder that holds runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes prompt order, sampling and initial adapters."""


class Rounds(Section):
    """How often it goes round."""

    count: Annotated[int, Field(ge=1)] = 3
    """Rounds at most; gates may stop earlier."""
    prompts_per_round: Annotated[int, Field(ge=1)] | None = None
    """One batch is online DPO, the whole pool (default) is iterative DPO."""
    reference: Literal["initial", "round_start"] = "initial"
    """`initial` is one leash for the whole run; `round_start` moves with the policy."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Rounds that a completion's policy may lie behind the one that is trained. 0: strictly
    on-policy. 1: generators with GPUs of their own (placement.colocate false) begin with the next
    round's prompts while the learner trains, so neither waits; every completion keeps the version
    that wrote it, and the report shows how many are behind."""


class Evaluation(Section):
    """Held-out answers."""

    samples_per_prompt: Annotated[int, Field(ge=1)] = 4
    """Sampled as in rollout; more samples shrink the intervals."""
    kl_prompts: Annotated[int, Field(ge=1)] = 32
    """Prompts whose fresh samples at temperature 1 and top-p 1 measure the policy's drift each
    round: KL to the start and to the round before, entropy, length."""
    greedy_prompts: Annotated[int, Field(ge=0)] = 32
    """Gate prompts whose likeliest answer is kept every round, so that a person can read what
    changed; no number is made of them."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the clusters for the 95% intervals."""


class Gates(Section):
    """When a round may be promoted."""

    dimensions: list[str] | None = None
    """Dimensions that may not drop. Default: correctness, else every dimension with a floor."""
    max_drop: Share = 0.02
    """Largest drop against the best promoted round (the start counts as round 0)."""
    rule: Literal["interval", "point"] = "interval"
    """`interval`: pass if the 95% interval's lower end is above -max_drop, fail if its upper end
    is below 0 and the point below -max_drop, else inconclusive. `point`: the point alone."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Largest KL to the start, in nats a sequence; needed with rounds.reference round_start, where
    the leash moves with the policy."""
    max_round_kl: Annotated[float, Field(gt=0)] | None = None
    """Largest KL to the policy that the round began with, in nats a sequence."""
    min_entropy: Annotated[float, Field(gt=0)] | None = None
    """Least entropy of the policy's answers, in nats a token: one that has collapsed onto few
    answers gives pairs that hardly differ."""
    max_length: Annotated[float, Field(gt=0)] | None = None
    """Largest mean length of the policy's answers, in tokens: many judges like longer ones."""
    on_inconclusive: Literal["promote", "stop"] = "stop"
    """Too few prompts to tell. `stop` trusts nothing unproved; `promote` suits small gate splits,
    since each round is compared with the best so far and a slow decay adds up until it shows."""

    @property
    def bounds_drift(self) -> bool:
        """Whether a gate is on the policy's drift."""
        bounds = (self.max_kl, self.max_round_kl, self.min_entropy, self.max_length)
        return any(bound is not None for bound in bounds)


class Placement(Section):
    """Where things run."""

    kind: Literal["auto", "local", "spmd", "ray"] = "auto"
    """`local`: everything in one process. `spmd`: the ranks that `accelerate launch` or torchrun
    started sample and train together. `ray`: engines and learner ranks are actors on a cluster.
    `auto`: what was started; on a cluster that a dry run describes, the kind that fits it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage of the learner's ranks: each holds its share of the optimizer (1), of
    the gradients too (2), of the weights too (3) (Rajbhandari et al. 2020). Each stage saves memory
    and costs communication; 0 holds everything on every rank."""
    offload: bool = False
    """Keep the optimizer, and under ZeRO-3 the weights, in host memory; slow, and a last resort."""
    generators: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Generator engines under `ray`. `auto`: as many as there are GPUs for."""
    tensor_parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """GPUs of one node that hold a generator's weights together; it divides the model's attention
    heads. `auto`: the fewest whose cache holds `rollout.max_concurrency` sequences."""
    colocate: Literal["auto"] | bool = "auto"
    """Whether generators and learner take turns on the same GPUs (`ray` only; one process and
    `spmd` always do). `auto`: yes where that fits, so that no GPU waits for another."""

    @model_validator(mode="after")
    def _rules(self) -> Placement:
        if self.kind == "local" and self.zero:
            raise ValueError(
                f"placement.zero shares memory among ranks, but kind local is one process, got "
                f"{self.zero}; use kind spmd, or 0"
            )
        if self.offload and not self.zero:
            raise ValueError("placement.offload is done by ZeRO: it needs placement.zero 1, 2 or 3")
        if self.kind in ("local", "spmd"):
            self._no_actors()
        return self

    def _no_actors(self) -> None:
        for name, value in (
            ("generators", self.generators),
            ("tensor_parallel", self.tensor_parallel),
        ):
            if value != "auto":
                raise ValueError(
                    f"placement.{name} needs kind ray, got {value} with kind {self.kind}, where "
                    "every process has an engine of its own"
                )
        if self.colocate is False:
            raise ValueError(
                f"placement.colocate false needs kind ray, got kind {self.kind}, where every "
                "process is generator and learner in turn"
            )


class Wandb(Section):
    """Weights & Biases. Its key comes from WANDB_API_KEY or `wandb login`, never from here."""

    mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` keeps everything in the run's folder for `wandb sync`. Default: WANDB_MODE, else
    online."""
    project: str | None = None
    """Default: WANDB_PROJECT, else pairloop."""
    entity: str | None = None
    """User or team. Default: WANDB_ENTITY, else your own."""


class Tracking(Section):
    """What is shown while it runs. Nothing here can change a result."""

    plain: bool = False
    """Plain lines, no live display (also when not a terminal)."""
    log_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps between lines in metrics.jsonl."""
    trackers: list[str] = Field(default_factory=list)
    """`wandb`, `tensorboard`, or both: told what goes to metrics.jsonl, and tables of samples."""
    samples: Annotated[int, Field(ge=0)] = 16
    """Pairs, and greedy answers before and after, in each round's tables for trackers; held-out
    records in a training on a file. With wandb online these texts leave the machine; 0 keeps them
    here."""
    wandb: Wandb = Wandb()


class RunConfig(Section):
    """One run."""

    run: Run = Run()
    model: Model
    prompts: Prompts
    rollout: Rollout = Rollout()
    judges: Judges
    selection: Selection = Selection()
    objective: Objective = Objective()
    learner: Learner = Learner()
    rounds: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    gates: Gates = Gates()
    calibration: Calibration = Calibration()
    placement: Placement = Placement()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _no_secrets(self) -> RunConfig:
        refuse_secrets(self)
        return self

    @model_validator(mode="after")
    def _dimensions_known(self) -> RunConfig:
        scored = self.judges.dimensions
        for field, names in (
            ("selection.weights", self.selection.weights),
            ("selection.floors", self.selection.floors),
            ("selection.protected", self.selection.protected),
            ("selection.retest_sd", self.selection.retest_sd),
            ("gates.dimensions", self.gates.dimensions),
        ):
            unknown = sorted(set(names or ()) - set(scored))
            if unknown:
                raise ValueError(
                    f"{field} names {unknown}, which no judge in judges.panel scores; "
                    f"scored are {list(scored)}"
                )
        if self.rounds.reference == "round_start" and self.gates.max_kl is None:
            raise ValueError(
                "rounds.reference round_start needs gates.max_kl: its leash moves with the policy, "
                "so drift from the start must be bounded by a gate"
            )
        longest, allowed = self.gates.max_length, self.rollout.max_new_tokens
        if longest is not None and longest >= allowed:
            raise ValueError(
                f"gates.max_length must be below rollout.max_new_tokens {allowed}, got "
                f"{longest:g}: no answer is longer, so it would stop nothing"
            )
        if self.rounds.max_staleness and (
            self.placement.kind != "ray" or self.placement.colocate is not False
        ):
            raise ValueError(
                "rounds.max_staleness 1 lets generators work while the learner trains, so they "
                "need places of their own: placement.kind ray and colocate false, got kind "
                f"{self.placement.kind} and colocate {self.placement.colocate}"
            )
        if self.rollout.transfer == "network" and (
            self.placement.kind != "ray" or self.placement.colocate is not False
        ):
            raise ValueError(
                "rollout.transfer network sends weights to generators with places of their own: "
                "placement.kind ray and colocate false, got kind "
                f"{self.placement.kind} and colocate {self.placement.colocate}"
            )
        if not self.weights:
            raise ValueError(
                f"selection.weights must be given: judges score {list(scored)}, "
                "none of which has a standard weight"
            )
        return self

    @model_validator(mode="after")
    def _levels_known(self) -> RunConfig:
        """A score that only ranks the answers to one prompt holds no floor and no gate."""
        for field, names in (
            ("selection.floors", self.selection.floors),
            ("gates.dimensions", self.gates.dimensions),
        ):
            relative = sorted(set(names or ()) - set(self.judges.absolute))
            if relative:
                raise ValueError(
                    f"{field} names {relative}, scored by a pairwise judge: a win rate among a "
                    "prompt's own answers averages 0.5 whatever they are worth; use mode pointwise "
                    "there, or leave them out here"
                )
        if not self.gated and not self.gates.bounds_drift:
            raise ValueError(
                "gates.dimensions must name a dimension whose score has a level, but every judge "
                "of judges.panel is pairwise; add one that is not, or bound the policy's drift, as "
                "gates.max_kl does"
            )
        return self

    @model_validator(mode="after")
    def _batches_hold_a_baseline(self) -> RunConfig:
        refuse_lone_labels(self.objective, self.learner)
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Reward weights in use, summing to 1: the configured ones, else the standard ones."""
        chosen = self.selection.weights or self._standard(STANDARD_WEIGHTS)
        total = sum(chosen.values())
        return {d: w / total for d, w in sorted(chosen.items())}

    @property
    def floors(self) -> dict[str, float]:
        """Floors in use."""
        given = self.selection.floors
        if given is not None:
            return dict(given)
        standard = self._standard(STANDARD_FLOORS)
        return {d: v for d, v in standard.items() if d in self.judges.absolute}

    @property
    def protected(self) -> dict[str, float]:
        """Protected dimensions in use, with their epsilon."""
        given = self.selection.protected
        return dict(given) if given is not None else self._standard(STANDARD_PROTECTED)

    @property
    def gated(self) -> tuple[str, ...]:
        """Dimensions that the gates watch."""
        if self.gates.dimensions is not None:
            return tuple(self.gates.dimensions)
        if "correctness" in self.judges.absolute:
            return ("correctness",)
        return tuple(self.floors) or tuple(d for d in self.weights if d in self.judges.absolute)

    @property
    def needed(self) -> tuple[str, ...]:
        """Dimensions without which a completion can't be used: reward, floors, protection."""
        return tuple(sorted({*self.weights, *self.floors, *self.protected}))

    @property
    def learning_rate(self) -> float:
        """5e-6 for full tuning, 1e-4 for adapters, unless given."""
        return self.learner.rate(self.model.tuning)

    @property
    def reference(self) -> Literal["initial", "round_start"]:
        """What the objective holds the policy to."""
        return self.rounds.reference

    def _standard(self, values: dict[str, float]) -> dict[str, float]:
        return {d: v for d, v in values.items() if d in self.judges.dimensions}


def refuse_secrets(config: Section) -> None:
    """Raises ValueError where a text of the config, which is dumped, hashed and told to trackers,
    holds a secret."""
    texts = list(_texts(config.model_dump()))
    # Each look walks the whole environment: once for all, and again only to name the setting.
    if secret_in("\n".join(text for _, text in texts)) is None:
        return
    for name, text in texts:
        if (found := secret_in(text)) is not None:
            raise ValueError(
                f"{name} must hold no secret, but it holds {found}; leave it out here and set "
                "it in the environment (HF_TOKEN, WANDB_API_KEY and the like)"
            )


def refuse_lone_labels(objective: Objective, learner: Learner) -> None:
    """Raises ValueError where an optimizer step would hold one label."""
    if objective.needs.data == "labels" and learner.batch_pairs < 2:
        raise ValueError(
            f"learner.batch_pairs must be at least 2 with {objective.name}, whose "
            f"baseline needs another answer in its step, got {learner.batch_pairs}"
        )


def check_zero(config: RunConfig) -> None:
    """Raises InputError where a setting does not go with `placement.zero`.

    Asked before anything is loaded, not when the config is read: the stage may come from a
    launcher, and the precision from the machine.
    """
    stage = config.placement.zero
    if not stage:
        return
    asked = f"does not go with placement.zero {stage}"
    if config.model.precision == "fp16":
        raise InputError(
            f"model.precision fp16 {asked}, whose shards the loss scale does not reach; use bf16, "
            "or placement.zero 0"
        )
    if config.learner.optimizer != "adamw":
        raise InputError(
            f"learner.optimizer {config.learner.optimizer} {asked}, which flattens what it would "
            "quantise block by block; use adamw"
        )
    if config.model.tuning == "qlora" and stage == 3:
        raise InputError(
            f"model.tuning qlora {asked}, which would split NF4 blocks; use placement.zero 2 or "
            "less (the adapter is small), or model.tuning lora"
        )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a dump, keys of free mappings too, with the dotted name of its setting."""
    if isinstance(value, str):
        yield name, value
    entries = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else entries
    for key, child in items:
        yield name or str(key), str(key)
        yield from _texts(child, f"{name}.{key}" if name else str(key))
