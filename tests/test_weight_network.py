"""Weights are sent to vLLM's workers by vLLM's own weight transfer, over gloo where there are no
GPUs: two engines and two learner ranks, whose weights ZeRO-3 splits, in actors of a real Ray."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakes
import psutil
import pytest
import torch
from golden_run import environment
from nodes import one_cluster
from placements import LORA, at, planned, preset, sizes
from ray_forks import forked_workers
from ray_nodes import actors
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch import weight_network
from launch.cluster import Cluster
from launch.cluster_fit import plan_cluster
from launch.machines import this_machine
from launch.placement import Plan, place
from launch.ray_run import _seated
from launch.roles import Cards, Roles
from rlhf.config import RunConfig
from rlhf.errors import InputError, ParityError
from rlhf.learner import Learner
from rlhf.model_files import prompt_encoder
from rlhf.policy import Policy
from rlhf.protocols import Loaded, Published, Sampling
from rlhf.weights import Digest, stored_digest
from rollout.transfer import Coming, Meeting
from rollout.vllm_generator import VllmGenerator
from rollout.weight_sync import Serving

PLAN = Plan("cpu", "vllm", "merged")


def run_config(folder: Path, model: Path) -> RunConfig:
    """Two learner ranks, two generators, whole weights."""
    values = fakes.run_values(
        folder,
        model,
        rollout={"engine": "vllm", "memory_gib": 0.2, "transfer": "network"},
        placement={"kind": "ray", "colocate": False, "zero": 3, "generators": 2},
    )
    values["model"]["tuning"] = "full"
    return RunConfig.model_validate(values)


def moved(source: Path, folder: Path, seed: int) -> Path:
    """The policy at `source`, moved away from it."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    noise = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    other = {n: w + 0.02 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def children() -> set[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return {p for p in found if "resource_tracker" not in " ".join(p.cmdline())}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def digest(weights: list[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> str:
    found = Digest(dtype)
    for name, weight in weights:
        found.add(name, weight)
    return found.hexdigest()


def test_a_digest_tells_whole_weights_apart_and_not_how_they_lie() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(6, 5, generator=draw), torch.randn(6, generator=draw)
    weights = [("matrix", matrix), ("vector", vector), ("step", torch.tensor(3))]
    same = digest(weights)
    assert digest(weights[::-1]) == same
    assert digest([("matrix", matrix.T.contiguous().T), *weights[1:]]) == same
    half = [(name, weight.to(torch.bfloat16)) for name, weight in weights[:2]]
    assert digest(half, torch.bfloat16) == digest(weights[:2], torch.bfloat16)
    # What is too small for a half is 0, of whichever sign, and a merge adds 0 to it.
    tiny = torch.tensor([[1e-9, -1e-9], [-0.0, 1.0]])
    assert digest([("w", tiny)], torch.float16) == digest([("w", tiny.half() + 0)], torch.float16)
    assert digest(weights[:2], torch.bfloat16) != digest(weights[:2])

    def changed(where: Callable[[Tensor], None]) -> list[tuple[str, Tensor]]:
        other = matrix.clone()
        where(other)
        return [("matrix", other), *weights[1:]]

    def in_a_row(other: Tensor) -> None:
        other[2, [0, 3]] = other[2, [3, 0]]

    def in_a_column(other: Tensor) -> None:
        other[[0, 3], 2] = other[[3, 0], 2]

    def rows(other: Tensor) -> None:
        other[[0, 3]] = other[[3, 0]]

    def bit(other: Tensor) -> None:
        other.view(torch.int32)[4, 4] ^= 1

    other = [
        *(changed(how) for how in (in_a_row, in_a_column, rows, bit)),
        [("matrix", matrix.reshape(5, 6)), *weights[1:]],
        [("matrix", matrix), ("vector", vector.flip(0)), weights[2]],
        [("vector", vector), ("matrix2", matrix), weights[2]],
        weights[:2],
    ]
    assert same not in {digest(weights) for weights in other}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"model": {"tuning": "lora"}}, "full or model.lora.rounds new.* got tuning lora"),
        ({"rollout": {"engine": "transformers"}}, "and engine transformers"),
        ({"rollout": {"sync": "adapter"}, "model": {"tuning": "lora"}}, "sync adapter"),
    ],
)
def test_the_network_is_refused_where_there_is_no_whole_model_or_no_vllm(
    tmp_path: Path, changes: dict[str, dict[str, Any]], shown: str
) -> None:
    values = run_config(tmp_path, tmp_path).model_dump(mode="json")
    for section, settings in changes.items():
        values[section] |= settings
    with pytest.raises(InputError, match=rf"rollout\.transfer network .*{shown}"):
        place(RunConfig.model_validate(values), True, True, (9, 0))


