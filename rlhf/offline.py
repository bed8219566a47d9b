"""Training on a preference file: what of it trains, what it did to the policy, and advice.

The file's records become a table as selection makes one, so the learner, its objectives and its
checkpoints are those of the loop. One round, stored as `rounds/0001`; `stats.json` says how each
epoch did on held-out clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlhf.advice import Facts, advice
from rlhf.config_objective import Objective
from rlhf.config_offline import Data, OfflineConfig
from rlhf.errors import DataGateError, InputError
from rlhf.examples import LabelData, Order, PairData, check_fits, split_by_cluster
from rlhf.files import atomic_folder, write_json
from rlhf.held_out import answer_logps, compare, sample_rows
from rlhf.learner import Learner
from rlhf.metrics import Metrics, read_metrics
from rlhf.pair_formats import Preferences, read_preferences
from rlhf.protocols import Reporter
from rlhf.round_data import RoundData, reference_logps
from rlhf.rounds import RunStore
from rlhf.tracking import Trackers, tracked_metrics

_STEPS = "trainer/steps.jsonl"
"""Every step's numbers until they are in stats.json."""

Encode = Callable[[Sequence[Any]], list[int]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """How text becomes ids: a prompt by the chat template, an answer by itself, and its end."""

    prompt: Encode
    answer: Callable[[str], list[int]]
    end: int
    text: Callable[[Sequence[int]], str]
    """Ids as a person reads them, for samples."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a training is wired to; `launch` builds it."""

    learner: Learner
    tokens: Tokens
    reporter: Reporter
    trackers: Trackers
    check: Callable[[], None]
    """Raises Interrupted at a safe point after a signal."""


def run(config: OfflineConfig, store: RunStore, parts: Parts) -> dict[str, Any]:
    """Train on the file, or go on with it; what `stats.json` then holds.

    Raises InputError where the file doesn't fit, DataGateError where too little of it is usable,
    NonFiniteError before a broken update, Interrupted at a safe point after a signal.
    """
    store.status("running")
    round, learner = store.round(1), parts.learner

    @cache
    def read() -> tuple[pl.DataFrame, dict[str, int]]:
        return read_examples(config.data, config.objective, parts.tokens)

    counts = round.record("data", lambda: read()[1])
    table = round.table("examples", lambda: read()[0])
    dropped = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "records")
    parts.reporter.say(f"data: {counts['records']} records of {config.data.path}: {dropped}")
    taken, reference = RoundData(table, config, 1), None
    if config.objective.needs.reference:
        parts.reporter.stage("reference log-probs")
        reference = reference_logps(round, taken, learner, parts.check)

    def start() -> dict[str, float]:
        _, held = taken.steps(reference)
        assert held is not None, "offline training holds clusters out"
        return learner.measure(held)

    def answers(policy: Path | None) -> pl.DataFrame:
        learner.policy.restore(policy)
        return answer_logps(learner, held)

    first = round.record("start", start)
    held = split_by_cluster(table, config.learner.validation_share, config.run.seed)[1]
    before = round.table("held_out/start", lambda: answers(None))
    metrics = tracked_metrics(store.folder / "metrics.jsonl", parts.trackers)
    if not round.done("policy"):
        _train(config, store, parts, metrics, table, reference)
    after = round.table("held_out/end", lambda: answers(round.path / "policy"))
    change = compare(before, after, config.run.seed)
    steps = round.path / _STEPS
    stats = round.record(
        "stats",
        lambda: (
            _stats(config, counts, first, read_metrics(steps), _raised(before, after))
            | {"held_out": change}
        ),
    )
    round.drop("trainer")
    write_json(store.folder / "stats.json", stats)
    _tell(config, parts, metrics, stats)
    parts.trackers.table(
        1,
        "held_out",
        lambda: sample_rows(held, before, after, parts.tokens.text, config.tracking.samples),
    )
    reason = f"epoch {stats['best_epoch']} of {len(stats['epochs'])} was best"
    store.status("done", reason=reason, best_round=1, promoted=[1])
    return stats


