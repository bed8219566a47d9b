"""Packed rows with shared prompts against one plain sequence at a time, in eager attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from rlhf import head
from rlhf.attention import Masking, masking
from rlhf.head import Tail, find_tail
from rlhf.logprobs import PLAIN, Ways, collate, collate_shared, token_logps
from rlhf.packing import TokenPair

WINDOW = 24
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": GROUPED,
    "Gemma2": {
        **GROUPED,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3": {**GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "Mistral": {**GROUPED, "sliding_window": WINDOW},
    "GPTNeoX": {},
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "Cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
}


def build(shape: str, attention: str = "sdpa", tied: bool = False) -> Any:
    """A random model of a family, in fp32."""
    family = "Gemma3Text" if shape == "Gemma3" else shape
    config = getattr(transformers, f"{family}Config")(
        **SIZES, **SHAPES[shape], attn_implementation=attention, tie_word_embeddings=tied
    )
    torch.manual_seed(5)
    return getattr(transformers, f"{shape}ForCausalLM")(config).eval()


def fast(model: Any) -> Ways:
    model = getattr(model, "get_base_model", lambda: model)()
    rows, tail = masking(model), find_tail(model, "cpu")
    assert isinstance(rows, Masking) and isinstance(tail, Tail), (rows, tail)
    return Ways(rows, tail)


def ids(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in rng.integers(3, SIZES["vocab_size"], count))


def sequences(longest: int) -> list[TokenPair]:
    """Prompts of one token to `longest`, answers of one token, and one that another begins with."""
    rng = np.random.default_rng(0)
    first, second, third = (ids(rng, n) for n in (1, longest, 33))
    answer = ids(rng, 40)
    return [
        (first, ids(rng, 6)),
        (second, answer[:12]),
        (second, answer),
        (third, ids(rng, 1)),
        (first, ids(rng, 1)),
        (second, ids(rng, 1)),
        (third, ids(rng, 9)),
    ]


def eager(model: Any, given: Sequence[TokenPair]) -> Tensor:
    """By definition: each sequence alone, log softmax of every position; tokens in the order
    given."""
    model.set_attn_implementation("eager")
    found = []
    for prompt, completion in given:
        logits_TV = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        logps_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logps_TV.gather(1, torch.tensor(completion)[:, None]).flatten())
    return torch.cat(found)


def gradients(model: Any, logps_N: Tensor) -> Tensor:
    """Of a sum that weighs each token otherwise, as one vector."""
    model.zero_grad()
    (logps_N * torch.linspace(-1, 2, len(logps_N))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def packed(model: Any, given: Sequence[TokenPair], ways: Ways) -> Tensor:
    return token_logps(model, collate_shared(given, 0, "cpu"), ways=ways)


def assert_equal(model: Any, attention: str, given: Sequence[TokenPair]) -> None:
    model.set_attn_implementation(attention)
    ours = packed(model, given, fast(model))
    our_gradients = gradients(model, ours)
    expected = eager(model, given)
    assert (ours - expected).abs().max() < 1e-4
    exact = gradients(model, expected)
    assert exact.norm() > 1e-3
    assert (our_gradients - exact).norm() < 1e-4 * exact.norm()


# The policy loads Gemma-2 with eager attention alone: see test_policy.
EACH = [(s, "eager" if s == "Gemma2" else "sdpa") for s in SHAPES]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head goes through seven tokens at a time."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 7 * 4 * SIZES["vocab_size"])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("shape", "attention"), [*EACH, *((s, "eager") for s, a in EACH if a != "eager")]
)
def test_packed_rows_equal_eager_sequences(shape: str, attention: str, tied: bool) -> None:
    model = build(shape, tied=tied)
    assert tied is (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert_equal(model, attention, sequences(90))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "attention"), EACH)
def test_prompts_of_500_tokens(shape: str, attention: str) -> None:
    assert_equal(build(shape), attention, sequences(500))


def adapted(model: Any, on_head: bool = False) -> Any:
    """An adapter that does something on every linear layer, the head with them or not."""
    from peft import LoraConfig, get_peft_model

    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    top = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    targets = [n for n in linear if on_head or n != top]
    torch.manual_seed(1)
    return get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False),
    ).eval()


@pytest.mark.parametrize("on_head", [False, True], ids=["", "head"])
@pytest.mark.parametrize(("shape", "attention"), EACH)
def test_adapters_off_and_on_the_head(shape: str, attention: str, on_head: bool) -> None:
    assert_equal(adapted(build(shape), on_head), attention, sequences(60))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "attention"), EACH)
def test_adapters_on_an_nf4_base(shape: str, attention: str, tmp_path: Path) -> None:
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = build(shape)
    model.save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"}
    )
    # Seven or four of each layer's; the head stays as it was.
    layers = SIZES["num_hidden_layers"]
    assert sum(isinstance(m, Linear4bit) for m in quantised.modules()) in (4 * layers, 7 * layers)
    given = sequences(60)
    moved = eager(quantised, given) - eager(model, given)
    assert moved.abs().max() > 1e-2, "NF4 moves the base itself"
    assert_equal(adapted(quantised), attention, given)


def test_a_window_is_counted_in_positions() -> None:
    """A mask without the window, or one that counts columns of the row, would show."""
    model = build("Mistral")
    given = sequences(90)
    right = packed(model, given, fast(model))
    wide = Ways(Masking({"full_attention": None}, False), Tail())
    assert (packed(model, given, wide) - right).abs().max() > 0.1


def test_what_a_completion_sees() -> None:
    """Row: prompt of 2, branches of 2 and 1, the next segment's prompt of 1, padding of 1."""
    given = [([3, 4], [5, 6, 7]), ([3, 4], [8, 9]), ([5], [6])]
    batch = collate_shared([*given, ([1] * 7, [2])], 0, "cpu")
    assert batch.layout is not None
    assert batch.input_ids_BT.tolist() == [[1] * 7, [3, 4, 5, 6, 8, 5, 0]]
    assert batch.layout.position_ids_BT[1].tolist() == [0, 1, 2, 3, 2, 0, 0]
    seen = batch.layout.visible_BTT(None)[1].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    # Position 4 of the row is the third of its sequence: two back is the prompt's first token.
    assert batch.layout.visible_BTT(2)[1, 4].int().tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert batch.at_N.tolist() == [8, 9, 10, 8, 11, 12, 6]


