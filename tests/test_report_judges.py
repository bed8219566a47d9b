"""The report says who judged, what vouches for it, how alike judges are, and explains the yield."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from report_runs import Runs, make_config
from scipy import stats

from rlhf import judge_view
from rlhf.agreement import spearman_within
from rlhf.files import write_json, write_parquet
from rlhf.report import render
from rlhf.report.judges import judges
from rlhf.report.selection import explained
from rlhf.run_view import RunView
from rlhf.summary import write_summary
from rlhf.types import SUSPICIOUS

METRIC = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 200, "detectable": 0.1}
CERTIFIED = {
    "metrics": {"within_prompt_accuracy": METRIC, "precision": METRIC},
    "floor": 0.3,
    "date": "2026-01-10T12:00:00+00:00",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Runs(make_config(tmp_path_factory.mktemp("run")), [0.4, 0.6, 0.7]).finish()


def with_model_judge(folder: Path, status: str) -> Path:
    """A run whose correctness a language model scores, and how it stood."""
    panel = [
        {"kind": "llm", "name": "reader", "model": "org/judge", "revision": "1f0c",
         "dimensions": ["correctness"]},
        {"name": "rules", "function": "a:b", "dimensions": ["style"]},
    ]  # fmt: skip
    runs = Runs(make_config(folder, judges={"panel": panel, "uncertified": "allow"}), [0.4])
    runs.start()
    about = {"judge": "reader", "dimension": "correctness", "shown": CERTIFIED}
    standing = {**about, "status": status, "reason": "said why", "granted": status == "granted"}
    write_json(runs.store.folder / "judges/standings.json", {"standings": [standing]})
    return runs.close()


def test_within_prompts_only_what_orders_a_prompts_answers_counts() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 4)
    x = rng.integers(0, 4, len(prompts)).astype(float)
    y = x + rng.integers(-1, 2, len(prompts)).astype(float)
    centred = [
        np.concatenate([r - r.mean() for r in (stats.rankdata(part) for part in v.reshape(40, 4))])
        for v in (x, y)
    ]
    found = spearman_within(x, y, prompts, prompts // 2, 200)
    assert found is not None
    assert found.value == pytest.approx(stats.pearsonr(*centred).statistic, abs=1e-12)
    assert found.low < found.value < found.high
    apart = spearman_within(x + 100 * prompts, y - 50 * prompts, prompts, prompts // 2, 200)
    assert apart == found, "levels of prompts do not enter"
    one = spearman_within(x[:20], y[:20], np.zeros(20, dtype=int), np.arange(20), 50)
    assert one is not None
    assert one.value == pytest.approx(stats.spearmanr(x[:20], y[:20]).statistic, abs=1e-12)
    alone = spearman_within(x, y, np.arange(len(x)), prompts, 50)
    assert alone is None, "one answer a prompt has no order"
    x[:4] = math.nan
    missing = spearman_within(x, y, prompts, prompts // 2, 50)
    assert missing is not None and missing.n == len(x) - 4


def test_agreement_with_the_audit_judge_is_that_of_the_stored_scores(folder: Path) -> None:
    found = judge_view.agreement(RunView(folder))
    assert {a.one for a in found} == {"reward", "correctness", "style"}
    assert {a.other for a in found} == {"onlooker: words"}
    assert [a.round for a in found if a.one == "style"] == [None, 0, 1, 2]
    # The audit scores half of correctness, and style falls as that rises.
    ends = {a.one: a.metric.value for a in found if a.round is None}
    assert ends["correctness"] == pytest.approx(1.0, abs=0.05)
    assert ends["style"] == pytest.approx(-1.0, abs=0.05)


def test_one_answer_a_prompt_has_no_agreement_to_show(tmp_path: Path) -> None:
    run = Runs(make_config(tmp_path), [0.4])
    run.start()
    view = RunView(run.close())
    (path,) = (view.folder / "rounds/0000/evaluation/scores").glob("*.parquet")
    write_parquet(pl.read_parquet(path, hive_partitioning=False).filter(sample=0), path)
    assert judges(view)["alike"] is None
    assert "Agreement with the audit judges" not in render(view)


@pytest.mark.parametrize("status", ["granted", "missing", "refused", "expired"])
def test_a_model_judge_shows_its_certificate_or_that_it_has_none(
    status: str, tmp_path: Path
) -> None:
    view = RunView(with_model_judge(tmp_path, status))
    reader, rules, audit = judge_view.roles(view)
    assert (reader.source, reader.kind) == (
        "org/judge, revision 1f0c (pointwise)", "language model",
    )  # fmt: skip
    assert reader.uses == ("reward 0.80", "floor 0.3", "protected 0", "gate")
    assert reader.stamped == (status != "granted")
    assert not rules.stamped and audit.uses == ("audit",)
    page = html.unescape(render(view))
    assert f"{'▲ granted' if status == 'granted' else f'▼ {status}'}</span>" in page
    assert ("Without a certificate: reader on correctness." in page) == (status != "granted")
    assert "precision at 0.3" in page and "2026-01-10" in page


def test_abstentions_and_flagged_answers_are_counted_by_round(folder: Path, tmp_path: Path) -> None:
    runs = Runs(make_config(tmp_path), [0.4, 0.6])
    runs.start()
    runs.sample(1)
    view = RunView(runs.close())
    (path,) = (view.folder / "rounds/0001/scores").glob("*.parquet")
    first = (pl.col("dimension") == "style") & (pl.col("sample") == 0)
    table = pl.read_parquet(path, hive_partitioning=False).with_columns(
        score=pl.when(first).then(None).otherwise("score"),
        abstained=first,
        reason=pl.when(first).then(pl.lit(f"{SUSPICIOUS} (a fence): no verdict")),
    )
    write_parquet(table, path)
    found = {(a.round, a.split, a.judge, a.dimension): a for a in judge_view.asked(view)}
    style = found[1, "training", "rules", "style"]
    assert (style.scores, style.abstained, style.flagged) == (96, 24, 24)
    assert found[1, "training", "rules", "correctness"].abstained == 0
    assert found[0, "gate", "onlooker", "words"].scores == 48
    page = html.unescape(render(view))
    assert "24 are abstentions. 24 scored completions look like an attempt" in page


def test_a_ledger_is_told_where_there_is_one(tmp_path: Path) -> None:
    folder = with_model_judge(tmp_path, "granted")
    assert "Calls and tokens" not in render(RunView(folder))
    ledger = {"calls": 1234, "retries": 5, "prompt_tokens": 70000, "completion_tokens": 800,
              "served": {"judge-2026-01": 1229}}  # fmt: skip
    write_json(folder / "judges/reader-usage.json", ledger)
    page = html.unescape(render(RunView(folder)))
    assert "Calls and tokens" in page
    for told in ("1,234", "70,000", "judge-2026-01 (1,229)"):
        assert told in page


def canaries(moved: float) -> dict[str, Any]:
    drift = {"value": moved, "low": moved - 0.01, "high": moved + 0.01, "n": 32, "limit": 0.05,
             "verdict": "drifted" if moved > 0.06 else "holds"}  # fmt: skip
    entry = {"judge": "reader", "dimension": "correctness", "fixed": False, "trains": True,
             "certified": True, "figures": {"retest_sd": METRIC}, "score_sd": 0.2,
             "drift": {"moved": drift}}  # fmt: skip
    still = {**entry, "judge": "rules", "dimension": "style", "fixed": True, "drift": {}}
    stops = [f"judge reader on correctness: scores moved by {moved:.3f}"] if moved > 0.06 else []
    return {"answers": {"start": 32, "gold": 0}, "askings": 2, "limits": {"max_drift": 0.05},
            "judges": [entry, still], "stops": stops, "warnings": []}  # fmt: skip


def test_drift_and_the_audit_of_pairs_are_shown_where_they_were_recorded(tmp_path: Path) -> None:
    runs = Runs(make_config(tmp_path), [0.4, 0.6])
    runs.start()
    runs.sample(1)
    assert "Canaries" not in render(RunView(runs.store.folder))
    runs.store.round(1).record("canaries", lambda: canaries(0.08))
    audit = {"judge": "onlooker", "dimension": "words", "preferred": 3, "equal": 1, "against": 16,
             "abstained": 0, "verdict": "inverted", **METRIC}  # fmt: skip
    inverted = "rejected answers are preferred to chosen ones"
    runs.store.round(1).record(
        "audit", lambda: {"pairs": 20, "judges": [audit], "inverted": inverted}
    )
    page = html.unescape(render(RunView(runs.close())))
    assert "judge reader on correctness: scores moved by 0.080. Each round asks 2 times" in page
    assert "▼ drifted" in page
    assert "must say the same each time: rules on style" in page
    assert f"{inverted}. 20 pairs of the last round" in page
    assert "▼ inverted" in page


@pytest.mark.slow
def test_the_yield_is_explained_with_every_number_that_was_measured(folder: Path) -> None:
    record = json.loads((folder / "rounds/0001/selection.json").read_text())
    funnel = json.loads((folder / "rounds/0001/funnel.json").read_text())
    page = html.unescape(render(RunView(folder)))
    alternatives = record["constraints"]["alternatives"]
    assert {a["constraint"] for a in alternatives} >= {"floor correctness", "margin"}
    costs = explained(funnel, record)["costs"]
    assert [row[:5] for row in costs.rows[1:]] == [
        (a["constraint"], a["change"] if a["change"] == "dropped" else f"relaxed to {a['change']}",
         f"{a['prompts']:,}", f"{a['gained_prompts']:+,}", f"{a['pairs']:,}")
        for a in alternatives
    ]  # fmt: skip
    assert "What each constraint costs" in page
    if record["suggestion"]:
        assert record["suggestion"][1:] in page
    assert "Verifiers score without noise" in page


def test_the_retention_multiplies_to_the_share_that_is_left(folder: Path) -> None:
    funnel = json.loads((folder / "rounds/0001/funnel.json").read_text())
    funnel["steps"] = [
        {"step": "generated", "prompts": 200, "lost_prompts": 0, "kept_prompts": 1.0},
        {"step": "floor correctness", "prompts": 50, "lost_prompts": 150, "kept_prompts": 0.25},
        {"step": "scored", "prompts": 50, "lost_prompts": 0, "kept_prompts": 1.0},
        {"step": "margin", "prompts": 40, "lost_prompts": 10, "kept_prompts": 0.8},
    ]
    assert explained(funnel, None) == {
        "product": "20.0% of prompts gave a pair = 25.0% (floor correctness) × 80.0% (margin)."
    }


def test_noise_is_told_in_words_with_the_same_numbers(folder: Path) -> None:
    record = json.loads((folder / "rounds/0001/selection.json").read_text())
    funnel = json.loads((folder / "rounds/0001/funnel.json").read_text())
    record["noise"] = {
        "sd": 0.1, "sources": {"correctness": "votes", "style": "verifier"},
        "spread_within_prompt": 0.2, "reliability": 0.75, "margin_of_noise_alone": 0.285,
        "mean_margin": 0.4, "mean_true_margin": 0.3, "inverted_share": 0.071,
    }  # fmt: skip
    measured = {"value": 0.2, "low": 0.1, "high": 0.3}
    record["split_votes"] = {"pairs": 20, "margin_chosen": 0.45, "margin_measured": measured}
    found = explained(funnel, record)
    for told in ("0.285", "0.400", "0.300 is true", "7.1% of the pairs are the wrong way round"):
        assert told in found["noise"]
    assert "measured on the other half, which chose nothing, it is 0.200" in found["split"]
    assert ("noise of correctness is known from", "the spread of its votes") in found[
        "noise_table"
    ].rows
    record["noise"]["sources"]["correctness"] = "unknown"
    assert "is not known: correctness has one vote" in explained(funnel, record)["noise"]


def test_the_summary_has_a_table_of_judges(tmp_path: Path) -> None:
    runs = Runs(make_config(tmp_path), [0.4, 0.6], prompts=12)
    runs.start()
    runs.go_round(1)
    write_summary(runs.store, runs.config)
    text = (runs.close() / "summary.md").read_text()
    assert re.search(
        r"\| rules \(verifier\) \| correctness \| reward 0.80, floor 0.3, protected 0, gate \| "
        r"none needed: a verifier's tests are its certificate \| 0 of \d+ \|",
        text,
    )
    assert "- yield " in text and "verifiers score without noise" in text
