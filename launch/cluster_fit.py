"""Which layout of a run fits a cluster, and what would help if none does.

Layouts are tried in the order of `launch.layout.options`. Of the first kind that fits, the
narrowest engine is taken whose cache holds `rollout.max_concurrency` of the longest sequences, or
else the narrowest that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch import architectures, remedies
from launch.architectures import Architecture
from launch.cluster import Cluster, Slot
from launch.cluster_memory import ClusterEstimate, Sizer
from launch.judge_memory import JudgeModel, own_models, own_specs
from launch.layout import Family, Layout, divides, options
from launch.machines import GIB, Machine
from launch.memory import Estimate
from launch.placement import Plan, place_on, settle
from launch.remedies import SPARE, Group, candidates, changed
from rlhf.config import RunConfig
from rlhf.errors import InputError

LARGEST = 256
"""GPUs of the largest cluster that is proposed."""
CHANGES_WHAT_IS_TRAINED = ("model.tuning", "prompts.max_tokens", "rollout.max_new_tokens")
"""Settings beside which more GPUs are proposed too."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A config on a cluster."""

    config: RunConfig
    cluster: Cluster
    plan: Plan
    layout: Layout
    found: ClusterEstimate | None
    """None where the model's size is unknown."""
    unknown: tuple[str, ...]
    """Why sizes are unknown, a line each."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a plan needs to know of the models."""

    policy: Architecture
    judges: Sequence[JudgeModel]


def plan_cluster(config: RunConfig, cluster: Cluster) -> Planned:
    """Who sits where, and the memory that it takes; nothing is loaded or asked.

    Raises InputError where the config asks for what the cluster can't do; whether it fits is for
    `refusal` to say.
    """
    config = settle(config, _typical(cluster))
    plan = place_on(config, _typical(cluster))
    cluster = cluster if plan.device == "cuda" else cluster.without_gpus()
    judges, unknown = own_models(config)
    try:
        policy = architectures.find(config.model.path, config.model.revision)
    except InputError as error:
        said = (f"memory     not estimated: {error}",)
        first = next(options(config, cluster, None, own_specs(config), plan.engine))[0]
        return Planned(config, cluster, plan, first, None, said)
    found = _choose(config, cluster, plan, _Sizes(policy, judges))
    lines = tuple(f"judge      {line}" for line in unknown)
    return Planned(config, cluster, plan, found.layout, found, lines)


def refusal(planned: Planned) -> InputError | None:
    """Why it can't be run there: the term that breaks it, and the smallest change that helps."""
    found = planned.found
    if found is None or found.fits():
        return None
    slot, tightest = max(found.slots.items(), key=lambda item: _excess(item[1]))
    said = f"{planned.cluster.name} is too small: {_term(tightest, slot)}"
    return InputError(f"{said}. {_help(planned)}")


def _typical(cluster: Cluster) -> Machine:
    """The node that models run on; of unlike ones the one whose GPUs can least, since all of them
    get the same precision."""
    with_gpus = [machine for machine in cluster.nodes if machine.gpus]
    return min(with_gpus, key=lambda m: m.capability or (0, 0), default=cluster.nodes[0])


def _choose(config: RunConfig, cluster: Cluster, plan: Plan, sizes: _Sizes) -> ClusterEstimate:
    sizer = Sizer(config, plan, sizes.policy, sizes.judges)
    tight: ClusterEstimate | None = None
    closest: ClusterEstimate | None = None
    families: Iterator[Family] = options(
        config, cluster, sizes.policy, own_specs(config), plan.engine
    )
    for family in families:
        found = [sizer.estimate(layout) for layout in family]
        fitting = [estimate for estimate in found if estimate.fits(SPARE)]
        full = config.rollout.max_concurrency
        roomy = (estimate for estimate in fitting if estimate.sequences >= full)
        if fitting:
            return next(roomy, fitting[0])
        tight = tight or next((estimate for estimate in found if estimate.fits()), None)
        closest = closest or min(found, key=_distance)
    chosen = tight or closest
    assert chosen is not None, "options yields a family or raises"
    return chosen


def _distance(found: ClusterEstimate) -> tuple[float, int]:
    """How far from fitting; among equals, engines that hold more are nearer."""
    return max(map(_excess, found.slots.values())), -found.sequences


