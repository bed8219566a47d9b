"""A tensor-parallel generator has the GPUs of all its places, and serves what one process serves.
Ray is real, its GPUs are numbers, and vLLM's CPU build splits the model over two processes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import psutil
import pytest
import torch
from golden_run import environment
from light_actors import BrokenRoles, FewRoles, Worker
from nodes import one_cluster
from ray_forks import forked_workers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from launch.cluster import parse
from launch.layout import ENGINE_SHARE, Layout, options
from launch.placement import Plan
from launch.ray_run import _seated
from launch.roles import Cards, Roles
from rlhf.config import RunConfig
from rlhf.model_files import prompt_encoder
from rlhf.protocols import Loaded, Published, Sampling
from rollout.weight_sync import weights_sha256

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

WIDTH = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    with one_cluster(), forked_workers(), pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        sizes: dict[str, Any] = {"num_cpus": 8, "num_gpus": 3, "object_store_memory": 100 * 2**20}
        ray.init("local", **sizes, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def run_config(folder: Path, model: Path, engine: str, **placement: Any) -> RunConfig:
    rollout = {"engine": engine, "memory_gib": 0.2, "gpu_memory_share": 0.45, "max_concurrency": 8}
    return RunConfig.model_validate(
        fakes.run_values(
            folder, model, rollout=rollout, placement={"kind": "ray", "device": "cpu", **placement}
        )
    )


def layout(config: RunConfig, colocated: bool) -> Layout:
    placement = config.placement.model_copy(
        update={"colocate": colocated, "tensor_parallel": WIDTH, "device": "auto"}
    )
    wanted = config.model_copy(update={"placement": placement})
    cards = WIDTH if colocated else WIDTH + 1
    return next(options(wanted, parse(f"1x{cards}xA100-80GB"), None))[0]


@pytest.mark.parametrize("colocated", [True, False])
def test_an_engine_sees_the_gpus_of_its_places_and_no_other(
    cluster: Any, tmp_path: Path, colocated: bool
) -> None:
    from launch.generator_actors import GeneratorActor, Holder

    class Looking(GeneratorActor):
        def visible(self) -> list[str]:
            return os.environ["CUDA_VISIBLE_DEVICES"].split(",")

        def halve(self) -> None:
            self._generator.concurrency.say("half as many")

    config = run_config(tmp_path, tmp_path, "vllm")
    share = 0.45 if colocated else ENGINE_SHARE
    with _seated(layout(config, colocated)) as seats:
        ranks = [seat.make(Holder) for seat in seats.of["learner"]]
        (seat,) = seats.of["generator"]
        engine = seat.make(Looking, FewRoles(), 64, seat, 0)
        learn = [cluster.get(rank.gpus.remote(), timeout=300) for rank in ranks]
        seen = cluster.get(engine.visible.remote(), timeout=300)
        assert cluster.get(engine.call.remote("cards")) == Cards(WIDTH, share)
        assert len({*seen}) == WIDTH and all(len(gpus) == 1 for gpus in learn)
        every = {gpu for gpus in learn for gpu in gpus}
        assert every == {*seen} if colocated else every.isdisjoint(seen)
        cluster.get(engine.halve.remote())
        news = [cluster.get(engine.call.remote("news")) for _ in range(2)]
        assert news == [["half as many"], []], "the driver hears of it once"
        # Whoever comes in its place finds all of it free again.
        cluster.kill(engine)
        engine = seat.make(Looking, FewRoles(), 64, seat, 0)
        assert cluster.get(engine.visible.remote(), timeout=300) == seen
        for actor in (*ranks, engine):
            cluster.kill(actor)


def test_an_actor_whose_engine_lost_a_worker_counts_as_dead(cluster: Any, tmp_path: Path) -> None:
    from launch.actors import LOST, answered
    from launch.generator_actors import GeneratorActor

    with _seated(layout(run_config(tmp_path, tmp_path, "vllm"), False)) as seats:
        (seat,) = seats.of["generator"]
        for broken, expected in ((False, ValueError), (True, LOST)):
            actor = seat.make(GeneratorActor, BrokenRoles(broken), 64, seat, 0)
            with pytest.raises(expected):
                answered(actor.call.remote("fail"))
            cluster.kill(actor)


def test_a_generator_that_dies_each_time_ends_the_run_clearly(cluster: Any, tmp_path: Path) -> None:
    from launch.actors import TRIES, ActorLostError
    from launch.generator_actors import Generators

    said: list[str] = []
    roles: Any = BrokenRoles(True)
    with _seated(layout(run_config(tmp_path, tmp_path, "vllm"), False)) as seats:
        generators = Generators(seats, roles, 64, said.append)
        with pytest.raises(ActorLostError, match=f"generator 0 died {TRIES + 1} times"):
            generators._ask(0, "fail")
        generators.close()
    assert [line for line in said if "made anew" in line] == [
        f"generator 0 died and is made anew ({again} of {TRIES})" for again in range(1, TRIES + 1)
    ]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        # Who waits for the dead waits for good, and for who failed perhaps.
        (["hang", "die"], "LOST"),
        (["hang", "refuse"], "as asked"),
        (["lose", "refuse"], "as asked"),
        (["lose", "answer"], "another rank ended"),
        (["answer", "hang"], "did not end within 5 s, though none of them died"),
        (["answer", "answer"], None),
    ],
)
def test_calls_that_wait_for_each_other_end_with_the_cause(
    cluster: Any, calls: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import actors

    monkeypatch.setattr(actors, "GRACE_S", 5.0)
    made = [cluster.remote(Worker).options(num_cpus=0).remote() for _ in calls]
    cluster.get([actor.answer.remote() for actor in made])
    asked = [getattr(actor, call).remote() for actor, call in zip(made, calls, strict=True)]
    began = time.monotonic()
    try:
        if expected is None:
            assert actors.all_of(asked, within=300) == [7, 7]
        elif expected == "LOST":
            with pytest.raises(actors.LOST):
                actors.all_of(asked)
        else:
            with pytest.raises(Exception, match=expected):
                actors.all_of(asked, within=5)
        assert time.monotonic() - began < 120
    finally:
        for actor in made:
            cluster.kill(actor)


def versions(folder: Path, model: Path) -> list[Published]:
    """The model, and one that has moved away from it."""
    moved = folder / "moved"
    shutil.copytree(model, moved)
    noise = torch.Generator().manual_seed(1)
    weights = load_file(moved / "model.safetensors")
    other = {n: w + 0.02 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    save_file(other, moved / "model.safetensors", metadata={"format": "pt"})
    return [
        Published(number, path, "merged", weights_sha256(path))
        for number, path in enumerate((model, moved))
    ]


def test_two_processes_serve_what_one_does_through_a_reload(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One core for each of vLLM's two workers.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    config = run_config(tmp_path, tiny_model, "vllm")
    split = Roles(config, Plan("cpu", "vllm", "merged")).generator(64, Cards(WIDTH, 0.0))
    plain = Roles(config, Plan("cpu", "transformers", "merged")).generator(64)
    encode = prompt_encoder(AutoTokenizer.from_pretrained(tiny_model))
    prompts = fakes.prompts_of(encode, ["Hi", "Where is my parcel?", "Refund"])
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        for published in versions(tmp_path, tiny_model):
            assert split.load(published) == Loaded(published.version, published.sha256)
            plain.load(published)
            drawn = split.generate(prompts, Sampling(2, 1.0, 1.0, 8, seed=3))
            assert [(c.prompt_id, c.sample) for c in drawn] == [
                (p.prompt_id, sample) for p in prompts for sample in range(2)
            ]
            expected = plain.logps(drawn)
            assert_close(split.logps(drawn), expected)
            assert_close([c.logps for c in drawn], expected)
        made = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        workers = {p.pid for p in made if "resource_tracker" not in " ".join(p.cmdline())}
        assert len(workers) == WIDTH
    finally:
        split.close()
    ranks = [p for p in made if p.pid in workers]
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []


def assert_close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert list(one) == pytest.approx(list(other), abs=1e-3)
