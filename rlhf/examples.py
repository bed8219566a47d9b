"""A round's pairs or labels as the learner takes them: which make up each optimizer step, with ids
and cached reference log-probs.

The order of examples is a function of (seed, round, epoch), so a resumed round goes on with the
steps that it would have had, and reference log-probs can be computed before any of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, pairwise
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rlhf.config_objective import OBJECTIVES, Objective
from rlhf.errors import InputError
from rlhf.objectives import LabelLogps, Logps, PairLogps, StepLoss
from rlhf.packing import TokenPair

PAIR_REFERENCE = pl.Schema(
    {
        "prompt_id": pl.String,
        "chosen_sample": pl.Int32,
        "rejected_sample": pl.Int32,
        "reference_chosen": pl.Float64,
        "reference_rejected": pl.Float64,
    }
)
LABEL_REFERENCE = pl.Schema(
    {
        "prompt_id": pl.String,
        "prompt_sha256": pl.String,
        "answer_prompt_id": pl.String,
        "answer_sample": pl.Int32,
        "reference": pl.Float64,
    }
)
"""log ref(answer | prompt); where `answer_prompt_id` is another prompt's, for KTO's baseline.
`prompt_sha256` is over the prompt's tokens: where too long ones were cut, those of one prompt are
not the same for all of its answers."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, with their log-probs under the reference (0 where unneeded)."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reference_chosen: float = 0.0
    reference_rejected: float = 0.0

    @property
    def sequences(self) -> tuple[TokenPair, ...]:
        """What is scored together: chosen, then rejected."""
        return (self.prompt, self.chosen), (self.prompt, self.rejected)

    @property
    def tokens(self) -> int:
        """Tokens that a padded pass over both sequences reads."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def answer_tokens(self) -> int:
        """Tokens whose log-probs are summed."""
        return len(self.chosen) + len(self.rejected)

    @property
    def praised_tokens(self) -> int:
        """Tokens of the answer that the SFT term raises."""
        return len(self.chosen)


@dataclass(frozen=True, slots=True)
class Label:
    """One answer that is good or bad, with its log-prob under the reference."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    good: bool
    reference: float = 0.0

    @property
    def sequences(self) -> tuple[TokenPair, ...]:
        """What is scored."""
        return ((self.prompt, self.completion),)

    @property
    def tokens(self) -> int:
        """Tokens that a padded pass reads."""
        return len(self.prompt) + len(self.completion)

    @property
    def answer_tokens(self) -> int:
        """Tokens whose log-probs are summed."""
        return len(self.completion)

    @property
    def praised_tokens(self) -> int:
        """Tokens of the answer that the SFT term raises; none of a bad one."""
        return len(self.completion) if self.good else 0


