"""`pairloop dpo`: what of a file trains, what a training leaves behind, and what it advises."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

import launch.offline
from launch.architectures import find
from launch.cli import main
from launch.machines import parse
from launch.memory import estimate_offline, learning
from rlhf.advice import Facts, advice
from rlhf.config_io import load_as
from rlhf.config_learner import Model
from rlhf.config_objective import Objective
from rlhf.config_offline import Data, OfflineConfig
from rlhf.errors import DataGateError, InputError, Interrupted
from rlhf.held_out import compare
from rlhf.offline import Tokens, _raised, _stats, fit, read_examples
from rlhf.protocols import TrackedRun

GOOD, BAD = ("yes", "sure", "right", "fine", "well"), ("no", "never", "wrong", "bad", "poor")


def words(rng: np.random.Generator, known: Sequence[str]) -> str:
    return " ".join(rng.choice(known, rng.integers(3, 9)))


def write_pairs(path: Path, count: int = 24) -> Path:
    """Chosen answers are of other words than rejected ones."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"question {n}: {words(rng, GOOD + BAD)}?",
            "chosen": words(rng, GOOD),
            "rejected": words(rng, BAD),
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, model: Path, data: Path, **sections: dict[str, Any]) -> Path:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "off", "directory": str(folder / "runs")},
        "model": {"path": str(model), "precision": "fp32", "lora": {"rank": 4, "alpha": 8.0}},
        "data": {"path": str(data)},
        "learner": {
            "epochs": 3,
            "batch_pairs": 8,
            "learning_rate": 5e-3,
            "validation_share": 0.25,
            "checkpoint_steps": 1,
        },
        "tracking": {"plain": True},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def by_word(text: str) -> list[int]:
    """t13 is token 13; other words are told apart by their letters."""
    return [int(w[1:]) if w[1:].isdecimal() else 20 + sum(map(ord, w)) for w in text.split()]


TOKENS = Tokens(lambda messages: by_word(messages[-1]["content"]), by_word, 2, str)


