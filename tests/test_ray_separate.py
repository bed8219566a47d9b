"""Learner on one node of a Ray cluster, generator and judge on the other: ahead, and without it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from fakes import run_values
from golden_run import (
    assert_same_run,
    finish,
    observed,
    replay,
    start,
    wait_for,
    write_config,
)
from peft import PeftModel
from preloaded import Fork
from ray.cluster_utils import Cluster
from ray_nodes import actors, cluster_of, slowed
from test_reward_model_judge import save_reward_model
from transformers import AutoModelForCausalLM

from launch.cluster_fit import plan_cluster
from launch.ray_run import _seated, alive, joined
from rlhf.config_io import load
from rlhf.logprobs import collate, split_rows, token_logps
from rollout.transfer import adapter_folder

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


def begin(folder: Path, model: Path, reader: dict[str, Any], **rounds: Any) -> tuple[Fork, Path]:
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
    return start(config), run


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
    behind = f"{int(ahead) * 8} of 32 answers are of the policy 1 round before"
    assert behind in summary and behind in (run / "report.html").read_text()


def test_a_generator_that_dies_while_it_draws_ahead_is_made_anew(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, tiny_model, "tiny", placement=PLACEMENT, rounds={"count": 2, "max_staleness": 1}
    )
    run, process = tmp_path / "runs/tiny", start(config)
    with slowed("LearnerActor", run / "rounds/0001/reference_logps.parquet"):
        wait_for(run / "rounds/0002/completions/part-00000.parquet", process)
        (doomed,) = actors("GeneratorActor")
        doomed.kill()
        assert not (run / "rounds/0001/policy").exists(), "the learner still trains"
        wait_for(run / "rounds/0002/completions/part-00002.parquet", process)
        assert not (run / "rounds/0001/policy").exists(), "the new one draws ahead, too"
    status, output = finish(process)
    assert status == 0, output
    assert "generator 0 died and is made anew (1 of 3)" in output
    (ahead,) = re.findall(r"round 2: (\d) of 4 shards drawn ahead", output)
    assert int(ahead) >= 3
    assert sorted(versions(run, 2)) == [0] * int(ahead) + [1] * (4 - int(ahead))
    drawn = pl.read_parquet(run / "rounds/0002/completions/*.parquet")
    assert drawn.select("prompt_id", "sample").n_unique() == drawn.height == 8 * 4


def test_everybody_sits_on_the_node_that_the_plan_says(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    config = load([write_config(tmp_path, tiny_model, "tiny", placement=PLACEMENT)])
    with joined() as found:
        import ray

        layout = plan_cluster(config, found).layout
        nodes = [node["NodeID"] for node in alive()]
        head: Any = cluster.head_node
        assert nodes[0] == head.node_id and len(nodes) == 2
        with _seated(layout) as seats:
            for role, planned in (("learner", 0), ("generator", 1)):
                (seat,) = seats.of[role]  # type: ignore[index]
                where = seat.ask(lambda: ray.get_runtime_context().get_node_id())
                # The head has room for all, and more of it.
                assert ray.get(where, timeout=120) == nodes[planned]


def test_a_node_dies_in_mid_round_and_the_run_makes_the_same_pairs(
    cluster: Cluster,
    one_process: dict[str, Any],
    tiny_model: Path,
    reader: dict[str, Any],
    tmp_path: Path,
) -> None:
    process, run = begin(tmp_path, tiny_model, reader)
    wait_for(run / "rounds/0001/completions/part-00000.parquet", process)
    lost = actors("GeneratorActor") + actors("JudgeActor")
    assert len(lost) == 2
    (doomed,) = cluster.worker_nodes
    cluster.remove_node(doomed, allow_graceful=False)
    # Nobody else ends them.
    _, left = psutil.wait_procs(lost, timeout=120)
    assert not left
    status, output = finish(process)
    assert status == 0, output
    assert "generator 0 died and is made anew" in output, output
    assert "judge reader died and is made anew" in output, output
    assert "learner rank died" not in output
    assert_same_run(observed(run), one_process, within=1e-5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["round"], line["step"]) for line in lines if line["stage"] == "train"]
    assert len(steps) == len(set(steps))


def test_engines_as_actors_serve_an_adapter_though_one_dies_and_judge_with_a_model(
    cluster: Cluster, tiny_model: Path, smollm2: str, tmp_path: Path
) -> None:
    # The test before this one has removed a node.
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    (rules,) = run_values(tmp_path, tiny_model)["judges"]["panel"]
    # "helpfulness" has no standard weight. A model this small abstains.
    judge = {
        "kind": "llm",
        "name": "reader",
        "dimensions": ["helpfulness"],
        "model": smollm2,
        "max_tokens": 96,
        "engine": {"precision": "fp32", "max_length": 2048, "memory_gib": 0.3},
    }
    rollout = {"engine": "vllm", "memory_gib": 0.2, "sync": "adapter", "temperature": 1.0}
    config = write_config(
        tmp_path,
        tiny_model,
        "tiny",
        rollout={**rollout, "samples_per_prompt": 2},
        placement={**PLACEMENT, "generators": 2},
        rounds={"count": 1, "prompts_per_round": 4},
        prompts={n: {"path": f"{tmp_path}/{n}.jsonl", "limit": 3} for n in ("gate", "final")},
        judges={
            "panel": [rules, judge],
            "uncertified": "allow",
            "max_abstention": 0.9,
            "canaries": {"answers": 0},
        },
    )
    run, process = tmp_path / "runs/tiny", start(config)
    wait_for(run / "rounds/0001/policy", process)
    doomed, _ = actors("GeneratorActor")
    wait_for(run / "rounds/0001/evaluation/completions/part-00000.parquet", process)
    doomed.suspend()
    more_to_draw = not (run / "rounds/0001/evaluation/fresh").exists()
    # What it is given anew came to nobody by way of this folder.
    published = [*run.glob("published/version-*")]
    for folder in published:
        shutil.rmtree(folder)
    doomed.kill()
    status, output = finish(process)
    assert status == 0, output
    assert more_to_draw and len(published) == 1, output
    assert re.search(r"generator [01] died and is made anew \(1 of 3\)", output)
    assert "weights adapter" in output
    for version in (0, 1):
        for generator in (0, 1):
            assert f"version {version} to generator {generator}: parity holds" in output
    scores = pl.read_parquet(run / "rounds/0001/scores/*.parquet").filter(judge="reader")
    assert scores.height == 4 * 2 and scores["abstained"].sum() < scores.height
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    policy: Any = PeftModel.from_pretrained(base, str(run / "rounds/0001/policy")).eval()
    found = run / "rounds/0001/evaluation"
    kinds = [pl.read_parquet(found / name / "*.parquet") for name in ("completions", "fresh")]
    drawn = pl.concat(kinds).to_dict(as_series=False)
    assert {*drawn["policy_version"]} == {1}
    answers = list(zip(drawn["prompt_token_ids"], drawn["token_ids"], strict=True))
    batch = collate(answers, 0, "cpu")
    with torch.no_grad():
        served = split_rows(token_logps(policy, batch), batch)
        with policy.disable_adapter():
            start_of_run = split_rows(token_logps(policy, batch), batch)
    gaps, moved = zip(
        *(
            (abs(np.subtract(own, said)).max(), abs(np.subtract(before, said)).max())
            for own, before, said in zip(served, start_of_run, drawn["logps"], strict=True)
        ),
        strict=True,
    )
    assert max(gaps) < 5e-3 < min(moved)
    assert not adapter_folder(run, 0).exists()
