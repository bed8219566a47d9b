"""The generator's rows of the memory table: on a card that it shares with the learner, on cards of
its own, or on a CPU.

A tensor-parallel engine splits its linear layers, embedding and head over its GPUs, and the key
heads too, which are repeated where there are fewer of them than GPUs. A LoRA's two matrices are
split where the layer is: the second one's output of q, k, v, gate and up, the first one's input of
o and down; the others are on every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.architectures import Architecture
from launch.learner_memory import Learning
from launch.learner_parts import message
from launch.machines import GIB, Machine
from launch.memory_parts import (
    ASLEEP,
    ASSUMED,
    AWAKE,
    RUNNING,
    Part,
    default_batched_tokens,
    key_value_bytes,
    millions,
    workspace,
)
from launch.placement import Plan
from rlhf.config import RunConfig

ROLE = "generator"
NF4_SERVED = 0.5 + 4 / 64
"""Bytes a weight in vLLM, which undoes the second quantisation when it loads."""
PROBE_TOKENS = 64
"""Longest answer of the parity check (`rollout.weight_sync`)."""
SPLIT_IN = ("o_proj", "down_proj")
"""Layers that are split by their input."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One GPU's place for a shard of an engine."""

    share: float
    """Of the card, while awake."""
    width: int = 1
    """GPUs that hold the engine together."""
    apart: bool = False
    """Whether no learner is on the card, so that the engine never sleeps."""


def engine_parts(
    config: RunConfig, plan: Plan, machine: Machine, held: Learning, seat: Seat
) -> tuple[list[Part], int]:
    """The rows, and what a share lacks for one sequence of the longest; mostly negative."""
    if plan.engine == "vllm" and held.on_gpu:
        return _vllm_on_gpu(config, plan, machine, held, seat)
    a, c, host = held.architecture, held.compute, not held.on_gpu
    size, longest = c * a.parameters, held.prompt + held.completion
    said = f"{c} B x {millions(a.parameters)}, a copy of its own"
    rows = config.rollout.max_concurrency
    token = key_value_bytes(a, c)
    where = RUNNING if host or seat.apart else AWAKE
    parts = [Part(ROLE, "weights", size, said, where, host)]
    if not host and not seat.apart:
        parts.append(Part(ROLE, "weights asleep", size, said, ASLEEP, True))
    if plan.engine == "vllm":
        cache = round(config.rollout.memory_gib * GIB)
        said = f"rollout.memory_gib; {cache // (token * longest):,} of the longest at once"
        parts.append(Part(ROLE, "key-value cache", cache, said, RUNNING, host))
        batched = max(8192, longest)
        work = workspace(a, c, batched, rows)
        said = f"a step over {batched:,} tokens, logits of {rows} sequences"
        parts.append(Part(ROLE, "workspace", work, said, AWAKE, host))
        return parts, token * longest - cache
    said = f"{token:,} B x {rows} sequences x {longest:,} tokens"
    parts.append(Part(ROLE, "key-value cache", token * rows * longest, said, ("generate",), host))
    said = f"20 B x {rows} sequences x {a.vocabulary:,}"
    parts.append(Part(ROLE, "logits", 20 * rows * a.vocabulary, said, ("generate",), host))
    return parts, 0


def _vllm_on_gpu(
    config: RunConfig, plan: Plan, machine: Machine, held: Learning, seat: Seat
) -> tuple[list[Part], int]:
    a, c, rollout = held.architecture, held.compute, config.rollout
    longest = longest_bytes(held, seat.width)
    budget = round(seat.share * machine.gpu)
    weights = _weights(config, plan, held) // seat.width
    slots = c * adapter_shard(a, config, seat.width) if plan.sync == "adapter" else 0
    batched = min(default_batched_tokens(machine), rollout.max_concurrency * _longest(held))
    work = workspace(a, c, batched, rollout.max_concurrency, seat.width) + ASSUMED.graphs
    cache = budget - weights - slots - work
    rows = max(0, cache) // longest
    said = (
        f"{seat.share:g} of the card: weights {(weights + slots) / GIB:.2f}, "
        f"workspace {work / GIB:.2f}, cache {cache / GIB:.2f} GiB for {rows:,} of the longest"
    )
    if seat.width > 1:
        said = f"1/{seat.width} of each layer, {said}"
    probe = (held.prompt + min(PROBE_TOKENS, held.completion)) * a.vocabulary
    scoring = f"{c + 5} B x {probe // a.vocabulary:,} tokens x {a.vocabulary:,}, beyond its share"
    parts = [
        Part(ROLE, "vLLM, awake", budget, said, RUNNING if seat.apart else AWAKE, False),
        Part(ROLE, "scoring a probe", (c + 5) * probe, scoring, ("publish",), False),
    ]
    if plan.network:
        size, received = message(held)
        said = f"2 x ({received}), beyond its share"
        parts.append(Part(ROLE, "messages received", 2 * size, said, ("publish",), False))
    if not seat.apart:
        host = f"{(weights + slots) / GIB:.2f} GiB in host memory while it sleeps"
        asleep = "vLLM, asleep"
        parts[1:1] = [
            Part(ROLE, asleep, ASSUMED.graphs, "graphs, assumed", ASLEEP, False),
            Part(ROLE, asleep, weights + slots, host, ASLEEP, True),
        ]
    return parts, longest - cache


def longest_bytes(held: Learning, width: int) -> int:
    """Keys and values of the longest sequence in vLLM, on one of `width` GPUs."""
    return key_value_bytes(held.architecture, held.compute, width) * _longest(held)


def _longest(held: Learning) -> int:
    # One more: scoring a full-length sequence asks the engine for one token.
    return held.prompt + held.completion + 1


def _weights(config: RunConfig, plan: Plan, held: Learning) -> int:
    a, c = held.architecture, held.compute
    if plan.sync == "adapter" and config.model.tuning == "qlora":
        return round(NF4_SERVED * a.linear) + c * (a.parameters - a.linear)
    return c * a.parameters


def adapter_shard(architecture: Architecture, config: RunConfig, width: int) -> int:
    """Weights of a LoRA on one of the GPUs that split the model."""
    lora, shapes = config.model.lora, architecture.shapes
    targets = lora.target_modules
    names = list(shapes) if isinstance(targets, str) else targets
    total = 0
    for name in names:
        if name not in shapes:
            total += architecture.adapter(lora.rank, [name])
            continue
        into, out = shapes[name]
        sides = into // width + out if name in SPLIT_IN else into + out // width
        total += architecture.layers * lora.rank * sides
    return total
