"""`pairloop dpo`: build what a training on a preference file needs, run it, say how it ended."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from launch.machines import this_machine
from launch.placement import device_of, settle, several
from launch.quiet import hush, hush_transformers
from launch.roles import model_path
from launch.terminal import Terminal
from rlhf.config_io import resolved
from rlhf.config_offline import OfflineConfig
from rlhf.errors import InputError, Interrupted, PairloopError
from rlhf.interrupts import Interrupts
from rlhf.rounds import RunStore
from rlhf.tracking import Trackers
from rlhf.tracking import build as build_trackers

if TYPE_CHECKING:
    from rlhf.offline import Parts, Tokens
    from rlhf.policy import Policy


def train(config: OfflineConfig) -> int:
    """Train to the end, in this process, or go on with it; the exit status.

    Raises PairloopError: bad input, a data gate, a broken update, or an interruption.
    """
    hush()
    alone(config)
    terminal = Terminal(config.tracking.plain)
    machine = this_machine()
    config = settle(config, machine)
    device = device_of(config, machine.gpus > 0, machine.capability)
    trackers = Trackers(build_trackers(config.tracking), terminal.say)
    with (
        Interrupts(terminal.announce) as interrupts,
        RunStore.open(config) as store,
        terminal.showing(store.folder / "output.log"),
    ):
        terminal.say(f"run {store.folder}: {config.objective.name} on {device}")
        try:
            trackers.start(config.run.name, resolved(config), store.folder / "trackers")
            from rlhf.offline import run

            run(config, store, _parts(config, device, terminal, trackers, interrupts))
        except Interrupted as error:
            store.status("interrupted", reason=str(error))
            trackers.finish("interrupted")
            raise
        except PairloopError as error:
            store.status("failed", reason=str(error))
            trackers.finish("failed")
            raise
        trackers.finish("done")
        for name, reason in trackers.lost.items():
            terminal.say(f"tracker {name} was lost on the way: {reason}")
        terminal.say(f"numbers: {store.folder / 'stats.json'}")
        terminal.say(f"policy: {store.round(1).path / 'policy'}")
    return 0


def alone(config: OfflineConfig) -> None:
    """Raises InputError where several processes were started or asked for: this one trains."""
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"pairloop dpo trains in one process, but a launcher started {ranks}; start it without "
            "the launcher (pairloop train goes over ranks)"
        )
    if (wanted := several(config)) is not None:
        raise InputError(f"{wanted}: pairloop dpo trains in one process; leave it out")


def rehearse(config: OfflineConfig) -> str:
    """Read the file as a training would, without a model; what is in it, and the steps at most.

    Raises InputError where a training would, texts without a token aside.
    """
    from rlhf.offline import outline

    alone(config)
    build_trackers(config.tracking)
    found = outline(config)
    epochs = config.learner.epochs
    return "\n".join(
        [
            f"records    {found.train} train, {found.held_out} held out, of {found.clusters} "
            "clusters; what turns out empty, identical or too long falls",
            f"steps      at most {found.steps}: {epochs} epochs of {found.steps // epochs}",
        ]
    )


def tokens_of(policy: Policy) -> Tokens:
    """How a policy's tokenizer turns text into ids."""
    from rlhf.model_files import answer_end, prompt_encoder
    from rlhf.offline import Tokens

    tokenizer = policy.tokenizer
    return Tokens(
        prompt_encoder(tokenizer),
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        answer_end(tokenizer, policy.stop_ids),
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
    )


def _parts(
    config: OfflineConfig,
    device: str,
    terminal: Terminal,
    trackers: Trackers,
    interrupts: Interrupts,
) -> Parts:
    from rlhf.learner import Learner
    from rlhf.offline import Parts
    from rlhf.policy import Policy

    hush_transformers()
    policy = Policy(config.model, model_path(config), device, config.run.seed)
    learner = Learner(policy, config, terminal.say)
    learner.check = interrupts.check
    return Parts(learner, tokens_of(policy), terminal, trackers, interrupts.check)
