"""The truth table of the gates, and sentences a person can act on."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import Gates
from rlhf.errors import InputError
from rlhf.gates import Gate, Outcome, decide, judge_gates, limit_gates


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


def limited(
    value: float, standard_error: float | None, rule: Rule = "interval", bound: str = "max_kl"
) -> Gate:
    """The gate of a measure that is bounded at 5."""
    found = {"value": value, "standard_error": standard_error}
    others = {"value": -1e9, "standard_error": 0.0}
    measured = {
        "max_kl": "kl_start",
        "max_round_kl": "kl_round",
        "min_entropy": "entropy",
        "max_length": "length",
    }
    drift = {name: found if key == bound else others for key, name in measured.items()}
    (gate,) = limit_gates(drift, Gates.model_validate({bound: 5.0, "rule": rule}))
    return gate


# How far beyond its bound a measure is, its standard error, and what each rule says.
BEYOND: list[tuple[float, float | None, Outcome, Outcome]] = [
    (-1.0, 0.5, "pass", "pass"),
    (-1.0, 0.52, "inconclusive", "pass"),
    (0.0, 0.0, "pass", "pass"),
    (0.01, 0.0, "fail", "fail"),
    (1.0, 0.52, "inconclusive", "fail"),
    (1.0, 0.5, "fail", "fail"),
    (-4.9, None, "inconclusive", "pass"),
    (45.0, None, "inconclusive", "fail"),
]


@pytest.mark.parametrize(("beyond", "standard_error", "interval", "point"), BEYOND)
@pytest.mark.parametrize("bound", ["max_kl", "max_round_kl", "min_entropy", "max_length"])
def test_drift_is_held_within_its_bound(
    bound: str, beyond: float, standard_error: float | None, interval: Outcome, point: Outcome
) -> None:
    value = 5.0 - beyond if bound == "min_entropy" else 5.0 + beyond
    assert limited(value, standard_error, bound=bound).verdict == interval
    assert limited(value, standard_error, "point", bound).verdict == point


def test_only_what_is_bounded_has_a_gate() -> None:
    drift = {n: {"value": 1.0, "standard_error": 0.1} for n in ("kl_start", "length")}
    assert limit_gates(drift, Gates()) == []
    assert [g.name for g in limit_gates(drift, Gates(max_length=9))] == ["length of answers"]


@given(st.floats(-10, 100))
def test_a_drift_without_error_never_passes_the_interval_rule(value: float) -> None:
    gate = limited(value, None)
    assert gate.verdict == "inconclusive"
    assert (gate.low, gate.high, gate.smallest_detectable) == (-math.inf, math.inf, math.inf)


@pytest.mark.parametrize("found", [(math.nan, 0.1), (1.0, math.nan)])
def test_a_drift_that_is_no_number_is_refused(found: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="KL to the start holds NaN"):
        limited(*found)


@pytest.mark.parametrize("rule", ["interval", "point"])
def test_drift_is_told_with_what_is_allowed(rule: Rule) -> None:
    gate = limited(7.0, 0.5, rule)
    assert (gate.value, gate.threshold, gate.rule) == (7.0, 5.0, rule)
    assert (gate.low, gate.high) == pytest.approx((6.020018, 7.979982), abs=1e-6)
    assert decide([PASS, gate], "promote").reason == (
        "Not promoted: KL to the start is 7.000 (95% interval +6.020 to +7.980), "
        "at most 5 nats a sequence allowed: fail."
    )
    assert decide([limited(3.0, 0.1, rule, "min_entropy")], "promote").reason == (
        "Not promoted: entropy of answers is 3.000 (95% interval +2.804 to +3.196), "
        "at least 5 nats a token allowed: fail."
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
