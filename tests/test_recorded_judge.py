"""A recorded judge says what its file says of this very answer, and abstains on every other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from fakes import run_values

from launch.cli import main
from launch.judging import identities
from rlhf.certificates import JudgeIdentity
from rlhf.config_judges import RecordedSpec
from rlhf.errors import InputError
from rlhf.types import Completion, Prompt, Score, completions_table, scores_table
from rollout.judges.panel import build, score_all
from rollout.judges.recorded import RecordedJudge, answer_id

Item = tuple[Prompt, Completion]


def item(prompt_id: str, sample: int, text: str, version: int = 0) -> Item:
    prompt = Prompt(prompt_id, ({"role": "user", "content": "When does it open?"},))
    return prompt, Completion(prompt_id, sample, text, (1,), (1,), (0.0,), "stop", version)


ITEMS = [item("p-1", 0, "At nine."), item("p-1", 1, "Never."), item("q", 0, "At nine.")]


def spec(path: Path, **settings: Any) -> RecordedSpec:
    values = {"name": "kim", "dimensions": ["style"], "verdicts": str(path), **settings}
    return RecordedSpec(kind="recorded", **values)


def written(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text(
        "".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines)
    )
    return path


def line(item_id: str, score: Any, **more: Any) -> dict[str, Any]:
    return {"item_id": item_id, "judge": "kim", "dimension": "style", "score": score, **more}


def scored(built: RecordedJudge, items: Sequence[Item]) -> list[float | None]:
    return [score.score for score in score_all([built], items)]


def judge(path: Path, **settings: Any) -> RecordedJudge:
    (built,) = build([spec(path, **settings)], "judges.panel")
    assert isinstance(built, RecordedJudge)
    return built


def test_a_verdict_counts_for_its_text_and_its_prompt(tmp_path: Path) -> None:
    path = written(
        tmp_path / "kim.jsonl",
        line(answer_id("p-1", "At nine."), 0.75),
        line(answer_id("p-1", "Never."), None),
        {**line(answer_id("q", "At nine."), 1.0), "judge": "lee"},
    )
    first, second, third = score_all([judge(path)], ITEMS)
    assert (first.score, first.votes, first.spread) == (0.75, (0.75,), 0.0)
    assert second.abstained and second.reason == f"the judge abstained in {path}"
    assert third.abstained and third.reason == f"{path} holds no verdict on this answer"
    (again,) = scored(judge(path), [item("p-1", 7, "At nine.", version=3)])
    assert again == 0.75, "the same text is the same answer, whatever its number"


def test_several_runs_are_votes(tmp_path: Path) -> None:
    name = answer_id("p-1", "At nine.")
    lines = [line(name, score, run=str(i)) for i, score in enumerate((0.2, 0.4, None, 0.9))]
    built = judge(written(tmp_path / "kim.jsonl", *lines))
    (found,) = score_all([built], ITEMS[:1])
    assert found.votes == (0.2, 0.4, 0.9) and built.votes == 3
    assert found.score == pytest.approx(0.5) and found.spread == pytest.approx(0.36055512754)


def test_a_sample_number_stands_for_the_text_that_was_judged_and_no_other(tmp_path: Path) -> None:
    """A later policy's sample 0 is another answer: the verdict must not follow the number."""
    table = tmp_path / "completions.parquet"
    completions_table([c for _, c in ITEMS]).write_parquet(table)
    path = written(tmp_path / "kim.jsonl", line("p-1-0", 0.25), line("q-0", 1.0))
    built = judge(path, completions=str(table))
    assert scored(built, ITEMS) == [0.25, None, 1.0]
    assert scored(built, [item("p-1", 0, "At ten.", version=1)]) == [None]
    with pytest.raises(InputError, match=r"kim.jsonl:1: sample 0 of prompt 'p-1' says nothing"):
        judge(path)


def test_scores_of_a_run_are_verdicts_too(tmp_path: Path) -> None:
    scores = [
        Score("p-1", 0, "kim", "style", 0.5, (0.25, 0.75), 0.35),
        Score.abstain("p-1", 1, "kim", "style", "no idea"),
        Score.of("q", 0, "lee", "style", 1.0),
    ]
    for name, table in (
        ("scores", scores_table(scores)),
        ("completions", completions_table([c for _, c in ITEMS])),
    ):
        (tmp_path / name).mkdir()
        for index, part in enumerate(table.iter_slices(2)):
            part.write_parquet(tmp_path / name / f"part-{index}.parquet")
    built = judge(tmp_path / "scores", completions=str(tmp_path / "completions"))
    found = score_all([built], ITEMS)
    assert [(s.score, s.votes) for s in found] == [(0.5, (0.25, 0.75)), (None, ()), (None, ())]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (line("p-1-0", 1.5), r"kim.jsonl:2: score must be in \[0, 1\], found 1.5"),
        (line("answer 7", 1.0), "kim.jsonl:2: item_id must be an answer's SHA-256"),
        (line("p-1-9", 1.0), "kim.jsonl:2: sample 9 of prompt 'p-1' is not among the completions"),
        (line("p-1-0", True), "kim.jsonl:2: score must be a number, found true"),
        ('{"item_id": ', "kim.jsonl:2: must be one JSON object"),
        (line("q-0", 0.5), "kim.jsonl:2: a verdict of judge 'kim' on 'style'.*at line 1 already"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, bad: Any, said: str) -> None:
    table = tmp_path / "completions.parquet"
    completions_table([c for _, c in ITEMS]).write_parquet(table)
    path = written(tmp_path / "kim.jsonl", line("q-0", 1.0), bad)
    with pytest.raises(InputError, match=said):
        judge(path, completions=str(table))


