"""The page's words: the numbers of `rlhf.report.data` as sentences, tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf import staleness
from rlhf.config import Gates
from rlhf.gates import LIMITS, bounds
from rlhf.report import charts, data
from rlhf.report.data import Comparison, Dimension, Pairs, Point
from rlhf.report.drawing import DOWN, INK, UP
from rlhf.report.selection import explained
from rlhf.report.tables import (
    comparison_row,
    curve_rows,
    drift_rows,
    duration,
    gap_row,
    gate_row,
    quantile_row,
    round_row,
    score_row,
    shown_name,
    table,
    time_row,
)
from rlhf.run_view import RunView
from rlhf.staleness import said
from rlhf.verdict import change, direction

STAGES = {
    "completions": "sample answers",
    "scores": "score answers",
    "pairs": "select pairs",
    "labels": "label answers",
    "reference_logps": "reference log-probs",
    "training": "train",
    "evaluation/completions": "gate split: sample",
    "evaluation/scores": "gate split: score",
    "greedy/completions": "likeliest answers: sample",
    "greedy/scores": "likeliest answers: score",
    "evaluation/fresh": "drift: sample",
    "drift": "drift: log-probs",
    "start/completions": "final split, start: sample",
    "start/scores": "final split, start: score",
    "best/completions": "final split, best: sample",
    "best/scores": "final split, best: score",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot and what it is called."""

    title: str
    svg: Markup
    note: str = ""


def scores(dimensions: Sequence[Dimension], found: Comparison | None) -> dict[str, Any]:
    """What rose and what fell: against the start, and round by round."""
    if found is None:
        rows = [score_row(d, d.scores[-1]) for d in dimensions]
        return {"lead": "Only the start is evaluated so far.", "start": table("The start", rows)}
    known = [d for d in dimensions if d.key in found.change]
    where = f"the {found.split} split"
    title = f"Round {found.round} against the start on {where}"
    limits = charts.shared_limits([d.changes for d in dimensions])
    return {
        "lead": f"{title}: {_rose_and_fell(known, found)}",
        "sizes": _sizes(found.change["reward"], found.split),
        "forest": Plot(
            title,
            charts.change_forest([(d.name, d.audit, found.change[d.key]) for d in known], title),
        ),
        "table": table(title, [comparison_row(d, found) for d in known]),
        "panels": [
            (
                d,
                f"round {d.changes[-1].round}: {change(d.changes[-1].value)}",
                charts.score_panel(
                    d, f"{shown_name(d)}: change against the start by round", limits
                ),
            )
            for d in dimensions
            if d.changes
        ],
        "rounds": table(
            "Scores on the gate split, and their change against the start, by round",
            [round_row(d, p) for d in dimensions for p in d.scores],
            "round",
        ),
    }


