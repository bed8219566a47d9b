"""Preference files of any common format as one table: pairs, or labelled answers.

| format        | columns                                                                        |
|---------------|--------------------------------------------------------------------------------|
| pairloop      | a run's `pairs.parquet`                                                        |
| explicit      | prompt, chosen, rejected: text (TRL "standard")                                |
| explicit-chat | the same as lists of messages (TRL "conversational"); prompt may be text       |
| implicit      | chosen, rejected: text that begins with the prompt                             |
| implicit-chat | chosen, rejected: messages that begin with the prompt's                        |
| sharegpt      | conversations, chosen, rejected: `from` and `value`                            |
| labels        | prompt, completion: text; label: true or false (TRL "unpaired preference")     |
| labels-chat   | the same as lists of messages; or messages and label                           |

Text that ends in `Assistant:` is read as a transcript of turns (`rlhf.transcripts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final, Literal, get_args

import polars as pl

from rlhf.errors import InputError
from rlhf.pair_files import MESSAGES, Records, read_records
from rlhf.transcripts import (
    ends_in_turn,
    from_run,
    from_text,
    message,
    split_chats,
    split_texts,
)

Format = Literal[
    "pairloop", "explicit", "explicit-chat", "implicit", "implicit-chat",
    "sharegpt", "labels", "labels-chat",
]  # fmt: skip
FORMATS: Final[tuple[Format, ...]] = get_args(Format)

TEXTS: Final = ("prompt_id", "category", "principle", "cluster", "split")
_PAIR_SCORES: Final = {
    side: tuple(name.format(side) for name in (
        "score_{}", "reward_{}", "{}_score", "{}_rating", "{}-rating", "rating_{}",
    ))
    for side in ("chosen", "rejected")
}  # fmt: skip
_META: Final[dict[str, tuple[str, ...]]] = {
    **{name: (name,) for name in TEXTS},
    "chosen_source": ("chosen_source", "source_chosen"),
    "rejected_source": ("rejected_source", "source_rejected"),
    "source": ("source",),
    **{f"score_{side}": names for side, names in _PAIR_SCORES.items()},
    "score": ("score", "reward"),
}
NUMBERS: Final = ("score_chosen", "score_rejected", "score")
PAIR_META: Final = tuple(name for name in _META if name != "score")
LABEL_META: Final = (*TEXTS, "source", "score")
_PARTS: Final = (
    "prompt", "chosen", "rejected", "conversations", "completion", "messages", "label",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preferences:
    """A preference file, in one shape.

    `table` has `where`, `prompt` and, as pairs, `chosen`, `rejected` and `PAIR_META`, or, as
    labels, `completion`, `label` and `LABEL_META`. Prompts and answers have the type `MESSAGES`;
    what the file lacks is null. `extras` are its other columns of plain type, row by row; `unread`
    are columns that another format would have read.
    """

    records: Records
    format: Format
    table: pl.DataFrame
    extras: pl.DataFrame
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def paired(self) -> bool:
        """Whether these are pairs; else labelled answers."""
        return "chosen" in self.table.columns

    @property
    def answers(self) -> tuple[str, ...]:
        """The columns that hold answers."""
        return ("chosen", "rejected") if self.paired else ("completion",)


def read_preferences(
    path: Path, format: str | None = None, columns: Mapping[str, str] | None = None
) -> Preferences:
    """Read a preference file; `format` says what it is, else its columns and their types do.

    `columns` maps a name of ours (prompt, chosen, score_chosen, category, ...) to the file's.

    Raises:
        InputError: the file can't be read, is no preference file or not of that format, or a
            record lacks its prompt or an answer (says where).
    """
    records = read_records(path)
    table = _renamed(records, columns or {})
    found = _detect(records, table)
    if format is not None:
        found = _asked(format, found, table, records)
    read = _read(found, table)
    for name in read:
        if name != "label" and table.schema[name] not in (pl.String, MESSAGES):
            raise InputError(
                f"{records.path}: {name} must be text, or messages with a role and text, in every "
                f"record; it is {table.schema[name]}"
            )
    parts, notes = _parts(found, table, records)
    _check_complete(parts, records)
    paired = "chosen" in parts.columns
    meta, used = _meta(table, PAIR_META if paired else LABEL_META, records)
    extras = table.drop(*used, *(p for p in _PARTS if p in table.columns))
    whole = pl.concat([records.where.to_frame(), parts, meta], how="horizontal")
    # Of a prompt that is not read there is a note.
    unread = (p for p in _PARTS if p in table.columns and p not in (*read, "prompt"))
    return Preferences(records, found, whole, extras, tuple(notes), tuple(unread))


def _read(format: Format, table: pl.DataFrame) -> tuple[str, ...]:
    """The columns that make prompt and answers."""
    if format == "sharegpt":
        return "conversations", "chosen", "rejected"
    if format in ("implicit", "implicit-chat"):
        return "chosen", "rejected"
    if format in ("labels", "labels-chat"):
        known = (("completion", "prompt"), ("messages",), ("conversations",))
        names = next(names for names in known if names[0] in table.columns)
        return (*(name for name in names if name in table.columns), "label")
    return "prompt", "chosen", "rejected"


def _renamed(records: Records, columns: Mapping[str, str]) -> pl.DataFrame:
    table, known = records.table, (*_PARTS, *_META)
    for name, column in columns.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"--column must name one of {', '.join(known)}, got {name!r}{hint}")
        if column not in table.columns:
            why = records.untyped.get(column)
            raise InputError(
                f"--column {name}={column}: {records.path} has no such column of plain type"
                f"{f' ({why})' if why else ''}; it has {', '.join(table.columns)}"
            )
        if name != column:
            table = table.drop(name, strict=False).rename({column: name})
    return table


def _detect(records: Records, table: pl.DataFrame) -> Format:
    has, schema = set(table.columns), table.schema
    for name in _PARTS:
        if name in records.untyped and name not in has:
            raise InputError(
                f"{records.path}: {name} must be text, or messages with a role and text, in every "
                f"record; {records.untyped[name]}"
            )
    if {"chosen", "rejected"} <= has:
        chats = [schema[name] == MESSAGES for name in ("chosen", "rejected")]
        if chats[0] != chats[1]:
            raise InputError(f"{records.path}: chosen and rejected must both be text or messages")
        if schema.get("conversations") == MESSAGES:
            return "sharegpt"
        if {"prompt", "margin", "chosen_sample", "reward_chosen"} <= has:
            return "pairloop"
        if "prompt" not in has:
            return "implicit-chat" if chats[0] else "implicit"
        if chats[0] and schema["prompt"] == pl.String and _begins_with_user(table):
            return "implicit-chat"
        return "explicit-chat" if MESSAGES in (schema["prompt"], schema["chosen"]) else "explicit"
    if "label" in has and has & {"completion", "messages", "conversations"}:
        text = schema.get("completion") == pl.String and schema.get("prompt") == pl.String
        return "labels" if text else "labels-chat"
    raise InputError(
        f"{records.path} must hold chosen and rejected, or prompt, completion and label; it has "
        f"{', '.join(table.columns)}. Name columns with --column, as in --column chosen=answer_1"
    )


def _asked(format: str, found: Format, table: pl.DataFrame, records: Records) -> Format:
    """The format that was asked for, if the file can be read so."""
    asked = next((name for name in FORMATS if name == format), None)
    if asked is None:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    alike = [{"pairloop", "explicit", "implicit"}, {"explicit-chat", "implicit-chat"}]
    fits = asked == found or any({asked, found} <= group for group in alike)
    if not fits or (asked not in ("implicit", "implicit-chat") and "prompt" not in table.columns
                    and "prompt" in _needs(asked)):  # fmt: skip
        raise InputError(f"--format {asked}: {records.path} has the columns of {found}")
    return asked


def _needs(format: Format) -> tuple[str, ...]:
    return ("prompt", "chosen", "rejected") if format.startswith(("explicit", "pairl")) else ()


def _begins_with_user(table: pl.DataFrame) -> bool:
    roles = pl.col("chosen").list.first().struct.field("role")
    return bool(table.select(roles.is_in(["user", "system"]).all()).item())


def _parts(format: Format, table: pl.DataFrame, records: Records) -> tuple[pl.DataFrame, list[str]]:
    """Prompt and answers as `MESSAGES`, and what a user should know about the reading."""
    if format == "sharegpt":
        return table.select(pl.col("conversations").alias("prompt"), *_chats(table)), []
    if format == "implicit-chat":
        ignored = ["prompt: not read, chosen and rejected hold it"] if "prompt" in table else []
        return split_chats(table), ignored
    if format == "implicit":
        return split_texts(table)
    if format in ("labels", "labels-chat"):
        return _labelled(table, records), []
    if format == "pairloop":
        return table.select(from_run(pl.col("prompt")).alias("prompt"), *_chats(table)), []
    return _explicit(table), []


def _explicit(table: pl.DataFrame) -> pl.DataFrame:
    if table.schema["prompt"] == MESSAGES:
        return table.select("prompt", *_chats(table))
    transcript = ends_in_turn(pl.col("prompt"))
    # The space after "Assistant:" belongs to the transcript.
    answers = [
        pl.when(transcript).then(message(pl.col(name).str.strip_prefix(" "), "assistant"))
        .otherwise(message(pl.col(name), "assistant")).alias(name)
        if table.schema[name] == pl.String else pl.col(name)
        for name in ("chosen", "rejected")
    ]  # fmt: skip
    return table.select(from_text(pl.col("prompt")).alias("prompt"), *answers)


def _chats(table: pl.DataFrame) -> list[pl.Expr]:
    """Chosen and rejected as messages, whatever they are."""
    return [
        pl.col(name)
        if table.schema[name] == MESSAGES
        else message(pl.col(name), "assistant").alias(name)
        for name in ("chosen", "rejected")
    ]


def _labelled(table: pl.DataFrame, records: Records) -> pl.DataFrame:
    label = table["label"]
    if label.dtype.is_integer() and set(label.unique()) <= {0, 1, None}:
        label = label.cast(pl.Boolean)
    if label.dtype != pl.Boolean:
        values = ", ".join(map(str, label.unique(maintain_order=True).head(3)))
        raise InputError(f"{records.path}: label must be true or false, got {values}")
    chat = next((n for n in ("messages", "conversations") if table.schema.get(n) == MESSAGES), None)
    if "completion" not in table.columns and chat is not None:
        answered = pl.col(chat).list.last().struct.field("role") == "assistant"
        last = pl.when(answered).then(pl.col(chat).list.tail(1))
        return table.select(
            pl.col(chat).list.head(pl.col(chat).list.len().cast(pl.Int64) - 1).alias("prompt"),
            last.alias("completion"),
            label.alias("label"),
        )
    if "completion" not in table.columns:
        raise InputError(
            f"{records.path}: messages and conversations must be lists of messages with a role and "
            "text where there is no completion"
        )
    if "prompt" not in table.columns:
        raise InputError(f"{records.path}: labelled completions need a prompt, there is no column")
    transcript = pl.lit(False)
    if table.schema["prompt"] == pl.String:
        transcript = ends_in_turn(pl.col("prompt"))
    answer = pl.col("completion")
    if table.schema["completion"] == pl.String:
        stripped = answer.str.strip_prefix(" ")
        answer = message(pl.when(transcript).then(stripped).otherwise(answer), "assistant")
    prompt = pl.col("prompt")
    if table.schema["prompt"] == pl.String:
        prompt = from_text(prompt)
    return table.select(prompt.alias("prompt"), answer.alias("completion"), label.alias("label"))


def _check_complete(parts: pl.DataFrame, records: Records) -> None:
    for name in parts.columns:
        absent = pl.col(name).is_null()
        if name in ("chosen", "rejected", "completion"):
            absent |= pl.col(name).list.len() == 0
        rows = parts.with_row_index("row").filter(absent)["row"]
        if rows.len():
            more = f", and so do {rows.len() - 1} more records" if rows.len() > 1 else ""
            what = "an assistant's answer" if name == "completion" else name
            raise InputError(
                f"{records.where[rows[0]]} must have {what}, it has none{more}; "
                "correct them or take them out"
            )


def _meta(
    table: pl.DataFrame, names: tuple[str, ...], records: Records
) -> tuple[pl.DataFrame, list[str]]:
    """Columns `names` under our names, null where the file has none, and the columns used."""
    columns, used = [], []
    for name in names:
        dtype = pl.Float64 if name in NUMBERS else pl.String
        source = next((alias for alias in _META[name] if alias in table.columns), None)
        if source is None:
            columns.append(pl.lit(None, dtype).alias(name))
            continue
        if table.schema[source].is_nested():
            raise InputError(f"{records.path}: {source} must be a plain value in every record")
        given = table[source].null_count() < table.height
        if dtype == pl.Float64 and given and not table.schema[source].is_numeric():
            raise InputError(
                f"{records.path}: {source} must be a number in every record, it is "
                f"{table.schema[source]}"
            )
        used.append(source)
        value = pl.col(source).cast(dtype)
        columns.append((value.fill_nan(None) if name in NUMBERS else value).alias(name))
    height = pl.int_range(table.height).alias("_row")
    return table.select(height, *columns).drop("_row"), used
