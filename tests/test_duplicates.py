"""Near-duplicates: signatures as datasketch's, exact similarity, who stays, and planted ones."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from rlhf import duplicates, minhash
from rlhf.duplicates import near_duplicates, similar_pairs, similarities
from rlhf.minhash import min_hashes, permutations, rows_per_band, shingle_sets

Rng = np.random.Generator


def words(rng: Rng, count: int) -> list[str]:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return ["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(count)]


def shingles(text: str) -> set[str]:
    padded = text.ljust(minhash.SHINGLE)
    return {padded[i : i + 5] for i in range(len(padded) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_signatures_equal_datasketchs() -> None:
    texts = pl.Series(
        ["a plain text of some length", "ab", "", "größer als üblich 漢字かな交じり文"]
    )
    values, sizes = shingle_sets(texts)
    a, b = permutations(3)
    own = min_hashes(values, sizes, a, b)
    for row, part in enumerate(np.split(values, np.cumsum(sizes)[:-1])):
        theirs = MinHash(permutations=np.array([a, b]), scheme="affine32", hashfunc=int)
        theirs.update_batch([int(v) for v in part])
        assert np.array_equal(own[row], theirs.hashvalues)


@given(st.lists(st.text(alphabet="ab ", max_size=12), min_size=1, max_size=12))
def test_shingle_sets_are_the_sets_of_runs(texts: list[str]) -> None:
    _, sizes = shingle_sets(pl.Series(texts, dtype=pl.String))
    assert sizes.tolist() == [len(shingles(text)) for text in texts]


def test_similarity_is_exact_and_nothing_below_the_threshold_is_found() -> None:
    rng = np.random.default_rng(1)
    vocabulary = words(rng, 14)
    texts = sorted({" ".join(sorted(rng.choice(vocabulary, 6))) for _ in range(200)})
    expected = {
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if jaccard(texts[i], texts[j]) >= 0.5
    }
    assert len(expected) > 50
    found = similar_pairs(pl.Series(texts), 0.5)
    for earlier, later, similarity in found.iter_rows():
        assert similarity == pytest.approx(jaccard(texts[earlier], texts[later]), abs=1e-12)
    pairs = set(found.select("earlier", "later").iter_rows())
    assert pairs <= expected
    assert len(pairs) >= 0.97 * len(expected)


@pytest.mark.slow
def test_planted_ones_are_found_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    vocabulary = words(rng, 4000)
    originals = [" ".join(rng.choice(vocabulary, 30)) for _ in range(2000)]
    planted = []
    for text in originals[:500]:
        changed = text.split()
        changed[rng.integers(30)] = "replaced"
        planted.append(" ".join(changed))
    texts = [*originals, *planted]
    near = near_duplicates(pl.Series(texts), 0.8)
    expected = [jaccard(originals[i], planted[i]) >= 0.8 for i in range(500)]
    found = (near["kept"][2000:] == pl.Series(range(500))).to_list()
    assert sum(expected) > 400
    assert sum(f and e for f, e in zip(found, expected, strict=True)) >= 0.99 * sum(expected)
    assert not any(f and not e for f, e in zip(found, expected, strict=True))
    assert near["kept"][:2000].to_list() == list(range(2000))


def test_case_white_space_and_width_make_no_other_text() -> None:
    texts = pl.Series(
        ["Reset my  PASSWORD", "reset my password\n", "ｒｅｓｅｔ my password", "else"]
    )
    near = near_duplicates(texts)
    assert near["kept"].to_list() == [0, 0, 0, 3]
    assert near["similarity"].to_list() == [1.0, 1.0, 1.0, 1.0]


def test_who_falls_is_like_one_that_stays_and_chains_make_no_group() -> None:
    base = "the quick brown fox jumps over the lazy dog and runs into the deep dark wood"
    step = base.replace("quick", "quack")
    far = step.replace("lazy", "hazy").replace("deep", "dear")
    assert jaccard(base, step) >= 0.7
    assert jaccard(step, far) >= 0.65
    assert jaccard(base, far) < 0.65
    near = near_duplicates(pl.Series([base, step, far]), 0.65)
    assert near["kept"].to_list() == [0, 0, 2], "far is like step alone, and step does not stay"
    assert near["similarity"][1] == pytest.approx(jaccard(base, step))


def test_a_thousand_texts_from_one_template_fall_to_the_first() -> None:
    template = "Please translate the following sentence into French and explain each word: {:04d}"
    near = near_duplicates(pl.Series([template.format(i) for i in range(1000)]), 0.8)
    assert near["kept"].unique().to_list() == [0]


@given(st.lists(st.text(max_size=30), max_size=20), st.sampled_from([0.3, 0.8, 1.0]))
def test_what_is_kept_stays_itself_and_stands_no_later(texts: list[str], threshold: float) -> None:
    near = near_duplicates(pl.Series(texts, dtype=pl.String), threshold)
    kept = near["kept"].to_numpy()
    assert (kept <= np.arange(len(texts))).all()
    assert (kept[kept] == kept).all()
    assert ((near["similarity"] >= threshold) & (near["similarity"] <= 1)).all()


def test_bands_reach_the_recall_and_no_more_rows_would() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95):
        rows = rows_per_band(threshold)
        missed = [(1 - threshold**r) ** (minhash.PERMUTATIONS // r) for r in (rows, rows + 1)]
        assert missed[0] <= 1 - minhash.RECALL < missed[1]


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        similar_pairs(pl.Series(["a"]), threshold)


def test_null_is_no_text() -> None:
    with pytest.raises(ValueError, match="null"):
        near_duplicates(pl.Series(["a", None]))


def test_similarities_row_by_row_are_jaccards(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    one = [" ".join(words(rng, 6)) for _ in range(40)] + ["", "a"]
    other = [text[: rng.integers(0, 40)] + " more" for text in one[:40]] + ["", "b"]
    monkeypatch.setattr(duplicates, "BLOCK_PAIRS", 7)
    found = similarities(pl.Series(one), pl.Series(other))
    squeezed = [[" ".join(t.split()) for t in texts] for texts in (one, other)]
    plain = [jaccard(a, b) for a, b in zip(*squeezed, strict=True)]
    assert found.tolist() == pytest.approx(plain)
    assert similarities(pl.Series([], dtype=pl.String), pl.Series([], dtype=pl.String)).size == 0
    with pytest.raises(ValueError, match="as many"):
        similarities(pl.Series(one), pl.Series(other[1:]))
