"""Where what is made of a model file is kept, so that it is made once a user."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def model_cache() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/pairloop/models`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "pairloop" / "models"


def made_of(source: Path, suffix: str = "") -> Path:
    """The place for what is made of a file, by its content: another file has another place."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return model_cache() / f"{source.stem}-{digest}{suffix}"
