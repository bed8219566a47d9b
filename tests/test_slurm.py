"""A run as a Slurm job over two nodes, one rank each: it stops, queues again, goes on, ends."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from fakes import run_values
from golden_run import finish, start_ranks
from nodes import until
from slurm_cluster import Cluster, cluster

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

DEADLINE = 600.0
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


class Trial:
    """A run in a folder of its own, and what is submitted for it."""

    def __init__(self, folder: Path, model: Path, slurm: Cluster) -> None:
        self.folder = folder
        self.run = folder / "runs/trial"
        self._slurm = slurm
        values = run_values(
            folder,
            model,
            learner={"batch_pairs": 1, "epochs": 8, "checkpoint_steps": 1},
            rounds={"count": 1},
            placement={"device": "cpu"},
        )
        # Dropout draws numbers, so a resumed step shows whether the generators' state came back.
        values["model"]["lora"]["dropout"] = 0.1
        (folder / "run.yaml").write_text(yaml.safe_dump(values))

    def submit(self) -> int:
        python = [sys.executable, "-m", "launch", "submit", "slurm", "run.yaml"]
        asked = ["--nodes", "2", "--cpus-per-rank", "1", "--time", "30"]
        paths = f"{TESTS}:{TESTS.parent}"
        told = self._slurm.run(*python, *asked, cwd=self.folder, PYTHONPATH=paths)
        found = re.search(r"^job (\d+): ", told)
        assert found, told
        return int(found[1])

    def log(self, job: int) -> str:
        return (self.folder / f"runs/trial-{job}.out").read_text()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return found

    def losses(self) -> list[tuple[int, float]]:
        lines = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_job_over_two_nodes_that_is_told_to_stop_queues_again_once_and_goes_on_exactly(
    tiny_model: Path, slurm: Cluster, tmp_path: Path
) -> None:
    other = Trial(tmp_path / "other", tiny_model, slurm)
    status, output = finish(start_ranks(other.folder / "run.yaml"))
    assert status == 0, output
    trial = Trial(tmp_path / "job", tiny_model, slurm)
    job = trial.submit()
    first = trial.run / "rounds/0001/trainer/checkpoints/000001"
    until(first.is_dir, DEADLINE, f"{first} is there")
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))

    until(lambda: slurm.show(job)["JobState"] == "PENDING", 120, "the job is queued again")
    assert slurm.show(job)["Restarts"] == "1"
    assert trial.status()["state"] == "interrupted", trial.log(job)
    assert not (trial.run / "rounds/0001/policy").exists()
    checkpoint = max(first.parent.iterdir())
    # Of each rank that trains.
    assert {f.name for f in checkpoint.glob("rank-*")} == {"rank-00000.pt", "rank-00001.pt"}
    stopped_at = len(trial.losses())
    # Slurm holds back for two minutes what queues again. Less will do, but within the second that
    # ended it a node takes the new start for the old one.
    until(slurm.idle, 120, "both nodes are idle")
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")
    over = slurm.wait(job, DEADLINE)

    log = trial.log(job)
    assert (over["JobState"], over["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert (over["NodeList"], over["NumTasks"], over["Restarts"]) == ("n[1-2]", "2", "1")
    assert log.count(f"job {job} queues again") == 1
    assert trial.status()["state"] == "done"
    # As two ranks that nobody stopped.
    assert 0 < stopped_at < len(other.losses())
    assert trial.losses() == other.losses()
    for name in ("pairs.parquet", "policy/adapter_model.safetensors"):
        mine, others = (t.run / "rounds/0001" / name for t in (trial, other))
        if name.endswith(".parquet"):
            assert pl.read_parquet(mine).equals(pl.read_parquet(others))
        else:
            assert mine.read_bytes() == others.read_bytes()


def test_a_rank_that_dies_ends_its_job_soon_and_for_good(
    tiny_model: Path, slurm: Cluster, tmp_path: Path
) -> None:
    trial = Trial(tmp_path, tiny_model, slurm)
    job = trial.submit()
    first = trial.run / "rounds/0001/trainer/checkpoints/000001"
    until(first.is_dir, DEADLINE, f"{first} is there")
    os.kill(rank_process(job, 1), signal.SIGKILL)
    over = slurm.wait(job, 120)
    log = trial.log(job)
    assert (over["JobState"], over["ExitCode"], over["Restarts"]) == ("FAILED", "137:0", "0"), log
    assert trial.status()["state"] == "failed"
    assert "another rank ended" in log


def rank_process(job: int, rank: int) -> int:
    """The process of a job's rank, as this machine counts processes."""
    wanted = {f"SLURM_JOB_ID={job}", f"RANK={rank}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted <= set((folder / "environ").read_text(errors="replace").split("\0")):
                return int(folder.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


def test_a_run_that_fails_ends_its_job_with_its_own_status(
    tiny_model: Path, slurm: Cluster, tmp_path: Path
) -> None:
    trial = Trial(tmp_path, tiny_model, slurm)
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    # Nothing is that good: no pair, which is a data gate.
    values["selection"]["floors"] = {"correctness": 1.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    job = trial.submit()
    over = slurm.wait(job, DEADLINE)
    assert (over["JobState"], over["ExitCode"]) == ("FAILED", "3:0"), trial.log(job)
    assert over["Restarts"] == "0"
    assert trial.status()["state"] == "failed"
