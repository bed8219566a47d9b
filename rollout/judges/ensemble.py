"""Several judges that vote, as one: their mean or median, with votes and spread.

Votes count only where they could differ. A model asked the same at temperature 0 says the same, so
two members that ask one model in the same words are refused. Where too few members have a verdict,
or their votes lie too far apart, the ensemble abstains and says what each voted.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.config_judges import EnsembleSpec
from rlhf.errors import InputError
from rlhf.protocols import Judge, ModelJudge
from rlhf.types import SUSPICIOUS, Completion, Prompt, Score
from rollout.judges.cache import key_of
from rollout.judges.fence import flagged
from rollout.judges.llm import LlmJudge
from rollout.judges.reward_model import RewardModelJudge
from rollout.judges.verifier import Verifier

Items = Sequence[tuple[Prompt, Completion]]


class Ensemble:
    """Asks every member about every completion; one vote a member, in their order."""

    def __init__(self, spec: EnsembleSpec, members: Sequence[Judge]) -> None:
        self.spec = spec
        self.name = spec.name
        self.dimensions = tuple(spec.dimensions)
        self.members = tuple(members)
        self.needed = spec.quorum or len(members) // 2 + 1
        """Fewest votes that make a score."""
        self._combined = statistics.fmean if spec.combine == "mean" else statistics.median

    @classmethod
    def of(cls, spec: EnsembleSpec, field: str, members: Sequence[Judge]) -> Ensemble:
        """The ensemble of these members. Raises InputError where two are one vote."""
        first: dict[str, str] = {}
        for member in members:
            asks = key_of(_asks(member))
            if asks in first:
                raise InputError(
                    f"{field}.members: {first[asks]} and {member.name} ask the same in the same "
                    "words, which is one vote, not two; give one of them another model, a rubric "
                    "in other words (rubrics: a .yaml file), another scale_order or mode"
                )
            first[asks] = member.name
        return cls(spec, members)

    def score(self, items: Items) -> list[Score]:
        """One `Score` for every item and dimension, in that order."""
        found = [_by_place(member.score(items), items, member) for member in self.members]
        return [
            self._one(completion, dimension, [votes[index, dimension] for votes in found])
            for index, (_, completion) in enumerate(items)
            for dimension in self.dimensions
        ]

    def start(self, folder: Path | None) -> list[str]:
        """Start the members; what they say, and in what they differ. Raises InputError as they
        do."""
        told = [line for member in self._models for line in member.start(folder)]
        spec = self.spec
        return [
            *told,
            f"judge {self.name}: the {spec.combine} of {len(self.members)} votes "
            f"({', '.join(member.name for member in self.members)}) that differ in "
            f"{' and '.join(self._differences())}; at least {self.needed} votes, spread at "
            f"most {spec.max_spread:g}",
        ]

    def news(self) -> str | None:
        """What the members tell."""
        return "; ".join(told for m in self._models if (told := m.news())) or None

    def sleep(self) -> None:
        """All members."""
        for member in self._models:
            member.sleep()

    def close(self) -> None:
        """All members."""
        for member in self._models:
            member.close()

    @property
    def _models(self) -> list[ModelJudge]:
        return [member for member in self.members if isinstance(member, ModelJudge)]

    def _differences(self) -> list[str]:
        """In what not all members are alike."""
        asked = [_asks(member) for member in self.members]
        aspects = dict.fromkeys(name for one in asked for name in one)
        return [n for n in aspects if len({key_of(one.get(n)) for one in asked}) > 1]

    def _one(self, completion: Completion, dimension: str, said: Sequence[Score]) -> Score:
        at = (completion.prompt_id, completion.sample, self.name, dimension)
        votes = tuple(score.score for score in said if score.score is not None)
        told = ", ".join(
            f"{s.judge} {'abstains' if s.score is None else f'{s.score:.2f}'}" for s in said
        )
        texts = [completion.text] if any(map(_is_flagged, said)) else []
        if len(votes) < self.needed:
            why = next(s.reason for s in said if s.score is None)
            reason = f"{len(votes)} votes, {self.needed} needed ({told}): {why}"
            return Score.abstain(*at, str(flagged(reason, texts)))
        spread = statistics.stdev(votes) if len(votes) > 1 else 0.0
        if spread > self.spec.max_spread:
            limit = self.spec.max_spread
            reason = f"the votes lie too far apart ({told}): {spread:.2f}, at most {limit:g}"
            return Score.abstain(*at, str(flagged(reason, texts)))
        value = float(self._combined(votes))
        return Score(*at, value, votes, spread, False, flagged(told, texts))


def _asks(judge: Judge) -> Mapping[str, object]:
    """By aspect, what decides a judge's verdicts; two that agree in all of them are one vote."""
    if isinstance(judge, LlmJudge):
        spec = judge.spec
        return {
            "kind": spec.kind,
            "model": dict(judge.backend.identity),
            "wording": {d: rubric.sha256 for d, rubric in sorted(judge.rubrics.items())},
            "option order": spec.scale_order,
            "mode": spec.mode,
            "dimensions a call": spec.one_call,
        }
    if isinstance(judge, RewardModelJudge):
        return {"kind": judge.spec.kind, "model": [judge.spec.model, judge.weights]}
    if isinstance(judge, Verifier):
        name = getattr(judge.function, "__qualname__", repr(judge.function))
        return {"kind": "verifier", "function": f"{judge.function.__module__}:{name}"}
    return {"kind": "recorded", "verdicts": judge.name}


def _is_flagged(score: Score) -> bool:
    return (score.reason or "").startswith(f"{SUSPICIOUS} (")


def _by_place(scores: Sequence[Score], items: Items, judge: Judge) -> dict[tuple[int, str], Score]:
    """(item, dimension) -> a member's score, each checked to be about that very item."""
    places = [(index, d) for index in range(len(items)) for d in judge.dimensions]
    found = dict(zip(places, scores, strict=True))
    for (index, dimension), score in found.items():
        completion = items[index][1]
        wanted = (completion.prompt_id, completion.sample, dimension)
        assert (score.prompt_id, score.sample, score.dimension) == wanted, (judge.name, wanted)
    return found
