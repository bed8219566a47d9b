"""Why a round gave the pairs it gave: what each constraint costs, what noise did, what is inverted.

`analyse` makes the record `selection.json` of a round, beside `funnel.json`:

| key | holds |
|---|---|
| `strategy`, `pairs`, `prompts`, `min_margin` | what was asked for and what came out |
| `noise` | the margin that noise alone gives, the estimated share of inverted pairs |
| `split_votes` | margins of pairs chosen on half of the votes, measured on the other half |
| `constraints`, `suggestion` | yield and scores of chosen without each constraint, or with less |
| `analysed_prompts` | how many prompts the two above were measured on |
| `similarity` | how alike chosen and rejected are, and how many hardly differ |
| `inversion` | mean chosen minus rejected per dimension, with its interval |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

import polars as pl
from scipy import stats

from rlhf.candidates import KEY, candidates_of, score_wide, with_eligible
from rlhf.duplicates import similarities
from rlhf.errors import DataGateError
from rlhf.noise import noise_record, settled
from rlhf.pairing import pick
from rlhf.rules import Rules
from rlhf.selection import Tables, noise_in
from rlhf.statistics import Interval, cluster_mean, standard_error

ANALYSED_PROMPTS = 20_000
"""Constraints and split votes are measured on so many prompts at most, drawn by the seed."""
NEAR_IDENTICAL = 0.9
"""Similarity from which two answers hardly differ."""
_BOOTSTRAPPED = 10_000
_STEP = 0.05
_MOST = 0.5


class Draw(NamedTuple):
    """What the randomness of an analysis is keyed by."""

    round: int
    resamples: int
    """Of the bootstrap intervals."""


def analyse(
    answered: Iterable[Tables], pairs: pl.DataFrame, rules: Rules, draw: Draw
) -> dict[str, Any]:
    """The JSON-able record `selection.json`.

    `pairs` are what `select_pairs` made of all tables of `answered`, which are gone through several
    times; all answers to a prompt are in one of them. Scores are those of the panel alone: audit
    judges must not speak here.

    Raises InputError and DataGateError as `select_pairs` does.
    """
    noise = noise_in(answered, rules)
    rules = settled(rules, lambda: noise)
    asked = pl.concat(completions["prompt_id"].unique() for completions, *_ in answered)
    completions, scores, prompts = _of(answered, _drawn(asked, rules.draw_seed(draw.round)))
    few = candidates_of(completions, scores, rules)
    costs = constraint_costs(few, completions, rules, draw.round)
    return {
        "strategy": rules.strategy,
        "pairs": pairs.height,
        "prompts": asked.len(),
        "min_margin": rules.min_margin,
        "noise": noise_record(noise, pairs["margin"].to_numpy()),
        "split_votes": split_votes(completions, scores, prompts, rules, draw),
        "constraints": costs,
        "suggestion": suggestion(costs),
        "similarity": similarity(pairs, rules.draw_seed(draw.round)),
        "inversion": inversion(pairs, _scores_of(answered, pairs), draw.resamples, rules.seed),
    }


def constraint_costs(
    candidates: pl.DataFrame, completions: pl.DataFrame, rules: Rules, round: int
) -> dict[str, Any]:
    """What selection gives now, and what it would give with one constraint dropped or relaxed.

    Each of `alternatives` changes one constraint and nothing else, and is a selection of its own:
    `prompts` and `pairs` that it gives, `gained_prompts`, and by how much the means of chosen's
    `reward` and `scores` change (None where either side has no pair). The cap on all pairs is left
    out. A dropped floor still wants a score.
    """

    def outcome(tried: Rules) -> dict[str, Any]:
        picked = pick(with_eligible(candidates, tried), completions, tried, round)
        chosen = candidates[picked["c"]]
        scores = chosen.select(pl.col("scores").struct.unnest().mean()).row(0, named=True)
        return {
            "prompts": picked["p"].n_unique(),
            "pairs": picked.height,
            "reward": chosen["reward"].mean(),
            "scores": scores,
        }

    now = outcome(rules)
    alternatives = []
    for constraint, change, tried in _alternatives(rules):
        then = outcome(tried)
        alternatives.append(
            {
                "constraint": constraint,
                "change": change,
                "prompts": then["prompts"],
                "pairs": then["pairs"],
                "gained_prompts": then["prompts"] - now["prompts"],
                "reward_change": _less(then["reward"], now["reward"]),
                "scores_change": {d: _less(then["scores"][d], v) for d, v in now["scores"].items()},
            }
        )
    return {
        "analysed_prompts": candidates["p"].n_unique(),
        "now": now,
        "alternatives": alternatives,
    }


def _alternatives(rules: Rules) -> Iterator[tuple[str, str, Rules]]:
    """Constraint, what is changed, and the rules with that change alone."""
    assert rules.min_margin != "auto", "min_margin is settled before pairs are made"
    if not rules.allow_truncated_chosen:
        yield "complete", "dropped", replace(rules, allow_truncated_chosen=True)
    for d, floor in sorted(rules.floors.items()):
        yield f"floor {d}", "dropped", replace(rules, floors={**rules.floors, d: 0.0})
        if (lower := round(floor - _STEP, 12)) > 0:
            yield f"floor {d}", f"{lower:g}", replace(rules, floors={**rules.floors, d: lower})
    for d, epsilon in sorted(rules.protected.items()):
        yield f"protected {d}", "dropped", replace(rules, protected={**rules.protected, d: 1.0})
        if (wider := round(epsilon + _STEP, 12)) < 1:
            relaxed = replace(rules, protected={**rules.protected, d: wider})
            yield f"protected {d}", f"{wider:g}", relaxed
    if (ratio := rules.max_length_ratio) is not None:
        yield "length ratio", "dropped", replace(rules, max_length_ratio=None)
        yield "length ratio", f"{1.25 * ratio:g}", replace(rules, max_length_ratio=1.25 * ratio)
    if (margin := rules.min_margin) > 0:
        yield "margin", "dropped", replace(rules, min_margin=0.0)
        yield "margin", f"{margin / 2:g}", replace(rules, min_margin=margin / 2)
    if (most := rules.max_similarity) is not None:
        yield "near-duplicate", "dropped", replace(rules, max_similarity=None)
        wider = round((1 + most) / 2, 12)
        yield "near-duplicate", f"{wider:g}", replace(rules, max_similarity=wider)


def suggestion(costs: Mapping[str, Any]) -> str | None:
    """A sentence, where one constraint alone costs at least half of the prompts without pairs."""
    now, alternatives = costs["now"], costs["alternatives"]
    lost = costs["analysed_prompts"] - now["prompts"]
    dropped = [a for a in alternatives if a["change"] == "dropped"]
    worst = max(dropped, key=lambda a: a["gained_prompts"], default=None)
    if worst is None or lost == 0 or worst["gained_prompts"] < _MOST * lost:
        return None
    name = worst["constraint"]
    text = (
        f"{name} alone costs {worst['gained_prompts']} of the {lost} prompts without a pair: "
        f"without it {worst['prompts']} of {costs['analysed_prompts']} would give pairs, now "
        f"{now['prompts']}{_effect(worst)}"
    )
    relaxed = [a for a in alternatives if a["constraint"] == name and a is not worst]
    if relaxed:
        text += f"; at {relaxed[0]['change']}, {relaxed[0]['prompts']} would{_effect(relaxed[0])}"
    return text


def _effect(alternative: Mapping[str, Any]) -> str:
    """How the mean of what the constraint watches would change."""
    kind, _, dimension = alternative["constraint"].partition(" ")
    watched = dimension if kind in ("floor", "protected") else "reward"
    change = (
        alternative["reward_change"]
        if watched == "reward"
        else alternative["scores_change"][watched]
    )
    return "" if change is None else f" (chosen's mean {watched} {change:+.3f})"


def split_votes(
    completions: pl.DataFrame,
    scores: pl.DataFrame,
    prompts: pl.DataFrame,
    rules: Rules,
    draw: Draw,
) -> dict[str, Any] | None:
    """Pairs chosen on half of each answer's votes, and their margin measured on the other half.

    Each half (the mean of every second vote) chooses once and measures once. What chose is not
    asked again, so `margin_measured` has no winner's curse; `margin_chosen` has that of half the
    votes, which is more than that of the pairs that train, chosen on all. A verifier's score is
    exact and stands in both halves. None where no dimension has votes, or a needed one has fewer
    than two.
    """
    noisy = sorted(set(rules.needed) - set(rules.deterministic))
    votes = scores.filter(pl.col("dimension").is_in(noisy), pl.col("votes").list.len() >= 2)
    if not noisy or votes["dimension"].n_unique() < len(noisy):
        return None
    halves = [candidates_of(completions, _half(scores, noisy, half), rules) for half in (0, 1)]
    found = []
    for chooser, measurer in (halves, halves[::-1]):
        picked = pick(chooser, completions, rules, draw.round)
        chosen, rejected = (measurer["value"].gather(picked[side]) for side in ("c", "r"))
        measured = picked.select("margin", prompt_id=chooser["prompt_id"].gather(picked["c"]))
        found.append(measured.with_columns(measured=chosen - rejected))
    table = pl.concat(found).join(prompts.select("prompt_id", "cluster"), on="prompt_id")
    if table.is_empty():
        return None
    interval = _interval(table, "measured", draw.resamples, rules.seed)
    return {
        "pairs": table.height,
        "margin_chosen": table["margin"].mean(),
        "margin_measured": asdict(interval),
    }


def _half(scores: pl.DataFrame, noisy: list[str], half: Literal[0, 1]) -> pl.DataFrame:
    """Scores whose noisy dimensions are the mean of every second vote, null where there is one."""
    mean = pl.col("votes").list.gather_every(2, half).list.mean()
    split = pl.when(pl.col("votes").list.len() >= 2).then(mean)
    return scores.with_columns(
        score=pl.when(pl.col("dimension").is_in(noisy)).then(split).otherwise("score")
    )


def similarity(pairs: pl.DataFrame, seed: int) -> dict[str, Any]:
    """How alike the answers of pairs are (`rlhf.duplicates.similarities`), of at most
    `ANALYSED_PROMPTS` of them: `pairs`, their `mean` (None without pairs), and how many are
    `near_identical`, `NEAR_IDENTICAL` or more alike."""
    drawn = pairs.select("prompt_id", "chosen", "rejected")
    if drawn.height > ANALYSED_PROMPTS:
        drawn = drawn.sort(pl.struct(pl.all()).hash(seed), *drawn.columns).head(ANALYSED_PROMPTS)
    found = similarities(drawn["chosen"], drawn["rejected"])
    return {
        "pairs": len(found),
        "mean": float(found.mean()) if len(found) else None,
        "near_identical": int((found >= NEAR_IDENTICAL).sum()),
    }


def inversion(
    pairs: pl.DataFrame, scores: pl.DataFrame, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Dimension -> mean of chosen minus rejected, its 95% interval over clusters, and `inverted`.

    Inverted is a mean significantly below 0. Dimensions are all that `scores` hold; pairs that lack
    a score of one don't count for it (`pairs` says how many do).
    """
    struct = pairs.schema["scores_chosen"]
    assert isinstance(struct, pl.Struct)
    needed = [field.name for field in struct.fields]
    others = sorted(set(scores["dimension"].unique()) - set(needed))
    sides = {}
    for role in ("chosen", "rejected"):
        of_pairs = pairs.select("prompt_id", pl.col(f"{role}_sample").alias("sample"))
        known = pairs.select(pl.col(f"scores_{role}").struct.unnest())
        rest = score_wide(scores.filter(pl.col("dimension").is_in(others)), others)
        wide = of_pairs.join(rest, on=KEY, how="left", maintain_order="left").select(others)
        sides[role] = known.hstack(wide)
    found = {}
    for d in sorted([*needed, *others]):
        table = pairs.select("cluster", value=sides["chosen"][d] - sides["rejected"][d])
        table = table.drop_nulls()
        if table.height:
            interval = _interval(table, "value", resamples, seed)
            found[d] = {**asdict(interval), "pairs": table.height, "inverted": interval.high < 0}
    return found


