"""A recorded judge: verdicts that people or an outside judge gave, read from a file.

Each verdict belongs to one text. Sampling again gives other answers under the same numbers, so a
verdict on `sample` 3 counts only where the text of that sample is known (`completions`), and then
for that text alone. What the file says nothing about is an abstention.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from rlhf.config_judges import RecordedSpec
from rlhf.errors import InputError
from rlhf.judgements import Verdict, read_verdicts
from rlhf.types import Completion, Prompt, Score

Votes = tuple[float, ...]
Verdicts = Mapping[tuple[str, str], Votes]
"""(answer, dimension) -> its votes; none where the judge abstained."""

_HASH = re.compile(r"[0-9a-f]{64}")
_SHOWN = 10


def answer_id(prompt_id: str, text: str) -> str:
    """The name of an answer in a verdict file, whichever sample of its prompt it was.

    >>> answer_id("refund-1", "Five days.")[:12]
    'd8316890a7b3'
    """
    return hashlib.sha256(f"{prompt_id}\n{text}".encode()).hexdigest()


class RecordedJudge:
    """Looks verdicts up; the mean where there are several runs.

    >>> told = {(answer_id("p", "At nine."), "style"): (0.5, 1.0)}
    >>> judge = RecordedJudge("kim", ("style",), told, Path("kim.jsonl"))
    >>> prompt = Prompt("p", ({"role": "user", "content": "When does it open?"},))
    >>> answer = Completion("p", 0, "At nine.", (1,), (1,), (0.0,), "stop", 0)
    >>> [(s.score, s.votes) for s in judge.score([(prompt, answer)])]
    [(0.75, (0.5, 1.0))]
    """

    def __init__(
        self, name: str, dimensions: tuple[str, ...], verdicts: Verdicts, source: Path
    ) -> None:
        self.name = name
        self.dimensions = dimensions
        self.votes = max(map(len, verdicts.values()), default=1)
        """Most votes that an answer has."""
        self._verdicts = verdicts
        self._source = source

    @classmethod
    def of(cls, spec: RecordedSpec, field: str) -> RecordedJudge:
        """The judge that a configuration names, its file read.

        Raises InputError with file and line (row in Parquet) of what can't be used.
        """
        path = Path(spec.verdicts)
        if not path.exists():
            raise InputError(f"{field}.verdicts: there is no {path} in {Path.cwd()}")
        texts = None if spec.completions is None else _texts(spec, field)
        tabular = path.is_dir() or path.suffix == ".parquet"
        read = _from_table if tabular else _from_lines
        verdicts = read(path, spec, texts, field)
        return cls(spec.name, tuple(spec.dimensions), verdicts, path)

    def score(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """One `Score` for every item and dimension, in that order."""
        return [self._one(completion, d) for _, completion in items for d in self.dimensions]

    def _one(self, completion: Completion, dimension: str) -> Score:
        at = (completion.prompt_id, completion.sample, self.name, dimension)
        votes = self._verdicts.get((answer_id(completion.prompt_id, completion.text), dimension))
        if votes is None:
            return Score.abstain(*at, f"{self._source} holds no verdict on this answer")
        if not votes:
            return Score.abstain(*at, f"the judge abstained in {self._source}")
        spread = statistics.stdev(votes) if len(votes) > 1 else 0.0
        return Score(*at, statistics.fmean(votes), votes, spread)


Texts = Mapping[tuple[str, int], str]
"""(prompt_id, sample) -> the answer's text."""


def _texts(spec: RecordedSpec, field: str) -> Texts:
    assert spec.completions is not None
    table = _table(Path(spec.completions), f"{field}.completions", ("prompt_id", "sample", "text"))
    columns = table.select(pl.col("prompt_id", "text").cast(pl.String), pl.col("sample"))
    twice = columns.group_by("prompt_id", "sample").agg(pl.col("text").n_unique())
    if (several := twice.filter(pl.col("text") > 1).sort("prompt_id", "sample")).height:
        prompt_id, sample, _ = several.row(0)
        raise InputError(
            f"{field}.completions: sample {sample} of prompt {prompt_id!r} must be one answer, but "
            f"stands for {several['text'][0]} different ones in {spec.completions}; name the "
            "completions of one round and stage"
        )
    return {(prompt_id, sample): text for prompt_id, text, sample in columns.iter_rows()}


