"""Sampling with Transformers alone: no extra engine, and exact in fp32 on a CPU.

A prompt is read once for all its samples: its cache is repeated, and every answer goes on from it
until it ends. `generate` would carry ended answers along to the last one's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

from rlhf.errors import InputError
from rlhf.logprobs import collate, split_rows, token_logps
from rlhf.protocols import Loaded, Published, Sampling
from rlhf.types import Completion, FinishReason, Prompt
from rollout.concurrency import Concurrency
from rollout.nucleus import keep_nucleus
from rollout.weight_sync import weights_sha256


class TransformersGenerator:
    """A policy copy of its own, in compute precision."""

    broken = False
    """Its process is all there is of it."""

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
        self.revision: str | None = None
        """Of a base from the hub: a commit, tag or branch."""
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.dtype = dtype
        self.device = device
        self.concurrency = Concurrency(max_concurrency, "the Transformers generator")
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
        return self.concurrency.work(lambda: self._generate_all(prompts, sampling))

    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """See `Generator.logps`."""
        return self.concurrency.work(lambda: self._score_all(completions))

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

    def _read(self, path: str, revision: str | None = None) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=self.dtype, use_safetensors=True, revision=revision
        )
        return model.to(self.device).eval()

    def _load_adapter(self, path: Path) -> None:
        if self._model is None:
            base = self._read(self.base, self.revision)
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

    def _generate_all(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        torch.manual_seed(sampling.seed)
        found: list[Completion] = []
        for part, samples in _portions(prompts, sampling.samples, self.concurrency.now):
            drawn = self._generate(part, replace(sampling, samples=len(samples)))
            found += [replace(c, sample=samples[c.sample]) for c in drawn]
        return found

    @torch.no_grad()
    def _score_all(self, completions: Sequence[Completion]) -> list[list[float]]:
        found: list[list[float]] = []
        size = min(16, self.concurrency.now)
        for start in range(0, len(completions), size):
            part = completions[start : start + size]
            batch = collate(
                [(c.prompt_token_ids, c.token_ids) for c in part], self.stop_ids[0], self.device
            )
            found += split_rows(token_logps(self.model, batch), batch)
        return found

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Step by step, all answers side by side; one that has ended leaves the batch."""
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), width), self.stop_ids[0], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = self._prefill(ids, mask, sampling.samples)
        last_B = ids[:, -1].repeat_interleave(sampling.samples, 0)
        mask = mask.repeat_interleave(sampling.samples, 0)
        stops = torch.tensor(self.stop_ids, device=self.device)
        rows = list(range(len(last_B)))
        sampled: list[list[int]] = [[] for _ in rows]
        logps: list[list[float]] = [[] for _ in rows]
        for _ in range(sampling.max_new_tokens):
            logits_BV = self.model(
                input_ids=last_B[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            last_B, drawn_logps_B = _draw(logits_BV.float(), sampling)
            for row, token, logp in zip(rows, last_B.tolist(), drawn_logps_B.tolist(), strict=True):
                sampled[row].append(token)
                logps[row].append(logp)
            going = (~torch.isin(last_B, stops)).nonzero().squeeze(1)
            if not len(going):
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                last_B, mask = last_B[going], mask[going]
                rows = [rows[i] for i in going.tolist()]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return [
            self._completion(prompt, row % sampling.samples, sampled[row], logps[row])
            for row, prompt in enumerate(p for p in prompts for _ in range(sampling.samples))
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
        ended = tokens[-1] in self.stop_ids
        reason: FinishReason = "stop" if ended else "length"
        said = tokens[:-1] if ended else tokens
        return Completion(
            prompt.prompt_id,
            sample,
            str(self.tokenizer.decode(said, skip_special_tokens=True)).strip(),
            tuple(tokens),
            prompt.token_ids,
            tuple(logps),
            reason,
            self._loaded.version,
        )


def _portions(
    prompts: Sequence[Prompt], samples: int, most: int
) -> Iterator[tuple[Sequence[Prompt], range]]:
    """Prompts with the samples of each that are drawn together: at most `most` sequences."""
    size = max(1, most // samples)
    for start in range(0, len(prompts), size):
        for first in range(0, samples, most):
            yield prompts[start : start + size], range(first, min(samples, first + most))


def _draw(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probs under the distribution they were drawn from, [B] each."""
    if sampling.greedy:
        logps_BV = logits_BV.log_softmax(-1)
        tokens_B = logps_BV.argmax(-1)
    else:
        kept_BV = keep_nucleus(
            logits_BV / sampling.temperature,
            logits_BV.new_full((len(logits_BV),), sampling.top_p),
        )
        logps_BV = kept_BV.log_softmax(-1)
        tokens_B = torch.multinomial(logps_BV.exp(), 1).squeeze(1)
    return tokens_B, logps_BV.gather(1, tokens_B[:, None]).squeeze(1)
