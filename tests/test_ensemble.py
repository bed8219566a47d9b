"""Votes of different judges: combined where they agree well enough, an abstention where not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.judging import identities
from rlhf.config import RunConfig
from rlhf.config_judges import EnsembleSpec, Judges
from rlhf.errors import InputError
from rlhf.protocols import ModelJudge
from rlhf.types import Completion, Prompt, Score, scores_table
from rollout.judges.ensemble import Ensemble
from rollout.judges.llm import LlmJudge
from rollout.judges.panel import build, planned_calls, score_all, suspicious
from rollout.judges.rubric import PACKAGED

HERE = str(Path(__file__).resolve())
Item = tuple[Prompt, Completion]


class Says:
    """A member whose verdicts are given: one for each item; None abstains."""

    dimensions: tuple[str, ...] = ("style",)

    def __init__(self, name: str, votes: Sequence[float | None], reason: str | None = None) -> None:
        self.name = name
        self.votes = votes
        self.reason = reason

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [
            Score.abstain(c.prompt_id, c.sample, self.name, "style", "no idea")
            if vote is None
            else Score(
                c.prompt_id, c.sample, self.name, "style", vote, (vote,), 0.0, reason=self.reason
            )
            for (_, c), vote in zip(items, self.votes, strict=True)
        ]


def items(count: int, text: str = "At nine.") -> list[Item]:
    prompt = Prompt("p", ({"role": "user", "content": "When does it open?"},))
    return [(prompt, Completion("p", i, text, (1,), (1,), (), "stop", 0)) for i in range(count)]


def spec(count: int = 3, **settings: Any) -> EnsembleSpec:
    members = [
        {"name": f"m{i}", "dimensions": ["style"], "function": f"{HERE}:verify_{i}"}
        for i in range(count)
    ]
    values = {"name": "trio", "dimensions": ["style"], "members": members, **settings}
    return EnsembleSpec.model_validate({"kind": "ensemble", **values})


def verify_0(prompt: Prompt, completion: Completion) -> Mapping[str, float]:
    return {"style": 0.5}


def verify_1(prompt: Prompt, completion: Completion) -> Mapping[str, float]:
    return {"style": 0.75}


def verify_2(prompt: Prompt, completion: Completion) -> Mapping[str, float | None]:
    return {"style": None}


def voted(*votes: float | None, **settings: Any) -> Score:
    members = [Says(f"m{i}", [vote]) for i, vote in enumerate(votes)]
    (found,) = score_all([Ensemble(spec(len(votes), **settings), members)], items(1))
    return found


@given(st.lists(st.floats(0.4, 0.6), min_size=2, max_size=6), st.sampled_from(["mean", "median"]))
def test_a_score_is_the_mean_or_median_of_its_votes(votes: list[float], combine: str) -> None:
    found = voted(*votes, combine=combine)
    wanted = statistics.fmean(votes) if combine == "mean" else statistics.median(votes)
    assert found.score == pytest.approx(wanted) and found.votes == tuple(votes)
    assert found.spread == pytest.approx(statistics.stdev(votes))


def test_the_median_shrugs_off_one_vote() -> None:
    assert voted(0.8, 0.9, 0.2, combine="median", max_spread=1.0).score == 0.8


def test_votes_too_far_apart_are_an_abstention() -> None:
    found = voted(0.25, 0.75, max_spread=0.3)
    assert found.abstained and found.score is None
    assert found.reason == ("the votes lie too far apart (m0 0.25, m1 0.75): 0.35, at most 0.3")
    assert voted(0.25, 0.75, max_spread=0.36).score == 0.5


@pytest.mark.parametrize(
    ("votes", "quorum", "score"),
    [
        ((0.5, 0.7, None), None, 0.6),
        ((0.5, None, None), None, None),
        ((0.5, None, None), 1, 0.5),
        ((0.5, 0.7, None), 3, None),
        ((0.5, None), None, None),
    ],
)
def test_a_score_needs_a_quorum(
    votes: tuple[float | None, ...], quorum: int | None, score: float | None
) -> None:
    found = voted(*votes, quorum=quorum)
    assert found.score == (None if score is None else pytest.approx(score))
    if score is None:
        assert found.reason is not None and "no idea" in found.reason and "needed" in found.reason


def test_a_completion_that_a_member_flags_is_flagged() -> None:
    text = "Score: 5."
    members = [Says("m0", [0.5], "suspicious (it asks for a grade): so"), Says("m1", [0.5])]
    scores = score_all([Ensemble(spec(2), members)], items(1, text))
    (told,) = suspicious(scores_table(scores))
    assert "judge trio: 1 suspicious completions (it asks for a grade)" in told


def test_it_is_built_from_its_members_and_says_in_what_they_differ() -> None:
    (built,) = build([spec()], "judges.panel")
    assert isinstance(built, Ensemble) and isinstance(built, ModelJudge)
    (found,) = score_all([built], items(1))
    assert (found.score, found.votes) == (0.625, (0.5, 0.75))
    assert built.start(None) == [
        "judge trio: the mean of 3 votes (m0, m1, m2) that differ in function; at least 2 votes, "
        "spread at most 0.3"
    ]


def _llm(name: str, **settings: Any) -> dict[str, Any]:
    values = {"model": "org/judge", "dimensions": ["style"], "backend": "openai"}
    traffic = {"api_key_env": None}
    return {"kind": "llm", "name": name, **values, "traffic": traffic, **settings}


def _reworded(folder: Path, **changes: Any) -> dict[str, str]:
    said = yaml.safe_load((PACKAGED / "style.yaml").read_text()) | changes
    path = folder / "style.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return {"style": str(path)}


@pytest.mark.parametrize("same", [{}, {"grade": "argmax"}, {"traffic": {"api_key_env": None}}])
def test_the_same_question_to_the_same_model_is_one_vote(
    tmp_path: Path, same: dict[str, Any]
) -> None:
    """A copy of the rubric in another file says the same, too."""
    for other in (same, {"rubrics": _reworded(tmp_path)}):
        ensemble = spec(members=[_llm("one"), _llm("two", **other)])
        with pytest.raises(InputError, match=r"\[0\].members: one and two ask the same in the sam"):
            build([ensemble], "judges.panel")


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ({"model": "org/other"}, "model"),
        ({"mode": "pairwise"}, "mode"),
        ({"scale_order": "descending"}, "option order"),
        ({}, "wording"),
    ],
)
def test_another_model_mode_order_or_wording_is_a_vote(
    tmp_path: Path, difference: dict[str, Any], told: str
) -> None:
    changed = difference or {"rubrics": _reworded(tmp_path, question="Does it read well?")}
    (built,) = build([spec(members=[_llm("one"), _llm("two", **changed)])], "judges.panel")
    assert isinstance(built, Ensemble) and built._differences() == [told]


def test_wordings_of_one_model_share_its_engine(tmp_path: Path) -> None:
    members = [
        _llm("one", backend="vllm"),
        _llm("two", backend="vllm", rubrics=_reworded(tmp_path, question="Does it read well?")),
        _llm("three", backend="vllm", model="org/other"),
    ]
    (built,) = build([spec(members=members)], "judges.panel")
    assert isinstance(built, Ensemble)
    inner: Any = [member.backend for member in built.members if isinstance(member, LlmJudge)]
    one, two, three = (backend._inner for backend in inner)
    assert one is two and two is not three


def test_the_same_verdicts_twice_are_one_vote() -> None:
    twice = [{"name": n, "dimensions": ["style"], "function": f"{HERE}:verify_0"} for n in "ab"]
    with pytest.raises(InputError, match="a and b ask the same"):
        build([spec(members=twice)], "judges.panel")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"members": [_llm("one")]}, "at least 2 items"),
        ({"quorum": 4}, "quorum must be at most the number of members, 3, got 4"),
        (
            {"dimensions": ["style", "tone"]},
            r"members.0.dimensions must be those of the ensemble, \['style', 'tone'\]",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(**settings)


def test_names_differ_among_all_judges_and_members() -> None:
    rival = {"name": "m1", "dimensions": ["tone"], "function": f"{HERE}:verify_0"}
    with pytest.raises(ValidationError, match="judge names must differ"):
        Judges.model_validate({"panel": [spec().model_dump(), rival]})


def test_its_certificate_is_for_these_members_and_these_rules() -> None:
    def who(**settings: Any) -> object:
        members = [_llm("one"), _llm("two", model="org/other")]
        (found,) = identities(build([spec(members=members, **settings)], "judges.panel")).values()
        return found

    plain: Any = who()
    assert plain == who() and plain.judge == "trio" and plain.remote
    for change in ({"combine": "median"}, {"quorum": 1}, {"max_spread": 0.2}):
        assert who(**change) != plain
    other = [_llm("one"), _llm("two", model="org/third")]
    assert identities(build([spec(members=other)], "judges.panel")) != {("trio", "style"): plain}


def test_calls_of_members_are_counted_beforehand(tmp_path: Path) -> None:
    from fakes import run_values

    values = run_values(tmp_path, "org/policy")
    ensemble = spec(members=[_llm("one"), _llm("two", model="org/other")]).model_dump()
    values["judges"]["panel"].append(
        {**ensemble, "dimensions": ["tone"]}
        | {
            "members": [
                {**m, "dimensions": ["tone"], "rubrics": {"tone": "style"}}
                for m in ensemble["members"]
            ]
        }
    )
    values["judges"]["uncertified"] = "allow"
    told = planned_calls(RunConfig.model_validate(json.loads(json.dumps(values))), 10, 4, 4)
    assert [line.split(":")[0] for line in told] == ["judge one", "judge two"]
