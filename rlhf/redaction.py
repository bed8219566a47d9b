"""Tell a secret when it stands where none may: in a config, a message, a tracker's file.

Secrets come from the environment. What is secret there is known exactly, by the variable's name;
what was pasted from elsewhere is known by the shapes that providers give their keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

HIDDEN = "(hidden: a secret)"

_NAME = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)
# Where a secret lies, not the secret: RAY_AUTH_TOKEN_PATH.
_PLACE = re.compile(r"_(?:PATH|FILE|DIR)$", re.IGNORECASE)
_USER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/\s@]+)@")
_LEAST = 8
"""Characters; a shorter value would be found in innocent text."""

_SHAPES = (
    ("a Hugging Face token", r"hf_[A-Za-z0-9]{30,}"),
    ("a W&B key", r"wandb_v\d+_[A-Za-z0-9_]{20,}"),
    ("an API key", r"sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"),
    ("an AWS key", r"(?:AKIA|ASIA)[A-Z0-9]{16}"),
    ("a Google key", r"AIza[A-Za-z0-9_-]{35}"),
    ("a GitHub token", r"(?:gh[opsur]_|github_pat_)[A-Za-z0-9_]{20,}"),
    ("a GitLab token", r"glpat-[A-Za-z0-9_-]{16,}"),
    ("a Slack token", r"xox[abprs]-[A-Za-z0-9-]{10,}"),
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
_PATTERNS = [(label, re.compile(rf"(?<![A-Za-z0-9]){shape}")) for label, shape in _SHAPES]
_PASSWORD = ("a password in a URL", re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"))


def names_secret(name: str) -> bool:
    """Whether a setting or variable of this name would hold a secret.

    >>> names_secret("wandb_api_key"), names_secret("max_tokens"), names_secret("TOKEN_FILE")
    (True, False, False)
    """
    return bool(_NAME.search(name)) and not _PLACE.search(name)


def secret_in(text: str) -> str | None:
    """What secret `text` holds, in words that don't give it away; None if it holds none.

    >>> secret_in("https://me:letmein@host/model")
    'a password in a URL'
    """
    for variable, value in _in_environment():
        if value in text:
            return f"the value of ${variable}"
    return next((label for label, p in (*_PATTERNS, _PASSWORD) if p.search(text)), None)


def mask(text: str) -> str:
    """`text` with every secret in it replaced."""
    for _, value in _in_environment():
        text = text.replace(value, HIDDEN)
    for _, pattern in (*_PATTERNS, _PASSWORD):
        text = pattern.sub(HIDDEN, text)
    return text


def _in_environment() -> Iterator[tuple[str, str]]:
    """Variable and secret: the value, or the user and password of a URL in it (a proxy's)."""
    for variable, value in os.environ.items():
        # As it is, and as who strips it shows it.
        for known in dict.fromkeys((value, value.strip())) if names_secret(variable) else ():
            if len(known) >= _LEAST:
                yield variable, known
        for user in _USER.findall(value):
            yield from ((variable, part) for part in user.split(":") if len(part) >= _LEAST)
