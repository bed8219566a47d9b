"""Score an answer to a DSTC9 support question, each dimension in [0, 1].

* correctness: the share of the FAQ answer's key words and numbers that the answer states, each
  affirmed or denied as the FAQ entry does.
* groundedness: no number and no name that FAQ entry and question lack.
* problem_solution: one sentence tells the customer what is so, or what to do.
* style: the house rules of the demo's support desk.

The data has no hand-written facts, so the rules take them from the FAQ entry: they are coarser than
the demo's, and a right answer in quite other words scores low. `audit` compares with the human
agents' replies, which no verifier reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Final

from sacrebleu.metrics.chrf import CHRF

from rlhf.types import Completion, Prompt
from rollout.support_desk import house_rules
from rollout.support_desk.grounding import ungrounded_names
from rollout.support_desk.wording import (
    Token,
    content,
    is_negator,
    is_number,
    is_prose,
    negated,
    quantities,
    sentences,
    stem,
    tokens,
    vocabulary,
    words,
)

# Words for "there is": whether it is so shows in the negation, not in which of them was chosen.
_AVAILABILITY: Final = frozenset(
    stem(word)
    for word in vocabulary(
        "available offer offered provide provided allow allowed accept accepted possible permitted "
        "welcome serve supply option service facility currently time onsite site location place "
        "guest customer"
    )
)
_VERB_NEGATORS: Final = vocabulary("not never cannot unable")
_YES_NO: Final = re.compile(
    r"(?:is|are|am|was|do|does|did|can|could|may|might|will|would|should|has|have)\b", re.I
)
_DOUBT: Final = re.compile(
    r"\b(?:not (?:entirely )?sure|no idea|don't know|do not know|as an ai|maybe|perhaps|"
    r"probably|i think|i guess)\b",
    re.I,
)
_NUMBER_WEIGHT: Final = 2.0
_BARE_ANSWER: Final = 0.5
_DISCOUNT: Final = 0.5
_TOLD_SHARE: Final = 0.5


def verify(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """All four dimensions; None where the prompt has no FAQ entry to judge by."""
    if not prompt.context:
        return dict.fromkeys(("correctness", "groundedness", "problem_solution", "style"))
    text = completion.text
    return {
        "correctness": correctness(prompt, text),
        "groundedness": groundedness(prompt, text),
        "problem_solution": problem_solution(prompt, text),
        "style": style(prompt, completion),
    }


def audit(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """chrF, scaled to [0, 1], against the FAQ answer and (the closest of) the agents' replies."""
    replies = list(prompt.metadata.get("agent_replies") or [])
    return {
        "reference_overlap": _overlap(completion.text, [prompt.reference or ""]),
        "agent_overlap": _overlap(completion.text, replies),
    }


def correctness(prompt: Prompt, text: str) -> float:
    """Numbers count double. A key word that the answer both affirms and denies, or the other way
    round than the FAQ entry, is not stated; nor is one that only stands in a question.

    To a yes-or-no question, an opening "yes" or "no" against the FAQ entry makes it 0, and the bare
    right one is worth a half. Each of these halves the score: doubt, a negation on one side alone,
    a heap of key words without a sentence.
    """
    answer = tokens("\n".join(_statements(text)))
    if not answer:
        return 0.0
    passage = tokens(prompt.context or "")
    yes_no, opening = _YES_NO.match(_question(prompt)), _opening(answer)
    if yes_no and opening is not None and opening == _denies(passage):
        return 0.0
    score = _recall(prompt, answer)
    if yes_no and opening is not None:
        score = max(score, _BARE_ANSWER)
    if _DOUBT.search(text):
        score *= _DISCOUNT
    # Word by word, "Visa and Maestro are not accepted" denies Maestro alone.
    if any(is_negator(t.text) for t in answer) != any(is_negator(t.text) for t in passage):
        score *= _DISCOUNT
    if is_prose(passage) and not is_prose(answer):
        score *= _DISCOUNT
    return score


