"""The demo, made small, with the real model and each real engine: as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fakes
import polars as pl
import pytest
import yaml

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
SMALL = {
    "prompts.gate.limit": "2",
    "prompts.final.limit": "2",
    "rounds.count": "1",
    "rounds.prompts_per_round": "8",
    "rollout.max_new_tokens": "24",
    "rollout.samples_per_prompt": "4",
    "rollout.parity_completions": "2",
    "evaluation.samples_per_prompt": "1",
    "evaluation.kl_prompts": "2",
    "evaluation.greedy_prompts": "1",
    # So few and short answers rarely meet the real floors.
    "selection.floors": "{correctness: 0.0}",
    "selection.cold_start.min_passing_share": "0",
    "gates.max_drop": "1.0",
}


@pytest.mark.parametrize(
    ("flags", "settings"),
    [([], {}), (["--transformers"], {"model.tuning": "qlora", "model.precision": "fp32"})],
    ids=["vllm", "transformers-nf4"],
)
def test_a_small_demo_goes_round(
    flags: list[str], settings: dict[str, str], tmp_path: Path
) -> None:
    given = [f"--{key}={value}" for key, value in {**SMALL, **settings}.items()]
    ended = subprocess.run(
        [sys.executable, "-m", "launch", "demo", "--out", str(tmp_path / "demo"), *flags, *given],
        check=False,
        capture_output=True,
        text=True,
        timeout=1000,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "published version 1" in ended.stdout
    assert "PARITY FAILS" not in ended.stdout
    run = tmp_path / "demo"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    pairs = pl.read_parquet(run / "rounds/0001/pairs.parquet")
    assert 0 < pairs.height <= 8
    assert (pairs["reward_chosen"] > pairs["reward_rejected"]).all()
    assert "final split" in (run / "summary.md").read_text()
    assert not (run / "published").exists()


# An engine that answers every reload, refreshes everything, and keeps the weights it has.
STALE = """
import sys
from rollout import vllm_generator

class Stale(vllm_generator.VllmGenerator):
    def load(self, published):
        if self._loaded is None:
            return super().load(published)
        sha256 = vllm_generator.weights_sha256(published.path)
        self._loaded = vllm_generator.Loaded(published.version, sha256)
        return self._loaded

if __name__ == "__main__":
    from launch.cli import main
    vllm_generator.VllmGenerator = Stale
    sys.exit(main(sys.argv[1:]))
"""


def test_a_stale_vllm_engine_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    values = fakes.run_values(
        tmp_path,
        tiny_model,
        rollout={"engine": "vllm", "memory_gib": 0.25, "parity_tolerance": 0.5},
        rounds={"count": 1},
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    (tmp_path / "stale.py").write_text(STALE)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "stale.py"), "train", str(config)],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    # The gap alone is allowed to be large here: it is the slope that tells.
    assert "the generator does not serve version 1" in ended.stderr
    assert "1 fresh, 0 stale" in ended.stderr
    run = tmp_path / "runs/trial"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert (run / "rounds/0000/evaluation.json").exists()
    assert not (run / "rounds/0001/evaluation/completions").exists(), "nothing it said was kept"
