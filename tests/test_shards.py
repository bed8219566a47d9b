"""Selection and duplicates, shard by shard, are those of all at once: same pairs, same funnel."""

from __future__ import annotations

import gc
import math
import random
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_answers import DIMENSIONS, RULES, Row, answer, many_answers, tables

from rlhf import duplicate_shards, selection_shards
from rlhf.duplicate_shards import Alike, Slice
from rlhf.duplicates import first_of_equals, repeating, standing
from rlhf.errors import InputError
from rlhf.labels import labels_schema, select_labels
from rlhf.noise import NoiseSums, noise_from, noise_sums
from rlhf.rules import Rules
from rlhf.selection import Tables, candidates_of, cold_start, select_pairs
from rlhf.selection_shards import Answered, Shard, in_turn
from rlhf.statistics import exact_sum
from rlhf.yield_analysis import Draw, analyse


def store(
    folder: Path,
    answers: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame],
    parts: Sequence[list[str]],
) -> list[Shard]:
    """Write a folder as a round leaves it, each part with some of the prompts; a shard a part."""
    completions, scores, prompts = answers
    prompts.write_parquet(folder / "prompts.parquet")
    for name, table in (("completions", completions), ("scores", scores)):
        (folder / name).mkdir()
        for number, ids in enumerate(parts):
            few = table.filter(pl.col("prompt_id").is_in(ids))
            few.write_parquet(folder / name / f"part-{number:05d}.parquet")
    return selection_shards.shards_of(folder, 0)


def shared_out(names: Sequence[str], count: int, seed: int) -> list[list[str]]:
    mixed = random.Random(seed).sample(list(names), len(names))
    return [mixed[i::count] for i in range(count)]


many_rules = st.builds(
    Rules,
    weights=st.just(RULES.weights),
    floors=st.dictionaries(st.sampled_from(DIMENSIONS), st.sampled_from([0.5, 0.6])),
    protected=st.dictionaries(st.sampled_from(DIMENSIONS), st.sampled_from([0.0, 0.05])),
    min_margin=st.sampled_from([0.0, 0.05, "auto"]),
    max_pairs=st.sampled_from([None, 1, 2, 3]),
    strategy=st.sampled_from(["largest_margin", "best_random", "adjacent", "all_pairs"]),
    pairs_per_prompt=st.sampled_from([1, 3]),
    length_penalty=st.sampled_from([0.0, 0.1]),
    max_similarity=st.sampled_from([None, 0.9]),
    deterministic=st.just(frozenset({"style"})),
    retest_sd=st.just({"correctness": 0.02, "problem_solution": 0.01}),
    seed=st.integers(0, 3),
)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(many_answers(), many_rules, st.integers(1, 4), st.integers(0, 99))
def test_shards_give_the_pairs_and_the_funnel_of_all(
    rows: list[Row], rules: Rules, count: int, seed: int
) -> None:
    answers = tables(rows)
    expected = outcome(lambda: select_pairs(*answers, rules, round=2))
    with tempfile.TemporaryDirectory() as folder:
        parts = shared_out(answers[2]["prompt_id"].to_list(), count, seed)
        shards = store(Path(folder), answers, parts)
        answered = set(answers[0]["prompt_id"])
        assert len(shards) == count or any(answered.isdisjoint(part) for part in parts)
        assert outcome(lambda: in_turn(shards, rules, round=2)) == expected
        given = Answered(shards)
        assert outcome(lambda: select_labels(given, rules)) == outcome(
            lambda: select_labels([answers], rules)
        )
        if rows:
            start = cold_start([answers], rules)
            # Means are added up in another order.
            assert cold_start(given, rules) == {
                n: value if value is None else pytest.approx(value, abs=1e-12)
                for n, value in start.items()
            }
        if not isinstance(expected[0], type):
            draw = Draw(2, 50)
            pairs = select_pairs(*answers, rules, round=2).pairs
            assert analyse(given, pairs, rules, draw) == analyse([answers], pairs, rules, draw)


def outcome(select: Any) -> tuple[Any, ...]:
    """Rows with their types, and the funnel; or what was refused (a min_margin, for lack of
    trust)."""
    try:
        found = select()
    except Exception as error:
        return type(error), str(error)
    return found.pairs.schema, found.pairs.rows(), found.funnel


