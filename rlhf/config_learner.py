"""What is trained, and how: the policy and the optimizer step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config_base import Section, Share


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
    rounds: Literal["carry", "new"] = "carry"
    """`carry`: one adapter is trained on round after round; versions are small. `new`: each round
    trains a fresh one over the last version's weights, into which the last one is merged (ReLoRA,
    Lialin et al. 2023); take it where many rounds are to learn more than one adapter of this rank
    can hold. Versions are then whole models of 4 bytes a weight; not with qlora, whose base merging
    would quantise anew."""


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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "bf16"
    """Compute precision. fp16 (with loss scaling) for GPUs older than Ampere, such as a T4. `auto`
    takes the fastest that the machine multiplies in by itself, and the run keeps it: bf16 on Ampere
    and later and on CPUs with AVX-512 bf16, fp16 on older GPUs, fp32 on other CPUs (where bf16 is
    several times as slow)."""
    lora: Lora = Lora()
    attention: str = "sdpa"
    """Attention implementation for the learner, as Transformers names it: `sdpa`, `eager`, or on a
    GPU `flex_attention`; with others prompts are not shared. Models that cap attention logits
    (Gemma-2) get eager instead of sdpa, which would leave that out."""
    trust_remote_code: bool = False
    """Off: a model must not run code of its own; needs `revision` if switched on."""

    @model_validator(mode="after")
    def _rules(self) -> Model:
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code needs model.revision, so that the code is pinned")
        if self.adapter is not None and self.tuning == "full":
            raise ValueError("model.adapter needs model.tuning lora or qlora")
        if self.lora.rounds == "new" and self.tuning == "qlora":
            raise ValueError(
                "model.lora.rounds new can't be had with model.tuning qlora: merging an adapter "
                "into an NF4 base quantises it anew, which is another model; use carry, or lora"
            )
        if self.lora.rounds == "new" and self.tuning == "full":
            raise ValueError("model.lora.rounds new needs model.tuning lora, got full")
        return self

    @property
    def merges(self) -> bool:
        """Whether each round's adapter is merged into the weights, and the next one is new."""
        return self.lora.rounds == "new"

    @property
    def whole(self) -> bool:
        """Whether stored versions are whole models, not adapters over `path`."""
        return self.tuning == "full" or self.merges


class Learner(Section):
    """How the policy is trained on a round's pairs."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Default 5e-6 full, 1e-4 LoRA and QLoRA: an adapter starts from zero and is scaled by
    alpha / rank, so it needs, and stands, some twenty times the rate that moves trained weights."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over a round's pairs; fresh pairs come next round, so one is enough."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the clusters that are held out of training; their loss is measured after every
    epoch, and the weights of the best epoch are kept. For several epochs on fixed data; 0: none."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Epochs without a lower validation loss after which training stops. Default: it doesn't."""
    batch_pairs: Annotated[int, Field(ge=1)] = 16
    """Pairs (for `kto`: labelled answers) per optimizer step, over all ranks."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 2048
    """Tokens per forward pass, padding included, a prompt counted once for all its completions;
    changes memory and speed, never the step. A longer pair is a pass by itself."""
    on_inexact: Literal["stop", "plain"] = "stop"
    """What to do where packed rows and the chunked head don't give the log-probs that padded rows
    and whole logits give: `stop` with the numbers, or go the `plain` way, which takes more of both
    time and memory."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate within a round."""
    warmup_share: Share = 0.1
    """Share of a round's steps with rising learning rate: Adam's first estimates are poor."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw_8bit` (bitsandbytes) keeps Adam's moments in 8 bits, a quarter of the memory: worth it
    for full tuning. `paged_adamw_8bit` also moves them to the host where a GPU runs short."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this L2 norm."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The leash to the reference already regularises. Norms and biases never decay."""
    gradient_checkpointing: bool = False
    """Trade a third more compute for activations; needed for 7B on 16 GB."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between mid-round checkpoints; the last two are kept."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 5
    """fp16: overflows in a row before the run stops."""

    @model_validator(mode="after")
    def _patience_measures(self) -> Learner:
        if self.patience is not None and not self.validation_share:
            raise ValueError(
                "patience needs learner.validation_share: without held-out pairs no loss is "
                "measured after an epoch"
            )
        return self

    def rate(self, tuning: str) -> float:
        """`learning_rate`, or its default for this tuning."""
        return self.learning_rate or (5e-6 if tuning == "full" else 1e-4)
