"""Selection shard by shard: what `select_pairs` does with all answers at once.

A folder is as a round leaves it: `completions/` and `scores/` with Parquet parts of the same names,
where parts of one name hold all answers to some prompts and all their scores, and
`prompts.parquet`. What shards give adds up (`NoiseSums`, `Counts`) or is put together (pairs), so
pairs and funnel don't depend on how parts are shared out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import polars as pl

from rlhf.candidates import KEY, check_listed, checked_candidates
from rlhf.errors import InputError
from rlhf.files import read_parquet
from rlhf.funnel import Counts
from rlhf.noise import Noise, NoiseSums, noise_from, noise_sums, settled
from rlhf.rules import Rules
from rlhf.selection import Selected, Tables, capped, funnel_of, pairs_table, part_of
from rlhf.types import COMPLETIONS, SCORES

SHARD_COMPLETIONS = 20_000
"""So many are one shard: with their tokens and scores some hundred megabytes in memory, whatever
they are compressed to."""
PAIR = ("prompt_id", "chosen_sample", "rejected_sample")
"""What tells the pairs of a table apart, and sorts it."""

_PROMPTS = pl.Schema(dict.fromkeys(("prompt_id", "category", "cluster", "prompt"), pl.String))
# Behaviour log-probs and judges' words take room and select nothing.
_ANSWERS = pl.Schema({n: t for n, t in COMPLETIONS.items() if n != "logps"})
_SCORES = pl.Schema({n: t for n, t in SCORES.items() if n not in ("spread", "reason")})


@dataclass(frozen=True, slots=True)
class Shard:
    """Some prompts: files that hold all their answers, and all scores of these."""

    completions: tuple[Path, ...]
    scores: tuple[Path, ...]
    prompts: Path
    """A file that lists these prompts, and others."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What the whole needs to know of a shard's pairs."""

    prompt_ids: pl.Series
    """Each of the shard's prompts once."""
    counts: Counts
    pairs: pl.DataFrame
    """What `capped` looks at: prompt_id, category, margin, sample_c, sample_r."""


def shards_of(folder: Path, size: int = SHARD_COMPLETIONS) -> list[Shard]:
    """The folder's parts, in order, as shards of at most `size` completions; a larger part is one.

    Raises:
        InputError: something is missing, parts don't match, or a file has other columns.
    """
    prompts = folder / "prompts.parquet"
    completions, scores = (_parts(folder / name) for name in ("completions", "scores"))
    names = [[path.name for path in parts] for parts in (completions, scores)]
    if unmatched := sorted(set(names[0]) ^ set(names[1])):
        raise InputError(
            f"{folder} must have a part of scores for each part of completions, and "
            f"{unmatched[0]} is in one of them only"
        )
    wanted = ((completions, _ANSWERS), (scores, _SCORES), ([prompts], _PROMPTS))
    for paths, schema in wanted:
        for path in paths:
            _check_columns(path, schema)
    pairs = zip(completions, scores, strict=True)
    groups = _packed([(c, s, _rows(c)) for c, s in pairs], size)
    return [Shard(tuple(c), tuple(s), prompts) for c, s in groups]


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers in files; whoever iterates has the tables of one shard after another in memory."""

    shards: Sequence[Shard]

    def __iter__(self) -> Iterator[Tables]:
        return map(read, self.shards)

    def completions(self, keys: pl.DataFrame) -> pl.DataFrame:
        """Whole rows (schema `COMPLETIONS`) of some answers, by prompt_id and sample."""
        parts = (path for shard in self.shards for path in shard.completions)
        return pl.concat(read_parquet(part).join(keys, on=KEY, how="semi") for part in parts)


def fresh(shards: Sequence[Shard], oldest: int) -> tuple[list[Shard], int]:
    """Without the parts whose answers are of a policy version before `oldest`; how many answers
    are in those."""
    kept, stale = [], 0
    for shard in shards:
        completions, scores = list[Path](), list[Path]()
        for answers, judged in zip(shard.completions, shard.scores, strict=True):
            versions = pl.read_parquet(
                answers, columns=["policy_version"], glob=False, hive_partitioning=False
            )["policy_version"]
            if (versions < oldest).any():
                stale += versions.len()
            else:
                completions.append(answers)
                scores.append(judged)
        if completions:
            kept.append(Shard(tuple(completions), tuple(scores), shard.prompts))
    return kept, stale


def read(shard: Shard) -> Tables:
    """A shard's tables, without what selects nothing."""
    completions = pl.read_parquet(
        list(shard.completions), columns=list(_ANSWERS), glob=False, hive_partitioning=False
    )
    scores = pl.read_parquet(
        list(shard.scores), columns=list(_SCORES), glob=False, hive_partitioning=False
    )
    ids = completions["prompt_id"].unique()
    listed = pl.scan_parquet(shard.prompts, glob=False, hive_partitioning=False).select(
        list(_PROMPTS)
    )
    return completions, scores, listed.filter(pl.col("prompt_id").is_in(ids.implode())).collect()


