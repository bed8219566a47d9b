"""Everything in one process: build the parts, run the loop, say how it ended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.judging import Judging, Sharing
from launch.machines import this_machine
from launch.placement import Plan, one_process, place_on, settle
from launch.quiet import hush, hush_transformers
from launch.terminal import Terminal
from rlhf.config import RunConfig
from rlhf.config_io import resolved
from rlhf.config_offline import Trains
from rlhf.errors import DataGateError, Interrupted, PairloopError
from rlhf.interrupts import Interrupts
from rlhf.protocols import Generator
from rlhf.rounds import RunStore
from rlhf.tracking import Trackers
from rlhf.tracking import build as build_trackers
from rollout.imports import resolve_path
from rollout.judges.panel import planned_calls
from rollout.prompts import Pools, load_pools, prompt_table, sample_round

if TYPE_CHECKING:
    from rlhf.stage_base import Parts
    from rlhf.stages import Outcome


def train(config: RunConfig) -> int:
    """Run the loop to its end; the exit status (see `pairloop --help`). Raises as `run` does."""
    return DataGateError.exit_status if run(config).best_round is None else 0


def run(config: RunConfig) -> Outcome:
    """Run the loop to its end, in this process, or go on with it.

    Raises PairloopError: bad input, a data gate, a failed check, or an interruption.
    """
    hush()
    one_process(config)
    terminal = Terminal(config.tracking.plain)
    machine = this_machine()
    config = settle(config, machine)
    plan = place_on(config, machine)
    judging = Judging(config, plan.device)
    trackers = Trackers(build_trackers(config.tracking), terminal.say)
    with (
        Interrupts(terminal.announce) as interrupts,
        RunStore.open(config) as store,
        terminal.showing(store.folder / "output.log"),
    ):
        terminal.say(
            f"run {store.folder}: {plan.engine} on {plan.device} in "
            f"{config.model.precision}, weights {plan.sync}"
        )
        watch = _Watch(terminal, trackers, interrupts)
        try:
            trackers.start(config.run.name, resolved(config), store.folder / "trackers")
            judging.open(store.folder / "judges", terminal.say)
            with _wired(config, plan, store, judging, watch) as parts:
                from rlhf import online_dpo

                outcome = online_dpo.run(config, store, parts)
        except Interrupted as error:
            store.status("interrupted", reason=str(error))
            _summarise(store, config, error)
            trackers.finish("interrupted")
            raise
        except PairloopError as error:
            store.status("failed", reason=str(error))
            _summarise(store, config, error)
            trackers.finish("failed")
            raise
        trackers.finish(outcome.state)
        for name, reason in trackers.lost.items():
            terminal.say(f"tracker {name} was lost on the way: {reason}")
        terminal.say(f"{outcome.state.replace('_', ' ')}: {outcome.reason}")
        terminal.say(f"summary: {store.folder / 'summary.md'}")
        terminal.say(f"report: {store.folder / 'report.html'}")
        if outcome.best_round is not None:
            best = store.folder / f"rounds/{outcome.best_round:04d}/policy"
            terminal.say(f"best policy: {best}")
        return outcome


@dataclass(frozen=True, slots=True)
class _Watch:
    """Who watches a run, and may ask it to stop."""

    terminal: Terminal
    trackers: Trackers
    interrupts: Interrupts


def rehearse(config: RunConfig) -> str:
    """Load judges and prompts as a run would, without a model; what became of the prompts.

    Raises InputError where a run would, over-long prompts aside.
    """
    judging = Judging(config, config.placement.device)
    build_trackers(config.tracking)
    pools = load_pools(config.prompts, config.run.seed, None)
    uncertified = [
        f"{s.judge} on {s.dimension}: uncertified ({s.status})" for s in judging.uncertified
    ]
    return "\n".join([_counted(pools), *_calls(config, pools, judging), *uncertified])


@contextmanager
def _wired(
    config: RunConfig,
    plan: Plan,
    store: RunStore,
    judging: Judging,
    watch: _Watch,
) -> Iterator[Parts]:
    """The parts of a run; frees generator and judges at the end."""
    from rlhf.learner import Learner
    from rlhf.policy import Policy, load_tokenizer, prompt_encoder
    from rlhf.stage_base import Parts
    from rollout.weight_sync import Serving

    hush_transformers()
    path = model_path(config)
    tokenizer = load_tokenizer(config.model, path)
    pools = load_pools(config.prompts, config.run.seed, prompt_encoder(tokenizer))
    for line in (_counted(pools), *_calls(config, pools, judging)):
        watch.terminal.say(line)
    policy = Policy(config.model, path, plan.device, config.run.seed)
    learner = Learner(policy, config, watch.terminal.say)
    serving = Serving(
        lambda: _generator(config, plan, policy, pools),
        learner,
        plan.sync,
        store.folder / "published",
        pools.train,
        lambda found: watch.terminal.say(_parity_line(found)),
    )
    try:
        yield Parts(
            serving=Sharing(serving, judging),
            learner=learner,
            sample=lambda index: sample_round(
                pools.train, index - 1, config.rounds.prompts_per_round, config.run.seed
            ),
            gate=pools.gate,
            final=pools.final,
            score=judging.score,
            check_scores=judging.check,
            watch=judging.watch,
            prompt_table=prompt_table,
            counts=pools.counts,
            reporter=watch.terminal,
            trackers=watch.trackers,
            interrupts=watch.interrupts,
        )
    finally:
        serving.close()
        judging.close()


def _generator(config: RunConfig, plan: Plan, policy: Any, pools: Pools) -> Generator:
    rollout = config.rollout
    if plan.engine == "transformers":
        from rollout.transformers_generator import TransformersGenerator

        return TransformersGenerator(
            policy.path,
            policy.tokenizer,
            policy.stop_ids,
            policy.dtype,
            plan.device,
            rollout.max_concurrency,
        )
    from rollout.vllm_engine import EngineOptions
    from rollout.vllm_generator import Served, VllmGenerator

    longest = max(len(p.token_ids) for p in (*pools.train, *pools.gate, *pools.final))
    return VllmGenerator(
        Served(
            base=policy.path,
            stop_ids=policy.stop_ids,
            lora_rank=config.model.lora.rank,
            quantised=config.model.tuning == "qlora",
        ),
        EngineOptions(
            dtype=policy.dtype,
            device=plan.device,
            # One more: scoring a full-length sequence asks the engine for one token.
            max_length=longest + rollout.max_new_tokens + 1,
            max_concurrency=rollout.max_concurrency,
            memory_gib=rollout.memory_gib,
            gpu_memory_share=rollout.gpu_memory_share,
            seed=config.run.seed,
        ),
    )


def model_path(config: Trains) -> str:
    """Where Transformers loads the policy's model from; a .gguf file is converted once."""
    from rlhf.policy import materialise

    given = config.model.path
    local = given.startswith("package:") or os.path.exists(given)
    return materialise(str(resolve_path(given)) if local else given)


