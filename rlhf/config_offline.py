"""Training on a preference file: `pairloop dpo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config import (
    Placement,
    Run,
    RunConfig,
    Tracking,
    refuse_lone_labels,
    refuse_secrets,
)
from rlhf.config_base import Section, Share
from rlhf.config_learner import Learner, Model
from rlhf.config_objective import Objective


class Data(Section):
    """The preference file, in any format that `pairloop pairs analyze` reads."""

    path: str
    """JSONL, JSON or Parquet file of pairs or labelled answers."""
    format: str | None = None
    """Its format, such as explicit-chat; default: told by its columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """A name of ours (prompt, chosen, cluster, ...) -> the file's name for it."""
    max_tokens: Annotated[int, Field(ge=2)] = 1024
    """Most tokens of a prompt with one answer."""
    too_long: Literal["drop", "cut_prompt", "cut_answer"] = "drop"
    """What becomes of a longer one. `drop`: it trains nothing. `cut_prompt`: its prompt loses its
    beginning. `cut_answer`: its answers lose their end, and with it their end token."""
    max_too_long: Share = 0.1
    """Largest share of records that may be too long; more stops before anything is trained."""


class OfflineLearner(Learner):
    """How the policy is trained on the file: as in rounds, with held-out clusters by default."""

    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the clusters (else prompts) that are held out, to measure every epoch by."""


class OfflineConfig(Section):
    """One training on a preference file."""

    run: Run = Run()
    model: Model
    data: Data
    objective: Objective = Objective()
    learner: OfflineLearner = OfflineLearner()
    placement: Placement = Placement()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _rules(self) -> OfflineConfig:
        refuse_secrets(self)
        refuse_lone_labels(self.objective, self.learner)
        return self

    @property
    def learning_rate(self) -> float:
        """As in rounds."""
        return self.learner.rate(self.model.tuning)

    @property
    def reference(self) -> Literal["initial", "round_start"]:
        """The model as it is before training."""
        return "initial"


Trains = RunConfig | OfflineConfig
"""What the learner can be told."""