Example = Pair | Label


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step trains on."""

    examples: tuple[Example, ...]
    mismatched: tuple[TokenPair, ...] = ()
    """For KTO's baseline: each example's prompt with the completion of another one."""
    reference_mismatched: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that padded passes with a gradient read."""
        return sum(e.tokens for e in self.examples)

    def loss(self, objective: Objective) -> StepLoss:
        """The step's loss, with what all of it is divided by."""
        counts = {
            "pairs": len(self.examples),
            "examples": len(self.examples),
            "tokens": sum(e.answer_tokens for e in self.examples),
        }
        praised = [e.praised_tokens for e in self.examples if e.praised_tokens]
        by_tokens = objective.sft_normalise == "tokens"
        return StepLoss(
            objective,
            counts[objective.needs.denominator],
            sum(praised) if by_tokens else len(praised),
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What fixes which examples make up which step."""

    seed: int
    round: int
    epochs: int
    batch: int
    """Examples a step."""

    def steps(self, examples: int, least: int) -> list[list[int]]:
        """Rows of each step's examples: every epoch takes every row once, in an order of its own.

        Where an epoch's last step would have fewer than `least`, they join the step before it.
        """
        starts = list(range(0, examples, self.batch))
        if len(starts) > 1 and examples - starts[-1] < least:
            starts.pop()
        cuts = list(pairwise([*starts, examples]))
        steps = []
        for epoch in range(self.epochs):
            rng = np.random.default_rng((self.seed, self.round, epoch))
            rows = rng.permutation(examples).tolist()
            steps += [rows[start:end] for start, end in cuts]
        return steps


class PairData:
    """A table of pairs (schema `pairs_schema`, or what of it is read here)."""

    least = 1

    def __init__(self, table: pl.DataFrame) -> None:
        self.keys = table.select("prompt_id", "chosen_sample", "rejected_sample")
        ids = table.select("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        self.examples = [Pair(tuple(p), tuple(c), tuple(r)) for p, c, r in ids.iter_rows()]

    def unscored(self, order: Order) -> list[TokenPair]:
        """The sequences whose log-probs under the reference are needed: chosen, rejected, ..."""
        return [sequence for e in self.examples for sequence in e.sequences]

    def scored(self, order: Order, sums: Sequence[float]) -> pl.DataFrame:
        """Their sums with their keys, schema `PAIR_REFERENCE`."""
        return self.keys.with_columns(
            reference_chosen=pl.Series(sums[0::2], dtype=pl.Float64),
            reference_rejected=pl.Series(sums[1::2], dtype=pl.Float64),
        )

    def steps(self, order: Order, reference: pl.DataFrame | None) -> list[Step]:
        """Every step of a round; without a `reference` its log-probs are left at 0."""
        examples = self.examples
        if reference is not None:
            found = self.keys.join(
                reference, on=self.keys.columns, how="left", validate="1:1", maintain_order="left"
            ).select("reference_chosen", "reference_rejected")
            assert not sum(found.null_count().row(0)), "every pair has its reference log-probs"
            examples = [
                replace(e, reference_chosen=chosen, reference_rejected=rejected)
                for e, (chosen, rejected) in zip(examples, found.iter_rows(), strict=True)
            ]
        planned = order.steps(len(examples), self.least)
        return [Step(tuple(examples[row] for row in rows)) for rows in planned]


class LabelData:
    """A table of labelled answers (schema `labels_schema`, or what of it is read here)."""

    # One alone would have no other completion to take KTO's baseline from.
    least = 2

    def __init__(self, table: pl.DataFrame) -> None:
        self.answers = list(table.select("prompt_id", "sample").iter_rows())
        ids = table.select("prompt_token_ids", "completion_token_ids", "good")
        self.examples = [Label(tuple(p), tuple(c), good) for p, c, good in ids.iter_rows()]
        self._tokens = [
            sha256(np.array(e.prompt, dtype=np.int64).tobytes()).hexdigest() for e in self.examples
        ]

    def unscored(self, order: Order) -> list[TokenPair]:
        """The sequences whose log-probs under the reference are needed: every answer to its own
        prompt, then what stands in the steps' mismatches."""
        return [(self.examples[i].prompt, self.examples[j].completion) for i, j in self._put(order)]

    def scored(self, order: Order, sums: Sequence[float]) -> pl.DataFrame:
        """Their sums with their keys, schema `LABEL_REFERENCE`."""
        rows = [self._key(*put, value) for put, value in zip(self._put(order), sums, strict=True)]
        return pl.DataFrame(rows, schema=LABEL_REFERENCE, orient="row")

    def steps(self, order: Order, reference: pl.DataFrame | None) -> list[Step]:
        """Every step of a round; without a `reference` its log-probs are 0 and no baseline is
        taken."""
        planned = order.steps(len(self.examples), self.least)
        if reference is None:
            return [Step(tuple(self.examples[row] for row in rows)) for rows in planned]
        known = {tuple(key): value for *key, value in reference.iter_rows()}
        examples = [
            replace(e, reference=known[self._key(i, i)]) for i, e in enumerate(self.examples)
        ]
        steps = []
        for rows, others in zip(planned, self._mismatches(order), strict=True):
            put = list(zip(rows, others, strict=True))
            steps.append(
                Step(
                    tuple(examples[row] for row in rows),
                    tuple((examples[i].prompt, examples[j].completion) for i, j in put),
                    tuple(known[self._key(i, j)] for i, j in put),
                )
            )
        return steps

    def _put(self, order: Order) -> list[tuple[int, int]]:
        """(row of the prompt, row of the answer) of all that is scored, each once."""
        planned = order.steps(len(self.examples), self.least)
        own = [(row, row) for row in range(len(self.examples))]
        mismatched = zip(chain(*planned), chain(*self._mismatches(order)), strict=True)
        # Two labels may share a prompt, and then the same answer to it is the same sequence.
        once = {self._key(*put): put for put in (*own, *mismatched)}
        return list(once.values())

    def _mismatches(self, order: Order) -> list[list[int]]:
        """Per step, the row whose completion is put to each example's prompt."""
        found = []
        for number, rows in enumerate(order.steps(len(self.examples), self.least)):
            prompts = [self.answers[row][0] for row in rows]
            others = mismatch(prompts, (order.seed, order.round, number))
            found.append([rows[other] for other in others])
        return found

    def _key(self, prompt: int, answer: int, *value: float) -> tuple[Any, ...]:
        return (self.answers[prompt][0], self._tokens[prompt], *self.answers[answer], *value)


def mismatch(prompts: Sequence[str], key: Sequence[int]) -> list[int]:
    """For each example of a step, the one whose completion is put to its prompt: a permutation.

    It answers another prompt wherever no prompt has more than half of the examples, and is another
    example wherever there are two. `key` seeds it.
    """
    rng = np.random.default_rng(tuple(key))
    names = sorted(set(prompts))
    place = dict(zip(names, rng.permutation(len(names)).tolist(), strict=True))
    rows = sorted(rng.permutation(len(prompts)).tolist(), key=lambda row: place[prompts[row]])
    # Rows stand prompt by prompt, so going on by the largest group's size leaves every group.
    largest = max(Counter(prompts).values())
    shift = largest if largest < len(prompts) else 1
    found = [0] * len(prompts)
    for position, row in enumerate(rows):
        found[row] = rows[(position + shift) % len(rows)]
    return found


def split_by_cluster(
    table: pl.DataFrame, share: float, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(what trains, what is held out): `share` of the clusters, but at least one.

    A cluster's place in the queue depends on its name and the seed, so rounds on the same prompts
    hold out nearly the same ones. Raises InputError where there is only one cluster.
    """
    names = table["cluster"].unique().to_list()
    if len(names) < 2:
        raise InputError(
            f"learner.validation_share: {share:g} of the clusters can't be held out of "
            f"{len(names)} cluster; give more prompts, or leave it 0"
        )
    queue = sorted(names, key=lambda name: sha256(f"{seed} {name}".encode()).digest())
    count = min(max(1, round(share * len(names))), len(names) - 1)
    held = pl.col("cluster").is_in(queue[:count])
    return table.filter(~held), table.filter(held)


def data_of(table: pl.DataFrame, objective: Objective) -> PairData | LabelData:
    """The table as `objective` trains on it. Raises InputError where it is of the other kind."""
    check_fits(objective, table.columns)
    return PairData(table) if objective.needs.data == "pairs" else LabelData(table)


def check_fits(objective: Objective, columns: Sequence[str], source: str = "the data") -> None:
    """Raises InputError where `columns` are pairs and the objective wants labels, or vice versa."""
    found = "pairs" if {"chosen", "chosen_token_ids"} & set(columns) else "labels"
    wanted = objective.needs.data
    if found != wanted:
        others = ", ".join(n for n, needs in OBJECTIVES.items() if needs.data == found)
        to = "labels-chat" if wanted == "labels" else "explicit-chat"
        raise InputError(
            f"objective.name: {objective.name} trains on {wanted}, but {source} holds {found}; "
            f"take one of {others}, or convert: pairloop pairs convert FILE OUT --to {to}"
        )


def weights_advice(objective: Objective, good: int, bad: int) -> str | None:
    """What to set where KTO's weights leave good and bad answers out of balance (Ethayarajh et al.
    2024, equation 8: lambda_D good / (lambda_U bad) from 1 to 4/3); None where they don't."""
    up, down = (objective.arguments[name] for name in ("good_weight", "bad_weight"))
    ratio = up * good / (down * bad)
    if 1 <= ratio <= 4 / 3:
        return None
    return (
        f"good answers weigh {ratio:.2f} times the bad ones ({good} x {up:g} against {bad} x "
        f"{down:g}); KTO's authors keep it between 1 and 4/3, here by objective.good_weight "
        f"{1.15 * down * bad / good:.2f} or objective.bad_weight {up * good / (1.15 * bad):.2f}"
    )


def sequences(examples: Sequence[Example]) -> list[TokenPair]:
    """What a forward pass over `examples` reads: all chosen answers, then all rejected ones."""
    sides = zip(*(e.sequences for e in examples), strict=True)
    return [sequence for side in sides for sequence in side]


def logps_of(
    examples: Sequence[Example], sums_S: Tensor, baseline: Tensor, reference: bool
) -> Logps:
    """The log-probs `sums_S` of `sequences(examples)` beside the reference's, if it is needed."""
    rows = [_numbers(e) for e in examples]
    if isinstance(examples[0], Label):
        known, tokens, good = sums_S.new_tensor(rows).T
        return LabelLogps(sums_S, known if reference else None, good.bool(), tokens, baseline)
    known_c, known_r, tokens_c, tokens_r = sums_S.new_tensor(rows).T
    chosen_B, rejected_B = sums_S.chunk(2)
    if not reference:
        return PairLogps(chosen_B, rejected_B, None, None, tokens_c, tokens_r)
    return PairLogps(chosen_B, rejected_B, known_c, known_r, tokens_c, tokens_r)


def at_reference(step: Step, device: str) -> Logps:
    """What `logps_of` gives for the whole step where the policy is the reference."""
    known = [_numbers(e)[0] for e in step.examples]
    if isinstance(step.examples[0], Pair):
        known += [_numbers(e)[1] for e in step.examples]
    sums_S = torch.tensor(known, dtype=torch.float64, device=device)
    return logps_of(step.examples, sums_S, sums_S.new_zeros(()), reference=True)


def _numbers(e: Example) -> tuple[float, ...]:
    if isinstance(e, Label):
        return (e.reference, len(e.completion), e.good)
    return (e.reference_chosen, e.reference_rejected, len(e.chosen), len(e.rejected))
