"""Clusters in a word."""

from __future__ import annotations

import pytest

from launch.cluster import Cluster, Slot, alone, parse
from launch.machines import GIB, Machine
from launch.machines import parse as machine
from rlhf.errors import InputError


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "card"),
    [
        ("4x8xH100-80GB", 4, 8, "H100-80GB"),
        ("8xA100-80GB", 1, 8, "A100-80GB"),
        ("1xT4-16GB", 1, 1, "T4-16GB"),
        ("2x1xL4-24GB", 2, 1, "L4-24GB"),
    ],
)
def test_a_described_cluster(text: str, nodes: int, gpus: int, card: str) -> None:
    found = parse(text)
    assert found == Cluster(text, (machine(f"{gpus}x{card}"),) * nodes)
    assert found.slots == tuple(Slot(n, g) for n in range(nodes) for g in range(gpus))
    assert parse(found.times(2).name).nodes == found.times(2).nodes == 2 * found.nodes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("H100", ("--cluster must be NODESxGPUSxCARD-SIZEGB", "4x8xH100-80GB", "got 'H100'")),
        ("0x8xH100-80GB", ("--cluster must be",)),
        ("4x0xH100-80GB", ("--cluster must be COUNTxCARD-SIZEGB",)),
        ("2x3x4xH100-80GB", ("--cluster must be",)),
        ("4x8xH10-80GB", ("--cluster 8xH10-80GB: there is no card H10", "did you mean H100?")),
        ("4x8xT4-80GB", ("a T4 has 16GB, got 80GB",)),
    ],
)
def test_what_describes_no_cluster_is_refused(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


def test_a_node_without_gpus_is_a_place_only_where_no_node_has_any() -> None:
    bare = Machine("a laptop", 0, 0, None, 16 * GIB)
    assert alone(bare).slots == (Slot(0, None),)
    mixed = Cluster("mixed", (bare, machine("2xT4-16GB")))
    assert mixed.slots == (Slot(1, 0), Slot(1, 1))
    assert mixed.without_gpus().slots == (Slot(0, None), Slot(1, None))
