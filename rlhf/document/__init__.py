"""Self-contained HTML pages: one file, no network, and nothing that a model wrote can run.

A page brings a template, a style sheet and a script of its own; what all pages look like and how
they show text is in `base.css` and `base.js` here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf.errors import InputError
from rlhf.files import atomic_write

_BASE = Path(__file__).parent


def document(
    templates: Path, name: str, content: Mapping[str, Any], look: str | None = None
) -> str:
    """The page `name`.html.j2 of the folder `templates`, with `look`.css and `look`.js, by default
    those of its own name.

    The template gets `content`, escaped, and `style`, `script` and `policy`: a content security
    policy that allows this very script and no request of any kind.
    """
    look = look or name
    script = _joined("base.js", templates / f"{look}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        _environment(templates)
        .get_template(f"{name}.html.j2")
        .render(
            **content,
            policy=Markup(policy),
            script=Markup(script),
            style=Markup(_joined("base.css", templates / f"{look}.css")),
        )
    )


@cache
def _environment(templates: Path) -> Environment:
    """One a folder: compiling templates takes as long as all else about a small page."""
    return Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )


def write_document(path: Path, text: str, flag: str) -> Path:
    """Write a page, whole or not at all; where it is. Raises InputError naming `flag`."""
    try:
        atomic_write(path, text.encode())
    # ValueError: `.` and `/` are no file's names.
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{flag} must be a file that can be written: {path}: {why}; give another {flag}"
        ) from error
    return path


def _joined(base: str, own: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (_BASE / base, own))


def visible(value: Any) -> Any:
    """Text with control and invisible characters spelt out, so that none can reorder a line.

    >>> visible("a\\u202eb")
    'a⟨U+202E⟩b'
    """
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c
        for c in value
    )


def encoded(value: Any) -> str:
    """JSON that nothing in it can end the `<script>` element around it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
