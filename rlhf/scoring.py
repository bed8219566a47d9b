"""A policy's sequences scored the frugal way, once that is proved to be the exact one.

What the model can take is found out when it is loaded: packed rows with shared prompts, the chunked
head, both or neither. Before the first scores that count, one batch goes both that way and the
plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf.attention import Masking, masking
from rlhf.errors import InexactError
from rlhf.group import ALONE, Group
from rlhf.head import Tail, find_tail
from rlhf.logprobs import (
    PLAIN,
    Batch,
    Ways,
    collate,
    collate_shared,
    sequence_logps,
    token_logps,
)
from rlhf.packing import MicroBatch, TokenPair, distinct, plan
from rlhf.policy import Policy

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Mean gap of a token's log-prob, in nats. A mask that lets one completion see another is off by
several times the largest; two orders of the same bf16 sums are apart by a third of it."""


class Scorer:
    """Log-probs under a policy's model, and how examples are cut into micro-batches for it."""

    def __init__(
        self,
        policy: Policy,
        budget: int,
        on_inexact: Literal["stop", "plain"],
        say: Callable[[str], None],
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.on_inexact = on_inexact
        self.say = say
        plain = policy.plain_model()
        attention = plain.config._attn_implementation
        if attention != policy.config.attention:
            say(f"learner: {attention} attention: the model caps attention logits, sdpa would not")
        rows, tail = masking(plain), find_tail(plain, policy.device)
        if isinstance(rows, str):
            say(f"learner: prompts are not shared and rows not packed: {rows}")
        if isinstance(tail, str):
            say(f"learner: logits are computed whole: {tail}")
        self.ways = Ways(
            rows if isinstance(rows, Masking) else None, tail if isinstance(tail, Tail) else None
        )
        self._proved = self.ways == PLAIN

    def plans(
        self, examples: Sequence[Sequence[TokenPair]], group: Group = ALONE
    ) -> list[list[MicroBatch]]:
        """Each rank's micro-batches of at most `budget` tokens, equally many; an example's
        sequences have one prompt."""
        return plan(examples, self.budget, self.ways.masking is not None, group.world)

    def tokens(
        self, model: nn.Module, sequences: Sequence[TokenPair], unwrapped: nn.Module | None = None
    ) -> tuple[Tensor, Batch]:
        """Token log-probs [N] and the batch that says whose they are."""
        put = collate if self.ways.masking is None else collate_shared
        batch = put(sequences, self.policy.pad_id, self.policy.device)
        with self.policy.autocast():
            return token_logps(model, batch, unwrapped, self.ways), batch

    def sums(
        self, model: nn.Module, sequences: Sequence[TokenPair], unwrapped: nn.Module | None = None
    ) -> Tensor:
        """Sum of each sequence's token log-probs, shape [S]; a sequence given twice is computed
        once."""
        once, places = distinct(sequences)
        tokens_N, batch = self.tokens(model, once, unwrapped)
        return sequence_logps(tokens_N, batch)[torch.tensor(places, device=tokens_N.device)]

    def _plain(self, model: nn.Module, sequence: TokenPair) -> Tensor:
        """Token log-probs of a sequence by itself, from whole logits."""
        batch = collate([sequence], self.policy.pad_id, self.policy.device)
        with self.policy.autocast():
            return token_logps(model, batch)

    def prove(self, examples: Sequence[Sequence[TokenPair]], group: Group = ALONE) -> None:
        """Once: a batch of `probe`, made from the longest sequence, the frugal way and each of its
        sequences by itself, without gradients. All of `group` do the same and agree.

        Raises InexactError where the gap is over the precision's tolerance, or goes the plain way
        from then on if `on_inexact` says so.
        """
        if self._proved or not examples:
            return
        longest = max((s for e in examples for s in e), key=lambda s: len(s[0]) + len(s[1]))
        sequences = probe(*longest)
        model = self.policy.model
        training = model.training
        model.eval()
        with torch.no_grad():
            found_N, _ = self.tokens(model, sequences)
            plain_N = torch.cat([self._plain(model, sequence) for sequence in sequences])
        model.train(training)
        self._proved = True
        if not all(group.gather(bool(plain_N.isfinite().all()))):
            # Neither way is to blame; the step itself stops at what is not finite.
            return
        gaps_N = (found_N - plain_N).abs()
        gap, most = max(group.gather((float(gaps_N.mean()), float(gaps_N.max()))))
        precision = self.policy.config.precision
        allowed = TOLERANCE[precision]
        if gap <= allowed:
            return
        what = (
            f"packed and plain log-probs of {len(gaps_N)} tokens are {gap:.2g} nats apart on "
            f"average ({most:.2g} at most), {allowed:g} is allowed in {precision}"
        )
        if self.on_inexact == "stop":
            raise InexactError(f"{what}; learner.on_inexact: plain takes padded rows instead")
        self.say(f"learner: {what}: padded rows and whole logits from here on")
        self.ways = PLAIN


def probe(prompt: Sequence[int], completion: Sequence[int]) -> list[TokenPair]:
    """Sequences that packing lays out in every way it knows, from the tokens of one: two
    completions share a prompt, which fills a row; two shorter segments lie in another.

    >>> from rlhf.packing import pack
    >>> rows = pack(probe((1, 2, 3, 4), (5, 6)))
    >>> [[(s.prompt, [ids for _, ids in s.completions]) for s in row] for row in rows]
    [[([1, 2, 3, 4], [(5, 6), (6, 5)])], [([4, 5, 6], [(5,)]), ([2, 3], [(5,)])]]
    """
    first, text = tuple(completion), (*prompt, *completion)
    half, part = max(1, len(prompt) // 2), first[: (len(first) + 1) // 2]
    sequences: list[TokenPair] = [
        (tuple(prompt), first),
        (tuple(prompt), first[::-1]),
        (text[1 : 1 + half], part),
        # One longer, so that it is never the same prompt.
        (text[1 + half : 2 + 2 * half], part),
    ]
    return list(dict.fromkeys(sequences))
