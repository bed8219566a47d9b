"""A language model with a rubric as a judge: pointwise grades, or pairwise win rates.

Temperature 0; the answer is constrained to a JSON schema, a short reason before the verdict. What
does not come back exactly as asked (cut off, refused, another schema, a grade off the scale) is an
abstention with its reason. What is judged is fenced (`fence`), and nothing in it is ever parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from pathlib import Path

from rlhf.config_judges import LlmSpec
from rlhf.errors import InputError
from rlhf.files import read_json, write_json
from rlhf.types import Completion, Prompt, Score
from rollout.imports import resolve_path
from rollout.judges import questions
from rollout.judges.backends import Answer, Backend, Call
from rollout.judges.cache import weights_of
from rollout.judges.fence import Fence, flagged
from rollout.judges.rubric import Rubric, load
from rollout.judges.verdicts import (
    Compared,
    Comparison,
    Graded,
    NoVerdict,
    Shown,
    Won,
    comparisons,
    grades,
    winners,
)

Items = Sequence[tuple[Prompt, Completion]]
Group = tuple[str, ...]
"""The dimensions that one call asks for."""

_REASON_CHARACTERS = 500
_PROBE = Prompt(
    "probe",
    ({"role": "user", "content": "What is 2 + 2?"},),
    context="2 + 2 = 4",
    reference="4",
)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about the answers to one prompt: one text to grade, or two, in the order
    shown, to compare."""

    prompt: Prompt = field(compare=False)
    prompt_id: str
    texts: tuple[str, ...]
    group: Group


@dataclass(slots=True)
class _Tally:
    """One completion's comparisons on one dimension."""

    points: float = 0.0
    wins: int = 0
    ties: int = 0
    losses: int = 0
    flips: int = 0
    missing: Counter[str] = field(default_factory=Counter)

    @property
    def answered(self) -> int:
        return self.wins + self.ties + self.losses


