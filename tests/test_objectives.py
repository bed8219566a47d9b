"""DPO against the paper's formula written out, against its symmetries, and against TRL."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from rlhf.logprobs import collate, sequence_logps, token_logps
from rlhf.objectives import OBJECTIVES, PairLogps, dpo, pair_metrics

BETA = 0.2
LOGPS = st.floats(-80, 0, allow_nan=False)
Pair = tuple[list[int], list[int], list[int]]


def logps_of(*values: float) -> PairLogps:
    return PairLogps(*(torch.tensor([v], dtype=torch.float64) for v in values))


@given(LOGPS, LOGPS, LOGPS, LOGPS, st.floats(0.01, 1.0))
def test_dpo_is_equation_7_of_the_paper(
    chosen: float, rejected: float, reference_chosen: float, reference_rejected: float, beta: float
) -> None:
    ratio = math.exp(
        -beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    )  # sigmoid(x) = 1 / (1 + exp(-x))
    loss = dpo(logps_of(chosen, rejected, reference_chosen, reference_rejected), beta)
    assert loss.item() == pytest.approx(math.log1p(ratio), rel=1e-9, abs=1e-12)


def test_dpo_of_numbers_worked_by_hand() -> None:
    # Log-ratios: chosen -10 - -12 = 2, rejected -9 - -8 = -1; 0.2 * 3 = 0.6; ln(1 + e^-0.6).
    loss = dpo(logps_of(-10, -9, -12, -8), 0.2)
    assert loss.item() == pytest.approx(0.4374880, abs=1e-7)


@given(LOGPS, LOGPS, st.floats(0.01, 1.0))
def test_the_loss_is_ln_2_where_the_policy_is_the_reference(
    chosen: float, rejected: float, beta: float
) -> None:
    loss = dpo(logps_of(chosen, rejected, chosen, rejected), beta)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


@given(LOGPS, LOGPS, LOGPS, LOGPS)
def test_swapping_chosen_and_rejected_negates_the_margin(
    chosen: float, rejected: float, reference_chosen: float, reference_rejected: float
) -> None:
    there = logps_of(chosen, rejected, reference_chosen, reference_rejected)
    back = logps_of(rejected, chosen, reference_rejected, reference_chosen)
    one, other = pair_metrics(there, BETA), pair_metrics(back, BETA)
    assert one["margin"].item() == -other["margin"].item()
    assert one["logratio_chosen"].item() == other["logratio_rejected"].item()
    # -log sigmoid(x) and -log sigmoid(-x) differ by x.
    difference = dpo(back, BETA) - dpo(there, BETA)
    assert difference.item() == pytest.approx(one["margin"].item(), abs=1e-9)


def test_a_step_down_the_gradient_raises_chosen_and_lowers_rejected() -> None:
    logps = PairLogps(*(torch.full((3,), -5.0, requires_grad=True) for _ in range(4)))
    dpo(logps, BETA).sum().backward()
    assert logps.policy_chosen_B.grad is not None and logps.policy_rejected_B.grad is not None
    # At the reference the weight sigmoid(-margin) of equation 7's gradient is one half.
    assert torch.equal(logps.policy_chosen_B.grad, torch.full((3,), -BETA / 2))
    assert torch.equal(logps.policy_rejected_B.grad, torch.full((3,), BETA / 2))


def test_extreme_margins_stay_finite_with_finite_gradients() -> None:
    chosen = torch.tensor([-5000.0, 0.0], requires_grad=True)
    logps = PairLogps(chosen, torch.tensor([0.0, -5000.0]), torch.zeros(2), torch.zeros(2))
    losses_B = dpo(logps, 1.0)
    losses_B.sum().backward()
    assert losses_B.tolist() == [5000.0, 0.0]
    assert chosen.grad is not None and chosen.grad.tolist() == [-1.0, 0.0]


def test_pair_metrics_are_sums_that_carry_no_gradient() -> None:
    policy_B = torch.tensor([-1.0, -4.0, -3.0], requires_grad=True)
    # Log-ratios: chosen 1, -2, -1; rejected -1, 0, -1. A tie is not accurate.
    logps = PairLogps(
        policy_B,
        torch.tensor([-3.0, -2.0, -3.0]),
        torch.full((3,), -2.0),
        torch.full((3,), -2.0),
    )
    metrics = pair_metrics(logps, 0.5)
    assert {name: value.item() for name, value in metrics.items()} == {
        "accuracy": 1.0,
        "logratio_chosen": -2.0,
        "logratio_rejected": -2.0,
        "margin": 0.0,
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_every_objective_declares_its_denominator() -> None:
    assert {name: o.denominator for name, o in OBJECTIVES.items()} == {"dpo": "pairs"}
    assert OBJECTIVES["dpo"].losses is dpo


def ragged_pairs(end: int) -> list[Pair]:
    """Four pairs of unlike lengths; all answers but one end with the end token."""
    rng = np.random.default_rng(5)

    def ids(length: int) -> list[int]:
        return [int(i) for i in rng.integers(100, 40_000, length)]

    return [
        (ids(prompt), [*ids(chosen), end], [*ids(rejected), *([end] if ends else [])])
        for prompt, chosen, rejected, ends in (
            (9, 4, 7, 1),
            (3, 1, 12, 1),
            (14, 8, 2, 1),
            (5, 6, 6, 0),
        )
    ]


def a_model_and_a_perturbed_copy(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(dtype)
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.add_(noise, alpha=0.01)
    return model, reference


def our_loss(model: Any, reference: Any, pairs: list[Pair], pad: int) -> Tensor:
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    batch = collate(sequences, pad, "cpu")
    policy_2B = sequence_logps(token_logps(model, batch), batch)
    with torch.no_grad():
        reference_2B = sequence_logps(token_logps(reference, batch), batch)
    size = len(pairs)
    return dpo(PairLogps(*policy_2B.split(size), *reference_2B.split(size)), BETA).sum() / size


def trl_trainer(folder: Path, work: Path, model: Any, reference: Any) -> Any:
    """TRL's own trainer; the text it asks for at construction is never used."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(work),
        beta=BETA,
        loss_type=["sigmoid"],
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        max_length=None,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=text,
        processing_class=tokenizer,
    )


