"""The page of a calibration shows the verdict and why, and plots that say what the data say."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from calibrations import ORIGIN, Found, found, of_pairs, of_scores

from launch.cli import main
from rlhf.calibration import Use
from rlhf.judgements import Gold, Verdict
from rlhf.report.calibration import FAMILIES, render_calibration
from rlhf.report.calibration_charts import POINTS
from rlhf.report.crosstabs import Heat
from rlhf.report.verdict_plots import Exhibit, exhibits


def shown(found: Found) -> list[Exhibit]:
    """What stands of the first judge."""
    finding, forms = found[0]
    return [exhibit for judged in forms for exhibit in exhibits(finding, judged)]


def heat_of(found: Found, title: str) -> Heat:
    (heat,) = (e.heat for e in shown(found) if e.title == title)
    assert heat is not None
    return heat


def cells(heat: Heat) -> dict[tuple[str, str], int]:
    return {
        (row.name, column): cell.count
        for row in heat.rows
        for column, cell in zip(heat.columns, row.cells, strict=True)
        if cell.count
    }


def test_the_sentence_and_every_reason_stand_there() -> None:
    findings = of_scores(offset=0.2)
    page = html.unescape(render_calibration(findings, ORIGIN))
    assert "house may build pairs, but may not be a floor at 0.45 on style." in page
    ((finding, _),) = findings
    assert finding.reasons
    for reason in finding.reasons:
        assert reason in page
    assert "0 of 1 granted" in page
    granted = html.unescape(render_calibration(of_scores(), ORIGIN))
    assert "house may build pairs and be a floor at 0.45 on style." in granted


def test_each_figure_stands_beside_what_is_asked_and_the_end_that_is_compared() -> None:
    ((finding, forms),) = of_scores(offset=0.2)
    page = html.unescape(render_calibration([(finding, forms)], ORIGIN))
    precision = finding.metrics["precision"]
    row = re.search(r"<tr[^>]*><th[^>]*>precision at 0.45</th>(.*?)</tr>", page, re.DOTALL)
    assert row
    assert re.findall(r"<td[^>]*>(.*?)</td>", row[1]) == [
        f"{precision.value:.3f}",
        f"{precision.low:.3f} to {precision.high:.3f}",
        f"{precision.low:.3f}",
        "at least 0.800",
        "▼ not met",
        str(precision.n),
        f"{precision.detectable:.3f}",
    ]
    assert [b.metric for b in finding.bounds] == [
        "retest_sd", "within_prompt_accuracy", "precision", "recall",
    ]  # fmt: skip


def test_what_does_not_apply_is_absent() -> None:
    titles = [e.title for e in shown(of_scores(runs=1))]
    assert titles == ["Score against gold", "Within prompts"]
    assert "Order flips" not in render_calibration(of_scores(runs=1), ORIGIN)
    titles = [e.title for e in shown(of_pairs())]
    assert titles == ["Verdict against gold", "Order flips"]


def test_order_flips_are_counted_by_verdict_in_either_order() -> None:
    assert cells(heat_of(of_pairs(), "Order flips")) == {
        ("a", "b"): 10,
        ("a", "none"): 3,
        ("b", "none"): 2,
        ("a", "a"): 22,
        ("b", "b"): 23,
    }
    (flips,) = (e for e in shown(of_pairs()) if e.title == "Order flips")
    assert flips.lead.startswith("10 of 60 verdicts (17%) turn round with the order")
    assert flips.numbers is not None
    assert [row[1] for row in flips.numbers.rows] == ["45", "10", "0", "0", "5"]


def test_grades_are_a_table_and_abstentions_have_a_column() -> None:
    grades = [1.0, 2.0, 2.0, 3.0, None]
    verdicts = [Verdict(str(i), "j", "d", False, g, "p") for i, g in enumerate(grades)]
    gold = [Gold(str(i), "d", False, g) for i, g in enumerate([1.0, 2.0, 3.0, 3.0, 3.0])]
    findings = found(verdicts, gold, Use())
    assert cells(heat_of(findings, "Score against gold")) == {
        ("1", "1"): 1, ("2", "2"): 1, ("3", "2"): 1, ("3", "3"): 1, ("3", "none"): 1,
    }  # fmt: skip
    assert cells(heat_of(findings, "Within prompts")) == {
        ("1", "as gold"): 2, ("1", "equal"): 1, ("1", "none"): 1,
        ("2", "as gold"): 2, ("2", "none"): 1,
    }  # fmt: skip


def test_many_points_are_sampled_and_said_to_be() -> None:
    many = of_scores(number=150)
    finding = many[0][0]
    against, within, *_ = shown(many)
    assert f"{POINTS} of 600 are drawn, taken at random." in against.lead
    assert against.svg is not None
    assert against.svg.count("<use") <= POINTS + 40
    assert against.numbers is not None
    assert sum(int(row[1]) for row in against.numbers.rows) == 600, "the table holds all"
    assert within.numbers is not None
    assert within.numbers.rows[0][0] == "ordered as gold does"
    share = float(within.numbers.rows[0][2].rstrip("%")) / 100
    metric = finding.metrics["within_prompt_accuracy"].value
    assert share == pytest.approx(metric, abs=6e-4)


def test_bands_are_those_of_their_sources_and_people_stand_beside() -> None:
    kappa = next(f for f in FAMILIES if "kappa" in f.metrics)
    assert [kappa.band(v) for v in (-0.1, 0.40, 0.41, 0.60, 0.61, 1.0)] == [
        "poor", "poor", "moderate", "moderate", "good", "good",
    ]  # fmt: skip
    findings = of_pairs()
    page = html.unescape(render_calibration(findings, ORIGIN))
    assert "Landis and Koch (1977)" in page
    ceiling = findings[0][0].metrics["human_vs_rest"]
    row = re.search(r">people</th>(.*?)</tr>", page, re.DOTALL)
    assert row and f"{ceiling.value:.3f}" in row[1]
    assert ">people<" not in render_calibration(of_scores(), ORIGIN)


@pytest.mark.slow
def test_the_page_loads_nothing_and_is_the_same_each_time() -> None:
    page = render_calibration(of_scores() + of_pairs(), ORIGIN)
    assert page == render_calibration(of_scores() + of_pairs(), ORIGIN)
    assert "default-src 'none'" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)


def test_names_are_text() -> None:
    evil = "<script>alert(1)</script>"
    verdicts = [Verdict(str(i), evil, evil, False, i / 30, f"p{i // 2}") for i in range(30)]
    gold = [Gold(str(i), evil, False, i / 30) for i in range(30)]
    assert evil not in render_calibration(found(verdicts, gold, Use()), ORIGIN)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    both = [{"item_id": i, "dimension": "d", "score": i % 5 / 4} for i in range(40)]
    judged = [{**row, "judge": "j", "prompt_id": i // 4} for i, row in enumerate(both)]
    (tmp_path / "v.jsonl").write_text(lines(judged))
    (tmp_path / "g.jsonl").write_text(lines(both))
    return ["--verdicts", str(tmp_path / "v.jsonl"), "--gold", str(tmp_path / "g.jsonl")]


def test_the_command_writes_it_beside_the_certificates_or_where_it_is_told(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*files, "--calibration.bootstrap", "100"]
    assert main(["judge", "calibrate", *flags, "--registry", str(tmp_path / "kept")]) == 0
    (page,) = (tmp_path / "kept").glob("calibration-*.html")
    assert f"plots: {page}" in capsys.readouterr().out
    assert len(list((tmp_path / "kept").glob("*.json"))) == 1
    told = tmp_path / "else/where.html"
    assert main(["judge", "calibrate", *flags, "--report", str(told)]) == 0
    assert "j may build pairs" in told.read_text()
    assert main(["judge", "calibrate", *flags]) == 0
    assert "no plots were drawn: name a file with --report" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    bad = str(tmp_path / "file/page.html")
    assert main(["judge", "calibrate", *flags, "--report", bad]) == 2
    assert "--report must be a file that can be written" in capsys.readouterr().err
