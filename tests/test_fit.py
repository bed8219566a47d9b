"""Whether a run fits, what a dry run says of it, and the smallest change that helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fakes import run_values

from launch import local, presets
from launch.architectures import Architecture, find
from launch.fit import report, smallest_change
from launch.machines import GIB, Machine, parse, this_machine
from launch.memory import estimate
from launch.placement import place_on, settle
from launch.remedies import SPARE, changed
from rlhf import config_io
from rlhf.config import RunConfig
from rlhf.errors import Interrupted

DESCRIBED = ("1xT4-16GB", "1xA100-40GB", "1xA100-80GB", "1xH100-80GB")
LAPTOP = Machine("a laptop", 0, 0, None, 16 * GIB, 2 * GIB)


def preset(name: str, **sections: dict[str, Any]) -> RunConfig:
    values = config_io.load([presets.path(name)]).model_dump()
    for section, changes in sections.items():
        values[section] |= changes
    return RunConfig.model_validate(values)


def sized(config: RunConfig) -> Architecture:
    return find(config.model.path)


def fits(config: RunConfig, machine: Machine) -> bool:
    return estimate(config, place_on(config, machine), machine, sized(config)).fits(SPARE)


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("qwen2.5-7b-instruct-qlora-t4", "1xT4-16GB"),
        ("gemma-2b-it-qlora-t4", "1xT4-16GB"),
        ("qwen2.5-7b-instruct-qlora-a100", "1xA100-40GB"),
        ("qwen2.5-7b-instruct-qlora-a100", "1xA100-80GB"),
        ("llama-3.1-8b-instruct-lora-a100", "1xA100-40GB"),
        ("llama-3.1-8b-instruct-lora-a100", "1xA100-80GB"),
        ("llama-3.1-8b-instruct-lora-a100", "1xH100-80GB"),
    ],
)
def test_a_preset_fits_the_card_in_its_name_with_room_to_spare(name: str, machine: str) -> None:
    text = report(preset(name), parse(machine))[0]
    assert "GPU        fits: " in text
    assert "host       fits: " in text
    assert "barely" not in text and "smallest change" not in text


def test_a_laptop_preset_fits_a_laptop() -> None:
    config = preset("smollm2-cpu", rollout={"engine": "transformers"})
    text = report(config, LAPTOP)[0]
    assert "host       fits: " in text
    assert "only 2.0 GiB are free now" in text


@pytest.mark.parametrize(
    ("name", "machine", "sections", "expected"),
    [
        # Each starts from a preset that fits, and takes one setting too far.
        (
            "qwen2.5-7b-instruct-qlora-t4",
            "1xT4-16GB",
            {"rollout": {"gpu_memory_share": 0.7}},
            (("rollout.gpu_memory_share", 0.48),),
        ),
        (
            "qwen2.5-7b-instruct-qlora-a100",
            "1xA100-40GB",
            {"learner": {"micro_batch_tokens": 8192}},
            (("learner.micro_batch_tokens", 4096),),
        ),
        (
            "qwen2.5-7b-instruct-qlora-t4",
            "1xT4-16GB",
            {"rollout": {"max_concurrency": 64, "gpu_memory_share": 0.48}},
            (("rollout.max_concurrency", 8),),
        ),
        (
            "qwen2.5-7b-instruct-qlora-a100",
            "1xA100-40GB",
            {"prompts": {"max_tokens": 6144}},
            (("learner.gradient_checkpointing", True),),
        ),
        (
            "smollm2-cpu",
            "1xT4-16GB",
            {
                "rollout": {"memory_gib": 12.0, "engine": "vllm"},
                "placement": {"device": "cpu"},
            },
            (("rollout.memory_gib", 8.0),),
        ),
    ],
)
def test_the_smallest_change_is_one_setting(
    name: str, machine: str, sections: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    described = parse(machine)
    config = settle(preset(name, **sections), described)
    assert not fits(config, described)
    found = smallest_change(config, described, sized(config))
    assert found == expected
    assert fits(changed(config, found), described)
    flags = " ".join(f"--{key} {str(value).lower()}" for key, value in expected)
    assert report(config, described)[0].endswith(f"smallest change: {flags}")


@pytest.mark.parametrize("machine", DESCRIBED)
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-7B-Instruct", "google/gemma-2b-it"])
def test_what_is_proposed_fits_and_no_part_of_it_is_idle(
    path: str, tuning: str, machine: str
) -> None:
    model = {"path": path, "tuning": tuning, "precision": "fp16"}
    config, described = preset("qwen2.5-7b-instruct-qlora-a100", model=model), parse(machine)
    found = smallest_change(config, described, sized(config))
    if fits(config, described):
        assert found == ()
        return
    if found is None:
        assert "no setting makes it fit" in report(config, described)[0]
        assert not fits(changed(config, [("learner.micro_batch_tokens", 1)]), described)
        return
    assert fits(changed(config, found), described)
    for change in found:
        without = [c for c in found if c != change]
        assert not without or not fits(changed(config, without), described)


def test_no_change_is_proposed_that_would_be_refused() -> None:
    """Adapters that are merged can't go to an NF4 base."""
    lora = {"tuning": "lora", "precision": "fp16", "lora": {"rounds": "new"}}
    config, described = preset("qwen2.5-7b-instruct-qlora-a100", model=lora), parse("1xT4-16GB")
    assert not fits(config, described)
    assert smallest_change(config, described, sized(config)) is None


