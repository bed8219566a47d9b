"""Near-duplicates among many texts: candidates by MinHash, every one of them checked exactly.

Two texts are compared as sets of their runs of `SHINGLE` characters, after normalisation; their
similarity is |A and B| / |A or B| (Jaccard). `rlhf.minhash` proposes pairs, the exact similarity
decides, so precision is 1.

Array suffixes: `N` texts, `E` pairs of texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rlhf.minhash import (
    BLOCK_PAIRS,
    I64,
    LARGEST_SHINGLE,
    SHINGLE,
    U32,
    agreeing,
    band_keys,
    min_hashes,
    permutations,
    shingle_sets,
    within_buckets,
)

NONE_SIMILAR = pl.DataFrame(
    schema={"earlier": pl.Int64, "later": pl.Int64, "similarity": pl.Float64}
)
"""What `similar_pairs` gives where no two are."""

_CHUNK_CHARACTERS = 1 << 18


def normalised(text: pl.Expr) -> pl.Expr:
    """What counts as the same text: Unicode NFKC, lower case, white space as single spaces."""
    squeezed = text.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ")
    return squeezed.str.strip_chars()


def near_duplicates(texts: pl.Series, threshold: float = 0.8, seed: int = 0) -> pl.DataFrame:
    """Whether each text repeats an earlier one, exactly or nearly; one row a text, in their order.

    `kept` is the index of the text that stands for it: its own if it stays, else the most similar
    text that stays (the earliest of equals). `similarity` is theirs, 1 where it stays. So each text
    that falls is similar to one that stays, and no two that stay are known to be similar; chains
    (a like b, b like c, a unlike c) do not make one group.

    >>> texts = pl.Series(["Reset my password, please.", "Hello", "reset  my password please."])
    >>> near_duplicates(texts)["kept"].to_list()
    [0, 1, 0]

    Raises:
        ValueError: `threshold` is not in (0, 1], or a text is null.
    """
    _check(texts, threshold)
    first = first_of_equals(digests([texts]))
    unique = np.unique(first)
    return standing(first, _of(unique, similar_pairs(texts.gather(unique), threshold, seed)))


def repeating(columns: Sequence[pl.Series], most: float, seed: int = 0) -> pl.DataFrame:
    """`near_duplicates` of records with a text in each column.

    Records repeat each other where the texts of every column are equal, or where they are more than
    `most` alike in every column and as a whole: one question about two passages, or two about one,
    are different records. With `most` 1 only equal ones fall.

    Raises:
        ValueError: `most` is not in (0, 1], or a text is null.
    """
    _check(joined(columns), most)
    first = first_of_equals(digests(columns))
    if most == 1:
        return standing(first, NONE_SIMILAR)
    unique = np.unique(first)
    distinct = [column.gather(unique) for column in columns]
    pairs = similar_pairs(joined(distinct), most, seed)
    earlier, later = ([c.gather(pairs[n]) for c in distinct] for n in ("earlier", "later"))
    return standing(first, _of(unique, pairs.filter(alike(earlier, later, most))))


def joined(columns: Sequence[pl.Series]) -> pl.Series:
    """Each record's texts, one below the other."""
    return reduce(lambda above, below: above + "\n" + below, columns)


def alike(one: Sequence[pl.Series], other: Sequence[pl.Series], most: float) -> pl.Series:
    """Whether records at the same place are more than `most` alike in every column, shape [N]."""
    columns = [similarities(a, b) > most for a, b in zip(one, other, strict=True)]
    return pl.Series(np.logical_and.reduce(columns))


def digests(columns: Sequence[pl.Series]) -> pl.DataFrame:
    """Two 64-bit hashes a record, `low` and `high`, that records share whose texts are equal in
    every column after normalisation; others do with a probability of 2^-128."""
    # Normalised text has no line break.
    key = joined([_normal_series(column) for column in columns])
    return pl.DataFrame({"low": key.hash(0), "high": key.hash(1)})


def first_of_equals(digests: pl.DataFrame) -> I64:
    """Index of the first record with the same digests as each one, shape [N]."""
    table = digests.with_row_index("index")
    first = table.select(pl.col("index").min().over("low", "high").cast(pl.Int64))
    found: I64 = first["index"].to_numpy()
    return found


