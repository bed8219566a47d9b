"""Objectives against their papers' formulas written out, their symmetries, and TRL."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import linear

from rlhf import head, objectives
from rlhf.attention import Masking, masking
from rlhf.config_objective import OBJECTIVES, Objective
from rlhf.examples import mismatch
from rlhf.head import Tail, find_tail
from rlhf.logprobs import Ways, collate, collate_shared, sequence_logps, token_logps
from rlhf.objectives import (
    LabelLogps,
    PairLogps,
    StepLoss,
    cdpo,
    dpo,
    ipo,
    kl_baseline,
    kto,
    log_odds_ratio,
    losses,
    metrics,
    orpo,
    robust_dpo,
    sft,
)

BETA = 0.2
LOGPS = st.floats(-80, 0, allow_nan=False)
BETAS = st.floats(0.01, 1.0)
TOKENS = st.integers(1, 40)
SMOOTHING = st.floats(0.01, 0.49)
PAIRED = [name for name, needs in OBJECTIVES.items() if needs.data == "pairs"]
Pair = tuple[list[int], list[int], list[int]]


def logps_of(*values: float, tokens: tuple[int, int] = (1, 1)) -> PairLogps:
    policy_and_reference = (torch.tensor([v], dtype=torch.float64) for v in values)
    return PairLogps(*policy_and_reference, *(torch.tensor([t]) for t in tokens))


def labels_of(
    policy: list[float], reference: list[float], good: list[bool], baseline: float = 0.0
) -> LabelLogps:
    return LabelLogps(
        torch.tensor(policy, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(good),
        torch.ones(len(good)),
        torch.tensor(baseline, dtype=torch.float64),
    )


def settings(name: str, **given: Any) -> Objective:
    smoothing = {"label_smoothing": 0.1} if name in ("cdpo", "robust_dpo") else {}
    return Objective.model_validate({"name": name, **smoothing, **given})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
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
    # By tokens: 2 / 4 - -1 / 2 = 1; ln(1 + e^-0.2).
    loss = dpo(logps_of(-10, -9, -12, -8, tokens=(4, 2)), 0.2, "tokens")
    assert loss.item() == pytest.approx(0.5981389, abs=1e-7)


def test_cdpo_and_robust_dpo_of_numbers_worked_by_hand() -> None:
    logps = logps_of(-10, -9, -12, -8)
    # As above: kept 0.4374880, flipped 0.4374880 + 0.6 = 1.0374880.
    conservative = cdpo(logps, 0.2, label_smoothing=0.1)
    assert conservative.item() == pytest.approx(0.9 * 0.4374880 + 0.1 * 1.0374880, abs=1e-7)
    robust = robust_dpo(logps, 0.2, label_smoothing=0.1)
    assert robust.item() == pytest.approx((0.9 * 0.4374880 - 0.1 * 1.0374880) / 0.8, abs=1e-7)


def test_ipo_of_numbers_worked_by_hand() -> None:
    logps = logps_of(-10, -9, -12, -8, tokens=(4, 2))
    # Margins 3 a sequence and 1 a token; 1 / (2 * 0.25) = 2.
    assert ipo(logps, 0.25, "none").item() == pytest.approx((3 - 2) ** 2)
    assert ipo(logps, 0.25, "tokens").item() == pytest.approx((1 - 2) ** 2)
    assert ipo(logps, 0.1, "tokens").item() == pytest.approx((1 - 5) ** 2)


def test_kto_of_numbers_worked_by_hand() -> None:
    # Mismatched log-ratios 3, 1, -1: their mean 1 is the baseline, which stands above 0.
    baseline = kl_baseline(torch.tensor([-5.0, -3.0, -9.0]), torch.tensor([-8.0, -4.0, -8.0]))
    assert baseline.item() == 1
    logps = labels_of([-10.0, -9.0], [-12.0, -8.0], [True, False], baseline.item())
    losses_B = kto(logps, 0.2, good_weight=1.5, bad_weight=0.5)
    # Good: log-ratio 2, 1.5 (1 - sigmoid(0.2 (2 - 1))); bad: -1, 0.5 (1 - sigmoid(0.2 (1 - -1))).
    expected = [1.5 * (1 - 0.5498340), 0.5 * (1 - 0.5986877)]
    assert losses_B.tolist() == pytest.approx(expected, abs=1e-7)


def test_orpo_of_numbers_worked_by_hand() -> None:
    # Token means ln 0.8 and ln 0.5: odds 4 and 1, log odds ratio ln 4; sigmoid(ln 4) = 4 / 5.
    logps = logps_of(3 * math.log(0.8), 2 * math.log(0.5), 0, 0, tokens=(3, 2))
    assert log_odds_ratio(logps).item() == pytest.approx(math.log(4))
    assert orpo(logps, 0.25).item() == pytest.approx(-0.25 * math.log(0.8))


def test_the_sft_term_of_numbers_worked_by_hand() -> None:
    pairs = logps_of(-6, -9, -7, -8, tokens=(4, 2))
    assert (sft(pairs, "tokens").item(), sft(pairs, "answers").item()) == (6, 1.5)
    labels = labels_of([-6.0, -9.0], [0, 0], [True, False])
    assert sft(labels, "tokens").tolist() == [6, 0]


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS, SMOOTHING)
def test_smoothed_losses_are_those_of_the_labels_they_believe_in(
    c: float, r: float, ref_c: float, ref_r: float, beta: float, e: float
) -> None:
    there, back = logps_of(c, r, ref_c, ref_r), logps_of(r, c, ref_r, ref_c)
    mixed = (1 - e) * dpo(there, beta) + e * dpo(back, beta)
    assert cdpo(there, beta, e).item() == pytest.approx(mixed.item(), rel=1e-9)
    # Labels flipped with chance e: what is expected of the robust loss is the true labels' loss.
    expected = (1 - e) * robust_dpo(there, beta, e) + e * robust_dpo(back, beta, e)
    assert expected.item() == pytest.approx(dpo(there, beta).item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", PAIRED)
@given(st.tuples(LOGPS, LOGPS, LOGPS, LOGPS), BETAS, TOKENS, TOKENS)
def test_swapping_chosen_and_rejected_negates_the_margin(
    name: str, values: tuple[float, ...], beta: float, first: int, second: int
) -> None:
    c, r, ref_c, ref_r = values
    objective = settings(name, beta=beta)
    one = metrics(logps_of(c, r, ref_c, ref_r, tokens=(first, second)), objective)
    other = metrics(logps_of(r, c, ref_r, ref_c, tokens=(second, first)), objective)
    assert one["margin"][0].item() == -other["margin"][0].item()
    assert one["logratio_chosen"] == other["logratio_rejected"]
    if one["margin"][0] != 0:
        assert one["accuracy"][0] + other["accuracy"][0] == 1


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
def test_losses_of_a_swapped_pair_differ_by_its_margin(
    c: float, r: float, ref_c: float, ref_r: float, beta: float
) -> None:
    there, back = logps_of(c, r, ref_c, ref_r), logps_of(r, c, ref_r, ref_c)
    margin = beta * ((c - ref_c) - (r - ref_r))
    # -log sigmoid(x) and -log sigmoid(-x) differ by x.
    assert (dpo(back, beta) - dpo(there, beta)).item() == pytest.approx(margin, abs=1e-9)
    # (-x - a)^2 - (x - a)^2 = 4 a x, with a = 1 / (2 tau) and x unscaled.
    found = (ipo(back, beta, "none") - ipo(there, beta, "none")).item()
    assert found == pytest.approx(2 * margin / beta**2, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("normalise", ["tokens", "none"])
@given(LOGPS, LOGPS, BETAS, TOKENS, TOKENS)
def test_at_the_reference_every_loss_is_its_known_value(
    normalise: Any, chosen: float, rejected: float, beta: float, first: int, second: int
) -> None:
    logps = logps_of(chosen, rejected, chosen, rejected, tokens=(first, second))
    for name in ("dpo", "cdpo", "robust_dpo"):
        loss = losses(logps, settings(name, beta=beta, normalise=normalise))
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    found = losses(logps, settings("ipo", beta=beta, normalise=normalise))
    assert found.item() == pytest.approx(1 / (4 * beta**2))
    labels = labels_of([chosen, rejected], [chosen, rejected], [True, False])
    halves = losses(labels, settings("kto", beta=beta, good_weight=1.3, bad_weight=0.7))
    assert halves.tolist() == pytest.approx([0.65, 0.35])


@pytest.mark.parametrize(
    ("name", "minimum"),
    [("ipo", lambda beta: 1 / (2 * beta)), ("cdpo", lambda beta: math.log(0.9 / 0.1) / beta)],
)
@given(BETAS)
def test_a_regularised_loss_has_its_minimum_where_its_paper_says(
    name: str, minimum: Callable[[float], float], beta: float
) -> None:
    margin = torch.tensor([minimum(beta)], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    objective = settings(name, beta=beta, normalise="none")

    def loss_at(chosen: Tensor) -> Tensor:
        return losses(PairLogps(chosen, zero, zero, zero, one, one), objective).sum()

    (slope,) = torch.autograd.grad(loss_at(margin), margin)
    assert abs(slope.item()) < 1e-9 / beta
    for other in (0.9, 1.1):
        assert loss_at(margin * other) > loss_at(margin)


@given(st.floats(-9, 0), st.floats(-9, 0), BETAS, st.floats(0, 9))
def test_kto_pulls_good_answers_up_and_bad_ones_down(
    policy: float, reference: float, beta: float, baseline: float
) -> None:
    logps = labels_of([policy, policy], [reference, reference], [True, False], baseline)
    good, bad = kto(logps, beta, 1.0, 1.0).tolist()
    value = sigmoid(beta * (policy - reference - baseline))
    assert [good, bad] == pytest.approx([1 - value, value], abs=1e-12)
    higher = labels_of([policy + 1] * 2, [reference] * 2, [True, False], baseline)
    after = kto(higher, beta, 1.0, 1.0).tolist()
    assert after[0] < good and after[1] > bad


def test_the_kl_baseline_is_not_below_zero_and_carries_no_gradient() -> None:
    policy_B = torch.tensor([-4.0, -6.0], requires_grad=True)
    baseline = kl_baseline(policy_B, torch.tensor([-3.0, -2.0]))
    assert baseline.item() == 0 and not baseline.requires_grad
    # Clamped micro-batch by micro-batch, it would be (2 + 0) / 2 = 1 instead of (2 - 2) / 2 = 0.
    parts = torch.tensor([-1.0, -5.0]), torch.tensor([-3.0, -3.0])
    assert kl_baseline(*parts).item() == 0


def test_a_step_down_the_gradient_raises_chosen_and_lowers_rejected() -> None:
    for name in PAIRED:
        chosen, rejected = (torch.full((3,), -5.0, requires_grad=True) for _ in range(2))
        fixed, tokens = torch.full((3,), -5.0), torch.full((3,), 4)
        logps = PairLogps(chosen, rejected, fixed, fixed, tokens, tokens)
        losses(logps, settings(name, beta=BETA)).sum().backward()
        assert chosen.grad is not None and rejected.grad is not None
        assert (chosen.grad < 0).all() and (rejected.grad > 0).all(), name
        if name == "dpo":
            # At the reference the weight sigmoid(-margin) of equation 7's gradient is one half.
            assert torch.equal(chosen.grad, torch.full((3,), -BETA / 2))
            assert torch.equal(rejected.grad, torch.full((3,), BETA / 2))


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_of_pair_losses_are_those_of_finite_differences(name: str) -> None:
    rng = torch.Generator().manual_seed(1)
    drawn = torch.rand((4, 5), generator=rng, dtype=torch.float64)
    chosen, rejected, ref_c, ref_r = (-(1 + 9 * drawn)).unbind()
    tokens = torch.tensor([1, 2, 3, 5, 8]), torch.tensor([8, 5, 3, 2, 1])
    for normalise in ("tokens", "none"):
        takes = "normalise" in OBJECTIVES[name].settings
        objective = settings(name, **({"normalise": normalise} if takes else {}))

        def loss(c: Tensor, r: Tensor, objective: Objective = objective) -> Tensor:
            return losses(PairLogps(c, r, ref_c, ref_r, *tokens), objective)

        inputs = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
        assert torch.autograd.gradcheck(loss, inputs)


def test_gradients_of_kto_and_of_the_sft_term_are_those_of_finite_differences() -> None:
    policy_B = torch.tensor([-3.0, -6.0, -2.0], dtype=torch.float64, requires_grad=True)
    given_B = torch.tensor([-4.0, -5.0, -2.5], dtype=torch.float64)
    good, tokens, base = torch.tensor([True, False, True]), torch.tensor([3, 4, 1]), given_B[2] * -1

    def loss(policy_B: Tensor) -> Tensor:
        logps = LabelLogps(policy_B, given_B, good, tokens, base)
        return losses(logps, settings("kto", good_weight=1.2)) + sft(logps, "answers")

    assert torch.autograd.gradcheck(loss, (policy_B,))


def test_extreme_margins_stay_finite_with_finite_gradients() -> None:
    for name in PAIRED:
        chosen = torch.tensor([-5000.0, 0.0, -1e-9], requires_grad=True)
        rejected, zero, one = torch.tensor([0.0, -5000.0, -1e-9]), torch.zeros(3), torch.ones(3)
        logps = PairLogps(chosen, rejected, zero, zero, one, one)
        losses_B = losses(logps, settings(name, beta=1.0))
        losses_B.sum().backward()
        assert losses_B.isfinite().all(), name
        assert chosen.grad is not None and chosen.grad.isfinite().all(), name
        if name == "dpo":
            assert losses_B[:2].tolist() == [5000.0, 0.0]
            assert chosen.grad[:2].tolist() == [-1.0, 0.0]


def test_metrics_are_sums_and_counts_that_carry_no_gradient() -> None:
    policy_B = torch.tensor([-1.0, -4.0, -3.0], requires_grad=True)
    # Log-ratios: chosen 1, -2, -1; rejected -1, 0, -1. A tie is not accurate.
    logps = PairLogps(
        policy_B,
        torch.tensor([-3.0, -2.0, -3.0]),
        torch.full((3,), -2.0),
        torch.full((3,), -2.0),
        torch.ones(3),
        torch.ones(3),
    )
    found = metrics(logps, settings("dpo", beta=0.5))
    assert {name: (value.item(), count) for name, (value, count) in found.items()} == {
        "preferred": (1.0, 3),
        "accuracy": (1.0, 3),
        "logratio_chosen": (-2.0, 3),
        "logratio_rejected": (-2.0, 3),
        "margin": (0.0, 3),
    }
    assert not any(value.requires_grad for value, _ in found.values())


def test_metrics_of_labels_are_of_good_and_bad_answers() -> None:
    # Log-ratios 2, 1, 0.5, -1 around a baseline of 1.
    logps = labels_of([-1, -2, -2.5, -4], [-3, -3, -3, -3], [True, False, False, True], 1.0)
    found = metrics(logps, settings("kto"))
    assert {name: (value.item(), count) for name, (value, count) in found.items()} == {
        "accuracy": (3.0, 4),
        "logratio_good": (1.0, 2),
        "logratio_bad": (1.5, 2),
    }


def test_metrics_without_a_reference_tell_no_log_ratio() -> None:
    one = torch.ones(1)
    logps = PairLogps(one.log() - math.log(2), one * -3, None, None, one, one)
    found = metrics(logps, settings("orpo", beta=0.1))
    assert found.keys() == {"preferred", "accuracy", "margin"}
    # Odds 1 and e^-3 / (1 - e^-3).
    assert found["margin"][0].item() == pytest.approx(0.1 * (3 + math.log(1 - math.exp(-3))))


def test_every_objective_is_a_function_and_a_row_of_needs() -> None:
    assert get_args(Objective.model_fields["name"].annotation) == tuple(OBJECTIVES)
    paired = {n: (x.reference, x.denominator) for n, x in OBJECTIVES.items() if x.data == "pairs"}
    with_reference = dict.fromkeys(("dpo", "cdpo", "robust_dpo", "ipo"), (True, "pairs"))
    assert paired == {**with_reference, "orpo": (False, "pairs")}
    assert (OBJECTIVES["kto"].data, OBJECTIVES["kto"].denominator) == ("labels", "examples")
    for name, needs in OBJECTIVES.items():
        _, *parameters = inspect.signature(getattr(objectives, name)).parameters
        assert set(parameters) == set(needs.settings), name


def test_settings_that_an_objective_does_not_take_are_refused() -> None:
    for values, expected in (
        ({"name": "dpo", "label_smoothing": 0.1}, "says nothing to dpo.*cdpo, robust_dpo"),
        ({"name": "orpo", "normalise": "tokens"}, "says nothing to orpo"),
        ({"name": "ipo", "good_weight": 2.0}, "says nothing to ipo.*kto"),
        ({"name": "cdpo"}, "cdpo needs label_smoothing"),
    ):
        with pytest.raises(ValidationError, match=expected):
            Objective.model_validate(values)
    assert settings("ipo").arguments == {"beta": 0.2, "normalise": "tokens"}
    assert settings("dpo").arguments == {"beta": 0.2, "normalise": "none"}
    assert settings("kto", bad_weight=1.3).arguments["good_weight"] == 1.0
    assert [settings(n).sft for n in ("dpo", "orpo")] == [0.0, 1.0]
    assert settings("orpo", sft_weight=0.0).sft == 0.0


def ragged_pairs(end: int) -> list[Pair]:
    """Four pairs of unlike lengths; all answers but one end with the end token."""
    rng = np.random.default_rng(5)

    def ids(length: int) -> list[int]:
        return [int(i) for i in rng.integers(100, 1000, length)]

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


def lengths(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Tokens of chosen and rejected answers."""
    return (torch.tensor([len(c) for _, c, _ in pairs]), torch.tensor([len(r) for *_, r in pairs]))


