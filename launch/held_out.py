"""The points of a sweep on held-out prompts: each answers them, and the judges of a run score it.

Prompts, judges and sampling are those of a run's config. One run folder holds all points: its
rounds are the points in the grid's order, its round 0 is the start that they share. So answers are
drawn, scored, compared and resumed by the loop's own stages, and published with its checks.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from launch.judging import Judging
from launch.local import Watchers, Wiring
from launch.machines import this_machine
from launch.placement import place_on, settle
from launch.roles import Alone
from launch.terminal import Terminal
from rlhf.config import Run, RunConfig, Tracking
from rlhf.config_io import load
from rlhf.errors import DataGateError, InputError
from rlhf.interrupts import Interrupts
from rlhf.rounds import Round, RunStore
from rlhf.sweep import Answers, Change, Point
from rlhf.tracking import Trackers
from rollout.judges.panel import InProcess


def config_for(file: Path, folder: Path, points: Sequence[Point]) -> RunConfig:
    """The run that scores these points: the file's prompts, judges and sampling, their model.

    Raises InputError where the file is no run's config, or the points are no versions of its model.
    """
    models = [point.config.model for point in points]
    if any(model != models[0] for model in models):
        raise InputError(
            "--held-out serves the points as versions of one policy, so no setting of model can be "
            "varied; sweep it without --held-out"
        )
    given, first = load([file]), points[0].config
    if given.model.path != first.model.path:
        raise InputError(
            f"--held-out {file}: model.path must be the sweep's {first.model.path}, got "
            f"{given.model.path}"
        )
    run = Run(name="held-out", directory=str(folder), seed=first.run.seed)
    own = {"run": run, "model": first.model, "placement": first.placement}
    own["tracking"] = Tracking(plain=True)
    if given.rollout.transfer == "network":
        # One process has nobody to send to.
        own["rollout"] = given.rollout.model_copy(update={"transfer": "auto"})
    config = given.model_copy(update=own)
    return settle(config, this_machine())


def answers(
    config: RunConfig, policies: Sequence[tuple[Point, Path]], terminal: Terminal
) -> list[Answers | None]:
    """What became of each stored policy's answers against the start's, in the order given; None
    where judges abstained too often on one's.

    Raises as a run does: bad input, a data gate on the start, a stale generator, an interruption.
    """
    from rlhf.stages import Stages

    config = _named(config, policies)
    plan = place_on(config, this_machine())
    judging = Judging(config, InProcess(plan.device))
    found: list[Answers | None] = []
    with Interrupts(terminal.announce) as interrupts, RunStore.open(config) as store:
        judging.open(store.folder / "judges", terminal.say)
        watchers = Watchers(terminal, Trackers({}, terminal.say), interrupts)
        wiring = Wiring(config, plan, store, judging, Alone())
        with wiring.parts(watchers) as parts:
            do = Stages(config, store, parts)
            do.evaluate(store.round(0), version=0)
            for version, (point, policy) in enumerate(policies, start=1):
                round = store.round(version)
                _keep(round, policy)
                try:
                    # Each was trained from the start.
                    do.evaluate(round, version, before=0)
                except DataGateError as error:
                    terminal.say(f"answers of {point.name} are not compared: {error}")
                    found.append(None)
                else:
                    found.append(_answers(round))
    return found


def _named(config: RunConfig, policies: Sequence[tuple[Point, Path]]) -> RunConfig:
    """Under a name of these very weights: other ones are never taken for answered."""
    from rollout.weight_sync import weights_sha256

    names = " ".join(f"{point.name} {weights_sha256(policy)}" for point, policy in policies)
    digest = sha256(names.encode()).hexdigest()[:8]
    run = config.run.model_copy(update={"name": f"held-out-{digest}"})
    return config.model_copy(update={"run": run})


def _keep(round: Round, policy: Path) -> None:
    def copied(folder: Path) -> None:
        shutil.copytree(policy, folder, dirs_exist_ok=True)

    round.folder("policy", copied)


def _answers(round: Round) -> Answers:
    change = round.stored("evaluation")["against"]["start"]["change"]
    return Answers(
        round.stored("drift")["kl_start"]["value"],
        {n: Change(c["difference"], c["low"], c["high"]) for n, c in change.items()},
    )
