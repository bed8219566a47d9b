"""The learner's rows of the memory table: alone (`launch.learner_memory`) or a rank among others
(`launch.zero_memory`)."""

from __future__ import annotations

from collections.abc import Iterator

from launch.learner_memory import NF4, Learning
from launch.memory_parts import RUNNING, Part, Phase, millions
from launch.placement import Plan
from launch.zero_memory import ALONE, BUCKET, LIVE, PERSISTENT, Sharded, Sharding
from rlhf.files import SHARD
from rollout.transfer import BUFFER

ROLE = "learner"
TRAIN: tuple[Phase, ...] = ("train",)
PASSES: tuple[Phase, ...] = ("reference", "train", "publish")
"""Phases in which the policy computes."""
WRITTEN = ("stored version", "copy to write", "messages to send", "copy for a checkpoint")
"""In host memory, for the rank that writes files, and what it sends from."""


def learner_parts(held: Learning, sharding: Sharding = ALONE) -> Iterator[Part]:
    """Every row of a rank, those of no bytes too."""
    rank = Sharded(held, sharding)
    yield from _weights(rank)
    yield from _state(rank)
    yield from _passing(rank)


def publish_parts(held: Learning, plan: Plan, sharding: Sharding = ALONE) -> Iterator[Part]:
    """What it takes to hand a version over; `WRITTEN` is there on the first rank only."""
    a, c, host = held.architecture, held.compute, not held.on_gpu
    if held.model.merges or (held.full and (held.on_gpu or sharding.engine)):
        said = f"4 B x {millions(a.parameters)}, what a version starts from or is merged into"
        yield Part("publish", WRITTEN[0], 4 * a.parameters, said, ("publish",), True)
    if held.full and (held.on_gpu or sharding.engine):
        yield Part("publish", WRITTEN[3], *written(held, 4), ("train",), True)
    if plan.sync == "merged":
        # One after the other, each on its way to the file.
        largest = max(rows * columns for rows, columns in a.shapes.values())
        said = f"8 B x {millions(largest)}, the largest matrix and what its adapter adds"
        merged = 0 if held.full else 8 * largest
        yield Part("publish", "merged matrix", merged, said, ("publish",), host)
        yield Part("publish", WRITTEN[1], *written(held, c), ("publish",), True)
        if plan.network:
            # Two under way, each of tensors and what they are joined to.
            size, said = message(held)
            yield Part("publish", WRITTEN[2], 4 * size, f"4 x ({said})", ("publish",), host)
    else:
        said = f"10 B x {held.scored:,} tokens x {a.vocabulary:,}"
        size = 10 * held.scored * a.vocabulary
        yield Part("publish", "scoring", size, said, ("publish",), host)


def written(held: Learning, weight: int) -> tuple[int, str]:
    """Bytes of a model of `weight` bytes a weight that are held while it is stored, and how that
    comes: a file's, and of the largest tensor on its way to the next."""
    a = held.architecture
    whole, some = weight * a.parameters, SHARD + weight * a.vocabulary * a.hidden
    if whole <= some:
        return whole, f"{weight} B x {millions(a.parameters)}"
    return some, f"{SHARD / 1e9:g} GB of a file + {weight} B x {a.vocabulary:,} x {a.hidden:,}"


def message(held: Learning) -> tuple[int, str]:
    """Bytes of the largest message of weights over the network, and how that comes."""
    a, c = held.architecture, held.compute
    said = f"{BUFFER // 2**20} MiB + {c} B x {a.vocabulary:,} x {a.hidden:,}"
    return BUFFER + c * a.vocabulary * a.hidden, said


