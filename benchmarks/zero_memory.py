"""What each of two ranks holds under DeepSpeed's ZeRO 0 to 3, beside `launch.zero_memory`.

    python benchmarks/zero_memory.py [--json]

Each case trains a random Llama for two steps of two micro-batches on two gloo ranks on this
machine's CPU, as the learner does: trained weights in fp32 under autocast, a frozen base in compute
precision. Where the second step's state is largest it counts the bytes of the tensors that hold
weights, gradients, AdamW's copy and moments, each storage once. The last column is what the process
holds in all (PSS) beyond what it held before the model was made. Stage 0 is without DeepSpeed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

RANKS = 2
MIB = 2**20
PARTS = ("weights", "gradients", "masters", "moments")
BUCKET = 1_000_000
"""Elements of a reduction bucket: DeepSpeed's 500 million would hide the rest on a small model."""
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
}
"""Llamas of 4 query and 2 key heads over 4,096 words: 0.6 million and 28.6 million weights."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, and how it is shared out."""

    stage: int
    tuning: str = "full"
    precision: str = "bf16"
    size: str = "small"


CASES = tuple(
    Case(stage, tuning, precision)
    for tuning, precision in (("full", "fp32"), ("lora", "bf16"))
    for stage in range(4)
)
"""Full tuning holds the same in bf16, which a CPU without it is slow in."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one rank."""

    weights: int
    gradients: int
    masters: int
    moments: int
    pss: int = 0
    """Of the process, beyond what it held before the model; 0 in theory."""

    @property
    def state(self) -> int:
        """What tensors hold."""
        return self.weights + self.gradients + self.masters + self.moments


def theory(case: Case) -> Held:
    """What `launch.zero_memory` says of a rank."""
    from launch.architectures import Architecture
    from launch.learner_memory import Learning
    from launch.zero_memory import Sharded, Sharding
    from rlhf.config_learner import Model

    model = Model.model_validate(
        {"path": "random", "tuning": case.tuning, "precision": case.precision}
    )
    architecture = Architecture.read(_llama(case), "random")
    held = Learning(architecture, model, 64, 32, 16, False, on_gpu=False)
    rank = Sharded(held, Sharding(case.stage, RANKS))
    weights = rank.base + rank.adapter + rank.whole
    return Held(weights, rank.gradients, rank.masters, rank.moments)


def measure(cases: Sequence[Case]) -> list[list[Held]]:
    """Train cases on two fresh ranks; what each rank holds of each.

    Raises CalledProcessError (its output is on standard error) or TimeoutExpired.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={RANKS}", str(Path(__file__).resolve())),
            *("--cases", json.dumps([asdict(case) for case in cases]), "--out", folder),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=1800, env=environment)
        ranks = [
            [Held(**held) for held in json.loads(file.read_text(encoding="utf-8"))]
            for file in sorted(Path(folder).glob("*.json"))
        ]
        return [list(of_case) for of_case in zip(*ranks, strict=True)]


def _llama(case: Case) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"vocab_size": 4096, "tie_word_embeddings": False, "model_type": "llama"}
    return {**shape, **heads, **SIZES[case.size]}


def _settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,
        "managed_gradient_accumulation": False,
    }


def _pss() -> int:
    """Bytes of this process, pages that it shares divided among those who share them; what it has
    freed is given back before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def _model(case: Case) -> Any:
    """The policy as the learner loads it: a frozen base in compute precision, else in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_llama(case)))
    if case.tuning == "full":
        return model
    from peft import LoraConfig, get_peft_model

    compute = torch.bfloat16 if case.precision == "bf16" else torch.float32
    lora = LoraConfig(r=16, target_modules="all-linear")
    held: Any = model
    return get_peft_model(held.to(compute), lora)


def run(cases: Sequence[Case]) -> list[Held]:
    """Train the cases on this rank, one after another."""
    import torch

    from rlhf.partition import deepspeed

    deepspeed().init_distributed("gloo")
    torch.set_num_threads(1)
    found: list[Held] = []
    for case in cases:
        if case.size != "tiny":
            # What loads on first use is none of the state.
            _train(replace(case, size="tiny"), lambda model, optimizer: None)
        _train(case, partial(_look, found, case.stage, _pss()))
    return found


def _look(found: list[Held], stage: int, empty: int, model: Any, optimizer: Any) -> None:
    found.append(Held(**_count(stage, model, optimizer), pss=_pss() - empty))


def _train(case: Case, look: Callable[[Any, Any], None]) -> None:
    """Two steps; `look` at model and optimizer where the second one's state is at its largest."""
    import torch

    from rlhf.partition import deepspeed

    model = _model(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-5)
    engine = None
    if case.stage:
        engine, optimizer, *_ = deepspeed().initialize(
            model=model, optimizer=optimizer, config=_settings(case.stage)
        )
    tokens = torch.arange(64).reshape(1, 64) + torch.distributed.get_rank()

    def backward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            loss = (engine or model)(input_ids=tokens, labels=tokens).loss
        (loss.backward if engine is None else partial(engine.backward, loss))()

    for _ in range(2):
        backward()
    (engine or optimizer).step()
    if engine is None:
        optimizer.zero_grad(set_to_none=True)
    backward()
    backward()
    look(model, optimizer)
    if engine is not None:
        engine.destroy()