class LlmJudge:
    """Scores completions by asking a model, through whatever back end holds it."""

    def __init__(self, spec: LlmSpec, rubrics: Mapping[str, Rubric], backend: Backend) -> None:
        self.spec = spec
        self.name = spec.name
        self.dimensions = tuple(spec.dimensions)
        self.rubrics = {dimension: rubrics[dimension] for dimension in spec.dimensions}
        self.backend = backend
        self._fence = Fence()
        self._noted: list[Comparison] | None = None

    @classmethod
    def of(cls, spec: LlmSpec, field: str, backend: Backend) -> LlmJudge:
        """The judge that a configuration names. Raises InputError for a rubric that can't be
        read."""
        return cls(spec, load_rubrics(spec, field), backend)

    def start(self, folder: Path | None) -> list[str]:
        """Check rubrics and back end before anything is generated; what is worth saying.

        `folder` keeps what a run must remember of its judges: rubrics, usage, who answered.
        Raises InputError where the rubrics are not those that the run began with, or the back end
        can't be used as configured.
        """
        if folder is not None:
            self._remember(folder / f"{self.name}.json")
        usage = None if folder is None else folder / f"{self.name}-usage.json"
        group = asked_together(self.spec)[0]
        answer = self.backend.start(usage, self._call(self._probe(group)))
        if answer is None:
            return []
        if self._expected and answer.text is not None and not answer.tokens:
            raise InputError(
                f"judge {self.name}: grade expected needs log-probs, which this endpoint does not "
                "give; use grade: argmax"
            )
        found: Mapping[str, Graded | Compared | NoVerdict] = self._read(group, answer)
        odd = next((v for v in found.values() if isinstance(v, NoVerdict)), None)
        return [f"judge {self.name}: no verdict on what 2 + 2 is: {odd}"] if odd else []

    def wording_sha256(self, dimension: str) -> str:
        """Of all that a dimension is asked by, whatever is judged: rubrics, the question's wording,
        its schema and decoding. What a certificate is given for."""
        (group,) = (g for g in asked_together(self.spec) if dimension in g)
        said = [self.spec.mode, self.spec.grade, self._call(self._probe(group)).key]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @cached_property
    def weights(self) -> str | None:
        """What tells these weights from others: the SHA-256 of a local model's, a hub id's
        revision; None where it may change."""
        local = self.spec.backend == "vllm" and resolve_path(self.spec.model).exists()
        return weights_of(self.spec.model, None) if local else self.spec.revision

    def score(self, items: Items) -> list[Score]:
        """One `Score` for every item and dimension, in that order."""
        if self.spec.mode == "pairwise":
            return self._compare(items)
        return self._grade(items)

    @contextmanager
    def noting(self) -> Iterator[list[Comparison]]:
        """Within it the comparisons behind the scores are kept, in the list that this yields: for
        what measures a pairwise judge. A pointwise one makes none."""
        noted: list[Comparison] = []
        self._noted = noted
        try:
            yield noted
        finally:
            self._noted = None

    def news(self) -> str | None:
        """See `Backend.news`."""
        told = self.backend.news()
        return f"judge {self.name}: {told}" if told else None

    def sleep(self) -> None:
        """See `Backend.sleep`."""
        self.backend.sleep()

    def close(self) -> None:
        """See `Backend.close`."""
        self.backend.close()

    @property
    def _expected(self) -> bool:
        return self.spec.mode == "pointwise" and self.spec.grade == "expected"

    def _probe(self, group: Group) -> Question:
        """A question whose answer everybody knows."""
        texts = ("4", "5")[: 2 if self.spec.mode == "pairwise" else 1]
        return Question(_PROBE, _PROBE.prompt_id, texts, group)

    def _grade(self, items: Items) -> list[Score]:
        asked = [
            (Question(prompt, prompt.prompt_id, (completion.text,), group), index)
            for index, (prompt, completion) in enumerate(items)
            for group in self._groups(prompt)
        ]
        answers = self._ask([question for question, _ in asked])
        found: dict[tuple[int, str], Graded | NoVerdict] = {}
        for question, index in asked:
            group = {d: self.rubrics[d] for d in question.group}
            for dimension, verdict in grades(answers[question], group, self._expected).items():
                found[index, dimension] = verdict
        scores = []
        for index, (prompt, completion) in enumerate(items):
            at = (completion.prompt_id, completion.sample, self.name)
            for dimension in self.dimensions:
                verdict = found.get((index, dimension)) or self._lacking(prompt, dimension)
                if isinstance(verdict, NoVerdict):
                    reason = flagged(str(verdict), [completion.text])
                    scores.append(Score.abstain(*at, dimension, str(reason)))
                    continue
                reason = flagged(verdict.reason[:_REASON_CHARACTERS], [completion.text])
                scores.append(self._scored(*at, dimension, verdict.value, reason))
        return scores

    def _compare(self, items: Items) -> list[Score]:
        by_prompt: dict[str, list[int]] = defaultdict(list)
        for index, (prompt, _) in enumerate(items):
            by_prompt[prompt.prompt_id].append(index)
        asked = [
            Question(items[a][0], items[a][0].prompt_id, (items[a][1].text, items[b][1].text), g)
            for indices in by_prompt.values()
            for a, b in permutations(indices, 2)
            # Two equal answers tie; nobody needs to be asked.
            if items[a][1].text != items[b][1].text
            for g in self._groups(items[a][0])
        ]
        answers = self._ask(asked)
        won: dict[Shown, Compared | NoVerdict] = {}
        for question, answer in answers.items():
            for dimension, verdict in winners(answer, question.group).items():
                won[question.prompt_id, question.texts, dimension] = verdict
        if self._noted is not None:
            self._noted += comparisons([completion for _, completion in items], won)
        scores = []
        for index, (prompt, completion) in enumerate(items):
            others = [items[other][1] for other in by_prompt[prompt.prompt_id] if other != index]
            scores += [self._ranked(prompt, completion, others, d, won) for d in self.dimensions]
        return scores

    def _ranked(
        self,
        prompt: Prompt,
        completion: Completion,
        others: Sequence[Completion],
        dimension: str,
        won: Won,
    ) -> Score:
        """The win rate of one completion over the others of its prompt."""
        at = (completion.prompt_id, completion.sample, self.name, dimension)
        if lacking := questions.lacking(prompt, self.rubrics[dimension]):
            return Score.abstain(*at, lacking)
        if not others:
            return Score.abstain(*at, "there is no other answer to this prompt to compare with")
        tally = _Tally()
        for other in others:
            _count(tally, prompt.prompt_id, completion.text, other.text, dimension, won)
        if 2 * tally.answered < len(others):
            why, _ = tally.missing.most_common(1)[0]
            said = f"only {tally.answered} of {len(others)} comparisons have a verdict: {why}"
            return Score.abstain(*at, str(flagged(said, [completion.text])))
        said = (
            f"{tally.wins} won, {tally.ties} tied ({tally.flips} by changing with the order), "
            f"{tally.losses} lost of {len(others)}"
        )
        reason = flagged(said, [completion.text])
        return self._scored(*at, tally.points / tally.answered, reason)

    def _scored(
        self,
        prompt_id: str,
        sample: int,
        judge: str,
        dimension: str,
        value: float,
        reason: str | None,
    ) -> Score:
        return Score(prompt_id, sample, judge, dimension, value, (value,), 0.0, False, reason)

    def _ask(self, asked: Sequence[Question]) -> dict[Question, Answer]:
        """The answer to every question; equal ones are asked once."""
        unique = list(dict.fromkeys(asked))
        answers = self.backend.ask([self._call(question) for question in unique])
        return dict(zip(unique, answers, strict=True))

    def _call(self, question: Question) -> Call:
        group = {dimension: self.rubrics[dimension] for dimension in question.group}
        longest = self.spec.max_tokens * len(group)
        best_first = self.spec.scale_order == "descending"
        if self.spec.mode == "pairwise":
            first, second = question.texts
            messages = questions.comparing(
                question.prompt, first, second, group, self._fence, best_first
            )
            schema = questions.comparing_schema(group)
            return Call(messages, schema, longest, nonce=self._fence.nonce)
        (text,) = question.texts
        messages = questions.grading(question.prompt, text, group, self._fence, best_first)
        # Providers differ in how many they give; five are given by all.
        most = max(5, *(len(rubric.grades) for rubric in group.values()))
        alternatives = most if self._expected else 0
        schema = questions.grading_schema(group)
        return Call(messages, schema, longest, alternatives, self._fence.nonce)

    def _read(self, group: Group, answer: Answer) -> Mapping[str, Graded | Compared | NoVerdict]:
        if self.spec.mode == "pairwise":
            return winners(answer, group)
        return grades(answer, {d: self.rubrics[d] for d in group}, self._expected)

    def _groups(self, prompt: Prompt) -> list[Group]:
        """What to ask about an answer to this prompt: dimensions whose rubrics can be applied."""
        able = {d for d, r in self.rubrics.items() if questions.lacking(prompt, r) is None}
        groups = [tuple(d for d in group if d in able) for group in asked_together(self.spec)]
        return [group for group in groups if group]

    def _lacking(self, prompt: Prompt, dimension: str) -> NoVerdict:
        reason = questions.lacking(prompt, self.rubrics[dimension])
        assert reason is not None, dimension
        return NoVerdict(reason)

    def _remember(self, path: Path) -> None:
        now = {
            "rubrics": {d: r.sha256 for d, r in self.rubrics.items()},
            "backend": dict(self.backend.identity),
        }
        if not path.exists():
            write_json(path, now)
            return
        before = read_json(path, "remove it to take the judge as it is now")
        if changed := sorted(d for d, s in now["rubrics"].items() if before["rubrics"].get(d) != s):
            raise InputError(
                f"judge {self.name}: the rubrics of {changed} are not those that this run began "
                "with, so its scores would not compare; put them back, or start a run of another "
                "name"
            )


