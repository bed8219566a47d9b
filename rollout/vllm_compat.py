"""What vLLM 0.32 needs of us, each with its reason and when it can go."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf.errors import InputError
from rollout.nucleus import keep_nucleus


def prepare(device: str, memory_gib: float) -> None:
    """Set what vLLM reads from the environment on import. A user's own settings win."""
    try:
        import importlib.util

        found = importlib.util.find_spec("vllm")
    except ValueError:
        found = None
    if found is None:
        raise InputError(
            "rollout.engine vllm: vLLM is not installed; pip install 'pairloop[vllm]', or set "
            "rollout.engine: transformers"
        )
    # The engine shares this process, so that sleep, reload and close act on it directly.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(memory_gib))))


def engine_arguments(device: str, max_length: int) -> dict[str, Any]:
    """Arguments that differ on a CPU.

    There, requests with seeds crash under chunked prefill ("CPU Generator does not use offset"),
    and graphs cost more to compile than a run gains.
    """
    if device != "cpu":
        return {}
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_length),
    }


def request_seed(device: str, seed: int, index: int) -> int | None:
    """A seed per request on GPUs; none on a CPU, where each seeded row is drawn by itself."""
    return None if device == "cpu" else (seed + index) % 2**31


def sort_less(device: str) -> None:
    """On a CPU, filter top-p without sorting the vocabulary, which costs more than a small model.

    Replaces `apply_top_k_top_p_pytorch` for requests without top-k (vLLM 0.32.0; upstream sorts on
    every backend that lacks a fused kernel). Can go when vLLM's CPU backend has such a kernel.
    """
    if device != "cpu":
        return
    from vllm.v1.sample.ops import topk_topp_sampler

    original = topk_topp_sampler.apply_top_k_top_p_pytorch
    if getattr(original, "sorts_less", False):
        return

    def apply(
        logits: torch.Tensor, k: Any, p: Any, allow_cpu_sync: bool = False
    ) -> torch.Tensor:
        if k is not None or p is None:
            return original(logits, k, p, allow_cpu_sync)
        return keep_nucleus(logits, p)

    apply.sorts_less = True  # type: ignore[attr-defined]
    topk_topp_sampler.apply_top_k_top_p_pytorch = apply


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The engine in this process draws from torch's global generator: fix it, then put it back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def shut_down(llm: Any) -> None:
    """End the engine in this process; `LLM` has no public close."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
