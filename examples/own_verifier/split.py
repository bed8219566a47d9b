"""Split prompts into train, gate and final, so that no cluster is in two.

    python examples/own_verifier/split.py PROMPTS.jsonl FOLDER

A cluster's hash decides, so a cluster stays where it is when others are added.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

UPPER_ENDS = {"train": 0.6, "gate": 0.8, "final": 1.0}
"""Of each split, on a cluster's hash in [0, 1)."""


def split_of(cluster: str) -> str:
    """The split of a cluster: prompts about one source, which all go the same way."""
    place = int(hashlib.sha256(cluster.encode()).hexdigest()[:8], 16) / 2**32
    return next(split for split, end in UPPER_ENDS.items() if place < end)


def split(prompts: Path, folder: Path) -> dict[str, int]:
    """Write `folder`/train.jsonl, gate.jsonl and final.jsonl; how many prompts each has."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {name: [] for name in UPPER_ENDS}
    for line in prompts.read_text(encoding="utf-8").splitlines():
        lines[split_of(json.loads(line)["cluster"])].append(line)
    for name, kept in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in kept), "utf-8")
    return {name: len(kept) for name, kept in lines.items()}


if __name__ == "__main__":
    print(split(Path(sys.argv[1]), Path(sys.argv[2])))
