"""Near-duplicates among 200,000 prompts with planted ones: recall, precision, time and memory.

    python benchmarks/duplicates.py [--prompts 200000] [--threshold 0.8] [--peer 20000]

A tenth of the prompts repeat others with one to eight words replaced. Truth is each planted pair's
exact similarity, computed here from Python sets; precision checks every pair that was found so.
Beside it `datasketch` (MinHash of 128, its LSH) on the first `--peer` prompts, as its loop goes.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import polars as pl

from rlhf.duplicates import near_duplicates, normalised, similar_pairs
from rlhf.minhash import PERMUTATIONS, SHINGLE

PLANTED_SHARE = 0.1
VOCABULARY = 30_000


def prompts(count: int, seed: int = 0) -> tuple[pl.Series, np.ndarray]:
    """Prompts of 12 to 60 words with Zipf's frequencies, and the original of each planted one.

    Planted ones stand at the end; shape of the originals: [planted].
    """
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    rank = np.minimum(rng.zipf(1.5, (VOCABULARY, 9)) - 1, 25)
    lengths = rng.integers(3, 10, VOCABULARY)
    words = [bytes(letters[row[:n]]).decode() for row, n in zip(rank, lengths, strict=True)]
    chance = 1 / np.arange(20, VOCABULARY + 20)
    chance /= chance.sum()
    planted = int(count * PLANTED_SHARE)
    sizes = rng.integers(12, 61, count - planted)
    drawn = rng.choice(VOCABULARY, int(sizes.sum()), p=chance)
    texts = [[words[i] for i in part] for part in np.split(drawn, np.cumsum(sizes)[:-1])]
    originals = rng.choice(len(texts), planted, replace=False)
    copies = []
    for original in originals:
        copy = list(texts[original])
        for place in rng.choice(len(copy), rng.integers(1, 9), replace=False):
            copy[place] = words[rng.integers(VOCABULARY)]
        copies.append(copy)
    return pl.Series([" ".join(text) for text in (*texts, *copies)]), originals


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of two normalised texts' runs of `SHINGLE` characters."""
    sets = [{t[i : i + SHINGLE] for i in range(len(t) - SHINGLE + 1)} for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def gigabytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peer(texts: list[str], threshold: float) -> float:
    """Seconds that datasketch takes to sign and look up `texts`."""
    from datasketch import MinHash, MinHashLSH

    started = time.perf_counter()
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    for number, text in enumerate(texts):
        signature = MinHash(PERMUTATIONS)
        runs = {text[i : i + SHINGLE].encode() for i in range(len(text) - SHINGLE + 1)}
        signature.update_batch(runs)
        index.query(signature)
        index.insert(number, signature)
    return time.perf_counter() - started


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--peer", type=int, default=20_000)
    options = parser.parse_args()
    texts, originals = prompts(options.prompts)
    plain = texts.to_frame("t").select(normalised(pl.col("t"))).to_series().to_list()
    before = gigabytes()
    average = texts.str.len_chars().sum() / len(texts)
    print(f"{len(texts)} prompts, {average:.0f} characters on average")

    started = time.perf_counter()
    found = similar_pairs(texts, options.threshold)
    seconds = time.perf_counter() - started
    print(
        f"similar_pairs: {seconds:.1f} s, peak memory {gigabytes():.2f} GiB ({before:.2f} before)"
    )

    first = len(texts) - len(originals)
    exact = np.array([
        similarity(plain[original], plain[first + i]) for i, original in enumerate(originals)
    ])  # fmt: skip
    pairs = set(found.select("earlier", "later").iter_rows())
    hit = np.array([(int(o), first + i) in pairs for i, o in enumerate(originals)])
    due = exact >= options.threshold
    print(f"planted: {due.sum()} at or above {options.threshold}; recall {hit[due].mean():.4f}")
    at = due & (exact < options.threshold + 0.02)
    print(f"  within 0.02 above the threshold: {at.sum()}; recall {hit[at].mean():.4f}")
    wrong = sum(similarity(plain[a], plain[b]) < options.threshold for a, b in pairs)
    print(f"found: {len(pairs)} pairs; precision {1 - wrong / max(1, len(pairs)):.4f}")

    started = time.perf_counter()
    near = near_duplicates(texts, options.threshold)
    fell = int((near["kept"] != pl.Series(range(len(texts)))).sum())
    print(f"near_duplicates: {time.perf_counter() - started:.1f} s, {fell} texts fall")
    if options.peer:
        own = time.perf_counter()
        similar_pairs(texts[: options.peer], options.threshold)
        own = time.perf_counter() - own
        theirs = peer(plain[: options.peer], options.threshold)
        print(f"first {options.peer}: {own:.1f} s here, {theirs:.1f} s with datasketch's loop")


if __name__ == "__main__":
    main()
