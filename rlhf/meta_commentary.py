"""Answers that talk about themselves instead of answering, and how far a detector of them goes.

"As an AI language model ...", "Here is a revised answer: ...", "The assistant's response is
harmful": what a model that wrote or judged an answer leaves in it. A policy trained on such answers
learns to say it. Patterns find them; whoever asks for a rewrite, or about AI, gets what the same
words mean there, so those prompts excuse them.

The detector errs, so the share that it flags is corrected by its recall and its false positive rate
(`measured`), and a verdict waits for what their intervals allow. Recall comes from packaged labels
that no pattern was tuned on. The false positive rate can't: its honest answers are the hard cases,
far more of them than in real data. It comes from public answers whose flagged ones were all read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal

import polars as pl

LABELS: Final = "meta_commentary_labels.yaml"

_ANSWER = r"(?:response|answer|reply)"
_REVISED = r"(?:revised|rewritten|re-written|improved|corrected|rephrased|edited)"
_REVISE = r"(?:revis|rewrit|re-writ|rewrot|rephras|modif|edit|chang|updat|improv|adjust)\w*"
_EARLIER = r"(?:previous|earlier|original|last|first|initial)"
_FAULTY = (
    r"(?:harmful|toxic|unethical|racist|sexist|offensive|biased|unhelpful|preachy|problematic|"
    r"inappropriate|insensitive|dismissive|judge?mental|rude)"
)

# The author is a model.
_SELF: Final = (
    r"\bas an? (?:\w+[ -]){0,2}?(?:ai|artificial intelligence|language model|"
    r"(?:machine[- ]learning|ai|text) model|virtual assistant|digital assistant|chatbot)"
    r"(?:\s*,|\.| (?:i|my|we|language|model|assistant|text|system|chatbot|trained|developed|"
    r"created|designed|and)\b)",
    r"\b(?:being|while|since) (?:i(?:'m| am) )?an? (?:\w+ )?(?:ai|language model)\b",
    r"\bi(?:'m| am) (?:just |only |merely |simply )?an? (?:\w+ )?"
    r"(?:ai|artificial intelligence|language model|computer program|chatbot|virtual assistant)\b",
    r"\bi (?:was|have been|am) trained (?:on|by|to)\b",
    r"\bmy (?:own )?(?:training data|knowledge (?:cut-?off|base)|last (?:knowledge )?update|"
    r"knowledge (?:was|is|only|ends)|training (?:ends|ended|stops|only))\b",
    r"\bbased on my (?:training|knowledge cut)",
)

# The answer is about an answer: this one, the one before, or its revision.
_REVISION: Final = (
    rf"(?m)^\W*(?:final )?(?:(?:new|better|{_REVISED}) {_ANSWER}|{_ANSWER} \({_REVISED}\)"
    rf"|{_REVISED}(?: version)?|revision|rewrite|rewording|critique(?: of the {_ANSWER})?)\W*:",
    rf"\b(?:here(?:'s| is)|below is)(?: (?:a|an|the|my|another)){{1,2}} "
    rf"(?:(?:much )?(?:more|less) \w+|{_REVISED}|better|safer|harmless) (?:and \w+ )?"
    rf"(?:{_ANSWER}\b|version of (?:the|my|that|this) (?:\w+(?:'s)? )?{_ANSWER})",
    rf"\b(?:here(?:'s| is) the {_ANSWER}, {_REVISED})",
    rf"\b(?:i(?:'d| would| will|'ll| should|'ve| have)?|let me)(?: like to)? {_REVISE} "
    rf"(?:(?:the|my|this|that|its?) )?(?:[\w']+ ){{0,2}}{_ANSWER}\b",
    rf"\b(?:i(?:'ve| have)) made (?:the|my|this) {_ANSWER}\b",
    rf"\bmy (?:{_EARLIER}|{_REVISED}) {_ANSWER}\b",
    rf"\bthe {_EARLIER} {_ANSWER} (?:is|was|could|can|should|does|did|contain\w*|fail\w*|has)\b",
    rf"\bthe (?:ai|assistant|chatbot|model|bot)'s (?:\w+ )?{_ANSWER}\b",
    r"\bthe (?:ai|assistant|chatbot|bot) should(?: not)? (?:have|refuse|decline|avoid)\b",
    rf"\b(?:the|this) {_ANSWER}(?: above| given| provided by the \w+)? "
    rf"(?:is|was) (?:\w+ly |somewhat |very )?{_FAULTY}\b",
    rf"\bthis {_ANSWER} is (?:better|worse|too|more|less)\b",
    rf"\b(?:the|this) {_ANSWER}(?: above| given| provided by the \w+)? "
    r"(?:(?:does not|doesn't|fails to|did not) (?:comply|address|follow|mention|provide|answer)|"
    r"(?:can|could|should) (?:be \w+ed|be rewritten|encourage|decline)|ignores|encourages|"
    r"must not|assumes)\b",
    rf"\b(?:this|the) (?:{_REVISED} )?(?:{_ANSWER}|version|revision) "
    r"(?:avoids|removes|addresses|acknowledges|complies|gets rid)\b",
    rf"\bin (?:this|my|the) (?:{_REVISED} )?(?:{_ANSWER}|version|revision),? i(?:'ve)?\b",
    rf"\b(?:a|an) (?:better|(?:more|less) \w+|{_REVISED}|safer) {_ANSWER} "
    r"(?:would|could|might|may|should)\b",
    rf"\b(?:this|the|a|my) {_REVISED} {_ANSWER}\b",
    rf"\b{_ANSWER} [ab] (?:is|was|seems) (?:\w+ )?(?:better|worse|more|less|preferable)\b",
    r"\bthe critique (?:is|was|says|points|notes)\b",
    r"\b(?:comply with|following|according to) the (?:given )?(?:principle|constitution),? "
    r"(?:i|the (?:response|answer)|here)\b",
    r"\bin accordance with the (?:principle|constitution),? (?:i|here|the (?:response|answer))\b",
    rf"\bguidelines i was given\b|\bto make (?:the|my|this) {_ANSWER} (?:more|less)\b",
    r"\bthe user (?:is asking|asks|wants me|'s request is)|\bthe user's (?:request|question) is\b",
    rf"\bi chose this {_ANSWER}\b",
)

_ASKS_ABOUT_MODELS: Final = (
    r"(?i)\b(?:ai|artificial intelligence|robots?|bots?|chatbot|humans?|language models?|llms?|"
    r"gpt|neural|yourself|are you|who made you|training data|do you (?:have|feel|think))\b"
)
_ASKS_FOR_REVISION: Final = (
    r"(?i)\b(?:revis|re-?writ|rephras|paraphras|proofread|improv|edit|correct|fix|critiqu|"
    r"feedback|review|shorten|reword)|\b(?:which|this|following|better) (?:response|answer|reply)\b"
)

_REFUSAL: Final = (
    r"(?i)^\W*(?:(?:i'?m|i am) (?:very |really |truly |so )?sorry,? (?:but )?|sorry,? (?:but )?|"
    r"i apologi[sz]e,? but |unfortunately,? )?(?:as an? [^.,]*, )?"
    r"i(?: ?'m| am)? ?(?:can(?:no|')t|can not|won't|will not|(?:am )?(?:not able|unable) to|"
    r"must decline|(?:do not|don't) feel comfortable|(?:do not|don't) want to|"
    r"(?:am )?not (?:comfortable|going to|willing to|interested in)) (?:\w+ ){0,2}?"
    r"(?:help|assist|provide|do|answer|fulfil|fulfill|comply|create|write|generate|share|give|"
    r"support|engage|helping|assisting|impersonating|discuss|condone|participate|offer|tell|"
    r"recommend|be able|with)\b"
)

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Share:
    """A share in [0, 1] with the interval that the detector's own errors leave.

    >>> Share(0.01, 0.0, 0.015).verdict(0.02)
    'pass'
    """

    value: float
    low: float
    high: float

    def verdict(self, target: float) -> Verdict:
        """Whether the share is below `target`, as far as can be told."""
        if self.high < target:
            return "pass"
        return "fail" if self.low >= target else "inconclusive"


@dataclass(frozen=True, slots=True)
class Rates:
    """What a detector did on labelled answers, and on ordinary ones of which few are labelled meta.

    >>> Rates(90, 100, 5, 200, 0, 5000).recall
    0.9
    """

    true_positives: int
    positives: int
    false_positives: int
    negatives: int
    wrongly_flagged: int
    """Of the ordinary honest answers."""
    ordinary: int
    """Ordinary honest answers."""

    @property
    def precision(self) -> float:
        """Of the labelled answers it flagged, the share that are meta-commentary."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Of the labelled meta-commentary, the share it flagged."""
        return self.true_positives / self.positives

    @property
    def false_positive_rate(self) -> float:
        """Of ordinary honest answers, the share it flagged."""
        return self.wrongly_flagged / self.ordinary

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% Wilson intervals of precision, recall and false positive rate."""
        flagged = self.true_positives + self.false_positives
        return {
            "precision": _wilson(self.true_positives, flagged),
            "recall": _wilson(self.true_positives, self.positives),
            "false_positive_rate": _wilson(self.wrongly_flagged, self.ordinary),
        }

    def corrected(self, flagged: float) -> Share:
        """The true share of meta-commentary where a share `flagged` of answers was flagged.

        (flagged - f) / (recall - f) with f the false positive rate (Rogan and Gladen 1978,
        https://doi.org/10.1093/oxfordjournals.aje.a112510), clipped to [0, 1]. The ends take the
        intervals' least and most favourable recall and f together, so they are rather too wide.

        >>> round(Rates(90, 100, 5, 200, 0, 5000).corrected(0.09).value, 3)
        0.1
        """
        intervals = self.intervals()
        recall, false = intervals["recall"], intervals["false_positive_rate"]
        return Share(
            _corrected(flagged, self.recall, self.false_positive_rate),
            _corrected(flagged, recall[1], false[1]),
            _corrected(flagged, recall[0], false[0]),
        )


def _corrected(flagged: float, recall: float, false: float) -> float:
    return min(1.0, max(0.0, (flagged - false) / (recall - false)))


def _wilson(count: int, total: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def commentary(answer: pl.Expr, prompt: pl.Expr) -> pl.Expr:
    """The first words of `answer` (text) that talk about itself or its author, null if none do.

    `prompt` is what the user asked (text, may be empty): asking for a rewrite, or about AI, excuses
    the words that answer it.
    """
    text = answer.str.replace_all("[’`]", "'")
    about_model = text.str.extract(_any_of(_SELF), 0)
    about_answer = text.str.extract(_any_of(_REVISION), 0)
    return pl.coalesce(
        pl.when(~prompt.str.contains(_ASKS_ABOUT_MODELS)).then(about_model),
        pl.when(~prompt.str.contains(_ASKS_FOR_REVISION)).then(about_answer),
    )


def refusal(answer: pl.Expr) -> pl.Expr:
    """Whether an answer (text) opens by declining: for orientation, nobody has measured it."""
    return answer.str.replace_all("[’`]", "'").str.contains(_REFUSAL)


def _any_of(patterns: tuple[str, ...]) -> str:
    return "(?i)" + "|".join(f"(?:{pattern})" for pattern in patterns)


def labelled(part: Literal["tune", "measure"]) -> pl.DataFrame:
    """The packaged labels: `answer`, `prompt` (empty where none) and `meta`."""
    rows = [
        {"prompt": "", **(entry if isinstance(entry, dict) else {"answer": entry}), "meta": meta}
        for label, entries in _labels()[part].items()
        for meta in [label.endswith("meta")]
        for entry in entries
    ]
    return pl.DataFrame(rows, schema={"answer": pl.String, "prompt": pl.String, "meta": pl.Boolean})


@cache
def measured(part: Literal["tune", "measure"] = "measure") -> Rates:
    """The detector's rates, computed on the packaged labels; takes some milliseconds."""
    found = commentary(pl.col("answer"), pl.col("prompt")).is_not_null()
    flagged = labelled(part).with_columns(flagged=found)
    meta, honest = flagged.filter("meta"), flagged.filter(~pl.col("meta"))
    ordinary = _labels()["ordinary"]
    rightly = ordinary["flagged"] - ordinary["wrongly_flagged"]
    return Rates(
        int(meta["flagged"].sum()),
        meta.height,
        int(honest["flagged"].sum()),
        honest.height,
        ordinary["wrongly_flagged"],
        ordinary["answers"] - rightly,
    )


@cache
def _labels() -> dict[str, Any]:
    import yaml

    text = files("rlhf").joinpath(LABELS).read_text(encoding="utf-8")
    labels: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return labels
