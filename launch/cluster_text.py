"""What `train --dry-run` says of a cluster: who sits where, and the memory of each node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from launch.cluster import Slot
from launch.cluster_fit import Planned
from launch.cluster_memory import ClusterEstimate
from launch.layout import Holder, Layout
from launch.machines import GIB
from launch.memory import Estimate
from launch.memory_table import rows, starved, verdict
from launch.placement import work
from rlhf.config import RunConfig


def describe(planned: Planned) -> str:
    """The whole plan as text."""
    lines = [f"placement  {_summary(planned.layout)} on {planned.cluster.name}"]
    lines += _seating(planned.layout)
    lines += _groups(planned.layout)
    lines += work(planned.config, planned.plan)
    if planned.found is not None:
        lines += _memory(planned.config, planned.found)
    return "\n".join([*lines, *planned.unknown])


def _summary(layout: Layout) -> str:
    sharding, generators = layout.sharding, layout.of("generator")
    zero = f", ZeRO-{sharding.stage}" if sharding.engine else ""
    zero += " offloaded" if sharding.offload else ""
    how = "" if layout.kind != "ray" else ", colocated" if layout.colocated else ", separate"
    width = layout.tensor_parallel
    each = f" of {width} GPUs each" if width > 1 else ""
    idle = len(layout.cluster.slots) - len(layout.used)
    rest = f"; {idle} GPUs idle" if idle else ""
    return (
        f"{layout.kind}{how}: {_count(sharding.ranks, 'learner rank')}{zero}, "
        f"{_count(len(generators), 'generator')}{each}{rest}"
    )


def _seating(layout: Layout) -> Iterator[str]:
    """A line for each node: holders of a role that take alike of their GPUs are named together."""
    by_node: dict[int, list[Holder]] = defaultdict(list)
    for holder in layout.holders:
        by_node[holder.slots[0].node].append(holder)
    for node, holders in sorted(by_node.items()):
        alike: dict[tuple[str, float, int], list[Holder]] = defaultdict(list)
        for holder in holders:
            named = holder.name if holder.role == "judge" else holder.role
            alike[named, holder.fraction, len(holder.slots)].append(holder)
        yield f"{f'node {node}':<10} " + "; ".join(map(_together, alike.values()))


def _together(holders: Sequence[Holder]) -> str:
    first = holders[0]
    if first.role == "judge":
        name = f"judge {first.name}"
    else:
        numbers = _ranges(int(holder.name.rsplit(" ", 1)[1]) for holder in holders)
        kind = "learner rank" if first.role == "learner" else "generator"
        name = f"{kind}{'s' if len(holders) > 1 else ''} {numbers}"
    slots = [slot for holder in holders for slot in holder.slots]
    if slots[0].gpu is None:
        return name
    part = "whole" if first.fraction == 1 else f"{first.fraction:g} of each"
    return f"{name} on {_gpus(slots)}, {part if len(slots) > 1 else part.removesuffix(' of each')}"


def _groups(layout: Layout) -> Iterator[str]:
    """Ray's placement groups, equal ones once."""
    counted: dict[str, int] = defaultdict(int)
    for group in layout.groups:
        bundles: dict[str, int] = defaultdict(int)
        for bundle in group.bundles:
            bundles[", ".join(f"{name} {amount:g}" for name, amount in bundle.items())] += 1
        said = " + ".join(f"{count} x {{{bundle}}}" for bundle, count in bundles.items())
        counted[f"{group.strategy}: {said}"] += 1
    for said, count in counted.items():
        yield f"bundles    {_count(count, 'placement group')}, {said}"


def _memory(config: RunConfig, found: ClusterEstimate) -> Iterator[str]:
    longest = f"{config.prompts.max_tokens} + {config.rollout.max_new_tokens} tokens"
    yield (f"memory     for sequences of {longest}, the longest that the config allows; all in GiB")
    cards: dict[tuple[object, ...], list[Slot]] = defaultdict(list)
    hosts: dict[tuple[object, ...], list[Slot]] = defaultdict(list)
    for slot, estimate in found.slots.items():
        cards[estimate.machine, *(p for p in estimate.parts if not p.host)].append(slot)
        hosts[estimate.machine, *(p for p in estimate.parts if p.host)].append(slot)
    for slots in cards.values():
        yield from _card(found.slots[slots[0]], slots)
    for slots in hosts.values():
        yield from _host(found.slots[slots[0]], slots)


def _card(estimate: Estimate, slots: Sequence[Slot]) -> Iterator[str]:
    """A GPU, and all that hold the same."""
    if estimate.on_gpu:
        on_node: dict[int, list[Slot]] = defaultdict(list)
        for slot in slots:
            on_node[slot.node].append(slot)
        alike: dict[str, list[int]] = defaultdict(list)
        for node, own in on_node.items():
            alike[_gpus(own)].append(node)
        named = "; ".join(f"{_nodes(nodes)}, {gpus}" for gpus, nodes in alike.items())
        each = " each" if len(slots) > 1 else ""
        yield f"\n{named}: {estimate.machine.gpu / GIB:.1f} GiB{each}"
        yield from rows(estimate, host=False)
        yield verdict(estimate, host=False)
    yield from starved(estimate)


def _host(estimate: Estimate, slots: Sequence[Slot]) -> Iterator[str]:
    """The host memory of a node, and of all that hold the same."""
    assumed = " (assumed)" if estimate.machine.described else ""
    named = _nodes({slot.node for slot in slots})
    yield f"\n{named}, host memory: {estimate.machine.host / GIB:.1f} GiB{assumed}"
    yield from rows(estimate, host=True)
    yield verdict(estimate, host=True)


def _nodes(numbers: Iterable[int]) -> str:
    known = set(numbers)
    return f"node{'s' if len(known) > 1 else ''} {_ranges(known)}"


def _gpus(slots: Iterable[Slot]) -> str:
    return f"GPU {_ranges(slot.gpu or 0 for slot in slots)}"


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers with runs shortened.

    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
