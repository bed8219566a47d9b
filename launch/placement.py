"""Who runs where: pure, from the config and what the machine has."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from rlhf.config import RunConfig
from rlhf.errors import InputError


@dataclass(frozen=True, slots=True)
class Plan:
    """One machine, one process."""

    device: Literal["cpu", "cuda"]
    engine: Literal["vllm", "transformers"]
    sync: Literal["adapter", "merged"]


def has_cuda() -> bool:
    """Whether the driver shows an NVIDIA GPU; asks the driver, not torch."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and (count.value > 0)
    )


def place(config: RunConfig, cuda: bool, vllm: bool) -> Plan:
    """Derive the plan. `cuda` and `vllm` say what the machine has.

    Raises InputError where the config asks for what can't be had.
    """
    if config.placement.device == "cuda" and not cuda:
        raise InputError("placement.device is cuda, but this machine shows no GPU; use auto or cpu")
    on_gpu = cuda and config.placement.device != "cpu"
    if config.rollout.engine == "vllm" and not vllm:
        raise InputError(
            "rollout.engine is vllm, but vLLM is not installed: pip install 'pairloop[vllm]' "
            "(on a machine without GPU: make setup), or use rollout.engine transformers"
        )
    engine: Literal["vllm", "transformers"] = (
        "vllm" if vllm and config.rollout.engine != "transformers" else "transformers"
    )
    adapted = config.model.tuning != "full"
    if config.rollout.sync == "adapter" and not adapted:
        raise InputError("rollout.sync adapter needs model.tuning lora or qlora, got full")
    automatic: Literal["adapter", "merged"] = "adapter" if adapted and on_gpu else "merged"
    sync = automatic if config.rollout.sync == "auto" else config.rollout.sync
    return Plan("cuda" if on_gpu else "cpu", engine, sync)


def find(config: RunConfig) -> Plan:
    """The plan for this machine."""
    return place(config, has_cuda(), importlib.util.find_spec("vllm") is not None)


def plan(config: RunConfig) -> str:
    """What `train --dry-run` says about this machine."""
    found = find(config)
    tuned = {
        "full": "all weights, fp32 masters",
        "lora": f"LoRA rank {config.model.lora.rank} on a {config.model.precision} base",
        "qlora": f"LoRA rank {config.model.lora.rank} on an NF4 base",
    }
    travels = {
        "merged": "merged weights, reloaded in place",
        "adapter": "the adapter alone, hot-loaded",
    }
    k, rounds = config.rollout.samples_per_prompt, config.rounds
    per_round = rounds.prompts_per_round or "all"
    return "\n".join(
        [
            f"placement  {config.placement.kind}, one process on {found.device}",
            f"learner    {config.model.path}: {tuned[config.model.tuning]}, "
            f"{config.objective.name} beta {config.objective.beta:g}, "
            f"learning rate {config.learning_rate:g}",
            f"generator  {found.engine}, {k} samples a prompt; weights travel as "
            f"{travels[found.sync]}",
            f"judges     {', '.join(j.name for j in config.judges.panel)}; audit: "
            f"{', '.join(j.name for j in config.judges.audit) or 'none'}",
            f"rounds     up to {rounds.count}, {per_round} prompts each",
            f"gates      {', '.join(config.gated)} may not drop by more than "
            f"{config.gates.max_drop:g}",
        ]
    )
