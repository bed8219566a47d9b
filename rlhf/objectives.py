"""Preference objectives as pure functions of sequence log-probs.

Each returns per-pair losses; whoever sums them over an optimizer step divides by the objective's
declared denominator over the whole step, so that micro-batches change nothing.

Shapes: B is pairs. Log-probs are sums over a completion's tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Sequence log-probs of a batch of pairs under the policy and the reference."""

    policy_chosen_B: Tensor
    policy_rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor

    @property
    def chosen_logratio_B(self) -> Tensor:
        """log pi(chosen) - log ref(chosen)."""
        return self.policy_chosen_B - self.reference_chosen_B

    @property
    def rejected_logratio_B(self) -> Tensor:
        """log pi(rejected) - log ref(rejected)."""
        return self.policy_rejected_B - self.reference_rejected_B


def dpo(logps: PairLogps, beta: float) -> Tensor:
    """DPO loss of each pair, shape [B] (Rafailov et al. 2023, equation 7).

    -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)); ln 2 where policy = reference.
    https://arxiv.org/abs/2305.18290
    """
    return -logsigmoid(beta * (logps.chosen_logratio_B - logps.rejected_logratio_B))


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss and what its sum over a step is divided by."""

    losses: Callable[[PairLogps, float], Tensor]
    denominator: Literal["pairs"]


OBJECTIVES = {"dpo": Objective(dpo, "pairs")}


def pair_metrics(logps: PairLogps, beta: float) -> dict[str, Tensor]:
    """Sums over the pairs of a batch: divide by the number of pairs in the step."""
    chosen, rejected = logps.chosen_logratio_B.detach(), logps.rejected_logratio_B.detach()
    return {
        "accuracy": (chosen > rejected).to(torch.float64).sum(),
        "logratio_chosen": chosen.double().sum(),
        "logratio_rejected": rejected.double().sum(),
        "margin": (beta * (chosen - rejected)).double().sum(),
    }