@pytest.mark.parametrize("placement", [{"kind": "local"}, {"kind": "ray", "colocate": True}])
def test_the_network_is_refused_where_engines_have_no_place_of_their_own(
    tmp_path: Path, placement: dict[str, Any]
) -> None:
    values = run_config(tmp_path, tmp_path).model_dump(mode="json")
    values["placement"] = placement
    with pytest.raises(ValueError, match=r"rollout\.transfer network .* colocate false, got kind"):
        RunConfig.model_validate(values)


WAITING = """
import multiprocessing, os, signal
from rollout.vllm_compat import end_with_parent

def wait():
    end_with_parent()
    print(os.getpid(), flush=True)
    signal.pause()

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=wait)
    child.start()
    child.join()
"""


@pytest.mark.slow
def test_a_worker_that_waits_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=60)
    assert alive == []


class Asked:
    """Learners and generators that only say what they were asked."""

    device = "cpu"

    def __init__(self, workers: list[int]) -> None:
        self.workers = workers
        self.coming: list[Coming] = []

    def described(self) -> dict[str, Any]:
        return {"names": ["w"]}

    def address(self) -> tuple[str, int]:
        return "there", 5

    def send(self, meeting: Meeting) -> list[str]:
        return ["digest", "digest"]

    def receiving(self, version: int, stored: Path, coming: list[Coming]) -> list[str]:
        self.coming += coming
        return ["word"] * len(coming)


def test_every_worker_of_every_generator_has_a_rank_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_network, "all_of", lambda references, within: references)
    both: Any = Asked([2, 1, 3])
    sent, said = weight_network.transfer(both, both, 4, Path())
    assert (sent, len(said)) == ("digest", 3)
    assert [coming.first for coming in both.coming] == [1, 3, 4]
    assert {coming.meeting for coming in both.coming} == {Meeting("there", 5, 7, "cpu")}


def test_messages_are_planned_for_on_both_ends() -> None:
    config = preset(
        LORA,
        model={"tuning": "full"},
        placement={"kind": "ray", "colocate": False, "generators": 2, "zero": 3},
        rollout={"transfer": "network"},
    )
    found = planned(config, "1x8xH100-80GB")
    # 256 MiB, and the embedding beyond: 128,256 words of 4,096 numbers of 2 bytes.
    message = 256 * 2**20 + 2 * 128_256 * 4_096
    assert sizes(at(found, gpu=0))["publish", "messages to send"] == 4 * message
    assert ("publish", "messages to send") not in sizes(at(found, gpu=1))
    assert sizes(at(found, gpu=7))["generator", "messages received"] == 2 * message
    ordinary = planned(config.model_copy(update={"rollout": preset(LORA).rollout}), "1x8xH100-80GB")
    assert not [what for _, what in sizes(at(ordinary, gpu=7)) if "messages" in what]


