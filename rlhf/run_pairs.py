"""The pairs of answers that a run offers to be labelled, and what its judges said of them.

Each prompt's answers are drawn into disjoint pairs, so that no answer is asked about twice. Strata:

- `category`: the prompt's.
- `band`: the low, middle or high third of [0, 1] that the mean of all scores of both answers is in.
- `disagreement`: `missing` where a judge abstained on one of the answers; `split` where dimensions
  or judges prefer different answers, or a judge's votes on an answer spread further than its scores
  of the two lie apart; else `agreed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from rlhf.blind_sheet import Question, answer_item
from rlhf.candidates import DECIMALS, KEY
from rlhf.errors import InputError
from rlhf.funnel import is_score
from rlhf.run_view import RoundView, RunView

STRATA = ("category", "band", "disagreement")
Split = Literal["train", "gate"]
_PLACES: Mapping[Split, str] = {"train": "", "gate": "evaluation/"}
_ABOUT = ("prompt_id", "category", "prompt", "context", "reference")


@dataclass(frozen=True, slots=True)
class Answers:
    """A run's judged answers.

    `table` has a row an answer: round, prompt_id, category, prompt, context, reference, sample,
    text, tokens. `scores` a row for each judge, dimension and answer: round, prompt_id, sample,
    judge, dimension, score (null where it abstained), spread.
    """

    table: pl.DataFrame
    scores: pl.DataFrame
    rounds: tuple[int, ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What was scored, by name."""
        return tuple(self.scores["dimension"].unique().sort())


@dataclass(frozen=True, slots=True)
class Offer:
    """Candidates for `rlhf.blind_sheet.sample_pairs`, and what fell before."""

    candidates: pl.DataFrame
    answers: int
    prompts: int
    empty: int
    """Answers without text."""
    alike: int
    """Answers with the text of another one to the same prompt."""


def judged_answers(run: RunView, split: Split, round: int | None) -> Answers:
    """The answers of a split that judges have scored, of one round or of all that have them.

    `train`: what pairs are made of, which audit judges don't see. `gate`: held-out answers, which
    they do; the start's are round 0.

    Raises InputError where there are none yet.
    """
    place = _PLACES[split]
    found = [r for r in run.rounds if r.index is not None and _has(r, place)]
    indices = tuple(r.index for r in found if r.index is not None)
    if round is not None and round not in indices:
        have = f"rounds {', '.join(map(str, indices))} have" if indices else "no round has"
        raise InputError(
            f"--round must be one whose {split} answers are scored and kept with their prompts: "
            f"{have} them in {run.folder}, got {round}"
        )
    wanted = [r for r in found if round is None or r.index == round]
    if not wanted:
        raise InputError(
            f"{run.folder} must hold scored answers on the {split} split, with their prompts; no "
            "round has got that far. Try again later, or with --split gate"
        )
    parts = [_round(run, r, place) for r in wanted]
    return Answers(
        pl.concat([table for table, _ in parts]),
        pl.concat([scores for _, scores in parts]),
        tuple(r.index for r in wanted if r.index is not None),
    )


def _prompts(run: RunView, round: RoundView, place: str) -> pl.LazyFrame | None:
    """Held-out prompts are kept once, with the start."""
    return (run.rounds[0] if place else round).table("prompts")


def _has(round: RoundView, place: str) -> bool:
    names = [f"{place}completions", f"{place}scores", *([] if place else ["prompts"])]
    return all(round.table(name) is not None for name in names)


