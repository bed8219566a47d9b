"""The demo, made small, with the real model and each real engine: as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
SMALL = {
    "prompts.gate.limit": "8",
    "prompts.final.limit": "8",
    "rounds.count": "1",
    "rounds.prompts_per_round": "16",
    "rollout.max_new_tokens": "24",
    "rollout.samples_per_prompt": "4",
    "rollout.parity_completions": "4",
    "evaluation.samples_per_prompt": "1",
    "evaluation.kl_prompts": "4",
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
        timeout=500,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "published version 1" in ended.stdout
    assert "PARITY FAILS" not in ended.stdout
    run = tmp_path / "demo"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    pairs = pl.read_parquet(run / "rounds/0001/pairs.parquet")
    assert 0 < pairs.height <= 16
    assert (pairs["reward_chosen"] > pairs["reward_rejected"]).all()
    assert "final split" in (run / "summary.md").read_text()
    assert not (run / "published").exists()
