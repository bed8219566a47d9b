"""Whether a run fits a cluster: what is chosen, what is refused, and that the advice is true."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placements import LLAMA_70B, LORA, QLORA_T4, QWEN_7B, at, planned, preset, sizes

from launch import cluster_fit
from launch.cluster import Cluster, alone, parse
from launch.cluster_fit import plan_cluster, refusal
from launch.cluster_text import describe
from launch.fit import report
from launch.layout import ENGINE_SHARE
from launch.machines import GIB, Machine
from launch.machines import parse as parse_machine
from launch.memory_parts import RUNNING
from launch.remedies import SHARE, SPARE, changed
from rlhf.config import RunConfig

FULL_7B = {"path": QWEN_7B, "tuning": "full"}


def lora(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    placement = {"device": "auto", **sections.pop("placement", {})}
    return preset(LORA, model=model or {}, placement=placement, **sections)


def fits(config: RunConfig, cluster: str) -> bool:
    found = planned(config, cluster).found
    assert found is not None
    return found.fits(SPARE)


def test_one_gpu_of_a_cluster_is_the_same_as_a_machine() -> None:
    """Both ways to a single process end in the same rows."""
    config = preset(QLORA_T4)
    rows = report(config, parse_machine("1xT4-16GB"))[0].splitlines()
    text = describe(planned(config, "1xT4-16GB")).splitlines()
    assert [line for line in rows if line not in text] == [rows[0]]


@pytest.mark.parametrize(
    ("cluster", "config", "kind", "colocated", "width", "ranks"),
    [
        # A whole copy on each GPU beside the learner.
        ("8xA100-80GB", lora(), "spmd", True, 1, 8),
        # Several nodes: Ray, which spans them.
        ("2x4xA100-80GB", lora(), "ray", True, 1, 8),
        # 141 GB are no engine for half a card.
        ("8xA100-80GB", lora({"path": LLAMA_70B}, placement={"zero": 3}), "ray", True, 8, 8),
        # A shard of seven billion weights and most of the card for vLLM fit apart alone.
        (
            "8xA100-80GB",
            lora(
                FULL_7B,
                rollout={"gpu_memory_share": 0.9},
                placement={"zero": 3},
            ),
            "ray",
            False,
            1,
            4,
        ),
    ],
)
def test_the_first_kind_that_fits_is_taken(
    cluster: str, config: RunConfig, kind: str, colocated: bool, width: int, ranks: int
) -> None:
    plan = planned(config, cluster)
    layout = plan.layout
    found = (layout.kind, layout.colocated, layout.tensor_parallel, layout.sharding.ranks)
    assert found == (kind, colocated, width, ranks)
    assert refusal(plan) is None


def test_an_engine_apart_never_sleeps_and_has_its_card() -> None:
    plan = planned(lora(placement={"kind": "ray", "colocate": False}), "2x4xA100-80GB")
    apart, learner = at(plan, 1, 3), at(plan, 0, 0)
    (vllm,) = (p for p in apart.parts if p.role == "generator" and p.what == "vLLM, awake")
    assert (vllm.size, vllm.phases) == (round(ENGINE_SHARE * round(79.1 * GIB)), RUNNING)
    assert not any(p.what == "vLLM, asleep" for p in apart.parts)
    assert {role for role, _ in sizes(apart)} == {"generator", "framework"}
    assert {role for role, _ in sizes(learner)} == {"learner", "publish", "framework"}


def test_a_host_holds_what_each_of_its_processes_holds_and_shares_the_checkpoint() -> None:
    config = lora(FULL_7B, placement={"zero": 3})
    two, four = (sizes(at(planned(config, f"{n}xA100-80GB")), host=True) for n in (2, 4))
    for row in (("framework", "process"), ("generator", "vLLM, asleep")):
        assert four[row] == 2 * two[row]
    row = ("learner", "checkpoint")
    assert four[row] == two[row] == 2 * 7_615_616_512
    row = ("publish", "copy to write")
    assert four[row] == two[row] == 5_000_000_000 + 2 * 152_064 * 3_584


def test_offload_moves_the_optimizer_and_under_zero_3_the_weights_to_the_host() -> None:
    for stage, moved in ((2, ("AdamW's copy", "AdamW")), (3, ("AdamW's copy", "AdamW", "weights"))):
        config = lora(FULL_7B, placement={"kind": "spmd", "zero": stage})
        kept = at(planned(config, "8xA100-80GB"))
        away = at(planned(changed(config, [("placement.offload", True)]), "8xA100-80GB"))
        for what in moved:
            part = sizes(kept)["learner", what]
            assert ("learner", what) not in sizes(away)
            assert sizes(away, host=True)["learner", what] == 8 * part
        assert sizes(away)["learner", "gradients"] == sizes(kept)["learner", "gradients"]


@pytest.mark.parametrize(
    ("cluster", "config", "term", "change"),
    [
        (
            "4x8xH100-80GB",
            lora({"path": LLAMA_70B}),
            "GPU 0 of node 0 needs 174.3 of 79.1 GiB in publish, most of it for learner weights, "
            "131.4 GiB (2 B x 70,553.7M)",
            "Smallest change: --placement.zero 3",
        ),
        (
            "4x8xH100-80GB",
            lora({"path": LLAMA_70B}, placement={"zero": 3, "tensor_parallel": 2}),
            "on GPU 0 of node 0 the key-value cache of generator lacks 29.",
            "Smallest change: --placement.tensor_parallel 4",
        ),
        (
            "4x8xH100-80GB",
            lora(
                {"path": LLAMA_70B},
                placement={"zero": 3},
                learner={"gradient_checkpointing": False},
            ),
            "in train, most of it for learner activations, 140.1 GiB (459,240 B x 4,096 tokens x "
            "80 layers, kept for backward)",
            "Smallest change: --learner.gradient_checkpointing true",
        ),
        (
            "8xA100-80GB",
            lora(FULL_7B),
            "in train, most of it for learner AdamW, 56.7 GiB (8 B x 7,615.6M)",
            "Smallest change: --placement.zero 3",
        ),
        (
            "2xH100-80GB",
            lora(FULL_7B, placement={"zero": 3}),
            "in train, most of it for learner AdamW, 28.4 GiB (8 B x 7,615.6M / 2 ranks)",
            "Smallest change: --placement.offload true",
        ),
        (
            "2xA100-80GB",
            lora(placement={"kind": "ray", "colocate": True}, rollout={"gpu_memory_share": 0.9}),
            "GPU 0 of node 0 needs",
            "Smallest change: --rollout.gpu_memory_share 0.7",
        ),
    ],
)
def test_a_refusal_names_the_term_and_the_smallest_change_which_helps(
    cluster: str, config: RunConfig, term: str, change: str
) -> None:
    plan = planned(config, cluster)
    error = refusal(plan)
    assert error is not None
    assert error.exit_status == 2
    assert str(error).startswith(f"{cluster} is too small: ")
    assert term in str(error)
    assert change in str(error)
    flags = re.findall(r"--(\S+) (\S+)", str(error))
    read = {"true": True, "false": False}
    changes = [
        (
            name,
            read.get(
                value, float(value) if "." in value else int(value) if value.isdigit() else value
            ),
        )
        for name, value in flags
    ]
    assert not fits(config, cluster)
    assert fits(changed(config, changes), cluster)


def test_where_only_what_is_trained_could_change_more_gpus_are_named_too() -> None:
    """The host of one A100 has no room for 16 bytes a weight either."""
    config = lora(FULL_7B, placement={"zero": 3})
    said = str(refusal(planned(config, "1xA100-80GB")))
    assert "Smallest change: --model.tuning lora" in said
    found = re.search(r"or as it is on (\S+)$", said)
    assert found is not None
    assert found.group(1) == "4x1xA100-80GB"
    assert fits(config, "4x1xA100-80GB")
    assert not fits(config, "2x1xA100-80GB")


def test_where_no_setting_helps_more_gpus_do_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some setting nearly always helps, a shorter answer at worst; so here there are none."""
    monkeypatch.setattr(cluster_fit, "_groups", lambda *_: [(SHARE, [])])
    config = lora(
        {"path": LLAMA_70B},
        placement={"zero": 3, "kind": "ray", "colocate": True},
        rollout={"gpu_memory_share": 0.7},
    )
    said = str(refusal(planned(config, "4xH100-80GB")))
    assert said.endswith("No setting helps; more GPUs do: 4x4xH100-80GB")
    assert fits(config, "4x4xH100-80GB")
    assert not fits(config, "2x4xH100-80GB")
    assert str(refusal(planned(config, "1xL4-24GB"))).endswith(
        "Neither a setting nor more of these nodes helps; take larger cards or a smaller model"
    )


