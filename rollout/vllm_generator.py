"""Sampling with vLLM, as an engine in this process.

The engine starts at the first `load`, from the folder that is loaded; later versions are reloaded
in place (merged) or hot-loaded as an adapter. What differs on a CPU is in `vllm_compat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.errors import ParityError
from rlhf.protocols import Loaded, Published, Sampling
from rlhf.types import Completion, Prompt
from rollout import vllm_compat
from rollout.vllm_compat import EngineOptions
from rollout.weight_sync import weights_sha256

# Names that vLLM gives dtypes.
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class VllmGenerator:
    """One vLLM engine."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._llm: Any = None
        self._loaded: Loaded | None = None
        self._adapter: Any = None
        self._adapters = 0
        self._checksums: Any = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See `Generator.generate`. Samples depend on what else is in the batch."""
        assert self._loaded is not None, "load a policy version before sampling"
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=vllm_compat.request_seed(self.options.device, sampling.seed, index),
                logprobs=0,
                stop_token_ids=list(self.options.stop_ids),
                skip_special_tokens=True,
            )
            for index in range(len(prompts))
        ]
        with vllm_compat.seeded(sampling.seed):
            outputs = self._ask([list(p.token_ids) for p in prompts], parameters)
        return [
            Completion(
                prompt.prompt_id,
                sample,
                answer.text.strip(),
                tuple(answer.token_ids),
                prompt.token_ids,
                tuple(
                    step[token].logprob
                    for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
                ),
                "length" if answer.finish_reason == "length" else "stop",
                self._loaded.version,
            )
            for prompt, output in zip(prompts, outputs, strict=True)
            for sample, answer in enumerate(sorted(output.outputs, key=lambda o: o.index))
        ]

    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """See `Generator.logps`; read from the engine's prompt log-probs."""
        from vllm import SamplingParams

        rows = [[*c.prompt_token_ids, *c.token_ids] for c in completions]
        parameters = [SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)] * len(rows)
        outputs = self._ask(rows, parameters)
        return [
            [
                output.prompt_logprobs[len(c.prompt_token_ids) + i][token].logprob
                for i, token in enumerate(c.token_ids)
            ]
            for c, output in zip(completions, outputs, strict=True)
        ]

    def load(self, published: Published) -> Loaded:
        """See `Generator.load`."""
        sha256 = weights_sha256(published.path)
        if published.kind == "adapter":
            if self._llm is None:
                self._start(self.options.base, lora=True)
            from vllm.lora.request import LoRARequest

            # A new id per load: the engine keeps adapters by id, whatever their files hold now.
            self._adapters += 1
            name = f"load-{self._adapters}"
            self._adapter = LoRARequest(name, self._adapters, str(published.path))
        elif self._llm is None:
            self._start(str(published.path), lora=False)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(published.path)})
            vllm_compat.refresh_head(self._llm, self.options.device)
        self._llm.reset_prefix_cache()
        if self.options.device != "cpu":
            self._checksums = self._llm.collective_rpc("compute_weight_checksums")
        self._loaded = Loaded(published.version, sha256)
        return self._loaded

    def sleep(self) -> None:
        """Move weights to host memory and free the cache; a CPU engine has no card to give back."""
        if self.options.device != "cpu" and self._llm is not None:
            self._llm.sleep(level=1)

    def wake(self) -> Loaded | None:
        """Serve again. Raises ParityError if the weights came back changed."""
        if self.options.device != "cpu" and self._llm is not None:
            self._llm.wake_up()
            if self._llm.collective_rpc("compute_weight_checksums") != self._checksums:
                raise ParityError("vLLM's weights changed while it slept")
        return self._loaded

    def close(self) -> None:
        """Shut the engine down."""
        if self._llm is not None:
            vllm_compat.shut_down(self._llm)
            self._llm = None

    def _start(self, model: str, lora: bool) -> None:
        options = self.options
        vllm_compat.prepare()
        vllm_compat.sort_less(options.device)
        from vllm import LLM

        extra: dict[str, Any] = {}
        if lora:
            vllm_compat.score_prompts_with_adapters(options.device)
            extra |= {"enable_lora": True, "max_lora_rank": max(8, options.lora_rank)}
            if options.quantised:
                extra |= {"quantization": "bitsandbytes"}
        self._llm = LLM(
            model,
            tokenizer=options.tokenizer,
            dtype=_DTYPES[options.dtype],
            max_model_len=options.max_length,
            max_num_seqs=options.max_concurrency,
            # The log-probs of the distribution sampled from, not of the raw model.
            logprobs_mode="processed_logprobs",
            # What is sampled is set per request, never by the model's generation config.
            generation_config="vllm",
            seed=options.seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **vllm_compat.engine_arguments(options),
            **extra,
        )

    def _ask(self, rows: Sequence[list[int]], parameters: Sequence[Any]) -> list[Any]:
        from vllm import TokensPrompt

        return list(
            self._llm.generate(
                [TokensPrompt(prompt_token_ids=row) for row in rows],
                list(parameters),
                use_tqdm=False,
                lora_request=self._adapter,
            )
        )
