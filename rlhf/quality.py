"""What is wrong with a set of preferences: checks with targets, balance, and the worst examples.

Every check that a rule of `rlhf.pair_filter` could mend is that rule's own count, so what `analyze`
reports is what `filter` would take. Shares are of rows. The file is all there is, so a check's
verdict compares its value; the intervals say what another sample of prompts might have shown. The
exception is meta-commentary, whose detector errs: see `rlhf.meta_commentary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import polars as pl

from rlhf.duplicates import normalised
from rlhf.errors import InputError
from rlhf.files import finite_or_null
from rlhf.leaks import leaking
from rlhf.meta_commentary import measured
from rlhf.pair_filter import RULES, text_columns, unanswerable
from rlhf.pair_formats import Preferences
from rlhf.statistics import Floats, Interval, cluster_mean, standard_error

Verdict = Literal["pass", "fail", "inconclusive", "not measured", ""]

_RESAMPLES: Final = 1000
_MANY_CLUSTERS: Final = 2000
_SHOWN: Final = 120
BALANCE: Final = ("category", "principle", "source")

TARGETS: Final[Mapping[str, float]] = {
    "identical": 0.05,
    "revised_wins": 0.6,
    "delta": 0.5,
    "meta_commentary": 0.02,
    "leaks": 0.0,
}
CRITICAL: Final = ("identical", "revised_wins", "meta_commentary", "leaks")
"""Not the delta: its raw scale is the judge's, and only who knows that can set its target."""
_AT_LEAST: Final = ("revised_wins", "delta")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing measured. `value`, `low` and `high` are a share in [0, 1], or a raw score's mean.

    `count` rows of `of` were found. `passes_if` is `<`, `<=` or `>` the target.
    """

    name: str
    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    of: int | None = None
    passes_if: str = "<"
    target: float | None = None
    verdict: Verdict = ""
    critical: bool = False
    note: str = ""

    @property
    def share(self) -> bool:
        """Whether the value is a share; else it is on the file's own scale."""
        return self.name != "delta"


