"""One of the ranks that `test_ranks.py` starts: trains small policies together with the others.

Arguments: the folder with `cases.json`; writes what rank 0 found to `found.json` there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from launch.ranks import join
from rlhf import head, sharding
from rlhf.checkpoint import save_trained
from rlhf.config import RunConfig
from rlhf.config_offline import Trains
from rlhf.errors import Interrupted, NonFiniteError
from rlhf.group import Group
from rlhf.learner import Learner
from rlhf.objectives import Logps, StepLoss
from rlhf.packing import TokenPair
from rlhf.partition import WHOLE, Split
from rlhf.policy import Policy
from rlhf.round_data import RoundData
from rlhf.sharding import Replicated, Sharding, Zero


def never() -> None:
    """Nobody asks to stop."""


def make_learner(config: RunConfig, group: Group, stage: int, offload: bool) -> Learner:
    def shard(policy: Policy, config: Trains) -> Sharding:
        if stage == 0:
            return Replicated(policy, config.learner, config.model.precision, group)
        return Zero(policy, config.learner, group, stage, offload)

    partition = Split() if stage == 3 else WHOLE
    policy = Policy(config.model, config.model.path, "cpu", config.run.seed, partition)
    return Learner(policy, config, shard=shard)


PARTS = StepLoss.parts


def break_loss(value: float) -> None:
    """From here on `value` is added to every loss; until `StepLoss.parts` is itself again."""

    def parts(loss: StepLoss, logps: Logps) -> tuple[Tensor, Tensor]:
        own, nll = PARTS(loss, logps)
        return own + value, nll

    mended: Any = StepLoss
    mended.parts = parts


def count_gathers(learner: Learner, counted: Counter[str]) -> Callable[[], None]:
    """Count passes through the head, gathers of its weights, and chunks of hidden states."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as zero3

    top = learner.policy.plain_model().get_output_embeddings()
    coordinator: Any = zero3.PartitionedParameterCoordinator
    chunked: Any = head
    fetch, score = coordinator.fetch_sub_module, chunked.cross_entropy

    def fetched(self: Any, module: Any, *given: Any, **more: Any) -> Any:
        counted["gathers"] += module is top
        return fetch(self, module, *given, **more)

    def scored(*given: Any, **more: Any) -> Tensor:
        counted["chunks"] += 1
        found: Tensor = score(*given, **more)
        return found

    coordinator.fetch_sub_module, chunked.cross_entropy = fetched, scored
    top.register_forward_pre_hook(lambda *_: counted.update(passes=1))

    def undo() -> None:
        coordinator.fetch_sub_module, chunked.cross_entropy = fetch, score

    return undo


def save_gathered(policy: Policy, folder: Path, group: Group) -> None:
    """Trained weights, weight by weight, by other code than what stores versions."""
    kept = {}
    for name, parameter in policy.trainable():
        with policy.gathered([parameter], False):
            kept[name] = parameter.detach().clone()
    if group.main:
        folder.mkdir(parents=True)
        save_file(kept, folder / "model.safetensors")


