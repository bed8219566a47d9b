"""Labelled sheets back as gold: the CSV that a person filled in, and the file that the page saves.

A cell is `a`, `tie` or `b` (which answer is better), `yes` or `no` (whether an answer is good
enough by itself: a score of 1 or 0), `?` where the annotator can't tell, or empty where nothing was
said. Only item ids, labels and annotators are read; texts may have been cut or changed.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.blind_sheet.sheet import SIDES, Key, answer_item
from rlhf.errors import InputError
from rlhf.judgements import WINNERS, Gold, read_gold

_CANT_TELL = "?"
_BARS = {"yes": 1.0, "no": 0.0}
_DELIMITERS = (",", ";", "\t")
_SHOWN = 10
# Far above any text, far below what a file without closing quotes would be taken for.
_LONGEST_CELL = 10_000_000


@dataclass(frozen=True, slots=True)
class Labels:
    """What sheets said: gold labels, and how many questions were answered otherwise or not."""

    gold: tuple[Gold, ...]
    cant_tell: int
    blank: int
    """Questions of the sheets that nobody answered, counted for every file."""

    @property
    def annotators(self) -> tuple[str, ...]:
        """Who labelled, in order of appearance; without those who gave no name."""
        return tuple(dict.fromkeys(g.annotator for g in self.gold if g.annotator is not None))


@dataclass(frozen=True, slots=True)
class _Column:
    """What a column of the CSV asks."""

    dimension: str
    side: Literal["a", "b"] | None
    """None where it asks which answer is better."""


def read_labels(paths: Sequence[Path], key: Key) -> Labels:
    """The labels of sheets that several people may have filled in, partly or whole.

    Raises InputError naming file and line of every item that is not on the sheet, every value that
    is no label, and every second label of one annotator for one item and dimension.
    """
    questions = len(key.items) * sum(len(question.columns) for question in key.questions)
    gold: list[Gold] = []
    cant_tell = blank = 0
    first: dict[tuple[str, str, str | None], str] = {}
    problems: list[str] = []
    for path in paths:
        said = _of_csv(path, key) if path.suffix.lower() == ".csv" else _of_lines(path, key)
        for label in said.gold:
            asked = (label.item_id, label.dimension, label.annotator)
            at = f"{path}:{label.line}"
            if asked in first:
                problems.append(_twice(at, label, first[asked]))
            first.setdefault(asked, at)
        gold += said.gold
        cant_tell += said.cant_tell
        blank += questions - said.cant_tell - len(said.gold)
    _refuse(problems)
    if not gold:
        raise InputError(
            f"sheets must hold at least one label, found none in {', '.join(map(str, paths))}; "
            "fill in a, tie or b (and yes or no) in the columns after the answers"
        )
    return Labels(tuple(gold), cant_tell, max(0, blank))


def as_lines(labels: Labels) -> Iterator[dict[str, Any]]:
    """Gold labels as `rlhf.judgements.read_gold` reads them, one record a line."""
    words = {value: word for word, value in WINNERS.items()}
    for label in labels.gold:
        said = {"winner": words[label.value]} if label.pairwise else {"score": label.value}
        by = {} if label.annotator is None else {"annotator": label.annotator}
        yield {"item_id": label.item_id, "dimension": label.dimension, **said, **by}


def _twice(at: str, label: Gold, before: str) -> str:
    who = f"annotator {label.annotator!r}" if label.annotator else "an annotator without a name"
    return (
        f"{at}: a label of item {label.item_id!r} on {label.dimension!r} by {who} stands at "
        f"{before} already; take one out, or name the annotators"
    )


def _of_lines(path: Path, key: Key) -> Labels:
    """The file that the page saves, which is a gold file."""
    gold = read_gold(path)
    asked = {
        (item, question.dimension): pairwise
        for question in key.questions
        for item_id in key.items
        for item, pairwise in (
            (item_id, True),
            *((answer_item(item_id, side), False) for side in SIDES if question.bar),
        )
    }
    problems = []
    for label in gold:
        pairwise = asked.get((label.item_id, label.dimension))
        if pairwise is None:
            what = f"item {label.item_id!r}, dimension {label.dimension!r}"
            problems.append(f"{path}:{label.line}: {what} is not asked on this sheet; take it out")
        elif pairwise != label.pairwise or (not pairwise and label.value not in (0, 1)):
            rule = "winner" if pairwise else "a score of 0 or 1"
            problems.append(
                f"{path}:{label.line}: item {label.item_id!r} on {label.dimension!r} must have "
                f"{rule}; correct it"
            )
    _refuse(problems)
    with path.open(encoding="utf-8") as lines:
        said = sum(1 for line in lines if line.strip())
    return Labels(tuple(gold), said - len(gold), 0)


def _of_csv(path: Path, key: Key) -> Labels:
    header, rows = _rows(path)
    columns = _columns(path, header, key)
    gold: list[Gold] = []
    cant_tell = 0
    problems: list[str] = []
    seen: Counter[tuple[str, str]] = Counter()
    for line, row in rows:
        item_id, annotator = row["item_id"].strip(), row.get("annotator", "").strip()
        said = {name: row[name].strip() for name in columns if row[name].strip()}
        if item_id not in key.items:
            problems.append(
                f"{path}:{line}: item_id must be one of this sheet, found {item_id!r}; take the "
                "row out, or correct it"
            )
            continue
        seen[item_id, annotator] += 1
        if seen[item_id, annotator] > 1:
            problems.append(
                f"{path}:{line}: item {item_id!r} must have one row for annotator {annotator!r}, "
                "found another; take one out"
            )
            continue
        for name, text in said.items():
            if text == _CANT_TELL:
                cant_tell += 1
                continue
            column = columns[name]
            values = WINNERS if column.side is None else _BARS
            value = values.get(text.lower())
            if value is None:
                problems.append(
                    f"{path}:{line}: {name} must be {', '.join(values)}, ? or empty, found "
                    f"{text[:40]!r}; correct it"
                )
                continue
            item = item_id if column.side is None else answer_item(item_id, column.side)
            who = annotator or None
            gold.append(Gold(item, column.dimension, column.side is None, value, who, line))
    _refuse(problems)
    return Labels(tuple(gold), cant_tell, 0)


def _columns(path: Path, header: Sequence[str], key: Key) -> dict[str, _Column]:
    found: dict[str, _Column] = {}
    for question in key.questions:
        sides: tuple[Literal["a", "b"] | None, ...] = (None, "a", "b")
        found |= {
            name: _Column(question.dimension, side)
            for name, side in zip(question.columns, sides, strict=False)
        }
    lacking = [name for name in ("item_id", *found) if name not in header]
    twice = sorted(name for name, times in Counter(header).items() if name and times > 1)
    if lacking or twice:
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(twice)} twice"
        raise InputError(
            f"{path}:1: the first row must name the sheet's columns, it {what}; leave the first "
            "row as it was"
        )
    return found


def _rows(path: Path) -> tuple[list[str], list[tuple[int, Mapping[str, str]]]]:
    """The header, and each row with the line that it begins at; rows without any text fall."""
    if not path.is_file():
        raise InputError(f"{path} must be a labelled sheet, found no file; name one that is there")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{path} must be UTF-8 text; save it again, as `CSV UTF-8` where there is a choice"
        ) from None
    first = text.split("\n", 1)[0]
    # Spreadsheets write what their locale takes for a comma.
    delimiter = max(_DELIMITERS, key=first.count)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Mapping[str, str]]] = []
    begins = 1
    header: list[str] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        begins = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) > len(header):
                    raise csv.Error(f"{len(cells)} cells under {len(header)} columns")
                padded = [*cells, *[""] * (len(header) - len(cells))]
                rows.append((begins, dict(zip(header, padded, strict=True))))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}:{begins}: must be a row of the sheet as CSV, found {error}; correct it"
        ) from None
    return header, rows


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN
        rest = [f"and {more} more labels that can't be used"] if more > 0 else []
        raise InputError("\n".join([*problems[:_SHOWN], *rest]))
