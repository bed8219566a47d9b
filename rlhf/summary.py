"""`summary.md`: what improved, by how much, and why each round was promoted or not.

Also the table a round prints and the card a stored policy carries. Everything is read from the
store, so a summary can be written again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from rlhf import judge_view, staleness, yield_analysis
from rlhf.config import RunConfig
from rlhf.evaluation import AUDIT_PREFIX
from rlhf.files import atomic_write
from rlhf.gates import LIMITS
from rlhf.pair_audit import said
from rlhf.rounds import RunStore
from rlhf.run_view import RunView
from rlhf.verdict import change, interval, number, stamps, verdict

Row = dict[str, str]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table with the first row's keys as columns."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row[c] for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def round_rows(store: RunStore, index: int) -> list[Row]:
    """A round's held-out scores beside the start and the previous round, a row a dimension."""
    evaluation = store.round(index).stored("evaluation")
    return [
        {
            "dimension": _shown(name),
            "score": number(score["value"]),
            "95% interval": f"{number(score['low'])} to {number(score['high'])}",
            "since start": _since(evaluation, "start", name),
            "since previous": _since(evaluation, "previous", name),
        }
        for name, score in _ordered(evaluation["scores"])
    ]


def write_summary(store: RunStore, config: RunConfig) -> None:
    """Write `summary.md` into the run's folder."""
    status = store.read_status() or {}
    run = RunView(store.folder)
    opening = verdict(run)
    parts = [f"# {config.run.name}", f"**{opening.sentence}**"]
    if opening.details:
        parts.append(opening.details)
    parts += [f"**{stamp.name}**: {stamp.meaning}." for stamp in stamps(run)]
    if store.final().done("evaluation"):
        parts += ["## The claim: final split, scored once", _final(store)]
    rounds = _finished(store, config.rounds.count)
    if rounds:
        parts += ["## Rounds on the gate split", _rounds(store, rounds)]
    parts += ["## Judges", _judges(run)]
    if store.round(0).done("pools"):
        parts += ["## Prompts", _prompts(store.round(0).stored("pools"))]
    for index in rounds:
        parts += [f"## Round {index}", _one_round(run, store, index)]
    parts += ["## Where things are", _places(status)]
    atomic_write(store.folder / "summary.md", ("\n\n".join(parts) + "\n").encode())


def model_card(config: RunConfig, index: int, data: pl.DataFrame) -> str:
    """README.md of a stored policy. The same run gives the same bytes."""
    tuning = {"full": "full fine-tune", "lora": "LoRA adapter", "qlora": "LoRA adapter on NF4"}
    tuned = "LoRA, merged each round," if config.model.merges else tuning[config.model.tuning]
    loader = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
        if config.model.whole
        else "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
    )
    library = f"library_name: {'transformers' if config.model.whole else 'peft'}\n"
    objective = config.objective
    if objective.needs.data == "labels":
        good = int(data["good"].sum())
        kind, about = "labels", f"{good} good, {data.height - good} bad"
        judged = "good"
    else:
        margin = float(data["margin"].to_numpy().mean())
        kind, about = "pairs", f"mean margin {margin:.3f}"
        judged = "chosen"
    leash = f"reference {config.rounds.reference}" if objective.needs.reference else "no reference"
    return f"""---
{library}tags: [pairloop, {objective.name}, on-policy]
---

# {config.run.name}, round {index}

{tuned} of `{config.model.path}`, trained by pairloop on {data.height} {kind}
of the policy's own answers (round {index}, {about}) with
{objective.name.upper()}, beta {objective.beta:g}, learning rate
{config.learning_rate:g}, {leash}.

Judged on {", ".join(config.judges.dimensions)}; {judged} answers met the floors
{", ".join(f"{d} {v:g}" for d, v in sorted(config.floors.items())) or "(none)"}.
What it scored, and whether it was promoted, stands in the run's `summary.md`.

```python
{loader}
```
"""


