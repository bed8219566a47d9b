"""Scored completions -> preference pairs, and a funnel that says where the others fell.

For each prompt: the pair with the largest margin among those that satisfy every constraint (or what
another strategy takes of them). Taking the best and the worst answer first and filtering then loses
every prompt whose best answer fails a constraint that its second best would have met;
`funnel["yield"]` shows both counts.

Column suffixes: `_c` the chosen answer of a pair, `_r` the rejected one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import polars as pl

from rlhf.candidates import (
    candidates_of,
    checked_candidates,
    chosen_steps,
    reward_expression,
    score_wide,
)
from rlhf.config_selection import ColdStart
from rlhf.errors import DataGateError
from rlhf.funnel import (
    Constraints,
    Counts,
    Left,
    as_steps,
    failed_completions,
    failed_pairs,
    kept_pairs,
    left_after,
    unusable_scores,
)
from rlhf.noise import Noise, noise_from, noise_of, noise_sums, settled
from rlhf.pairing import admissible_of, judged_pairs, pair_steps
from rlhf.rules import Rules
from rlhf.strategies import taken, why_not
from rlhf.types import pairs_schema

__all__ = [
    "Rules",
    "Selected",
    "candidates_of",
    "check_cold_start",
    "chosen_steps",
    "cold_start",
    "reward_expression",
    "score_wide",
    "select_pairs",
]

SOURCE = "on_policy"


Tables = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]
"""Completions, scores and prompts, as `select_pairs` takes them."""


@dataclass(frozen=True, slots=True)
class Selected:
    """Pairs (schema `pairs_schema(rules.needed)`, sorted by prompt_id, then the samples of chosen
    and rejected) and the JSON-able funnel."""

    pairs: pl.DataFrame
    funnel: dict[str, Any]


def select_pairs(
    completions: pl.DataFrame,
    scores: pl.DataFrame,
    prompts: pl.DataFrame,
    rules: Rules,
    round: int = 0,
) -> Selected:
    """The admissible pairs of each prompt that the strategy takes, at most `rules.max_pairs`.

    A chosen answer is non-empty, has every needed dimension scored, meets every floor and ended by
    itself (unless truncated ones are allowed). The rejected one is non-empty and scored. Their
    texts (stripped) and their token ids differ, the chosen one is not worse by more than epsilon on
    any protected dimension and not too long beside it, and its value (the reward, less the length
    penalty where there is one) is larger by at least `min_margin`, and larger at all.
    The result depends on the rows alone, not on their order. No admissible pair gives an empty
    table.

    Args:
        completions: schema `COMPLETIONS`, one policy version a prompt.
        scores: schema `SCORES`, of these completions.
        prompts: prompt_id, category, cluster, prompt (text); may hold more prompts.
        rules: what makes a pair.
        round: with the seed, keys what the strategy `best_random` draws.

    Raises:
        ValueError: a completion, score or prompt twice, a score without completion, a completion
            without prompt, two policy versions or two sets of prompt tokens for one prompt.
        InputError: `min_margin` is `auto` and the noise of the rewards is not known.
        DataGateError: `min_margin` is `auto` and no margin could be trusted.
    """
    candidates = checked_candidates(completions, scores, prompts, rules)
    rules = settled(rules, lambda: noise_of(scores, candidates, rules))
    part = part_of(candidates, completions, scores, prompts, rules, round)
    kept = capped(part.pairs, rules.max_pairs)
    return Selected(pairs_table(kept, completions, rules), funnel_of(part.counts, kept, rules))


@dataclass(frozen=True, slots=True)
class Part:
    """What selection makes of some prompts, before the cap on all pairs.

    `pairs` has prompt_id, category, cluster, prompt, margin, and with the suffixes `_c` and `_r`
    sample, reward, scores and `row`, the answer's place among the completions; not sorted.
    """

    pairs: pl.DataFrame
    counts: Counts


def part_of(
    candidates: pl.DataFrame,
    completions: pl.DataFrame,
    scores: pl.DataFrame,
    prompts: pl.DataFrame,
    rules: Rules,
    round: int,
) -> Part:
    """The pairs that the strategy takes, and what was counted on the way.

    `candidates` are those of the tables, which are sound, and `rules.min_margin` is settled.

    Raises:
        ValueError: two sets of prompt tokens for one prompt.
    """
    constraints = Constraints(chosen_steps(rules), pair_steps(rules))
    picked, best_and_worst, kept, failed = [], 0, [], []
    for pairs, extremes in judged_pairs(candidates, completions, rules, round):
        admissible = admissible_of(pairs, constraints.pair)
        picked.append(taken(admissible, rules))
        best_and_worst += admissible.join(extremes, on=["c", "r"], how="semi").height
        kept.append(kept_pairs(pairs, constraints.pair))
        failed.append(failed_pairs(pairs, constraints.pair))
    about = prompts.select("prompt_id", "category", "cluster", "prompt")
    found = _described(pl.concat(picked), candidates).join(about, on="prompt_id", how="left")
    _check_prompt_tokens(found, completions)
    counts = Counts(
        left=(*left_after(candidates, pl.concat(kept).sum(), constraints), _left(found)),
        completions=failed_completions(candidates, constraints.chosen),
        pairs=pl.concat(failed).sum().row(0, named=True),
        best_and_worst=best_and_worst,
        unusable=unusable_scores(scores, rules.needed, completions.height),
    )
    return Part(found, counts)


def noise_in(answered: Iterable[Tables], rules: Rules) -> Noise:
    """`noise_of` all tables, which are sound. Raises ValueError where they are not."""
    sums = (
        noise_sums(scores, checked_candidates(completions, scores, prompts, rules), rules)
        for completions, scores, prompts in answered
    )
    return noise_from(reduce(add, sums), rules)


def funnel_of(counts: Counts, kept: pl.DataFrame, rules: Rules) -> dict[str, Any]:
    """The funnel, from the counts of all prompts and the pairs (columns prompt_id and sample_c)
    that the cap left."""
    cap = "no cap is set" if rules.max_pairs is None else f"more than {rules.max_pairs} pairs"
    steps = [(step.name, step.why) for step in (*chosen_steps(rules), *pair_steps(rules))]
    named = [*steps, why_not(rules), ("cap", cap)]
    return {
        "steps": as_steps(named, [*counts.left, _left(kept)]),
        "alone": {"completions": dict(counts.completions), "pairs": dict(counts.pairs)},
        "yield": {
            "largest_admissible": counts.left[-1].prompts,
            "best_and_worst_then_filter": counts.best_and_worst,
        },
        "unusable_scores": {d: dict(of) for d, of in counts.unusable.items()},
        "strategy": rules.strategy,
        "min_margin": rules.min_margin,
        "pairs": kept.height,
    }


def _left(pairs: pl.DataFrame) -> Left:
    chosen = pairs.select("prompt_id", "sample_c").n_unique()
    return Left(chosen, pairs["prompt_id"].n_unique())


def cold_start(answered: Iterable[Tables], rules: Rules) -> dict[str, Any]:
    """Whether the policy's answers hold anything to learn from, before any training.

    `passing_share`: share of prompts with an answer that may be chosen. `spread`: mean over prompts
    with a usable answer of the population standard deviation of the reward within the prompt; None
    if there is no such prompt. With the counts `prompts` and `usable_prompts`.

    Raises:
        ValueError: no completions.
    """
    by_prompt = pl.concat(
        candidates_of(completions, scores, rules)
        .group_by("prompt_id", maintain_order=True)
        .agg(
            pl.col("eligible").any(),
            pl.col("reward").filter("usable").std(ddof=0).alias("spread"),
        )
        for completions, scores, _ in answered
    )
    if by_prompt.is_empty():
        raise ValueError("completions must not be empty")
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


def _described(pairs: pl.DataFrame, candidates: pl.DataFrame) -> pl.DataFrame:
    """Pairs with what candidates know of both answers, suffixed."""
    chosen, rejected = (
        candidates[pairs[place]].select(
            pl.col("row", "sample", "reward", "scores").name.suffix(suffix)
        )
        for place, suffix in (("c", "_c"), ("r", "_r"))
    )
    prompt = candidates[pairs["c"]].select("prompt_id")
    return pl.concat([prompt, pairs.select("margin"), chosen, rejected], how="horizontal")


def capped(pairs: pl.DataFrame, max_pairs: int | None) -> pl.DataFrame:
    """Largest margins first, each category in proportion to its pairs.

    Pairs need prompt_id, category, margin, sample_c and sample_r, and come back sorted by prompt_id
    and samples. The k-th largest of a category's n pairs stands at (k - 1/2) / n of the queue; ties
    go by category, then prompt_id, then the samples.
    """
    by_name = ["prompt_id", "sample_c", "sample_r"]
    if max_pairs is None:
        return pairs.sort(by_name)
    size = pl.len().over("category")
    return (
        pairs.sort("margin", *by_name, descending=[True, False, False, False])
        .with_columns(place=(pl.int_range(pl.len()).over("category") + 0.5) / size)
        .sort("place", "category", *by_name)
        .head(max_pairs)
        .sort(by_name)
    )


def _check_prompt_tokens(pairs: pl.DataFrame, completions: pl.DataFrame) -> None:
    tokens = completions["prompt_token_ids"]
    if not tokens.gather(pairs["row_c"]).equals(tokens.gather(pairs["row_r"])):
        raise ValueError("the answers of one prompt were sampled from different prompt_token_ids")


def pairs_table(best: pl.DataFrame, completions: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Pairs (as a `Part` has them) with their texts and tokens: schema `pairs_schema`."""
    chosen, rejected = (completions[best[f"row{side}"]] for side in ("_c", "_r"))
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
            for side, role in (("_c", "chosen"), ("_r", "rejected"))
            for name, target in (
                ("sample", f"{role}_sample"),
                ("reward", f"reward_{role}"),
                ("scores", f"scores_{role}"),
            )
        ),
    ).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
