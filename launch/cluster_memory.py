"""How much memory a layout needs, GPU by GPU and node by node.

A process has its libraries in host memory and a CUDA context on each card that it uses. Under
`local` and `spmd` that is one process a slot, under `ray` one for each learner rank, judge, and GPU
of a generator, and the driver on the first node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launch import judge_memory
from launch.architectures import Architecture
from launch.cluster import Slot
from launch.engine_parts import Seat, engine_parts, longest_bytes
from launch.judge_memory import JudgeModel
from launch.layout import Holder, Layout
from launch.learner_parts import WRITTEN, learner_parts, publish_parts
from launch.machines import Machine
from launch.memory import Estimate, going_on, learning, process_parts
from launch.memory_parts import Part
from launch.placement import Plan
from rlhf.config import RunConfig

Rows = tuple[list[Part], dict[str, int]]
"""Parts, and what engines lack for one sequence of the longest."""


@dataclass(frozen=True)
class ClusterEstimate:
    """What a layout needs."""

    layout: Layout
    slots: Mapping[Slot, Estimate]
    """Slot -> what lies on its card, and in the host memory of its whole node."""
    sequences: int
    """Of the longest, that the tightest generator's cache holds."""

    def fits(self, spare: float = 0.0) -> bool:
        """Whether every card and every host leaves this share free."""
        return all(found.fits(spare) for found in self.slots.values())


class Sizer:
    """Sizes one config's layouts; what they have in common is computed once."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        architecture: Architecture,
        judges: Sequence[JudgeModel] = (),
    ) -> None:
        self._config = config = going_on(config, architecture)
        self._plan = plan
        self._on_gpu = plan.device == "cuda"
        self._held = learning(config, architecture, self._on_gpu)
        self._judges = {judge.spec.name: judge for judge in judges}
        self._known: dict[tuple[object, ...], Rows] = {}

    def estimate(self, layout: Layout) -> ClusterEstimate:
        """Every slot of a layout."""
        first = layout.of("learner")[0].slots[0]
        rows = {slot: self._rows(layout, slot, slot == first) for slot in layout.used}
        by_node = {
            node: [slot for slot in layout.used if slot.node == node]
            for node in {slot.node for slot in layout.used}
        }
        slots: dict[Slot, Estimate] = {}
        known: dict[tuple[object, ...], list[Estimate]] = {}
        for node, own in sorted(by_node.items()):
            machine = layout.cluster.nodes[node]
            # Lists of rows live as long as this object, so that equal nodes share their estimates.
            key = (machine, *(id(rows[slot][0]) for slot in own))
            if key not in known:
                known[key] = self._node(machine, [rows[slot] for slot in own])
            slots |= dict(zip(own, known[key], strict=True))
        return ClusterEstimate(layout, slots, self._sequences(layout))

    def _node(self, machine: Machine, rows: Sequence[Rows]) -> list[Estimate]:
        host = _added([p for parts, _ in rows for p in parts if p.host])
        return [
            Estimate((*(p for p in parts if not p.host), *host), machine, self._on_gpu, short)
            for parts, short in rows
        ]

    def _rows(self, layout: Layout, slot: Slot, first: bool) -> Rows:
        """What everybody on a slot holds, on the card and on the host."""
        machine = layout.cluster.nodes[slot.node]
        holders = layout.at(slot)
        seats = tuple(
            (h.role, h.share, len(h.slots), h.role == "judge" and h.name) for h in holders
        )
        key = (machine, seats, first, layout.colocated, layout.kind, layout.sharding)
        if key not in self._known:
            parts, short = list[Part](), dict[str, int]()
            for holder in holders:
                rows, lacks = self._holder(layout, holder, machine, first)
                parts += rows
                short |= lacks
            parts += self._processes(layout, holders, first)
            self._known[key] = [part for part in parts if part.size], short
        return self._known[key]

    def _holder(self, layout: Layout, holder: Holder, machine: Machine, first: bool) -> Rows:
        if holder.role == "learner":
            rows = [*learner_parts(self._held, layout.sharding)]
            published = publish_parts(self._held, self._plan, layout.sharding)
            return [*rows, *(p for p in published if first or p.what not in WRITTEN)], {}
        if holder.role == "generator":
            seat = Seat(holder.share, len(holder.slots), not layout.colocated)
            rows, lack = engine_parts(self._config, self._plan, machine, self._held, seat)
            return rows, {"generator": lack}
        judge = self._judges.get(holder.name)
        if judge is None:
            return [], {}
        rows, lack = judge_memory.parts(judge, machine, self._on_gpu)
        return rows, {f"judge {holder.name}": lack}

    def _processes(self, layout: Layout, holders: Sequence[Holder], first: bool) -> list[Part]:
        if layout.kind != "ray":
            return [*process_parts(self._on_gpu, any(map(self._vllm, holders)))]
        each = [p for holder in holders for p in process_parts(self._on_gpu, self._vllm(holder))]
        driver = [replace(p, what="driver") for p in process_parts(False, False) if first]
        return [*_added([p for p in each if not p.host]), *(p for p in each if p.host), *driver]

    def _vllm(self, holder: Holder) -> bool:
        if holder.role == "generator":
            return self._plan.engine == "vllm"
        judge = self._judges.get(holder.name) if holder.role == "judge" else None
        return judge is not None and judge.spec.backend == "vllm"

    def _sequences(self, layout: Layout) -> int:
        if self._plan.engine != "vllm" or not self._on_gpu:
            return self._config.rollout.max_concurrency
        seats = {
            (layout.cluster.nodes[holder.slots[0].node], holder.share, len(holder.slots))
            for holder in layout.of("generator")
        }
        return min(self._held_at_once(*seat) for seat in seats)

    def _held_at_once(self, machine: Machine, share: float, width: int) -> int:
        seat = Seat(share, width)
        _, lack = engine_parts(self._config, self._plan, machine, self._held, seat)
        longest = longest_bytes(self._held, width)
        return max(0, longest - lack) // longest


def _judge(holder: Holder) -> str | None:
    """Which judge it is; ranks and generators differ in number alone."""
    return holder.name if holder.role == "judge" else None


def _added(parts: Sequence[Part]) -> list[Part]:
    """Equal parts as one row, how often it is there before its formula."""
    return [_times(count, part) for part, count in Counter(parts).items()]


def _times(count: int, part: Part) -> Part:
    if count == 1 or part.once:
        return part
    formula = f"({part.formula})" if " " in part.formula else part.formula
    return replace(part, size=count * part.size, formula=f"{count} x {formula}")
