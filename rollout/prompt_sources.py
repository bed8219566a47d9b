"""Where prompts come from: read a pool's records, check each, and say what can't be used.

Sources are JSONL and Parquet files, Hugging Face data sets and functions. A record has `prompt`
(plain text) or `messages` (a chat that ends with the user), and may have prompt_id, context,
reference, category, cluster and metadata; its other columns go to the metadata.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any, Final, NoReturn, TypeVar

import polars as pl

from rlhf.config_rollout import Prompts, PromptSource
from rlhf.errors import InputError
from rlhf.types import Message, Prompt
from rollout.imports import load_function

FIELDS: Final = (
    "prompt_id", "prompt", "messages", "context", "reference", "category", "cluster", "metadata",
)  # fmt: skip
ROLES: Final = ("system", "user", "assistant")
_SHOWN_RECORDS: Final = 10

T = TypeVar("T")


class _Problem(Exception):
    """Why a record can't be used."""


def digest(text: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def squeezed(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def cut(text: str, length: int = 160) -> str:
    """The text on one line, for a message."""
    line = squeezed(text)
    return line if len(line) <= length else f"{line[: length - 3]}..."


def read_pool(config: Prompts, split: str) -> list[Prompt]:
    """Every usable record of a split as a prompt; InputError where any can't be used."""
    source: PromptSource = getattr(config, split)
    _check_columns(source, split)
    prompts: list[Prompt] = []
    by_id: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    seen: set[str] = set()
    problems: list[str] = []
    for where, record in _records(source, split):
        try:
            if isinstance(record, _Problem):
                raise record
            fields, extra = _split_columns(record, source.columns)
            seen.update(str(name) for name in record)
            prompt, own_id = _prompt(fields, extra, config)
            first = by_id.setdefault(prompt.prompt_id, prompt)
            place = places.setdefault(prompt.prompt_id, where)
            if own_id and first != prompt:
                raise _Problem(
                    f"prompt_id {prompt.prompt_id!r} stands for something else at {place}"
                )
            prompts.append(prompt)
        except _Problem as problem:
            problems.append(f"{where}: {problem}")
    absent = sorted(set(source.columns.values()) - seen)
    if seen and absent:
        raise InputError(
            f"prompts.{split}.columns names {absent}, which no record of {named(source)} has; "
            f"it has {sorted(seen)}"
        )
    if problems:
        _refuse(split, problems)
    if not prompts:
        raise InputError(
            f"prompts.{split} must hold at least one prompt, but {named(source)} has no records"
        )
    return prompts


def _refuse(split: str, problems: Sequence[str]) -> NoReturn:
    more = len(problems) - _SHOWN_RECORDS
    raise InputError(
        f"prompts.{split}: {len(problems)} records can't be used\n"
        + "\n".join(f"  {problem}" for problem in problems[:_SHOWN_RECORDS])
        + (f"\n  and {more} more" if more > 0 else "")
        + "\nCorrect them or take them out."
    )


def _check_columns(source: PromptSource, split: str) -> None:
    for name in source.columns:
        if name not in FIELDS:
            near = get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"prompts.{split}.columns must map fields of a record ({', '.join(FIELDS)}), "
                f"got {name!r}{hint}"
            )


def _split_columns(
    record: Any, columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A raw record as its fields, None where absent, and the columns that are left over."""
    if not isinstance(record, Mapping):
        raise _Problem(f"must be an object, got {_kind(record)}")
    names = {name: columns.get(name, name) for name in FIELDS}
    # A field that reads from another column leaves a column of its own name to the metadata.
    fields = {name: record.get(column) for name, column in names.items()}
    used = set(names.values())
    return fields, {k: v for k, v in record.items() if k not in used}


def _prompt(
    fields: Mapping[str, Any], extra: Mapping[str, Any], config: Prompts
) -> tuple[Prompt, bool]:
    """A checked record as a prompt, and whether its id is the record's own."""
    context = _text(fields, "context")
    messages = _messages(fields, context, config)
    own_id = _text(fields, "prompt_id", label=True)
    prompt_id = own_id or digest(json.dumps([messages, context]))[:16]
    # Prompts about the same passage share a source, so they share a cluster.
    source = digest(squeezed(context))[:16] if context else prompt_id
    prompt = Prompt(
        prompt_id=prompt_id,
        messages=messages,
        context=context,
        reference=_text(fields, "reference"),
        category=_text(fields, "category", label=True) or "all",
        cluster=_text(fields, "cluster", label=True) or source,
        metadata=_metadata(fields["metadata"], extra),
    )
    return prompt, own_id is not None


def _messages(
    fields: Mapping[str, Any], context: str | None, config: Prompts
) -> tuple[Message, ...]:
    plain, chat = fields["prompt"], fields["messages"]
    if (plain is None) == (chat is None):
        rule = "must have prompt (plain text) or messages (a chat)"
        raise _Problem(f"{rule}, and has {'neither' if plain is None else 'both'}")
    if chat is not None:
        return _chat(chat)
    plain = _checked(plain, "prompt")
    used = {name for _, name, _, _ in Formatter().parse(config.template)}
    if context is None and "context" in used:
        raise _Problem("prompts.template uses {context}, and the record has none")
    asked = config.template.format(prompt=plain, context=context)
    system = (Message(role="system", content=config.system),) if config.system else ()
    return (*system, Message(role="user", content=asked))


def _chat(chat: Any) -> tuple[Message, ...]:
    if not isinstance(chat, list | tuple):
        raise _Problem(f"messages must be a list, got {_kind(chat)}")
    if not chat:
        raise _Problem("messages must not be empty")
    messages = tuple(_message(turn, f"messages[{index}]") for index, turn in enumerate(chat))
    if messages[-1]["role"] != "user":
        raise _Problem(f"the last message must be the user's, got {messages[-1]['role']!r}")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _Problem(f"{where} must be an object, got {_kind(turn)}")
    others = sorted(
        str(k) for k, v in turn.items() if k not in ("role", "content") and v is not None
    )
    if others:
        raise _Problem(f"{where} must have role and content alone, got also {others}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise _Problem(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}")
    return Message(role=role, content=_checked(content, f"{where}.content"))


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Problem(f"{name} must be text, got {_kind(value)}")
    if not value.strip():
        raise _Problem(f"{name} must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Problem(f"{name} must be valid Unicode: {error.reason}") from None
    return value


def _text(fields: Mapping[str, Any], name: str, *, label: bool = False) -> str | None:
    """An optional text; blank is absent. Labels (prompt_id, category, cluster) may be integers."""
    value = fields[name]
    if label and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _checked(value, name)


def _metadata(given: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise _Problem(f"metadata must be an object, got {_kind(given)}")
    twice = sorted(set(given or {}) & set(extra))
    if twice:
        raise _Problem(f"metadata and the record's own columns both have {twice}")
    return {**(given or {}), **extra}


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {cut(repr(value), 60)}"


def named(source: PromptSource) -> str:
    """The source as the configuration names it."""
    return source.path or source.dataset or source.function or ""


def _records(source: PromptSource, split: str) -> Iterator[tuple[str, Any]]:
    """Raw records with where they stand; a _Problem in the place of one that can't be read."""
    if source.path is not None:
        return _file_records(Path(source.path), split)
    if source.dataset is not None:
        return _numbered(f"{source.dataset} row", _dataset_rows(source, split))
    return _numbered(f"{source.function} record", _called(source, split))


def _numbered(name: str, rows: Iterable[T]) -> Iterator[tuple[str, T]]:
    return ((f"{name} {number}", row) for number, row in enumerate(rows, start=1))


def _file_records(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    field = f"prompts.{split}.path"
    if not path.is_file():
        raise InputError(f"{field} must be a file, and {path} is none (in {Path.cwd()})")
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    if path.suffix == ".parquet":
        try:
            table = pl.read_parquet(path, glob=False, hive_partitioning=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{field}: {path} is no readable Parquet file: {error}") from error
        return _numbered(f"{path} row", table.iter_rows(named=True))
    raise InputError(f"{field} must end in .jsonl, .ndjson or .parquet, got {path}")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            # Bytes are decoded line by line, so that a wrong one is reported with its line.
            record: Any
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text, parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:
                record = _Problem(f"invalid JSON: {error}")
            yield f"{path}:{number}", record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _dataset_rows(source: PromptSource, split: str) -> Iterable[Any]:
    """Rows of a Hugging Face data set: a folder written by `save_to_disk`, else `load_dataset`."""
    name, field = source.dataset or "", f"prompts.{split}.dataset"
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise InputError(f"{field} needs the package datasets: pip install datasets") from error
    folder = Path(name)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved and (source.config or source.revision):
        raise InputError(f"{field}: {name} is a saved data set, which has no config or revision")
    try:
        if not saved:
            return _iterable(
                datasets.load_dataset(
                    name, source.config, split=source.split, revision=source.revision
                ),
                field,
            )
        found = datasets.load_from_disk(name)
    # What the library raises for a missing set, split or file, or without a network, are all these.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{field}: {name} can't be loaded: {error}") from error
    if not isinstance(found, Mapping):
        return _iterable(found, field)
    if source.split not in found:
        raise InputError(
            f"prompts.{split}.split must be one of {sorted(found)} for {name}, got {source.split!r}"
        )
    return _iterable(found[source.split], field)


def _called(source: PromptSource, split: str) -> Iterable[Any]:
    """What the user's function returns for the split."""
    field = f"prompts.{split}.function"
    function = load_function(source.function or "", field)
    # The configuration's default names a data set's split; a function serves all three pools.
    wanted = source.split if "split" in source.model_fields_set else split
    # The function is the user's and may raise anything; the cause stays attached.
    try:
        return list(_iterable(function(wanted), field))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{field}: {source.function}({wanted!r}) raised {type(error).__name__}: {error}"
        ) from error


def _iterable(found: Any, field: str) -> Iterable[Any]:
    if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
        raise InputError(f"{field} must give records one by one, got {_kind(found)}")
    return found
