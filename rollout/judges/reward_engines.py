"""What computes a reward model's raw scores: Transformers, or vLLM's pooling runner.

A checkpoint is checked before its weights are read: its outputs, its tokenizer, and where it pools.
Transformers' decoders pool at the last token that is not padding, vLLM at the last token; they
agree only where no text ends in the pad token, and one that does is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rlhf.config_judges import RewardModelSpec
from rlhf.errors import InputError
from rlhf.types import Message
from rollout.concurrency import Concurrency
from rollout.judges.fence import harmless
from rollout.vllm_engine import InProcessEngine, require_vllm

Rows = Sequence[Sequence[int]]
"""Token ids, one row a text."""

_TOKENS_AT_ONCE = 16_384
_SMALLEST_VOCABULARY = 0.9
"""Embeddings are padded by a few per cent; a tokenizer much smaller belongs to another model."""


class RewardEngine(Protocol):
    """Computes raw scores, fp32 on the outside. Deterministic for the same rows."""

    beside: bool
    """Whether the work is done elsewhere."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Read the weights. Raises InputError where they are not all there."""
        ...

    def raw(self, rows: Rows) -> list[tuple[float, ...]]:
        """One number an output for each row, no activation applied."""
        ...

    def sleep(self) -> None:
        """Give the device back until the next `raw`."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A reward model's config and tokenizer, found to fit each other."""

    path: str
    revision: str | None
    pad_id: int
    capped: bool
    """Attention scores are soft-capped (Gemma 2), which only eager attention does."""
    tokenizer: Any

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with the answer, chat template applied. Tokens of
        the template that stand in the text are broken up: an answer can't end its own turn."""
        turns = [{"role": m["role"], "content": harmless(m["content"])} for m in messages]
        encoded: Any = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])


def read_checkpoint(spec: RewardModelSpec, field: str) -> Checkpoint:
    """Config and tokenizer, without weights. Raises InputError where they can't score."""
    from transformers import AutoConfig, AutoTokenizer

    found: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
    try:
        config: Any = AutoConfig.from_pretrained(spec.model, **found)
        tokenizer: Any = AutoTokenizer.from_pretrained(spec.model, **found)
    # What a config names decides which class reads it, and each raises its own.
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{field}.model: {spec.model} can't be loaded: {error}") from None
    named = (config.architectures or ["no architecture"])[0]
    if not named.endswith("ForSequenceClassification"):
        raise InputError(
            f"{field}.model must be a model for sequence classification, {spec.model} is {named}: "
            "it has no trained head that gives a score"
        )
    if config.num_labels != len(spec.dimensions):
        raise InputError(
            f"{field}.dimensions must name one dimension an output: {spec.model} has "
            f"{config.num_labels} outputs, and {len(spec.dimensions)} are named {spec.dimensions}"
        )
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and spec.engine.max_length > longest:
        raise InputError(
            f"{field}.engine.max_length must be at most {longest}, the positions that {spec.model} "
            f"knows, got {spec.engine.max_length}"
        )
    _check_tokenizer(tokenizer, text, spec, field)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return Checkpoint(spec.model, spec.revision, int(text.pad_token_id), capped, tokenizer)


def _check_tokenizer(tokenizer: Any, config: Any, spec: RewardModelSpec, field: str) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            f"{field}.model: the tokenizer of {spec.model} has no chat template, so it is not "
            "known how an answer was shown in training; put its chat_template.jinja beside it"
        )
    words, rows = len(tokenizer), config.vocab_size
    if not _SMALLEST_VOCABULARY * rows <= words <= rows:
        raise InputError(
            f"{field}.model: tokenizer and weights of {spec.model} belong to different models: "
            f"{words} tokens for {rows} embeddings"
        )
    if config.pad_token_id is None or config.pad_token_id != tokenizer.pad_token_id:
        raise InputError(
            f"{field}.model: config and tokenizer of {spec.model} must name one pad token, found "
            f"{config.pad_token_id} and {tokenizer.pad_token_id}: the last token that is not "
            "padding is where it pools; set pad_token_id in its config.json"
        )


