"""What is sampled, and how: prompt pools and rollouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config_base import Section

Transfer = Literal["auto", "memory", "disk", "network"]


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
    max_similarity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Prompts that are more alike than this (share of their runs of five characters in common,
    question and context each; case and spacing aside) count as one: the final split's stand, then
    gate's. Default: only equal ones fall, since prompts of one template may differ in a number
    alone and still be different tasks."""
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """Prompts longer than this after the chat template are dropped and counted, never truncated:
    nothing may score a prompt that nobody sampled from."""

    @model_validator(mode="after")
    def _fields_known(self) -> Prompts:
        try:
            self.template.format(prompt="", context="")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
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
    transfer: Transfer = "auto"
    """Where whole weights lie on their way to generators. `memory`: a private folder of /dev/shm,
    where all processes of the run are on one host, so that no disk slows a publish; `disk`: the
    run's folder, which every node sees; `auto`: memory where it can be had, else disk, and the log
    says why; `network`: nowhere, they are sent to vLLM's workers on other GPUs or hosts (NCCL
    among GPUs, gloo among CPUs), for models that are stored whole: full tuning, or
    `model.lora.rounds` new. An adapter is small and takes the run's folder, and
    Ray's object store where generators are actors."""
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
