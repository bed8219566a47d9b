"""`benchmarks/cache_blocks.py` compares engines that say the same, or says which does not."""

from __future__ import annotations

import math

import pytest

from benchmarks.cache_blocks import Measured, disagreement, table


def measured(block: int, samples: float = 100.0, *logps: float) -> Measured:
    return Measured(block, samples, 2 * samples, [list(logps or (-1.0, -2.0)), [-3.0]])


def test_engines_that_say_the_same_agree() -> None:
    assert disagreement([measured(128), measured(64, 150.0, -1.0005, -2.0), measured(32)]) is None


@pytest.mark.parametrize("other", [-1.1, math.nan])
def test_an_engine_that_says_something_else_is_named(other: float) -> None:
    why = disagreement([measured(128), measured(32), measured(64, 150.0, other, -2.0)])
    assert why is not None and why.startswith("blocks of 64 are")


def test_medians_stand_beside_what_vllm_takes_by_itself() -> None:
    found = [measured(128, 90), measured(64, 180), measured(128, 110), measured(64, 120)]
    assert [line.split() for line in table(found)[1:]] == [
        ["128", "100.0", "1.00", "200.0", "1.00"],
        ["64", "150.0", "1.50", "300.0", "1.50"],
    ]
