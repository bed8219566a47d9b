"""Scored completions -> preference pairs, and a funnel that says where the others fell.

For each prompt: the pair with the largest margin among those that satisfy every constraint. Taking
the best and the worst answer first and filtering then loses every prompt whose best answer fails a
constraint that its second best would have met; `funnel["yield"]` shows both counts.

Column suffixes: `_c` the chosen answer of a candidate pair, `_r` the rejected one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import polars as pl

from rlhf.config import ColdStart, RunConfig
from rlhf.errors import DataGateError
from rlhf.funnel import (
    Constraints,
    Step,
    count_steps,
    failed_completions,
    failed_pairs,
    is_score,
    kept_pairs,
    unusable_scores,
)
from rlhf.types import pairs_schema

_KEY = ["prompt_id", "sample"]
_DECIMALS = 12
_SIDES = ("_c", "_r")
_CHUNK_PAIRS = 2_000_000
SOURCE = "on_policy"


@dataclass(frozen=True, slots=True)
class Rules:
    """What makes a pair; all scores, floors and margins are in [0, 1].

    `protected` maps a dimension to epsilon: chosen may score below rejected by no more.

    >>> Rules({"correctness": 0.7, "style": 0.3}, {"correctness": 0.6}, {}).needed
    ('correctness', 'style')
    """

    weights: Mapping[str, float]
    floors: Mapping[str, float]
    protected: Mapping[str, float]
    min_margin: float = 0.05
    max_pairs: int | None = None
    allow_truncated_chosen: bool = False

    def __post_init__(self) -> None:
        if abs(sum(self.weights.values()) - 1) > 1e-9:
            raise ValueError(f"weights must sum to 1, got {dict(self.weights)}")

    @classmethod
    def of(cls, config: RunConfig) -> Rules:
        """The rules of a run."""
        return cls(
            weights=config.weights,
            floors=config.floors,
            protected=config.protected,
            min_margin=config.selection.min_margin,
            max_pairs=config.selection.max_pairs,
            allow_truncated_chosen=config.selection.allow_truncated_chosen,
        )

    @property
    def needed(self) -> tuple[str, ...]:
        """Dimensions without which a completion can't be used."""
        return tuple(sorted({*self.weights, *self.floors, *self.protected}))


@dataclass(frozen=True, slots=True)
class Selected:
    """Pairs (schema `pairs_schema(rules.needed)`, sorted by prompt_id) and the JSON-able funnel."""

    pairs: pl.DataFrame
    funnel: dict[str, Any]


def score_wide(scores: pl.DataFrame, dimensions: Sequence[str]) -> pl.DataFrame:
    """Scores (schema `SCORES`) with one row an answer: prompt_id, sample, a column per dimension.

    Null where the judge abstained or said nothing, and, whatever it said, where the value is not
    finite or outside [0, 1]: such a value never becomes a number here. Sorted by prompt and sample.

    Raises:
        ValueError: two scores of one dimension for one answer.
    """
    twice = scores.filter(pl.struct(*_KEY, "dimension").is_duplicated())
    twice = twice.filter(pl.col("dimension").is_in(list(dimensions)))
    if twice.height:
        row = twice.row(0, named=True)
        raise ValueError(
            f"prompt {row['prompt_id']!r} sample {row['sample']} has two scores of "
            f"{row['dimension']!r}; one judge a dimension may score it"
        )
    value = pl.when(is_score()).then("score")
    return (
        scores.group_by(_KEY)
        .agg(value.filter(pl.col("dimension") == d).first().alias(d) for d in dimensions)
        .sort(_KEY)
    )


def reward_expression(weights: Mapping[str, float]) -> pl.Expr:
    """Weighted sum over dimension columns, null if any is; in name order and to 12 decimals, so
    that neither the order of a config nor of rows can tip a comparison."""
    terms = [weight * pl.col(d) for d, weight in sorted(weights.items())]
    return reduce(operator.add, terms).round(_DECIMALS)


