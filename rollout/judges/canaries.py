"""Canaries in the hands of judges: the user's own read from a file, and every judge asked anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import polars as pl

from rlhf.canaries import SAID, GoldAnswer, Items, WatchedJudge
from rlhf.certificates import Standing, retest_sd
from rlhf.config import RunConfig
from rlhf.config_rollout import PromptSource
from rlhf.errors import InputError
from rlhf.protocols import Judge
from rlhf.types import Completion, Prompt
from rollout.judges.cache import VerdictCache
from rollout.judges.ensemble import Ensemble
from rollout.judges.llm import LlmJudge
from rollout.judges.panel import score_all
from rollout.judges.recorded import RecordedJudge
from rollout.judges.verifier import Verifier
from rollout.prompt_sources import read_pool

_FIELD = "judges.canaries.gold"


def read_gold(config: RunConfig) -> tuple[GoldAnswer, ...]:
    """The user's canaries, in the file's order; none where the config names no file.

    Raises InputError with every line that can't be used (the first ten are shown).
    """
    path = config.judges.canaries.gold
    if path is None:
        return ()
    source = PromptSource(path=path)
    prompts = config.prompts.model_copy(update={"train": source})
    try:
        read = read_pool(prompts, "train")
    except InputError as error:
        raise InputError(str(error).replace("prompts.train", _FIELD)) from None
    found: list[GoldAnswer] = []
    problems: list[str] = []
    for prompt in read:
        try:
            found += _answers(prompt, config.judges.dimensions)
        except InputError as problem:
            problems.append(f"  {prompt.prompt_id}: {problem}")
    twice = sorted({p.prompt_id for p in read if sum(q.prompt_id == p.prompt_id for q in read) > 1})
    problems += [f"  {name}: must stand on one line, with all its answers" for name in twice]
    if problems:
        raise InputError(f"{_FIELD}: {path} has prompts that can't be used\n" + "\n".join(problems))
    return tuple(found)


def _answers(prompt: Prompt, dimensions: Sequence[str]) -> Iterator[GoldAnswer]:
    given = prompt.metadata.get("answers")
    if not isinstance(given, list) or len(given) < 2:
        raise InputError("answers must be a list of two or more, so that gold orders them")
    metadata = {k: v for k, v in prompt.metadata.items() if k != "answers"}
    for sample, answer in enumerate(given):
        text = answer.get("text") if isinstance(answer, Mapping) else None
        gold = answer.get("gold") if isinstance(answer, Mapping) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"answers[{sample}].text must be text, got {text!r}")
        if not isinstance(gold, Mapping) or not gold:
            raise InputError(f"answers[{sample}].gold must be {{dimension: number}}, got {gold!r}")
        if unknown := sorted(set(gold) - set(dimensions)):
            raise InputError(
                f"answers[{sample}].gold names {unknown}, which no judge in judges.panel scores; "
                f"scored are {list(dimensions)}"
            )
        for dimension, value in gold.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(
                    f"answers[{sample}].gold.{dimension} must be a number, got {value!r}"
                )
        completion = Completion(prompt.prompt_id, sample, text, (), (), (), "stop", 0)
        yield GoldAnswer(replace(prompt, metadata=metadata), completion, gold)


def watched(
    config: RunConfig, panel: Sequence[Judge], audit: Sequence[Judge], standings: Sequence[Standing]
) -> list[WatchedJudge]:
    """Who is watched: every judge on each of its dimensions, and members of ensembles that compare
    answers, whose order is their own. `standings` are those of the panel's judges."""
    stand = {(s.judge, s.dimension): s for s in standings}
    found = []
    for judges, trains in ((panel, True), (audit, False)):
        for judge in judges:
            # The noise of a judge that is asked several times is in its votes.
            once = judge.votes == 1 if isinstance(judge, RecordedJudge) else True
            for dimension in judge.dimensions:
                standing = stand.get((judge.name, dimension))
                watch = WatchedJudge(
                    judge.name,
                    dimension,
                    fixed=isinstance(judge, Verifier | RecordedJudge),
                    trains=trains and dimension in config.needed,
                    certified=None if standing is None else standing.granted,
                    certified_sd=retest_sd(standing) if standing is not None and once else None,
                )
                found.append(watch)
                found += [replace(watch, judge=m.name) for m in _comparing(judge) if m is not judge]
    return found


def ask_anew(judges: Sequence[Judge], items: Items, cache: VerdictCache) -> pl.DataFrame:
    """Every judge's word on items, whatever the cache remembers; schema `SAID`."""
    comparing = [member for judge in judges for member in _comparing(judge)]
    with cache.unread(), ExitStack() as stack:
        noted = [(judge.name, stack.enter_context(judge.noting())) for judge in comparing]
        scores = score_all(judges, items)
    rows: list[tuple[str | int | float | None, ...]] = [
        (s.prompt_id, s.sample, None, None, s.judge, s.dimension, s.score, s.reason) for s in scores
    ]
    rows += [
        (c.prompt_id, c.sample, c.other, order, name, c.dimension, value, None)
        for name, compared in noted
        for c in compared
        for order, value in (("ab", c.ab), ("ba", c.ba))
    ]
    return pl.DataFrame(rows, schema=SAID, orient="row")


def _comparing(judge: Judge) -> list[LlmJudge]:
    """Those behind a judge that compare answers with each other."""
    members = judge.members if isinstance(judge, Ensemble) else (judge,)
    return [m for m in members if isinstance(m, LlmJudge) and m.spec.mode == "pairwise"]
