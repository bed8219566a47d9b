"""The winner's curse: ranges, inverted shares and trusted margins against simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from rlhf.candidates import candidates_of
from rlhf.errors import DataGateError, InputError
from rlhf.noise import Noise, expected_range, noise_of
from rlhf.rules import Rules, Strategy
from rlhf.selection import select_pairs
from rlhf.types import COMPLETIONS, SCORES
from rlhf.yield_analysis import Draw, analyse

Floats = NDArray[np.float64]
RULES = Rules({"quality": 1.0}, {}, {}, min_margin=0.0)
SAMPLES = 8


def round_of(
    votes: Floats, judges: dict[str, str] | None = None
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Completions, scores and prompts of votes (shape [dimensions, prompts, samples, votes])."""
    names = list(judges or {"quality": "house"})
    dimensions, prompts, samples, count = votes.shape
    assert dimensions == len(names)
    ids = [f"p{i:05d}" for i in range(prompts) for _ in range(samples)]
    key = {"prompt_id": ids, "sample": list(range(samples)) * prompts}
    rows = len(ids)
    answers = pl.DataFrame(key).with_columns(
        text=pl.format("answer {}", "sample"),
        token_ids=pl.concat_list(pl.lit(7), "sample"),
        prompt_token_ids=pl.lit([1], pl.List(pl.Int32)),
        logps=pl.lit([-0.5, -0.5], pl.List(pl.Float32)),
        finish_reason=pl.lit("stop"),
        policy_version=pl.lit(0),
    )
    parts = [
        pl.DataFrame(key).with_columns(
            judge=pl.lit((judges or {})[name] if judges else "house"),
            dimension=pl.lit(name),
            score=pl.Series(votes[d].mean(axis=-1).reshape(rows)),
            votes=pl.Series(votes[d].reshape(rows, count).tolist(), dtype=pl.List(pl.Float64)),
            spread=pl.Series(votes[d].std(axis=-1).reshape(rows)),
            abstained=pl.lit(False),
            reason=pl.lit(None, pl.String),
        )
        for d, name in enumerate(names)
    ]
    about = pl.DataFrame({"prompt_id": sorted(set(ids))}).with_columns(
        category=pl.lit("all"), cluster="prompt_id", prompt=pl.lit("question")
    )
    completions = answers.select(pl.col(n).cast(t) for n, t in COMPLETIONS.items())
    return completions, pl.concat(parts).select(pl.col(n).cast(t) for n, t in SCORES.items()), about


def planted(
    prompts: int, true_sd: float, vote_sd: float, votes: int, seed: int
) -> tuple[Floats, Floats]:
    """True values, shape [prompts, samples], and their votes, [1, prompts, samples, votes]."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(0.45, 0.55, (prompts, 1))
    true = means + true_sd * rng.standard_normal((prompts, SAMPLES))
    noise = vote_sd * rng.standard_normal((1, prompts, SAMPLES, votes))
    return true, true[None, :, :, None] + noise


def inverted(pairs: pl.DataFrame, true: Floats) -> Floats:
    """Whether each pair's chosen answer is truly the worse one."""
    place = pairs["prompt_id"].str.slice(1).cast(pl.Int64).to_numpy()
    chosen, rejected = (pairs[f"{r}_sample"].to_numpy() for r in ("chosen", "rejected"))
    worse: Floats = (true[place, chosen] < true[place, rejected]).astype(float)
    return worse


def found_noise(votes: Floats, rules: Rules = RULES, judges: dict[str, str] | None = None) -> Noise:
    completions, scores, _ = round_of(votes, judges)
    return noise_of(scores, candidates_of(completions, scores, rules), rules)


@pytest.mark.parametrize(
    # Tables of d2 for control charts (ASTM MNL 7, table 49).
    ("count", "table"),
    [(2, 1.128), (3, 1.693), (5, 2.326), (8, 2.847), (10, 3.078), (25, 3.931)],
)
def test_the_range_of_noise_equals_the_printed_tables(count: int, table: float) -> None:
    assert expected_range(count) == pytest.approx(table, abs=5.1e-4)


def test_one_answer_has_no_range_and_many_have_a_large_one() -> None:
    assert expected_range(1) == 0
    draws = np.random.default_rng(0).standard_normal((4000, 300))
    assert expected_range(300) == pytest.approx(np.ptp(draws, axis=1).mean(), rel=0.01)