def check_inversion(analysis: Mapping[str, Any], on_inversion: Literal["error", "warn"]) -> str:
    """A warning, empty where no dimension is inverted.

    Raises:
        DataGateError: a dimension is inverted, and `on_inversion` is `error`.
    """
    inverted = [
        f"{d} {f['value']:+.3f} (95% interval {f['low']:+.3f} to {f['high']:+.3f})"
        for d, f in analysis["inversion"].items()
        if f["inverted"]
    ]
    if not inverted:
        return ""
    text = (
        f"chosen answers score below rejected ones on {', '.join(inverted)}: training teaches that "
        "away; protect the dimension in selection.protected, or give it weight"
    )
    if on_inversion == "error":
        raise DataGateError(f"{text}. selection.on_inversion warn goes on all the same")
    return text


def said(funnel: Mapping[str, Any], analysis: Mapping[str, Any]) -> tuple[str, str]:
    """Two lines for the log: where the yield went, and what noise does to the margins."""
    parts = [
        f"{s['step']} {s['kept_prompts']:.3f}"
        for s in funnel["steps"][1:]
        if s["kept_prompts"] is not None and s["lost_prompts"]
    ]
    first, last = funnel["steps"][0]["prompts"], funnel["steps"][-1]["prompts"]
    share = f"{last / first:.3f} of prompts" if first else "no prompts"
    yielded = f"yield {share}" + (f" = {' x '.join(parts)}" if parts else "")
    if analysis["suggestion"]:
        yielded += f"; {analysis['suggestion']}"
    return yielded, _noise_line(analysis["noise"])


