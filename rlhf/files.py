"""Files that are whole or absent: staged beside their target, fsynced, renamed into place.

A staging name starts with a dot and ends with `STAGING`; a process that is killed leaves at most
such names behind, which `remove_leftovers` clears. A full disk is an `InputError` everywhere here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from rlhf.errors import InputError

STAGING = ".pairloop-staging"
# Polars and safetensors wrap the system's error in one of their own without an errno.
_FULL_MESSAGES = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), f"os error {errno.ENOSPC})")
_GROUP_ROWS = 1 << 13
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

SHARD = 5_000_000_000
"""Bytes of a model's weights that a file holds, as Transformers has it."""


def _tells_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(error) for message in _FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


@contextmanager
def reports_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota) met while writing `path` into an `InputError` with the remedy."""
    try:
        yield
    except InputError:
        raise
    # Libraries raise errors of many types for a full disk; every other error goes on unchanged.
    except Exception as error:
        if not _tells_full_disk(error):
            raise
        place = _nearest_existing(path.parent)
        free = shutil.disk_usage(place).free / 1e6
        mount = next(p for p in (place, *place.parents) if p.is_mount())
        raise InputError(
            f"disk full while writing {path}; {free:.1f} MB free on {mount}; "
            f"free space and run the same command again ({error})"
        ) from error


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn what keeps `path` from being written, permissions or another kind of file there, into an
    `InputError` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} must be a file or folder that can be written: {error.strerror or error}; give "
            "another, or change its permissions"
        ) from error


def sync(path: Path) -> None:
    """Fsync a file or a folder's own entries."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Make `path` and its missing parents, durably."""
    with reports_full_disk(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync(made.parent)
    return path


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds; nothing to remove is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a file or a folder as one: a kill leaves all of it under its name, or nothing."""
    if os.path.lexists(path):
        aside = _staging_name(path)
        path.rename(aside)
        remove(aside)


def is_staging(name: str) -> bool:
    """Whether a file's name is one that a killed write left behind."""
    return name.startswith(".") and name.endswith(STAGING)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writes left under `folder`. Only for a folder that nobody else writes."""
    for parent, folders, names in os.walk(folder):
        for name in filter(is_staging, [*folders, *names]):
            remove(Path(parent, name))
        folders[:] = [name for name in folders if not is_staging(name)]


def _staging_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{STAGING}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a staging path to write; on success it is fsynced and takes the name `path`."""
    with reports_full_disk(path):
        make_folder(path.parent)
        staging = _staging_name(path)
        try:
            yield staging
            sync(staging)
            staging.replace(path)
            sync(path.parent)
        finally:
            remove(staging)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a whole file, or leave what was there."""
    with atomic_file(path) as staging:
        staging.write_bytes(content)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty staging folder to fill; on success all of it is fsynced and named `path`.

    A folder already at `path` is moved aside first and then removed, so a kill in between leaves no
    folder under that name, never a mixture. On an exception the staging folder is removed and an
    old folder put back.
    """
    with reports_full_disk(path):
        make_folder(path.parent)
        staging, aside = _staging_name(path), _staging_name(path)
        try:
            staging.mkdir()
            yield staging
            for parent, _, names in os.walk(staging, topdown=False):
                for name in names:
                    sync(Path(parent, name))
                sync(Path(parent))
            if os.path.lexists(path):
                path.rename(aside)
            staging.rename(path)
            sync(path.parent)
        finally:
            remove(staging)
            if os.path.lexists(aside) and not os.path.lexists(path):
                aside.rename(path)
            remove(aside)


def sha256_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by path relative to it (with /), in name order."""
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(files)}


def finite_or_null(value: Any) -> Any:
    """`value` for JSON: NaN and infinities, which JSON lacks, become None at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON, keys in the order given, non-finite floats as null."""
    text = json.dumps(finite_or_null(value), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text.encode() + b"\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote; all else is an `InputError` with `remedy`."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} must be JSON as pairloop wrote it: {error}; {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}; {remedy}")
    return value


def write_parquet(table: pl.DataFrame, path: Path) -> None:
    """Write a table; equal tables give equal bytes, whatever their chunks or the thread count."""
    with atomic_file(path) as staging:
        # Pages follow the frame's chunks; one chunk makes the bytes depend on the values alone.
        table.rechunk().write_parquet(staging, compression="zstd", row_group_size=1 << 16)


def write_tables(tables: Iterable[pl.DataFrame], schema: pl.Schema, path: Path) -> None:
    """Write tables one below the other as one file that need not fit in memory; its bytes depend on
    the rows alone."""

    def groups(*_: object) -> Iterator[pl.DataFrame]:
        held = pl.DataFrame(schema=schema)
        for table in tables:
            held = held.vstack(table)
            while held.height >= _GROUP_ROWS:
                yield held[:_GROUP_ROWS].rechunk()
                held = held[_GROUP_ROWS:]
        yield held.rechunk()

    with atomic_file(path) as staging:
        register_io_source(groups, schema=schema).sink_parquet(
            staging, compression="zstd", row_group_size=_GROUP_ROWS, maintain_order=True
        )


def read_parquet(path: Path) -> pl.DataFrame:
    """Read one Parquet file; brackets or `key=value` in its path mean nothing."""
    return pl.read_parquet(path, glob=False, hive_partitioning=False)


class FolderLock:
    """A kernel lock on `folder/.lock`: held until `release` or the process's death of any kind.

    Raises `InputError` naming the holder when another process, or this one, holds it already.
    """

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        path = folder / self.NAME
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(
                f"run.directory must be a folder that can be written: {folder}: {error.strerror}; "
                "set run.directory to another place, or change its permissions"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._describe_holder(path)
        except BlockingIOError:
            self.release()
            raise InputError(_held_message(folder, path)) from None
        except OSError as error:
            self.release()
            if error.errno in _NO_LOCKS:
                raise InputError(
                    f"run.directory must be on a file system with locks: {folder} has none "
                    f"({error.strerror}); set run.directory to a local disk"
                ) from None
            raise
        except InputError:
            self.release()
            raise
        # A forked worker shares the lock: without this it would hold it after our death.
        os.register_at_fork(after_in_child=self.release)

    def _describe_holder(self, path: Path) -> None:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            # Not its arguments: a script around ours may take a secret there.
            "program": sys.argv[0],
        }
        with reports_full_disk(path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)

    def release(self) -> None:
        """Give the lock back; twice is no error."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _held_message(folder: Path, path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        pid = holder["pid"]
        who = f"process {pid} on {holder['host']} since {holder['started']}: {holder['program']}"
        stop = f"stop it (kill -TERM {pid}) or wait for it"
    # The holder writes its name just after it gets the lock: we may look in between.
    except (ValueError, KeyError):
        who, stop = "a process that has only just started", "wait for it"
    return (
        f"run.name must name a run that no other process works on: {folder} is in use by {who}; "
        f"{stop}, or give another run.name"
    )
