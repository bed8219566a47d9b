"""What a rank of the learner holds under DeepSpeed's ZeRO (Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054), as DeepSpeed 0.19 does it.

Letters as in `launch.learner_memory`; N ranks, B bytes of a frozen base (0 for full tuning).

    stage              0               1            2            3
    weights            4R + B          cR + B       cR + B       (cR + B) / N
    gradients          4R              cR           cR / N       cR / N
    fp32 masters       (the weights)   4R / N       4R / N       4R / N
    AdamW              8R              8R / N       8R / N       8R / N

With R = P in bf16 these are the paper's 16P, 4P + 12P/N, 2P + 14P/N and 16P/N (its stage 0 has 2P
of weights and 2P of gradients beside 12P; the learner keeps fp32 masters under autocast instead).

- In fp32 (c = 4) the masters are a second copy all the same.
- ZeRO-1 reduces its gradients at the end of backward, when all are there; ZeRO-2 on the way.
- ZeRO-3 keeps tensors under 100,000 weights whole beside their shards
  (`stage3_param_persistence_threshold`), which most of a LoRA's are; and gathers the weights that a
  pass is at, 10^9 of them at most (`stage3_max_live_parameters`).
- Gradients are reduced through a buffer of 5 x 10^8 elements (`reduce_bucket_size`).
- Activations are counted as under autocast, a little more than a model in bf16 keeps.
- A step turns a shard's gradients into fp32: 4R / N. At stage 0 all gradients are summed over the
  ranks in one buffer: 4R.
- Offload keeps masters, moments and the step's gradients in host memory, and at stage 3 the shards
  of the weights.

`benchmarks/zero_memory.py` compares this with what two ranks of DeepSpeed hold on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.learner_memory import Learning

PERSISTENT = 100_000
"""DeepSpeed 0.19: tensors with fewer weights are not sharded by ZeRO-3."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 has gathered at once, at most."""
BUCKET = 500_000_000
"""Elements of the buffer that gradients are reduced through."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the learner's ranks share its memory."""

    stage: int = 0
    ranks: int = 1
    offload: bool = False

    @property
    def engine(self) -> bool:
        """Whether DeepSpeed trains, not the learner by itself."""
        return self.stage > 0


ALONE = Sharding()


@dataclass(frozen=True)
class Sharded:
    """The bytes that one rank holds of a learner's state."""

    held: Learning
    sharding: Sharding

    @property
    def weight_bytes(self) -> int:
        """Of a trained weight as it rests between steps."""
        return self.held.compute if self.sharding.engine else 4

    @property
    def base(self) -> int:
        """The policy's weights without adapter."""
        whole = self.held.base
        if self.held.full:
            whole = self.weight_bytes * self.held.trained
        return self._share(whole, 3)

    @property
    def adapter(self) -> int:
        """One adapter."""
        return self._share(self.weight_bytes * self.held.adapter, 3)

    @property
    def gradients(self) -> int:
        """From backward to the step."""
        return self._share(self.weight_bytes * self.held.trained, 2)

    @property
    def masters(self) -> int:
        """The fp32 weights that AdamW moves; without DeepSpeed it moves the weights themselves."""
        return self._share(4 * self.held.trained, 1) if self.sharding.engine else 0

    @property
    def moments(self) -> int:
        """AdamW's state."""
        return self._share(self.held.moments, 1)

    @property
    def casts(self) -> int:
        """Copies in compute precision: under DeepSpeed the weights themselves are that."""
        return 0 if self.sharding.engine else self.held.casts

    @property
    def scoring(self) -> int:
        """A pass without gradients."""
        cast = self.held.full and self.sharding.engine
        return self.held.scoring - (self.held.casts if cast else 0)

    @property
    def whole(self) -> int:
        """Small tensors that ZeRO-3 keeps whole beside their shards."""
        if self.sharding.stage < 3:
            return 0
        a, lora = self.held.architecture, self.held.model.lora
        tensors = list(a.tensors)
        tensors += [] if self.held.full else a.adapter_tensors(lora.rank, lora.target_modules)
        small = sum(size * count for size, count in tensors if size < PERSISTENT)
        return self.held.compute * (small + a.layers * a.biases)

    @property
    def gathered(self) -> int:
        """Weights that a pass under ZeRO-3 has gathered at once."""
        if self.sharding.stage < 3:
            return 0
        a = self.held.architecture
        each = self.held.base / a.parameters if not self.held.full else self.held.compute
        return round(each * min(LIVE, a.parameters))

    @property
    def bucket(self) -> int:
        """The buffer that gradients are reduced through."""
        return self.held.compute * BUCKET if self.sharding.engine else 0

    @property
    def step(self) -> int:
        """What an optimizer step adds."""
        trained, ranks = self.held.trained, self.sharding.ranks
        if not self.sharding.engine:
            summed = 4 * trained if ranks > 1 else 0
            return max(self.held.step, summed)
        # On a CPU torch's AdamW works on the shard as one tensor, with a root and a quotient of it.
        return -(-(4 if self.held.on_gpu else 12) * trained // ranks)

    def _share(self, whole: int, stage: int) -> int:
        """What a rank holds of something that is split from this stage on."""
        return -(-whole // self.sharding.ranks) if self.sharding.stage >= stage else whole
