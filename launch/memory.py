"""How much memory a run needs, by role and phase, from its config and the model's architecture.

What the learner holds is in `launch.learner_memory`, what judges hold in `launch.judge_memory`; the
ranks and engines of a cluster are put together in `launch.cluster_memory`. A generator on a GPU has
`gpu_memory_share` of the card while it is awake; asleep (level 1), its weights lie in host memory.
On a CPU it stays as it is.

`benchmarks/memory.py` compares the learner's part with measured peaks on a CPU, with glibc's blocks
and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import judge_memory
from launch.architectures import Architecture
from launch.engine_parts import Seat, engine_parts
from launch.judge_memory import JudgeModel
from launch.learner_memory import Learning
from launch.learner_parts import learner_parts, publish_parts
from launch.machines import Machine
from launch.memory_parts import ASSUMED, PHASES, TRAINING, Part, Phase
from launch.placement import C, Plan
from rlhf.config import RunConfig
from rlhf.config_offline import OfflineConfig, Trains
from rlhf.files import read_json


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


def going_on(config: C, architecture: Architecture) -> C:
    """With the rank and the layers of the adapter that it goes on from, where it is here: the run
    takes them from there, whatever `model.lora` says."""
    model = config.model
    file = Path(model.adapter or "", "adapter_config.json")
    if model.adapter is None or model.lora.rounds == "new" or not file.is_file():
        return config
    found: dict[str, Any] = read_json(file, "it belongs to the adapter")
    ranks = [found.get("r"), *(found.get("rank_pattern") or {}).values()]
    targets = found.get("target_modules")
    own: dict[str, Any] = {"rank": max((int(r) for r in ranks if r), default=model.lora.rank)}
    # A pattern, or a name with its path, may mean any layer: all of them is no less.
    known = {*architecture.shapes, "lm_head"}
    plain = isinstance(targets, list) and known.issuperset(targets)
    own["target_modules"] = targets if plain else "all-linear"
    lora = model.lora.model_copy(update=own)
    return config.model_copy(update={"model": model.model_copy(update={"lora": lora})})


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

    Nothing is loaded or asked; of an adapter that it goes on from the config is read.
    """
    config = going_on(config, architecture)
    on_gpu = plan.device == "cuda"
    held = learning(config, architecture, on_gpu)
    engine, short = engine_parts(config, plan, machine, held, Seat(config.rollout.gpu_memory_share))
    lacks = {"generator": short}
    vllm = plan.engine == "vllm" or any(j.spec.backend == "vllm" for j in judges)
    parts = [*process_parts(on_gpu, vllm), *learner_parts(held), *publish_parts(held, plan)]
    parts += engine
    for judge in judges:
        found, lacks[f"judge {judge.spec.name}"] = judge_memory.parts(judge, machine, on_gpu)
        parts += found
    return Estimate(tuple(p for p in parts if p.size), machine, on_gpu, lacks)


def estimate_offline(
    config: OfflineConfig, device: str, machine: Machine, architecture: Architecture
) -> Estimate:
    """Every part of a training on a file. Nothing is loaded or asked."""
    on_gpu = device == "cuda"
    held = learning(going_on(config, architecture), architecture, on_gpu)
    parts = [*process_parts(on_gpu, vllm=False), *learner_parts(held)]
    reference = config.objective.needs.reference
    needed = [p for p in parts if p.size and (reference or p.what != "initial policy")]
    return Estimate(tuple(needed), machine, on_gpu, {}, TRAINING)


def process_parts(cuda: bool, vllm: bool) -> Iterable[Part]:
    """What a process takes before it holds anything."""
    size = ASSUMED.process + ASSUMED.policy + vllm * ASSUMED.vllm + cuda * ASSUMED.cuda_process
    said = "Python, torch, Transformers" + (", vLLM" if vllm else "") + (", CUDA" if cuda else "")
    told = "assumed" if cuda else "measured"
    yield Part("framework", "process", size, f"{said}; {told}", PHASES, True)
    if cuda:
        yield Part("framework", "CUDA context", ASSUMED.context, "assumed", PHASES, False)
