"""Read verdicts and gold labels from JSONL; every line that can't be used is named, with why.

A verdict is what a judge said of an item, a gold label what a person or a stronger judge said:

    {"item_id": "q1-3", "judge": "house", "dimension": "correctness", "score": 0.75}
    {"item_id": "q1-3", "dimension": "correctness", "score": 1, "annotator": "kim"}

An item is an answer (then `score`, a number) or a pair of answers `a` and `b` (then `winner`: "a",
"b" or "tie", whichever was shown first). A verdict of null is an abstention; a gold label of null
says that the annotator could not tell, and is no label.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from rlhf.errors import InputError

VERDICT_FIELDS = (
    "item_id", "judge", "dimension", "score", "winner", "prompt_id", "order", "run", "length",
    "length_a", "length_b",
)  # fmt: skip
GOLD_FIELDS = ("item_id", "dimension", "score", "winner", "annotator")
WINNERS = {"a": 1.0, "tie": 0.0, "b": -1.0}
"""A verdict on a pair as a number: how much better `a` is."""

_SHOWN_LINES = 10
_MISSING = object()

T = TypeVar("T")
Order = Literal["ab", "ba"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One verdict of one judge: `value` is its score, or for a pair +1 (a), 0 (tie) or -1 (b).

    >>> Verdict("q1", "house", "style", pairwise=False, value=None).value is None  # it abstained
    True
    """

    item_id: str
    judge: str
    dimension: str
    pairwise: bool
    value: float | None
    prompt_id: str | None = None
    order: Order | None = None
    """Which answer of a pair was shown first."""
    run: str | None = None
    length: float | None = None
    """Of the answer; of a pair, how much longer `a` is."""
    line: int = 0
    """Where it stands in its file."""


@dataclass(frozen=True, slots=True)
class Gold:
    """One annotator's label of one item; `value` as in `Verdict`."""

    item_id: str
    dimension: str
    pairwise: bool
    value: float
    annotator: str | None = None
    line: int = 0


class _Problem(Exception):
    """Why a line can't be used."""


