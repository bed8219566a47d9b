"""On-policy rounds with each kind of objective: what they train on, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fakes import run_values

from launch.local import train
from rlhf.config import RunConfig
from rlhf.errors import DataGateError
from rlhf.labels import labels_schema


def one_round(
    folder: Path, model: Path, objective: dict[str, Any], verifier: str = "vowels"
) -> Path:
    """The folder of a run of one round, trained."""
    values = run_values(
        folder,
        model,
        verifier,
        objective=objective,
        rollout={"max_new_tokens": 4},
        rounds={"count": 1},
        evaluation={"kl_prompts": 2},
    )
    assert train(RunConfig.model_validate(values)) == 0
    return folder / "runs" / "trial"


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "train"]


@pytest.mark.slow
def test_a_round_of_kto_trains_on_labels(tiny_model: Path, tmp_path: Path) -> None:
    run = one_round(tmp_path, tiny_model, {"name": "kto"})
    folder = run / "rounds/0001"
    labels = pl.read_parquet(folder / "labels.parquet")
    assert labels.schema == labels_schema(["correctness", "style"])
    assert set(labels["good"]) == {True, False}
    reference = pl.read_parquet(folder / "reference_logps.parquet")
    own = reference.filter(pl.col("prompt_id") == pl.col("answer_prompt_id"))
    keys = ["prompt_id", "answer_sample"]
    assert labels.join(own, left_on=["prompt_id", "sample"], right_on=keys, how="anti").is_empty()
    assert own.height < reference.height, "log-probs of mismatched answers are cached too"
    steps = steps_of(run)
    # Two labels a step, a third one where the last would be alone.
    assert len(steps) == labels.height // 2
    assert all("kl_baseline" in step and "margin" not in step for step in steps)
    manifest = json.loads((folder / "manifest.json").read_text())["artifacts"]
    assert {"labels", "labels_funnel", "pairs", "policy"} <= manifest.keys()
    card = (folder / "policy/README.md").read_text()
    assert f"on {labels.height} labels" in card and "KTO" in card
    summary = (run / "summary.md").read_text()
    assert "How completions became good and bad answers" in summary
    assert "kto, beta 0.2, on labels" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_round_of_orpo_has_no_reference(tiny_model: Path, tmp_path: Path) -> None:
    run = one_round(tmp_path, tiny_model, {"name": "orpo", "beta": 0.1})
    folder = run / "rounds/0001"
    assert (folder / "pairs.parquet").is_file()
    assert not (folder / "reference_logps.parquet").exists()
    steps = steps_of(run)
    assert steps and all({"nll", "margin", "accuracy"} <= step.keys() for step in steps)
    assert all("logratio_chosen" not in step for step in steps)
    assert "no reference" in (folder / "policy/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "first"),
    [
        ({"name": "ipo", "beta": 0.5}, 1.0),
        ({"name": "robust_dpo", "label_smoothing": 0.2}, 0.6931),
    ],
)
def test_a_round_of_any_other_objective_starts_at_its_value_at_the_reference(
    tiny_model: Path, tmp_path: Path, objective: dict[str, Any], first: float
) -> None:
    steps = steps_of(one_round(tmp_path, tiny_model, objective))
    assert steps[0]["loss"] == pytest.approx(first, abs=1e-3)


def test_kto_stops_where_one_kind_of_answer_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataGateError, match=r"no good answer is left.*margin.*kto needs both"):
        one_round(tmp_path, tiny_model, {"name": "kto"}, "indifferent")
