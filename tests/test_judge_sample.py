"""From a run to a sheet, from its labels to gold, and from both to a calibration at once."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from report_runs import Runs, make_config

from launch.cli import main
from rlhf.blind_sheet import Question, Sheet, sample_pairs
from rlhf.errors import InputError
from rlhf.files import sha256_tree
from rlhf.run_pairs import Answers, judged_answers, offered, verdicts_of
from rlhf.run_view import RunView


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of 40 prompts; correctness has a floor of 0.3."""
    config = make_config(tmp_path_factory.mktemp("run"))
    return Runs(config, [0.4, 0.6, 0.7], prompts=40).finish()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def calibrated(
    folder: Path, gold: Path, capsys: pytest.CaptureFixture[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Findings by judge and dimension."""
    command = ["judge", "calibrate", "--verdicts", str(folder / "verdicts.jsonl"), "--gold"]
    floors = ["--selection.floors.correctness", "0.3", "--calibration.bootstrap", "200"]
    assert main([*command, str(gold), "--json", *floors]) == 0
    return {(f["judge"], f["dimension"]): f for f in json.loads(capsys.readouterr().out)}


def filled(folder: Path, agree: bool) -> Path:
    """The CSV labelled by someone who knows the judges' scores, and agrees with them or never."""
    said = {(v["item_id"], v["dimension"], v["judge"]): v for v in lines(folder / "verdicts.jsonl")}
    other = {"a": "b", "b": "a", "tie": "tie"}

    def cell(item: str, column: str) -> str:
        dimension, _, side = column.removesuffix("_ok").partition("_")
        judge = "onlooker" if dimension == "words" else "rules"
        verdict = said[f"{item}-{side}" if side else item, dimension, judge]
        if not side:
            return str(verdict["winner"] if agree else other[verdict["winner"]])
        return "yes" if (verdict["score"] >= 0.3) == agree else "no"

    with (folder / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    asked = [c for c in rows[0] if c.partition("_")[0] in ("correctness", "style", "words")]
    path = folder / "labelled.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            labels = {column: cell(row["item_id"], column) for column in asked}
            writer.writerow({**row, **labels, "annotator": "kim"})
    return path


@pytest.mark.parametrize("split", ["train", "gate"])
@pytest.mark.parametrize("agree", [True, False])
def test_labels_put_in_are_what_calibration_measures(
    split: str, agree: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sha256_tree(run)
    folder = tmp_path / "sheet"
    sample = ["judge", "sample", str(run), "--split", split, "--items", "60", "--out", str(folder)]
    assert main(sample) == 0
    assert sha256_tree(run) == before, "the run's folder is read, not written"
    shown = capsys.readouterr().out
    assert "drawn 60 of" in shown and "fewer than" not in shown
    assert main(["judge", "gold", str(folder), str(filled(folder, agree))]) == 0
    assert "by kim" in capsys.readouterr().out

    found = calibrated(folder, folder / "gold.jsonl", capsys)
    audit = {("onlooker", "words")} if split == "gate" else set()
    assert found.keys() == {("rules", "correctness"), ("rules", "style")} | audit
    for finding in found.values():
        assert finding["metrics"]["within_prompt_accuracy"]["value"] == float(agree)
    correctness, style = found["rules", "correctness"], found["rules", "style"]
    assert (style["n"], correctness["n"]) == (60, 60 + 120), "answers count beside pairs"
    assert style["purposes"] == {"pairs": "granted" if agree else "refused"}
    assert correctness["metrics"]["precision"]["value"] == float(agree)
    assert correctness["metrics"]["recall"]["value"] == float(agree)


def test_people_who_grade_like_the_judge_certify_pairs_and_floor_in_one_go(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sheet"
    sample = ["judge", "sample", str(run), "--out", str(folder), "--dimension", "correctness"]
    assert main(sample) == 0
    assert "fewer than the 500 that were asked for" in capsys.readouterr().out
    assert main(["judge", "gold", str(folder), str(filled(folder, True))]) == 0
    capsys.readouterr()
    found = calibrated(folder, folder / "gold.jsonl", capsys)
    assert found.keys() == {("rules", "correctness")}
    assert found["rules", "correctness"]["purposes"] == {"pairs": "granted", "floor": "granted"}
    # Without the answers' labels, pairs alone say nothing of a floor.
    pairs = [line for line in lines(folder / "gold.jsonl") if "winner" in line]
    alone = folder / "pairs.jsonl"
    alone.write_text("".join(json.dumps(line) + "\n" for line in pairs))
    finding = calibrated(folder, alone, capsys)["rules", "correctness"]
    assert finding["purposes"] == {"pairs": "granted", "floor": "refused"}
    assert finding["n"] == len(pairs)


def test_a_run_that_goes_on_offers_what_it_has(tmp_path: Path) -> None:
    runs = Runs(make_config(tmp_path), [0.4, 0.6], prompts=6)
    runs.start()
    folder = runs.store.folder
    with pytest.raises(InputError, match="no round has got that far"):
        judged_answers(RunView(folder), "train", None)
    assert judged_answers(RunView(folder), "gate", None).rounds == (0,)
    runs.sample(1)
    # The lock is still held.
    assert main(["judge", "sample", str(folder), "--items", "4"]) == 0
    assert (folder / "sheet" / "sheet.html").is_file()
    runs.close()


def test_wrong_requests_exit_2(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--round", "7"], "rounds 1, 2 have them in"),
        (["--dimension", "words"], "--dimension must be one that a judge of the run scored"),
        (["--items", "0"], "--items must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ):
        assert main(["judge", "sample", str(run), *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["judge", "gold", str(run)]) == 2
    assert "SHEET must name at least one labelled sheet" in capsys.readouterr().err
    assert not (run / "sheet").exists(), "nothing is half-written"


def answers(
    texts: list[list[str]], scores: Sequence[tuple[int, int, str, float | None, float]]
) -> Answers:
    """Prompts with their answers' texts, and (prompt, sample, dimension, score, spread)."""
    rows = [
        (1, f"q{p}", s, text, len(text), "kind", "why?", None, None)
        for p, found in enumerate(texts)
        for s, text in enumerate(found)
    ]
    names = ("round", "prompt_id", "sample", "text", "tokens", "category", "prompt", "context")
    table = pl.DataFrame(rows, schema=[*names, "reference"], orient="row").cast(
        {"round": pl.Int32, "sample": pl.Int32, "context": pl.String, "reference": pl.String}
    )
    said = [(1, f"q{p}", s, "j", d, score, spread) for p, s, d, score, spread in scores]
    columns = ("round", "prompt_id", "sample", "judge", "dimension", "score", "spread")
    judged = pl.DataFrame(said, schema=list(columns), orient="row").cast(
        {"round": pl.Int32, "sample": pl.Int32, "score": pl.Float64, "spread": pl.Float64}
    )
    return Answers(table, judged, (1,))


def test_no_answer_is_in_two_pairs_and_alike_or_empty_ones_are_in_none() -> None:
    texts = [["one", "two", "three", "four", "five"], ["same", " same ", ""], ["lone", "other"]]
    scores = [(p, s, "d", 0.5, 0.0) for p, found in enumerate(texts) for s in range(len(found))]
    offer = offered(answers(texts, scores), ["d"], seed=0)
    pairs = offer.candidates
    used = pl.concat([pairs.select("prompt_id", sample=f"sample_{side}") for side in "xy"])
    assert used.is_unique().all()
    assert pairs["prompt_id"].value_counts(sort=True).rows() == [("q0", 2), ("q2", 1)]
    assert (offer.answers, offer.prompts, offer.empty, offer.alike) == (10, 3, 1, 1)


def test_strata_say_what_the_scores_say() -> None:
    def of(*scores: tuple[int, str, float | None, float]) -> tuple[str, str, int]:
        told = answers([["one", "two"]], [(0, *score) for score in scores])
        (row,) = offered(told, ["d", "e"], seed=0).candidates.to_dicts()
        better = {"one": 0, "two": 1}[row["answer_x"]]
        return row["band"], row["disagreement"], better

    low, high = (0, "d", 0.1, 0.0), (1, "d", 0.3, 0.0)
    assert of(low, high) == ("low", "agreed", 1)
    assert of((0, "d", 0.6, 0.0), (1, "d", 0.5, 0.0)) == ("middle", "agreed", 0)
    assert of((0, "d", 0.9, 0.0), (1, "d", 0.8, 0.15))[:2] == ("high", "split")
    assert of(low, high, (0, "e", 0.2, 0.0), (1, "e", 0.1, 0.0))[1] == "split"
    assert of(low, high, (0, "e", None, 0.0), (1, "e", 0.1, 0.0))[1] == "missing"


def test_verdicts_are_the_judges_own_on_the_sheets_sides() -> None:
    scores: list[tuple[int, int, str, float | None, float]] = [
        (0, 0, "d", 0.9, 0.0), (0, 1, "d", 0.2, 0.0), (1, 0, "d", 0.5, 0.0), (1, 1, "d", 0.5, 0.0),
        (2, 0, "d", None, 0.0), (2, 1, "d", 0.4, 0.0),
    ]  # fmt: skip
    told = answers([["great", "poor"], ["fine", "well"], ["cut", "short one"]], scores)
    pairs = sample_pairs(offered(told, ["d"], 0).candidates, 9, ["category"], 0).pairs
    sheet = Sheet.of(pairs, [Question("d", bar=True)], 0)
    found = list(verdicts_of(sheet.pairs, told, sheet.questions))
    assert len(found) == 3 * 3
    by_item = {v["item_id"]: v for v in found}
    expected = {"great": 0.9, "poor": 0.2, "fine": 0.5, "well": 0.5, "cut": None, "short one": 0.4}
    for row in sheet.pairs.to_dicts():
        a, b = row["answer_a"], row["answer_b"]
        verdict = by_item[row["item_id"]]
        assert (verdict["length_a"], verdict["length_b"]) == (len(a), len(b))
        for side, text in (("a", a), ("b", b)):
            assert by_item[f"{row['item_id']}-{side}"]["score"] == expected[text]
        one, other = expected[a], expected[b]
        if one is None or other is None:
            assert verdict["winner"] is None, "an abstention is never a number"
        else:
            assert verdict["winner"] == ("tie" if one == other else "a" if one > other else "b")
