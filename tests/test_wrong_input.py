"""Each wrong input, as a user meets it: one clear line, status 2 (3 where data fails a gate)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import run_values

from launch.cli import main

Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return run_values(tmp_path, tiny_model, rounds={"count": 1})


def run(values: dict[str, Any], folder: Path) -> int:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    return main(["train", str(config)])


def _put(section: str, key: str, value: Any) -> Change:
    def change(values: dict[str, Any], _: Path) -> None:
        values[section][key] = value

    return change


def _empty_pool(values: dict[str, Any], _: Path) -> None:
    Path(values["prompts"]["gate"]["path"]).write_text("")


def _shared_cluster(values: dict[str, Any], _: Path) -> None:
    path = Path(values["prompts"]["gate"]["path"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["cluster"] = "train-0"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _bad_line(values: dict[str, Any], _: Path) -> None:
    path = Path(values["prompts"]["train"]["path"])
    path.write_text(path.read_text() + '{"prompt": 7}\n')


def _no_tokenizer(values: dict[str, Any], folder: Path) -> None:
    shutil.copytree(values["model"]["path"], folder / "model")
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    values["model"]["path"] = str(folder / "model")


def _no_chat_template(values: dict[str, Any], folder: Path) -> None:
    shutil.copytree(values["model"]["path"], folder / "model")
    (folder / "model" / "chat_template.jinja").unlink()
    values["model"]["path"] = str(folder / "model")


WRONG: list[tuple[str, Change, list[str]]] = [
    ("missing prompts", _put("prompts", "train", {"path": "gone.jsonl"}), ["gone.jsonl"]),
    ("unknown key", _put("rollout", "temprature", 0.5), ["run.yaml:", "temperature"]),
    ("wrong type", _put("rollout", "temperature", "warm"), ["rollout.temperature", "warm"]),
    (
        "floor above 1",
        _put("selection", "floors", {"correctness": 1.2}),
        ["selection.floors.correctness", "1.2", "run.yaml:"],
    ),
    ("one sample", _put("rollout", "samples_per_prompt", 1), ["at least 2", "got 1"]),
    (
        "unknown dimension",
        _put("selection", "weights", {"correctness": 1.0, "charm": 1.0}),
        ["selection.weights", "charm", "correctness"],
    ),
    ("empty pool", _empty_pool, ["prompts.gate"]),
    ("shared cluster", _shared_cluster, ["train-0", "train", "gate"]),
    ("bad line", _bad_line, ["train.jsonl:7"]),
    ("no model", _put("model", "path", "./nowhere"), ["model.path", "./nowhere"]),
    ("no tokenizer", _no_tokenizer, ["tokenizer"]),
    ("no chat template", _no_chat_template, ["chat template"]),
]


@pytest.mark.parametrize(("change", "told"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_ends_with_2_and_says_what_and_where(
    change: Change,
    told: list[str],
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(values, tmp_path)
    assert run(values, tmp_path) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for words in told:
        assert words in message


def test_a_missing_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verifier", "reason"), [("raises", "database is down"), ("silent", "None")]
)
def test_a_judge_that_never_scores_ends_with_3_and_its_reason(
    verifier: str,
    reason: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(run_values(tmp_path, tiny_model, verifier), tmp_path) == 3
    message = capsys.readouterr().err
    assert reason in message
    assert "max_abstention" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True, timeout=20
    )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@pytest.mark.slow
def test_a_full_disk_ends_with_2_and_the_run_goes_on_once_there_is_room(
    values: dict[str, Any],
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values["run"]["directory"] = str(small_disk)
    values["rollout"]["transfer"] = "disk"
    assert run(values, tmp_path) == 2
    assert "disk full" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True, timeout=20)
    assert run(values, tmp_path) == 0