def test_a_plan_on_processors_is_of_host_memory_alone() -> None:
    server = Machine("a server", 0, 0, None, 64 * GIB, cpu_bf16=True)
    model = {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "precision": "bf16"}
    config = preset("smollm2-cpu", model=model, placement={"kind": "ray", "zero": 2})
    plan = plan_cluster(config, Cluster("two servers", (server, server)))
    text = describe(plan)
    assert "2 learner ranks, ZeRO-2, 2 generators on two servers" in text
    assert "GPU" not in text
    assert not sizes(at(plan, gpu=None))
    assert refusal(plan) is None
    small = alone(replace(server, host=2 * GIB))
    error = refusal(plan_cluster(config, small))
    assert error is not None
    assert "the host of node 0 needs" in str(error)


def test_a_model_of_unknown_size_is_seated_all_the_same() -> None:
    plan = planned(lora({"path": "org/unheard-of"}), "2x4xA100-80GB")
    assert refusal(plan) is None
    text = describe(plan)
    assert "8 learner ranks, 8 generators on 2x4xA100-80GB" in text
    assert "memory     not estimated: " in text
    assert "hf download org/unheard-of config.json" in text


@settings(max_examples=25, deadline=None)
@given(
    nodes=st.integers(1, 3),
    gpus=st.integers(1, 8),
    card=st.sampled_from(["L4-24GB", "A100-40GB", "H100-80GB"]),
    path=st.sampled_from([QWEN_7B, LLAMA_70B, "google/gemma-2b-it"]),
    tuning=st.sampled_from(["full", "lora"]),
    zero=st.integers(0, 3),
)
def test_more_gpus_never_make_a_fitting_plan_unfit(
    nodes: int, gpus: int, card: str, path: str, tuning: str, zero: int
) -> None:
    """Of hosts only their cards are held against it: with more ranks a node loads more at once."""
    config = lora({"path": path, "tuning": tuning}, placement={"zero": zero})

    def fits_cards(nodes: int, gpus: int) -> bool:
        machine = replace(parse_machine(f"{gpus}x{card}"), host=2**50)
        found = plan_cluster(config, Cluster("described", (machine,) * nodes)).found
        assert found is not None
        return found.fits(SPARE)

    if fits_cards(nodes, gpus):
        assert fits_cards(nodes + 1, gpus)
        assert fits_cards(nodes, gpus + 1)