def _noise_line(noise: Mapping[str, Any]) -> str:
    unknown = [d for d, source in noise["sources"].items() if source == "unknown"]
    mean = "" if noise["mean_margin"] is None else f"mean margin {noise['mean_margin']:.3f}; "
    if unknown:
        return (
            f"{mean}how much of it is noise is not known: {', '.join(unknown)} have one vote each, "
            "no canaries and no selection.retest_sd"
        )
    if set(noise["sources"].values()) == {"verifier"}:
        return f"{mean}verifiers score without noise"
    if noise["sd"] == 0:
        return (
            f"{mean}asked again, the judges say the same; errors that come again each time don't "
            "show in that"
        )
    if noise["margin_of_noise_alone"] is None or noise["inverted_share"] is None:
        return f"{mean}judge noise {noise['sd']:.3f}"
    return (
        f"{mean}noise alone would give {noise['margin_of_noise_alone']:.3f} (judge noise "
        f"{noise['sd']:.3f}); an estimated {noise['inverted_share']:.1%} of pairs are inverted"
    )


def _drawn(prompt_ids: pl.Series, seed: int) -> pl.DataFrame:
    """At most `ANALYSED_PROMPTS` of them."""
    ids = prompt_ids.to_frame()
    return ids.sort(pl.col("prompt_id").hash(seed), "prompt_id").head(ANALYSED_PROMPTS)