def test_flex_attention_takes_the_same_mask() -> None:
    """On a CPU it has no backward pass: log-probs alone."""
    model, given = build("Mistral"), sequences(60)
    with torch.no_grad():
        expected = packed(model, given, fast(model))
        model.set_attn_implementation("flex_attention")
        with torch.compiler.set_stance("force_eager"):
            found = packed(model, given, fast(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("Mamba", {"state_size": 4, "num_hidden_layers": 1}, "layers with a state"),
        ("Bloom", {"n_layer": 1, "n_head": 2}, "takes no position ids"),
    ],
)
def test_models_that_cannot_are_told_apart(family: str, more: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, f"{family}Config")(vocab_size=64, hidden_size=16, **more)
    found = masking(getattr(transformers, f"{family}ForCausalLM")(config))
    assert isinstance(found, str) and reason in found


def test_layers_of_another_kind_and_other_attention_are_told_apart() -> None:
    model = build("Qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in str(masking(model))
    model = build("Qwen3")
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(masking(model))


def test_padded_rows_take_the_chunked_head_too() -> None:
    model, given = build("Gemma2", "eager"), sequences(60)
    batch = collate(given, 0, "cpu")
    whole = token_logps(model, batch, ways=PLAIN)
    chunked = token_logps(model, batch, ways=Ways(None, fast(model).tail))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
