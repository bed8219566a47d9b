"""`pairloop sweep`: a grid's points, each a run; what is kept, what failed, what it says."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import run_values
from test_offline import write_config, write_pairs

import launch.sweep
from launch.cli import main
from launch.held_out import config_for
from launch.machines import this_machine
from launch.placement import settle
from rlhf.config_offline import OfflineConfig
from rlhf.errors import DataGateError, InputError, Interrupted
from rlhf.interrupts import Interrupts
from rlhf.rounds import RunStore
from rlhf.sweep import Answers, Change, grid, outcome, rows, values_of
from rollout.transformers_generator import TransformersGenerator

BETAS = ["--objective.beta", "0.05,0.5"]


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    learner = {"epochs": 1, "batch_pairs": 18}
    return write_config(tmp_path, tiny_model, pairs, learner=learner, run={"name": "grid"})


@pytest.mark.slow
def test_each_point_is_a_run_and_the_table_compares_them(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["sweep", str(config), *BETAS]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "runs/grid"
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [p["settings"] for p in points] == [{"objective.beta": b} for b in ("0.05", "0.5")]
    for point in points:
        stats = json.loads((folder / point["name"] / "stats.json").read_text())
        end = stats["epochs"][stats["best_epoch"] - 1]
        assert point["after"] == pytest.approx(end["validation_preferred"])
        assert point["before"] == pytest.approx(stats["start"]["preferred"])
        assert point["gain"] == pytest.approx(point["after"] - point["before"])
        ratios = [abs(end[f"validation_logratio_{kind}"]) for kind in ("chosen", "rejected")]
        assert point["drift"] == pytest.approx(sum(ratios) / 2)
        assert point["examples"] == 6
        assert point["low"] <= point["gain"] <= point["high"]
    with (folder / "sweep.csv").open() as file:
        assert [row["objective.beta"] for row in csv.DictReader(file)] == ["0.05", "0.5"]
    page = (folder / "sweep.html").read_text()
    assert "beta 0.05" in page
    assert "<svg" in page
    assert "gained" in shown
    # The same command trains nothing again.
    monkeypatch.setattr(launch.sweep, "train", pytest.fail)
    before = (folder / "sweep.json").read_bytes()
    assert main(["sweep", str(config), *BETAS]) == 0
    assert (folder / "sweep.json").read_bytes() == before


def stats_of(epoch: dict[str, float]) -> dict[str, Any]:
    """`stats.json` of a training of one epoch."""
    held = {"measure": "preferred", "examples": 40, "clusters": 20, "before": 0.5, "after": 0.8}
    held |= {"change": 0.3, "low": 0.1, "high": 0.5}
    best = {"epochs": [epoch], "best_epoch": 1, "held_out": held}
    return {**best, "advice": ["stuck: the loss went from 0.7 to 0.7"]}


def finish(config: OfflineConfig) -> int:
    """A point's training, its numbers made up."""
    ends = {"logratio_chosen": 1.0, "logratio_rejected": -3.0, "loss": 0.5}
    stats = stats_of({f"validation_{name}": value for name, value in ends.items()})
    with RunStore.open(settle(config, this_machine())) as store:
        folder = store.folder
    (folder / "stats.json").write_text(json.dumps(stats))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    return 0


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("no such thing"), 2), (MemoryError("out of memory"), 1)]
)
def test_a_point_that_fails_is_said_and_loses_no_other(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
) -> None:
    tried = []

    def train(config: OfflineConfig) -> int:
        tried.append(config.objective.beta)
        if config.objective.beta == 0.1 and len(tried) < 4:
            raise error
        return finish(config)

    monkeypatch.setattr(launch.sweep, "train", train)
    command = ["sweep", str(config), "--objective.beta=0.05,0.1,0.2"]
    assert main(command) == status
    shown = capsys.readouterr().out
    assert f"point 2 failed: {error}" in shown
    points = json.loads((tmp_path / "runs/grid/sweep.json").read_text())["points"]
    assert [p["failure"] for p in points] == [None, str(error), None]
    assert [p["gain"] for p in points] == [pytest.approx(0.3), None, pytest.approx(0.3)]
    assert points[0]["drift"] == 2.0
    assert f"failed: {error}" in (tmp_path / "runs/grid/sweep.html").read_text()
    # Only that point is tried again.
    assert main(command) == 0
    assert tried == [0.05, 0.1, 0.2, 0.1]


