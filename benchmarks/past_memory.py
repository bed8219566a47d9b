"""Past one machine's memory: `pairs select` and `pairs dedupe`, plain and with `--ray`.

    python benchmarks/past_memory.py [select] [dedupe] [--completions 1000000] [--records 200000]

Data of the kinds of benchmarks/selection.py (8 completions a prompt, four dimensions) and
benchmarks/duplicates.py (prompts with planted near-duplicates), in many files. Under Ray the object
store is held to `--store-mib`, so what is larger spills. Files must be the same to the byte before
a number is printed. Memory is what a process has for itself (resident less shared), at its peak, by
ten looks a second: of the command, and with Ray also of the largest worker and of all workers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import duplicates
import psutil
import selection

PARTS = 64
CONFIG = """
run: {name: again}
model: {path: none}
prompts: {train: {path: a.jsonl}, gate: {path: b.jsonl}, final: {path: c.jsonl}}
judges:
  panel:
    - name: house
      function: "verifiers:verify"
      dimensions: [correctness, groundedness, problem_solution, style]
selection: {strategy: all_pairs}
"""
COMMANDS = {
    "select": (("run.yaml", "round"), "{}/pairs.parquet"),
    "dedupe": (("pool",), "{}.parquet"),
}
"""Their arguments, and what they write in or as `{}`."""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Taken:
    """What a command took: seconds, and peak memory in bytes of itself and of Ray's workers."""

    seconds: float
    command: int
    worker: int
    workers: int


def own(process: psutil.Process) -> int:
    """Memory that a process has for itself; 0 once it is gone."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return max(0, int(memory.rss - memory.shared))


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one of Ray's workers."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and (words[0].startswith("ray::") or "default_worker.py" in " ".join(words))


def run(folder: Path, words: list[str], store: int) -> Taken:
    """Run `pairloop pairs` and watch its memory."""
    root = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(store),
    }
    started = time.perf_counter()
    command = subprocess.Popen(
        [sys.executable, "-m", "launch", "pairs", *words], cwd=folder, env=environment
    )
    seen = psutil.Process(command.pid)
    peak = Taken(0.0, 0, 0, 0)
    while command.poll() is None:
        try:
            workers = [own(p) for p in seen.children(recursive=True) if is_worker(p)]
        except psutil.Error:
            workers = []
        peak = Taken(
            time.perf_counter() - started,
            max(peak.command, own(seen)),
            max(peak.worker, *workers, 0),
            max(peak.workers, sum(workers)),
        )
        time.sleep(0.1)
    assert command.returncode == 0, f"{words} ended with {command.returncode}"
    return peak


def write_pool(folder: Path, count: int) -> None:
    """Prompts as Parquet files."""
    texts, _ = duplicates.prompts(count)
    table = texts.alias("prompt").to_frame()
    folder.mkdir()
    size = -(-count // PARTS)
    for number in range(PARTS):
        part = table[number * size : (number + 1) * size]
        part.write_parquet(folder / f"part-{number:05d}.parquet")


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def show(name: str, taken: Taken) -> None:
    """Print a line."""
    mib = [f"{value / _MIB:>8.0f}" if value else f"{'':>8}" for value in
           (taken.command, taken.worker, taken.workers)]  # fmt: skip
    print(f"{name:<16} {taken.seconds:>8.1f} {' '.join(mib)}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--store-mib", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "run.yaml").write_text(CONFIG)
        (folder / "round").mkdir()
        selection._BLOCK_PROMPTS = -(-options.completions // (selection.SAMPLES * PARTS))
        selection.write_data(folder / "round", options.completions)
        write_pool(folder / "pool", options.records)
        print(
            f"{options.completions} completions ({size_of(folder / 'round') / _MIB:.0f} MiB of "
            f"files), {options.records} records ({size_of(folder / 'pool') / _MIB:.0f} MiB)"
        )
        print("                  seconds  command   worker  workers   (peak memory, MiB)")
        for name in options.commands:
            words, written = COMMANDS[name]
            outs = [f"{name}-{way}" + ("" if name == "select" else ".parquet")
                    for way in ("plain", "ray")]  # fmt: skip
            plain = run(folder, [name, *words, outs[0]], options.store_mib * _MIB)
            ray = run(folder, [name, *words, outs[1], "--ray"], options.store_mib * _MIB)
            one, other = (folder / written.format(f"{name}-{way}") for way in ("plain", "ray"))
            assert one.read_bytes() == other.read_bytes(), f"{name} gave something else under Ray"
            show(name, plain)
            show(f"{name} --ray", ray)


if __name__ == "__main__":
    main()