def _from_lines(path: Path, spec: RecordedSpec, texts: Texts | None, field: str) -> Verdicts:
    said = read_verdicts(path)
    mine = [v for v in said if v.judge == spec.name]
    _check_held(path, spec, {v.judge for v in said}, {v.dimension for v in mine}, field)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    problems: list[str] = []
    for verdict in mine:
        try:
            votes = found[_answer(verdict, texts), verdict.dimension]
        except InputError as problem:
            problems.append(f"{path}:{verdict.line}: {problem}")
            continue
        if verdict.value is not None:
            votes.append(verdict.value)
    _refuse(problems)
    return {key: tuple(votes) for key, votes in found.items()}


def _answer(verdict: Verdict, texts: Texts | None) -> str:
    """The answer that a verdict is on. Raises InputError with what is wrong with its line."""
    if verdict.pairwise:
        raise InputError(
            "must have a score, found winner: a recorded judge scores answers one by one"
        )
    if verdict.value is not None and not 0 <= verdict.value <= 1:
        raise InputError(f"score must be in [0, 1], found {verdict.value:g}; map it to [0, 1]")
    if _HASH.fullmatch(verdict.item_id):
        return verdict.item_id
    prompt_id, hyphen, sample = verdict.item_id.rpartition("-")
    if not hyphen or not sample.isdecimal():
        raise InputError(
            "item_id must be an answer's SHA-256 (of prompt_id, a line feed and its text), or its "
            f"prompt_id, a hyphen and its sample number, found {verdict.item_id!r}"
        )
    return _known(prompt_id, int(sample), texts)


def _known(prompt_id: str, sample: int, texts: Texts | None) -> str:
    if texts is None:
        raise InputError(
            f"sample {sample} of prompt {prompt_id!r} says nothing about which text was judged; "
            "name the completions in this judge's `completions`, or give the answer's SHA-256"
        )
    if (prompt_id, sample) not in texts:
        raise InputError(f"sample {sample} of prompt {prompt_id!r} is not among the completions")
    return answer_id(prompt_id, texts[prompt_id, sample])


def _from_table(path: Path, spec: RecordedSpec, texts: Texts | None, field: str) -> Verdicts:
    where = f"{field}.verdicts"
    table = _table(path, where, ("prompt_id", "sample", "judge", "dimension", "score"))
    mine = table.with_row_index("row").filter(pl.col("judge") == spec.name)
    judges = set(table["judge"].unique().drop_nulls())
    _check_held(path, spec, judges, set(mine["dimension"].unique()), field)
    votes = pl.col("votes") if "votes" in table.columns else pl.lit(None, pl.List(pl.Float64))
    rows = mine.select("row", "prompt_id", "sample", "dimension", "score", votes.alias("votes"))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    problems: list[str] = []
    for row, prompt_id, sample, dimension, score, given in rows.iter_rows():
        cast = [] if score is None else list(given or [score])
        # NaN fails the comparison too.
        if not all(0 <= vote <= 1 for vote in cast):
            problems.append(f"{path}, row {row}: score must be in [0, 1], found {score:g}")
            continue
        try:
            found[_known(prompt_id, sample, texts), dimension] += cast
        except InputError as problem:
            problems.append(f"{path}, row {row}: {problem}")
    _refuse(problems)
    return {key: tuple(votes) for key, votes in found.items()}


def _table(path: Path, field: str, columns: Sequence[str]) -> pl.DataFrame:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError(f"{field}: there is no Parquet file at {path}")
    parts: list[Any] = []
    for file in files:
        try:
            parts.append(pl.read_parquet(file, glob=False, hive_partitioning=False))
        except PolarsError as error:
            raise InputError(f"{field}: {file} is not Parquet that can be read: {error}") from None
        if lacking := [name for name in columns if name not in parts[-1].columns]:
            raise InputError(
                f"{field}: {file} must have the columns {', '.join(columns)}; it lacks "
                f"{', '.join(lacking)}"
            )
    table: pl.DataFrame = pl.concat(parts, how="diagonal_relaxed")
    return table


def _check_held(
    path: Path, spec: RecordedSpec, judges: set[str], dimensions: set[str], field: str
) -> None:
    if spec.name not in judges:
        raise InputError(
            f"{field}.name must be a judge of {path}, which has {', '.join(sorted(judges))}; got "
            f"{spec.name!r}"
        )
    if lacking := sorted(set(spec.dimensions) - dimensions):
        raise InputError(
            f"{field}.dimensions: {path} has no verdict of {spec.name!r} on {', '.join(lacking)}; "
            f"it has them on {', '.join(sorted(dimensions))}"
        )


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN
        rest = [f"and {more} more verdicts that can't be used"] if more > 0 else []
        raise InputError("\n".join([*problems[:_SHOWN], *rest]))
