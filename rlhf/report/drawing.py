"""How plots are drawn: small matplotlib figures as SVG that a web page can colour and scale.

One unit is one CSS pixel at the width given here, so panels are drawn as small as a phone shows
them and a grid lays them out. Text stays text. Colours are names of CSS variables (`--up` and so
on), so a theme recolours a plot; what a colour says is also said by a shape or a label.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours to draw with -> the CSS variable that replaces them; no two may be equal.
INK, MUTED, GRID = "#1a1c1e", "#5f6770", "#dfe3e7"
UP, DOWN, FLAT, AUDIT = "#0067a5", "#c24a00", "#737b84", "#8a4f9e"
UP_SOFT, DOWN_SOFT, CARD = "#e3eff7", "#fbeadf", "#f5f7f9"
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", UP: "up", DOWN: "down", FLAT: "flat", AUDIT: "audit",
    UP_SOFT: "up-soft", DOWN_SOFT: "down-soft", CARD: "card",
}  # fmt: skip
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pairloop",
    "svg.image_inline": True,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.size": 10.5,
    "font.sans-serif": "DejaVu Sans",
    "axes.linewidth": 0.8,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
_P = ParamSpec("_P")


def styled(draw: Callable[_P, Markup]) -> Callable[_P, Markup]:
    """Draw under this module's settings, whatever the process has set for its own plots."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Markup:
        with rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return drawn


def axes_of(width: float, height: float, margins: tuple[float, float, float, float]) -> Axes:
    """Axes inside `margins` (left, right, top, bottom) of a figure, all in pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    left, right, top, bottom = margins
    box = (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - top - bottom) / height,
    )
    axes = figure.add_axes(box)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.tick_params(length=0, pad=4)
    return axes


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def svg_of(figure: Any, label: str) -> Markup:
    """The figure as an `<svg>` element with a name for screen readers and no fixed size."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Its style element would speak for the whole page, as its comments and metadata say nothing.
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL
    )
    width, height = (round(72 * size) for size in figure.get_size_inches())
    opening = (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'style="--width: {width}px">'
    )
    text = opening + text[text.index(">") + 1 :]
    text = text.replace(" font-family: 'DejaVu Sans', sans-serif;", "")
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return Markup(_own_ids(re.sub(r"\n\s*", "\n", text), label))


def _own_ids(text: str, label: str) -> str:
    """Ids that something refers to get this plot's prefix, so that no two plots share one; the
    others go."""
    prefix = "c" + hashlib.sha256(label.encode()).hexdigest()[:6]
    used = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)", text))
    text = re.sub(
        r'(<\w+) id="([^"]+)"',
        lambda m: f'{m[1]} id="{prefix}{m[2]}"' if m[2] in used else m[1],
        text,
    )
    return text.replace('xlink:href="#', f'xlink:href="#{prefix}').replace(
        "url(#", f"url(#{prefix}"
    )
