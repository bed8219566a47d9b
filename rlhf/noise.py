"""The winner's curse: how much of a margin is the judge's noise.

Whoever takes the best and the worst of K scores takes the luckiest and the unluckiest too. Even of
K equally good answers the margin is then d2(K) noise standard deviations, 2.85 at K = 8.

The model: within a prompt an answer's true value is normal with standard deviation tau, the judge
adds independent normal noise with standard deviation sigma, the same for every answer of the round.
The observed spread^2 within prompts is then tau^2 + sigma^2, and lambda = tau^2 / spread^2 is the
reliability. Given its scores, the true difference of two answers that differ by m is normal with
mean lambda * m and variance 2 * lambda * sigma^2: empirical Bayes, tau^2 estimated from all prompts
of the round (Efron & Morris 1973, https://doi.org/10.1080/01621459.1973.10481350). Conditioned on
all scores, it holds however the pair was picked from them (Efron 2011, Tweedie's formula and
selection bias, https://doi.org/10.1198/jasa.2011.tm11181), so

    P(inverted | m) = P(true difference < 0 | m) = Phi(-m * sqrt(lambda / 2) / sigma)

What it assumes and can't see: the same tau in every prompt (where some prompts have nothing to tell
apart, their pairs are inverted more often than estimated), normal values in [0, 1], and a judge
without bias: an error that is the same at every vote, such as a liking for length, is no noise.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy import integrate, stats

from rlhf.candidates import KEY
from rlhf.errors import DataGateError, InputError
from rlhf.funnel import is_score
from rlhf.rules import Rules
from rlhf.statistics import Floats, exact_sum

Source = Literal["verifier", "config", "certificate", "votes", "canaries", "unknown"]


@cache
def expected_range(count: int) -> float:
    """d2: expected maximum less minimum of `count` independent standard normal values.

    Integral over x of 1 - Phi(x)^K - (1 - Phi(x))^K (Tippett 1925), to 1e-7.

    >>> round(expected_range(8), 4)
    2.8472
    """
    if count < 2:
        return 0.0

    def outside(x: float) -> float:
        return float(1 - stats.norm.cdf(x) ** count - stats.norm.sf(x) ** count)

    return float(integrate.quad(outside, -math.inf, math.inf, epsabs=1e-9, limit=200)[0])


@dataclass(frozen=True, slots=True)
class Noise:
    """What is known of the noise in a round's values.

    `sd` (sigma), `spread` and margins are in units of reward; None where they are not known.
    """

    sd: float | None
    spread: float | None
    """Observed standard deviation within a prompt; None where no prompt has two usable answers."""
    sources: Mapping[str, Source]
    """Where each weighted dimension's noise is known from."""
    noise_margin: float | None
    """Margin of best and worst of equally good answers: mean over prompts of d2(K) * sd, K the
    prompt's usable answers."""

    @property
    def reliability(self) -> float | None:
        """lambda: share of the observed variance within prompts that is not noise."""
        if self.sd is None or self.spread is None:
            return None
        if self.spread == 0:
            return 0.0
        return max(0.0, 1 - self.sd**2 / self.spread**2)

    def inverted(self, margins: Floats) -> Floats | None:
        """Estimated chance that each pair is inverted; None where the noise is not known."""
        if self.sd is None or self.reliability is None:
            return None
        if self.sd == 0:
            return np.zeros_like(margins)
        scale = math.sqrt(self.reliability / 2) / self.sd
        chances: Floats = stats.norm.cdf(-margins * scale)
        return chances

    def trusted_margin(self, max_inversion: float) -> float:
        """Least margin whose pairs are inverted with a chance of at most `max_inversion`.

        z_{1 - max_inversion} * sigma * sqrt(2 / lambda), the formula above solved for m: 0 without
        noise, infinite where the observed spread is no larger than the noise.
        """
        assert self.sd is not None, "asked for where the noise is known"
        if self.sd == 0:
            return 0.0
        if not self.reliability:
            return math.inf
        z = float(stats.norm.ppf(1 - max_inversion))
        return z * self.sd * math.sqrt(2 / self.reliability)


