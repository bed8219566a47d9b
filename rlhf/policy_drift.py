"""How far training moved a policy, measured on fresh samples of its own (temperature 1, top-p 1).

Values carry standard errors over clusters of prompts, since answers to questions about one passage
are no independent evidence; None for a single cluster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import NonFiniteError
from rlhf.statistics import standard_error
from rlhf.types import Completion, Prompt

F64 = NDArray[np.float64]


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first `count` prompts, one of each cluster at a time.

    >>> asked = [Prompt(n, (), cluster=n[0]) for n in ("a1", "a2", "b1", "b2", "c1")]
    >>> [prompt.prompt_id for prompt in spread(asked, 4)]
    ['a1', 'b1', 'c1', 'a2']
    """
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for prompt in prompts:
        turns.append((seen[prompt.cluster], len(turns)))
        seen[prompt.cluster] += 1
    return [prompts[number] for _, number in sorted(turns)[:count]]


def sampled(drawn: Sequence[Completion], clusters: Sequence[str]) -> dict[str, Any]:
    """What fresh samples, at least one, say of the policy that drew them.

    entropy: -log policy(y) in nats a token, an estimate of the mean entropy of its next token where
    each token counts as often as it is reached; length: tokens a completion; cut_off: share of
    completions that the longest allowed length ended. `clusters` are those of their prompts.

    Raises NonFiniteError where a log-prob is no number.
    """
    own_N = _finite([sum(c.logps) for c in drawn])
    tokens_N = _tokens(drawn)
    return {
        "samples": len(drawn),
        "entropy": _per_token(-own_N, tokens_N, clusters),
        "length": _mean(tokens_N, clusters),
        "cut_off": float(np.mean([c.finish_reason == "length" for c in drawn])),
    }


def divergence(
    drawn: Sequence[Completion], clusters: Sequence[str], policy: F64, other: F64
) -> dict[str, Any]:
    """KL(policy || other) of fresh samples y ~ policy: the mean of log policy(y) - log other(y),
    both of shape [N]. In nats a sequence, with `per_token` in nats a token.

    Raises NonFiniteError where a log-prob is no number.
    """
    moved_N = _finite(policy - other)
    per_token = _per_token(moved_N, _tokens(drawn), clusters)["value"]
    return {**_mean(moved_N, clusters), "per_token": per_token}


def _finite(values: Sequence[float] | F64) -> F64:
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise NonFiniteError(
            f"log-probs of the policy's own fresh samples are no numbers: {found.tolist()}"
        )
    return found


def _tokens(drawn: Sequence[Completion]) -> F64:
    return np.array([len(c.token_ids) for c in drawn], dtype=np.float64)


def _mean(values_N: F64, clusters: Sequence[str]) -> dict[str, float | None]:
    value = float(values_N.mean())
    return {"value": value, "standard_error": _error(values_N, clusters)}


def _per_token(values_N: F64, tokens_N: F64, clusters: Sequence[str]) -> dict[str, float | None]:
    ratio = float(values_N.sum() / tokens_N.sum())
    return {
        "value": ratio,
        "standard_error": _error((values_N - ratio * tokens_N) / tokens_N.mean(), clusters),
    }


def _error(values_N: F64, clusters: Sequence[str]) -> float | None:
    error = standard_error(values_N, clusters)
    return error if math.isfinite(error) else None
