"""Learner and engine on one card, as far as a CPU shows it: who gives memory back, who checks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_generators import engine_options

from rlhf.config import RunConfig
from rlhf.errors import ParityError
from rlhf.learner import Learner
from rlhf.policy import Policy
from rlhf.protocols import Loaded, Published
from rollout.vllm_engine import InProcessEngine, device_arguments
from rollout.vllm_generator import Served, VllmGenerator
from rollout.weight_sync import Serving, weights_sha256

ROOT = Path(__file__).parents[1]


class CardEngine:
    """What a vLLM engine on a GPU is asked, in order; its weights may come back changed."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.checksum = "as loaded"

    def sleep(self, level: int) -> None:
        self.asked.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.asked.append("wake")

    def reset_prefix_cache(self) -> None:
        self.asked.append("forget prefixes")

    def collective_rpc(self, method: str, kwargs: Any = None) -> list[str]:
        self.asked.append(method)
        return [self.checksum]


@pytest.fixture
def engine() -> CardEngine:
    return CardEngine()


@pytest.fixture
def generator(engine: CardEngine, tiny_model: Path) -> VllmGenerator:
    """Serves version 3 on a card; its engine is the fake."""
    built = VllmGenerator(Served(str(tiny_model), (0,)), engine_options("cuda"))
    built._engine._llm = engine
    built.load(Published(3, tiny_model, "merged", weights_sha256(tiny_model)))
    engine.asked.clear()
    return built


def test_an_engine_sleeps_with_its_weights_in_host_memory(
    generator: VllmGenerator, engine: CardEngine, tiny_model: Path
) -> None:
    generator.sleep()
    assert engine.asked == ["sleep 1"], "level 2 would drop the weights"
    assert generator.wake() == Loaded(3, weights_sha256(tiny_model))
    assert engine.asked == ["sleep 1", "wake", "compute_weight_checksums"]


@pytest.mark.parametrize("version", ["org/model", "/stored/version"])
def test_an_engine_reads_the_base_and_its_tokenizer_at_their_revision(version: str) -> None:
    served = Served("org/model", (0,), 8, revision="abc", trusted=True)
    built = VllmGenerator(served, engine_options("cuda"))
    given: dict[str, Any] = {}
    built._engine.start = lambda model, **arguments: given.update(arguments)  # type: ignore[method-assign]
    built._start(version, lora=version == served.base)
    assert (given["tokenizer"], given["tokenizer_revision"]) == ("org/model", "abc")
    assert given.get("revision") == ("abc" if version == served.base else None)
    assert given["trust_remote_code"]


@pytest.mark.parametrize(("device", "asked"), [("cuda", ["sleep 1", "wake"]), ("cpu", [])])
def test_an_engine_sleeps_once_and_wakes_only_from_sleep(
    engine: CardEngine, device: str, asked: list[str]
) -> None:
    """Judges wake at each question, however often they were put to sleep before it."""
    built = InProcessEngine(engine_options(device), "a judge")
    built.sleep()
    assert not built.wake(), "what has not started does not sleep"
    built._llm = engine
    assert not built.wake()
    built.sleep()
    built.sleep()
    assert (built.wake(), built.wake()) == (device == "cuda", False)
    assert engine.asked == asked


def test_weights_that_changed_in_their_sleep_are_fatal(
    generator: VllmGenerator, engine: CardEngine
) -> None:
    generator.sleep()
    engine.checksum = "something else"
    with pytest.raises(ParityError, match="changed while it slept"):
        generator.wake()


def test_weights_that_a_load_left_as_they_were_are_fatal(
    generator: VllmGenerator, engine: CardEngine, tiny_model: Path, tmp_path: Path
) -> None:
    same = Published(4, tiny_model, "merged", weights_sha256(tiny_model))
    assert generator.load(same).version == 4, "what was not trained is not changed"
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    file = other / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    moved = Published(5, other, "merged", weights_sha256(other))
    with pytest.raises(ParityError, match="version 5, whose weights are others"):
        generator.load(moved)
    before = generator._loaded
    engine.checksum = "version 5"
    loaded = generator.load(moved)
    assert loaded == Loaded(5, moved.sha256)
    # What replicas compare is what their engines hold.
    assert before is not None
    assert loaded.held not in (None, before.held)


