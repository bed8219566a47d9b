"""The head of a language model, asked for log-probs of given tokens instead of logits.

Shapes: B rows, T row length, N tokens to score, H hidden, V vocabulary.

[N, V] logits never exist whole, nor does their gradient: while `scoring` is open, the head's own
forward is a loop over chunks of hidden states. It runs inside the module's call, so what adapters,
autocast, DDP or ZeRO do around that call happens once. Where the head is frozen, a chunk's gradient
is computed with its log-probs and kept as [N, H], since that of log-prob n is a function of
hidden state n alone; where it is trained, chunks are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20
"""Of a chunk's logits in fp32."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Hidden states [n, H] and targets [n] -> log-probs [n]."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What a model does to the head's output: cap * tanh(scale * z / cap), or scale * z."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits, from what its head returned."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of a chunk: 341 for 49,152 words, 64 for 262,144."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


@contextmanager
def _forward(head: nn.Module, forward: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """Replaces the head's forward; yields its own."""
    own, replaced = head.forward, head.__dict__.get("forward")
    head.forward = forward
    try:
        yield own
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


def find_tail(model: nn.Module, device: torch.device | str) -> Tail | str:
    """What a model does to its head's output, or why that isn't known.

    The head is made to return numbers that are known, so what becomes of them is measured, not
    looked up. One token passes, without gradients.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    width = getattr(head, "out_features", None)
    if not isinstance(width, int) or width < 8:
        return "its head is not a linear layer"
    known_V = torch.cat([torch.linspace(-60, 60, width - 1), torch.ones(1)]).to(device)

    def known(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return known_V.expand(*hidden.shape[:-1], width)

    training = model.training
    model.eval()
    with torch.no_grad(), _forward(head, known):
        # An id that every vocabulary has.
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        seen: Tensor = model(input_ids=token, use_cache=False).logits.reshape(-1)
    model.train(training)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr, operator]
    at_one = float(seen[-1])
    tail = Tail(at_one if cap is None else _uncapped(at_one, cap), cap)
    if seen.shape != known_V.shape or not torch.allclose(seen.float(), tail(known_V), rtol=1e-4):
        return "it changes logits after the head in a way that is not known"
    return tail


def _uncapped(value: float, cap: float) -> float:
    scale = cap * float(torch.atanh(torch.tensor(value / cap, dtype=torch.float64)))
    return 1.0 if abs(scale - 1) < 1e-4 else scale


@contextmanager
def scoring(
    head: nn.Module, at_N: Tensor, targets_N: Tensor, tail: Tail
) -> Iterator[Callable[[], Tensor]]:
    """While open, the head returns log-probs [N] of `targets_N` at the hidden states `at_N`.

    `at_N` are indices into the B * T hidden states. Yields a function that gives what the head
    returned in its last call, wrapped as the module's hooks left it: what the model makes of it
    further on is not wanted.
    """
    found: list[Tensor] = []

    def loop(hidden_BTH: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden_NH = hidden_BTH.flatten(0, -2).index_select(0, at_N)

        def score(hidden_nH: Tensor, targets_n: Tensor) -> Tensor:
            logits_nV = own(hidden_nH)
            if logits_nV.dtype in (torch.float16, torch.bfloat16):
                logits_nV = logits_nV.float()
            return -cross_entropy(tail(logits_nV), targets_n, reduction="none")

        chunk = chunk_tokens(head.out_features)  # type: ignore[arg-type]
        frozen = not any(p.requires_grad for p in head.parameters())
        if frozen and torch.is_grad_enabled():
            return _Frozen.apply(hidden_NH, targets_N, score, chunk)  # type: ignore[no-any-return, no-untyped-call]
        return torch.cat(
            [
                checkpoint(score, hidden_nH, targets_n, use_reentrant=False)
                for hidden_nH, targets_n in zip(
                    hidden_NH.split(chunk), targets_N.split(chunk), strict=True
                )
            ]
        )

    with _forward(head, loop) as own:
        handle = head.register_forward_hook(lambda _module, _args, output: found.append(output))
        try:
            yield lambda: found[-1]
        finally:
            handle.remove()


class _Frozen(torch.autograd.Function):
    """Log-probs through a head without trained weights, and d log-prob / d hidden state."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, score: Score, chunk: int) -> Tensor:
        gradients_NH = torch.empty_like(hidden_NH)
        logps = []
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                hidden_nH = hidden_NH[part].detach().requires_grad_()
                logps_n = score(hidden_nH, targets_N[part])
                (gradients_NH[part],) = torch.autograd.grad(logps_n.sum(), hidden_nH)
            logps.append(logps_n.detach())
        ctx.save_for_backward(gradients_NH)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradients_NH,) = ctx.saved_tensors
        (along_N,) = outputs
        return (gradients_NH * along_N[:, None]).to(gradients_NH.dtype), None, None, None