def standing(first: I64, pairs: pl.DataFrame) -> pl.DataFrame:
    """`near_duplicates`, from the first of the equals of each text and the similar pairs
    (`similar_pairs`) of those that are their own first."""
    kept, similarity = _leaders(pairs, len(first))
    stays = kept[first] == first
    return pl.DataFrame(
        {"kept": kept[first], "similarity": np.where(stays, 1.0, similarity[first])}
    )


def _of(index: I64, pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs of places in `index` as pairs of what stands there."""
    return pairs.with_columns(
        pl.Series(name, index[pairs[name].to_numpy()]) for name in ("earlier", "later")
    )


def similar_pairs(texts: pl.Series, threshold: float = 0.8, seed: int = 0) -> pl.DataFrame:
    """Pairs of texts with a similarity of at least `threshold`: `earlier`, `later` (indices, sorted
    by them) and `similarity`. Best given unequal texts: n equal ones are up to n (n - 1) / 2 pairs.

    Raises:
        ValueError: `threshold` is not in (0, 1], or a text is null.
    """
    _check(texts, threshold)
    if texts.is_empty():
        return NONE_SIMILAR
    values, sizes, signatures = _signed(texts, seed)
    pairs = _candidates(signatures, threshold)
    similarity = _jaccard(_set_rows(values, sizes), pairs)
    near = similarity >= threshold
    return _pair_table(pairs[:, near], similarity[near])


def bands(texts: pl.Series, threshold: float, seed: int = 0) -> NDArray[np.uint64]:
    """A key a band for each text, shape [bands, N]; texts with a key in common are candidates."""
    return np.stack(list(band_keys(_signed(texts, seed)[2], threshold)))


def sharing_band(key: NDArray[np.uint64], index: I64) -> I64:
    """Candidates of one band: pairs (earlier, later) of `index`, shape [2, E], with equal keys.

    `index` rises. All texts that have one of these keys must be there.
    """
    blocks = [np.stack([index[earlier], index[later]]) for earlier, later in within_buckets(key)]
    return np.concatenate([np.empty((2, 0), np.int64), *blocks], axis=1)


def verified(
    earlier: pl.Series, later: pl.Series, threshold: float, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Exact similarity of candidates, text by text, and whether `similar_pairs` would hold each;
    both of shape [E]."""
    if earlier.is_empty():
        return np.empty(0), np.empty(0, bool)
    values, sizes, signatures = _signed(pl.concat([earlier, later]), seed)
    rows = np.arange(earlier.len())
    pairs = np.stack([rows, rows + earlier.len()])
    similarity = _jaccard(_set_rows(values, sizes), pairs)
    agree = agreeing(signatures[pairs[0]], signatures[pairs[1]], threshold)
    return similarity, agree & (similarity >= threshold)


def similarities(one: pl.Series, other: pl.Series) -> NDArray[np.float64]:
    """Exact similarity of each text with the one at its place in the other series, shape [N].

    >>> same = similarities(pl.Series(["Five days.", "Yes"]), pl.Series(["five  DAYS.", "No"]))
    >>> same.tolist()
    [1.0, 0.0]

    Raises:
        ValueError: lengths that differ, or a text is null.
    """
    if one.len() != other.len() or one.null_count() or other.null_count():
        raise ValueError(f"texts must be as many, and none null; got {one.len()}, {other.len()}")
    found = [np.empty(0)]
    for start in range(0, one.len(), BLOCK_PAIRS):
        block = [_normal_series(side[start : start + BLOCK_PAIRS]) for side in (one, other)]
        number = block[0].len()
        values, sizes = shingle_sets(pl.concat(block))
        rows = np.arange(number)
        found.append(_jaccard(_set_rows(values, sizes), np.stack([rows, rows + number])))
    return np.concatenate(found)


def _check(texts: pl.Series, threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    if texts.null_count():
        raise ValueError(f"texts must not be null, {texts.null_count()} are")


def _normal_series(texts: pl.Series) -> pl.Series:
    return texts.to_frame("text").select(normalised(pl.col("text"))).to_series()


def _chunks(texts: pl.Series) -> Iterator[pl.Series]:
    """Runs of whole texts with about `_CHUNK_CHARACTERS` characters, so that arrays stay in cache.

    A longer text is a chunk of its own.
    """
    ends = np.cumsum(np.maximum(texts.str.len_chars().to_numpy(), SHINGLE))
    number = ends // _CHUNK_CHARACTERS
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(ends)], strict=True):
        yield texts[int(start) : int(end)]