def test_a_load_is_what_the_next_wake_is_compared_with(
    generator: VllmGenerator, engine: CardEngine, tiny_model: Path
) -> None:
    engine.checksum = "version 4"
    generator.load(Published(4, tiny_model, "merged", "unread"))
    generator.sleep()
    loaded = generator.wake()
    assert loaded is not None
    assert loaded.version == 4


def test_a_card_is_shared_by_sleeping_and_a_cpu_is_not() -> None:
    options = engine_options()
    assert device_arguments(options, "cuda") == {
        "gpu_memory_utilization": options.gpu_memory_share,
        "enable_sleep_mode": True,
    }
    assert "enable_sleep_mode" not in device_arguments(options, "cpu")


def test_the_learner_lets_go_before_the_engine_wakes(tiny_model: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(fakes.run_values(tmp_path, tiny_model))
    learner = Learner(Policy(config.model, str(tiny_model), "cpu", 0), config)
    held: list[bool] = []

    class Waking(fakes.SleepwalkingGenerator):
        def wake(self) -> Loaded | None:
            held.append(any(p.grad is not None for _, p in learner.policy.trainable()))
            return self._loaded

    policy = learner.policy
    serving = Serving(
        lambda: Waking(str(tiny_model), policy.tokenizer, policy.stop_ids, torch.float32, "cpu", 8),
        learner,
        "merged",
        tmp_path / "published",
        fakes.prompts_of(lambda messages: [5, 6, 7], ["Hi", "Refund"]),
        lambda found: None,
    )
    serving.at(0, None)
    serving.sleep()
    for _, parameter in policy.trainable():
        parameter.grad = torch.ones_like(parameter)
    serving.wake()
    assert held == [False]
    serving.close()


SMALL = {
    "placement.device": "cpu",
    "prompts.gate.limit": "6",
    "prompts.final.limit": "6",
    "rounds.count": "1",
    "rounds.prompts_per_round": "12",
    "rollout.max_new_tokens": "16",
    "rollout.samples_per_prompt": "4",
    "rollout.parity_completions": "4",
    "learner.batch_pairs": "2",
    "evaluation.samples_per_prompt": "1",
    "evaluation.kl_prompts": "2",
    "evaluation.greedy_prompts": "2",
    # A random model's answers differ in style alone.
    "selection.floors.correctness": "0",
    "selection.floors.groundedness": "0",
    "selection.floors.problem_solution": "0",
    "selection.min_margin": "0.001",
    "selection.max_pairs": "4",
    "selection.cold_start.min_spread": "0",
    "selection.cold_start.min_passing_share": "0",
    "selection.allow_truncated_chosen": "true",
    "gates.max_drop": "1.0",
}


@pytest.mark.engine
@pytest.mark.parametrize(
    "sync",
    [
        {"rollout.sync": "merged"},
        # The plugin multiplies in bf16, which shows in so small a model's wide weights.
        {"rollout.sync": "adapter", "rollout.parity_tolerance": "0.2"},
    ],
    ids=["merged", "adapter"],
)
def test_the_t4_preset_goes_round_on_a_cpu(
    sync: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    """NF4 base, LoRA, fp16 with loss scaling, checkpointed activations, a real vLLM engine that is
    given merged weights, or the adapter alone on an NF4 base of its own.

    What a CPU leaves out: nothing has to sleep.
    """
    given = [f"--{key}={value}" for key, value in (SMALL | sync).items()]
    place = [f"--run.directory={tmp_path}", "--run.name=t4", f"--model.path={tiny_model}"]
    config = str(ROOT / "configs" / "qwen2.5-7b-instruct-qlora-t4.yaml")
    ended = subprocess.run(
        [sys.executable, "-m", "launch", "train", config, *place, *given],
        check=False,
        capture_output=True,
        text=True,
        timeout=1000,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = tmp_path / "t4"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "train"]
    assert steps
    # The first scale may overflow and halve; what was not skipped has finite gradients.
    assert any(not step["skipped"] for step in steps)
    adapter = load_file(run / "rounds/0001/policy/adapter_model.safetensors")
    moved = [name for name, weight in adapter.items() if "lora_B" in name and weight.any()]
    assert moved, "the adapter was trained"
    assert "published version 1: " in ended.stdout
    assert f"weights {sync['rollout.sync']}" in ended.stdout
