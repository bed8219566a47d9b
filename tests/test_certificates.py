"""Certificates are written whole, found by who the judge is now, and stop a run without one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.judging import Judging
from rlhf import config_io
from rlhf.agreement import Metric
from rlhf.calibration import Finding, Use
from rlhf.certificates import (
    IDENTITIES,
    JudgeIdentity,
    Standing,
    check_measured,
    find_certificate,
    require_certificates,
    retest_sd,
    write_certificate,
    write_identities,
)
from rlhf.config import RunConfig
from rlhf.config_calibration import Calibration, Thresholds
from rlhf.errors import InputError
from rollout.judges.panel import InProcess

NOW = datetime(2026, 1, 10, 12, tzinfo=UTC)
JUDGE = JudgeIdentity("house", "org/judge", "1f0c", "rubric-1")
PAIRS = Use()
FLOOR = Use(floor=0.6)


def finding(**changes: Any) -> Finding:
    granted = Finding(
        judge="house",
        dimension="correctness",
        n=200,
        metrics={"within_prompt_accuracy": Metric(0.8, 0.7, 0.9, 200, 0.14)},
        verdict="granted",
        reasons=(),
        purposes={"pairs": "granted", "floor": "granted"},
        floor=0.6,
        votes=1,
        left_out={"no_gold": 0},
        bounds=(),
    )
    return replace(granted, **changes)


def store(
    registry: Path,
    *findings: Finding,
    identity: JudgeIdentity = JUDGE,
    now: datetime = NOW,
    gold: str = "gold-1",
) -> Path:
    return write_certificate(registry, identity, findings or (finding(),), gold, Calibration(), now)


def look_up(
    registry: Path,
    identity: JudgeIdentity = JUDGE,
    dimension: str = "correctness",
    use: Use = FLOOR,
    thresholds: Thresholds | None = None,
    now: datetime = NOW,
) -> Standing:
    return find_certificate(registry, identity, dimension, use, thresholds or Thresholds(), now)


def test_a_certificate_says_who_what_when_and_why(tmp_path: Path) -> None:
    path = store(tmp_path / "registry", finding(metrics={}, reasons=("pairs: no",)))
    said = json.loads(path.read_text())
    assert [said[k] for k in ("judge", "model", "model_revision", "rubric_hash", "gold_hash")] == [
        "house", "org/judge", "1f0c", "rubric-1", "gold-1",
    ]  # fmt: skip
    assert said["date"] == NOW.isoformat()
    assert said["expires"] is None
    assert said["thresholds"]["within_prompt_accuracy"] == 0.6
    entry = said["dimensions"]["correctness"]
    assert (entry["verdict"], entry["reasons"], entry["floor"]) == ("granted", ["pairs: no"], 0.6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_granted_certificate_is_found(tmp_path: Path) -> None:
    path = store(tmp_path)
    found = look_up(tmp_path)
    assert (found.status, found.granted, found.certificate) == ("granted", True, path)
    assert "200 items" in found.reason


def test_the_retest_spread_of_a_granted_certificate_can_be_used(tmp_path: Path) -> None:
    measured = {"retest_sd": Metric(0.04, 0.02, 0.06, 200, 0.01)}
    store(tmp_path / "with", finding(metrics=measured))
    store(tmp_path / "without")
    refused = {"pairs": "refused", "floor": "refused"}
    store(tmp_path / "refused", finding(metrics=measured, verdict="refused", purposes=refused))
    found = {name: retest_sd(look_up(tmp_path / name)) for name in ("with", "without", "refused")}
    assert found == {"with": 0.04, "without": None, "refused": None}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert look_up(tmp_path / "nowhere").status == "missing"
    store(tmp_path)
    assert look_up(tmp_path, dimension="style").status == "missing"
    assert look_up(tmp_path, replace(JUDGE, judge="other")).status == "missing"


@pytest.mark.parametrize(
    ("changes", "use", "thresholds", "reason"),
    [
        ({"model": "org/new"}, FLOOR, {}, "model was org/judge when calibrated and is org/new now"),
        ({"model_revision": "2"}, FLOOR, {}, "model_revision was 1f0c when calibrated and is 2"),
        ({"rubric_hash": None}, FLOOR, {}, "rubric_hash was rubric-1 when calibrated and is none"),
        ({}, Use(floor=0.7), {}, "calibrated at floor 0.6, and the floor is 0.7 now"),
        ({}, FLOOR, {"recall": 0.6}, "calibration.thresholds.recall was 0.5 when calibrated and"),
    ],
)
def test_a_mismatch_names_what_differs(
    changes: dict[str, Any],
    use: Use,
    thresholds: dict[str, float],
    reason: str,
    tmp_path: Path,
) -> None:
    store(tmp_path)
    identity = replace(JUDGE, **changes)
    found = look_up(tmp_path, identity, use=use, thresholds=Thresholds(**thresholds))  # type: ignore[arg-type]
    assert (found.status, found.granted) == ("mismatched", False)
    assert reason in found.reason


def test_the_mean_of_runs_certifies_no_single_call(tmp_path: Path) -> None:
    store(tmp_path, finding(votes=3))
    assert "calibrated on the mean of 3 runs, and asked 1 time(s)" in look_up(tmp_path).reason
    assert look_up(tmp_path, replace(JUDGE, votes=3)).granted


def test_a_refusal_counts_for_the_use_that_it_is_about(tmp_path: Path) -> None:
    purposes = {"pairs": "granted", "floor": "refused"}
    store(tmp_path, finding(verdict="refused", reasons=("floor 0.6: low",), purposes=purposes))
    assert look_up(tmp_path, use=PAIRS).granted
    found = look_up(tmp_path, use=FLOOR)
    assert (found.status, found.reason) == ("refused", "floor 0.6: low")


def test_only_a_remote_judges_certificate_expires(tmp_path: Path) -> None:
    remote = replace(JUDGE, remote=True)
    store(tmp_path / "remote", identity=remote)
    store(tmp_path / "local")
    last, late = NOW + timedelta(days=29), NOW + timedelta(days=31)
    assert look_up(tmp_path / "remote", remote, now=last).granted
    found = look_up(tmp_path / "remote", remote, now=late)
    assert (found.status, found.reason) == (
        "expired",
        "it was valid until 2026-02-09T12:00:00+00:00",
    )
    assert look_up(tmp_path / "local", now=late).granted


def test_the_newest_certificate_of_this_judge_counts(tmp_path: Path) -> None:
    store(tmp_path)
    store(tmp_path, finding(dimension="style"), now=NOW + timedelta(days=1))
    other = replace(JUDGE, rubric_hash="rubric-2")
    store(tmp_path, identity=other, now=NOW + timedelta(days=2))
    assert look_up(tmp_path).granted, "neither another dimension nor another rubric replaces it"
    refused = {"pairs": "refused", "floor": "refused"}
    store(
        tmp_path,
        finding(verdict="refused", reasons=("worse",), purposes=refused),
        now=NOW + timedelta(days=3),
        gold="gold-2",
    )
    assert look_up(tmp_path).status == "refused"
    assert look_up(tmp_path, other).granted


def test_what_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match=r"notes.json must be a certificate of format 1"):
        look_up(tmp_path)
    (tmp_path / "notes.json").write_text("{")
    with pytest.raises(InputError, match=r"notes.json must be JSON"):
        look_up(tmp_path)


def run_config(registry: Path, *more: tuple[str, str]) -> RunConfig:
    panel = "[{name: house, function: 'a:b', dimensions: [correctness, style, unused]}]"
    return config_io.load(
        [],
        [
            ("model.path", "m"),
            *((f"prompts.{split}.path", "p") for split in ("train", "gate", "final")),
            ("judges.panel", panel),
            ("calibration.registry", str(registry)),
            *more,
        ],
    )


def test_a_run_stops_before_it_starts_unless_it_says_otherwise(tmp_path: Path) -> None:
    store(tmp_path)
    identities = {("house", d): JUDGE for d in ("correctness", "style", "unused")}
    with pytest.raises(InputError) as caught:
        require_certificates(run_config(tmp_path), identities, NOW)
    assert "house on style: missing: " in str(caught.value)
    assert "correctness" not in str(caught.value)
    assert "unused" not in str(caught.value)
    allowed = run_config(tmp_path, ("judges.uncertified", "allow"))
    found = require_certificates(allowed, identities, NOW)
    assert [(s.dimension, s.granted) for s in found] == [("correctness", True), ("style", False)]
    store(tmp_path, finding(dimension="style", floor=None, purposes={"pairs": "granted"}))
    assert all(s.granted for s in require_certificates(run_config(tmp_path), identities, NOW))
    assert require_certificates(run_config(tmp_path), {}, NOW) == []


def test_the_command_writes_what_a_run_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("verdicts.jsonl").open("w") as verdicts, Path("gold.jsonl").open("w") as gold:
        for item in range(160):
            good = (item * 7 % 10) / 10
            line = {"item_id": item, "dimension": "correctness", "score": good}
            gold.write(json.dumps(line) + "\n")
            extra = {"judge": "house", "prompt_id": item // 4}
            verdicts.write(json.dumps({**line, **extra}) + "\n")
    Path("run.yaml").write_text(
        """\
