"""The report's plots of scores, gates, pairs and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rlhf.report.data import Dimension, Pairs, Point
from rlhf.report.drawing import (
    AUDIT,
    DOWN,
    FLAT,
    GRID,
    INK,
    MUTED,
    UP,
    axes_of,
    cut,
    styled,
    svg_of,
)

_ROUNDS_SHOWN = 12
_ROWS_SHOWN = 16
_ROW = 26
_VERDICT_MARKERS = {"pass": "^", "fail": "v", "inconclusive": "o"}


@styled
def change_forest(rows: Sequence[tuple[str, bool, Mapping[str, Any]]], label: str) -> Markup:
    """Changes against the start: name, whether it is an audit, and difference, low, high."""
    points = [
        (f"{name} (audit)" if audit else name, _color(found, audit), found)
        for name, audit, found in rows
    ]
    return _forest(points, "change of the mean score", label)


@styled
def gate_forest(gates: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Gates on scores, the last rounds first: value, interval, threshold (bar) and smallest
    detectable drop (diamond)."""
    shown = [
        (
            f"round {g['round']}: {g['name']}",
            {"pass": UP, "fail": DOWN}.get(g["verdict"], FLAT),
            {"difference": g["value"], **g, "marker": _VERDICT_MARKERS[g["verdict"]]},
        )
        for g in gates[-_ROWS_SHOWN:]
    ]
    return _forest(shown, "change against the best round so far", label)


@styled
def score_panel(dimension: Dimension, label: str, limits: tuple[float, float]) -> Markup:
    """One dimension's change against the start, round by round; all panels share `limits`."""
    axes = _small(limits)
    start = Point(0, 0.0, 0.0, 0.0)
    changes = dimension.changes[-_ROUNDS_SHOWN:]
    color = AUDIT if dimension.audit else INK
    line = [start, *changes] if len(changes) == len(dimension.changes) else list(changes)
    xs = list(range(len(line)))
    axes.plot(xs, [p.value for p in line], color=color, linewidth=1.2, alpha=0.55, clip_on=False)
    for x, point in zip(xs, line, strict=True):
        if point.round:
            _whisker(axes, x, point, _color(_found(point), dimension.audit), dimension.audit)
        else:
            axes.plot([x], [0], "o", color=MUTED, markersize=4, clip_on=False)
    _round_ticks(axes, xs, [p.round for p in line])
    return svg_of(axes.figure, label)


@styled
def gap_panel(points: Sequence[Point], label: str, limits: tuple[float, float]) -> Markup:
    """Chosen minus rejected of one dimension, round by round; an inversion is a falling triangle
    in the colour of a loss."""
    axes = _small(limits)
    shown = points[-_ROUNDS_SHOWN:]
    for x, point in enumerate(shown):
        inverted = point.value < 0
        _whisker(axes, x, point, DOWN if inverted else UP, marker="v" if inverted else "o")
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return svg_of(axes.figure, label)


@styled
def agreement_panel(points: Sequence[Point], label: str) -> Markup:
    """A correlation round by round: a triangle where its interval says that it is above or below
    zero."""
    axes = _small((-1.08, 1.08))
    shown = points[-_ROUNDS_SHOWN:]
    for x, point in enumerate(shown):
        found = _found(point)
        _whisker(axes, x, point, _color(found), marker=_marker(found))
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return svg_of(axes.figure, label)


@styled
def watch_panel(
    points: Sequence[Point], limit: float, label: str, limits: tuple[float, float]
) -> Markup:
    """How far a judge moved, round by round, and how far it may."""
    axes = _small(limits)
    axes.axhline(limit, color=DOWN, linewidth=1, linestyle=(0, (4, 2)))
    shown = points[-_ROUNDS_SHOWN:]
    for x, point in enumerate(shown):
        beyond = point.low is not None and point.low > limit
        _whisker(axes, x, point, DOWN if beyond else INK, marker="v" if beyond else "o")
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return svg_of(axes.figure, label)


@styled
def margin_panel(rounds: Sequence[Pairs], label: str) -> Markup:
    """Margins of each round: median, middle half, 5% to 95%."""
    axes = _panel()
    shown = rounds[-_ROUNDS_SHOWN:]
    for x, found in enumerate(shown):
        _range(axes, x, found.margin, UP, "o")
    axes.set_ylim(bottom=0)
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return svg_of(axes.figure, label)


@styled
def length_panel(rounds: Sequence[Pairs], label: str) -> Markup:
    """Lengths of chosen (circles) and rejected (triangles) answers of each round."""
    axes = _panel()
    shown = rounds[-_ROUNDS_SHOWN:]
    for x, found in enumerate(shown):
        _range(axes, x - 0.14, found.chosen_tokens, UP, "o")
        _range(axes, x + 0.14, found.rejected_tokens, DOWN, "v")
    axes.set_ylim(bottom=0)
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return svg_of(axes.figure, label)


