"""`train --dry-run` as a user runs it, for machines and clusters."""

from __future__ import annotations

from pathlib import Path

import pytest
from placements import LORA

from launch import cli, presets

RUN = str(presets.path(LORA))
"""A LoRA of 8B on the support desk's prompts."""


@pytest.mark.slow
def test_a_cluster_is_shown_and_where_it_is_too_small_refused_with_what_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", RUN, "--dry-run", "--cluster", "2x2xA100-40GB"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("4 learner ranks", "node 1     learner ranks 2-3", "prompts: train "):
        assert words in shown
    starved = [*arguments, "--rollout.gpu_memory_share", "0.9", "--placement.colocate", "true"]
    assert cli.main(starved) == 2
    shown, error = capsys.readouterr()
    assert "GPU        DOES NOT FIT" in shown
    assert "prompts: train " in shown
    assert error.startswith("error: 2x2xA100-40GB is too small: GPU 0 of node 0 needs ")
    change = error.strip().rpartition("Smallest change: ")[2].split()
    assert change[0] == "--rollout.gpu_memory_share"
    assert cli.main([*starved, *change]) == 0


@pytest.mark.slow
def test_a_machine_of_several_gpus_is_planned_for_as_the_config_asks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", RUN, "--dry-run", "--machine", "2xA100-80GB"]
    assert cli.main(arguments) == 0
    assert "one process on cuda of 2xA100-80GB; 1 more GPUs idle" in capsys.readouterr().out
    assert cli.main([*arguments, "--placement.zero", "2"]) == 0
    assert "spmd: 2 learner ranks, ZeRO-2, 2 generators" in capsys.readouterr().out
    assert cli.main([*arguments, "--placement.kind", "ray"]) == 0
    assert "2 placement groups" not in capsys.readouterr().out


def test_a_machine_and_a_cluster_are_not_planned_for_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = ["--machine", "1xT4-16GB", "--cluster", "2x4xT4-16GB"]
    assert cli.main(["train", RUN, "--dry-run", *both]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("--placement.zero", "2"), "placement.zero 2"),
        (("--placement.generators", "2"), "placement.generators 2"),
        (("--placement.tensor_parallel", "2"), "placement.tensor_parallel 2"),
        (("--placement.colocate", "false"), "placement.colocate false"),
    ],
)
def test_what_one_process_can_not_do_is_not_run_as_one(
    settings: tuple[str, str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", RUN, "--run.directory", str(tmp_path), *settings]) == 2
    assert f"error: {named} needs more than one process" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("kind", "local", "zero", "2"), "but kind local is one process, got 2"),
        (("offload", "true"), "it needs placement.zero 1, 2 or 3"),
        (("kind", "spmd", "tensor_parallel", "2"), "tensor_parallel needs kind ray, got 2"),
        (("kind", "local", "generators", "2"), "generators needs kind ray, got 2"),
        (("kind", "spmd", "colocate", "false"), "colocate false needs kind ray"),
        (("tensor_parallel", "0"), "tensor_parallel"),
        (("zero", "4"), "zero"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        part
        for name, value in zip(settings[::2], settings[1::2], strict=True)
        for part in (f"--placement.{name}", value)
    ]
    assert cli.main(["train", RUN, "--dry-run", "--cluster", "8xA100-80GB", *flags]) == 2
    assert words in capsys.readouterr().err
