"""Memory estimates: worked by hand, against what autograd keeps, and against measured peaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_small_model
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import memory as benchmark
from launch import presets
from launch.architectures import KNOWN, Architecture, find
from launch.learner_memory import Learning
from launch.machines import GIB, Machine, parse, this_machine
from launch.memory import Estimate, estimate, learning
from launch.memory_parts import ASSUMED, PHASES, Phase
from launch.placement import Plan, place_on, settle
from rlhf import config_io
from rlhf.config import RunConfig
from rlhf.config_learner import Learner, Model
from rlhf.logprobs import collate_shared, sequence_logps, token_logps
from rlhf.optimizer import make_optimizer
from rlhf.policy import Policy
from rlhf.scoring import Scorer

QWEN = Architecture.read(KNOWN["Qwen/Qwen2.5-7B-Instruct"], "")


WITH_BF16 = Machine("a server", 0, 0, None, 64 * GIB, cpu_bf16=True)


def preset(name: str, **sections: dict[str, Any]) -> RunConfig:
    values = config_io.load([presets.path(name)]).model_dump()
    for section, changes in sections.items():
        values[section] |= changes
    return settle(RunConfig.model_validate(values), WITH_BF16)


def on(config: RunConfig, machine: str) -> Estimate:
    described = parse(machine)
    plan = place_on(config, described)
    return estimate(config, plan, described, find(config.model.path))


def size(found: Estimate, role: str, what: str, host: bool = False) -> int:
    (part,) = (p for p in found.parts if (p.role, p.what, p.host) == (role, what, host))
    return part.size


def test_a_7b_qlora_on_a_t4_by_hand() -> None:
    """Qwen2.5-7B: 28 layers, hidden 3584, inner 18944, 4 key heads of 128, 152064 words.

    A layer's linear weights: q and o 2 x 3584 x 3584 = 25,690,112, k and v 2 x 3584 x 512 =
    3,670,016, the MLP 3 x 3584 x 18944 = 203,685,888; together 233,046,016, and 28 times that is
    6,525,288,448. NF4 takes 0.5 + 1/64 + 4/16384 = 0.515869140625 bytes of each: 3,366,194,944.
    All 7,615,616,512 less those, 1,090,328,064, rest in fp16: 2,180,656,128. Sum 5,546,851,072.

    The adapter, rank 16: in + out is 7168 for q and o, 4096 for k and v, 22528 for each of the
    MLP's three; 90,112 a layer, x 16 x 28 = 40,370,176 weights: 161,480,704 bytes in fp32, as much
    for gradients, twice that for AdamW, half of it for fp16 copies.

    A micro-batch is one pair at 448 + 2 x 192 = 832 tokens. With checkpointing each of 28 layers
    keeps its fp16 input: 28 x 832 x 3584 x 2 = 166,985,728.

    One layer, done again in backward, keeps a token's 8 x 3584 + 8 in the norms, 2 x 2 x 3584 of
    the adapters' inputs, 4 x 2 x 18944 in the MLP, 7 x 2 x 16 behind the adapters' first matrices,
    4 x 2 x 3584 + 4 x 28 in attention: 28,680 + 14,336 + 151,552 + 224 + 28,784 = 223,576 bytes,
    for 832 tokens 186,015,232. Its backward adds 8 x 18944 x 832 = 126,091,264, and a dequantised
    matrix 2 x 3584 x 18944 = 135,790,592. Sum 447,897,088: more than a chunk of the head, of which
    64 MiB in fp32 hold 67,108,864 / (4 x 152,064) = 110 tokens, 12 x 110 x 152,064 = 200,724,480.
    With a chunk's worth of tokens the head is more.
    """
    found = on(preset("qwen2.5-7b-instruct-qlora-t4"), "1xT4-16GB")
    assert size(found, "learner", "weights") == 5_546_851_072
    assert size(found, "learner", "adapter") == 161_480_704
    assert size(found, "learner", "gradients") == 161_480_704
    assert size(found, "learner", "AdamW") == 322_961_408
    assert size(found, "learner", "autocast copies") == 80_740_352
    assert size(found, "learner", "activations") == 166_985_728
    assert size(found, "learner", "backward") == 447_897_088
    short = preset(
        "qwen2.5-7b-instruct-qlora-t4",
        prompts={"max_tokens": 78},
        rollout={"max_new_tokens": 16},
        learner={"micro_batch_tokens": 110},
    )
    held = learning(short, QWEN, on_gpu=True)
    assert held.a_token == 223_576
    assert held.turn == 200_724_480


def test_vllm_on_a_t4_by_hand() -> None:
    """0.48 of 14.56 GiB, 7,504,166,859 bytes, is what vLLM holds while it is awake.

    Weights: vLLM undoes the second quantisation, 0.5 + 4/64 = 0.5625 bytes x 6,525,288,448 =
    3,670,474,752, and 2,180,656,128 in fp16, and 80,740,352 for one adapter: 5,931,871,232. While
    it sleeps they lie in host memory.

    A step reads at most 8 sequences x 641 tokens = 5,128. A token's way through a layer takes
    2 x (3 x 18944 + 4 x 3584 + 2 x 3584) = 156,672 bytes: 803,414,016. Logits of 8 sequences:
    8 x 152,064 x 14 = 17,031,168. Graphs are assumed. A token's keys and values:
    2 x 28 x 512 x 2 = 57,344 bytes; one sequence of 641: 36,757,504.
    """
    found = on(preset("qwen2.5-7b-instruct-qlora-t4"), "1xT4-16GB")
    budget = size(found, "generator", "vLLM, awake")
    assert budget == 7_504_166_859
    assert size(found, "generator", "vLLM, asleep", host=True) == 5_931_871_232
    cache = budget - 5_931_871_232 - 803_414_016 - 17_031_168 - ASSUMED.graphs
    assert found.short["generator"] == 36_757_504 - cache
    assert found.fits()
    starved = preset("qwen2.5-7b-instruct-qlora-t4", rollout={"gpu_memory_share": 0.45})
    short = on(starved, "1xT4-16GB").short["generator"]
    assert short == found.short["generator"] + budget - round(0.45 * round(14.56 * GIB)) > 0
    assert not on(starved, "1xT4-16GB").fits()


def test_the_peak_of_a_t4_by_hand() -> None:
    """Nothing is on the card twice: while vLLM is awake the learner has weights and adapter only.

    publish: context + weights 5,546,851,072 + adapter 161,480,704 + vLLM's share + a chunk of the
    learner's head, 10 x 110 x 152,064 = 167,270,400 + vLLM's own, 7 x 512 x 152,064 = 544,997,376.
    train: context + weights + adapter + gradients 161,480,704 + AdamW 322,961,408 + copies
    80,740,352 + activations 166,985,728 + a layer's backward 447,897,088 + what vLLM leaves.
    """
    found = on(preset("qwen2.5-7b-instruct-qlora-t4"), "1xT4-16GB")
    resident = ASSUMED.context + 5_546_851_072 + 161_480_704
    share = 7_504_166_859
    assert found.at("generate", host=False) == resident + share
    assert found.at("publish", host=False) == resident + share + 167_270_400 + 544_997_376
    assert found.at("train", host=False) == (
        resident
        + ASSUMED.graphs
        + (161_480_704 + 322_961_408 + 80_740_352 + 166_985_728 + 447_897_088)
    )
    assert found.peak(host=False) == ("publish", found.at("publish", host=False))


@pytest.mark.parametrize("machine", ["1xA100-40GB", "1xA100-80GB", "1xH100-80GB"])
def test_an_8b_lora_by_hand(machine: str) -> None:
    """Llama-3.1-8B in bf16: 2 x 8,030,261,248 = 16,060,522,496 bytes, in the learner and in vLLM.

    Adapter, rank 16: in + out 8192 for q and o, 5120 for k and v, 18432 for each of the MLP's
    three, 81,920 a layer x 16 x 32 = 41,943,040 weights.
    Checkpointed, two pairs of 1024 + 2 x 512 tokens: 32 x 4096 x 4096 x 2 = 1,073,741,824.
    vLLM reads 8,192 tokens a step on an A100 of either size, 16,384 on an H100; a token takes
    2 x (3 x 14336 + 4 x 4096 + 2 x 4096) = 135,168 bytes, and 64 rows of logits
    64 x 128,256 x 14 = 114,917,376.
    """
    found = on(preset("llama-3.1-8b-instruct-lora-a100"), machine)
    assert size(found, "learner", "weights") == 16_060_522_496
    assert size(found, "learner", "adapter") == 4 * 41_943_040
    assert size(found, "learner", "activations") == 1_073_741_824
    tokens = 16384 if "H100" in machine else 8192
    budget = round(0.5 * parse(machine).gpu)
    used = 16_060_522_496 + 2 * 41_943_040 + tokens * 135_168 + 114_917_376 + ASSUMED.graphs
    longest = 1537 * 2 * 32 * 1024 * 2
    assert found.short["generator"] == longest - (budget - used)
    assert found.fits()


def test_the_host_loads_what_is_not_quantised_and_keeps_what_sleeps() -> None:
    found = on(preset("llama-3.1-8b-instruct-lora-a100"), "1xA100-40GB")
    process = size(found, "framework", "process", host=True)
    assert found.at("load", host=True) == process + 16_060_522_496
    asleep = 16_060_522_496 + 2 * 41_943_040
    assert found.at("train", host=True) == process + asleep + 4 * 41_943_040
    quantised = on(preset("qwen2.5-7b-instruct-qlora-a100"), "1xA100-40GB")
    assert quantised.at("load", host=True) == size(quantised, "framework", "process", host=True)


def test_full_tuning_holds_sixteen_bytes_a_weight_and_the_start_once() -> None:
    """4 weights + 4 gradients + 8 AdamW; for the reference pass 4 + 4, before AdamW is there."""
    config = preset("smollm2-cpu", model={"tuning": "full"}, rollout={"engine": "transformers"})
    described = parse("1xT4-16GB")
    plan = Plan("cpu", "transformers", "merged")
    found = estimate(config, plan, described, find(config.model.path))
    fixed = ("weights", "gradients", "AdamW")
    learner = sum(size(found, "learner", what, host=True) for what in fixed)
    assert learner == 16 * 134_515_008
    assert size(found, "learner", "initial policy", host=True) == 4 * 134_515_008
    (start,) = (p for p in found.parts if p.what == "initial policy")
    assert start.phases == ("reference",)


def test_new_adapters_cost_the_start_for_a_pass_and_fp32_in_host_memory_to_store() -> None:
    """bf16 weights on the card, 2 bytes each; 4 where a version is merged and written."""

    def parts(rounds: str, adapter: str | None) -> Estimate:
        lora = {"rounds": rounds}
        config = preset(
            "qwen2.5-7b-instruct-qlora-a100",
            model={"tuning": "lora", "lora": lora, "adapter": adapter},
        )
        return on(config, "1xA100-80GB")

    carried, renewed = parts("carry", "folder"), parts("new", "folder")
    weights = QWEN.parameters
    assert size(renewed, "learner", "initial policy", host=False) == 2 * weights
    assert size(renewed, "publish", "stored version", host=True) == 4 * weights
    assert size(renewed, "learner", "start in fp32", host=True) == 4 * weights
    # No second adapter as the reference: the first is merged.
    one = size(renewed, "learner", "adapter", host=False)
    assert size(carried, "learner", "adapter", host=False) == 2 * one
    names = {part.what for part in carried.parts}
    assert not names & {"initial policy", "stored version", "start in fp32"}
    assert "start in fp32" not in {part.what for part in parts("new", None).parts}


def test_moments_in_8_bits_by_hand() -> None:
    """SmolLM2: 28,311,552 of the embedding and 30 x 3,538,944 of linear layers are 134,479,872 in
    tensors of whole blocks: 2 bytes each and 8 for each of 525,312 blocks of 256. The 61 norms of
    576 are under 4,096 and stay in fp32, 8 x 35,136. 268,959,744 + 4,202,496 + 281,088.

    An adapter of rank 4: nine tensors of 4 x 576 = 2,304 a layer and two of 4 x 192 = 768 stay in
    fp32, 8 x 22,272 = 178,176; three of 4 x 1536 = 6,144 take 2 x 6,144 + 8 x 24 = 12,480 each.
    30 x (178,176 + 37,440) = 6,468,480, where fp32 takes 8 x 40,704 x 30 = 9,768,960.

    While it steps, a CPU takes 20 bytes a weight of the largest tensor, a GPU nothing.
    """
    machine = parse("1xT4-16GB")

    def moments(tuning: str, optimizer: str) -> int:
        config = preset(
            "smollm2-cpu",
            model={"tuning": tuning, "lora": {"rank": 4}},
            rollout={"engine": "transformers"},
            learner={"optimizer": optimizer},
        )
        plan = Plan("cpu", "transformers", "merged")
        found = estimate(config, plan, machine, find(config.model.path))
        return size(found, "learner", "AdamW", host=True)

    assert moments("full", "adamw") == 8 * 134_515_008
    assert moments("full", "adamw_8bit") == 273_443_328
    assert moments("lora", "adamw") == 9_768_960
    assert moments("lora", "adamw_8bit") == moments("lora", "paged_adamw_8bit") == 6_468_480
    config = preset("smollm2-cpu", model={"tuning": "full"}, learner={"optimizer": "adamw_8bit"})
    smol = find(config.model.path)
    assert learning(config, smol, on_gpu=False).step == 20 * 28_311_552
    assert learning(config, smol, on_gpu=True).step == 0


@pytest.mark.parametrize(("tuning", "rank"), [("full", 1), ("lora", 4), ("lora", 33)])
def test_moments_in_8_bits_are_what_bitsandbytes_holds(
    tmp_path: Path, tuning: str, rank: int
) -> None:
    """Rank 33: 33 x 128 = 4,224 elements are 16.5 blocks of 256."""
    path = save_small_model(tmp_path / "model", tied=False)
    values = {"path": str(path), "tuning": tuning, "precision": "fp32", "lora": {"rank": rank}}
    model = Model.model_validate(values)
    policy = Policy(model, model.path, "cpu", seed=0)
    settings = Learner.model_validate({"optimizer": "adamw_8bit"})
    optimizer = make_optimizer(policy.trainable(), settings, 1e-3)
    for _, parameter in policy.trainable():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # The two tables that codes are looked up in are shared by all tensors.
    held = sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name in ("state1", "state2", "absmax1", "absmax2")
    )
    found = Learning(find(model.path), model, 80, 24, 8, False, False, settings.optimizer)
    assert found.moments == held


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.parametrize("reference", ["initial", "round_start"])
def test_full_tuning_loads_the_initial_policy_whatever_the_objective_holds_it_to(
    objective: str, reference: str
) -> None:
    """ORPO has no reference, but KL to the start is measured after each of its rounds too."""
    config = preset(
        "smollm2-cpu",
        model={"tuning": "full"},
        rollout={"engine": "transformers"},
        objective={"name": objective},
        rounds={"reference": reference},
        gates={"max_kl": 1.0},
    )
    plan = Plan("cpu", "transformers", "merged")
    found = estimate(config, plan, parse("1xT4-16GB"), find(config.model.path))
    assert size(found, "learner", "initial policy", host=True) == 4 * 134_515_008


def test_what_needs_less_is_said_to_need_less() -> None:
    """Each of these settings is a way out of a full memory, so each must lower the learner's."""
    base = preset("qwen2.5-7b-instruct-qlora-a100", learner={"micro_batch_tokens": 4096})

    def train(config: RunConfig) -> int:
        held = learning(config, QWEN, on_gpu=True)
        return held.base + held.casts + 16 * held.trained + held.activations + held.turn

    for section, change in (
        ("learner", {"micro_batch_tokens": 2048}),
        ("learner", {"gradient_checkpointing": True}),
    ):
        values = base.model_dump()
        values[section] |= change
        assert train(RunConfig.model_validate(values)) < train(base), change
    # One pair at a time: there its length counts.
    single = preset("qwen2.5-7b-instruct-qlora-a100", learner={"micro_batch_tokens": 1})
    for section, change in (
        ("prompts", {"max_tokens": 512}),
        ("rollout", {"max_new_tokens": 256}),
    ):
        values = single.model_dump()
        values[section] |= change
        assert train(RunConfig.model_validate(values)) < train(single), change
    lora = preset("qwen2.5-7b-instruct-qlora-a100", model={"tuning": "lora"})
    assert train(base) < train(lora) + 2 * QWEN.linear
    assert learning(base, QWEN, True).base < learning(lora, QWEN, True).base


