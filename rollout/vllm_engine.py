"""A vLLM engine in this process: started once, asleep while the learner works, closed once.

The generator, a language model as a judge and a reward model each have one. What an engine is built
with stands here, what we change inside vLLM in `vllm_compat`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.config_judges import Engine
from rlhf.errors import InputError
from rollout.concurrency import Concurrency, MemoryShortError, ran_out

if TYPE_CHECKING:
    import torch

    from rollout.transfer import Coming

T = TypeVar("T")

CPU_BLOCK = 64
"""Tokens a block of the cache, on a CPU. Samples of a prompt, and prompts that begin alike, share
whole blocks alone: in vLLM's 128 each of 8 samples of a prompt of 200 tokens computes 72 of them
again, here 8; in still smaller ones attention loses more than that gains
(`benchmarks/cache_blocks.py`)."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What every engine is built with."""

    dtype: torch.dtype
    device: str
    """auto, cpu or cuda."""
    max_length: int
    """Longest prompt plus completion, in tokens."""
    max_concurrency: int
    memory_gib: float
    """Key-value cache on a CPU."""
    gpu_memory_share: float
    seed: int
    tensor_parallel: int = 1
    """Cards of this node that its layers are split over."""
    receives: bool = False
    """Whether whole weights will be sent to it over the network."""


class InProcessEngine:
    """One engine. It shares this process, so that sleep, reload and close act on it directly."""

    def __init__(self, options: EngineOptions, name: str) -> None:
        self.options = options
        self.starts = 0
        self.concurrency = Concurrency(options.max_concurrency, name)
        self._llm: Any = None
        self._given: tuple[str, dict[str, Any]] = "", {}
        self._asleep = False
        self._beside_ranks = False

    @classmethod
    def of_judge(cls, engine: Engine, name: str, device: str) -> InProcessEngine:
        """The engine that a judge's configuration describes."""
        from rlhf.policy import DTYPES

        return cls(
            EngineOptions(
                dtype=DTYPES[engine.precision],
                device=device,
                max_length=engine.max_length,
                max_concurrency=engine.max_concurrency,
                memory_gib=engine.memory_gib,
                gpu_memory_share=engine.gpu_memory_share,
                seed=0,
            ),
            f"the engine of {name}",
        )

    @cached_property
    def device(self) -> str:
        """cpu or cuda."""
        if self.options.device != "auto":
            return self.options.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def started(self) -> bool:
        """Whether it holds a model."""
        return self._llm is not None

    @property
    def broken(self) -> bool:
        """Whether one of its worker processes has died, and it with them."""
        from rollout import vllm_compat

        return self.started and vllm_compat.worker_died(self._llm)

    @property
    def llm(self) -> Any:
        """vLLM's `LLM`."""
        assert self._llm is not None, "start the engine before using it"
        return self._llm

    def start(self, model: str, **arguments: Any) -> None:
        """Read the model. `arguments` are those of vLLM's `LLM` that this engine's use needs."""
        # vLLM reads this on import. A user's own setting wins.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        from rollout import vllm_compat

        self._given = model, dict(arguments)
        self.starts += 1
        # Beside other ranks the engine takes part in their groups, and leaves them as they are.
        self._beside_ranks = vllm_compat.beside_ranks()
        if self._beside_ranks:
            arguments["distributed_executor_backend"] = "external_launcher"
        elif self.options.tensor_parallel > 1:
            # Its workers are children of this process: the default inside a Ray actor would be
            # actors, which would want places of their own.
            arguments["tensor_parallel_size"] = self.options.tensor_parallel
            arguments["distributed_executor_backend"] = "mp"
        if self.options.receives:
            from rollout import vllm_transfer

            arguments["worker_extension_cls"] = vllm_transfer.WORKER
            arguments["weight_transfer_config"] = {"backend": vllm_transfer.BACKENDS[self.device]}
        vllm_compat.sort_less(self.device)
        if arguments.get("enable_lora"):
            vllm_compat.score_prompts_with_adapters(self.device)

        self._llm = LLM(
            model,
            dtype=str(self.options.dtype).removeprefix("torch."),
            max_model_len=self.options.max_length,
            max_num_seqs=self.concurrency.now,
            seed=self.options.seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **device_arguments(self.options, self.device),
            **arguments,
        )

    def reload(self, model: str) -> None:
        """Take the weights of another folder, in place."""
        from rollout import vllm_compat

        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        vllm_compat.refresh_head(self.llm, self.device)
        self._given = model, self._given[1]

    def receive(self, coming: Coming, stored: str) -> str:
        """Take weights that are sent over the network, and lie in the folder `stored` too: the
        digest of what came."""
        from rollout import vllm_compat
        from rollout.vllm_transfer import receive

        digest = receive(self.llm, coming)
        vllm_compat.refresh_head(self.llm, self.device)
        self._given = stored, self._given[1]
        return digest

    def ask(self, work: Callable[[Any], T]) -> T:
        """What `work` gives of vLLM's `LLM`. Where memory runs out, half way through a step, the
        engine can't be relied on: it is started anew for half as many sequences, with what it was
        started or reloaded with, and asked again.

        Raises MemoryShortError where that can't be done, or doesn't help.
        """
        return self.concurrency.work(lambda: work(self.llm), self._restart)

    def _restart(self) -> None:
        if self._beside_ranks:
            raise MemoryShortError(
                "an engine beside other ranks ran out of memory, and can't be started anew without "
                "them; use a smaller rollout.gpu_memory_share, which leaves more beside vLLM's own"
            )
        model, arguments = self._given
        self.close()
        try:
            self.start(model, **arguments)
        except Exception as error:
            if not ran_out(error):
                raise
            raise MemoryShortError(
                f"there is no memory left to start an engine anew that ran out of it: {error}; the "
                "same command goes on from what is stored"
            ) from error

    def sleep(self) -> None:
        """Move weights to host memory and free the cache; a CPU engine has no card to give back."""
        if self.started and self.device != "cpu" and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> bool:
        """Be ready again; whether it had slept."""
        slept, self._asleep = self._asleep, False
        if slept:
            self._llm.wake_up()
        return slept

    def close(self) -> None:
        """Shut the engine down; it may be started again."""
        if self.started:
            from rollout import vllm_compat

            vllm_compat.shut_down(self._llm, keep_groups=self._beside_ranks)
            self._llm, self._asleep = None, False


def device_arguments(options: EngineOptions, device: str) -> dict[str, Any]:
    """Arguments that differ between a CPU and a GPU.

    On a CPU the cache's size is given outright (else vLLM wants most of the machine's memory to be
    free), requests with seeds crash under chunked prefill ("CPU Generator does not use offset"),
    and graphs cost more to compile than a run gains.
    """
    if device != "cpu":
        return {"gpu_memory_utilization": options.gpu_memory_share, "enable_sleep_mode": True}
    return {
        "kv_cache_memory_bytes": round(options.memory_gib * 2**30),
        "block_size": CPU_BLOCK,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, options.max_length),
    }


def require_vllm(field: str, instead: str) -> None:
    """Raise InputError where a judge's back end is vLLM, which isn't installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"{field}.backend is vllm, but vLLM is not installed: pip install 'pairloop[vllm]' "
            f"(on a machine without GPU: make setup), or use backend {instead}"
        )
