"""The page of a calibration: what each judge may be used for, why, and what it was seen to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.agreement import Metric
from rlhf.bounds import Bound
from rlhf.calibration import LEFT_OUT, Finding
from rlhf.document import document, write_document
from rlhf.judged import Judged
from rlhf.report.calibration_charts import BANDS, BandRow, band_forest, figure_forest
from rlhf.report.page import Plot
from rlhf.report.tables import Table, table
from rlhf.report.verdict_plots import Exhibit, exhibits
from rlhf.verdict import number

_TEMPLATES = Path(__file__).parent / "templates"
_AT_FLOOR = ("precision", "recall", "f1")
_OPEN = 6
_PEOPLE = "people"

MEANINGS: Mapping[str, str] = {
    "within_prompt_accuracy": "of two answers to one prompt that gold tells apart, how often the "
    "judge prefers the same one: the question that selection asks; a coin gives 0.5",
    "accuracy": "share of pairs with gold's verdict; ties and abstentions count as wrong where "
    "gold is decided",
    "precision": "of the answers that the judge lets pass the floor, the share that gold lets pass",
    "recall": "of the answers that gold lets pass the floor, the share that the judge lets pass",
    "f1": "harmonic mean of precision and recall",
    "pearson": "Pearson's correlation with gold, over all prompts",
    "spearman": "rank correlation with gold, over all prompts",
    "kendall": "Kendall's tau-b with gold, over all prompts",
    "kappa": "agreement with the annotators' majority beyond chance (Cohen)",
    "kappa_quadratic": "the same for grades, where being far off counts more (Cohen's weighted)",
    "human_kappa": "agreement beyond chance of two annotators, mean over annotator pairs",
    "human_vs_rest": "agreement beyond chance of an annotator with the majority of the others: "
    "what a judge could reach",
    "kappa_vs_rest": "the judge against those same majorities",
    "order_consistency": "share of pairs with equal verdicts whichever answer is shown first",
    "first_position_rate": "share of decided verdicts for the answer that is shown first; 0.5 is "
    "fair",
    "retest_sd": "standard deviation of repeated scores of one answer, in units of the score",
    "length_bias": "partial rank correlation of verdict and length, given gold; 0 is fair",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of agreement and the bands that its literature gives it."""

    title: str
    metrics: tuple[str, ...]
    """The first that a judge has."""
    edges: tuple[float, float]
    """Where moderate and good begin."""
    chance: float
    source: str

    def band(self, value: float) -> str:
        """Poor, moderate or good; an edge itself is still the lower band."""
        return BANDS[sum(value > edge for edge in self.edges)]