def _excess(found: Estimate) -> float:
    """How full the fullest memory is, 1 being full; a cache that holds nothing counts beyond."""
    filled = [found.peak(host=True)[1] / found.machine.host]
    if found.on_gpu:
        filled.append(found.peak(host=False)[1] / found.machine.gpu)
        filled += [1 + lack / found.machine.gpu for lack in found.short.values() if lack > 0]
    return max(filled)


def _term(found: Estimate, slot: Slot) -> str:
    """What is too much, and the part that is most of it."""
    card = f"GPU {slot.gpu} of node {slot.node}"
    for host, size in ((False, found.machine.gpu), (True, found.machine.host)):
        phase, peak = found.peak(host)
        if (found.on_gpu or host) and peak > size:
            there = [p for p in found.parts if p.host == host and phase in p.phases]
            most = max(there, key=lambda p: p.size)
            return (
                f"{f'the host of node {slot.node}' if host else card} needs {peak / GIB:.1f} of "
                f"{size / GIB:.1f} GiB in {phase}, most of it for {most.role} {most.what}, "
                f"{most.size / GIB:.1f} GiB ({most.formula})"
            )
    engine, lack = max(found.short.items(), key=lambda item: item[1])
    said = next((p.formula for p in found.parts if p.what.endswith("vLLM, awake")), "")
    return (
        f"on {card} the key-value cache of {engine} lacks {lack / GIB:.2f} GiB to hold one "
        f"sequence of the longest ({said})"
    )


def _help(planned: Planned) -> str:
    config, cluster = planned.config, planned.cluster
    policy = architectures.find(config.model.path, config.model.revision)
    sizes = _Sizes(policy, own_models(config)[0])
    groups = list(_groups(config, cluster, policy))
    found = remedies.smallest(
        groups, lambda changes: _fits(changed(config, changes), cluster, sizes)
    )
    if found is not None and not any(name in CHANGES_WHAT_IS_TRAINED for name, _ in found):
        return _capital(remedies.flags(found))
    larger = _larger(config, cluster, sizes)
    if found is not None:
        on = f"; or as it is on {larger.name}" if larger is not None else ""
        return _capital(remedies.flags(found)) + on
    if larger is not None:
        return f"No setting helps; more GPUs do: {larger.name}"
    return "Neither a setting nor more of these nodes helps; take larger cards or a smaller model"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _fits(config: RunConfig, cluster: Cluster, sizes: _Sizes) -> bool:
    """Whether some layout leaves `SPARE` free."""
    try:
        plan = place_on(config, _typical(cluster))
        sizer = Sizer(config, plan, sizes.policy, sizes.judges)
        families = options(config, cluster, sizes.policy, own_specs(config), plan.engine)
        return any(sizer.estimate(layout).fits(SPARE) for family in families for layout in family)
    except InputError:
        return False


def _larger(config: RunConfig, cluster: Cluster, sizes: _Sizes) -> Cluster | None:
    """The cluster with the fewest times as many nodes on which it fits."""
    factor = 2
    while factor * len(cluster.slots) <= LARGEST:
        if _fits(config, cluster.times(factor), sizes):
            return cluster.times(factor)
        factor *= 2
    return None


def _groups(config: RunConfig, cluster: Cluster, architecture: Architecture) -> Iterator[Group]:
    """Settings to try, least harm first: as on one machine, and how a cluster is shared out."""
    placement = config.placement
    width, largest = placement.tensor_parallel, max(machine.gpus for machine in cluster.nodes)
    wider: Group = (
        "placement.tensor_parallel",
        []
        if width == "auto"
        else [n for n in range(width + 1, largest + 1) if divides(n, architecture)],
    )
    after: dict[str, list[Group]] = {
        remedies.SHARE: [
            ("placement.kind", [] if placement.kind == "auto" else ["auto"]),
            wider,
            ("placement.colocate", [] if placement.colocate == "auto" else ["auto"]),
            ("placement.generators", [] if placement.generators == "auto" else ["auto"]),
        ],
        "learner.micro_batch_tokens": [
            ("placement.zero", list(range(placement.zero + 1, 4))),
        ],
        "learner.gradient_checkpointing": [
            ("placement.offload", [] if placement.offload else [True]),
        ],
    }
    for name, values in candidates(config):
        # Many layouts are sized for each share: steps of a tenth are enough.
        share = name == remedies.SHARE
        yield name, [v for v in values if not share or round(100 * v) % 10 == 0]
        yield from after.get(name, [])
