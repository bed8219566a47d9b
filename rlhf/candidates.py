"""Completions and their scores as candidates for pairs: one light row an answer.

Columns of candidates, sorted by prompt, then sample:

| column | |
|---|---|
| `row` | where the answer stands in `completions` |
| `prompt_id`, `sample`, `p` | its key; `p` numbers the prompts by prompt_id |
| `filled`, `complete`, `scored` | it has text and tokens; ended by itself; lacks no needed score |
| `tokens` | its length |
| `scores`, `reward` | a struct of the needed dimensions; their weighted sum |
| `value` | what answers are ranked by: reward, less the length penalty where there is one |
| `usable`, `eligible` | it may be rejected; it may be chosen |
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce

import polars as pl

from rlhf.funnel import Step, is_score
from rlhf.rules import Rules

KEY = ["prompt_id", "sample"]
DECIMALS = 12
_SAMPLES = 2**32


def score_wide(scores: pl.DataFrame, dimensions: Sequence[str]) -> pl.DataFrame:
    """Scores (schema `SCORES`) with one row an answer: prompt_id, sample, a column per dimension.

    Null where the judge abstained or said nothing, and, whatever it said, where the value is not
    finite or outside [0, 1]: such a value never becomes a number here. Sorted by prompt and sample.

    Raises:
        ValueError: two scores of one dimension for one answer.
    """
    ids = _sorted_ids(scores)
    keys = _keys(scores, ids)
    base = keys.unique().sort()
    wide = _wide(base, _by_dimension(scores, keys, dimensions), ids)
    return wide.select(
        ids.gather(base // _SAMPLES),
        (base % _SAMPLES - _SAMPLES // 2).cast(scores.schema["sample"]).alias("sample"),
        *dimensions,
    )


def reward_expression(weights: Mapping[str, float]) -> pl.Expr:
    """Weighted sum over dimension columns, null if any is; in name order and to 12 decimals, so
    that neither the order of a config nor of rows can tip a comparison."""
    terms = [weight * pl.col(d) for d, weight in sorted(weights.items())]
    return reduce(operator.add, terms).round(DECIMALS)


def candidates_of(completions: pl.DataFrame, scores: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Candidates; an answer without scores is one too. The tables are taken as sound."""
    ids = _sorted_ids(completions)
    columns = _by_dimension(scores, _keys(scores, ids), rules.needed)
    return _candidates(completions, columns, ids, rules)


