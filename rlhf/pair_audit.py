"""A blind audit of a round's own pairs: does who trains nothing prefer what was chosen?

After selection `judges.audit_pairs` of the round's pairs are drawn; the audit judges score both
answers of each (`audit/scores`, schema `SCORES`), and a blind sheet in the run's folder `sheets`
puts them before a person. What they say reaches no selection and no training. `audit.json`:

| key | holds |
|---|---|
| `pairs` | how many pairs were drawn; they are the table `audit/pairs`, as in `pairs` |
| `judges` | a list, one entry for each audit judge and dimension |
| `inverted` | a sentence about those whose verdict is `inverted`; empty where there is none |

An entry has `judge`, `dimension`, `preferred`, `equal`, `against` (pairs whose chosen answer scores
higher, equal, lower), `abstained` (pairs that lack a score), `verdict`, and `value`, `low`, `high`:
the share of pairs in which it agrees with the selection, an equal score counting half, with its 95%
interval over clusters (null where no pair has both scores). A verdict is `agrees` (the interval
lies above 0.5, a coin's share), `inverted` (below it) or `unclear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from rlhf.agreement import share
from rlhf.blind_sheet import Question, Sheet
from rlhf.blind_sheet.sheet import KEY
from rlhf.errors import DataGateError
from rlhf.files import read_json
from rlhf.judgements import read_gold

SHEETS = "sheets"
"""In a run's folder: a blind sheet for each round, `0001` and so on. A person's labels are read
with `pairloop judge gold`."""
GOLD = "gold.jsonl"
"""Beside a sheet: its labels, where `pairloop judge gold` puts them."""
QUESTION = Question("better", "Which answer is better, all things considered?")

_PAIR = ["prompt_id", "chosen_sample", "rejected_sample"]


def draw_pairs(pairs: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """`count` of a round's pairs (all, where there are fewer), drawn by a keyed hash, in their
    order. The result depends on the rows alone."""
    drawn = pairs.select(_PAIR).sort(pl.concat_str(_PAIR, separator="\n").hash(seed), *_PAIR)
    return pairs.join(drawn.head(count), on=_PAIR, how="semi", maintain_order="left")


def sheet_of(pairs: pl.DataFrame, about: pl.DataFrame, seed: int) -> Sheet:
    """The drawn pairs as a blind sheet, whose key says on which side (`side_x`) chosen stands.

    `about` has prompt_id, prompt, context and reference.
    """
    shown = pairs.select(
        *_PAIR, pl.col("chosen").alias("answer_x"), pl.col("rejected").alias("answer_y")
    ).join(about.select("prompt_id", "prompt", "context", "reference"), on="prompt_id", how="left")
    return Sheet.of(shown, [QUESTION], seed)


def audited(
    pairs: pl.DataFrame,
    scores: pl.DataFrame,
    judged: Sequence[tuple[str, str]],
    resamples: int,
) -> dict[str, Any]:
    """The record `audit.json`, from the drawn pairs and the audit judges' scores of their answers.

    `judged` are judge and dimension of each.
    """
    entries = []
    for judge, dimension in judged:
        found = _agreement(_margins(pairs, scores, judge, dimension), resamples)
        entries.append({"judge": judge, "dimension": dimension, **found})
    return {"pairs": pairs.height, "judges": entries, "inverted": _inverted(entries)}


def labelled(sheet: Path, pairs: pl.DataFrame, resamples: int) -> list[dict[str, Any]]:
    """What people say who labelled a round's sheet, an entry each (as of `judges` in `audit.json`);
    empty before `pairloop judge gold` put their labels beside the sheet.

    `pairs` are those that were drawn. Raises InputError where labels or key can't be read.
    """
    if not (sheet / GOLD).is_file():
        return []
    items = read_json(sheet / KEY, "take the labels away")["items"]
    known = {(p, c, r): cluster for p, c, r, cluster in pairs.select(*_PAIR, "cluster").rows()}
    # Chosen was `answer_x`.
    placed = {
        i["item_id"]: (known[i["prompt_id"], i["chosen_sample"], i["rejected_sample"]], i["side_x"])
        for i in items
    }
    by_person: dict[str, dict[str, float]] = {}
    for label in read_gold(sheet / GOLD):
        if label.item_id in placed and label.dimension == QUESTION.dimension:
            _, side = placed[label.item_id]
            said = by_person.setdefault(label.annotator or "a person", {})
            said[label.item_id] = label.value if side == "a" else -label.value
    entries = []
    for person, said in by_person.items():
        rows = [(cluster, said.get(item)) for item, (cluster, _) in placed.items()]
        schema = {"cluster": pl.String, "margin": pl.Float64}
        table = pl.DataFrame(rows, schema=schema, orient="row")
        found = _agreement(table, resamples)
        entries.append({"judge": person, "dimension": QUESTION.dimension, **found})
    return entries


def check_audit(record: Mapping[str, Any], on_inversion: Literal["error", "warn"]) -> str:
    """A warning, empty where no audit judge is against the selection.

    Raises:
        DataGateError: one is, and `on_inversion` is `error`.
    """
    text: str = record["inverted"]
    if text and on_inversion == "error":
        raise DataGateError(f"{text}. selection.on_inversion warn goes on all the same")
    return text


def said(record: Mapping[str, Any]) -> str:
    """One line for the log."""
    parts = [
        f"{e['judge']} on {e['dimension']} agrees with {e['value']:.2f} of them ({e['low']:.2f} to "
        f"{e['high']:.2f})"
        if e["value"] is not None and e["low"] is not None
        else f"{e['judge']} on {e['dimension']} scored too few of them"
        for e in record["judges"]
    ]
    return f"audit of {record['pairs']} pairs: {'; '.join(parts) or 'there is no audit judge'}"


def _margins(pairs: pl.DataFrame, scores: pl.DataFrame, judge: str, dimension: str) -> pl.DataFrame:
    """Per pair: cluster, and by how much chosen scores above rejected (null where that is open)."""
    mine = scores.filter(~pl.col("abstained"), judge=judge, dimension=dimension)
    found = pairs.select("cluster", *_PAIR)
    for role in ("chosen", "rejected"):
        key = ["prompt_id", f"{role}_sample"]
        side = mine.select("prompt_id", pl.col("sample").alias(key[1]), pl.col("score").alias(role))
        found = found.join(side, on=key, how="left", maintain_order="left")
    return found.select("cluster", margin=pl.col("chosen") - pl.col("rejected"))


def _agreement(margins: pl.DataFrame, resamples: int) -> dict[str, Any]:
    known = margins.drop_nulls("margin")
    signs = np.sign(known["margin"].to_numpy())
    found: dict[str, Any] = {"value": None, "low": None, "high": None, "verdict": "unclear"}
    clusters = known["cluster"].rank("dense").to_numpy().astype(np.int64)
    agrees = share((signs + 1) / 2, np.ones(len(signs)), clusters, resamples, len(signs))
    if agrees is not None:
        verdict = "agrees" if agrees.low > 0.5 else "inverted" if agrees.high < 0.5 else "unclear"
        found = {k: getattr(agrees, k) for k in ("value", "low", "high")} | {"verdict": verdict}
    return {
        **found,
        "preferred": int((signs > 0).sum()),
        "equal": int((signs == 0).sum()),
        "against": int((signs < 0).sum()),
        "abstained": margins.height - known.height,
    }


def _inverted(entries: Sequence[Mapping[str, Any]]) -> str:
    against = [
        f"{e['judge']} on {e['dimension']} (it agrees with {e['value']:.2f}, 95% interval "
        f"{e['low']:.2f} to {e['high']:.2f}, of {e['preferred'] + e['equal'] + e['against']} pairs)"
        for e in entries
        if e["verdict"] == "inverted"
    ]
    if not against:
        return ""
    return (
        f"rejected answers are preferred to chosen ones by the audit of {', '.join(against)}: what "
        "the panel rewards is not what the audit judge values. Read the pairs of audit/pairs, and "
        "calibrate the panel's judges"
    )
