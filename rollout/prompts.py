"""Prompt pools: three lists of prompts that share no source, read, checked and counted.

A pool comes from a JSONL or Parquet file, a Hugging Face data set, or a function. Every record is
checked before the first prompt is used, what is dropped is counted, and what can't be used is an
error that says where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import polars as pl

from rlhf.config_rollout import Prompts, PromptSource
from rlhf.duplicates import repeating
from rlhf.errors import InputError
from rlhf.types import Message, Prompt
from rollout.prompt_sources import cut, digest, named, read_pool, squeezed

Encode = Callable[[Sequence[Message]], list[int]]

SPLITS: Final = ("train", "gate", "final")
_SHOWN_OVERLAPS: Final = 5


@dataclass(frozen=True, slots=True)
class Pools:
    """The three pools, and per split how many prompts each step left.

    `counts[split]` has read, duplicates, near_duplicates (of a prompt that stands, in any split),
    too_long, limited (dropped by `limit`), kept, clusters.
    """

    train: tuple[Prompt, ...]
    gate: tuple[Prompt, ...]
    final: tuple[Prompt, ...]
    counts: dict[str, dict[str, int]]


def load_pools(config: Prompts, seed: int, encode: Encode | None) -> Pools:
    """Read, check and count the three pools.

    `encode` turns messages into the ids that the policy is given; without it (a dry run) prompts
    have no `token_ids` and none is too long. Within a pool, prompts with the same messages and
    context (whitespace aside) are one prompt; `limit` draws by `seed`, whatever the row order.

    Raises InputError where a source can't be read, records can't be used (the first ten are
    listed), a pool is empty, or two splits share a cluster, a prompt text or a prompt_id.
    """
    distinct: dict[str, list[Prompt]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        read = read_pool(config, split)
        distinct[split] = _without_duplicates(read)
        counts[split] = {"read": len(read), "duplicates": len(read) - len(distinct[split])}
    _check_apart(distinct)
    different = _without_near_duplicates(distinct, config.max_similarity, seed)
    kept: dict[str, tuple[Prompt, ...]] = {}
    for split in SPLITS:
        source: PromptSource = getattr(config, split)
        fitting = _fitting(different[split], config.max_tokens, encode)
        chosen = _draw(fitting, source.limit, seed)
        counts[split] |= {
            "near_duplicates": len(distinct[split]) - len(different[split]),
            "too_long": len(different[split]) - len(fitting),
            "limited": len(fitting) - len(chosen),
            "kept": len(chosen),
            "clusters": len({p.cluster for p in chosen}),
        }
        if not chosen:
            raise InputError(
                f"prompts.{split} must hold at least one prompt, but none of {named(source)} is "
                f"left: {counts[split]}; prompts.max_tokens is {config.max_tokens}"
            )
        kept[split] = tuple(chosen)
    return Pools(kept["train"], kept["gate"], kept["final"], counts)


def sample_round(
    prompts: Sequence[Prompt], round_index: int, per_round: int | None, seed: int
) -> list[Prompt]:
    """The prompts of round `round_index` (from 0): the next `per_round` of an endless sequence.

    The sequence is one seeded permutation of the pool after another, so every prompt comes once
    before any comes twice. Where a round spans the end of one permutation, prompts it already holds
    are moved behind the round in the next, so that none is in a round twice. `per_round` None, or
    no smaller than the pool, is the whole pool in a new order each round.

    The order depends on the prompts' ids, not on their rows.
    """
    assert round_index >= 0, round_index
    size = len(prompts)
    if per_round is None or per_round >= size:
        return _shuffled(prompts, seed, round_index)
    start = round_index * per_round
    epoch = _shuffled(prompts, seed, 0)
    for number in range(1, start // size + 1):
        epoch = _next_epoch(epoch, prompts, per_round, seed, number)
    at = start % size
    taken = epoch[at : at + per_round]
    missing = per_round - len(taken)
    if missing:
        taken += _next_epoch(epoch, prompts, per_round, seed, start // size + 1)[:missing]
    return taken


def prompt_table(prompts: Iterable[Prompt]) -> pl.DataFrame:
    """What a run keeps of its prompts: prompt_id, category, cluster, the conversation as text
    (`prompt`: "role: content" by turns), context and reference (null where there is none)."""
    rows = [
        (p.prompt_id, p.category, p.cluster, _conversation(p.messages), p.context, p.reference)
        for p in prompts
    ]
    columns = ("prompt_id", "category", "cluster", "prompt", "context", "reference")
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")


def _conversation(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _next_epoch(
    epoch: Sequence[Prompt], prompts: Sequence[Prompt], per_round: int, seed: int, number: int
) -> list[Prompt]:
    """Permutation `number`; the round that spans its beginning holds no prompt of it twice."""
    order = _shuffled(prompts, seed, number)
    begun = number * len(prompts) % per_round
    if not begun:
        return order
    held = {p.prompt_id for p in epoch[-begun:]}
    fresh = [p for p in order if p.prompt_id not in held][: per_round - begun]
    first = {p.prompt_id for p in fresh}
    return fresh + [p for p in order if p.prompt_id not in first]


def _shuffled(prompts: Sequence[Prompt], seed: int, number: int) -> list[Prompt]:
    return sorted(prompts, key=lambda p: digest(f"{seed}:{number}:{p.prompt_id}"))


def _text_key(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What the policy sees, whitespace aside."""
    return tuple((m["role"], squeezed(m["content"])) for m in prompt.messages)


