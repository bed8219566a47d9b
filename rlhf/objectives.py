"""Preference objectives as pure functions of sequence log-probs, under their papers' names.

Each returns the loss of every pair (or labelled answer). Whoever sums them over an optimizer step
divides by the objective's declared denominator over the whole step, so that micro-batches change
nothing. What each needs stands in `rlhf.config_objective.OBJECTIVES`: a new objective is a function
here and a row there.

Shapes: B is pairs, or labelled answers. Log-probs are sums over a completion's tokens, in nats.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.config_objective import Objective

Normalise = Literal["tokens", "none"]


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Sequence log-probs of a batch of pairs under the policy and, if needed, the reference."""

    policy_chosen_B: Tensor
    policy_rejected_B: Tensor
    reference_chosen_B: Tensor | None
    reference_rejected_B: Tensor | None
    tokens_chosen_B: Tensor
    tokens_rejected_B: Tensor

    @property
    def chosen_logratio_B(self) -> Tensor:
        """log pi(chosen) - log ref(chosen)."""
        assert self.reference_chosen_B is not None
        return self.policy_chosen_B - self.reference_chosen_B

    @property
    def rejected_logratio_B(self) -> Tensor:
        """log pi(rejected) - log ref(rejected)."""
        assert self.reference_rejected_B is not None
        return self.policy_rejected_B - self.reference_rejected_B


@dataclass(frozen=True, slots=True)
class LabelLogps:
    """Sequence log-probs of a batch of labelled answers, and the whole step's KL baseline."""

    policy_B: Tensor
    reference_B: Tensor | None
    good_B: Tensor
    """True where the answer is good."""
    tokens_B: Tensor
    baseline: Tensor
    """`kl_baseline` of the optimizer step, a number without gradient."""

    @property
    def logratio_B(self) -> Tensor:
        """log pi(y|x) - log ref(y|x)."""
        assert self.reference_B is not None
        return self.policy_B - self.reference_B


Logps = PairLogps | LabelLogps


def log_ratio_margin(logps: PairLogps, normalise: Normalise) -> Tensor:
    """Chosen minus rejected log-ratio, shape [B]: what DPO and IPO are functions of.

    With `tokens` each log-ratio is first divided by its completion's tokens: length-normalised DPO,
    as in Tulu 3 (Lambert et al. 2024, https://arxiv.org/abs/2411.15124).
    """
    chosen_B, rejected_B = logps.chosen_logratio_B, logps.rejected_logratio_B
    if normalise == "tokens":
        return chosen_B / logps.tokens_chosen_B - rejected_B / logps.tokens_rejected_B
    return chosen_B - rejected_B


def dpo(logps: PairLogps, beta: float, normalise: Normalise = "none") -> Tensor:
    """DPO loss of each pair, shape [B] (Rafailov et al. 2023, equation 7).

    -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)); ln 2 where policy = reference.
    https://arxiv.org/abs/2305.18290
    """
    return -logsigmoid(beta * log_ratio_margin(logps, normalise))


def cdpo(
    logps: PairLogps, beta: float, label_smoothing: float, normalise: Normalise = "none"
) -> Tensor:
    """Conservative DPO, shape [B] (Mitchell 2023).

    The cross-entropy with a label that is wrong with chance e: (1 - e) times the DPO loss plus e
    times that of the swapped pair. Its minimum is a finite margin, log((1 - e) / e) / beta.
    https://ericmitchell.ai/cdpo.pdf
    """
    scaled_B = beta * log_ratio_margin(logps, normalise)
    return -(1 - label_smoothing) * logsigmoid(scaled_B) - label_smoothing * logsigmoid(-scaled_B)


def robust_dpo(
    logps: PairLogps, beta: float, label_smoothing: float, normalise: Normalise = "none"
) -> Tensor:
    """Robust DPO, shape [B] (Chowdhury et al. 2024, "Provably robust DPO").

    ((1 - e) times the DPO loss minus e times that of the swapped pair) / (1 - 2e): where labels are
    flipped with chance e, its expectation is the DPO loss of the true labels.
    https://arxiv.org/abs/2403.00409
    """
    scaled_B = beta * log_ratio_margin(logps, normalise)
    kept_B, flipped_B = -logsigmoid(scaled_B), -logsigmoid(-scaled_B)
    return ((1 - label_smoothing) * kept_B - label_smoothing * flipped_B) / (
        1 - 2 * label_smoothing
    )


def ipo(logps: PairLogps, beta: float, normalise: Normalise = "tokens") -> Tensor:
    """IPO loss of each pair, shape [B] (Azar et al. 2023, equation 17); beta is the paper's tau.

    (margin of log-ratios - 1 / (2 tau))^2: a regression to a finite margin.
    https://arxiv.org/abs/2310.12036
    """
    return (log_ratio_margin(logps, normalise) - 1 / (2 * beta)) ** 2


def kto(logps: LabelLogps, beta: float, good_weight: float, bad_weight: float) -> Tensor:
    """KTO loss of each answer, shape [B] (Ethayarajh et al. 2024, equation 7).

    lambda_y - v, where v = lambda_D sigmoid(beta (log-ratio - z0)) for good answers and
    lambda_U sigmoid(beta (z0 - log-ratio)) for bad ones; z0 is the step's KL baseline.
    https://arxiv.org/abs/2402.01306
    """
    above_B = beta * (logps.logratio_B - logps.baseline)
    return torch.where(
        logps.good_B,
        good_weight * torch.sigmoid(-above_B),  # 1 - sigmoid(x) = sigmoid(-x)
        bad_weight * torch.sigmoid(above_B),
    )


