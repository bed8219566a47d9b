"""Scored completions to pairs and funnel: pairloop (Polars) beside DuckDB and pandas.

    pip install '.[benchmarks]'
    python benchmarks/selection.py                  # 100 thousand, 1 million, 10 million
    python benchmarks/selection.py --rows 1000000 --json

Prompts have 8 completions each, scored on four dimensions, with ties, equal and empty texts,
cut-off answers and abstentions. Each contestant runs in a process of its own, reads the same
Parquet files, and writes the pairs with their texts and token ids, and the funnel. Seconds are from
the first read to the last write; processor time, which other work on the machine disturbs less, and
peak memory are those of the whole process. Pairs and funnel must be equal
to pairloop's before a number is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlhf.rules import Rules
from rlhf.selection import select_pairs
from rlhf.types import COMPLETIONS, SCORES

SAMPLES = 8
CONTESTANTS = ("pairloop", "duckdb", "pandas")
RULES = Rules(
    weights={"correctness": 0.4, "groundedness": 0.2, "problem_solution": 0.3, "style": 0.1},
    floors={"correctness": 0.6, "groundedness": 0.55, "problem_solution": 0.6},
    protected={"correctness": 0.0, "problem_solution": 0.0},
    min_margin=0.05,
)
COMPARED = ("prompt_id", "category", "cluster", "prompt", "chosen", "rejected", "chosen_sample",
            "rejected_sample", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids",
            "reward_chosen", "reward_rejected", "margin")  # fmt: skip
_BLOCK_PROMPTS = 125_000
_GIB = 2**30
FLOATS = pl.List(pl.Float64)


@dataclass(frozen=True, slots=True)
class Result:
    """What a contestant took: seconds by the clock and of all cores together, peak memory of its
    process in bytes, and the pairs that it made."""

    contestant: str
    rows: int
    seconds: float
    cpu_seconds: float
    peak: int
    pairs: int


def write_data(folder: Path, rows: int, seed: int = 0) -> None:
    """completions, scores and prompts as Parquet: `rows` completions, 8 a prompt."""
    prompts = rows // SAMPLES
    ids = pl.format("prompt-{}", pl.int_range(prompts).cast(pl.String).str.zfill(8))
    about = pl.select(
        ids.alias("prompt_id"),
        category=pl.format("category {}", pl.int_range(prompts) % 7),
        cluster=pl.format("cluster {}", pl.int_range(prompts) // 3),
        prompt=pl.format("What became of order {}?", pl.int_range(prompts)),
    )
    about.write_parquet(folder / "prompts.parquet")
    for name in ("completions", "scores"):
        (folder / name).mkdir()
    for block, start in enumerate(range(0, prompts, _BLOCK_PROMPTS)):
        rng = np.random.default_rng((seed, block))
        few = about["prompt_id"].slice(start, _BLOCK_PROMPTS)
        answers = _answers(few, rng)
        answers.write_parquet(folder / f"completions/part-{block:05d}.parquet")
        _scores(answers, rng).write_parquet(folder / f"scores/part-{block:05d}.parquet")


def _answers(ids: pl.Series, rng: np.random.Generator) -> pl.DataFrame:
    count = len(ids) * SAMPLES
    sample = np.tile(np.arange(SAMPLES, dtype=np.int32), len(ids))
    # One in twenty answers repeats the one before it, one in a hundred has no text.
    written = np.where((rng.random(count) < 0.05) & (sample > 0), sample - 1, sample)
    table = pl.DataFrame(
        {
            "prompt_id": ids.gather(np.repeat(np.arange(len(ids)), SAMPLES)),
            "sample": sample,
            "written": written,
            "empty": rng.random(count) < 0.01,
            "finish_reason": np.where(rng.random(count) < 0.1, "length", "stop"),
            "policy_version": np.ones(count, np.int32),
        }
    )
    text = pl.format(
        " Answer {} to {}: your order has left our house and is on its way.\n",
        "written",
        "prompt_id",
    )
    token = pl.col("written").cast(pl.Int32)
    return table.with_columns(
        text=pl.when("empty").then(pl.lit(" \n")).otherwise(text),
        token_ids=pl.concat_list([token * 17 + i for i in range(12)]),
        prompt_token_ids=pl.concat_list([pl.lit(i, pl.Int32) for i in range(6)]),
        logps=pl.concat_list([pl.lit(-0.5, pl.Float32)] * 12),
    ).select(pl.col(n).cast(t) for n, t in COMPLETIONS.items())


def _scores(answers: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """By answer, then dimension, as judges give them; on a grid of 0.05, 1 in 100 abstained."""
    dimensions = sorted(RULES.weights)
    count = answers.height * len(dimensions)
    score = pl.Series(rng.binomial(20, 0.6, count) / 20)
    abstained = pl.Series(rng.random(count) < 0.01)
    at = np.repeat(np.arange(answers.height), len(dimensions))
    return answers[at].select(
        "prompt_id",
        "sample",
        judge=pl.lit("house"),
        dimension=pl.Series(np.tile(np.array(dimensions), answers.height)),
        score=pl.when(~abstained).then(score),
        votes=pl.when(~abstained).then(pl.concat_list(score)).otherwise(pl.lit([], FLOATS)),
        spread=pl.when(~abstained).then(0.0),
        abstained=abstained,
        reason=pl.when(abstained).then(pl.lit("the judge said nothing")),
    ).select(pl.col(n).cast(t) for n, t in SCORES.items())  # fmt: skip


def pairloop(folder: Path) -> tuple[int, dict[str, Any]]:
    """`select_pairs` of all answers at once, which a round calls for a shard at a time."""
    completions, scores = (
        pl.read_parquet(folder / name / "*.parquet") for name in ("completions", "scores")
    )
    prompts = pl.read_parquet(folder / "prompts.parquet")
    selected = select_pairs(completions, scores, prompts, RULES)
    selected.pairs.write_parquet(folder / "pairloop.parquet")
    return selected.pairs.height, selected.funnel


def compete(contestant: str, folder: Path) -> None:
    """Run one contestant in this process; leaves pairs and funnel in `folder`, prints a Result."""
    if contestant != "pairloop":
        import selection_rivals
    started, before = time.perf_counter(), time.process_time()
    select = pairloop if contestant == "pairloop" else getattr(selection_rivals, contestant)
    pairs, funnel = select(folder)
    (folder / f"{contestant}.json").write_text(json.dumps(funnel))
    seconds = time.perf_counter() - started
    cpu = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak": peak, "pairs": pairs}))


def check_equal(folder: Path, rival: str) -> None:
    """Raises AssertionError where a rival's pairs or funnel are not pairloop's."""
    ours, theirs = (
        pl.read_parquet(folder / f"{name}.parquet", columns=list(COMPARED))
        .select(COMPARED)
        .sort("prompt_id")
        for name in ("pairloop", rival)
    )
    exact = pl.exclude("margin", "reward_chosen", "reward_rejected")
    types = ours.schema
    theirs = theirs.select(pl.col(n).cast(t) for n, t in types.items())
    assert ours.select(exact).equals(theirs.select(exact)), f"{rival} made other pairs"
    for name in ("margin", "reward_chosen", "reward_rejected"):
        gap = (ours[name] - theirs[name]).abs().max()
        assert gap is None or gap < 1e-9, f"{rival} found another {name}"
    funnels = [json.loads((folder / f"{name}.json").read_text()) for name in ("pairloop", rival)]
    counts = [
        {
            "steps": [(s["step"], s["completions"], s["prompts"]) for s in funnel["steps"]],
            **{k: funnel[k] for k in ("alone", "yield", "unusable_scores")},
        }
        for funnel in funnels
    ]
    assert counts[0] == counts[1], f"{rival} counted another funnel: {counts[1]}, not {counts[0]}"


def race(rows: int, contestants: Sequence[str], folder: Path, timeout: float) -> list[Result]:
    """Every contestant on the same data, each checked against pairloop."""
    write_data(folder, rows)
    results = []
    for contestant in contestants:
        command = [sys.executable, __file__, "--compete", contestant, "--folder", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
        )
        results.append(Result(contestant, rows, **json.loads(done.stdout)))
        if contestant != "pairloop":
            check_equal(folder, contestant)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one contestant")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--compete", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compete:
        compete(given.compete, given.folder)
        return
    contestants = ["pairloop", *(c for c in given.contestants if c != "pairloop")]
    results = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            results += race(rows, contestants, Path(folder), given.timeout)
    if given.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    print("  completions contestant   seconds    cpu s  peak GiB     pairs")
    for r in results:
        spent = f"{r.seconds:>9.1f} {r.cpu_seconds:>8.1f} {r.peak / _GIB:>9.2f}"
        print(f"{r.rows:>13,} {r.contestant:<10} {spent} {r.pairs:>9,}")


if __name__ == "__main__":
    main()
