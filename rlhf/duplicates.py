"""Near-duplicates among many texts: candidates by MinHash, every one of them checked exactly.

Two texts are compared as sets of their runs of `SHINGLE` characters, after normalisation; their
similarity is |A and B| / |A or B| (Jaccard). MinHash with banding (Broder 1997; Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) proposes pairs, the exact similarity
decides: precision is 1, and bands are chosen so that a pair at the threshold is proposed with
probability `RECALL` or more.

Signatures equal those of `datasketch.MinHash(scheme="affine32")` (a test holds that), but are
computed for many texts at once: one call a text is an order of magnitude slower.

Array suffixes: `N` texts, `S` shingles of a chunk, `P` permutations, `E` pairs of texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

SHINGLE = 5
PERMUTATIONS = 128
RECALL = 0.99
COMPARED_IN_A_BUCKET = 32
"""Of texts that share a band each is compared with that many of the first. Without a bound, 100,000
texts from one template would mean 5 billion comparisons; and those that are alike are like the
first one anyway."""

_CHUNK_CHARACTERS = 1 << 18
_BLOCK_PAIRS = 1 << 15
_LARGEST_SHINGLE = np.uint64(2**31 - 1)
_RADIX = np.uint64(0x9E3779B97F4A7C15)

_U32 = NDArray[np.uint32]
_I64 = NDArray[np.int64]


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
    first = _first_of_equals(texts)
    similarity = np.ones(texts.len())
    if texts.is_empty():
        return pl.DataFrame({"kept": first, "similarity": similarity})
    unique = np.unique(first)
    pairs = similar_pairs(texts.gather(unique), threshold, seed)
    kept, unique_similarity = _leaders(pairs, len(unique))
    place = np.searchsorted(unique, first)
    stays = kept[place] == place
    similarity = np.where(stays, 1.0, unique_similarity[place])
    return pl.DataFrame({"kept": unique[kept[place]], "similarity": similarity})


def similar_pairs(texts: pl.Series, threshold: float = 0.8, seed: int = 0) -> pl.DataFrame:
    """Pairs of texts with a similarity of at least `threshold`: `earlier`, `later` (indices, sorted
    by them) and `similarity`. Best given unequal texts: n equal ones are up to n (n - 1) / 2 pairs.

    Raises:
        ValueError: `threshold` is not in (0, 1], or a text is null.
    """
    _check(texts, threshold)
    counts, values, signatures = [], [], []
    a, b = permutations(seed)
    for chunk in _chunks(_normal_series(texts)):
        shingles, sizes = shingle_sets(chunk)
        signatures.append(min_hashes(shingles, sizes, a, b))
        values.append(shingles)
        counts.append(sizes)
    if not values:
        return _pair_table(np.empty((2, 0), np.int64), np.empty(0))
    sets = _set_rows(np.concatenate(values), np.concatenate(counts))
    pairs = _candidates(np.concatenate(signatures), threshold)
    similarity = _jaccard(sets, pairs)
    near = similarity >= threshold
    return _pair_table(pairs[:, near], similarity[near])


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
    for start in range(0, one.len(), _BLOCK_PAIRS):
        block = [_normal_series(side[start : start + _BLOCK_PAIRS]) for side in (one, other)]
        number = block[0].len()
        values, sizes = shingle_sets(pl.concat(block))
        rows = np.arange(number)
        found.append(_jaccard(_set_rows(values, sizes), np.stack([rows, rows + number])))
    return np.concatenate(found)


def rows_per_band(threshold: float) -> int:
    """Most rows a band for which a pair at the threshold is still proposed with `RECALL`.

    With r rows and PERMUTATIONS // r bands that probability is 1 - (1 - threshold^r)^bands.

    >>> rows_per_band(0.8), rows_per_band(0.5)
    (6, 3)
    """
    found = [
        rows
        for rows in range(1, PERMUTATIONS // 2 + 1)
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    ]
    return max(found, default=1)


def permutations(seed: int) -> tuple[_U32, _U32]:
    """Multipliers (odd) and addends of h -> a h + b modulo 2^32, both of shape [P]."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 1 << 31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, rng.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32)


def shingle_sets(texts: pl.Series) -> tuple[_U32, _I64]:
    """Hashes below 2^31 of the distinct runs of `SHINGLE` characters, text after text in rising
    order (shape [S]), and how many each text has (shape [N]). A shorter text is its only run.

    Two runs share a hash with a probability of 2^-31.
    """
    padded = texts.str.pad_end(SHINGLE)
    lengths = padded.str.len_chars().to_numpy().astype(np.int64)
    code_points = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    rolling = np.zeros(len(code_points) - SHINGLE + 1, np.uint64)
    for offset in range(SHINGLE):
        rolling = rolling * _RADIX + code_points[offset : len(rolling) + offset]
    rolling ^= rolling >> np.uint64(29)
    hashes = ((rolling * _RADIX) >> np.uint64(32)) % _LARGEST_SHINGLE
    owner = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    within = owner[: len(rolling)] == owner[SHINGLE - 1 :]
    keys = np.sort((owner[: len(rolling)][within] << np.uint64(32)) | hashes[within])
    distinct = keys[np.r_[True, keys[1:] != keys[:-1]]]
    sizes = np.bincount((distinct >> np.uint64(32)).astype(np.int64), minlength=len(lengths))
    return distinct.astype(np.uint32), sizes.astype(np.int64)


