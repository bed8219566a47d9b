"""Canaries: answers that the judges are asked about anew each round, before its scores are trusted.

Each round asks `ASKINGS` times about the same answers: `start`, drawn from the start's own answers
in round 1 (`canaries/items`), and `gold`, the user's, whose order is known. What was said is kept
in the round as `canaries/verdicts` (schema `VERDICTS`, parts 0 and 1 are the askings), what that
shows as `canaries.json`:

| key | holds |
|---|---|
| `baseline` | the round that this one is compared with: 1, or null in round 1 itself |
| `answers`, `askings` | how many answers were asked about, by set; how often |
| `items_sha256` | of the answers: a file of gold canaries must stay as it was |
| `limits` | `max_drift`, and the thresholds of `figures`: `retest_share`, ... |
| `judges` | a list, one for each judge and dimension, see below |
| `stops`, `warnings` | sentences: why the run stops here, and what is only told |

An entry of `judges` has `judge`, `dimension`, `fixed` (a function or a file: it must say the same
each time), `trains`, `certified` (null where none is needed), and

- `figures`: name -> `value`, `low`, `high` (95% interval over clusters), `n`, `detectable`, in this
  round alone: `retest_sd`, `abstained`, `within_prompt_accuracy` (against gold),
  `order_consistency`, `first_position_rate`; those that don't apply are absent;
- `score_sd`: standard deviation of all its scores;
- `drift`: name -> `value`, `low`, `high`, `n`, `limit`, `verdict`, against the baseline: `moved`
  (root mean square change of a score, less what asking again changes anyway), `shift` (mean change,
  signed), `abstained` (rise), `accuracy` and `consistency` (fall); empty in round 1.

Verdicts are `holds` (the far end of the interval is within the limit), `drifted` (the near end is
beyond it) and `unclear`. A certificate has to be sure that a judge is good, so there the
unfavourable end decides; a stop has to be sure that it no longer is, so here the near end does.
Changes are paired, answer by answer: a judge that says the same again has drifted by exactly 0.

Beside it lies `audit.json`, the blind audit of the round's own pairs (`rlhf.pair_audit`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from rlhf.types import Completion, Prompt

ASKINGS = 2
A_PROMPT = 2
"""Answers to one prompt: two, so that their order can be asked for."""

Items = Sequence[tuple[Prompt, Completion]]

SAID = pl.Schema(
    {
        "prompt_id": pl.String(),
        "sample": pl.Int32(),
        "other": pl.Int32(),
        "order": pl.String(),
        "judge": pl.String(),
        "dimension": pl.String(),
        "value": pl.Float64(),
        "reason": pl.String(),
    }
)
"""What judges say of items: a score of `sample`, null if they abstain; or, where `other` is not
null, how `sample` compares with it (1 better, 0 equal, -1 worse), `sample` shown first in `order`
ab and second in ba."""

VERDICTS = pl.Schema({"asking": pl.Int8(), "set": pl.String(), "cluster": pl.String(), **SAID})


@dataclass(frozen=True, slots=True)
class WatchedJudge:
    """A judge on one dimension, as its canaries see it."""

    judge: str
    dimension: str
    fixed: bool
    """A function or a file, which says the same of the same answer."""
    trains: bool
    certified: bool | None = None
    """Whether a certificate stands behind it; None where it needs none."""
    certified_sd: float | None = None
    """Standard deviation of its scores when asked again, as its certificate has it."""


@dataclass(frozen=True, slots=True)
class GoldAnswer:
    """A canary whose worth is known: by dimension, a number on any scale."""

    prompt: Prompt
    completion: Completion
    gold: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Watch:
    """How judges are watched; `launch` builds it."""

    ask: Callable[[Items], pl.DataFrame]
    """Every judge's word on items, asked anew whatever is remembered; schema `SAID`."""
    audit: Callable[[Items], pl.DataFrame]
    """Scores of the audit judges alone, which train nothing; schema `SCORES`."""
    judges: Sequence[WatchedJudge]
    gold: Sequence[GoldAnswer] = field(default_factory=tuple)


def draw_answers(parts: Iterable[pl.DataFrame], count: int, seed: int) -> pl.DataFrame:
    """At most `count` completions, `A_PROMPT` different ones of a prompt, drawn by a keyed hash.

    Prompts whose answers are all alike or empty have none; the result depends on the rows alone,
    not on their order. Schema `COMPLETIONS`, sorted by prompt and sample. All answers to a prompt
    are in one part, and parts are in memory one after the other.
    """
    # Whoever is drawn of all is drawn of its part.
    return _drawn(pl.concat(_drawn(part, count, seed) for part in parts), count, seed)


def _drawn(completions: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    text = pl.col("text").str.strip_chars()
    draw = pl.concat_str("prompt_id", pl.lit("\n"), "sample").hash(seed)
    different = (
        completions.filter(text != "")
        .sort("prompt_id", "sample")
        .unique(["prompt_id", "text"], keep="first", maintain_order=True)
        .with_columns(draw=draw)
        .sort("prompt_id", "draw")
        .filter(
            pl.int_range(pl.len()).over("prompt_id") < A_PROMPT,
            pl.len().over("prompt_id") >= A_PROMPT,
        )
    )
    prompts = (
        different.select(pl.col("prompt_id").unique())
        .sort(pl.col("prompt_id").hash(seed), "prompt_id")
        .head(count // A_PROMPT)
    )
    return (
        different.join(prompts, on="prompt_id", how="semi").drop("draw").sort("prompt_id", "sample")
    )


def items_sha256(items: Iterable[tuple[str, Prompt, Completion, Mapping[str, float]]]) -> str:
    """Of canaries, each with its set and gold."""
    digest = hashlib.sha256()
    for name, prompt, completion, gold in items:
        told = (name, prompt.messages, prompt.context, completion.text, sorted(gold.items()))
        digest.update(repr(told).encode())
    return digest.hexdigest()
