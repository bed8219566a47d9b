"""The loop over ranks: the golden run in every placement, and ranks that are stopped or die."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import polars as pl
import pytest
import yaml
from fakes import run_values
from golden_run import (
    ROOT,
    Running,
    assert_same_run,
    environment,
    finish,
    golden,
    launch,
    observed,
    replay,
    run,
    start_ranks,
    wait_for,
    write_config,
)
from test_reward_model_judge import save_reward_model

from launch.placement import Plan, launched
from launch.ranks import Lead, Met, _alone, join, met, sendable
from launch.shared_judges import SharedBackend, SharedRewardEngine
from launch.spmd import Leading, _check_alike, train, with_launchers_zero
from rlhf.config import RunConfig
from rlhf.config_io import load
from rlhf.config_judges import LlmSpec, RewardModelSpec
from rlhf.errors import InputError, Interrupted
from rlhf.files import read_json
from rlhf.group import Group
from rlhf.types import completions_of
from rollout.judges.panel import build
from rollout.prompts import load_pools

ACCELERATE = ROOT / "configs" / "accelerate"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def accelerate(name: str) -> list[str]:
    file = str(ACCELERATE / f"{name}.yaml")
    return ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]


LAUNCHERS: dict[str, tuple[Callable[[Path], Running], int]] = {
    "plain": (partial(launch, launcher=accelerate("cpu")), 0),
    "zero1": (start_ranks, 1),
    "zero2": (start_ranks, 2),
    "zero3": (partial(launch, launcher=accelerate("zero3")), 0),
    "zero3_offload": (partial(launch, launcher=accelerate("zero3_offload")), 0),
}


# Other processors add up in another order, and Adam makes more of it: wider bounds than below. Of
# the real model 1.5e-4 was seen between AVX2 and AVX-512.
@pytest.mark.engine
def test_one_process_repeats_the_golden_run(one_process: dict[str, Any]) -> None:
    assert_same_run(one_process, golden("tiny"), within=1e-4)


@pytest.mark.engine
def test_a_real_model_repeats_its_golden_run(smollm2: str, tmp_path: Path) -> None:
    assert_same_run(run(tmp_path, smollm2, "smollm2"), golden("smollm2"), within=1e-3)


@pytest.mark.engine
@pytest.mark.parametrize("how", LAUNCHERS)
def test_ranks_repeat_the_run_of_one_process(
    one_process: dict[str, Any], tiny_model: Path, tmp_path: Path, how: str
) -> None:
    begin, zero = LAUNCHERS[how]
    assert_same_run(run(tmp_path, tiny_model, "tiny", begin, zero), one_process, within=1e-5)


@pytest.mark.engine
def test_each_rank_serves_and_judges_with_engines_of_its_own(
    tiny_model: Path, smollm2: str, tmp_path: Path
) -> None:
    engine = {"precision": "fp32", "max_length": 1024}
    reader = {
        "kind": "llm",
        "name": "reader",
        "dimensions": ["helpfulness"],
        "model": smollm2,
        "max_tokens": 96,
        "engine": {**engine, "max_length": 2048, "memory_gib": 0.3},
    }
    liking = {
        "kind": "reward_model",
        "name": "liking",
        "dimensions": ["liking"],
        "model": str(save_reward_model(smollm2, tmp_path / "reward")),
        "engine": engine,
    }
    (rules,) = run_values(tmp_path, tiny_model)["judges"]["panel"]
    config = write_config(
        tmp_path,
        tiny_model,
        "tiny",
        rollout={"engine": "vllm", "memory_gib": 0.2, "samples_per_prompt": 2},
        rounds={"count": 1, "prompts_per_round": 4},
        # Neither has a standard weight, so they change no reward. A model this small abstains.
        judges={
            "panel": [rules, reader, liking],
            "uncertified": "allow",
            "max_abstention": 0.9,
            "canaries": {"answers": 0},
        },
        prompts={n: {"path": f"{tmp_path}/{n}.jsonl", "limit": 3} for n in ("gate", "final")},
    )
    status, output = finish(launch(config, TORCHRUN))
    assert status == 0, output
    assert "whole weights travel through shared memory" in output
    for generator in (0, 1):
        for version in (0, 1):
            assert f"version {version} to generator {generator}: parity holds" in output
    round_1 = tmp_path / "runs/tiny/rounds/0001"
    drawn = pl.read_parquet(round_1 / "completions/*.parquet")
    assert drawn.select("prompt_id", "sample").n_unique() == drawn.height == 4 * 2
    pairs = pl.read_parquet(round_1 / "pairs.parquet")
    for side in ("chosen", "rejected"):
        known = drawn.select("prompt_id", pl.col("sample").alias(f"{side}_sample"), side="text")
        found = pairs.join(known, on=["prompt_id", f"{side}_sample"], validate="1:1")
        assert found[side].to_list() == found["side"].to_list() and found.height == pairs.height > 0
    scores = pl.read_parquet(round_1 / "scores/*.parquet")
    assert scores.filter(judge="reader").height == drawn.height
    assert scores.filter(judge="reader")["abstained"].sum() < drawn.height
    # Each answer has the score that the model gives it, whichever rank it was asked on.
    settings = load([config])
    (judge,) = build(settings.judges.panel[2:], "judges.panel")
    judge.start(None)  # type: ignore[attr-defined]
    pool = load_pools(settings.prompts, settings.run.seed, None).train
    prompts = {prompt.prompt_id: prompt for prompt in pool}
    expected = judge.score([(prompts[c.prompt_id], c) for c in completions_of(drawn)])
    given = scores.filter(judge="liking").select("prompt_id", "sample", "score").rows()
    assert {row[:2]: row[2] for row in given} == {
        (score.prompt_id, score.sample): pytest.approx(score.score, abs=1e-5) for score in expected
    }


@pytest.mark.engine
def test_ranks_stop_together_and_a_dead_one_ends_all_and_nothing_is_lost(
    one_process: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "tiny")
    folder = replay(config, "tiny")
    process = start_ranks(config)
    wait_for(folder / "rounds/0001/trainer/checkpoints/000001", process)
    # One rank hears of it; all of them stop at the same step.
    os.kill(process.pids[1], signal.SIGUSR1)
    status, output = finish(process)
    assert status != 0 and "stopped at a safe point by SIGUSR1" in output, output
    assert read_json(folder / "status.json", "")["state"] == "interrupted"
    assert (folder / "rounds/0001/trainer/checkpoints").is_dir()

    process = start_ranks(config)
    wait_for(folder / "rounds/0001/policy", process)
    os.kill(process.pids[1], signal.SIGKILL)
    began = time.monotonic()
    status, output = finish(process)
    assert status != 0 and time.monotonic() - began < 120
    assert not (folder / "final/evaluation.json").exists()

    status, output = finish(start_ranks(config))
    assert status == 0, output
    assert_same_run(observed(folder), one_process, within=1e-5)


@pytest.mark.engine
def test_what_stops_rank_0_before_the_others_listen_ends_all(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "tiny")
    # Rank 0 alone reads prompts; under ZeRO the others wait for it to make its part of the policy.
    (tmp_path / "train8.jsonl").write_text("no JSON")
    began = time.monotonic()
    status, output = finish(launch(config, accelerate("zero2")))
    assert status != 0 and time.monotonic() - began < 180
    assert "error: prompts.train" in output or "train8.jsonl" in output, output


@pytest.mark.engine
def test_what_stops_rank_0_alone_in_mid_step_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model, "tiny")
    folder = replay(config, "tiny")
    process = start_ranks(config)
    wait_for(folder / "rounds/0001/trainer/checkpoints/000001", process)
    # Rank 0 alone writes metrics; the others go on to the next step, and wait there.
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    began = time.monotonic()
    status, output = finish(process)
    assert status != 0 and time.monotonic() - began < 120
    assert "IsADirectoryError" in output and "another rank ended" in output


# Every rank runs it before anything else.
FALLS = """
import os
if os.environ.get("RANK") == "1":
    from {module} import {kind}
    def fail(self, *given, **more):
        raise OSError(28, "the disk of this rank is full")
    {kind}.{method} = fail
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("module", "kind", "method"),
    [
        # Alone at its share of the prompts, and together with the others in mid-step.
        ("rollout.transformers_generator", "TransformersGenerator", "generate"),
        ("rlhf.sharding", "Replicated", "update"),
    ],
)
def test_what_stops_another_rank_ends_all_with_its_cause(
    module: str,
    kind: str,
    method: str,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    falls = tmp_path / "falls.py"
    falls.write_text(FALLS.format(module=module, kind=kind, method=method))
    config = write_config(tmp_path, tiny_model, "tiny")
    folder = replay(config, "tiny") if method == "update" else tmp_path / "runs/tiny"
    began = time.monotonic()
    status, output = finish(start_ranks(config, falls))
    assert status != 0 and time.monotonic() - began < 180
    cause = output.index("the disk of this rank is full")
    # What the others say of it comes after, and points there.
    assert cause < output.find("another rank ended") or "another rank ended" not in output, output
    assert read_json(folder / "status.json", "")["state"] != "done"


# Something of the interpreter's own end aborts, as a thread that comes back then does.
ABORTS_LATE = """
import atexit, os
class Late:
    def __del__(self):
        os._exit(134)
kept = Late()
register = atexit.register
def first(*given):
    atexit.register = register
    register(*given)
    register(print, "all done")
atexit.register = first
"""


@pytest.mark.parametrize(("variables", "expected"), [({"WORLD_SIZE": "1"}, 0), ({}, 134)])
def test_a_rank_that_has_done_all_does_not_fail_by_its_end(
    variables: dict[str, str], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORTS_LATE)
    known = {name: value for name, value in environment().items() if name != "WORLD_SIZE"}
    path = f"{tmp_path}{os.pathsep}{known['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "launch", "presets"],
        env={**known, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected
    assert expected or done.stdout.endswith("all done\n")


# A GPU's answer to whether autocast is on, where DeepSpeed asks; its own on a CPU is about GPUs.
AUTOCAST = """
import sys
import torch
import torch.distributed as dist
from rlhf.config_learner import Learner, Model
from rlhf.group import Group
from rlhf.policy import Policy
from rlhf.sharding import Zero

asked = torch.is_autocast_enabled
torch.is_autocast_enabled = lambda *device: asked(*device) if device else True
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = Model.model_validate({"path": sys.argv[1], "precision": "bf16"})
policy = Policy(model, sys.argv[1], "cpu", 0)
found = []
policy.model.register_forward_pre_hook(lambda *_: found.append(asked("cpu")))
zero = Zero(policy, Learner(), Group(0, 1, None), 1, False)
with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
    zero.model(input_ids=torch.arange(8).reshape(1, 8))
print(found, flush=True)
"""


@pytest.mark.engine
def test_deepspeed_leaves_the_learners_autocast_on(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AUTOCAST, str(tiny_model)],
        env={**environment(), "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[True]"


def settings(tmp_path: Path, **placement: Any) -> RunConfig:
    return load([write_config(tmp_path, "model", "run", placement=placement)])


def test_a_launcher_makes_it_spmd_unless_the_config_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched(settings(tmp_path))
    assert launched(settings(tmp_path, kind="spmd"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched(settings(tmp_path))
    with pytest.raises(InputError, match=r"placement\.kind is local, but a launcher started 2"):
        launched(settings(tmp_path, kind="local"))


@pytest.mark.parametrize(
    ("zero", "sections", "words"),
    [
        (1, {"model": {"precision": "fp16"}}, "model.precision fp16 does not go with"),
        (2, {"learner": {"optimizer": "adamw_8bit"}}, "learner.optimizer adamw_8bit does not go"),
        (3, {"model": {"tuning": "qlora"}}, "model.tuning qlora does not go with placement.zero 3"),
    ],
)
def test_what_zero_can_not_do_is_refused_before_ranks_meet_or_load(
    zero: int, sections: dict[str, dict[str, Any]], words: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, zero=zero)
    changed = {
        name: getattr(config, name).model_copy(update=values) for name, values in sections.items()
    }
    with pytest.raises(InputError, match=words):
        train(config.model_copy(update=changed))


def test_who_fails_stays_until_it_has_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its process ends, and the others lose it; what all agreed on parts them at once."""
    left: list[str] = []
    monkeypatch.setattr("launch.ranks.join", lambda device: device)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append("left"))
    with pytest.raises(OSError, match="full"), met("cpu"):
        raise OSError("the disk is full")
    assert left == []
    with pytest.raises(Interrupted), met("cpu"):
        raise Interrupted("a signal")
    with met("cpu"):
        pass
    assert left == ["left", "left"]


def test_ranks_whose_machines_read_auto_otherwise_are_refused(tmp_path: Path) -> None:
    """One would scale its loss, the other not, and both would add their gradients."""
    config, plan = settings(tmp_path), Plan("cuda", "vllm", "merged")
    own = (config.model.precision, "vllm", "cuda", "merged")
    for other, refused in ((own, False), (("fp16", *own[1:]), True)):
        group: Any = SimpleNamespace(gather=lambda value, other=other: [value, other])
        with pytest.raises(InputError, match="rank 1: fp16") if refused else nullcontext():
            _check_alike(group, config, plan)


def test_spmd_without_a_launcher_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"RANK is not set: accelerate launch .*torchrun"):
        join("cpu")


class TwoPartError(Exception):
    """Python can't make it again from its words alone."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def test_whatever_a_rank_raises_reaches_rank_0() -> None:
    plain = ValueError("as it was")
    assert sendable(plain) is plain
    unsendable = ValueError("said it")
    unsendable.held = lambda: None  # type: ignore[attr-defined]
    for error in (TwoPartError("said", "it"), unsendable):

        def fail(error: Exception = error) -> None:
            raise error

        answer = _alone(SimpleNamespace(fail=fail), "fail", ())
        sent = pickle.loads(pickle.dumps(answer)).error
        assert "said it" in str(sent) and type(error).__name__ in str(sent)


class TwoRanks:
    """A lead whose other rank has the same model, and answers at once."""

    group = Group(0, 2, None)

    def __init__(self) -> None:
        self.heard = False
        self.calls: list[tuple[str, str, list[Any]]] = []
        self.begun: list[tuple[Any, ...]] = []

    def together(self, *call: Any) -> AbstractContextManager[None]:
        self.begun.append(call)
        return nullcontext()

    def each(self, target: str, own: Any, method: str, arguments: list[Any]) -> list[Any]:
        self.calls.append((target, method, [a and a[0] for a in arguments]))
        return [None if a is None else getattr(own, method)(*a) for a in arguments]


class Doubling:
    """A reward engine whose score is twice a row's only number."""

    beside = False

    def load(self, checkpoint: Any) -> None:
        pass

    def raw(self, rows: Any) -> list[tuple[float, ...]]:
        return [(2.0 * row[0],) for row in rows]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_what_judges_are_asked_is_dealt_to_all_ranks_that_listen_and_comes_back_in_order() -> None:
    lead: Any = TwoRanks()
    spec = RewardModelSpec(kind="reward_model", name="rm", dimensions=["liking"], model="org/m")
    engine = SharedRewardEngine(Doubling(), spec, "judges.panel[1]", lead)
    engine.load(None)  # type: ignore[arg-type]
    rows = [[number] for number in range(5)]
    expected = [(2.0 * number,) for number in range(5)]
    # Before the others listen, rank 0 answers alone.
    assert engine.raw(rows) == expected and lead.calls == []
    lead.heard = True
    assert engine.raw(rows) == expected
    assert engine.raw(rows[:1]) == expected[:1]
    engine.sleep()
    assert lead.calls == [
        ("judges", "reward", [spec, spec]),
        ("judges.panel[1]", "raw", [rows[:2], rows[2:]]),
        ("judges.panel[1]", "raw", [None, rows[:1]]),
        ("judges.panel[1]", "sleep", [(), ()]),
    ]


class Repeating:
    """A language model of one's own that says a call's name."""

    identity: ClassVar[dict[str, str]] = {"model": "org/m"}

    def __init__(self) -> None:
        self.starts = 0

    def ready(self) -> None:
        self.starts += 1

    def ask(self, calls: Any) -> list[str]:
        return [f"to {call}" for call in calls]


def test_what_a_language_model_is_asked_is_dealt_too_once_all_have_started() -> None:
    lead: Any = TwoRanks()
    own: Any = Repeating()
    spec = LlmSpec(kind="llm", name="reader", dimensions=["style"], model="org/m")
    backend = SharedBackend(own, spec, "judges.panel[0]", lead)
    kept: list[tuple[int, Any]] = []
    for _ in range(2):
        calls: Any = ["a", "b", "c"]
        assert backend.ask(calls, lambda index, answer: kept.append((index, answer)))
    assert own.starts == 1 and lead.begun == [("judges", "language", spec, "judges.panel[0]")]
    assert kept == [(0, "to a"), (1, "to b"), (2, "to c")] * 2
    assert lead.calls == [("judges.panel[0]", "ask", [["a"], ["b", "c"]])] * 2


def test_a_reward_models_vllm_engine_is_refused_where_it_would_wait_for_ranks() -> None:
    group = Group(0, 2, None)
    engines = Leading(Lead(Met(group, None))).engines("cpu")
    liking = RewardModelSpec(
        kind="reward_model", name="rm", dimensions=["style"], model="org/m", backend="vllm"
    )
    with pytest.raises(InputError, match="use backend transformers, or placement.kind ray"):
        engines.reward(liking, "judges.panel[1]")


@pytest.mark.parametrize("file", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_file_gives_the_stage_that_it_is_named_after(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load(file.read_text())
    # As `accelerate launch` hands them on.
    if values["distributed_type"] == "DEEPSPEED":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for key, value in values["deepspeed_config"].items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key.upper()}", str(value))
    placement = with_launchers_zero(settings(tmp_path)).placement
    stages = {"zero2": (2, False), "zero3": (3, False), "zero3_offload": (3, True)}
    assert (placement.zero, placement.offload) == stages.get(file.stem, (0, False))
    if placement.zero:
        other = settings(tmp_path, zero=1)
        with pytest.raises(InputError, match="placement.zero is 1, but accelerate's config file"):
            with_launchers_zero(other)
