"""Packing: every sequence in one place, no row over its budget, the same work for every rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.packing import MicroBatch, TokenPair, pack, plan

ids = st.lists(st.integers(0, 3), min_size=1, max_size=5)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=3)
sequences = st.lists(st.tuples(prompts, ids), max_size=12)
pairs = st.lists(st.tuples(prompts, ids, ids).map(lambda e: [(e[0], e[1]), (e[0], e[2])]))


def distinct(examples: Sequence[Sequence[TokenPair]], micro: MicroBatch) -> list[TokenPair]:
    """What a micro-batch computes: a sequence that is given twice, once."""
    given = (s for i in micro.examples for s in examples[i])
    return list(dict.fromkeys((tuple(p), tuple(c)) for p, c in given))


def tokens(found: list[TokenPair], shared: bool) -> int:
    """Rows x longest row."""
    if not shared:
        return len(found) * max(len(p) + len(c) for p, c in found)
    rows = pack(found)
    return len(rows) * max(sum(s.length for s in row) for row in rows)


@given(sequences)
def test_a_prompt_is_in_one_segment_with_all_its_completions(given: list[TokenPair]) -> None:
    rows = pack(given)
    segments = [s for row in rows for s in row]
    assert len({tuple(s.prompt) for s in segments}) == len(segments)
    back = {n: (s.prompt, ids) for s in segments for n, ids in s.completions}
    assert back == {n: (list(p), c) for n, (p, c) in enumerate(given)}
    longest = max((s.length for s in segments), default=0)
    assert all(sum(s.length for s in row) <= longest for row in rows)


@given(pairs, st.integers(1, 40), st.booleans())
def test_every_example_is_in_one_micro_batch_and_none_is_over_the_budget(
    examples: list[list[TokenPair]], budget: int, shared: bool
) -> None:
    (own,) = plan(examples, budget, shared)
    assert sorted(i for micro in own for i in micro.examples) == list(range(len(examples)))
    assert all(micro.weight == 1 for micro in own)
    for micro in own:
        assert len(micro.examples) == 1 or tokens(distinct(examples, micro), shared) <= budget


@given(pairs, st.integers(1, 40), st.booleans(), st.integers(1, 5))
def test_ranks_get_equally_many_micro_batches_and_repeats_weigh_nothing(
    examples: list[list[TokenPair]], budget: int, shared: bool, ranks: int
) -> None:
    found = plan(examples, budget, shared, ranks)
    assert len(found) == ranks
    assert len({len(own) for own in found}) == 1
    counted = [i for own in found for micro in own if micro.weight for i in micro.examples]
    assert sorted(counted) == list(range(len(examples)))
    assert all(micro.examples for own in found for micro in own)
    idle = sum(micro.weight == 0 for own in found for micro in own)
    assert idle < ranks
    # Whoever could have worked does: idle passes are left only where every example is by itself.
    if idle:
        assert all(len(m.examples) == 1 for own in found for m in own)


def test_a_step_written_out() -> None:
    """Segments of 10 + 3 + 3 = 16, twice 4 + 1 + 1 = 6, and 2 + 0 + 0 = 2 tokens; 32 a pass.

    The longest opens rows of 16, of which 32 tokens hold two: the second takes 6 + 6 + 2.
    """

    def pair(token: int, prompt: int, completion: int) -> list[TokenPair]:
        return [([token] * prompt, [a] * completion) for a in (7, 8)]

    examples = [pair(1, 4, 2), pair(2, 10, 4), pair(3, 2, 1), pair(4, 4, 2)]
    assert plan(examples, 32, shared=True) == [[MicroBatch((1, 0, 3, 2))]]
    assert plan(examples, 31, shared=True) == [[MicroBatch((1,)), MicroBatch((0, 3, 2))]]
    # Padded rows: two of 14 tokens, then of 6, 6 and 3.
    expected = [[MicroBatch((1,)), MicroBatch((0, 3)), MicroBatch((2,))]]
    assert plan(examples, 28, shared=False) == expected


def test_pairs_of_one_prompt_stay_together_and_a_shared_answer_counts_once() -> None:
    prompt, good = [1] * 10, [2] * 6
    examples = [[(prompt, good), (prompt, [bad] * 6)] for bad in (3, 4, 5)]
    # 10 + 5 + 3 x 5 tokens.
    assert plan(examples, 30, shared=True) == [[MicroBatch((0, 1, 2))]]
    assert plan(examples, 29, shared=True) == [[MicroBatch((0, 1)), MicroBatch((2,))]]


def test_long_lists_are_planned_in_proportion() -> None:
    """100,000 sequences: a scan over open rows for each would take hours."""
    examples = [[([i], [0] * (1 + i % 50))] for i in range(100_000)]
    (own,) = plan(examples, 512, shared=True)
    held = sum(sum(len(examples[i][0][1]) for i in micro.examples) for micro in own)
    assert held == sum(1 + i % 50 for i in range(100_000))
    assert len(own) * 512 <= 1.05 * held


def test_an_example_has_one_prompt() -> None:
    with pytest.raises(AssertionError, match="one prompt"):
        plan([[([1], [2]), ([3], [4])]], 10, shared=True)
