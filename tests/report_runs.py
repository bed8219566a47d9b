"""Runs made of tables alone, by the real selection, comparison and gates: any size, any ending."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlhf.config import RunConfig
from rlhf.evaluation import compare, per_prompt, summarise
from rlhf.gates import decide, judge_gates
from rlhf.metrics import Metrics
from rlhf.rounds import Round, RunStore
from rlhf.selection import Rules, select_pairs
from rlhf.types import COMPLETIONS, SCORES
from rlhf.yield_analysis import Draw, analyse

DIMENSIONS = ("correctness", "style")
FILLER = "Where a parcel is late, the desk looks it up and says when it comes. "


def make_config(folder: Path, **sections: Any) -> RunConfig:
    """Two dimensions, an audit of words, gates on correctness; `sections` are merged in."""
    values: dict[str, Any] = {
        "run": {"name": "trial", "directory": str(folder)},
        "model": {"path": "some/model"},
        "prompts": {split: {"path": f"{split}.jsonl"} for split in ("train", "gate", "final")},
        "rollout": {"samples_per_prompt": 4},
        "judges": {
            "panel": [{"name": "rules", "function": "a:b", "dimensions": list(DIMENSIONS)}],
            "audit": [{"name": "onlooker", "function": "a:c", "dimensions": ["words"]}],
        },
        "selection": {"floors": {"correctness": 0.3}},
        "rounds": {"count": 2},
        "evaluation": {"bootstrap": 200},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


class Runs:
    """Writes one run, round by round; `levels[v]` is the mean correctness of version v."""

    def __init__(
        self, config: RunConfig, levels: Sequence[float], prompts: int = 24, characters: int = 70
    ) -> None:
        self.config = config
        self.levels = levels
        self.prompts = prompts
        self.characters = characters
        self.store = RunStore.open(config)
        self.metrics = Metrics(self.store.folder / "metrics.jsonl")

    def start(self) -> None:
        """Round 0: the start, evaluated."""
        kept = {"read": self.prompts, "duplicates": 0, "kept": self.prompts}
        self.store.status("running")
        self.store.round(0).record("pools", lambda: {"train": kept, "gate": kept})
        self._keep(self.store.round(0), "gate")
        self.evaluate(0)

    def sample(self, index: int, flat: bool = False) -> None:
        """Completions and scores of a round's training prompts; `flat`: all worth the same."""
        round = self.store.round(index)
        self._keep(round, "train")
        self._answers(round, "", "train", index - 1, 4, flat)

    def select(self, index: int) -> int:
        """The round's pairs and funnel; how many pairs there are."""
        round = self.store.round(index)
        completions = round.shards("completions", 1, _stored)
        scores = round.shards("scores", 1, _stored)
        rules = Rules.of(self.config)
        prompts = round.stored_table("prompts")
        found = select_pairs(completions, scores, prompts, rules)
        draw = Draw(index, self.config.evaluation.bootstrap)
        analysis = analyse([(completions, scores, prompts)], found.pairs, rules, draw)
        round.record("funnel", lambda: found.funnel)
        round.record("selection", lambda: analysis)
        round.table("pairs", lambda: found.pairs)
        self._time(index, "pairs", pairs=found.pairs.height)
        return found.pairs.height

    def train(self, index: int, steps: int = 4) -> None:
        """Only its log: nothing is trained."""
        for step in range(1, steps + 1):
            values = {"loss": 0.7 / step, "accuracy": 0.5 + step / (2 * steps), "margin": step / 9}
            values |= {"logratio_chosen": step / 5, "logratio_rejected": -step / 3}
            self.metrics.log(index, "train", step, {**values, "grad_norm": 1 / step})
        self._time(index, "training", skipped_steps=0)

    def evaluate(self, index: int) -> None:
        """Held-out answers of version `index`, their scores and what they say against the start."""
        round = self.store.round(index)
        self._answers(round, "evaluation", "gate", index, 2)
        self._answers(round, "greedy", "gate", index, 1)
        draws = (self.config.evaluation.bootstrap, 0)
        table = self._per_prompt(round, "evaluation")
        against = {}
        if index:
            before = self.store.round(0).stored_table("evaluation/per_prompt")
            change = compare(table, before, *draws)
            against = {name: {"round": 0, "change": change} for name in ("start", "previous")}
        measured = {"entropy": 1.5 - 0.1 * index, "length": 20.0 + index}
        if index:
            measured |= {"kl_start": 0.4 * index, "kl_round": 0.4}
        drift = {n: {"value": v, "standard_error": 0.1} for n, v in measured.items()}
        round.record("drift", lambda: drift)
        scores = summarise(table, *draws)
        round.record("evaluation", lambda: {"scores": scores, "against": against})

    def gate(self, index: int) -> bool:
        """Judge the round against the start; whether it was promoted."""
        change = self.store.round(index).stored("evaluation")["against"]["start"]["change"]
        gates = judge_gates(change, self.config.gates, self.config.gated)
        verdict = decide(gates, self.config.gates.on_inconclusive)
        self.store.round(index).record("gates", lambda: {**asdict(verdict), "against": 0})
        return verdict.promoted

    def go_round(self, index: int) -> bool:
        """A whole round; whether it was promoted."""
        self.sample(index)
        self.select(index)
        self.train(index)
        self.evaluate(index)
        return self.gate(index)

    def claim(self, best: int) -> None:
        """The final split, scored for the start and the best round."""
        final, draws = self.store.final(), (self.config.evaluation.bootstrap, 0)
        tables = {}
        for name, version in (("best", best), ("start", 0)):
            self._answers(final, name, "final", version, 2)
            tables[name] = self._per_prompt(final, name)
        final.record(
            "evaluation",
            lambda: {
                "best_round": best,
                "rounds": self.config.rounds.count,
                "start": summarise(tables["start"], *draws),
                "best": summarise(tables["best"], *draws),
                "change": compare(tables["best"], tables["start"], *draws),
            },
        )

    def finish(self) -> Path:
        """Go round as the loop does, to the end; the run's folder."""
        self.start()
        promoted: list[int] = []
        for index in range(1, self.config.rounds.count + 1):
            if not self.go_round(index):
                break
            promoted.append(index)
        reason = f"all {len(promoted)} rounds ran"
        if len(promoted) < self.config.rounds.count:
            reason = self.store.round(len(promoted) + 1).stored("gates")["reason"]
        if not promoted:
            self.store.status("failed", reason=f"no round could be promoted; {reason}")
        else:
            best = max(promoted, key=lambda i: self.levels[i])
            self.claim(best)
            whole = len(promoted) == self.config.rounds.count
            state: Any = "done" if whole else "stopped_early"
            self.store.status(state, reason=reason, best_round=best, promoted=promoted)
        return self.close()

    def close(self) -> Path:
        """Give the lock back; the run's folder."""
        self.store.close()
        return self.store.folder

    def _keep(self, round: Round, split: str) -> None:
        round.table("prompts", partial(self._prompts, split))

    def _prompts(self, split: str) -> pl.DataFrame:
        number = pl.int_range(self.prompts).cast(pl.String)
        return pl.select(
            prompt_id=pl.format("{}-{}", pl.lit(split), number),
            category=pl.format("kind {}", pl.int_range(self.prompts) % 3),
            cluster=pl.format("{}-source-{}", pl.lit(split), pl.int_range(self.prompts) // 2),
            prompt=pl.format("user: question {} about a parcel", number),
            context=pl.format("The parcel {} comes on Monday.", number),
            reference=pl.format("On Monday, parcel {}.", number),
        )

    def _answers(
        self, round: Round, place: str, split: str, version: int, samples: int, flat: bool = False
    ) -> None:
        where = f"{place}/" if place else ""
        made = self._drawn(split, version, samples)
        round.shards(f"{where}completions", 1, lambda _: made)
        tokens = int(made["token_ids"].list.len().sum())
        self._time(round.index, f"{where}completions", completions=made.height, tokens=tokens)
        scores = self._scored(made, version, split, "" if flat else "noisy")
        if not place:
            scores = scores.filter(judge="rules")
        round.shards(f"{where}scores", 1, lambda _: scores)
        self._time(round.index, f"{where}scores")

    def _drawn(self, split: str, version: int, samples: int) -> pl.DataFrame:
        rows = pl.int_range(self.prompts * samples)
        text = (FILLER * (self.characters // len(FILLER) + 1))[: self.characters]
        length = 3 + (rows * 7) % 11
        return (
            pl.select(number=rows // samples, sample=rows % samples, length=length)
            .select(
                prompt_id=pl.format("{}-{}", pl.lit(split), "number"),
                sample="sample",
                text=pl.format("Answer {} of version {}. {}", "sample", version, pl.lit(text)),
                token_ids=pl.concat_list("sample", pl.int_ranges(0, "length")),
                prompt_token_ids=pl.concat_list("number"),
                logps=pl.int_ranges(0, pl.col("length") + 1),
                finish_reason=pl.lit("stop"),
                policy_version=pl.lit(version),
            )
            .cast(COMPLETIONS)
        )

    def _scored(self, made: pl.DataFrame, version: int, split: str, noise: str) -> pl.DataFrame:
        rng = np.random.default_rng([version, len(split), made.height])
        spread = 0.2 if noise else 0.0
        level = self.levels[version] + rng.normal(0, spread, made.height)
        values = {
            ("rules", "correctness"): np.clip(level, 0, 1),
            # Right answers are a little worse in style: an inversion.
            ("rules", "style"): np.clip(0.8 - 0.3 * level, 0, 1) if noise else level * 0 + 0.5,
            ("onlooker", "words"): np.clip(0.5 * level, 0, 1),
        }
        tables = [
            made.select(
                "prompt_id",
                "sample",
                judge=pl.lit(judge),
                dimension=pl.lit(dimension),
                score=pl.Series(column),
                votes=pl.concat_list(pl.Series(column)),
                spread=0.0,
                abstained=False,
                reason=pl.lit(None),
            )
            for (judge, dimension), column in values.items()
        ]
        return pl.concat(tables).cast(SCORES)

    def _per_prompt(self, round: Round, name: str) -> pl.DataFrame:
        scores = round.shards(f"{name}/scores", 1, _stored)
        split = "final" if round.index is None else "gate"
        weights = self.config.weights
        return round.table(
            f"{name}/per_prompt",
            lambda: per_prompt(scores, self._prompts(split), weights, ["onlooker"]),
        )

    def _time(self, index: int | None, stage: str, **values: Any) -> None:
        self.metrics.log(index, stage, 1, {"seconds": 2.0, "loop_seconds": 0.5, **values})


def _stored(_: int) -> pl.DataFrame:
    raise AssertionError("stored already")
