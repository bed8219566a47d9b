"""On-policy preference optimisation: start reading here, `run` is the algorithm.

How it differs from offline DPO: answers are sampled from the policy that is being trained, every
round anew, and judged; pairs are made of the policy's own answers to one prompt (for KTO, single
good and bad answers). What it leaves out of RLHF with PPO: no value model, no reward gradient, no
per-token advantage; the KL leash is inside the loss and is measured on fresh samples instead of
being a penalty.

Versions are rounds: version 0 is the start, round t trains version t from version t - 1. Every
stage is stored by the round it belongs to and is done once, whatever kills the process.
"""

from __future__ import annotations

from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.rounds import RunStore
from rlhf.stage_base import Parts
from rlhf.stages import Outcome, Stages
from rlhf.summary import round_rows


def run(config: RunConfig, store: RunStore, parts: Parts) -> Outcome:
    """Go round until the rounds are done or a gate stops it; then score the final split once.

    Raises DataGateError where the data can't be trusted, ParityError where the generator is stale,
    NonFiniteError before a broken update, Interrupted at a safe point after a signal.
    """
    do = Stages(config, store, parts)
    _refuse_more_rounds(config, store)
    store.status("running")
    store.round(0).record("pools", lambda: dict(parts.counts))
    do.keep(store.round(0), parts.gate)
    do.evaluate(store.round(0), version=0)
    promoted: list[int] = []
    outcome: Outcome | None = None
    for index in range(1, config.rounds.count + 1):
        round = store.round(index)
        prompts = parts.sample(index)
        do.keep(round, prompts)
        do.watch_judges(round)
        answered = do.sample(round, prompts)
        if index == 1:
            do.check_cold_start(round, answered)
        pairs = do.select(round, answered)
        do.audit(round, prompts, answered, pairs)
        data = do.label(round, answered) if do.trains_on_labels else pairs
        with do.ahead(index + 1):
            do.train(round, data)
        do.evaluate(round, version=index)
        verdict = do.gate(round, best=do.best([0, *promoted]))
        parts.reporter.table(f"round {index}", round_rows(store, index))
        parts.reporter.say(verdict["reason"])
        if not verdict["promoted"]:
            outcome = do.stop(round, promoted, f"round {index}: {verdict['reason']}")
            break
        promoted.append(index)
        store.status("running", best_round=do.best(promoted), promoted=promoted)
        do.summarise()
    outcome = outcome or do.finish(promoted)
    if outcome.best_round is not None:
        do.claim(outcome.best_round)
    store.status(
        outcome.state, reason=outcome.reason, best_round=outcome.best_round, promoted=promoted
    )
    do.summarise()
    return outcome


def _refuse_more_rounds(config: RunConfig, store: RunStore) -> None:
    final = store.final()
    if not final.done("evaluation"):
        return
    rounds = final.stored("evaluation")["rounds"]
    if config.rounds.count != rounds:
        raise InputError(
            f"rounds.count must stay {rounds}, got {config.rounds.count}: the final split of this "
            "run was scored, and it is scored once. Start a new run (run.name) to go on"
        )
