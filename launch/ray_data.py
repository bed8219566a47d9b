"""Ray Data at the edge: shards and slices in tasks of a cluster, what is small in this process.

Tasks read the files themselves, so paths must mean the same on every node, and return whole
results of `rlhf.selection_shards` and `rlhf.duplicate_shards`. What is as large as the data (pairs
before they are sorted, keys by band, the texts of candidates) stays in the cluster's object store,
which spills to disk. This process holds, of each prompt, its id; of each pair, what the cap looks
at; of each record, a few numbers.

| here | in tasks |
|---|---|
| settle `min_margin: auto` | the noise of a shard |
| add counts, cap all pairs | the pairs of a shard; sort |
| the first of equal records | digests of a slice |
| who stands for whom | keys by band; candidates of a bucket; the exact similarity of candidates |
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from importlib.util import find_spec
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from rlhf import duplicate_shards, selection_shards
from rlhf.duplicate_shards import Alike, Slice
from rlhf.duplicates import NONE_SIMILAR, first_of_equals, standing
from rlhf.errors import InputError, PairloopError
from rlhf.noise import noise_from, settled
from rlhf.rules import Rules
from rlhf.selection_shards import PAIR, Shard
from rlhf.types import pairs_schema

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

_TASK_MEMORY = 2**30
"""What a task that reads a shard or a slice is given, so that no node starts too many at once."""
_JOINED_ROWS = 50_000
_HELD_ROWS = 1_000_000
_COMPARED = 10_000
_WRITTEN_ROWS = 20_000


@contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster as a run does, with Ray Data set up.

    Raises:
        InputError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("--ray needs Ray; pip install 'pairloop[ray]'")
    # Tasks import this module, and have no use for what a run imports.
    from launch.ray_run import joined

    with joined():
        import logging

        from ray.data import DataContext

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        with DataContext.current(context):
            yield


def select(
    shards: Sequence[Shard], given: Rules, round: int
) -> tuple[dict[str, Any], Iterator[pl.DataFrame]]:
    """The funnel, and the pairs in order, as `select_pairs` of all shards would have them.

    Raises what `select_pairs` does, and InputError for what is wrong with the tables.
    """
    selection_shards.check_prompts(shards[0].prompts)
    noise = _each(
        len(shards),
        lambda number: (selection_shards.shard_noise(shards[number], given), None),
    )
    rules = settled(given, lambda: noise_from(reduce(add, _results(noise)), given))
    stored = _each(
        len(shards),
        lambda number: selection_shards.shard_pairs(shards[number], rules, round),
    ).materialize()
    small = stored.select_columns(["number", "small"])
    folder = shards[0].prompts.parent
    keys, funnel = selection_shards.together(_results(small), folder, rules)
    return funnel, _sorted_pairs(stored, keys, rules)


def repeating(slices: Sequence[Slice], rule: Alike) -> pl.DataFrame:
    """`rlhf.duplicates.repeating` of all slices."""
    digests = _each(len(slices), lambda n: (duplicate_shards.slice_digests(slices[n], rule), None))
    first = first_of_equals(pl.concat(_results(digests)))
    if rule.most == 1:
        return standing(first, NONE_SIMILAR)
    keys = _tables(slices, lambda part: duplicate_shards.slice_bands(part, first, rule))
    buckets = duplicate_shards.buckets(len(first), rule)
    found = keys.groupby("bucket", num_partitions=1 + buckets // 4).map_groups(
        lambda bucket: _arrow(duplicate_shards.bucket_pairs(_frame(bucket))), batch_format="pyarrow"
    )
    candidates = _uniques(found, NONE_SIMILAR.select("earlier", "later"))
    if candidates.is_empty():
        return standing(first, NONE_SIMILAR)
    return standing(first, _similar(slices, candidates, rule))


def _similar(slices: Sequence[Slice], candidates: pl.DataFrame, rule: Alike) -> pl.DataFrame:
    """Candidates that are similar, with their similarity: each is brought together with the texts
    of its records, and compared."""
    import ray.data

    wanted = np.unique(candidates.to_numpy())
    parts = 1 + (len(wanted) + candidates.height) // _JOINED_ROWS
    pairs: Dataset = ray.data.from_arrow(_arrow(candidates))
    for side in ("earlier", "later"):
        texts = _tables(
            slices, partial(duplicate_shards.slice_texts, wanted=wanted, rule=rule, side=side)
        )
        pairs = pairs.join(texts, "inner", num_partitions=parts, on=(side,))
    found = pairs.map_batches(
        lambda batch: _arrow(duplicate_shards.similar(_frame(batch), rule)),
        batch_size=_COMPARED,
        batch_format="pyarrow",
    )
    return _collected(found, NONE_SIMILAR)


def _sorted_pairs(stored: Dataset, keys: pl.DataFrame, rules: Rules) -> Iterator[pl.DataFrame]:
    """The stored pairs that have one of the keys, in their order."""
    schema = pairs_schema(rules.needed)

    def kept(batch: pa.Table) -> pa.Table:
        tables = [pl.read_ipc(data.as_py()) for data in batch["large"]]
        return _arrow(pl.concat(tables).join(keys, on=list(PAIR), how="semi"))

    if keys.is_empty():
        yield pl.DataFrame(schema=schema)
        return
    last = ("", 0, 0)
    pairs = stored.select_columns(["large"]).map_batches(kept, batch_size=1, batch_format="pyarrow")
    ordered = pairs.sort(list(PAIR))
    for batch in ordered.iter_batches(batch_size=_WRITTEN_ROWS, batch_format="pyarrow"):
        table = _frame(batch).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
        first = table.select(PAIR).row(0)
        assert last < first, "Ray Data hands sorted blocks out in their order"
        last = table.select(PAIR).row(-1)
        yield table


def _each(count: int, work: Callable[[int], tuple[Any, pl.DataFrame | None]]) -> Dataset:
    """A task a number below `count`; a row each of what it gives: `small`, which `_results` reads,
    and the table `large`, if any."""
    import ray.data

    def run(row: dict[str, int]) -> dict[str, Any]:
        number = row["item"]
        try:
            small, large = work(number)
        # An error that is meant for the user would come back inside Ray Data's own.
        except PairloopError as error:
            small, large = error, None
        except FileNotFoundError as error:
            small, large = (
                InputError(f"{error}: with --ray all nodes must see the files under the same path"),
                None,
            )
        buffer = io.BytesIO()
        if large is not None:
            large.write_ipc(buffer, compression="zstd")
        return {"number": number, "small": pickle.dumps(small), "large": buffer.getvalue()}

    numbers = ray.data.from_items(list(range(count)), override_num_blocks=count)
    return numbers.map(run, memory=_TASK_MEMORY)


def _results(rows: Dataset) -> list[Any]:
    """What `_each` gave to look at, by number. Raises the first error that is among them."""
    found = _collected(rows, pl.DataFrame()).sort("number")
    # Written by this command's own tasks a moment ago; nothing from outside is read so.
    results = [pickle.loads(data) for data in found["small"]]
    for result in results:
        if isinstance(result, PairloopError):
            raise result
    return results


def _tables(slices: Sequence[Slice], work: Callable[[Slice], pl.DataFrame]) -> Dataset:
    """The rows that `work` makes of each slice."""
    import ray.data

    numbers = ray.data.from_items(list(range(len(slices))), override_num_blocks=len(slices))
    return numbers.map_batches(
        lambda batch: _arrow(work(slices[batch["item"][0].as_py()])),
        batch_size=1,
        batch_format="pyarrow",
        memory=_TASK_MEMORY,
    )


def _collected(rows: Dataset, none: pl.DataFrame) -> pl.DataFrame:
    """All rows, in this process; `none` where there are none, since an empty data set may have lost
    its columns."""
    batches = rows.iter_batches(batch_size=None, batch_format="pyarrow")
    tables = [_frame(batch) for batch in batches]
    return pl.concat([table for table in tables if table.height] or [none])


def _uniques(rows: Dataset, none: pl.DataFrame) -> pl.DataFrame:
    """`_collected` without repeats, which are dropped as they come: what is alike in one band is
    mostly alike in others."""
    seen, coming, held = none, list[pl.DataFrame](), 0
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        table = _frame(batch)
        # An empty batch may have lost its columns.
        if table.height:
            coming.append(table)
            held += table.height
        if held > max(seen.height, _HELD_ROWS):
            seen, coming, held = pl.concat([seen, *coming]).unique(), [], 0
    return pl.concat([seen, *coming]).unique()


def _frame(table: pa.Table) -> pl.DataFrame:
    found = pl.from_arrow(table)
    assert isinstance(found, pl.DataFrame)
    return found


def _arrow(table: pl.DataFrame) -> pa.Table:
    # Ray sorts and joins what Arrow has compute functions for, and string views are not among it.
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())
