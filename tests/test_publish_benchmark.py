"""The ways that `benchmarks/publish.py` compares serve the same, or it says which does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.publish import WAYS, Measured, Task, disagreement, measure, table

ONE = Measured(1.0, 0.5, 0.5, 4_000_000, [-1.0, -2.0], [-1.0, -2.0])


def test_equal_ways_are_told_from_one_that_serves_something_else() -> None:
    """Gaps of 0 and 0.1 nats are 0.05 a token."""
    assert disagreement([[ONE, ONE]] * 4, 0.01) is None
    stale = replace(ONE, engine=[-1.0, -2.1])
    wrong = disagreement([[ONE, ONE], [ONE, ONE], [ONE, stale], [ONE, ONE]], 0.01)
    assert wrong == "full, memory is 0.0500 nats a token from what its policy says"
    # Engine and policy agree on another version than the other ways serve.
    other = replace(ONE, engine=[-1.0, -2.1], policy=[-1.0, -2.1])
    wrong = disagreement([[ONE, ONE], [ONE, ONE], [ONE, ONE], [ONE, other]], 0.01)
    assert wrong == "full, disk is 0.0500 nats a token from what adapter, disk serves"


def test_ratios_are_to_the_way_through_disk() -> None:
    """Medians of 2 and 2 seconds, of 1 and 3 (2), and of 0.5 each."""
    fast = replace(ONE, write=0.25, digest=0.125, load=0.125)
    uneven = [replace(ONE, write=0.0), replace(ONE, write=2.0)]
    lines = table([[fast, fast], uneven, [ONE, ONE], [ONE, ONE]])
    assert [line.split()[-2:] for line in lines[1:]] == [
        ["0.500", "4.00"],
        ["2.000", "1.00"],
        ["2.000", "1.00"],
        ["2.000", "1.00"],
    ]
    assert all("4.0" in line.split() for line in lines[1:])


@pytest.mark.engine
def test_full_weights_through_memory_are_the_merged_adapters(
    tiny_model: Path, tmp_path: Path
) -> None:
    merged, full = WAYS[1:3]
    found = [
        measure(Task(way, str(tiny_model), "fp32", 1, str(tmp_path))) for way in (merged, full)
    ]
    for (one,), (other,) in [found]:
        assert one.engine == pytest.approx(one.policy, abs=1e-3)
        assert other.engine == pytest.approx(one.engine, abs=1e-3)
        assert one.size == other.size > 1_000_000
        assert min(one.write, one.digest, one.load) > 0
