"""What the learner holds in memory, as `rlhf.policy` and `rlhf.learner` do it.

Letters: P weights, of which E are the embedding and D the decoder's linear layers; R trained
weights (P, or the adapter's); L layers of hidden H, query width q, inner I; V vocabulary; c bytes
of the compute precision; S tokens of a micro-batch (`learner.micro_batch_tokens`, or the longest
pair that the config allows, prompt + 2 completions, where that is more); of N the head holds logits
at once (a chunk of `rlhf.head`).

- weights: full 4P (fp32 masters); LoRA cP; QLoRA 0.516 D (4 bits, one byte of scale for 64 weights,
  four more for 256 of those) + c(P - D). The adapter is fp32.
- gradients 4R, AdamW 8R; in 8 bits (bitsandbytes) 2R and 8 for each block of 256 weights, but 8 a
  weight in tensors of less than 4,096. Paged moments count where they are used. Under autocast also
  cR: each trained weight's cast is kept for backward.
- activations, a token and layer. Autograd keeps what a gradient needs: of a frozen layer nothing,
  of a trained one its input. The norms compute in fp32 whatever the rest does.

      attention       c(2q + 2k) + 4 a head      query, output, keys and values (repeated to k = q
                                                 where there are several), softmax statistics; all
                                                 layers share one mask
      full, autocast  26H + 8 + 4cI              norms 16H + 8 (residual and result), five inputs
                                                 10H; gate, its activation, up, their product
      full, fp32      24H + 8 + 16I
      LoRA, autocast  8H + 8 + c(5H + q + 4I + 7r)  PEFT casts each input to fp32 and autocast
                                                 back: a copy for each of the seven adapted layers
      LoRA, fp32      16H + 8 + 16I + 28r
      QLoRA on a GPU  8H + 8 + c(2H + 4I + 7r)   no such copies there; on a CPU as LoRA

  With gradient checkpointing each layer keeps its input alone (cH; 4H for full), and one layer at a
  time is computed again.
- at the turn from forward to backward 12NV: log-softmax, its gradient, and the logits' gradient,
  in fp32, and where the head is trained its gradient, a chunk's and the sum; or, where that is
  more, one layer's backward.
- on a CPU glibc keeps freed blocks of less than 32 MiB, and tensors of other sizes do not fit into
  them: half of what training frees, as measured (0.4 to 0.8 of the activations). With
  `MALLOC_MMAP_THRESHOLD_=262144` in the environment it keeps none, and a step takes some 6% longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from launch.architectures import Architecture
from rlhf.config_learner import Model
from rlhf.head import chunk_tokens

SMALLEST_8BIT, BLOCK = 4096, 256
"""bitsandbytes 0.50: elements of the smallest tensor whose moments are in 8 bits, and of a block
that shares one fp32 scale a moment (`Optimizer2State.init_state`)."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight with double quantisation."""


