"""A run on a Ray cluster: the one that this process belongs to, or one of this machine alone."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch import cluster_fit, local, ray_jobs
from launch.cluster import Cluster
from launch.layout import ACTOR_CPUS, Layout, Role
from launch.machines import Machine, this_machine
from launch.quiet import hush
from launch.roles import Roles, Say
from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.protocols import Generator, Learner
from rollout.judges.panel import Engines, InProcess
from rollout.transfer import shared_memory

if TYPE_CHECKING:
    from launch.actors import Seats
    from launch.learner_actors import Learners

ROLES: tuple[Role, ...] = ("learner", "generator", "judge")
LOOPBACK = "127.0.0.1"
RESERVE_S = 300.0
"""Seconds that a cluster has to give the actors their places."""


def train(config: RunConfig) -> int:
    """Run the loop in this process and its work in actors; the exit status.

    Raises PairloopError as `launch.local.run` does, and InputError where the cluster can't hold it.
    """
    hush()
    ray_jobs.check_inside(config)
    with joined() as found:
        planned = cluster_fit.plan_cluster(config, found)
        if (refused := cluster_fit.refusal(planned)) is not None:
            raise refused
        with _seated(planned.layout) as seats:
            team = _Actors(seats)
            try:
                return local.train(planned.config, team, planned.plan)
            finally:
                team.close()


class _Actors:
    """The team of `launch.local`: actors on their seats."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._say: Say = lambda _: None
        self._learners: Learners | None = None

    def learner(self, roles: Roles, say: Say) -> Learner:
        """See `Team.learner`: one rank a seat."""
        from launch.learner_actors import Learners

        self._say = say
        self._learners = Learners(self._seats, roles, say)
        return self._learners

    def generator(self, roles: Roles, longest: int) -> Generator:
        """See `Team.generator`: one a seat."""
        from launch.generator_actors import Generators

        return Generators(self._seats, roles, longest, self._say)

    def engines(self, device: str) -> Engines:
        """See `Team.engines`: each model in an actor of its own."""
        from launch.judge_actors import JudgeActors

        return JudgeActors(self._seats, InProcess(device), self._tell)

    def _tell(self, text: str) -> None:
        # Judges are built before anybody listens.
        self._say(text)

    def memories(self) -> list[str | None]:
        """See `Team.memories`: the driver's, which hashes what is written, and every seat's."""
        import ray

        working = [*self._seats.of["learner"], *self._seats.of["generator"]]
        asked = [seat.ask(shared_memory) for seat in working]
        return [shared_memory(), *ray.get(asked)]

    def close(self) -> None:
        """End the learner's ranks; the generators' end is the loop's."""
        if self._learners is not None:
            self._learners.close()


@contextmanager
def joined() -> Iterator[Cluster]:
    """The cluster of a submitted job or of RAY_ADDRESS, else one on this machine's loopback.

    Raises InputError where there is no Ray, or nothing at RAY_ADDRESS that lets this process in.
    """
    address = os.environ.get("RAY_ADDRESS")
    with nullcontext() if address else _alone_on_this_machine():
        try:
            import ray
        except ImportError as error:
            raise InputError(
                f"placement.kind ray needs Ray: {error}; pip install 'pairloop[ray]'"
            ) from None
        with _started(ray, address):
            machines = tuple(map(_machine, alive()))
            yield Cluster(f"{len(machines)} Ray nodes", machines)


@contextmanager
def _alone_on_this_machine() -> Iterator[None]:
    """What Ray has to find in the environment before it is imported, for a cluster that is nobody
    else's."""
    own = {
        # Whoever else is on this machine must not run code in our processes.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        # Else Ray takes an address of the loopback for one that others can reach, and listens to
        # everybody. The variable's name is that of the systems where it does so by default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _started(ray: Any, address: str | None) -> Iterator[None]:
    if address is None:
        # Without an address Ray would join whatever cluster it finds on this machine.
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        ray.init("local", _node_ip_address=LOOPBACK, **quiet)
    else:
        try:
            ray.init(address=address, log_to_driver=False)
        except (OSError, ValueError, ray.exceptions.RayError) as error:
            raise InputError(
                f"RAY_ADDRESS {address} must be a Ray cluster that this process may join: {error}; "
                "unset it to run on this machine alone"
            ) from error
    try:
        if address is None and (found := ray.util.get_node_ip_address()) != LOOPBACK:
            raise InputError(
                f"Ray listens on {found}, since it was imported before this run; start the run in "
                "a process of its own"
            )
        yield
    finally:
        ray.shutdown()


def _check_processors(layout: Layout, there: Sequence[float]) -> None:
    """Raises InputError where a group, which lies in one node, wants more CPUs than any has: Ray
    would wait for such a node for good."""
    for group in layout.groups:
        wanted = sum(bundle.get("CPU", 0.0) for bundle in group.bundles)
        if wanted > max(there, default=0.0):
            raise InputError(
                f"{wanted:g} CPUs are needed in one node, one for each actor there, and the nodes "
                f"of the Ray cluster have {', '.join(f'{n:g}' for n in there)}: start them with "
                "more (--num-cpus), or ask for fewer generators or judges with models of their own"
            )


def alive() -> list[dict[str, Any]]:
    """The cluster's living nodes in the order in which a plan counts them, this process's own
    first."""
    import ray

    own: str = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [node for node in nodes if node["Alive"]]
    return sorted(found, key=lambda node: (node["NodeID"] != own, node["NodeID"]))


def _machine(node: dict[str, Any]) -> Machine:
    """What a node has, by its own account, with the GPUs that Ray may give."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # A task without GPUs would be shown none.
    shown = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    ask = ray.remote(this_machine).options(
        num_cpus=0, scheduling_strategy=strategy, runtime_env=shown
    )
    machine: Machine = ray.get(ask.remote())
    return replace(machine, gpus=min(machine.gpus, int(node["Resources"].get("GPU", 0))))


@contextmanager
def _seated(layout: Layout) -> Iterator[Seats]:
    """Places for everybody, reserved for the run's life."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from launch.actors import Seat, Seats

    # Left to itself Ray takes whatever node has most room, and may leave none for the next group.
    # Once a node has died another one may do.
    living = alive()
    nodes = dict(enumerate(node["NodeID"] for node in living))
    _check_processors(layout, [node["Resources"].get("CPU", 0.0) for node in living])
    made = [
        (
            group,
            placement_group(
                list(group.bundles),
                strategy=group.strategy,
                _soft_target_node_id=nodes.get(group.slots[0].node),
            ),
        )
        for group in layout.groups
    ]
    try:
        try:
            ray.get([reserved.ready() for _, reserved in made], timeout=RESERVE_S)
        except ray.exceptions.GetTimeoutError:
            wanted = [bundle for group, _ in made for bundle in group.bundles]
            raise InputError(
                f"the Ray cluster has no room for {wanted} within {RESERVE_S:.0f} s; end what "
                "else runs on it, or add nodes"
            ) from None
        places = {
            slot: (reserved, bundle)
            for group, reserved in made
            for bundle, slot in enumerate(group.slots)
        }
        seats = {
            role: [
                Seat(
                    *places[holder.slots[0]],
                    ACTOR_CPUS,
                    holder.fraction,
                    holder.share,
                    tuple(places[slot][1] for slot in holder.slots[1:]),
                )
                for holder in layout.of(role)
            ]
            for role in ROLES
        }
        names = [holder.name for holder in layout.of("judge")]
        judges = dict(zip(names, seats["judge"], strict=True))
        yield Seats(seats, judges, layout.colocated)
    finally:
        for _, reserved in made:
            remove_placement_group(reserved)