def test_a_model_larger_than_the_card_gets_no_advice_but_a_larger_one() -> None:
    config = preset("llama-3.1-8b-instruct-lora-a100", model={"tuning": "full"})
    tiny = Machine("a small card", 1, 4 * GIB, (8, 0), 64 * GIB)
    assert smallest_change(config, tiny, sized(config)) is None
    assert report(config, tiny)[0].endswith("take a larger machine or a smaller model")


def test_a_dry_run_shows_each_part_under_its_phases_and_the_sums() -> None:
    text = report(preset("qwen2.5-7b-instruct-qlora-t4"), parse("1xT4-16GB"))[0]
    rows = {line[:33].strip(): line[33:].split() for line in text.splitlines()}
    assert text.startswith("memory     1xT4-16GB: GPU 14.6 GiB, host 15.0 GiB (assumed)")
    assert "448 + 192 tokens" in text
    assert rows["GPU"] == ["generate", "reference", "train", "publish", "formula"]
    assert rows["learner    weights"][:4] == ["5.17"] * 4
    assert rows["generator  vLLM, awake"][:2] == ["6.99", "6.99"]
    assert rows["learner    gradients"][0] == "0.15"


def test_merging_takes_a_matrix_at_a_time_beside_what_is_there() -> None:
    """Llama-3.1-8B's largest, gate, up or down: 4,096 x 14,336, twice in fp32."""
    config = preset("llama-3.1-8b-instruct-lora-a100", rollout={"sync": "merged"})
    text, wanting = report(config, parse("1xA100-80GB"))
    assert wanting is None
    assert f"8 B x {4096 * 14336 / 1e6:.1f}M" in text


def test_an_adapter_that_is_gone_on_from_counts_with_its_own_rank(tmp_path: Path) -> None:
    """The run takes rank and layers from there, whatever the config says."""
    file, name = tmp_path / "adapter_config.json", "llama-3.1-8b-instruct-lora-a100"
    found = {"r": 8, "rank_pattern": {"gate_proj": 128}, "target_modules": ["q_proj", "gate_proj"]}
    file.write_text(json.dumps(found))
    # Twice: the start of the run is kept beside it.
    held = 2 * 32 * 128 * (2 * 4096 + 4096 + 14336) / 1e6
    goes_on = preset(name, model={"adapter": str(tmp_path)})
    assert f"{held:.1f}M, rank 128" in report(goes_on, parse("1xA100-80GB"))[0]
    assert "rank 128" not in report(preset(name), parse("1xA100-80GB"))[0]
    # What PEFT takes and we don't size by name counts as all layers.
    file.write_text(json.dumps({**found, "target_modules": ["self_attn.q_proj"]}))
    all_layers = 32 * 128 * (4 * 4096 + 2 * 1024 + 2 * 4096 + 3 * (4096 + 14336)) / 1e6
    assert f"{2 * all_layers:.1f}M, rank 128" in report(goes_on, parse("1xA100-80GB"))[0]


def test_what_can_not_be_estimated_is_run_all_the_same(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far_enough(*_: object) -> NoReturn:
        raise Interrupted("far enough")

    monkeypatch.setattr(local, "Wiring", far_enough)
    lora = {"rank": 4, "alpha": 8.0, "target_modules": ["self_attn.q_proj"]}
    values = run_values(tmp_path, tiny_model)
    values["model"]["lora"] = lora
    with pytest.raises(Interrupted):
        local.run(RunConfig.model_validate(values))


def test_an_engine_that_can_not_hold_one_sequence_is_said_not_to_fit() -> None:
    config = preset("qwen2.5-7b-instruct-qlora-t4", rollout={"gpu_memory_share": 0.44})
    text = report(config, parse("1xT4-16GB"))[0]
    assert "generator  DOES NOT FIT: its cache lacks" in text
    assert "GPU        fits" in text


def test_a_model_of_unknown_size_is_said_to_be_and_the_dry_run_goes_on() -> None:
    text = report(preset("smollm2-cpu", model={"path": "org/unheard-of"}), LAPTOP)[0]
    assert text.startswith("memory     not estimated: ")
    assert "hf download org/unheard-of config.json" in text


@pytest.mark.parametrize(("gib", "said"), [(0.5, True), (1000, False)])
def test_a_run_that_will_not_fit_says_so_before_anything_is_loaded(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gib: float,
    said: bool,
) -> None:
    def far_enough(*_: object) -> NoReturn:
        raise Interrupted("far enough")

    small = replace(this_machine(), host=int(gib * GIB))
    monkeypatch.setattr(local, "this_machine", lambda: small)
    monkeypatch.setattr(local, "Wiring", far_enough)
    config = RunConfig.model_validate(run_values(tmp_path, tiny_model))
    with pytest.raises(Interrupted):
        local.run(config)
    told = "this run does not fit this machine, and may be killed: no setting makes it fit"
    assert (told in capsys.readouterr().out) == said
