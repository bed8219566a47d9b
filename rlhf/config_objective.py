"""Which loss trains the policy: every objective's needs in one table, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config_base import Section


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective needs. Its loss is the function of the same name in `rlhf.objectives`."""

    data: Literal["pairs", "labels"]
    """Two answers to one prompt, or single answers that are good or bad."""
    reference: bool
    """Whether log-probs under the reference are needed."""
    denominator: Literal["pairs", "examples", "tokens"]
    """What the losses of a whole optimizer step are summed up and divided by: its pairs, its
    labelled answers, or the completion tokens of both."""
    settings: tuple[str, ...]
    """The settings that its function takes, by name."""
    normalise: Literal["tokens", "none"] = "none"
    """Default of `objective.normalise`."""
    sft_weight: float = 0.0
    """Default of `objective.sft_weight`."""


OBJECTIVES: dict[str, Needs] = {
    "dpo": Needs("pairs", True, "pairs", ("beta", "normalise")),
    "cdpo": Needs("pairs", True, "pairs", ("beta", "normalise", "label_smoothing")),
    "robust_dpo": Needs("pairs", True, "pairs", ("beta", "normalise", "label_smoothing")),
    "ipo": Needs("pairs", True, "pairs", ("beta", "normalise"), normalise="tokens"),
    "kto": Needs("labels", True, "examples", ("beta", "good_weight", "bad_weight")),
    "orpo": Needs("pairs", False, "pairs", ("beta",), sft_weight=1.0),
}

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(OBJECTIVES)]


class Objective(Section):
    """What the judged answers train; `docs/objectives.md` says when to take which."""

    name: Name = "dpo"
    """`dpo` (Rafailov et al. 2023), `cdpo` (Mitchell 2023) and `robust_dpo` (Chowdhury et al. 2024)
    for labels that are sometimes wrong, `ipo` (Azar et al. 2023), `kto` (Ethayarajh et al. 2024)
    on single good and bad answers, `orpo` (Hong et al. 2024) without a reference."""
    beta: Annotated[float, Field(gt=0)] = 0.2
    """Strength of the leash to the reference; on-policy margins are small, so 0.1 drifts and 0.5
    barely moves. IPO's tau; for ORPO, which has no leash, the weight of its odds ratio (lambda)."""
    normalise: Literal["tokens", "none"] | None = None
    """`tokens` divides each answer's log-ratio by its tokens, so that long answers weigh no more;
    beta then acts on nats a token, and wants to be some tens of times larger in `dpo`. Default
    `tokens` for `ipo`, as its authors ran it, else `none`."""
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """Share of pairs whose order is believed to be wrong; for `cdpo` and `robust_dpo`, required."""
    good_weight: Annotated[float, Field(gt=0)] | None = None
    """KTO's lambda_D, default 1. Its authors keep good_weight x good answers between 1 and 4/3 of
    bad_weight x bad answers."""
    bad_weight: Annotated[float, Field(gt=0)] | None = None
    """KTO's lambda_U, default 1."""
    sft_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the negative log-likelihood of chosen (good) answers, added to any objective: it
    keeps them likely where a margin alone would push both answers down. Default 1 for `orpo`, of
    which it is a part, else 0."""
    sft_normalise: Literal["tokens", "answers"] = "tokens"
    """`tokens`: every token of the step's chosen answers weighs the same; `answers`: every answer,
    by its mean over tokens."""

    @model_validator(mode="after")
    def _rules(self) -> Objective:
        takes = OBJECTIVES[self.name].settings
        for setting in ("normalise", "label_smoothing", "good_weight", "bad_weight"):
            if setting not in takes and getattr(self, setting) is not None:
                fits = [name for name, needs in OBJECTIVES.items() if setting in needs.settings]
                raise ValueError(
                    f"{setting} says nothing to {self.name}; leave it out, or use one of "
                    f"{', '.join(fits)}"
                )
        if "label_smoothing" in takes and self.label_smoothing is None:
            raise ValueError(
                f"{self.name} needs label_smoothing, the share of pairs whose order is believed to "
                "be wrong, such as 0.1"
            )
        return self

    @property
    def needs(self) -> Needs:
        """The row of `OBJECTIVES`."""
        return OBJECTIVES[self.name]

    @property
    def sft(self) -> float:
        """Weight of the SFT term in use."""
        return self.needs.sft_weight if self.sft_weight is None else self.sft_weight

    @property
    def arguments(self) -> dict[str, Any]:
        """What the objective's function is called with beside log-probs: settings or defaults."""
        defaults = {"normalise": self.needs.normalise, "good_weight": 1.0, "bad_weight": 1.0}
        given = {name: getattr(self, name) for name in self.needs.settings}
        return {n: defaults.get(n) if v is None else v for n, v in given.items()}
