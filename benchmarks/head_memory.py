"""Peak memory of the head: chunked against whole logits, over tokens and vocabulary.

    python benchmarks/head_memory.py [--json]

Forward and backward through a linear head alone, in fp32 on a CPU, each case in a process of its
own whose heap gives every block back. Shown is what the pass adds to weights and hidden states: the
chunked head stays flat in both tokens and vocabulary; where its weights are trained, their gradient
and a chunk's come on top, and these grow with the vocabulary.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
TOKENS = (256, 1024, 4096)
WHOLE_AT_MOST = 2**28
"""Logits: these take 4 GiB whole, more take too long."""


@dataclass(frozen=True, slots=True)
class Case:
    """A head, and how many tokens are scored through it."""

    vocabulary: int
    tokens: int
    chunked: bool
    trained: bool
    hidden: int = 576


def measure(case: Case) -> int:
    """Bytes at the peak beyond weights and hidden states, in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=900, env=environment
    )
    return int(done.stdout.splitlines()[-1])


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None, name
    return int(found.group(1)) * 1024


def run(case: Case) -> int:
    """Pass through the head in this process; bytes as `measure` gives them."""
    import torch

    from rlhf.head import Tail, scoring

    torch.manual_seed(0)

    def once(head: torch.nn.Linear, hidden_1NH: torch.Tensor, targets_N: torch.Tensor) -> None:
        if not case.chunked:
            logits_NV = head(hidden_1NH)[0]
            torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum").backward()
            return
        with scoring(head, torch.arange(len(targets_N)), targets_N, Tail()) as found:
            head(hidden_1NH)
            found().sum().backward()

    def inputs(vocabulary: int, tokens: int) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
        head = torch.nn.Linear(case.hidden, vocabulary, bias=False).requires_grad_(case.trained)
        hidden = torch.randn(1, tokens, case.hidden, requires_grad=True)
        return head, hidden, torch.randint(vocabulary, (tokens,))

    # Libraries that load on first use are none of the head's.
    once(*inputs(64, 8))
    given = inputs(case.vocabulary, case.tokens)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    once(*given)
    return _status("VmHWM") - before


def main() -> None:
    """Print the table, or measure one case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a list of cases instead")
    parser.add_argument("--case", help="run this case in this process; a JSON object")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(run(Case(**json.loads(arguments.case))))
        return
    rows = []
    for trained in (False, True):
        for vocabulary in VOCABULARIES:
            for tokens in TOKENS:
                for chunked in (True, False):
                    if not chunked and vocabulary * tokens > WHOLE_AT_MOST:
                        continue
                    case = Case(vocabulary, tokens, chunked, trained)
                    rows.append(asdict(case) | {"peak_bytes": measure(case)})
                    if not arguments.json:
                        said = f"{'trained' if trained else 'frozen':<8}{vocabulary:>8} words"
                        said += f"{tokens:>6} tokens  {'chunked' if chunked else 'whole':<8}"
                        print(f"{said}{rows[-1]['peak_bytes'] / MIB:>7.0f} MiB", flush=True)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