def test_a_winner_is_no_score(tmp_path: Path) -> None:
    won = {"item_id": "p-1-0", "judge": "kim", "dimension": "style", "winner": "a"}
    with pytest.raises(InputError, match="kim.jsonl:1: must have a score, found winner"):
        judge(written(tmp_path / "kim.jsonl", won))


def test_a_row_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    scores_table([Score.of("q", 0, "kim", "style", s) for s in (0.5, float("nan"))]).write_parquet(
        path
    )
    texts = tmp_path / "completions.parquet"
    completions_table([ITEMS[2][1]]).write_parquet(texts)
    with pytest.raises(InputError, match=r"scores.parquet, row 1: score must be in .*found nan"):
        judge(path, completions=str(texts))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "lee"}, r"judges.panel\[0\].name must be a judge of .* which has kim"),
        ({"dimensions": ["tone"]}, "no verdict of 'kim' on tone; it has them on style"),
        ({"verdicts": "nowhere.jsonl"}, r"judges.panel\[0\].verdicts: there is no nowhere.jsonl"),
        ({"completions": "gone"}, r"judges.panel\[0\].completions: there is no Parquet file"),
    ],
)
def test_what_the_file_lacks_is_said(tmp_path: Path, settings: Any, said: str) -> None:
    path = written(tmp_path / "kim.jsonl", line(answer_id("q", "Yes."), 1.0))
    with pytest.raises(InputError, match=said):
        judge(path, **settings)


def test_two_texts_under_one_number_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "completions.parquet"
    pl.concat(completions_table([item("q", 0, text)[1]]) for text in ("Yes.", "No.")).write_parquet(
        table
    )
    path = written(tmp_path / "kim.jsonl", line("q-0", 1.0))
    with pytest.raises(InputError, match="sample 0 of prompt 'q' must be one answer"):
        judge(path, completions=str(table))


def test_what_it_says_may_train_once_its_own_file_was_calibrated(tmp_path: Path) -> None:
    """One file is measured and scored from, so the certificate names the judge in it."""
    path = written(tmp_path / "kim.jsonl", line(answer_id("q", "Yes."), 1.0))
    (found,) = identities([judge(path)]).values()
    assert found == JudgeIdentity("kim") and not found.remote


def _person_reads(run: Path, verdicts: Path) -> int:
    """A verdict of kim's on every stored answer that has none yet; how many those are."""
    known = {json.loads(text)["item_id"] for text in verdicts.read_text().splitlines()}
    files = [p for p in run.rglob("*.parquet") if p.parent.name == "completions"]
    added = 0
    with verdicts.open("a") as out:
        for prompt_id, text in pl.concat(
            pl.read_parquet(p, columns=["prompt_id", "text"]) for p in files
        ).iter_rows():
            if (item := answer_id(prompt_id, text)) not in known:
                known.add(item)
                share = sum(map(text.count, "aeiou")) / max(1, len(text))
                out.write(json.dumps(line(item, share)) + "\n")
                added += 1
    return added


@pytest.mark.engine
def test_a_person_judges_a_run_stage_by_stage_with_a_certificate(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage stops where the file lacks its answers; the same command goes on, and nobody is
    asked about an answer twice."""
    verdicts, gold = tmp_path / "kim.jsonl", tmp_path / "gold.jsonl"
    pilot = [(f"{p}", n, (p % 4 + n) / 4) for p in range(80) for n in range(2)]
    items = [{**line(answer_id(p, f"{n}"), score), "prompt_id": p} for p, n, score in pilot]
    verdicts.write_text("".join(json.dumps(item) + "\n" for item in items))
    labels = [{k: item[k] for k in ("item_id", "dimension", "score")} for item in items]
    gold.write_text("".join(json.dumps(label) + "\n" for label in labels))
    values = run_values(tmp_path, tiny_model, rounds={"count": 1})
    (rules,) = values["judges"]["panel"]
    kim = {"kind": "recorded", "name": "kim", "dimensions": ["style"], "verdicts": str(verdicts)}
    values["judges"]["panel"] = [{**rules, "dimensions": ["correctness"]}, kim]
    values["calibration"] = {"gold": str(gold), "verdicts": str(verdicts)}
    values["calibration"] |= {"registry": str(tmp_path / "certificates"), "bootstrap": 200}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["train", str(config)]) == 2
    assert "kim on style: missing" in capsys.readouterr().err
    assert main(["judge", "calibrate", str(config)]) == 0
    run, stops = tmp_path / "runs/trial", 0
    while (status := main(["train", str(config)])) == 3:
        assert "holds no verdict on this answer" in capsys.readouterr().err
        assert _person_reads(run, verdicts) > 0, "it stopped with nothing left to judge"
        stops += 1
    assert status == 0 and 3 <= stops <= 8
    assert "Uncertified" not in (run / "summary.md").read_text()
    scores = pl.read_parquet(run / "rounds/0001/scores/*.parquet").filter(judge="kim")
    assert scores.height == 24 and not scores["abstained"].any()