def _counted(pools: Pools) -> str:
    shown = [
        f"{split} {c['kept']} ({c['clusters']} clusters; dropped {c['duplicates']} duplicates, "
        f"{c['near_duplicates']} near-duplicates, {c['too_long']} too long)"
        for split, c in pools.counts.items()
    ]
    return "prompts: " + "; ".join(shown)


def _calls(config: RunConfig, pools: Pools, judging: Judging) -> list[str]:
    gold = Counter(canary.prompt.prompt_id for canary in judging.watch.gold)
    sizes = len(pools.train), len(pools.gate), len(pools.final)
    return planned_calls(config, *sizes, list(gold.values()))


def _parity_line(found: dict[str, Any]) -> str:
    slope = "" if found["slope"] is None else f", slope {found['slope']:.2f}"
    said = {
        "pass": "parity holds",
        "fail": "PARITY FAILS",
        "indistinguishable": "fresh and stale can't be told apart by log-probs (version and "
        "checksum agree)",
    }
    return (
        f"published version {found['version']}: {said[found['verdict']]}, gap "
        f"{found['gap']:.4f} nats a token{slope}"
    )


def _summarise(store: RunStore, config: RunConfig, error: PairloopError) -> None:
    from rlhf.report import write_report
    from rlhf.summary import write_summary

    # What was found before the end is worth reading; a full disk must not hide the failure.
    if isinstance(error, DataGateError | Interrupted):
        write_summary(store, config)
        write_report(store.folder)
