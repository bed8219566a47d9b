"""A run on Ray, and a sweep, as jobs of a real Slurm of two nodes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from golden_run import assert_same_run, observed, replay, write_config
from nodes import until
from ray_nodes import slowed
from slurm_cluster import Cluster, cluster
from test_offline import write_config as write_offline
from test_offline import write_pairs

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

DEADLINE = 600.0
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def submit(slurm: Cluster, folder: Path, *words: str) -> str:
    """What `pairloop submit slurm` says."""
    command = [sys.executable, "-m", "launch", "submit", "slurm", *words, "--time", "30"]
    return slurm.run(*command, cwd=folder, PYTHONPATH=f"{TESTS}:{TESTS.parent}")


def job_in(told: str, pattern: str) -> int:
    found = re.search(pattern, told, re.M)
    assert found, told
    return int(found[1])


def test_a_run_on_ray_over_two_nodes_queues_again_once_and_ends_with_the_golden_pairs(
    slurm: Cluster, one_process: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "tiny", placement={"kind": "ray", "device": "cpu"})
    run = replay(config, "tiny")
    told = submit(slurm, tmp_path, str(config), "--nodes", "2", "--cpus-per-rank", "2")
    job = job_in(told, r"^job (\d+): ")
    log = tmp_path / f"runs/tiny-{job}.out"
    first = run / "rounds/0001/trainer/checkpoints/000001"
    with slowed("LearnerActor", run / "rounds/0001/reference_logps.parquet"):
        until(lambda: ended(slurm, job) or first.is_dir(), DEADLINE, f"{first} is there")
        assert first.is_dir(), log.read_text()
        slurm.run("scancel", "--signal=USR1", "--batch", str(job))
        token = secret_of(job)
        assert not [line for line in command_lines() if token in line]
        until(lambda: slurm.show(job)["JobState"] == "PENDING", 120, "the job is queued again")
    assert slurm.show(job)["Restarts"] == "1"
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted", log.read_text()
    # Both nodes had a part in it.
    checkpoint = max(first.parent.iterdir())
    assert {f.name for f in checkpoint.glob("rank-*")} == {"rank-00000.pt", "rank-00001.pt"}
    # Slurm holds back for two minutes what queues again. Less will do, but within the second that
    # ended it a node takes the new start for the old one.
    until(slurm.idle, 120, "both nodes are idle")
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")
    over = slurm.wait(job, DEADLINE)

    text = log.read_text()
    assert (over["JobState"], over["ExitCode"], over["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert over["NodeList"] == "n[1-2]"
    assert text.count(f"job {job} queues again") == 1
    assert token not in text
    assert_same_run(observed(run), one_process, within=1e-5)
    # What its shells told each other goes with them.
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny", log.name, "tiny.sbatch"]


def ended(slurm: Cluster, job: int) -> bool:
    return slurm.show(job)["JobState"] not in {"PENDING", "RUNNING", "CONFIGURING"}


def secret_of(job: int) -> str:
    """The token of a job's Ray."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            # A process that has renamed itself leaves words here that are no variables.
            parts = (line.partition("=") for line in path.read_text(errors="replace").split("\0"))
            own = {name: value for name, _, value in parts}
            if own.get("SLURM_JOB_ID") == str(job) and "RAY_AUTH_TOKEN" in own:
                assert own["RAY_AUTH_MODE"] == "token"
                assert len(own["RAY_AUTH_TOKEN"]) == 64
                return own["RAY_AUTH_TOKEN"]
    raise AssertionError(f"no process of job {job} knows a token")


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace")


def test_a_sweep_is_an_array_of_its_points_and_a_job_for_the_table(
    slurm: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    learner = {"epochs": 1, "batch_pairs": 18}
    config = write_offline(tmp_path, tiny_model, pairs, learner=learner, run={"name": "grid"})
    betas = ["--objective.beta", "0.05,0.5", "--placement.device", "cpu"]
    told = submit(slurm, tmp_path, str(config), "--sweep", *betas, "--cpus-per-rank", "1")
    array = job_in(told, r"^job (\d+), 2 points: ")
    table = job_in(told, r"^job (\d+), the table once they have ended: ")
    over = slurm.wait(table, DEADLINE)

    folder = tmp_path / "runs/grid"
    log = folder.with_name(f"grid-{table}.out").read_text()
    assert (over["JobState"], over["ExitCode"]) == ("COMPLETED", "0:0"), log
    names = ["objective.beta-0.05", "objective.beta-0.5"]
    for number, name in enumerate(names, start=1):
        own = folder.with_name(f"grid-{array}_{number}.out").read_text()
        assert f"numbers: {folder / name / 'stats.json'}" in own
        assert f"done before: {folder / name / 'stats.json'}" in log
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [point["name"] for point in points] == names
    assert all(point["gain"] is not None for point in points)