def settled(rules: Rules, noise: Callable[[], Noise]) -> Rules:
    """Rules whose `min_margin` is a number: `auto` becomes `Noise.trusted_margin`.

    Raises:
        InputError: `auto`, and the noise of a weighted dimension is not known.
        DataGateError: `auto`, and no margin could be trusted.
    """
    if rules.min_margin != "auto":
        return rules
    found = noise()
    unknown = [d for d, source in found.sources.items() if source == "unknown"]
    if unknown:
        raise InputError(
            f"selection.min_margin auto needs the noise of {', '.join(unknown)}, whose scores have "
            "fewer than 2 votes each and which no certificate or canary tells: ask canaries "
            "(judges.canaries), or set selection.retest_sd to what calibration measured, or give "
            "selection.min_margin as a number"
        )
    margin = found.trusted_margin(rules.max_inversion)
    # A margin is at most the range of rewards, so more than 1 leaves nothing.
    if margin > 1:
        raise DataGateError(
            "selection.min_margin auto finds no margin that can be trusted: answers to one prompt "
            f"differ by a standard deviation of {found.spread or 0:.4f}, the judges' noise is "
            f"{found.sd:.4f}. Use more votes or a better judge, or sample more varied answers"
        )
    return replace(rules, min_margin=margin)


def noise_of(scores: pl.DataFrame, candidates: pl.DataFrame, rules: Rules) -> Noise:
    """The noise of the values of `candidates`, from what is known of each dimension's scores.

    In this order: a verifier has none; the config's `retest_sd`, the certificate's; the spread of
    votes, where answers have two or more; this round's canaries. Votes come before canaries since
    they are of the answers at hand, and since members of an ensemble that say the same when asked
    again still differ from each other. A score is taken as the mean of its n votes, so its variance
    is theirs over n. A judge's dimensions are summed vote by vote, so that errors common to them
    count in full; errors of different judges are taken as independent.
    """
    return noise_from(noise_sums(scores, candidates, rules), rules)


@dataclass(frozen=True, slots=True)
class Votes:
    """What a judge's votes tell of its noise."""

    dimensions: tuple[str, ...]
    """Weighted dimensions that it voted on, sorted."""
    variances: tuple[float, ...]
    """Exact sum over answers of the variance of the weighted sum of their scores on these."""
    answers: int


@dataclass(frozen=True, slots=True)
class NoiseSums:
    """What `noise_of` needs to know of some prompts; those of different prompts add up exactly."""

    squares: tuple[float, ...]
    """Exact sum of squared distances of usable answers' values from their prompt's mean."""
    sizes: Mapping[int, int]
    """Usable answers of a prompt, two or more -> how many prompts have as many."""
    votes: Mapping[str, Votes]
    """By judge."""

    def __add__(self, other: NoiseSums) -> NoiseSums:
        """The sums of both."""
        judges = sorted({*self.votes, *other.votes})
        return NoiseSums(
            exact_sum([*self.squares, *other.squares]),
            dict(sorted((Counter(self.sizes) + Counter(other.sizes)).items())),
            {j: _together([s.votes[j] for s in (self, other) if j in s.votes]) for j in judges},
        )


def _together(votes: Sequence[Votes]) -> Votes:
    """A judge's votes on different prompts. Answers count that have votes on all of its dimensions,
    and where it voted on fewer of them there are none."""
    dimensions = tuple(sorted({d for some in votes for d in some.dimensions}))
    whole = [some for some in votes if some.dimensions == dimensions]
    return Votes(
        dimensions,
        exact_sum([v for some in whole for v in some.variances]),
        sum(some.answers for some in whole),
    )


def noise_sums(scores: pl.DataFrame, candidates: pl.DataFrame, rules: Rules) -> NoiseSums:
    """What `noise_from` makes the noise of; arguments as those of `noise_of`."""
    values = candidates.filter("usable").group_by("p", maintain_order=True).agg(
        pl.len(), squares=pl.col("value").var(ddof=0) * pl.len()
    )  # fmt: skip
    several = values.filter(pl.col("len") > 1)
    sizes = several["len"].value_counts().sort("len")
    voted = {d: w for d, w in sorted(rules.weights.items()) if _told(d, rules) is None}
    return NoiseSums(exact_sum(several["squares"]), dict(sizes.iter_rows()), _votes(scores, voted))


