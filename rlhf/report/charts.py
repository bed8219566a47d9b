"""The report's plots: small matplotlib figures as SVG that a web page can colour and scale.

One unit is one CSS pixel at the width given here, so panels are drawn as small as a phone shows
them and a grid lays them out. Text stays text. Colours are names of CSS variables (`--up` and so
on), so a theme recolours a plot; what a colour says is also said by a shape or a label.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.report.data import Dimension, Pairs, Point

# Colours to draw with -> the CSS variable that replaces them; no two may be equal.
INK, MUTED, GRID = "#1a1c1e", "#5f6770", "#dfe3e7"
UP, DOWN, FLAT, AUDIT = "#0067a5", "#c24a00", "#737b84", "#8a4f9e"
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", UP: "up", DOWN: "down", FLAT: "flat", AUDIT: "audit",
}  # fmt: skip
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pairloop",
    "svg.image_inline": True,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.size": 10.5,
    "font.sans-serif": "DejaVu Sans",
    "axes.linewidth": 0.8,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
_P = ParamSpec("_P")
_ROUNDS_SHOWN = 12
_ROWS_SHOWN = 16
_ROW = 26
_VERDICT_MARKERS = {"pass": "^", "fail": "v", "inconclusive": "o"}


def _styled(draw: Callable[_P, Markup]) -> Callable[_P, Markup]:
    """Draw under this module's settings, whatever the process has set for its own plots."""

    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Markup:
        with rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return styled


@_styled
def change_forest(rows: Sequence[tuple[str, bool, Mapping[str, Any]]], label: str) -> Markup:
    """Changes against the start: name, whether it is an audit, and difference, low, high."""
    points = [
        (f"{name} (audit)" if audit else name, _color(found, audit), found)
        for name, audit, found in rows
    ]
    return _forest(points, "change of the mean score", label)


@_styled
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


@_styled
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
    return _svg(axes.figure, label)


@_styled
def gap_panel(points: Sequence[Point], label: str, limits: tuple[float, float]) -> Markup:
    """Chosen minus rejected of one dimension, round by round; an inversion is a falling triangle
    in the colour of a loss."""
    axes = _small(limits)
    shown = points[-_ROUNDS_SHOWN:]
    for x, point in enumerate(shown):
        inverted = point.value < 0
        _whisker(axes, x, point, DOWN if inverted else UP, marker="v" if inverted else "o")
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return _svg(axes.figure, label)


@_styled
def margin_panel(rounds: Sequence[Pairs], label: str) -> Markup:
    """Margins of each round: median, middle half, 5% to 95%."""
    axes = _panel()
    shown = rounds[-_ROUNDS_SHOWN:]
    for x, found in enumerate(shown):
        _range(axes, x, found.margin, UP, "o")
    axes.set_ylim(bottom=0)
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return _svg(axes.figure, label)


@_styled
def length_panel(rounds: Sequence[Pairs], label: str) -> Markup:
    """Lengths of chosen (circles) and rejected (triangles) answers of each round."""
    axes = _panel()
    shown = rounds[-_ROUNDS_SHOWN:]
    for x, found in enumerate(shown):
        _range(axes, x - 0.14, found.chosen_tokens, UP, "o")
        _range(axes, x + 0.14, found.rejected_tokens, DOWN, "v")
    axes.set_ylim(bottom=0)
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return _svg(axes.figure, label)


@_styled
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
    return _svg(axes.figure, label)


@_styled
def kl_panel(points: Sequence[Point], limit: float | None, label: str) -> Markup:
    """KL to the start of each round, and the largest that a gate allows."""
    axes = _panel()
    axes.axhline(0, color=MUTED, linewidth=0.8)
    shown = [Point(0, 0.0, 0.0, 0.0), *points][-_ROUNDS_SHOWN:]
    for x, point in enumerate(shown):
        _whisker(axes, x, point, INK if point.round else MUTED)
    if limit is not None:
        axes.axhline(limit, color=DOWN, linewidth=1, linestyle=(0, (4, 2)))
    _round_ticks(axes, list(range(len(shown))), [p.round for p in shown])
    return _svg(axes.figure, label)


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


def _axes(width: float, height: float, margins: tuple[float, float, float, float]) -> Axes:
    """Axes inside `margins` (left, right, top, bottom) of a figure, all in pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    left, right, top, bottom = margins
    box = (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - top - bottom) / height,
    )
    axes = figure.add_axes(box)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.tick_params(length=0, pad=4)
    return axes


def _small(limits: tuple[float, float]) -> Axes:
    axes = _axes(180, 130, (34, 8, 6, 20))
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _panel(bottom: float = 22) -> Axes:
    axes = _axes(320, 178, (40, 10, 8, bottom))
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
    axes = _axes(360, height, (left, 14, 6, 38))
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
    axes.set_yticks(range(len(rows)), [_cut(name, 30) for name, _, _ in rows], color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(title, color=MUTED, labelpad=3)
    return _svg(axes.figure, label)


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


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _svg(figure: Any, label: str) -> Markup:
    """The figure as an `<svg>` element with a name for screen readers and no fixed size."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Its style element would speak for the whole page, as its comments and metadata say nothing.
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL
    )
    width, height = (round(72 * size) for size in figure.get_size_inches())
    opening = (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'style="--width: {width}px">'
    )
    text = opening + text[text.index(">") + 1 :]
    text = text.replace(" font-family: 'DejaVu Sans', sans-serif;", "")
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return Markup(_own_ids(re.sub(r"\n\s*", "\n", text), label))


def _own_ids(text: str, label: str) -> str:
    """Ids that something refers to get this plot's prefix, so that no two plots share one; the
    others go."""
    prefix = "c" + hashlib.sha256(label.encode()).hexdigest()[:6]
    used = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)", text))
    text = re.sub(
        r'(<\w+) id="([^"]+)"',
        lambda m: f'{m[1]} id="{prefix}{m[2]}"' if m[2] in used else m[1],
        text,
    )
    return text.replace('xlink:href="#', f'xlink:href="#{prefix}').replace(
        "url(#", f"url(#{prefix}"
    )
