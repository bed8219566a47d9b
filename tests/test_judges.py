"""A score that is not a number in [0, 1] is an abstention with a reason, and never a number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config_judges import JudgeSpec, VerifierSpec
from rlhf.errors import DataGateError, InputError, Interrupted, PairloopError
from rlhf.types import Completion, Prompt, Score, scores_table
from rollout.judges.panel import build, check_abstentions, score_all
from rollout.judges.verifier import Verifier

Item = tuple[Prompt, Completion]


def item(prompt_id: str = "p", sample: int = 0) -> Item:
    prompt = Prompt(prompt_id, ({"role": "user", "content": "Hi"},))
    return prompt, Completion(prompt_id, sample, "Hello", (1,), (1,), (0.0,), "stop", 0)


def judged(value: Any) -> Score:
    """The score of a verifier whose result holds this value."""
    (score,) = Verifier("v", lambda p, c: {"style": value}, ("style",)).score([item()])
    return score


def returning(result: Any) -> list[Score]:
    return Verifier("v", lambda p, c: result, ("correctness", "style")).score([item()])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "value is NaN"),
        (np.float32("nan"), "value is NaN"),
        (math.inf, "value is inf, outside [0, 1]"),
        (-math.inf, "value is -inf, outside [0, 1]"),
        (1.7, "value is 1.7, outside [0, 1]"),
        (-0.001, "value is -0.001, outside [0, 1]"),
        (1 + 1e-9, "value is 1.000000001, outside [0, 1]"),
        (10**400, "value is outside [0, 1] by far"),
        ("0.9", "value is '0.9' (str), not a number"),
        (None, "value is None"),
        (True, "value is True (bool), not a number"),
        (np.True_, "not a number"),
        (Decimal("0.5"), "not a number"),
        ([0.5], "value is [0.5] (list), not a number"),
        (np.array([0.5]), "not a number"),
        (0.5 + 0j, "not a number"),
    ],
)
def test_a_malformed_value_is_an_abstention_with_its_reason(value: Any, reason: str) -> None:
    score = judged(value)
    assert score.abstained
    assert score.score is None
    assert score.votes == ()
    assert score.spread is None
    assert score.reason is not None
    assert reason in score.reason


@pytest.mark.parametrize(
    "value", [0, 1, 0.0, 0.5, 1.0, np.float32(0.5), np.int64(1), Fraction(1, 2)]
)
def test_a_number_in_range_is_kept_as_it_is(value: Any) -> None:
    score = judged(value)
    assert score == Score.of("p", 0, "v", "style", float(value))
    assert type(score.score) is float


@settings(max_examples=200, deadline=None)
@given(
    st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.booleans()
    | st.none()
    | st.lists(st.floats(), max_size=2)
)
def test_whatever_comes_back_is_a_number_in_range_or_an_abstention(value: Any) -> None:
    score = judged(value)
    if score.abstained:
        assert score.score is None
        assert score.reason
    else:
        assert score.score == value
        assert not isinstance(value, bool | str)
        assert 0 <= value <= 1


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "returned None"),
        (0.5, "returned float, not a dict"),
        ([0.5, 0.5], "returned list, not a dict"),
        ("{}", "returned str, not a dict"),
        ({}, "no key 'correctness' in the result, which has []"),
    ],
)
def test_a_result_that_is_no_dict_abstains_on_every_dimension(result: Any, reason: str) -> None:
    scores = returning(result)
    assert [s.dimension for s in scores] == ["correctness", "style"]
    assert all(s.abstained and s.score is None for s in scores)
    assert scores[0].reason == reason


def test_one_missing_key_costs_its_own_dimension_only() -> None:
    correctness, style = returning({"style": 0.5, "other": 9.0})
    assert correctness.reason == "no key 'correctness' in the result, which has ['style', 'other']"
    assert style.score == 0.5


@pytest.mark.parametrize(
    "error", [ValueError("no\nfact"), AssertionError(), KeyError("fact"), RecursionError("deep")]
)
def test_an_exception_is_an_abstention_that_names_it(error: Exception) -> None:
    def verify(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
        if completion.sample == 1:
            raise error
        return {"style": 1.0}

    scores = Verifier("v", verify, ("style",)).score([item(sample=s) for s in range(3)])
    assert [s.score for s in scores] == [1.0, None, 1.0]
    assert scores[1].reason is not None
    assert scores[1].reason.startswith(f"raised {type(error).__name__}:")
    assert "\n" not in scores[1].reason


def test_a_long_reason_is_cut() -> None:
    reason = judged("x" * 10_000).reason
    assert reason is not None
    assert len(reason) == 200


@pytest.mark.parametrize("error", [Interrupted, MemoryError, KeyboardInterrupt, SystemExit])
def test_what_says_nothing_about_the_completion_is_not_taken_for_an_abstention(
    error: type[BaseException],
) -> None:
    def verify(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
        raise error

    with pytest.raises(error):
        Verifier("v", verify, ("style",)).score([item()])


def test_scores_come_by_item_then_dimension() -> None:
    judge = Verifier("v", lambda p, c: {"a": 0.1, "b": 0.2}, ("b", "a"))
    scores = judge.score([item("p", 0), item("p", 1), item("q", 0)])
    assert [(s.prompt_id, s.sample, s.dimension) for s in scores] == [
        (p, n, d) for p, n in (("p", 0), ("p", 1), ("q", 0)) for d in ("b", "a")
    ]


def test_malformed_scores_are_null_in_the_table() -> None:
    values: list[Any] = [math.nan, 1.7, "0.9", None, 0.25]
    judge = Verifier("v", lambda p, c: {"style": values[c.sample]}, ("style",))
    table = scores_table(judge.score([item(sample=s) for s in range(len(values))]))
    assert table["score"].to_list() == [None, None, None, None, 0.25]
    assert table["abstained"].to_list() == [True, True, True, True, False]
    assert table["reason"].null_count() == 1


def test_a_panel_is_built_in_the_configured_order_from_files(tmp_path: Path) -> None:
    source = tmp_path / "judges.py"
    source.write_text("def a(p, c): return {'x': 0.1}\ndef b(p, c): return {'y': 0.2}\n")
    specs: list[JudgeSpec] = [
        VerifierSpec(name="two", function=f"{source}:b", dimensions=["y"]),
        VerifierSpec(name="one", function=f"{source}:a", dimensions=["x"]),
    ]
    scores = score_all(build(specs, "judges.panel"), [item("p", 0), item("p", 1)])
    assert [(s.judge, s.sample, s.score) for s in scores] == [
        ("two", 0, 0.2),
        ("two", 1, 0.2),
        ("one", 0, 0.1),
        ("one", 1, 0.1),
    ]


def test_a_judge_that_cannot_be_built_names_its_field() -> None:
    good = VerifierSpec(name="good", function=f"{json.__name__}:dumps", dimensions=["x"])
    bad = VerifierSpec(name="bad", function="json:dumpz", dimensions=["y"])
    with pytest.raises(InputError, match=r"judges\.panel\[1\]\.function: json has no function"):
        build([good, bad], "judges.panel")


class Fake:
    """A judge whose answer is bent by a function before it is given."""

    name = "fake"
    dimensions: tuple[str, ...] = ("a", "b")

    def __init__(self, bend: Callable[[list[Score]], list[Score]]) -> None:
        self.bend = bend

    def score(self, items: Sequence[Item]) -> list[Score]:
        return self.bend(
            [
                Score.of(c.prompt_id, c.sample, self.name, d, 0.5)
                for _, c in items
                for d in self.dimensions
            ]
        )


def test_an_answer_in_order_is_taken() -> None:
    assert len(score_all([Fake(lambda s: s)], [item("p"), item("q")])) == 4
    assert score_all([Fake(lambda s: s)], []) == []


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (lambda s: s[:-1], "(4 in all), got 3"),
        (lambda s: [*s, s[0]], "(4 in all), got 5"),
        (lambda s: [*s[2:], *s[:2]], "but scored prompt 'q'"),
        (lambda s: [s[1], s[0], *s[2:]], "dimension 'a', but scored"),
        (lambda s: [Score.of("p", 1, "fake", "a", 0.5), *s[1:]], "but scored prompt 'p', sample 1"),
        (lambda s: [Score.of("p", 0, "other", "a", 0.5), *s[1:]], "as 'other'"),
        (lambda s: [Score.of("p", 0, "fake", "a", math.nan), *s[1:]], "in [0, 1] or abstain"),
        (lambda s: [Score.of("p", 0, "fake", "a", 1.7), *s[1:]], "in [0, 1] or abstain"),
        (lambda s: [Score("p", 0, "fake", "a", None), *s[1:]], "in [0, 1] or abstain"),
        (lambda s: [Score("p", 0, "fake", "a", 0.5, abstained=True), *s[1:]], "or abstain"),
        (lambda s: [Score.abstain("p", 0, "fake", "a", ""), *s[1:]], "abstain with a reason"),
    ],
)
def test_an_answer_to_another_question_is_refused_by_name(
    bend: Callable[[list[Score]], list[Score]], said: str
) -> None:
    with pytest.raises(PairloopError) as caught:
        score_all([Fake(bend)], [item("p"), item("q")])
    assert "judge 'fake'" in str(caught.value)
    assert said in str(caught.value)


def test_a_completion_is_never_scored_against_another_prompt() -> None:
    (prompt, _), (_, completion) = item("p"), item("q")
    with pytest.raises(AssertionError):
        score_all([Fake(lambda s: s)], [(prompt, completion)])


def abstaining(missing: int, asked: int, dimension: str = "style") -> list[Score]:
    return [
        Score.abstain("p", n, "v", dimension, "value is NaN")
        if n < missing
        else Score.of("p", n, "v", dimension, 0.5)
        for n in range(asked)
    ]


def test_abstentions_at_the_limit_pass_and_above_it_stop() -> None:
    check_abstentions(scores_table(abstaining(1, 20)), 0.05)
    with pytest.raises(DataGateError):
        check_abstentions(scores_table(abstaining(2, 20)), 0.05)
    check_abstentions(scores_table(abstaining(20, 20)), 1.0)
    check_abstentions(scores_table([]), 0.0)


def test_the_stop_names_dimension_share_limit_and_common_reasons() -> None:
    scores = abstaining(0, 10, "correctness") + abstaining(3, 10)
    scores += [Score.abstain("q", 0, "v", "style", "raised KeyError: 'fact'")]
    with pytest.raises(DataGateError) as caught:
        check_abstentions(scores_table(scores), 0.05)
    message = str(caught.value)
    assert "judges.max_abstention allows 5.0%" in message
    assert "style: 36.4% (4 of 11)" in message
    assert "3 x v: value is NaN; 1 x v: raised KeyError: 'fact'" in message
    assert "correctness" not in message
    assert caught.value.exit_status == 3


def test_one_judge_is_not_hidden_by_another_of_its_dimension() -> None:
    audit = [Score.of("p", n, "onlooker", "style", 0.5) for n in range(100)]
    with pytest.raises(DataGateError, match=r"style: 9\.0% \(9 of 100\) of v; 9 x v: value is NaN"):
        check_abstentions(scores_table(abstaining(9, 100) + audit), 0.05)


def test_one_dimension_is_not_hidden_by_the_others() -> None:
    scores = abstaining(10, 10, "a") + [s for d in "bcdefgh" for s in abstaining(0, 100, d)]
    with pytest.raises(DataGateError, match="a: 100"):
        check_abstentions(scores_table(scores), 0.05)
