"""The nucleus is the textbook's, whatever the shape of the distribution."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import nucleus
from rollout.nucleus import keep_nucleus

Weights = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


def reference(weights: list[int], top_p: Fraction) -> set[int]:
    """The smallest set of heaviest tokens that reaches top_p, with those tied with its lightest.

    Exact: token i has probability weights[i] / sum(weights).
    """
    total, mass, least = sum(weights), Fraction(0), 0
    for weight in sorted(weights, reverse=True):
        least = weight
        mass += Fraction(weight, total)
        if mass >= top_p:
            break
    return {i for i, weight in enumerate(weights) if weight >= least}


def between_edges(weights: list[int], pick: float) -> Fraction:
    """A top_p well away from every cumulative sum, where rounding decides."""
    total, mass, middles, last = sum(weights), 0, [], Fraction(0)
    for weight in sorted(weights, reverse=True):
        mass += weight
        middles.append((last + Fraction(mass, total)) / 2)
        last = Fraction(mass, total)
    return middles[int(pick * len(middles))]


def kept(weights: list[list[int]], top_p: list[float]) -> list[set[int]]:
    logits = torch.tensor(weights, dtype=torch.float64).log()
    result = keep_nucleus(logits, torch.tensor(top_p, dtype=torch.float64))
    inside = result.isfinite()
    assert torch.equal(result[inside], logits[inside]), "kept logits are as they were"
    assert bool((result[~inside] == -torch.inf).all())
    return [set(row.nonzero().flatten().tolist()) for row in inside]


@given(weights=Weights, pick=st.floats(0, 1, exclude_max=True), first=st.sampled_from([1, 3, 256]))
@settings(deadline=None)
def test_it_is_the_sorted_reference_however_far_it_has_to_look(
    weights: list[int], pick: float, first: int
) -> None:
    top_p = between_edges(weights, pick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nucleus, "FIRST", first)
        assert kept([weights], [float(top_p)]) == [reference(weights, top_p)]


@given(rows=st.lists(st.lists(st.integers(1, 99), min_size=6, max_size=6), min_size=2, max_size=5))
@settings(deadline=None)
def test_each_row_has_its_own_nucleus(rows: list[list[int]]) -> None:
    picks = [(i + 0.5) / len(rows) for i in range(len(rows))]
    top_p = [between_edges(row, pick) for row, pick in zip(rows, picks, strict=True)]
    together = kept(rows, [float(p) for p in top_p])
    assert together == [reference(row, p) for row, p in zip(rows, top_p, strict=True)]


def test_tokens_tied_with_the_last_one_stay() -> None:
    assert kept([[4, 2, 2, 1, 1]], [0.5]) == [{0, 1, 2}]


@pytest.mark.parametrize("top_p", [0.0, 1e-3])
def test_the_most_likely_token_always_stays(top_p: float) -> None:
    assert kept([[1, 97, 1, 1]], [top_p]) == [{1}]


def test_a_top_p_of_one_keeps_every_token_of_its_row_alone() -> None:
    # Added up in float32, these 5000 pass 1 before the tail comes.
    long_tailed = torch.cat([torch.zeros(5000), torch.full((10,), -30.0)])
    both = keep_nucleus(torch.stack([long_tailed, long_tailed]), torch.tensor([1.0, 0.5]))
    assert both[0].isfinite().all()
    assert not both[1, 5000:].isfinite().any()


def test_a_peaked_distribution_is_not_sorted_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    topk = torch.Tensor.topk

    def noted(self: torch.Tensor, k: int, **options: Any) -> object:
        asked.append(k)
        return topk(self, k, **options)

    monkeypatch.setattr(torch.Tensor, "topk", noted)
    peaked = torch.linspace(0, -100, 5000)[None]
    keep_nucleus(peaked, torch.tensor([0.9]))
    assert asked == [nucleus.FIRST]
    keep_nucleus(torch.zeros(1, 5000), torch.tensor([0.9]))
    assert asked[1:] == [nucleus.FIRST, 8 * nucleus.FIRST, 5000]
