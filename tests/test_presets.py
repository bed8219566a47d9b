"""Presets: listed, printed, complete, and dry runs of what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.presets import describe, header, path, presets
from rlhf import config_io
from rlhf.config import RunConfig

MACHINES = {
    "qwen2.5-7b-instruct-qlora-t4": "1xT4-16GB",
    "gemma-2b-it-qlora-t4": "1xT4-16GB",
    "qwen2.5-7b-instruct-qlora-a100": "1xA100-40GB",
    "llama-3.1-8b-instruct-lora-a100": "1xA100-40GB",
    "smollm2-cpu": None,
}
"""Presets for a run of one's own, and the machine that their first lines plan for."""


def test_presets_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    named = {preset.name for preset in presets()}
    assert named >= {*MACHINES, "demo", "demo_transformers"}
    for preset in presets():
        block = text[text.index(f"{preset.name}\n") :].split("\n\n")[0]
        lines = [line.strip() for line in block.splitlines()]
        assert lines == [
            preset.name,
            preset.what,
            f"hardware  {preset.hardware}",
            f"time      {preset.time}",
        ]
    assert "pairloop init NAME > run.yaml" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_what_init_prints_dry_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In an empty folder, without weights, hub or GPU."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", name]) == 0
    printed = capsys.readouterr().out
    assert printed == path(name).read_text()
    (tmp_path / "run.yaml").write_text(printed)
    machine = MACHINES[name]
    flags = ["--rollout.engine", "transformers"] if machine is None else ["--machine", machine]
    assert main(["train", "run.yaml", "--dry-run", *flags]) == 0
    shown = capsys.readouterr().out
    assert f"of {machine or 'this machine'}" in shown
    assert "DOES NOT FIT" not in shown
    assert "train 220" in shown


@pytest.mark.parametrize("name", MACHINES)
def test_a_preset_tells_how_to_run_it(name: str) -> None:
    text = path(name).read_text()
    lines = [line[1:].strip() for line in header(text)]
    assert f"pairloop init {name} > run.yaml" in lines
    assert "pairloop train run.yaml" in lines
    described = f" --machine {MACHINES[name]}" if MACHINES[name] else ""
    assert f"pairloop train run.yaml --dry-run{described}" in lines
    said = " ".join(lines)
    assert "estimated" in said, "no time here was measured on this hardware"
    assert ("Not run on a GPU yet" in said) == (MACHINES[name] is not None)


@pytest.mark.parametrize("name", MACHINES)
def test_a_preset_has_every_section_a_user_touches_with_reasons(name: str) -> None:
    text = path(name).read_text()
    sections = set(yaml.safe_load(text))
    assert (
        {
            "run",
            "model",
            "prompts",
            "rollout",
            "judges",
            "selection",
            "objective",
            "learner",
            "rounds",
            "evaluation",
            "gates",
        }
        <= sections
        <= set(RunConfig.model_fields)
    )
    body = text.splitlines()[len(header(text)) :]
    assert sum("#" in line for line in body) >= 15
    assert re.search(r"#\s+train: \{path: train\.jsonl\}", text), "how to put one's own prompts"


@pytest.mark.parametrize(
    ("name", "tuning", "precision"),
    [
        ("qwen2.5-7b-instruct-qlora-t4", "qlora", "fp16"),
        ("gemma-2b-it-qlora-t4", "qlora", "fp16"),
        ("qwen2.5-7b-instruct-qlora-a100", "qlora", "bf16"),
        ("llama-3.1-8b-instruct-lora-a100", "lora", "bf16"),
        ("smollm2-cpu", "lora", "auto"),
    ],
)
def test_a_preset_is_what_its_name_says(name: str, tuning: str, precision: str) -> None:
    config = config_io.load([path(name)])
    assert (config.model.tuning, config.model.precision) == (tuning, precision)
    assert config.placement.device == ("auto" if name == "smollm2-cpu" else "cuda")
    family = re.match(r"[a-z]+", name)
    assert family is not None and family.group() in config.model.path.lower()


def test_a_preset_for_a_gpu_does_not_start_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch import local, machines

    here = machines.Machine("this machine", 0, 0, None, 16 * machines.GIB, machines.GIB)
    monkeypatch.setattr(machines, "this_machine", lambda: here)
    monkeypatch.setattr(local, "this_machine", lambda: here)
    monkeypatch.chdir(tmp_path)
    config = str(path("qwen2.5-7b-instruct-qlora-t4"))
    for flags in ([], ["--dry-run"]):
        assert main(["train", config, *flags]) == 2
        assert "shows no GPU" in capsys.readouterr().err


def test_bf16_on_a_t4_is_refused_with_the_flag_that_mends_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(path("qwen2.5-7b-instruct-qlora-t4"))
    command = ["train", config, "--dry-run", "--machine", "1xT4-16GB", "--model.precision", "bf16"]
    assert main(command) == 2
    assert "use --model.precision fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (
            "# A thing. Or two.\n# Hardware: one T4 (16 GB), 2.5 GB left. Time: 2.5 hours.\n",
            ("A thing. Or two.", "one T4 (16 GB), 2.5 GB left", "2.5 hours"),
        ),
        ("# A thing.\n# Hardware: a.\n#   cmd\n# Time: b. Run it with\n", ("A thing.", "a", "b")),
    ],
)
def test_the_first_lines_are_read_sentence_by_sentence(
    comment: str, expected: tuple[str, str, str]
) -> None:
    found = describe("x", comment + "run: {}\n# Time: not this.\n")
    assert (found.what, found.hardware, found.time) == expected


def test_a_config_without_hardware_and_time_is_no_preset() -> None:
    with pytest.raises(ValueError, match="x: its first lines must say"):
        describe("x", "# Just a thing.\nrun: {}\n")