FAMILIES = (
    Family(
        "Of two answers to one prompt, the same preferred",
        ("within_prompt_accuracy",),
        (0.63, 0.77),
        0.5,
        "Moderate is the range in which people agree with each other on which of two answers is "
        "better (0.63 to 0.77: Stiennon et al. 2020, Ouyang et al. 2022, Bai et al. 2022). "
        "Dashed: a coin.",
    ),
    Family(
        "Agreement beyond chance (kappa)",
        ("kappa_vs_rest", "kappa"),
        (0.40, 0.60),
        0.0,
        "Above 0.40 is moderate and above 0.60 substantial by Landis and Koch (1977); Altman "
        "(1991) calls the latter good, and both call what is at or below 0.40 fair or worse.",
    ),
    Family(
        "Agreement of grades beyond chance (quadratic kappa)",
        ("kappa_quadratic",),
        (0.40, 0.60),
        0.0,
        "The bands of kappa (Landis and Koch 1977; Altman 1991). With many grades the quadratic "
        "weights give higher values than plain kappa.",
    ),
    Family(
        "Rank correlation (Spearman)",
        ("spearman",),
        (0.50, 0.75),
        0.0,
        "Above 0.50 is moderate and above 0.75 good by Koo and Li (2016), whose bands are for "
        "intraclass correlations; a rank correlation also forgives a constant offset.",
    ),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where verdicts and gold came from, by name, and how often prompts were resampled."""

    verdicts: str
    gold: str
    resamples: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """One kind of agreement on one dimension, judge by judge."""

    plot: Plot
    table: Table


@dataclass(frozen=True, slots=True)
class Part:
    """One judge on one dimension."""

    id: str
    judge: str
    dimension: str
    granted: bool
    sentence: str
    reasons: tuple[str, ...]
    counted: str
    forest: Plot | None
    figures: Table | None
    exhibits: tuple[Exhibit, ...]


def write_calibration(
    path: Path, found: Sequence[tuple[Finding, Sequence[Judged]]], origin: Origin, flag: str
) -> Path:
    """Write the page of these findings, each with the verdicts it is about; where it is.

    Raises InputError naming `flag` where `path` can't be written.
    """
    return write_document(path, render_calibration(found, origin), flag)


def render_calibration(found: Sequence[tuple[Finding, Sequence[Judged]]], origin: Origin) -> str:
    """The page as text. The same arguments give the same text."""
    findings = [finding for finding, _ in found]
    granted = [finding for finding in findings if finding.verdict == "granted"]
    parts = [_part(f"judge-{place}", *both) for place, both in enumerate(found)]
    items = max((finding.n for finding in findings), default=0)
    annotators = max((j.labels.shape[1] for _, forms in found for j in forms), default=0)
    dimensions = dict.fromkeys(finding.dimension for finding in findings)
    content = {
        "tone": "improved" if granted and len(granted) == len(findings) else "stopped",
        "mark": f"{len(granted)} of {len(findings)} granted",
        "sentence": _sentence(findings, granted),
        "facts": [
            ("Certificates", f"{len(granted)} of {len(findings)}", "judge and dimension"),
            ("Items compared", f"{items:,}", "for a judge, at most"),
            ("Annotators", str(annotators), "for an item, at most"),
            ("Intervals", "95%", f"{origin.resamples:,} bootstrap samples of the prompts"),
        ],
        "origin": origin,
        "overview": [(part, _key_figure(f)) for part, f in zip(parts, findings, strict=True)],
        "dimensions": [(d, list(_agreement(d, findings))) for d in dimensions],
        "parts": parts,
        "open": len(parts) <= _OPEN,
        "meanings": [(n, m) for n, m in MEANINGS.items() if any(n in f.metrics for f in findings)],
    }  # fmt: skip
    return document(_TEMPLATES, "calibration", content, look="page")


def _sentence(findings: Sequence[Finding], granted: Sequence[Finding]) -> str:
    if len(findings) == 1:
        return _may(findings[0])
    if not granted:
        return f"None of {len(findings)} judges earned a certificate."
    names = [f"{f.judge} on {f.dimension}" for f in granted]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{len(granted)} of {len(findings)} judges earned a certificate: {shown}."


def _may(finding: Finding) -> str:
    """What a judge may be used for, as a sentence."""
    uses = {"pairs": "build pairs", "floor": f"be a floor at {finding.floor or 0:g}"}
    may = [uses[p] for p, verdict in finding.purposes.items() if verdict == "granted"]
    not_ = [uses[p] for p, verdict in finding.purposes.items() if verdict == "refused"]
    said = f"{finding.judge} may {' and '.join(may)}" if may else f"{finding.judge} may not "
    if may and not_:
        said += ", but may not "
    return f"{said}{' and may not '.join(not_)} on {finding.dimension}."


def _key_figure(finding: Finding) -> str:
    metric = finding.metrics.get("within_prompt_accuracy")
    if metric is None:
        return "can't be measured"
    return f"{metric.value:.3f} ({metric.low:.3f} to {metric.high:.3f})"


def _agreement(dimension: str, findings: Sequence[Finding]) -> Iterator[Agreement]:
    """The kinds of agreement that some judge of the dimension has."""
    of_dimension = [f for f in findings if f.dimension == dimension]
    for family in FAMILIES:
        named = [
            (f.judge, name, f.metrics[name])
            for f in of_dimension
            for name in [next((m for m in family.metrics if m in f.metrics), None)]
            if name is not None
        ]
        if not named:
            continue
        rows = [BandRow(judge, metric, False) for judge, _, metric in named]
        if any(name == "kappa_vs_rest" for _, name, _ in named):
            rows += _people(of_dimension)
        label = f"{family.title}: {dimension}"
        plot = Plot(
            family.title, band_forest(rows, family.edges, label, family.chance), family.source
        )
        yield Agreement(plot, table(label, [_band_row(row, family) for row in rows], "band"))


def _people(findings: Sequence[Finding]) -> Iterator[BandRow]:
    """The ceiling: once where all judges were compared on the same items, else for each."""
    ceilings = {
        f.judge: f.metrics["human_vs_rest"] for f in findings if "human_vs_rest" in f.metrics
    }
    distinct = list(dict.fromkeys(ceilings.values()))
    if len(distinct) == 1:
        yield BandRow(_PEOPLE, distinct[0], True)
        return
    for judge, metric in ceilings.items():
        yield BandRow(f"{_PEOPLE}, items of {judge}", metric, True)


def _band_row(row: BandRow, family: Family) -> dict[str, str]:
    band, low = family.band(row.metric.value), family.band(row.metric.low)
    return {
        "judge": row.name,
        "value": number(row.metric.value),
        "95% interval": _interval(row.metric),
        "band": band if band == low else f"{band}, perhaps {low}",
        "n": f"{row.metric.n:,}",
        "detectable": _number(row.metric.detectable),
    }


def _part(id_: str, finding: Finding, forms: Sequence[Judged]) -> Part:
    bounds = {bound.metric: bound for bound in finding.bounds}
    about = f"{finding.judge} on {finding.dimension}"
    named = [
        (f"{name} at {finding.floor:g}" if name in _AT_FLOOR else name, metric, bounds.get(name))
        for name, metric in finding.metrics.items()
    ]
    # In units of the score, which no axis from -1 to 1 holds.
    drawn = [row for row in named if row[0] != "retest_sd"]
    label = f"{about}: figures with 95% intervals against what is asked"
    counted = [f"{finding.n:,} items have a verdict and a gold label"]
    counted += [f"{count:,} {LEFT_OUT[why]}" for why, count in finding.left_out.items() if count]
    if finding.votes > 1:
        counted.append(f"a verdict is the mean (of pairs the majority) of {finding.votes} runs")
    counted += [f"{b.metric} may be {b.asked}" for b in finding.bounds if b.why]
    rows = [_figure_row(*row) for row in named]
    return Part(
        id=id_,
        judge=finding.judge,
        dimension=finding.dimension,
        granted=finding.verdict == "granted",
        sentence=_may(finding),
        reasons=finding.reasons,
        counted="; ".join(counted) + ".",
        forest=Plot(label, figure_forest(drawn, label)) if drawn else None,
        figures=table(label, rows, "asked", "verdict") if rows else None,
        exhibits=tuple(e for judged in forms for e in exhibits(finding, judged)),
    )


def _figure_row(name: str, metric: Metric, bound: Bound | None) -> dict[str, str]:
    if bound is None:
        end, asked, holds = "", "", ""
    else:
        end = _number(bound.unfavourable(metric))
        asked = bound.asked.partition(", ")[0]
        holds = "▲ met" if bound.holds(metric) else "▼ not met"
    return {
        "figure": name,
        "value": number(metric.value),
        "95% interval": _interval(metric),
        "unfavourable end": end,
        "asked": asked,
        "verdict": holds,
        "n": f"{metric.n:,}",
        "detectable": _number(metric.detectable),
    }


def _interval(metric: Metric) -> str:
    return f"{_number(metric.low)} to {_number(metric.high)}"


def _number(value: float) -> str:
    return number(value if np.isfinite(value) else None)
