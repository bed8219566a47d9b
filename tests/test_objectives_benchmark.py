"""The benchmark on real pairs: what is tested trained nothing; labels are the same answers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.objectives_on_real_pairs import RECIPES, config, folds, write

RECORDS = [
    {"prompt": f"question {n % 7}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)
]


def test_every_pair_is_tested_once_by_a_policy_that_never_saw_its_prompt() -> None:
    parts = list(folds(RECORDS, 3))
    tested = [r["chosen"] for _, testing in parts for r in testing]
    assert sorted(tested) == sorted(r["chosen"] for r in RECORDS)
    for training, testing in parts:
        assert len(training) + len(testing) == len(RECORDS)
        assert not {r["prompt"] for r in training} & {r["prompt"] for r in testing}


@pytest.mark.parametrize("objective", RECIPES)
def test_labels_are_the_answers_of_the_pairs_and_fit_their_objective(
    objective: str, tmp_path: Path
) -> None:
    labels = objective == "kto"
    file = write(tmp_path / "fold.jsonl", RECORDS, labels)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(RECORDS) * (2 if labels else 1)
    if labels:
        assert {r["completion"] for r in rows if r["label"]} == {r["chosen"] for r in RECORDS}
        assert {r["completion"] for r in rows if not r["label"]} == {r["rejected"] for r in RECORDS}
    given = Namespace(
        model="org/model", seed=0, max_tokens=64, learning_rate=1e-4, epochs=1, batch_pairs=4
    )
    settings = config(tmp_path, file, objective, given)
    assert settings.objective.needs.data == ("labels" if labels else "pairs")
    assert settings.learner.batch_pairs == (8 if labels else 4)
