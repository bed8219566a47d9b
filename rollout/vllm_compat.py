"""What vLLM 0.32 needs of us, each with its reason and when it can go."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rollout.nucleus import keep_nucleus


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

    def apply(logits: torch.Tensor, k: Any, p: Any, allow_cpu_sync: bool = False) -> torch.Tensor:
        if k is not None or p is None:
            filtered: torch.Tensor = original(logits, k, p, allow_cpu_sync)
            return filtered
        return keep_nucleus(logits, p)

    apply.sorts_less = True  # type: ignore[attr-defined]
    topk_topp_sampler.apply_top_k_top_p_pytorch = apply


def refresh_head(llm: Any, device: str) -> None:
    """After a reload on a CPU, let an output layer that is tied to the embedding follow it.

    The reload replaces the embedding in place, but the tied layer multiplies with a repacked copy
    of its first weights, and has no weights of its own that would be reloaded (vLLM 0.32.0,
    `dispatch_cpu_unquantized_gemm`). Can go when its reload repacks tied layers too.
    """
    if device == "cpu":
        llm.apply_model(_repack_heads)


def _repack_heads(model: torch.nn.Module) -> None:
    """A function of the module's own, since workers in other processes are sent it by name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def score_prompts_with_adapters(device: str) -> None:
    """On a CPU, let prompts be scored while an adapter is served.

    Prompt log-probs ask for logits of every token, but the output layer looks adapters up by
    sequence, and the shapes do not fit (vLLM 0.32.0; on GPUs the output layer's own adapter is left
    out instead, https://github.com/vllm-project/vllm/issues/51594, which the parity check would
    catch). All our sequences share one adapter, so the first one's index serves all tokens. Can go
    when that issue is closed for both.
    """
    if device != "cpu":
        return
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    original = PunicaWrapperCPU.add_lora_logits
    if getattr(original, "by_token", False):
        return

    def apply(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **options: Any,
    ) -> None:
        indices = self.sampler_indices
        if len(indices) == len(x):
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, **options)
            return
        indices = indices[:1].expand(len(x))
        buffer = x.new_zeros((len(x), lora_b_stacked.size(-1)), dtype=torch.float32)
        bgmv_shrink(x, lora_a_stacked, buffer, indices, scale)
        bgmv_expand(buffer, lora_b_stacked, y, indices, add_inputs=True)

    apply.by_token = True  # type: ignore[attr-defined]
    PunicaWrapperCPU.add_lora_logits = apply


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The engine in this process draws from torch's global generator: fix it, then put it back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def beside_ranks() -> bool:
    """Whether this process is one of several ranks that have met: an engine before this one made a
    group too, of this process alone."""
    from torch import distributed

    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def worker_died(llm: Any) -> bool:
    """Whether a worker in a process of its own has died: vLLM's error then is one of many, and only
    the executor knows."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    executor = getattr(core, "model_executor", None)
    # Its own mark is set by a thread, perhaps after the error that the death caused.
    workers = getattr(executor, "workers", None) or ()
    return getattr(executor, "is_failed", False) or not all(w.proc.is_alive() for w in workers)


def end_with_parent() -> None:
    """In a worker process: end as soon as the engine's process has.

    vLLM's workers look for that between two calls (vLLM 0.32.0, `monitor_death_pipe`), and inside a
    broadcast that nobody goes on with they would keep their GPU for good. Can go when they end at
    once.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def shut_down(llm: Any, keep_groups: bool) -> None:
    """End the engine in this process; `LLM` has no public close.

    vLLM's own end destroys every group of the process (vLLM 0.32.0,
    `destroy_distributed_environment`); `keep_groups` leaves those that it did not make. Can go when
    upstream destroys its own alone.
    """
    from vllm.distributed import parallel_state

    def destroy_own() -> None:
        if parallel_state._WORLD:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None

    everything = parallel_state.destroy_distributed_environment
    if keep_groups:
        parallel_state.destroy_distributed_environment = destroy_own
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        parallel_state.destroy_distributed_environment = everything
    gc.collect()
    if torch.distributed.is_initialized() and not keep_groups:
        torch.distributed.destroy_process_group()
