"""Candidates -> all pairs of a chosen with a rejected answer, and which of them are admissible.

Prompts come in chunks, so that memory is bounded whatever their number. Column suffixes: `_c` the
chosen answer of a pair, `_r` the rejected one; `c` and `r` are their places among the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from rlhf.candidates import DECIMALS, KEY
from rlhf.duplicates import similarities
from rlhf.funnel import Step, depth
from rlhf.rules import Rules
from rlhf.strategies import COLUMNS, taken

_CHUNK_PAIRS = 2_000_000


def pick(
    candidates: pl.DataFrame, completions: pl.DataFrame, rules: Rules, round: int
) -> pl.DataFrame:
    """What the strategy takes, as places in `candidates`: columns `strategies.COLUMNS`.

    Without the cap on all pairs. `rules.min_margin` is settled.
    """
    steps = pair_steps(rules)
    return pl.concat(
        taken(admissible_of(pairs, steps), rules)
        for pairs, _ in judged_pairs(candidates, completions, rules, round)
    )


def pair_steps(rules: Rules) -> list[Step]:
    """What chosen and rejected must satisfy together, in order; `min_margin` is settled."""
    assert rules.min_margin != "auto", "min_margin is settled before pairs are made"
    differ = (pl.col("text_c") != pl.col("text_r")) & (pl.col("ids_c") != pl.col("ids_r"))
    protected = [
        Step(
            f"protected {d}",
            f"{d} more than {epsilon:g} below that of the answer it would be preferred to",
            (pl.col(f"{d} score_c").round(DECIMALS) - pl.col(f"{d} score_r").round(DECIMALS)).round(
                DECIMALS
            )
            >= -round(epsilon, DECIMALS),
        )
        for d, epsilon in sorted(rules.protected.items())
    ]
    ratio = rules.max_length_ratio
    length = [
        Step(
            "length ratio",
            f"more than {ratio:g} times the tokens of the answer it would be preferred to",
            pl.col("tokens_c") <= ratio * pl.col("tokens_r"),
        )
        for ratio in ([] if ratio is None else [ratio])
    ]
    most = rules.max_similarity
    alike = [
        Step(
            "near-duplicate",
            f"more than {most:g} alike to the answer it would be preferred to",
            pl.col("similarity") <= most,
        )
        for most in ([] if most is None else [most])
    ]
    margin = pl.col("margin")
    return [
        Step("different answer", "no other usable answer, or only the same one", differ),
        *protected,
        *length,
        Step(
            "margin",
            f"reward not larger, or by less than {rules.min_margin:g}",
            (margin > 0) & (margin >= round(rules.min_margin, DECIMALS)),
        ),
        *alike,
    ]


def admissible_of(pairs: pl.DataFrame, steps: Sequence[Step]) -> pl.DataFrame:
    """Those that every step holds for, with the columns that strategies know."""
    return pairs.filter(pl.col("depth") == len(steps)).select(COLUMNS)


def judged_pairs(
    candidates: pl.DataFrame, completions: pl.DataFrame, rules: Rules, round: int
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Chunk by chunk: pairs of an eligible with a usable answer and what each step says of them;
    and for each prompt its best and its worst usable answer, as `c` and `r`.

    Pairs have the columns of `strategies.COLUMNS` and `rlhf.funnel`, and are sorted by `c`, `r`.
    Texts are compared last, and only those of pairs that every other step holds for.
    """
    steps = pair_steps(rules)
    cheap = [step for step in steps if step.name != "near-duplicate"]
    protected = [
        pl.col("scores").struct.field(d).alias(f"{d} score") for d in sorted(rules.protected)
    ]
    for chunk in _chunks(candidates, completions):
        light = chunk.select(
            "p", "place", "value", "tokens", "text", "ids", "usable", "eligible", *protected,
            draw=pl.struct(KEY).hash(rules.draw_seed(round)),
        )  # fmt: skip
        usable = light.filter("usable").drop("usable", "eligible")
        pairs = (
            _joined(light.filter("eligible").drop("usable", "eligible"), usable)
            .with_columns(step.holds.alias(step.flag) for step in cheap)
            .pipe(_compared, steps[len(cheap) :], cheap, candidates["row"], completions["text"])
            .select(*COLUMNS, *(step.flag for step in steps), depth=depth(steps))
        )
        extremes = usable.group_by("p").agg(
            pl.col("place").get(pl.col("value").arg_max()).alias("c"),
            pl.col("place").get(pl.col("value").arg_min()).alias("r"),
        )
        yield pairs, extremes


def _compared(
    pairs: pl.DataFrame,
    dear: Sequence[Step],
    cheap: Sequence[Step],
    rows: pl.Series,
    texts: pl.Series,
) -> pl.DataFrame:
    """Pairs with the outcome of the steps (`dear`) that look at their texts, if there are any."""
    if not dear:
        return pairs
    numbered = pairs.with_row_index("pair")
    open_pairs = numbered.filter(pl.all_horizontal(step.flag for step in cheap))
    chosen, rejected = (texts.gather(rows.gather(open_pairs[side])) for side in ("c", "r"))
    found = open_pairs.select("pair", similarity=pl.Series(similarities(chosen, rejected)))
    known = numbered.join(found, on="pair", how="left", maintain_order="left").drop("pair")
    return known.with_columns(pl.col("similarity").fill_null(0.0)).with_columns(
        step.holds.alias(step.flag) for step in dear
    )


def _chunks(candidates: pl.DataFrame, completions: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Whole prompts at a time, so that no join exceeds about `_CHUNK_PAIRS` rows.

    Adds `place` (the row's number) and the keys `text` and `ids`: equal within a prompt exactly
    where the stripped texts, or the token ids, are.
    """
    sizes = candidates["p"].rle().struct.field("len").cast(pl.Int64).to_frame()
    lengths = (
        sizes.group_by(pl.col("len").pow(2).cum_sum() // _CHUNK_PAIRS, maintain_order=True)
        .agg(pl.col("len").sum().alias("rows"))["rows"]
        .to_list()
    )
    placed = candidates.with_row_index("place")
    start = 0
    for length in lengths or [0]:
        chunk = placed.slice(start, length)
        start += length
        answers = completions[chunk["row"]].select(
            chunk["p"], chunk["sample"], pl.col("text").str.strip_chars(), ids="token_ids"
        )
        lowest = pl.col("sample").min()
        yield chunk.hstack(
            answers.select(text=lowest.over("p", "text"), ids=lowest.over("p", "ids"))
        )


def _joined(chosen: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    sides = [
        side.rename({"place": place}).select(
            "p", place, pl.all().exclude("p", place).name.suffix(suffix)
        )
        for side, place, suffix in ((chosen, "c", "_c"), (rejected, "r", "_r"))
    ]
    return (
        sides[0]
        .join(sides[1], on="p", maintain_order="left_right")
        .filter(pl.col("c") != pl.col("r"))
        .with_columns(margin=(pl.col("value_c") - pl.col("value_r")).round(DECIMALS))
    )
