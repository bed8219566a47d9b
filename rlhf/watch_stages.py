"""The loop's watch over its judges: canaries before scores are trusted, an audit of what was
selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from rlhf.blind_sheet import write_sheet
from rlhf.blind_sheet.sheet import KEY
from rlhf.canaries import ASKINGS, SAID, VERDICTS, Items, draw_answers, items_sha256
from rlhf.drift import Bootstrap, Limits, examine
from rlhf.errors import DataGateError, InputError
from rlhf.pair_audit import SHEETS, audited, check_audit, draw_pairs, said, sheet_of
from rlhf.rounds import Round
from rlhf.selection_shards import Answered
from rlhf.stage_base import StageBase, title, unreachable
from rlhf.types import Prompt, completions_of

_GOLD = pl.Schema(
    {
        "prompt_id": pl.String(),
        "sample": pl.Int32(),
        "dimension": pl.String(),
        "gold": pl.Float64(),
    }
)


class WatchStages(StageBase):
    """Stages that measure judges; nothing of what they store reaches a pair's scores."""

    def watch_judges(self, round: Round) -> None:
        """Ask every judge anew about the same answers as in the first round, whose answers are
        drawn for that.

        Raises DataGateError where a judge that trains has drifted, InputError where the user's
        canaries are not those that the run began with.
        """
        settings = self.config.judges.canaries
        if settings.answers == 0 and settings.gold is None:
            return
        if round.done("canaries") and round.stored("canaries")["stops"]:
            # Once the judge is put back, the same command asks it again.
            round.drop("canaries/verdicts")
            round.drop("canaries")
        sets = {"start": self._start_canaries(), "gold": self._gold_canaries()}

        def ask(asking: int) -> pl.DataFrame:
            told = pl.concat(self._ask(name, items, asking) for name, items in sets.items())
            return told.select(pl.col(name).cast(dtype) for name, dtype in VERDICTS.items())

        with self.timed(round, "canaries") as note:
            check = self.parts.interrupts.check
            verdicts = round.shards("canaries/verdicts", ASKINGS, ask, check)
            found = round.record("canaries", lambda: self._examined(round, sets, verdicts))
            note.update(_numbers(found))
        for warning in found["warnings"]:
            self.parts.reporter.say(f"{title(round)} warning: {warning}")
        if found["stops"]:
            lines = "\n".join(f"  {text}" for text in found["stops"])
            raise DataGateError(
                f"{title(round)}: judges no longer score as they did, so nothing was trained on "
                f"this round:\n{lines}\nPut the judge back as it was (model, revision, rubric, "
                "endpoint, code) and run the same command, which asks again; or start a new run "
                "with it as it is, calibrated anew. judges.canaries says what is asked, "
                f"{round.path / 'canaries.json'} what was found"
            )

    def audit(
        self,
        round: Round,
        prompts: Sequence[Prompt],
        answered: Answered,
        pairs: pl.DataFrame,
    ) -> None:
        """Draw some of the round's pairs and ask the audit judges which answers they prefer.

        Raises DataGateError where they prefer the rejected ones and `selection.on_inversion` is
        `error`.
        """
        count, index = self.config.judges.audit_pairs, round.index
        assert index is not None
        if count == 0:
            return
        seed, resamples = self.rules.draw_seed(index), self.config.evaluation.bootstrap
        with self.timed(round, "audit"):
            drawn = round.table("audit/pairs", lambda: draw_pairs(pairs, count, seed))
            judged = [(j.name, d) for j in self.config.judges.audit for d in j.dimensions]
            scores = round.table(
                "audit/scores",
                lambda: self.parts.watch.audit(self._answers_of(drawn, prompts, answered)),
            )
            found = round.record("audit", lambda: audited(drawn, scores, judged, resamples))
            self._offer_sheet(index, drawn, prompts)
        if judged:
            self.parts.reporter.say(f"{title(round)} {said(found)}")
        if warning := check_audit(found, self.config.selection.on_inversion):
            self.parts.reporter.say(f"{title(round)} warning: {warning}")

    def _offer_sheet(self, index: int, pairs: pl.DataFrame, prompts: Sequence[Prompt]) -> None:
        """A blind sheet of the drawn pairs, outside the round's folder: people write in it."""
        folder = self.store.folder / SHEETS / f"{index:04d}"
        if not pairs.is_empty() and not (folder / KEY).exists():
            about = self.parts.prompt_table(prompts)
            sheet = sheet_of(pairs, about, self.config.run.seed)
            write_sheet(folder, sheet, f"{self.config.run.name}, round {index}")

    def retest_sd(self, round: Round) -> tuple[dict[str, float], dict[str, float]]:
        """Dimension -> standard deviation of a score that is asked for again: as certificates have
        it, and as this round's canaries showed it."""
        training = [j for j in self.parts.watch.judges if j.trains and not j.fixed]
        certified = {j.dimension: j.certified_sd for j in training if j.certified_sd is not None}
        found = round.stored("canaries")["judges"] if round.done("canaries") else []
        names = {(j.judge, j.dimension) for j in training}
        asked = {
            entry["dimension"]: entry["figures"]["retest_sd"]["value"]
            for entry in found
            if (entry["judge"], entry["dimension"]) in names and "retest_sd" in entry["figures"]
        }
        return certified, asked

    def _start_canaries(self) -> Items:
        """Of round 1's answers, whichever round asks."""
        count, first, seed = (
            self.config.judges.canaries.answers,
            self.store.round(1),
            self.config.run.seed,
        )
        prompts = self.parts.sample(1)

        def draw() -> pl.DataFrame:
            completions = self.generate(first, self.draw("completions", prompts, 0))
            return draw_answers(completions, count, seed)

        known = {p.prompt_id: p for p in prompts}
        drawn = first.table("canaries/items", draw)
        return [(known[c.prompt_id], c) for c in completions_of(drawn)]

    def _gold_canaries(self) -> Items:
        return [(canary.prompt, canary.completion) for canary in self.parts.watch.gold]

    def _ask(self, name: str, items: Items, asking: int) -> pl.DataFrame:
        told = self.parts.watch.ask(items) if items else pl.DataFrame(schema=SAID)
        clusters = {prompt.prompt_id: prompt.cluster for prompt, _ in items}
        cluster = told["prompt_id"].replace_strict(clusters, return_dtype=pl.String)
        return told.with_columns(cluster.alias("cluster"), set=pl.lit(name), asking=pl.lit(asking))

    def _examined(
        self, round: Round, sets: Mapping[str, Items], verdicts: pl.DataFrame
    ) -> dict[str, Any]:
        first = self.store.round(1)
        before = None
        gold = {(g.prompt.prompt_id, g.completion.sample): g.gold for g in self.parts.watch.gold}
        sha256 = items_sha256(
            (name, prompt, answer, gold.get((answer.prompt_id, answer.sample), {}))
            for name, items in sets.items()
            for prompt, answer in items
        )
        if round is not first:
            before = first.shards("canaries/verdicts", ASKINGS, unreachable)
            if first.stored("canaries")["items_sha256"] != sha256:
                raise InputError(
                    f"judges.canaries.gold: {self.config.judges.canaries.gold} must stay as it was "
                    "when the run began, so that rounds compare, and it changed; put it back, or "
                    "start a run of another name"
                )
        rows = [(*at, d, value) for at, labels in gold.items() for d, value in labels.items()]
        order = pl.DataFrame(rows, schema=_GOLD, orient="row")
        limits, evaluation = Limits.of(self.config), self.config.evaluation
        draw = Bootstrap(evaluation.bootstrap, self.config.run.seed)
        found = examine(verdicts, before, order, self.parts.watch.judges, limits, draw)
        if not sets["start"] and self.config.judges.canaries.answers:
            found["warnings"].append(
                "no prompt of the first round has two different answers to ask judges about again"
            )
        return {
            "baseline": None if before is None else first.index,
            "answers": {name: len(items) for name, items in sets.items()},
            "askings": ASKINGS,
            "items_sha256": sha256,
            "limits": asdict(limits),
            **found,
        }

    def _answers_of(
        self, pairs: pl.DataFrame, prompts: Sequence[Prompt], answered: Answered
    ) -> Items:
        """Both answers of every pair, each once, with their prompts."""
        known = {p.prompt_id: p for p in prompts}
        keys = pl.concat(
            pairs.select("prompt_id", sample=f"{role}_sample") for role in ("chosen", "rejected")
        )
        answers = answered.completions(keys.unique())
        rows = completions_of(answers.sort("prompt_id", "sample"))
        return [(known[c.prompt_id], c) for c in rows]


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """What canaries found, for the log."""
    return {
        f"{entry['judge']} {entry['dimension']} {name}": values["value"]
        for entry in found["judges"]
        for name, values in (*entry["figures"].items(), *entry["drift"].items())
    }
