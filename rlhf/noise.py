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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy import integrate, stats

from rlhf.candidates import KEY
from rlhf.errors import DataGateError, InputError
from rlhf.rules import Rules
from rlhf.statistics import Floats

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
    values = candidates.filter("usable").group_by("p", maintain_order=True).agg(
        pl.len(), squares=pl.col("value").var(ddof=0) * pl.len()
    )  # fmt: skip
    several = values.filter(pl.col("len") > 1)
    spread = None
    if several.height:
        freedom = int(several["len"].sum()) - several.height
        spread = math.sqrt(float(several["squares"].sum()) / freedom)
    sources: dict[str, Source] = {}
    again: dict[str, float] = {}
    for d in sorted(rules.weights):
        given = _told_again(d, rules)
        if d in rules.deterministic:
            sources[d] = "verifier"
        elif given is not None:
            sources[d], again[d] = given
    voted = {d: w for d, w in sorted(rules.weights.items()) if d not in sources}
    by_judge = _vote_variances(scores, voted)
    known = {d for dimensions in by_judge for d in dimensions}
    for d in voted:
        sources[d] = "votes" if d in known else "canaries" if d in rules.canary_sd else "unknown"
        if sources[d] == "canaries":
            again[d] = rules.canary_sd[d]
    variance = sum(by_judge.values()) + sum((rules.weights[d] * x) ** 2 for d, x in again.items())
    sd = None if "unknown" in sources.values() else math.sqrt(variance)
    margin = None
    if sd is not None and len(several):
        sizes = several["len"].value_counts().sort("len")
        ranges = sum(n * expected_range(k) for k, n in sizes.iter_rows())
        margin = sd * ranges / len(several)
    return Noise(sd, spread, dict(sorted(sources.items())), margin)


def _told_again(dimension: str, rules: Rules) -> tuple[Source, float] | None:
    """Where the standard deviation of a score asked for again is given, and what it is."""
    if dimension in rules.retest_sd:
        return "config", rules.retest_sd[dimension]
    if dimension in rules.certified_sd:
        return "certificate", rules.certified_sd[dimension]
    return None


def _vote_variances(
    scores: pl.DataFrame, weights: Mapping[str, float]
) -> dict[tuple[str, ...], float]:
    """Dimensions of one judge -> variance of their weighted sum of scores, where votes tell."""
    voted = scores.filter(
        pl.col("dimension").is_in(list(weights)),
        pl.col("votes").list.len() >= 2,
        ~pl.col("abstained"),
    )
    found = {}
    for judged in voted.partition_by("judge", maintain_order=False) if voted.height else []:
        dimensions = tuple(sorted(judged["dimension"].unique()))
        votes = _votes_wide(judged, dimensions)
        if votes.height:
            total = reduce(operator.add, (pl.col(d) * weights[d] for d in dimensions))
            variance = (total.list.var() / total.list.len()).mean()
            found[dimensions] = votes.select(variance).item()
    return found


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
