"""What README and the configs tell people to run, runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/*.yaml")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = '{"prompt": "Is %s open?", "reference": "Yes.", "cluster": "%s"}\n'


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_config_opens_with_hardware_time_and_a_command_that_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header)
    assert "Hardware:" in text
    assert "Time:" in text
    monkeypatch.chdir(tmp_path)
    if path.parent.name == "dstc9" and "PAIRLOOP_DATA" not in os.environ:
        pytest.skip("PAIRLOOP_DATA is unset: it names the folder that holds dstc9_support/")
    # Commands name files by a path from the checkout.
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for line in (line for line in header if line.startswith("python ")):
        prepare = [sys.executable, *shlex.split(line)[1:]]
        subprocess.run(prepare, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for line in (line for line in header if line.startswith("pairloop init ")):
        printed, arrow, target = shlex.split(line)[2:]
        assert (printed, arrow) == (path.stem, ">")
        (tmp_path / target).write_text(path.read_text())
    commands = [shlex.split(line)[1:] for line in header if line.startswith("pairloop train ")]
    assert (tmp_path / commands[-1][1]).read_text() == path.read_text()
    # Where the run needs a GPU, a dry run for that machine stands before it.
    planned = next((c[2:] for c in commands if "--dry-run" in c), ["--dry-run"])
    for command in commands:
        assert main([*command, *(planned if "--dry-run" not in command else [])]) == 0


def test_the_commands_of_the_tour_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's run.yaml and verifier, as they stand there, through its own commands."""
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "more.yaml").write_text("rounds: {count: 1}\n")
    checks = blocks("python")[0]
    (tmp_path / "my_checks.py").write_text(checks + "\n\noverlap = verify\n")
    for split in ("train", "gate", "final"):
        (tmp_path / f"{split}.jsonl").write_text(RECORD % (split, split))
    monkeypatch.chdir(tmp_path)
    tour = blocks("sh")[0]
    commands = [shlex.split(line, comments=True)[1:] for line in tour.splitlines() if line.strip()]
    assert len(commands) == 3
    for command in commands:
        assert main([*[c for c in command if c != "--dry-run"], "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "temperature: 0.8" in shown
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in shown


def test_the_verifier_of_the_tour_scores() -> None:
    from rlhf.types import Completion, Prompt

    scope: dict[str, object] = {}
    exec(blocks("python")[0], scope)
    prompt = Prompt("p", ({"role": "user", "content": "Open?"},), reference="Yes")
    said = Completion("p", 0, "yes, it is", (1,), (1,), (0.0,), "stop", 0)
    verify = scope["verify"]
    assert callable(verify)
    assert verify(prompt, said) == {"correctness": 1.0, "style": 1.0}


def test_the_commands_of_the_presets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (b for b in blocks("sh") if "pairloop init" in b)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        command, _, target = line.partition(" > ")
        assert main(shlex.split(command)[1:]) == 0
        shown = capsys.readouterr().out
        if target:
            (tmp_path / target).write_text(shown)
    assert "GPU        fits" in shown


def test_every_command_of_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the tour and the presets run here, the others in the tests of their modules."""
    spans = [
        *re.findall(r"```\w*\n(.*?)```", README, re.DOTALL),
        *re.findall(r"`([^`\n]+)`", README),
    ]
    named = {name for span in spans for name in re.findall(r"^pairloop ([a-z]+)", span, re.M)}
    assert named >= {"train", "demo", "config", "init", "presets", "doctor", "report"}
    for name in named:
        assert main([name, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_the_other_commands_of_the_readme_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert "samples_per_prompt" in capsys.readouterr().out
    assert main(["demo", "--dry-run"]) == 0
    assert main(["demo", "--transformers", "--dry-run"]) == 0


def test_files_that_the_readme_names_are_there() -> None:
    rooms = "benchmarks|configs|examples|constraints|rollout|rlhf|launch"
    named = set(re.findall(rf"`((?:{rooms})/[\w./-]+)`", README))
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []
