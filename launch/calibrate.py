"""`pairloop judge calibrate`: how far verdicts agree with gold, and the certificates that earns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.judge import Places
from rlhf import config_io
from rlhf.calibration import LEFT_OUT, Finding, Use, compared, finding_of
from rlhf.certificates import JudgeIdentity, check_measured, write_certificate
from rlhf.config import RunConfig
from rlhf.config_calibration import Calibration
from rlhf.config_judges import VerifierSpec
from rlhf.config_selection import STANDARD_FLOORS, Selection
from rlhf.errors import InputError
from rlhf.files import finite_or_null, sha256_file
from rlhf.judged import collect
from rlhf.judgements import read_both

Override = tuple[str, str]

_SECTIONS = ("calibration.", "selection.floors")


def run(
    config: RunConfig | None, places: Places, overrides: Sequence[Override], as_json: bool
) -> int:
    """Calibrate the judges of a verdict file; 0, whatever the verdicts are.

    Without a config the settings are the defaults with `overrides`, and certificates are written
    only where a registry is given. The page is written where `places.report` says, else beside
    the certificates.

    Raises InputError: files that are missing or can't be used, unknown settings.
    """
    settings, use = _settings(config, overrides)
    verdicts_path = _file(places.verdicts, settings.verdicts, "verdicts")
    gold_path = _file(places.gold, settings.gold, "gold")
    judged = compared(collect(*read_both(verdicts_path, gold_path), settings.repeats))
    findings = [finding_of(forms, use(forms[0].dimension), settings) for forms in judged]
    registry = places.registry
    if registry is None and config is not None:
        registry = Path(settings.registry)
    written = []
    if registry is not None:
        known = _identities(config)
        check_measured(verdicts_path, known)
        written = _certify(findings, registry, sha256_file(gold_path), settings, known)
    report = places.report or (registry and registry / _page_name(verdicts_path, gold_path))
    if report:
        from rlhf.report.calibration import Origin, write_calibration

        origin = Origin(str(verdicts_path), str(gold_path), settings.bootstrap)
        write_calibration(report, list(zip(findings, judged, strict=True)), origin, "--report")
    if as_json:
        listed = [finite_or_null(finding.as_json()) for finding in findings]
        print(json.dumps(listed, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    _show(findings)
    for path in written:
        print(f"certificate: {path}")
    if not written:
        print("no certificate was written: name a folder with --registry")
    print(f"plots: {report}" if report else "no plots were drawn: name a file with --report")
    return 0


def _page_name(verdicts: Path, gold: Path) -> str:
    """One page for each pair of files, so that a certificate's page stays beside it."""
    both = sha256_file(verdicts) + sha256_file(gold)
    return f"calibration-{hashlib.sha256(both.encode()).hexdigest()[:12]}.html"


def _settings(
    config: RunConfig | None, overrides: Sequence[Override]
) -> tuple[Calibration, Callable[[str], Use]]:
    if config is not None:
        return config.calibration, lambda dimension: Use.of(config, dimension)
    for key, _ in overrides:
        if not key.startswith(_SECTIONS):
            raise InputError(
                f"--{key} must be a setting of calibration or selection.floors where there is no "
                "config; leave it out, or name a config"
            )
    calibration = [o for o in overrides if o[0].startswith("calibration.")]
    selection = [o for o in overrides if o[0].startswith("selection.")]
    floors = config_io.load_section("selection", Selection, selection).floors
    floors = STANDARD_FLOORS if floors is None else floors
    settings = config_io.load_section("calibration", Calibration, calibration)
    return settings, lambda dimension: Use(floor=floors.get(dimension))


def _file(given: Path | None, configured: str | None, name: str) -> Path:
    if given is not None:
        return given
    if configured is None:
        raise InputError(
            f"--{name} must name a JSONL file, found none; give it, or set calibration.{name} in "
            "a config"
        )
    return Path(configured)


def _identities(config: RunConfig | None) -> dict[tuple[str, str], JudgeIdentity]:
    """The config's own model judges: a certificate names their model, revision and rubric."""
    if config is None:
        return {}
    from launch.judging import identities
    from rollout.judges.panel import InProcess, build

    models = [spec for spec in config.judges.panel if not isinstance(spec, VerifierSpec)]
    return identities(build(models, "judges.panel", InProcess(config.placement.device)))


def _certify(
    findings: Sequence[Finding],
    registry: Path,
    gold_hash: str,
    settings: Calibration,
    known: Mapping[tuple[str, str], JudgeIdentity],
) -> list[Path]:
    """A certificate for each identity: a judge of the config has one for each dimension, since
    every dimension has its own rubric; of any other judge only the name is known."""
    now = datetime.now(UTC)
    by_identity: dict[JudgeIdentity, list[Finding]] = {}
    for finding in findings:
        found = known.get((finding.judge, finding.dimension), JudgeIdentity(finding.judge))
        by_identity.setdefault(found, []).append(finding)
    return [
        write_certificate(registry, who, found, gold_hash, settings, now)
        for who, found in by_identity.items()
    ]


def _show(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        # A file has no width: nothing in it is folded to fit one.
        console.width = 160
    for finding in findings:
        console.print(_metrics(finding))
        left_out = [f"{n} {LEFT_OUT[why]}" for why, n in finding.left_out.items() if n]
        if left_out:
            console.print(f"left out: {', '.join(left_out)}")
        for reason in finding.reasons:
            console.print(f"- {reason}")
        console.print()
    console.print(_verdicts(findings))


def _metrics(finding: Finding) -> Table:
    table = Table(title=f"{finding.judge} on {finding.dimension}: {finding.verdict}")
    table.title_justify = "left"
    table.add_column("metric")
    for column in ("value", "95% interval", "n", "smallest detectable"):
        table.add_column(column, justify="right")
    for name, metric in finding.metrics.items():
        at_floor = name in ("precision", "recall", "f1")
        table.add_row(
            f"{name} at {finding.floor:g}" if at_floor else name,
            f"{metric.value:.3f}",
            f"{metric.low:.3f} to {metric.high:.3f}",
            str(metric.n),
            f"{metric.detectable:.3f}",
        )
    return table


def _verdicts(findings: Sequence[Finding]) -> Table:
    table = Table(title="Verdicts", title_justify="left")
    for column in ("judge", "dimension", "verdict", "granted for"):
        table.add_column(column, overflow="fold")
    table.add_column("n", justify="right")
    for finding in findings:
        table.add_row(*_verdict_row(finding))
    return table


def _verdict_row(finding: Finding) -> tuple[str, ...]:
    granted: list[Any] = [p for p, verdict in finding.purposes.items() if verdict == "granted"]
    return (
        finding.judge,
        finding.dimension,
        finding.verdict,
        ", ".join(granted) or "nothing",
        str(finding.n),
    )
