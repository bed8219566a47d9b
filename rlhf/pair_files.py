"""Read a file of records as a table, strictly: a line that isn't what it should be is an error.

JSON is parsed by the standard library and typed here: a reader that guesses column types turns a
list in one line and a string in another into strings, and a broken character into none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import polars as pl

from rlhf.errors import InputError
from rlhf.files import atomic_file, finite_or_null, named, read_parquet, write_parquet

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".parquet")
MESSAGES: Final = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

# ShareGPT's names of the roles.
ROLES: Final = {"human": "user", "gpt": "assistant", "observation": "tool", "bot": "assistant"}


@dataclass(frozen=True, slots=True)
class Records:
    """A file's records. `table` has a row each, in order; its columns are scalars or `MESSAGES`."""

    path: Path
    table: pl.DataFrame
    where: pl.Series
    """Names each record: `file:line`, or `file record n` where it has no line of its own."""
    lines: pl.Series | None
    """The records as JSON text, None for Parquet."""
    untyped: Mapping[str, str]
    """Columns that `table` lacks, and why: nested values, or types that differ."""


def read_records(path: Path) -> Records:
    """The records of a JSONL, JSON or Parquet file.

    Raises:
        InputError: no such file, another kind of file, no records, or a malformed one (where).
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        inside = sorted(p.relative_to(path).as_posix() for p in path.glob("**/pairs.parquet"))
        holds = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise InputError(f"{path} must be a file, it is a folder{holds}")
    if not path.is_file():
        raise InputError(f"{path} must be a file of preferences, there is none")
    if suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}")
    records = _parquet(path) if suffix == ".parquet" else _json(path)
    if records.where.is_empty():
        raise InputError(f"{path} must hold at least one record, it holds none")
    return records


def write_records(path: Path, table: pl.DataFrame) -> None:
    """Write a table as JSONL, JSON (one array) or Parquet, as the suffix says; whole or not at all.

    Nulls of JSON records are left out, and what is no number; dates and decimals become text.

    Raises:
        InputError: the suffix says no format, or JSON can't hold a column.
    """
    suffix = check_target(path)
    if suffix == ".parquet":
        with named(path):
            write_parquet(table, path)
        return
    for name, dtype in table.schema.items():
        if dtype == pl.Binary:
            raise InputError(f"{path}: column {name} is binary, which JSON can't hold; drop it")
    rows = (finite_or_null(row) for row in table.iter_rows(named=True))
    lines = (
        json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False, default=str)
        for row in rows
    )
    write_lines(path, lines)


def write_lines(path: Path, lines: Iterator[str] | Sequence[str]) -> None:
    """Write JSON texts as the lines of a file, or as one array where it ends in .json."""
    with (
        named(path),
        atomic_file(path) as staging,
        staging.open("w", encoding="utf-8", newline="\n") as file,
    ):
        if check_target(path) == ".json":
            file.write("[\n" + ",\n".join(lines) + "\n]\n")
        else:
            file.writelines(f"{line}\n" for line in lines)


def check_target(path: Path) -> str:
    """The suffix of a file to write, in lower case.

    Raises:
        InputError: a suffix that says no format.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}")
    return suffix


def _parquet(path: Path) -> Records:
    try:
        table = read_parquet(path)
    except pl.exceptions.ComputeError as error:
        raise InputError(f"{path} must be a Parquet file: {error}") from None
    typed, untyped = [], {}
    for column in table.iter_columns():
        made = _parquet_column(column)
        if made is None:
            untyped[column.name] = f"it holds {column.dtype}"
        else:
            typed.append(made)
    where = [f"{path} record {number}" for number in range(1, table.height + 1)]
    return Records(path, pl.DataFrame(typed), pl.Series("where", where), None, untyped)


def _parquet_column(column: pl.Series) -> pl.Series | None:
    dtype = column.dtype
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return column.cast(pl.String)
    if not dtype.is_nested():
        return column
    if isinstance(dtype, pl.Struct):
        column, dtype = column.reshape((-1, 1)).arr.to_list(), pl.List(dtype)
    inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else None
    names = {f.name: f.dtype for f in inner.fields} if isinstance(inner, pl.Struct) else {}
    for role, content in (("role", "content"), ("from", "value")):
        if names.get(role) == pl.String and names.get(content) == pl.String:
            turn = pl.struct(
                pl.element().struct.field(role).replace(ROLES).alias("role"),
                pl.element().struct.field(content).alias("content"),
            )
            return column.to_frame().select(pl.col(column.name).list.eval(turn)).to_series()
    return None