def checked_candidates(
    completions: pl.DataFrame, scores: pl.DataFrame, prompts: pl.DataFrame, rules: Rules
) -> pl.DataFrame:
    """Candidates of tables that are checked first, with their prompts' `check_listed`.

    Raises:
        ValueError: a completion, score or prompt twice, a score without completion, a completion
            without prompt, a prompt without category, two policy versions for one prompt.
    """
    check_listed(prompts)
    ids = _sorted_ids(completions)
    present = scores["dimension"].unique().sort().to_list()
    columns = _by_dimension(scores, _keys(scores, ids), sorted({*present, *rules.needed}))
    keyed = completions.select("policy_version").with_columns(key=_keys(completions, ids))
    keyed = keyed.sort("key")

    def named(wrong: pl.Expr) -> list[str]:
        return ids.gather(keyed.filter(wrong)["key"] // _SAMPLES).to_list()

    same_prompt = pl.col("key") // _SAMPLES == pl.col("key").shift() // _SAMPLES
    known = keyed["key"]
    strangers = any(
        not part["key"].equals(known)
        and not part["key"].is_in(known.implode()).fill_null(False).all()
        for part in columns.values()
    )
    faults: dict[str, Sequence[str]] = {
        "sampled twice": named(pl.col("key") == pl.col("key").shift()),
        "answered by more than one policy_version": named(
            same_prompt & (pl.col("policy_version") != pl.col("policy_version").shift())
        ),
        "scored without a completion": scores.join(completions, on=KEY, how="anti")[
            "prompt_id"
        ].to_list()
        if strangers
        else [],
        "sampled but not listed": ids.filter(~ids.is_in(prompts["prompt_id"].implode())).to_list(),
    }
    _refuse(faults)
    return _candidates(completions, columns, ids, rules)


def check_listed(prompts: pl.DataFrame) -> None:
    """Look at the columns prompt_id and category of prompts.

    Raises:
        ValueError: a prompt twice, or without a category.
    """
    twice, blank = pl.col("prompt_id").is_duplicated(), pl.col("category").is_null()
    _refuse(
        {
            "listed twice": prompts.filter(twice)["prompt_id"].to_list(),
            "without a category": prompts.filter(blank)["prompt_id"].to_list(),
        }
    )


def _refuse(faults: Mapping[str, Sequence[str]]) -> None:
    for fault, prompt_ids in faults.items():
        if len(prompt_ids):
            raise ValueError(f"{len(prompt_ids)} rows {fault}, first: {min(prompt_ids)!r}")


def chosen_steps(rules: Rules) -> list[Step]:
    """What a chosen answer must satisfy by itself, in order."""
    complete = pl.lit(True) if rules.allow_truncated_chosen else pl.col("complete")
    floors = [
        Step(
            f"floor {d}",
            f"{d} below {floor:g}",
            pl.col("scores").struct.field(d).round(DECIMALS) >= round(floor, DECIMALS),
        )
        for d, floor in sorted(rules.floors.items())
    ]
    return [
        Step("non-empty", "no text or no tokens", pl.col("filled")),
        Step("scored", f"no score of one of {', '.join(rules.needed)}", pl.col("scored")),
        Step("complete", "cut off, which may be rejected but not chosen", complete),
        *floors,
    ]


def with_eligible(candidates: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Candidates whose `eligible` is that of these rules."""
    holds = pl.all_horizontal(step.holds for step in chosen_steps(rules)).fill_null(False)
    return candidates.with_columns(eligible=holds)


def _candidates(
    completions: pl.DataFrame, columns: Mapping[str, pl.DataFrame], ids: pl.Series, rules: Rules
) -> pl.DataFrame:
    keys = _keys(completions, ids)
    has_text = pl.col("text").str.strip_chars().str.len_bytes() > 0
    tokens = pl.col("token_ids").list.len()
    light = completions.select(
        *KEY,
        filled=(has_text & (tokens > 0)).fill_null(False),
        complete=(pl.col("finish_reason") == "stop").fill_null(False),
        tokens=tokens,
        p=(keys // _SAMPLES).cast(pl.UInt32),
    ).with_row_index("row")
    if not keys.is_sorted():
        light, keys = light[keys.arg_sort()], keys.sort()
    needed = list(rules.needed)
    wide = _wide(keys, {d: columns[d] for d in needed}, ids).select(
        scores=pl.struct(needed),
        scored=pl.all_horizontal(pl.col(*needed).is_not_null()),
        reward=reward_expression(rules.weights),
    )
    candidates = light.hstack(wide).with_columns(usable=pl.col("filled") & pl.col("scored"))
    return with_eligible(candidates.with_columns(value=_value(rules)), rules)


def _value(rules: Rules) -> pl.Expr:
    """What answers are ranked by: reward - c * z, c the length penalty.

    z is the answer's length in tokens, less the mean over the usable answers of its prompt, over
    their population standard deviation; 0 where they are all equally long. A penalty linear in
    length is the field's practice (Dong et al. 2024, RLHF Workflow, reward - lambda * |a|,
    https://arxiv.org/abs/2405.07863); standardised, c is in units of reward for every prompt: an
    answer one standard deviation longer than its prompt's mean must be better by c to rank equal.
    """
    if rules.length_penalty == 0:
        return pl.col("reward")
    tokens = pl.col("tokens").cast(pl.Float64)
    among = pl.when("usable").then(tokens)
    deviation = among.std(ddof=0).over("p")
    z = pl.when(deviation > 0).then((tokens - among.mean().over("p")) / deviation).otherwise(0.0)
    return (pl.col("reward") - rules.length_penalty * z).round(DECIMALS)


def _sorted_ids(table: pl.DataFrame) -> pl.Series:
    return table["prompt_id"].unique().sort()


def _keys(table: pl.DataFrame, ids: pl.Series) -> pl.Series:
    """One number a row that sorts as prompt_id, then sample; null for an id not in `ids`.

    Strings are compared here and nowhere else: on millions of rows all later steps are faster.
    """
    numbered = ids.to_frame().with_row_index("number")
    number = table.select("prompt_id").join(
        numbered, on="prompt_id", how="left", maintain_order="left"
    )["number"]
    sample = table["sample"].cast(pl.Int64) + _SAMPLES // 2
    return (number.cast(pl.UInt64) * _SAMPLES + sample.cast(pl.UInt64)).alias("key")


def _by_dimension(
    scores: pl.DataFrame, keys: pl.Series, dimensions: Sequence[str]
) -> dict[str, pl.DataFrame]:
    """Dimension -> its scores: key (sorted), and a column named after it."""
    table = scores.select("dimension", score=pl.when(is_score()).then("score")).with_columns(keys)
    return {
        d: table.filter(pl.col("dimension") == d)
        .select("key", pl.col("score").alias(d))
        .sort("key")
        for d in dimensions
    }


def _wide(base: pl.Series, columns: Mapping[str, pl.DataFrame], ids: pl.Series) -> pl.DataFrame:
    """A column per dimension, rows as in `base` (sorted keys)."""
    wide = base.to_frame()
    for dimension, part in columns.items():
        twice = part.filter(pl.col("key") == pl.col("key").shift())
        if twice.height:
            key = twice["key"][0]
            raise ValueError(
                f"prompt {ids[key // _SAMPLES]!r} sample {key % _SAMPLES - _SAMPLES // 2} has two "
                f"scores of {dimension!r}; one judge a dimension may score it"
            )
        if part["key"].equals(base):
            wide = wide.hstack([part[dimension]])
        else:
            wide = wide.join(part, on="key", how="left", maintain_order="left")
    return wide