def gates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every check, with its value, interval, threshold, smallest detectable drop and verdict."""
    if not rows:
        return {"lead": "No round has been judged yet."}
    by_round = {row["round"]: row["promoted"] for row in rows}
    promoted = [str(number_) for number_, kept in by_round.items() if kept]
    stopped = [str(number_) for number_, kept in by_round.items() if not kept]
    lead = f"Promoted: round {', '.join(promoted)}. " if promoted else "No round was promoted. "
    if stopped:
        lead += f"Stopped at: round {', '.join(stopped)}."
    on_scores = [row for row in rows if not data.is_limit(row)]
    label = "Gates on scores: change with 95% interval, threshold and smallest detectable drop"
    return {
        "lead": lead,
        "forest": Plot(label, charts.gate_forest(on_scores, label)) if on_scores else None,
        "table": table("Gates of every round", [gate_row(row) for row in rows], "gate", "verdict"),
    }


def pairs(found: Sequence[Pairs]) -> dict[str, Any]:
    """Margins, lengths, and chosen minus rejected on each dimension."""
    if not found:
        return {"lead": "No pairs have been selected yet."}
    last = found[-1]
    names = list(last.dimensions)
    series = {d: [p.dimensions[d] for p in found if d in p.dimensions] for d in names}
    inverted = sorted({d for d in names for p in series[d] if p.value < 0})
    limits = charts.shared_limits(list(series.values()))
    lead = (
        f"Round {last.round}: {last.count} pairs, median margin {last.margin[2]:.3f}; chosen "
        f"answers have {last.chosen_tokens[2]:.0f} tokens, rejected ones "
        f"{last.rejected_tokens[2]:.0f} (medians). "
    )
    lead += (
        f"Inverted: {', '.join(inverted)} (the chosen answers score lower on average)."
        if inverted
        else "No dimension is inverted: on each, chosen answers score higher on average."
    )
    return {
        "lead": lead,
        "plots": [
            Plot("Margin", charts.margin_panel(found, "Margins of the pairs by round"),
                 "by round: median, middle half, 5% to 95%"),
            Plot("Length", charts.length_panel(found, "Tokens of chosen and rejected by round"),
                 "tokens, by round; ● chosen, ▼ rejected"),
        ],
        "quantiles": table(
            "Margins and lengths in tokens, by round: 5%, 25%, median, 75%, 95%",
            [quantile_row(p) for p in found],
        ),
        "panels": [
            (d, f"round {series[d][-1].round}: {change(series[d][-1].value)}",
             charts.gap_panel(series[d], f"{d}: chosen minus rejected by round", limits),
             d in inverted)
            for d in names
        ],
        "gaps": table(
            "Mean of chosen minus rejected, by dimension and round",
            [gap_row(d, p, point) for d in names for p in found
             for point in [p.dimensions[d]]],
            "round", "mark",
        ),
    }  # fmt: skip


def training(
    metrics: Sequence[Mapping[str, Any]], drift: Mapping[str, Sequence[Point]], gates: Gates
) -> dict[str, Any]:
    """Curves over the optimizer steps of all rounds, and how far each round moved the policy."""
    rows, size = data.curves(metrics)
    plots, tables = [], []
    if rows:
        ratios = {"logratio_chosen": UP, "logratio_rejected": DOWN}
        of_labels = {"logratio_good": UP, "logratio_bad": DOWN}
        panels = [
            ("Loss", {"loss": INK}, "mean over the examples of a step"),
            ("Accuracy", {"accuracy": INK}, "share of examples that it gets right"),
            ("Margin", {"margin": INK}, "beta × what tells chosen from rejected"),
            ("Log-ratios", ratios, "nats a sequence; solid chosen, dashed rejected"),
            ("Log-ratios", of_labels, "nats a sequence; solid good, dashed bad answers"),
            ("NLL", {"nll": INK}, "of the SFT term, nats"),
            ("Gradient norm", {"grad_norm": INK}, "L2, before clipping"),
        ]
        plots = [
            Plot(title, charts.curve_panel(rows, series, f"{title} by training step"), note)
            for title, series, note in panels
            if any(row[name] is not None for row in rows for name in series)
        ]
        of = "each step" if size == 1 else f"means of {size} steps"
        tables.append(table(f"Training curves, {of}", curve_rows(rows)))
    # The start alone has not drifted.
    if any(point.round for points in drift.values() for point in points):
        for name, limit in LIMITS.items():
            title, bound = name[0].upper() + name[1:], bounds(gates)[name]
            note = f"{limit.unit}, by round" + ("" if bound is None else "; dashed: the limit")
            panel = charts.drift_panel(drift[name], bound, f"{title} by round")
            plots.append(Plot(title, panel, note))
        tables.append(table("How far the policy moved, 95% intervals", drift_rows(drift)))
    return {
        "lead": _training_lead(rows, size, data.skipped_steps(metrics)),
        "plots": plots,
        "tables": tables,
    }


def timing(found: data.Timing) -> dict[str, Any]:
    """Seconds and tokens of each stage, and what the loop itself added."""
    if not found.stages:
        return {"lead": "Nothing has been timed yet."}
    whole = found.wall
    rows = [
        time_row(STAGES.get(stage.name, stage.name), stage.seconds, whole, stage.tokens)
        for stage in found.stages
    ]
    if found.loop is not None:
        rows.append(time_row("the loop itself", found.loop, whole, None))
    rows.append(time_row("all", whole, whole, None) | {"total": True})
    lead = f"{duration(whole)} in all; " + (
        "this run did not log what the loop itself added."
        if found.loop is None
        else "the loop itself (storing, hashing, reporting) added "
        f"{found.loop / (whole or 1):.1%} of it."
    )
    rounds = sorted(
        {r for s in found.stages for r in s.by_round}, key=lambda r: (r is None, r or 0)
    )
    names = {r: "final" if r is None else "start" if r == 0 else f"round {r}" for r in rounds}
    return {
        "lead": lead,
        "rows": rows,
        "rounds": table(
            "Seconds of each stage, by round",
            [
                {"stage": STAGES.get(s.name, s.name)}
                | {names[r]: f"{s.by_round[r]:.1f}" if r in s.by_round else "" for r in rounds}
                for s in found.stages
            ],
        ),
    }


def funnels(run: RunView) -> list[dict[str, Any]]:
    """Each round's funnel; shares are of what was sampled, idle steps are those nothing fell at."""
    found = []
    for round in run.rounds:
        funnel = round.record("funnel")
        if funnel is not None:
            behind = staleness.behind(round)
            unusable = {d: sum(counts.values()) for d, counts in funnel["unusable_scores"].items()}
            found.append(
                {
                    "round": round.index,
                    "steps": _funnel_steps(funnel),
                    "yield": funnel["yield"],
                    "written_by": said(behind, run.config.rounds.max_staleness) if behind else "",
                    "abstained": {d: count for d, count in unusable.items() if count},
                    "explained": explained(funnel, round.record("selection")),
                }
            )
    return found


