"""What every page is made with: templates, one script, one style, and no network."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf.errors import InputError
from rlhf.files import atomic_write

_TEMPLATES = Path(__file__).parent / "templates"


def page_of(template: str, **content: Any) -> str:
    """A page as text: its style and script are within it, and only that script may run."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        script=Markup(script),
        script_hash=digest,
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
    )


def write_page(path: Path, text: str, flag: str) -> Path:
    """Write a page, whole or not at all; where it is. Raises InputError naming `flag`."""
    try:
        atomic_write(path, text.encode())
    except OSError as error:
        raise InputError(
            f"{flag} must be a file that can be written: {path}: {error.strerror}; "
            f"give another {flag}"
        ) from error
    return path


def visible(value: Any) -> Any:
    """Text with control and invisible characters spelt out, so that none can reorder a line.

    >>> visible("a\\u202eb")
    'a⟨U+202E⟩b'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c
        for c in value
    )
