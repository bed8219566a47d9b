"""What memory estimates are made of: phases, parts, assumed overheads, an engine's forward pass.

Numbers for GPUs (`ASSUMED`) are assumptions until someone measures them there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.architectures import Architecture
from launch.machines import GIB, Machine

Phase = Literal["load", "generate", "reference", "train", "publish"]
PHASES: tuple[Phase, ...] = ("load", "generate", "reference", "train", "publish")
AWAKE: tuple[Phase, ...] = ("generate", "publish")
ASLEEP: tuple[Phase, ...] = ("reference", "train")
RUNNING: tuple[Phase, ...] = (*AWAKE, *ASLEEP)
TRAINING: tuple[Phase, ...] = ("load", *ASLEEP)


@dataclass(frozen=True, slots=True)
class Overheads:
    """What neither config nor architecture says, in bytes."""

    process: int
    """Python, torch, Transformers and PEFT, nothing loaded yet."""
    policy: int
    """A loaded policy's tokenizer and modules, and what libraries keep for themselves."""
    vllm: int
    """vLLM's modules on top."""
    cuda_process: int
    """CUDA's libraries in host memory."""
    context: int
    """CUDA context, kernels and library workspaces on the GPU."""
    graphs: int
    """vLLM's CUDA graphs; they stay while it sleeps."""


ASSUMED = Overheads(
    process=round(0.65 * GIB),
    policy=round(0.08 * GIB),
    vllm=round(0.3 * GIB),
    cuda_process=round(2.5 * GIB),
    context=round(0.75 * GIB),
    graphs=round(0.4 * GIB),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table."""

    role: str
    what: str
    size: int
    """Bytes."""
    formula: str
    phases: tuple[Phase, ...]
    host: bool
    """In host memory, not the GPU's."""
    once: bool = False
    """All processes of a node have it together."""


def millions(count: float) -> str:
    """A count as a formula shows it: 134.5M."""
    return f"{count / 1e6:,.1f}M"


def key_value_bytes(architecture: Architecture, compute: int, width: int = 1) -> int:
    """Bytes of a token's keys and values in all layers, on one of `width` GPUs."""
    a = architecture
    return 2 * a.layers * max(1, a.kv_heads // width) * a.head_dim * compute


def workspace(
    architecture: Architecture, compute: int, tokens: int, rows: int, width: int = 1
) -> int:
    """An engine's forward pass without gradients: `tokens` through a layer of which one of `width`
    GPUs has its part, `rows` to logits."""
    a = architecture
    layer = compute * (4 * a.hidden + (3 * a.intermediate + 2 * a.query) // width)
    return tokens * layer + rows * a.vocabulary * (compute + 12)


def default_batched_tokens(machine: Machine) -> int:
    """Tokens of a vLLM step unless set (vLLM 0.32, `get_batch_defaults`)."""
    if machine.gpu >= 160 * GIB:
        return 16384
    ampere = machine.capability == (8, 0)
    return 16384 if machine.gpu >= 70 * GIB and not ampere else 8192
