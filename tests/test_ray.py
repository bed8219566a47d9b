"""The loop on a real Ray cluster of two nodes: the golden run, though actors die."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from golden_run import assert_same_run, finish, observed, replay, start, wait_for, write_config
from preloaded import Fork
from ray.cluster_utils import Cluster
from ray_nodes import actors, cluster_of

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

NODES = 2
DIES_IN_SAVE = """
import os, signal
import ray
from launch.learner_actors import Learners

call = Learners._call

def kill_first(self, method, *arguments):
    if method == "save":
        Learners._call = call
        (arguments[0] / "begun").touch()
        _, process = ray.get(self._ranks[-1].identity.remote())
        os.kill(process, signal.SIGKILL)
        print("the last rank is killed", flush=True)
    return call(self, method, *arguments)

Learners._call = kill_first
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two raylets; an actor for learning and one for generating find place on each."""
    with cluster_of(2, 2) as found:
        yield found


def kill_when(path: Path, kind: str, process: Fork) -> psutil.Process:
    """SIGKILL an actor of a class as soon as `path` is there."""
    wait_for(path, process)
    victims = actors(kind)
    assert len(victims) == NODES, victims
    victims[-1].send_signal(signal.SIGKILL)
    return victims[-1]


def test_ranks_and_generators_on_two_nodes_repeat_the_golden_run_though_some_of_each_die(
    cluster: Cluster, one_process: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Under ZeRO-3: a generator while it draws, a rank while it trains, and one while what it
    trained is being stored."""
    config = write_config(tmp_path, tiny_model, "tiny", placement={"kind": "ray", "zero": 3})
    before = tmp_path / "before.py"
    before.write_text(DIES_IN_SAVE)
    run, process = replay(config, "tiny"), start(config, before)
    first = kill_when(run / "rounds/0001/completions/part-00000.parquet", "GeneratorActor", process)
    second = kill_when(run / "rounds/0001/trainer/checkpoints/000001", "LearnerActor", process)
    status, output = finish(process)
    assert status == 0, output
    assert not first.is_running() and not second.is_running()
    assert "died and is made anew (1 of 3)" in output
    trained, stored = output.split("the last rank is killed")
    for told in (trained, stored):
        assert told.count("a learner rank died; all are made anew (1 of 3)") == 1, output
    # Nothing of what the first rank had begun to write.
    assert not (run / "rounds/0001/policy/begun").exists()
    # Both nodes are this machine.
    assert "whole weights travel through shared memory" in output
    assert_same_run(observed(run), one_process, within=1e-5)