def _count(stage: int, model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of each kind of tensor, each storage once, for the first kind that it is of."""
    seen: set[int] = set()
    found = {}
    for name, tensors in zip(PARTS, _tensors(stage, model, optimizer), strict=True):
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        found[name] = total
    return found


def _tensors(stage: int, model: Any, optimizer: Any) -> Iterator[Iterable[Any]]:
    parameters = list(model.parameters())
    yield [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]
    reduced = [p.grad for p in parameters if p.grad is not None]
    if stage in (1, 2):
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            reduced += [g for group in kept.values() for g in group or () if g is not None]
    if stage == 3:
        reduced.append(optimizer.grad_partitions_flat_buffer)
    yield reduced
    masters = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
    masters[3] = "fp32_partitioned_groups_flat"
    yield getattr(optimizer, masters[stage]) if stage else []
    inner = optimizer.optimizer if stage else optimizer
    yield [t for state in inner.state.values() for t in state.values() if t.numel() > 1]


def main() -> None:
    """Print the comparison as a table, or as JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", help="train these cases on this rank; a JSON list")
    parser.add_argument("--out", type=Path, help="folder for what this rank holds")
    parser.add_argument("--json", action="store_true", help="a line for each case")
    given = parser.parse_args()
    if given.cases is not None:
        held = run([Case(**case) for case in json.loads(given.cases)])
        file = given.out / f"{os.environ['RANK']}.json"
        file.write_text(json.dumps([asdict(each) for each in held]), encoding="utf-8")
        return
    fullest = [max(ranks, key=lambda held: held.state) for ranks in measure(CASES)]
    if given.json:
        for case, found in zip(CASES, fullest, strict=True):
            record = {**asdict(case), "theory": asdict(theory(case)), "measured": asdict(found)}
            print(json.dumps(record))
        return
    print(f"MiB of a rank of {RANKS}, the fuller one: theory, tensors counted")
    print(f"{'case':<18}" + "".join(f"{part:>17}" for part in (*PARTS, "state")) + "      PSS")
    for case, found in zip(CASES, fullest, strict=True):
        line = f"{f'{case.tuning} {case.precision} ZeRO-{case.stage}':<18}"
        for part in (*PARTS, "state"):
            line += f"{getattr(theory(case), part) / MIB:>9.1f}{getattr(found, part) / MIB:>8.1f}"
        print(f"{line}{found.pss / MIB:>9.1f}")


if __name__ == "__main__":
    main()
