"""SIGKILL anywhere and the same command again: the bytes of a run that was never killed."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import run_values
from golden_run import ROOT, environment
from preloaded import Fork

pytestmark = pytest.mark.engine

DEADLINE = 600.0
POLL = 0.002

# In the order a run makes them: after each, or in the middle of the stage that follows, it dies.
KILL_WHEN_THERE = [
    "rounds/0000/evaluation/completions/part-00000.parquet",
    "rounds/0001/completions/part-00001.parquet",
    "rounds/0001/scores/part-00000.parquet",
    "rounds/0001/pairs.parquet",
    "rounds/0001/reference_logps.parquet",
    "rounds/0001/trainer/checkpoints/000001",
    "rounds/0001/policy",
    "rounds/0001/evaluation/scores/part-00002.parquet",
    "rounds/0001/gates.json",
    "rounds/0002/trainer/checkpoints/000001",
    "final/best/completions/part-00000.parquet",
]


def write_config(folder: Path, model: Path, name: str) -> Path:
    steps = {"batch_pairs": 1, "epochs": 4, "checkpoint_steps": 1}
    values = run_values(
        folder,
        model,
        learner={"learning_rate": 0.003, **steps},
        run={"name": name, "directory": str(folder / "runs")},
    )
    # Dropout draws numbers, so a resumed step shows whether the generator's state came back.
    values["model"]["lora"]["dropout"] = 0.1
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path) -> Fork:
    return Fork(["train", str(config)], environment(), ROOT)


def finish(process: Fork) -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode is not None
    return process.returncode, output


def wait_for(path: Path, process: Fork) -> bool:
    """True once `path` is there; False if the process ended before."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if path.exists():
            return True
        if process.poll() is not None:
            return path.exists()
        time.sleep(POLL)
    raise AssertionError(f"{path} did not appear within {DEADLINE:.0f} s")


def hashes(run: Path) -> dict[str, str]:
    """Every file whose bytes must not depend on kills: all but times, and who ran it."""
    timed = {"metrics.jsonl", ".lock", "config.json", "config.yaml", "status.json", "summary.md"}
    timed |= {"report.html"}
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in timed and path.name != "manifest.json"
    }


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = finish(start(write_config(folder, tiny_model, "run")))
    assert status == 0, output
    return folder / "runs" / "run"


def test_a_run_killed_at_every_stage_ends_with_the_same_bytes(
    whole: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "run")
    run = tmp_path / "runs" / "run"
    for point in KILL_WHEN_THERE:
        process = start(config)
        there = wait_for(run / point, process)
        assert there, f"{point}: {finish(process)}"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE)
        assert process.returncode == -signal.SIGKILL, f"the run ended before {point}"
    status, output = finish(start(config))
    assert status == 0, output
    assert hashes(run) == hashes(whole)


def test_no_step_is_logged_twice(whole: Path, tiny_model: Path, tmp_path: Path) -> None:
    import polars as pl

    config = write_config(tmp_path, tiny_model, "run")
    run = tmp_path / "runs" / "run"
    process = start(config)
    assert wait_for(run / "rounds/0001/trainer/checkpoints/000001", process)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 75, output
    assert "run the same command" in output
    status, output = finish(start(config))
    assert status == 0, output

    def steps(folder: Path) -> Any:
        log = pl.read_ndjson(folder / "metrics.jsonl", infer_schema_length=None)
        return log.filter(stage="train").select("round", "step", "loss").rows()

    assert steps(run) == steps(whole)
    assert hashes(run) == hashes(whole)


def test_a_run_folder_in_use_is_refused_by_name_of_its_holder(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "run")
    first = start(config)
    try:
        assert wait_for(tmp_path / "runs/run/config.json", first)
        # Else it might end while the second is still on its way.
        first.send_signal(signal.SIGSTOP)
        status, output = finish(start(config))
        assert status == 2, output
        assert str(first.pid) in output
    finally:
        first.kill()
        first.communicate(timeout=DEADLINE)
