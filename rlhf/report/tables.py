"""The report's numbers as text: tables, their rows, and how a number is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.report import data
from rlhf.report.data import Comparison, Dimension, Pairs, Point
from rlhf.verdict import change, interval, number

_VERDICTS = {"pass": "▲ pass", "fail": "▼ fail", "inconclusive": "● inconclusive"}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, a row at a time; columns named in `words` are aligned as text."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()


def table(caption: str, rows: Sequence[Mapping[str, str]], *words: str) -> Table:
    """A table with the first row's keys as columns."""
    columns = tuple(rows[0])
    cells = tuple(tuple(row[c] for c in columns) for row in rows)
    return Table(caption, columns, cells, frozenset({columns[0], *words}))


def duration(seconds: float) -> str:
    """As a person says it.

    >>> duration(7.25), duration(125), duration(7384)
    ('7.2 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def shown_name(dimension: Dimension) -> str:
    return f"{dimension.name} (audit)" if dimension.audit else dimension.name


def score_row(dimension: Dimension, point: Point) -> dict[str, str]:
    return {
        "dimension": shown_name(dimension),
        "score": number(point.value),
        "95% interval": f"{number(point.low)} to {number(point.high)}",
    }


def comparison_row(dimension: Dimension, found: Comparison) -> dict[str, str]:
    moved = found.change[dimension.key]
    return {
        "dimension": shown_name(dimension),
        "start": number(found.start[dimension.key]["value"]),
        f"round {found.round}": number(found.now[dimension.key]["value"]),
        "change": change(moved["difference"]),
        "95% interval": interval(moved["low"], moved["high"]),
        "detectable": number(moved["smallest_detectable"]),
    }


def round_row(dimension: Dimension, score: Point) -> dict[str, str]:
    moved = next((p for p in dimension.changes if p.round == score.round), None)
    return {
        "dimension": shown_name(dimension),
        "round": "start" if score.round == 0 else str(score.round),
        "score": number(score.value),
        "its 95% interval": f"{number(score.low)} to {number(score.high)}",
        "change": "" if moved is None else change(moved.value),
        "95% interval of the change": "" if moved is None else interval(moved.low, moved.high),
    }


def gate_row(gate: Mapping[str, Any]) -> dict[str, str]:
    signed = number if data.is_limit(gate) else change
    rate = gate["false_stop_rate"]
    rule = "" if rate is None else f" (point rule, stops {rate:.0%} of unchanged rounds)"
    return {
        "round": f"{gate['round']} against {gate['against'] or 'start'}",
        "gate": gate["name"],
        "value": signed(gate["value"]),
        "95% interval": f"{signed(gate['low'])} to {signed(gate['high'])}",
        "threshold": signed(gate["threshold"]),
        "detectable": number(gate["smallest_detectable"]),
        "verdict": _VERDICTS[gate["verdict"]] + rule,
    }


def quantile_row(found: Pairs) -> dict[str, str]:
    def said(values: Sequence[float], digits: int) -> str:
        return ", ".join(f"{v:.{digits}f}" for v in values)

    return {
        "round": str(found.round),
        "pairs": str(found.count),
        "margin": said(found.margin, 2),
        "tokens, chosen": said(found.chosen_tokens, 0),
        "tokens, rejected": said(found.rejected_tokens, 0),
        "chosen longer": f"{found.chosen_longer:.0%}",
    }


def gap_row(name: str, found: Pairs, point: Point) -> dict[str, str]:
    return {
        "dimension": name,
        "round": str(found.round),
        "chosen - rejected": change(point.value),
        "95% interval": interval(point.low, point.high),
        "pairs with chosen lower": f"{found.inverted[name]:.0%}",
        "mark": "▼ inverted" if point.value < 0 else "",
    }


def curve_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Only what the objective measures gets a column."""
    known = [n for n in data.CURVES if any(row[n] is not None for row in rows)]
    return [
        {"round": str(row["round"]), "step": str(row["step"])}
        | {
            name.replace("logratio", "log-ratio").replace("_", " "): ""
            if row[name] is None
            else f"{row[name]:.4g}"
            for name in known
        }
        for row in rows
    ]


def drift_rows(drift: Mapping[str, Sequence[Point]]) -> list[dict[str, str]]:
    """A row a round, a column for each of its measures; the start has not moved."""
    found: dict[int, dict[str, str]] = {}
    for name, points in drift.items():
        for p in points:
            row = found.setdefault(
                p.round, {"round": str(p.round or "start"), **dict.fromkeys(drift, "0")}
            )
            row[name] = f"{number(p.value)} ({number(p.low)} to {number(p.high)})"
    return [found[index] for index in sorted(found)]


def time_row(name: str, seconds: float, whole: float, tokens: int | None) -> dict[str, Any]:
    counted = tokens is not None and seconds > 0
    return {
        "name": name,
        "seconds": duration(seconds),
        "share": seconds / whole if whole else 0.0,
        "tokens": "" if tokens is None else f"{tokens:,}",
        "speed": f"{(tokens or 0) / seconds:,.0f}" if counted else "",
        "total": False,
    }
