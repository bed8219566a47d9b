"""What `benchmarks/selection.py` measures pairloop against: the same selection by other means.

Each function reads the folder's Parquet files, writes its pairs beside them, and returns their
number and the funnel. Written as one would write them by hand, with the rules of the benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = {"correctness": 0.4, "groundedness": 0.2, "problem_solution": 0.3, "style": 0.1}
FLOORS = {"correctness": 0.6, "groundedness": 0.55, "problem_solution": 0.6}
PROTECTED = ("correctness", "problem_solution")
MARGIN = 0.05
CHOSEN_STEPS = ("non-empty", "scored", "complete", *(f"floor {d}" for d in FLOORS))
PAIR_STEPS = ("different answer", *(f"protected {d}" for d in PROTECTED), "margin")

_CANDIDATES = """
create table wide as
select prompt_id, sample, {columns} from scores group by prompt_id, sample;

create table candidates as
select c.rowid as place, dense_rank() over (order by prompt_id) as p, c.prompt_id, c.sample,
    {dimensions},
    length(trim(c.text, ' \n\t')) > 0 and len(c.token_ids) > 0 as filled,
    {present} as scored,
    c.finish_reason = 'stop' as complete,
    {floors},
    round({reward}, 12) as reward,
    trim(c.text, ' \n\t') as text, c.token_ids as ids
from completions c left join wide using (prompt_id, sample);

create table pairs as
select *, case when not h0 then 0 when not h1 then 1 when not h2 then 2 when not h3 then 3
    else 4 end as depth
from (
    select c.p, c.place as c, r.place as r, c.sample as sample_c, r.sample as sample_r,
        c.reward as reward_c, r.reward as reward_r, round(c.reward - r.reward, 12) as margin,
        c.text <> r.text and c.ids <> r.ids as h0,
        round(c.correctness - r.correctness, 12) >= 0 as h1,
        round(c.problem_solution - r.problem_solution, 12) >= 0 as h2,
        round(c.reward - r.reward, 12) > 0 and round(c.reward - r.reward, 12) >= {margin} as h3
    from candidates c join candidates r on c.p = r.p and c.place <> r.place
    where c.filled and c.scored and c.complete and {all_floors} and r.filled and r.scored
);

create table best as
select p, first(c order by margin desc, sample_c, sample_r) as c,
    first(r order by margin desc, sample_c, sample_r) as r from pairs where depth = 4 group by p;
