"""A round's data, and the pass over all of it for reference log-probs: a stop costs the micro-batch
at hand, and changes no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fakes import referenced
from small_models import save_small_model
from test_learner import config_for, make_learner, make_pairs
from test_learner_objectives import make_labels

from rlhf import kept
from rlhf.errors import Interrupted
from rlhf.learner import Learner
from rlhf.packing import TokenPair
from rlhf.policy import Policy
from rlhf.round_data import RoundData, reference_logps
from rlhf.rounds import Round

TABLES = {
    name: table.with_columns(cluster=pl.col("prompt_id"))
    for name, table in (("dpo", make_pairs(24)), ("kto", make_labels(24)))
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small") / "model", layers=1)


def learner_for(model: Path, name: str, tuning: str = "lora") -> Learner:
    learner = {"validation_share": 0.3, "batch_pairs": 3, "micro_batch_tokens": 25}
    objective = {"name": name}
    return make_learner(
        config_for(model, objective=objective, learner=learner, model={"tuning": tuning})
    )


class Asked:
    """Counts micro-batches by the questions that follow them; asks to stop after `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.count = 0
        self.last = last

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.last:
            raise Interrupted("as asked")


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", [*TABLES])
def test_a_stop_costs_no_micro_batch_and_changes_no_bit(
    name: str, tuning: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "EACH", 3)
    table = TABLES[name]
    learner = learner_for(model, name, tuning)
    data, whole = RoundData(table, learner.config, 1), referenced(learner, table, 1)
    everything = Asked()
    learner.reference_logps(data.unscored(), tmp_path / "unused", everything)
    assert everything.count > 6
    again, loads = learner_for(model, name, tuning), 0
    load = Policy._load_start

    def counted(policy: Policy) -> Any:
        nonlocal loads
        loads += 1
        return load(policy)

    monkeypatch.setattr(Policy, "_load_start", counted)
    round = Round(tmp_path / "0001", 1, {})
    asked = Asked(last=5)
    with pytest.raises(Interrupted, match="as asked"):
        reference_logps(round, data, learner, asked)
    assert not round.done("reference_logps")
    parts = sorted((round.path / "reference").iterdir())
    assert [pl.read_parquet(part).height > 0 for part in parts] == [True, True]
    # As a new process would.
    anew, rest = Round(round.path, 1, {}), Asked()
    found = reference_logps(anew, data, again, rest)
    assert asked.count + rest.count == everything.count
    assert loads == (2 if tuning == "full" else 0), "once a call"
    assert found.equals(whole) and whole.height
    # Once it is there it is read, and nothing else is left.
    silent = Asked()
    assert reference_logps(anew, data, learner, silent).equals(whole) and silent.count == 0
    assert {p.name for p in round.path.iterdir()} == {"manifest.json", "reference_logps.parquet"}


def test_a_death_costs_what_came_after_the_last_file_and_other_data_takes_nothing_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "EACH", 3)
    learner = learner_for(model, "dpo")
    sequences = RoundData(TABLES["dpo"], learner.config, 1).unscored()
    count = 0

    def die() -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.reference_logps(sequences, tmp_path, die)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]
    whole, rest = Asked(), Asked()
    expected = learner.reference_logps(sequences, tmp_path / "whole", whole)
    # Another prompt in front: its answer is another sequence, and so is nothing that was known.
    others: list[TokenPair] = [([7, *prompt], answer) for prompt, answer in sequences]
    fresh = learner.reference_logps(others, tmp_path / "others", Asked())
    assert learner.reference_logps(others, tmp_path, Asked()) == fresh
    assert learner.reference_logps(sequences, tmp_path, rest) == expected
    assert rest.count == whole.count - 3


class Scripted:
    """A learner whose reference says -(sum of all ids) / 7."""

    def reference_logps(
        self, sequences: Sequence[TokenPair], state: Path, check: Callable[[], None]
    ) -> list[float]:
        return [-(sum(prompt) + sum(answer)) / 7 for prompt, answer in sequences]


def test_what_a_kill_left_behind_is_removed(model: Path, tmp_path: Path) -> None:
    learner: Any = Scripted()
    data = RoundData(TABLES["dpo"], learner_for(model, "dpo").config, 1)
    round = Round(tmp_path / "0001", 1, {})
    found = reference_logps(round, data, learner, Asked())
    left = round.path / "reference"
    left.mkdir()
    (left / "part-00000.parquet").write_bytes(b"")
    assert reference_logps(round, data, learner, Asked()).equals(found) and not left.exists()


def test_what_is_held_out_is_scored_and_is_no_step(model: Path, tmp_path: Path) -> None:
    table, config = TABLES["dpo"], learner_for(model, "dpo").config
    data = RoundData(table, config, 1)
    unscored = data.unscored()
    assert len(unscored) == len({(tuple(p), tuple(a)) for p, a in unscored})
    reference = data.scored(Scripted().reference_logps(unscored, tmp_path, Asked()))
    steps, held = data.steps(reference)
    assert held is not None and held.examples
    trained = sum(len(step.examples) for step in steps)
    assert trained + len(held.examples) == reference.height == table.height
    assert data.planned == len(steps)
    for example in held.examples:
        prompt, chosen = example.sequences[0]
        assert example.reference_chosen == -(sum(prompt) + sum(chosen)) / 7  # type: ignore[union-attr]
    alone = {"validation_share": 0.0}
    whole = config.model_copy(update={"learner": config.learner.model_copy(update=alone)})
    assert RoundData(table, whole, 1).steps(None)[1] is None
