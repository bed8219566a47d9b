"""Epochs with validation: what is held out, which weights are kept, when training stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from fakes import referenced
from small_models import save_small_model
from test_learner import config_for, make_learner, make_pairs, never, same, train, trained
from test_learner_objectives import make_labels
from torch import Tensor

from rlhf.checkpoint import Checkpoints, Progress
from rlhf.config import RunConfig
from rlhf.errors import InputError, Interrupted, NonFiniteError
from rlhf.examples import split_by_cluster
from rlhf.learner import Learner
from rlhf.round_data import RoundData
from rlhf.types import Trained


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small") / "model")


def clustered(table: pl.DataFrame) -> pl.DataFrame:
    """Two rows a cluster."""
    return table.with_row_index("cluster").with_columns(
        (pl.col("cluster") // 2).cast(pl.String).alias("cluster")
    )


def validating(small_model: Path, **learner: Any) -> RunConfig:
    learner = {"epochs": 4, "batch_pairs": 4, "validation_share": 0.25, **learner}
    return config_for(small_model, lora={"dropout": 0.1}, learner=learner)


def test_a_split_keeps_clusters_whole_and_is_fixed_by_the_seed() -> None:
    table = clustered(make_pairs(40))
    training, held = split_by_cluster(table, 0.25, seed=3)
    assert held["cluster"].n_unique() == 5 and held.height == 10
    assert not set(held["cluster"]) & set(training["cluster"])
    assert pl.concat([training, held]).sort("prompt_id").equals(table.sort("prompt_id"))
    again = split_by_cluster(table.reverse(), 0.25, seed=3)[1]
    assert set(again["cluster"]) == set(held["cluster"])
    assert set(split_by_cluster(table, 0.25, seed=4)[1]["cluster"]) != set(held["cluster"])
    # A larger share holds out what a smaller one does, and more.
    assert set(held["cluster"]) < set(split_by_cluster(table, 0.5, seed=3)[1]["cluster"])
    with pytest.raises(InputError, match=r"validation_share: 0.2.*1 cluster"):
        split_by_cluster(table.head(2), 0.2, seed=3)


def test_held_out_pairs_never_train_and_the_best_epoch_is_kept(
    small_model: Path, tmp_path: Path
) -> None:
    # A rate that learns the pairs by heart: the held-out loss turns, with random answers.
    config = validating(small_model, learning_rate=2e-2)
    learner, pairs = make_learner(config), clustered(make_pairs(16))
    held = split_by_cluster(pairs, 0.25, config.run.seed)[1]
    seen: list[dict[str, float]] = []
    weights: list[dict[str, Tensor]] = []

    def on_step(_: int, found: dict[str, float]) -> None:
        seen.append(found)
        weights.append(trained(learner))

    reference = referenced(learner, pairs, 1)
    assert reference.height == pairs.height
    result = learner.train(pairs, reference, 1, tmp_path, on_step, never)
    assert result.planned_steps == RoundData(pairs, learner.config, 1).planned == 12 == len(seen)
    losses = {n + 1: m["validation_loss"] for n, m in enumerate(seen) if "validation_loss" in m}
    assert list(losses) == [3, 6, 9, 12]
    assert result.best_step == min(losses, key=lambda n: losses[n]) != 12
    assert result.best_loss == losses[result.best_step]
    assert same(trained(learner), weights[result.best_step - 1])
    # The loss that was measured is that of the held-out pairs under those weights.
    step = make_step(learner, held, reference)
    assert learner.measure(step)["loss"] == pytest.approx(result.best_loss)


def make_step(learner: Learner, held: pl.DataFrame, reference: pl.DataFrame) -> Any:
    from rlhf.examples import Order, PairData

    (step,) = PairData(held).steps(Order(0, 1, 1, held.height), reference)
    return step


def test_training_stops_after_epochs_without_a_lower_loss(
    small_model: Path, tmp_path: Path
) -> None:
    config = validating(small_model, learning_rate=2e-2, patience=1, epochs=8)
    result, log = train(make_learner(config), clustered(make_pairs(16)), tmp_path)
    assert result.best_step is not None
    # Three steps an epoch: it stops at the first epoch that is no better.
    assert log.steps[-1] == result.best_step + 3 == result.executed_steps < result.planned_steps


@pytest.mark.parametrize("numbers", [{2}, {2, 4}, set()])
def test_a_held_out_loss_that_is_no_number_is_never_the_best(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: set[int]
) -> None:
    epochs, measure = iter(range(1, 5)), Learner.measure

    def broken(self: Learner, step: Any) -> dict[str, float]:
        found = measure(self, step)
        return found if next(epochs) in numbers else {**found, "loss": math.nan}

    monkeypatch.setattr(Learner, "measure", broken)
    learner, pairs = make_learner(validating(small_model)), clustered(make_pairs(16))
    if not numbers:
        with pytest.raises(NonFiniteError, match="after no epoch the loss of held-out examples"):
            train(learner, pairs, tmp_path)
        return
    result, _ = train(learner, pairs, tmp_path)
    assert result.best_step in {3 * epoch for epoch in numbers}
    assert result.best_loss is not None and math.isfinite(result.best_loss)


def test_best_weights_that_a_checkpoint_names_stay(small_model: Path, tmp_path: Path) -> None:
    """Trained again from there, no later epoch may be better, on another machine."""
    learner = make_learner(validating(small_model))
    checkpoints = Checkpoints(tmp_path / "checkpoints", learner.policy, learner.sharding)
    learner.sharding.begin()
    checkpoints.save_best(3)
    for step in (4, 5):
        checkpoints.save(Progress(1, step, best_step=3, best_loss=0.5))
    for step in (6, 9, 12):
        checkpoints.save_best(step)
    assert {path.name for path in tmp_path.glob("best-*")} == {"best-000003", "best-000012"}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 5, 6, 9, 12])
def test_a_stop_and_a_resume_keep_the_same_best_weights(
    small_model: Path, tmp_path: Path, stop: int
) -> None:
    config, pairs = validating(small_model, learning_rate=2e-2), clustered(make_pairs(16))

    def go(state: Path, stop: int | None = None) -> tuple[Trained, dict[str, Tensor]]:
        calls = 0

        def check() -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Interrupted("stopped at a safe point")

        torch.rand(3)
        learner = make_learner(config)
        return train(learner, pairs, state, check=check)[0], trained(learner)

    whole = go(tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tmp_path / "cut", stop)
    again = go(tmp_path / "cut")
    assert again[0] == whole[0]
    assert same(again[1], whole[1])


def test_kto_is_validated_with_a_baseline_of_the_held_out_answers(
    small_model: Path, tmp_path: Path
) -> None:
    config = validating(small_model).model_copy(
        update={"objective": config_for(small_model, objective={"name": "kto"}).objective}
    )
    learner = make_learner(config)
    labels = clustered(make_labels(16))
    seen: list[dict[str, float]] = []
    reference = referenced(learner, labels, 1)
    learner.train(labels, reference, 1, tmp_path, lambda _, m: seen.append(m), never)
    assert sum("validation_loss" in m for m in seen) == 4
    assert all("validation_accuracy" in m for m in seen if "validation_loss" in m)


def test_patience_without_validation_is_refused(small_model: Path) -> None:
    with pytest.raises(ValueError, match=r"patience needs learner.validation_share"):
        config_for(small_model, learner={"patience": 2})
