"""What makes a pair: the settings of selection, resolved for a run."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rlhf.config import RunConfig

Strategy = Literal["largest_margin", "best_random", "adjacent", "all_pairs"]

SEVERAL_A_PROMPT = 4
"""Pairs of a prompt that `adjacent` and `all_pairs` make at most, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What makes a pair; all scores, floors and margins are in [0, 1].

    `protected` maps a dimension to epsilon: chosen may score below rejected by no more.

    >>> Rules({"correctness": 0.7, "style": 0.3}, {"correctness": 0.6}, {}).needed
    ('correctness', 'style')
    """

    weights: Mapping[str, float]
    floors: Mapping[str, float]
    protected: Mapping[str, float]
    min_margin: float | Literal["auto"] = 0.05
    """`auto` is settled by the noise of the round's scores (`rlhf.noise.settle`)."""
    max_pairs: int | None = None
    allow_truncated_chosen: bool = False
    strategy: Strategy = "largest_margin"
    pairs_per_prompt: int = 1
    max_length_ratio: float | None = None
    """Tokens of chosen over tokens of rejected."""
    max_similarity: float | None = None
    """Of the texts of chosen and rejected, as `rlhf.duplicates.similarities` has it."""
    length_penalty: float = 0.0
    max_inversion: float = 0.05
    deterministic: Set[str] = frozenset()
    """Dimensions whose judge gives the same answer the same score every time: verifiers."""
    retest_sd: Mapping[str, float] = field(default_factory=dict)
    """Dimension -> standard deviation of a score when the same answer is judged again, as the
    config gives it."""
    certified_sd: Mapping[str, float] = field(default_factory=dict)
    """The same, as certificates have it."""
    canary_sd: Mapping[str, float] = field(default_factory=dict)
    """The same, as the round's canaries showed it."""
    seed: int = 0

    def __post_init__(self) -> None:
        if abs(sum(self.weights.values()) - 1) > 1e-9:
            raise ValueError(f"weights must sum to 1, got {dict(self.weights)}")

    @classmethod
    def of(cls, config: RunConfig) -> Rules:
        """The rules of a run."""
        selection = config.selection
        several = selection.strategy in ("adjacent", "all_pairs")
        return cls(
            weights=config.weights,
            floors=config.floors,
            protected=config.protected,
            min_margin=selection.min_margin,
            max_pairs=selection.max_pairs,
            allow_truncated_chosen=selection.allow_truncated_chosen,
            strategy=selection.strategy,
            pairs_per_prompt=selection.pairs_per_prompt or (SEVERAL_A_PROMPT if several else 1),
            max_length_ratio=selection.max_length_ratio,
            max_similarity=selection.max_similarity,
            length_penalty=selection.length_penalty,
            max_inversion=selection.max_inversion,
            deterministic={
                d for judge in config.judges.panel if judge.kind == "verifier"
                for d in judge.dimensions
            },
            retest_sd=selection.retest_sd,
            seed=config.run.seed,
        )  # fmt: skip

    @property
    def needed(self) -> tuple[str, ...]:
        """Dimensions without which a completion can't be used."""
        return tuple(sorted({*self.weights, *self.floors, *self.protected}))

    def draw_seed(self, round: int) -> int:
        """Seed of a round's keyed hashes."""
        state = np.random.SeedSequence((self.seed, round)).generate_state(1, np.uint64)
        return int(state[0])