def select_pairs(
    completions: pl.DataFrame, scores: pl.DataFrame, prompts: pl.DataFrame, rules: Rules
) -> Selected:
    """The best admissible pair of each prompt, at most `rules.max_pairs` of them.

    A chosen answer is non-empty, has every needed dimension scored, meets every floor and ended by
    itself (unless truncated ones are allowed). The rejected one is non-empty and scored. Their
    texts (stripped) and their token ids differ, the chosen one is not worse by more than epsilon on
    any protected dimension, and its reward is larger by at least `min_margin`, and larger at all.
    Largest margin wins; ties go to the lowest chosen, then the lowest rejected sample. The result
    depends on the rows alone, not on their order. No admissible pair gives an empty table.

    Args:
        completions: schema `COMPLETIONS`, one policy version a prompt.
        scores: schema `SCORES`, of these completions.
        prompts: prompt_id, category, cluster, prompt (text); may hold more prompts.
        rules: what makes a pair.

    Raises:
        ValueError: a completion, score or prompt twice, a score without completion, a completion
            without prompt, two policy versions or two sets of prompt tokens for one prompt.
    """
    _check(completions, scores, prompts)
    candidates = candidates_of(completions, scores, rules)
    constraints = Constraints(chosen_steps(rules), _pair_steps(rules))
    best, best_and_worst, kept, failed = [], 0, [], []
    for chunk in _chunks(candidates, completions):
        pairs = _joined(chunk.filter("eligible"), chunk.filter("usable")).with_columns(
            step.holds.alias(step.flag) for step in constraints.pair
        )
        best.append(_largest(pairs.filter(pl.all_horizontal(s.flag for s in constraints.pair))))
        best_and_worst += _best_against_worst(chunk, constraints.pair)
        kept.append(kept_pairs(pairs, constraints.pair))
        failed.append(failed_pairs(pairs, constraints.pair))
    about = prompts.select("prompt_id", "category", "cluster", "prompt")
    admissible = pl.concat(best).join(about, on="prompt_id", how="left")
    capped = _capped(admissible, rules.max_pairs)
    funnel = {
        "steps": count_steps(
            candidates,
            pl.concat(kept).sum(),
            constraints,
            admissible.height,
            capped.height,
            rules.max_pairs,
        ),
        "alone": {
            "completions": failed_completions(candidates, constraints.chosen),
            "pairs": pl.concat(failed).sum().row(0, named=True),
        },
        "yield": {
            "largest_admissible": admissible.height,
            "best_and_worst_then_filter": best_and_worst,
        },
        "unusable_scores": unusable_scores(scores, rules.needed, completions.height),
    }
    return Selected(_pairs_table(capped, completions, rules), funnel)


def cold_start(completions: pl.DataFrame, scores: pl.DataFrame, rules: Rules) -> dict[str, Any]:
    """Whether the policy's answers hold anything to learn from, before any training.

    `passing_share`: share of prompts with an answer that may be chosen. `spread`: mean over prompts
    with a usable answer of the population standard deviation of the reward within the prompt; None
    if there is no such prompt. With the counts `prompts` and `usable_prompts`.

    Raises:
        ValueError: no completions.
    """
    if completions.is_empty():
        raise ValueError("completions must not be empty")
    by_prompt = (
        candidates_of(completions, scores, rules)
        .group_by("prompt_id", maintain_order=True)
        .agg(
            pl.col("eligible").any(),
            pl.col("reward").filter("usable").std(ddof=0).alias("spread"),
        )
    )
    return {
        "passing_share": by_prompt["eligible"].mean(),
        "spread": by_prompt["spread"].mean(),
        "prompts": by_prompt.height,
        "usable_prompts": by_prompt["spread"].count(),
    }


def check_cold_start(result: Mapping[str, Any], limits: ColdStart) -> None:
    """Stop before training where `cold_start` found too little to learn from.

    Raises:
        DataGateError: a number is below its limit; says which, by how much, and the remedy.
    """
    failed = []
    if result["passing_share"] < limits.min_passing_share:
        failed.append(
            f"{result['passing_share']:.3f} of {result['prompts']} prompts have an answer that "
            "passes the floors, selection.cold_start.min_passing_share is "
            f"{limits.min_passing_share:g}"
        )
    if result["spread"] is None:
        failed.append(f"none of {result['prompts']} prompts has an answer with a reward")
    elif result["spread"] < limits.min_spread:
        failed.append(
            "the reward's mean standard deviation within a prompt is "
            f"{result['spread']:.4f}, selection.cold_start.min_spread is {limits.min_spread:g}"
        )
    if failed:
        raise DataGateError(f"cold start: {'; '.join(failed)}: warm up with SFT first")


