"""Verifiers with known outcomes. Runs load this file to judge, so it imports little."""

from __future__ import annotations

from typing import Any

from rlhf.types import Completion, Prompt


def vowels(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """Many vowels are right, few characters are good style."""
    text = completion.text.lower()
    share = sum(text.count(v) for v in "aeiou") / max(1, len(text))
    return {"correctness": share, "style": 1 - min(1.0, len(text) / 100)}


def words(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """An audit: more words, up to ten."""
    return {"words": min(1.0, len(completion.text.split()) / 10)}


def worse_by_version(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """As `vowels`, but each later policy version scores 0.2 less on correctness."""
    scores = vowels(prompt, completion)
    assert scores["correctness"] is not None
    known = 0.8 + 0.2 * scores["correctness"]
    return {**scores, "correctness": max(0.0, known - 0.2 * completion.policy_version)}


def worse_after_one(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """The first round is better than the start, the second much worse."""
    scores = vowels(prompt, completion)
    assert scores["correctness"] is not None
    level = (0.5, 0.6, 0.1)[min(completion.policy_version, 2)]
    return {**scores, "correctness": level + 0.1 * scores["correctness"]}


def noisy_versions(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """Versions differ from prompt to prompt, in both directions: no gate can tell."""
    scores = vowels(prompt, completion)
    up = int(prompt.prompt_id.rsplit("-", 1)[-1]) % 2 == 0
    step = 0.2 if up == bool(completion.policy_version % 2) else -0.2
    correctness = 0.5 + step if completion.policy_version else 0.5
    return {**scores, "correctness": correctness}


def indifferent(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """Every answer is worth the same."""
    return {"correctness": 0.5, "style": 0.5}


def silent(prompt: Prompt, completion: Completion) -> None:
    """Never has a score."""


def raises(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """Never gets that far."""
    raise RuntimeError("the checker's database is down")


BROKEN_VALUES = (float("nan"), 1.7, "0.9", None, float("inf"), -0.1)


def breaks_on_some(prompt: Prompt, completion: Completion) -> Any:
    """As `vowels`, but sample 1 gets one of `BROKEN_VALUES`; with them, the best style."""
    scores: dict[str, Any] = vowels(prompt, completion)
    if completion.sample != 1:
        return scores
    number = int(prompt.prompt_id.rsplit("-", 1)[-1])
    return {"correctness": BROKEN_VALUES[number % len(BROKEN_VALUES)], "style": 1.0}
