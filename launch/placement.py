"""How a process works on its machine: pure, from the config and what the machine has.

Where the many processes of a cluster sit is decided in `launch.layout` and `launch.cluster_fit`.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, TypeVar

from launch.machines import BF16_CAPABILITY, Machine
from rlhf.config import RunConfig
from rlhf.config_offline import OfflineConfig, Trains
from rlhf.errors import InputError

VLLM_NF4 = "vllm_bnb_plugin"
"""Since vLLM 0.28 bitsandbytes is not part of it (https://github.com/vllm-project/vllm/pull/43529);
this plugin brings it back."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a process does on its device; who sits on which of several is a `launch.layout`."""

    device: Literal["cpu", "cuda"]
    engine: Literal["vllm", "transformers"]
    sync: Literal["adapter", "merged"]
    network: bool = False
    """Whether whole weights are sent to generators (`rollout.transfer`)."""


def place(
    config: RunConfig,
    cuda: bool,
    vllm: bool,
    capability: tuple[int, int] | None = None,
    vllm_nf4: bool = True,
) -> Plan:
    """Derive the plan. The rest says what the machine has: a GPU, vLLM, the GPU's compute
    capability, and vLLM's plugin for NF4.

    Raises InputError where the config asks for what can't be had.
    """
    device = device_of(config, cuda, capability)
    on_gpu = device == "cuda"
    if config.rollout.engine == "vllm" and not vllm:
        raise InputError(
            "rollout.engine is vllm, but vLLM is not installed: pip install 'pairloop[vllm]' "
            "(on a machine without GPU: make setup), or use rollout.engine transformers"
        )
    engine: Literal["vllm", "transformers"] = (
        "vllm" if vllm and config.rollout.engine != "transformers" else "transformers"
    )
    tuning = config.model.tuning
    if config.rollout.sync == "adapter" and tuning == "full":
        raise InputError("rollout.sync adapter needs model.tuning lora or qlora, got full")
    if config.rollout.sync == "adapter" and config.model.merges:
        raise InputError(
            "rollout.sync adapter needs model.lora.rounds carry, got new, where each version is a "
            "whole model and its adapter is on other weights than the generator's; use merged"
        )
    # Transformers would serve the adapter on the base as it is on disk, not on the NF4 one.
    same_base = tuning != "qlora" or engine == "vllm"
    if config.rollout.sync == "adapter" and not same_base:
        raise InputError(
            "rollout.sync adapter with model.tuning qlora needs rollout.engine vllm, got "
            "transformers, whose base is not the NF4 one that the adapter is trained on; use "
            "rollout.sync merged"
        )
    adapter = not config.model.whole and on_gpu and same_base
    automatic: Literal["adapter", "merged"] = "adapter" if adapter else "merged"
    sync = automatic if config.rollout.sync == "auto" else config.rollout.sync
    if sync == "adapter" and config.rollout.transfer == "memory":
        raise InputError(
            "rollout.transfer memory is for whole weights, but here the adapter alone travels; use "
            "auto, or rollout.sync merged"
        )
    if config.rollout.transfer == "network" and not (
        sync == "merged" and config.model.whole and engine == "vllm"
    ):
        raise InputError(
            "rollout.transfer network sends whole weights, as rounds store them, to vLLM: it needs "
            "model.tuning full or model.lora.rounds new, rollout.sync merged and rollout.engine "
            f"vllm, got tuning {tuning}, rounds {config.model.lora.rounds}, sync {sync} and engine "
            f"{engine}; use auto, memory or disk"
        )
    if sync == "adapter" and tuning == "qlora" and not vllm_nf4:
        raise InputError(
            "model.tuning qlora needs vLLM's bitsandbytes plugin to serve the NF4 base: "
            "pip install 'pairloop[vllm-nf4]', or use rollout.sync merged where the whole model "
            "fits"
        )
    return Plan(device, engine, sync, config.rollout.transfer == "network")


def several(config: Trains) -> str | None:
    """The setting that asks for more than one process; None where none does."""
    placement = config.placement
    if placement.kind in ("spmd", "ray"):
        return f"placement.kind {placement.kind}"
    asked = {
        "zero": placement.zero > 0,
        "generators": placement.generators != "auto",
        "tensor_parallel": placement.tensor_parallel != "auto",
        "colocate": placement.colocate is False,
    }
    name = next((name for name, found in asked.items() if found), None)
    return None if name is None else f"placement.{name} {getattr(placement, name)!s}".lower()


def one_process(config: Trains) -> None:
    """Raises InputError where the config asks for more than the process that it is started as."""
    if (wanted := several(config)) is not None:
        raise InputError(
            f"{wanted} needs more than one process, and this is one: start ranks with accelerate "
            "launch or torchrun, or set placement.kind ray (README, More than one process), or "
            "leave it out"
        )


def launched(config: RunConfig) -> bool:
    """Whether a launcher started this process as one of several ranks (`placement.kind` spmd).

    Raises InputError where the config asks for another kind than was started.
    """
    ranks, placement = int(os.environ.get("WORLD_SIZE", "1")), config.placement
    if placement.kind == "local" and ranks > 1:
        raise InputError(
            f"placement.kind is local, but a launcher started {ranks} ranks; use spmd or auto, or "
            "start it without the launcher"
        )
    if ranks == 1 and placement.kind != "spmd":
        one_process(config)
    return placement.kind == "spmd" or ranks > 1


def device_of(
    config: Trains, cuda: bool, capability: tuple[int, int] | None
) -> Literal["cpu", "cuda"]:
    """Where the learner works. Raises InputError where the config asks for what can't be had."""
    if config.placement.device == "cuda" and not cuda:
        raise InputError(
            "placement.device is cuda, but this machine shows no GPU; use auto or cpu, or plan for "
            "another machine with --dry-run --machine 1xT4-16GB"
        )
    if not cuda or config.placement.device == "cpu":
        return "cpu"
    if capability is not None:
        _check_precision(config, capability)
    return "cuda"


def _check_precision(config: Trains, capability: tuple[int, int]) -> None:
    if config.model.precision == "bf16" and capability < BF16_CAPABILITY:
        has = ".".join(map(str, capability))
        raise InputError(
            f"model.precision bf16 needs a GPU of compute capability 8.0 (Ampere) or later, got "
            f"{has}; use --model.precision fp16, which scales the loss"
        )


C = TypeVar("C", RunConfig, OfflineConfig)


def settle(config: C, machine: Machine) -> C:
    """The config with `model.precision: auto` replaced by what it means on a machine."""
    if config.model.precision != "auto":
        return config
    if machine.gpus and config.placement.device != "cpu":
        native = machine.capability is not None and machine.capability >= BF16_CAPABILITY
        precision = "bf16" if native else "fp16"
    else:
        precision = "bf16" if machine.cpu_bf16 else "fp32"
    return config.model_copy(
        update={"model": config.model.model_copy(update={"precision": precision})}
    )


def place_on(config: RunConfig, machine: Machine) -> Plan:
    """The plan for a machine. One that was described has every package that the config asks for."""
    if machine.described:
        return place(config, machine.gpus > 0, vllm=True, capability=machine.capability)
    return place(
        config,
        machine.gpus > 0,
        importlib.util.find_spec("vllm") is not None,
        machine.capability,
        importlib.util.find_spec(VLLM_NF4) is not None,
    )


def plan(config: RunConfig, machine: Machine) -> str:
    """What `train --dry-run` says of who runs where on a machine."""
    found = place_on(config, machine)
    where = f"placement  local, one process on {found.device} of {machine.name}"
    idle = f"; {machine.gpus - 1} more GPUs idle" if machine.gpus > 1 else ""
    return "\n".join([where + idle, *work(config, found)])


def work(config: RunConfig, found: Plan) -> list[str]:
    """What learner, generator and judges do, a line each."""
    travels = {
        "merged": "merged weights, reloaded in place",
        "adapter": "the adapter alone, hot-loaded",
    }
    k, rounds = config.rollout.samples_per_prompt, config.rounds
    per_round = rounds.prompts_per_round or "all"
    return [
        _training(config),
        f"generator  {found.engine}, {k} samples a prompt; weights travel as {travels[found.sync]}",
        f"judges     {', '.join(j.name for j in config.judges.panel)}; audit: "
        f"{', '.join(j.name for j in config.judges.audit) or 'none'}",
        f"rounds     up to {rounds.count}, {per_round} prompts each",
        f"gates      {', '.join(config.gated)} may not drop by more than {config.gates.max_drop:g}",
    ]


def plan_offline(config: OfflineConfig, machine: Machine) -> str:
    """What `dpo --dry-run` says of who runs where on a machine."""
    device = device_of(config, machine.gpus > 0, machine.capability)
    data = config.data
    longer = {
        "drop": "train nothing",
        "cut_prompt": "lose the beginning of their prompt",
        "cut_answer": "lose the end of their answers",
    }
    where = f"placement  local, one process on {device} of {machine.name}"
    idle = f"; {machine.gpus - 1} more GPUs idle" if machine.gpus > 1 else ""
    return "\n".join(
        [
            where + idle,
            _training(config),
            f"data       {data.path}; records over {data.max_tokens} tokens "
            f"{longer[data.too_long]}, more than {data.max_too_long:.0%} of them stop it",
        ]
    )


def _training(config: Trains) -> str:
    """What the learner does."""
    tuned = {
        "full": "all weights, fp32 masters",
        "lora": f"LoRA rank {config.model.lora.rank} on a {config.model.precision} base"
        + (", a new one each round, merged into the last version" if config.model.merges else ""),
        "qlora": f"LoRA rank {config.model.lora.rank} on an NF4 base",
    }
    return (
        f"learner    {config.model.path}: {tuned[config.model.tuning]}, "
        f"{config.objective.name} beta {config.objective.beta:g}, "
        f"learning rate {config.learning_rate:g}"
    )
