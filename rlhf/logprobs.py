"""Log-probs of sampled tokens under a model: completion positions only.

Shapes: B sequences, T padded length, N completion tokens of the whole batch, V vocabulary.

Sequences are padded on the right, so a causal model needs no position ids and padding can't touch
a real token. Only hidden states that predict a completion token go through the head: a
pre-forward hook on the head picks them, which works alike under PEFT, DDP and ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Tokens = Sequence[int]
TokenPair = tuple[Tokens, Tokens]
"""Prompt ids and completion ids."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompt + completion rows, right-padded."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    predicts_BT: Tensor
    """True where the next token is a completion token."""
    targets_N: Tensor
    rows_N: Tensor
    """Row of each completion token."""


def collate(sequences: Sequence[TokenPair], pad: int, device: torch.device | str) -> Batch:
    """A batch from (prompt ids, completion ids). Raises ValueError on an empty prompt or answer."""
    length = max(len(p) + len(c) for p, c in sequences)
    ids = torch.full((len(sequences), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    targets: list[int] = []
    rows: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        if not prompt or not completion:
            raise ValueError("log-probs need at least one prompt token and one completion token")
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, :end] = 1
        predicts[row, len(prompt) - 1 : end - 1] = True
        targets.extend(completion)
        rows.extend([row] * len(completion))
    return Batch(
        ids.to(device),
        mask.to(device),
        predicts.to(device),
        torch.tensor(targets, device=device),
        torch.tensor(rows, device=device),
    )


@contextmanager
def _head_only_at(model: nn.Module, positions_BT: Tensor) -> Iterator[None]:
    head = model.get_output_embeddings()  # type: ignore[operator]

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH = args[0]
        return (hidden_BTH[positions_BT].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def token_logps(model: nn.Module, batch: Batch, unwrapped: nn.Module | None = None) -> Tensor:
    """Log-probs of the completion tokens, shape [N], float32 (float64 for a float64 model).

    `unwrapped` is the Transformers or PEFT model inside a DDP or DeepSpeed wrapper.
    """
    with _head_only_at(unwrapped or model, batch.predicts_BT):
        logits_1NV = model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).logits
    logits_NV = logits_1NV.squeeze(0)
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return -cross_entropy(logits_NV, batch.targets_N, reduction="none")


def sequence_logps(tokens_N: Tensor, batch: Batch) -> Tensor:
    """Sums over each row's completion tokens, shape [B]."""
    sums_B = tokens_N.new_zeros(batch.input_ids_BT.shape[0])
    return sums_B.index_add(0, batch.rows_N, tokens_N)


def split_rows(tokens_N: Tensor, batch: Batch) -> list[list[float]]:
    """Token log-probs of each row, as lists."""
    counts = torch.bincount(batch.rows_N, minlength=batch.input_ids_BT.shape[0]).tolist()
    return [part.tolist() for part in tokens_N.detach().cpu().split(counts)]
