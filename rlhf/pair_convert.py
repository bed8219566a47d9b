"""Preferences from one format to another, and what the other one can't hold.

Formats are those of `rlhf.pair_formats`. What a file says beside prompt and answers (scores,
category, its own columns of plain type) goes along under its name here; whatever does not is named
in `Converted.lost`, with counts. Nothing is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl

from rlhf.errors import InputError
from rlhf.pair_formats import LABEL_META, PAIR_META, Format, Preferences
from rlhf.transcripts import answer_text, ends_in_turn, is_plain, survives, to_transcript

TARGETS: Final[tuple[Format, ...]] = (
    "explicit", "explicit-chat", "implicit", "implicit-chat", "sharegpt", "labels", "labels-chat",
)  # fmt: skip
_SHARED: Final = tuple(name for name in LABEL_META if name in PAIR_META)


@dataclass(frozen=True, slots=True)
class Converted:
    """The records of the new file, what of the old one they lack, and what else to know."""

    table: pl.DataFrame
    lost: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(preferences: Preferences, target: str) -> Converted:
    """Preferences in the format `target`, in their order.

    Pairs become labels as two rows, chosen (true) and rejected (false). Labels become pairs prompt
    by prompt: its first good answer with its first bad one, and so on; the rest is left over.

    Raises:
        InputError: `target` is no format that can be written, or no pair can be made of the labels.
    """
    if target not in TARGETS:
        raise InputError(
            f"--to must be one of {', '.join(TARGETS)}, got {target!r}"
            + (
                "; that format holds token ids, which exist only where a policy sampled"
                if target == "pairloop"
                else ""
            )
        )
    nested = ", ".join(preferences.records.untyped)
    lost = [f"columns of nested or mixed values: {nested}"] if nested else []
    lost += [f"column {name}" for name in preferences.unread]
    table = _whole(preferences)
    to_labels = target.startswith("labels")
    if preferences.paired and to_labels:
        table = _to_labels(table, lost)
        lost.append(f"which of {table.height} answers were compared with each other")
    elif not preferences.paired and not to_labels:
        table = _to_pairs(table, lost)
    answers = ("completion",) if to_labels else ("chosen", "rejected")
    return _written(table, target, answers, lost)


def _whole(preferences: Preferences) -> pl.DataFrame:
    """All columns side by side: ours without `where`, then the file's own of other names."""
    ours = preferences.table.drop("where")
    extras = preferences.extras
    own = [name for name in extras.columns if name not in ours.columns]
    return pl.concat([ours, extras.select(own)], how="horizontal")


def _to_labels(table: pl.DataFrame, lost: list[str]) -> pl.DataFrame:
    table = _without(table, ("completion", "label", "score", "source"), lost)
    kept = [name for name in table.columns if name not in ("chosen", "rejected", *PAIR_META)]
    shared = [name for name in _SHARED if name in table.columns]
    sides = [
        table.select(
            "prompt",
            pl.col(side).alias("completion"),
            pl.lit(side == "chosen").alias("label"),
            pl.col(f"score_{side}").alias("score"),
            pl.col(f"{side}_source").alias("source"),
            *shared,
            *(name for name in kept if name != "prompt"),
            pl.int_range(table.height).alias("_pair"),
        )
        for side in ("chosen", "rejected")
    ]
    return pl.concat(sides).sort("_pair", maintain_order=True).drop("_pair")


def _without(table: pl.DataFrame, names: Sequence[str], lost: list[str]) -> pl.DataFrame:
    """Less the file's own columns that have names of the other format's."""
    own = [name for name in names if name in table.columns]
    lost += [f"column {name}, which there means something else" for name in own]
    return table.drop(own)