def _weights(rank: Sharded) -> Iterator[Part]:
    held, sharding = rank.held, rank.sharding
    a, c, host = held.architecture, held.compute, not held.on_gpu
    shared = f" / {sharding.ranks} ranks" if sharding.stage == 3 else ""
    resting = host or (sharding.offload and sharding.stage == 3)
    total, linear = millions(a.parameters), millions(a.linear)
    if held.model.tuning == "qlora":
        said = f"NF4 {NF4:.3f} B x {linear} + {c} B x {millions(a.parameters - a.linear)}"
    else:
        said = f"{4 if held.full else c} B x {total}"
    yield _part("weights", rank.base, said + shared, (*RUNNING, "load"), resting)
    copies = 2 if held.model.adapter is not None and not held.model.merges else 1
    if not held.full:
        adapter = f"4 B x {millions(copies * held.adapter)}"
        said = f"{adapter}, rank {held.model.lora.rank}{shared}"
        yield _part("adapter", copies * rank.adapter, said, RUNNING, resting)
        said = f"4 B x {millions(held.adapter)}"
        yield _part("adapter at the start", 4 * held.adapter, said, RUNNING, True)
    said = f"tensors under {PERSISTENT:,} weights, on every rank"
    yield _part("small tensors, whole", rank.whole, said, RUNNING, host)
    if held.on_gpu and held.model.tuning != "qlora":
        if sharding.stage == 3:
            said = f"{c} B x {total}, mapped by all ranks of the node"
            size = c * a.parameters
            yield Part(ROLE, "checkpoint", size, said, ("load",), host=True, once=True)
        else:
            passing = "the weights, on their way to the GPU"
            yield _part("weights", rank.base, passing, ("load",), True)
    weight = 4 if held.full else c
    said = f"2 x {weight} B x {millions(rank.largest)}, gathered to be filled"
    yield _part("largest tensor, whole", 2 * weight * rank.largest, said, ("load",), host)
    merged = held.model.merges and held.model.adapter is not None
    if merged or (held.model.whole and sharding.stage == 3):
        said = f"4 B x {total}{shared}, " + (
            "the adapter merged into it" if merged else "to restore"
        )
        yield _part("start in fp32", rank.start, said, ("load",), True)
    if held.model.whole:
        # KL to the start is measured after every round, whatever the objective's reference.
        said = f"{weight} B x {total}{shared}, loaded for one pass: reference, KL to the start"
        yield _part("initial policy", rank.base, said, ("reference",), resting)
    live = min(LIVE, a.parameters)
    said = f"weights that a pass is at: up to {millions(live)}"
    yield _part("gathered weights", rank.gathered, said, PASSES, host)


def _state(rank: Sharded) -> Iterator[Part]:
    """Gradients, masters and moments."""
    held, sharding = rank.held, rank.sharding
    trained, host = millions(held.trained), not held.on_gpu
    kept = host or sharding.offload
    ranks = f" / {sharding.ranks} ranks"
    said = f"4 B x {trained}" + (ranks if sharding.stage >= 2 else "")
    # DeepSpeed's buffers live as long as its engine, which is there all the time.
    always = RUNNING if sharding.stage == 3 else TRAIN
    yield _part("gradients", rank.gradients, said, always, host)
    yield _part("gradients under way", rank.under_way, said, TRAIN, host)
    yield _part("AdamW's copy", rank.masters, f"4 B x {trained}{ranks}", RUNNING, kept)
    said = _moments_said(held) + (ranks if sharding.engine else "")
    yield _part("AdamW", rank.moments, said, TRAIN, kept)
    said = f"{rank.buckets} x 4 B x {BUCKET:,} gradients on their way"
    yield _part("reduction bucket", rank.bucket, said, always, host)


def _passing(rank: Sharded) -> Iterator[Part]:
    """What a pass over a micro-batch takes, and a step."""
    held, sharding = rank.held, rank.sharding
    a, c, host = held.architecture, held.compute, not held.on_gpu
    shape = f"{held.tokens:,} tokens, logits of {held.scored:,}"
    yield _part("scoring", held.scoring, shape, ("reference",), host)
    yield _part("autocast copies", held.casts, f"{c} B x {millions(held.trained)}", TRAIN, host)
    each = "layer inputs" if held.checkpointing else "kept for backward"
    bytes_each = held.stream if held.checkpointing else held.a_token
    said = f"{bytes_each:,} B x {held.tokens:,} tokens x {a.layers} layers, {each}"
    yield _part("activations", held.activations, said, TRAIN, host)
    said = f"a chunk of the head: 12 B x {held.scored:,} tokens x {a.vocabulary:,}"
    if held.full:
        said += ", and its gradient"
    elif held.turn > 12 * held.scored * a.vocabulary:
        said = "one layer's"
    yield _part("backward", held.turn, said, TRAIN, host)
    passing = held.casts + held.activations + held.turn
    if sharding.offload and not host:
        said = f"8 B x {millions(held.trained)} / {sharding.ranks} ranks"
        yield _part("AdamW's step", rank.step, said, TRAIN, True)
    else:
        more = max(0, rank.step - passing)
        yield _part("AdamW's step", more, "beyond the activations", TRAIN, host)
    said = "half of what is freed; MALLOC_MMAP_THRESHOLD_=262144 in the environment: 0"
    yield Part("framework", "freed blocks", held.blocks, said, TRAIN, host)


def _part(what: str, size: int, said: str, phases: tuple[Phase, ...], host: bool) -> Part:
    return Part(ROLE, what, size, said, phases, host)


def _moments_said(held: Learning) -> str:
    trained = millions(held.trained)
    if held.optimizer == "adamw":
        return f"8 B x {trained}"
    paged = "; the host's where the card is short" if held.optimizer.startswith("paged") else ""
    return f"{held.moments / held.trained:.3f} B x {trained}, in 8 bits{paged}"