class Case:
    """Two rounds of training, the second from the first's stored policy."""

    def __init__(self, folder: Path, case: dict[str, Any], group: Group) -> None:
        self.group = group
        self.stage = case["stage"]
        self.config = RunConfig.model_validate(case["config"])
        self.table = pl.read_parquet(folder / case["table"])
        self.out = folder / case["name"]
        self.offload = case["offload"]
        self.stop_at, self.broken_at = case.get("stop_at"), case.get("broken_at")
        self.what, self.value = case.get("what"), float(case.get("value", "nan"))
        self.head = Counter[str]()
        self.undo: Callable[[], None] = lambda: None
        self.losses: dict[int, list[float]] = {}
        self.norms: list[float] = []
        self.round = 0
        self.learner = self.make()

    @property
    def last_rank(self) -> bool:
        return self.group.rank == self.group.world - 1

    def make(self) -> Learner:
        learner = make_learner(self.config, self.group, self.stage, self.offload)
        if self.stage == 3:
            self.undo()
            self.head.clear()
            self.undo = count_gathers(learner, self.head)
        return learner

    def on_step(self, step: int, values: dict[str, float]) -> None:
        self.losses[self.round].append(values["loss"])
        self.norms.append(values["grad_norm"])
        if self.broken_at == [self.round, step] and self.last_rank:
            if self.what == "loss":
                break_loss(self.value)
            else:
                _, parameter = self.learner.policy.trainable()[0]
                parameter.register_hook(lambda gradient: gradient * self.value)

    def check(self) -> None:
        # Asked of the last rank alone: the others have to hear of it.
        if [self.round, len(self.losses[self.round])] == self.stop_at and self.last_rank:
            self.stop_at = None
            raise Interrupted("stopped by the test")

    def train(self, index: int) -> list[float] | None:
        """One round, stopped and gone on with where the case says so; reference log-probs."""
        self.round, self.losses[index] = index, []
        before = None if index == 1 else self.out / f"policy-{index - 1}"
        self.learner.restore(before)
        found = None
        if self.config.objective.needs.reference:
            data, kept = RoundData(self.table, self.config, index), self.out / f"reference-{index}"
            sequences = data.unscored()
            if self.stop_at is not None and index == 1:
                self.stop_scoring(sequences, kept)
            found = data.scored(self.learner.reference_logps(sequences, kept, never))
        state = self.out / f"trainer-{index}"
        arguments = (self.table, found, index, state, self.on_step, self.check)
        try:
            self.learner.train(*arguments)
        except Interrupted:
            # As a new process would: from the stored policy, then from the checkpoint.
            self.learner = self.make()
            self.learner.restore(before)
            self.learner.train(*arguments)
        self.save(index)
        return None if found is None else found[found.columns[-1]].to_list()

    def stop_scoring(self, sequences: Sequence[TokenPair], kept: Path) -> None:
        """Where the last rank hears of it after its second micro-batch."""
        asked = 0

        def check() -> None:
            nonlocal asked
            asked += 1
            if asked == 2 and self.last_rank:
                raise Interrupted("stopped by the test")

        try:
            self.learner.reference_logps(sequences, kept, check)
        except Interrupted:
            assert asked == 2, "all ranks at the same one"
        else:
            raise AssertionError("the pass went on")

    def save(self, index: int) -> None:
        policy, merged = self.out / f"policy-{index}", self.out / f"merged-{index}"
        if self.group.main:
            policy.mkdir(parents=True)
            merged.mkdir()
        self.group.wait()
        self.learner.save(policy, "A test's policy.\n")
        self.learner.save_merged(merged)
        save_gathered(self.learner.policy, self.out / f"gathered-{index}", self.group)
        self.group.wait()

    def fill_disk(self) -> list[list[str]]:
        """What each rank hears where the first can't write what all gather: a version, and the
        weights of a checkpoint."""
        heard = []

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("the disk is full")

        with pytest.MonkeyPatch.context() as patch:
            if self.group.main:
                patch.setattr("rlhf.weights.save_file", fail)
            saves: list[Callable[[], None]] = [
                lambda: self.learner.save_merged(self.out / "failed"),
                lambda: save_trained(self.learner.policy, self.out / "failed too", self.group),
            ]
            for save in saves:
                try:
                    save()
                except OSError as error:
                    heard.append(str(error))
        return self.group.gather(heard)

    def run(self) -> dict[str, Any]:
        reference = [self.train(index) for index in (1, 2)]
        losses = list(self.losses.values())
        return {
            "losses": losses,
            "norms": self.norms,
            "reference": reference,
            "everywhere": self.group.gather(losses),
            "ways": repr(self.learner.scorer.ways),
            "head": dict(self.head),
            "full_disk": self.fill_disk() if self.stage == 3 else None,
            "splits_others": is_deepspeed_zero3_enabled(),
        }


def attempt(folder: Path, case: dict[str, Any], group: Group) -> dict[str, Any]:
    """What a case found, or every rank's error; the weights that it left are stored as `after`."""
    trial = Case(folder, case, group)
    try:
        return trial.run()
    except NonFiniteError as error:
        errors = group.gather(str(error))
    finally:
        StepLoss.parts = PARTS  # type: ignore[method-assign]
        trial.undo()
    trial.out.mkdir(exist_ok=True)
    save_gathered(trial.learner.policy, trial.out / "after", group)
    return {"errors": errors}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # So that a small model's weights are as split as a large one's.
    sharding.PERSISTENT = 0
    # Five tokens of its vocabulary of 512: several chunks a pass.
    head.CHUNK_BYTES = 5 * 4 * 512
    group = join("cpu").group
    cases = json.loads((folder / "cases.json").read_text())
    found = {case["name"]: attempt(folder, case, group) for case in cases}
    if group.main:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
