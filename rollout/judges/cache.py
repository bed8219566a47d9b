"""Verdicts already given, in SQLite, so that no model is asked the same twice.

A key is the SHA-256 of everything that can change a verdict: judge, back end, model and its
weights, precision, and the call, which holds rubric and its wording, schema, decoding, order,
context, prompt and completion; and which repeat of it is meant. What measures a judge (calibration,
retest, canaries) asks anew, within `unread`.

Write-ahead logging lets processes share a file, and one that is killed leaves it whole; like any
SQLite file it belongs on a local disk.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from rlhf.errors import InputError
from rlhf.files import make_folder, sha256_file
from rollout.imports import resolve_path
from rollout.judges.backends import Answer, Backend, Call, Keep, Token

FILE = "verdicts.sqlite"
"""In a run's folder `judges`, unless judges.cache names another."""

_FORMAT = 1
_SECONDS_FOR_A_LOCK = 60
_SECONDS_BETWEEN_WRITES = 1.0
_KEYS_AT_ONCE = 500
_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, model TEXT NOT NULL, made REAL NOT NULL,
    value BLOB NOT NULL
) WITHOUT ROWID"""


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON-able parts.

    >>> key_of("reader", {"model": "a"}, 0) == key_of("reader", {"model": "a"}, 1)
    False
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What of a folder says how a text is read and answered."""


def weights_of(model: str, revision: str | None) -> str | None:
    """What tells a model from others of its name: the SHA-256 of a local file, or of a folder's
    weights, config and tokenizer; the commit of a hub id that is on this machine; None where that
    can't be known. Raises InputError for a folder without safetensors."""
    path = resolve_path(model)
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise InputError(
                f"{path} must hold weights as *.safetensors, found none: they could be replaced "
                "unnoticed; convert them"
            )
        parts = sorted(p for pattern in _OF_A_MODEL for p in path.glob(pattern))
        return key_of(*((p.name, sha256_file(p)) for p in parts))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