"""

_PAIRS = """
copy (
    select chosen.prompt_id, category, cluster, prompt, chosen.text as chosen,
        rejected.text as rejected, chosen.sample as chosen_sample,
        rejected.sample as rejected_sample, chosen.prompt_token_ids,
        chosen.token_ids as chosen_token_ids, rejected.token_ids as rejected_token_ids,
        c.reward as reward_chosen, r.reward as reward_rejected,
        round(c.reward - r.reward, 12) as margin
    from best
    join candidates c on c.place = best.c join candidates r on r.place = best.r
    join completions chosen on chosen.rowid = best.c
    join completions rejected on rejected.rowid = best.r
    join prompts on prompts.prompt_id = chosen.prompt_id
    order by chosen.prompt_id
) to '{target}' (format parquet);
"""


def duckdb(folder: Path) -> tuple[int, dict[str, Any]]:
    """In memory, on all cores."""
    import duckdb as database

    connection = database.connect(config={"threads": os.cpu_count() or 1, "memory_limit": "18GB"})
    connection.execute(f"set temp_directory = '{folder}/spilled'")
    for name in ("completions", "scores", "prompts"):
        parts = f"{folder}/{name}.parquet" if name == "prompts" else f"{folder}/{name}/*.parquet"
        connection.execute(f"create table {name} as from read_parquet('{parts}')")
    usable = "not abstained and isfinite(score) and score between 0 and 1"
    query = _CANDIDATES.format(
        columns=", ".join(
            f"max(score) filter (dimension = '{d}' and {usable}) as {d}" for d in WEIGHTS
        ),
        dimensions=", ".join(WEIGHTS),
        present=" and ".join(f"{d} is not null" for d in WEIGHTS),
        floors=", ".join(f"round({d}, 12) >= {f} as floor_{d}" for d, f in FLOORS.items()),
        reward=" + ".join(f"{w} * {d}" for d, w in WEIGHTS.items()),
        all_floors=" and ".join(f"c.floor_{d}" for d in FLOORS),
        margin=MARGIN,
    )
    connection.execute(query)
    connection.execute(_PAIRS.format(target=folder / "duckdb.parquet"))

    def row(select: str) -> tuple[int, ...]:
        found: tuple[int, ...] | None = connection.execute(select).fetchone()
        assert found is not None
        return found

    holds = ["filled", "scored", "complete", *(f"floor_{d}" for d in FLOORS)]
    steps = [
        row(f"select count(*), count(distinct p) from candidates where {' and '.join(upto)}")
        for upto in (["true", *holds[:i]] for i in range(len(holds) + 1))
    ]
    reached = "(select p, c, max(depth) as depth from pairs group by p, c)"
    steps += [
        row(f"select count(*), count(distinct p) from {reached} where depth >= {i}")
        for i in range(1, 5)
    ]
    (pairs,) = row("select count(*) from best")
    extremes = """
        select p, first(place order by reward desc, sample) as c,
            first(place order by reward, sample) as r
        from candidates where filled and scored group by p"""
    (both,) = row(f"select count(*) from pairs semi join ({extremes}) using (c, r) where depth = 4")
    return pairs, _funnel(
        steps,
        pairs,
        row(f"select count(*), {_failing(holds)} from candidates"),
        row(f"select count(*), {_failing(f'h{i}' for i in range(4))} from pairs where margin >= 0"),
        both,
        {
            d: dict(zip(("abstained", "invalid", "missing"), row(
                f"select sum(abstained::int), sum((not abstained and not ({usable}))::int), "
                f"(select count(*) from completions) - count(*) from scores where dimension = '{d}'"
            ), strict=True))
            for d in WEIGHTS
        },
    )  # fmt: skip


def _failing(flags: Iterable[str]) -> str:
    return ", ".join(f"count(*) filter (not {flag})" for flag in flags)


def _funnel(
    steps: list[tuple[int, ...]],
    pairs: int,
    completions_alone: tuple[int, ...],
    pairs_alone: tuple[int, ...],
    both: int,
    unusable: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Counts in the shape of pairloop's funnel."""
    names = ("generated", *CHOSEN_STEPS, *PAIR_STEPS, "one pair a prompt", "cap")
    counts = [*steps, (pairs, pairs), (pairs, pairs)]
    return {
        "steps": [
            {"step": name, "completions": int(completions), "prompts": int(prompts)}
            for name, (completions, prompts) in zip(names, counts, strict=True)
        ],
        "alone": {
            "completions": _named(CHOSEN_STEPS, completions_alone),
            "pairs": _named(PAIR_STEPS, pairs_alone),
        },
        "yield": {"largest_admissible": pairs, "best_and_worst_then_filter": both},
        "unusable_scores": unusable,
    }


def _named(steps: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("considered", *steps), map(int, counts), strict=True))


