"""NaN and infinity in a loss or a gradient never reach the weights, whatever the objective, the
precision and the tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from fakes import referenced
from small_models import save_small_model
from test_learner import config_for, make_pairs, never, same
from test_learner_objectives import make_labels
from torch import Tensor

from rlhf.config_objective import OBJECTIVES
from rlhf.errors import NonFiniteError
from rlhf.learner import Learner
from rlhf.objectives import StepLoss
from rlhf.policy import Policy
from rlhf.types import Trained

PAIRS: list[dict[str, Any]] = [
    {"name": "dpo"},
    {"name": "dpo", "sft_weight": 0.5},
    {"name": "cdpo", "label_smoothing": 0.1},
    {"name": "robust_dpo", "label_smoothing": 0.1},
    {"name": "ipo", "beta": 1.0},
    {"name": "orpo"},
]
SETTINGS = [*PAIRS, {"name": "kto"}]
WHOLE = StepLoss.parts
BROKEN = [(what, value) for what in ("loss", "gradient") for value in (math.nan, math.inf)]


def test_every_objective_is_here() -> None:
    assert {settings["name"] for settings in SETTINGS} == OBJECTIVES.keys()


@pytest.fixture(
    scope="module",
    params=[(t, p) for t in ("full", "lora", "qlora") for p in ("fp32", "bf16", "fp16")],
    ids="-".join,
)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    tuning, precision = request.param
    folder = save_small_model(tmp_path_factory.mktemp("small") / "model", layers=1)
    model = config_for(folder, model={"tuning": tuning, "precision": precision}).model
    return Policy(model, model.path, "cpu", 0)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in policy.trainable()}


@dataclass
class Broken:
    """A training where the step after the first update has `value` in its loss, or in one weight's
    gradient."""

    learner: Learner
    what: str
    value: float
    seen: list[dict[str, Tensor]] = field(default_factory=list)
    """Weights after each step."""
    skipped: list[float] = field(default_factory=list)

    @property
    def now(self) -> bool:
        return self.skipped[-1:] == [0] and self.skipped.count(0) == 1

    def on_step(self, _: int, metrics: dict[str, float]) -> None:
        self.seen.append(weights(self.learner.policy))
        self.skipped.append(metrics["skipped"])

    def parts(self, loss: StepLoss, logps: Any) -> tuple[Tensor, Tensor]:
        own, nll = WHOLE(loss, logps)
        bad = self.value if self.now and self.what == "loss" else 0.0
        # In the SFT term where there is one: it is added after the objective's own loss.
        return (own, nll + bad) if loss.objective.sft else (own + bad, nll)

    def train(self, data: pl.DataFrame, reference: pl.DataFrame | None, state: Path) -> Trained:
        _, last = self.learner.policy.trainable()[-1]
        hook = last.register_hook(
            lambda g: g * self.value if self.now and self.what == "gradient" else g
        )
        try:
            return self.learner.train(data, reference, 1, state, self.on_step, never)
        finally:
            hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_what_is_not_finite_never_reaches_the_weights(
    policy: Policy, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken step raises; but under fp16, which scales the loss, it is skipped and counted, and
    the next ones go on from where the last one was."""
    config = config_for(
        Path(policy.path),
        objective=settings,
        model=policy.config.model_dump(exclude={"lora", "path"}),
        learner={
            "batch_pairs": 2,
            "epochs": 2,
            "learning_rate": 1e-3,
            "micro_batch_tokens": 2048,
        },
    )
    learner = Learner(policy, config)
    data = make_labels(4) if settings["name"] == "kto" else make_pairs(4)
    reference = referenced(learner, data, 1) if config.objective.needs.reference else None
    start = weights(policy)
    for what, value in BROKEN:
        training = Broken(learner, what, value)
        monkeypatch.setattr(StepLoss, "parts", lambda *given, to=training: to.parts(*given))
        state = tmp_path / f"{what}-{value}"
        if config.model.precision == "fp16":
            count = training.train(data, reference, state).skipped_steps
            # Others may overflow by themselves: the scale starts high.
            at = training.skipped.index(0)
            assert training.skipped[at + 1] == 1 and 0 in training.skipped[at + 2 :]
            assert count == training.skipped.count(1)
            for before, after, skipped in zip(
                [start, *training.seen], training.seen, training.skipped, strict=False
            ):
                assert same(before, after) is bool(skipped)
            first = training.seen[at]
        else:
            with pytest.raises(NonFiniteError, match=r"step 2: loss .*not touched"):
                training.train(data, reference, state)
            (first,) = training.seen
            assert same(weights(policy), first)
        assert not same(start, first), "the first step trains"
        assert all(w.isfinite().all() for w in weights(policy).values())
        with torch.no_grad():
            for name, trained in policy.trainable():
                trained.copy_(start[name])
