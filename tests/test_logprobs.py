"""Completion log-probs against a naive computation over all logits, one sequence at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.logprobs import collate, sequence_logps, split_rows, token_logps

Sequences = list[tuple[list[int], list[int]]]
PAD = 2

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)


def ragged(lengths: Sequence[tuple[int, int]], seed: int = 0) -> Sequences:
    """Random (prompt ids, completion ids) of the given lengths."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(100, 1000, p).tolist(), rng.integers(100, 1000, c).tolist())
        for p, c in lengths
    ]


RAGGED = ragged([(5, 3), (1, 1), (12, 9), (2, 14), (7, 1)])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def naive(model: Any, sequences: Sequences) -> list[list[float]]:
    """log softmax of every position's logits, an unpadded sequence at a time, then the targets."""
    found = []
    for prompt, completion in sequences:
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *completion]])).logits[0]
        logps_TV = logits_TV.double().log_softmax(-1)
        found.append(
            [logps_TV[len(prompt) + i - 1, token].item() for i, token in enumerate(completion)]
        )
    return found


def scored(model: Any, sequences: Sequences, pad: int = PAD) -> list[list[float]]:
    batch = collate(sequences, pad, "cpu")
    with torch.no_grad():
        return split_rows(token_logps(model, batch), batch)


def assert_close(one: list[list[float]], other: list[list[float]]) -> None:
    assert [len(row) for row in one] == [len(row) for row in other]
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_a_ragged_batch_equals_the_naive_computation(model: Any) -> None:
    assert_close(scored(model, RAGGED), naive(model, RAGGED))


def test_sequence_logps_are_the_sums_of_their_tokens(model: Any) -> None:
    batch = collate(RAGGED, PAD, "cpu")
    with torch.no_grad():
        sums_B = sequence_logps(token_logps(model, batch), batch)
    expected = [sum(row) for row in naive(model, RAGGED)]
    assert sums_B.tolist() == pytest.approx(expected, abs=1e-4)


def test_gradients_equal_the_naive_computations_in_float64(model: Any) -> None:
    exact = copy.deepcopy(model).double()
    sequences = RAGGED[:3]
    batch = collate(sequences, PAD, "cpu")
    weights_B = torch.linspace(-1, 2, len(sequences), dtype=torch.float64)
    (sequence_logps(token_logps(exact, batch), batch) * weights_B).sum().backward()
    ours = {n: p.grad.clone() for n, p in exact.named_parameters()}
    exact.zero_grad()
    for weight, (prompt, completion) in zip(weights_B, sequences, strict=True):
        logps_TV = exact(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        targets = torch.tensor(completion)
        picked = logps_TV[len(prompt) - 1 : -1].gather(1, targets[:, None])
        (weight * picked.sum()).backward()
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_neither_padding_nor_neighbours_nor_their_order_change_a_row(model: Any) -> None:
    alone = [scored(model, [row])[0] for row in RAGGED]
    assert_close(scored(model, RAGGED), alone)
    assert_close(scored(model, RAGGED[::-1])[::-1], alone)
    much_padding = scored(model, [*RAGGED, *ragged([(40, 30)], seed=1)])[:-1]
    assert_close(much_padding, alone)


def test_the_pad_id_is_never_seen(model: Any) -> None:
    assert scored(model, RAGGED, pad=PAD) == scored(model, RAGGED, pad=777)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5))
def test_only_completion_tokens_are_targets(sequences: Sequences) -> None:
    batch = collate(sequences, PAD, "cpu")
    assert batch.targets_N.tolist() == [t for _, completion in sequences for t in completion]
    # Position i predicts token i + 1: the tokens after the marked positions are the targets.
    after = batch.input_ids_BT.roll(-1, dims=1).flatten()
    assert after[batch.at_N].tolist() == batch.targets_N.tolist()
    length = batch.input_ids_BT.shape[1]
    for row, (prompt, completion) in enumerate(sequences):
        marked = (batch.at_N[batch.sequences_N == row] - row * length).tolist()
        assert marked == list(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
        assert batch.attention_mask_BT[row].sum() == len(prompt) + len(completion)
        kept = batch.input_ids_BT[row][batch.attention_mask_BT[row].bool()].tolist()
        assert kept == [*prompt, *completion]


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5), st.integers(0, 2**31))
def test_split_rows_and_sums_keep_every_token_in_its_row(sequences: Sequences, seed: int) -> None:
    batch = collate(sequences, PAD, "cpu")
    tokens_N = torch.rand(len(batch.targets_N), generator=torch.Generator().manual_seed(seed))
    rows = split_rows(tokens_N, batch)
    assert [len(row) for row in rows] == [len(completion) for _, completion in sequences]
    assert [v for row in rows for v in row] == tokens_N.tolist()
    sums = sequence_logps(tokens_N, batch).tolist()
    assert sums == pytest.approx([sum(row) for row in rows], rel=1e-5)


@pytest.mark.parametrize("sequence", [([1, 2], []), ([], [1, 2])], ids=["completion", "prompt"])
def test_an_empty_side_is_refused(sequence: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        collate([([1], [2]), sequence], PAD, "cpu")


def test_moving_the_border_drops_the_prompts_tokens_and_changes_no_other(model: Any) -> None:
    prompt, completion = RAGGED[2]
    early = scored(model, [(prompt[:1], [*prompt[1:], *completion])])[0]
    assert len(early) == len(prompt) - 1 + len(completion)
    late = scored(model, [(prompt, completion)])[0]
    assert late == pytest.approx(early[len(prompt) - 1 :], abs=1e-5)


def hooks(model: Any) -> int:
    return len(model.get_output_embeddings()._forward_pre_hooks)


def test_the_head_is_plain_again_after_success_and_after_failure(model: Any) -> None:
    batch = collate(RAGGED, PAD, "cpu")
    token_logps(model, batch)
    assert hooks(model) == 0

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            token_logps(model, batch)
    finally:
        handle.remove()
    assert hooks(model) == 0
    assert model(batch.input_ids_BT).logits.shape[:2] == batch.input_ids_BT.shape


def test_only_the_predicting_positions_pass_through_the_head(model: Any) -> None:
    seen: list[Tensor] = []
    batch = collate(RAGGED, PAD, "cpu")
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, output: seen.append(output)
    )
    try:
        token_logps(model, batch)
    finally:
        handle.remove()
    assert [tuple(o.shape[:2]) for o in seen] == [(1, len(batch.targets_N))]


def test_half_precision_logits_are_normalised_in_float32(model: Any) -> None:
    batch = collate(RAGGED, PAD, "cpu")
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        logps_N = token_logps(half, batch)
        # The same hidden states and head in bf16, widened before the softmax.
        logits_BTV = half(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    expected_NV = logits_BTV.flatten(0, 1)[batch.at_N].float().log_softmax(-1)
    assert logps_N.dtype is torch.float32
    torch.testing.assert_close(logps_N, expected_NV.gather(1, batch.targets_N[:, None])[:, 0])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_adapters_count_and_a_wrapped_model_scores_alike(
    model: Any, targets: str | list[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False),
    ).eval()
    ours = scored(adapted, RAGGED)
    assert_close(ours, naive(adapted, RAGGED))
    assert abs(ours[2][0] - scored(model, RAGGED)[2][0]) > 1e-2, "the adapter must count"

    class Wrapper(torch.nn.Module):
        """As DDP and DeepSpeed do: the forward of another module, without its methods."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    batch = collate(RAGGED, PAD, "cpu")
    with torch.no_grad():
        wrapped = split_rows(token_logps(Wrapper(adapted), batch, adapted), batch)
    assert wrapped == ours