def _signed(texts: pl.Series, seed: int) -> tuple[U32, I64, U32]:
    """Shingles and their counts, as of `shingle_sets`, and signatures, of one text or more."""
    a, b = permutations(seed)
    sets = [shingle_sets(chunk) for chunk in _chunks(_normal_series(texts))]
    signatures = [min_hashes(shingles, sizes, a, b) for shingles, sizes in sets]
    values, counts = zip(*sets, strict=True)
    return np.concatenate(values), np.concatenate(counts), np.concatenate(signatures)


def _candidates(signatures: U32, threshold: float) -> I64:
    """Pairs (earlier, later), shape [2, E], that share a band and whose signatures agree enough."""
    texts = len(signatures)
    found = np.empty(0, np.int64)
    for key in band_keys(signatures, threshold):
        close = [
            earlier[agree] * texts + later[agree]
            for earlier, later in within_buckets(key)
            for agree in [agreeing(signatures[earlier], signatures[later], threshold)]
        ]
        found = np.unique(np.concatenate([found, *close]))
    return np.stack(np.divmod(found, texts))


def _set_rows(shingles: U32, sizes: I64) -> Any:
    """Sets of shingles (as of `shingle_sets`) as the rows of a sparse matrix of ones."""
    from scipy import sparse

    bounds = np.r_[0, np.cumsum(sizes)]
    return sparse.csr_array(
        (np.ones(len(shingles), np.int8), shingles.astype(np.int32), bounds),
        shape=(len(sizes), int(LARGEST_SHINGLE)),
    )


def _jaccard(sets: Any, pairs: I64) -> NDArray[np.float64]:
    """Exact similarity of each pair of rows of a sparse matrix, shape [E]."""
    sizes = np.diff(sets.indptr)
    shared = [
        np.diff(sets[earlier].multiply(sets[later]).indptr)
        for start in range(0, pairs.shape[1], BLOCK_PAIRS)
        for earlier, later in [pairs[:, start : start + BLOCK_PAIRS]]
    ]
    both = np.concatenate([np.empty(0, np.int64), *shared])
    similarity: NDArray[np.float64] = both / (sizes[pairs[0]] + sizes[pairs[1]] - both)
    return similarity


def _pair_table(pairs: I64, similarity: NDArray[np.float64]) -> pl.DataFrame:
    columns = {"earlier": pairs[0], "later": pairs[1], "similarity": similarity}
    return pl.DataFrame(columns).sort("earlier", "later")


def _leaders(pairs: pl.DataFrame, texts: int) -> tuple[I64, NDArray[np.float64]]:
    """For each text who stands for it, and their similarity (shapes [N]).

    In order, a text stays unless it is similar to an earlier one that stays. Each turn settles all
    texts whose earlier neighbours are settled or among which one stays.
    """
    earlier, later = pairs["earlier"].to_numpy(), pairs["later"].to_numpy()
    stays, falls = np.zeros(texts, bool), np.zeros(texts, bool)
    while True:
        falls[later[stays[earlier]]] = True
        open_later = later[~falls[earlier]]
        waits = np.zeros(texts, bool)
        waits[open_later] = True
        settled = ~falls & ~waits & ~stays
        if not settled.any():
            break
        stays |= settled
    best = (
        pairs.filter(pl.Series(stays[earlier] & falls[later]))
        .sort("similarity", "earlier", descending=[True, False])
        .unique("later", keep="first", maintain_order=True)
    )
    kept, similarity = np.arange(texts), np.ones(texts)
    kept[best["later"].to_numpy()] = best["earlier"].to_numpy()
    similarity[best["later"].to_numpy()] = best["similarity"].to_numpy()
    return kept, similarity
