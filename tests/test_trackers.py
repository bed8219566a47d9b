"""Trackers hear every line once, in order, whatever kills the run; and none of them stops one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from fakes import run_values
from hypothesis import given
from hypothesis import strategies as st
from trackers_read import tensorboard, wandb_ids, wandb_lines

from rlhf import tracking
from rlhf.config import Tracking
from rlhf.errors import InputError
from rlhf.metrics import Metrics
from rlhf.protocols import TrackedRun
from rlhf.tracking import Trackers, answer_rows, pair_rows
from rlhf.types import COMPLETIONS, Prompt, pairs_schema

ROOT = Path(__file__).parents[1]
DEADLINE = 600.0


class Recorder:
    """Keeps what it is told; fails where it is asked to."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.run: TrackedRun | None = None
        self.lines: list[tuple[int | None, str, int, dict[str, float]]] = []
        self.tables: list[tuple[int, str, list[Mapping[str, str | float]]]] = []
        self.state: str | None = None

    def start(self, run: TrackedRun) -> str:
        self.run = run
        self._fail("start")
        return "here"

    def log(self, round: int | None, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._fail(stage)
        self.lines.append((round, stage, step, dict(values)))

    def table(self, round: int, name: str, rows: Sequence[Mapping[str, str | float]]) -> None:
        self._fail("table")
        self.tables.append((round, name, list(rows)))

    def finish(self, state: str) -> None:
        self._fail("finish")
        self.state = state

    def _fail(self, at: str) -> None:
        if at == self.fails_at:
            raise ConnectionError(f"no route from {at}, key {os.environ.get('WANDB_API_KEY')}")


def started(folder: Path, *trackers: Recorder, say: Any = lambda text: None) -> Trackers:
    found = Trackers({f"t{i}": tracker for i, tracker in enumerate(trackers)}, say)
    found.start("trial", {"run": {"name": "trial"}}, folder / "trackers")
    return found


def log_of(folder: Path, trackers: Trackers) -> Metrics:
    """As a run's stages open it: what is there is told first."""
    metrics = Metrics(folder / "metrics.jsonl", trackers.log)
    trackers.replay(metrics.read())
    return metrics


def test_training_steps_count_over_rounds_and_other_stages_stand_at_the_steps_so_far(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    metrics = log_of(tmp_path, started(tmp_path, recorder))
    metrics.log(0, "held_out", 1, {"reward": 0.5})
    for index in (1, 2):
        metrics.log(index, "completions", 1, {"seconds": 2.0, "tokens": 7})
        for step in (1, 2, 3):
            metrics.log(
                index, "train", step, {"loss": 0.7, "note": "no number", "nan": float("nan")}
            )
        metrics.log(index, "held_out", 1, {"reward": 0.6})
    metrics.log(None, "claim", 1, {"reward": 0.1})
    assert [(stage, step) for _, stage, step, _ in recorder.lines] == [
        ("held_out", 0),
        ("completions", 0), ("train", 1), ("train", 2), ("train", 3), ("held_out", 3),
        ("completions", 3), ("train", 4), ("train", 5), ("train", 6), ("held_out", 6),
        ("claim", 6),
    ]  # fmt: skip
    assert recorder.lines[1][3] == {"seconds": 2.0, "tokens": 7.0}
    assert recorder.lines[2][3] == {"loss": 0.7}


@pytest.mark.slow
@given(kills=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=4))
def test_whatever_kills_a_run_each_line_is_told_once_and_no_step_goes_back(
    kills: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed after so many lines of its process, then resumed from a checkpoint some steps back."""
    folder = tmp_path_factory.mktemp("killed")
    heard: list[tuple[int | None, str, int, dict[str, float]]] = []
    planned = [(r, "train", s) for r in (1, 2) for s in range(1, 6)]
    position = 0
    for lines, back in [*kills, (len(planned), 0)]:
        recorder = Recorder()
        metrics = log_of(folder, started(folder, recorder))
        for round_, stage, step in planned[position : position + lines]:
            metrics.rewind(round_, stage, after_step=step - 1)
            metrics.log(round_, stage, step, {"loss": 1.0})
        heard += recorder.lines
        reached = min(len(planned), position + lines)
        # No checkpoint lies before the round under way.
        position = max(reached - back, 5 if reached > 5 else 0)
    steps = [step for _, _, step, _ in heard]
    assert steps == list(range(1, 11))
    assert recorder.run is not None
    assert len({json.loads((folder / "trackers/id.json").read_text())["id"]}) == 1


def test_a_tracker_that_joins_later_hears_what_it_missed(tmp_path: Path) -> None:
    metrics = log_of(tmp_path, started(tmp_path))
    metrics.log(1, "train", 1, {"loss": 0.7})
    late = Recorder()
    metrics = log_of(tmp_path, started(tmp_path, late))
    metrics.log(1, "train", 2, {"loss": 0.6})
    assert [line[2] for line in late.lines] == [1, 2]
    again = Recorder()
    log_of(tmp_path, started(tmp_path, again))
    assert not again.lines
    assert late.run is not None and again.run is not None
    assert (late.run.identity, late.run.told) == (again.run.identity, 0)
    assert again.run.told == 2


def test_tables_are_made_only_for_whom_they_are_new(tmp_path: Path) -> None:
    made: list[int] = []

    def rows() -> list[dict[str, str | float]]:
        made.append(1)
        return [{"prompt": "p", "margin": 0.5}]

    first = Recorder()
    trackers = started(tmp_path, first)
    for index in (1, 2, 2):
        trackers.table(index, "pairs", rows)
    trackers.table(3, "greedy", list)
    assert [(index, name) for index, name, _ in first.tables] == [(1, "pairs"), (2, "pairs")]
    again = Recorder()
    started(tmp_path, again).table(1, "pairs", rows)
    assert not again.tables
    assert len(made) == 2


@pytest.mark.parametrize("at", ["train", "table", "finish"])
def test_a_tracker_lost_on_the_way_is_said_and_the_others_go_on(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    said: list[str] = []
    broken, sound = Recorder(fails_at=at), Recorder()
    trackers = started(tmp_path, broken, sound, say=said.append)
    trackers.log(1, "train", 1, {"loss": 0.7})
    trackers.table(1, "pairs", lambda: [{"prompt": "p"}])
    trackers.log(1, "train", 2, {"loss": 0.6})
    trackers.finish("done")
    assert list(trackers.lost) == ["t0"]
    warnings = [line for line in said if line.startswith("WARNING: tracker t0 is lost: Connection")]
    assert len(warnings) == 1
    assert "canary" not in "".join([*said, *trackers.lost.values()])
    assert [line[2] for line in sound.lines] == [1, 2]
    assert (len(sound.tables), sound.state) == (1, "done")


def test_a_tracker_that_cannot_start_is_an_error_without_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    with pytest.raises(InputError, match="t0, which can't start: ConnectionError") as found:
        started(tmp_path, Recorder(fails_at="start"))
    assert "canary" not in str(found.value)


@pytest.mark.parametrize("name", sorted(tracking.KNOWN))
def test_a_missing_package_is_named_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(tracking, "version", missing)
    with pytest.raises(InputError, match=rf"pip install 'pairloop\[{name}\]'"):
        tracking.build(Tracking(trackers=[name]))


def test_an_unknown_tracker_is_refused_and_names_the_known() -> None:
    with pytest.raises(InputError, match="must name tensorboard or wandb, got 'mlflow'"):
        tracking.build(Tracking(trackers=["mlflow"]))


def test_a_tracker_of_ones_own_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = f"{__name__}:Recorder"
    monkeypatch.setitem(tracking.KNOWN, "mine", made)
    (tracker,) = tracking.build(Tracking(trackers=["mine"])).values()
    assert type(tracker).__name__ == "Recorder"


def pairs(margins: Sequence[float]) -> pl.DataFrame:
    scores = {"correctness": 1.0}
    rows = [
        {
            "prompt_id": f"p{i}", "prompt": f"question {i}", "chosen": "yes", "rejected": "no",
            "margin": margin, "scores_chosen": scores, "scores_rejected": {"correctness": 0.0},
        }
        for i, margin in enumerate(margins)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides=dict(pairs_schema(["correctness"])))


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [9]), (3, [9, 5, 1]), (20, 9)])
def test_sample_pairs_run_from_the_largest_margin_to_the_smallest(
    count: int, expected: list[int] | int
) -> None:
    found = pair_rows(pairs([i / 10 for i in range(1, 10)]), count)
    wanted = list(range(9, 0, -1)) if isinstance(expected, int) else expected
    assert [row["margin"] for row in found] == [i / 10 for i in wanted]
    for row in found:
        assert (row["correctness (chosen)"], row["correctness (rejected)"]) == (1.0, 0.0)
        assert (row["chosen"], row["rejected"]) == ("yes", "no")


def test_answers_before_and_after_stand_beside_their_prompt() -> None:
    def answers(word: str) -> pl.DataFrame:
        rows = [{"prompt_id": i, "text": f"{word} {i}"} for i in ("b", "a")]
        return pl.DataFrame(rows).cast({c: COMPLETIONS[c] for c in ("prompt_id", "text")})

    prompts = [Prompt(i, ({"role": "user", "content": f"ask {i}"},)) for i in ("a", "b")]
    assert answer_rows(prompts[:1], answers("old"), answers("new")) == [
        {"prompt": "ask a", "start": "old a", "now": "new a"}
    ]


@pytest.mark.parametrize("text", ["a|b", "<script>x</script>", "**b** [l](u)", "one\ntwo", "_e_"])
def test_model_text_reaches_tensorboard_as_it_stands(text: str) -> None:
    from html import unescape

    from rlhf.trackers.tensorboard import _cell

    cell = _cell(text)
    assert not set("|*[]()`\n").intersection(cell.replace("<br>", ""))
    assert "<script" not in cell
    assert unescape(cell.replace("<br>", "\n")) == text


def write_config(folder: Path, model: Path) -> Path:
    steps = {"learning_rate": 0.003, "batch_pairs": 1, "epochs": 4}
    values = run_values(
        folder,
        model,
        learner={**steps, "checkpoint_steps": 5},
        tracking={
            "plain": True,
            "trackers": ["wandb", "tensorboard"],
            "samples": 3,
            "wandb": {"mode": "offline"},
        },
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    folder = config.parent
    own = {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**kept, **own},
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, output


def wait_until_told(journal: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a training step of round 1 was told."""
    sought = json.dumps({"round": 1, "stage": "train", "step": step}).encode()
    end = time.monotonic() + DEADLINE
    while not (journal.exists() and sought in journal.read_bytes()):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end, "the step was never told"
        time.sleep(0.002)


@pytest.mark.engine
def test_a_killed_run_goes_on_in_the_same_wandb_run_and_the_same_curves(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Killed after step 8, resumed after step 5: read back through each tracker's own records."""
    config = write_config(tmp_path, tiny_model)
    run = tmp_path / "runs/trial"
    process = start(config)
    wait_until_told(run / "trackers/tensorboard.jsonl", 8, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    status, output = finish(start(config))
    assert status == 0, output
    assert f"tensorboard: tensorboard --logdir {run / 'trackers/tensorboard'}" in output
    assert "wandb: offline; send it with: wandb sync" in output

    metrics = pl.read_ndjson(run / "metrics.jsonl", infer_schema_length=None)
    trained = metrics.filter(stage="train")
    total = trained.height
    assert total > 30

    curves = tensorboard(run / "trackers/tensorboard")
    loss = {event.step: event.value for event in curves.Scalars("train/loss")}
    assert len(loss) == len(curves.Scalars("train/loss")), "a step was told twice"
    assert list(loss) == sorted(loss)
    # The step under way when it was killed may be lacking, and no other.
    missing = {*range(1, total + 1)} - loss.keys()
    assert len(missing) <= 1 and all(step >= 8 for step in missing)
    expected = dict(enumerate(trained["loss"], start=1))
    assert loss == pytest.approx({step: expected[step] for step in loss}, rel=1e-6)
    last = trained.group_by("round", maintain_order=True).agg(pl.col("step").max())["step"]
    at = [0, int(last[0]), total]
    assert [event.step for event in curves.Scalars("held_out/reward")] == at
    texts = curves.Tags()["tensors"]
    for tag in ("pairs/round 0001", "pairs/round 0002", "greedy/round 0002"):
        assert f"{tag}/text_summary" in texts

    files = sorted((run / "trackers/wandb").rglob("*.wandb"))
    assert len(files) == 2
    (identity,) = wandb_ids(files)
    assert identity == json.loads((run / "trackers/id.json").read_text())["id"]
    lines = wandb_lines(files)
    counted = [line["_step"] for line in lines]
    assert counted == sorted(set(counted)), "wandb's own step went back or stood still"
    steps = [int(line["optimizer_step"]) for line in lines if "train/loss" in line]
    # A kill takes what wandb had not written for a tenth of a second, and never doubles a step.
    assert steps == sorted(set(steps))
    assert {*range(1, total + 1)} - set(steps) <= {6, 7, 8, 9, 10}
    named = {"/".join(key.split("/")[:2]) for line in lines for key in line if "/round_" in key}
    assert named == {f"{name}/round_000{i}" for name in ("pairs", "greedy") for i in (1, 2)}
    kept = sorted(p.name for p in (run / "trackers/wandb").rglob("*.table.json"))
    assert len(kept) == 4


@pytest.mark.engine
def test_wandb_online_without_a_key_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "no_such_model")
    status, output = finish(start(config, "--tracking.wandb.mode", "online"))
    assert status == 2, output
    assert "tracking.wandb.mode online needs a key: set WANDB_API_KEY" in output
