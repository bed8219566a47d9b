"""The smallest change of a config after which something fits, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch.placement import C
from rlhf.config import RunConfig
from rlhf.config_offline import Trains

Change = tuple[str, Any]
"""A setting's dotted name and the value it would take."""

Group = tuple[str, list[Any]]
"""A setting and the values to try, mildest first."""

Fits = Callable[[Sequence[Change]], bool]
SHARE = "rollout.gpu_memory_share"

SPARE = 0.05
"""Share of a memory that had better stay free, for what an estimate does not know."""


def smallest(groups: Sequence[Group], fits: Fits) -> tuple[Change, ...] | None:
    """The least harmful change after which it fits: one setting, or where no single one is enough
    several, none of which could be left out or be milder. `groups` are in the order of harm. Empty
    where it fits as it is, None where nothing helps.
    """
    if fits(()):
        return ()
    singles = (((name, value),) for name, values in groups for value in values)
    found = next((single for single in singles if fits(single)), None) or _together(groups, fits)
    return None if found is None else _milder(found, groups, fits)


def changed(config: C, changes: Sequence[Change]) -> C:
    """The config with some settings changed."""
    for name, value in changes:
        section, key = name.split(".")
        inner = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: inner})
    return config


def candidates(config: Trains) -> Iterator[Group]:
    """Settings with the values to try, least harm first.

    The first change nothing that a round holds (a share, a cache, a micro-batch), the next cost
    time (an engine that decodes fewer at once, activations computed twice), then comes what is
    trained, and last what is trained on: shorter prompts are dropped prompts, and an answer that is
    cut off can't be chosen.
    """
    learner = config.learner
    rollout = config.rollout if isinstance(config, RunConfig) else None
    if rollout is not None:
        shares = [round(0.02 * i, 2) for i in range(5, 46)]
        near = sorted(shares, key=lambda share: abs(share - rollout.gpu_memory_share))
        yield SHARE, [s for s in near if s != rollout.gpu_memory_share]
        gibibytes = (8.0, 4.0, 2.0, 1.0, 0.5)
        yield "rollout.memory_gib", [g for g in gibibytes if g != rollout.memory_gib]
    yield "learner.micro_batch_tokens", _halved(learner.micro_batch_tokens, 256)
    if rollout is not None:
        rows = _halved(rollout.max_concurrency, rollout.samples_per_prompt)
        yield "rollout.max_concurrency", rows
    yield (
        "learner.gradient_checkpointing",
        [] if learner.gradient_checkpointing else [True],
    )
    smaller = [] if config.model.merges else ["qlora"]
    tunings = {"full": ["lora", "qlora"], "lora": smaller, "qlora": []}
    yield "model.tuning", list(tunings[config.model.tuning])
    if isinstance(config, RunConfig):
        yield "prompts.max_tokens", _halved(config.prompts.max_tokens, 128)
        yield "rollout.max_new_tokens", _halved(config.rollout.max_new_tokens, 64)
    else:
        yield "data.max_tokens", _halved(config.data.max_tokens, 128)


def flags(changes: Sequence[Change]) -> str:
    """Changes as they are given on the command line, after the words that say how many they are."""
    given = " ".join(f"--{name} {_shown(value)}" for name, value in changes)
    what = "smallest change" if len(changes) == 1 else "no single setting; together"
    return f"{what}: {given}"


def _together(groups: Sequence[Group], fits: Fits) -> tuple[Change, ...] | None:
    """Each setting at its thriftiest, in the order of harm, until it fits with some share."""
    shares = dict(groups).get(SHARE, [])
    taken: tuple[Change, ...] = ()
    for name, values in groups:
        if name == SHARE or not values:
            continue
        taken = (*taken, (name, values[-1]))
        for tried in (taken, *((*taken, (SHARE, share)) for share in shares)):
            if fits(tried):
                return tried
    return None


def _milder(found: tuple[Change, ...], groups: Sequence[Group], fits: Fits) -> tuple[Change, ...]:
    """Most harmful first, each change left out or made as mild as the others allow."""
    for change in reversed(found):
        at = found.index(change)
        before, after = found[:at], found[at + 1 :]
        if (before or after) and fits((*before, *after)):
            found = (*before, *after)
            continue
        name = change[0]
        options = ((*before, (name, value), *after) for value in dict(groups)[name])
        found = next(option for option in options if fits(option))
    return found


def _halved(value: int, least: int) -> list[int]:
    """Half of it, half of that, and so on, down to `least`."""
    times = int(math.log2(value / least)) if value > least else 0
    return [value >> i for i in range(1, times + 1)]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
