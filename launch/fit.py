"""Whether a run fits a machine, as a table, and the smallest change that would make it fit."""

from __future__ import annotations

from collections.abc import Sequence

from launch import architectures, remedies
from launch.architectures import Architecture
from launch.judge_memory import ROLE, JudgeModel, own_models
from launch.machines import GIB, Machine
from launch.memory import Estimate, estimate, estimate_offline
from launch.memory_table import table, verdicts
from launch.placement import C, device_of, place_on, settle
from launch.remedies import SPARE, Change, candidates, changed
from rlhf.config import RunConfig
from rlhf.config_offline import Trains
from rlhf.errors import InputError


def report(config: C, machine: Machine) -> tuple[str, str | None]:
    """What a dry run says about memory: the table, and what would help where it doesn't fit; and
    that help by itself."""
    config = settle(config, machine)
    try:
        known = architectures.find(config.model.path, config.model.revision)
    except InputError as error:
        return f"memory     not estimated: {error}", None
    judges, unknown = _judges(config)
    found: Estimate = _estimated(config, machine, known, judges)
    lines: list[str] = [_heading(config, found), *table(found), *verdicts(found)]
    lines += [f"{ROLE:<10} {line}" for line in unknown]
    if found.fits():
        return "\n".join(lines), None
    wanting = _help(config, machine, known, judges)
    return "\n".join([*lines, f"fit        {wanting}"]), wanting


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
    """The least harmful change after which the run fits with `SPARE` left (`remedies.smallest`);
    None where only a larger machine helps.
    """

    def fits(changes: Sequence[Change]) -> bool:
        try:
            found = _estimated(changed(config, changes), machine, architecture, judges)
        except InputError:
            return False
        return found.fits(SPARE)

    return remedies.smallest(list(candidates(config)), fits)


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
    return remedies.flags(changes)


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
