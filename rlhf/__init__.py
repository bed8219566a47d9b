"""The method: on-policy preference optimisation, readable without knowing where it runs.

The names below are the public interface (docs/api.md). They load when they are first used, so that
`import rlhf` costs nothing; whatever else is in these modules may move between releases.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config import RunConfig
    from rlhf.errors import (
        DataGateError,
        InputError,
        Interrupted,
        NonFiniteError,
        PairloopError,
        ParityError,
    )
    from rlhf.notebook import RunResults, load_config
    from rlhf.types import Completion, Message, Prompt, Score

__all__ = [
    "Completion",
    "DataGateError",
    "InputError",
    "Interrupted",
    "Message",
    "NonFiniteError",
    "PairloopError",
    "ParityError",
    "Prompt",
    "RunConfig",
    "RunResults",
    "Score",
    "load_config",
]

_MODULES = {
    "config": ("RunConfig",),
    "errors": (
        "DataGateError",
        "InputError",
        "Interrupted",
        "NonFiniteError",
        "PairloopError",
        "ParityError",
    ),
    "notebook": ("RunResults", "load_config"),
    "types": ("Completion", "Message", "Prompt", "Score"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"rlhf.{module}"), name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