def _final(store: RunStore) -> str:
    final = store.final().stored("evaluation")
    rows = []
    for name, change_ in _ordered(final["change"]):
        rows.append(
            {
                "dimension": _shown(name),
                "start": number(final["start"][name]["value"]),
                f"round {final['best_round']}": number(final["best"][name]["value"]),
                "change": change(change_["difference"]),
                "95% interval": interval(change_["low"], change_["high"]),
                "smallest detectable": number(change_["smallest_detectable"]),
            }
        )
    some = final["change"]["reward"]
    return (
        f"{some['n_prompts']} prompts in {some['n_clusters']} clusters; paired differences, "
        "intervals from a bootstrap over clusters.\n\n" + markdown_table(rows)
    )


def _rounds(store: RunStore, rounds: Sequence[int]) -> str:
    evaluations = {i: store.round(i).stored("evaluation") for i in (0, *rounds)}
    names = [name for name, _ in _ordered(evaluations[0]["scores"])]
    rows = []
    for index, evaluation in evaluations.items():
        row = {"round": "start" if index == 0 else str(index)}
        row |= {_shown(n): number(evaluation["scores"][n]["value"]) for n in names}
        drift = store.round(index).stored("drift")
        for name, limit in LIMITS.items():
            found = drift.get(limit.measured)
            row[name] = "0" if found is None else number(found["value"])
        rows.append(row)
    return markdown_table(rows)


def _prompts(counts: Mapping[str, Mapping[str, int]]) -> str:
    return markdown_table(
        [
            {"split": split, **{name.replace("_", " "): str(n) for name, n in found.items()}}
            for split, found in counts.items()
        ]
    )


def _judges(run: RunView) -> str:
    """Who scored what, what stands behind it, and how often there was no score."""
    asked = judge_view.asked(run)
    rows = []
    for role in judge_view.roles(run):
        own = [a for a in asked if (a.judge, a.dimension) == (role.judge, role.dimension)]
        scores, missing = sum(a.scores for a in own), sum(a.abstained for a in own)
        vouched = {"not needed": f"none needed: {role.reason}", "granted": "granted"}
        rows.append(
            {
                "judge": f"{role.judge} ({role.kind})",
                "dimension": role.dimension,
                "used for": ", ".join(role.uses) or "nothing",
                "certificate": vouched.get(role.status, f"**{role.status}**: {role.reason}"),
                "abstained": f"{missing} of {scores}",
            }
        )
    return markdown_table(rows)


def _one_round(run: RunView, store: RunStore, index: int) -> str:
    gates = store.round(index).stored("gates")
    funnel = store.round(index).stored("funnel")
    gate_rows = [
        {
            "gate": gate["name"],
            f"change against round {gates['against']}, or value": said_as(gate["value"]),
            "95% interval": f"{said_as(gate['low'])} to {said_as(gate['high'])}",
            "threshold": said_as(gate["threshold"]),
            "smallest detectable": number(gate["smallest_detectable"]),
            "verdict": gate["verdict"]
            + (
                ""
                if gate["false_stop_rate"] is None
                else f" (point rule, false-stop rate {gate['false_stop_rate']:.0%})"
            ),
        }
        for gate in gates["gates"]
        for said_as in [number if gate["name"] in LIMITS else change]
    ]
    steps = [
        {
            "step": step["step"],
            "completions": str(step["completions"]),
            "prompts": str(step["prompts"]),
            "why": step["why"],
        }
        for step in funnel["steps"]
    ]
    kept = funnel["yield"]
    parts = [
        gates["reason"],
        markdown_table(gate_rows),
        *_watched(store, index),
        f"{_written_by(run, index)}How completions became pairs:",
        markdown_table(steps),
        f"Largest admissible margin kept {kept['largest_admissible']} pairs; best and worst, "
        f"then filter, would have kept {kept['best_and_worst_then_filter']}.",
    ]
    if store.round(index).done("selection"):
        explained = yield_analysis.said(funnel, store.round(index).stored("selection"))
        parts.append("\n".join(f"- {line}" for line in explained))
    if store.round(index).done("labels_funnel"):
        labels = store.round(index).stored("labels_funnel")
        parts += ["How completions became good and bad answers, which trained:", _labels(labels)]
    return "\n\n".join(parts)