def _check(completions: pl.DataFrame, scores: pl.DataFrame, prompts: pl.DataFrame) -> None:
    faults = {
        "sampled twice": completions.filter(pl.struct(_KEY).is_duplicated()),
        "answered by more than one policy_version": completions.group_by("prompt_id")
        .agg(pl.col("policy_version").n_unique())
        .filter(pl.col("policy_version") > 1),
        "scored without a completion": scores.join(completions, on=_KEY, how="anti"),
        "listed twice": prompts.filter(pl.col("prompt_id").is_duplicated()),
        "sampled but not listed": completions.join(prompts, on="prompt_id", how="anti"),
        "without a category": prompts.filter(pl.col("category").is_null()),
    }
    for fault, rows in faults.items():
        if rows.height:
            raise ValueError(f"{rows.height} rows {fault}, first: {rows['prompt_id'].min()!r}")


def candidates_of(completions: pl.DataFrame, scores: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """One light row a completion, sorted by prompt and sample; `row` points into `completions`.

    Columns: row, prompt_id, sample, filled, complete, scored, scores, reward, usable, eligible.
    """
    wide = score_wide(scores, rules.needed).select(
        *_KEY,
        pl.struct(rules.needed).alias("scores"),
        pl.all_horizontal(pl.col(*rules.needed).is_not_null()).alias("scored"),
        reward_expression(rules.weights).alias("reward"),
    )
    has_text = pl.col("text").str.strip_chars().str.len_bytes() > 0
    light = completions.select(
        *_KEY,
        filled=(has_text & (pl.col("token_ids").list.len() > 0)).fill_null(False),
        complete=(pl.col("finish_reason") == "stop").fill_null(False),
    ).with_row_index("row")
    return (
        light.join(wide, on=_KEY, how="left")
        .with_columns(pl.col("scored").fill_null(False))
        .with_columns(
            usable=pl.col("filled") & pl.col("scored"),
            eligible=pl.all_horizontal(s.holds for s in chosen_steps(rules)).fill_null(False),
        )
        .sort(_KEY)
    )


def chosen_steps(rules: Rules) -> list[Step]:
    """What a chosen answer must satisfy by itself, in order."""
    complete = pl.lit(True) if rules.allow_truncated_chosen else pl.col("complete")
    floors = [
        Step(f"floor {d}", f"{d} below {floor:g}", _score(d) >= round(floor, _DECIMALS))
        for d, floor in sorted(rules.floors.items())
    ]
    return [
        Step("non-empty", "no text or no tokens", pl.col("filled")),
        Step("scored", f"no score of one of {', '.join(rules.needed)}", pl.col("scored")),
        Step("complete", "cut off, which may be rejected but not chosen", complete),
        *floors,
    ]


def _pair_steps(rules: Rules) -> list[Step]:
    """What chosen and rejected must satisfy together, in order."""
    differ = (pl.col("text_c") != pl.col("text_r")) & (pl.col("ids_c") != pl.col("ids_r"))
    protected = [
        Step(
            f"protected {d}",
            f"{d} more than {epsilon:g} below that of the answer it would be preferred to",
            (_score(d, "_c") - _score(d, "_r")).round(_DECIMALS) >= -round(epsilon, _DECIMALS),
        )
        for d, epsilon in sorted(rules.protected.items())
    ]
    margin = pl.col("margin")
    return [
        Step("different answer", "no other usable answer, or only the same one", differ),
        *protected,
        Step(
            "margin",
            f"reward not larger, or by less than {rules.min_margin:g}",
            (margin > 0) & (margin >= round(rules.min_margin, _DECIMALS)),
        ),
    ]


def _score(dimension: str, suffix: str = "") -> pl.Expr:
    return pl.col(f"scores{suffix}").struct.field(dimension).round(_DECIMALS)


def _chunks(candidates: pl.DataFrame, completions: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Whole prompts at a time, so that no join exceeds about `_CHUNK_PAIRS` rows.

    Adds `p` (number of the prompt) and the keys `text` and `ids`: equal within a prompt exactly
    where the stripped texts, or the token ids, are.
    """
    sizes = (
        candidates.group_by("prompt_id", maintain_order=True)
        .len()
        .select(
            pl.col("len").cast(pl.Int64),
            chunk=pl.col("len").cast(pl.Int64).pow(2).cum_sum() // _CHUNK_PAIRS,
        )
    )
    lengths = sizes.group_by("chunk", maintain_order=True).agg(pl.col("len").sum())["len"]
    start = 0
    for length in lengths.to_list() or [0]:
        chunk = candidates.slice(start, length)
        start += length
        lowest = pl.col("sample").min()
        keys = completions[chunk["row"]].select(
            p=pl.col("prompt_id").rle_id(),
            text=lowest.over("prompt_id", pl.col("text").str.strip_chars()),
            ids=lowest.over("prompt_id", "token_ids"),
        )
        yield chunk.hstack(keys)


def _joined(chosen: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    sides = [
        side.select("p", pl.all().exclude("p").name.suffix(suffix))
        for side, suffix in ((chosen, "_c"), (rejected.drop("prompt_id"), "_r"))
    ]
    return (
        sides[0]
        .join(sides[1], on="p")
        .filter(pl.col("row_c") != pl.col("row_r"))
        .with_columns(margin=(pl.col("reward_c") - pl.col("reward_r")).round(_DECIMALS))
    )


def _largest(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pair with the largest margin of each prompt, ties to the lowest samples."""
    return (
        pairs.sort("p", "margin", "sample_c", "sample_r", descending=[False, True, False, False])
        .unique("p", keep="first", maintain_order=True)
        .select(
            pl.col("prompt_id_c").alias("prompt_id"),
            "margin",
            *(f"{name}{side}" for name in ("row", "sample", "reward", "scores") for side in _SIDES),
        )
    )


def _best_against_worst(chunk: pl.DataFrame, pair_steps: Sequence[Step]) -> int:
    """Prompts whose highest- and lowest-reward usable answers happen to satisfy everything."""
    best, worst = (
        chunk.filter("usable")
        .sort("p", "reward", "sample", descending=[False, descending, False])
        .unique("p", keep="first", maintain_order=True)
        for descending in (True, False)
    )
    holds = pl.all_horizontal("eligible_c", *(s.holds for s in pair_steps))
    return _joined(best, worst).filter(holds).height


def _capped(pairs: pl.DataFrame, max_pairs: int | None) -> pl.DataFrame:
    """Largest margins first, each category in proportion to its pairs.

    The k-th largest of a category's n pairs stands at (k - 1/2) / n of the queue; ties go by
    category, then prompt_id.
    """
    if max_pairs is None:
        return pairs.sort("prompt_id")
    size = pl.len().over("category")
    return (
        pairs.sort("margin", "prompt_id", descending=[True, False])
        .with_columns(place=(pl.int_range(pl.len()).over("category") + 0.5) / size)
        .sort("place", "category", "prompt_id")
        .head(max_pairs)
        .sort("prompt_id")
    )


def _pairs_table(best: pl.DataFrame, completions: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    chosen, rejected = (completions[best[f"row{side}"]] for side in _SIDES)
    if not chosen["prompt_token_ids"].equals(rejected["prompt_token_ids"]):
        raise ValueError("the answers of one prompt were sampled from different prompt_token_ids")
    schema = pairs_schema(rules.needed)
    return best.with_columns(
        chosen["prompt_token_ids"],
        chosen["policy_version"],
        chosen["text"].alias("chosen"),
        rejected["text"].alias("rejected"),
        chosen["token_ids"].alias("chosen_token_ids"),
        rejected["token_ids"].alias("rejected_token_ids"),
        pl.lit(SOURCE).alias("source"),
        *(
            pl.col(f"{name}{side}").alias(target)
            for side, role in zip(_SIDES, ("chosen", "rejected"), strict=True)
            for name, target in (
                ("sample", f"{role}_sample"),
                ("reward", f"reward_{role}"),
                ("scores", f"scores_{role}"),
            )
        ),
    ).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
