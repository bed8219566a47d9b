"""Notices another distribution's `rlhf`, `rollout` or `launch` in the place of ours.

The three names are short, and other projects use them too. Two things happen: a folder earlier on
the import path holds one of them, or another distribution was installed into the same folder and
wrote over our files. Either would run somebody else's code under our name.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from pathlib import Path

PACKAGES = ("launch", "rollout", "rlhf")
DISTRIBUTION = "pairloop"


class ShadowError(Exception):
    """A package of ours resolves to somebody else's file.

    Not an `rlhf.errors.InputError`: `rlhf` itself may be the package that can't be trusted.
    """

    exit_status = 2


def check() -> None:
    """All three packages lie beside this one, and their files are as they were installed.

    Imports none of them but `launch`, which is running. Raises ShadowError.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = _location(name)
        if found is None:
            raise ShadowError(
                f"package {name} is missing beside {home / 'launch'}: the installation is "
                f"incomplete; install {DISTRIBUTION} again"
            )
        if found.resolve() != home / name:
            raise ShadowError(
                f"package {name} must be {home / name}, found {found}, which shadows it; uninstall "
                "the distribution that owns it, or take its folder off PYTHONPATH and the working "
                f"directory, or run {DISTRIBUTION} in a virtual environment of its own"
            )
    _unchanged(home)


def _location(name: str) -> Path | None:
    """The folder, or the single file, that `import name` would load."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


def _unchanged(home: Path) -> None:
    """Python files of an installed wheel still have the hashes in its RECORD.

    A source checkout and an editable installation have no such record; they pass.
    """
    from importlib import metadata

    try:
        files = metadata.distribution(DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix != ".py" or file.hash is None or file.parts[0] not in PACKAGES:
            continue
        if path.resolve().parents[len(file.parts) - 1] != home or not path.is_file():
            continue
        digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            raise ShadowError(
                f"package {file.parts[0]}: {path} is not the file that {DISTRIBUTION} installed; "
                "another distribution wrote over it, or it was edited; install "
                f"{DISTRIBUTION} into a virtual environment of its own"
            )