def voted(prompts: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Answers of judges with three votes, which sum to no round number; some votes are missing."""
    rng = np.random.default_rng(seed)
    rows = [
        answer(f"{'abc'[i % 3]}{i}", sample, tuple(rng.random(3)), f"text {sample}")
        for i in range(prompts)
        for sample in range(int(rng.integers(2, 6)))
    ]
    completions, scores, about = tables(rows)
    votes = np.clip(
        scores["score"].to_numpy()[:, None] + rng.normal(0, 0.05, (scores.height, 3)), 0, 1
    )
    few = rng.random(scores.height) < 0.1
    judge = np.where(scores["dimension"] == "style", "stylist", "house")
    drawn = [row[:1] if one else row for row, one in zip(votes.tolist(), few, strict=True)]
    return completions, scores.with_columns(
        judge=pl.Series(judge),
        votes=pl.Series(drawn, dtype=pl.List(pl.Float64)),
        score=pl.Series([math.fsum(v) / len(v) for v in drawn]),
    ), about  # fmt: skip


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who selects, labels, analyses or looks at a start lets go of a shard before the next."""
    answers = voted(40, seed=1)
    shards = store(tmp_path, answers, shared_out(answers[2]["prompt_id"].to_list(), 8, 1))
    held: list[list[weakref.ref[pl.DataFrame]]] = []
    alive: list[int] = []

    def reading(shard: Shard) -> Tables:
        gc.collect()
        alive.append(sum(any(table() is not None for table in shard) for shard in held))
        found = read(shard)
        held.append([weakref.ref(table) for table in found])
        return found

    read = selection_shards.read
    monkeypatch.setattr(selection_shards, "read", reading)
    rules = replace(RULES, min_margin="auto", max_inversion=0.2)
    given = Answered(shards)
    pairs = in_turn(shards, rules, round=0).pairs
    select_labels(given, rules)
    cold_start(given, rules)
    monkeypatch.setattr("rlhf.yield_analysis.ANALYSED_PROMPTS", 5)
    assert analyse(given, pairs, rules, Draw(1, 50))["constraints"]["analysed_prompts"] == 5
    # The one that was read before is still a local variable of whoever goes through them.
    assert len(alive) >= 8 * 7 and max(alive) <= 1
    capped, passes = replace(rules, min_margin=0.0, max_pairs=3), len(alive)
    assert in_turn(shards, capped, round=0).pairs.equals(
        select_pairs(*answers, capped, round=0).pairs
    )
    assert len(alive) == passes + 8 * 2, "the second time with the cap"
    labels = select_labels(given, capped).pairs
    assert labels.height == 3 and labels.schema == labels_schema(rules.needed)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 7, 40])
def test_auto_asks_for_the_same_margin_to_the_last_bit(tmp_path: Path, count: int) -> None:
    answers = voted(40, seed=count)
    rules = replace(RULES, min_margin="auto", max_inversion=0.2)
    shards = store(tmp_path, answers, shared_out(answers[2]["prompt_id"].to_list(), count, count))
    expected, found = select_pairs(*answers, rules), in_turn(shards, rules, round=0)
    assert expected.funnel["min_margin"] > 0
    assert found.funnel == expected.funnel
    assert found.pairs.equals(expected.pairs)


def test_votes_of_a_judge_count_only_where_it_voted_on_all_that_it_votes_on_anywhere() -> None:
    """A shard without any vote on style knows of one dimension less, and must not count."""
    completions, scores, _ = voted(6, seed=3)
    scores = scores.with_columns(judge=pl.lit("house"))
    lone = (pl.col("prompt_id") < "b") & (pl.col("dimension") == "style")
    scores = scores.with_columns(votes=pl.when(~lone).then("votes").otherwise(pl.lit([0.5])))

    def sums(few: pl.Expr) -> NoiseSums:
        of, judged = completions.filter(few), scores.filter(few)
        return noise_sums(judged, candidates_of(of, judged, RULES), RULES)

    first = pl.col("prompt_id") < "b"
    assert sums(first).votes["house"].dimensions == ("correctness", "problem_solution")
    whole, parts = sums(pl.lit(True)), sums(first) + sums(~first)
    assert noise_from(parts, RULES) == noise_from(whole, RULES)


@given(st.lists(st.floats(-1e200, 1e200), max_size=30), st.integers(0, 30))
def test_exact_sums_add_up_to_the_last_bit(values: list[float], at: int) -> None:
    parts = exact_sum([*exact_sum(values[:at]), *exact_sum(values[at:])])
    assert sum(map(Fraction, parts)) == sum(map(Fraction, values))
    assert parts == exact_sum(values)


