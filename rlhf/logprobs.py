"""Log-probs of sampled tokens under a model: completion positions only.

Shapes: S sequences, B rows, T padded length, N completion tokens of the whole batch, H hidden,
V vocabulary.

Two layouts give the same numbers. `collate` makes every sequence a row, padded on the right, so a
causal model needs no position ids and padding can't touch a real token. `collate_shared` gives all
completions of a prompt one copy of it and packs such segments into rows (`rlhf.packing`); it needs
a mask and position ids (`rlhf.attention`). Only hidden states that predict a completion token go
through the head, in chunks (`rlhf.head`) or, where the model's tail is not known, at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlhf.attention import Layout, Masking
from rlhf.head import Tail, scoring
from rlhf.packing import Segment, TokenPair, pack


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of prompts and completions, right-padded."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    at_N: Tensor
    """Index, among the B * T positions, of the one that predicts each completion token."""
    targets_N: Tensor
    sequences_N: Tensor
    """Sequence of each completion token; sequences are in the order given."""
    count: int
    """S."""
    layout: Layout | None = None
    """Of packed rows."""


def collate(sequences: Sequence[TokenPair], pad: int, device: torch.device | str) -> Batch:
    """A row for each (prompt ids, completion ids).

    Raises ValueError on an empty prompt or answer.
    """
    _check(sequences)
    length = max(len(p) + len(c) for p, c in sequences)
    ids = torch.full((len(sequences), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    at: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, :end] = 1
        at.extend(range(row * length + len(prompt) - 1, row * length + end - 1))
    return _batch(sequences, ids, mask, at, device)


def collate_shared(sequences: Sequence[TokenPair], pad: int, device: torch.device | str) -> Batch:
    """Packed rows, in which all completions of a prompt share it.

    Raises ValueError on an empty prompt or answer.
    """
    _check(sequences)
    rows = pack(sequences)
    length = max(sum(s.length for s in row) for row in rows)
    shape = (len(rows), length)
    ids = torch.full(shape, pad, dtype=torch.long)
    positions, branches = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1, dtype=torch.long)
    at: list[Sequence[int]] = [()] * len(sequences)
    for row, packed in enumerate(rows):
        start = 0
        for number, segment in enumerate(packed):
            part = slice(start, start + segment.length)
            tokens, places, branch = _written(segment)
            ids[row, part] = torch.tensor(tokens)
            positions[row, part] = torch.tensor(places)
            branches[row, part] = torch.tensor(branch)
            segments[row, part] = number
            at_row = row * length + start
            after = len(segment.prompt)
            for sequence, completion in segment.completions:
                more = len(completion) - 1
                first = at_row + len(segment.prompt) - 1
                at[sequence] = (first, *range(at_row + after, at_row + after + more))
                after += more
            start += segment.length
    layout = Layout(positions.to(device), segments.to(device), branches.to(device))
    flat = [index for indices in at for index in indices]
    return _batch(sequences, ids, segments >= 0, flat, device, layout)


def _written(segment: Segment) -> tuple[list[int], list[int], list[int]]:
    """(token ids, position ids, branches) of a segment."""
    start = len(segment.prompt)
    tokens, places, branches = list(segment.prompt), list(range(start)), [0] * start
    for number, (_, completion) in enumerate(segment.completions, start=1):
        more = len(completion) - 1
        tokens += completion[:more]
        places += range(start, start + more)
        branches += [number] * more
    return tokens, places, branches


def _check(sequences: Sequence[TokenPair]) -> None:
    if not all(prompt and completion for prompt, completion in sequences):
        raise ValueError("log-probs need at least one prompt token and one completion token")


def _batch(
    sequences: Sequence[TokenPair],
    ids: Tensor,
    mask: Tensor,
    at: list[int],
    device: torch.device | str,
    layout: Layout | None = None,
) -> Batch:
    counts = torch.tensor([len(c) for _, c in sequences])
    return Batch(
        ids.to(device),
        mask.to(device),
        torch.tensor(at, device=device),
        torch.tensor([t for _, c in sequences for t in c], device=device),
        torch.arange(len(sequences)).repeat_interleave(counts).to(device),
        len(sequences),
        layout,
    )


@dataclass(frozen=True, slots=True)
class Ways:
    """What a model can take; None is the plain way: padded rows, logits at once."""

    masking: Masking | None = None
    tail: Tail | None = None


PLAIN = Ways()


def token_logps(
    model: nn.Module, batch: Batch, unwrapped: nn.Module | None = None, ways: Ways = PLAIN
) -> Tensor:
    """Log-probs of the completion tokens, shape [N], float32 (float64 for a float64 model).

    `unwrapped` is the Transformers or PEFT model inside a DDP or DeepSpeed wrapper. A packed batch
    needs `ways.masking`.
    """
    inner: Any = unwrapped or model
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if batch.layout is None:
        inputs["attention_mask"] = batch.attention_mask_BT
    else:
        assert ways.masking is not None, "packed rows need a mask"
        inputs["attention_mask"] = ways.masking.build(batch.layout, _queries(inner))
        inputs["position_ids"] = batch.layout.position_ids_BT
    head = inner.get_output_embeddings()
    if ways.tail is not None:
        with scoring(head, batch.at_N, batch.targets_N, ways.tail) as found:
            model(**inputs)
            return found()
    with _only_at(head, batch.at_N):
        logits_NV: Tensor = model(**inputs).logits.squeeze(0)
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return -cross_entropy(logits_NV, batch.targets_N, reduction="none")


@contextmanager
def _only_at(head: nn.Module, at_N: Tensor) -> Iterator[None]:
    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH = args[0]
        return (hidden_BTH.flatten(0, -2)[at_N].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _queries(model: Any) -> torch.dtype:
    """The precision that attention computes in."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.dtype
    return dtype


def sequence_logps(tokens_N: Tensor, batch: Batch) -> Tensor:
    """Sums over each sequence's completion tokens, shape [S]."""
    return tokens_N.new_zeros(batch.count).index_add(0, batch.sequences_N, tokens_N)


def split_rows(tokens_N: Tensor, batch: Batch) -> list[list[float]]:
    """Token log-probs of each sequence, as lists."""
    counts = torch.bincount(batch.sequences_N, minlength=batch.count).tolist()
    return [part.tolist() for part in tokens_N.detach().cpu().split(counts)]
