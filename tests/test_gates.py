"""The truth table of the gates, and sentences a person can act on."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import Gates
from rlhf.errors import InputError
from rlhf.gates import Gate, Outcome, decide, drift_gate, judge_gates


def change(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    se = None if low is None else 0.02
    return {
        "difference": value,
        "low": low,
        "high": high,
        "se": se,
        "smallest_detectable": None if se is None else 0.056,
        "n_prompts": 60,
        "n_clusters": 20,
    }


def judged(value: float, low: float | None, high: float | None, **config: Any) -> Gate:
    gates = judge_gates({"correctness": change(value, low, high)}, Gates(**config), ["correctness"])
    return gates[0]


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.05, 0.01, 0.09, "pass"),
        (-0.01, -0.019, -0.001, "pass"),
        (0.0, -0.02, 0.02, "inconclusive"),
        (-0.05, -0.09, -0.01, "fail"),
        (-0.05, -0.10, 0.0, "inconclusive"),
        (-0.02, -0.03, -0.01, "inconclusive"),
        (-0.015, -0.028, -0.002, "inconclusive"),
        (0.3, None, None, "inconclusive"),
        (-0.3, -math.inf, math.inf, "inconclusive"),
    ],
)
def test_interval_rule(value: float, low: float, high: float, verdict: str) -> None:
    gate = judged(value, low, high)
    assert gate.verdict == verdict
    assert (gate.threshold, gate.rule, gate.false_stop_rate) == (-0.02, "interval", None)


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "pass"), (-0.02, "pass"), (-0.021, "fail")])
def test_point_rule_prints_how_often_it_stops_for_nothing(value: float, verdict: str) -> None:
    gate = judged(value, -0.5, 0.5, rule="point")
    assert gate.verdict == verdict
    assert gate.false_stop_rate == pytest.approx(0.158655, abs=1e-6)
    assert "stops 16% of rounds that change nothing" in decide([gate], "stop").reason


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_interval_never_gets_a_worse_verdict(
    value: float, below: float, above: float, lift: float
) -> None:
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    low, high = value - below, value + above
    now = judged(value, low, high).verdict
    lifted = judged(value + lift, low + lift, high + lift).verdict
    assert order[lifted] >= order[now]


def test_each_gated_dimension_gets_its_gate_and_no_other() -> None:
    comparison = {d: change(0.0, -0.01, 0.01) for d in ("correctness", "style", "audit.chrf")}
    gates = judge_gates(comparison, Gates(), ["style", "correctness"])
    assert [g.name for g in gates] == ["style", "correctness"]
    assert gates[0].smallest_detectable == 0.056


def test_a_dimension_that_was_not_evaluated_is_an_error() -> None:
    with pytest.raises(InputError, match=r"gates\.dimensions.*\['style'\].*'correctness'"):
        judge_gates({"correctness": change(0.0, -0.01, 0.01)}, Gates(), ["style"])


def test_nan_is_refused_under_both_rules() -> None:
    for rule in ("interval", "point"):
        with pytest.raises(ValueError, match="NaN"):
            judged(math.nan, -0.01, 0.01, rule=rule)


Rule = Literal["interval", "point"]


def drift(kl: float, standard_error: float | None, rule: Rule = "interval") -> Gate:
    return drift_gate({"kl": kl, "standard_error": standard_error}, 5.0, rule)


@pytest.mark.parametrize(
    ("kl", "standard_error", "interval", "point"),
    [
        (4.0, 0.5, "pass", "pass"),
        (4.0, 0.52, "inconclusive", "pass"),
        (5.0, 0.0, "pass", "pass"),
        (5.01, 0.0, "fail", "fail"),
        (6.0, 0.52, "inconclusive", "fail"),
        (6.0, 0.5, "fail", "fail"),
        (0.1, None, "inconclusive", "pass"),
        (50.0, None, "inconclusive", "fail"),
    ],
)
def test_drift_is_held_below_its_limit(
    kl: float, standard_error: float | None, interval: Outcome, point: Outcome
) -> None:
    assert drift(kl, standard_error).verdict == interval
    assert drift(kl, standard_error, "point").verdict == point


@given(st.floats(-10, 100))
def test_a_drift_without_error_never_passes_the_interval_rule(kl: float) -> None:
    gate = drift(kl, None)
    assert gate.verdict == "inconclusive"
    assert (gate.low, gate.high, gate.smallest_detectable) == (-math.inf, math.inf, math.inf)


@pytest.mark.parametrize("rule", ["interval", "point"])
def test_drift_is_told_with_what_is_allowed(rule: Rule) -> None:
    gate = drift(7.0, 0.5, rule)
    assert (gate.value, gate.threshold, gate.rule) == (7.0, 5.0, rule)
    assert (gate.low, gate.high) == pytest.approx((6.020018, 7.979982), abs=1e-6)
    assert decide([PASS, gate], "promote").reason == (
        "Not promoted: kl to the start is 7.000 (95% interval +6.020 to +7.980), "
        "5.000 nats a sequence allowed: fail."
    )


PASS, FAIL, UNCLEAR = (
    judged(0.01, -0.01, 0.03),
    judged(-0.05, -0.08, -0.02),
    judged(0.0, -0.05, 0.05),
)


@pytest.mark.parametrize(
    ("gates", "under_stop", "under_promote"),
    [
        ([PASS], True, True),
        ([PASS, PASS], True, True),
        ([FAIL], False, False),
        ([PASS, FAIL], False, False),
        ([UNCLEAR], False, True),
        ([PASS, UNCLEAR], False, True),
        ([UNCLEAR, FAIL], False, False),
    ],
)
def test_promotion(gates: list[Gate], under_stop: bool, under_promote: bool) -> None:
    for verdict, expected in (
        (decide(gates, "stop"), under_stop),
        (decide(gates, "promote"), under_promote),
    ):
        assert verdict.promoted is expected
        assert verdict.gates == tuple(gates)
        assert verdict.reason.startswith("Promoted: " if expected else "Not promoted: ")
        assert verdict.reason.endswith(".")


def test_reasons_name_the_numbers() -> None:
    assert decide([PASS], "stop").reason == (
        "Promoted: correctness changed by +0.010 (95% interval -0.010 to +0.030), so a drop of "
        "0.020 or more is ruled out."
    )
    assert decide([PASS, FAIL], "stop").reason == (
        "Not promoted: correctness changed by -0.050 (95% interval -0.080 to -0.020), a drop of "
        "more than the allowed 0.020."
    )
    assert decide([UNCLEAR], "stop").reason == (
        "Not promoted: correctness changed by +0.000 (95% interval -0.050 to +0.050), which can't "
        "rule out a drop of 0.020; these prompts detect drops from 0.056 "
        "(gates.on_inconclusive stop stops such a round)."
    )
    assert "one cluster" in decide([judged(0.1, None, None)], "stop").reason


def test_nothing_checked_is_nothing_promoted() -> None:
    with pytest.raises(ValueError, match="at least one gate"):
        decide([], "promote")
