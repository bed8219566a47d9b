"""How far behind the trained policy a round's answers were."""

from __future__ import annotations

import polars as pl

from rlhf.run_view import RoundView


def behind(round: RoundView) -> dict[int, int] | None:
    """Rounds between the policy that wrote an answer and the one that was trained -> answers; None
    before all are drawn."""
    completions = round.table("completions")
    if completions is None or round.index is None:
        return None
    lag = (round.index - 1 - pl.col("policy_version")).alias("behind")
    counted = completions.group_by(lag).len().sort("behind").collect()
    return dict(counted.iter_rows())


def said(found: dict[int, int], allowed: int) -> str:
    """One sentence.

    >>> said({0: 32}, 0)
    'All 32 answers are of the policy that was trained.'
    >>> said({0: 24, 1: 8}, 1)
    '8 of 32 answers are of the policy 1 round before the one that was trained.'
    """
    count = sum(found.values())
    told = [
        f"{n} of {count} answers are of the policy {lag} round{'s' * (lag > 1)} before the one "
        f"that was trained{'' if lag <= allowed else ', too old, and left out'}"
        for lag, n in found.items()
        if lag
    ]
    if not told:
        return f"All {count} answers are of the policy that was trained."
    return "; ".join(told) + "."