def pandas(folder: Path) -> tuple[int, dict[str, Any]]:
    """Arrow-backed frames; pairs in blocks of prompts, since all at once don't fit."""
    import pandas as pd
    import pyarrow.parquet as pq

    read = {"dtype_backend": "pyarrow"}
    completions = pd.read_parquet(folder / "completions", **read)
    columns = ["prompt_id", "sample", "dimension", "score", "abstained"]
    scores = pd.read_parquet(folder / "scores", columns=columns, **read)
    prompts = pd.read_parquet(folder / "prompts.parquet", **read)
    abstained = scores["abstained"].to_numpy(bool)
    raw = scores["score"].to_numpy(float, na_value=np.nan)
    valid = ~abstained & np.isfinite(raw) & (raw >= 0) & (raw <= 1)
    scores = scores.assign(score=np.where(valid, raw, np.nan))
    wide = completions[["prompt_id", "sample"]]
    unusable = {}
    for d in WEIGHTS:
        of = (scores["dimension"] == d).to_numpy(bool)
        unusable[d] = {
            "abstained": int((abstained & of).sum()),
            "invalid": int((~abstained & ~valid & of).sum()),
            "missing": len(completions) - int(of.sum()),
        }
        one = scores.loc[of, ["prompt_id", "sample", "score"]].rename(columns={"score": d})
        wide = wide.merge(one, on=["prompt_id", "sample"], how="left")
    del scores
    light = pd.DataFrame({d: wide[d].to_numpy(float, na_value=np.nan) for d in WEIGHTS})
    light["p"] = pd.factorize(completions["prompt_id"], sort=True)[0]
    light["sample"] = completions["sample"].to_numpy(int)
    light["place"] = np.arange(len(light))
    text = completions["text"].str.strip()
    lengths = pq.read_table(folder / "completions", columns=["token_ids"])["token_ids"]
    light["text"] = pd.factorize(text)[0]
    light["ids"] = _list_codes(lengths.combine_chunks())
    filled = (text.str.len() > 0).to_numpy(bool)
    light["reward"] = sum(w * light[d] for d, w in WEIGHTS.items()).round(12)
    scored = light[list(WEIGHTS)].notna().all(axis=1).to_numpy()
    complete = (completions["finish_reason"] == "stop").to_numpy(bool)
    floors = [(light[d].round(12) >= f).to_numpy() for d, f in FLOORS.items()]
    holds = [filled, scored, complete, *floors]
    steps, left = [(len(light), light["p"].nunique())], np.ones(len(light), bool)
    for held in holds:
        left = left & held
        steps.append((int(left.sum()), light["p"][left].nunique()))
    light = light.assign(usable=filled & scored, eligible=left).sort_values(["p", "sample"])
    blocks = [_pandas_block(block) for _, block in light.groupby(light["p"] // 50_000)]
    counts = np.sum([block[1] for block in blocks], axis=0)
    best = pd.concat([block[0] for block in blocks])
    chosen, rejected = (completions.take(best[side].to_numpy()) for side in ("c", "r"))
    table = pd.DataFrame(
        {
            "prompt_id": chosen["prompt_id"].array,
            "chosen": chosen["text"].array,
            "rejected": rejected["text"].array,
            "chosen_sample": chosen["sample"].array,
            "rejected_sample": rejected["sample"].array,
            "prompt_token_ids": chosen["prompt_token_ids"].array,
            "chosen_token_ids": chosen["token_ids"].array,
            "rejected_token_ids": rejected["token_ids"].array,
            "reward_chosen": best["reward_c"].array,
            "reward_rejected": best["reward_r"].array,
            "margin": best["margin"].array,
        }
    )
    table.merge(prompts, on="prompt_id", how="left").to_parquet(folder / "pandas.parquet")
    # A floor is not failed where there is no score.
    below = [int((light[d].round(12) < f).sum()) for d, f in FLOORS.items()]
    alone = (len(light), *(int((~held).sum()) for held in holds[:3]), *below)
    steps += [(int(counts[2 * i]), int(counts[2 * i + 1])) for i in range(4)]
    return len(best), _funnel(
        steps, len(best), alone, tuple(counts[8:13]), int(counts[13]), unusable
    )


def _list_codes(lists: Any) -> Any:
    """Equal numbers for equal lists: a polynomial hash modulo 2^64 of each, with its length."""
    values = lists.flatten().to_numpy().astype(np.uint64)
    offsets = lists.offsets.to_numpy()
    lengths = np.diff(offsets)
    place = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(int(lengths.max(initial=1)), 0x9E3779B97F4A7C15, np.uint64))
        terms = (values + np.uint64(1)) * powers[place]
        sums = np.add.reduceat(terms, offsets[:-1] - offsets[0])
    return sums + lengths.astype(np.uint64)


def _pandas_block(block: Any) -> tuple[Any, list[int]]:
    """The best pairs of some prompts, and 14 counts: completions and prompts of each of four steps,
    pairs ahead and failing each step, prompts whose best and worst make a pair."""
    columns = ["p", "place", "sample", "reward", "text", "ids", *PROTECTED]
    usable = block.loc[block["usable"], columns]
    pairs = block.loc[block["eligible"], columns].merge(usable, on="p", suffixes=("_c", "_r"))
    pairs = pairs[pairs["place_c"] != pairs["place_r"]]
    margin = (pairs["reward_c"] - pairs["reward_r"]).round(12)
    held = [
        (pairs["text_c"] != pairs["text_r"]) & (pairs["ids_c"] != pairs["ids_r"]),
        *((pairs[f"{d}_c"] - pairs[f"{d}_r"]).round(12) >= 0 for d in PROTECTED),
        (margin > 0) & (margin >= MARGIN),
    ]
    upto = np.logical_and.accumulate(np.stack([h.to_numpy() for h in held]), axis=0)
    pairs = pairs.assign(margin=margin, depth=upto.sum(axis=0))
    reached = pairs.groupby(["p", "place_c"])["depth"].max().reset_index()
    counts = []
    for i in range(1, 5):
        there = reached[reached["depth"] >= i]
        counts += [len(there), there["p"].nunique()]
    ahead = margin >= 0
    counts += [int(ahead.sum()), *(int((ahead & ~h).sum()) for h in held)]
    admissible = pairs[pairs["depth"] == 4]
    order = ["p", "margin", "sample_c", "sample_r"]
    best = admissible.sort_values(order, ascending=[True, False, True, True]).drop_duplicates("p")
    top = usable.loc[usable.groupby("p")["reward"].idxmax(), ["p", "place"]]
    low = usable.loc[usable.groupby("p")["reward"].idxmin(), ["p", "place"]]
    extremes = top.merge(low, on="p", suffixes=("_c", "_r"))
    counts.append(len(admissible.merge(extremes, on=["p", "place_c", "place_r"])))
    return best.rename(columns={"place_c": "c", "place_r": "r"}), counts