def asked_together(spec: LlmSpec) -> tuple[Group, ...]:
    """The dimensions of each call about one answer or pair."""
    if spec.one_call == "all":
        return (tuple(spec.dimensions),)
    return tuple((dimension,) for dimension in spec.dimensions)


def calls(spec: LlmSpec, answers: int) -> int:
    """Calls for one prompt with that many different answers, further tries not counted.

    One an answer, or one for each order of every two, times the calls that the dimensions take.

    >>> reader = {"kind": "llm", "name": "r", "model": "m", "dimensions": ["correctness", "style"]}
    >>> [calls(LlmSpec(**reader, mode=mode), 8) for mode in ("pointwise", "pairwise")]
    [16, 112]
    """
    times = answers * (answers - 1) if spec.mode == "pairwise" else answers
    return times * len(asked_together(spec))


def load_rubrics(spec: LlmSpec, field: str) -> dict[str, Rubric]:
    """Dimension -> rubric. Raises InputError with all that is wrong, one a line."""
    found: dict[str, Rubric] = {}
    problems: list[str] = []
    for dimension in spec.dimensions:
        try:
            name = spec.rubrics.get(dimension, dimension)
            found[dimension] = load(name, f"{field}.rubrics.{dimension}")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return found


def _count(
    tally: _Tally,
    prompt_id: str,
    mine: str,
    theirs: str,
    dimension: str,
    won: Won,
) -> None:
    """Add one comparison: both orders must agree, else it is a tie."""
    if mine == theirs:
        tally.ties += 1
        tally.points += 0.5
        return
    ahead = won[prompt_id, (mine, theirs), dimension]
    behind = won[prompt_id, (theirs, mine), dimension]
    if isinstance(ahead, NoVerdict) or isinstance(behind, NoVerdict):
        tally.missing[str(ahead if isinstance(ahead, NoVerdict) else behind)] += 1
        return
    if (ahead.winner, behind.winner) == ("A", "B"):
        tally.wins += 1
        tally.points += 1
    elif (ahead.winner, behind.winner) == ("B", "A"):
        tally.losses += 1
    else:
        tally.ties += 1
        tally.points += 0.5
        tally.flips += (ahead.winner, behind.winner) != ("tie", "tie")