def test_a_training_learns_held_out_preferences_and_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model, write_pairs(tmp_path / "pairs.jsonl"))
    assert main(["dpo", str(config)]) == 0
    folder = tmp_path / "runs/off"
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["data"] == {
        "records": 24, "empty": 0, "identical": 0, "too_long": 0, "kept": 24,
    }  # fmt: skip
    # Six of 24 prompts are held out; 18 pairs are three steps of at most eight.
    assert [e["steps"] for e in stats["epochs"]] == [3, 3, 3]
    assert stats["start"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    best = stats["epochs"][stats["best_epoch"] - 1]
    assert best["validation_loss"] < 0.6 and best["validation_accuracy"] > 0.8
    assert best["validation_preferred"] >= stats["start"]["preferred"]
    assert best["validation_margin"] > 0
    for epoch in (1, 2, 3):
        assert (folder / f"epochs/0{epoch}/adapter_model.safetensors").is_file()
    kept = (folder / "rounds/0001/policy/adapter_model.safetensors").read_bytes()
    named = folder / f"epochs/0{stats['best_epoch']}/adapter_model.safetensors"
    assert named.read_bytes() == kept
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert not (folder / "rounds/0001/trainer").exists()
    said = capsys.readouterr().out
    assert "held out: loss 0.6931 ->" in said
    # Done: the same command does nothing again and says the same.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("rounds/0001/*.parquet")}
    assert main(["dpo", str(config)]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert main(["report", str(folder)]) == 2
    assert "stats.json" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")

    def trained(name: str) -> tuple[bytes, Any]:
        folder = tmp_path / "runs" / name
        adapter = folder / "rounds/0001/policy/adapter_model.safetensors"
        return adapter.read_bytes(), json.loads((folder / "stats.json").read_text())

    def config(name: str) -> OfflineConfig:
        path = write_config(tmp_path, tiny_model, pairs, run={"name": name})
        return load_as(OfflineConfig, [path])

    assert launch.offline.train(config("whole")) == 0
    calls = 0

    class Stops:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Stops:
            return self

        def __exit__(self, *_: object) -> None: ...
        def check(self) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise Interrupted("stopped at a safe point")

    with monkeypatch.context() as patch:
        patch.setattr(launch.offline, "Interrupts", Stops)
        with pytest.raises(Interrupted):
            launch.offline.train(config("cut"))
    status = json.loads((tmp_path / "runs/cut/status.json").read_text())
    assert status["state"] == "interrupted"
    assert launch.offline.train(config("cut")) == 0
    whole, cut = trained("whole"), trained("cut")
    assert cut == whole
    assert len(cut[1]["epochs"]) == 3


@pytest.mark.slow
def test_kto_trains_on_a_file_of_labels_and_pairs_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    objective = {"name": "kto"}
    refused = write_config(tmp_path, tiny_model, pairs, objective=objective)
    assert main(["dpo", str(refused)]) == 2
    assert "pairloop pairs convert" in capsys.readouterr().err
    labels = tmp_path / "labels.jsonl"
    assert main(["pairs", "convert", str(pairs), str(labels), "--to", "labels"]) == 0
    config = write_config(tmp_path, tiny_model, labels, objective=objective, run={"name": "kto"})
    assert main(["dpo", str(config), "--learner.epochs", "2"]) == 0
    stats = json.loads((tmp_path / "runs/kto/stats.json").read_text())
    assert stats["data"]["kept"] == 48
    assert stats["epochs"][-1]["validation_loss"] < stats["start"]["loss"]


def test_a_dry_run_tells_plan_memory_and_steps_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A model known by its name alone: no file of it is here.
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    config = write_config(tmp_path, Path("Qwen/Qwen2.5-7B-Instruct"), pairs)
    command = ["dpo", str(config), "--dry-run"]
    assert main([*command, "--machine", "1xA100-80GB"]) == 0
    shown = capsys.readouterr().out
    assert "  max_tokens: 1024\n" in shown
    assert "placement  local, one process on cuda of 1xA100-80GB\n" in shown
    assert "LoRA rank 4 on a fp32 base, dpo beta 0.2, learning rate 0.005\n" in shown
    assert "GPU        fits: " in shown
    assert "generate" not in shown and "publish" not in shown
    # As `test_a_training_learns_held_out_preferences_and_says_so` has them.
    assert "records    18 train, 6 held out, of 24 clusters" in shown
    assert "steps      at most 9: 3 epochs of 3\n" in shown
    assert not (tmp_path / "runs").exists()
    assert main([*command, "--machine", "1xT4-16GB"]) == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out
    assert "smallest change: --" in said.out or "together: --" in said.out
    assert "error: it does not fit 1xT4-16GB: " in said.err
    # What a training would refuse, a dry run does.
    for flag, error in (
        ("--objective.name=kto", "kto trains on labels"),
        ("--tracking.trackers=[abacus]", "must name tensorboard or wandb"),
        ("--placement.device=cuda", "this machine shows no GPU"),
    ):
        assert main([*command, flag]) == 2
        assert error in capsys.readouterr().err
    assert main(["dpo", str(config), "--machine", "1xT4-16GB"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_the_memory_of_a_training_is_a_run_s_learner_without_generator_and_judges() -> None:
    """Of pairs the longest example is a prompt of one token with two answers, of labels one
    answer."""
    values = {"model": {"path": "Qwen/Qwen2.5-7B-Instruct"}, "data": {"path": "x"}}
    config = OfflineConfig.model_validate({**values, "learner": {"micro_batch_tokens": 1}})
    on, known = parse("1xA100-80GB"), find("Qwen/Qwen2.5-7B-Instruct")
    assert learning(config, known, on_gpu=True).tokens == 1 + 2 * 1023
    labels = config.model_copy(update={"objective": Objective(name="kto")})
    assert learning(labels, known, on_gpu=True).tokens == 1024
    found = estimate_offline(config, "cuda", on, known)
    assert {part.role for part in found.parts} == {"framework", "learner"}
    full = config.model_copy(update={"model": Model(path="x", tuning="full")})
    whole = estimate_offline(full, "cuda", on, known)
    assert any(part.what == "initial policy" for part in whole.parts)
    orpo = full.model_copy(update={"objective": Objective(name="orpo")})
    alone = estimate_offline(orpo, "cuda", on, known)
    assert not any(part.what == "initial policy" for part in alone.parts)


class Listener:
    """A tracker that keeps what it is told."""

    def __init__(self, _: Any) -> None:
        self.lines: list[tuple[str, int, dict[str, float]]] = []
        self.tables: dict[str, Any] = {}
        self.state = ""

    def start(self, run: TrackedRun) -> str:
        self.run = run
        return "here"

    def log(self, round: int | None, stage: str, step: int, values: dict[str, float]) -> None:
        self.lines.append((stage, step, values))

    def table(self, round: int, name: str, rows: Any) -> None:
        self.tables[name] = rows

    def finish(self, state: str) -> None:
        self.state = state


@pytest.mark.slow
def test_trackers_hear_of_a_training_and_thinned_lines_change_no_result(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    made: list[Listener] = []

    def listen(settings: Any) -> Listener:
        made.append(Listener(settings))
        return made[-1]

    monkeypatch.setattr("rlhf.tracking.KNOWN", {"mine": "test_offline:listen"})
    monkeypatch.setattr("test_offline.listen", listen, raising=False)
    stats = []
    for name, log_steps in (("each", 1), ("some", 2)):
        tracking = {"trackers": ["mine"], "samples": 2, "log_steps": log_steps}
        settings: dict[str, dict[str, Any]] = {"tracking": tracking, "run": {"name": name}}
        config = write_config(tmp_path, tiny_model, pairs, **settings)
        assert main(["dpo", str(config), "--learner.epochs", "1"]) == 0
        stats.append(json.loads((tmp_path / "runs" / name / "stats.json").read_text()))
    assert stats[0] == stats[1]
    every, some = made
    steps = [[s for stage, s, _ in heard.lines if stage == "train"] for heard in made]
    # The last of three closes the epoch.
    assert steps == [[1, 2, 3], [2, 3]]
    (end,) = (values for stage, _, values in every.lines if stage == "held_out")
    held = stats[0]["held_out"]
    assert end == {name: held[name] for name in ("before", "after", "change")}
    rows = some.tables["held_out"]
    assert len(rows) == 2
    assert rows[0]["prompt"].startswith("user\nquestion") or "question" in rows[0]["prompt"]
    gained = [row["margin after"] - row["margin before"] for row in rows]
    assert gained[0] > gained[1]
    assert every.run.config["data"]["path"] == str(pairs)
    assert (every.state, some.state) == ("done", "done")


def test_held_out_change_is_paired_and_over_clusters() -> None:
    about = {"prompt_id": ["a", "b", "c", "d"], "cluster": ["x", "x", "y", "z"]}
    before = pl.DataFrame({**about, "chosen": [-2.0, -1, -5, -1], "rejected": [-1.0, -2, -4, -2]})
    after = before.with_columns(chosen=pl.Series([-0.5, -1.0, -5.0, -3.0]))
    found = compare(before, after, seed=0)
    # a turned right, b and c stayed, d turned wrong.
    assert (found["measure"], found["examples"], found["clusters"]) == ("preferred", 4, 3)
    assert (found["before"], found["after"], found["change"]) == (0.5, 0.5, 0.0)
    assert found["low"] < 0 < found["high"]
    assert compare(before, before, seed=0)["change"] == 0.0
    labels = pl.DataFrame(
        {**about, "good": [True, True, False, False], "completion": [-1.0, -1, -1, -1]}
    )
    moved = labels.with_columns(completion=pl.Series([-0.5, -2.0, -3.0, -1.0]))
    found = compare(labels, moved, seed=0)
    # Up and good, down and good, down and bad, unmoved.
    assert (found["measure"], found["before"], found["after"]) == (
        "moved",
        0.5,
        (1 + 0 + 1 + 0.5) / 4,
    )


def test_records_that_can_not_train_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [("t11 t12", "t13", "t14"), ("t11", "t15", "t15"), ("t11", "", "t14")]
    file.write_text(
        "".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows)
    )
    table, counts = read_examples(Data(path=str(file)), Objective(), TOKENS)
    assert counts == {"records": 3, "empty": 1, "identical": 1, "too_long": 0, "kept": 1}
    assert table["prompt_token_ids"].to_list() == [[11, 12]]
    # The end token belongs to the answer.
    assert table["chosen_token_ids"].to_list() == [[13, 2]]


def data(rule: str, most: int = 5) -> Data:
    return Data.model_validate({"path": "x", "max_tokens": most, "too_long": rule})


def test_what_is_too_long_follows_the_rule() -> None:
    prompt, answers = [1, 2, 3, 4], [[5, 6, 2], [7, 2]]
    assert fit(prompt, answers, data("drop", 7)) == (prompt, answers)
    assert fit(prompt, answers, data("drop")) is None
    assert fit(prompt, answers, data("cut_prompt")) == ([3, 4], answers)
    assert fit(prompt, answers, data("cut_answer", 6)) == (prompt, [[5, 6], [7, 2]])
    # Nothing would be left of the prompt, or of the answers' difference.
    assert fit(prompt, answers, data("cut_prompt", 3)) is None
    assert fit(prompt, [[5, 6], [5, 7]], data("cut_answer")) is None


def test_too_many_long_records_stop_before_training(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl")
    short = Data(path=str(file), max_tokens=8)
    with pytest.raises(DataGateError, match=r"of 24 records have more than 8 tokens.*allows 10%"):
        read_examples(short, Objective(), TOKENS)
    loose = short.model_copy(update={"max_too_long": 1.0, "too_long": "cut_prompt"})
    table, counts = read_examples(loose, Objective(), TOKENS)
    assert 0 < counts["kept"] == table.height
    length = pl.col("prompt_token_ids").list.len() + pl.col("chosen_token_ids").list.len()
    assert table.select(length.max()).item() <= 8


def test_what_chosen_answers_gained_is_known_without_a_reference() -> None:
    before = pl.DataFrame({"chosen": [-10.0, -20.0], "rejected": [-5.0, -5.0]})
    after = pl.DataFrame({"chosen": [-16.0, -28.0], "rejected": [-50.0, -5.0]})
    assert _raised(before, after) == -7
    good = [True, False, True]
    before = pl.DataFrame({"completion": [-1.0, -2.0, -3.0], "good": good})
    after = pl.DataFrame({"completion": [-2.0, -90.0, -7.0], "good": good})
    assert _raised(before, after) == -2.5
    nobody = after.with_columns(good=pl.lit(False))
    assert _raised(nobody, nobody) == 0


def test_what_was_skipped_or_no_number_is_left_out_of_the_statistics() -> None:
    """fp16 halves its scale and goes on; metrics hold null there."""

    def step(loss: float | None, held: Any = "") -> dict[str, Any]:
        found = {"loss": loss, "accuracy": 0.5}
        if held != "":
            ends = {"logratio_chosen": 1.0, "logratio_rejected": -1.0, "loss": held}
            found |= {f"validation_{name}": value for name, value in ends.items()}
        return found

    steps = [step(None), step(0.6, None), step(0.4), step(0.2, 0.5), step(None), step(None, 0.7)]
    config = OfflineConfig.model_validate(
        {"run": {"name": "n"}, "model": {"path": "m"}, "data": {"path": "pairs.jsonl"}}
    )
    stats = _stats(config, {}, {"loss": math.nan}, steps, 0.0)
    assert stats["best_epoch"] == 2
    assert [e["loss"] for e in stats["epochs"]] == [0.6, pytest.approx(0.3), None]


def test_a_rehearsal_refuses_what_a_training_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl")
    config = load_as(OfflineConfig, [write_config(tmp_path, Path("some/model"), file)])
    assert "records" in launch.offline.rehearse(config)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="a launcher started 2"):
            launch.offline.rehearse(config)
    answers = [{"role": role, "content": "t1"} for role in ("assistant", "user", "assistant")]
    row = {"prompt": "t11", "chosen": answers, "rejected": answers[:1]}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="chosen must be one message, got 3"):
        launch.offline.rehearse(config)


def test_a_training_on_a_file_is_refused_where_a_launcher_started_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OfflineConfig.model_validate(
        {
            "run": {"name": "offline", "directory": str(tmp_path)},
            "model": {"path": str(tmp_path)},
            "data": {"path": str(tmp_path / "pairs.jsonl")},
        }
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="trains in one process, but a launcher started 2"):
        launch.offline.train(config)
    monkeypatch.delenv("WORLD_SIZE")
    wide = config.placement.model_copy(update={"kind": "spmd"})
    with pytest.raises(InputError, match="placement.kind spmd: pairloop dpo trains in one process"):
        launch.offline.train(config.model_copy(update={"placement": wide}))
    assert not [*tmp_path.iterdir()]


CALM = Facts(False, 1e-4, 0.8, 0.69, 0.5, 0.4, (0.6, 0.55))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"accuracy": 0.995}, "overfit: the policy gets 99.5%"),
        ({"validation_losses": (0.5, 0.6)}, "lowest after epoch 1 (0.5000)"),
        ({"last_loss": 0.689}, "stuck: the loss went from 0.6900 to 0.6890"),
        ({"chosen_logratio": -12.0}, "collapsing: chosen answers became 12.0 nats less likely"),
        ({"full": True}, "1e-04 is high for full fine-tuning"),
        ({"full": True, "learning_rate": 5e-6}, None),
    ],
)
def test_advice_is_given_where_the_numbers_say_so(
    change: dict[str, Any], expected: str | None
) -> None:
    said = advice(replace(CALM, **change))
    assert len(said) == (expected is not None)
    if expected is not None:
        assert expected.replace("1e-04", "0.0001") in said[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data.pth": "x"}, r"unknown key data\.pth.*did you mean path"),
        ({"rounds.count": "2"}, r"unknown key rounds"),
        ({"learner.validation_share": "0"}, r"learner\.validation_share must be .* > 0"),
        ({"model.path": "https://me:letmein@host/model"}, r"model\.path must hold no secret"),
        ({"objective.name": "kto", "learner.batch_pairs": "1"}, r"batch_pairs must be at least 2"),
    ],
)
def test_settings_are_checked_as_in_a_run(
    tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    path = write_config(tmp_path, Path("some/model"), Path("pairs.jsonl"))
    with pytest.raises(InputError, match=expected):
        load_as(OfflineConfig, [path], list(settings.items()))


def test_a_longer_answer_than_one_message_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"

    def said(*texts: str) -> list[dict[str, str]]:
        roles = ("assistant", "user", "assistant")
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    row = {"prompt": "t11", "chosen": said("t12", "t13", "t14"), "rejected": said("t15")}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"chosen must be one message, got 3"):
        read_examples(Data(path=str(file)), Objective(), TOKENS)
