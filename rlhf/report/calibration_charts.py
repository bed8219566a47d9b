"""Plots of calibration: intervals against what is asked, agreement in bands, scores as points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from rlhf.agreement import Metric
from rlhf.bounds import Bound
from rlhf.report.drawing import (
    AUDIT,
    CARD,
    DOWN,
    DOWN_SOFT,
    FLAT,
    GRID,
    INK,
    MUTED,
    UP,
    UP_SOFT,
    axes_of,
    cut,
    styled,
    svg_of,
)
from rlhf.statistics import Floats

POINTS = 400
"""Points of one plot; more are sampled."""

BANDS = ("poor", "moderate", "good")

_ROW = 24


@dataclass(frozen=True, slots=True)
class BandRow:
    """One line of an agreement plot."""

    name: str
    metric: Metric
    people: bool


@dataclass(frozen=True, slots=True)
class Points:
    """Points to draw, with the middle of groups of them, and lines at a floor."""

    x: Floats
    y: Floats
    x_title: str
    y_title: str
    middles: Sequence[tuple[float, float]] = ()
    floor: float | None = None
    centred: bool = False
    """Both axes are differences, so zero is marked."""


@styled
def figure_forest(rows: Sequence[tuple[str, Metric, Bound | None]], label: str) -> Markup:
    """Metrics that lie in [-1, 1]: value, interval, bounds (bars), unfavourable end (filled)."""
    left = 14 + 5.9 * max(len(name) for name, _, _ in rows)
    axes = axes_of(360, _ROW * len(rows) + 30, (min(left, 190.0), 12, 6, 24))
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.xaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for y, (_, found, bound) in enumerate(rows):
        holds = bound is None or bound.holds(found)
        color = FLAT if bound is None else UP if holds else DOWN
        marker = "o" if bound is None else "^" if holds else "v"
        axes.plot([found.low, found.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([found.value], [y], marker, color=color, markersize=6.5)
        if bound is None:
            continue
        axes.plot([bound.unfavourable(found)], [y], "s", color=color, markersize=4.5)
        for bar in (bound.least, bound.most):
            if bar is not None:
                axes.plot([bar, bar], [y - 0.34, y + 0.34], color=INK, linewidth=1.6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [cut(name, 30) for name, _, _ in rows], color=INK)
    lowest = min(*(m.low for _, m, _ in rows), *(b.least or 0 for _, _, b in rows if b), 0.0)
    axes.set_xlim(max(-1.04, lowest - 0.04), 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return svg_of(axes.figure, label)


@styled
def band_forest(
    rows: Sequence[BandRow], edges: tuple[float, float], label: str, chance: float
) -> Markup:
    """Agreement of each judge, over bands poor, moderate and good that part at `edges`."""
    widest = max(len(row.name) for row in rows)
    left = min(190.0, 14 + 5.9 * widest)
    height = _ROW * len(rows) + 48
    axes = axes_of(360, height, (left, 12, 22, 26))
    lowest = min(chance, *(row.metric.low for row in rows))
    start = max(-1.0, lowest - 0.05)
    spans = zip((start, *edges), (*edges, 1.0), (DOWN_SOFT, CARD, UP_SOFT), BANDS, strict=True)
    for low, high, color, name in spans:
        if high > start:
            axes.axvspan(max(low, start), high, color=color, linewidth=0, zorder=0)
            middle = (max(low, start) + high) / 2
            axes.text(middle, -0.62, name, ha="center", va="bottom", color=MUTED, size=9)
    for edge in edges:
        axes.axvline(edge, color=GRID, linewidth=1, zorder=1)
    axes.axvline(chance, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    for y, row in enumerate(rows):
        color = AUDIT if row.people else INK
        ends = [max(row.metric.low, start), row.metric.high]
        axes.plot(ends, [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([row.metric.value], [y], "s" if row.people else "o", color=color, markersize=6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(start, 1.0)
    axes.set_yticks(range(len(rows)), [cut(row.name, 30) for row in rows], color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return svg_of(axes.figure, label)


@styled
def scatter(found: Points, label: str) -> Markup:
    """Points, their middles as diamonds, and what a floor asks of both axes."""
    axes = axes_of(320, 250, (48, 10, 8, 36))
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if found.centred:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.plot(found.x, found.y, "o", color=UP, markersize=3, markeredgewidth=0, alpha=0.45)
    if found.floor is not None:
        axes.axhline(found.floor, color=DOWN, linewidth=1, linestyle=(0, (4, 2)))
        axes.axvline(found.floor, color=DOWN, linewidth=1, linestyle=(0, (4, 2)))
    if found.middles:
        x, y = np.array(found.middles).T
        axes.plot(x, y, "D-", color=INK, markersize=5, linewidth=1)
    axes.margins(0.05)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(found.x_title, color=MUTED, labelpad=2)
    axes.set_ylabel(found.y_title, color=MUTED, labelpad=3)
    return svg_of(axes.figure, label)
