"""How fast vLLM samples on a CPU, by the size of its cache's blocks.

    python benchmarks/cache_blocks.py [--blocks 64,128,32] [--prompts 16] [--repeats 2] [--json]

Prompts and sampling are the demo's. Two loads: 8 samples of each of so many prompts, as a round
draws them, and one sample of all held-out ones, several of which ask about one passage. Each size
has an engine in a process of its own, taken in turns; medians over the repeats are shown, and how
much faster a size is than 128, which vLLM takes by itself. Before any number is printed, all sizes
must give the same log-probs of the same answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/demo.yaml"
OWN = 128
"""vLLM's own size on a CPU."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine. Tokens sampled a second, and log-probs of the fixed answers in nats."""

    block: int
    samples: float
    held_out: float
    logps: list[list[float]]


def measure(block: int, prompts: int, model: str | None) -> Measured:
    """Start an engine in this process and sample with it."""
    from launch.machines import this_machine
    from launch.placement import place_on, settle
    from launch.roles import Roles
    from rlhf.config_io import load
    from rlhf.model_files import prompt_encoder
    from rlhf.protocols import Published, Sampling
    from rlhf.types import Completion
    from rollout import vllm_engine
    from rollout.prompts import load_pools
    from rollout.weight_sync import weights_sha256

    vllm_engine.CPU_BLOCK = block
    machine = this_machine()
    config = settle(load([CONFIG], [] if model is None else [("model.path", model)]), machine)
    roles = Roles(config, place_on(config, machine))
    pools = load_pools(config.prompts, 0, prompt_encoder(roles.tokenizer))
    generator = roles.generator(max(len(p.token_ids) for p in (*pools.train, *pools.final)))
    rollout, path = config.rollout, Path(roles.path)
    generator.load(Published(0, path, "merged", weights_sha256(path)))

    def rate(asked: Sequence[int], samples: int) -> float:
        given = [(pools.train if samples > 1 else pools.final)[i] for i in asked]
        sampling = Sampling(samples, rollout.temperature, rollout.top_p, rollout.max_new_tokens, 0)
        began = time.perf_counter()
        drawn = generator.generate(given, sampling)
        return sum(len(c.token_ids) for c in drawn) / (time.perf_counter() - began)

    try:
        # The first answers warm up, and are of no prompt that is timed.
        rate(range(prompts, prompts + 2), 2)
        fixed = [
            Completion(p.prompt_id, 0, "", tuple(range(100, 132)), p.token_ids, (), "length", 0)
            for p in pools.final[:4]
        ]
        return Measured(
            block,
            rate(range(prompts), rollout.samples_per_prompt),
            rate(range(len(pools.final)), 1),
            generator.logps(fixed),
        )
    finally:
        generator.close()


def disagreement(found: Sequence[Measured], tolerance: float = 1e-3) -> str | None:
    """Two sizes whose log-probs are further apart than `tolerance`, in nats a token."""
    first = found[0]
    for other in found[1:]:
        gaps = [
            abs(a - b)
            for one, two in zip(first.logps, other.logps, strict=True)
            for a, b in zip(one, two, strict=True)
        ]
        if not statistics.fmean(gaps) <= tolerance:
            return (
                f"blocks of {other.block} are {statistics.fmean(gaps):.4f} nats a token from "
                f"blocks of {first.block}"
            )
    return None


def table(found: Sequence[Measured]) -> list[str]:
    """Medians in tokens a second, and how much faster than vLLM's own size."""
    sizes = list(dict.fromkeys(one.block for one in found))
    middle = {
        size: tuple(
            statistics.median(getattr(one, load) for one in found if one.block == size)
            for load in ("samples", "held_out")
        )
        for size in sizes
    }
    lines = [f"{'block':>5}{'8 samples':>11}{'ratio':>7}{'held out':>10}{'ratio':>7}"]
    for size, (samples, held_out) in middle.items():
        ratios = [a / b for a, b in zip((samples, held_out), middle[OWN], strict=True)]
        lines.append(
            f"{size:>5}{samples:>11.1f}{ratios[0]:>7.2f}{held_out:>10.1f}{ratios[1]:>7.2f}"
        )
    return lines


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", default="64,128,32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", help="instead of the demo's")
    parser.add_argument("--json", action="store_true", help="print what each engine gave instead")
    parser.add_argument("--block", type=int, help="measure this size in this process")
    parser.add_argument("--out", type=Path, help="where to write what was measured")
    given = parser.parse_args()
    if given.block is not None:
        found = measure(given.block, given.prompts, given.model)
        given.out.write_text(json.dumps(asdict(found)))
        return
    sizes = [OWN, *(int(size) for size in given.blocks.split(",") if int(size) != OWN)]
    measured = []
    for _ in range(given.repeats):
        for size in sizes:
            with tempfile.NamedTemporaryFile(suffix=".json") as out:
                command = [sys.executable, __file__, "--block", str(size), "--out", out.name]
                command += ["--prompts", str(given.prompts)]
                command += ["--model", given.model] if given.model else []
                subprocess.run(command, check=True, stdout=sys.stderr, timeout=3600, cwd=ROOT)
                measured.append(Measured(**json.loads(Path(out.name).read_bytes())))
    if why := disagreement(measured):
        sys.exit(f"error: {why}")
    if given.json:
        print(json.dumps([asdict(one) for one in measured]))
    else:
        print("\n".join(table(measured)))


if __name__ == "__main__":
    main()
