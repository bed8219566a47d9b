"""Counts of verdicts by two things, such as gold and judge, as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.judgements import WINNERS
from rlhf.statistics import Floats

MOST_GRADES = 11
"""Scales with more values than 0 to 10 are drawn as points."""

NO_VERDICT = "none"
WINNER_NAMES = {value: name for name, value in WINNERS.items()}


@dataclass(frozen=True, slots=True)
class Cell:
    """How many items, and their share of their row; `agrees` where both sides say the same."""

    count: int
    share: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line of cells."""

    name: str
    cells: tuple[Cell, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Heat:
    """A table of counts that is its own plot."""

    title: str
    note: str
    rows_are: str
    columns_are: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Sides:
    """What a heat is about: the words above it and beside it."""

    title: str
    note: str
    rows_are: str
    columns_are: str
    comparable: bool = True
    """Whether rows and columns are of one scale, so that what agrees can be framed."""


def few_values(*columns: Floats) -> bool:
    """Whether each column takes so few values that a table shows them all."""
    return all(len(np.unique(c[~np.isnan(c)])) <= MOST_GRADES for c in columns)


def heat(
    sides: Sides,
    rows: Floats,
    columns: Floats,
    names: Mapping[float, str] | None = None,
    column_names: Mapping[float, str] | None = None,
) -> Heat:
    """Items by their value in `rows` and in `columns` (shape [N]; NaN is no verdict).

    `names` says what a value is called, in the order of the table (`column_names` where columns
    have others); without them values are called by their number, from low to high.
    """
    names = names or {}
    column_names = names if column_names is None else column_names
    down, across = _values(rows, names), _values(columns, column_names)
    counted = np.array([[_count(rows, columns, r, c) for c in across] for r in down], dtype=int)
    made = []
    for r, counts in zip(down, counted.reshape(len(down), len(across)), strict=True):
        total = int(counts.sum())
        cells = [
            Cell(int(n), float(n / total) if total else 0.0, sides.comparable and r == c)
            for c, n in zip(across, counts, strict=True)
        ]
        made.append(Row(_name(r, names), tuple(cells), total))
    shown = tuple(_name(value, column_names) for value in across)
    return Heat(sides.title, sides.note, sides.rows_are, sides.columns_are, shown, tuple(made))


def _values(column: Floats, names: Mapping[float, str]) -> Sequence[float]:
    known = np.unique(column[~np.isnan(column)]).tolist()
    found = list(names) or known
    return [*found, float("nan")] if np.isnan(column).any() else found


def _count(rows: Floats, columns: Floats, row: float, column: float) -> int:
    return int((_equal(rows, row) & _equal(columns, column)).sum())


def _equal(values: Floats, value: float) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.isnan(values) if np.isnan(value) else values == value
    return found


def _name(value: float, names: Mapping[float, str]) -> str:
    return NO_VERDICT if np.isnan(value) else names.get(value, f"{value:.3g}")
