"""What a rank holds under ZeRO: the stages by hand, what a stage saves, what DeepSpeed holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import zero_loading
from benchmarks import zero_memory as benchmark
from benchmarks.zero_memory import PARTS, Case, measure, theory
from launch.architectures import KNOWN, Architecture
from launch.learner_memory import Learning
from launch.zero_memory import BUCKET, LIVE, Sharded, Sharding
from rlhf.config_learner import Model

QWEN = "Qwen/Qwen2.5-7B-Instruct"
P = 7_615_616_512


def rank(
    stage: int, ranks: int, tuning: str = "full", precision: str = "bf16", name: str = QWEN
) -> Sharded:
    model = Model.model_validate({"path": name, "tuning": tuning, "precision": precision})
    architecture = Architecture.read(KNOWN[name], name)
    held = Learning(architecture, model, 2048, 1024, 512, True, on_gpu=True)
    return Sharded(held, Sharding(stage, ranks))


def state(found: Sharded) -> int:
    return found.base + found.adapter + found.gradients + found.masters + found.moments


def test_full_tuning_by_stage() -> None:
    """Eight ranks, as multiples of P. Weights, gradients, AdamW's copy and moments are

    4 + 4 + 0 + 8; 4 + 4 + 4/8 + 8/8; 4 + 4/8 + 4/8 + 8/8; 4/8 + 4/8 + 4/8 + 8/8.
    """
    for precision in ("bf16", "fp32"):
        found = [state(rank(stage, 8, precision=precision)) / P for stage in range(4)]
        assert found == [16, 9.5, 6, 2.5]


def test_a_lora_shards_its_frozen_base_in_stage_3_alone() -> None:
    """R = 40,370,176 of rank 16 on P frozen weights, four ranks, bf16: 2P and as multiples of R

    4 + 4 + 8; 4 + 4 + 1 + 2; 4 + 1 + 1 + 2; at last a quarter of P too, 1 + 1 + 1 + 2.
    """
    r = 40_370_176
    expected = [2 * P + 16 * r, 2 * P + 11 * r, 2 * P + 8 * r, P / 2 + 5 * r]
    assert [state(rank(stage, 4, "lora")) for stage in range(4)] == expected


def test_what_zero_3_adds_for_its_passes_by_hand() -> None:
    """57 norms of 3,584 and 28 x 4,608 biases stay whole, 4 B each, 2 where they are frozen; 10^9
    weights are gathered.

    An adapter's matrices of 16 x 3,584 = 57,344 and less stay whole too: nine a layer, and k's and
    v's outputs of 16 x 512.
    """
    full = rank(3, 8)
    assert full.whole == 4 * (57 * 3584 + 28 * 4608)
    assert full.gathered == 4 * LIVE
    assert full.bucket == 4 * BUCKET
    assert rank(1, 8).bucket == rank(2, 8).bucket / 2 == 4 * BUCKET
    # 3,584 wide: q in, q out, k in, v in, o in, o out, gate in, up in, down out.
    small = 28 * 16 * (9 * 3584 + 2 * 512)
    assert rank(3, 8, "lora").whole == full.whole / 2 + 4 * small
    assert rank(2, 8).whole == rank(2, 8).gathered == 0
    assert rank(0, 8).bucket == 0


@given(
    name=st.sampled_from(sorted(KNOWN)),
    tuning=st.sampled_from(["full", "lora", "qlora"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    ranks=st.integers(2, 512),
)
def test_a_later_stage_and_another_rank_never_take_more(
    name: str, tuning: str, precision: str, ranks: int
) -> None:
    stages = [rank(stage, ranks, tuning, precision, name) for stage in range(4)]
    held = [state(found) for found in stages]
    assert held == sorted(held, reverse=True)
    for stage, found in enumerate(stages):
        assert state(rank(stage, ranks + 1, tuning, precision, name)) <= state(found)
        assert min(found.base, found.gradients, found.moments) > 0


@given(name=st.sampled_from(sorted(KNOWN)), ranks=st.integers(2, 64))
def test_with_its_buffers_stage_3_pays_for_models_larger_than_what_it_gathers(
    name: str, ranks: int
) -> None:
    """A model of 135 million weights would be gathered whole, beside its shards."""
    second, third = rank(2, ranks, name=name), rank(3, ranks, name=name)
    if second.held.architecture.parameters > 2 * LIVE:
        assert state(third) + third.whole + third.gathered < state(second)


@pytest.mark.engine
def test_deepspeed_holds_what_is_said() -> None:
    """Two gloo ranks, a random Llama: each kind of tensor within a few per cent on each rank."""
    cases = [
        Case(stage, tuning, precision, "tiny")
        for stage in range(4)
        for tuning, precision in (("full", "fp32"), ("lora", "bf16"))
    ]
    for case, ranks in zip(cases, measure(cases), strict=True):
        assert len(ranks) == benchmark.RANKS
        for held in ranks:
            for part in PARTS:
                said, found = getattr(theory(case), part), getattr(held, part)
                assert found == pytest.approx(said, rel=0.03), (case, part)


@pytest.mark.engine
def test_zero_3_has_no_more_than_a_share_and_two_of_a_tensor_while_it_loads() -> None:
    """Two gloo ranks, a model of 40 million weights, loaded and used for one pass: P bytes in fp32.

    Whole P; split P / 2 and twice the largest tensor, as a frozen base half of that.
    """
    held = Learning(
        Architecture.read({"model_type": "llama", **zero_loading.LLAMA}, "random"),
        Model.model_validate({"path": "random", "tuning": "full", "precision": "fp32"}),
        *(64, 32, 16, False),
        on_gpu=False,
    )
    alone, split = Sharded(held, Sharding()), Sharded(held, Sharding(3, zero_loading.RANKS))
    cases = [case for case in zero_loading.CASES if case.split or case.precision == "fp32"]
    found = dict(zip(cases, zero_loading.measure(cases), strict=True))
    for case, ranks in found.items():
        weight = {"fp32": 4, "bf16": 2}[case.precision]
        assert len(ranks) == zero_loading.RANKS
        for loaded in ranks:
            rank = split if case.split else alone
            assert loaded.held == pytest.approx(rank.base * weight / 4, rel=0.001)
            # DeepSpeed makes weights of the type that its config names.
            assert loaded.dtype == {"fp32": "float32", "bf16": "bfloat16"}[case.precision]
            if case.precision == "fp32":
                assert loaded.logits == found[replace(case, split=False)][0].logits
            if case.split:
                said = weight / 4 * rank.base + 2 * weight * rank.largest
                assert loaded.held < loaded.peak < 1.1 * said
            else:
                assert loaded.peak > 0.99 * alone.base
