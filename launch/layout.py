"""Who sits on which GPU of a cluster: pure, from the config and the model's attention heads.

Three ways to share GPUs out:
- `local` and `spmd`: every rank is one process with a learner, a generator and the judges' models
  of its own on its GPU; they take turns.
- `ray`, colocated: every GPU has a learner rank; generators of `tensor_parallel` GPUs and judges
  sit on the same GPUs and take turns with it.
- `ray`, separate: the last GPUs hold generators and judges, all others a learner rank each.

A layout says nothing of memory: `options` lists what the config allows, families in the order in
which they are preferred, and `launch.cluster_fit` takes the first that fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from launch.architectures import Architecture
from launch.cluster import Cluster, Slot
from launch.zero_memory import Sharding
from rlhf.config import RunConfig, check_zero
from rlhf.config_judges import LlmSpec, RewardModelSpec
from rlhf.errors import InputError

Spec = LlmSpec | RewardModelSpec
"""A judge with a model of its own."""
Kind = Literal["local", "spmd", "ray"]
Role = Literal["learner", "generator", "judge"]

ENGINE_SHARE = 0.85
"""Of its card's memory for an engine without a learner beside it: CUDA needs some, and so does vLLM
beyond its share when it scores the parity check."""
ACTOR_CPUS = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A learner rank or an engine, and where it sits."""

    role: Role
    name: str
    slots: tuple[Slot, ...]
    """One for a learner rank or judge; for a generator as many as it is tensor-parallel."""
    fraction: float
    """Of each of its GPUs, as Ray counts them; 0 on nodes without GPUs."""
    share: float = 0.0
    """Of each card's memory, that an engine takes while it is awake."""


@dataclass(frozen=True, slots=True)
class PlacementGroup:
    """Bundles of one node that Ray reserves together, one for each slot."""

    strategy: Literal["STRICT_PACK"]
    slots: tuple[Slot, ...]
    bundles: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Layout:
    """Who sits where."""

    kind: Kind
    cluster: Cluster
    colocated: bool
    sharding: Sharding
    tensor_parallel: int
    holders: tuple[Holder, ...]
    """Learner ranks in their order, then generators, then judges."""

    def of(self, role: Role) -> tuple[Holder, ...]:
        """All holders of a role."""
        return tuple(h for h in self.holders if h.role == role)

    def at(self, slot: Slot) -> tuple[Holder, ...]:
        """Who sits on a slot."""
        return tuple(self._by_slot[slot])

    @cached_property
    def used(self) -> tuple[Slot, ...]:
        """Slots that somebody sits on."""
        return tuple(sorted(self._by_slot))

    @cached_property
    def _by_slot(self) -> dict[Slot, list[Holder]]:
        seated: dict[Slot, list[Holder]] = {}
        for holder in self.holders:
            for slot in holder.slots:
                seated.setdefault(slot, []).append(holder)
        return seated

    @property
    def groups(self) -> tuple[PlacementGroup, ...]:
        """What Ray must reserve, none for other kinds.

        Slots of one node that the same roles sit on are a group: bundles of a `STRICT_PACK` group
        lie on one node, so a tensor-parallel generator never crosses the network. A bundle is one
        GPU, so that fractions of one actor and another are fractions of the same GPU.
        """
        if self.kind != "ray":
            return ()
        together: dict[tuple[int, bool], list[Slot]] = defaultdict(list)
        for slot in self.used:
            learns = any(holder.role == "learner" for holder in self.at(slot))
            together[slot.node, learns].append(slot)
        return tuple(
            PlacementGroup("STRICT_PACK", tuple(slots), tuple(map(self._bundle, slots)))
            for slots in together.values()
        )

    def _bundle(self, slot: Slot) -> dict[str, float]:
        bundle = {"CPU": ACTOR_CPUS * len(self.at(slot))}
        return bundle if slot.gpu is None else {**bundle, "GPU": 1.0}


Family = list[Layout]
"""Layouts of one kind, narrow engines first."""


def options(
    config: RunConfig,
    cluster: Cluster,
    architecture: Architecture | None,
    judges: Sequence[Spec] = (),
    engine: str = "vllm",
) -> Iterator[Family]:
    """What the config allows on a cluster, each family not empty, the preferred one first.

    Without the architecture no generator is made tensor-parallel unless the config says so.
    Raises InputError where nothing is possible.
    """
    check_zero(config)
    seats = _Seats(config, cluster, judges)
    widths = _widths(config, cluster, architecture, engine)
    builders: dict[str, Callable[[], Iterator[Layout]]] = {
        "local": seats.local,
        "spmd": seats.spmd,
        "colocated": lambda: seats.colocated(widths),
        "separate": lambda: seats.separate(widths),
    }
    refused: list[InputError] = []
    preferred = _preferred(config, cluster)
    for name in preferred:
        try:
            family = list(builders[name]())
        except InputError as error:
            refused.append(error)
        else:
            yield family
    if len(refused) == len(preferred):
        raise refused[0]


