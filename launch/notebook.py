"""For scripts and notebooks: run a config, in this process, and get what it found.

from launch import preset, train
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import presets, shadow
from rlhf.config import RunConfig
from rlhf.notebook import RunResults, load_config


def preset(name: str, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """A config that travels with pairloop (`pairloop presets`), with `settings` on top.

    `preset("demo", {"rounds.count": 1})`. Raises InputError as `rlhf.load_config` does.
    """
    return load_config(presets.path(name), settings=settings)


def train(config: RunConfig) -> RunResults:
    """Run, or go on with, what a config describes; what it found, also where no round was promoted.

    Ctrl-C, or a notebook's stop button, stops it at the next safe point; the same call goes on.

    Raises PairloopError: bad input, data that can't be trusted, a failed check, an interruption.
    """
    shadow.check()
    from launch.local import run

    run(config)
    return RunResults(Path(config.run.directory) / config.run.name)
