"""The judges of a run together: build them, ask them all, stop when too few answers count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import polars as pl

from rlhf.canaries import A_PROMPT, ASKINGS
from rlhf.config import RunConfig
from rlhf.config_judges import (
    EnsembleSpec,
    JudgeSpec,
    LlmSpec,
    RecordedSpec,
    RewardModelSpec,
    VerifierSpec,
)
from rlhf.errors import DataGateError, PairloopError
from rlhf.protocols import Judge
from rlhf.types import SUSPICIOUS, Completion, Prompt, Score
from rollout.judges.backends import Backend
from rollout.judges.cache import CachedBackend, VerdictCache, key_of, weights_of
from rollout.judges.ensemble import Ensemble
from rollout.judges.llm import LlmJudge, calls
from rollout.judges.recorded import RecordedJudge
from rollout.judges.verifier import Verifier

if TYPE_CHECKING:
    from rollout.judges.reward_engines import RewardEngine

_REASONS_SHOWN = 3


class Engines(Protocol):
    """Where the models of judges are held."""

    def language(self, spec: LlmSpec, field: str) -> Backend:
        """What answers for a language model of one's own. Raises InputError where it can't be
        had."""
        ...

    def reward(self, spec: RewardModelSpec, field: str) -> RewardEngine:
        """What computes a reward model's raw scores. Raises InputError where it can't be had."""
        ...


@dataclass(frozen=True, slots=True)
class InProcess:
    """In this process; `device` is auto, cpu or cuda."""

    device: str = "auto"

    def language(self, spec: LlmSpec, field: str) -> Backend:
        """See `Engines.language`."""
        from rollout.judges.backends.vllm import VllmBackend

        return VllmBackend(spec, field, self.device)

    def reward(self, spec: RewardModelSpec, field: str) -> RewardEngine:
        """See `Engines.reward`."""
        from rollout.judges.reward_engines import TransformersEngine, VllmEngine

        if spec.backend == "vllm":
            return VllmEngine(spec, field, self.device)
        return TransformersEngine(spec, self.device)


def build(
    specs: Sequence[JudgeSpec],
    field: str,
    engines: Engines | None = None,
    cache: VerdictCache | None = None,
) -> list[Judge]:
    """The judges of a configuration list (`field`: judges.panel or judges.audit), in its order.

    Their own models are in this process, unless `engines` holds them elsewhere; model judges ask
    `cache` first. No model is loaded and no endpoint asked yet. Raises InputError where a judge
    can't be had: its function, file, rubric, model or key.
    """
    builder = _Builder(engines or InProcess(), cache or VerdictCache())
    return [builder.build(spec, f"{field}[{index}]") for index, spec in enumerate(specs)]


class _Builder:
    """Builds judges over one cache."""

    def __init__(self, engines: Engines, cache: VerdictCache) -> None:
        self._engines = engines
        self._cache = cache
        self._held: dict[str, Backend] = {}

    def build(self, spec: JudgeSpec, field: str) -> Judge:
        """One judge."""
        if isinstance(spec, EnsembleSpec):
            members = [
                self.build(member, f"{field}.members[{index}]")
                for index, member in enumerate(spec.members)
            ]
            return Ensemble.of(spec, field, members)
        if isinstance(spec, VerifierSpec):
            return Verifier.of(spec, field)
        if isinstance(spec, RecordedSpec):
            return RecordedJudge.of(spec, field)
        if isinstance(spec, RewardModelSpec):
            from rollout.judges.reward_model import RewardModelJudge

            engine = self._engines.reward(spec, field)
            return RewardModelJudge.of(spec, field, engine, self._cache)
        backend, weights = self._backend(spec, field)
        return LlmJudge.of(spec, field, CachedBackend(backend, self._cache, spec.name, weights))

    def _backend(self, spec: LlmSpec, field: str) -> tuple[Backend, Callable[[], str | None]]:
        if spec.backend == "openai":
            from rollout.judges.backends.openai import OpenAiBackend

            # What a provider serves under a name can't be told apart; verdicts can be pruned.
            return OpenAiBackend(spec, field), lambda: "served by others"
        # Wordings of one model share its engine.
        held = engine_key(spec)
        if held not in self._held:
            self._held[held] = self._engines.language(spec, field)
        return self._held[held], lambda: weights_of(spec.model, spec.revision)


def engine_key(spec: LlmSpec) -> str:
    """What judges that share an engine have in common."""
    return key_of(spec.model, spec.revision, spec.engine.model_dump(mode="json"))


def beside(judge: Judge) -> bool:
    """Whether a judge's work is done elsewhere, so that this process need not wait for it."""
    from rollout.judges.reward_model import RewardModelJudge

    if isinstance(judge, Ensemble):
        return all(map(beside, judge.members))
    if isinstance(judge, LlmJudge):
        return judge.backend.beside
    return isinstance(judge, RewardModelJudge) and judge.beside