def _preferred(config: RunConfig, cluster: Cluster) -> list[str]:
    placement, slots = config.placement, cluster.slots
    ray = {"auto": ["colocated", "separate"], True: ["colocated"], False: ["separate"]}
    of_ray = ray[placement.colocate]
    if placement.kind == "ray":
        return of_ray
    if placement.kind != "auto":
        return [placement.kind]
    if (placement.generators, placement.tensor_parallel) != ("auto", "auto"):
        return of_ray
    if placement.colocate is False:
        return of_ray
    if len(slots) == 1:
        return ["spmd" if placement.zero else "local"]
    wide = ["spmd", *of_ray] if len(cluster.nodes) == 1 else [*of_ray, "spmd"]
    return wide if placement.zero else [*wide, "local"]


def _widths(
    config: RunConfig, cluster: Cluster, architecture: Architecture | None, engine: str
) -> list[int]:
    """Numbers of GPUs that a generator may be split over, fewest first."""
    asked = config.placement.tensor_parallel
    largest = max(1, *(machine.gpus for machine in cluster.nodes))
    heads = 1 if architecture is None else architecture.heads
    if asked == "auto":
        if architecture is None or engine != "vllm":
            return [1]
        return [n for n in range(1, largest + 1) if divides(n, architecture)]
    if asked > 1 and engine != "vllm":
        raise InputError(
            f"placement.tensor_parallel {asked} needs rollout.engine vllm, got {engine}"
        )
    if asked > largest:
        raise InputError(
            f"placement.tensor_parallel {asked} needs a node with as many GPUs, but the largest of "
            f"{cluster.name} has {largest}; use {largest} or fewer"
        )
    if architecture is not None and not divides(asked, architecture):
        can = [n for n in range(1, largest + 1) if divides(n, architecture)]
        raise InputError(
            f"placement.tensor_parallel must divide the model's {heads} attention heads and its "
            f"{architecture.kv_heads} key heads (or be a multiple of these), got {asked}; "
            f"possible here: {', '.join(map(str, can))}"
        )
    return [asked]