def _round(run: RunView, round: RoundView, place: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    prompts = _prompts(run, round, place)
    completions, scores = (round.table(f"{place}{name}") for name in ("completions", "scores"))
    if prompts is None or completions is None or scores is None:
        raise InputError(
            f"{round.path} must have kept its prompts with their answers; it was made by an older "
            "version: run it again"
        )
    number = pl.lit(round.index, pl.Int32).alias("round")
    table = completions.select(
        number, *KEY, "text", tokens=pl.col("token_ids").list.len().cast(pl.Int64)
    ).join(prompts.select(_ABOUT), on="prompt_id")
    # Compared as selection does: what is no score is null, and never becomes a number.
    known = pl.when(is_score()).then(pl.col("score").round(DECIMALS)).alias("score")
    said = scores.select(number, *KEY, "judge", "dimension", known, "spread")
    return table.collect(), said.collect()


def offered(answers: Answers, dimensions: Sequence[str], seed: int) -> Offer:
    """Pairs of answers to one prompt, each answer in one pair at most; drawn with `seed`.

    Columns: those of `rlhf.blind_sheet.SHOWN`, round, sample_x, sample_y, tokens_x, tokens_y,
    `STRATA` and `preferred`: the sum over judges and dimensions of the sign of their preference for
    `answer_x`, which is the one that more of them prefer. An answer that rounds sampled again
    counts once.
    """
    table = answers.table.sort("round", *KEY)
    text = pl.col("text").str.strip_chars()
    filled = table.filter(text.str.len_bytes() > 0)
    unique = filled.unique(["prompt_id", text], keep="first", maintain_order=True)
    drawn = _matched(unique, seed)
    scores = answers.scores.filter(pl.col("dimension").is_in(list(dimensions)))
    return Offer(
        candidates=_oriented(drawn.join(_told(drawn, scores), on="pair").drop("pair")),
        answers=table.height,
        prompts=table["prompt_id"].n_unique(),
        empty=table.height - filled.height,
        alike=filled.height - unique.height,
    )


def _matched(unique: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Neighbours in a random order of a prompt's answers of one round: a pair each."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, 1)))
    of_prompt = ["round", "prompt_id"]
    placed = (
        unique.with_columns(chance=pl.Series(rng.permutation(unique.height)))
        .sort(*of_prompt, "chance")
        .with_columns(turn=pl.int_range(pl.len()).over(of_prompt))
    )
    own = ("sample", "text", "tokens")
    one, other = (
        placed.filter(pl.col("turn") % 2 == side).with_columns(turn=pl.col("turn") // 2)
        for side in (0, 1)
    )
    return (
        one.drop("chance")
        .join(other.select(*of_prompt, "turn", *own), on=[*of_prompt, "turn"], suffix="_y")
        .sort(*of_prompt, "turn")
        .rename({name: f"{name}_x" for name in own})
        .drop("turn")
        .with_row_index("pair")
    )


def _told(drawn: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Of each pair: its band, its disagreement, and which answer is preferred by how many."""
    by_judge = ["judge", "dimension"]
    kept = scores.join(drawn.select("round", "prompt_id").unique(), on=["round", "prompt_id"])
    sides = [
        drawn.select("pair", "round", "prompt_id", sample=f"sample_{side}")
        .join(kept, on=["round", *KEY], maintain_order="left_right")
        .select("pair", *by_judge, pl.col("score", "spread").name.suffix(f"_{side}"))
        for side in ("x", "y")
    ]
    both = sides[0].join(sides[1], on=["pair", *by_judge], maintain_order="left")
    gap = (pl.col("score_x") - pl.col("score_y")).round(DECIMALS)
    noisy = pl.max_horizontal("spread_x", "spread_y") > gap.abs()
    missing = pl.col("score_x").is_null() | pl.col("score_y").is_null()
    told = both.group_by("pair").agg(
        mean=(pl.col("score_x").sum() + pl.col("score_y").sum())
        / (pl.col("score_x").count() + pl.col("score_y").count()),
        missing=missing.any(),
        split=((gap > 0).any() & (gap < 0).any()) | noisy.any(),
        preferred=gap.sign().sum(),
    )
    # Without any score it is 0 / 0, and as low as can be.
    third = pl.col("mean").fill_nan(0).round(DECIMALS)
    return told.select(
        "pair",
        "preferred",
        band=pl.when(third < 1 / 3).then(pl.lit("low"))
        .when(third < 2 / 3).then(pl.lit("middle"))
        .otherwise(pl.lit("high")),
        disagreement=pl.when("missing").then(pl.lit("missing"))
        .when("split").then(pl.lit("split"))
        .otherwise(pl.lit("agreed")),
    )  # fmt: skip


def _oriented(pairs: pl.DataFrame) -> pl.DataFrame:
    """`x` is the answer that more judges and dimensions prefer, so that the sides are balanced in
    what a judge would say."""
    swap = pl.col("preferred") < 0
    turned = [
        pl.when(swap).then(f"{name}_{other}").otherwise(f"{name}_{side}").alias(f"{name}_{side}")
        for name in ("sample", "text", "tokens")
        for side, other in (("x", "y"), ("y", "x"))
    ]
    return pairs.with_columns(*turned, preferred=pl.col("preferred").abs()).rename(
        {"text_x": "answer_x", "text_y": "answer_y"}
    )


def verdicts_of(
    sheet: pl.DataFrame, answers: Answers, questions: Sequence[Question]
) -> Iterator[dict[str, Any]]:
    """What every judge of the run said of a sheet's items, as `read_verdicts` reads it.

    A pair's winner is the answer with the higher score, a tie where they are equal, null where one
    has none. An answer's verdict is its score. Lengths are in tokens.
    """
    placed = sheet.with_columns(
        pl.when(pl.col("side_x") == side).then(f"{name}_x").otherwise(f"{name}_y").alias(
            f"{name}_{side}"
        )
        for name in ("sample", "tokens")
        for side in ("a", "b")
    )  # fmt: skip
    by_answer: dict[tuple[int, str, int], list[tuple[str, str, float | None]]] = {}
    wanted = answers.scores.join(
        placed.select("round", "prompt_id").unique(), on=["round", "prompt_id"]
    )
    for round, prompt_id, sample, *said in (
        wanted.sort("judge", "dimension")
        .select("round", *KEY, "judge", "dimension", "score")
        .iter_rows()
    ):
        by_answer.setdefault((round, prompt_id, sample), []).append(tuple(said))
    asked = {question.dimension: question for question in questions}
    for row in placed.iter_rows(named=True):
        a, b = (
            {(judge, d): score for judge, d, score in by_answer.get(
                (row["round"], row["prompt_id"], row[f"sample_{side}"]), []
            )}
            for side in ("a", "b")
        )  # fmt: skip
        for (judge, dimension), score in a.items():
            if dimension not in asked or (judge, dimension) not in b:
                continue
            yield from _verdicts(row, judge, asked[dimension], (score, b[judge, dimension]))


def _verdicts(
    row: Mapping[str, Any],
    judge: str,
    question: Question,
    scores: tuple[float | None, float | None],
) -> Iterator[dict[str, Any]]:
    about = {"judge": judge, "dimension": question.dimension, "prompt_id": row["prompt_id"]}
    lengths = (row["tokens_a"], row["tokens_b"])
    yield {
        "item_id": row["item_id"],
        **about,
        "winner": _winner(*scores),
        "length_a": lengths[0],
        "length_b": lengths[1],
    }
    if question.bar:
        for side, score, length in zip(("a", "b"), scores, lengths, strict=True):
            item = answer_item(row["item_id"], side)
            yield {"item_id": item, **about, "score": score, "length": length}


def _winner(a: float | None, b: float | None) -> str | None:
    if a is None or b is None:
        return None
    return "tie" if a == b else "a" if a > b else "b"
