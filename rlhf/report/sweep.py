"""The page of a sweep: what each point gained, against how far it drifted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from rlhf.document import document, write_document
from rlhf.evaluation import AUDIT_PREFIX
from rlhf.report.drawing import GRID, INK, MUTED, UP, axes_of, cut, styled, svg_of
from rlhf.report.page import Plot
from rlhf.report.tables import table
from rlhf.sweep import Outcome, answer_rows, rows

_TEMPLATES = Path(__file__).parent / "templates"
MEASURES = {
    "preferred": "share of held-out pairs whose chosen answer is likelier than the rejected one",
    "moved": "share of held-out answers that went their way, good ones up and bad ones down; half "
    "before anything moved",
}


@dataclass(frozen=True, slots=True)
class Dot:
    """A point in a plot; its interval where that is bounded."""

    name: str
    drift: float
    gain: float
    low: float | None
    high: float | None


def write_sweep(path: Path, name: str, outcomes: Sequence[Outcome]) -> Path:
    """Write the page; where it is. Raises InputError where it can't be written."""
    done = [o for o in outcomes if o.failure is None]
    heard = answer_rows(outcomes)
    content = {
        "name": name,
        "sentence": _sentence(done, len(outcomes)),
        "measure": MEASURES[done[0].measure or ""] if done else "",
        "plots": list(_plots(done)),
        "undrawn": [_label(o) for o in done if o.drift is None],
        "table": table("Every point", rows(outcomes), "said"),
        "answers": table("Held-out answers", heard) if heard else None,
        "panels": list(_panels(done)),
    }
    return write_document(path, document(_TEMPLATES, "sweep", content, look="page"), "run.name")


def _sentence(done: Sequence[Outcome], count: int) -> str:
    said = f"{len(done)} of {count} points are done."
    if not done:
        return said
    best = max(done, key=lambda o: o.gain or 0.0)
    drift = "" if best.drift is None else f" at a drift of {best.drift:.2f} nats"
    sure = best.low is not None and best.low > 0
    doubt = "" if sure else "; its 95% interval holds 0, so that may be chance"
    return f"{said} {_label(best)} gained most, {best.gain:+.3f}{drift}{doubt}."


def _label(found: Outcome) -> str:
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in found.settings.items())


def _plots(done: Sequence[Outcome]) -> Iterator[Plot]:
    """Preference against drift, of the points whose objective has a reference to drift from."""
    dots = [
        Dot(_label(o), o.drift, o.gain, o.low, o.high)
        for o in done
        if o.drift is not None and o.gain is not None
    ]
    if dots:
        title = "Preference gained against drift"
        yield Plot(title, trade_off(dots, title, "drift from the reference, nats an answer"))


def _panels(done: Sequence[Outcome]) -> Iterator[Plot]:
    """Reward and each dimension of held-out answers against their KL to the start."""
    given = [(_label(o), o.answers) for o in done if o.answers is not None]
    names = given[0][1].changes if given else ()
    for name in sorted(names, key=lambda n: (n != "reward", n.startswith(AUDIT_PREFIX), n)):
        dots = [
            Dot(label, found.kl, found.changes[name].value, *found.changes[name].ends)
            for label, found in given
        ]
        title = f"{name} gained against KL"
        yield Plot(title, trade_off(dots, title, "KL to the start, nats an answer"))


@styled
def trade_off(dots: Sequence[Dot], label: str, across: str) -> Markup:
    """What was gained, with its interval, by drift; each point named."""
    axes = axes_of(360, 280, (52, 12, 12, 44))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    middle = (min(d.drift for d in dots) + max(d.drift for d in dots)) / 2
    for place, dot in enumerate(sorted(dots, key=lambda d: d.drift)):
        if dot.low is not None and dot.high is not None:
            axes.plot([dot.drift] * 2, [dot.low, dot.high], color=UP, linewidth=1.2, alpha=0.6)
        axes.plot([dot.drift], [dot.gain], "o", color=UP, markersize=6)
        # Names stand towards the middle, neighbours' above and below in turn.
        left = dot.drift <= middle
        axes.annotate(
            cut(dot.name, 30),
            (dot.drift, dot.gain),
            xytext=(7 if left else -7, -13 if place % 2 else 7),
            textcoords="offset points",
            horizontalalignment="left" if left else "right",
            color=INK,
        )
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel(across, color=MUTED)
    axes.set_ylabel("gained", color=MUTED)
    return svg_of(axes.figure, label)
