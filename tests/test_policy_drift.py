"""How far a policy moved: values and standard errors against arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import NonFiniteError
from rlhf.policy_drift import divergence, sampled
from rlhf.types import Completion, FinishReason


def answer(*logps: float, ended: FinishReason = "stop") -> Completion:
    tokens = tuple(range(len(logps)))
    return Completion("p", 0, "", tokens, (1,), logps, ended, 1)


DRAWN = [answer(-1.0, -2.0), answer(-0.5, ended="length"), answer(-3.0, -1.0, -2.0)]


def test_samples_say_what_arithmetic_by_hand_says() -> None:
    found = sampled(DRAWN, ["a", "b", "c"])
    assert found["samples"] == 3
    assert found["cut_off"] == pytest.approx(1 / 3)
    # 9.5 nats over 6 tokens; residuals 3 - 2 h, 0.5 - h, 6 - 3 h with h = 9.5 / 6.
    h = 9.5 / 6
    assert found["entropy"]["value"] == pytest.approx(h)
    squares = (3 - 2 * h) ** 2 + (0.5 - h) ** 2 + (6 - 3 * h) ** 2
    by_hand = math.sqrt(3 / 2 * squares) / 3 / 2
    assert found["entropy"]["standard_error"] == pytest.approx(by_hand)
    assert found["length"]["value"] == 2
    # sd 1 over the root of 3.
    assert found["length"]["standard_error"] == pytest.approx(1 / math.sqrt(3))


def test_a_divergence_is_the_mean_of_differences() -> None:
    policy, other = np.array([-3.0, -0.5, -6.0]), np.array([-4.0, -2.5, -6.0])
    found = divergence(DRAWN, ["a", "b", "c"], policy, other)
    assert found["value"] == pytest.approx(1.0)
    assert found["standard_error"] == pytest.approx(1 / math.sqrt(3))
    assert found["per_token"] == pytest.approx(3 / 6)


def test_answers_of_one_cluster_count_together() -> None:
    policy, other = np.array([-3.0, -0.5, -6.0]), np.array([-4.0, -2.5, -6.0])
    # Residuals 0, 1, -1: the first two together deviate by 1, the last by -1.
    found = divergence(DRAWN, ["a", "a", "b"], policy, other)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 1 * (1 + 1)) / 3)
    for clusters in (["a", "a", "a"], ["a"]):
        n = len(clusters)
        alone = divergence(DRAWN[:n], clusters, policy[:n], other[:n])
        assert alone["standard_error"] is None


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8))
def test_copies_of_every_answer_within_its_cluster_prove_nothing_more(lengths: list[int]) -> None:
    drawn = [answer(*([-0.5] * n)) for n in lengths]
    names = [str(number) for number in range(len(drawn))]
    once, twice = sampled(drawn, names), sampled([*drawn, *drawn], [*names, *names])
    for name in ("entropy", "length"):
        for key in ("value", "standard_error"):
            assert once[name][key] == pytest.approx(twice[name][key], abs=1e-12)


def test_a_log_prob_that_is_no_number_stops() -> None:
    with pytest.raises(NonFiniteError, match="fresh samples"):
        sampled([answer(-1.0, math.nan)], ["a"])
    with pytest.raises(NonFiniteError, match="fresh samples"):
        divergence(DRAWN, ["a", "b", "c"], np.array([0.0, -math.inf, 0.0]), np.zeros(3))