model: {path: m}
prompts: {train: {path: p}, gate: {path: p}, final: {path: p}}
judges:
  panel: [{name: house, function: 'a:b', dimensions: [correctness]}]
selection: {floors: {correctness: 0.5}}
calibration: {verdicts: verdicts.jsonl, gold: gold.jsonl, bootstrap: 200}
"""
    )
    assert main(["judge", "calibrate", "run.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "house on correctness: granted" in shown
    assert "precision at 0.5" in shown
    assert "pairs, floor" in shown
    (path,) = Path("certificates").glob("*.json")
    assert len(list(Path("certificates").glob("calibration-*.html"))) == 1
    assert f"certificate: {path}" in shown
    said = json.loads(path.read_text())
    assert said["gold_hash"] == hashlib.sha256(Path("gold.jsonl").read_bytes()).hexdigest()
    config = config_io.load([Path("run.yaml")])
    identities = {("house", "correctness"): JudgeIdentity("house")}
    assert all(s.granted for s in require_certificates(config, identities, datetime.now(UTC)))

    files = ["--verdicts", "verdicts.jsonl", "--gold", "gold.jsonl"]
    assert main(["judge", "calibrate", *files, "--calibration.bootstrap", "100"]) == 0
    assert "no certificate was written" in capsys.readouterr().out
    assert main(["judge", "calibrate", *files, "--registry", "mine", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["floor"], found["verdict"]) == (0.6, "granted")
    assert len(list(Path("mine").glob("*.json"))) == 1


def test_calibration_certifies_the_model_that_the_config_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("verdicts.jsonl").open("w") as verdicts, Path("gold.jsonl").open("w") as gold:
        for item in range(320):
            dimension = ("correctness", "style")[item % 2]
            good = (item * 7 % 10) / 10
            line = {"item_id": item, "dimension": dimension, "score": good}
            gold.write(json.dumps(line) + "\n")
            extra = {"judge": "reader", "prompt_id": item // 8}
            verdicts.write(json.dumps({**line, **extra}) + "\n")
    Path("run.yaml").write_text(
        """\
