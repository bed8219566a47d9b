"""Every objective through the learner: its steps, its baseline, its reference or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from test_learner import (
    config_for,
    first_gradients,
    make_learner,
    make_pairs,
    moved,
    never,
    same,
    trained,
)
from torch import Tensor

from rlhf import objectives
from rlhf.config import RunConfig
from rlhf.config_objective import OBJECTIVES, Needs, Objective
from rlhf.errors import InputError, Interrupted, NonFiniteError
from rlhf.examples import (
    LABEL_REFERENCE,
    Label,
    LabelData,
    Order,
    check_fits,
    mismatch,
    weights_advice,
)
from rlhf.labels import labels_schema
from rlhf.learner import Learner
from rlhf.logprobs import collate, sequence_logps, token_logps
from rlhf.objectives import PairLogps, log_ratio_margin

SMOOTHED = {"label_smoothing": 0.1}
SETTINGS: list[dict[str, Any]] = [
    {"name": "dpo", "sft_weight": 0.5},
    {"name": "dpo", "normalise": "tokens", "beta": 5.0},
    {"name": "cdpo", **SMOOTHED},
    {"name": "robust_dpo", **SMOOTHED},
    {"name": "ipo", "sft_weight": 0.1, "sft_normalise": "answers"},
    {"name": "kto", "good_weight": 1.2, "sft_weight": 0.1},
    {"name": "orpo"},
]


def named(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small") / "model")


def make_labels(count: int, seed: int = 0) -> pl.DataFrame:
    """Answers of random ids and unlike lengths, two a prompt, of both kinds."""
    rng = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return [int(i) for i in rng.integers(10, VOCABULARY, rng.integers(1, most))]

    prompts = [ids(8) for _ in range((count + 1) // 2)]
    rows = [
        {
            "prompt_id": f"p{i // 2}",
            "sample": i % 2,
            "prompt_token_ids": prompts[i // 2],
            "completion_token_ids": [*ids(9), 2],
            "good": i % 3 > 0,
        }
        for i in range(count)
    ]
    schema = labels_schema(["correctness"])
    return pl.DataFrame(rows, schema={name: schema[name] for name in rows[0]})


def test_cut_prompts_of_one_name_are_scored_each_by_itself() -> None:
    """Answers that are too long cut their prompt shorter than others do."""
    labels = make_labels(6).with_columns(
        prompt_id=pl.lit("p"), sample=pl.int_range(6, dtype=pl.Int32)
    )
    prompts = [ids[number % 2 :] for number, ids in enumerate(labels["prompt_token_ids"].to_list())]
    cut = labels.with_columns(prompt_token_ids=pl.Series(prompts, dtype=pl.List(pl.Int32)))
    order, data = Order(0, 1, 4, 3), LabelData(cut)
    sequences = data.unscored(order)

    def logp(prompt: Sequence[int], answer: Sequence[int]) -> float:
        return -float(sum(prompt) + 7919 * sum(answer))

    reference = data.scored(order, [logp(*sequence) for sequence in sequences])
    for step in data.steps(order, reference):
        for example in step.examples:
            assert isinstance(example, Label)
            assert example.reference == logp(example.prompt, example.completion)
        for sequence, known in zip(step.mismatched, step.reference_mismatched, strict=True):
            assert known == logp(*sequence)


def data_for(objective: dict[str, Any], count: int = 8) -> pl.DataFrame:
    labels = OBJECTIVES[objective["name"]].data == "labels"
    return make_labels(count) if labels else make_pairs(count)


def reference_of(learner: Learner, data: pl.DataFrame, round_index: int) -> pl.DataFrame | None:
    needed = learner.config.objective.needs.reference
    return referenced(learner, data, round_index) if needed else None


def run_round(
    learner: Learner, data: pl.DataFrame, state: Path, round_index: int = 1, check: Any = never
) -> list[dict[str, float]]:
    """The metrics of every step."""
    seen: list[dict[str, float]] = []
    reference = reference_of(learner, data, round_index)
    learner.train(data, reference, round_index, state, lambda _, m: seen.append(m), check)
    return seen


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_every_objective_lowers_its_loss(
    small_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = config_for(
        small_model, objective=settings, learner={"epochs": 6, "learning_rate": 2e-3}
    )
    seen = run_round(make_learner(config), data_for(settings), tmp_path)
    assert len(seen) == 6
    assert seen[-1]["loss"] < 0.97 * seen[0]["loss"]
    assert seen[-1]["accuracy"] > 0.7
    assert ("nll" in seen[0]) == (config.objective.sft > 0)
    if "nll" in seen[0]:
        assert seen[-1]["nll"] < seen[0]["nll"]
    assert ("kl_baseline" in seen[0]) == (settings["name"] == "kto")
    assert ("logratio_chosen" in seen[0]) == (settings["name"] not in ("kto", "orpo"))


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_micro_batches_leave_every_objectives_step_as_it_is(
    small_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    data, found = data_for(settings), []
    # Unequal ones too: a mean of micro-batch means would weigh the last examples more.
    for size in (1000, 50, 1):
        learner = make_learner(
            config_for(
                small_model,
                objective=settings,
                learner={"micro_batch_tokens": size, "max_grad_norm": 1e9},
            )
        )
        learner.policy.model.double()
        reference = reference_of(learner, data, 2)
        found.append(first_gradients(learner, data, tmp_path / str(size), reference))
    (whole, loss), *cut = found
    assert whole.norm() > 1e-3
    for gradients, other in cut:
        assert other == pytest.approx(loss, rel=1e-12)
        # Norms are fp32 inside even here, and a prompt that two answers share passes back once.
        assert (gradients - whole).norm() < 1e-6 * whole.norm()


def test_ktos_baseline_is_the_whole_steps_clamped_mean(small_model: Path, tmp_path: Path) -> None:
    config = config_for(
        small_model,
        objective={"name": "kto"},
        learner={"batch_pairs": 4, "micro_batch_tokens": 20, "epochs": 2, "learning_rate": 1e-9},
    )
    learner, labels = moved(make_learner(config), 0.1), make_labels(9)
    reference = referenced(learner, labels, 3)
    assert reference.schema == LABEL_REFERENCE
    assert (
        not reference.select("prompt_id", "answer_prompt_id", "answer_sample").is_duplicated().any()
    )
    steps = LabelData(labels).steps(Order(0, 3, 2, 4), reference)
    # Nine labels: a ninth alone would have no other completion, so it joins the step before.
    assert [len(step.examples) for step in steps] == [4, 5, 4, 5]

    def logp(sequence: Any) -> float:
        batch = collate([sequence], 0, "cpu")
        with torch.no_grad():
            return sequence_logps(token_logps(learner.policy.model, batch), batch).item()

    learner.policy.model.eval()
    expected = []
    for step in steps:
        policy = np.array([logp(sequence) for sequence in step.mismatched])
        with learner.policy.reference("initial"):
            start = np.array([logp(sequence) for sequence in step.mismatched])
        assert step.reference_mismatched == pytest.approx(start, abs=1e-4)
        expected.append(max(0.0, float((policy - start).mean())))
        own = {(e.prompt, e.completion) for e in step.examples}  # type: ignore[union-attr]
        assert not own & set(step.mismatched)
        assert Counter(c for _, c in step.mismatched) == Counter(c for _, c in own)
    assert max(expected) > 0.1
    seen: list[float] = []
    learner.train(labels, reference, 3, tmp_path, lambda _, m: seen.append(m["kl_baseline"]), never)
    assert seen == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20), st.integers(0, 99))
def test_mismatches_are_a_keyed_permutation_that_leaves_each_prompt(
    prompts: list[str], key: int
) -> None:
    found = mismatch(prompts, (key, 1))
    assert sorted(found) == list(range(len(prompts)))
    assert found == mismatch(prompts, (key, 1))
    if len(prompts) > 1:
        assert all(i != j for i, j in enumerate(found))
    if max(Counter(prompts).values()) <= len(prompts) / 2:
        assert all(prompts[i] != prompts[j] for i, j in enumerate(found))


def test_another_key_mismatches_otherwise() -> None:
    prompts = [str(i) for i in range(12)]
    assert mismatch(prompts, (1,)) != mismatch(prompts, (2,))


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["name"] != "orpo"], ids=named)
def test_a_first_loss_that_is_not_the_references_stops_before_any_update(
    small_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    learner = make_learner(config_for(small_model, objective=settings))
    data, before = data_for(settings), trained(learner)
    wrong = referenced(learner, data, 1)
    column = next(name for name in wrong.columns if name.startswith("reference"))
    wrong = wrong.with_columns(pl.col(column) - 5.0)
    with pytest.raises(NonFiniteError, match=f"first step's {settings['name']} loss is"):
        learner.train(data, wrong, 1, tmp_path, lambda *_: None, never)
    assert same(trained(learner), before)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_kto_stopped_after_any_step_and_resumed_changes_no_byte(
    small_model: Path, tmp_path: Path, stop: int
) -> None:
    config = config_for(
        small_model,
        lora={"dropout": 0.1},
        objective={"name": "kto"},
        learner={"batch_pairs": 3, "micro_batch_tokens": 20, "epochs": 2},
    )
    labels, calls = make_labels(6), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted("stopped at a safe point")

    whole = make_learner(config)
    losses = [m["loss"] for m in run_round(whole, labels, tmp_path / "whole", 2)]
    with pytest.raises(Interrupted):
        run_round(make_learner(config), labels, tmp_path / "cut", 2, check)
    torch.rand(stop)
    again = make_learner(config)
    assert [m["loss"] for m in run_round(again, labels, tmp_path / "cut", 2)] == losses[stop:]
    assert same(trained(again), trained(whole))


def test_orpo_asks_the_reference_nothing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was loaded")

    learner = make_learner(config_for(small_model, objective={"name": "orpo"}))
    monkeypatch.setattr(learner.policy, "reference", refuse)
    assert len(run_round(learner, make_pairs(8), tmp_path)) == 1


def hinge(logps: PairLogps, beta: float) -> Tensor:
    """A loss of a user's own (SLiC's, Zhao et al. 2023)."""
    return torch.relu(1 - beta * log_ratio_margin(logps, "none"))


def test_an_objective_is_added_by_one_function_and_one_row(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "hinge", hinge, raising=False)
    monkeypatch.setitem(OBJECTIVES, "hinge", Needs("pairs", True, "tokens", ("beta",)))
    config = config_for(small_model, learner={"epochs": 4, "learning_rate": 2e-3})
    mine = config.model_copy(update={"objective": Objective.model_construct(name="hinge")})
    pairs = make_pairs(8)
    seen = run_round(make_learner(mine), pairs, tmp_path)
    tokens = pairs.select(
        pl.col("chosen_token_ids").list.len() + pl.col("rejected_token_ids").list.len()
    ).sum()
    # Each of eight pairs has a loss of 1 at the reference; the row says: by tokens.
    assert seen[0]["loss"] == pytest.approx(8 / tokens.item(), rel=1e-4)
    assert seen[-1]["loss"] < seen[0]["loss"]


def test_data_that_an_objective_does_not_fit_is_refused_with_a_way_out(small_model: Path) -> None:
    learner = make_learner(config_for(small_model, objective={"name": "kto"}))
    with pytest.raises(
        InputError, match=r"kto trains on labels.*holds pairs.*one of dpo.*--to lab"
    ):
        referenced(learner, make_pairs(4), 1)
    orpo = Objective(name="orpo")
    with pytest.raises(
        InputError, match=r"data/a\.jsonl holds labels; take one of kto, or.*convert"
    ):
        check_fits(orpo, ["prompt", "completion", "label"], "data/a.jsonl")
    check_fits(orpo, ["prompt", "chosen", "rejected"])


def test_advice_on_ktos_weights_restores_the_authors_balance() -> None:
    def advice(good: int, bad: int, **weights: float) -> str | None:
        return weights_advice(Objective.model_validate({"name": "kto", **weights}), good, bad)

    assert advice(12, 10) is None and advice(13, 10) is None
    said = advice(10, 30)
    assert said is not None and "good_weight 3.45 or objective.bad_weight 0.29" in said
    assert advice(10, 30, good_weight=3.45) is None
    assert advice(10, 30, bad_weight=0.29) is None


def test_a_step_of_kto_needs_two_answers(small_model: Path) -> None:
    values = config_for(small_model).model_dump()
    values["objective"] = {"name": "kto"}
    values["learner"]["batch_pairs"] = 1
    with pytest.raises(ValueError, match=r"batch_pairs must be at least 2 with kto.*got 1"):
        RunConfig.model_validate(values)
