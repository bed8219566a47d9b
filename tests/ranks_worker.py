"""One of the ranks that `test_ranks.py` starts: trains small policies together with the others.

Arguments: the folder with `cases.json`; writes what rank 0 found to `found.json` there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from launch.ranks import join
from rlhf import sharding
from rlhf.checkpoint import save_trained
from rlhf.config import RunConfig
from rlhf.config_offline import Trains
from rlhf.errors import Interrupted, NonFiniteError
from rlhf.group import Group
from rlhf.learner import Learner
from rlhf.partition import WHOLE, Split
from rlhf.policy import Policy
from rlhf.sharding import Replicated, Sharding, Zero


def make_learner(config: RunConfig, group: Group, stage: int) -> Learner:
    def shard(policy: Policy, config: Trains) -> Sharding:
        if stage == 0:
            return Replicated(policy, config.learner, config.model.precision, group)
        return Zero(policy, config.learner, group, stage, offload=False)

    partition = Split() if stage == 3 else WHOLE
    policy = Policy(config.model, config.model.path, "cpu", config.run.seed, partition)
    return Learner(policy, config, shard=shard)


class Case:
    """Two rounds of training, the second from the first's stored policy."""

    def __init__(self, folder: Path, case: dict[str, Any], group: Group) -> None:
        self.group = group
        self.stage = case["stage"]
        self.config = RunConfig.model_validate(case["config"])
        self.table = pl.read_parquet(folder / case["table"])
        self.out = folder / case["name"]
        self.stop_at, self.nan_at = case.get("stop_at"), case.get("nan_at")
        self.losses: dict[int, list[float]] = {}
        self.norms: list[float] = []
        self.round = 0
        self.learner = make_learner(self.config, group, self.stage)

    @property
    def last_rank(self) -> bool:
        return self.group.rank == self.group.world - 1

    def on_step(self, step: int, values: dict[str, float]) -> None:
        self.losses[self.round].append(values["loss"])
        self.norms.append(values["grad_norm"])
        if self.nan_at == [self.round, step] and self.last_rank:
            _, parameter = self.learner.policy.trainable()[0]
            parameter.register_hook(lambda gradient: gradient * float("nan"))

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
            found = self.learner.reference_logps(self.table, index)
        state = self.out / f"trainer-{index}"
        arguments = (self.table, found, index, state, self.on_step, self.check)
        try:
            self.learner.train(*arguments)
        except Interrupted:
            # As a new process would: from the stored policy, then from the checkpoint.
            self.learner = make_learner(self.config, self.group, self.stage)
            self.learner.restore(before)
            self.learner.train(*arguments)
        self.save(index)
        return None if found is None else found[found.columns[-1]].to_list()

    def save(self, index: int) -> None:
        policy, merged = self.out / f"policy-{index}", self.out / f"merged-{index}"
        if self.group.main:
            policy.mkdir(parents=True)
            merged.mkdir()
        self.group.wait()
        self.learner.save(policy, "A test's policy.\n")
        self.learner.save_merged(merged)
        # Weight by weight, by other code than what was saved above.
        save_trained(self.learner.policy, self.out / f"gathered-{index}.safetensors", self.group)
        self.group.wait()

    def run(self) -> dict[str, Any]:
        reference = [self.train(index) for index in (1, 2)]
        losses = list(self.losses.values())
        return {
            "losses": losses,
            "norms": self.norms,
            "reference": reference,
            "everywhere": self.group.gather(losses),
            "ways": repr(self.learner.scorer.ways),
            "splits_others": is_deepspeed_zero3_enabled(),
        }


def attempt(folder: Path, case: dict[str, Any], group: Group) -> dict[str, Any]:
    """What a case found, or every rank's error; the weights that it left are stored as `after`."""
    trial = Case(folder, case, group)
    try:
        return trial.run()
    except NonFiniteError as error:
        errors = group.gather(str(error))
    trial.out.mkdir(exist_ok=True)
    save_trained(trial.learner.policy, trial.out / "after.safetensors", group)
    return {"errors": errors}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # So that a small model's weights are as split as a large one's.
    sharding.PERSISTENT = 0
    group = join("cpu").group
    cases = json.loads((folder / "cases.json").read_text())
    found = {case["name"]: attempt(folder, case, group) for case in cases}
    if group.main:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
