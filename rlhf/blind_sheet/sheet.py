"""A blind sheet: what is asked of whom, and the files that it is written to.

| file | for whom |
|---|---|
| `sheet.html`, `sheet.csv` | whoever labels: pairs of answers as A and B, in an order drawn |
| `key.json` | whoever reads the labels: where each pair comes from, what stands on which side |
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from rlhf.blind_sheet.draw import SHOWN, blind
from rlhf.document import document, encoded, visible
from rlhf.errors import InputError
from rlhf.files import atomic_write, read_json, write_json

HTML, CSV, KEY = "sheet.html", "sheet.csv", "key.json"
TEXTS = ("prompt", "context", "reference", "answer_a", "answer_b")
"""Columns of the CSV that hold texts; whatever is done to them is not read back."""
SIDES = ("a", "b")
_FORMAT = 1
_TEMPLATES = Path(__file__).parent / "templates"
# What a spreadsheet takes for a formula where a cell begins with it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked on one dimension: which answer is better, and with `bar` also of each answer
    whether it is good enough by itself, which is what a floor asks.

    >>> Question("style", "Is it friendly and short?").columns
    ('style',)
    """

    dimension: str
    text: str = ""
    bar: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns in a CSV."""
        bars = tuple(f"{self.dimension}_{side}_ok" for side in SIDES)
        return (self.dimension, *(bars if self.bar else ()))


@dataclass(frozen=True, slots=True)
class Sheet:
    """Blinded pairs (as of `rlhf.blind_sheet.blind`) and what is asked of each."""

    pairs: pl.DataFrame
    questions: tuple[Question, ...]

    @classmethod
    def of(cls, pairs: pl.DataFrame, questions: Sequence[Question], seed: int) -> Sheet:
        """A sheet of pairs as `sample_pairs` gives them.

        Raises InputError where a dimension's name would be that of another column.
        """
        columns = ["item_id", "annotator", *TEXTS, *(c for q in questions for c in q.columns)]
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise InputError(
                f"dimensions must have names that a sheet's other columns don't, found "
                f"{', '.join(twice)}; rename the dimension"
            )
        return cls(blind(pairs, seed), tuple(questions))

    @property
    def key(self) -> dict[str, Any]:
        """Everything that a sheet doesn't say, less the texts; JSON-ready."""
        hidden = self.pairs.drop(*SHOWN[1:], "answer_a", "answer_b")
        return {
            "format": _FORMAT,
            "sheet": self.name,
            "questions": [asdict(question) for question in self.questions],
            "items": [{"item_id": row.pop("item_id"), **row} for row in hidden.to_dicts()],
        }

    @property
    def name(self) -> str:
        """Tells sheets apart; the hash of what is asked."""
        asked = json.dumps([asdict(q) for q in self.questions], ensure_ascii=False)
        ids = "".join(self.pairs["item_id"])
        return hashlib.blake2b(f"{ids}{asked}".encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class Key:
    """What labels are checked against."""

    items: frozenset[str]
    questions: tuple[Question, ...]


def answer_item(item_id: str, side: str) -> str:
    """The item that stands for one answer of a pair; `side` is `a` or `b`."""
    return f"{item_id}-{side}"


def write_sheet(folder: Path, sheet: Sheet, title: str) -> list[Path]:
    """Write `sheet.html`, `sheet.csv` and `key.json`; the files, in this order.

    The same sheet gives the same bytes. Raises InputError where `folder` holds another sheet, whose
    labels could not be read any more.
    """
    paths = [folder / name for name in (HTML, CSV, KEY)]
    *_, key = paths
    if key.exists() and read_json(key, "move it away").get("sheet") != sheet.name:
        raise InputError(
            f"--out must be a folder without another sheet: {folder} holds one, and labels on it "
            "could not be read any more; give another --out, or move it away"
        )
    write_json(key, sheet.key)
    atomic_write(paths[0], _page(sheet, title).encode())
    # Spreadsheets take a file without this mark for one in an older encoding.
    atomic_write(paths[1], b"\xef\xbb\xbf" + _table(sheet).encode())
    return paths


def read_key(folder: Path) -> Key:
    """The key of the sheet in `folder`. Raises InputError where there is none."""
    path = folder / KEY
    if not path.is_file():
        raise InputError(
            f"FOLDER must be one that `pairloop judge sample` wrote: {folder} has no {KEY}; give "
            "the folder that it named"
        )
    key = read_json(path, "draw the sheet again")
    if key.get("format") != _FORMAT:
        raise InputError(f"{path} must be of format {_FORMAT}, found {key.get('format')}")
    return Key(
        frozenset(item["item_id"] for item in key["items"]),
        tuple(Question(**question) for question in key["questions"]),
    )


def _page(sheet: Sheet, title: str) -> str:
    names = ("item_id", *TEXTS)
    items = [
        {name: value for name, value in row.items() if value is not None}
        for row in sheet.pairs.select(names).iter_rows(named=True)
    ]
    asked = {"sheet": sheet.name, "questions": [asdict(q) for q in sheet.questions]}
    return document(
        _TEMPLATES,
        "sheet",
        {
            "title": title,
            "pairs": len(items),
            "bars": any(question.bar for question in sheet.questions),
            "json": encoded({**asked, "items": items}),
        },
    )


def _table(sheet: Sheet) -> str:
    asked = [column for question in sheet.questions for column in question.columns]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["item_id", *TEXTS, *asked, "annotator"])
    for row in sheet.pairs.select("item_id", *TEXTS).iter_rows():
        item_id, *texts = row
        writer.writerow([item_id, *map(_cell, texts), *("" for _ in asked), ""])
    return out.getvalue()


def _cell(text: str | None) -> str:
    """Text that a spreadsheet shows and never computes: a formula gets an apostrophe in front."""
    shown = str(visible(text or ""))
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
