"""A Ray cluster of this machine's own: raylets that share its two cores."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from golden_run import environment
from nodes import one_cluster
from ray.cluster_utils import Cluster
from ray_forks import forked_workers


@contextmanager
def cluster_of(*cpus: int) -> Iterator[Cluster]:
    """A raylet for each number of CPUs that it pretends to have, the head first; runs that are
    started within find it."""
    with one_cluster(), forked_workers(), pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        memory: dict[str, Any] = {"object_store_memory": 100 * 2**20}
        head: dict[str, Any] = {"num_cpus": cpus[0], "include_dashboard": False, **memory}
        found = Cluster(initialize_head=True, head_node_args=head)
        for count in cpus[1:]:
            found.add_node(num_cpus=count, **memory)
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.shutdown()  # type: ignore[no-untyped-call]


def actors(kind: str) -> list[psutil.Process]:
    """Processes of the living actors of a class, of this process's own clusters: other tests may
    have theirs at the same time."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # One that ends meanwhile is no living actor.
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(f"ray::{kind}"):
                found.append(process)
    return found


@contextmanager
def slowed(kind: str, after: Path) -> Iterator[None]:
    """Once `after` is there, actors of a class get a fiftieth of the time: what a tiny model trains
    is over before a stop has gone its way through job server, signal and driver."""
    done = threading.Event()

    def slow() -> None:
        while not after.exists():
            if done.wait(0.01):
                return
        found = actors(kind)
        while not done.is_set():
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for actor in found:
                    with suppress(psutil.NoSuchProcess):
                        actor.send_signal(number)
                done.wait(0.49 if number == signal.SIGSTOP else 0.01)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