@styled
def curve_panel(rows: Sequence[Mapping[str, Any]], series: Mapping[str, str], label: str) -> Markup:
    """Training curves over the steps of all rounds; `series` maps a column to its colour."""
    axes = _panel(bottom=34)
    ends = [row["at"] for row, after in pairwise(rows) if row["round"] != after["round"]]
    for end in ends:
        axes.axvline(end + 0.5, color=GRID, linewidth=0.8, zorder=0)
    styles = ("-", (0, (4, 2)))
    for style, (name, color) in zip(styles, series.items(), strict=False):
        # A round starts a new optimizer and may start a new reference: its curve starts anew.
        for number in dict.fromkeys(row["round"] for row in rows):
            own = [row for row in rows if row["round"] == number]
            values = [float("nan") if row[name] is None else row[name] for row in own]
            axes.plot([r["at"] for r in own], values, color=color, linewidth=1.5, linestyle=style,
                      marker="o" if len(own) == 1 else None, markersize=3)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step", color=MUTED, labelpad=1)
    return svg_of(axes.figure, label)


@styled
def drift_panel(points: Sequence[Point], limit: float | None, label: str) -> Markup:
    """A measure of each version of the policy, and what a gate allows of it."""
    axes = _panel()
    axes.axhline(0, color=MUTED, linewidth=0.8)
    shown = points[-_ROUNDS_SHOWN:]
    for x, point in enumerate(shown):
        _whisker(axes, x, point, INK if point.round else MUTED)
    if limit is not None:
        axes.axhline(limit, color=DOWN, linewidth=1, linestyle=(0, (4, 2)))
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return svg_of(axes.figure, label)


def shared_limits(series: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Limits that hold zero and every interval of several panels, with some air."""
    found = [
        end
        for points in series
        for p in points[-_ROUNDS_SHOWN:]
        for end in (p.value, p.low, p.high)
        if end is not None
    ]
    low, high = min([0.0, *found]), max([0.0, *found])
    air = 0.08 * (high - low) or 0.1
    return low - air, high + air


def _color(found: Mapping[str, Any], audit: bool = False) -> str:
    if found["low"] is not None and found["low"] > 0:
        return AUDIT if audit else UP
    return DOWN if found["high"] is not None and found["high"] < 0 else FLAT


def _found(point: Point) -> dict[str, Any]:
    return {"low": point.low, "high": point.high}


def _small(limits: tuple[float, float]) -> Axes:
    axes = axes_of(180, 130, (34, 8, 6, 20))
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _panel(bottom: float = 22) -> Axes:
    axes = axes_of(320, 178, (40, 10, 8, bottom))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(y=0.08)
    return axes


def _forest(rows: Sequence[tuple[str, str, Mapping[str, Any]]], title: str, label: str) -> Markup:
    """One row each, from the top: name, colour, and difference, low, high; with `threshold` and
    `smallest_detectable` drawn where a row is a gate's."""
    widest = max(len(name) for name, _, _ in rows)
    left = min(190.0, 14 + 5.9 * widest)
    height = _ROW * len(rows) + 44
    axes = axes_of(360, height, (left, 14, 6, 38))
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.xaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for y, (_, color, found) in enumerate(rows):
        value = found["difference"]
        low = value if found["low"] is None else found["low"]
        high = value if found["high"] is None else found["high"]
        axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        marker = found.get("marker") or _marker(found)
        axes.plot([value], [y], marker, color=color, markersize=6.5)
        if "threshold" in found:
            bar = found["threshold"]
            axes.plot([bar, bar], [y - 0.32, y + 0.32], color=INK, linewidth=1.6)
            if found["smallest_detectable"] is not None:
                axes.plot(
                    [-found["smallest_detectable"]], [y], "D", markerfacecolor="none", color=MUTED,
                    markersize=4.5,
                )  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [cut(name, 30) for name, _, _ in rows], color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(title, color=MUTED, labelpad=3)
    return svg_of(axes.figure, label)


def _marker(found: Mapping[str, Any]) -> str:
    color = _color(found)
    return {UP: "^", DOWN: "v"}.get(color, "o")


def _whisker(
    axes: Axes, x: float, point: Point, color: str, audit: bool = False, marker: str = "o"
) -> None:
    low = point.value if point.low is None else point.low
    high = point.value if point.high is None else point.high
    axes.plot([x, x], [low, high], color=color, linewidth=2, solid_capstyle="butt")
    axes.plot([x], [point.value], "s" if audit else marker, color=color, markersize=5.5)


def _range(axes: Axes, x: float, quantiles: Sequence[float], color: str, marker: str) -> None:
    lowest, low, middle, high, highest = quantiles
    axes.plot([x, x], [lowest, highest], color=color, linewidth=1.2)
    axes.plot([x, x], [low, high], color=color, linewidth=5, solid_capstyle="butt", alpha=0.45)
    axes.plot([x], [middle], marker, color=color, markersize=6)


def _round_ticks(axes: Axes, xs: Sequence[int], rounds: Sequence[int]) -> None:
    every = max(1, -(-len(xs) // 6))
    shown = [(x, r) for x, r in zip(xs, rounds, strict=True) if x % every == 0 or x == xs[-1]]
    names = ["start" if r == 0 else str(r) for _, r in shown]
    axes.set_xticks([x for x, _ in shown], names)
    axes.set_xlim(min(xs) - 0.5, max(xs) + 0.5)