@dataclass(frozen=True, slots=True)
class Report:
    """`balance`: field -> rows `value`, `rows`, `share`, `delta`. `examples`: check -> rows."""

    files: tuple[str, ...]
    format: str
    rows: int
    prompts: int
    checks: tuple[Check, ...]
    balance: Mapping[str, Sequence[Mapping[str, Any]]]
    examples: Mapping[str, Sequence[Mapping[str, str]]]
    notes: tuple[str, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """Critical checks that failed."""
        return tuple(c for c in self.checks if c.critical and c.verdict == "fail")

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        report: dict[str, Any] = finite_or_null(asdict(self))
        return {**report, "failed": [check.name for check in self.failed]}


def analyze(
    preferences: Sequence[Preferences],
    targets: Mapping[str, float] = TARGETS,
    critical: Sequence[str] = CRITICAL,
    examples: int = 3,
) -> Report:
    """Measure one or more preference files; of several, each is a split.

    Raises:
        InputError: pairs beside labels, or a target or critical check that there isn't.
    """
    if len({p.paired for p in preferences}) > 1:
        raise InputError("files must all hold pairs or all hold labels, these hold both")
    table = _joined(preferences)
    paired = preferences[0].paired
    found = _by_rules(preferences, table)
    checks = [check for check, _ in found.values()]
    checks += _of_pairs(table) if paired else _of_labels(table)
    leaks, leaked = _leaks(table)
    names = {check.name for check in checks} | {"leaks"}
    _check_names({*targets, *critical} - set(TARGETS), names, "--target and --critical")
    aimless = next((name for name in critical if name not in targets), None)
    if aimless is not None:
        raise InputError(f"--critical {aimless} has no target: add --target {aimless}=VALUE")
    judged = [_judged(c, targets, critical) for c in (*checks, leaks)]
    shown = {name: reasons for name, (check, reasons) in found.items() if check.count}
    if leaked is not None and leaks.count:
        shown["leaks"] = leaked
    return Report(
        files=tuple(str(p.records.path) for p in preferences),
        format=", ".join(dict.fromkeys(p.format for p in preferences)),
        rows=table.height,
        prompts=table["prompt_key"].n_unique(),
        checks=tuple(sorted(judged, key=lambda c: (c.target is None, c.name))),
        balance={field: rows for field in BALANCE if (rows := _balance(table, field, paired))},
        examples={name: _examples(table, reasons, examples) for name, reasons in shown.items()},
        notes=_notes(preferences),
    )


def _joined(preferences: Sequence[Preferences]) -> pl.DataFrame:
    tables = [
        text_columns(p).with_columns(
            split=pl.lit(str(p.records.path)) if len(preferences) > 1 else pl.col("split")
        )
        for p in preferences
    ]
    table = pl.concat(tables).with_columns(prompt_key=normalised(pl.col("prompt")))
    return table.with_columns(cluster_key=pl.coalesce("cluster", "prompt_key"))


def _by_rules(
    preferences: Sequence[Preferences], table: pl.DataFrame
) -> dict[str, tuple[Check, pl.Series]]:
    """A check and the reasons, row by row, of each rule that needs no value to be chosen."""
    found = {}
    for name, rule in RULES.items():
        if name in ("min_delta", "max_length_ratio"):
            continue
        why = next((w for p in preferences if (w := unanswerable(rule, p))), None)
        if why is not None:
            if preferences[0].paired:
                check = Check(name, rule.what, None, note=why)
                found[name] = (check, pl.Series([], dtype=pl.String))
            continue
        reasons = rule.apply(table, preferences[0].answers, rule.default or 0.0)
        count = reasons.len() - reasons.null_count()
        of = table.height if preferences[0].paired else _concerned(name, table)
        check = Check(name, rule.what, count / of if of else None, count=count, of=of)
        if name == "near_duplicate":
            check = replace(check, what=f"{rule.what} ({rule.default})")
        if name == "meta_commentary":
            check = _corrected(check)
        found[name] = (check, reasons)
    return found


def _concerned(name: str, table: pl.DataFrame) -> int:
    preferred = name in ("meta_commentary", "refusal")
    return int(table["label"].sum()) if preferred else table.height


def _corrected(check: Check) -> Check:
    """The share with the detector's measured errors taken out."""
    if check.value is None:
        return check
    rates = measured()
    share = rates.corrected(check.value)
    note = (
        f"flagged {check.count} of {check.of} ({check.value:.1%}); corrected for the detector's "
        f"recall of {rates.recall:.0%} (on {rates.positives} labelled answers) and its "
        f"{rates.false_positive_rate:.2%} false positives (on {rates.ordinary} ordinary ones); "
        f"precision {rates.precision:.0%} on hard labelled cases"
    )
    return replace(check, value=share.value, low=share.low, high=share.high, note=note)


def _of_pairs(table: pl.DataFrame) -> list[Check]:
    delta = pl.col("score_chosen") - pl.col("score_rejected")
    scored = table.select("cluster_key", delta=delta).drop_nulls("delta")
    scored = scored.filter(pl.col("delta").is_finite())
    lengths = [pl.col(name).str.len_chars().cast(pl.Int64) for name in ("chosen", "rejected")]
    longer = table.select("cluster_key", by=lengths[0] - lengths[1]).filter(pl.col("by") != 0)
    means = table.select(c=lengths[0].mean(), r=lengths[1].mean()).row(0)
    sides = _revised(table)
    return [
        _mean("delta", "mean score of chosen minus rejected, on the raw scale", scored["delta"],
              scored["cluster_key"], "no scores in the file"),
        _mean("longer_chosen", "the longer answer is the chosen one (half: no length bias)",
              longer["by"] > 0, longer["cluster_key"], "all answers are of one length",
              f"mean length {means[0]:.0f} characters chosen, {means[1]:.0f} rejected"),
        _mean("revised_wins", "of a base and a revised answer the revised one is chosen",
              sides["wins"], sides["cluster_key"],
              "no record says which answer is base and which revised"),
    ]  # fmt: skip


def _revised(table: pl.DataFrame) -> pl.DataFrame:
    """`wins` and `cluster_key` of rows that compare a base with a revised answer.

    Both sources may be told, or `source` alone, which is then the chosen answer's.
    """
    told = [pl.col(f"{side}_source").str.to_lowercase() for side in ("chosen", "rejected")]
    compared = (told[0] == "revised") & (told[1] == "base") | (told[0] == "base") & (
        told[1] == "revised"
    )
    alone = pl.col("source").str.to_lowercase()
    wins = (
        pl.when(compared)
        .then(told[0] == "revised")
        .when(alone.is_in(["base", "revised"]))
        .then(alone == "revised")
    )
    return table.select("cluster_key", wins=wins).drop_nulls("wins")


def _of_labels(table: pl.DataFrame) -> list[Check]:
    """The share of good labels, and whether a good answer is longer than a bad one."""
    clusters = table["cluster_key"]
    length = table["completion"].str.len_chars()
    label = table["label"]
    good, bad = int(label.sum()), int((~label).sum())
    means = [
        length.filter(kind).cast(pl.Float64).to_numpy().mean() if number else 0.0
        for kind, number in ((label, good), (~label, bad))
    ]
    value = None
    if good and bad:
        # Mann-Whitney: the chance that a good answer is longer than a bad one, ties as half.
        ranks = float(length.rank("average").filter(label).sum())
        value = (ranks - good * (good + 1) / 2) / (good * bad)
    lengths = ", ".join(f"{mean:.0f} characters {kind}"
                        for mean, kind in zip(means, ("good", "bad"), strict=True))  # fmt: skip
    return [
        _mean("good", "answers labelled good", label, clusters, ""),
        Check("longer_good", "a good answer is longer than a bad one (half: no length bias)",
              value, note="labels of one kind only" if value is None else f"mean length {lengths}"),
    ]  # fmt: skip


def _mean(
    name: str, what: str, values: pl.Series, clusters: pl.Series, absent: str, note: str = ""
) -> Check:
    if values.is_empty():
        return Check(name, what, None, note=absent)
    interval = _interval(values.cast(pl.Float64).to_numpy(), clusters)
    count = int(values.sum()) if values.dtype == pl.Boolean else None
    shown = replace(Check(name, what, interval.value), count=count, of=values.len(), note=note)
    return replace(shown, low=interval.low, high=interval.high)


def _interval(values: Floats, clusters: pl.Series) -> Interval:
    """95% interval of the mean over clusters; with very many of them the normal one is as good."""
    codes = clusters.rank("dense").cast(pl.String).to_list()
    if clusters.n_unique() <= _MANY_CLUSTERS:
        return cluster_mean(values, codes, _RESAMPLES, seed=0)
    half = 1.959964 * standard_error(values, codes)
    value = float(np.mean(values))
    return Interval(value, value - half, value + half)


def _leaks(table: pl.DataFrame) -> tuple[Check, pl.Series | None]:
    """Rows that have something in common with another split, if there is one."""
    what = "the prompt, a near one, or the cluster is in another split too"
    check = Check("leaks", what, None, passes_if="<=", note="one split only")
    splits = table["split"].n_unique() - int(table["split"].has_nulls())
    if splits < 2:
        return check, None
    reasons, kinds = leaking(table)
    count = reasons.len() - reasons.null_count()
    note = ", ".join(f"{number} rows share {kind}" for kind, number in kinds.items())
    found = replace(check, value=count / table.height, count=count, of=table.height)
    return replace(found, note=f"{splits} splits: {note}"), reasons


def _check_names(asked: set[str], known: set[str], what: str) -> None:
    unknown = sorted(asked - known)
    if unknown:
        raise InputError(f"{what} must name one of {', '.join(sorted(known))}, got {unknown[0]!r}")


def _judged(check: Check, targets: Mapping[str, float], critical: Sequence[str]) -> Check:
    target = targets.get(check.name)
    if check.name in _AT_LEAST:
        check = replace(check, passes_if=">")
    check = replace(check, target=target, critical=check.name in critical)
    if check.value is None:
        return replace(check, verdict="not measured")
    if target is None:
        return check
    if check.name == "meta_commentary":
        assert check.low is not None
        assert check.high is not None
        verdict: Verdict = "pass" if check.high < target else "inconclusive"
        return replace(check, verdict="fail" if check.low >= target else verdict)
    holds = {"<": check.value < target, "<=": check.value <= target, ">": check.value > target}
    return replace(check, verdict="pass" if holds[check.passes_if] else "fail")


def _balance(table: pl.DataFrame, field: str, paired: bool) -> list[dict[str, Any]]:
    """Rows per value of a field, most first; empty where the field says nothing."""
    if table[field].null_count() == table.height or table[field].n_unique() < 2:
        return []
    delta = (pl.col("score_chosen") - pl.col("score_rejected")).mean() if paired else None
    parts = [delta.alias("delta")] if delta is not None else [pl.col("label").mean().alias("good")]
    counts = table.group_by(pl.col(field).fill_null("(none)").alias("value")).agg(
        pl.len().alias("rows"), (pl.len() / table.height).alias("share"), *parts
    )
    return counts.sort("rows", "value", descending=[True, False]).to_dicts()


def _examples(table: pl.DataFrame, reasons: pl.Series, count: int) -> list[dict[str, str]]:
    """The first rows with a reason; where scores tell, the most inverted first."""
    found = table.with_columns(reasons.alias("reason")).filter(pl.col("reason").is_not_null())
    if "score_chosen" in found.columns:
        worst = pl.col("score_chosen") - pl.col("score_rejected")
        found = found.sort(worst, nulls_last=True, maintain_order=True)
    answer = "chosen" if "chosen" in found.columns else "completion"
    texts = ("prompt", answer, *(("rejected",) if answer == "chosen" else ()))
    return found.head(count).select(
        "where", "reason", *(_shortened(name) for name in texts)
    ).to_dicts()  # fmt: skip


def _shortened(name: str) -> pl.Expr:
    text = pl.col(name).str.replace_all(r"\s+", " ")
    long = text.str.len_chars() > _SHOWN
    return pl.when(long).then(text.str.head(_SHOWN) + "...").otherwise(text).alias(name)


def _notes(preferences: Sequence[Preferences]) -> tuple[str, ...]:
    notes = [f"{p.records.path}: {note}" for p in preferences for note in p.notes]
    first = preferences[0]
    texts = [n for n, dtype in first.extras.schema.items() if dtype == pl.String]
    few = [n for n in texts if 1 < first.extras[n].n_unique() <= 50]
    if few and first.table["category"].null_count() == first.table.height:
        notes.append(f"no column category; --column category={few[0]} would use {few[0]}")
    return tuple(notes)
