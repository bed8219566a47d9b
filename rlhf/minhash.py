"""MinHash with banding: which of many texts are worth comparing.

A text is the set of its runs of `SHINGLE` characters. Of the places of two texts' signatures about
the share agrees that their sets have in common, and the texts are proposed where they agree in a
whole band (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3). Bands
are chosen so that a pair at the threshold is proposed with probability `RECALL` or more.

Signatures equal those of `datasketch.MinHash(scheme="affine32")` (a test holds that), but are
computed for many texts at once: one call a text is an order of magnitude slower.

Array suffixes: `N` texts, `S` shingles of a chunk, `P` permutations, `E` pairs of texts.
"""

from __future__ import annotations

from collections.abc import Iterator

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

BLOCK_PAIRS = 1 << 15
LARGEST_SHINGLE = np.uint64(2**31 - 1)
_RADIX = np.uint64(0x9E3779B97F4A7C15)

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]


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


def permutations(seed: int) -> tuple[U32, U32]:
    """Multipliers (odd) and addends of h -> a h + b modulo 2^32, both of shape [P]."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 1 << 31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, rng.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32)


def shingle_sets(texts: pl.Series) -> tuple[U32, I64]:
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
    hashes = ((rolling * _RADIX) >> np.uint64(32)) % LARGEST_SHINGLE
    owner = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    within = owner[: len(rolling)] == owner[SHINGLE - 1 :]
    keys = np.sort((owner[: len(rolling)][within] << np.uint64(32)) | hashes[within])
    distinct = keys[np.r_[True, keys[1:] != keys[:-1]]]
    sizes = np.bincount((distinct >> np.uint64(32)).astype(np.int64), minlength=len(lengths))
    return distinct.astype(np.uint32), sizes.astype(np.int64)


def min_hashes(shingles: U32, sizes: I64, a: U32, b: U32) -> U32:
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


def band_keys(signatures: U32, threshold: float) -> Iterator[NDArray[np.uint64]]:
    """Of each band a key a text, shape [N]."""
    rows = rows_per_band(threshold)
    for band in range(PERMUTATIONS // rows):
        key = np.zeros(len(signatures), np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            key = (key ^ signatures[:, column]) * _RADIX
            key ^= key >> np.uint64(32)
        yield key


def _mix(hashes: U32) -> U32:
    """MurmurHash3's finalizer, a bijection: neighbouring values go far apart."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def agreeing(one: U32, other: U32, threshold: float) -> NDArray[np.bool_]:
    """Whether signatures, row by row, agree enough, shape [E].

    Enough is three standard deviations below the threshold: that loses one pair in 700 at it, and
    spares the exact comparison of most others.
    """
    deviation = np.sqrt(PERMUTATIONS * threshold * (1 - threshold))
    least = PERMUTATIONS * threshold - 3 * deviation
    agree: NDArray[np.bool_] = np.count_nonzero(one == other, axis=1) >= least
    return agree


def within_buckets(key: NDArray[np.uint64]) -> Iterator[tuple[I64, I64]]:
    """Blocks of pairs (earlier, later) of texts with equal keys, each text with the first few."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    start = np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    partners = np.minimum(np.arange(len(ordered)) - start, COMPARED_IN_A_BUCKET)
    later = np.flatnonzero(partners)
    counts = partners[later]
    block = np.cumsum(counts) // BLOCK_PAIRS
    cuts = np.flatnonzero(np.diff(block)) + 1
    for members, numbers in zip(np.split(later, cuts), np.split(counts, cuts), strict=True):
        ends = np.cumsum(numbers)
        rank = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - numbers, numbers)
        yield order[np.repeat(start[members], numbers) + rank], order[np.repeat(members, numbers)]