def sums(model: Any, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """As the learner takes them: prompts shared, rows packed, the head five tokens at a time."""
    batch = collate_shared(sequences, model.config.pad_token_id, "cpu")
    ways = Ways(masking(model), find_tail(model, "cpu"))  # type: ignore[arg-type]
    assert isinstance(ways.masking, Masking) and isinstance(ways.tail, Tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_BYTES", 5 * 4 * model.config.vocab_size)
        return sequence_logps(token_logps(model, batch, ways=ways), batch)


def plain_sums(model: Any, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """From padded rows and whole logits."""
    batch = collate(sequences, model.config.pad_token_id, "cpu")
    return sequence_logps(token_logps(model, batch), batch)


def ours_on_pairs(
    model: Any,
    reference: Any,
    pairs: list[Pair],
    objective: Objective,
    sums: Callable[[Any, list[tuple[list[int], list[int]]]], Tensor] = sums,
) -> Tensor:
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    policy_2B = sums(model, sequences)
    with torch.no_grad():
        reference_2B = sums(reference, sequences)
    size = len(pairs)
    (c, r), (ref_c, ref_r) = policy_2B.split(size), reference_2B.split(size)
    logps = PairLogps(c, r, ref_c, ref_r, *lengths(pairs))
    return losses(logps, objective).sum() / size


def trl_trainer(kind: str, folder: Path, work: Path, models: tuple[Any, Any], **given: Any) -> Any:
    """TRL's own trainer; the text it asks for at construction is never used."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer: Any
    row: dict[str, Any] = {"prompt": "a", "chosen": " b", "rejected": " c"}
    if kind == "kto":
        config, trainer, row = KTOConfig, KTOTrainer, {"prompt": "a", "completion": " b"}
        row["label"] = True
    else:
        config, trainer = (ORPOConfig, ORPOTrainer) if kind == "orpo" else (DPOConfig, DPOTrainer)
    model, reference = models
    return trainer(
        model=model,
        **({} if kind == "orpo" else {"ref_model": reference}),
        args=config(
            output_dir=str(work),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            max_length=None if kind != "orpo" else 64,
            **given,
        ),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


class Float64Head:
    """TRL's log-probs without its fused head, which sums in fp32 whatever the model's dtype."""

    @staticmethod
    def apply(hidden_ND: Tensor, weight_VD: Tensor, bias: None, labels_N: Tensor, *_: Any) -> Any:
        from trl.trainer.utils import selective_log_softmax

        logps_N = selective_log_softmax(linear(hidden_ND, weight_VD, bias), labels_N)
        unused_N = torch.zeros_like(logps_N)
        return logps_N, unused_N, None, unused_N, unused_N.bool()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_equal(model: Any, ours: Tensor, theirs: Callable[[], Tensor]) -> None:
    """Losses, and gradients as vectors, within 1e-5 of each other."""
    our_gradients, their_loss = gradients(model, ours), theirs()
    their_gradients = gradients(model, their_loss)
    assert ours.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        expected = their_gradients[name]
        assert gradient.abs().max() > 1e-5, name
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def pairs_for(trainer: Any, pairs: list[Pair]) -> Any:
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    return trainer.data_collator(rows)


@pytest.mark.slow
def test_loss_and_gradients_equal_trl_element_by_element_in_float64(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64Head)
    model, reference = a_model_and_a_perturbed_copy(tiny_model, torch.float64)
    pairs = ragged_pairs(end=model.config.eos_token_id)
    # Norms are fp32 inside even here, and a shared prompt's gradient passes through them once.
    ours = ours_on_pairs(model, reference, pairs, settings("dpo", beta=BETA), plain_sums)
    our_gradients = gradients(model, ours)
    trainer = trl_trainer("dpo", tiny_model, tmp_path, (model, reference), beta=BETA)
    theirs = trainer.compute_loss(trainer.model, pairs_for(trainer, pairs))
    their_gradients = gradients(model, theirs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-12)
    assert abs(ours.item() - math.log(2)) > 0.01, "a loss at the reference would prove little"
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("sigmoid", settings("dpo", beta=BETA)),
        ("sigmoid_norm", settings("dpo", beta=BETA, normalise="tokens")),
        ("robust", settings("robust_dpo", beta=BETA, label_smoothing=0.1)),
        ("ipo", settings("ipo", beta=BETA)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_loss_and_gradients_equal_trl_in_fp32(
    tiny_model: Path, tmp_path: Path, loss_type: str, objective: Objective
) -> None:
    # TRL 1.16 has no cDPO of its own; its IPO is the one normalised by tokens.
    model, reference = a_model_and_a_perturbed_copy(tiny_model, torch.float32)
    pairs = ragged_pairs(end=model.config.eos_token_id)
    given = {"beta": BETA, "loss_type": [loss_type], "label_smoothing": 0.1}
    if loss_type != "robust":
        del given["label_smoothing"]
    trainer = trl_trainer("dpo", tiny_model, tmp_path, (model, reference), **given)
    inputs = pairs_for(trainer, pairs)
    ours = ours_on_pairs(model, reference, pairs, objective)
    assert_equal(model, ours, lambda: trainer.compute_loss(trainer.model, inputs))


def test_kto_equals_trl_where_a_step_is_one_micro_batch(tiny_model: Path, tmp_path: Path) -> None:
    # TRL takes its baseline from each micro-batch: there the two are the same number.
    model, reference = a_model_and_a_perturbed_copy(tiny_model, torch.float32)
    drawn = ragged_pairs(end=model.config.eos_token_id)
    rows = [(p, c, True) for p, c, _ in drawn] + [(p, r, False) for p, _, r in drawn[:2]]
    others = mismatch([str(p) for p, _, _ in rows], (0,))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    trainer = trl_trainer("kto", tiny_model, tmp_path, (model, reference), beta=BETA, **weights)
    inputs = trainer.data_collator(
        [
            {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": rows[j][1], "label": good}
            for (p, c, good), j in zip(rows, others, strict=True)
        ]
    )

    own = [(p, c) for p, c, _ in rows]
    put = [(p, rows[j][1]) for (p, _, _), j in zip(rows, others, strict=True)]
    with torch.no_grad():
        baseline = kl_baseline(sums(model, put), sums(reference, put))
        reference_B = sums(reference, own)
    assert baseline > 0, "a baseline of 0 would prove little"
    good, tokens = torch.tensor([g for *_, g in rows]), torch.tensor([len(c) for _, c, _ in rows])
    logps = LabelLogps(sums(model, own), reference_B, good, tokens, baseline)
    ours = losses(logps, settings("kto", beta=BETA, good_weight=1.3, bad_weight=0.7)).mean()
    assert_equal(model, ours, lambda: trainer.compute_loss(trainer.model, inputs))


def test_orpo_equals_trl_but_for_the_prompt_in_its_nll(tiny_model: Path, tmp_path: Path) -> None:
    model, _ = a_model_and_a_perturbed_copy(tiny_model, torch.float32)
    pairs = ragged_pairs(end=model.config.eos_token_id)
    trainer = trl_trainer("orpo", tiny_model, tmp_path, (model, None), beta=BETA)
    rows = []
    for prompt, *answers in pairs:
        row: dict[str, Any] = {}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            row[f"{side}_input_ids"] = [*prompt, *answer]
            row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    inputs = trainer.data_collator(rows)
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    whole = [(p[:1], [*p[1:], *c]) for p, c, _ in pairs]
    chosen_B, rejected_B = sums(model, sequences).chunk(2)
    # Of every token but the first, the prompt's too.
    mean_nll = -sums(model, whole).sum() / sum(len(tokens) for _, tokens in whole)
    logps = PairLogps(chosen_B, rejected_B, None, None, *lengths(pairs))
    objective = settings("orpo", beta=BETA)
    step = StepLoss(objective, len(pairs), sum(len(c) for _, c, _ in pairs))
    own, nll = step.parts(logps)
    assert step.total(logps).item() == pytest.approx((own + nll).item())
    assert abs(nll.item() - mean_nll.item()) > 1e-2, "the prompt's share of TRL's NLL"
    model.eval()
    assert_equal(model, own + mean_nll, lambda: trainer.compute_loss(trainer.model, inputs))