def _funnel_steps(funnel: Mapping[str, Any]) -> list[dict[str, Any]]:
    first, alone = funnel["steps"][0], funnel["alone"]
    steps = []
    for step in funnel["steps"]:
        kind, unit = (
            ("completions", "answers")
            if step["step"] in alone["completions"]
            else ("pairs", "pairs")
        )
        steps.append(
            {
                **step,
                "share": step["prompts"] / first["prompts"],
                "share_completions": step["completions"] / first["completions"],
                "idle": not step["lost_completions"] and not step["lost_prompts"],
                "alone": alone[kind].get(step["step"]),
                "of": alone[kind]["considered"],
                "unit": unit,
            }
        )
    return steps


def _rose_and_fell(known: Sequence[Dimension], found: Comparison) -> str:
    by: dict[str, list[str]] = {"rose": [], "fell": [], "unclear": []}
    for dimension in known:
        if dimension.key != "reward":
            by[direction(found.change[dimension.key])].append(shown_name(dimension))
    said = [
        f"{', '.join(names)} {how}"
        for how, names in (
            ("rose", by["rose"]),
            ("fell", by["fell"]),
            ("did not move beyond chance", by["unclear"]),
        )
        if names
    ]
    return "; ".join(said) + ("." if by["fell"] else "; nothing fell.")


def _sizes(found: Mapping[str, Any], split: str) -> str:
    once = ", scored once" if split == "final" else ""
    return (
        f"{found['n_prompts']} prompts in {found['n_clusters']} clusters{once}; paired "
        "differences, 95% intervals from a bootstrap over clusters."
    )


def _training_lead(rows: Sequence[Mapping[str, Any]], size: int, skipped: int) -> str:
    if not rows:
        return "Nothing has been trained yet."
    steps = f"{rows[-1]['at']} optimizer steps over {len({r['round'] for r in rows})} rounds"
    said = f"{steps}. Vertical lines part the rounds, each of which starts a new optimizer."
    if size > 1:
        said += f" A point is the mean of {size} steps."
    if skipped:
        said += f" {skipped} steps were skipped (fp16 overflow)."
    return said
