"""Whether a run fits a machine, as a table, and the smallest change that would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch import architectures
from launch.architectures import Architecture
from launch.judge_memory import ROLE, JudgeModel, own_models
from launch.machines import GIB, Machine
from launch.memory import Estimate, estimate, estimate_offline
from launch.memory_parts import Phase
from launch.placement import C, device_of, place_on, settle
from rlhf.config import RunConfig
from rlhf.config_offline import Trains
from rlhf.errors import InputError

Change = tuple[str, Any]
"""A setting's dotted name and the value it would take."""

Group = tuple[str, list[Any]]
"""A setting and the values to try, mildest first."""

Fits = Callable[[Sequence[Change]], bool]
SHARE = "rollout.gpu_memory_share"

SPARE = 0.05
"""Share of a memory that had better stay free, for what an estimate does not know."""


def report(config: C, machine: Machine) -> str:
    """What a dry run says about memory: the table, whether it fits, what would help."""
    config = settle(config, machine)
    try:
        known = architectures.find(config.model.path, config.model.revision)
    except InputError as error:
        return f"memory     not estimated: {error}"
    judges, unknown = _judges(config)
    found: Estimate = _estimated(config, machine, known, judges)
    lines = [_heading(config, found), *_table(found), *_verdicts(found)]
    lines += [f"{ROLE:<10} {line}" for line in unknown]
    if not found.fits():
        lines.append(f"fit        {_help(config, machine, known, judges)}")
    return "\n".join(lines)


def _judges(config: Trains) -> tuple[list[JudgeModel], list[str]]:
    return own_models(config) if isinstance(config, RunConfig) else ([], [])


def _estimated(
    config: Trains, machine: Machine, architecture: Architecture, judges: Sequence[JudgeModel]
) -> Estimate:
    """Raises InputError where the machine lacks what the config asks for."""
    if isinstance(config, RunConfig):
        return estimate(config, place_on(config, machine), machine, architecture, judges)
    device = device_of(config, machine.gpus > 0, machine.capability)
    return estimate_offline(config, device, machine, architecture)


def smallest_change(
    config: C,
    machine: Machine,
    architecture: Architecture,
    judges: Sequence[JudgeModel] = (),
) -> tuple[Change, ...] | None:
    """The least harmful change after which the run fits with `SPARE` left: one setting, or where no
    single one is enough several, none of which could be left out or be milder. Empty where it fits
    as it is, None where only a larger machine helps.
    """

    def fits(changes: Sequence[Change]) -> bool:
        try:
            found = _estimated(changed(config, changes), machine, architecture, judges)
        except InputError:
            return False
        return found.fits(SPARE)

    if fits(()):
        return ()
    groups = list(_candidates(config))
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


def _candidates(config: Trains) -> Iterator[Group]:
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


def _halved(value: int, least: int) -> list[int]:
    """Half of it, half of that, and so on, down to `least`."""
    times = int(math.log2(value / least)) if value > least else 0
    return [value >> i for i in range(1, times + 1)]


def _help(
    config: C, machine: Machine, architecture: Architecture, judges: Sequence[JudgeModel]
) -> str:
    changes = smallest_change(config, machine, architecture, judges)
    if changes is None and judges:
        named = ", ".join(judge.spec.name for judge in judges)
        return (
            f"no setting of the policy makes it fit beside {named}: give the judge a smaller model "
            "or share, or a machine of its own (backend: openai)"
        )
    if changes is None:
        return "no setting makes it fit; take a larger machine or a smaller model"
    flags = " ".join(f"--{name} {_shown(value)}" for name, value in changes)
    what = "smallest change" if len(changes) == 1 else "no single setting; together"
    return f"{what}: {flags}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _heading(config: Trains, found: Estimate) -> str:
    machine = found.machine
    assumed = " (assumed)" if machine.described else ""
    gpu = f"GPU {machine.gpu / GIB:.1f} GiB, " if found.on_gpu else ""
    if isinstance(config, RunConfig):
        longest = f"{config.prompts.max_tokens} + {config.rollout.max_new_tokens} tokens"
    else:
        longest = f"{config.data.max_tokens} tokens"
    return (
        f"memory     {machine.name}: {gpu}host {machine.host / GIB:.1f} GiB{assumed}; "
        f"for sequences of {longest}, the longest that the config allows; all in GiB"
    )


def _table(found: Estimate) -> Iterator[str]:
    """Rows of both memories, what a part needs under each phase that it is there in, and sums."""
    places = [("GPU", False), ("host", True)] if found.on_gpu else [("host", True)]
    width = max(22, *(len(p.what) for p in found.parts))
    for place, host in places:
        rows = [p for p in found.parts if p.host == host]
        shown: list[Phase] = [p for p in found.phases if p != "load" or _loads(found, host)]
        yield f"{place:<10} {'':<{width}}" + "".join(f"{p:>11}" for p in shown) + "  formula"
        for part in rows:
            size = f"{part.size / GIB:.2f}"
            cells = "".join(f"{size if p in part.phases else '':>11}" for p in shown)
            yield f"{part.role:<10} {part.what:<{width}}{cells}  {part.formula}"
        sums = "".join(f"{found.at(p, host) / GIB:>11.2f}" for p in shown)
        yield f"{'sum':<10} {'':<{width}}{sums}"


def _loads(found: Estimate, host: bool) -> bool:
    """Whether loading needs more than what stays."""
    return any(p.phases == ("load",) and p.host == host for p in found.parts)


def _verdicts(found: Estimate) -> Iterator[str]:
    places = [("GPU", False, found.machine.gpu)] if found.on_gpu else []
    for place, host, size in [*places, ("host", True, found.machine.host)]:
        phase, peak = found.peak(host)
        spare = size - peak
        said = f"{peak / GIB:.1f} of {size / GIB:.1f} GiB at most, in {phase}"
        if spare < 0:
            yield f"{place:<10} DOES NOT FIT: {said}, {-spare / GIB:.1f} too many"
        elif spare < SPARE * size:
            yield f"{place:<10} fits, but barely: {said}"
        else:
            yield f"{place:<10} fits: {said}"
        free = found.machine.free
        if host and free is not None and free < peak <= size:
            yield f"{'':<10} only {free / GIB:.1f} GiB are free now: other programs hold the rest"
    for engine, lack in found.short.items():
        if lack > 0:
            yield (
                f"{engine:<10} DOES NOT FIT: its cache lacks {lack / GIB:.2f} GiB to hold one "
                "sequence of the longest"
            )
