"""The report's judges: who scored, what stands behind it, how often, how alike, and whether it
stayed the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf import judge_view
from rlhf.judge_view import Alike, Asked, Role
from rlhf.report import charts
from rlhf.report.data import Point
from rlhf.report.tables import Table, table
from rlhf.run_view import RunView
from rlhf.verdict import change, interval, number

_FIGURES = (
    "within_prompt_accuracy", "precision", "recall", "order_consistency", "first_position_rate",
    "retest_sd", "length_bias",
)  # fmt: skip
_PANELS = 12
_DRIFTS = {"holds": "▲ holds", "drifted": "▼ drifted", "unclear": "● unclear"}
_AUDITS = {"agrees": "▲ agrees", "inverted": "▼ inverted", "unclear": "● unclear"}


def judges(run: RunView) -> dict[str, Any]:
    """Everything of the section."""
    roles, asked = judge_view.roles(run), judge_view.asked(run)
    return {
        "lead": _lead(roles, asked),
        "roles": [_role(role) for role in roles],
        "certificates": _certificates(roles),
        "asked": table("Scores asked for, and abstentions", [_asked(a) for a in asked], "split",
                       "judge", "dimension") if asked else None,
        "usage": _usage(judge_view.usage(run)),
        "alike": _alike(run, judge_view.agreement(run)),
        "canaries": _canaries(run),
        "audit": _pair_audit(run),
    }  # fmt: skip


def _lead(roles: Sequence[Role], asked: Sequence[Asked]) -> str:
    scores, abstained = (sum(getattr(a, n) for a in asked) for n in ("scores", "abstained"))
    said = []
    if bare := [f"{r.judge} on {r.dimension}" for r in roles if r.stamped]:
        said.append(f"Without a certificate: {', '.join(bare)}.")
    elif granted := [r for r in roles if r.status == "granted"]:
        said.append(f"All {len(granted)} uses of a model judge have a certificate.")
    else:
        said.append("No model judge decides anything here, so no certificate is needed.")
    if scores:
        flagged = sum(a.flagged for a in asked)
        said.append(f"{scores:,} scores were asked for, {abstained:,} are abstentions.")
        if flagged:
            said.append(f"{flagged:,} scored completions look like an attempt on the judge.")
    return " ".join(said)


def _role(role: Role) -> dict[str, Any]:
    marks = {"granted": "▲ granted", "not needed": "none needed"}
    return {
        "judge": role.judge,
        "kind": role.kind,
        "source": role.source,
        "dimension": role.dimension,
        "uses": ", ".join(role.uses) or "nothing",
        "mark": marks.get(role.status, f"▼ {role.status}"),
        "tone": "good" if role.status == "granted" else "bad" if role.stamped else "",
        "reason": role.reason,
    }


def _certificates(roles: Sequence[Role]) -> Table | None:
    """The figures of certificates, granted or not; None where there are none."""
    rows = []
    for role in roles:
        for name in _FIGURES:
            metric = (role.figures or {}).get("metrics", {}).get(name)
            if metric is not None:
                floor = (role.figures or {}).get("floor")
                at = f" at {floor:g}" if name in ("precision", "recall") else ""
                rows.append(
                    {
                        "judge": role.judge,
                        "dimension": role.dimension,
                        "figure": f"{name}{at}",
                        "value": number(metric["value"]),
                        "95% interval": f"{number(metric['low'])} to {number(metric['high'])}",
                        "n": f"{metric['n']:,}",
                        "detectable": number(metric["detectable"]),
                        "calibrated": (role.figures or {})["date"][:10],
                    }
                )
    return table("Figures of the certificates", rows, "dimension", "figure") if rows else None


def _asked(found: Asked) -> dict[str, str]:
    where = "start" if found.round == 0 else "" if found.round is None else str(found.round)
    return {
        "round": where or "final",
        "split": found.split,
        "judge": found.judge,
        "dimension": found.dimension,
        "scores": f"{found.scores:,}",
        "abstained": f"{found.abstained:,}",
        "share": f"{found.abstained / found.scores:.1%}" if found.scores else "",
        "flagged": f"{found.flagged:,}",
    }


def _usage(found: Mapping[str, Mapping[str, Any]]) -> Table | None:
    rows = [
        {
            "judge": name,
            "calls": f"{ledger['calls']:,}",
            "of them again": f"{ledger['retries']:,}",
            "tokens read": f"{ledger['prompt_tokens']:,}",
            "tokens written": f"{ledger['completion_tokens']:,}",
            "answered by": ", ".join(f"{who} ({n:,})" for who, n in ledger["served"].items()),
        }
        for name, ledger in found.items()
    ]
    return (
        table("What endpoints were asked, over all starts", rows, "answered by") if rows else None
    )


def _alike(run: RunView, found: Sequence[Alike]) -> dict[str, Any] | None:
    if not found:
        return None
    whole = [a for a in found if a.round is None]
    twos = [(a.one, a.other) for a in whole]
    series = {
        two: [_point(a) for a in found if (a.one, a.other) == two and a.round is not None]
        for two in twos
    }
    drawn = {two: points for two, points in series.items() if points}
    limits = charts.shared_limits(list(drawn.values()))
    return {
        "lead": _alike_lead(whole),
        "panels": [
            (one, f"{other}, {_latest(points)}",
             charts.gap_panel(points, f"{one} and {other}: rank correlation by round", limits))
            for (one, other), points in list(drawn.items())[:_PANELS]
        ],
        "left_out": max(0, len(drawn) - _PANELS),
        "table": table("Rank correlation within prompts with the audit judges",
                       [_alike_row(a) for a in found], "audit judge", "round"),
    }  # fmt: skip


def _alike_lead(whole: Sequence[Alike]) -> str:
    said = []
    for a in whole:
        if a.one != judge_view.REWARD:
            continue
        m = a.metric
        verdict = (
            "orders a prompt's answers as the reward does"
            if m.low > 0
            else "orders them the other way round"
            if m.high < 0
            else "shows no sure agreement with the reward"
        )
        ends = f"{change(m.value)}, 95% interval {interval(m.low, m.high)}"
        said.append(f"{a.other} {verdict} ({ends}).")
    return " ".join(said)


def _alike_row(a: Alike) -> dict[str, str]:
    return {
        "dimension": a.one,
        "audit judge": a.other,
        "round": "all" if a.round is None else _round(a.round),
        "correlation": change(a.metric.value),
        "95% interval": interval(a.metric.low, a.metric.high),
        "answers": f"{a.metric.n:,}",
        "detectable": number(a.metric.detectable),
    }


def _canaries(run: RunView) -> dict[str, Any] | None:
    """Drift of judges that are asked about the same answers every round."""
    records = [(r.index, found) for r in run.rounds if r.index and (found := r.record("canaries"))]
    if not records:
        return None
    last = records[-1][1]
    rows = [row for index, record in records for row in _canary_rows(index, record)]
    moved: dict[tuple[str, str], list[Point]] = {}
    for index, record in records:
        for entry in record["judges"]:
            if (drift := entry["drift"].get("moved")) is not None:
                key = entry["judge"], entry["dimension"]
                moved.setdefault(key, []).append(Point.of(index, drift, "value"))
    limit = last["limits"]["max_drift"]
    limits = charts.shared_limits([*moved.values(), [Point(0, limit, None, None)]])
    fixed = [f"{e['judge']} on {e['dimension']}" for e in last["judges"] if e["fixed"]]
    return {
        "lead": " ".join([*last["stops"], *last["warnings"]])
        or "No judge has drifted beyond the limit.",
        "sizes": ", ".join(f"{n} ({name})" for name, n in last["answers"].items() if n),
        "askings": last["askings"],
        "limit": limit,
        "fixed": fixed,
        "panels": [
            (f"{judge}: {dimension}", _latest(points),
             charts.watch_panel(points, limit,
                                f"{judge} on {dimension}: how far scores moved by round", limits))
            for (judge, dimension), points in list(moved.items())[:_PANELS]
        ],
        "table": table("Canaries, by round", rows, "dimension", "figure", "round", "verdict")
        if rows
        else None,
    }  # fmt: skip


def _canary_rows(index: int, record: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for entry in record["judges"]:
        found = {**entry["figures"], **{f"drift: {n}": d for n, d in entry["drift"].items()}}
        for name, figure in found.items():
            limit = figure.get("limit")
            yield {
                "judge": entry["judge"],
                "dimension": entry["dimension"],
                "round": str(index),
                "figure": name.replace("_", " "),
                "value": number(figure["value"]),
                "95% interval": f"{number(figure['low'])} to {number(figure['high'])}",
                "n": f"{figure['n']:,}",
                "limit": "" if limit is None else f"{limit:g}",
                "verdict": _DRIFTS.get(figure.get("verdict", ""), ""),
            }


def _pair_audit(run: RunView) -> dict[str, Any] | None:
    """Whether who trains nothing prefers what was chosen, in a blind sample of a round's pairs."""
    records = [(r.index, found) for r in run.rounds if r.index and (found := r.record("audit"))]
    rows = [
        {
            "judge": entry["judge"],
            "dimension": entry["dimension"],
            "round": str(index),
            "prefers chosen": str(entry["preferred"]),
            "equal": str(entry["equal"]),
            "prefers rejected": str(entry["against"]),
            "no score": str(entry["abstained"]),
            "agreement": "" if entry["value"] is None else number(entry["value"]),
            "95% interval": ""
            if entry["value"] is None
            else f"{number(entry['low'])} to {number(entry['high'])}",
            "verdict": _AUDITS[entry["verdict"]],
        }
        for index, record in records
        for entry in record["judges"]
    ]
    if not rows:
        return None
    last = records[-1][1]
    return {
        "lead": last["inverted"]
        or "No audit judge prefers the rejected answers of the pairs that trained.",
        "pairs": last["pairs"],
        "table": table("Blind audit of each round's pairs", rows, "dimension", "round", "verdict"),
    }


def _point(a: Alike) -> Point:
    assert a.round is not None, "a point stands at a round"
    return Point(a.round, a.metric.value, a.metric.low, a.metric.high)


def _latest(points: Sequence[Point]) -> str:
    return f"{'start' if not points[-1].round else f'round {points[-1].round}'}: " + change(
        points[-1].value
    )


def _round(index: int) -> str:
    return "start" if index == 0 else str(index)
