"""Certificates on disk: written by calibration, looked up before a judge's scores may train.

A registry is a folder of JSON files, one for each calibration of one judge. The newest that names
the judge as it is now (model, revision, rubric) and covers the dimension is the one that counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from rlhf.calibration import Finding, Use
from rlhf.config import RunConfig
from rlhf.config_calibration import Calibration, Thresholds
from rlhf.errors import InputError
from rlhf.files import read_json, write_json

Status = Literal["granted", "missing", "mismatched", "refused", "expired"]

_FORMAT = 1
_IDENTITY = ("model", "model_revision", "rubric_hash")
_KEYS = {"judge", *_IDENTITY, "gold_hash", "date", "expires", "thresholds", "dimensions"}


@dataclass(frozen=True, slots=True)
class JudgeIdentity:
    """Everything about a judge whose change makes it another judge.

    >>> JudgeIdentity("house", model="org/judge", model_revision="1f0c").remote
    False
    """

    judge: str
    model: str | None = None
    model_revision: str | None = None
    rubric_hash: str | None = None
    votes: int = 1
    """How often it is asked for one score."""
    remote: bool = False
    """Whether others serve it, and may change it."""


IDENTITIES = "identities.json"
"""Beside a run's judges, and beside the verdicts of theirs that were drawn from it."""


def write_identities(path: Path, known: Mapping[tuple[str, str], JudgeIdentity]) -> None:
    """Who gave the verdicts of a run, by judge and dimension."""
    entries = [{"dimension": d, **asdict(identity)} for (_, d), identity in sorted(known.items())]
    write_json(path, {"identities": entries})


def check_measured(verdicts: Path, known: Mapping[tuple[str, str], JudgeIdentity]) -> None:
    """Raises InputError where a file of verdicts has `IDENTITIES` beside it, and another judge of a
    name gave them than the one that would be certified."""
    path = verdicts.with_name(IDENTITIES)
    if not path.is_file():
        return
    for entry in read_json(path, "sample the run again")["identities"]:
        now = known.get((entry["judge"], entry["dimension"]))
        if now is None:
            continue
        changed = [name for name, value in asdict(now).items() if entry.get(name) != value]
        if changed:
            told = ", ".join(f"{n} {entry.get(n)} -> {getattr(now, n)}" for n in changed)
            raise InputError(
                f"judge {entry['judge']} on {entry['dimension']} is not the one whose verdicts are "
                f"in {verdicts}: {told}; put back what was changed, or sample and label answers "
                "that it has judged"
            )


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a judge may be used on a dimension, and why not."""

    judge: str
    dimension: str
    status: Status
    reason: str
    certificate: Path | None = None
    shown: Mapping[str, Any] | None = None
    """What that certificate says of the dimension (`n`, `floor`, `metrics`, ...), with its `date`,
    when it `expires` and `gold_hash`."""

    @property
    def granted(self) -> bool:
        """Whether its scores may train."""
        return self.status == "granted"


def write_certificate(
    registry: Path,
    identity: JudgeIdentity,
    findings: Sequence[Finding],
    gold_hash: str,
    settings: Calibration,
    now: datetime,
) -> Path:
    """Store what calibration found for one judge; the file's path.

    `findings` are all of `identity.judge`, `gold_hash` is the SHA-256 of the gold labels, `now` is
    aware of its zone. The file is whole or absent.
    """
    assert findings and all(finding.judge == identity.judge for finding in findings)
    expires = now + timedelta(days=settings.remote_days) if identity.remote else None
    content = {
        "format": _FORMAT,
        "judge": identity.judge,
        **{name: getattr(identity, name) for name in _IDENTITY},
        "gold_hash": gold_hash,
        "date": now.isoformat(),
        "expires": expires and expires.isoformat(),
        "thresholds": settings.thresholds.model_dump(mode="json"),
        "dimensions": {finding.dimension: _entry(finding) for finding in findings},
    }
    key = json.dumps([asdict(identity), gold_hash, sorted(f.dimension for f in findings)])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", identity.judge).strip(".-") or "judge"
    path = registry / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    write_json(path, content)
    return path


def _entry(finding: Finding) -> dict[str, Any]:
    found = finding.as_json()
    order = ("verdict", "reasons", "purposes", "floor", "votes", "n", "left_out", "metrics")
    return {name: found[name] for name in order}


def find_certificate(
    registry: Path,
    identity: JudgeIdentity,
    dimension: str,
    use: Use,
    thresholds: Thresholds,
    now: datetime,
) -> Standing:
    """How `identity` stands on `dimension`, for what it is used for and against these thresholds.

    missing: no certificate covers the dimension. mismatched: those that do are of another model,
    revision, rubric, number of votes, floor or thresholds, each named. Else refused, expired or
    granted, by the newest.

    Raises InputError where the registry holds what is no certificate.
    """

    shown: Mapping[str, Any] | None = None

    def standing(status: Status, reason: str, path: Path | None = None) -> Standing:
        return Standing(identity.judge, dimension, status, reason, path, shown)

    covering = [
        (path, certificate)
        for path, certificate in _certificates(registry)
        if certificate["judge"] == identity.judge and dimension in certificate["dimensions"]
    ]
    if not covering:
        return standing("missing", f"{registry} holds no certificate for it")
    covering.sort(key=lambda found: (found[1]["date"], found[0].name), reverse=True)
    same = [found for found in covering if not _other_judge(found[1], identity)]
    path, certificate = (same or covering)[0]
    entry = certificate["dimensions"][dimension]
    shown = {**entry, **{name: certificate[name] for name in ("date", "expires", "gold_hash")}}
    differences = [
        *_other_judge(certificate, identity),
        *_other_use(entry, identity, use),
        *_other_thresholds(certificate["thresholds"], thresholds),
    ]
    if differences:
        return standing("mismatched", "; ".join(differences), path)
    wanted = [
        purpose
        for purpose, used in (("pairs", use.pairs), ("floor", use.floor is not None))
        if used
    ]
    if any(entry["purposes"][purpose] != "granted" for purpose in wanted):
        reasons = "; ".join(entry["reasons"])
        return standing("refused", reasons or f"not granted for {' and '.join(wanted)}", path)
    expires = certificate["expires"]
    if expires is not None and now >= datetime.fromisoformat(expires):
        return standing("expired", f"it was valid until {expires}", path)
    return standing("granted", f"calibrated {certificate['date']} on {entry['n']} items", path)


def require_certificates(
    config: RunConfig, identities: Mapping[tuple[str, str], JudgeIdentity], now: datetime
) -> list[Standing]:
    """How judges stand on the dimensions that the run uses.

    `identities` are those of the judges that need certificates, which verifiers don't, by name and
    dimension (a rubric may be a dimension's own). Call it before anything is generated; the caller
    prints and logs what is not granted and stamps the report.

    Raises InputError naming every certificate that is not granted, unless judges.uncertified is
    `allow`.
    """
    registry, thresholds = Path(config.calibration.registry), config.calibration.thresholds
    found = [
        find_certificate(registry, identity, dimension, Use.of(config, dimension), thresholds, now)
        for (_, dimension), identity in identities.items()
        if dimension in config.needed
    ]
    bad = [standing for standing in found if not standing.granted]
    if bad and config.judges.uncertified == "refuse":
        lines = [f"  {s.judge} on {s.dimension}: {s.status}: {s.reason}" for s in bad]
        raise InputError(
            "judges.panel must have a certificate for every dimension that is used; found\n"
            + "\n".join(lines)
            + "\ncalibrate them with `pairloop judge calibrate CONFIG`, or set judges.uncertified "
            "to allow and have the report say so"
        )
    return found


def retest_sd(standing: Standing) -> float | None:
    """Standard deviation of one score when the same answer is judged again, as the certificate that
    is granted has it; None where nobody measured it. Raises InputError where it can't be read."""
    if not standing.granted or standing.certificate is None:
        return None
    certificate = read_json(standing.certificate, "calibrate again")
    found = certificate["dimensions"][standing.dimension]["metrics"].get("retest_sd")
    return None if found is None else float(found["value"])


def _certificates(registry: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    remedy = "take it out of the registry, or calibrate again"
    for path in sorted(registry.glob("*.json")) if registry.is_dir() else []:
        certificate = read_json(path, remedy)
        if certificate.get("format") != _FORMAT or not certificate.keys() >= _KEYS:
            raise InputError(
                f"{path} must be a certificate of format {_FORMAT}, found format "
                f"{certificate.get('format')} with {sorted(certificate)}; {remedy}"
            )
        yield path, certificate


def _other_judge(certificate: Mapping[str, Any], identity: JudgeIdentity) -> list[str]:
    """What makes the certified judge another one than `identity`."""
    wanted = ((name, getattr(identity, name)) for name in _IDENTITY)
    return [
        f"{name} was {_named(certificate[name])} when calibrated and is {_named(value)} now"
        for name, value in wanted
        if certificate[name] != value
    ]


def _other_use(entry: Mapping[str, Any], identity: JudgeIdentity, use: Use) -> Iterator[str]:
    if entry["votes"] > identity.votes:
        yield (
            f"calibrated on the mean of {entry['votes']} runs, and asked {identity.votes} time(s) "
            "now: calibrate with calibration.repeats first"
        )
    if use.floor is not None and entry["floor"] != use.floor:
        yield f"calibrated at floor {_named(entry['floor'])}, and the floor is {use.floor:g} now"


def _other_thresholds(certified: Mapping[str, Any], thresholds: Thresholds) -> Iterator[str]:
    for name, value in thresholds.model_dump(mode="json").items():
        if certified.get(name) != value:
            yield (
                f"calibration.thresholds.{name} was {_named(certified.get(name))} when calibrated "
                f"and is {_named(value)} now"
            )


def _named(value: Any) -> str:
    return "none" if value is None else str(value)
