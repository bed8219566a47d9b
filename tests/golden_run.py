"""The tiny run that every placement must repeat, and what is compared of it.

`python tests/golden_run.py [tiny] [smollm2]` (with `tests` and the project on PYTHONPATH) writes
`golden/` anew, from runs in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import yaml
from conftest import SMOLLM2
from fakes import run_values
from preloaded import Fork
from small_models import save_chat_model

from rlhf.config_io import load, resolved
from rlhf.files import write_json
from rlhf.model_files import materialise
from rollout.imports import resolve_path

Running = subprocess.Popen[str] | Fork
ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")
DEADLINE = 1000.0
KEYS = ["prompt_id", "chosen_sample", "rejected_sample", "chosen", "rejected"]


def write_config(
    folder: Path,
    model: str | Path,
    name: str,
    rollout: Mapping[str, Any] = MappingProxyType({}),
    **sections: Any,
) -> Path:
    """Two rounds of 8 prompts x 4 samples x 24 tokens in fp32 with the Transformers generator.

    The held-out prompts, of which no pair is made, are few.
    """
    values = run_values(
        folder,
        model,
        run={"name": name, "directory": str(folder / "runs")},
        evaluation={
            "samples_per_prompt": 1,
            "bootstrap": 100,
            "kl_prompts": 2,
            "greedy_prompts": 0,
        },
        learner={"learning_rate": 0.003, "batch_pairs": 2, "checkpoint_steps": 1},
        **sections,
    )
    train = folder / "train8.jsonl"
    lines = [{"prompt": f"Tell me of thing {i}.", "cluster": f"train {i}"} for i in range(8)]
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values["prompts"]["train"] = {"path": str(train)}
    for split in ("gate", "final"):
        values["prompts"][split].setdefault("limit", 2)
    values["rollout"] |= {"max_new_tokens": 24, **rollout}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }


def start(config: Path, before: Path | None = None, ranks: int = 0) -> Fork:
    """`pairloop train` on `config`; its process runs the script `before` first."""
    told = {} if before is None else {"RUN_BEFORE": str(before)}
    return Fork(["train", str(config)], {**environment(), **told}, ROOT, ranks)


def start_ranks(config: Path, before: Path | None = None) -> Fork:
    """The same by two ranks."""
    return start(config, before, ranks=2)


def launch(config: Path, launcher: Sequence[str]) -> subprocess.Popen[str]:
    """`pairloop train` on `config`, by way of a launcher's words before `-m launch`."""
    command = [sys.executable, *launcher, "-m", "launch", "train", str(config)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
    )


def finish(process: Running) -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode is not None
    return process.returncode, output


def wait_for(path: Path, process: Running) -> None:
    """Until `path` is there; it fails if the process ends before, or at the deadline."""
    end = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, finish(process)
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{path} did not appear: {finish(process)}")
        time.sleep(0.01)


def observed(run: Path) -> dict[str, Any]:
    """Pairs and losses of both rounds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "train"]
    return {
        str(index): {
            "pairs": pl.read_parquet(run / f"rounds/{index:04d}/pairs.parquet").select(KEYS).rows(),
            "losses": [line["loss"] for line in steps if line["round"] == index],
        }
        for index in (1, 2)
    }


def replay(config: Path, name: str) -> Path:
    """Put round 2's stored answers into a run that has not begun; its folder.

    Round 1's come from the same weights everywhere. By round 2 rounding has made weights differ by
    a millionth or so, and of a thousand tokens drawn one may then be another.
    """
    settings = load([config])
    run = Path(settings.run.directory) / settings.run.name
    write_json(run / "config.json", resolved(settings))
    shutil.copytree(GOLDEN / name, run / "rounds/0002/completions")
    return run


def run(
    folder: Path,
    model: str | Path,
    name: str,
    begin: Callable[[Path], Running] = start,
    zero: int = 0,
) -> dict[str, Any]:
    """What is `observed` of a whole run that `begin` starts."""
    config = write_config(folder, model, name, placement={"zero": zero} if zero else {})
    found = replay(config, name)
    status, output = finish(begin(config))
    assert status == 0, output
    assert "done: all 2 rounds ran" in output
    return observed(found)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], within: float) -> None:
    """The same pairs, and losses as near."""
    for index in ("1", "2"):
        assert found[index]["pairs"] == expected[index]["pairs"]
        gaps = np.subtract(found[index]["losses"], expected[index]["losses"])
        assert len(gaps) >= 3 and abs(gaps).max() < within, gaps


def golden(name: str) -> dict[str, Any]:
    """What a run in one process gave when it was written."""
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    for values in found.values():
        values["pairs"] = [tuple(pair) for pair in values["pairs"]]
    return found


def write(name: str, model: str | Path, folder: Path) -> None:
    """Write `golden/NAME.json`, and round 2's answers beside it, from a run in one process."""
    status, output = finish(start(write_config(folder, model, name)))
    assert status == 0, output
    run = folder / "runs" / name
    (GOLDEN / f"{name}.json").write_text(json.dumps(observed(run), indent=1) + "\n")
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    shutil.copytree(run / "rounds/0002/completions", GOLDEN / name)


def main(names: Sequence[str]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "tiny": str(save_chat_model(Path(folder) / "model")),
            "smollm2": materialise(str(resolve_path(SMOLLM2))),
        }
        for name in names or models:
            write(name, models[name], Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
