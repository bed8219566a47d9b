"""A verifier: a judge that is a Python function.

    def verify(prompt: Prompt, completion: Completion) -> dict[str, float | None]

Its tests are its certificate. Whatever goes wrong with one completion is an abstention with its
reason; nothing is clipped, converted or guessed into a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rlhf.config_judges import VerifierSpec
from rlhf.errors import Interrupted
from rlhf.types import Completion, Prompt, Score
from rollout.imports import load_function

Verify = Callable[[Prompt, Completion], Mapping[str, float | None]]
_REASON_CHARACTERS = 200


class _Abstention(Exception):
    """Why there is no score."""


@dataclass(slots=True)
class Verifier:
    """A function as a judge; keys of its result that are not in `dimensions` are ignored.

    >>> from rlhf.types import Completion, Prompt
    >>> judge = Verifier("length", lambda p, c: {"style": len(c.text) / 10}, ("style",))
    >>> prompt = Prompt("p", ({"role": "user", "content": "Hi"},))
    >>> answer = Completion("p", 0, "Hello", (1,), (1,), (0.0,), "stop", 0)
    >>> [(s.dimension, s.score) for s in judge.score([(prompt, answer)])]
    [('style', 0.5)]
    """

    name: str
    function: Verify
    dimensions: tuple[str, ...]

    @classmethod
    def of(cls, spec: VerifierSpec, field: str) -> Verifier:
        """The verifier that a configuration names. Raises InputError as `load_function` does."""
        function = load_function(spec.function, f"{field}.function")
        return cls(spec.name, function, tuple(spec.dimensions))

    def score(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """One `Score` for every item and dimension, in that order."""
        return [score for item in items for score in self._score_one(*item)]

    def _score_one(self, prompt: Prompt, completion: Completion) -> list[Score]:
        at = (completion.prompt_id, completion.sample, self.name)
        try:
            result = self._call(prompt, completion)
        except _Abstention as why:
            return [Score.abstain(*at, d, str(why)) for d in self.dimensions]
        scores = []
        for dimension in self.dimensions:
            try:
                scores.append(Score.of(*at, dimension, _value(result, dimension)))
            except _Abstention as why:
                scores.append(Score.abstain(*at, dimension, str(why)))
        return scores

    def _call(self, prompt: Prompt, completion: Completion) -> Mapping[str, Any]:
        try:
            result: Any = self.function(prompt, completion)
        # A signal's request to stop and an exhausted machine say nothing about this completion.
        except (Interrupted, MemoryError):
            raise
        # The one place that takes any exception: the function is the user's and may raise any,
        # and one bad completion must cost one score, not the round. The reason keeps what it was.
        except Exception as error:
            raise _Abstention(_short(f"raised {type(error).__name__}: {error}")) from error
        if result is None:
            raise _Abstention("returned None")
        if not isinstance(result, Mapping):
            raise _Abstention(f"returned {type(result).__name__}, not a dict")
        return result


def _value(result: Mapping[str, Any], dimension: str) -> float:
    """The dimension's score in [0, 1]. Raises _Abstention where it isn't one."""
    if dimension not in result:
        raise _Abstention(_short(f"no key {dimension!r} in the result, which has {list(result)}"))
    value = result[dimension]
    if value is None:
        raise _Abstention("value is None")
    # bool is an int to Python, but True is more often a forgotten condition than a score of 1.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _Abstention(_short(f"value is {value!r} ({type(value).__name__}), not a number"))
    try:
        number = float(value)
    except OverflowError:
        raise _Abstention("value is outside [0, 1] by far") from None
    if math.isnan(number):
        raise _Abstention("value is NaN")
    if not 0 <= number <= 1:
        raise _Abstention(f"value is {number}, outside [0, 1]")
    return number


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _REASON_CHARACTERS else f"{line[: _REASON_CHARACTERS - 3]}..."
