"""What each of two ranks takes to load a model, whole or split while it loads (ZeRO-3).

    python benchmarks/zero_loading.py [--json]

A random Llama of 40 million weights, 152 MiB in fp32, is stored in bf16 and loaded as the learner
does: in fp32 to be trained whole, in bf16 as a frozen base. Memory is anonymous (`RssAnon`), beyond
what the process held before, and looked at every half millisecond: the pages of the checkpoint,
which is mapped, belong to the host's cache (so a base that rests as it is stored takes none where
it is whole). The pass of a start (`rlhf.partition.Split.computing`) is made too. glibc is told to
give back what is freed, which of tensors under 32 MiB it would keep.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RANKS = 2
MIB = 2**20
LLAMA: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144"}


@dataclass(frozen=True, slots=True)
class Case:
    """How it is loaded."""

    split: bool
    precision: str


CASES = tuple(Case(split, precision) for precision in ("fp32", "bf16") for split in (False, True))


@dataclass(frozen=True, slots=True)
class Loaded:
    """Bytes of one rank."""

    peak: int
    """While loading and in the pass after it."""
    held: int
    """Tensors of the weights, each storage once."""
    dtype: str
    logits: float
    """Of one token: a sum that is the same however the model lies."""


def measure(cases: Sequence[Case]) -> list[list[Loaded]]:
    """Load each case on two fresh ranks; what each rank took for each.

    Raises CalledProcessError (its output is on standard error) or TimeoutExpired.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _store(folder / "model")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={RANKS}", str(Path(__file__).resolve())),
            *("--cases", json.dumps([asdict(case) for case in cases]), "--out", name),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **MALLOC}
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=1800, env=environment)
        ranks = [
            [Loaded(**found) for found in json.loads((folder / f"{rank}.json").read_text())]
            for rank in range(RANKS)
        ]
        return [list(of_case) for of_case in zip(*ranks, strict=True)]


def _store(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.to(torch.bfloat16).save_pretrained(folder)


def run(cases: Sequence[Case], model: Path) -> list[Loaded]:
    """Load the cases on this rank, one after another."""
    import torch

    from launch.ranks import join

    torch.set_num_threads(1)
    join("cpu")
    # What loads on first use is no part of it.
    for split in (False, True):
        _load(Case(split, "fp32"), model)
    return [_load(case, model) for case in cases]


def _load(case: Case, folder: Path) -> Loaded:
    import torch

    from rlhf.config_learner import Model
    from rlhf.partition import WHOLE, Split
    from rlhf.policy import DTYPES
    from rlhf.weights import load_base

    config = Model.model_validate({"path": str(folder), "precision": case.precision})
    partition = Split() if case.split else WHOLE
    dtype = DTYPES[case.precision]
    with _peak() as seen:
        with partition.loading(dtype):
            model: Any = load_base(config, str(folder), "cpu", dtype)
        with partition.computing(model), torch.no_grad():
            logits = model(input_ids=torch.tensor([[1]]), use_cache=False).logits
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for p in model.parameters()
        for tensor in (p, getattr(p, "ds_tensor", p))
    }
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    total = float(logits.double().abs().sum())
    return Loaded(seen[0], sum(storages.values()), "+".join(sorted(dtypes)), total)


@contextmanager
def _peak() -> Iterator[list[int]]:
    """What this process has at most while open, beyond what it has now; read it afterwards."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, seen, done = _anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], _anonymous() - before)
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen[0] = max(seen[0], _anonymous() - before)


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def main() -> None:
    """Print what was measured as a table, or as JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", help="load these cases on this rank; a JSON list")
    parser.add_argument("--out", type=Path, help="folder with the model, for what this rank took")
    parser.add_argument("--json", action="store_true", help="a line for each case")
    given = parser.parse_args()
    if given.cases is not None:
        cases = [Case(**case) for case in json.loads(given.cases)]
        found = [asdict(loaded) for loaded in run(cases, given.out / "model")]
        file = given.out / f"{os.environ['RANK']}.json"
        file.write_text(json.dumps(found), encoding="utf-8")
        return
    fullest = [max(ranks, key=lambda loaded: loaded.peak) for ranks in measure(CASES)]
    if given.json:
        for case, loaded in zip(CASES, fullest, strict=True):
            print(json.dumps({**asdict(case), **asdict(loaded)}))
        return
    print(
        f"MiB of a rank of {RANKS}, the fuller one: peak while loading, weights that it then holds"
    )
    for case, loaded in zip(CASES, fullest, strict=True):
        said = f"{case.precision} {'split' if case.split else 'whole'}"
        print(f"{said:<12}{loaded.peak / MIB:>9.1f}{loaded.held / MIB:>9.1f}")


if __name__ == "__main__":
    main()
