"""The loop's stages: each is done once, timed, and stored by the round it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from rlhf.errors import DataGateError
from rlhf.evaluation import compare, per_prompt, summarise
from rlhf.examples import weights_advice
from rlhf.gates import LIMITS, decide, judge_gates, limit_gates
from rlhf.labels import select_labels
from rlhf.policy_drift import divergence, sampled, spread
from rlhf.protocols import Sampling
from rlhf.round_data import RoundData, reference_logps
from rlhf.rounds import Round
from rlhf.selection import check_cold_start, cold_start
from rlhf.selection_shards import Answered, fresh, in_turn, shards_of
from rlhf.stage_base import title, unreachable
from rlhf.summary import model_card, write_summary
from rlhf.tracking import answer_rows, pair_rows
from rlhf.types import Prompt, completions_of
from rlhf.watch_stages import WatchStages
from rlhf.yield_analysis import Draw, analyse, check_inversion, said


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    state: Literal["done", "stopped_early", "failed"]
    reason: str
    best_round: int | None
    promoted: tuple[int, ...]


class Stages(WatchStages):
    """The loop's stages, each done once and timed."""

    def sample(self, round: Round, prompts: Sequence[Prompt]) -> Answered:
        """A round's completions and the panel's scores of them, from the version before it: files,
        since they may be more than this process should hold.

        Answers of a version that lies further back than `rounds.max_staleness` allows are left out.
        No stage of this one draws any: whoever changes that is seen here.

        Raises DataGateError on too many abstentions, and where every answer is too old.
        """
        assert round.index is not None
        before = round.index - 1
        self.trusted(round, self.draw("completions", prompts, before))
        kept, stale = fresh(shards_of(round.path), before - self.config.rounds.max_staleness)
        if stale:
            self.parts.reporter.say(f"{title(round)}: {stale} completions are too old and left out")
        if not kept:
            raise DataGateError(
                f"{title(round)}: every completion is older than rounds.max_staleness"
            )
        return Answered(kept)

    @contextmanager
    def ahead(self, index: int) -> Iterator[None]:
        """Within it generators begin with round `index`, where its answers may be of a policy that
        lies a round behind."""
        last, trained = self.config.rounds.count, self.store.round(index - 1).done("policy")
        if not self.config.rounds.max_staleness or index > last or trained:
            yield
            return
        round, prompts = self.store.round(index), self.parts.sample(index)
        self.keep(round, prompts)
        self.watch_judges(round)
        with self.drawing_ahead(round, self.draw("completions", prompts, index - 2)):
            yield

    def check_cold_start(self, round: Round, answered: Answered) -> None:
        """Raises DataGateError where the start has too little to learn from."""
        found = round.record("cold_start", lambda: cold_start(answered, self.rules))
        check_cold_start(found, self.config.selection.cold_start)

    def select(self, round: Round, answered: Answered) -> pl.DataFrame:
        """Pairs and the funnel that explains every loss.

        Raises DataGateError if there is no pair, or chosen answers are worse on a dimension and
        `selection.on_inversion` is `error`.
        """
        index = round.index
        assert index is not None
        certified, asked = self.retest_sd(round)
        rules = replace(self.rules, certified_sd=certified, canary_sd=asked)

        @cache
        def selected() -> Any:
            return in_turn(answered.shards, rules, index)

        def analysed() -> dict[str, Any]:
            draw = Draw(index, self.config.evaluation.bootstrap)
            return analyse(answered, pairs, rules, draw)

        with self.timed(round, "pairs") as note:
            funnel = round.record("funnel", lambda: selected().funnel)
            pairs = round.table("pairs", lambda: selected().pairs)
            analysis = round.record("selection", analysed)
            note["pairs"] = pairs.height
        kept = funnel["yield"]
        self.parts.reporter.say(
            f"{title(round)} pairs: {pairs.height} of {analysis['prompts']} prompts "
            f"(best and worst, then filter, would keep {kept['best_and_worst_then_filter']} of "
            f"{kept['largest_admissible']})"
        )
        for line in said(funnel, analysis):
            self.parts.reporter.say(f"{title(round)} {line}")
        if pairs.is_empty() and not self.trains_on_labels:
            lost = max(funnel["steps"], key=lambda s: s["lost_prompts"])
            raise DataGateError(
                f"{title(round)}: no pair is left of {analysis['prompts']} prompts; most fell at "
                f"{lost['step']} ({lost['lost_prompts']} prompts: {lost['why']}). "
                f"The whole funnel is in {round.path / 'funnel.json'}"
            )
        if warning := check_inversion(analysis, self.config.selection.on_inversion):
            self.parts.reporter.say(f"{title(round)} warning: {warning}")
        if not pairs.is_empty():
            self.parts.trackers.table(
                index, "pairs", lambda: pair_rows(pairs, self.config.tracking.samples)
            )
        return pairs

    @property
    def trains_on_labels(self) -> bool:
        """Whether the objective wants single good and bad answers; pairs then only inform."""
        return self.config.objective.needs.data == "labels"

    def label(self, round: Round, answered: Answered) -> pl.DataFrame:
        """Single answers that are good or bad, and their funnel.

        Raises DataGateError unless there are answers of both kinds: of one kind alone, the policy
        would learn to say everything, or nothing.
        """

        @cache
        def selected() -> Any:
            return select_labels(answered, self.rules)

        with self.timed(round, "labels") as note:
            funnel = round.record("labels_funnel", lambda: selected().funnel)
            labels = round.table("labels", lambda: selected().pairs)
            note["labels"] = labels.height
        good = int(labels["good"].sum())
        bad = labels.height - good
        self.parts.reporter.say(f"{title(round)} labels: {good} good and {bad} bad answers")
        for kind, count in (("good", good), ("bad", bad)):
            if not count:
                steps = [f"{step['answers']} after {step['step']}" for step in funnel[kind]]
                raise DataGateError(
                    f"{title(round)}: no {kind} answer is left ({', '.join(steps)}), and "
                    f"{self.config.objective.name} needs both kinds"
                )
        if advice := weights_advice(self.config.objective, good, bad):
            self.parts.reporter.say(f"{title(round)} {advice}")
        return labels

    def train(self, round: Round, data: pl.DataFrame) -> None:
        """Policy `round.index` from the one before, trained on pairs or labels, by way of cached
        reference log-probs where the objective has a reference."""
        index = round.index
        assert index is not None
        learner, before = self.parts.learner, self.policy(index - 1)
        if round.done("policy"):
            round.folder("policy", unreachable)
            round.drop("trainer")
            return
        self.parts.serving.sleep()
        learner.restore(before)
        taken, check = RoundData(data, self.config, index), self.parts.interrupts.check
        reference = None
        if self.config.objective.needs.reference:
            with self.timed(round, "reference_logps"):
                reference = reference_logps(round, taken, learner, check)
        planned = taken.planned
        logged = False

        def on_step(step: int, values: Mapping[str, float]) -> None:
            nonlocal logged
            if not logged:
                self.metrics.rewind(index, "train", after_step=step - 1)
                logged = True
            measured = "validation_loss" in values
            if measured or step % self.config.tracking.log_steps == 0 or step == planned:
                self.metrics.log(index, "train", step, values)
            advance(step)

        def compute(folder: Path) -> None:
            trained = learner.train(
                data,
                reference,
                index,
                round.scratch("trainer"),
                on_step,
                check,
            )
            note.update(asdict(trained))
            learner.save(folder, model_card(self.config, index, data))

        with (
            self.timed(round, "training", "policy") as note,
            self.parts.reporter.progress(f"{title(round)} train", planned) as advance,
        ):
            round.folder("policy", compute)
            round.drop("trainer")
        self.parts.serving.wake()

    def evaluate(self, round: Round, version: int, before: int | None = None) -> None:
        """Held-out scores of `version` on the gate split, and how far it has drifted; `before` is
        the version that it was trained from, by default the one before it."""
        self._score_held_out(round, "evaluation", self.parts.gate, version)
        self._keep_greedy(round, version)
        if not round.done("drift"):
            prompts = spread(self.parts.gate, self.config.evaluation.kl_prompts)
            fresh = Sampling(1, 1.0, 1.0, self.config.rollout.max_new_tokens, self.config.run.seed)
            drawn = self.generate(round, self.draw("evaluation/fresh", prompts, version, fresh))
            with self.timed(round, "drift"):
                round.record("drift", lambda: self._drift(drawn.table(), version, before))
        found = round.record("evaluation", lambda: self._evaluation(round, version))
        values = {name: score["value"] for name, score in found["scores"].items()}
        drift = round.stored("drift")
        measured = [limit.measured for limit in LIMITS.values() if limit.measured in drift]
        values |= {f"drift.{name}": drift[name]["value"] for name in measured}
        self.metrics.settle(version, "held_out", values)

    def gate(self, round: Round, best: int) -> dict[str, Any]:
        """Whether this round is promoted, judged against the best so far."""

        def compute() -> dict[str, Any]:
            change = compare(self._table(round), self._table(self.store.round(best)), *self._draws)
            gates = judge_gates(change, self.config.gates, self.config.gated)
            gates += limit_gates(round.stored("drift"), self.config.gates)
            verdict = decide(gates, self.config.gates.on_inconclusive)
            return {**asdict(verdict), "against": best}

        return round.record("gates", compute)

    def best(self, among: Sequence[int]) -> int:
        """The round with the highest gate reward; the earliest of equals."""
        return max(among, key=lambda i: (self._reward(i), -i))

    def stop(self, round: Round, promoted: Sequence[int], reason: str) -> Outcome:
        """A gate ended the run at `round`."""
        assert round.index is not None
        # What was drawn ahead of it is for nobody.
        ahead = round.index + 1
        self.forget_ahead(ahead, "completions")
        self.store.drop(ahead)
        self.metrics.rewind(ahead, "canaries")
        if not promoted:
            return Outcome("failed", f"no round could be promoted; {reason}", None, ())
        return Outcome("stopped_early", reason, self.best(promoted), tuple(promoted))

    def finish(self, promoted: Sequence[int]) -> Outcome:
        """All rounds ran."""
        return Outcome(
            "done",
            f"all {self.config.rounds.count} rounds ran",
            self.best(promoted),
            tuple(promoted),
        )

    def claim(self, best: int) -> None:
        """Score the final split, once, for the start and the best round."""
        final = self.store.final()
        self.keep(final, self.parts.final)
        tables = {}
        # The best first: its weights are often still served.
        for name, version in (("best", best), ("start", 0)):
            tables[name] = self._score_held_out(final, name, self.parts.final, version)
        final.record(
            "evaluation",
            lambda: {
                "best_round": best,
                "rounds": self.config.rounds.count,
                "start": summarise(tables["start"], *self._draws),
                "best": summarise(tables["best"], *self._draws),
                "change": compare(tables["best"], tables["start"], *self._draws),
            },
        )
        change = final.stored("evaluation")["change"]
        self.metrics.settle(
            None, "claim", {name: found["difference"] for name, found in change.items()}
        )

    def summarise(self) -> None:
        """Write summary.md and report.html from what is stored."""
        # Plotting takes a while to import, and the first round a while to get here.
        from rlhf.report import write_report

        write_summary(self.store, self.config)
        write_report(self.store.folder)

    def _score_held_out(
        self, round: Round, name: str, prompts: Sequence[Prompt], version: int
    ) -> pl.DataFrame:
        sampling = self.sampling(self.config.evaluation.samples_per_prompt)
        draw = self.draw(f"{name}/completions", prompts, version, sampling, audit=True)
        scores = self.trusted(round, draw)
        audit = [judge.name for judge in self.config.judges.audit]
        about = self.parts.prompt_table(prompts)
        return round.table(
            f"{name}/per_prompt",
            lambda: per_prompt(scores.table(), about, self.config.weights, audit),
        )

    def _keep_greedy(self, round: Round, version: int) -> None:
        prompts = self.parts.gate[: self.config.evaluation.greedy_prompts]
        if prompts:
            rollout, seed = self.config.rollout, self.config.run.seed
            greedy = Sampling(1, 0.0, 1.0, rollout.max_new_tokens, seed)
            draw = self.draw("greedy/completions", prompts, version, greedy, audit=True)
            # For reading only, so abstentions stop nothing here.
            drawn, _ = self.answer(round, draw)
            if version > 0:
                shown = prompts[: self.config.tracking.samples]
                self.parts.trackers.table(
                    version,
                    "greedy",
                    lambda: answer_rows(shown, self._start_greedy(), drawn.table()),
                )

    def _start_greedy(self) -> pl.DataFrame:
        """What the start answered, as it is stored."""
        prompts = self.parts.gate[: self.config.evaluation.greedy_prompts]
        count = len(self.shards(prompts))
        return self.store.round(0).shards("greedy/completions", count, unreachable)

    def _evaluation(self, round: Round, version: int) -> dict[str, Any]:
        table = self._table(round)
        against = {}
        if version > 0:
            others = {"start": 0, "previous": version - 1, "best": self.best(range(version))}
            against = {
                name: {
                    "round": other,
                    "change": compare(table, self._table(self.store.round(other)), *self._draws),
                }
                for name, other in others.items()
            }
        return {"version": version, "scores": summarise(table, *self._draws), "against": against}

    def _drift(self, drawn: pl.DataFrame, version: int, before: int | None) -> dict[str, Any]:
        """What fresh samples of `version` say of it; a trained one is also held against the start
        and the version that it was trained from."""
        completions = completions_of(drawn)
        of = {prompt.prompt_id: prompt.cluster for prompt in self.parts.gate}
        clusters = [of[c.prompt_id] for c in completions]
        found = sampled(completions, clusters)
        if version == 0:
            return found

        def logps(initial: bool = False) -> np.ndarray:
            return np.array([sum(row) for row in learner.logps(completions, initial=initial)])

        learner = self.parts.learner
        self.parts.serving.sleep()
        learner.restore(self.policy(version))
        now, start = logps(), logps(initial=True)
        began, since = start, version - 1 if before is None else before
        if since > 0:
            learner.restore(self.policy(since))
            began = logps()
        self.parts.serving.wake()
        found["kl_start"] = divergence(completions, clusters, now, start)
        found["kl_round"] = divergence(completions, clusters, now, began)
        return found

    def _table(self, round: Round) -> pl.DataFrame:
        return round.stored_table("evaluation/per_prompt")

    def _reward(self, index: int) -> float:
        scores = self.store.round(index).stored("evaluation")["scores"]
        return float(scores["reward"]["value"])

    @property
    def _draws(self) -> tuple[int, int]:
        return self.config.evaluation.bootstrap, self.config.run.seed
