"""Learner on one node of a Ray cluster, generator and judge on the other: ahead, and without it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fakes import run_values
from golden_run import finish, golden, observed, replay, start, wait_for, write_config
from ray.cluster_utils import Cluster
from ray_nodes import actors, cluster_of
from test_reward_model_judge import save_reward_model

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

PLACEMENT = {"kind": "ray", "colocate": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head has room for what the other node held."""
    with cluster_of(4, 2) as found:
        yield found


@pytest.fixture(scope="module")
def reader(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reward model whose scores are kept and change no pair."""
    model = save_reward_model(smollm2, tmp_path_factory.mktemp("reward") / "model")
    engine = {"precision": "fp32", "max_length": 512}
    return {
        "kind": "reward_model",
        "name": "reader",
        "dimensions": ["liking"],
        "model": str(model),
        "engine": engine,
    }


def begin(
    folder: Path, model: Path, reader: dict[str, Any], **rounds: Any
) -> tuple[subprocess.Popen[str], Path]:
    (rules,) = run_values(folder, model)["judges"]["panel"]
    # "liking" has no standard weight, so it changes no reward.
    judges = {"panel": [rules, reader], "uncertified": "allow"}
    config = write_config(
        folder,
        model,
        "tiny",
        placement=PLACEMENT,
        judges=judges,
        rounds={"count": 2, **rounds},
    )
    run = folder / "runs/tiny" if rounds else replay(config, "tiny")
    return start(config, []), run


def versions(run: Path, index: int) -> list[int]:
    """Of each of a round's shards."""
    parts = sorted((run / f"rounds/{index:04d}/completions").iterdir())
    found = [pl.read_parquet(part)["policy_version"].unique().to_list() for part in parts]
    assert all(len(one) == 1 for one in found)
    return [one for (one,) in found]


def test_the_next_round_is_begun_while_the_learner_trains_though_the_judge_dies(
    cluster: Cluster, tiny_model: Path, reader: dict[str, Any], tmp_path: Path
) -> None:
    process, run = begin(tmp_path, tiny_model, reader, max_staleness=1)
    wait_for(run / "rounds/0001/scores/part-00000.parquet", process)
    (judge,) = actors("JudgeActor")
    judge.send_signal(signal.SIGKILL)
    status, output = finish(process)
    assert status == 0, output
    assert "judge reader died and is made anew (1 of 3)" in output
    (ahead,) = re.findall(r"round 2: (\d) of 4 shards drawn ahead", output)
    assert int(ahead) >= 1
    assert versions(run, 1) == [0, 0, 0, 0]
    assert sorted(versions(run, 2)) == [0] * int(ahead) + [1] * (4 - int(ahead))
    scores = pl.read_parquet(run / "rounds/0001/scores/*.parquet")
    assert scores.filter(pl.col("judge") == "reader")["abstained"].sum() == 0
    summary = (run / "summary.md").read_text()
    assert f"{int(ahead) * 8} of 32 answers are of the policy 1 round before" in summary


def test_a_node_dies_in_mid_round_and_the_run_makes_the_same_pairs(
    cluster: Cluster, tiny_model: Path, reader: dict[str, Any], tmp_path: Path
) -> None:
    process, run = begin(tmp_path, tiny_model, reader)
    wait_for(run / "rounds/0001/completions/part-00000.parquet", process)
    (doomed,) = cluster.worker_nodes
    lost = actors("GeneratorActor") + actors("JudgeActor")
    assert len(lost) == 2
    cluster.remove_node(doomed, allow_graceful=False)
    # What runs on a machine goes with it.
    for actor in lost:
        actor.kill()
    status, output = finish(process)
    assert status == 0, output
    assert "generator 0 died and is made anew" in output, output
    assert "judge reader died and is made anew" in output, output
    found, expected = observed(run), golden("tiny")
    for index in ("1", "2"):
        assert found[index]["pairs"] == expected[index]["pairs"]
        assert found[index]["losses"] == pytest.approx(expected[index]["losses"], abs=1e-4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["round"], line["step"]) for line in lines if line["stage"] == "train"]
    assert len(steps) == len(set(steps))