@pytest.mark.parametrize("path", [QWEN_7B, LLAMA_70B])
@pytest.mark.parametrize("cluster", ["8xA100-80GB", "4x8xH100-80GB"])
def test_a_later_stage_takes_less_of_a_card_in_full_tuning(path: str, cluster: str) -> None:
    """What a GPU holds while it trains, buckets and gathered weights included."""
    placement = {"kind": "ray", "colocate": True, "tensor_parallel": 2}
    peaks = [
        at(
            planned(
                lora({"path": path, "tuning": "full"}, placement={**placement, "zero": stage}),
                cluster,
            )
        ).at("train", host=False)
        for stage in range(4)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_equal_gpus_are_shown_once_and_each_node_has_its_line() -> None:
    text = describe(planned(lora(placement={"kind": "ray"}), "3x4xA100-80GB"))
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines if "GiB each" in line] == ["nodes 0-2, GPU 0-3"]
    hosts = [line.split(":")[0] for line in lines if line.startswith("node") and "host" in line]
    assert hosts == ["node 0, host memory", "nodes 1-2, host memory"]
    seats = [line for line in lines if re.match(r"node \d +learner", line)]
    assert [line.split(" on ")[0] for line in seats] == [
        "node 0     learner ranks 0-3",
        "node 1     learner ranks 4-7",
        "node 2     learner ranks 8-11",
    ]


def test_a_cluster_word_is_a_cluster_of_nodes() -> None:
    assert planned(lora(), "8xA100-80GB").cluster == parse("8xA100-80GB")
