"""Rubrics: what a model judge is asked, as a YAML file that a person can read and correct."""

from __future__ import annotations

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from rlhf.config_base import Section
from rlhf.config_yaml import Reader, dotted, show
from rlhf.errors import InputError

PACKAGED = Path(__file__).parent / "rubrics"
Text = Annotated[str, Field(min_length=1)]
Extra = Literal["context", "reference"]
"""What of a prompt, beside its messages, a judge may be shown."""


class Example(Section):
    """One graded answer, shown to the judge."""

    prompt: Text
    """What was asked."""
    context: Text | None = None
    reference: Text | None = None
    answer: Text
    """What was answered."""
    reason: Text
    """Why it has its grade, in a sentence or two."""
    grade: int | None
    """A grade of the scale; null for an abstention."""


class Rubric(Section):
    """One dimension's question and scale."""

    dimension: Text
    """What it was written for; a judge may use it for a dimension of another name."""
    question: Text
    """What the judge has to find out about the answer."""
    scale: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]$")], Text], Field(min_length=2)]
    """Grade -> the sentence that anchors it; consecutive digits, so that each is one token."""
    abstain: Text
    """When an answer can't be graded."""
    sees: list[Extra] = Field(default_factory=list)
    """What of the prompt the judge is shown beside its messages."""
    needs: list[Extra] = Field(default_factory=list)
    """What a prompt must have; one without it is an abstention that costs no call."""
    examples: list[Example] = Field(default_factory=list)
    """Graded answers, which fix the scale better than words do."""

    @model_validator(mode="after")
    def _rules(self) -> Rubric:
        grades = self.grades
        if list(grades) != list(range(grades[0], grades[0] + len(grades))):
            raise ValueError(f"scale must rise by 1 from grade to grade, got {list(grades)}")
        unseen = sorted(set(self.needs) - set(self.sees))
        if unseen:
            raise ValueError(f"needs must be among what the judge sees, got {unseen}")
        for index, example in enumerate(self.examples):
            if example.grade is not None and example.grade not in grades:
                raise ValueError(
                    f"examples.{index}.grade must be on the scale {grades[0]} to {grades[-1]}, "
                    f"got {example.grade}"
                )
        return self

    @property
    def grades(self) -> tuple[int, ...]:
        """The scale's grades, lowest first."""
        return tuple(map(int, self.scale))

    def value(self, grade: float) -> float:
        """A grade, or a mean of grades, on [0, 1]: 0 for the lowest, 1 for the highest."""
        low, high = self.grades[0], self.grades[-1]
        return min(1.0, max(0.0, (grade - low) / (high - low)))

    @property
    def sha256(self) -> str:
        """Of what it says, whatever its layout and comments."""
        said = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(said.encode()).hexdigest()


def packaged() -> tuple[str, ...]:
    """Names of the rubrics that come with the package."""
    return tuple(sorted(path.stem for path in PACKAGED.glob("*.yaml")))


def load(name: str, field: str) -> Rubric:
    """The rubric of a name or path; `field` is the configuration field, for the message.

    A path ends in .yaml or .yml and is looked up from the working directory. Raises InputError
    with all that is wrong, one a line, with file and line.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in packaged():
        path = PACKAGED / f"{name}.yaml"
    else:
        near = get_close_matches(name, packaged(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"{field}: there is no packaged rubric {name!r}; {hint}packaged are "
            f"{', '.join(packaged())}; for your own, give the path of a .yaml file"
        )
    return _read(path, field)


def _read(path: Path, field: str) -> Rubric:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{field}: there is no rubric {path} in the working directory {Path.cwd()}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{field}: rubric {path} can't be read: {reason}") from None
    reader = Reader(lambda line: f"{path}:{line}")
    root = reader.read(text)
    if reader.problems:
        raise InputError("\n".join(reader.problems))
    if root is None or not isinstance(root.value, dict):
        raise InputError(f"{field}: rubric {path} must hold a mapping, as `dimension: correctness`")
    try:
        return Rubric.model_validate(root.plain, strict=True)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            at = tuple(part for part in detail["loc"] if part != "[key]")
            if detail["type"] == "value_error":
                message = str(detail["ctx"]["error"])
                opening = message.split(" ", 1)[0].split(".")
                place = root.at(tuple(int(p) if p.isdecimal() else p for p in opening)).place
                lines.append(f"{message} ({place})")
                continue
            node = root.at(at)
            said = detail["msg"][0].lower() + detail["msg"][1:]
            found = "" if detail["type"] == "missing" else f", found {show(node.plain)}"
            lines.append(f"{dotted(at)}: {said}{found} ({node.place})")
        raise InputError("\n".join(lines)) from None