class Entry(NamedTuple):
    """One verdict to keep; `value` is JSON-able."""

    key: str
    judge: str
    model: str
    value: Any


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which verdicts are meant: all, or those of a judge, a model, older than a time (Unix)."""

    judge: str | None = None
    model: str | None = None
    before: float | None = None

    @property
    def where(self) -> tuple[str, list[str | float]]:
        """SQL and its parameters."""
        terms = [("judge = ?", self.judge), ("model = ?", self.model), ("made < ?", self.before)]
        given = [(sql, value) for sql, value in terms if value is not None]
        return " AND ".join(["1", *(sql for sql, _ in given)]), [value for _, value in given]


class Held(NamedTuple):
    """What a cache holds of one judge and model; times are Unix seconds, sizes bytes."""

    judge: str
    model: str
    verdicts: int
    oldest: float
    newest: float
    size: int


class VerdictCache:
    """A file of verdicts; before `open` it holds nothing and keeps nothing."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._connection: sqlite3.Connection | None = None
        self._unread = False
        self._turn = RLock()

    def open(self, path: Path) -> None:
        """Use this file, made where there is none. Raises InputError where it is none of ours."""
        make_folder(path.parent)
        self._path = path
        with self._told():
            connection = sqlite3.connect(
                path,
                timeout=_SECONDS_FOR_A_LOCK,
                isolation_level=None,
                # One thread at a time, by the lock.
                check_same_thread=False,
            )
            self._connection = connection
            # In this order: another process makes both at once, perhaps between the two.
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != _FORMAT and (version or tables):
                self.close()
                raise InputError(
                    f"{path} must be a verdict cache of format {_FORMAT}, found format {version}; "
                    "name another file in judges.cache"
                )
            if not tables:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
            connection.execute("COMMIT")

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Within it every verdict is asked for anew, and none is kept: for what measures a judge,
        which a remembered verdict would only flatter."""
        before, self._unread = self._unread, True
        try:
            yield
        finally:
            self._unread = before

    def find(self, keys: Sequence[str]) -> dict[str, Any]:
        """Key -> verdict, for those that are known."""
        if self._connection is None or self._unread:
            return {}
        found: dict[str, Any] = {}
        with self._told():
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = keys[start : start + _KEYS_AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = self._connection.execute(
                    f"SELECT key, value FROM verdicts WHERE key IN ({marks})", some
                )
                found |= {key: json.loads(zlib.decompress(value)) for key, value in rows}
        return found

    def keep(self, entries: Sequence[Entry]) -> None:
        """Keep verdicts, all or none; one that is known already stands."""
        if self._connection is None or self._unread or not entries:
            return
        now = time.time()
        rows = [(e.key, e.judge, e.model, now, _packed(e.value)) for e in entries]
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?,?,?,?,?)", rows)
            self._connection.execute("COMMIT")

    def held(self, chosen: Chosen) -> list[Held]:
        """What is there, one line a judge and model."""
        assert self._connection is not None
        where, values = chosen.where
        with self._told():
            rows = self._connection.execute(
                "SELECT judge, model, count(*), min(made), max(made), sum(length(value)) "
                f"FROM verdicts WHERE {where} GROUP BY judge, model ORDER BY judge, model",
                values,
            )
            return [Held(*row) for row in rows]

    def prune(self, chosen: Chosen) -> int:
        """Remove verdicts and give their space back; how many there were."""
        assert self._connection is not None
        where, values = chosen.where
        with self._told():
            removed = self._connection.execute(f"DELETE FROM verdicts WHERE {where}", values)
            count = removed.rowcount
            self._connection.execute("PRAGMA incremental_vacuum").fetchall()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return count

    def close(self) -> None:
        """Let go of the file; it holds nothing and keeps nothing until it is opened again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors as ours; a transaction under way is undone. One thread at a time."""
        with self._turn:
            try:
                yield
            except (sqlite3.Error, zlib.error) as error:
                if self._connection is not None and self._connection.in_transaction:
                    self._connection.rollback()
                raise InputError(
                    f"the verdict cache {self._path} can't be used: {error}; free the disk or the "
                    "file, or remove it: its verdicts would be asked for again"
                ) from error


class CachedBackend:
    """A back end that is asked only for what is not known; failures are never kept."""

    def __init__(
        self, inner: Backend, cache: VerdictCache, judge: str, weights: Callable[[], str | None]
    ) -> None:
        """`weights` tells the model's weights apart (`weights_of`); nothing is cached where it
        gives None."""
        self.identity: Mapping[str, str] = inner.identity
        self.beside = inner.beside
        self._inner = inner
        self._cache = cache
        self._judge = judge
        self._weights = weights
        self._held: str | None = None
        self._known = 0

    def start(self, record: Path | None, probe: Call) -> Answer | None:
        """See `Backend.start`; whether it answers is asked of the back end itself."""
        return self._inner.start(record, probe)

    def ask(self, calls: Sequence[Call], keep: Keep | None = None, repeat: int = 0) -> list[Answer]:
        """See `Backend.ask`; `repeat` tells askings of one call apart."""
        self._held = self._held or self._weights()
        if self._held is None:
            return self._inner.ask(calls, keep)
        keys = [
            key_of(self._judge, dict(self.identity), self._held, call.key, repeat) for call in calls
        ]
        known = {key: _answer(value) for key, value in self._cache.find(keys).items()}
        self._known += sum(key in known for key in keys)
        missing = [index for index, key in enumerate(keys) if key not in known]
        waiting = _Waiting(self._cache)

        def told(index: int, answer: Answer) -> None:
            if _worth_keeping(calls[missing[index]], answer):
                model = self.identity.get("model", "")
                key = keys[missing[index]]
                waiting.add(Entry(key, self._judge, model, _value(answer)))
            if keep is not None:
                keep(missing[index], answer)

        try:
            fresh = self._inner.ask([calls[index] for index in missing], told)
        finally:
            waiting.write()
        answers = {keys[index]: answer for index, answer in zip(missing, fresh, strict=True)}
        return [known[key] if key in known else answers[key] for key in keys]

    def news(self) -> str | None:
        """See `Backend.news`."""
        told = self._inner.news()
        if not self._known:
            return told
        return f"{told + '; ' if told else ''}{self._known} verdicts so far came from the cache"

    def sleep(self) -> None:
        """See `Backend.sleep`."""
        self._inner.sleep()

    def close(self) -> None:
        """See `Backend.close`."""
        self._inner.close()


class _Waiting:
    """Answers on their way to the cache: a kill costs at most the last second's."""

    def __init__(self, cache: VerdictCache) -> None:
        self._cache = cache
        self._entries: list[Entry] = []
        self._written = time.monotonic()

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        self._cache.keep(self._entries)
        self._entries = []
        self._written = time.monotonic()


def open_existing(path: Path) -> VerdictCache:
    """The cache of a file or of a run's folder. Raises InputError where there is none."""
    file = path / "judges" / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no verdict cache at {file}; name its file, or a run's folder")
    cache = VerdictCache()
    cache.open(file)
    return cache


def _worth_keeping(call: Call, answer: Answer) -> bool:
    """Whether it is JSON as asked for, with its probabilities where those were: what isn't may be
    better next time."""
    if answer.text is None or (call.alternatives and not answer.tokens):
        return False
    try:
        json.loads(answer.text)
    except (ValueError, RecursionError):
        return False
    return True


def _value(answer: Answer) -> list[Any]:
    return [answer.text, [[token.text, dict(token.alternatives)] for token in answer.tokens]]


def _answer(value: list[Any]) -> Answer:
    text, tokens = value
    return Answer(text, tuple(Token(piece, alternatives) for piece, alternatives in tokens))


def _packed(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, ensure_ascii=False).encode())
