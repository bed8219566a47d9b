"""Where a version's whole weights lie on their way to generators: in shared memory, or on disk; or
where both ends meet.

Shared memory is a file system like any other here: what is written, hashed, loaded and checked is
the same folder, which never reaches a disk. It serves where the process that writes it, the one
that hashes it and every generator see the same memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config_rollout import Transfer
from rlhf.errors import InputError
from rlhf.files import SHARD, remove, reports_full_disk

MEMORY = Path("/dev/shm")
BESIDE = 64 * 2**20
"""Bytes of a version beside its weights: tokenizer, configuration, headers."""
BUFFER = 256 * 2**20
"""Bytes of weights that fill a message over NCCL; its last tensor may go beyond."""
DISK = "published"
"""Name of the folder in the run's own."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a version's weights take, and that the host's memory has free."""

    needed: int
    free: int


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the sender, rank 0, and all workers of all generators meet."""

    host: str
    port: int
    world: int
    device: str
    """cpu or cuda."""


@dataclass(frozen=True, slots=True)
class Coming:
    """What a generator is to receive."""

    meeting: Meeting
    first: int
    """Rank of the first of its workers."""
    weights: dict[str, Any]
    """As `rollout.vllm_transfer.described` gives them."""


def shared_memory() -> str | None:
    """The shared memory that this process sees: one word for all who see the same, whatever their
    containers; None where there is none."""
    try:
        if not MEMORY.is_mount() or not os.access(MEMORY, os.W_OK):
            return None
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{kernel} {MEMORY.stat().st_dev}"
    except OSError:
        return None


def memory_folder(run: Path) -> Path:
    """Where a run's versions lie in memory: the same at each of its starts."""
    named = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
    return MEMORY / f"pairloop-{run.name}-{named}"


def put_adapter(run: Path, generator: int, files: Mapping[str, bytes]) -> Path:
    """Store an adapter that came to a generator of a run, in place of the last one; its folder.

    Raises InputError where somebody else has a folder of its name.
    """
    folder = adapter_folder(run, generator)
    if (foreign := _foreign(folder)) is not None:
        raise InputError(f"an adapter can't be stored: {foreign}; remove it, or set TMPDIR")
    remove(folder)
    with reports_full_disk(folder):
        folder.mkdir(mode=0o700)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return folder


def drop_adapter(run: Path, generator: int) -> None:
    """Remove it, when the run ends."""
    folder = adapter_folder(run, generator)
    if _foreign(folder) is None:
        remove(folder)


def adapter_folder(run: Path, generator: int) -> Path:
    """Where a generator's adapter lies on its node: the same however often it is made anew."""
    return Path(tempfile.gettempdir()) / f"{memory_folder(run).name}-adapter-{generator}"


def make_way(
    asked: Transfer, run: Path, seen: Sequence[str | None], room: Room
) -> tuple[Path, str]:
    """The folder that versions are written to, and a line on why there.

    `run` is the run's folder, held by this process; `seen` is what `shared_memory` said in each
    process that writes or loads them. What a killed run left behind is removed, on disk and in
    memory.

    Raises InputError where memory is asked for and can't be had.
    """
    memory, disk = memory_folder(run), run / DISK
    remove(disk)
    if (missing := _foreign(memory)) is None:
        remove(memory)
        missing = _unshared(seen) or _short(room)
    if asked == "memory" and missing is not None:
        raise InputError(
            f"rollout.transfer memory can't be had: {missing}; use auto or disk, which take the "
            "run's folder"
        )
    what = "the first version's weights" if asked == "network" else "whole weights"
    later = "; later ones are sent over the network" if asked == "network" else ""
    if asked == "disk":
        return disk, f"{what} travel through {disk}"
    if missing is not None:
        return disk, f"{what} travel through {disk}, since {missing}{later}"
    memory.mkdir(mode=0o700)
    return memory, f"{what} travel through shared memory, {memory}{later}"


def _foreign(folder: Path) -> str | None:
    """Why a name that anybody may take can't be ours."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
        return None
    return f"{folder} is there and is no folder of this user's"


def _unshared(seen: Sequence[str | None]) -> str | None:
    if None in seen:
        return f"not every process of the run has shared memory at {MEMORY}"
    if len(found := {*seen}) > 1:
        return f"the run's processes see {len(found)} shared memories, as on several hosts"
    return None


def _short(room: Room) -> str | None:
    """What lacks: the folder has to find place, and beside it the file that is written to it."""
    place, needed = shutil.disk_usage(MEMORY).free, room.needed + BESIDE
    if place < needed:
        return f"{MEMORY} has {place / 1e6:,.0f} MB free and a version takes {needed / 1e6:,.0f}"
    if room.free < (both := needed + min(room.needed, SHARD)):
        return (
            f"the host has {room.free / 1e6:,.0f} MB of memory free, and a version with the file "
            f"that is being written takes {both / 1e6:,.0f}"
        )
    return None