def _tell(config: OfflineConfig, parts: Parts, metrics: Metrics, stats: Mapping[str, Any]) -> None:
    """Say and track how it ended."""
    best, held = stats["epochs"][stats["best_epoch"] - 1], stats["held_out"]
    metrics.settle(1, "held_out", {name: held[name] for name in ("before", "after", "change")})
    bounded = held["low"] is not None and held["high"] is not None
    interval = f"{held['low']:+.3f} to {held['high']:+.3f}" if bounded else "unbounded"
    start = stats["start"]["loss"]
    parts.reporter.say(
        f"held out: loss {'no number' if start is None else f'{start:.4f}'} -> "
        f"{best['validation_loss']:.4f}, accuracy "
        f"{best['validation_accuracy']:.3f}; epoch {stats['best_epoch']} of "
        f"{len(stats['epochs'])} was best"
    )
    parts.reporter.say(
        f"held out: {held['measure']} {held['before']:.3f} -> {held['after']:.3f}, change "
        f"{held['change']:+.3f} (95% interval {interval}; {held['examples']} examples of "
        f"{held['clusters']} clusters)"
    )
    for line in stats["advice"]:
        parts.reporter.say(f"advice: {line}")


def _train(
    config: OfflineConfig,
    store: RunStore,
    parts: Parts,
    metrics: Metrics,
    table: pl.DataFrame,
    reference: pl.DataFrame | None,
) -> None:
    round, learner = store.round(1), parts.learner
    planned, resumed = RoundData(table, config, 1).planned, False
    each = planned // config.learner.epochs
    # Every step, whatever trackers and metrics.jsonl get, so that stats.json is the same.
    steps = Metrics(round.path / _STEPS)

    def on_step(step: int, values: dict[str, float]) -> None:
        nonlocal resumed
        if not resumed:
            for log in (steps, metrics):
                log.rewind(1, "train", after_step=step - 1)
            resumed = True
        steps.log(1, "train", step, values)
        if step % config.tracking.log_steps == 0 or step % each == 0:
            metrics.log(1, "train", step, values)
        parts.reporter.metrics("train", values)
        if step % each == 0:
            with atomic_folder(store.folder / "epochs" / f"{step // each:02d}") as folder:
                learner.save(folder, _card(config, f"epoch {step // each}"))
        advance(step)

    def compute(folder: Path) -> None:
        scratch = round.scratch("trainer")
        learner.train(table, reference, 1, scratch, on_step, parts.check)
        learner.save(folder, _card(config, "the best epoch"))

    with parts.reporter.progress("train", planned) as advance:
        round.folder("policy", compute)


def _raised(before: pl.DataFrame, after: pl.DataFrame) -> float:
    """Mean change (nats) of the log-prob of chosen, or good, held-out answers, from two of
    `answer_logps`."""
    if "chosen" in after.columns:
        change = after["chosen"] - before["chosen"]
    else:
        change = (after["completion"] - before["completion"]).filter(after["good"])
    return float(np.mean(change.to_numpy())) if len(change) else 0.0