def planned_calls(
    config: RunConfig, train: int, gate: int, final: int, gold: Sequence[int] = ()
) -> list[str]:
    """What model judges will be asked at most, one line a judge, from the prompts of each split,
    and how many answers each prompt of the user's own canaries has.

    >>> planned_calls(config, train=100, gate=50, final=50)  # doctest: +SKIP
    ['judge reader: at most 2400 calls to org/judge: ...']
    """
    per_round = config.rounds.prompts_per_round or train
    k, held_out = config.rollout.samples_per_prompt, config.evaluation.samples_per_prompt
    greedy = min(gate, config.evaluation.greedy_prompts)
    rounds = config.rounds.count
    lines = []
    for judges, trains in ((config.judges.panel, True), (config.judges.audit, False)):
        for spec in _asking(judges):
            training = calls(spec, k) * min(per_round, train) if trains else 0
            evaluation = calls(spec, held_out) * gate + calls(spec, 1) * greedy
            claim = 2 * calls(spec, held_out) * final
            canaries = min(config.judges.canaries.answers // A_PROMPT, per_round, train)
            watching = ASKINGS * sum(calls(spec, n) for n in [*[A_PROMPT] * canaries, *gold])
            if not trains:
                watching += calls(spec, 2) * min(config.judges.audit_pairs, per_round, train)
            most = rounds * (training + watching) + (rounds + 1) * evaluation + claim
            limit = spec.traffic.max_calls if spec.backend == "openai" else None
            lines.append(
                f"judge {spec.name}: at most {most} calls to {spec.model} ({spec.mode}): "
                f"{training} for each of {rounds} rounds and {watching} to watch the judges there, "
                f"{evaluation} for each of {rounds + 1} evaluations, {claim} for the final split"
                + (f"; budget {limit}, which may not do" if limit and limit < most else "")
            )
    return lines


def _asking(specs: Sequence[JudgeSpec]) -> Iterator[LlmSpec]:
    """Those that make calls, members of ensembles among them."""
    for spec in specs:
        if isinstance(spec, EnsembleSpec):
            yield from _asking(spec.members)
        elif isinstance(spec, LlmSpec):
            yield spec


def telling(parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Scores that come in parts (schema `SCORES`), as `suspicious` and `check_abstentions` read
    them: without votes, and without the words beside an ordinary score, which take most room."""
    ordinary = ~pl.col("abstained") & ~pl.col("reason").str.starts_with(f"{SUSPICIOUS} (")
    words = pl.when(ordinary).then(pl.lit("")).otherwise("reason").alias("reason")
    return pl.concat(part.select(pl.exclude("votes", "reason"), words) for part in parts)


def suspicious(scores: pl.DataFrame) -> list[str]:
    """One line a judge that was shown completions with signs of an attempt on it.

    `scores` has schema `SCORES`.
    """
    flagged = (
        scores.filter(pl.col("reason").str.starts_with(f"{SUSPICIOUS} ("))
        .group_by("judge")
        .agg(
            pl.struct("prompt_id", "sample").n_unique().alias("completions"),
            pl.col("reason").str.extract(r"^\w+ \((.*?)\): ").alias("signs"),
        )
        .sort("judge")
    )
    return [
        f"judge {row['judge']}: {row['completions']} suspicious completions "
        f"({'; '.join(sorted(set(row['signs'])))}), scored as they stand"
        for row in flagged.iter_rows(named=True)
    ]


def score_all(judges: Sequence[Judge], items: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
    """Every judge's scores, ordered by judge, then item, then dimension; see `checked`."""
    return checked(judges, items, (judge.score(items) for judge in judges))


def checked(
    judges: Sequence[Judge],
    items: Sequence[tuple[Prompt, Completion]],
    answers: Iterable[Sequence[Score]],
) -> list[Score]:
    """The answers of all judges, one below the other.

    Scores are never matched to completions by position alone: a judge whose answer does not name
    exactly the items and dimensions it was asked for, in that order, raises PairloopError.
    """
    for prompt, completion in items:
        assert prompt.prompt_id == completion.prompt_id, (prompt.prompt_id, completion.prompt_id)
    scores: list[Score] = []
    for judge, found in zip(judges, answers, strict=True):
        _check_answer(judge, items, found)
        scores.extend(found)
    return scores


def _check_answer(
    judge: Judge, items: Sequence[tuple[Prompt, Completion]], found: Sequence[Score]
) -> None:
    asked = [(c.prompt_id, c.sample, d) for _, c in items for d in judge.dimensions]
    if len(found) != len(asked):
        raise PairloopError(
            f"judge {judge.name!r} must return one score for each of {len(items)} completions and "
            f"{len(judge.dimensions)} dimensions ({len(asked)} in all), got {len(found)}"
        )
    for wanted, score in zip(asked, found, strict=True):
        got = (score.prompt_id, score.sample, score.dimension)
        if got != wanted or score.judge != judge.name:
            raise PairloopError(
                f"judge {judge.name!r} was asked for prompt {wanted[0]!r}, sample {wanted[1]}, "
                f"dimension {wanted[2]!r}, but scored prompt {got[0]!r}, sample {got[1]}, "
                f"dimension {got[2]!r} as {score.judge!r}"
            )
        if not _well_formed(score):
            raise PairloopError(
                f"judge {judge.name!r} must give a score in [0, 1] or abstain with a reason, got "
                f"{score}"
            )


def _well_formed(score: Score) -> bool:
    if score.abstained:
        return score.score is None and bool(score.reason)
    return score.score is not None and math.isfinite(score.score) and 0 <= score.score <= 1


def check_abstentions(scores: pl.DataFrame, limit: float) -> None:
    """Stop where a judge leaves out too many scores of a dimension.

    `scores` has schema `SCORES`; `limit` is the largest share of abstentions, in [0, 1], that a
    judge may have in a dimension: another that scores the same one hides none of its. Raises
    DataGateError with every dimension above it and its commonest reasons.
    """
    shares = (
        scores.group_by("dimension", "judge")
        .agg(
            pl.col("abstained").mean().alias("share"),
            pl.col("abstained").sum().alias("missing"),
            pl.len().alias("asked"),
        )
        .filter(pl.col("share") > limit)
        .sort("dimension", "judge")
    )
    if shares.is_empty():
        return
    lines = [
        f"  {row['dimension']}: {row['share']:.1%} ({row['missing']} of {row['asked']}) of "
        f"{row['judge']}; " + _common_reasons(scores.filter(judge=row["judge"]), row["dimension"])
        for row in shares.iter_rows(named=True)
    ]
    raise DataGateError(
        f"judges.max_abstention allows {limit:.1%} missing scores in a dimension; above it are\n"
        + "\n".join(lines)
        + "\nCorrect the judge, or the prompts that it can't judge; raise judges.max_abstention "
        "only if completions without a score may be left out."
    )


def _common_reasons(scores: pl.DataFrame, dimension: str) -> str:
    counted = (
        scores.filter((pl.col("dimension") == dimension) & pl.col("abstained"))
        .group_by("judge", "reason")
        .len()
        .sort(["len", "judge", "reason"], descending=[True, False, False])
    )
    shown = [
        f"{row['len']} x {row['judge']}: {row['reason']}"
        for row in counted.head(_REASONS_SHOWN).iter_rows(named=True)
    ]
    more = counted.height - len(shown)
    return "; ".join(shown) + (f"; and {more} other reasons" if more > 0 else "")