def kl_baseline(policy_B: Tensor, reference_B: Tensor) -> Tensor:
    """KTO's z0 (Ethayarajh et al. 2024, section 4.1): a number without gradient.

    The mean log-ratio of prompts with completions that answer other prompts, not below 0. B must be
    all of an optimizer step: the mean of micro-batches' clamped means would be another number.
    """
    return (policy_B - reference_B).mean().clamp(min=0).detach()


def orpo(logps: PairLogps, beta: float) -> Tensor:
    """ORPO's odds-ratio loss of each pair, shape [B] (Hong et al. 2024, equation 7); the weight
    lambda is `beta`. The whole of equation 6 is this plus the SFT term.

    -lambda log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p), where p is
    the geometric mean of a completion's token probabilities (equation 3).
    https://arxiv.org/abs/2403.07691
    """
    return -beta * logsigmoid(log_odds_ratio(logps))


def log_odds_ratio(logps: PairLogps) -> Tensor:
    """log odds(chosen) - log odds(rejected), shape [B] (Hong et al. 2024, equations 4 and 5)."""
    chosen_B = _log_odds(logps.policy_chosen_B / logps.tokens_chosen_B)
    return chosen_B - _log_odds(logps.policy_rejected_B / logps.tokens_rejected_B)


def _log_odds(mean_B: Tensor) -> Tensor:
    # A completion that is certain has infinite odds: it stays at the largest that can be told.
    mean_B = mean_B.clamp(max=-torch.finfo(mean_B.dtype).eps)
    return mean_B - torch.log(-torch.expm1(mean_B))


def sft(logps: Logps, normalise: Literal["tokens", "answers"]) -> Tensor:
    """Negative log-likelihood of chosen (good) completions, shape [B], 0 for bad ones.

    With `answers` each completion's mean over its tokens, else its sum.
    """
    if isinstance(logps, PairLogps):
        nll_B, tokens_B = -logps.policy_chosen_B, logps.tokens_chosen_B
    else:
        nll_B, tokens_B = -logps.policy_B * logps.good_B, logps.tokens_B
    return nll_B / tokens_B if normalise == "answers" else nll_B


def losses(logps: Logps, objective: Objective) -> Tensor:
    """The objective's own loss of every pair or answer, shape [B], without the SFT term."""
    # By name, so that the table of needs is also the table of functions.
    function = getattr(sys.modules[__name__], objective.name)
    found: Tensor = function(logps, **objective.arguments)
    return found


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss of an optimizer step, as a sum over the batches that it is cut into."""

    objective: Objective
    denominator: float
    """Pairs, answers or tokens of the whole step, as the objective declares."""
    sft_denominator: float
    """Chosen (good) answers, or their tokens, of the whole step."""

    def parts(self, logps: Logps) -> tuple[Tensor, Tensor]:
        """A batch's parts of the objective's own loss and of the mean NLL of the SFT term (0 where
        it has no weight)."""
        own = losses(logps, self.objective).sum() / self.denominator
        if not self.objective.sft or not self.sft_denominator:
            return own, torch.zeros_like(own)
        nll_B = sft(logps, self.objective.sft_normalise)
        return own, nll_B.sum() / self.sft_denominator

    def total(self, logps: Logps) -> Tensor:
        """A batch's part of the loss that is minimised."""
        own, nll = self.parts(logps)
        return own + self.objective.sft * nll


Sum = tuple[Tensor, float]
"""A sum over some examples of a batch, and how many they are."""


def metrics(logps: Logps, objective: Objective) -> dict[str, Sum]:
    """What is worth watching, as sums and counts: add both up over a step, then divide.

    Pairs: `preferred` (share whose chosen answer the policy finds likelier than the rejected one),
    `accuracy` (the same relative to the reference; for ORPO, by odds), `margin` (beta times what
    the loss is a function of), `logratio_chosen` and `logratio_rejected` (nats a sequence). Labels:
    `accuracy` (share on their side of the baseline), `logratio_good`, `logratio_bad`.
    """
    if isinstance(logps, LabelLogps):
        ratio_B, good_B = logps.logratio_B.detach().double(), logps.good_B
        right_B = (ratio_B > logps.baseline) == good_B
        return {
            "accuracy": (right_B.double().sum(), len(ratio_B)),
            "logratio_good": (ratio_B[good_B].sum(), int(good_B.sum())),
            "logratio_bad": (ratio_B[~good_B].sum(), int((~good_B).sum())),
        }
    if logps.reference_chosen_B is None:
        margin_B = log_odds_ratio(logps).detach().double()
        ratios = {}
    else:
        normalise = objective.arguments.get("normalise", "none")
        margin_B = log_ratio_margin(logps, normalise).detach().double()
        ratios = {
            "logratio_chosen": logps.chosen_logratio_B.detach().double(),
            "logratio_rejected": logps.rejected_logratio_B.detach().double(),
        }
    values = {
        "preferred": (logps.policy_chosen_B > logps.policy_rejected_B).double(),
        "accuracy": (margin_B > 0).double(),
        "margin": objective.beta * margin_B,
        **ratios,
    }
    return {name: (value_B.sum(), len(value_B)) for name, value_B in values.items()}