def test_parts_are_shared_out_by_size_and_in_order(tmp_path: Path) -> None:
    answers = tables([answer(f"a{i}", s, (0.9, 0.9, s / 2)) for i in range(6) for s in range(2)])
    store(tmp_path, answers, [[f"a{i}"] for i in range(6)])
    shards = selection_shards.shards_of(tmp_path, 5)
    assert [len(s.completions) for s in shards] == [2, 2, 2]
    assert [p for s in shards for p in s.completions] == sorted(tmp_path.glob("completions/*"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "scores/part-00001.parquet").unlink(), "part of scores for each part"),
        (lambda f: (f / "prompts.parquet").unlink(), r"prompts\.parquet must be a Parquet file"),
        (
            lambda f: pl.read_parquet(f / "completions/part-00000.parquet")
            .drop("text")
            .write_parquet(f / "completions/part-00000.parquet"),
            "must have text as String, got none",
        ),
        (
            lambda f: [
                pl.concat([pl.read_parquet(f / n / f"part-0000{i}.parquet") for i in (0, 1)])
                .write_parquet(f / n / "part-00001.parquet")
                for n in ("completions", "scores")
            ],
            "prompt 'a0' is in several",
        ),
        (
            lambda f: pl.concat([pl.read_parquet(f / "scores/part-00000.parquet")] * 2)
            .write_parquet(f / "scores/part-00000.parquet"),
            r"part-00000\.parquet: prompt 'a0' sample 0 has two scores",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said_with_the_file(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    answers = tables([answer(f"a{i}", s, (0.9, 0.9, s / 2)) for i in range(2) for s in range(2)])
    store(tmp_path, answers, [["a0"], ["a1"]])
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        in_turn(selection_shards.shards_of(tmp_path, 0), RULES, round=0)


def by_slices(slices: Sequence[Slice], rule: Alike) -> pl.DataFrame:
    """What `launch.ray_data.repeating` does, in this process."""
    first = first_of_equals(pl.concat(duplicate_shards.slice_digests(s, rule) for s in slices))
    keys = pl.concat(duplicate_shards.slice_bands(s, first, rule) for s in slices)
    buckets = keys.sample(fraction=1, shuffle=True, seed=0).partition_by("bucket")
    assert len(buckets) <= duplicate_shards.buckets(len(first), rule)
    pairs = pl.concat(duplicate_shards.bucket_pairs(b) for b in buckets).unique()
    wanted = np.unique(pairs.to_numpy())
    for side in ("earlier", "later"):
        texts = [duplicate_shards.slice_texts(s, wanted, rule, side) for s in slices]
        pairs = pairs.join(pl.concat(texts), on=side)
    return standing(first, duplicate_shards.similar(pairs, rule))


def pool(seed: int, count: int = 60) -> pl.DataFrame:
    """Questions about passages; many repeat another, in letters, in case, or but for some words."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
    made: list[dict[str, str | None]] = []
    for _ in range(count):
        text = {"prompt": list(rng.choice(words, 20)), "context": list(rng.choice(words, 30))}
        for name in text:
            if made and rng.random() < 0.7:
                old = made[rng.integers(len(made))][name] or ""
                text[name] = [w if rng.random() < 0.97 else rng.choice(words) for w in old.split()]
        shown = {name: " ".join(kept) for name, kept in text.items()}
        if rng.random() < 0.2:
            shown = {name: said.upper() for name, said in shown.items()}
        made.append({**shown, "context": shown["context"] if rng.random() < 0.8 else None})
    return pl.DataFrame(made).with_row_index("number")


@pytest.mark.slow
@pytest.mark.parametrize("most", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_slices_give_who_stays_of_all(
    tmp_path: Path, most: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicate_shards, "_BUCKET_KEYS", 20)
    records = pool(size)
    records[:25].write_parquet(tmp_path / "a.parquet", row_group_size=4)
    records[25:].write_parquet(tmp_path / "b.parquet")
    slices = sliced(tmp_path, size)
    rule = Alike(("prompt", "context"), most)
    expected = repeating([records["prompt"], records["context"].fill_null("")], most)
    fell = (expected["kept"] != records["number"]).sum()
    assert 0 < fell < records.height
    assert duplicate_shards.whole(slices, rule).equals(expected)
    assert by_slices(slices, rule).equals(expected)
    assert pl.concat(duplicate_shards.records(s) for s in slices).equals(records)


def sliced(folder: Path, size: int) -> list[Slice]:
    """Slices of so many records."""
    whole = duplicate_shards.slices_of(folder)
    return [
        Slice(s.path, start, min(size, s.records - start), s.first + start)
        for s in whole
        for start in range(0, s.records, size)
    ]


def test_slices_follow_the_size_and_cover_all(tmp_path: Path) -> None:
    records = pool(0)
    records[:25].write_parquet(tmp_path / "a.parquet")
    records[25:].write_parquet(tmp_path / "b.parquet")
    slices = duplicate_shards.slices_of(tmp_path, 10)
    assert [s.records for s in slices] == [10, 10, 5, 10, 10, 10, 5]
    assert pl.concat(duplicate_shards.records(s) for s in slices).equals(records)
    assert [s.first for s in slices] == list(np.cumsum([0, *(s.records for s in slices)])[:-1])
