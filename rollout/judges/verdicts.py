"""What a model answered -> verdicts. Whatever is not exactly a verdict is none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from rlhf.types import Completion
from rollout.judges.backends import Answer, Token
from rollout.judges.rubric import Rubric

Winner = Literal["A", "B", "tie"]
_SHOWN = 120


class NoVerdict(Exception):
    """Why there is no verdict."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One dimension's grade on [0, 1], and the judge's reason."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class Compared:
    """One dimension's winner by position, and the judge's reason."""

    winner: Winner
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was said of two answers to one prompt, in each order they were shown in; `value` is 1
    where `sample` is better, -1 where `other` is, 0 for a tie, None for no verdict.

    >>> seen = Comparison("p", 0, 1, "style", ab=1.0, ba=-1.0)
    >>> seen.ab == seen.ba  # whichever stood first won
    False
    """

    prompt_id: str
    sample: int
    other: int
    dimension: str
    ab: float | None
    ba: float | None


Shown = tuple[str, tuple[str, ...], str]
"""Prompt, the texts in the order they were shown in, and the dimension."""
Won = Mapping[Shown, Compared | NoVerdict]


def grades(
    answer: Answer, rubrics: Mapping[str, Rubric], expected: bool
) -> dict[str, Graded | NoVerdict]:
    """A verdict, or why there is none, for every dimension of a call.

    With `expected` the value is the mean grade over the probabilities of the grade's token, taken
    among the grades alone; the grade itself is the likeliest, as it was decoded.
    """
    found: dict[str, Graded | NoVerdict] = {}
    try:
        verdicts = _verdicts(answer, list(rubrics), "grade")
    except NoVerdict as why:
        return dict.fromkeys(rubrics, why)
    places = _places(answer.tokens)
    # An object's members may come in any order; what decided them stands in that of the text.
    for index, (dimension, verdict) in enumerate(verdicts.items()):
        rubric = rubrics[dimension]
        grade = verdict["grade"]
        try:
            if grade is None:
                raise NoVerdict(_short(f"the judge abstained: {verdict['reason']}"))
            # bool is an int to Python, and True would be a grade of 1.
            if isinstance(grade, bool) or not isinstance(grade, int):
                raise NoVerdict(_short(f"grade is {grade!r}, not a whole number"))
            if grade not in rubric.grades:
                low, high = rubric.grades[0], rubric.grades[-1]
                raise NoVerdict(f"grade {grade} is not on the scale {low} to {high}")
            mean = float(grade)
            if expected:
                if len(places) != len(rubrics):
                    raise NoVerdict("the grade's token was not found among the answer's tokens")
                mean = _mean(places[index], grade, rubric.grades)
            found[dimension] = Graded(rubric.value(mean), verdict["reason"])
        except NoVerdict as why:
            found[dimension] = why
    return found


def winners(answer: Answer, dimensions: Sequence[str]) -> dict[str, Compared | NoVerdict]:
    """Which position won, or why there is no verdict, for every dimension of a call."""
    found: dict[str, Compared | NoVerdict] = {}
    try:
        verdicts = _verdicts(answer, dimensions, "winner")
    except NoVerdict as why:
        return dict.fromkeys(dimensions, why)
    for dimension, verdict in verdicts.items():
        winner, reason = verdict["winner"], verdict["reason"]
        if winner is None:
            found[dimension] = NoVerdict(_short(f"the judge abstained: {reason}"))
        elif winner in ("A", "B", "tie"):
            found[dimension] = Compared(winner, reason)
        else:
            found[dimension] = NoVerdict(_short(f"winner is {winner!r}, not A, B or tie"))
    return found


def comparisons(completions: Sequence[Completion], won: Won) -> Iterator[Comparison]:
    """Every two different answers to a prompt, on every dimension that was asked about."""
    points = {"A": 1.0, "tie": 0.0, "B": -1.0}
    dimensions = dict.fromkeys(dimension for _, _, dimension in won)
    by_prompt: dict[str, list[Completion]] = {}
    for completion in completions:
        by_prompt.setdefault(completion.prompt_id, []).append(completion)
    for prompt_id, answers in by_prompt.items():
        for one, two in combinations(answers, 2):
            for dimension in dimensions:
                ahead = won.get((prompt_id, (one.text, two.text), dimension))
                behind = won.get((prompt_id, (two.text, one.text), dimension))
                if ahead is None or behind is None:
                    continue
                ab = points[ahead.winner] if isinstance(ahead, Compared) else None
                ba = -points[behind.winner] if isinstance(behind, Compared) else None
                yield Comparison(prompt_id, one.sample, two.sample, dimension, ab, ba)


def _verdicts(answer: Answer, dimensions: Sequence[str], key: str) -> dict[str, dict[str, Any]]:
    """The verdict object of every dimension, in the text's order. The whole text must be one JSON
    object of exactly the keys asked for: nothing is looked for inside a text that merely holds such
    an object."""
    if answer.text is None:
        raise NoVerdict(_short(answer.failure or "no answer"))
    try:
        parsed: Any = json.loads(answer.text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise NoVerdict(_short(f"not JSON: {answer.text!r}")) from None
    nested = {dimensions[0]: parsed} if len(dimensions) == 1 else parsed
    if not isinstance(nested, dict) or set(nested) != set(dimensions):
        raise NoVerdict(_short(f"not a verdict on {', '.join(dimensions)}: {answer.text!r}"))
    for verdict in nested.values():
        well_formed = (
            isinstance(verdict, dict)
            and set(verdict) == {"reason", key}
            and isinstance(verdict["reason"], str)
        )
        if not well_formed:
            raise NoVerdict(_short(f"not a verdict with reason and {key}: {answer.text!r}"))
        # JSON may hold half a surrogate pair, which no table takes.
        verdict["reason"] = verdict["reason"].encode(errors="replace").decode()
    return nested


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _places(tokens: Sequence[Token]) -> list[Token]:
    """The tokens that decided the grades, in order: each the first after `"grade":`.

    Inside a JSON string that key could only stand with its quotes escaped, so a reason can't
    imitate it.
    """
    found: list[Token] = []
    tail, due = "", False
    for token in tokens:
        text = "".join(token.text.split())
        if due and text:
            found.append(token)
            due = False
        tail = (tail + text)[-len('"grade":') :]
        due = due or tail == '"grade":'
    return found


def _mean(token: Token, grade: int, scale: Sequence[int]) -> float:
    """The mean grade under the token's alternatives, restricted to the scale."""
    if token.text.strip() != str(grade):
        raise NoVerdict(f"grade {grade} is no token of its own, so it has no probability")
    weights = dict.fromkeys(scale, 0.0)
    for text, logp in token.alternatives.items():
        label = text.strip()
        if label.isdecimal() and len(label) == 1 and int(label) in weights:
            weights[int(label)] += math.exp(logp)
    total = sum(weights.values())
    if not (math.isfinite(total) and weights[grade] > 0):
        raise NoVerdict("the back end gave no probability for the grade that it chose")
    return sum(g * w for g, w in weights.items()) / total


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
