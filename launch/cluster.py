"""Clusters: nodes side by side, described in a word such as `4x8xH100-80GB`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from launch import machines
from launch.machines import Machine
from rlhf.errors import InputError


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A place for one learner rank: a GPU of a node, or a node without GPUs."""

    node: int
    gpu: int | None
    """Number within its node; None where the node has none."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a plan needs to know of a cluster."""

    name: str
    nodes: tuple[Machine, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Places by node. A node without GPUs beside others that have some holds no model."""
        gpus = [Slot(n, g) for n, machine in enumerate(self.nodes) for g in range(machine.gpus)]
        return tuple(gpus) or tuple(Slot(n, None) for n in range(len(self.nodes)))

    @property
    def described(self) -> bool:
        """Whether it was given in words."""
        return all(machine.described for machine in self.nodes)

    def times(self, factor: int) -> Cluster:
        """As many times the nodes."""
        nodes = self.nodes * factor
        return Cluster(f"{len(nodes)}x{self.nodes[0].name}", nodes)

    def without_gpus(self) -> Cluster:
        """Its processors alone."""
        return replace(self, nodes=tuple(replace(m, gpus=0) for m in self.nodes))


def alone(machine: Machine) -> Cluster:
    """A machine as a cluster of one node."""
    return Cluster(machine.name, (machine,))


def parse(text: str) -> Cluster:
    """The cluster that `NODESxGPUSxCARD-SIZEGB` describes; of one node where NODES is left out.

    >>> len(parse("4x8xH100-80GB").slots)
    32

    Raises InputError where the form, the card or its size is unknown.
    """
    form = re.fullmatch(r"(?:(\d+)x)?(\d+x[A-Za-z][A-Za-z0-9]*-\d+GB)", text)
    if form is None or form.group(1) == "0":
        raise InputError(
            "--cluster must be NODESxGPUSxCARD-SIZEGB, such as 4x8xH100-80GB or 8xA100-80GB, "
            f"got {text!r}"
        )
    machine = machines.parse(form.group(2), "--cluster")
    return Cluster(text, (machine,) * int(form.group(1) or 1))
