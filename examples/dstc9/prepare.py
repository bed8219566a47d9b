"""Turn DSTC9 support questions into train, gate and final prompts.

    python examples/dstc9/prepare.py [OUT_DIR] [--data FILE]

Each question of a customer becomes one prompt, with the FAQ answer as grounding and reference. The
hotel, restaurant or service is the cluster and belongs to one split; a general question (trains,
taxis) has no such place, so its FAQ answer is the cluster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rlhf.errors import InputError

DATA_FILE: Final = Path("dstc9_support") / "support_responses_val.jsonl"
SYSTEM: Final = (
    "You are the support desk of a booking service. Answer the customer from the FAQ entry only, "
    "in one or two plain sentences, and offer further help."
)
# Upper ends of the splits on a cluster's hash, in [0, 1).
SPLITS: Final = {"train": 0.6, "gate": 0.8, "final": 1.0}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of support_responses_val.jsonl. Raises InputError where there is no such file."""
    if not path.is_file():
        raise InputError(
            f"there is no file {path}; set PAIRLOOP_DATA to the folder that holds {DATA_FILE}, "
            "or name the file with --data"
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prompts_by_split(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Prompt records per split, and how many rows were dropped and why.

    A question and FAQ answer stand once, whoever asked; a FAQ answer that two places share word for
    word stays with the first, so that no passage is in two splits. What human agents replied is
    kept in the metadata for the audit judge.
    """
    records: dict[tuple[str, str], dict[str, Any]] = {}
    owners: dict[str, str] = {}
    dropped = {"duplicates": 0, "shared answers": 0}
    for row in rows:
        question, answer = " ".join(row["question"].split()), " ".join(row["answer"].split())
        cluster = f"{row['domain']}: {row['entity'] or answer}"
        if owners.setdefault(answer.lower(), cluster) != cluster:
            dropped["shared answers"] += 1
            continue
        key = (question.lower(), answer.lower())
        if key in records:
            dropped["duplicates"] += 1
        else:
            records[key] = _record(row, question, answer, cluster)
        records[key]["metadata"]["agent_replies"].append(row["agent_response"])
    splits: dict[str, list[Any]] = {name: [] for name in SPLITS}
    for record in records.values():
        splits[split_of(record["cluster"])].append(record)
    return splits, dropped


def _record(row: dict[str, Any], question: str, answer: str, cluster: str) -> dict[str, Any]:
    about = f" about {row['entity']}" if row["entity"] else ""
    return {
        "prompt_id": row["id"],
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"FAQ entry{about}: {answer}\n\nQuestion: {question}"},
        ],
        "context": answer,
        "reference": answer,
        "category": row["domain"],
        "cluster": cluster,
        "metadata": {"entity": row["entity"], "agent_replies": []},
    }


def split_of(cluster: str) -> str:
    """The split of a cluster: by its hash alone, so that no other row can move it."""
    share = int(hashlib.sha256(cluster.encode()).hexdigest()[:8], 16) / 16**8
    return next(name for name, end in SPLITS.items() if share < end)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 2 where the data is missing."""
    parser = argparse.ArgumentParser(description="Prepare the DSTC9 support questions.")
    parser.add_argument("out_dir", type=Path, nargs="?", default=Path("runs/dstc9-prompts"))
    parser.add_argument("--data", type=Path, help=f"the file {DATA_FILE.name}")
    arguments = parser.parse_args(argv)
    path = arguments.data or Path(os.environ.get("PAIRLOOP_DATA", "")) / DATA_FILE
    try:
        splits, dropped = prompts_by_split(read_rows(path))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name, records in splits.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (arguments.out_dir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(records)} prompts, {len({r['cluster'] for r in records})} clusters")
    print("dropped: " + ", ".join(f"{count} {why}" for why, count in dropped.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