@pytest.mark.engine
@pytest.mark.parametrize("width", [1, 2])
def test_what_an_engine_received_is_what_was_sent_and_what_a_new_one_reads(
    tiny_model: Path, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends in one process: the sender in a thread, and workers as its children if there are
    several."""
    from rollout.vllm_transfer import described, send

    if width > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    config = run_config(tmp_path, tiny_model)
    policy = Policy(config.model, str(tiny_model), "cpu", 0)
    (tmp_path / "start").mkdir()
    policy.save(tmp_path / "start", "card")
    generator = Roles(config, PLAN).generator(64, Cards(width, 0.0))
    assert isinstance(generator, VllmGenerator)
    prompts = fakes.prompts_of(prompt_encoder(policy.tokenizer), ["Hi", "Where is my parcel?"])
    learner = Learner(policy, config)
    others = children()
    try:
        start = tmp_path / "start"
        stored = stored_digest(start, torch.float32)
        loaded = generator.load(Published(0, start, "stored", stored))
        assert loaded.sha256 == stored
        drawn = generator.generate(prompts, Sampling(2, 1.0, 1.0, 8, seed=3))
        before = learner.logps(drawn)
        assert_close(generator.logps(drawn), before)
        for version in (1, 2):
            folder = moved(start, tmp_path / f"version-{version}", version)
            policy.restore(folder)
            meeting = Meeting("127.0.0.1", free_port(), 1 + width, "cpu")
            with ThreadPoolExecutor(1) as beside:
                sent = beside.submit(send, policy, 0, meeting)
                said = generator.take(version, folder, Coming(meeting, 1, described(policy)))
                assert said == Loaded(version, sent.result(timeout=60))
            assert said.sha256 == stored_digest(folder, torch.float32)
            after = learner.logps(drawn)
            assert_close(generator.logps(drawn), after)
            assert max(abs(a - b) for a, b in zip(after[0], before[0], strict=True)) > 0.01
        # An engine that is started anew reads what the old one was sent.
        generator._engine._restart()
        generator._check_restarted()
        assert_close(generator.logps(drawn), after)
        (folder / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes())
        with pytest.raises(ParityError, match="has changed since it was loaded"):
            generator._check_restarted()
        if width > 1:
            assert not generator.broken
            workers = children() - others
            assert len(workers) == width
            workers.pop().kill()
            with pytest.raises(Exception, match=r".*"):
                generator.logps(drawn)
            assert generator.broken
    finally:
        generator.close()


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray

    with one_cluster(), forked_workers(), pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        sizes: dict[str, Any] = {"num_cpus": 8, "object_store_memory": 100 * 2**20}
        ray.init("local", **sizes, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.mark.engine
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("victim", ["GeneratorActor", "LearnerActor"])
def test_split_weights_reach_every_generator_though_somebody_dies_on_the_way(
    cluster: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    from launch.actors import all_of
    from launch.generator_actors import Generators
    from launch.learner_actors import Learners

    config = run_config(tmp_path, tiny_model)
    roles = Roles(config, PLAN)
    said: list[str] = []
    logged: list[dict[str, Any]] = []
    layout = plan_cluster(config, Cluster("four nodes", (this_machine(),) * 4)).layout
    with _seated(layout) as seats:
        assert [len(seats.of[role]) for role in ("learner", "generator")] == [2, 2]
        learners = Learners(seats, roles, said.append)
        prompts = fakes.prompts_of(prompt_encoder(roles.tokenizer), ["Hi", "Refund", "Where?"])
        serving = Serving(
            lambda: Generators(seats, roles, 64, said.append),
            learners,
            "merged",
            tmp_path / "published",
            prompts,
            logged.append,
        )
        try:
            serving.at(0, None)
            start = tmp_path / "start"
            start.mkdir()
            learners.save(start, "card")
            serving.at(1, moved(start, tmp_path / "version-1", 1))
            assert not list((tmp_path / "published").iterdir()), "nothing is written any more"
            first = {actor.pid for actor in actors("GeneratorActor")}
            ranks = {actor.pid for actor in actors("LearnerActor")}
            assert len(first) == len(ranks) == 2 and not said

            def kill_first(references: Any, within: float) -> Any:
                # Nobody can be done yet: one of those who receive was stopped before.
                actors(victim)[0].send_signal(signal.SIGKILL)
                if victim == "LearnerActor":
                    stopped.send_signal(signal.SIGCONT)
                return all_of(references, within)

            stopped = actors("GeneratorActor")[0]
            stopped.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(weight_network, "all_of", kill_first)
            serving.at(2, moved(start, tmp_path / "version-2", 2))
            assert len(said) == 1 and "version 2 was lost on its way" in said[0]
            second = {actor.pid for actor in actors("GeneratorActor")}
            assert len(second) == 2 and second.isdisjoint(first)
            # A rank may wait in the broadcast for good.
            assert ranks.isdisjoint({actor.pid for actor in actors("LearnerActor")})

            monkeypatch.undo()
            serving.at(3, moved(start, tmp_path / "version-3", 3))
            assert {actor.pid for actor in actors("GeneratorActor")} == second
            # One that is made anew later reads what was sent.
            psutil.Process(second.pop()).kill()
            generator = serving.at(3, tmp_path / "version-3")
            assert len({str(rows) for rows in generator.all_logps(serving._probes)}) == 1  # type: ignore[attr-defined]
            assert len(said) == 2 and "died and is made anew" in said[1]
        finally:
            serving.close()
            learners.close()
    assert [(entry["version"], entry["generator"]) for entry in logged] == [
        (version, generator) for version in range(4) for generator in range(2)
    ]
    assert {entry["verdict"] for entry in logged} == {"pass"}
    assert all(abs(entry["slope"] - 1) < 0.05 for entry in logged[2:])


def assert_close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert list(one) == pytest.approx(list(other), abs=1e-3)
