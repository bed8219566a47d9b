"""Repeated records of Parquet files, slice by slice: what `repeating` does with all at once.

A slice gives digests, then keys by band of those of its records that no earlier one equals; texts
that share a band are compared, and who stays is settled for all at once, by numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rlhf.duplicates import alike, bands, digests, joined, repeating, sharing_band, verified
from rlhf.errors import InputError
from rlhf.minhash import I64, PERMUTATIONS, rows_per_band
from rlhf.pair_files import MESSAGES
from rlhf.transcripts import prompt_text

SLICE_RECORDS = 20_000
TEXT = ("prompt", "messages", "context")
"""Columns by which records are compared by default, those of them that there are."""
_BUCKET_KEYS = 1_000_000


@dataclass(frozen=True, slots=True)
class Slice:
    """Records of a file, one after the other; `first` is the first one's number among all."""

    path: Path
    start: int
    records: int
    first: int


@dataclass(frozen=True, slots=True)
class Alike:
    """When records repeat each other: `repeating`'s arguments."""

    columns: tuple[str, ...]
    most: float
    seed: int = 0


def slices_of(path: Path, size: int = SLICE_RECORDS) -> list[Slice]:
    """The records of a Parquet file, or of a folder of them by name, in order, at most `size` each.

    Raises:
        InputError: no Parquet, no records, or files whose columns differ.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".parquet" or not file.is_file() for file in files):
        raise InputError(f"{path} must be a Parquet file or a folder of them")
    found, first, schema = [], 0, None
    for file in files:
        try:
            columns = pl.read_parquet_schema(file)
            records = (
                pl.scan_parquet(file, glob=False, hive_partitioning=False)
                .select(pl.len())
                .collect()
                .item()
            )
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{file} must be a Parquet file: {error}") from None
        if columns != (schema := schema or columns):
            raise InputError(f"{file} must have the columns of {files[0]}: {schema}, got {columns}")
        for start in range(0, records, size):
            few = min(size, records - start)
            found.append(Slice(file, start, few, first))
            first += few
    if not found:
        raise InputError(f"{path} must hold at least one record, it holds none")
    return found


def text_columns(slices: Sequence[Slice], named: Sequence[str]) -> tuple[str, ...]:
    """The columns to compare: those named, or those of `TEXT` that there are.

    Raises:
        InputError: none, or one that holds neither text nor messages.
    """
    path = slices[0].path
    schema = pl.read_parquet_schema(path)
    columns = tuple(named) or tuple(name for name in TEXT if name in schema)
    if not columns:
        raise InputError(
            f"{path} has none of {', '.join(TEXT)}; name its text with --text, of {list(schema)}"
        )
    for name in columns:
        if schema.get(name) not in (pl.String(), MESSAGES):
            raise InputError(
                f"--text {name} must be text or messages of {path}, got "
                f"{schema.get(name, f'no such column (it has {list(schema)})')}"
            )
    return columns


def records(part: Slice) -> pl.DataFrame:
    """All columns of a slice."""
    return (
        pl.scan_parquet(part.path, glob=False, hive_partitioning=False)
        .slice(part.start, part.records)
        .collect()
    )


def texts(part: Slice, rule: Alike) -> list[pl.Series]:
    """What a slice's records are compared by; a null is no text."""
    table = pl.scan_parquet(part.path, glob=False, hive_partitioning=False).slice(
        part.start, part.records
    )
    schema = pl.read_parquet_schema(part.path)
    shown = [pl.col(n) if schema[n] == pl.String else prompt_text(n) for n in rule.columns]
    found = table.select(e.fill_null("").alias(str(i)) for i, e in enumerate(shown)).collect()
    return found.get_columns()


def whole(slices: Sequence[Slice], rule: Alike) -> pl.DataFrame:
    """`repeating` of all slices at once."""
    parts = [texts(part, rule) for part in slices]
    return repeating(
        [pl.concat(column) for column in zip(*parts, strict=True)], rule.most, rule.seed
    )


def slice_digests(part: Slice, rule: Alike) -> pl.DataFrame:
    """`digests` of a slice's records."""
    return digests(texts(part, rule))


def slice_bands(part: Slice, first: I64, rule: Alike) -> pl.DataFrame:
    """Of each record that is the first of its equals a row a band: `bucket`, `key`, `index`.

    Records that share a band have that bucket and key in common; a bucket has keys of one band.
    """
    own = first[part.first : part.first + part.records]
    index = part.first + np.flatnonzero(own == np.arange(part.first, part.first + part.records))
    few = [column.gather(index - part.first) for column in texts(part, rule)]
    schema = {"bucket": pl.Int64, "key": pl.UInt64, "index": pl.Int64}
    if not len(index):
        return pl.DataFrame(schema=schema)
    share = np.uint64(_buckets_a_band(len(first)))
    rows = [
        {"bucket": band * int(share) + (key % share).astype(np.int64), "key": key, "index": index}
        for band, key in enumerate(bands(joined(few), rule.most, rule.seed))
    ]
    return pl.concat(pl.DataFrame(columns, schema=schema) for columns in rows)


def buckets(records: int, rule: Alike) -> int:
    """How many buckets `slice_bands` fills where there are so many records."""
    return _buckets_a_band(records) * (PERMUTATIONS // rows_per_band(rule.most))


def _buckets_a_band(records: int) -> int:
    """So many that a bucket holds about `_BUCKET_KEYS` keys."""
    return 1 + records // _BUCKET_KEYS


def bucket_pairs(bucket: pl.DataFrame) -> pl.DataFrame:
    """Candidates of a whole bucket: `earlier` and `later`."""
    ordered = bucket.sort("index")
    pairs = sharing_band(ordered["key"].to_numpy(), ordered["index"].to_numpy())
    return pl.DataFrame({"earlier": pairs[0], "later": pairs[1]})


def slice_texts(part: Slice, wanted: I64, rule: Alike, side: str) -> pl.DataFrame:
    """Of a slice's records that are wanted (the rising numbers of some records), the number in a
    column named `side`, and the texts beside it, as `similar` finds them."""
    ends = np.searchsorted(wanted, [part.first, part.first + part.records])
    index = wanted[ends[0] : ends[1]]
    columns = [column.gather(index - part.first) for column in texts(part, rule)]
    names = _named(side, rule)
    return pl.DataFrame([pl.Series(side, index), *map(pl.Series.alias, columns, names)])


def similar(pairs: pl.DataFrame, rule: Alike) -> pl.DataFrame:
    """Of candidates, with the texts of both sides, those that `repeating` holds for similar:
    `earlier`, `later` and `similarity`."""
    earlier, later = (pairs.select(_named(s, rule)).get_columns() for s in ("earlier", "later"))
    similarity, near = verified(joined(earlier), joined(later), rule.most, rule.seed)
    found = pairs.select("earlier", "later", similarity=pl.Series(similarity))
    return found.filter(pl.Series(near) & alike(earlier, later, rule.most))


def _named(side: str, rule: Alike) -> list[str]:
    return [f"{side} {column}" for column in rule.columns]
