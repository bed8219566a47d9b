"""Which pairs of answers a person is asked about: drawn by strata, then blinded.

A candidate is a pair of two answers to one prompt. Its table has the columns `SHOWN` (a row a pair;
context and reference may be null) and any others, which stay secret: they go to the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

SHOWN = ("prompt_id", "prompt", "context", "reference", "answer_x", "answer_y")
"""Columns of candidates; `answer_x` and `answer_y` are not yet on a side."""
MINIMUM = 5
"""Pairs that every stratum gives where it has them and the sample has room."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """What one stratum offered and gave.

    >>> Stratum({"category": "billing"}, candidates=40, drawn=5).drawn
    5
    """

    values: dict[str, str]
    candidates: int
    drawn: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """The pairs drawn, with all columns of the candidates and in their order, and the strata."""

    pairs: pl.DataFrame
    strata: tuple[Stratum, ...]

    @property
    def candidates(self) -> int:
        """Pairs that there were to draw from."""
        return sum(stratum.candidates for stratum in self.strata)


def allocate(sizes: Sequence[int], items: int, minimum: int = MINIMUM) -> list[int]:
    """How many of `items` each stratum gives: in proportion to `sizes`, but at least `minimum`.

    Webster's method of apportionment with a minimum: after the minimum, each next place goes to the
    stratum with the largest size / (places + 1/2), the first of equals; no stratum gives more than
    it has (Balinski and Young, Fair Representation, 1982). Where the sample is too small for the
    minimum, it is lowered for all alike.

    >>> allocate([90, 9, 1], 20)
    [14, 5, 1]
    """
    known = np.array(sizes, dtype=np.int64)
    least = min(minimum, items // max(len(known), 1))
    given = np.minimum(known, least)
    for _ in range(min(items, int(known.sum())) - int(given.sum())):
        claim = np.where(given < known, known / (given + 0.5), -1.0)
        given[claim.argmax()] += 1
    return [int(number) for number in given]


def sample_pairs(
    candidates: pl.DataFrame, items: int, strata: Sequence[str], seed: int, minimum: int = MINIMUM
) -> Sampled:
    """Draw at most `items` candidates, allocated over the strata by `allocate`.

    `strata` name columns of text whose values together are a stratum. Within one, a prompt's second
    pair comes after every prompt's first. The same candidates, in the same order, and the same seed
    give the same pairs.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, 0)))
    chance = pl.Series("_chance", rng.permutation(candidates.height))
    drawn = candidates.with_row_index("_place").with_columns(
        chance,
        _stratum=pl.struct(strata).rank("dense") if strata else pl.lit(1, pl.UInt32),
    )
    turn = pl.col("_chance").rank("ordinal").over("prompt_id")
    drawn = drawn.with_columns(_turn=turn).sort("_stratum", "_turn", "_chance")
    sizes = drawn.group_by("_stratum", maintain_order=True).agg(
        pl.len().alias("candidates"), *(pl.col(name).first() for name in strata)
    )
    places = allocate(sizes["candidates"].to_list(), items, minimum)
    limits = sizes.select("_stratum", _limit=pl.Series(places, dtype=pl.Int64))
    kept = (
        drawn.with_columns(_rank=pl.int_range(pl.len()).over("_stratum"))
        .join(limits, on="_stratum", maintain_order="left")
        .filter(pl.col("_rank") < pl.col("_limit"))
        .sort("_place")
        .select(candidates.columns)
    )
    told = tuple(
        Stratum({name: row[name] for name in strata}, row["candidates"], number)
        for row, number in zip(sizes.iter_rows(named=True), places, strict=True)
    )
    return Sampled(kept, told)


def blind(pairs: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The pairs in an order and on sides that say nothing of where they come from.

    Adds `item_id`, `side_x` (`a` or `b`: where `answer_x` stands), `answer_a` and `answer_b`.
    `answer_x` stands on each side equally often (once more on `a` where the number is odd). Order,
    sides and ids are drawn with a key made of the seed and of every column, also those that a sheet
    doesn't show: without them, nobody who knows this code and the seed can draw them again.
    """
    rows = [json.dumps(row, ensure_ascii=False, default=str) for row in pairs.iter_rows(named=True)]
    secret = hashlib.sha256("\n".join([str(seed), *rows]).encode("utf-8", "surrogatepass")).digest()
    rng = np.random.default_rng(np.frombuffer(secret, dtype=np.uint64))
    on_a = rng.permutation(np.arange(pairs.height) % 2 == 0)
    ids = [
        # A letter first, so that no spreadsheet takes it for a number.
        "p" + hashlib.blake2b(str(place).encode(), digest_size=6, key=secret).hexdigest()
        for place in range(pairs.height)
    ]
    x, y = pl.col("answer_x"), pl.col("answer_y")
    shuffled = pairs.with_columns(
        item_id=pl.Series(ids, dtype=pl.String), _x=pl.Series(on_a, dtype=pl.Boolean)
    )[rng.permutation(pairs.height)]
    return shuffled.with_columns(
        side_x=pl.when("_x").then(pl.lit("a")).otherwise(pl.lit("b")),
        answer_a=pl.when("_x").then(x).otherwise(y),
        answer_b=pl.when("_x").then(y).otherwise(x),
    ).drop("_x")
