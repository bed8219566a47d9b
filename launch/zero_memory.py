"""What a rank of the learner holds where several train one policy, as `rlhf` has DeepSpeed 0.19 do
ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): trained weights are fp32 and
computed under autocast, a frozen base rests in compute precision.

Letters as in `launch.learner_memory`; N ranks, B bytes of a frozen base (0 for full tuning).

    stage              0           1               2             3
    weights            4R + B      4R + B          4R + B        (4R + B) / N
    gradients          4R          4R              4R / N        4R / N
    second copy        0           4R / N          4R / N        4R / N
    AdamW              8R          8R / N          8R / N        8R / N

- The second copy is what AdamW moves: DeepSpeed clones its shard of weights that are fp32 anyway.
- A step has several micro-batches: ZeRO-1 adds up whole gradients and reduces them when it steps;
  ZeRO-2 adds to its shard that of the micro-batch under way, another 4R / N.
- Autocast keeps its copies of all trained weights from forward to backward at every stage, so even
  ZeRO-3 takes cR: little for a LoRA, 2P for full tuning.
- ZeRO-3 keeps tensors under 100,000 weights whole beside their shards
  (`stage3_param_persistence_threshold`), which most of a LoRA's are; and gathers the weights that a
  pass is at, 10^9 of them at most (`stage3_max_live_parameters`).
- ZeRO-3 splits a model while it loads: each rank has its shards, and twice the tensor that is being
  filled (gathered, and the buffer that it is gathered from). A start that is loaded for its pass,
  or to go back to, is split as well.
- Gradients are reduced through a buffer of 5 x 10^8 elements (`reduce_bucket_size`); through two
  where a GPU overlaps this with backward (`overlap_comm`, stage 2).
- A step works on a copy of a shard's gradients, 4R / N, and AdamW's root of the second moments. At
  stage 0 all gradients are summed over the ranks in one buffer: 4R.
- Offload keeps the second copy, moments and what a step adds in host memory, and at stage 3 the
  shards of the weights.

`benchmarks/zero_memory.py` compares this with what two ranks of DeepSpeed hold on a CPU,
`benchmarks/zero_loading.py` with what they take to load.
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
    def base(self) -> int:
        """The policy's weights without adapter."""
        return self._share(self.held.base, 3)

    @property
    def start(self) -> int:
        """The run's start in fp32, read to be merged or to go back to."""
        return self._share(4 * self.held.architecture.parameters, 3)

    @property
    def adapter(self) -> int:
        """One adapter."""
        return self._share(4 * self.held.adapter, 3)

    @property
    def gradients(self) -> int:
        """What a step has added up so far."""
        return self._share(4 * self.held.trained, 2)

    @property
    def under_way(self) -> int:
        """The shard of a micro-batch's gradients that ZeRO-2 adds to what it has."""
        return self.gradients if self.sharding.stage == 2 else 0

    @property
    def masters(self) -> int:
        """DeepSpeed's second copy of a shard of the trained weights, which AdamW moves."""
        return self._share(4 * self.held.trained, 1) if self.sharding.engine else 0

    @property
    def moments(self) -> int:
        """AdamW's state."""
        return self._share(self.held.moments, 1)

    @property
    def whole(self) -> int:
        """Small tensors that ZeRO-3 keeps whole beside their shards."""
        if self.sharding.stage < 3:
            return 0
        a, lora = self.held.architecture, self.held.model.lora
        base = sum(size * count for size, count in a.tensors if size < PERSISTENT)
        base += a.layers * a.biases
        if self.held.full:
            return 4 * base
        tensors = a.adapter_tensors(lora.rank, lora.target_modules)
        adapter = sum(size * count for size, count in tensors if size < PERSISTENT)
        return self.held.compute * base + 4 * adapter

    @property
    def largest(self) -> int:
        """Weights of the largest tensor, which ZeRO-3 has whole while it loads it."""
        if self.sharding.stage < 3:
            return 0
        return max(size for size, _ in self.held.architecture.tensors)

    @property
    def gathered(self) -> int:
        """Weights that a pass under ZeRO-3 has gathered at once."""
        if self.sharding.stage < 3:
            return 0
        a = self.held.architecture
        return round(self.held.base / a.parameters * min(LIVE, a.parameters))

    @property
    def bucket(self) -> int:
        """The buffers that gradients are reduced through."""
        return 4 * BUCKET * self.buckets

    @property
    def buckets(self) -> int:
        """How many there are."""
        overlapped = self.held.on_gpu and self.sharding.stage == 2
        return (2 if overlapped else 1) if self.sharding.engine else 0

    @property
    def step(self) -> int:
        """What an optimizer step adds."""
        trained, ranks = self.held.trained, self.sharding.ranks
        if not self.sharding.engine:
            summed = 4 * trained if ranks > 1 else 0
            return max(self.held.step, summed)
        # Beside the gradients' copy, AdamW's root, and on a CPU a quotient of it.
        return -(-(8 if self.held.on_gpu else 12) * trained // ranks)

    def _share(self, whole: int, stage: int) -> int:
        """What a rank holds of something that is split from this stage on."""
        return -(-whole // self.sharding.ranks) if self.sharding.stage >= stage else whole