def _of(answered: Iterable[Tables], prompt_ids: pl.DataFrame) -> Tables:
    """What the tables hold of some prompts."""
    few = [
        [t.join(prompt_ids, on="prompt_id", how="semi", maintain_order="left") for t in tables]
        for tables in answered
    ]
    completions, scores, prompts = (pl.concat(parts) for parts in zip(*few, strict=True))
    return completions, scores, prompts


def _scores_of(answered: Iterable[Tables], pairs: pl.DataFrame) -> pl.DataFrame:
    """All scores of the answers of pairs."""
    sides = (pairs.select("prompt_id", sample=f"{s}_sample") for s in ("chosen", "rejected"))
    keys = pl.concat(sides).unique()
    return pl.concat(scores.join(keys, on=KEY, how="semi") for _, scores, _ in answered)


def _interval(table: pl.DataFrame, column: str, resamples: int, seed: int) -> Interval:
    """Mean of a column with its 95% interval over clusters.

    Among many clusters the mean is normal and the bootstrap would take minutes to say the same.
    """
    values, clusters = table[column].to_numpy(), table["cluster"].to_list()
    if table["cluster"].n_unique() <= _BOOTSTRAPPED:
        return cluster_mean(values, clusters, resamples, seed)
    mean, half = (
        float(values.mean()),
        float(stats.norm.ppf(0.975)) * standard_error(values, clusters),
    )
    return Interval(mean, mean - half, mean + half)


def _less(then: float | None, now: float | None) -> float | None:
    return None if then is None or now is None else then - now
