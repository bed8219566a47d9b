"""Rank statistics of many weighted samples at once: mid-ranks, ties, concordance, correlation.

A bootstrap draws each item some number of times; that number is its weight. A row of weights is one
resample, and every function here treats all rows together.

Shapes: N items, C clusters, B samples, G groups of equal values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.statistics import Floats

Codes = NDArray[np.integer[Any]]

_BLOCK_CELLS = 2_000_000
_EXACT_IN_FLOAT32 = 1 << 24


@dataclass(frozen=True, slots=True)
class Ranks:
    """The order of N values, ready to be ranked under any weights.

    `order` sorts the values, `starts` are where a new value begins in that order (shape [G]),
    `group` is each item's place among the distinct values (shape [N]).
    """

    order: Codes
    starts: Codes
    group: Codes

    @classmethod
    def of(cls, values: Floats) -> Ranks:
        _, starts, group = np.unique(np.sort(values), return_index=True, return_inverse=True)
        order = np.argsort(values, kind="stable")
        own = np.empty_like(group)
        own[order] = group
        return cls(order, starts, own)

    def __call__(self, weights: Floats) -> Floats:
        """Mid-ranks up to a constant (shape [B, N]) when items count `weights` times each."""
        groups = self._groups(weights)
        middle: Floats = np.cumsum(groups, axis=1) - groups / 2
        return middle[:, self.group]

    def ties(self, weights: Floats) -> Floats:
        """Pairs of equal values (shape [B]); copies of one item are pairs too."""
        groups = self._groups(weights)
        tied: Floats = (groups * (groups - 1)).sum(axis=1) / 2
        return tied

    def _groups(self, weights: Floats) -> Floats:
        summed: Floats = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        return summed


def concordance(x: Ranks, y: Ranks, codes: Codes, counts: Floats) -> Floats:
    """Concordant less discordant pairs (shape [B]); items are sorted by their cluster `codes`."""
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    ends = np.append(starts[1:], len(codes))
    # Sums of signs are whole numbers, which float32 holds exactly up to 2^24, at half the cost.
    small = len(codes) * int((ends - starts).max()) < _EXACT_IN_FLOAT32
    dtype = np.float32 if small else np.float64
    x_group: Any = x.group.astype(dtype)
    y_group: Any = y.group.astype(dtype)
    drawn = counts.astype(dtype)
    total = np.zeros(len(counts))
    per_block = max(1, _BLOCK_CELLS // len(codes))
    first = 0
    while first < len(starts):
        # As many whole clusters as fit, at least one.
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + per_block, side="right")))
        rows = slice(starts[first], ends[last - 1])
        signs = np.sign(x_group[rows, None] - x_group[None, :])
        signs *= np.sign(y_group[rows, None] - y_group[None, :])
        signs = np.add.reduceat(signs, starts[first:last] - starts[first], axis=0)
        signs = np.add.reduceat(signs, starts, axis=1)
        total += ((drawn @ signs.T) * drawn[:, first:last]).sum(axis=1, dtype=np.float64)
        first = last
    return total / 2


def weighted_correlation(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of each row of `x` and `y` (all shape [B, N]), NaN where constant."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    weighted = weights * x
    covariance = (weighted * y).sum(axis=1)
    return divide(covariance, np.sqrt((weighted * x).sum(axis=1) * (weights * y * y).sum(axis=1)))


def divide(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    """The quotient, NaN where `below` is 0."""
    quotient: Floats = np.full(np.shape(below), math.nan)
    np.divide(above, below, out=quotient, where=below != 0)
    return quotient