def _stats(
    config: OfflineConfig,
    counts: Mapping[str, int],
    start: Mapping[str, float],
    steps: Sequence[Mapping[str, Any]],
    raised: float,
) -> dict[str, Any]:
    ends = [number for number, step in enumerate(steps) if "validation_loss" in step]
    epochs = []
    for number, (first, last) in enumerate(pairwise([-1, *ends]), start=1):
        own = steps[first + 1 : last + 1]
        held = {k: v for k, v in steps[last].items() if k.startswith("validation_")}
        mean = {k: _mean(s[k] for s in own) for k in ("loss", "accuracy")}
        epochs.append({"epoch": number, "steps": len(own), **mean, **held})
    # Of a step that was skipped there is no loss, and of an epoch there may be none.
    losses = [step["loss"] for step in steps if step["loss"] is not None] or [math.nan]
    found = [math.inf if e["validation_loss"] is None else e["validation_loss"] for e in epochs]
    ratio = "good" if config.objective.needs.data == "labels" else "chosen"
    facts = Facts(
        full=config.model.tuning == "full",
        learning_rate=config.learning_rate,
        accuracy=math.nan if epochs[-1]["accuracy"] is None else epochs[-1]["accuracy"],
        first_loss=losses[0],
        last_loss=losses[-1] if epochs[-1]["loss"] is None else epochs[-1]["loss"],
        # Without a reference there is no ratio, and what the best epoch did tells.
        chosen_logratio=epochs[-1].get(f"validation_logratio_{ratio}", raised),
        validation_losses=tuple(found),
    )
    return {
        "objective": config.objective.name,
        "data": dict(counts),
        "start": dict(start),
        "epochs": epochs,
        "best_epoch": found.index(min(found)) + 1,
        "advice": advice(facts),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


@dataclass(frozen=True, slots=True)
class Outline:
    """What a training has before it, told from the file alone: records by split, and steps."""

    train: int
    held_out: int
    clusters: int
    steps: int
    """At most: what turns out empty, identical or too long takes no part."""


def outline(config: OfflineConfig) -> Outline:
    """Read the file, without tokenizer or model.

    Raises InputError where it can't be read or doesn't fit the objective.
    """
    learner, needs = config.learner, config.objective.needs
    preferences = _read(config.data, config.objective)
    names = [_names(record)[1] for record in preferences.table.iter_rows(named=True)]
    table = pl.DataFrame({"cluster": names})
    training, held = split_by_cluster(table, learner.validation_share, config.run.seed)
    order = Order(config.run.seed, 1, learner.epochs, learner.batch_pairs)
    least = (PairData if needs.data == "pairs" else LabelData).least
    steps = len(order.steps(training.height, least))
    return Outline(training.height, held.height, len(set(names)), steps)


def _card(config: OfflineConfig, which: str) -> str:
    """README.md of a stored policy. The same training gives the same bytes."""
    objective = config.objective
    library = "transformers" if config.model.whole else "peft"
    return (
        f"---\nlibrary_name: {library}\ntags: [pairloop, {objective.name}]\n---\n\n"
        f"# {config.run.name}\n\n`{config.model.path}` trained by pairloop on "
        f"`{config.data.path}` with {objective.name.upper()}, beta {objective.beta:g}, learning "
        f"rate {config.learning_rate:g}: {which}. Its numbers stand in the run's `stats.json`.\n"
    )


def read_examples(
    data: Data, objective: Objective, tokens: Tokens
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The file as a table of pairs or labels with token ids, and what became of its records.

    A cluster is the file's own, else the prompt. Raises InputError where the file can't be read or
    doesn't fit the objective, DataGateError where too many records are too long or none is left.
    """
    preferences = _read(data, objective)
    rows, counts = [], {"records": preferences.table.height, "empty": 0, "identical": 0}
    counts |= {"too_long": 0, "kept": 0}
    for number, record in enumerate(preferences.table.iter_rows(named=True)):
        row = _tokenised(record, number, preferences.answers, tokens)
        answers = [row[f"{name}_token_ids"] for name in preferences.answers]
        # An answer has its end token besides.
        if not row["prompt_token_ids"] or any(len(answer) < 2 for answer in answers):
            counts["empty"] += 1
            continue
        if len(answers) > 1 and answers[0] == answers[1]:
            counts["identical"] += 1
            continue
        fitted = fit(row["prompt_token_ids"], answers, data)
        counts["too_long"] += fitted is None or fitted != (row["prompt_token_ids"], answers)
        if fitted is None:
            continue
        row["prompt_token_ids"], answers = fitted
        row |= {f"{n}_token_ids": a for n, a in zip(preferences.answers, answers, strict=True)}
        rows.append(row)
    counts["kept"] = len(rows)
    _check_counts(counts, data)
    return pl.DataFrame(rows, schema=_schema(preferences)), counts


def _read(data: Data, objective: Objective) -> Preferences:
    preferences = read_preferences(Path(data.path), data.format, data.columns)
    check_fits(objective, preferences.table.columns, data.path)
    for record in preferences.table.select("where", *preferences.answers).iter_rows(named=True):
        for name in preferences.answers:
            if len(record[name]) != 1:
                raise InputError(
                    f"{record['where']}: {name} must be one message, got {len(record[name])}; put "
                    "the turns before the last into the prompt"
                )
    return preferences


def fit(
    prompt: list[int], answers: list[list[int]], data: Data
) -> tuple[list[int], list[list[int]]] | None:
    """Prompt and answers of at most `data.max_tokens` together with the longest answer, or None
    where the rule drops them; as they were where nothing is too long."""
    longest = max(len(answer) for answer in answers)
    over = len(prompt) + longest - data.max_tokens
    if over <= 0:
        return prompt, answers
    # What is left must hold a token to predict from and one to predict.
    if data.too_long == "cut_prompt" and over < len(prompt):
        return prompt[over:], answers
    if data.too_long == "cut_answer" and len(prompt) < data.max_tokens:
        cut = [answer[: data.max_tokens - len(prompt)] for answer in answers]
        # Two answers that differ only in what was cut off teach nothing.
        return None if len(cut) > 1 and cut[0] == cut[1] else (prompt, cut)
    return None


def _tokenised(
    record: Mapping[str, Any], number: int, answers: Sequence[str], tokens: Tokens
) -> dict[str, Any]:
    prompt_id, cluster = _names(record)
    row: dict[str, Any] = {
        "prompt_id": prompt_id,
        "cluster": cluster,
        "prompt_token_ids": tokens.prompt(record["prompt"]),
    }
    for name in answers:
        row[f"{name}_token_ids"] = [*tokens.answer(record[name][0]["content"]), tokens.end]
    if "label" in record:
        return {**row, "sample": number, "good": record["label"]}
    return {**row, "chosen_sample": 2 * number, "rejected_sample": 2 * number + 1}


def _names(record: Mapping[str, Any]) -> tuple[str, str]:
    """prompt_id and cluster: the file's own, else both from the prompt's text."""
    said = "\n\n".join(m["content"] for m in record["prompt"])
    return (
        record["prompt_id"] or sha256(said.encode()).hexdigest()[:16],
        record["cluster"] or sha256(" ".join(said.lower().split()).encode()).hexdigest(),
    )


def _schema(preferences: Preferences) -> pl.Schema:
    """What of `pairs_schema` or `labels_schema` the learner reads."""
    ids, text, number = pl.List(pl.Int32), pl.String(), pl.Int32()
    about = {"prompt_id": text, "cluster": text, "prompt_token_ids": ids}
    answers = {f"{name}_token_ids": ids for name in preferences.answers}
    if preferences.paired:
        return pl.Schema({**about, **answers, "chosen_sample": number, "rejected_sample": number})
    return pl.Schema({**about, **answers, "sample": number, "good": pl.Boolean()})


def _check_counts(counts: Mapping[str, int], data: Data) -> None:
    share = counts["too_long"] / max(1, counts["records"])
    if share > data.max_too_long:
        raise DataGateError(
            f"{data.path}: {counts['too_long']} of {counts['records']} records have more than "
            f"{data.max_tokens} tokens, data.max_too_long allows {data.max_too_long:.0%}; raise "
            "data.max_tokens, or choose data.too_long and raise the limit"
        )
    if not counts["kept"]:
        raise DataGateError(f"{data.path}: no record is left to train on: {dict(counts)}")