def test_noise_and_its_margin_are_those_that_were_planted() -> None:
    true, votes = planted(prompts=1500, true_sd=0.0, vote_sd=0.06, votes=3, seed=1)
    noise = found_noise(votes)
    assert noise.sd == pytest.approx(0.06 / math.sqrt(3), rel=0.03)
    assert noise.noise_margin == pytest.approx(2.847 * 0.06 / math.sqrt(3), rel=0.03)
    completions, scores, prompts = round_of(votes)
    margins = select_pairs(completions, scores, prompts, RULES).pairs["margin"]
    # Equally good answers: what selection finds is noise, and no more than was foretold.
    assert margins.mean() == pytest.approx(noise.noise_margin, rel=0.03)
    assert noise.reliability == pytest.approx(0, abs=0.05)
    assert true.std(axis=1).max() == 0


@pytest.mark.parametrize("strategy", ["largest_margin", "best_random", "all_pairs"])
@pytest.mark.parametrize("true_sd", [0.03, 0.06])
def test_the_inverted_share_is_the_one_that_happens(strategy: Strategy, true_sd: float) -> None:
    rules = replace(RULES, strategy=strategy, pairs_per_prompt=4)
    true, votes = planted(prompts=2500, true_sd=true_sd, vote_sd=0.06, votes=2, seed=2)
    completions, scores, prompts = round_of(votes)
    pairs = select_pairs(completions, scores, prompts, rules).pairs
    chances = found_noise(votes).inverted(pairs["margin"].to_numpy())
    assert chances is not None
    happened = inverted(pairs, true).mean()
    assert chances.mean() == pytest.approx(happened, abs=0.012)
    # The chance of each pair, too: among the doubtful half, and among the clear one.
    doubtful = chances > np.median(chances)
    for half in (doubtful, ~doubtful):
        assert chances[half].mean() == pytest.approx(inverted(pairs, true)[half].mean(), abs=0.02)


@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_auto_takes_the_margin_whose_pairs_are_inverted_that_seldom(limit: float) -> None:
    rules = replace(RULES, min_margin="auto", max_inversion=limit)
    true, votes = planted(prompts=4000, true_sd=0.05, vote_sd=0.06, votes=2, seed=3)
    completions, scores, prompts = round_of(votes)
    all_pairs = replace(rules, strategy="all_pairs", pairs_per_prompt=56)
    selected = select_pairs(completions, scores, prompts, all_pairs)
    least = selected.funnel["min_margin"]
    assert found_noise(votes).inverted(np.array([least])) == pytest.approx([limit])
    pairs = selected.pairs
    assert pairs["margin"].min() >= least
    near = (pairs["margin"] < least * 1.05).to_numpy()
    assert near.sum() > 500
    assert inverted(pairs, true)[near].mean() == pytest.approx(limit, abs=0.02)


def test_auto_without_noise_asks_for_any_difference() -> None:
    _, votes = planted(prompts=20, true_sd=0.05, vote_sd=0.0, votes=1, seed=4)
    completions, scores, prompts = round_of(votes)
    rules = replace(RULES, min_margin="auto", deterministic=frozenset({"quality"}))
    selected = select_pairs(completions, scores, prompts, rules)
    assert (selected.funnel["min_margin"], selected.pairs.height) == (0.0, 20)
    record = analyse([(completions, scores, prompts)], selected.pairs, rules, Draw(1, 200))
    assert record["noise"]["sources"] == {"quality": "verifier"}
    assert (record["noise"]["sd"], record["noise"]["inverted_share"]) == (0.0, 0.0)
    assert record["split_votes"] is None


def test_auto_says_what_to_do_where_nothing_is_known_or_nothing_can_be_trusted() -> None:
    _, votes = planted(prompts=30, true_sd=0.05, vote_sd=0.01, votes=1, seed=5)
    rules = replace(RULES, min_margin="auto")
    with pytest.raises(InputError, match=r"min_margin auto needs the noise of quality.*retest_sd"):
        select_pairs(*round_of(votes), rules)
    known = replace(rules, retest_sd={"quality": 0.01})
    assert select_pairs(*round_of(votes), known).funnel["min_margin"] == pytest.approx(
        1.645 * 0.01 * math.sqrt(2 / (1 - 0.01**2 / 0.051**2)), rel=0.02
    )
    with pytest.raises(DataGateError, match="no margin that can be trusted"):
        select_pairs(*round_of(votes), replace(rules, retest_sd={"quality": 0.2}))


