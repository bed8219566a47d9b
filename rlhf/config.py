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
from rlhf.redaction import secret_in


class Run(Section):
    """Where a run lives and what fixes its randomness."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `directory/name`."""
    directory: str = "runs"
    """Folder that holds runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes prompt order, sampling and initial adapters."""


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update; 16 on every linear layer matches full tuning on small preference sets."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale is alpha / rank; twice the rank is the usual start."""
    dropout: Share = 0.0
    """Off: with one epoch a round there is little to overfit, and log-probs stay exact."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get an adapter; all linear layers beat attention alone at equal size."""


class Model(Section):
    """The policy that is trained."""

    path: str
    """Hub id, local folder, or a .gguf file (converted once into the user cache).
    `package:NAME/FILE` names a file inside an installed Python package."""
    revision: str | None = None
    """Hub revision; pin it, so that a rerun trains the same model."""
    adapter: str | None = None
    """A PEFT adapter folder to go on from; it is then also the initial reference."""
    tuning: Literal["full", "lora", "qlora"] = "lora"
    """`qlora` quantises the frozen base to NF4 with double quantisation (Dettmers et al. 2023)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision. fp16 (with loss scaling) for GPUs older than Ampere, such as a T4."""
    lora: Lora = Lora()
    attention: str = "sdpa"
    """Attention implementation for the learner, as Transformers names it."""
    trust_remote_code: bool = False
    """Off: a model must not run code of its own; needs `revision` if switched on."""

    @model_validator(mode="after")
    def _rules(self) -> Model:
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code needs model.revision, so that the code is pinned")
        if self.adapter is not None and self.tuning == "full":
            raise ValueError("model.adapter needs model.tuning lora or qlora")
        return self


class PromptSource(Section):
    """One split's prompts: exactly one of path, dataset or function."""

    path: str | None = None
    """JSONL or Parquet file; relative to the working directory."""
    dataset: str | None = None
    """Hugging Face data set: hub id or local folder."""
    config: str | None = None
    """Configuration name of the data set."""
    revision: str | None = None
    """Revision of the data set."""
    split: str = "train"
    """Split of the data set; also passed to `function`."""
    function: str | None = None
    """`module:function` or `file.py:function`; called with the split's name, returns records."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Record field -> column, where names differ: prompt, messages, context, reference, category,
    cluster, prompt_id. Columns not named here go to `metadata`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Keep this many prompts, drawn by the run's seed."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptSource:
        given = [n for n in ("path", "dataset", "function") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, dataset, function; got {given or 'none'}")
        return self


class Prompts(Section):
    """Three pools that share no cluster: training, gates each round, the final claim."""

    train: PromptSource
    """Prompts that are sampled and trained on."""
    gate: PromptSource
    """Prompts scored every round; they decide promotion."""
    final: PromptSource
    """Prompts scored once, at the end."""
    system: str | None = None
    """System message put before plain-text prompts."""
    template: str = "{prompt}"
    """User message for plain-text prompts; may use {prompt} and {context}."""
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """Prompts longer than this after the chat template are dropped and counted, never truncated:
    nothing may score a prompt that nobody sampled from."""

    @model_validator(mode="after")
    def _fields_known(self) -> Prompts:
        try:
            self.template.format(prompt="", context="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"template may use {{prompt}} and {{context}} only: {error}") from None
        return self


class Rollout(Section):
    """How the current policy is sampled."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` takes vLLM where it is installed, else Transformers; the log says which."""
    samples_per_prompt: int = 8
    """Best against worst of 8 finds a usable margin on most prompts; beyond 8 gains flatten."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7
    """Varied enough to differ, close enough to what will be served."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Cuts the tail that serving would never show."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest completion; what is cut off may be rejected, not chosen."""
    shard_prompts: Annotated[int, Field(ge=1)] = 16
    """Prompts per generation shard: the unit that is stored, and lost at most, on a kill."""
    max_concurrency: Annotated[int, Field(ge=1)] = 128
    """Sequences decoded together."""
    memory_gib: Annotated[float, Field(gt=0)] = 1.0
    """vLLM's key-value cache on a CPU, in GiB."""
    gpu_memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of a GPU that vLLM takes while awake; the learner has the card while it sleeps."""
    sync: Literal["auto", "adapter", "merged"] = "auto"
    """How weights reach the generator. `auto`: merged on a CPU (hot LoRA decodes twelve times
    slower there) and for full tuning, the adapter alone on a GPU."""
    parity_completions: Annotated[int, Field(ge=2)] = 16
    """Completions scored by learner and generator after every publish."""
    parity_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest mean absolute log-prob gap a token, in nats. Default by precision: 0.002 fp32,
    0.08 bf16, 0.04 fp16 (measured fresh gaps in bf16 are 0.03 to 0.05)."""

    @model_validator(mode="after")
    def _pairs_possible(self) -> Rollout:
        if self.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt must be at least 2 to form a pair, "
                f"got {self.samples_per_prompt}"
            )
        return self