model: {path: m}
prompts: {train: {path: p}, gate: {path: p}, final: {path: p}}
judges:
  panel: [{kind: llm, name: reader, model: org/judge, dimensions: [correctness, style]}]
selection: {floors: {correctness: 0.5}}
calibration: {verdicts: verdicts.jsonl, gold: gold.jsonl, bootstrap: 200}
"""
    )
    config = config_io.load([Path("run.yaml")])
    with pytest.raises(InputError, match="reader on correctness: missing"):
        Judging(config, InProcess("cpu"))
    assert main(["judge", "calibrate", "run.yaml"]) == 0
    assert capsys.readouterr().out.count("certificate: ") == 2, "each dimension has its own rubric"
    assert Judging(config, InProcess("cpu")).uncertified == []
    other = config_io.load([Path("run.yaml")], [("judges.panel.0.model", "org/other")])
    with pytest.raises(InputError, match="mismatched.*org/judge"):
        Judging(other, InProcess("cpu"))


def test_verdicts_certify_nobody_but_who_gave_them(tmp_path: Path) -> None:
    """A rubric that was edited between the run and its calibration is another judge's."""
    given = JudgeIdentity("reader", "org/judge", "1f0c", "rubric")
    known = {("reader", "style"): given, ("reader", "tone"): given}
    verdicts = tmp_path / "verdicts.jsonl"
    check_measured(verdicts, known)
    write_identities(tmp_path / IDENTITIES, known)
    check_measured(verdicts, known)
    check_measured(verdicts, {("another", "style"): JudgeIdentity("another")})
    edited = {**known, ("reader", "tone"): replace(given, rubric_hash="edited")}
    with pytest.raises(InputError, match="reader on tone is not the one.*rubric -> edited"):
        check_measured(verdicts, edited)
