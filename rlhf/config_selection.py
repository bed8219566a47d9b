"""How scores become pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config_base import Section, Share


class ColdStart(Section):
    """When to warm up with SFT first instead."""

    min_passing_share: Share = 0.10
    """Least share of prompts with any answer that may be chosen."""
    min_spread: Share = 0.02
    """Least mean standard deviation of the reward within a prompt."""


STANDARD_WEIGHTS = {
    "correctness": 0.4,
    "groundedness": 0.2,
    "problem_solution": 0.3,
    "style": 0.1,
}
STANDARD_FLOORS = {"correctness": 0.60, "groundedness": 0.55, "problem_solution": 0.60}
STANDARD_PROTECTED = {"correctness": 0.0, "problem_solution": 0.0}


class Selection(Section):
    """Scores -> pairs."""

    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Reward = weighted sum over dimensions (weights are normalised to sum to 1). Default
    0.4 correctness, 0.3 problem_solution, 0.2 groundedness, 0.1 style: what is right and useful
    outweighs how it sounds. Standard dimensions that no judge scores are left out."""
    floors: dict[str, Share] | None = None
    """Least score of a chosen answer, per dimension. Default 0.60 correctness, 0.55 groundedness
    (its judges are noisier), 0.60 problem_solution: relative preference alone would teach the
    better of two wrong answers."""
    protected: dict[str, Share] | None = None
    """Dimension -> epsilon: chosen may not score below rejected by more. Default 0 on correctness
    and problem_solution: without it, half a reward's gain can be paid for with the wrong answer."""
    strategy: Literal["largest_margin", "best_random", "adjacent", "all_pairs"] = "largest_margin"
    """Which admissible pairs of a prompt are taken. `largest_margin`: the clearest one.
    `best_random`: the best answer against a random worse one, which is less often the judge's
    luckiest error. `adjacent`: each answer against the next worse one, the hardest lessons.
    `all_pairs`: as many as `pairs_per_prompt`, largest margins first."""
    pairs_per_prompt: Annotated[int, Field(ge=1)] | None = None
    """Cap a prompt, for `adjacent` and `all_pairs`. Default 4: many pairs of one prompt repeat
    its answers. The other strategies take one."""
    min_margin: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.05
    """Least reward difference; below it, judge noise decides which answer is chosen. `auto`: each
    round, the least margin whose pairs are inverted with a chance of at most `max_inversion`."""
    max_inversion: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """With `min_margin: auto`, largest chance that noise alone put the worse answer first."""
    retest_sd: dict[str, Share] = Field(default_factory=dict)
    """Dimension -> standard deviation of a score when the same answer is judged again, where it
    was measured. Default: the certificate's, else from the spread of votes, else from the round's
    canaries; verifiers have none."""
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """Chosen may have at most this many times the tokens of rejected. Default: no cap."""
    max_similarity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest share of their runs of five characters that chosen and rejected may have in common
    (Jaccard, case and spacing aside). Between answers that hardly differ DPO can lower the
    likelihood of both (Pal et al. 2024, Smaug). Default: no limit, since what differs may be what
    matters (a number), and comparing takes time; selection.json counts them either way."""
    length_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Taken off the reward, in ranking and margins, for each standard deviation that an answer is
    longer than the mean of its prompt (shorter ones gain): judges tend to like length."""
    on_inversion: Literal["error", "warn"] = "warn"
    """What follows where chosen answers score significantly below rejected ones on a dimension:
    training would teach it away."""
    max_pairs: Annotated[int, Field(ge=1)] | None = None
    """Cap a round: largest margins first, stratified by category."""
    allow_truncated_chosen: bool = False
    """Off: a cut-off answer teaches not to stop."""
    cold_start: ColdStart = ColdStart()

    @model_validator(mode="after")
    def _one_pair(self) -> Selection:
        if (self.pairs_per_prompt or 1) > 1 and self.strategy in ("largest_margin", "best_random"):
            raise ValueError(
                f"pairs_per_prompt must be 1 with strategy {self.strategy}, which takes one pair a "
                f"prompt, got {self.pairs_per_prompt}; leave it out, or use strategy all_pairs"
            )
        return self