class ColdStart(Section):
    """When to warm up with SFT first instead."""

    min_passing_share: Share = 0.10
    """Least share of prompts with any answer that may be chosen."""
    min_spread: Share = 0.02
    """Least mean standard deviation of the reward within a prompt."""


STANDARD_WEIGHTS = {
    "correctness": 0.4,
    "groundedness": 0.2,
    "problem_solution": 0.3,
    "style": 0.1,
}
STANDARD_FLOORS = {"correctness": 0.60, "groundedness": 0.55, "problem_solution": 0.60}
STANDARD_PROTECTED = {"correctness": 0.0, "problem_solution": 0.0}


class Selection(Section):
    """Scores -> pairs."""

    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Reward = weighted sum over dimensions (weights are normalised to sum to 1). Default
    0.4 correctness, 0.3 problem_solution, 0.2 groundedness, 0.1 style: what is right and useful
    outweighs how it sounds. Standard dimensions that no judge scores are left out."""
    floors: dict[str, Share] | None = None
    """Least score of a chosen answer, per dimension. Default 0.60 correctness, 0.55 groundedness
    (its judges are noisier), 0.60 problem_solution: relative preference alone would teach the
    better of two wrong answers."""
    protected: dict[str, Share] | None = None
    """Dimension -> epsilon: chosen may not score below rejected by more. Default 0 on correctness
    and problem_solution: without it, half a reward's gain can be paid for with the wrong answer."""
    strategy: Literal["largest_margin", "best_random", "adjacent", "all_pairs"] = "largest_margin"
    """Which admissible pairs of a prompt are taken. `largest_margin`: the clearest one.
    `best_random`: the best answer against a random worse one, which is less often the judge's
    luckiest error. `adjacent`: each answer against the next worse one, the hardest lessons.
    `all_pairs`: as many as `pairs_per_prompt`, largest margins first."""
    pairs_per_prompt: Annotated[int, Field(ge=1)] | None = None
    """Cap a prompt, for `adjacent` and `all_pairs`. Default 4: many pairs of one prompt repeat
    its answers. The other strategies take one."""
    min_margin: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.05
    """Least reward difference; below it, judge noise decides which answer is chosen. `auto`: each
    round, the least margin whose pairs are inverted with a chance of at most `max_inversion`."""
    max_inversion: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """With `min_margin: auto`, largest chance that noise alone put the worse answer first."""
    retest_sd: dict[str, Share] = Field(default_factory=dict)
    """Dimension -> standard deviation of a score when the same answer is judged again, where it
    was measured. Default: from the spread of votes; verifiers have none."""
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """Chosen may have at most this many times the tokens of rejected. Default: no cap."""
    length_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Taken off the reward, in ranking and margins, for each standard deviation that an answer is
    longer than the mean of its prompt (shorter ones gain): judges tend to like length."""
    on_inversion: Literal["error", "warn"] = "warn"
    """What follows where chosen answers score significantly below rejected ones on a dimension:
    training would teach it away."""
    max_pairs: Annotated[int, Field(ge=1)] | None = None
    """Cap a round: largest margins first, stratified by category."""
    allow_truncated_chosen: bool = False
    """Off: a cut-off answer teaches not to stop."""
    cold_start: ColdStart = ColdStart()

    @model_validator(mode="after")
    def _one_pair(self) -> Selection:
        if (self.pairs_per_prompt or 1) > 1 and self.strategy in ("largest_margin", "best_random"):
            raise ValueError(
                f"pairs_per_prompt must be 1 with strategy {self.strategy}, which takes one pair a "
                f"prompt, got {self.pairs_per_prompt}; leave it out, or use strategy all_pairs"
            )
        return self


class Objective(Section):
    """What the pairs train."""

    name: Literal["dpo"] = "dpo"
    """`dpo`: Rafailov et al. 2023, equation 7."""
    beta: Annotated[float, Field(gt=0)] = 0.2
    """Strength of the leash to the reference; on-policy margins are small, so 0.1 drifts and 0.5
    barely moves."""


class Learner(Section):
    """How the policy is trained on a round's pairs."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Default 5e-6 full, 1e-4 LoRA and QLoRA: an adapter starts from zero and is scaled by
    alpha / rank, so it needs, and stands, some twenty times the rate that moves trained weights."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over a round's pairs; fresh pairs come next round, so one is enough."""
    batch_pairs: Annotated[int, Field(ge=1)] = 16
    """Pairs per optimizer step, over all ranks."""
    micro_batch_pairs: Annotated[int, Field(ge=1)] = 4
    """Pairs per forward pass; changes memory and speed, never the step."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate within a round."""
    warmup_share: Share = 0.1
    """Share of a round's steps with rising learning rate: Adam's first estimates are poor."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this L2 norm."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The leash to the reference already regularises."""
    gradient_checkpointing: bool = False
    """Trade a third more compute for activations; needed for 7B on 16 GB."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between mid-round checkpoints."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 5
    """fp16: overflows in a row before the run stops."""


class Rounds(Section):
    """How often it goes round."""

    count: Annotated[int, Field(ge=1)] = 3
    """Rounds at most; gates may stop earlier."""
    prompts_per_round: Annotated[int, Field(ge=1)] | None = None
    """One batch is online DPO, the whole pool (default) is iterative DPO."""
    reference: Literal["initial", "round_start"] = "initial"
    """`initial` is one leash for the whole run; `round_start` moves with the policy."""


class Evaluation(Section):
    """Held-out answers."""

    samples_per_prompt: Annotated[int, Field(ge=1)] = 4
    """Sampled as in rollout; more samples shrink the intervals."""
    kl_prompts: Annotated[int, Field(ge=1)] = 32
    """Prompts whose fresh samples at temperature 1 estimate the KL to the initial policy."""
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
    on_inconclusive: Literal["promote", "stop"] = "stop"
    """Too few prompts to tell. `stop` trusts nothing unproved; `promote` suits small gate splits,
    since each round is compared with the best so far and a slow decay adds up until it shows."""


class Placement(Section):
    """Where things run."""

    kind: Literal["local"] = "local"
    """`local`: everything in this process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""


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
    """Pairs, and greedy answers before and after, in each round's tables for trackers. With wandb
    online these texts leave the machine; 0 keeps them here."""
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
        """The config is dumped, hashed and told to trackers."""
        for name, text in _texts(self.model_dump()):
            if (found := secret_in(text)) is not None:
                raise ValueError(
                    f"{name} must hold no secret, but it holds {found}; leave it out here and set "
                    "it in the environment (HF_TOKEN, WANDB_API_KEY and the like)"
                )
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
        if not self.gated and self.gates.max_kl is None:
            raise ValueError(
                "gates.dimensions must name a dimension whose score has a level, but every judge "
                "of judges.panel is pairwise; add one that is not, or set gates.max_kl"
            )
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
        return self.learner.learning_rate or (5e-6 if self.model.tuning == "full" else 1e-4)

    def _standard(self, values: dict[str, float]) -> dict[str, float]:
        return {d: v for d, v in values.items() if d in self.judges.dimensions}


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a dump, keys of free mappings too, with the dotted name of its setting."""
    if isinstance(value, str):
        yield name, value
    entries = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else entries
    for key, child in items:
        yield name or str(key), str(key)
        yield from _texts(child, f"{name}.{key}" if name else str(key))
