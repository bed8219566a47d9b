"""Dry runs of `train` and `dpo`: the settings, who runs where, the memory, and the data."""

from __future__ import annotations

from collections.abc import Iterator

from launch import cluster, fit, machines, offline
from launch.cluster_fit import plan_cluster, refusal
from launch.cluster_text import describe
from launch.local import rehearse
from launch.placement import plan, plan_offline, settle, several
from rlhf import config_io
from rlhf.config import RunConfig
from rlhf.config_offline import OfflineConfig
from rlhf.errors import InputError


def say(config: RunConfig, machine: str | None, described: str | None) -> Iterator[str]:
    """Texts to print, for a `machine` or cluster in a word, else for this machine.

    Raises InputError, on a cluster after all is said, where the run can't be what is asked for.
    """
    if machine is not None and described is not None:
        raise InputError("--machine and --cluster both say what to plan for: give one of them")
    if described is not None:
        yield from _on(config, cluster.parse(described))
        return
    here = machines.this_machine() if machine is None else machines.parse(machine)
    if several(config) is not None:
        yield from _on(config, cluster.alone(here))
        return
    config = settle(config, here)
    yield config_io.dump(config)
    yield plan(config, here)
    text, wanting = fit.report(config, here)
    yield text
    yield rehearse(config)
    _refuse(here, wanting)


def say_offline(config: OfflineConfig, machine: str | None) -> Iterator[str]:
    """What `dpo --dry-run` prints, for a `machine` in a word or this one."""
    here = machines.this_machine() if machine is None else machines.parse(machine)
    config = settle(config, here)
    yield config_io.dump(config)
    yield plan_offline(config, here)
    text, wanting = fit.report(config, here)
    yield text
    yield offline.rehearse(config)
    _refuse(here, wanting)


def _refuse(here: machines.Machine, wanting: str | None) -> None:
    if wanting is not None:
        raise InputError(f"it does not fit {here.name}: {wanting}")


def _on(config: RunConfig, nodes: cluster.Cluster) -> Iterator[str]:
    planned = plan_cluster(config, nodes)
    yield config_io.dump(planned.config)
    yield describe(planned)
    yield rehearse(planned.config)
    if (refused := refusal(planned)) is not None:
        raise refused
