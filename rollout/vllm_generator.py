"""Sampling with vLLM, as an engine in this process.

The engine starts at the first `load`, from the folder that is loaded; later versions are reloaded
in place (merged) or hot-loaded as an adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rlhf.errors import InputError, ParityError
from rlhf.protocols import Loaded, Published, Sampling
from rlhf.types import Completion, Prompt
from rollout import vllm_compat
from rollout.concurrency import Concurrency
from rollout.vllm_engine import EngineOptions, InProcessEngine
from rollout.weight_sync import weights_sha256

if TYPE_CHECKING:
    from rollout.transfer import Coming


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of the policy before its first version is loaded."""

    base: str
    """Folder or hub id of the base model, whose tokenizer every version has."""
    stop_ids: tuple[int, ...]
    lora_rank: int = 0
    """Highest rank of an adapter that may be loaded."""
    quantised: bool = False
    """The base is NF4 (adapter sync only; merged folders are already dequantised)."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    trusted: bool = False
    """Whether code that comes with the model may run."""


def served_rank(rank: int) -> int:
    """The rank that vLLM sets aside for adapters of `rank`: it offers few.

    Raises InputError where none is high enough.
    """
    from vllm.config.lora import MaxLoRARanks

    offered = sorted(r for r in get_args(MaxLoRARanks) if r >= max(8, rank))
    if not offered:
        raise InputError(
            f"rollout.sync adapter: vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}, "
            f"got {rank} (model.lora.rank, or model.adapter's); use rollout.sync merged"
        )
    return int(offered[0])


class VllmGenerator:
    """Samples from one engine."""

    def __init__(self, served: Served, options: EngineOptions) -> None:
        self._served = served
        self._engine = InProcessEngine(options, "the vLLM generator")
        self._published: Published | None = None
        self._loaded: Loaded | None = None
        self._adapter: Any = None
        self._adapters = 0
        self._checksums: Any = None

    @property
    def concurrency(self) -> Concurrency:
        """How many sequences its engine works on at once."""
        return self._engine.concurrency

    @property
    def broken(self) -> bool:
        """Whether a worker process of its engine has died, so that it can't serve any more."""
        return self._engine.broken

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
                seed=vllm_compat.request_seed(self._engine.device, sampling.seed, index),
                logprobs=0,
                stop_token_ids=list(self._served.stop_ids),
                skip_special_tokens=True,
            )
            for index in range(len(prompts))
        ]
        rows = [list(p.token_ids) for p in prompts]
        outputs = self._ask(rows, parameters, sampling.seed)
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
        sha256 = self._sha256(published)
        if published.kind == "adapter":
            if not self._engine.started:
                self._start(self._served.base, lora=True)
            from vllm.lora.request import LoRARequest

            # A new id per load: the engine keeps adapters by id, whatever their files hold now.
            self._adapters += 1
            name = f"load-{self._adapters}"
            self._adapter = LoRARequest(name, self._adapters, str(published.path))
        elif not self._engine.started:
            self._start(str(published.path), lora=False)
        else:
            self._engine.reload(str(published.path))
        return self._serve(published, sha256)

    def take(self, version: int, stored: Path, coming: Coming) -> Loaded:
        """Serve a version whose weights are sent over the network from now on; they are those that
        a round has `stored`. The engine has a version already."""
        digest = self._engine.receive(coming, str(stored))
        return self._serve(Published(version, stored, "stored", digest), digest)

    def sleep(self) -> None:
        """See `InProcessEngine.sleep`."""
        self._engine.sleep()

    def wake(self) -> Loaded | None:
        """Serve again. Raises ParityError if the weights came back changed."""
        if self._engine.wake() and self._weights() != self._checksums:
            raise ParityError("vLLM's weights changed while it slept")
        return self._loaded

    def close(self) -> None:
        """Shut the engine down."""
        self._engine.close()

    def _serve(self, published: Published, sha256: str) -> Loaded:
        self._engine.llm.reset_prefix_cache()
        before, self._checksums = self._checksums, self._weights()
        other = self._loaded is not None and self._loaded.sha256 != sha256
        # An adapter leaves the weights beneath it as they are.
        if other and published.kind != "adapter" and before == self._checksums is not None:
            raise ParityError(
                f"vLLM read version {published.version}, whose weights are others, and its own "
                "checksums say that it holds what it held before"
            )
        self._published = published
        self._loaded = Loaded(published.version, sha256, self._held())
        return self._loaded

    def _held(self) -> str | None:
        if self._checksums is None:
            return None
        return hashlib.sha256(repr(self._checksums).encode()).hexdigest()

    def _sha256(self, published: Published) -> str:
        """Of what lies in its folder now."""
        if published.kind != "stored":
            return weights_sha256(published.path)
        from rlhf.weights import stored_digest

        return stored_digest(published.path, self._engine.options.dtype)

    def _weights(self) -> Any:
        """vLLM's checksums; on a CPU they are blind to what was reloaded, and nothing sleeps."""
        if self._engine.device == "cpu":
            return None
        return self._engine.llm.collective_rpc("compute_weight_checksums")

    def _start(self, model: str, lora: bool) -> None:
        extra: dict[str, Any] = {"trust_remote_code": self._served.trusted}
        if self._served.revision is not None:
            extra["tokenizer_revision"] = self._served.revision
            if model == self._served.base:
                extra["revision"] = self._served.revision
        if lora:
            extra |= {"enable_lora": True, "max_lora_rank": served_rank(self._served.lora_rank)}
            if self._served.quantised:
                extra |= {"quantization": "bitsandbytes"}
        self._engine.start(
            model,
            tokenizer=self._served.base,
            # The log-probs of the distribution sampled from, not of the raw model.
            logprobs_mode="processed_logprobs",
            # What is sampled is set per request, never by the model's generation config.
            generation_config="vllm",
            **extra,
        )

    def _ask(
        self, rows: Sequence[list[int]], parameters: Sequence[Any], seed: int = 0
    ) -> list[Any]:
        from vllm import TokensPrompt

        def generate(llm: Any) -> list[Any]:
            with vllm_compat.seeded(seed):
                outputs: list[Any] = llm.generate(
                    [TokensPrompt(prompt_token_ids=row) for row in rows],
                    list(parameters),
                    use_tqdm=False,
                    lora_request=self._adapter,
                )
            return outputs

        starts = self._engine.starts
        outputs = self._engine.ask(generate)
        if self._engine.starts != starts:
            self._check_restarted()
        return outputs

    def _check_restarted(self) -> None:
        """Raises ParityError unless what a new engine read is what the old one served."""
        assert self._published is not None and self._loaded is not None
        if self._sha256(self._published) != self._loaded.sha256:
            raise ParityError(
                f"{self._published.path} has changed since it was loaded, and an engine that was "
                "started anew has read it"
            )
        self._checksums = self._weights()
