"""Take out what spoils preference data, rule by rule, and count what each rule took.

Rules run in the order given and each sees what the ones before left, so the funnel's losses add up.
A row that falls is named with its rule and the words or the record that made it fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from rlhf.duplicates import near_duplicates, normalised
from rlhf.errors import InputError
from rlhf.files import named, read_parquet, write_parquet
from rlhf.meta_commentary import commentary, refusal
from rlhf.pair_files import check_target, write_lines
from rlhf.pair_formats import Preferences
from rlhf.transcripts import answer_text, prompt_text

DEFAULT_RULES: Final = ("empty", "identical", "inverted", "duplicate", "contradiction")
_SQUEEZED: Final = r"\s+"

Reasons = pl.Series
"""Why each row falls, null where it stays."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """Rows that stay (numbers into the preferences' table), those that fall, and the funnel.

    `fallen` has `where`, `rule` and `reason`. `funnel` is JSON-able: `rows`, `steps` (`rule`,
    `lost`, `left`, `kept` of the rows before it) and `kept` of all.
    """

    stay: pl.Series
    fallen: pl.DataFrame
    funnel: dict[str, Any]


def text_columns(preferences: Preferences) -> pl.DataFrame:
    """The table with `row`, prompts and answers as text: `prompt`, then the answers; and of each,
    as `same_prompt` and so on, a 64-bit hash that equal texts share (`duplicates.normalised`)."""
    texts = [answer_text(name).alias(name) for name in preferences.answers]
    table = preferences.table.with_row_index("row").with_columns(
        prompt_text().alias("prompt"), *texts
    )
    names = ("prompt", *preferences.answers)
    return table.with_columns(normalised(pl.col(n)).hash().alias(f"same_{n}") for n in names)


def apply_rules(preferences: Preferences, rules: Sequence[str]) -> Filtered:
    """Apply rules by name, a few with a value: `min_delta=0.5`. `RULES` lists them.

    Raises:
        InputError: an unknown rule, a value that isn't one, or a rule that the data can't answer.
    """
    left = text_columns(preferences)
    steps, fallen = [], []
    for text in rules:
        name, _, value = text.partition("=")
        rule = _rule(name, value, preferences)
        reasons = rule(left).alias("reason")
        falls = left.with_columns(reasons, rule=pl.lit(text)).filter(pl.col("reason").is_not_null())
        fallen.append(falls.select("row", "where", "rule", "reason"))
        before, left = left.height, left.filter(reasons.is_null())
        kept = left.height / before if before else 1.0
        steps.append({"rule": text, "lost": falls.height, "left": left.height, "kept": kept})
    total = preferences.table.height
    funnel = {"rows": total, "steps": steps, "kept": left.height / total}
    nothing = left.clear().select("row", "where", rule=pl.lit(""), reason=pl.lit(""))
    gone = pl.concat([nothing, *fallen]).sort("row").drop("row")
    return Filtered(left["row"], gone, funnel)


def default_rules(preferences: Preferences) -> list[str]:
    """Rules that nobody regrets, less those that this data can't answer."""
    return [name for name in DEFAULT_RULES if not unanswerable(RULES[name], preferences)]


def unanswerable(rule: Rule, preferences: Preferences) -> str | None:
    """Why the data can't answer a rule, None where it can."""
    path, table = preferences.records.path, preferences.table
    if rule.needs_pairs and not preferences.paired:
        return f"needs pairs, {path} has labels"
    sides = ("score_chosen", "score_rejected")
    if rule.needs_scores and any(table[side].null_count() == table.height for side in sides):
        return (
            f"needs scores, which {path} lacks; name them with --column score_chosen=NAME "
            "--column score_rejected=NAME"
        )
    return None


def write_kept(preferences: Preferences, stay: pl.Series, path: Path) -> None:
    """Write the records that stay as they were: the same lines, or the same Parquet columns.

    Raises:
        InputError: `path` is of another kind than the file (`pairs convert` changes formats).
    """
    records, suffix = preferences.records, check_target(path)
    if (suffix == ".parquet") != (records.lines is None):
        raise InputError(
            f"{path} must be of the same kind as {records.path}; `pairloop pairs convert` changes "
            "that"
        )
    if records.lines is None:
        with named(path):
            write_parquet(read_parquet(records.path)[stay.to_list()], path)
    else:
        write_lines(path, records.lines.gather(stay).to_list())


def _rule(name: str, value: str, preferences: Preferences) -> Callable[[pl.DataFrame], Reasons]:
    if name not in RULES:
        raise InputError(f"--rules must be of {', '.join(sorted(RULES))}, got {name!r}")
    rule = RULES[name]
    number = _value(name, value, rule)
    why = unanswerable(rule, preferences)
    if why is not None:
        raise InputError(f"--rules {name} {why}")
    return lambda table: rule.apply(table, preferences.answers, number)


def _value(name: str, text: str, rule: Rule) -> float:
    """A rule's value: as given, or its own; 0 for a rule that takes none."""
    if rule.within is None:
        if text:
            raise InputError(f"--rules {name} takes no value, got {text!r}")
        return 0.0
    if not text and rule.default is None:
        raise InputError(f"--rules {name} needs a value, as in {name}=0.5")
    try:
        number = float(text) if text else float(rule.default or 0)
    except ValueError:
        raise InputError(f"--rules {name} needs a number, got {text!r}") from None
    low, high = rule.within
    if not low < number <= high:
        raise InputError(
            f"--rules {name} must be above {low:g} and at most {high:g}, got {number:g}"
        )
    return number


def _empty(table: pl.DataFrame, answers: tuple[str, ...], _: float) -> Reasons:
    texts = ("prompt", *answers)
    blank = [
        pl.when(pl.col(n).str.strip_chars() == "").then(pl.lit(f"{n} is empty")) for n in texts
    ]
    return table.select(pl.coalesce(blank)).to_series()


def _identical(table: pl.DataFrame, _: tuple[str, ...], __: float) -> Reasons:
    same = squeezed("chosen") == squeezed("rejected")
    return table.select(pl.when(same).then(pl.lit("chosen and rejected are equal"))).to_series()


def squeezed(column: str) -> pl.Expr:
    """Text whose white space doesn't count."""
    return pl.col(column).str.replace_all(_SQUEEZED, " ").str.strip_chars()


def _inverted(table: pl.DataFrame, _: tuple[str, ...], __: float) -> Reasons:
    low = pl.col("score_chosen") < pl.col("score_rejected")
    said = pl.format("chosen scores {}, rejected {}", "score_chosen", "score_rejected")
    return table.select(pl.when(low).then(said)).to_series()


def _min_delta(table: pl.DataFrame, _: tuple[str, ...], least: float) -> Reasons:
    delta = pl.col("score_chosen") - pl.col("score_rejected")
    short = (delta < least) | delta.is_null()
    said = pl.format("delta {}", delta.cast(pl.String).fill_null("missing"))
    return table.select(pl.when(short).then(said)).to_series()


def _max_length_ratio(table: pl.DataFrame, _: tuple[str, ...], most: float) -> Reasons:
    lengths = [pl.col(n).str.len_chars().clip(lower_bound=1) for n in ("chosen", "rejected")]
    ratio = pl.max_horizontal(lengths) / pl.min_horizontal(lengths)
    said = pl.format("one answer is {} times as long", ratio.round(1))
    return table.select(pl.when(ratio > most).then(said)).to_series()


def _duplicate(table: pl.DataFrame, answers: tuple[str, ...], _: float) -> Reasons:
    label = ["label"] if "label" in table.columns else []
    first = pl.col("where").first().over(_same("prompt", *answers) + label)
    return table.select(
        pl.when(first != pl.col("where")).then(pl.format("repeats {}", first))
    ).to_series()


def _contradiction(table: pl.DataFrame, answers: tuple[str, ...], _: float) -> Reasons:
    """Rows that say the opposite of another: both fall, since nothing tells which is right."""
    if "label" in table.columns:
        both = pl.col("label").n_unique().over(_same("prompt", *answers)) > 1
        said = pl.lit("the same answer is labelled true and false")
        return table.select(pl.when(both).then(said)).to_series()
    opposite = table.select(
        "same_prompt",
        pl.col("same_rejected").alias("same_chosen"),
        pl.col("same_chosen").alias("same_rejected"),
        pl.col("where").alias("other"),
    ).unique(_same("prompt", *answers), keep="first", maintain_order=True)
    other = table.join(
        opposite, on=_same("prompt", *answers), how="left", maintain_order="left"
    )  # fmt: skip
    differ = pl.col("same_chosen") != pl.col("same_rejected")
    said = pl.format("{} prefers the other answer", "other")
    return other.select(pl.when(differ & pl.col("other").is_not_null()).then(said)).to_series()


def _same(*names: str) -> list[str]:
    return [f"same_{name}" for name in names]


def _near_duplicate(table: pl.DataFrame, _: tuple[str, ...], threshold: float) -> Reasons:
    """Rows whose prompt is nearly that of another prompt; rows of one prompt stay together."""
    prompts = table.select("where", prompt=normalised(pl.col("prompt")))
    distinct = prompts.unique("prompt", keep="first", maintain_order=True)
    near = near_duplicates(distinct["prompt"], threshold)
    kept = distinct["where"].gather(near["kept"])
    said = pl.format("its prompt is {} like that of {}", pl.col("similarity").round(2), "kept")
    reasons = distinct.select(
        "prompt",
        reason=near.with_columns(kept=kept)
        .select(pl.when(kept != distinct["where"]).then(said))
        .to_series(),
    )
    return prompts.join(reasons, on="prompt", how="left", maintain_order="left")["reason"]


def _meta_commentary(table: pl.DataFrame, answers: tuple[str, ...], _: float) -> Reasons:
    words = commentary(pl.col(answers[0]), pl.col("prompt")).str.strip_chars()
    if "label" in table.columns:
        words = pl.when("label").then(words)
    return table.select(pl.format('says "{}"', words)).to_series()


def _refusal(table: pl.DataFrame, answers: tuple[str, ...], _: float) -> Reasons:
    declines = refusal(pl.col(answers[0]))
    if "label" in table.columns:
        declines &= pl.col("label")
    said = pl.lit("the preferred answer declines")
    return table.select(pl.when(declines).then(said)).to_series()


@dataclass(frozen=True, slots=True)
class Rule:
    """What takes a row out. `within` bounds its value (above, at most), None where it has none."""

    apply: Callable[[pl.DataFrame, tuple[str, ...], float], Reasons]
    what: str
    within: tuple[float, float] | None = None
    default: float | None = None
    needs_pairs: bool = False
    needs_scores: bool = False


RULES: Final[Mapping[str, Rule]] = {
    "empty": Rule(_empty, "the prompt or an answer is blank"),
    "identical": Rule(_identical, "chosen and rejected differ in white space only",
                      needs_pairs=True),
    "inverted": Rule(_inverted, "chosen scores less than rejected", needs_pairs=True,
                     needs_scores=True),
    "duplicate": Rule(_duplicate, "the same prompt and answers as an earlier row"),
    "contradiction": Rule(_contradiction, "another row prefers the other answer; both fall"),
    "near_duplicate": Rule(_near_duplicate, "a prompt this similar to an earlier one",
                           (0, 1), 0.8),
    "meta_commentary": Rule(_meta_commentary, "the preferred answer talks about itself"),
    "refusal": Rule(_refusal, "the preferred answer opens by declining"),
    "min_delta": Rule(_min_delta, "chosen's score exceeds rejected's by less than this",
                      (-math.inf, math.inf), needs_pairs=True, needs_scores=True),
    "max_length_ratio": Rule(_max_length_ratio, "one answer is longer than this many times the "
                             "other", (0, math.inf), 2.0, needs_pairs=True),
}  # fmt: skip
