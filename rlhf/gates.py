"""Whether a round may be promoted: each check with its value, interval, threshold and verdict.

Scores are compared with the best promoted round so far, so a slow decay adds up until it shows. The
policy's drift is measured by itself, and may be bounded too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats

from rlhf.config import Gates
from rlhf.errors import InputError
from rlhf.statistics import false_stop_rate

Outcome = Literal["pass", "fail", "inconclusive"]
NORMAL_975 = float(stats.norm.ppf(0.975))


@dataclass(frozen=True, slots=True)
class Limit:
    """What of the policy's drift may be bounded, whatever the scores."""

    measured: str
    """What `rlhf.policy_drift` calls it."""
    unit: str
    most: bool
    """Whether the bound is an upper one."""


LIMITS = {
    "KL to the start": Limit("kl_start", "nats a sequence", True),
    "KL of the round": Limit("kl_round", "nats a sequence", True),
    "entropy of answers": Limit("entropy", "nats a token", False),
    "length of answers": Limit("length", "tokens", True),
}
"""By the name of their gate."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One check. `value` is the change of the mean score, and `threshold` the least it may be; or,
    of `LIMITS`, what was measured and its bound.

    `smallest_detectable` is the drop that this many prompts show with 80% power;
    `false_stop_rate` is how often the point rule would stop a round that changed nothing (None
    under the interval rule).
    """

    name: str
    value: float
    low: float
    high: float
    threshold: float
    smallest_detectable: float
    verdict: Outcome
    rule: Literal["interval", "point"]
    false_stop_rate: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Promoted or not, by which gates, and why in one sentence."""

    promoted: bool
    gates: tuple[Gate, ...]
    reason: str


def judge_gates(
    comparison: Mapping[str, Mapping[str, Any]], config: Gates, dimensions: Sequence[str]
) -> list[Gate]:
    """One gate per dimension, from `evaluation.compare(candidate, best)`.

    `interval`: pass if low > -max_drop; fail if high < 0 and value < -max_drop; else inconclusive.
    `point`: pass if value >= -max_drop, else fail. None for an end or an error stands for
    unbounded, as it does where the comparison was read back from JSON.

    Raises:
        InputError: a gated dimension wasn't evaluated.
        ValueError: a number of the comparison is NaN.
    """
    missing = [d for d in dimensions if d not in comparison]
    if missing:
        raise InputError(
            f"gates.dimensions must be evaluated, got {missing}; evaluated are "
            f"{sorted(comparison)}: name one of these or add a judge that scores it"
        )
    return [_gate(name, comparison[name], config) for name in dimensions]


def decide(gates: Sequence[Gate], on_inconclusive: Literal["promote", "stop"]) -> Verdict:
    """Promoted if no gate fails, and none is inconclusive unless `on_inconclusive` is `promote`.

    Raises:
        ValueError: no gates; a round that nothing checked can't be promoted.
    """
    if not gates:
        raise ValueError("at least one gate must be judged")
    failed = [g for g in gates if g.verdict == "fail"]
    unclear = [g for g in gates if g.verdict == "inconclusive"]
    promoted = not failed and (not unclear or on_inconclusive == "promote")
    shown = failed or unclear or list(gates)
    reason = ("Promoted: " if promoted else "Not promoted: ") + "; ".join(map(_sentence, shown))
    if unclear and not failed:
        action = "promotes" if promoted else "stops"
        reason += f" (gates.on_inconclusive {on_inconclusive} {action} such a round)"
    return Verdict(promoted, tuple(gates), reason + ".")


def limit_gates(drift: Mapping[str, Any], config: Gates) -> list[Gate]:
    """One gate for each of `LIMITS` that is set, from what `rlhf.policy_drift` measured."""
    return [
        _limit_gate(name, drift[LIMITS[name].measured], bound, config.rule)
        for name, bound in bounds(config).items()
        if bound is not None
    ]


def bounds(config: Gates) -> dict[str, float | None]:
    """The bound of each of `LIMITS`, None where none is set."""
    return {
        "KL to the start": config.max_kl,
        "KL of the round": config.max_round_kl,
        "entropy of answers": config.min_entropy,
        "length of answers": config.max_length,
    }


def _limit_gate(
    name: str, found: Mapping[str, Any], bound: float, rule: Literal["interval", "point"]
) -> Gate:
    """Whether a measured value, with its standard error (None for a single sample), keeps to its
    bound.

    Pass if the 95% interval lies within it, fail if outside, else inconclusive; `point` looks at
    the mean alone. Raises ValueError on NaN.
    """
    value = float(found["value"])
    half = NORMAL_975 * _bounded(found["standard_error"], math.inf)
    if math.isnan(value) or math.isnan(half):
        raise ValueError(f"the {name} holds NaN: {dict(found)}")
    over = value - bound if LIMITS[name].most else bound - value
    verdict: Outcome = "inconclusive"
    if (over if rule == "point" else over + half) <= 0:
        verdict = "pass"
    elif (over if rule == "point" else over - half) > 0:
        verdict = "fail"
    return Gate(name, value, value - half, value + half, bound, half, verdict, rule, None)


def _gate(name: str, change: Mapping[str, Any], config: Gates) -> Gate:
    value, se = float(change["difference"]), _bounded(change["se"], math.inf)
    low, high = _bounded(change["low"], -math.inf), _bounded(change["high"], math.inf)
    detectable = _bounded(change["smallest_detectable"], math.inf)
    if any(math.isnan(x) for x in (value, se, low, high, detectable)):
        raise ValueError(f"the comparison of {name!r} holds NaN: {dict(change)}")
    verdict: Outcome
    if config.rule == "point":
        verdict = "pass" if value >= -config.max_drop else "fail"
    elif low > -config.max_drop:
        verdict = "pass"
    elif high < 0 and value < -config.max_drop:
        verdict = "fail"
    else:
        verdict = "inconclusive"
    return Gate(
        name=name,
        value=value,
        low=low,
        high=high,
        threshold=-config.max_drop,
        smallest_detectable=detectable,
        verdict=verdict,
        rule=config.rule,
        false_stop_rate=(false_stop_rate(se, config.max_drop) if config.rule == "point" else None),
    )


def _bounded(value: float | None, unbounded: float) -> float:
    return unbounded if value is None else float(value)


def _sentence(gate: Gate) -> str:
    interval = f"95% interval {gate.low:+.3f} to {gate.high:+.3f}"
    if limit := LIMITS.get(gate.name):
        bound = f"at {'most' if limit.most else 'least'} {gate.threshold:g} {limit.unit} allowed"
        return f"{gate.name} is {gate.value:.3f} ({interval}), {bound}: {gate.verdict}"
    changed = f"{gate.name} changed by {gate.value:+.3f} ({interval})"
    drop = -gate.threshold
    if gate.rule == "point":
        kept = "within" if gate.verdict == "pass" else "more than"
        return (
            f"{changed}, {kept} the allowed drop of {drop:.3f}; this rule stops "
            f"{gate.false_stop_rate:.0%} of rounds that change nothing"
        )
    if gate.verdict == "pass":
        return f"{changed}, so a drop of {drop:.3f} or more is ruled out"
    if gate.verdict == "fail":
        return f"{changed}, a drop of more than the allowed {drop:.3f}"
    power = (
        f"these prompts detect drops from {gate.smallest_detectable:.3f}"
        if math.isfinite(gate.smallest_detectable)
        else "prompts of one cluster can't bound it"
    )
    return f"{changed}, which can't rule out a drop of {drop:.3f}; {power}"