@dataclass(frozen=True)
class Learning:
    """The learner's memory for micro-batches of `budget` tokens or one pair, `prompt` and twice
    `completion`."""

    architecture: Architecture
    model: Model
    budget: int
    prompt: int
    completion: int
    checkpointing: bool
    on_gpu: bool
    optimizer: str = "adamw"
    """`learner.optimizer`."""

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.model.tuning == "full"

    @property
    def compute(self) -> int:
        """c: bytes of the compute precision."""
        return BYTES[self.model.precision]

    @property
    def mixed(self) -> bool:
        """Whether autocast is on."""
        return self.compute < 4

    @property
    def tokens(self) -> int:
        """S."""
        return max(self.budget, self.prompt + 2 * self.completion)

    @property
    def scored(self) -> int:
        """N."""
        return min(self.tokens, chunk_tokens(self.architecture.vocabulary))

    @cached_property
    def adapter(self) -> int:
        """Weights of the adapter; 0 for full tuning."""
        lora = self.model.lora
        return 0 if self.full else self.architecture.adapter(lora.rank, lora.target_modules)

    @property
    def trained(self) -> int:
        """R."""
        return self.architecture.parameters if self.full else self.adapter

    @property
    def base(self) -> int:
        """Bytes of the policy's weights without adapter."""
        total, linear = self.architecture.parameters, self.architecture.linear
        if self.model.tuning == "qlora":
            return round(NF4 * linear + self.compute * (total - linear))
        return (4 if self.full else self.compute) * total

    @property
    def casts(self) -> int:
        """Trained weights in compute precision, kept from forward to backward."""
        a = self.architecture
        matrices = a.linear + a.embedding if self.full else self.adapter
        return self.compute * matrices if self.mixed else 0

    @property
    def a_token(self) -> int:
        """Bytes that autograd keeps of a token in one layer."""
        a, c, r = self.architecture, self.compute, self.model.lora.rank
        h, q, i = a.hidden, a.query, a.intermediate
        keys = values = q
        if a.kv_heads == 1:
            # One head is expanded to all without a copy, unless autocast copies it: rotated keys
            # of full tuning are fp32.
            values = a.key
            keys = q if self.full and self.mixed else a.key
        fixed = c * (2 * q + keys + values) + 4 * a.heads + 8
        if self.full:
            return fixed + (26 * h + 4 * c * i if self.mixed else 24 * h + 16 * i)
        if not self.mixed:
            return fixed + 16 * h + 16 * i + 28 * r
        shared = self.on_gpu and self.model.tuning == "qlora"
        inputs = 2 * h if shared else 5 * h + q
        return fixed + 8 * h + c * (inputs + 4 * i + 7 * r)

    @property
    def stream(self) -> int:
        """Bytes of a token between two layers."""
        return (4 if self.full else self.compute) * self.architecture.hidden

    @property
    def activations(self) -> int:
        """Bytes kept from forward to backward, casts aside."""
        each = self.stream if self.checkpointing else self.a_token
        return self.architecture.layers * each * self.tokens

    @property
    def turn(self) -> int:
        """Largest that backward adds at once."""
        a = self.architecture
        head = 12 * self.scored * a.vocabulary
        head += 2 * self.compute * a.embedding if self.full else 0
        layer = 8 * a.intermediate * self.tokens
        layer += self.a_token * self.tokens if self.checkpointing else 0
        if self.model.tuning == "qlora":
            layer += self.compute * a.hidden * a.intermediate
        return max(head, layer)

    @property
    def moments(self) -> int:
        """AdamW's state."""
        if self.optimizer == "adamw":
            return 8 * self.trained
        a, lora = self.architecture, self.model.lora
        tensors = a.tensors if self.full else a.adapter_tensors(lora.rank, lora.target_modules)
        # A bias of 4,096 or more counts as fp32 too: some kilobytes a layer.
        biases = 8 * a.layers * a.biases if self.full else 0
        return biases + sum(count * _moments_8bit(size) for size, count in tensors)

    @property
    def step(self) -> int:
        """What AdamW adds while it steps: a square root of its second moments, and a quotient.

        In 8 bits a GPU works in place; a CPU takes both moments, the gradient, the root and the
        quotient in fp32, a tensor at a time (20 bytes a weight, as measured).
        """
        a = self.architecture
        largest = max(a.embedding, a.hidden * a.intermediate) if self.full else 0
        if self.optimizer != "adamw":
            return 0 if self.on_gpu else 20 * largest
        return 4 * self.trained if self.on_gpu else 8 * largest

    @property
    def blocks(self) -> int:
        """What glibc keeps of freed tensors; CUDA's allocator joins and splits its blocks."""
        freed = 4 * self.trained + self.casts + self.activations + self.turn
        return 0 if self.on_gpu else freed // 2

    @property
    def scoring(self) -> int:
        """A pass without gradients over the same micro-batch."""
        a, c = self.architecture, self.compute
        logits = (8 if c == 4 else 10) * self.scored * a.vocabulary
        layer = (4 * c * a.intermediate + 4 * self.stream) * self.tokens
        return max(logits, layer) + (self.casts if self.full else 0)


def _moments_8bit(size: int) -> int:
    """Bytes of both moments of a tensor under an 8-bit AdamW."""
    return 8 * size if size < SMALLEST_8BIT else 2 * size + 8 * -(-size // BLOCK)