@contextmanager
def kept() -> Iterator[dict[int, torch.Tensor]]:
    """Every storage that autograd keeps for backward, once."""
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def bytes_kept(model: Model) -> int:
    """What a forward pass over two pairs keeps, the weights themselves aside."""
    policy = Policy(model, model.path, "cpu", seed=0)
    policy.model.train()
    rows = [([5] * 24, [6] * 9), ([5] * 24, [7] * 9), ([6] * 24, [8] * 9), ([6] * 24, [9] * 8)]
    ways = Scorer(policy, 0, "stop", print).ways
    assert ways.masking is not None and ways.tail is not None
    batch = collate_shared(rows, policy.pad_id, "cpu")
    assert batch.input_ids_BT.shape == (2, 40)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in policy.model.buffers()}
    with kept() as storages, policy.autocast():
        sums = sequence_logps(token_logps(policy.model, batch, ways=ways), batch)
    found = sum(t.untyped_storage().nbytes() for ptr, t in storages.items() if ptr not in own)
    assert sums.requires_grad
    return found


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize(
    ("tuning", "precision"),
    [
        ("full", "fp32"),
        ("full", "bf16"),
        ("lora", "fp32"),
        ("lora", "bf16"),
        ("lora", "fp16"),
        ("qlora", "bf16"),
    ],
)
def test_a_layer_keeps_what_the_formula_says(
    tmp_path: Path, tuning: str, precision: str, key_heads: int
) -> None:
    """Two models that differ by two layers: the ends cancel out, the layers' share remains."""
    measured, expected = [], []
    for layers in (2, 4):
        path = save_small_model(tmp_path / str(layers), layers=layers, key_heads=key_heads)
        values = {"path": str(path), "tuning": tuning, "precision": precision}
        model = Model.model_validate(values)
        held = Learning(find(model.path), model, 80, 24, 8, checkpointing=False, on_gpu=False)
        measured.append(bytes_kept(model))
        expected.append(held.activations + held.casts)
    assert measured[1] - measured[0] == pytest.approx(expected[1] - expected[0], rel=0.001)


NATIVE = "bf16" if this_machine().cpu_bf16 else "fp32"
"""Elsewhere a step in bf16 takes minutes."""


@pytest.mark.engine
@pytest.mark.parametrize(
    "case",
    [
        benchmark.Case("full", NATIVE, pairs=1, prompt=96, completion=32),
        benchmark.Case("qlora", NATIVE, prompt=96, completion=32),
        benchmark.Case("lora", NATIVE, prompt=96, completion=32, checkpointing=True),
    ],
    ids=lambda c: f"{c.tuning}{'-checkpointing' * c.checkpointing}",
)
def test_estimates_are_within_15_percent_of_measured_peaks(case: benchmark.Case) -> None:
    """SmolLM2-135M in a process of its own, on real bitsandbytes for NF4."""
    assert benchmark.estimated(case) == pytest.approx(benchmark.measure(case).peak, rel=0.15)


def test_every_phase_has_the_process_and_the_weights() -> None:
    found = on(preset("gemma-2b-it-qlora-t4"), "1xT4-16GB")
    shown: tuple[Phase, ...] = PHASES
    for phase in shown:
        assert found.at(phase, host=True) >= ASSUMED.process
        assert found.at(phase, host=False) >= size(found, "learner", "weights")
