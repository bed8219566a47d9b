"""How much memory a run needs, by role and phase, from its config and the model's architecture.

What the learner holds is in `launch.learner_memory`, what judges hold in `launch.judge_memory`. A
generator on a GPU has `gpu_memory_share` of the card while it is awake; asleep (level 1), its
weights lie in host memory. On a CPU it stays as it is.

`benchmarks/memory.py` compares the learner's part with measured peaks on a CPU, with glibc's blocks
and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch import judge_memory
from launch.architectures import Architecture
from launch.judge_memory import JudgeModel
from launch.learner_memory import NF4, Learning
from launch.machines import GIB, Machine
from launch.memory_parts import (
    ASLEEP,
    ASSUMED,
    AWAKE,
    PHASES,
    RUNNING,
    TRAINING,
    Part,
    Phase,
    default_batched_tokens,
    key_value_bytes,
    millions,
    workspace,
)
from launch.placement import Plan
from rlhf.config import RunConfig
from rlhf.config_offline import OfflineConfig, Trains

NF4_SERVED = 0.5 + 4 / 64
"""Bytes a weight in vLLM, which undoes the second quantisation when it loads."""
PROBE_TOKENS = 64
"""Longest answer of the parity check (`rollout.weight_sync`)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs on a machine."""

    parts: tuple[Part, ...]
    machine: Machine
    on_gpu: bool
    short: Mapping[str, int]
    """Engine -> bytes that its share lacks to hold one sequence of the longest; mostly negative."""
    phases: tuple[Phase, ...] = PHASES
    """Those that it goes through."""

    def at(self, phase: Phase, host: bool) -> int:
        """Bytes in a phase, in host or GPU memory."""
        return sum(p.size for p in self.parts if phase in p.phases and p.host == host)

    def peak(self, host: bool) -> tuple[Phase, int]:
        """The phase that needs most, and its bytes."""
        phase = max(self.phases, key=lambda p: self.at(p, host))
        return phase, self.at(phase, host)

    def fits(self, spare: float = 0.0) -> bool:
        """Whether every phase leaves this share free, and the engine can serve the longest."""
        used = 1 - spare
        gpu = not self.on_gpu or self.peak(host=False)[1] <= used * self.machine.gpu
        served = all(lack <= 0 for lack in self.short.values())
        return gpu and self.peak(host=True)[1] <= used * self.machine.host and served


def learning(config: Trains, architecture: Architecture, on_gpu: bool) -> Learning:
    """The learner's memory at the longest sequences that the config allows."""
    if isinstance(config, RunConfig):
        prompt, completion = config.prompts.max_tokens, config.rollout.max_new_tokens
    elif config.objective.needs.data == "pairs":
        # The limit is on a prompt with one answer: a short prompt's two answers are longest.
        prompt, completion = 1, config.data.max_tokens - 1
    else:
        # A label is scored by itself.
        prompt, completion = config.data.max_tokens, 0
    return Learning(
        architecture,
        config.model,
        config.learner.micro_batch_tokens,
        prompt,
        completion,
        config.learner.gradient_checkpointing,
        on_gpu,
        config.learner.optimizer,
    )


def estimate(
    config: RunConfig,
    plan: Plan,
    machine: Machine,
    architecture: Architecture,
    judges: Sequence[JudgeModel] = (),
) -> Estimate:
    """Every part of a run on a machine, with the judges' own models (`judge_memory.own_models`).

    Pure: nothing is loaded or asked.
    """
    on_gpu = plan.device == "cuda"
    held = learning(config, architecture, on_gpu)
    engine, short = _engine(config, plan, machine, held)
    lacks = {"generator": short}
    vllm = plan.engine == "vllm" or any(j.spec.backend == "vllm" for j in judges)
    parts = [*_process(on_gpu, vllm), *_learner(held), *_publishing(plan, held), *engine]
    for judge in judges:
        found, lacks[f"judge {judge.spec.name}"] = judge_memory.parts(judge, machine, on_gpu)
        parts += found
    return Estimate(tuple(p for p in parts if p.size), machine, on_gpu, lacks)


def estimate_offline(
    config: OfflineConfig, device: str, machine: Machine, architecture: Architecture
) -> Estimate:
    """Every part of a training on a file. Pure: nothing is loaded or asked."""
    on_gpu = device == "cuda"
    held = learning(config, architecture, on_gpu)
    parts = [*_process(on_gpu, vllm=False), *_learner(held)]
    reference = config.objective.needs.reference
    needed = [p for p in parts if p.size and (reference or p.what != "initial policy")]
    return Estimate(tuple(needed), machine, on_gpu, {}, TRAINING)