def divides(width: int, architecture: Architecture) -> bool:
    """Whether vLLM can split the model so: query heads evenly, key heads evenly or repeated, and
    evenly what is between its layers and the vocabulary, which it pads to 64."""
    keys, padded = architecture.kv_heads, -(-architecture.vocabulary // 64) * 64
    evenly = (architecture.heads, architecture.intermediate, padded)
    return all(n % width == 0 for n in evenly) and (keys % width == 0 or width % keys == 0)


class _Seats:
    """The layouts of one config on one cluster."""

    def __init__(self, config: RunConfig, cluster: Cluster, judges: Sequence[Spec]) -> None:
        self._config = config
        self._placement = config.placement
        self._cluster = cluster
        self._judges = judges
        self._share = config.rollout.gpu_memory_share

    def local(self) -> Iterator[Layout]:
        """One process on the first slot."""
        if self._placement.zero:
            raise InputError(
                f"placement.zero {self._placement.zero} shares memory among ranks, but kind local "
                "is one process; use placement.kind spmd or ray"
            )
        yield self._processes("local", self._cluster.slots[:1])

    def spmd(self) -> Iterator[Layout]:
        """One process on each slot."""
        yield self._processes("spmd", self._cluster.slots)

    def colocated(self, widths: Sequence[int]) -> Iterator[Layout]:
        """A learner rank on every slot, generators over all of them."""
        slots, asked = self._cluster.slots, self._placement.generators
        most = 0
        for width in widths:
            groups = self._groups(width)
            most = max(most, len(groups))
            if asked == "auto" or asked <= len(groups):
                generators = [
                    Holder("generator", f"generator {i}", group, self._share, self._share)
                    for i, group in enumerate(groups[: None if asked == "auto" else asked])
                ]
                engines = [*generators, *self._judges_on(slots, generators)]
                yield self._layout("ray", True, slots, engines, width)
        if asked != "auto" and asked > most:
            raise InputError(
                f"placement.generators {asked} do not find place on {self._cluster.name}, which "
                f"has room for {most}"
            )

    def separate(self, widths: Sequence[int]) -> Iterator[Layout]:
        """Generators and judges on the last slots, learner ranks on the others. Where their number
        is free, generators take up to half of the slots; then ever fewer."""
        slots, asked = self._cluster.slots, self._placement.generators
        found = False
        for width in widths:
            groups = self._groups(width)[::-1]
            for count in _fewer(len(slots) // 2 // width) if asked == "auto" else [asked]:
                if count <= len(groups) and count * width < len(slots):
                    found = True
                    yield self._apart(groups[:count], width)
        if not found:
            number = "a generator" if asked == "auto" else f"{asked} generators"
            raise InputError(
                f"placement.colocate false leaves no GPU to the learner: {number} and at least one "
                f"learner rank do not find place on the {len(slots)} of {self._cluster.name}"
            )

    def _apart(self, groups: Sequence[tuple[Slot, ...]], width: int) -> Layout:
        taken = sorted(slot for slots in groups for slot in slots)
        judges = self._judges_on(taken, [])
        held: dict[Slot, float] = defaultdict(float)
        for judge in judges:
            held[judge.slots[0]] += judge.share
        generators = []
        for i, slots in enumerate(sorted(groups)):
            beside = max(held[slot] for slot in slots) if slots[0].gpu is not None else 0.0
            share = round(ENGINE_SHARE - beside, 4)
            if share <= 0:
                raise InputError(
                    f"the judges' engine.gpu_memory_share adds up to {beside:g} beside a "
                    "generator; use less, or more generators"
                )
            name, rest = f"generator {i}", round(1 - beside, 4)
            generators.append(Holder("generator", name, slots, rest, share))
        learner = [slot for slot in self._cluster.slots if slot not in set(taken)]
        return self._layout("ray", False, learner, [*generators, *judges], width)

    def _processes(self, kind: Kind, slots: Sequence[Slot]) -> Layout:
        generators = [
            Holder("generator", f"generator {i}", (slot,), self._share, self._share)
            for i, slot in enumerate(slots)
        ]
        judges = [
            Holder("judge", spec.name, (slot,), share, share)
            for slot in slots
            for spec in self._judges
            for share in [spec.engine.gpu_memory_share]
        ]
        return self._layout(kind, True, slots, [*generators, *judges], 1)

    def _judges_on(self, slots: Sequence[Slot], beside: Sequence[Holder]) -> list[Holder]:
        """Each judge on the slot whose engines hold least so far."""
        held = dict.fromkeys(slots, 0.0)
        for holder in beside:
            for slot in holder.slots:
                held[slot] += holder.share
        seated = []
        for spec in self._judges:
            slot = min(held, key=lambda s: (held[s], s.node, s.gpu or 0))
            share = spec.engine.gpu_memory_share
            held[slot] += share
            seated.append(Holder("judge", spec.name, (slot,), share, share))
        return seated

    def _layout(
        self,
        kind: Kind,
        colocated: bool,
        learner: Sequence[Slot],
        engines: Sequence[Holder],
        width: int,
    ) -> Layout:
        """With the learner's ranks on what their slots' engines leave."""
        held: dict[Slot, float] = defaultdict(float)
        for engine in engines:
            for slot in engine.slots:
                held[slot] += engine.fraction
        full = next((slot for slot in learner if held[slot] > 1 - 1e-4), None)
        if full is not None and full.gpu is not None:
            raise InputError(
                f"rollout.gpu_memory_share and the judges' engine.gpu_memory_share add up to "
                f"{held[full]:g} of one GPU; together they must stay below 1"
            )
        ranks = [
            Holder("learner", f"rank {i}", (slot,), round(1 - held[slot], 4))
            for i, slot in enumerate(learner)
        ]
        placement = self._placement
        sharding = Sharding(placement.zero, len(ranks), placement.offload)
        holders = tuple(_seated(holder) for holder in (*ranks, *engines))
        return Layout(kind, self._cluster, colocated, sharding, width, holders)

    def _groups(self, width: int) -> list[tuple[Slot, ...]]:
        """Slots in groups of `width`, each within one node."""
        by_node: dict[int, list[Slot]] = defaultdict(list)
        for slot in self._cluster.slots:
            by_node[slot.node].append(slot)
        return [
            tuple(slots[i : i + width])
            for slots in by_node.values()
            for i in range(0, len(slots) - width + 1, width)
        ]


def _fewer(most: int) -> Iterator[int]:
    """Numbers of generators to try: halved while there are many, then one less each time."""
    count = max(1, most)
    while count:
        yield count
        count = count // 2 if count > 8 else count - 1


def _seated(holder: Holder) -> Holder:
    """On a node without GPUs there is no fraction of one."""
    if holder.slots[0].gpu is not None:
        return holder
    return Holder(holder.role, holder.name, holder.slots, 0.0)