def groundedness(prompt: Prompt, text: str) -> float:
    """1 if every number and name stands in FAQ entry or question, a half for one that doesn't, and
    so on. An answer without any key word of the entry, and without a yes or no, says nothing about
    it and earns nothing."""
    known = "\n".join(m["content"] for m in prompt.messages if m["role"] == "user")
    known += "\n" + known.replace("'s", "")  # "Rosa" is named where "Rosa's Bed and Breakfast" is
    numbers = {quantity.value for quantity in quantities(tokens(known))}
    stated = [q.value for q in quantities(tokens(text))]
    # "one of our team" counts nothing.
    strange = [value for value in stated if value not in numbers and value != "1"]
    strange += ungrounded_names(text, known)
    answer = tokens(text)
    if not content(answer) & content(tokens(prompt.context or "")) and _opening(answer) is None:
        return 0.0
    return float(_DISCOUNT ** len(strange))


def problem_solution(prompt: Prompt, text: str) -> float:
    """1 if one full sentence, no question, tells at least half of the FAQ entry; a half if only the
    sentences together do, or in doubt; else 0."""
    statements = _statements(text)
    lines = [tokens(line) for line in statements]
    listing = not is_prose(tokens(prompt.context or ""))  # an entry that is all list has no prose
    told = [line for line in lines if (listing or is_prose(line)) and len(line) > 2]
    best = max((_recall(prompt, line) for line in told), default=0.0)
    together = _recall(prompt, tokens("\n".join(statements)))
    if best >= _TOLD_SHARE:
        return _DISCOUNT if _DOUBT.search(text) else 1.0
    return _DISCOUNT if together >= _TOLD_SHARE else 0.0


def style(prompt: Prompt, completion: Completion) -> float:
    """The mean of the demo's house rules, in the same words."""
    excused = " ".join(m["content"] for m in prompt.messages)
    return house_rules.mean_of_rules(completion.text, excused, completion.finish_reason)


def _question(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"].rpartition("Question:")[2].strip()


def _statements(text: str) -> list[str]:
    """The sentences that state something: an offer to book a room states nothing about rooms."""
    return [line for line in sentences(text) if not line.endswith("?")]


def _opening(answer: Sequence[Token]) -> bool | None:
    """True for an answer that opens with yes, False for no, None for neither."""
    first = answer[0].text if answer else ""
    return {"yes": True, "no": False}.get(first)


def _denies(stream: Sequence[Token]) -> bool:
    """Whether a FAQ entry answers "no": it opens so, or its first clause holds a negation."""
    opening = _opening(stream)
    if opening is not None:
        return not opening
    return any(is_negator(t.text) for t in stream if t.clause == stream[0].clause)


def _recall(prompt: Prompt, answer: Sequence[Token]) -> float:
    """The weighted share of the FAQ entry's key words that the answer states as the entry does."""
    passage = tokens(prompt.context or "")
    keys = _polarities(passage)
    place = content(tokens(str(prompt.metadata.get("entity") or "")))
    specific = {k: v for k, v in keys.items() if k not in _AVAILABILITY and k not in place}
    keys = specific or keys
    found = _polarities(answer)
    weights = {key: _NUMBER_WEIGHT if is_number(key) else 1.0 for key in keys}
    held = sum(w for key, w in weights.items() if key in found and found[key] <= keys[key])
    total = sum(weights.values())
    return held / total if total else 0.0


def _polarities(stream: Sequence[Token]) -> dict[str, set[bool]]:
    """Every content word's stem with whether it is affirmed (True), denied (False), or both."""
    # "not" denies its whole clause, the subject before it too; "no" only what follows it.
    denied = {t.clause for t in stream if t.text in _VERB_NEGATORS or t.text.endswith("n't")}
    carried = content(stream)
    found: dict[str, set[bool]] = {}
    for index, token in enumerate(stream):
        key = stem(token.text)
        if key in carried:
            affirmed = not (token.clause in denied or negated(stream, index))
            found.setdefault(key, set()).add(affirmed)
    return found


@cache
def _chrf() -> CHRF:
    return CHRF()


def _overlap(text: str, references: list[str]) -> float | None:
    kept = [reference for reference in references if words(reference)]
    if not kept:
        return None
    score = float(_chrf().sentence_score(text, kept).score) / 100.0
    return min(1.0, max(0.0, score))  # chrF of equal texts can be a rounding error above 1
