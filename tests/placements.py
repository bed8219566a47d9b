"""Configs and plans for the tests of placement."""

from __future__ import annotations

from typing import Any

from launch import presets
from launch.cluster import Slot, parse
from launch.cluster_fit import Planned, plan_cluster
from launch.memory import Estimate
from rlhf import config_io
from rlhf.config import RunConfig

QLORA_T4 = "qwen2.5-7b-instruct-qlora-t4"
QLORA_A100 = "qwen2.5-7b-instruct-qlora-a100"
LORA = "llama-3.1-8b-instruct-lora-a100"
"""Presets. LoRA's has 1024 + 512 tokens, micro-batches of 4,096 with checkpointing, 64 sequences at
once, and half of the card for vLLM."""
QWEN_7B = "Qwen/Qwen2.5-7B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"


def preset(name: str, **sections: dict[str, Any]) -> RunConfig:
    """A preset with some settings changed."""
    values = config_io.load([presets.path(name)]).model_dump()
    for section, changes in sections.items():
        values[section] |= changes
    return RunConfig.model_validate(values)


def planned(config: RunConfig, cluster: str) -> Planned:
    """The plan for a described cluster."""
    return plan_cluster(config, parse(cluster))


def at(plan: Planned, node: int = 0, gpu: int | None = 0) -> Estimate:
    """What a GPU and its host hold."""
    assert plan.found is not None
    return plan.found.slots[Slot(node, gpu)]


def sizes(found: Estimate, host: bool = False) -> dict[tuple[str, str], int]:
    """(role, what) -> bytes of every row of a memory."""
    return {(p.role, p.what): p.size for p in found.parts if p.host == host}