def noise_from(sums: NoiseSums, rules: Rules) -> Noise:
    """The noise, from the sums over all prompts."""
    several = sum(sums.sizes.values())
    spread = None
    if several:
        freedom = sum(size * prompts for size, prompts in sums.sizes.items()) - several
        spread = math.sqrt(math.fsum(sums.squares) / freedom)
    by_judge = [votes for votes in sums.votes.values() if votes.answers]
    known = {d for votes in by_judge for d in votes.dimensions}
    sources: dict[str, Source] = {}
    variance = math.fsum(math.fsum(v.variances) / v.answers for v in by_judge)
    for d in sorted(rules.weights):
        told = _told(d, rules)
        if told is None and d in known:
            sources[d] = "votes"
            continue
        if told is None and d in rules.canary_sd:
            told = "canaries", rules.canary_sd[d]
        sources[d], again = told or ("unknown", 0.0)
        variance += (rules.weights[d] * again) ** 2
    sd = None if "unknown" in sources.values() else math.sqrt(variance)
    margin = None
    if sd is not None and several:
        ranges = sum(n * expected_range(k) for k, n in sorted(sums.sizes.items()))
        margin = sd * ranges / several
    return Noise(sd, spread, sources, margin)


def _told(dimension: str, rules: Rules) -> tuple[Source, float] | None:
    """Where the standard deviation of a score asked for again is given, and what it is."""
    if dimension in rules.deterministic:
        return "verifier", 0.0
    if dimension in rules.retest_sd:
        return "config", rules.retest_sd[dimension]
    if dimension in rules.certified_sd:
        return "certificate", rules.certified_sd[dimension]
    return None


def _votes(scores: pl.DataFrame, weights: Mapping[str, float]) -> dict[str, Votes]:
    """Judge -> what its votes on these dimensions tell, where it cast two or more."""
    voted = scores.filter(
        pl.col("dimension").is_in(list(weights)), pl.col("votes").list.len() >= 2, is_score()
    )
    found = {}
    for (judge,), judged in voted.partition_by("judge", as_dict=True).items():
        dimensions = tuple(sorted(judged["dimension"].unique()))
        total = reduce(operator.add, (pl.col(d) * weights[d] for d in dimensions))
        variances = _votes_wide(judged, dimensions).select(total.list.var() / total.list.len())
        known = variances.to_series()
        known = known.filter(known.is_finite())
        found[judge] = Votes(dimensions, exact_sum(known), known.len())
    return dict(sorted(found.items()))


def _votes_wide(judged: pl.DataFrame, dimensions: Iterable[str]) -> pl.DataFrame:
    """Answers with equally many votes on every dimension, one column of votes each; sorted."""
    first, *others = (
        judged.filter(pl.col("dimension") == d).select(*KEY, pl.col("votes").alias(d))
        for d in dimensions
    )
    wide = first
    for other in others:
        wide = wide.join(other, on=KEY)
    lengths = [pl.col(d).list.len() for d in dimensions]
    same = pl.min_horizontal(lengths) == pl.max_horizontal(lengths)
    return wide.filter(same).sort(KEY)


def noise_record(noise: Noise, margins: Floats) -> dict[str, Any]:
    """What `selection.json` keeps of the noise and of what it does to pairs with these margins."""
    chances = noise.inverted(margins)
    return {
        "sd": noise.sd,
        "sources": dict(noise.sources),
        "spread_within_prompt": noise.spread,
        "reliability": noise.reliability,
        "margin_of_noise_alone": noise.noise_margin,
        "mean_margin": float(margins.mean()) if len(margins) else None,
        "mean_true_margin": None
        if noise.reliability is None or not len(margins)
        else float(noise.reliability * margins.mean()),
        "inverted_share": None if chances is None or not len(margins) else float(chances.mean()),
    }
