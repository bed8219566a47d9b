"""`pairloop pairs select` and `dedupe` as a user meets them; under Ray in test_ray_data.py."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import report_runs

from launch.cli import main
from rlhf.files import read_json


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["pairs", *words]) == 2
    return capsys.readouterr().err


def test_a_stored_round_gives_its_own_pairs_again(tmp_path: Path) -> None:
    config = report_runs.make_config(tmp_path / "runs")
    run = report_runs.Runs(config, [0.5, 0.6, 0.7]).finish()
    stored, again = run / "rounds/0001", tmp_path / "again"
    words = ["select", str(run / "config.yaml"), str(stored), str(again), "--round", "1"]
    assert main(["pairs", *words]) == 0
    pairs = pl.read_parquet(again / "pairs.parquet")
    assert pairs.height > 0
    assert pairs.equals(pl.read_parquet(stored / "pairs.parquet"))
    assert read_json(again / "funnel.json", "") == read_json(stored / "funnel.json", "")


def test_what_stands_is_written_as_it_was_and_what_fell_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["Open?", "open? ", "When is my parcel due to arrive in Rome?",
             "When is my parcel due to arrive in Rome??", "Open?"]  # fmt: skip
    turns = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": a}]
             for a in asked]  # fmt: skip
    pool = pl.DataFrame({"messages": turns, "context": ["x", "x", None, None, "y"], "n": range(5)})
    pool.write_parquet(tmp_path / "pool.parquet")
    out, fallen = tmp_path / "out.parquet", tmp_path / "fallen.parquet"
    words = ["dedupe", str(tmp_path / "pool.parquet"), str(out), "--fallen", str(fallen)]
    assert main(["pairs", *words]) == 0
    assert "compared by messages, context" in capsys.readouterr().out
    assert pl.read_parquet(out).equals(pool[[0, 2, 4]])
    fell = pl.read_parquet(fallen)
    assert fell.select("record", "kept").rows() == [(2, 1), (4, 3)]
    assert fell["similarity"][0] == 1
    assert 0.8 < fell["similarity"][1] < 1


def test_what_dedupe_cannot_do_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, out = str(tmp_path / "pool.parquet"), str(tmp_path / "out.parquet")
    pl.DataFrame({"question": ["a"], "n": [1]}).write_parquet(pool)
    text = ["--text", "question"]
    assert "--similarity must be above 0" in refused(
        capsys, "dedupe", pool, out, *text, "--similarity", "1.2"
    )
    assert "must end in .parquet" in refused(capsys, "dedupe", pool, out[:-8] + ".jsonl", *text)
    assert "must not exist yet" in refused(capsys, "dedupe", pool, pool, *text)
    assert "name its text with --text" in refused(capsys, "dedupe", pool, out)
    assert "--text n must be text or messages" in refused(
        capsys, "dedupe", pool, out, "--text", "n"
    )
    missing = str(tmp_path / "none.parquet")
    assert "must be a Parquet file or a folder" in refused(capsys, "dedupe", missing, out, *text)
    other = tmp_path / "parts"
    other.mkdir()
    pl.DataFrame({"question": ["a"]}).write_parquet(other / "a.parquet")
    pl.DataFrame({"question": [1]}).write_parquet(other / "b.parquet")
    assert "must have the columns of" in refused(capsys, "dedupe", str(other), out, *text)
    assert not Path(out).exists()