def test_an_interruption_stops_the_sweep_and_keeps_what_is_done(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(config: OfflineConfig) -> int:
        tried.append(config.objective.beta)
        if len(tried) == 2:
            raise Interrupted("stopped at a safe point")
        return finish(config)

    monkeypatch.setattr(launch.sweep, "train", train)
    assert main(["sweep", str(config), *BETAS]) == 75
    assert main(["sweep", str(config), *BETAS]) == 0
    assert tried == [0.05, 0.5, 0.5]


def test_every_combination_is_a_point_with_a_folder_of_its_own(config: Path) -> None:
    flags = [("objective.beta", "0.1,0.2"), ("learner.epochs", "1,2"), ("run.seed", "7")]
    folder, points = grid([config], flags)
    assert [(p.config.objective.beta, p.config.learner.epochs) for p in points] == [
        (0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)
    ]  # fmt: skip
    assert {p.config.run.seed for p in points} == {7}
    assert points[1].name == "objective.beta-0.1--learner.epochs-2"
    assert {p.config.run.directory for p in points} == {str(folder)}
    _, files = grid([config], [("data.path", "a/b.jsonl,a_b.jsonl,a:b.jsonl")])
    assert len({p.name for p in files}) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"objective.beta": "0.1,0"}, r"objective\.beta must be a number > 0, found 0 "),
        ({"objective.beta": "0.1,hot"}, r'objective\.beta must be .*found "hot"'),
        ({"objective.bta": "0.1,0.2"}, r"unknown key objective\.bta.*did you mean beta"),
        ({"objective.beta": "0.1,,0.2"}, r"--objective\.beta has an empty value"),
        ({"objective.beta": "0.1,0.2,"}, r"--objective\.beta has an empty value"),
        ({"objective.beta": ",0.1"}, r"--objective\.beta has an empty value"),
        ({"objective.beta": "0.1,0.1"}, r"each value once, got 0\.1 again"),
        ({"objective.beta": "0.1"}, r"needs a setting with several values"),
        ({"run.name": "a,b"}, r"--run\.name can't be varied"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(
    config: Path, tmp_path: Path, flags: dict[str, str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        grid([config], list(flags.items()))
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_not_written_into_a_run(config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/grid").mkdir(parents=True)
    (tmp_path / "runs/grid/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"run\.name: .* holds a run"):
        grid([config], [("objective.beta", "0.1,0.2")])


def test_commas_in_brackets_and_quotes_part_no_values() -> None:
    assert values_of("a.b", "[q,v],all-linear,'x,y'") == ["[q,v]", "all-linear", "'x,y'"]


def test_without_a_reference_there_is_no_drift(config: Path) -> None:
    _, points = grid([config], [("objective.beta", "0.1,0.2")])
    found = outcome(points[0], stats_of({"validation_loss": 0.9}))
    assert found.drift is None
    assert found.gain == pytest.approx(0.3)
    (row,) = rows([found])
    assert (row["gained"], row["drift"], row["said"]) == ("+0.300", "no reference", "stuck")


def test_what_does_not_fit_is_refused_before_any_point_is_trained(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch.sweep, "train", pytest.fail)
    # The first point could be trained; the second needs labels.
    assert main(["sweep", str(config), "--objective.name", "dpo,kto"]) == 2
    assert "kto trains on labels" in capsys.readouterr().err


def test_a_stop_that_came_at_a_point_s_end_begins_no_other(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(config: OfflineConfig) -> int:
        tried.append(config.objective.beta)
        with Interrupts():
            signal.raise_signal(signal.SIGUSR1)
        return finish(config)

    monkeypatch.setattr(launch.sweep, "train", train)
    assert main(["sweep", str(config), *BETAS]) == 75
    assert tried == [0.05]


@pytest.mark.parametrize("gated", ["one", "start"])
def test_answers_that_judges_would_not_score_lose_no_table(
    config: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gated: str,
) -> None:
    online = tmp_path / "online.yaml"
    online.write_text(yaml.safe_dump(run_values(tmp_path / "online", tiny_model)))
    error = DataGateError("judges abstained on 40% of the answers")

    def answers(config: Any, policies: Any, terminal: Any) -> list[Any]:
        if gated == "start":
            raise error
        return [Answers(0.1, {"reward": Change(0.2, 0.1, 0.3)}), None]

    monkeypatch.setattr(launch.sweep, "train", finish)
    monkeypatch.setattr(launch.sweep, "answers", answers)
    assert main(["sweep", str(config), *BETAS, "--held-out", str(online)]) == 3
    points = json.loads((tmp_path / "runs/grid/sweep.json").read_text())["points"]
    assert [p["gain"] for p in points] == [pytest.approx(0.3)] * 2
    assert (str(error) in capsys.readouterr().err) == (gated == "start")


def test_precision_auto_is_settled_once_for_a_point_and_its_training(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sweep", str(config), *BETAS, "--model.precision", "auto"]
    monkeypatch.setattr(launch.sweep, "train", finish)
    assert main(command) == 0
    monkeypatch.setattr(launch.sweep, "train", pytest.fail)
    assert main(command) == 0


@pytest.mark.engine
def test_points_answer_held_out_prompts_and_judges_score_them(
    config: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run_values(tmp_path / "online", tiny_model)
    # Its own adapter is none of the sweep's: points are served as they were trained.
    values["model"]["lora"]["rank"] = 8
    online = tmp_path / "online.yaml"
    online.write_text(yaml.safe_dump(values))
    command = ["sweep", str(config), *BETAS, "--held-out", str(online)]
    assert main(command) == 0
    folder = tmp_path / "runs/grid"
    points = json.loads((folder / "sweep.json").read_text())["points"]
    (run,) = folder.glob("held-out-*")
    for number, point in enumerate(points, start=1):
        stored = json.loads((run / f"rounds/000{number}/evaluation.json").read_text())
        start = stored["against"]["start"]["change"]
        changes = point["answers"]["changes"]
        assert set(changes) == {"reward", "correctness", "style", "audit.words"}
        for name, change in changes.items():
            assert change["value"] == start[name]["difference"]
            assert (change["low"], change["high"]) == (start[name]["low"], start[name]["high"])
        kl = json.loads((run / f"rounds/000{number}/drift.json").read_text())["kl_start"]["value"]
        assert point["answers"]["kl"] == kl
        served = (run / f"rounds/000{number}/policy/adapter_model.safetensors").read_bytes()
        own = folder / point["name"] / "rounds/0001/policy/adapter_model.safetensors"
        assert served == own.read_bytes()
    page = (folder / "sweep.html").read_text()
    assert "correctness gained against KL" in page and "audit.words" in page
    # Nothing is trained, drawn or scored again.
    monkeypatch.setattr(launch.sweep, "train", pytest.fail)
    monkeypatch.setattr(TransformersGenerator, "generate", pytest.fail)
    before = (folder / "sweep.json").read_bytes()
    assert main(command) == 0
    assert (folder / "sweep.json").read_bytes() == before


def test_points_are_served_in_one_process_whatever_the_run_of_their_prompts_would_do(
    config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rollout, apart = {"engine": "vllm", "transfer": "network"}, {"kind": "ray", "colocate": False}
    values = run_values(tmp_path / "online", tiny_model, rollout=rollout, placement=apart)
    values["model"]["tuning"] = "full"
    online = tmp_path / "online.yaml"
    online.write_text(yaml.safe_dump(values))
    _, points = grid([config], [("objective.beta", "0.1,0.2")])
    found = config_for(online, tmp_path / "out", points)
    assert (found.placement.kind, found.rollout.transfer) == ("auto", "auto")


@pytest.mark.parametrize(
    ("flags", "model", "expected"),
    [
        (["--model.lora.rank", "2,4"], None, "no setting of model can be varied"),
        (BETAS, "org/other", r"model.path must be the sweep's"),
        (BETAS, "missing file", "does not exist"),
    ],
)
def test_held_out_prompts_that_do_not_fit_are_refused_before_training(
    config: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    model: str | None,
    expected: str,
) -> None:
    values = run_values(tmp_path / "online", model or tiny_model)
    online = tmp_path / "online.yaml"
    if model != "missing file":
        online.write_text(yaml.safe_dump(values))
    assert main(["sweep", str(config), *flags, "--held-out", str(online)]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs/grid").exists()