class _Seen:
    """What earlier lines said, so that a later one can't say otherwise."""

    def __init__(self) -> None:
        self._said: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def once(self, key: tuple[Any, ...], line: int, what: str) -> None:
        """Raise _Problem if this key came before."""
        if key in self._said:
            raise _Problem(f"{what} stands at line {self._said[key][1]} already; take one out")
        self._said[key] = (None, line)

    def same(self, key: tuple[Any, ...], value: Any, line: int, what: str) -> None:
        """Raise _Problem if this key came with another value; None says nothing."""
        if value is None:
            return
        before, at = self._said.setdefault(key, (value, line))
        if before != value:
            raise _Problem(f"{what} must be {before} as at line {at}, found {value}; correct one")


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a JSONL file, in its order.

    Required are item_id, judge, dimension, and score or winner. Optional are prompt_id, order, run,
    and length (of an answer) or length_a and length_b (of a pair). Other fields are ignored, unless
    they look like one of these misspelt.

    Raises InputError naming file and line, rule, what was found and remedy, for up to ten lines.
    """
    seen = _Seen()

    def parse(record: Mapping[str, Any], line: int) -> Verdict:
        _check_names(record, VERDICT_FIELDS)
        pairwise, value = _judged(record)
        found = Verdict(
            item_id=_label(record, "item_id"),
            judge=_label(record, "judge"),
            dimension=_label(record, "dimension"),
            pairwise=pairwise,
            value=value,
            prompt_id=_optional_label(record, "prompt_id"),
            order=_order(record, pairwise),
            run=_optional_label(record, "run"),
            length=_length(record, pairwise),
            line=line,
        )
        item = found.item_id
        of = f"of judge {found.judge!r} on {found.dimension!r}"
        asked = (found.judge, found.dimension, item, found.order, found.run)
        seen.once(asked, line, f"a verdict {of} for item {item!r} in the same order and run")
        form = "winner" if pairwise else "score"
        of_item = f"the kind of verdicts {of} for item {item!r}"
        seen.same(("form", *asked[:3]), form, line, of_item)
        seen.same(("prompt", item), found.prompt_id, line, f"prompt_id of item {item!r}")
        seen.same(("length", item, pairwise), found.length, line, f"length of item {item!r}")
        return found

    return _read(path, "verdict", parse)


def read_gold(path: Path) -> list[Gold]:
    """The gold labels of a JSONL file, in its order.

    Required are item_id, dimension, and score or winner; `annotator` tells several people apart.
    Where the label is null there is none, and the line is passed over.

    Raises InputError as `read_verdicts` does.
    """
    seen = _Seen()

    def parse(record: Mapping[str, Any], line: int) -> Gold | None:
        _check_names(record, GOLD_FIELDS)
        pairwise, value = _judged(record)
        item, dimension = _label(record, "item_id"), _label(record, "dimension")
        annotator = _optional_label(record, "annotator")
        by = f"annotator {annotator!r}" if annotator else "an annotator without a name"
        seen.once(
            (dimension, item, annotator), line, f"a label of item {item!r} on {dimension!r} by {by}"
        )
        if value is None:
            return None
        form = "winner" if pairwise else "score"
        of_item = f"the kind of gold on item {item!r}, dimension {dimension!r}"
        seen.same(("form", dimension, item), form, line, of_item)
        return Gold(item, dimension, pairwise, value, annotator, line)

    return _read(path, "gold label", parse)


def read_both(verdicts_path: Path, gold_path: Path) -> tuple[list[Verdict], list[Gold]]:
    """Verdicts and the gold labels they are measured against.

    Raises InputError as the readers do, and where the two can't be compared: scores in one and
    winners in the other, or no item in both.
    """
    verdicts, gold = read_verdicts(verdicts_path), read_gold(gold_path)
    first_gold: dict[str, Gold] = {}
    for label in gold:
        first_gold.setdefault(label.dimension, label)
    forms = {(label.dimension, label.pairwise) for label in gold}
    comparable = {(v.judge, v.dimension) for v in verdicts if (v.dimension, v.pairwise) in forms}
    for verdict in verdicts:
        against = first_gold.get(verdict.dimension)
        if against is not None and (verdict.judge, verdict.dimension) not in comparable:
            kinds = {True: "winner", False: "score"}
            raise InputError(
                f"{verdicts_path}:{verdict.line}: verdicts on {verdict.dimension!r} must have "
                f"{kinds[against.pairwise]}, as gold has at {gold_path}:{against.line}, found "
                f"{kinds[verdict.pairwise]}; give both on answers, or both on pairs"
            )
    labelled = {(label.item_id, label.dimension) for label in gold}
    if not any((v.item_id, v.dimension) in labelled for v in verdicts):
        one, other = verdicts[0], gold[0]
        raise InputError(
            f"{verdicts_path} and {gold_path} must share items, found none: verdicts are on such "
            f"as item {one.item_id!r}, dimension {one.dimension!r} (line {one.line}), gold on "
            f"item {other.item_id!r}, dimension {other.dimension!r} (line {other.line}); name "
            "items and dimensions alike in both"
        )
    return verdicts, gold


def _read(path: Path, what: str, parse: Callable[[Mapping[str, Any], int], T | None]) -> list[T]:
    if not path.is_file():
        raise InputError(
            f"{path} must be a JSONL file of {what}s, found no file; name one, from {Path.cwd()}"
        )
    found: list[T] = []
    problems: list[str] = []
    for line, record in _lines(path):
        try:
            if isinstance(record, _Problem):
                raise record
            if not isinstance(record, dict):
                raise _Problem(f"must be a JSON object, found {_shown(record)}; correct the line")
            parsed = parse(record, line)
            if parsed is not None:
                found.append(parsed)
        except _Problem as problem:
            problems.append(f"{path}:{line}: {problem}")
    if problems:
        _refuse(problems, what)
    if not found:
        raise InputError(f"{path} must hold at least one {what}, found none; write some to it")
    return found


def _refuse(problems: Sequence[str], what: str) -> NoReturn:
    more = len(problems) - _SHOWN_LINES
    lines = list(problems[:_SHOWN_LINES])
    if more > 0:
        lines.append(f"and {more} more {what}s that can't be used")
    raise InputError("\n".join(lines))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Each line's number and JSON value; a _Problem in the place of one that can't be read."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            # Bytes are decoded line by line, so that a wrong one is reported with its line.
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield (
                    number,
                    json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object),
                )
            except (ValueError, RecursionError) as error:
                yield number, _Problem(f"must be one JSON object, found {error}; correct the line")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON has not (an abstention is null)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} twice")
    return dict(pairs)


def _check_names(record: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    """A misspelt optional field would be lost in silence; columns of other names are no harm."""
    for name in record:
        if name not in fields and (near := _meant(name, fields)):
            raise _Problem(f"fields must be spelt as they are known, found {name}; write {near}")


@cache
def _meant(name: str, fields: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(name.lower(), fields, n=1, cutoff=0.85)), None)


def _judged(record: Mapping[str, Any]) -> tuple[bool, float | None]:
    """Whether it is about a pair, and the value; None where it is null."""
    score, winner = record.get("score", _MISSING), record.get("winner", _MISSING)
    if score is _MISSING and winner is _MISSING:
        raise _Problem(
            "must have score (of an answer) or winner (of a pair), found neither; "
            "write null where the judge abstained"
        )
    if winner is _MISSING or (winner is None and score is not _MISSING):
        return False, None if score is None else _number(record, "score")
    if score is not _MISSING and score is not None:
        raise _Problem("must have score or winner, found both; an item is an answer or a pair")
    if winner is None:
        return True, None
    if not isinstance(winner, str) or winner not in WINNERS:
        raise _Problem(
            f"winner must be a, b or tie, found {_shown(winner)}; "
            "write null where there is no verdict"
        )
    return True, WINNERS[winner]


def _order(record: Mapping[str, Any], pairwise: bool) -> Order | None:
    order = record.get("order")
    if order is None:
        return None
    if order not in ("ab", "ba"):
        raise _Problem(f"order must be ab or ba, found {_shown(order)}; leave it out if unknown")
    if not pairwise:
        raise _Problem(f"order must stand beside winner, found {order!r} with score; take it out")
    return "ab" if order == "ab" else "ba"


def _length(record: Mapping[str, Any], pairwise: bool) -> float | None:
    names = ("length_a", "length_b") if pairwise else ("length",)
    kind = "a pair" if pairwise else "an answer"
    for name in ("length", "length_a", "length_b"):
        if name not in names and record.get(name) is not None:
            raise _Problem(f"{kind} must have {' and '.join(names)}, found {name}; rename it")
    given = [name for name in names if record.get(name) is not None]
    if not given:
        return None
    if len(given) < len(names):
        raise _Problem(f"length_a and length_b must both be given, found {given[0]} alone; add it")
    lengths = [_number(record, name) for name in names]
    if min(lengths) < 0:
        raise _Problem(f"a length must be at least 0, found {min(lengths):g}; count again")
    return lengths[0] - lengths[1] if pairwise else lengths[0]


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record[name]
    # bool is an int to Python, but true is more often a slip than a score of 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Problem(f"{name} must be a number, found {_shown(value)}; write it without quotes")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Problem(f"{name} must be a finite number, found {_shown(value)}; correct it")
    return number


def _label(record: Mapping[str, Any], name: str) -> str:
    found = _optional_label(record, name)
    if found is None:
        raise _Problem(f"{name} must be text or a whole number, found nothing; add it")
    return found


def _optional_label(record: Mapping[str, Any], name: str) -> str | None:
    """A name or number that stands for something; absent, null and blank are None."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise _Problem(f"{name} must be text or a whole number, found {_shown(value)}; quote it")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