def _written_by(run: RunView, index: int) -> str:
    found = staleness.behind(next(round for round in run.rounds if round.index == index))
    return f"{staleness.said(found, run.config.rounds.max_staleness)} " if found else ""


def _watched(store: RunStore, index: int) -> list[str]:
    """What canaries and the audit of the round's pairs showed, where there were any."""
    round = store.round(index)
    told = []
    if round.done("canaries"):
        found = round.stored("canaries")
        asked = " and ".join(f"{n} of {name}" for name, n in found["answers"].items() if n)
        if found["judges"] and asked:
            told += [
                f"Judges asked anew, {found['askings']} times, about the same answers ({asked}); "
                "changes are against round 1, with their 95% intervals:",
                markdown_table([_canary_row(entry) for entry in found["judges"]]),
            ]
        told += [f"Warning: {text}." for text in found["warnings"]]
    if round.done("audit") and round.stored("audit")["judges"]:
        audit = round.stored("audit")
        told.append(said(audit)[0].upper() + said(audit)[1:] + ".")
    return told


def _canary_row(entry: Mapping[str, Any]) -> Row:
    figures, drift = entry["figures"], entry["drift"]
    shown = {
        "retest sd": figures.get("retest_sd"),
        "gold accuracy": figures.get("within_prompt_accuracy"),
        "order consistency": figures.get("order_consistency"),
    }
    moved = drift.get("moved")
    verdicts = [found["verdict"] for found in drift.values()]
    worst = next((v for v in ("drifted", "unclear", "holds") if v in verdicts), "")
    return {
        "judge": entry["judge"],
        "dimension": entry["dimension"],
        **{name: number(found["value"]) if found else "" for name, found in shown.items()},
        "scores moved by": f"{number(moved['value'])} ({number(moved['low'])} to "
        f"{number(moved['high'])})"
        if moved
        else "",
        "verdict": worst or ("the same each time" if entry["fixed"] else "first round"),
    }


def _labels(funnel: Mapping[str, Any]) -> str:
    columns = ("step", "answers", "why")
    return markdown_table(
        [
            {"label": kind, **{name: str(step.get(name, "")) for name in columns}}
            for kind in ("good", "bad")
            for step in funnel[kind]
        ]
    )


def _places(status: Mapping[str, Any]) -> str:
    best = status.get("best_round")
    policy = "none was promoted" if best is None else f"`rounds/{best:04d}/policy`"
    return (
        f"- best policy: {policy}\n- pairs of a round: `rounds/NNNN/pairs.parquet`, its funnel: "
        "`funnel.json`\n- every completion and score: `completions/`, `scores/`, `evaluation/`\n"
        "- pairs to be read blind: `sheets/NNNN`\n- training curves and times: `metrics.jsonl`\n"
        "- resolved configuration: `config.yaml`"
    )


def _finished(store: RunStore, count: int) -> list[int]:
    present = [i for i in range(1, count + 1) if (store.folder / f"rounds/{i:04d}").is_dir()]
    return [i for i in present if store.round(i).done("gates")]


def _since(evaluation: Mapping[str, Any], other: str, name: str) -> str:
    found = evaluation["against"][other]["change"][name]
    return f"{change(found['difference'])} ({interval(found['low'], found['high'])})"


def _shown(name: str) -> str:
    return f"{name.removeprefix(AUDIT_PREFIX)} (audit)" if name.startswith(AUDIT_PREFIX) else name


def _ordered(scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
    # Reward first, audit last.
    return sorted(
        scores.items(), key=lambda s: (s[0] != "reward", s[0].startswith(AUDIT_PREFIX), s[0])
    )