def _process(cuda: bool, vllm: bool) -> Iterable[Part]:
    size = ASSUMED.process + ASSUMED.policy + vllm * ASSUMED.vllm + cuda * ASSUMED.cuda_process
    said = "Python, torch, Transformers" + (", vLLM" if vllm else "") + (", CUDA" if cuda else "")
    told = "assumed" if cuda else "measured"
    yield Part("framework", "process", size, f"{said}; {told}", PHASES, True)
    if cuda:
        yield Part("framework", "CUDA context", ASSUMED.context, "assumed", PHASES, False)


def _learner(held: Learning) -> Iterable[Part]:
    a, c, host = held.architecture, held.compute, not held.on_gpu
    total, linear = millions(a.parameters), millions(a.linear)
    if held.model.tuning == "qlora":
        rest = millions(a.parameters - a.linear)
        said = f"NF4 {NF4:.3f} B x {linear} + {c} B x {rest}"
    else:
        said = f"{4 if held.full else c} B x {total}"
    yield Part("learner", "weights", held.base, said, PHASES, host)
    if not held.full:
        copies = 2 if held.model.adapter is not None and not held.model.merges else 1
        size = 4 * copies * held.adapter
        said = f"4 B x {millions(copies * held.adapter)}, rank {held.model.lora.rank}"
        yield Part("learner", "adapter", size, said, RUNNING, host)
        said = f"4 B x {millions(held.adapter)}"
        yield Part("learner", "adapter at the start", 4 * held.adapter, said, RUNNING, True)
    if held.on_gpu and held.model.tuning != "qlora":
        passing = "the weights, on their way to the GPU"
        yield Part("learner", "weights", held.base, passing, ("load",), True)
    if held.model.merges and held.model.adapter is not None:
        said = f"4 B x {total}, the adapter merged into it"
        yield Part("learner", "start in fp32", 4 * a.parameters, said, ("load",), True)
    if held.model.whole:
        # KL to the start is measured after every round, whatever the objective's reference.
        said = (
            f"{4 if held.full else c} B x {total}, loaded for one pass: reference, KL to the start"
        )
        yield Part("learner", "initial policy", held.base, said, ("reference",), host)
    shape = f"{held.tokens:,} tokens, logits of {held.scored:,}"
    yield Part("learner", "scoring", held.scoring, shape, ("reference",), host)
    trained = millions(held.trained)
    train: tuple[Phase, ...] = ("train",)
    yield Part("learner", "gradients", 4 * held.trained, f"4 B x {trained}", train, host)
    yield Part("learner", "AdamW", held.moments, _moments_said(held), train, host)
    yield Part("learner", "autocast copies", held.casts, f"{c} B x {trained}", train, host)
    each = "layer inputs" if held.checkpointing else "kept for backward"
    bytes_each = held.stream if held.checkpointing else held.a_token
    said = f"{bytes_each:,} B x {held.tokens:,} tokens x {a.layers} layers, {each}"
    yield Part("learner", "activations", held.activations, said, train, host)
    said = f"a chunk of the head: 12 B x {held.scored:,} tokens x {a.vocabulary:,}"
    if held.full:
        said += ", and its gradient"
    elif held.turn > 12 * held.scored * a.vocabulary:
        said = "one layer's"
    yield Part("learner", "backward", held.turn, said, train, host)
    more = held.step - held.casts - held.activations - held.turn
    yield Part("learner", "AdamW's step", max(0, more), "beyond the activations", train, host)
    said = "half of what is freed; MALLOC_MMAP_THRESHOLD_=262144 in the environment: 0"
    yield Part("framework", "freed blocks", held.blocks, said, train, host)


def _moments_said(held: Learning) -> str:
    trained = millions(held.trained)
    if held.optimizer == "adamw":
        return f"8 B x {trained}"
    paged = "; the host's where the card is short" if held.optimizer.startswith("paged") else ""
    return f"{held.moments / held.trained:.3f} B x {trained}, in 8 bits{paged}"


