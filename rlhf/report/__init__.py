"""`report.html`: one page that says what improved, what it cost and why each answer was chosen.

Everything is read from the run's folder, which is neither locked nor changed, so a run that is
still going on can be reported at any time. The same folder gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf.errors import InputError
from rlhf.files import atomic_write
from rlhf.report import data, page
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
    path = out or folder / NAME
    text = render(RunView(folder), budget)
    try:
        atomic_write(path, text.encode())
    except OSError as error:
        raise InputError(
            f"--out must be a file that can be written: {path}: {error.strerror}; "
            "give another --out"
        ) from error
    return path


def render(run: RunView, budget: int = BUDGET) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    # Only this script may run, and nothing may be fetched: whatever a model wrote.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        **_content(run, budget),
        script=Markup(script),
        script_hash=digest,
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
    )


def visible(value: Any) -> Any:
    """Text with control and invisible characters spelt out, so that none can reorder a line.

    >>> visible("a\\u202eb")
    'a⟨U+202E⟩b'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c
        for c in value
    )


def _content(run: RunView, budget: int) -> dict[str, Any]:
    metrics = run.metrics()
    pairs = data.pairs(run)
    compared = data.comparison(run)
    timing = data.timing(run, metrics, pairs)
    said = verdict(run)
    kl = data.kl(run)
    return {
        "name": run.config.run.name,
        "verdict": said,
        "tone": _TONES[said.tone],
        "stamps": stamps(run),
        "facts": _facts(run, compared, pairs, kl, timing),
        "scores": page.scores(data.dimensions(run), compared) if run.evaluated else None,
        "gates": page.gates(data.gate_rows(run)),
        "funnels": page.funnels(run),
        "pools": data.pool_counts(run),
        "pairs": page.pairs(pairs),
        "training": page.training(metrics, kl, run.config.gates.max_kl),
        "timing": page.timing(timing),
        "browser": browser(run, budget),
        "settings": _settings(run),
        "versions": (run.rounds[0].manifest.get("versions", {}) if run.rounds else {}),
    }


def _facts(
    run: RunView,
    compared: data.Comparison | None,
    pairs: list[data.Pairs],
    kl: list[data.Point],
    timing: data.Timing,
) -> list[tuple[str, str, str]]:
    """What is asked first: name, value, what it is about."""
    facts = []
    if compared is not None:
        start, now = (side["reward"]["value"] for side in (compared.start, compared.now))
        where = f"start → round {compared.round}, {compared.split} split"
        facts.append(("Reward", f"{number(start)} → {number(now)}", where))
        drift = next((p for p in kl if p.round == compared.round), None)
        if drift is not None:
            facts.append(("KL to the start", f"{drift.value:.2f}", f"nats, round {drift.round}"))
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