class Float64Head:
    """TRL's log-probs without its fused head, which sums in fp32 whatever the model's dtype."""

    @staticmethod
    def apply(hidden_ND: Tensor, weight_VD: Tensor, bias: None, labels_N: Tensor, *_: Any) -> Any:
        from trl.trainer.utils import selective_log_softmax

        logps_N = selective_log_softmax(linear(hidden_ND, weight_VD, bias), labels_N)
        unused_N = torch.zeros_like(logps_N)
        return logps_N, unused_N, None, unused_N, unused_N.bool()


def losses_and_gradients(
    folder: Path, work: Path, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor], float, dict[str, Tensor]]:
    """(our loss, our gradients, TRL's loss, TRL's gradients) on one batch."""
    model, reference = a_model_and_a_perturbed_copy(folder, dtype)
    pairs = ragged_pairs(end=model.config.eos_token_id)
    ours = our_loss(model, reference, pairs, pad=model.config.pad_token_id)
    ours.backward()
    our_gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    trainer = trl_trainer(folder, work, model, reference)
    inputs = trainer.data_collator(
        [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    )
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    their_gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    return ours.item(), our_gradients, theirs.item(), their_gradients


def test_loss_and_gradients_equal_trl_element_by_element_in_float64(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64Head)
    ours, our_gradients, theirs, their_gradients = losses_and_gradients(
        tiny_model, tmp_path, torch.float64
    )
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-12)
    assert abs(ours - math.log(2)) > 0.01, "a loss at the reference would prove little"
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-12)


def test_loss_and_gradients_equal_trl_in_fp32(tiny_model: Path, tmp_path: Path) -> None:
    ours, our_gradients, theirs, their_gradients = losses_and_gradients(
        tiny_model, tmp_path, torch.float32
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, gradient in our_gradients.items():
        theirs_here = their_gradients[name]
        assert (gradient - theirs_here).norm() <= 1e-5 * theirs_here.norm(), name
