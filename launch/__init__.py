"""Doors and wiring: the command line, and the only place that knows where things run.

For scripts and notebooks (docs/api.md): `from launch import preset, train`. They load when they are
first used, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.notebook import preset, train

__all__ = ["preset", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'launch' has no attribute {name!r}")
    from launch import notebook

    return getattr(notebook, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
