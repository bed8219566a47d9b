"""The learner: how a step is cut, or where a round stops, changes nothing; NaN goes nowhere."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fakes import referenced
from hypothesis import given
from hypothesis import strategies as st
from small_models import VOCABULARY, save_small_model
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import rlhf.checkpoint
from rlhf.config import RunConfig
from rlhf.errors import InputError, Interrupted, NonFiniteError
from rlhf.examples import PAIR_REFERENCE
from rlhf.files import write_json
from rlhf.learner import Learner
from rlhf.logprobs import collate, sequence_logps, token_logps
from rlhf.optimizer import learning_rate
from rlhf.packing import TokenPair
from rlhf.policy import Policy
from rlhf.round_data import RoundData
from rlhf.types import Completion, Trained, pairs_schema

END = 2
METRICS = {
    "loss",
    "preferred",
    "accuracy",
    "logratio_chosen",
    "logratio_rejected",
    "margin",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "skipped",
}


def config_for(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run's settings: LoRA of rank 4 in fp32, unless a section says otherwise."""
    source = {"path": "prompts.jsonl"}
    return RunConfig.model_validate(
        {
            "model": {
                "path": str(folder),
                "precision": "fp32",
                "lora": {"rank": 4, "alpha": 8, **sections.pop("lora", {})},
                **sections.pop("model", {}),
            },
            "prompts": {"train": source, "gate": source, "final": source},
            "judges": {"panel": [{"name": "j", "function": "m:f", "dimensions": ["correctness"]}]},
            "learner": {
                "batch_pairs": 8,
                "micro_batch_tokens": 64,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "warmup_share": 0.0,
                **sections.pop("learner", {}),
            },
            # Asked for by `rounds.reference: round_start`; the learner doesn't read it.
            "gates": {"max_kl": 1.0},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small") / "model")


def make_learner(config: RunConfig) -> Learner:
    return Learner(Policy(config.model, config.model.path, "cpu", config.run.seed), config)


def make_pairs(count: int, seed: int = 0) -> pl.DataFrame:
    """Pairs of random ids and unlike lengths."""
    rng = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return [int(i) for i in rng.integers(10, VOCABULARY, rng.integers(1, most))]

    rows = [
        {
            "prompt_id": f"p{i}",
            "chosen_sample": i % 3,
            "rejected_sample": 3 + i % 2,
            "prompt_token_ids": ids(8),
            "chosen_token_ids": [*ids(6), END],
            "rejected_token_ids": [*ids(9), END],
        }
        for i in range(count)
    ]
    schema = pairs_schema(["correctness"])
    return pl.DataFrame(rows, schema={name: schema[name] for name in rows[0]})


@dataclass
class Log:
    """What `train` reported, and the trained weights after every step."""

    learner: Learner
    steps: list[int] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)
        self.metrics.append(metrics)
        self.weights.append(trained(self.learner))


def trained(learner: Learner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in learner.policy.trainable()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def never() -> None:
    """No signal ever asks for a stop."""


def train(
    learner: Learner,
    pairs: pl.DataFrame,
    state: Path,
    *,
    round_index: int = 1,
    check: Callable[[], None] = never,
    reference: pl.DataFrame | None = None,
) -> tuple[Trained, Log]:
    log = Log(learner)
    if reference is None and learner.config.objective.needs.reference:
        reference = referenced(learner, pairs, round_index)
    return learner.train(pairs, reference, round_index, state, log, check), log


def moved(learner: Learner, scale: float = 0.02) -> Learner:
    """The learner with a policy that has left its reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in learner.policy.trainable():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return learner


@contextmanager
def gradients_seen() -> Iterator[list[list[Tensor]]]:
    """The gradients that reach each optimizer step."""
    seen: list[list[Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        seen.append([p.grad.clone() for p in parameters])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def first_gradients(
    learner: Learner, pairs: pl.DataFrame, state: Path, reference: pl.DataFrame | None = None
) -> tuple[Tensor, float]:
    """(all gradients of one step as one vector, its loss), away from the reference."""
    with gradients_seen() as seen:
        _, log = train(moved(learner), pairs, state, round_index=2, reference=reference)
    assert len(seen) == 1
    return torch.cat([g.flatten() for g in seen[0]]), log.metrics[0]["loss"]


def test_a_pass_without_gradients_stops_between_micro_batches(small_model: Path) -> None:
    learner = make_learner(config_for(small_model, learner={"micro_batch_tokens": 50}))
    sequences = RoundData(make_pairs(6), learner.config, 1).unscored()
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Interrupted("as asked")

    learner.check = check
    with pytest.raises(Interrupted, match="as asked"):
        learner.answer_logps(sequences)
    assert len(learner.answer_logps(sequences)) == len(sequences) and asked > 3


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_micro_batches_leave_the_step_as_it_is_in_float64(
    small_model: Path, tmp_path: Path, tuning: str
) -> None:
    pairs, reference, found = make_pairs(8), None, []
    # Unequal ones too: a mean of micro-batch means would weigh some pairs more.
    for size in (1000, 60, 40, 1):
        learner = make_learner(
            config_for(
                small_model,
                model={"tuning": tuning},
                learner={"micro_batch_tokens": size, "max_grad_norm": 1e9},
            )
        )
        learner.policy.model.double()
        if reference is None:
            reference = referenced(learner, pairs, 1)
        found.append(first_gradients(learner, pairs, tmp_path / str(size), reference))
    (whole, loss), *cut = found
    assert whole.dtype is torch.float64 and whole.norm() > 1e-2
    assert abs(loss - math.log(2)) > 1e-3
    for gradients, other in cut:
        assert other == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(gradients, whole, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_micro_batches_leave_the_step_as_it_is_in_fp32(
    small_model: Path, tmp_path: Path, tuning: str
) -> None:
    pairs = make_pairs(8)
    found = []
    for size in (1000, 60, 1):
        config = config_for(
            small_model, model={"tuning": tuning}, learner={"micro_batch_tokens": size}
        )
        found.append(first_gradients(make_learner(config), pairs, tmp_path / str(size)))
    (whole, loss), *cut = found
    for gradients, other in cut:
        assert other == pytest.approx(loss, rel=1e-5)
        assert (gradients - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(
    small_model: Path, tmp_path: Path, tuning: str
) -> None:
    found = []
    for on in (False, True):
        config = config_for(
            small_model, model={"tuning": tuning}, learner={"gradient_checkpointing": on}
        )
        state = tmp_path / str(on)
        found.append(first_gradients(make_learner(config), make_pairs(4), state)[0])
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()


@pytest.mark.parametrize(
    ("tuning", "precision"),
    [
        ("lora", "fp32"),
        ("lora", "bf16"),
        ("lora", "fp16"),
        ("qlora", "fp32"),
        ("qlora", "bf16"),
        ("full", "fp32"),
        ("full", "bf16"),
    ],
)
def test_every_tuning_and_precision_lowers_the_loss(
    small_model: Path, tmp_path: Path, tuning: str, precision: str
) -> None:
    learner = make_learner(
        config_for(
            small_model,
            model={"tuning": tuning, "precision": precision},
            learner={"epochs": 5, "learning_rate": 2e-4 if tuning == "full" else 2e-3},
        )
    )
    result, log = train(learner, make_pairs(8), tmp_path)
    assert result == Trained(5, 5, 0, log.metrics[0]["loss"])
    losses = [m["loss"] for m in log.metrics]
    # bf16 and fp16 passes over other batches round otherwise; fp32 shows no difference.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4 if precision == "fp32" else 0.05)
    assert losses[-1] < losses[0] - 0.05
    assert log.metrics[-1]["margin"] > 0.1
    assert log.metrics[-1]["accuracy"] > 0.7


def test_metrics_are_those_of_the_whole_step(small_model: Path, tmp_path: Path) -> None:
    config = config_for(small_model, learner={"micro_batch_tokens": 50})
    learner = moved(make_learner(config))
    pairs = make_pairs(8)
    policy = sums(learner, pairs)
    with learner.policy.reference("initial"):
        reference = sums(learner, pairs)
    chosen, rejected = ((policy - reference)[side::2] for side in (0, 1))
    _, log = train(learner, pairs, tmp_path, round_index=2)
    (metrics,) = log.metrics
    assert metrics.keys() == METRICS
    margins = 0.2 * (chosen - rejected)
    expected = {
        "logratio_chosen": chosen.mean(),
        "logratio_rejected": rejected.mean(),
        "margin": margins.mean(),
        "accuracy": (margins > 0).mean(),
        "loss": np.log1p(np.exp(-margins)).mean(),
        "learning_rate": 1e-3,
        "skipped": 0.0,
    }
    assert {n: metrics[n] for n in expected} == pytest.approx(expected, abs=1e-5)
    assert metrics["grad_norm"] > 0 and metrics["tokens_per_second"] > 0


def sums(learner: Learner, pairs: pl.DataFrame) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sequence log-probs, one unpadded sequence at a time: chosen, rejected, chosen, ..."""
    found = []
    learner.policy.model.eval()
    for row in pairs.iter_rows(named=True):
        for side in ("chosen_token_ids", "rejected_token_ids"):
            batch = collate([(row["prompt_token_ids"], row[side])], 0, "cpu")
            with torch.no_grad():
                tokens_N = token_logps(learner.policy.model, batch)
                found.append(sequence_logps(tokens_N, batch).item())
    return np.array(found)


@pytest.mark.parametrize("kind", ["initial", "round_start"])
def test_reference_logps_are_those_of_the_reference(small_model: Path, kind: str) -> None:
    # Dropout is for training: as after an earlier round, the model comes in train mode.
    config = config_for(small_model, rounds={"reference": kind}, lora={"dropout": 0.5})
    learner = moved(make_learner(config))
    learner.policy.model.train()
    before, pairs = trained(learner), make_pairs(7)
    table = referenced(learner, pairs, 1)
    assert table.schema == PAIR_REFERENCE
    assert same(trained(learner), before)
    with learner.policy.reference(kind):
        expected = sums(learner, pairs)
    assert table["reference_chosen"].to_list() == pytest.approx(expected[0::2], abs=1e-4)
    assert table["reference_rejected"].to_list() == pytest.approx(expected[1::2], abs=1e-4)
    other = np.abs(sums(learner, pairs) - expected).max()
    assert other == 0 if kind == "round_start" else other > 0.1


def test_reference_logps_are_joined_by_pair_not_by_row(small_model: Path, tmp_path: Path) -> None:
    pairs, weights = make_pairs(8), []
    for shuffled in (False, True):
        learner = moved(make_learner(config_for(small_model)))
        reference = referenced(learner, pairs, 1)
        if shuffled:
            reference = reference.sample(fraction=1, shuffle=True, seed=1)
        state = tmp_path / str(shuffled)
        weights.append(train(learner, pairs, state, round_index=2, reference=reference)[1].weights)
    assert same(weights[0][-1], weights[1][-1])


def test_logps_come_back_in_the_order_of_the_completions(small_model: Path) -> None:
    learner = moved(make_learner(config_for(small_model)))
    pairs = make_pairs(7)
    completions = [
        Completion("p", i, "", tuple(row[side]), tuple(row["prompt_token_ids"]), (), "stop", 0)
        for i, row in enumerate(pairs.iter_rows(named=True))
        for side in ("chosen_token_ids", "rejected_token_ids")
    ]
    now, start = learner.logps(completions), learner.logps(completions, initial=True)
    assert [len(row) for row in now] == [len(c.token_ids) for c in completions]
    assert [sum(row) for row in now] == pytest.approx(sums(learner, pairs), abs=1e-4)
    with learner.policy.reference("initial"):
        assert [sum(row) for row in start] == pytest.approx(sums(learner, pairs), abs=1e-4)


def test_every_epoch_takes_every_pair_once_in_an_order_of_its_own(
    small_model: Path, tmp_path: Path
) -> None:
    config = config_for(small_model, learner={"epochs": 2, "batch_pairs": 3})
    learner, pairs = make_learner(config), make_pairs(8)
    reference = referenced(learner, pairs, 1)
    seen: list[list[tuple[int, ...]]] = []

    score = learner.sequence_logps

    def note(sequences: Sequence[TokenPair]) -> Tensor:
        chosen = sequences[: len(sequences) // 2]
        seen.append([(*prompt, *completion) for prompt, completion in chosen])
        return score(sequences)

    learner.sequence_logps = note  # type: ignore[method-assign]
    result, log = train(learner, pairs, tmp_path, reference=reference)
    assert result.planned_steps == RoundData(
        pairs, learner.config, 1
    ).planned == 6 and log.steps == [1, 2, 3, 4, 5, 6]
    assert [len(rows) for rows in seen] == [3, 3, 2, 3, 3, 2]
    epochs = [list(chain(*seen[:3])), list(chain(*seen[3:]))]
    expected = sorted(
        tuple(row["prompt_token_ids"]) + tuple(row["chosen_token_ids"])
        for row in pairs.iter_rows(named=True)
    )
    assert [sorted(epoch) for epoch in epochs] == [expected, expected]
    assert [set(rows) for rows in seen[:3]] != [set(rows) for rows in seen[3:]]


def test_gradients_are_clipped_and_their_full_norm_reported(
    small_model: Path, tmp_path: Path
) -> None:
    learner = make_learner(config_for(small_model, learner={"max_grad_norm": 1e-3}))
    with gradients_seen() as seen:
        _, log = train(learner, make_pairs(8), tmp_path)
    norm = torch.cat([g.flatten() for g in seen[0]]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2)
    assert log.metrics[0]["grad_norm"] > 1e-2


def test_a_round_without_pairs_trains_nothing(small_model: Path, tmp_path: Path) -> None:
    learner = make_learner(config_for(small_model))
    before = trained(learner)
    result, log = train(learner, make_pairs(1).clear(), tmp_path)
    assert result == Trained(0, 0, 0, None) and not log.steps
    assert same(trained(learner), before)


def breaks_at(learner: Learner, log: Callable[[], int], steps: set[int], what: str) -> None:
    """Make the given steps (from 1) overflow: in the loss, or in the gradients alone."""

    def broken() -> bool:
        return log() + 1 in steps

    if what == "loss":
        learner.policy.model.get_output_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda _module, _args, logits: logits * math.inf if broken() else logits
        )
    else:
        _, parameter = learner.policy.trainable()[-1]
        parameter.register_hook(lambda gradient: gradient * math.inf if broken() else gradient)


def train_breaking(
    learner: Learner, pairs: pl.DataFrame, state: Path, steps: set[int], what: str
) -> tuple[Trained | NonFiniteError, Log]:
    log = Log(learner)
    reference = referenced(learner, pairs, 1)
    breaks_at(learner, lambda: len(log.steps), steps, what)
    try:
        return learner.train(pairs, reference, 1, state, log, never), log
    except NonFiniteError as error:
        return error, log


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_non_finite_loss_or_gradient_never_reaches_the_weights(
    small_model: Path, tmp_path: Path, precision: str, what: str
) -> None:
    config = config_for(
        small_model, model={"precision": precision}, learner={"batch_pairs": 2, "epochs": 2}
    )
    learner = make_learner(config)
    error, log = train_breaking(learner, make_pairs(4), tmp_path, {3}, what)
    assert isinstance(error, NonFiniteError)
    assert str(error).startswith("step 3: loss ") and "not touched" in str(error)
    assert log.steps == [1, 2] and not same(log.weights[0], log.weights[1])
    assert same(trained(learner), log.weights[1])
    assert not (tmp_path / "checkpoints").exists()


def scales(state: Path) -> float:
    newest = max((state / "checkpoints").iterdir())
    kept = torch.load(newest / "rank-00000.pt", weights_only=True)
    return float(kept["sharding"]["scaler"]["scale"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_fp16_overflow_skips_its_step_and_halves_the_scale(
    small_model: Path, tmp_path: Path, what: str
) -> None:
    config = config_for(
        small_model,
        model={"precision": "fp16"},
        learner={"batch_pairs": 2, "epochs": 2, "checkpoint_steps": 1, "max_skipped_steps": 2},
    )
    learner = make_learner(config)
    start = trained(learner)
    found: list[float] = []
    log = Log(learner)

    def check() -> None:
        # Called after step n, when the checkpoint on disk is still that of step n - 1.
        if len(log.steps) > 1:
            found.append(scales(tmp_path))

    reference = referenced(learner, make_pairs(6), 1)
    breaks_at(learner, lambda: len(log.steps), {1, 3, 5}, what)
    result = learner.train(make_pairs(6), reference, 1, tmp_path, log, check)
    # Three misses, none two in a row.
    assert (result.planned_steps, result.executed_steps, result.skipped_steps) == (6, 3, 3)
    assert [m["skipped"] for m in log.metrics] == [1, 0, 1, 0, 1, 0]
    whole = 65536.0
    assert found == [whole / 2, whole / 2, whole / 4, whole / 4, whole / 8]
    weights = [start, *log.weights]
    moves = [not same(a, b) for a, b in pairwise(weights)]
    assert moves == [False, True, False, True, False, True]
    assert all(w.isfinite().all() for w in weights[-1].values())


def test_fp16_overflows_in_a_row_stop_the_run(small_model: Path, tmp_path: Path) -> None:
    config = config_for(
        small_model,
        model={"precision": "fp16"},
        learner={"batch_pairs": 2, "epochs": 2, "max_skipped_steps": 2},
    )
    learner = make_learner(config)
    error, log = train_breaking(learner, make_pairs(4), tmp_path, {2, 3}, "gradient")
    assert isinstance(error, NonFiniteError)
    assert "step 3: 2 fp16 overflows in a row" in str(error) and "loss scale now 16384" in str(
        error
    )
    assert log.steps == [1, 2] and same(trained(learner), log.weights[0])


def test_a_first_loss_that_is_not_ln_2_stops_before_any_update(
    small_model: Path, tmp_path: Path
) -> None:
    learner, pairs = make_learner(config_for(small_model)), make_pairs(8)
    before = trained(learner)
    wrong = referenced(learner, pairs, 1).with_columns(pl.col("reference_chosen") + 0.5)
    with pytest.raises(
        NonFiniteError, match=r"round 1: the first step's dpo loss is 0\.7.*0\.6931"
    ):
        train(learner, pairs, tmp_path, reference=wrong)
    assert same(trained(learner), before)


def test_the_first_loss_is_checked_only_where_policy_and_reference_agree(
    small_model: Path, tmp_path: Path
) -> None:
    pairs = make_pairs(8)
    later = moved(make_learner(config_for(small_model)), 0.1)
    result, _ = train(later, pairs, tmp_path / "later", round_index=2)
    assert result.first_loss is not None and abs(result.first_loss - math.log(2)) > 1e-3

    moving = config_for(small_model, rounds={"reference": "round_start"})
    result, _ = train(moved(make_learner(moving), 0.1), pairs, tmp_path / "moving", round_index=2)
    assert result.first_loss == pytest.approx(math.log(2), abs=1e-4)

    # Dropout in training, none in the reference pass: no fault of the weights.
    noisy = config_for(small_model, rounds={"reference": "round_start"}, lora={"dropout": 0.3})
    result, _ = train(moved(make_learner(noisy), 0.1), pairs, tmp_path / "noisy", round_index=2)
    assert result.first_loss is not None and abs(result.first_loss - math.log(2)) > 1e-3


def resumable(small_model: Path, **learner: Any) -> RunConfig:
    return config_for(
        small_model,
        lora={"dropout": 0.1},
        learner={"batch_pairs": 3, "micro_batch_tokens": 32, "epochs": 2, **learner},
    )


@dataclass
class Whole:
    """A round that was never stopped."""

    pairs: pl.DataFrame
    reference: pl.DataFrame
    result: Trained
    log: Log


@pytest.fixture(scope="module")
def whole(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    learner, pairs = make_learner(resumable(small_model)), make_pairs(6)
    reference = referenced(learner, pairs, 1)
    result, log = train(
        learner, pairs, tmp_path_factory.mktemp("whole"), round_index=3, reference=reference
    )
    assert log.steps == [1, 2, 3, 4]
    return Whole(pairs, reference, result, log)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_stop_after_any_step_and_a_resume_change_no_byte(
    small_model: Path, tmp_path: Path, whole: Whole, stop: int
) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted("stopped at a safe point")

    def go(check: Callable[[], None]) -> tuple[Trained, Log]:
        # What this process drew before must not matter.
        torch.rand(stop)
        learner = make_learner(resumable(small_model))
        reference = whole.reference
        return train(
            learner, whole.pairs, tmp_path, round_index=3, check=check, reference=reference
        )

    with pytest.raises(Interrupted):
        go(check)
    result, log = go(never)
    assert log.steps == [1, 2, 3, 4][stop:]
    assert result == whole.result
    assert same(trained(log.learner), whole.log.weights[-1])
    losses = [m["loss"] for m in whole.log.metrics]
    assert [m["loss"] for m in log.metrics] == losses[stop:]


def test_a_kill_between_checkpoints_repeats_the_steps_since_the_last(
    small_model: Path, tmp_path: Path, whole: Whole
) -> None:
    class Killed(BaseException):
        """The process is gone: nothing is saved on the way out."""

    def kill(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    config = resumable(small_model, checkpoint_steps=2)
    with pytest.raises(Killed):
        make_learner(config).train(whole.pairs, whole.reference, 3, tmp_path, kill, never)
    learner = make_learner(config)
    result, log = train(learner, whole.pairs, tmp_path, round_index=3, reference=whole.reference)
    assert log.steps == [3, 4] and result == whole.result
    assert same(trained(learner), whole.log.weights[-1])


def test_dropout_and_order_are_fixed_by_seed_and_round(
    small_model: Path, tmp_path: Path, whole: Whole
) -> None:
    for round_index, equal in ((3, True), (4, False)):
        learner = make_learner(resumable(small_model))
        torch.manual_seed(99)
        train(
            learner,
            whole.pairs,
            tmp_path / str(round_index),
            round_index=round_index,
            reference=whole.reference,
        )
        assert same(trained(learner), whole.log.weights[-1]) is equal


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_was_touched_is_refused(
    small_model: Path, tmp_path: Path, whole: Whole
) -> None:
    def stop() -> None:
        raise Interrupted("stopped")

    learner = make_learner(resumable(small_model))
    folder = tmp_path / "checkpoints" / "000001"

    def go(check: Callable[[], None]) -> None:
        train(learner, whole.pairs, tmp_path, check=check, reference=whole.reference)

    with pytest.raises(Interrupted):
        go(stop)
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    before = trained(learner)
    for name in ("trained/model.safetensors", "rank-00000.pt"):
        for damage in (flip, Path.unlink):
            damage(folder / name)
            with pytest.raises(InputError, match=rf"{name}: its SHA-256 is .* remove .*000001"):
                go(never)
            (folder / name).write_bytes(files[folder / name])
    meta = folder / "checkpoint.json"
    meta.write_bytes(files[meta][:20])
    with pytest.raises(InputError, match=r"checkpoint\.json must be JSON.*remove .*000001"):
        go(never)
    assert same(trained(learner), before)


def test_a_checkpoint_names_its_step_and_hashes(
    small_model: Path, tmp_path: Path, whole: Whole
) -> None:
    config = resumable(small_model, checkpoint_steps=3)
    train(make_learner(config), whole.pairs, tmp_path, round_index=3, reference=whole.reference)
    meta = json.loads((tmp_path / "checkpoints/000003/checkpoint.json").read_text())
    assert meta["step"] == 3 and meta["skipped"] == 0
    assert meta["first_loss"] == whole.result.first_loss
    assert meta["sha256"].keys() == {"trained/model.safetensors", "rank-00000.pt"}


def kept_steps(state: Path) -> list[str]:
    return sorted(path.name for path in (state / "checkpoints").iterdir())


def test_the_last_two_checkpoints_are_kept_and_the_older_one_serves_alone(
    small_model: Path, tmp_path: Path, whole: Whole
) -> None:
    config = resumable(small_model, checkpoint_steps=1)

    def go() -> tuple[Trained, Log]:
        return train(
            make_learner(config),
            whole.pairs,
            tmp_path,
            round_index=3,
            reference=whole.reference,
        )

    go()
    assert kept_steps(tmp_path) == ["000002", "000003"]
    newest = tmp_path / "checkpoints/000003/rank-00000.pt"
    flip(newest)
    with pytest.raises(InputError, match=r"remove .*000003 to go on from step 2"):
        go()
    shutil.rmtree(newest.parent)
    result, log = go()
    assert log.steps == [3, 4] and result == whole.result
    assert same(trained(log.learner), whole.log.weights[-1])


def test_a_checkpoint_that_can_not_be_written_costs_none_of_the_others(
    small_model: Path, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def fail_at_third(path: Path, value: Any) -> None:
        nonlocal written
        written += 1
        assert len(kept_steps(tmp_path)) == written, "pruned before the new one is whole"
        if written == 3:
            raise OSError("the disk is gone")
        write_json(path, value)

    monkeypatch.setattr(rlhf.checkpoint, "write_json", fail_at_third)
    with pytest.raises(OSError, match="gone"):
        train(
            make_learner(resumable(small_model, checkpoint_steps=1)),
            whole.pairs,
            tmp_path,
            round_index=3,
            reference=whole.reference,
        )
    assert kept_steps(tmp_path) == ["000001", "000002"]


def test_learning_rates_written_out() -> None:
    def rates(schedule: str, warmup: float = 0.0) -> list[float]:
        return [round(learning_rate(s, 4, 2.0, schedule, warmup), 6) for s in range(4)]

    assert rates("constant") == [2.0, 2.0, 2.0, 2.0]
    assert rates("linear") == [2.0, 1.5, 1.0, 0.5]
    # 1 + cos(k pi / 4), k = 0 ... 3.
    assert rates("cosine") == [2.0, 1.707107, 1.0, 0.292893]
    # Half the steps rise to the peak; the decay starts from there.
    assert rates("constant", 0.5) == [1.0, 2.0, 2.0, 2.0]
    assert rates("linear", 0.5) == [1.0, 2.0, 2.0, 1.0]
    assert rates("cosine", 1.0) == [0.5, 1.0, 1.5, 2.0]


@given(
    st.integers(1, 400),
    st.sampled_from(["constant", "linear", "cosine"]),
    st.floats(0, 1),
)
def test_a_schedule_rises_then_never_rises_again_and_every_step_counts(
    planned: int, schedule: str, warmup: float
) -> None:
    rates = [learning_rate(s, planned, 1.0, schedule, warmup) for s in range(planned)]
    assert all(0 < r <= 1 for r in rates) and max(rates) == 1
    peak = rates.index(1.0)
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))


def test_rates_reach_the_optimizer(small_model: Path, tmp_path: Path) -> None:
    schedule = {"schedule": "linear", "warmup_share": 0.5, "batch_pairs": 2, "learning_rate": 0.01}
    learner = make_learner(config_for(small_model, learner=schedule))
    used: list[float] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    try:
        _, log = train(learner, make_pairs(8), tmp_path)
    finally:
        handle.remove()
    assert used == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert [m["learning_rate"] for m in log.metrics] == used


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "steps"), [(0, 4, 3, 0), (1, 4, 1, 1), (8, 4, 2, 4), (9, 4, 2, 6)]
)
def test_planned_steps(small_model: Path, pairs: int, batch: int, epochs: int, steps: int) -> None:
    config = config_for(small_model, learner={"batch_pairs": batch, "epochs": epochs})
    learner = Learner.__new__(Learner)
    learner.config, learner.settings = config, config.learner
    assert RoundData(make_pairs(9).head(pairs), learner.config, 0).planned == steps
