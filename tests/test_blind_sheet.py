"""Blind sheets: who is drawn, that nothing tells the answers apart, and labels as they were put."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.blind_sheet import Question, Sheet, allocate, blind, read_key, sample_pairs, write_sheet
from rlhf.blind_sheet.labels import Labels, as_lines, read_labels
from rlhf.errors import InputError
from rlhf.judgements import WINNERS, read_gold

QUESTIONS = (Question("truth", "Is it true?", bar=True), Question("tone"))
HOSTILE = '=HYPERLINK("http://x")</script><script>alert(1)</script>\u202e'


def candidates(count: int, prompts: int | None = None) -> pl.DataFrame:
    """Pairs whose secret columns hold marks that stand nowhere else."""
    number = pl.int_range(count)
    return pl.select(
        prompt_id=pl.format("promptmark{}", number % (prompts or count)),
        prompt=pl.format("question {}", number),
        context=pl.when(number % 2 == 0).then(pl.format("passage {}", number)),
        reference=pl.lit(None, pl.String),
        answer_x=pl.when(number == 3).then(pl.lit(HOSTILE)).otherwise(pl.format("left {}", number)),
        answer_y=pl.format("right {}", number),
        category=pl.format("kindmark{}", number % 3),
        chosen=pl.format("chosenmark{}", number),
        margin=number / 7,
    )


@given(st.lists(st.integers(0, 60), max_size=8), st.integers(0, 90), st.integers(0, 9))
def test_strata_give_in_proportion_but_at_least_the_minimum(
    sizes: list[int], items: int, minimum: int
) -> None:
    given = allocate(sizes, items, minimum)
    assert sum(given) == min(items, sum(sizes))
    least = min(minimum, items // max(1, len(sizes)))
    assert all(min(size, least) <= n <= size for size, n in zip(sizes, given, strict=True))
    by_size = [n for _, n in sorted(zip(sizes, given, strict=True))]
    assert by_size == sorted(by_size), "a larger stratum never gives less"


def test_allocation_is_websters() -> None:
    # The sizes over 0.5, 1.5, 2.5: 106, 35.3, 21.2; 48, 16; 46, 15.3 are the seven largest. Over
    # 1, 2, 3 (D'Hondt) the largest stratum would have four.
    assert allocate([53, 24, 23], 7, minimum=0) == [3, 2, 2]


def test_each_stratum_gives_what_is_said_and_prompts_come_once_first() -> None:
    table = candidates(90, prompts=30)
    drawn = sample_pairs(table, 30, ["category"], seed=1)
    told = {s.values["category"]: (s.candidates, s.drawn) for s in drawn.strata}
    counted = dict(drawn.pairs["category"].value_counts().iter_rows())
    assert told == {f"kindmark{k}": (30, counted[f"kindmark{k}"]) for k in range(3)}
    assert drawn.pairs.height == 30 == drawn.pairs["prompt_id"].n_unique()
    assert drawn.candidates == 90
    again = sample_pairs(table, 30, ["category"], seed=1)
    assert again.pairs.equals(drawn.pairs)
    assert not sample_pairs(table, 30, ["category"], seed=2).pairs.equals(drawn.pairs)
    assert sample_pairs(table, 500, ["category"], seed=1).pairs.equals(table)


def sides(pairs: pl.DataFrame, seed: int) -> dict[str, str]:
    """Pair (by its prompt's text) -> the side of its x."""
    return dict(blind(pairs, seed).select("prompt", "side_x").iter_rows())


def test_sides_are_balanced_and_independent_of_what_is_x() -> None:
    pairs = candidates(21)
    swapped = pairs.with_columns(answer_x="answer_y", answer_y="answer_x")
    for table in (pairs, swapped):
        on_a = np.array(
            [[side == "a" for _, side in sorted(sides(table, seed).items())] for seed in range(400)]
        )
        assert set(on_a.sum(axis=1)) == {11}, "of 21 pairs, eleven have x on side a"
        # Each pair's share over seeds: 5 standard errors of a coin.
        assert np.abs(on_a.mean(axis=0) - 11 / 21).max() < 5 * 0.5 / 20


def test_a_place_in_the_sheet_says_nothing_of_the_source() -> None:
    pairs = candidates(20)
    places = np.array(
        [[int(text.split()[1]) for text in blind(pairs, seed)["prompt"]] for seed in range(400)]
    )
    # The mean source row at every place: uniform on 0..19 has mean 9.5, sd 5.77.
    assert np.abs(places.mean(axis=0) - 9.5).max() < 5 * 5.77 / 20


def test_order_sides_and_ids_need_what_a_sheet_does_not_show() -> None:
    pairs = candidates(40)
    other = pairs.with_columns(margin=pl.col("margin") + 1e-9)
    one, two = blind(pairs, 0), blind(other, 0)
    assert one.equals(blind(pairs, 0))
    assert not set(one["item_id"]) & set(two["item_id"])
    assert one["prompt"].to_list() != two["prompt"].to_list()
    assert sides(pairs, 0) != sides(other, 0)


def test_a_sheet_holds_no_word_of_its_key(tmp_path: Path) -> None:
    sheet = Sheet.of(candidates(30), QUESTIONS, seed=0)
    html, table, key = write_sheet(tmp_path, sheet, "trial")
    for path in (html, table):
        text = path.read_text(encoding="utf-8-sig")
        assert "promptmark" not in text and "chosenmark" not in text and "kindmark" not in text
        assert "side_x" not in text and "margin" not in text.split("</style>")[-1]
    known = json.loads(key.read_text())
    assert {item["chosen"] for item in known["items"]} == {f"chosenmark{i}" for i in range(30)}
    assert {item["side_x"] for item in known["items"]} == {"a", "b"}
    assert not any("left" in str(item) or "right" in str(item) for item in known["items"])


def test_the_same_sheet_has_the_same_bytes_and_another_is_not_overwritten(tmp_path: Path) -> None:
    paths = write_sheet(tmp_path, Sheet.of(candidates(8), QUESTIONS, 0), "trial")
    before = [path.read_bytes() for path in paths]
    write_sheet(tmp_path, Sheet.of(candidates(8), QUESTIONS, 0), "trial")
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(InputError, match="--out must be a folder without another sheet"):
        write_sheet(tmp_path, Sheet.of(candidates(8), QUESTIONS, 1), "trial")
    assert [path.read_bytes() for path in paths] == before


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(InputError, match="found truth_a_ok; rename"):
        Sheet.of(candidates(2), [Question("truth", bar=True), Question("truth_a_ok")], 0)
    with pytest.raises(InputError, match="found prompt; rename"):
        Sheet.of(candidates(2), [Question("prompt")], 0)


def test_no_cell_is_a_formula_and_texts_are_visible(tmp_path: Path) -> None:
    _, path, _ = write_sheet(tmp_path, Sheet.of(candidates(6), QUESTIONS, 0), "trial")
    with path.open(encoding="utf-8-sig", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert "'" + HOSTILE.replace("\u202e", "⟨U+202E⟩") in cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sheet of twelve pairs."""
    write_sheet(tmp_path, Sheet.of(candidates(12), QUESTIONS, 0), "trial")
    return tmp_path


Fill = Callable[[int, dict[str, str]], Mapping[str, str]]


def fill(folder: Path, name: str, labels: Fill, delimiter: str = ",") -> Path:
    """The CSV as a person leaves it: `labels` gives the cells that are changed in each row."""
    with (folder / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    path = folder / name
    with path.open("w", encoding="utf-8", newline="") as file:
        # In an order of their own.
        writer = csv.DictWriter(file, sorted(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, **labels(number, row)} for number, row in enumerate(rows))
    return path


def said(labels: Labels) -> dict[tuple[str, str, str | None], float]:
    return {(g.item_id, g.dimension, g.annotator): g.value for g in labels.gold}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_come_back_as_they_were_put(folder: Path, delimiter: str) -> None:
    rng = np.random.default_rng(7)
    put: dict[tuple[str, str, str | None], float] = {}
    unsure = blank = 0

    def cells(number: int, row: dict[str, str]) -> dict[str, str]:
        nonlocal unsure, blank
        item, found = row["item_id"], {"annotator": " kim "}
        asked = [
            ("truth", "truth", ""),
            ("truth_a_ok", "truth", "-a"),
            ("truth_b_ok", "truth", "-b"),
            ("tone", "tone", ""),
        ]
        for column, dimension, side in asked:
            values: dict[str, float] = {"yes": 1.0, "no": 0.0} if side else dict(WINNERS)
            word = str(rng.choice([*values, "?", ""]))
            found[column] = f" {word.upper()}" if number % 2 else word
            unsure += word == "?"
            blank += word == ""
            if word in values:
                put[f"{item}{side}", dimension, "kim"] = values[word]
        return found

    path = fill(folder, "kim.csv", cells, delimiter)
    labels = read_labels([path], read_key(folder))
    assert said(labels) == put
    assert (labels.cant_tell, labels.blank) == (unsure, blank)
    gold = folder / "gold.jsonl"
    gold.write_text("".join(json.dumps(line) + "\n" for line in as_lines(labels)))
    assert {(g.item_id, g.dimension, g.annotator): g.value for g in read_gold(gold)} == put
    # What the page saves is a gold file too, and reads back the same.
    assert said(read_labels([gold], read_key(folder))) == put


def test_several_people_partly_filled(folder: Path) -> None:
    kim = fill(folder, "kim.csv", lambda n, _: {"truth": "a", "annotator": "kim"} if n < 3 else {})
    lee = fill(folder, "lee.csv", lambda n, _: {"tone": "tie", "annotator": "lee"} if n else {})
    labels = read_labels([kim, lee], read_key(folder))
    assert labels.annotators == ("kim", "lee")
    assert (len(labels.gold), labels.cant_tell) == (3 + 11, 0)
    assert labels.blank == 2 * 12 * 4 - 14


def _unknown(number: int, _: dict[str, str]) -> Mapping[str, str]:
    return {"item_id": "p0", "truth": "a"} if number == 4 else {}


def _bad(cells: dict[str, str]) -> Fill:
    return lambda number, _: cells if number == 4 else {}


BAD_SHEETS: dict[str, tuple[Fill, str]] = {
    "an unknown item": (_unknown, "item_id must be one of this sheet, found 'p0'; take the row"),
    "another word": (_bad({"truth": "left"}), "truth must be a, tie, b, ? or empty, found 'left'"),
    "a word of another column": (
        _bad({"truth_a_ok": "a"}),
        "truth_a_ok must be yes, no, ? or empty, found 'a'",
    ),
}


@pytest.mark.parametrize("case", BAD_SHEETS)
def test_what_is_no_label_names_file_and_line(case: str, folder: Path) -> None:
    cells, message = BAD_SHEETS[case]
    path = fill(folder, "kim.csv", cells)
    with pytest.raises(InputError) as caught:
        read_labels([path], read_key(folder))
    assert str(caught.value).startswith(f"{path}:6: {message}")


def test_a_row_twice_and_a_label_twice_are_refused(folder: Path) -> None:
    kim = fill(folder, "kim.csv", lambda n, _: {"truth": "a", "annotator": "kim"})
    lines = kim.read_text().splitlines()
    kim.write_text("\n".join([*lines, lines[3]]) + "\n")
    with pytest.raises(InputError, match=r"kim.csv:14: item 'p\w+' must have one row for annot"):
        read_labels([kim], read_key(folder))
    one = fill(folder, "one.csv", lambda n, _: {"truth": "a"} if n == 2 else {})
    two = fill(folder, "two.csv", lambda n, _: {"truth": "b"} if n == 2 else {})
    with pytest.raises(InputError, match=r"two.csv:4: a label .* stands at .*one.csv:4 already"):
        read_labels([one, two], read_key(folder))


def _latin(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-8").replace(b"question 1", b"question \xe9"))


def _without_column(path: Path) -> None:
    path.write_text(path.read_text().replace("tone", "tune"))


def _ragged(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4] + ",more", *lines[5:]]) + "\n")


def _open_quote(path: Path) -> None:
    path.write_text(path.read_text() + '"p1,')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_latin, "must be UTF-8 text; save it again"),
        (_without_column, ":1: the first row must name the sheet's columns, it lacks tone"),
        (_ragged, ":5: must be a row of the sheet as CSV, found 12 cells under 11 columns"),
        (_open_quote, ":14: must be a row of the sheet as CSV, found unexpected end of data"),
        (Path.unlink, "must be a labelled sheet, found no file"),
    ],
)
def test_a_file_that_is_no_sheet_is_refused(
    spoil: Callable[[Path], Any], message: str, folder: Path
) -> None:
    path = fill(folder, "kim.csv", lambda n, _: {"truth": "a", "annotator": "kim"})
    spoil(path)
    with pytest.raises(InputError) as caught:
        read_labels([path], read_key(folder))
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_saved_labels_are_checked_against_the_key(folder: Path) -> None:
    item = json.loads((folder / "key.json").read_text())["items"][0]["item_id"]
    path = folder / "kim.jsonl"
    for line, message in (
        ({"item_id": "p0", "winner": "a"}, "item 'p0', dimension 'truth' is not asked"),
        ({"item_id": f"{item}-a", "score": 0.5}, "must have a score of 0 or 1; correct it"),
        ({"item_id": item, "score": 1}, "must have winner; correct it"),
        ({"item_id": f"{item}-b", "winner": "a"}, "must have a score of 0 or 1"),
    ):
        path.write_text(json.dumps({"dimension": "truth", **line}) + "\n")
        with pytest.raises(InputError, match=rf"kim.jsonl:1: .*{message}"):
            read_labels([path], read_key(folder))
    path.write_text(
        json.dumps({"item_id": item, "dimension": "truth", "winner": None, "annotator": "kim"})
        + "\n"
        + json.dumps({"item_id": item, "dimension": "tone", "winner": "b", "annotator": "kim"})
    )
    labels = read_labels([path], read_key(folder))
    assert (said(labels), labels.cant_tell) == ({(item, "tone", "kim"): -1.0}, 1)


def test_an_empty_sheet_and_a_folder_without_a_key_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="sheets must hold at least one label, found none"):
        read_labels([folder / "sheet.csv"], read_key(folder))
    with pytest.raises(InputError, match="has no key.json; give the folder"):
        read_key(folder / "elsewhere")
