"""Verdict and gold files: what they may hold, and an error with file and line for all else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from rlhf.errors import InputError
from rlhf.judgements import read_both, read_gold, read_verdicts

VERDICT = {"item_id": "i", "judge": "j", "dimension": "d", "score": 0.5}
GOLD = {"item_id": "i", "dimension": "d", "score": 1}


def write(path: Path, *lines: Any) -> Path:
    """Records as JSON, text and bytes as they stand."""
    with path.open("wb") as file:
        for line in lines:
            raw = line if isinstance(line, str | bytes) else json.dumps(line)
            file.write((raw.encode() if isinstance(raw, str) else raw) + b"\n")
    return path


def pair(**fields: Any) -> dict[str, Any]:
    base = {k: v for k, v in VERDICT.items() if k != "score"}
    return {**base, "winner": "a", **fields}


def test_everything_a_line_may_hold_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "v.jsonl",
        b"\xef\xbb\xbf" + json.dumps({**VERDICT, "prompt_id": 7, "run": 0, "length": 12}).encode(),
        "",
        {**VERDICT, "item_id": 4, "score": None, "reason": "cut off", "prompt": "Why?"},
        pair(judge="k", order="ba", winner="b", length_a=10, length_b=4),
        pair(judge="k", order="ab", winner=None),
        pair(judge="k", item_id="other", winner="tie", score=None),
    )
    one, two, three, four, five = read_verdicts(path)
    assert (one.item_id, one.prompt_id, one.run, one.length, one.line) == ("i", "7", "0", 12.0, 1)
    assert (two.item_id, two.value, two.pairwise, two.line) == ("4", None, False, 3)
    assert (three.value, three.order, three.length, three.pairwise) == (-1.0, "ba", 6.0, True)
    assert (four.value, four.order) == (None, "ab")
    assert (five.value, five.pairwise) == (0.0, True)
    labels = read_gold(write(tmp_path / "g.jsonl", GOLD, {**GOLD, "annotator": 2}))
    assert [(label.value, label.annotator) for label in labels] == [(1.0, None), (1.0, "2")]


BAD_VERDICTS: dict[str, tuple[list[Any], int, str]] = {
    "no JSON": (["{"], 1, "must be one JSON object, found Expecting property name"),
    "no UTF-8": ([VERDICT, b"\xff{}"], 2, "must be one JSON object, found 'utf-8' codec"),
    "no object": (["[1]"], 1, "must be a JSON object, found [1]; correct the line"),
    "NaN": (['{"score": NaN}'], 1, "found NaN, which JSON has not (an abstention is null)"),
    "a key twice": (['{"score": 1, "score": 2}'], 1, "found score twice"),
    "no item": ([{k: v for k, v in VERDICT.items() if k != "item_id"}], 1, "item_id must be text"),
    "an item that is a list": ([{**VERDICT, "item_id": [1]}], 1, "whole number, found [1]"),
    "an empty judge": ([{**VERDICT, "judge": " "}], 1, "judge must be text or a whole number"),
    "neither": ([{k: v for k, v in VERDICT.items() if k != "score"}], 1, "found neither; write"),
    "both": ([{**VERDICT, "winner": "a"}], 1, "must have score or winner, found both"),
    "a score in quotes": (
        [{**VERDICT, "score": "0.5"}],
        1,
        'score must be a number, found "0.5"; write it without quotes',
    ),
    "a true score": ([{**VERDICT, "score": True}], 1, "score must be a number, found true"),
    "an infinite score": (['{"item_id": 1, "score": 1e999}'], 1, "score must be a finite number"),
    "an unknown winner": ([pair(winner="A")], 1, 'winner must be a, b or tie, found "A"; write'),
    "an unknown order": ([pair(order="first")], 1, 'order must be ab or ba, found "first"'),
    "an order of a score": ([{**VERDICT, "order": "ab"}], 1, "order must stand beside winner"),
    "one length of two": ([pair(length_a=3)], 1, "must both be given, found length_a alone"),
    "the wrong length": ([pair(length=3)], 1, "must have length_a and length_b, found length"),
    "a negative length": ([{**VERDICT, "length": -1}], 1, "must be at least 0, found -1; count"),
    "misspelt": ([{**VERDICT, "promt_id": "p"}], 1, "found promt_id; write prompt_id"),
    "said twice": ([VERDICT, VERDICT], 2, "stands at line 1 already; take one out"),
    "two kinds": (
        [VERDICT, pair(order="ab")],
        2,
        "verdicts of judge 'j' on 'd' for item 'i' must be score as at line 1, found winner",
    ),
    "two prompts": (
        [{**VERDICT, "prompt_id": "p"}, {**VERDICT, "judge": "k", "prompt_id": "q"}],
        2,
        "prompt_id of item 'i' must be p as at line 1, found q; correct one",
    ),
}


@pytest.mark.parametrize("case", BAD_VERDICTS)
def test_a_bad_verdict_exits_2_with_file_line_rule_and_remedy(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, number, message = BAD_VERDICTS[case]
    verdicts = write(tmp_path / "verdicts.jsonl", *lines)
    gold = write(tmp_path / "gold.jsonl", GOLD)
    command = ["judge", "calibrate", "--verdicts", str(verdicts), "--gold", str(gold), "--json"]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {verdicts}:{number}: ")
    assert message in shown.err
    assert "Traceback" not in shown.err


BAD_GOLD: dict[str, tuple[list[Any], str]] = {
    "labelled twice": (
        [GOLD, GOLD],
        "a label of item 'i' on 'd' by an annotator without a name stands at line 1 already",
    ),
    "two kinds": (
        [GOLD, {"item_id": "i", "dimension": "d", "winner": "a", "annotator": "kim"}],
        "the kind of gold on item 'i', dimension 'd' must be score as at line 1, found winner",
    ),
    "misspelt": ([{**GOLD, "anotator": "x"}], "found anotator; write annotator"),
}


@pytest.mark.parametrize("case", BAD_GOLD)
def test_a_bad_gold_label_names_its_line(case: str, tmp_path: Path) -> None:
    lines, message = BAD_GOLD[case]
    path = write(tmp_path / "gold.jsonl", *lines)
    with pytest.raises(InputError) as caught:
        read_gold(path)
    assert str(caught.value).startswith(f"{path}:{len(lines)}: ")
    assert message in str(caught.value)


def test_all_bad_lines_are_told_at_once_up_to_ten(tmp_path: Path) -> None:
    path = write(
        tmp_path / "v.jsonl", *[{**VERDICT, "item_id": i, "score": "x"} for i in range(12)]
    )
    with pytest.raises(InputError) as caught:
        read_verdicts(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[9].startswith(f"{path}:10: ")
    assert lines[10] == "and 2 more verdicts that can't be used"


def test_files_that_are_missing_empty_or_of_other_items_are_refused(tmp_path: Path) -> None:
    verdicts, gold = write(tmp_path / "v.jsonl", VERDICT), write(tmp_path / "g.jsonl", GOLD)
    with pytest.raises(InputError, match="must be a JSONL file of verdicts, found no file"):
        read_both(tmp_path / "none.jsonl", gold)
    with pytest.raises(InputError, match="must hold at least one gold label, found none"):
        read_both(verdicts, write(tmp_path / "empty.jsonl", ""))
    other = write(tmp_path / "other.jsonl", {**GOLD, "item_id": "k"})
    with pytest.raises(InputError, match="must share items, found none.*'i'.*'k'"):
        read_both(verdicts, other)
    winners = write(tmp_path / "w.jsonl", {"item_id": "i", "dimension": "d", "winner": "a"})
    with pytest.raises(InputError, match=r"v.jsonl:1: verdicts on 'd' must have winner, as gold"):
        read_both(verdicts, winners)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--verdicts must name a JSONL file, found none"),
        (["--verdicts", "v.jsonl"], "--gold must name a JSONL file, found none"),
        (["--rollout.top_p", "1"], "--rollout.top_p must be a setting of calibration"),
        (["--calibration.bootstrap", "9"], "must be a whole number >= 100, found 9"),
        (["--calibration.thresholds.precison", "1"], "did you mean precision?"),
        (["--selection.floors.correctness", "2"], "must be a number >= 0 and <= 1, found 2"),
    ],
)
def test_wrong_flags_exit_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", "calibrate", *flags]) == 2
    assert message in capsys.readouterr().err
