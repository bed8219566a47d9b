"""The chunked head: the same numbers and gradients, and never more than a chunk of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_shared_prefix import build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlhf import head as module
from rlhf.head import Tail, chunk_tokens, find_tail, scoring

HIDDEN, WORDS, TOKENS = 12, 40, 23


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens each, so that the last is not full."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * WORDS)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, 20, H], which of the 40 are scored (one of them twice), and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 20, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    at_N = torch.randperm(40, generator=generator)[:TOKENS]
    at_N[-1] = at_N[0]
    return hidden, at_N, torch.randint(WORDS, (TOKENS,), generator=generator)


class Low(nn.Module):
    """As PEFT puts it around a head: a frozen linear layer and a trained update with dropout."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(HIDDEN, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, WORDS, bias=False, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        self.out_features = WORDS

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.base(hidden) + self.up(self.down(self.dropout(hidden)))
        return result


def linear(trained: bool) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(HIDDEN, WORDS, dtype=torch.float64).requires_grad_(trained)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: linear(False),
    "trained": lambda: linear(True),
    "adapted": lambda: Low(linear(False)).eval(),
}


def both(head: nn.Module, tail: Tail) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(log-probs, gradients of everything that has one) chunked, and by definition."""
    along_N = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    found = []
    for chunked in (True, False):
        hidden, at_N, targets_N = inputs()
        if chunked:
            with scoring(head, at_N, targets_N, tail) as output:
                head(hidden)
                logps_N = output()
        else:
            logits_NV = tail(head(hidden.flatten(0, 1)[at_N]))
            logps_N = -cross_entropy(logits_NV, targets_N, reduction="none")
        head.zero_grad()
        (logps_N * along_N).sum().backward()
        trained = [p.grad.clone() for p in head.parameters() if p.grad is not None]
        assert hidden.grad is not None
        found.append((logps_N.detach(), hidden.grad, *trained))
    return found[0], found[1]


@pytest.mark.parametrize("tail", [Tail(), Tail(0.3), Tail(1.0, 2.0), Tail(0.5, 1.5)], ids=str)
@pytest.mark.parametrize("name", [*HEADS])
def test_chunks_give_the_same_numbers_and_gradients(name: str, tail: Tail) -> None:
    ours, expected = both(HEADS[name](), tail)
    assert len(ours) == len(expected) == {"frozen": 2, "trained": 4, "adapted": 4}[name]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_head_never_makes_more_than_a_chunk_of_logits() -> None:
    head, (hidden, at_N, targets_N) = linear(False), inputs()
    rows: list[int] = []
    plain = head.forward

    def watched(part: Tensor) -> Tensor:
        rows.append(len(part))
        return plain(part)

    head.forward = watched  # type: ignore[method-assign, assignment]
    with scoring(head, at_N, targets_N, Tail()) as output:
        head(hidden)
        output().sum().backward()
    assert rows == [5, 5, 5, 5, 3]
    assert head.forward is watched


def test_a_frozen_head_gets_no_gradient_and_keeps_no_logits() -> None:
    head, (hidden, at_N, targets_N) = linear(False), inputs()
    with scoring(head, at_N, targets_N, Tail()) as output:
        head(hidden)
        logps_N = output()
    graph: Any = logps_N.grad_fn
    assert [tuple(t.shape) for t in graph.saved_tensors] == [(TOKENS, HIDDEN)]
    logps_N.sum().backward()
    assert all(p.grad is None for p in head.parameters())


def test_dropout_in_front_of_the_head_is_the_same_when_computed_again() -> None:
    """The gradient is that of the log-probs that were returned: a step along it predicts them."""
    head, (hidden, at_N, targets_N) = Low(linear(False)).train(), inputs()

    def logps(weight: Tensor) -> Tensor:
        torch.manual_seed(5)
        with torch.no_grad():
            head.up.weight.copy_(weight)
        with scoring(head, at_N, targets_N, Tail()) as output:
            head(hidden)
            return output().sum()

    start = head.up.weight.detach().clone()
    logps(start).backward()
    slope = head.up.weight.grad
    assert slope is not None
    size = 1e-6
    ahead, behind = (logps(start + sign * size * slope).item() for sign in (1, -1))
    assert (ahead - behind) / (2 * size) == pytest.approx(slope.square().sum().item(), rel=1e-5)


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    head, (hidden, at_N, targets_N) = linear(True), inputs()
    with torch.no_grad(), scoring(head, at_N, targets_N, Tail()) as output:
        head(hidden)
        assert not output().requires_grad


def test_chunks_hold_equally_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = {v: chunk_tokens(v) for v in (32_768, 49_152, 152_064, 262_144)}
    assert found == {32_768: 512, 49_152: 341, 152_064: 110, 262_144: 64}


@pytest.mark.parametrize(
    ("shape", "tail"),
    [
        ("Llama", Tail()),
        ("GPTNeoX", Tail()),
        ("Gemma2", Tail(1.0, 3.0)),
        ("Granite", Tail(1 / 3)),
        ("Cohere", Tail(0.25)),
    ],
)
def test_what_a_model_does_after_its_head_is_found_out(shape: str, tail: Tail) -> None:
    model = build(shape).train()
    found = find_tail(model, "cpu")
    assert isinstance(found, Tail)
    assert found.scale == pytest.approx(tail.scale)
    assert found.cap == tail.cap
    assert model.training and "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize(
    "change",
    [lambda z: z + 0.1, lambda z: z.clamp(-5, 5), lambda z: z[..., :-2], lambda z: 2 * z.tanh()],
    ids=["shift", "clamp", "slice", "unknown-cap"],
)
def test_a_tail_that_is_not_known_is_not_guessed(change: Callable[[Tensor], Tensor]) -> None:
    model = build("Llama")
    plain = model.forward

    def forward(**given: Any) -> Any:
        output = plain(**given)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    assert "not known" in str(find_tail(model, "cpu"))
