"""Between text and messages, for whole columns at once: transcripts, and prompts cut off answers.

A transcript has turns that begin with a blank line and `Human:` or `Assistant:` and ends with an
open `Assistant:`, as in Anthropic's HH data; text before its first turn is the system message.
"""

from __future__ import annotations

import polars as pl

from rlhf.pair_files import MESSAGES

_TURN = r"(?:^|\n\n)(Human|Assistant): ?"
_OWN_TURN = r"(?:^|\n\n)(system|user|assistant): "
_ENDS_IN_TURN = r"\n\nAssistant:$|^Assistant:$"
# Characters that no text of people holds: record and unit separator.
_RECORD, _UNIT = "\x1e", "\x1f"


def prompt_text(column: str = "prompt") -> pl.Expr:
    """The text of a prompt's turns, without system messages: what tells prompts apart."""
    turn = pl.element().struct
    said = pl.element().filter(turn.field("role") != "system").struct.field("content")
    return pl.col(column).list.eval(said).list.join("\n\n")


def answer_text(column: str) -> pl.Expr:
    """The text of an answer's messages."""
    return pl.col(column).list.eval(pl.element().struct.field("content")).list.join("\n\n")


def message(text: pl.Expr, role: str) -> pl.Expr:
    """Text as a list with one message; null stays null."""
    made = pl.concat_list(pl.struct(role=pl.lit(role), content=text)).cast(MESSAGES)
    return pl.when(text.is_not_null()).then(made)


def from_run(text: pl.Expr) -> pl.Expr:
    """A prompt as a run's `pairs.parquet` writes it: one message, or marked with its roles."""
    marked = text.str.contains(r"^(?:system|user|assistant): ")
    return pl.when(marked).then(_turns(text, _OWN_TURN)).otherwise(message(text, "user"))


def ends_in_turn(text: pl.Expr) -> pl.Expr:
    """Whether text is a transcript."""
    return text.str.contains(_ENDS_IN_TURN)


def from_text(text: pl.Expr) -> pl.Expr:
    """A prompt's text as messages: a transcript's turns, or one of the user's."""
    turns = _turns(text, _TURN).list.eval(pl.element().filter(
        (pl.element().struct.field("content") != "")
        | (pl.element().struct.field("role") != "assistant")
    ))  # fmt: skip
    return pl.when(ends_in_turn(text)).then(turns).otherwise(message(text, "user"))


def _turns(text: pl.Expr, marker: str) -> pl.Expr:
    """Text with marked turns as messages; what stands before the first is a system message."""
    parts = text.str.replace_all(marker, f"{_RECORD}$1{_UNIT}").str.split(_RECORD)
    split = pl.element().str.split_exact(_UNIT, 1)
    role, content = split.struct.field("field_0"), split.struct.field("field_1")
    named = role.replace({"Human": "user", "Assistant": "assistant"})
    turn = pl.struct(
        role=pl.when(content.is_null()).then(pl.lit("system")).otherwise(named),
        content=pl.coalesce(content, role),
    )
    return parts.list.eval(pl.element().filter(pl.element() != "")).list.eval(turn)


def split_chats(table: pl.DataFrame) -> pl.DataFrame:
    """Leading messages that chosen and rejected share are the prompt; each keeps at least one."""
    least = pl.min_horizontal(pl.col("chosen").list.len(), pl.col("rejected").list.len())
    longest = table.select(least.max()).item() or 0
    same = [
        (pl.col("chosen").list.get(i, null_on_oob=True)
         == pl.col("rejected").list.get(i, null_on_oob=True)) & (i + 1 < least)
        for i in range(max(longest - 1, 0))
    ]  # fmt: skip
    running = [pl.all_horizontal(same[: i + 1]).cast(pl.UInt32) for i in range(len(same))]
    table = table.with_columns(shared=pl.sum_horizontal(running) if running else pl.lit(0))
    return table.select(
        pl.col("chosen").list.head(pl.col("shared")).alias("prompt"),
        *(pl.col(name).list.slice(pl.col("shared")) for name in ("chosen", "rejected")),
    )


