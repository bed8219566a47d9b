"""The records that cross a room's border, and the table schemas that hold them in bulk.

Records at the edges, tables for bulk: one prompt or one score is a small frozen record; a round's
worth of them is a Polars frame with the schema beside the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict

import polars as pl

FinishReason = Literal["stop", "length"]


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked, and what judges may know about it.

    >>> Prompt("refund-1", ({"role": "user", "content": "When is my refund due?"},)).cluster
    'refund-1'
    """

    prompt_id: str
    messages: tuple[Message, ...]
    context: str | None = None
    reference: str | None = None
    category: str = "all"
    cluster: str = ""
    """Prompts that share a source; intervals are resampled by it, splits are kept apart by it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    """The chat template applied once, when the pool was loaded; empty before that."""

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", self.prompt_id)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. `token_ids` are what was sampled: the end token only if it was sampled.

    `logps[i]` is the log-probability of `token_ids[i]` under the distribution it was drawn from
    (temperature and top-p applied), in nats.
    """

    prompt_id: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True, slots=True)
class Score:
    """One judge's value for one completion and dimension, in [0, 1], or an abstention.

    >>> Score.of("refund-1", 0, "house", "correctness", 1.0).abstained
    False
    >>> Score.abstain("refund-1", 0, "house", "correctness", "verifier returned None").score is None
    True
    """

    prompt_id: str
    sample: int
    judge: str
    dimension: str
    score: float | None
    votes: tuple[float, ...] = ()
    spread: float | None = None
    """Standard deviation of the votes; 0 for a single deterministic vote."""
    abstained: bool = False
    reason: str | None = None
    """Why there is no score; with one, a model judge's own words, after what made its completion
    suspicious, if anything did."""

    @classmethod
    def of(cls, prompt_id: str, sample: int, judge: str, dimension: str, value: float) -> Score:
        """One deterministic vote."""
        return cls(prompt_id, sample, judge, dimension, value, (value,), 0.0)

    @classmethod
    def abstain(cls, prompt_id: str, sample: int, judge: str, dimension: str, reason: str) -> Score:
        """No score, and why."""
        return cls(prompt_id, sample, judge, dimension, None, (), None, True, reason)


SUSPICIOUS = "suspicious"
"""Opens the reason of a score whose completion was flagged, before what was seen in brackets."""

COMPLETIONS = pl.Schema(
    {
        "prompt_id": pl.String(),
        "sample": pl.Int32(),
        "text": pl.String(),
        "token_ids": pl.List(pl.Int32),
        "prompt_token_ids": pl.List(pl.Int32),
        "logps": pl.List(pl.Float32),
        "finish_reason": pl.String(),
        "policy_version": pl.Int32(),
    }
)

SCORES = pl.Schema(
    {
        "prompt_id": pl.String(),
        "sample": pl.Int32(),
        "judge": pl.String(),
        "dimension": pl.String(),
        "score": pl.Float64(),
        "votes": pl.List(pl.Float64),
        "spread": pl.Float64(),
        "abstained": pl.Boolean(),
        "reason": pl.String(),
    }
)


def pairs_schema(dimensions: Sequence[str]) -> pl.Schema:
    """The schema of `pairs.parquet`; the two score structs have one field per dimension."""
    scores = pl.Struct(dict.fromkeys(sorted(dimensions), pl.Float64))
    return pl.Schema(
        {
            "prompt_id": pl.String(),
            "category": pl.String(),
            "cluster": pl.String(),
            "prompt": pl.String(),
            "chosen": pl.String(),
            "rejected": pl.String(),
            "chosen_sample": pl.Int32(),
            "rejected_sample": pl.Int32(),
            "prompt_token_ids": pl.List(pl.Int32),
            "chosen_token_ids": pl.List(pl.Int32),
            "rejected_token_ids": pl.List(pl.Int32),
            "reward_chosen": pl.Float64(),
            "reward_rejected": pl.Float64(),
            "margin": pl.Float64(),
            "scores_chosen": scores,
            "scores_rejected": scores,
            "source": pl.String(),
            "policy_version": pl.Int32(),
        }
    )


def completions_table(completions: Iterable[Completion]) -> pl.DataFrame:
    """Completions as a frame with schema `COMPLETIONS`."""
    return pl.DataFrame([asdict(c) for c in completions], schema=COMPLETIONS)


def scores_table(scores: Iterable[Score]) -> pl.DataFrame:
    """Scores as a frame with schema `SCORES`."""
    return pl.DataFrame([asdict(s) for s in scores], schema=SCORES)


def completions_of(table: pl.DataFrame) -> list[Completion]:
    """The records of a completions table, in its row order."""
    return [
        Completion(
            **{
                **row,
                "token_ids": tuple(row["token_ids"]),
                "prompt_token_ids": tuple(row["prompt_token_ids"]),
                "logps": tuple(row["logps"]),
            }
        )
        for row in table.iter_rows(named=True)
    ]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a round's training did."""

    planned_steps: int
    executed_steps: int
    skipped_steps: int
    first_loss: float | None
    """Loss of the round's first step; None for a round without steps."""
    best_step: int | None = None
    """The step whose weights were kept, for their validation loss; None without validation."""
    best_loss: float | None = None
    """That validation loss."""