def _without_duplicates(prompts: Sequence[Prompt]) -> list[Prompt]:
    first: dict[Any, Prompt] = {}
    for prompt in prompts:
        first.setdefault((_text_key(prompt), squeezed(prompt.context or "")), prompt)
    return list(first.values())


def _without_near_duplicates(
    pools: Mapping[str, Sequence[Prompt]], most: float | None, seed: int
) -> Mapping[str, Sequence[Prompt]]:
    """Pools without prompts that are more than `most` alike to one that stands, whichever's it is.

    What measures stands first. Both the turns (the system's aside) and the context must be alike:
    one question about two passages, or two about one, are different prompts.
    """
    if most is None:
        return pools
    ordered = [(split, p) for split in reversed(SPLITS) for p in pools[split]]
    turns = pl.Series([_asked(p) for _, p in ordered], dtype=pl.String)
    contexts = pl.Series([p.context or "" for _, p in ordered], dtype=pl.String)
    found = repeating([turns, contexts], most, seed)["kept"]
    kept: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
    for index, (stands_for, (split, prompt)) in enumerate(zip(found, ordered, strict=True)):
        if stands_for == index:
            kept[split].append(prompt)
    return kept


def _asked(prompt: Prompt) -> str:
    return "\n\n".join(m["content"] for m in prompt.messages if m["role"] != "system")


def _fitting(prompts: Sequence[Prompt], max_tokens: int, encode: Encode | None) -> list[Prompt]:
    if encode is None:
        return list(prompts)
    encoded = [replace(p, token_ids=tuple(encode(p.messages))) for p in prompts]
    return [p for p in encoded if len(p.token_ids) <= max_tokens]


def _draw(prompts: Sequence[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    """`limit` prompts in their order; dropping any other prompt does not change who is drawn."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    drawn = {p.prompt_id for p in _shuffled(prompts, seed, 0)[:limit]}
    return [p for p in prompts if p.prompt_id in drawn]


def _check_apart(pools: Mapping[str, Sequence[Prompt]]) -> None:
    """Gates and claims mean something only about prompts unlike those trained on."""
    _check_shared("clusters", _splits_by(pools, lambda p: p.cluster))
    _check_shared("prompt texts", _splits_by(pools, lambda p: _conversation(p.messages), _text_key))
    _check_shared("prompt_ids", _splits_by(pools, lambda p: p.prompt_id))


def _splits_by(
    pools: Mapping[str, Sequence[Prompt]],
    label: Callable[[Prompt], str],
    key: Callable[[Prompt], Any] | None = None,
) -> dict[Any, tuple[str, list[str]]]:
    found: dict[Any, tuple[str, list[str]]] = {}
    for split, prompts in pools.items():
        for prompt in prompts:
            splits = found.setdefault((key or label)(prompt), (label(prompt), []))[1]
            if split not in splits:
                splits.append(split)
    return found


def _check_shared(what: str, found: Mapping[Any, tuple[str, list[str]]]) -> None:
    shared = [(label, splits) for label, splits in found.values() if len(splits) > 1]
    if not shared:
        return
    shown = "; ".join(
        f"{cut(label)!r} in {' and '.join(splits)}" for label, splits in shared[:_SHOWN_OVERLAPS]
    )
    more = len(shared) - _SHOWN_OVERLAPS
    raise InputError(
        f"prompts.train, gate and final must share no {what}, but {len(shared)} stand in more than "
        f"one split: {shown}{f'; and {more} more' if more > 0 else ''}. Keep each in one split, "
        "or gates and claims would measure what was memorised."
    )