def in_turn(shards: Sequence[Shard], given: Rules, round: int) -> Selected:
    """`select_pairs` of all shards, with one of them in memory at a time. Where there is a cap they
    are gone through once more, so that no pair is held that it takes out.

    Raises what `select_pairs` does, with InputError for what is wrong with the tables.
    """
    check_prompts(shards[0].prompts)
    rules = settled(given, lambda: noise(shards, given))
    again = rules.max_pairs is not None and len(shards) > 1
    summaries, held = list[Summary](), list[pl.DataFrame]()
    for shard in shards:
        summary, pairs = shard_pairs(shard, rules, round)
        summaries.append(summary)
        if not again:
            held.append(pairs)
    keys, funnel = together(summaries, shards[0].prompts.parent, rules)
    tables = (shard_pairs(shard, rules, round)[1] for shard in shards) if again else held
    kept = pl.concat(table.join(keys, on=list(PAIR), how="semi") for table in tables)
    return Selected(kept.sort(PAIR), funnel)


def noise(shards: Sequence[Shard], rules: Rules) -> Noise:
    """`noise_of` all shards. Raises InputError where their tables are not sound."""
    return noise_from(reduce(add, (shard_noise(shard, rules) for shard in shards)), rules)


def shard_noise(shard: Shard, rules: Rules) -> NoiseSums:
    """What `noise_from` needs of a shard. Raises InputError where its tables are not sound."""
    _, scores, candidates, _ = _checked(shard, rules)
    return noise_sums(scores, candidates, rules)


def shard_pairs(shard: Shard, rules: Rules, round: int) -> tuple[Summary, pl.DataFrame]:
    """A shard's pairs before the cap (schema `pairs_schema(rules.needed)`), and what they come to;
    `rules.min_margin` is settled.

    Raises InputError where its tables are not sound.
    """
    completions, scores, candidates, prompts = _checked(shard, rules)
    with _sound(shard.completions[0]):
        part = part_of(candidates, completions, scores, prompts, rules, round)
    light = part.pairs.select("prompt_id", "category", "margin", "sample_c", "sample_r")
    summary = Summary(completions["prompt_id"].unique(), part.counts, light)
    return summary, pairs_table(part.pairs, completions, rules)


def together(
    summaries: Sequence[Summary], folder: Path, rules: Rules
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The columns `PAIR` of the pairs that the cap leaves, sorted by them, and the funnel.

    Raises:
        InputError: a prompt is in two shards.
    """
    _check_apart(pl.concat(s.prompt_ids for s in summaries), folder)
    kept = capped(pl.concat(s.pairs for s in summaries), rules.max_pairs)
    counts = reduce(add, (s.counts for s in summaries))
    named = {"sample_c": "chosen_sample", "sample_r": "rejected_sample"}
    return kept.rename(named).select(PAIR), funnel_of(counts, kept, rules)


def check_prompts(path: Path) -> None:
    """`check_listed` of a file of prompts, with InputError."""
    with _sound(path):
        check_listed(
            pl.read_parquet(
                path, columns=["prompt_id", "category"], glob=False, hive_partitioning=False
            )
        )


def _checked(
    shard: Shard, rules: Rules
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Completions, scores, candidates and prompts."""
    completions, scores, prompts = read(shard)
    with _sound(shard.completions[0]):
        candidates = checked_candidates(completions, scores, prompts, rules)
    return completions, scores, candidates, prompts


@contextmanager
def _sound(where: Path) -> Iterator[None]:
    """Tables that are not sound were given by the user, who is told where."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _check_apart(prompt_ids: pl.Series, folder: Path) -> None:
    if twice := prompt_ids.filter(prompt_ids.is_duplicated()).sort().to_list():
        raise InputError(
            f"{folder} must have all answers to a prompt in one part, and prompt {twice[0]!r} is "
            "in several; sort its completions and its scores by prompt_id and split both at the "
            "same prompts"
        )


def _parts(folder: Path) -> list[Path]:
    parts = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    if not parts:
        raise InputError(
            f"{folder} must be a folder of Parquet parts, as a round's completions and scores are"
        )
    return parts


def _check_columns(path: Path, schema: pl.Schema) -> None:
    try:
        found = pl.read_parquet_schema(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} must be a Parquet file: {error}") from None
    for name, dtype in schema.items():
        if found.get(name) != dtype:
            raise InputError(f"{path} must have {name} as {dtype}, got {found.get(name, 'none')}")


def _rows(path: Path) -> int:
    count: int = (
        pl.scan_parquet(path, glob=False, hive_partitioning=False).select(pl.len()).collect().item()
    )
    return count


def _packed(
    parts: Sequence[tuple[Path, Path, int]], size: int
) -> Iterator[tuple[list[Path], list[Path]]]:
    """Neighbouring parts together, up to `size` completions, which are counted beside them."""
    completions: list[Path] = []
    scores: list[Path] = []
    total = 0
    for answers, judged, count in parts:
        if completions and total + count > size:
            yield completions, scores
            completions, scores, total = [], [], 0
        completions.append(answers)
        scores.append(judged)
        total += count
    yield completions, scores
