"""Who runs where: the derivation as a table, the refusals, and what a dry run prints."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from launch.machines import GIB, Machine, parse, this_machine
from launch.placement import Plan, place, place_on, plan, settle
from launch.presets import path
from rlhf import config_io
from rlhf.config import RunConfig
from rlhf.errors import InputError

TUNINGS = ("full", "lora", "qlora")


def config(**sections: dict[str, Any]) -> RunConfig:
    pool = {"path": "pool.jsonl"}
    judge = {"name": "house", "function": "a:b", "dimensions": ["correctness"]}
    return RunConfig.model_validate(
        {
            "prompts": {"train": pool, "gate": pool, "final": pool},
            "judges": {"panel": [judge]},
            **sections,
            "model": {"path": "org/model", **sections.get("model", {})},
        }
    )


def asked(device: str, engine: str, sync: str, tuning: str) -> RunConfig:
    return config(
        model={"tuning": tuning},
        rollout={"engine": engine, "sync": sync},
        placement={"device": device},
    )


CPU = Machine("a laptop", 0, 0, None, 16 * GIB)


@pytest.mark.parametrize(
    ("cuda", "vllm", "tuning", "expected"),
    [
        (False, False, "full", Plan("cpu", "transformers", "merged")),
        (False, False, "lora", Plan("cpu", "transformers", "merged")),
        (False, True, "full", Plan("cpu", "vllm", "merged")),
        (False, True, "lora", Plan("cpu", "vllm", "merged")),
        (False, True, "qlora", Plan("cpu", "vllm", "merged")),
        (True, False, "full", Plan("cuda", "transformers", "merged")),
        (True, False, "lora", Plan("cuda", "transformers", "adapter")),
        # Transformers would serve the adapter on a base that is not the NF4 one.
        (True, False, "qlora", Plan("cuda", "transformers", "merged")),
        (True, True, "full", Plan("cuda", "vllm", "merged")),
        (True, True, "lora", Plan("cuda", "vllm", "adapter")),
        (True, True, "qlora", Plan("cuda", "vllm", "adapter")),
    ],
)
def test_auto_takes_the_best_the_machine_has(
    cuda: bool, vllm: bool, tuning: str, expected: Plan
) -> None:
    assert place(asked("auto", "auto", "auto", tuning), cuda, vllm) == expected


@pytest.mark.parametrize(
    ("device", "engine", "sync", "tuning", "cuda", "vllm"),
    list(
        product(
            ("auto", "cpu", "cuda"),
            ("auto", "vllm", "transformers"),
            ("auto", "adapter", "merged"),
            TUNINGS,
            (False, True),
            (False, True),
        )
    ),
)
def test_what_is_asked_for_is_had_or_refused(
    device: str, engine: str, sync: str, tuning: str, cuda: bool, vllm: bool
) -> None:
    """Never something else in silence: each of the cases keeps to the config, or is an error."""
    refused = (
        (device == "cuda" and not cuda)
        or (engine == "vllm" and not vllm)
        or (sync == "adapter" and tuning == "full")
        or (
            sync == "adapter"
            and tuning == "qlora"
            and (engine == "transformers" or (engine == "auto" and not vllm))
        )
    )
    if refused:
        with pytest.raises(InputError):
            place(asked(device, engine, sync, tuning), cuda, vllm)
        return
    found = place(asked(device, engine, sync, tuning), cuda, vllm)
    assert device in ("auto", found.device)
    assert engine in ("auto", found.engine)
    assert sync in ("auto", found.sync)
    assert cuda or found.device == "cpu"
    assert vllm or found.engine == "transformers"
    assert tuning != "full" or found.sync == "merged"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("cuda", "auto", "auto", "lora"), ("placement.device", "no GPU", "use auto or cpu")),
        (("auto", "vllm", "auto", "lora"), ("rollout.engine", "pip install 'pairloop[vllm]'")),
        (("auto", "auto", "adapter", "full"), ("rollout.sync", "model.tuning", "got full")),
        (("auto", "auto", "adapter", "qlora"), ("rollout.sync", "NF4", "merged")),
    ],
)
def test_a_refusal_names_the_setting_and_the_way_out(
    wanted: tuple[str, str, str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        place(asked(*wanted), cuda=False, vllm=False)
    assert caught.value.exit_status == 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "capability", "refused"),
    [
        ("bf16", (7, 5), True),
        ("bf16", (7, 0), True),
        ("bf16", (8, 0), False),
        ("bf16", (9, 0), False),
        ("fp16", (7, 5), False),
        ("fp32", (7, 5), False),
    ],
)
def test_bf16_needs_ampere(precision: str, capability: tuple[int, int], refused: bool) -> None:
    wanted = config(model={"precision": precision})
    if not refused:
        assert place(wanted, True, True, capability).device == "cuda"
        return
    with pytest.raises(InputError, match=r"8\.0 \(Ampere\).*got 7\.\d.*--model.precision fp16"):
        place(wanted, True, True, capability)
    # The GPU's precision is no concern of a run on the CPU beside it.
    on_cpu = config(model={"precision": precision}, placement={"device": "cpu"})
    assert place(on_cpu, True, True, capability).device == "cpu"


def test_an_nf4_base_needs_the_plugin_that_serves_it() -> None:
    """vLLM itself no longer reads bitsandbytes; merged weights are dequantised and need nothing."""
    with pytest.raises(InputError, match=r"pip install 'pairloop\[vllm-nf4\]'"):
        place(asked("auto", "vllm", "auto", "qlora"), True, True, vllm_nf4=False)
    for sync, tuning in (("merged", "qlora"), ("auto", "lora")):
        assert place(asked("auto", "vllm", sync, tuning), True, True, vllm_nf4=False)
    assert place(asked("auto", "vllm", "auto", "qlora"), False, True, vllm_nf4=False)


def test_this_machine_has_a_plan() -> None:
    found = place_on(config(), this_machine())
    assert found == place(config(), found.device == "cuda", found.engine == "vllm")


@pytest.mark.parametrize(
    ("machine", "device", "precision"),
    [
        (parse("1xT4-16GB"), "auto", "fp16"),
        (parse("1xA100-40GB"), "auto", "bf16"),
        (parse("1xA100-40GB"), "cpu", "fp32"),
        (CPU, "auto", "fp32"),
        (replace(CPU, cpu_bf16=True), "auto", "bf16"),
        (replace(parse("1xT4-16GB"), cpu_bf16=True), "cpu", "bf16"),
    ],
)
def test_an_automatic_precision_is_what_the_machine_multiplies_in(
    machine: Machine, device: str, precision: str
) -> None:
    found = settle(config(model={"precision": "auto"}, placement={"device": device}), machine)
    assert found == config(model={"precision": precision}, placement={"device": device})
    for asked_for in ("fp32", "bf16", "fp16"):
        wanted = config(model={"precision": asked_for})
        assert settle(wanted, machine) is wanted


def test_a_described_machine_stands_in_for_this_one() -> None:
    """Its card and capability count, and it has the packages that the config asks for."""
    wanted = asked("cuda", "vllm", "auto", "qlora")
    assert place_on(wanted, parse("1xA100-40GB")) == Plan("cuda", "vllm", "adapter")
    with pytest.raises(InputError, match="fp16"):
        place_on(wanted, parse("1xT4-16GB"))
    with pytest.raises(InputError, match="no GPU.*--machine"):
        place_on(wanted, CPU)


def test_the_plan_says_where_the_run_takes_place() -> None:
    wanted = config(model={"lora": {"rank": 7}}, rollout={"samples_per_prompt": 5})
    text = plan(wanted, parse("2xA100-40GB"))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert list(lines) == ["placement", "learner", "generator", "judges", "rounds", "gates"]
    assert "one process on cuda of 2xA100-40GB; 1 more GPUs idle" in lines["placement"]
    assert "org/model: LoRA rank 7" in lines["learner"]
    assert "vllm, 5 samples a prompt" in lines["generator"]
    assert "the adapter alone" in lines["generator"]
    assert "house; audit: none" in lines["judges"]
    assert "correctness" in lines["gates"]


@pytest.mark.parametrize(
    ("tuning", "words"), [("full", "all weights"), ("lora", "bf16 base"), ("qlora", "NF4 base")]
)
def test_the_plan_names_what_is_trained(tuning: str, words: str) -> None:
    text = plan(config(model={"tuning": tuning, "precision": "bf16"}), CPU)
    assert words in text
    assert "merged weights, reloaded in place" in text


def test_the_plan_says_that_adapters_are_merged() -> None:
    lora = {"rank": 7, "rounds": "new"}
    lines = plan(config(model={"lora": lora}), parse("1xA100-40GB")).splitlines()
    assert "LoRA rank 7 on a bf16 base, a new one each round, merged" in lines[1]
    assert "weights travel as merged weights, reloaded in place" in lines[2]


@pytest.mark.parametrize("name", ["demo", "demo_transformers"])
def test_presets_load_and_have_a_plan(name: str) -> None:
    preset = config_io.load([path(name)])
    # The first demo asks for vLLM, the second for a machine without it.
    assert place(preset, cuda=False, vllm=name == "demo").device == "cpu"
    if name == "demo":
        assert (preset.run.directory, preset.run.name) == ("runs", "demo")


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no preset dmeo; there are .*demo, demo_transformers"):
        path("dmeo")


def test_a_preset_in_the_package_comes_before_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed wheel has its configs inside `launch`, whatever lies beside the packages."""
    for folder in ("launch/configs", "configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "demo.yaml").write_text("")
    monkeypatch.setattr("launch.presets.__file__", str(tmp_path / "launch/presets.py"))
    assert path("demo") == tmp_path / "launch/configs/demo.yaml"
