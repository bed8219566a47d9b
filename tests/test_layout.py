"""Who sits on which GPU: every role has its place, and no GPU is given away twice."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placements import LLAMA_70B, LORA, QWEN_7B, preset

from launch.architectures import Architecture, find
from launch.cluster import Cluster, Slot, alone, parse
from launch.judge_memory import own_specs
from launch.layout import Layout, divides, options
from launch.machines import GIB, Machine
from launch.ray_run import _check_processors
from rlhf.config import RunConfig
from rlhf.errors import InputError

MODELS = (QWEN_7B, LLAMA_70B, "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-2b-it")
"""28 heads and 4 key heads; 64 and 8; 9 and 3; 8 and 1."""


def judge(name: str, share: float = 0.2) -> dict[str, Any]:
    return {
        "kind": "llm",
        "name": name,
        "dimensions": [f"quality of {name}"],
        "model": "google/gemma-2b-it",
        "revision": name,
        "engine": {"gpu_memory_share": share},
    }


def config(
    judges: int = 0, share: float = 0.4, model: str = QWEN_7B, **placement: Any
) -> RunConfig:
    found = preset(
        LORA,
        model={"path": model},
        rollout={"gpu_memory_share": share},
        placement={"device": "auto", **placement},
    )
    values = found.model_dump()
    values["judges"]["audit"] = [judge(f"judge{i}") for i in range(judges)]
    return RunConfig.model_validate(values)


def layouts(wanted: RunConfig, cluster: Cluster, model: str = QWEN_7B) -> Iterator[Layout]:
    for family in options(wanted, cluster, find(model), own_specs(wanted)):
        yield from family


def first(wanted: RunConfig, cluster: str) -> Layout:
    return next(layouts(wanted, parse(cluster)))


@pytest.mark.slow
@given(
    nodes=st.integers(1, 4),
    gpus=st.integers(1, 8),
    judges=st.integers(0, 2),
    share=st.sampled_from([0.1, 0.35, 0.55]),
    model=st.sampled_from(MODELS),
    kind=st.sampled_from(["auto", "spmd", "ray"]),
    zero=st.integers(0, 3),
)
def test_every_role_has_its_place_and_no_gpu_is_given_away_twice(
    nodes: int, gpus: int, judges: int, share: float, model: str, kind: str, zero: int
) -> None:
    wanted = config(judges, share, model, kind=kind, zero=zero)
    cluster = parse(f"{nodes}x{gpus}xA100-80GB")
    for layout in layouts(wanted, cluster, model):
        taken = dict.fromkeys(cluster.slots, 0.0)
        for holder in layout.holders:
            assert len({slot.node for slot in holder.slots}) == 1
            assert len(set(holder.slots)) == len(holder.slots)
            assert 0 < holder.fraction <= 1
            assert holder.share < 1
            for slot in holder.slots:
                taken[slot] += holder.fraction
        assert max(taken.values()) <= 1 + 1e-9
        assert layout.kind == "local" or min(taken.values()) > 0
        assert len(layout.of("learner")) == layout.sharding.ranks >= 1
        assert len({rank.slots for rank in layout.of("learner")}) == layout.sharding.ranks
        assert layout.of("generator")
        assert {holder.name for holder in layout.of("judge")} == {
            f"judge{i}" for i in range(judges)
        }
        heads = find(model)
        width = layout.tensor_parallel
        assert {len(g.slots) for g in layout.of("generator")} == {width}
        assert heads.heads % width == 0
        assert heads.kv_heads % width == 0 or width % heads.kv_heads == 0
        reserved = [slot for group in layout.groups for slot in group.slots]
        assert sorted(reserved) == (list(layout.used) if layout.kind == "ray" else [])
        for group in layout.groups:
            assert {slot.node for slot in group.slots} == {group.slots[0].node}
            for slot, bundle in zip(group.slots, group.bundles, strict=True):
                assert bundle == {"CPU": len(layout.at(slot)), "GPU": 1}


@pytest.mark.slow
@given(gpus=st.integers(2, 8), nodes=st.integers(1, 3), model=st.sampled_from(MODELS))
def test_separate_engines_and_learner_share_no_gpu(gpus: int, nodes: int, model: str) -> None:
    wanted = config(1, model=model, kind="ray", colocate=False)
    for layout in layouts(wanted, parse(f"{nodes}x{gpus}xA100-80GB"), model):
        assert not layout.colocated
        for slot in layout.used:
            roles = {holder.role for holder in layout.at(slot)}
            assert roles in ({"learner"}, {"generator"}, {"generator", "judge"})


@pytest.mark.parametrize(
    ("cluster", "placement", "expected"),
    [
        ("1xT4-16GB", {}, ["local"]),
        ("1xT4-16GB", {"zero": 2}, ["spmd"]),
        ("8xA100-80GB", {}, ["spmd", "ray", "ray", "local"]),
        ("8xA100-80GB", {"zero": 1}, ["spmd", "ray", "ray"]),
        ("2x4xA100-80GB", {}, ["ray", "ray", "spmd", "local"]),
        ("8xA100-80GB", {"tensor_parallel": 2}, ["ray", "ray"]),
        ("8xA100-80GB", {"generators": 2, "colocate": True}, ["ray"]),
        ("8xA100-80GB", {"colocate": False}, ["ray"]),
        ("8xA100-80GB", {"kind": "local"}, ["local"]),
        ("8xA100-80GB", {"kind": "ray"}, ["ray", "ray"]),
    ],
)
def test_kinds_are_tried_widest_first_and_only_those_that_the_config_allows(
    cluster: str, placement: dict[str, Any], expected: list[str]
) -> None:
    families = options(config(**placement), parse(cluster), find(QWEN_7B))
    assert [family[0].kind for family in families] == expected


def test_separate_generators_take_the_last_gpus_and_the_learner_all_others() -> None:
    wanted = config(kind="ray", colocate=False, generators=3, tensor_parallel=2)
    (layout,) = layouts(wanted, parse("2x5xA100-80GB"))
    assert [g.slots for g in layout.of("generator")] == [
        (Slot(0, 2), Slot(0, 3)),
        (Slot(1, 0), Slot(1, 1)),
        (Slot(1, 2), Slot(1, 3)),
    ]
    assert [rank.slots[0] for rank in layout.of("learner")] == [
        Slot(0, 0),
        Slot(0, 1),
        Slot(0, 4),
        Slot(1, 4),
    ]


def test_judges_that_share_an_engine_have_one_seat() -> None:
    values = config(judges=2).model_dump()
    for spec in values["judges"]["audit"]:
        spec["revision"] = "main"
    layout = next(layouts(RunConfig.model_validate(values), parse("1xA100-80GB")))
    assert [holder.name for holder in layout.of("judge")] == ["judge0"]


def test_judges_spread_over_gpus_and_narrow_the_learner_there() -> None:
    layout = first(config(2, share=0.5, kind="ray"), "2xA100-80GB")
    assert [h.slots for h in layout.of("judge")] == [(Slot(0, 0),), (Slot(0, 1),)]
    assert [rank.fraction for rank in layout.of("learner")] == [0.3, 0.3]
    # With spmd each process has its own judges.
    layout = first(config(2, share=0.5, kind="spmd"), "2xA100-80GB")
    assert [h.name for h in layout.of("judge")] == ["judge0", "judge1"] * 2
    assert [rank.fraction for rank in layout.of("learner")] == [0.1, 0.1]


def test_nodes_without_gpus_are_a_slot_each() -> None:
    """Two raylets on processors: a learner rank and a generator on each."""
    node = Machine("a server", 0, 0, None, 64 * GIB)
    two = Cluster("two servers", (node, node))
    layout = next(layouts(config(1, kind="ray"), two))
    assert [rank.slots for rank in layout.of("learner")] == [(Slot(0, None),), (Slot(1, None),)]
    assert len(layout.of("generator")) == 2
    assert [group.bundles for group in layout.groups] == [({"CPU": 3},), ({"CPU": 2},)]
    assert {holder.fraction for holder in layout.holders} == {0}
    (apart,) = layouts(config(kind="ray", colocate=False), two)
    assert apart.of("learner")[0].slots == (Slot(0, None),)
    assert apart.of("generator")[0].slots == (Slot(1, None),)


@pytest.mark.parametrize(
    ("cluster", "judges", "placement", "words"),
    [
        ("4xA100-80GB", 0, {"tensor_parallel": 3}, ("28 attention heads", "got 3", "1, 2, 4")),
        ("4xA100-80GB", 0, {"tensor_parallel": 8}, ("a node with as many GPUs", "has 4")),
        ("4xA100-80GB", 0, {"generators": 5, "colocate": True}, ("generators 5", "room for 4")),
        ("4xA100-80GB", 0, {"generators": 4, "colocate": False}, ("leaves no GPU to the learner",)),
        ("1xA100-80GB", 0, {"colocate": False}, ("leaves no GPU to the learner", "on the 1 of")),
        ("2xA100-80GB", 3, {"kind": "spmd"}, ("add up to 1 of one GPU", "below 1")),
        ("2xA100-80GB", 5, {"colocate": False}, ("adds up to 1 beside a generator",)),
    ],
)
def test_what_can_not_be_seated_is_refused(
    cluster: str, judges: int, placement: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        list(layouts(config(judges, **placement), parse(cluster)))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("zero", "sections", "words"),
    [
        (
            1,
            {"model": {"precision": "fp16"}},
            "model.precision fp16 does not go with placement.zero 1",
        ),
        (2, {"learner": {"optimizer": "adamw_8bit"}}, "learner.optimizer adamw_8bit does not go"),
        (3, {"model": {"tuning": "qlora"}}, "model.tuning qlora does not go with placement.zero 3"),
    ],
)
def test_what_zero_can_not_do_is_refused_when_it_is_planned(
    zero: int, sections: dict[str, dict[str, Any]], words: str
) -> None:
    placement = {"device": "auto", "zero": zero}
    wanted = preset(LORA, placement=placement, **sections)
    with pytest.raises(InputError, match=words):
        list(layouts(wanted, parse("2xA100-80GB")))
    without = preset(LORA, placement={"device": "auto"}, **sections)
    assert list(layouts(without, parse("2xA100-80GB")))


def test_only_vllm_splits_a_model_over_gpus() -> None:
    wanted, cluster = config(tensor_parallel=2), parse("4xA100-80GB")
    with pytest.raises(InputError, match="tensor_parallel 2 needs rollout.engine vllm"):
        list(options(wanted, cluster, find(QWEN_7B), engine="transformers"))
    families = options(config(kind="ray"), cluster, find(QWEN_7B), engine="transformers")
    assert {layout.tensor_parallel for family in families for layout in family} == {1}


def test_a_model_of_unknown_heads_is_split_only_as_asked() -> None:
    cluster = parse("4xA100-80GB")
    (asked,) = next(options(config(tensor_parallel=3), cluster, None))
    assert asked.tensor_parallel == 3
    (layout,) = next(options(config(kind="ray"), cluster, None))
    assert layout.tensor_parallel == 1


def test_a_lone_process_is_no_cluster() -> None:
    layout = next(layouts(config(kind="local"), alone(Machine("here", 2, GIB, (8, 0), GIB))))
    assert layout.used == (Slot(0, 0),)
    assert layout.groups == ()


def test_splitting_follows_the_rule_of_vllm() -> None:
    """Query heads evenly; key heads evenly, or each on as many GPUs as are left over."""
    heads = Architecture(1, 64, 8, 2, 8, 64, 64, True)
    wanted = config(kind="ray", colocate=True)
    (family,) = options(wanted, parse("8xA100-80GB"), heads)
    assert [layout.tensor_parallel for layout in family] == [1, 2, 4, 8]
    heads = Architecture(1, 64, 12, 3, 8, 192, 192, True)
    (family,) = options(wanted, parse("8xA100-80GB"), heads)
    assert [layout.tensor_parallel for layout in family] == [1, 3, 6]


def test_a_width_splits_everything_that_vllm_splits() -> None:
    """Qwen2.5-1.5B: 12 heads, but 8,960 between the layers, which 6 does not divide."""
    architecture = Architecture(28, 1536, 12, 2, 128, 8960, 151936, True)
    assert [n for n in range(1, 9) if divides(n, architecture)] == [1, 2, 4]


def test_a_group_that_no_node_has_processors_for_is_refused_at_once() -> None:
    group = SimpleNamespace(bundles=[{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0}])
    layout: Any = SimpleNamespace(groups=[group])
    _check_processors(layout, [2.0, 3.0])
    with pytest.raises(InputError, match="3 CPUs are needed in one node.*have 2, 0: start"):
        _check_processors(layout, [2.0, 0.0])