def _to_pairs(table: pl.DataFrame, lost: list[str]) -> pl.DataFrame:
    sides = [f"{what}{side}" for side in ("chosen", "rejected") for what in ("", "score_")]
    table = _without(table, (*sides, "chosen_source", "rejected_source"), lost)
    # A prompt's n-th good answer goes with its n-th bad one.
    place = pl.int_range(pl.len()).over("prompt", "label")
    table = table.with_columns(_place=place).with_row_index("_row")
    good, bad = table.filter("label"), table.filter(~pl.col("label"))
    named = {"completion": "rejected", "score": "score_rejected", "source": "rejected_source"}
    beside = [
        name for name in table.columns
        if name not in (*named, "prompt", "label", "_place", "_row")
    ]  # fmt: skip
    other = bad.select(
        "prompt", "_place", *(pl.col(name).alias(new) for name, new in named.items()),
        *(pl.col(name).alias(f"_bad {name}") for name in beside),
    )  # fmt: skip
    pairs = good.join(other, on=["prompt", "_place"], how="inner", maintain_order="left")
    if pairs.is_empty():
        raise InputError("no prompt has both a good and a bad answer, so there is no pair to make")
    left = table.height - 2 * pairs.height
    if left:
        lost.append(f"{left} of {table.height} answers, whose prompt has none of the other label")
    for name in beside:
        differ = pairs.filter(pl.col(name).ne_missing(pl.col(f"_bad {name}"))).height
        if differ:
            lost.append(f"{name} of {differ} rejected answers, which is not their chosen one's")
    return (
        pairs.sort("_row")
        .rename({"completion": "chosen", "score": "score_chosen", "source": "chosen_source"})
        .drop("_row", "_place", "label", *(f"_bad {name}" for name in beside))
    )


def _written(
    table: pl.DataFrame, target: str, answers: tuple[str, ...], lost: list[str]
) -> Converted:
    own = {"prompt", "conversations", "label", *answers}
    unused = [
        name for name in table.columns
        if name not in own and (table.schema[name].is_nested() or table[name].null_count()
                                == table.height)
    ]  # fmt: skip
    lost += [f"column {name}" for name in unused if table[name].null_count() < table.height]
    carried = [name for name in table.columns if name not in (*own, *unused)]
    notes: list[str] = []
    if target.endswith("-chat"):
        parts = _chats(target, answers)
    elif target == "sharegpt":
        parts = _sharegpt(table, lost)
    else:
        parts = _texts(table, target, answers, lost, notes)
    label = ["label"] if "label" in table.columns else []
    return Converted(table.select(*parts, *label, *carried), tuple(lost), tuple(notes))


def _chats(target: str, answers: tuple[str, ...]) -> list[pl.Expr]:
    if target == "implicit-chat":
        return [pl.concat_list("prompt", name).alias(name) for name in answers]
    return [pl.col("prompt"), *map(pl.col, answers)]


def _sharegpt(table: pl.DataFrame, lost: list[str]) -> list[pl.Expr]:
    turn = pl.element().struct
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    renamed = pl.struct(
        turn.field("role").replace(names).alias("from"), turn.field("content").alias("value")
    )
    _count(table, [pl.col(n).list.len() > 1 for n in ("chosen", "rejected")], lost,
           "answers with several messages, joined")  # fmt: skip
    first = [
        pl.struct(
            pl.col(name).list.first().struct.field("role").replace(names).alias("from"),
            answer_text(name).alias("value"),
        ).alias(name)
        for name in ("chosen", "rejected")
    ]
    return [pl.col("prompt").list.eval(renamed).alias("conversations"), *first]


def _texts(
    table: pl.DataFrame, target: str, answers: tuple[str, ...], lost: list[str], notes: list[str]
) -> list[pl.Expr]:
    prompt = pl.col("prompt")
    content = prompt.list.first().struct.field("content")
    plain = is_plain(prompt) & ~ends_in_turn(content) & (target != "implicit")
    opened = to_transcript(prompt)
    marked = pl.any_horizontal(
        answer_text(name).str.contains(r"\n\nAssistant:") for name in answers
    )
    broken = ~plain & (~survives(prompt) | (prompt.list.len() == 0))
    if target == "implicit":
        broken |= marked
    _count(table, [broken], lost, "prompts whose turns the text no longer shows as they were")
    _count(table, [~plain & ~broken], notes,
           "prompts written as transcripts, which read back as the same messages")  # fmt: skip
    several = [
        (pl.col(name).list.len() > 1) | (pl.col(name).list.first().struct.field("role")
                                         != "assistant")
        for name in answers
    ]  # fmt: skip
    _count(table, several, lost, "answers with several messages or other roles, joined")
    if target == "implicit":
        return [(opened + " " + answer_text(name)).alias(name) for name in answers]
    written = pl.when(plain).then(content).otherwise(opened)
    return [
        written.alias("prompt"),
        *(
            pl.when(plain).then(answer_text(name)).otherwise(" " + answer_text(name)).alias(name)
            for name in answers
        ),
    ]


def _count(table: pl.DataFrame, which: list[pl.Expr], told: list[str], what: str) -> None:
    number = int(table.select(pl.sum_horizontal(w.sum() for w in which)).item())
    if number:
        told.append(f"{number} {what}")