def _publishing(plan: Plan, held: Learning) -> Iterable[Part]:
    a, c, host = held.architecture, held.compute, not held.on_gpu
    if held.model.merges:
        said = f"4 B x {millions(a.parameters)}, what the adapter is merged into, and is stored"
        yield Part("publish", "stored version", 4 * a.parameters, said, ("publish",), True)
    if plan.sync == "merged":
        said = f"4 B x {millions(a.linear)}, base + adapter"
        merged = 0 if held.full else 4 * a.linear
        yield Part("publish", "merged layers", merged, said, ("publish",), host)
        said = f"{c} B x {millions(a.parameters)}"
        yield Part("publish", "copy to write", c * a.parameters, said, ("publish",), True)
    else:
        said = f"10 B x {held.scored:,} tokens x {a.vocabulary:,}"
        size = 10 * held.scored * a.vocabulary
        yield Part("publish", "scoring", size, said, ("publish",), host)


def _engine(
    config: RunConfig, plan: Plan, machine: Machine, held: Learning
) -> tuple[list[Part], int]:
    """The generator's parts, and what its share lacks for one sequence of the longest."""
    if plan.engine == "vllm" and held.on_gpu:
        return _vllm_on_gpu(config, plan, machine, held)
    a, c, host = held.architecture, held.compute, not held.on_gpu
    size, longest = c * a.parameters, held.prompt + held.completion
    said = f"{c} B x {millions(a.parameters)}, a copy of its own"
    rows = config.rollout.max_concurrency
    token = key_value_bytes(a, c)
    where = RUNNING if host else AWAKE
    parts = [Part("generator", "weights", size, said, where, host)]
    if not host:
        parts.append(Part("generator", "weights asleep", size, said, ASLEEP, True))
    if plan.engine == "vllm":
        cache = round(config.rollout.memory_gib * GIB)
        said = f"rollout.memory_gib; {cache // (token * longest):,} of the longest at once"
        parts.append(Part("generator", "key-value cache", cache, said, RUNNING, host))
        batched = max(8192, longest)
        work = workspace(a, c, batched, rows)
        said = f"a step over {batched:,} tokens, logits of {rows} sequences"
        parts.append(Part("generator", "workspace", work, said, AWAKE, host))
        return parts, token * longest - cache
    said = f"{token:,} B x {rows} sequences x {longest:,} tokens"
    parts.append(
        Part("generator", "key-value cache", token * rows * longest, said, ("generate",), host)
    )
    said = f"20 B x {rows} sequences x {a.vocabulary:,}"
    parts.append(Part("generator", "logits", 20 * rows * a.vocabulary, said, ("generate",), host))
    return parts, 0


def _vllm_on_gpu(
    config: RunConfig, plan: Plan, machine: Machine, held: Learning
) -> tuple[list[Part], int]:
    a, c, rollout = held.architecture, held.compute, config.rollout
    longest = held.prompt + held.completion + 1
    budget = round(rollout.gpu_memory_share * machine.gpu)
    served = plan.sync == "adapter" and config.model.tuning == "qlora"
    weights = round(NF4_SERVED * a.linear) + c * (a.parameters - a.linear)
    weights = weights if served else c * a.parameters
    slots = c * held.adapter if plan.sync == "adapter" else 0
    batched = min(default_batched_tokens(machine), rollout.max_concurrency * longest)
    work = workspace(a, c, batched, rollout.max_concurrency) + ASSUMED.graphs
    token = key_value_bytes(a, c)
    cache = budget - weights - slots - work
    rows = max(0, cache) // (token * longest)
    said = (
        f"{rollout.gpu_memory_share:g} of the card: weights {(weights + slots) / GIB:.2f}, "
        f"workspace {work / GIB:.2f}, cache {cache / GIB:.2f} GiB for {rows:,} of the longest"
    )
    probe = (held.prompt + min(PROBE_TOKENS, held.completion)) * a.vocabulary
    host = f"{(weights + slots) / GIB:.2f} GiB in host memory while it sleeps"
    parts = [
        Part("generator", "vLLM, awake", budget, said, AWAKE, False),
        Part("generator", "vLLM, asleep", ASSUMED.graphs, "graphs, assumed", ASLEEP, False),
        Part("generator", "vLLM, asleep", weights + slots, host, ASLEEP, True),
        Part(
            "generator",
            "scoring a probe",
            (c + 5) * probe,
            f"{c + 5} B x {probe // a.vocabulary:,} tokens x {a.vocabulary:,}, beyond its share",
            ("publish",),
            False,
        ),
    ]
    return parts, token * longest - cache
