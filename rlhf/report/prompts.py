"""The browser of prompts: which prompts the page holds, and all their answers as JSON.

A page that anyone can open must stay small, so a large run is sampled: what matters most is kept
first (prompts that got worse, prompts with a likeliest answer, the largest and smallest margins),
then a random rest, fixed by the prompts' ids. The page says what it left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from rlhf.document import encoded
from rlhf.evaluation import AUDIT_PREFIX
from rlhf.report.answers import (
    TEXT_LIMIT,
    answers_of,
    dimension_keys,
    drawn,
    mark_pairs,
    pairs_of,
    short,
    shortened,
)
from rlhf.report.data import reader_version
from rlhf.run_view import RoundView, RunView

BUDGET = 8_000_000
"""Bytes of JSON."""
EXTREMES = 20
"""Largest margins of a round that are always kept, and as many of the smallest."""
GATE = "gate"

# Tier -> what its prompts are, and the share of the budget that they may take before the rest.
_TIERS = (
    ("that got worse", 0.5),
    ("with a likeliest answer before and after", 0.15),
    ("with the largest and smallest margins", 0.2),
    ("drawn at random", 0.0),
)
_OVERHEAD = 160
_DECIMALS = 12


@dataclass(frozen=True, slots=True)
class Kept:
    """How many prompts of a kind the page holds, of how many."""

    kind: str
    shown: int
    total: int


@dataclass(frozen=True, slots=True)
class Browser:
    """The page's JSON and what it leaves out; `completions` counts the answers of all prompts."""

    json: str
    shown: int
    total: int
    completions: int
    kept: tuple[Kept, ...]
    categories: tuple[str, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """What a split's entries are made of; tables are None where nothing was stored."""

    split: str
    prompts: pl.LazyFrame | None
    answers: tuple[tuple[str, RoundView, str], ...]
    """Title, round, and the name under which completions and scores are stored."""
    greedy: bool


def browser(run: RunView, budget: int = BUDGET) -> Browser | None:
    """The prompts that fit, or None where nothing was sampled yet."""
    sources = list(_sources(run))
    if not sources:
        return None
    index = _ranked(pl.concat([_index(source) for source in sources]))
    # By the size of their texts first, then by what their JSON really takes.
    built = _built(run, sources, _allotted(index, budget))
    taken = _allotted(built, budget).select("split", "prompt_id", "json")
    index = _ordered(index.join(taken, on=["split", "prompt_id"], how="left"))
    there = index.drop_nulls("json")
    names = [[key, key.removeprefix(AUDIT_PREFIX)] for key in dimension_keys(run)]
    head = encoded({"dimensions": names, "floors": run.config.floors})
    return Browser(
        json=f'{{"about":{head},"entries":[{",".join(there["json"])}]}}',
        shown=there.height,
        total=index.height,
        completions=int(index["answers"].sum()),
        kept=_kept(index),
        categories=tuple(there["category"].unique().sort()),
        splits=tuple(there["split"].unique(maintain_order=True)),
    )


def _built(run: RunView, sources: Sequence[_Source], picked: pl.DataFrame) -> pl.DataFrame:
    """The picked prompts with their JSON, and its size as their bytes."""
    made = {
        (source.split, entry["id"]): encoded(entry)
        for source in sources
        for entry in _entries(run, source, picked.filter(split=source.split))
    }
    texts = [made[key] for key in picked.select("split", "prompt_id").iter_rows()]
    sizes = [len(text.encode()) + 1 for text in texts]
    return picked.with_columns(
        json=pl.Series(texts, dtype=pl.String), bytes=pl.Series(sizes, dtype=pl.Int64)
    )


def _sources(run: RunView) -> Iterator[_Source]:
    version = reader_version(run)
    rounds = {r.index: r for r in run.rounds}
    if run.evaluated and 0 in rounds:
        held_out = [("Start", rounds[0], "evaluation")]
        if version:
            held_out.append((f"Round {version}", rounds[version], "evaluation"))
        if all(drawn(r, name) is not None for _, r, name in held_out):
            yield _Source(GATE, rounds[0].table("prompts"), tuple(held_out), greedy=True)
    for round in run.rounds:
        if round.index and drawn(round, "") is not None:
            answers = (("", round, ""),)
            yield _Source(f"{round.index}", round.table("prompts"), answers, greedy=False)


def _index(source: _Source) -> pl.DataFrame:
    """Split, prompt_id, category, answers (their number), bytes, change, margin, greedy."""
    size = pl.col("text").str.len_bytes().clip(upper_bound=TEXT_LIMIT).sum()
    tables = [drawn(r, place) for _, r, place in source.answers]
    found = (
        pl.concat([t.select("prompt_id", "text") for t in tables if t is not None])
        .group_by("prompt_id")
        .agg(answers=pl.len(), bytes=size.cast(pl.Int64) + _OVERHEAD * pl.len())
        .collect()
    )
    if source.prompts is not None:
        about = source.prompts.select(
            "prompt_id",
            "category",
            own=sum(
                pl.col(c).str.len_bytes().fill_null(0).clip(upper_bound=TEXT_LIMIT).cast(pl.Int64)
                for c in ("prompt", "context", "reference")
            ),
        ).collect()
        found = found.join(about, on="prompt_id", how="left").with_columns(
            bytes=pl.col("bytes") + pl.col("own").fill_null(0)
        )
    else:
        found = found.with_columns(category=pl.lit(None, pl.String))
    last = source.answers[-1][1]
    pairs = None if source.split == GATE else last.table("pairs")
    if pairs is None:
        found = found.with_columns(margin=pl.lit(None, pl.Float64))
    else:
        # A prompt is one entry, however many pairs a strategy makes of it.
        of_prompt = pairs.group_by("prompt_id").agg(
            pl.col("margin").max(), pl.col("category").first().alias("known")
        )
        about = of_prompt.collect()
        found = found.join(about, on="prompt_id", how="left").with_columns(
            category=pl.coalesce("category", "known")
        )
    changed = _changes(source)
    greedy = last.table("greedy/completions") if source.greedy else None
    kept = [] if greedy is None else greedy.select("prompt_id").collect()["prompt_id"].to_list()
    return found.join(changed, on="prompt_id", how="left").select(
        pl.lit(source.split).alias("split"),
        "prompt_id",
        pl.col("category").fill_null("all"),
        pl.col("answers").cast(pl.Int64),
        "bytes",
        "change",
        "margin",
        pl.col("prompt_id").is_in(kept).alias("greedy"),
    )


def _changes(source: _Source) -> pl.DataFrame:
    """Mean reward of each gate prompt now less that at the start, where both are known."""
    tables = [r.table("evaluation/per_prompt") for _, r, _ in source.answers]
    if source.split != GATE or len(tables) < 2 or tables[0] is None or tables[1] is None:
        return pl.DataFrame(schema={"prompt_id": pl.String, "change": pl.Float64})
    start, now = (t.select("prompt_id", "reward") for t in tables if t is not None)
    return (
        now.join(start, on="prompt_id", suffix="_start")
        .select("prompt_id", change=(pl.col("reward") - pl.col("reward_start")).round(_DECIMALS))
        .collect()
    )


def _ranked(index: pl.DataFrame) -> pl.DataFrame:
    """Sorted by tier, and within it by what matters most; `chance` is fixed by split and id."""
    margin = pl.col("margin")
    edge = pl.min_horizontal(
        margin.rank("ordinal", descending=down).over("split") for down in (False, True)
    )
    chance = [
        hashlib.blake2b(f"{split}:{key}".encode(), digest_size=8).hexdigest()
        for split, key in index.select("split", "prompt_id").iter_rows()
    ]
    index = index.with_columns(
        edge=edge,
        chance=pl.Series(chance, dtype=pl.String),
        tier=pl.when(pl.col("change") < 0)
        .then(0)
        .when("greedy")
        .then(1)
        .when(edge <= EXTREMES)
        .then(2)
        .otherwise(3),
    )
    worst = pl.when(pl.col("tier") == 0).then("change")
    outermost = pl.when(pl.col("tier") == 2).then("edge")
    return index.sort("tier", worst, outermost, "chance")


def _allotted(index: pl.DataFrame, budget: int) -> pl.DataFrame:
    """The prompts whose bytes fit: each tier's first up to its share, then a random rest."""
    share = pl.col("tier").replace_strict(dict(enumerate(share for _, share in _TIERS)))
    index = index.with_columns(
        place=pl.int_range(pl.len()),
        first=pl.col("bytes").cum_sum().over("tier") <= share * budget,
    )
    left = budget - int(index.filter("first")["bytes"].sum())
    later = pl.when("first").then(0).otherwise("bytes").cum_sum()
    kept = index.sort("chance", "split").filter(pl.col("first") | (later <= left))
    return kept.sort("place").drop("place", "first")


def _ordered(index: pl.DataFrame) -> pl.DataFrame:
    """As a person reads them: the gate split first, what fell most on top; then each round, the
    largest margin on top."""
    number = pl.col("split").replace(GATE, "0").cast(pl.Int64)
    return index.with_columns(number=number).sort(
        "number", "change", "margin", "prompt_id", descending=[False, False, True, False],
        nulls_last=True,
    )  # fmt: skip


def _kept(index: pl.DataFrame) -> tuple[Kept, ...]:
    counts = {
        tier: (shown, total)
        for tier, shown, total in index.group_by("tier")
        .agg(pl.col("json").count(), pl.len().alias("total"))
        .iter_rows()
    }
    return tuple(
        Kept(kind, *counts[tier]) for tier, (kind, _) in enumerate(_TIERS) if tier in counts
    )


def _entries(run: RunView, source: _Source, rows: pl.DataFrame) -> Iterator[dict[str, Any]]:
    ids = rows["prompt_id"].to_list()
    texts = _texts(source, ids)
    groups = [
        (title, round, answers_of(run, round, place, ids, source.split != GATE))
        for title, round, place in source.answers
    ]
    greedy = [
        answers_of(run, r, "greedy", ids, False) if source.greedy else {}
        for _, r, _ in source.answers
    ]
    pairs = {} if source.split == GATE else pairs_of(source.answers[0][1], ids)
    for row in rows.iter_rows(named=True):
        key = row["prompt_id"]
        entry: dict[str, Any] = {"id": key, "split": source.split, "category": row["category"]}
        entry |= texts.get(key, {})
        if source.split == GATE:
            entry["change"] = short(row["change"])
            entry["groups"] = [
                {"title": title, "answers": answers.get(key, []), "greedy": likeliest.get(key, [])}
                for (title, _, answers), likeliest in zip(groups, greedy, strict=True)
            ]
        else:
            answers = groups[0][2].get(key, [])
            entry |= mark_pairs(answers, pairs.get(key, []))
            entry["groups"] = [{"title": "", "answers": answers, "greedy": []}]
        yield entry


def _texts(source: _Source, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    columns = ["prompt_id", "cluster", "prompt", "context", "reference"]
    table = source.prompts
    if table is None:
        pairs = None if source.split == GATE else source.answers[0][1].table("pairs")
        if pairs is None:
            return {}
        nothing = pl.lit(None, pl.String)
        table = pairs.with_columns(context=nothing, reference=nothing)
    rows = table.filter(pl.col("prompt_id").is_in(list(ids))).select(columns).collect()
    return {
        row.pop("prompt_id"): {k: shortened(v) for k, v in row.items() if v is not None}
        for row in rows.iter_rows(named=True)
    }