def check_probe(ids: Sequence[int], checkpoint: Checkpoint, field: str) -> None:
    """See that plain English, encoded, has no unknown token and does not end in the pad token.

    Raises InputError.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer.unk_token_id in ids and tokenizer.unk_token_id != checkpoint.pad_id:
        raise InputError(
            f"{field}.model: the tokenizer of {checkpoint.path} does not know plain English words; "
            "it belongs to another model"
        )
    if ids[-1] == checkpoint.pad_id:
        token = tokenizer.convert_ids_to_tokens(checkpoint.pad_id)
        raise InputError(
            f"{field}.model: every text ends in {token!r}, which is also the pad token of "
            f"{checkpoint.path}: Transformers would score the token before it, vLLM the token "
            "itself; give tokenizer and config.json a pad token that ends no text"
        )


class TransformersEngine:
    """The model in this process, weights in `engine.precision`, its head in fp32.

    A head in bf16 gives scores in steps of 1/32 at 5, and would tie what the model tells apart.
    """

    beside = False

    def __init__(self, spec: RewardModelSpec, device: str) -> None:
        self._spec = spec
        self.concurrency = Concurrency(spec.engine.max_concurrency, f"the engine of {spec.name}")
        self._device = device
        self._pad_id = 0
        self._model: Any = None

    def load(self, checkpoint: Checkpoint) -> None:
        """See `RewardEngine.load`."""
        import torch
        from transformers import AutoModelForSequenceClassification

        from rlhf.policy import DTYPES

        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"attn_implementation": "eager"} if checkpoint.capped else {}
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                checkpoint.path,
                revision=checkpoint.revision,
                dtype=DTYPES[self._spec.engine.precision],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the reward model {checkpoint.path} can't be loaded: {error}"
            ) from None
        if missing := sorted(loading["missing_keys"]):
            raise InputError(
                f"the reward model {checkpoint.path} lacks {', '.join(missing[:3])}: its scores "
                "would be random; take a checkpoint with a trained head"
            )
        for module in model.children():
            if isinstance(module, torch.nn.Linear):
                module.float()
                module.register_forward_pre_hook(lambda _, given: (given[0].float(),))
        self._pad_id = checkpoint.pad_id
        self._model = model.to(self._device).eval()

    def raw(self, rows: Rows) -> list[tuple[float, ...]]:
        """See `RewardEngine.raw`. Longest first, so that a batch is padded little."""
        self._model.to(self._device)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, tuple[float, ...]] = {}
        while len(found) < len(order):
            rest = order[len(found) :]
            found |= self.concurrency.work(partial(self._first, rows, rest))
        return [found[index] for index in range(len(rows))]

    def _first(self, rows: Rows, order: Sequence[int]) -> dict[int, tuple[float, ...]]:
        """Scores of as many as are worked on at once."""
        import torch

        width = len(rows[order[0]])
        batch = order[: min(self.concurrency.now, max(1, _TOKENS_AT_ONCE // width))]
        padded = [[*rows[i], *[self._pad_id] * (width - len(rows[i]))] for i in batch]
        mask = [[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch]
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
            ).logits
        return {i: tuple(row) for i, row in zip(batch, logits.float().tolist(), strict=True)}

    def sleep(self) -> None:
        """See `RewardEngine.sleep`."""
        if self._model is not None and self._device == "cuda":
            import torch

            self._model.to("cpu")
            torch.cuda.empty_cache()

    def close(self) -> None:
        """See `RewardEngine.close`."""
        self._model = None


class VllmEngine:
    """vLLM's pooling runner in this process."""

    beside = False

    def __init__(self, spec: RewardModelSpec, field: str, device: str) -> None:
        require_vllm(field, "transformers")
        self._engine = InProcessEngine.of_judge(spec.engine, field, device)

    @property
    def concurrency(self) -> Concurrency:
        """How many rows it works on at once."""
        return self._engine.concurrency

    def load(self, checkpoint: Checkpoint) -> None:
        """See `RewardEngine.load`. vLLM refuses weights that are not all there by itself."""
        self._engine.start(checkpoint.path, runner="pooling", revision=checkpoint.revision)

    def raw(self, rows: Rows) -> list[tuple[float, ...]]:
        """See `RewardEngine.raw`. Unless told not to, vLLM applies a sigmoid."""
        from vllm import PoolingParams, TokensPrompt

        self._engine.wake()
        outputs: list[Any] = self._engine.ask(
            lambda llm: llm.encode(
                [TokensPrompt(prompt_token_ids=list(row)) for row in rows],
                PoolingParams(use_activation=False),
                pooling_task="classify",
                use_tqdm=False,
            )
        )
        return [tuple(output.outputs.data.float().tolist()) for output in outputs]

    def sleep(self) -> None:
        """See `RewardEngine.sleep`."""
        self._engine.sleep()

    def close(self) -> None:
        """See `RewardEngine.close`."""
        self._engine.close()


def folder_of(model: str) -> Path | None:
    """The model's own folder on this machine; None for a hub id."""
    return Path(model) if Path(model).is_dir() else None
