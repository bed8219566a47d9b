"""Real Ray Data, in a cluster of this machine: what the commands write is the same to the byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from golden_run import environment
from test_shards import pool, shared_out, store, voted

pytestmark = pytest.mark.engine

CONFIG = """
run: {name: again}
model: {path: none}
prompts: {train: {path: a.jsonl}, gate: {path: b.jsonl}, final: {path: c.jsonl}}
judges:
  panel:
    - name: own
      function: "verifiers:verify"
      dimensions: [correctness, problem_solution, style]
selection: {floors: {correctness: 0.3}, min_margin: 0.05, %s}
"""
IN_SHARDS = """
import sys
from rlhf import duplicate_shards, selection_shards
duplicate_shards.slices_of.__defaults__ = selection_shards.shards_of.__defaults__ = (40,)
duplicate_shards._BUCKET_KEYS = 100
from launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def patient() -> dict[str, str]:
    """Ray's raylet has 30 seconds to start by default, which a busy machine may not keep."""
    return {**environment(), "RAY_raylet_start_wait_time_s": "180"}


def pairloop(folder: Path, *words: str, small: bool = False) -> str:
    """What a command prints; with `small`, where a task reads 40 rows."""
    start = ["-c", IN_SHARDS] if small else ["-m", "launch"]
    done = subprocess.run(
        [sys.executable, *start, "pairs", *words], cwd=folder, env=patient(),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rules", ["strategy: all_pairs", "max_pairs: 17, length_penalty: 0.1"])
def test_pairs_and_funnel_are_those_of_one_process(tmp_path: Path, rules: str) -> None:
    answers = voted(60, seed=1)
    store(tmp_path, answers, shared_out(answers[2]["prompt_id"].to_list(), 9, seed=1))
    (tmp_path / "run.yaml").write_text(CONFIG % rules)
    said = pairloop(tmp_path, "select", "run.yaml", ".", "one")
    assert "completions of 60 prompts" in said
    again = pairloop(tmp_path, "select", "run.yaml", ".", "many", "--ray", small=True)
    assert again == said.replace("to one", "to many")
    assert pl.read_parquet(tmp_path / "one/pairs.parquet").height >= 17
    for name in ("pairs.parquet", "funnel.json"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_same_records_fall_as_in_one_process(tmp_path: Path) -> None:
    records = pool(5, 200)
    (tmp_path / "pool").mkdir()
    records[:90].write_parquet(tmp_path / "pool/a.parquet", row_group_size=20)
    records[90:].write_parquet(tmp_path / "pool/b.parquet", row_group_size=20)
    said = pairloop(tmp_path, "dedupe", "pool", "one.parquet", "--fallen", "one.jsonl")
    again = pairloop(
        tmp_path, "dedupe", "pool", "many.parquet", "--fallen", "many.jsonl", "--ray", small=True
    )
    assert again == said.replace("one.parquet", "many.parquet")
    left = pl.read_parquet(tmp_path / "one.parquet")
    assert 0 < left.height < records.height
    assert left.equals(records.filter(pl.col("number").is_in(left["number"].implode())))
    for name in ("parquet", "jsonl"):
        many, one = (tmp_path / f"{which}.{name}" for which in ("many", "one"))
        assert many.read_bytes() == one.read_bytes()


def test_what_is_wrong_in_a_task_is_said_as_in_one_process(tmp_path: Path) -> None:
    completions, scores, prompts = voted(8, seed=2)
    names = prompts["prompt_id"].to_list()
    store(
        tmp_path, (completions, pl.concat([scores, scores[-1:]]), prompts), [names[:4], names[4:]]
    )
    (tmp_path / "run.yaml").write_text(CONFIG % "max_pairs: 3")
    words = ["pairs", "select", "run.yaml", ".", "out", "--ray"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=tmp_path, env=patient(),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "has two scores of" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