def test_errors_common_to_one_judges_dimensions_count_in_full() -> None:
    rng = np.random.default_rng(6)
    shared = 0.05 * rng.standard_normal((1, 800, SAMPLES, 2))
    votes = 0.5 + np.concatenate([shared, shared])
    rules = Rules({"quality": 0.5, "tone": 0.5}, {}, {})
    one = found_noise(votes, rules, {"quality": "house", "tone": "house"})
    two = found_noise(votes, rules, {"quality": "house", "tone": "other"})
    assert one.sd == pytest.approx(0.05 / math.sqrt(2), rel=0.05)
    assert two.sd == pytest.approx(0.05 / 2, rel=0.05)


def test_margins_measured_on_other_votes_are_true_and_those_of_choice_are_not() -> None:
    true, votes = planted(prompts=1500, true_sd=0.03, vote_sd=0.08, votes=4, seed=7)
    completions, scores, prompts = round_of(votes)
    pairs = select_pairs(completions, scores, prompts, RULES).pairs
    found = analyse([(completions, scores, prompts)], pairs, RULES, Draw(1, 400))["split_votes"]
    assert found["pairs"] == 3000
    # Half of the votes: sd of choice sqrt(0.03^2 + 0.08^2 / 2), of which the true part remains.
    sd = math.sqrt(0.03**2 + 0.08**2 / 2)
    assert found["margin_chosen"] == pytest.approx(2.847 * sd, rel=0.03)
    measured = found["margin_measured"]
    assert measured["value"] == pytest.approx(2.847 * 0.03**2 / sd, rel=0.1)
    assert measured["low"] < 2.847 * 0.03**2 / sd < measured["high"] < found["margin_chosen"] / 2
    assert true.shape == (1500, SAMPLES)


def test_row_order_changes_no_number_of_the_analysis() -> None:
    _, votes = planted(prompts=60, true_sd=0.05, vote_sd=0.05, votes=3, seed=8)
    given = round_of(votes)
    rules = replace(RULES, min_margin="auto", max_inversion=0.2)
    straight = select_pairs(*given, rules)
    record = analyse([given], straight.pairs, rules, Draw(1, 200))
    mixed = [t.sample(fraction=1, shuffle=True, seed=5) for t in given]
    shuffled = select_pairs(mixed[0], mixed[1], mixed[2], rules)
    assert straight.pairs.equals(shuffled.pairs) and straight.funnel == shuffled.funnel
    draw = Draw(1, 200)
    assert record == analyse([(mixed[0], mixed[1], mixed[2])], shuffled.pairs, rules, draw)


def test_where_noise_is_known_from_has_an_order() -> None:
    """The config, then certificates, votes, canaries; a verifier has none."""
    one_vote, two_votes = (planted(50, 0.05, 0.05, votes, seed=9)[1] for votes in (1, 2))
    told = replace(RULES, canary_sd={"quality": 0.03})
    assert found_noise(one_vote).sources == {"quality": "unknown"}
    by_canaries = found_noise(one_vote, told)
    assert (by_canaries.sources, by_canaries.sd) == ({"quality": "canaries"}, 0.03)
    by_votes = found_noise(two_votes, told)
    assert by_votes.sources == {"quality": "votes"} and by_votes.sd == found_noise(two_votes).sd
    certified = replace(told, certified_sd={"quality": 0.02})
    found = found_noise(two_votes, certified)
    assert (found.sources, found.sd) == ({"quality": "certificate"}, 0.02)
    given = found_noise(two_votes, replace(certified, retest_sd={"quality": 0.01}))
    assert (given.sources, given.sd) == ({"quality": "config"}, 0.01)
    exact = found_noise(two_votes, replace(certified, deterministic={"quality"}))
    assert (exact.sources, exact.sd) == ({"quality": "verifier"}, 0.0)


def test_canaries_let_min_margin_be_found() -> None:
    _, votes = planted(200, 0.1, 0.02, 1, seed=3)
    completions, scores, prompts = round_of(votes)
    auto = replace(RULES, min_margin="auto")
    with pytest.raises(InputError, match="no certificate or canary tells"):
        select_pairs(completions, scores, prompts, auto)
    selected = select_pairs(
        completions, scores, prompts, replace(auto, canary_sd={"quality": 0.02})
    )
    assert 0 < selected.funnel["min_margin"] < 0.1
