"""Everything in one process: build the parts, run the loop, say how it ended."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import fit
from launch.judging import Judging, Sharing
from launch.machines import Machine, this_machine
from launch.placement import Plan, one_process, place_on, settle
from launch.quiet import hush, hush_transformers
from launch.roles import Alone, Roles, Team
from launch.terminal import Terminal
from rlhf.config import RunConfig
from rlhf.config_io import resolved
from rlhf.errors import DataGateError, InputError, Interrupted, PairloopError
from rlhf.interrupts import Interrupts
from rlhf.rounds import RunStore
from rlhf.tracking import Trackers
from rlhf.tracking import build as build_trackers
from rollout.judges.panel import InProcess, planned_calls
from rollout.prompts import Pools, load_pools, prompt_table, sample_round
from rollout.transfer import Room, make_way

if TYPE_CHECKING:
    from rlhf.stage_base import Parts
    from rlhf.stages import Outcome


def train(config: RunConfig, team: Team | None = None, plan: Plan | None = None) -> int:
    """Run the loop to its end; the exit status (see `pairloop --help`). Raises as `run` does."""
    return DataGateError.exit_status if run(config, team, plan).best_round is None else 0


def run(config: RunConfig, team: Team | None = None, plan: Plan | None = None) -> Outcome:
    """Run the loop to its end, in this process with its `team`, or go on with it.

    `plan` says how the team works, where that is not on this machine.

    Raises PairloopError: bad input, a data gate, a failed check, or an interruption.
    """
    hush()
    if team is None:
        one_process(config)
    terminal = Terminal(config.tracking.plain)
    machine = this_machine()
    config = settle(config, machine)
    # Ranks and clusters are measured by whoever placed them.
    wanting = _wanting(config, machine) if team is None else None
    plan = plan or place_on(config, machine)
    team = team or Alone()
    judging = Judging(config, team.engines(plan.device))
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
        if wanting is not None:
            terminal.say(
                f"memory: by its estimate this run does not fit {machine.name}, and may be killed: "
                f"{wanting} (--dry-run shows who needs how much)"
            )
        watchers = Watchers(terminal, trackers, interrupts)
        try:
            trackers.start(config.run.name, resolved(config), store.folder / "trackers")
            judging.open(store.folder / "judges", terminal.say)
            wiring = Wiring(config, plan, store, judging, team)
            with wiring.parts(watchers) as parts:
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


def _wanting(config: RunConfig, machine: Machine) -> str | None:
    """What would help a run that by its estimate does not fit; None where it fits, or where it
    can't be estimated: what is wrong then is for whoever needs it to say."""
    try:
        return fit.report(config, machine)[1]
    except InputError:
        return None


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who watches a run, and may ask it to stop."""

    terminal: Terminal
    trackers: Trackers
    interrupts: Interrupts


def rehearse(config: RunConfig) -> str:
    """Load judges and prompts as a run would, without a model; what became of the prompts.

    Raises InputError where a run would, over-long prompts aside.
    """
    judging = Judging(config, InProcess(config.placement.device))
    build_trackers(config.tracking)
    pools = load_pools(config.prompts, config.run.seed, None)
    uncertified = [
        f"{s.judge} on {s.dimension}: uncertified ({s.status})" for s in judging.uncertified
    ]
    return "\n".join([_counted(pools), *_calls(config, pools, judging), *uncertified])


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the parts of a run are made from."""

    config: RunConfig
    plan: Plan
    store: RunStore
    judging: Judging
    team: Team

    @contextmanager
    def parts(self, watchers: Watchers) -> Iterator[Parts]:
        """The parts of a run; frees generator and judges at the end."""
        from rlhf.learner import Learner
        from rlhf.model_files import prompt_encoder
        from rlhf.stage_base import Parts
        from rollout.weight_sync import Serving

        hush_transformers()
        # Who frees memory collects garbage; the libraries' millions of objects are none. What a run
        # before this one left is.
        gc.collect()
        gc.freeze()
        config, plan, judging = self.config, self.plan, self.judging
        roles = Roles(config, plan)
        pools = load_pools(config.prompts, config.run.seed, prompt_encoder(roles.tokenizer))
        for line in (_counted(pools), *_calls(config, pools, judging)):
            watchers.terminal.say(line)
        learner = self.team.learner(roles, watchers.terminal.say)
        if isinstance(learner, Learner):
            learner.check = watchers.interrupts.check
        folder = self._way(roles, watchers.terminal.say)
        longest = max(len(p.token_ids) for p in (*pools.train, *pools.gate, *pools.final))
        serving = Serving(
            lambda: self.team.generator(roles, longest),
            learner,
            plan.sync,
            folder,
            pools.train,
            lambda found: watchers.terminal.say(_parity_line(found)),
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
                ask=judging.ask,
                judges_beside=judging.beside,
                check_scores=judging.check,
                watch=judging.watch,
                prompt_table=prompt_table,
                counts=pools.counts,
                reporter=watchers.terminal,
                trackers=watchers.trackers,
                interrupts=watchers.interrupts,
            )
        finally:
            try:
                serving.close()
            finally:
                judging.close()
                gc.unfreeze()

    def _way(self, roles: Roles, say: Callable[[str], None]) -> Path:
        """The folder that versions travel through, empty of what a killed run left there."""
        from launch.doctor.probes import ask_memory

        run = self.store.folder
        if self.plan.sync == "adapter":
            return make_way("disk", run, [], Room(0, 0))[0]
        room = Room(roles.version_bytes, ask_memory().available)
        folder, said = make_way(self.config.rollout.transfer, run, self.team.memories(), room)
        say(said)
        return folder


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
    of = f" to generator {found['generator']}" if "generator" in found else ""
    return (
        f"published version {found['version']}{of}: {said[found['verdict']]}, gap "
        f"{found['gap']:.4f} nats a token{slope}"
    )


def _summarise(store: RunStore, config: RunConfig, error: PairloopError) -> None:
    from rlhf.report import write_report
    from rlhf.summary import write_summary

    # What was found before the end is worth reading; a full disk must not hide the failure.
    if isinstance(error, DataGateError | Interrupted):
        write_summary(store, config)
        write_report(store.folder)
