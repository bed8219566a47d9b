"""Sampling with Transformers' batched `generate`: no extra engine, and exact in fp32 on a CPU.

A prompt is read once for all its samples: its cache is repeated, and `generate` goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
)

from rlhf.errors import InputError
from rlhf.logprobs import collate, split_rows, token_logps
from rlhf.protocols import Loaded, Published, Sampling
from rlhf.types import Completion, FinishReason, Prompt
from rollout.nucleus import keep_nucleus
from rollout.weight_sync import weights_sha256

_DRAWN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


class _Nucleus(LogitsProcessor):
    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return keep_nucleus(scores, scores.new_full((scores.shape[0],), self.top_p))


class _Recorder(LogitsProcessor):
    """Last in the list: sees the distribution that is sampled from, and keeps its log-probs."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self._last_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids[:, -1])
        self._last_BV = scores.float().log_softmax(-1)
        return scores

    def note(self, tokens_B: Tensor) -> None:
        """Record the log-probs of the tokens drawn from the last distribution."""
        if self._last_BV is not None:
            self.columns.append(self._last_BV.gather(1, tokens_B[:, None]).squeeze(1))


class TransformersGenerator:
    """A policy copy of its own, in compute precision."""

    def __init__(
        self,
        base: str,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        dtype: torch.dtype,
        device: str,
        max_concurrency: int,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.dtype = dtype
        self.device = device
        self.max_concurrency = max_concurrency
        self._model: nn.Module | None = None
        self._loaded: Loaded | None = None

    @property
    def model(self) -> Any:
        """The model being served; an assertion before the first `load`."""
        assert self._model is not None, "load a policy version before sampling"
        return self._model

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See `Generator.generate`. In fp32 on a CPU the same call gives the same bytes."""
        assert self._loaded is not None
        torch.manual_seed(sampling.seed)
        size = max(1, self.max_concurrency // sampling.samples)
        found: list[Completion] = []
        for start in range(0, len(prompts), size):
            found += self._generate(prompts[start : start + size], sampling)
        return found

    @torch.no_grad()
    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """See `Generator.logps`."""
        found: list[list[float]] = []
        for start in range(0, len(completions), 16):
            part = completions[start : start + 16]
            batch = collate(
                [(c.prompt_token_ids, c.token_ids) for c in part], self.stop_ids[0], self.device
            )
            found += split_rows(token_logps(self.model, batch), batch)
        return found

    def load(self, published: Published) -> Loaded:
        """See `Generator.load`."""
        sha256 = weights_sha256(published.path)
        if published.kind == "adapter":
            self._load_adapter(published.path)
        elif self._model is None:
            self._model = self._read(str(published.path))
        else:
            weights: dict[str, Tensor] = {}
            for file in sorted(published.path.glob("*.safetensors")):
                weights.update(load_file(file))
            missing, unexpected = self._model.load_state_dict(weights, strict=False)
            tied = set(getattr(self._model, "all_tied_weights_keys", None) or ())
            if unexpected or set(missing) - tied:
                raise InputError(f"{published.path}: weights do not fit the generator's model")
        self._loaded = Loaded(published.version, sha256)
        return self._loaded

    def sleep(self) -> None:
        """Move the copy to host memory, so that the learner has the card."""
        if self.device != "cpu" and self._model is not None:
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> Loaded | None:
        """Move it back."""
        if self.device != "cpu" and self._model is not None:
            self._model.to(self.device)
        return self._loaded

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def _read(self, path: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=self.dtype, use_safetensors=True
        )
        # `generate` fills every setting that it is not given from this one: a folder's own
        # repetition penalty, say, would change the distribution that is sampled from.
        model.generation_config = GenerationConfig()
        return model.to(self.device).eval()

    def _load_adapter(self, path: Path) -> None:
        if self._model is None:
            base = self._read(self.base)
            self._model = PeftModel.from_pretrained(
                base, str(path), adapter_name="even", use_safetensors=True
            ).eval()
            return
        # The new adapter is read beside the old one, so never under the same name.
        model, old = self.model, self.model.active_adapter
        new = "odd" if old == "even" else "even"
        model.load_adapter(str(path), adapter_name=new)
        model.set_adapter(new)
        model.delete_adapter(old)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), width), self.stop_ids[0], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        recorder = _Recorder()
        shaped: list[LogitsProcessor] = []
        if not sampling.greedy:
            shaped = [TemperatureLogitsWarper(sampling.temperature), _Nucleus(sampling.top_p)]
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids.repeat_interleave(sampling.samples, 0),
                attention_mask=mask.repeat_interleave(sampling.samples, 0),
                past_key_values=self._prefill(ids, mask, sampling.samples),
                logits_processor=LogitsProcessorList([*shaped, recorder]),
                # Neutral here: the processors above already shape the distribution.
                generation_config=GenerationConfig(
                    **_DRAWN if not sampling.greedy else {"do_sample": False},
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=list(self.stop_ids),
                    pad_token_id=self.stop_ids[0],
                ),
            )
        recorder.note(output[:, -1])
        sampled = output[:, width:].tolist()
        logps = torch.stack(recorder.columns, 1).tolist()
        return [
            self._completion(prompt, sample, sampled[row], logps[row])
            for row, (prompt, sample) in enumerate(
                (p, s) for p in prompts for s in range(sampling.samples)
            )
        ]

    def _prefill(self, ids: Tensor, mask: Tensor, samples: int) -> DynamicCache:
        """The cache of all but the last prompt token, once a prompt, repeated for its samples."""
        cache = DynamicCache(config=self.model.config)
        if ids.shape[1] > 1:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            self.model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(samples)
        return cache

    def _completion(
        self, prompt: Prompt, sample: int, tokens: list[int], logps: list[float]
    ) -> Completion:
        assert self._loaded is not None
        ends = [i for i, token in enumerate(tokens) if token in self.stop_ids]
        reason: FinishReason = "stop" if ends else "length"
        kept = tokens[: ends[0] + 1] if ends else tokens
        said = kept[:-1] if ends else kept
        return Completion(
            prompt.prompt_id,
            sample,
            str(self.tokenizer.decode(said, skip_special_tokens=True)).strip(),
            tuple(kept),
            prompt.token_ids,
            tuple(logps[: len(kept)]),
            reason,
            self._loaded.version,
        )
