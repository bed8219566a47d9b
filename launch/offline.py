"""`pairloop dpo`: build what a training on a preference file needs, run it, say how it ended."""

from __future__ import annotations

from launch.local import model_path
from launch.machines import this_machine
from launch.placement import device_of, one_process, settle
from launch.quiet import hush, hush_transformers
from launch.terminal import Terminal
from rlhf.config_offline import OfflineConfig
from rlhf.errors import Interrupted, PairloopError
from rlhf.interrupts import Interrupts
from rlhf.rounds import RunStore


def train(config: OfflineConfig) -> int:
    """Train to the end, in this process, or go on with it; the exit status.

    Raises PairloopError: bad input, a data gate, a broken update, or an interruption.
    """
    hush()
    one_process(config)
    terminal = Terminal(config.tracking.plain)
    machine = this_machine()
    config = settle(config, machine)
    device = device_of(config, machine.gpus > 0, machine.capability)
    with (
        Interrupts(terminal.announce) as interrupts,
        RunStore.open(config) as store,
        terminal.showing(store.folder / "output.log"),
    ):
        terminal.say(f"run {store.folder}: {config.objective.name} on {device}")
        try:
            _run(config, store, terminal, interrupts, device)
        except Interrupted as error:
            store.status("interrupted", reason=str(error))
            raise
        except PairloopError as error:
            store.status("failed", reason=str(error))
            raise
        terminal.say(f"numbers: {store.folder / 'stats.json'}")
        terminal.say(f"policy: {store.round(1).path / 'policy'}")
    return 0


def _run(
    config: OfflineConfig, store: RunStore, terminal: Terminal, interrupts: Interrupts, device: str
) -> None:
    from rlhf.learner import Learner
    from rlhf.offline import Parts, Tokens, run
    from rlhf.policy import Policy, prompt_encoder

    hush_transformers()
    policy = Policy(config.model, model_path(config), device, config.run.seed)
    tokenizer = policy.tokenizer
    tokens = Tokens(
        prompt_encoder(tokenizer),
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        policy.stop_ids[0],
    )
    learner = Learner(policy, config, terminal.say)
    run(config, store, Parts(learner, tokens, terminal, interrupts.check))
