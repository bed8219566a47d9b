"""A rubric says what a judge is asked, is checked to the line, and is known by its content."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from rlhf.config_selection import STANDARD_WEIGHTS
from rlhf.errors import InputError
from rollout.judges.rubric import Rubric, load, packaged

GOOD = """\
dimension: brevity
question: Is it short?
scale:
  0: No.
  1: Nearly.
  2: Yes.
abstain: there is no answer.
sees: [reference]
examples:
  - prompt: Hi
    answer: Hello.
    reason: One word.
    grade: 2
"""


def written(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return str(path)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(written(folder, text), "judges.panel[0].rubrics.brevity")
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_every_standard_dimension_has_a_rubric_and_the_scales_have_five_anchors() -> None:
    wanted = {*STANDARD_WEIGHTS, "harmlessness", "helpfulness"}
    assert set(packaged()) == wanted
    for name in packaged():
        rubric = load(name, "field")
        assert rubric.dimension == name
        assert rubric.grades == (1, 2, 3, 4, 5)
        graded = [example.grade for example in rubric.examples]
        assert len(set(graded)) > 1, f"{name}: examples of one grade fix no scale"


def test_groundedness_is_judged_by_the_context_alone() -> None:
    rubric = load("groundedness", "field")
    assert (rubric.sees, rubric.needs) == (["context"], ["context"])


def test_grades_map_to_the_unit_interval(tmp_path: Path) -> None:
    rubric = load(written(tmp_path, GOOD), "field")
    assert [rubric.value(grade) for grade in (*rubric.grades, 0.5)] == [0, 0.5, 1, 0.25]
    assert load("style", "field").value(1) == 0


def test_the_hash_is_of_what_is_said_not_of_its_layout(tmp_path: Path) -> None:
    rubric = load(written(tmp_path, GOOD), "field")
    again = load(
        written(
            tmp_path,
            f"# a comment\n{GOOD.replace('[reference]', '- reference')}".replace(
                "sees: - reference", "sees:\n  - reference"
            ),
        ),
        "field",
    )
    assert again.sha256 == rubric.sha256
    for old, new in (("Is it short?", "Is it brief?"), ("Nearly.", "Almost."), ("2\n", "1\n")):
        other = load(written(tmp_path, GOOD.replace(old, new, 1)), "field")
        assert other.sha256 != rubric.sha256, (old, new)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("question: Is it short?\n", "", "question: field required (own.yaml:1)"),
        ("Is it short?", "''", "question: string should have at least 1 character, found"),
        ("abstain:", "abstein:", 'abstein: extra inputs are not permitted, found "there'),
        ("  1: Nearly.", "  5: Nearly.", "scale must rise by 1 from grade to grade, got [0, 5, 2]"),
        ("  1: Nearly.", "  10: Nearly.", "string should match pattern"),
        ("sees: [reference]", "sees: [sources]", "sees.0: input should be 'context' or"),
        ("sees: [reference]", "needs: [context]", "needs must be among what the judge sees"),
        ("    grade: 2", "    grade: 3", "examples.0.grade must be on the scale 0 to 2, got 3"),
        ("    grade: 2", "    grade: '2'", "examples.0.grade: input should be a valid integer"),
        ("scale:\n", "scale:\n  0: Never.\n", "scale.0 is given twice (own.yaml:4 and own.yaml:5)"),
        ("dimension: brevity", "dimension: [", "invalid YAML (own.yaml:2)"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_line(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    found = problems(tmp_path, text)
    assert any(said in line and "(own.yaml:" in line for line in found), found


def test_all_mistakes_are_told_together(tmp_path: Path) -> None:
    text = GOOD.replace("Is it short?", "''").replace("    grade: 2", "    grade: two")
    found = problems(tmp_path, text)
    assert [line.rpartition("(")[2] for line in found] == ["own.yaml:2)", "own.yaml:13)"]


def test_an_unknown_name_and_a_missing_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"rubrics\.tone: there is no packaged rubric 'stile'; did "
        r"you mean style\? packaged are correctness, .*path of a \.yaml file",
    ):
        load("stile", "judges.panel[0].rubrics.tone")
    with pytest.raises(InputError, match=r"there is no rubric nope\.yaml in the working directory"):
        load("nope.yaml", "field")
    with pytest.raises(InputError, match="must hold a mapping"):
        load(written(tmp_path, "- a\n"), "field")


def test_an_abstention_may_be_an_example(tmp_path: Path) -> None:
    rubric: Rubric = load(written(tmp_path, GOOD.replace("grade: 2", "grade: null")), "field")
    assert rubric.examples[0].grade is None