def split_texts(table: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The prompt up to the last `Assistant:` where both share that, else their common beginning."""
    marked = r"(?s)^(.*\n\nAssistant:) ?(.*)$"
    sides = ("chosen", "rejected")
    table = table.select(sides).with_columns(
        pl.col(name).str.extract(marked, group).alias(f"{name}_{part}")
        for name in sides
        for group, part in ((1, "prompt"), (2, "answer"))
    )
    agree = pl.col("chosen_prompt") == pl.col("rejected_prompt")
    table = table.with_columns(agree.fill_null(False).alias("agree"), _shared_length(table))
    # As TRL's extract_prompt does it: a space before the difference belongs to the answers.
    space = pl.col("chosen").str.slice(pl.col("shared") - 1, 1) == " "
    same = pl.col("chosen") == pl.col("rejected")
    cut = pl.when(same | (pl.col("shared") == 0)).then(0).otherwise(pl.col("shared") - space)
    parts = table.with_columns(cut.cast(pl.Int64).alias("cut")).select(
        pl.when("agree")
        .then(from_text(pl.col("chosen_prompt")))
        .otherwise(message(pl.col("chosen").str.head(pl.col("cut")), "user"))
        .alias("prompt"),
        *(
            message(
                pl.when("agree").then(f"{name}_answer")
                .otherwise(pl.col(name).str.slice(pl.col("cut"))),
                "assistant",
            ).alias(name)
            for name in sides
        ),
    )  # fmt: skip
    unmarked = table.height - int(table["agree"].sum())
    note = f"prompt: the common beginning of chosen and rejected in {unmarked} records, which have "
    return parts, [f"{note}no shared turn markers"] if unmarked else []


def _shared_length(table: pl.DataFrame) -> pl.Series:
    """Characters that chosen and rejected begin with in common, by bisection over all rows."""
    sides = table.select("chosen", "rejected")
    least = pl.min_horizontal(pl.col("chosen", "rejected").str.len_chars()).cast(pl.Int64)
    sides = sides.with_columns(low=pl.lit(0, pl.Int64), high=least)
    for _ in range(int(sides["high"].max() or 0).bit_length()):  # type: ignore[arg-type]
        middle = (pl.col("low") + pl.col("high") + 1) // 2
        sides = sides.with_columns(middle=middle).with_columns(
            same=pl.col("chosen").str.head(pl.col("middle"))
            == pl.col("rejected").str.head(pl.col("middle"))
        )
        sides = sides.with_columns(
            low=pl.when("same").then("middle").otherwise("low"),
            high=pl.when("same").then("high").otherwise(
                pl.max_horizontal("low", pl.col("middle") - 1)
            ),
        )  # fmt: skip
    return sides["low"].alias("shared")


def to_transcript(chat: pl.Expr) -> pl.Expr:
    """Messages as a transcript that ends with an open turn of the assistant."""
    turn = pl.element().struct
    role, content = turn.field("role"), turn.field("content")
    name = role.replace({"user": "Human", "assistant": "Assistant", "system": "System"})
    opening = (pl.int_range(pl.len()) == 0) & (role == "system")
    said = pl.when(opening).then(content).otherwise(pl.format("\n\n{}: {}", name, content))
    return chat.list.eval(said).list.join("") + "\n\nAssistant:"


def is_plain(chat: pl.Expr) -> pl.Expr:
    """Whether messages are one of the user's, whose text alone is the prompt."""
    first = chat.list.first().struct
    return (chat.list.len() == 1) & (first.field("role") == "user")


def survives(chat: pl.Expr) -> pl.Expr:
    """Whether a transcript of these messages reads back as the same messages.

    Not so where other roles speak, a system message stands further down, an assistant's turn is
    empty, or a text holds what looks like a turn.
    """
    turn = pl.element().struct
    role, content = turn.field("role"), turn.field("content")
    place = pl.int_range(pl.len())
    known = role.is_in(["user", "assistant"]) | ((role == "system") & (place == 0))
    marked = content.str.contains(r"(?:^|\n\n)(?:Human|Assistant):|[\x1e\x1f]")
    empty = (content == "") & (role != "user")
    return chat.list.eval(known & ~marked & ~empty).list.all()