def _json(path: Path) -> Records:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InputError(f"{path}:{line} must be UTF-8, got the byte {byte:#x}") from None
    array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    where, lines, records = _array(path, text) if array else _lines(path, text)
    table, untyped = _typed(records, where)
    named = pl.Series("where", where, dtype=pl.String)
    return Records(path, table, named, pl.Series("json", lines, dtype=pl.String), untyped)


def _lines(path: Path, text: str) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    where, lines, records = [], [], []
    # Not splitlines: text may hold other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where.append(f"{path}:{number}")
            lines.append(line.rstrip("\r"))
            records.append(_object(line, where[-1]))
    return where, lines, records


def _array(path: Path, text: str) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    values = _parse(text, lambda error: f"{path}:{error.lineno}")
    where = [f"{path} record {number}" for number in range(1, len(values) + 1)]
    records = [_mapping(value, at) for value, at in zip(values, where, strict=True)]
    return where, [json.dumps(record, ensure_ascii=False) for record in records], records


def _object(line: str, where: str) -> dict[str, Any]:
    return _mapping(_parse(line, lambda _: where), where)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object, got {kind(value)}")
    return value


def _parse(text: str, where: Callable[[json.JSONDecodeError], str]) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where(error)} must be JSON: {error.msg} at character {error.colno}; "
            "correct the record or take it out"
        ) from None
    except ValueError as error:
        first = json.JSONDecodeError("", text, 0)
        raise InputError(f"{where(first)} must be JSON: {error}") from None


def kind(value: Any) -> str:
    """A JSON value's kind, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def _typed(
    records: Sequence[Mapping[str, Any]], where: Sequence[str]
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Columns of one type each; those that have none, and why."""
    columns, untyped = [], {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record.get(name) for record in records]
        try:
            columns.append(_typed_column(name, values, where))
        except _Untyped as reason:
            untyped[name] = str(reason)
        except UnicodeEncodeError:
            at = where[next(i for i, value in enumerate(values) if _broken(value))]
            raise InputError(f"{at}: {name} must be text, it holds half a character") from None
    return pl.DataFrame(columns), untyped


def _typed_column(name: str, values: list[Any], where: Sequence[str]) -> pl.Series:
    """A column of text, truth values, numbers or chats; `_Untyped` for what is none of them."""
    first: dict[type, int] = {}
    for row, kind_of in enumerate(map(type, values)):
        first.setdefault(kind_of, row)
    first.pop(type(None), None)
    if first.keys() <= {str}:
        return pl.Series(name, values, dtype=pl.String)
    if first.keys() == {bool}:
        return pl.Series(name, values, dtype=pl.Boolean)
    if first.keys() == {int} and all(v is None or abs(v) < 2**63 for v in values):
        return pl.Series(name, values, dtype=pl.Int64)
    if first.keys() <= {int, float}:
        return pl.Series(name, values, dtype=pl.Float64)
    if first.keys() <= {list, dict}:
        turns = [_turns(value, at) for value, at in zip(values, where, strict=True)]
        return pl.Series(name, turns, dtype=MESSAGES)
    kinds = [f"{where[row]} has {kind(values[row])}" for row in sorted(first.values())]
    raise _Untyped(", ".join(kinds[:3]))


class _Untyped(Exception):
    """Why a column has no type of ours."""


def _turns(value: Any, where: str) -> list[dict[str, str]] | None:
    """A chat, or one message, with `role` and `content` in our words."""
    if value is None:
        return None
    turns = []
    for turn in [value] if isinstance(value, dict) else value:
        found = turn if isinstance(turn, dict) else {}
        role = found.get("role", found.get("from"))
        content = found.get("content", found.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise _Untyped(f"{where} has something else than messages with a role and text")
        turns.append({"role": ROLES.get(role, role), "content": content})
    return turns


def _broken(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
