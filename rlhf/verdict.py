"""How a run stands, in one sentence, and what a reader must know before believing it.

`summary.md` and `report.html` both open with this, so they never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.files import read_json
from rlhf.run_view import RoundView, RunView

Tone = Literal["improved", "unclear", "worse", "stopped", "failed", "interrupted", "unfinished"]

STANDINGS = "standings.json"
"""In a run's folder `judges`: how its judges stood on their dimensions at its last start."""

# A verifier's own tests are its certificate.
_EXEMPT_KINDS = frozenset({"verifier"})
# What says the same of an answer each time; canaries hold it to that too.
_CONSTANT_KINDS = frozenset({"verifier", "recorded"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sentence, its tone, and the run's own words where the sentence says less."""

    tone: Tone
    sentence: str
    details: str | None = None


@dataclass(frozen=True, slots=True)
class Stamp:
    """Something that weakens what the run shows.

    >>> Stamp("No audit judge", "nothing here shows whether the judges were gamed").name
    'No audit judge'
    """

    name: str
    meaning: str


def number(value: float | None) -> str:
    """Three decimals; unbounded where there is none."""
    return "unbounded" if value is None else f"{value:.3f}"


def change(value: float | None) -> str:
    """With its sign."""
    return "unbounded" if value is None else f"{value:+.3f}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends of a change."""
    return f"{change(low)} to {change(high)}"


def direction(found: Mapping[str, Any]) -> Literal["rose", "fell", "unclear"]:
    """What a change's 95% interval says; an end that is None is unbounded."""
    if found["low"] is not None and found["low"] > 0:
        return "rose"
    return "fell" if found["high"] is not None and found["high"] < 0 else "unclear"


def verdict(run: RunView) -> Verdict:
    """How the run stands."""
    state = run.status.get("state", "running")
    reason = (run.status.get("reason") or "").strip()
    claim = run.final.record("evaluation")
    if state in ("done", "stopped_early") and claim is None:
        sentence = (
            f"The run is {state.replace('_', ' ')}, but the scores of its final split are gone"
        )
        return Verdict("failed", f"{sentence} from {run.final.path}.", reason)
    if state == "done" and claim is not None:
        return _done(run, claim)
    if state == "stopped_early" and claim is not None:
        sentence = f"A gate stopped the run {_stopped_at(run.judged[-1], run)}; {_claimed(claim)}."
        return Verdict("stopped", sentence, reason)
    if state == "interrupted":
        return Verdict("interrupted", f"The run was interrupted {_progress(run)}: {reason}.")
    if state == "failed":
        return _failed(run, reason)
    return Verdict("unfinished", f"The run is not finished: {_so_far(run)}.")


def stamps(run: RunView, uncertified: Sequence[str] | None = None) -> list[Stamp]:
    """What a reader must know first; `uncertified` names judges that train without a certificate
    (default: every judge of the panel that needs one)."""
    config, state = run.config, run.status.get("state", "running")
    names = uncertified_judges(run) if uncertified is None else uncertified
    found = []
    if state == "stopped_early":
        found.append(
            Stamp(
                "Stopped early",
                f"a gate ended the run after {len(run.judged)} of {config.rounds.count} rounds",
            )
        )
    if state == "interrupted":
        found.append(Stamp("Interrupted", "the same command goes on where it stopped"))
    if not config.judges.audit:
        found.append(Stamp("No audit judge", "nothing here shows whether the judges were gamed"))
    if names:
        found.append(
            Stamp(
                "Uncertified judges",
                f"{', '.join(names)} trained this policy without a certificate against gold labels",
            )
        )
    if unwatched := _unwatched(run):
        found.append(
            Stamp(
                "No canaries",
                f"nothing shows whether {', '.join(unwatched)} scored the same answers alike from "
                "round to round",
            )
        )
    if unproved := [r.index for r in run.judged if _promoted_unproved(_gates(r))]:
        found.append(
            Stamp(
                "Promoted without proof",
                f"the gates of round {', '.join(map(str, unproved))} were inconclusive, and "
                "gates.on_inconclusive is promote",
            )
        )
    return found


def uncertified_judges(run: RunView) -> list[str]:
    """Names of judges that train a dimension although nothing compared them with gold labels."""
    path = run.folder / "judges" / STANDINGS
    if not path.exists():
        return [j.name for j in run.config.judges.panel if j.kind not in _EXEMPT_KINDS]
    standings = read_json(path, "it belongs to a run: put back what was changed")["standings"]
    found = (s["judge"] for s in standings if not s["granted"] or s.get("trained_uncertified"))
    return list(dict.fromkeys(found))


def _unwatched(run: RunView) -> list[str]:
    """Names of judges that train, that may drift, and that nobody asks again."""
    judges = run.config.judges
    if judges.canaries.answers or judges.canaries.gold is not None:
        return []
    return [judge.name for judge in judges.panel if judge.kind not in _CONSTANT_KINDS]


def _done(run: RunView, claim: Mapping[str, Any]) -> Verdict:
    tones: dict[str, Tone] = {"rose": "improved", "fell": "worse", "unclear": "unclear"}
    tone = tones[direction(claim["change"]["reward"])]
    opening = {
        "improved": "The policy improved",
        "worse": "The policy got worse",
        "unclear": "The policy shows no certain change",
    }[tone]
    count = run.config.rounds.count
    ran = f"all {count} rounds ran" if count > 1 else "its one round ran"
    return Verdict(tone, f"{opening}: {_claimed(claim)}, and {ran}.")


def _failed(run: RunView, reason: str) -> Verdict:
    last = run.rounds[-1] if run.rounds else None
    if last is not None and run.judged[-1:] == [last] and not _gates(last)["promoted"]:
        sentence = f"A gate stopped the run {_stopped_at(last, run)}, so no round was promoted."
        return Verdict("failed", sentence, reason)
    funnel = None if last is None else last.record("funnel")
    if last is not None and funnel is not None and funnel["steps"][-1]["prompts"] == 0:
        worst = max(funnel["steps"], key=lambda step: step["lost_prompts"])
        return Verdict(
            "failed",
            f"The run stopped for want of pairs: none is left of the "
            f"{funnel['steps'][0]['prompts']} prompts of round {last.index}, and most "
            f"({worst['lost_prompts']}) fell at {worst['step']}.",
            reason,
        )
    lines = reason.splitlines() or ["no reason was recorded"]
    details = reason if len(lines) > 1 else None
    return Verdict("failed", f"The run failed: {lines[0].rstrip('.')}.", details)


def _claimed(claim: Mapping[str, Any]) -> str:
    """What the final split showed, as a clause."""
    return _gain(claim["change"]["reward"], f"on the final split round {claim['best_round']}")


def _gain(found: Mapping[str, Any], who: str) -> str:
    bounds = f"95% interval {interval(found['low'], found['high'])}"
    return (
        f"{who} changed the weighted reward by {change(found['difference'])} against the start "
        f"({bounds})"
    )


def _stopped_at(last: RoundView, run: RunView) -> str:
    gates = _gates(last)["gates"]
    failed = [g["name"] for g in gates if g["verdict"] == "fail"]
    unclear = [g["name"] for g in gates if g["verdict"] == "inconclusive"]
    kind = "failed" if failed else "inconclusive"
    where = f"at round {last.index} of {run.config.rounds.count}"
    return f"{where} ({', '.join(failed or unclear)}: {kind})"


def _progress(run: RunView) -> str:
    count = run.config.rounds.count
    if not run.judged:
        return "before its first round was judged"
    return f"after {len(run.judged)} of {count} round{'s' if count > 1 else ''}"


def _so_far(run: RunView) -> str:
    if not run.evaluated:
        return "the start is not evaluated yet"
    if not run.judged:
        return "the start is evaluated, no round is judged yet"
    judged = f"{len(run.judged)} of {run.config.rounds.count} rounds judged"
    best = run.status.get("best_round")
    evaluation = next((r.record("evaluation") for r in run.evaluated if r.index == best), None)
    if not best or evaluation is None:
        return judged
    found = evaluation["against"]["start"]["change"]["reward"]
    return f"{judged}, and {_gain(found, f'on the gate split round {best}, the best so far,')}"


def _gates(round: RoundView) -> dict[str, Any]:
    gates = round.record("gates")
    assert gates is not None, "a round is judged by its gates"
    return gates


def _promoted_unproved(gates: Mapping[str, Any]) -> bool:
    unclear = any(gate["verdict"] == "inconclusive" for gate in gates["gates"])
    return bool(gates["promoted"]) and unclear
