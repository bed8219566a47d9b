"""Why a round gave the pairs it gave, in words: `selection.json` of `rlhf.yield_analysis`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.report.tables import Table, table
from rlhf.verdict import change, interval, number

_SOURCES = {
    "verifier": "a verifier, which scores without noise",
    "retest": "selection.retest_sd",
    "config": "selection.retest_sd",
    "certificate": "the judge's certificate",
    "votes": "the spread of its votes",
    "canaries": "this round's canaries, asked twice",
    "unknown": "unknown: one vote a score, and nothing that says how it varies",
}


def explained(funnel: Mapping[str, Any], analysis: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the funnel multiplies to, and, where it was analysed, what constraints and noise do."""
    found: dict[str, Any] = {"product": _product(funnel)}
    if analysis is None:
        return found
    return found | {
        "strategy": analysis["strategy"].replace("_", " "),
        "suggestion": analysis["suggestion"],
        "costs": _costs(analysis["constraints"]),
        "analysed": _analysed(analysis),
        "noise": _noise(analysis["noise"]),
        "noise_table": _noise_table(analysis["noise"], analysis["min_margin"]),
        "split": _split(analysis["split_votes"]),
        "inversion": _inversion(analysis["inversion"]),
    }


def _product(funnel: Mapping[str, Any]) -> str | None:
    """The share of prompts that gave a pair, as the product of what each step kept."""
    first, last = funnel["steps"][0]["prompts"], funnel["steps"][-1]["prompts"]
    lossy = [s for s in funnel["steps"][1:] if s["lost_prompts"] and s["kept_prompts"] is not None]
    if not first or not lossy:
        return None
    factors = " × ".join(f"{s['kept_prompts']:.1%} ({s['step']})" for s in lossy)
    return f"{last / first:.1%} of prompts gave a pair = {factors}."


def _costs(costs: Mapping[str, Any]) -> Table | None:
    """What each constraint costs by itself: the selection with it alone dropped or relaxed."""
    now = costs["now"]
    dimensions = list(now["scores"])

    def row(name: str, changed: str, then: Mapping[str, Any]) -> dict[str, str]:
        return {
            "constraint": name,
            "change": changed,
            "prompts with a pair": f"{then['prompts']:,}",
            "gained": f"{then['gained_prompts']:+,}",
            "pairs": f"{then['pairs']:,}",
            "chosen's reward": _change(then["reward_change"]),
            **{f"chosen's {d}": _change(then["scores_change"][d]) for d in dimensions},
        }

    if not costs["alternatives"]:
        return None
    means = {f"chosen's {d}": _mean(v) for d, v in now["scores"].items()}
    rows = [
        {
            "constraint": "as it was",
            "change": "",
            "prompts with a pair": f"{now['prompts']:,}",
            "gained": "",
            "pairs": f"{now['pairs']:,}",
            "chosen's reward": _mean(now["reward"]),
            **means,
        }
    ]
    for a in costs["alternatives"]:
        changed = "dropped" if a["change"] == "dropped" else f"relaxed to {a['change']}"
        rows.append(row(a["constraint"], changed, a))
    return table("What each constraint costs: the selection with it alone changed", rows, "change")


def _analysed(analysis: Mapping[str, Any]) -> str:
    few, all_ = analysis["constraints"]["analysed_prompts"], analysis["prompts"]
    if few == all_:
        return f"Measured on all {all_:,} prompts."
    return f"Measured on {few:,} of {all_:,} prompts, drawn at random."


def _noise(noise: Mapping[str, Any]) -> str:
    """What the luck of the best and the worst score does to margins."""
    unknown = [d for d, source in noise["sources"].items() if source == "unknown"]
    if unknown:
        return (
            f"How much of the margins is the judges' noise is not known: {', '.join(unknown)} has "
            "one vote a score, and nothing says how it varies."
        )
    if set(noise["sources"].values()) == {"verifier"}:
        return "Verifiers score without noise, so no part of a margin is luck."
    if noise["sd"] == 0:
        return (
            "Asked again, the judges say the same, so no part of a margin is luck; errors that "
            "come again each time don't show in that."
        )
    said = f"The judges' noise has a standard deviation of {noise['sd']:.3f} in the reward."
    if noise["margin_of_noise_alone"] is not None and noise["mean_margin"] is not None:
        said += (
            " Whoever takes the best and the worst of several scores takes the luckiest and the "
            f"unluckiest too: equally good answers would still give a margin of "
            f"{noise['margin_of_noise_alone']:.3f}; the pairs' mean margin is "
            f"{noise['mean_margin']:.3f}"
        )
        if noise["mean_true_margin"] is not None:
            said += f", of which an estimated {noise['mean_true_margin']:.3f} is true"
        said += "."
    if noise["inverted_share"] is not None:
        said += f" An estimated {noise['inverted_share']:.1%} of the pairs are the wrong way round."
    return said


def _noise_table(noise: Mapping[str, Any], min_margin: float) -> Table | None:
    if set(noise["sources"].values()) == {"verifier"}:
        return None
    names = {
        "sd": "judges' noise (sd of a reward)",
        "spread_within_prompt": "spread of rewards within a prompt (sd)",
        "reliability": "share of that spread that is no noise",
        "margin_of_noise_alone": "margin that noise alone would give",
        "mean_margin": "mean margin of the pairs",
        "mean_true_margin": "of it, estimated to be true",
        "inverted_share": "share of pairs estimated to be inverted",
    }
    rows = [
        {"what": words, "value": number(noise[key])}
        for key, words in names.items()
        if noise[key] is not None
    ]
    rows.append({"what": "least margin asked for", "value": number(min_margin)})
    rows += [
        {"what": f"noise of {d} is known from", "value": _SOURCES[source]}
        for d, source in noise["sources"].items()
    ]
    return table("Noise and margins", rows)


def _split(split: Mapping[str, Any] | None) -> str | None:
    if split is None:
        return None
    measured = split["margin_measured"]
    return (
        f"Chosen on half of the votes, {split['pairs']:,} pairs had a mean margin of "
        f"{number(split['margin_chosen'])}; measured on the other half, which chose nothing, it is "
        f"{number(measured['value'])} (95% interval {interval(measured['low'], measured['high'])})."
    )


def _inversion(found: Mapping[str, Mapping[str, Any]]) -> Table | None:
    rows = [
        {
            "dimension": d,
            "chosen - rejected": change(f["value"]),
            "95% interval": interval(f["low"], f["high"]),
            "pairs": f"{f['pairs']:,}",
            "mark": "▼ inverted" if f["inverted"] else "",
        }
        for d, f in found.items()
    ]
    return table("Inversion alarm: mean of chosen minus rejected", rows, "mark") if rows else None


def _change(value: float | None) -> str:
    return "" if value is None else change(value)


def _mean(value: float | None) -> str:
    return "" if value is None else number(value)