def min_hashes(shingles: _U32, sizes: _I64, a: _U32, b: _U32) -> _U32:
    """Signatures, shape [N, P]: the least of a * mix(shingle) + b over each text's shingles."""
    mixed = _mix(shingles)
    starts = np.cumsum(sizes) - sizes
    signatures = np.empty((len(a), len(sizes)), np.uint32)
    permuted = np.empty_like(mixed)
    for row, (multiplier, addend) in enumerate(zip(a, b, strict=True)):
        np.multiply(mixed, multiplier, out=permuted)
        np.add(permuted, addend, out=permuted)
        np.minimum.reduceat(permuted, starts, out=signatures[row])
    return np.ascontiguousarray(signatures.T)


def _mix(hashes: _U32) -> _U32:
    """MurmurHash3's finalizer, a bijection: neighbouring values go far apart."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def _check(texts: pl.Series, threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    if texts.null_count():
        raise ValueError(f"texts must not be null, {texts.null_count()} are")


def _normal_series(texts: pl.Series) -> pl.Series:
    return texts.to_frame("text").select(normalised(pl.col("text"))).to_series()


def _first_of_equals(texts: pl.Series) -> _I64:
    """Index of the first text that equals each one after normalisation, shape [N]."""
    table = _normal_series(texts).to_frame("text").with_row_index("index")
    first: _I64 = table.select(pl.col("index").min().over("text").cast(pl.Int64)).to_numpy()[:, 0]
    return first


def _chunks(texts: pl.Series) -> Iterator[pl.Series]:
    """Runs of whole texts with about `_CHUNK_CHARACTERS` characters, so that arrays stay in cache.

    A longer text is a chunk of its own.
    """
    ends = np.cumsum(np.maximum(texts.str.len_chars().to_numpy(), SHINGLE))
    number = ends // _CHUNK_CHARACTERS
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(ends)], strict=True):
        yield texts[int(start) : int(end)]


def _candidates(signatures: _U32, threshold: float) -> _I64:
    """Pairs (earlier, later), shape [2, E], that share a band and whose signatures agree enough.

    Enough is three standard deviations below the threshold: that loses one pair in 700 at it, and
    spares the exact comparison of most others.
    """
    texts, rows = len(signatures), rows_per_band(threshold)
    deviation = np.sqrt(PERMUTATIONS * threshold * (1 - threshold))
    least = PERMUTATIONS * threshold - 3 * deviation
    found = np.empty(0, np.int64)
    for band in range(PERMUTATIONS // rows):
        key = np.zeros(texts, np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            key = (key ^ signatures[:, column]) * _RADIX
            key ^= key >> np.uint64(32)
        close = [
            earlier * texts + later
            for earlier, later in _within_buckets(key)
            for same in [signatures[earlier] == signatures[later]]
            for agree in [np.count_nonzero(same, axis=1) >= least]
            for earlier, later in [(earlier[agree], later[agree])]
        ]
        found = np.unique(np.concatenate([found, *close]))
    return np.stack(np.divmod(found, texts))


def _within_buckets(key: NDArray[np.uint64]) -> Iterator[tuple[_I64, _I64]]:
    """Blocks of pairs (earlier, later) of texts with equal keys, each text with the first few."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    start = np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    partners = np.minimum(np.arange(len(ordered)) - start, COMPARED_IN_A_BUCKET)
    later = np.flatnonzero(partners)
    counts = partners[later]
    block = np.cumsum(counts) // _BLOCK_PAIRS
    cuts = np.flatnonzero(np.diff(block)) + 1
    for members, numbers in zip(np.split(later, cuts), np.split(counts, cuts), strict=True):
        ends = np.cumsum(numbers)
        rank = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - numbers, numbers)
        yield order[np.repeat(start[members], numbers) + rank], order[np.repeat(members, numbers)]


def _set_rows(shingles: _U32, sizes: _I64) -> Any:
    """Sets of shingles (as of `shingle_sets`) as the rows of a sparse matrix of ones."""
    from scipy import sparse

    bounds = np.r_[0, np.cumsum(sizes)]
    return sparse.csr_array(
        (np.ones(len(shingles), np.int8), shingles.astype(np.int32), bounds),
        shape=(len(sizes), int(_LARGEST_SHINGLE)),
    )


def _jaccard(sets: Any, pairs: _I64) -> NDArray[np.float64]:
    """Exact similarity of each pair of rows of a sparse matrix, shape [E]."""
    sizes = np.diff(sets.indptr)
    shared = [
        np.diff(sets[earlier].multiply(sets[later]).indptr)
        for start in range(0, pairs.shape[1], _BLOCK_PAIRS)
        for earlier, later in [pairs[:, start : start + _BLOCK_PAIRS]]
    ]
    both = np.concatenate([np.empty(0, np.int64), *shared])
    similarity: NDArray[np.float64] = both / (sizes[pairs[0]] + sizes[pairs[1]] - both)
    return similarity


def _pair_table(pairs: _I64, similarity: NDArray[np.float64]) -> pl.DataFrame:
    columns = {"earlier": pairs[0], "later": pairs[1], "similarity": similarity}
    return pl.DataFrame(columns).sort("earlier", "later")


def _leaders(pairs: pl.DataFrame, texts: int) -> tuple[_I64, NDArray[np.float64]]:
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
