"""`report.html`: one page that says what improved, what it cost and why each answer was chosen.

Everything is read from the run's folder, which is neither locked nor changed, so a run that is
still going on can be reported at any time. The same folder gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.document import document, write_document
from rlhf.report import data, page
from rlhf.report.judges import judges
from rlhf.report.prompts import BUDGET, browser
from rlhf.report.tables import duration
from rlhf.run_view import RunView
from rlhf.verdict import number, stamps, verdict

NAME = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_TONES = {
    "improved": ("▲", "Improved"),
    "unclear": ("●", "No certain change"),
    "worse": ("▼", "Got worse"),
    "stopped": ("■", "Stopped early"),
    "failed": ("✕", "Failed"),
    "interrupted": ("❚❚", "Interrupted"),
    "unfinished": ("◔", "Not finished"),
}


def write_report(folder: Path, out: Path | None = None, budget: int = BUDGET) -> Path:
    """Write the report of the run in `folder`, by default to its `report.html`; where it is.

    `budget` bounds the bytes that prompts and answers take; the page says what was left out.
    Raises InputError where `folder` holds no run, or `out` can't be written.
    """
    return write_document(out or folder / NAME, render(RunView(folder), budget), "--out")


def render(run: RunView, budget: int = BUDGET) -> str:
    """The page as text."""
    return document(_TEMPLATES, "page", _content(run, budget))


def _content(run: RunView, budget: int) -> dict[str, Any]:
    metrics = run.metrics()
    pairs = data.pairs(run)
    compared = data.comparison(run)
    timing = data.timing(run, metrics, pairs)
    said = verdict(run)
    drift = data.drift(run)
    return {
        "name": run.config.run.name,
        "verdict": said,
        "tone": _TONES[said.tone],
        "stamps": stamps(run),
        "facts": _facts(run, compared, pairs, drift, timing),
        "scores": page.scores(data.dimensions(run), compared) if run.evaluated else None,
        "gates": page.gates(data.gate_rows(run)),
        "judges": judges(run),
        "funnels": page.funnels(run),
        "pools": data.pool_counts(run),
        "pairs": page.pairs(pairs),
        "training": page.training(metrics, drift, run.config.gates),
        "timing": page.timing(timing),
        "browser": browser(run, budget),
        "settings": _settings(run),
        "versions": (run.rounds[0].manifest.get("versions", {}) if run.rounds else {}),
    }


def _facts(
    run: RunView,
    compared: data.Comparison | None,
    pairs: list[data.Pairs],
    drift: dict[str, list[data.Point]],
    timing: data.Timing,
) -> list[tuple[str, str, str]]:
    """What is asked first: name, value, what it is about."""
    facts = []
    if compared is not None:
        start, now = (side["reward"]["value"] for side in (compared.start, compared.now))
        where = f"start → round {compared.round}, {compared.split} split"
        facts.append(("Reward", f"{number(start)} → {number(now)}", where))
        name = "KL to the start"
        moved = next((p for p in drift[name] if p.round == compared.round), None)
        if moved is not None:
            facts.append((name, f"{moved.value:.2f}", f"nats, round {moved.round}"))
    promoted = len(run.status.get("promoted") or [])
    facts.append(("Rounds promoted", str(promoted), f"of {run.config.rounds.count} planned"))
    if pairs:
        rounds = f"in {len(pairs)} round{'s' if len(pairs) > 1 else ''}"
        facts.append(("Pairs", f"{sum(p.count for p in pairs):,}", rounds))
    if timing.stages:
        sampled = sum(
            s.tokens or 0 for s in timing.stages if s.name not in ("training", "reference_logps")
        )
        facts.append(("Time", duration(timing.wall), f"{sampled:,} tokens sampled"))
    return facts


def _settings(run: RunView) -> list[tuple[str, str]]:
    config, objective = run.config, run.config.objective
    leashed = objective.needs.reference

    def said(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in values.items()) or "none"

    return [
        ("Model", f"{config.model.path} ({config.model.tuning}, {config.model.precision})"),
        ("Objective", f"{objective.name}, beta {objective.beta:g}, on {objective.needs.data}"),
        ("Learning rate", f"{config.learning_rate:g}"),
        ("Reference", config.rounds.reference.replace("_", " ") if leashed else "none"),
        ("Answers a prompt", str(config.rollout.samples_per_prompt)),
        ("Judges", ", ".join(judge.name for judge in config.judges.panel)),
        ("Audit judges", ", ".join(judge.name for judge in config.judges.audit) or "none"),
        ("Reward weights", said(config.weights)),
        ("Floors", said(config.floors)),
        ("Protected", said(config.protected)),
        ("Seed", str(config.run.seed)),
    ]
