"""Score an answer of the support desk on four dimensions, each in [0, 1].

* correctness: the asked fact is stated, and stated as true.
* groundedness: nothing is stated that the passage lacks (numbers, names, contact details).
* problem_solution: the customer is told what to do.
* style: the desk's house rules.

None means that the prompt holds nothing to judge by, never that the answer is hard to judge. All
rules are string rules, so each has a cheat it was written against; the docstrings name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from rollout.support_desk import house_rules
from rollout.support_desk.grounding import COMPANY, LIST_MARK, checkable_items
from rollout.support_desk.wording import (
    ANSWER_PROSE,
    IMPERATIVES,
    Quantity,
    Tokens,
    content,
    find,
    find_loose,
    is_negator,
    is_prose,
    negated,
    quantities,
    sentences,
    stem,
    tidy,
    tokens,
    vocabulary,
    words,
)

DUMP_SPAN: Final = 5
DUMP_SHARE: Final = 0.7
MAX_REPEATS: Final = 3
DISCOUNT: Final = 0.5
UNGROUNDED_CAP: Final = 0.5
# How far an answer's overlap with the passage, in new content words, lets groundedness rise.
SUPPORT_RAMP: Final = (0.0, 0.4, 0.7, 1.0)

_DOUBT: Final = re.compile(
    r"\b(?:i|we) (?:do not|don't|cannot|can't) (?:know|say|tell|be sure|help|answer)|"
    r"\bnot (?:entirely |quite |completely )?(?:sure|certain)|\bas an ai\b|"
    r"\b(?:unable|not able) to (?:help|answer|assist|say)|\bno idea\b|"
    r"\b(?:maybe|perhaps|possibly|probably|i think|i guess|i believe)\b",
    re.IGNORECASE,
)  # fmt: skip
LEAD_INS: Final = vocabulary("so and then also but simply just first next or now")
_ADDRESS: Final = vocabulary("you your yours we we'll you'll us our please")


class PromptLike(Protocol):
    """What the verifiers read of a prompt record."""

    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...
    @property
    def context(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class CompletionLike(Protocol):
    """What the verifiers read of a completion."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...


def question_of(prompt: PromptLike) -> str:
    """The customer's own words: the last user message, from "Question:" on."""
    asked = [m["content"] for m in prompt.messages if m.get("role") == "user"]
    return asked[-1].rpartition("Question:")[2].strip() if asked else ""


def passage_of(prompt: PromptLike) -> str:
    """The knowledge passage, empty when the prompt has none."""
    return prompt.context or ""


def verify(prompt: PromptLike, completion: CompletionLike) -> dict[str, float | None]:
    """All four dimensions of one answer."""
    return {
        "correctness": correctness(prompt, completion),
        "groundedness": groundedness(prompt, completion),
        "problem_solution": problem_solution(prompt, completion),
        "style": style(prompt, completion),
    }


def correctness(prompt: PromptLike, completion: CompletionLike) -> float | None:
    """The share of the asked fact's groups that the answer states, discounted where it cheats.

    A group counts when one of its forms stands in the answer undenied, in a sentence rather than
    a heap of keywords, and without a rival ("30 days or maybe 60 days"). The sum is halved for
    each of: the passage copied out, the fact repeated over and over, doubt voiced, more quantities
    strewn around the fact than the passage puts there.
    """
    groups = prompt.metadata.get("fact")
    if not groups:
        return None
    passage = tokens(passage_of(prompt))
    answer = tokens(LIST_MARK.sub("", completion.text))
    known = passage + tokens(question_of(prompt))
    lines = [tokens(s) for s in sentences(LIST_MARK.sub("", completion.text))]
    score = sum(_stated(group, answer, lines, passage, known) for group in groups) / len(groups)
    if copied_share(passage_of(prompt), completion.text) > DUMP_SHARE:
        score *= DISCOUNT
    if any(len(find(form, answer)) > MAX_REPEATS for group in groups for form in group):
        score *= DISCOUNT
    if _DOUBT.search(tidy(completion.text)):
        score *= DISCOUNT
    if _strewn(groups, lines, passage_of(prompt)):
        score *= DISCOUNT
    return score


def _stated(
    group: Sequence[str],
    answer: Tokens,
    lines: Sequence[Tokens],
    passage: Tokens,
    known: Tokens,
) -> float:
    """How well one group is stated: 1, half in a keyword heap, 0 absent, denied or rivalled."""
    best = 0.0
    for form in group:
        passage_denies = any(negated(passage, at) for at in find(form, passage))
        places = _places(form, group, answer)
        if not places or _rivalled(form, answer, places, passage, known):
            continue
        # One denial outweighs a statement elsewhere: "30 days. It is not 30 days." says nothing.
        if not passage_denies and any(negated(answer, at) for at in places):
            continue
        holding = [line for line in lines if find(form, line)]
        prose = is_prose(answer, ANSWER_PROSE) and any(is_prose(line) for line in holding)
        best = max(best, 1.0 if prose else DISCOUNT)
    return best


def _places(form: str, group: Sequence[str], answer: Tokens) -> list[int]:
    """Where a form stands; a bare "3" beside "3 floors" does not stand in "3 hours"."""
    places = find(form, answer)
    bare = words(form)
    if len(bare) != 1 or not any(len(words(other)) > 1 for other in group):
        return places
    counted = {q.index for q in quantities(answer) if q.unit not in (None, "£")}
    return [at for at in places if at not in counted]


def _rivalled(form: str, answer: Tokens, places: list[int], passage: Tokens, known: Tokens) -> bool:
    """Whether the answer also gives another value in the fact's unit that the prompt lacks, or
    offers one as an alternative by "or" that the passage does not offer."""
    grounded = {(q.value, q.unit) for q in quantities(known)}
    stated = quantities(answer)
    span = len(words(form))
    own = [q for q in stated if any(at <= q.index < at + span for at in places)]
    own_values = {(q.value, q.unit) for q in own}
    for fact in own:
        for other in stated:
            same_kind = other.unit == fact.unit and fact.unit is not None
            if not same_kind or (other.value, other.unit) in own_values:
                continue
            if (other.value, other.unit) not in grounded:
                return True
            if _joined_by_or(fact, other, answer) and not _offers_both(fact, other, passage):
                return True
    return False


def _joined_by_or(one: Quantity, two: Quantity, stream: Tokens) -> bool:
    low, high = sorted((one.index, two.index))
    between = [token.text for token in stream[low:high]]
    return len(between) <= 7 and bool({"or", "maybe", "perhaps"} & set(between))


def _offers_both(one: Quantity, two: Quantity, passage: Tokens) -> bool:
    found = quantities(passage)
    pairs = [(a, b) for a in found for b in found if a.value == one.value and b.value == two.value]
    return any(_joined_by_or(a, b, passage) for a, b in pairs)


def _strewn(groups: Sequence[Sequence[str]], lines: Sequence[Tokens], context: str) -> bool:
    """Whether the fact's sentence holds more numbers than any sentence of the passage, plus one:
    the answer that lists every number in sight to be sure of hitting the right one."""
    usual = max((len(quantities(tokens(s))) for s in sentences(context)), default=0)
    holding = [line for line in lines if any(find(f, line) for group in groups for f in group)]
    return any(len({q.value for q in quantities(line)}) > usual + 1 for line in holding)


def copied_share(passage: str, text: str) -> float:
    """The share of the passage's five-word spans that the text holds: 1 for a verbatim copy."""
    source, copy = words(passage), words(text)
    spans = {tuple(source[i : i + DUMP_SPAN]) for i in range(len(source) - DUMP_SPAN + 1)}
    held = {tuple(copy[i : i + DUMP_SPAN]) for i in range(len(copy) - DUMP_SPAN + 1)}
    return len(spans & held) / len(spans) if spans else 0.0


def groundedness(prompt: PromptLike, completion: CompletionLike) -> float | None:
    """1 minus the share of checkable items that neither passage nor question has.

    One ungrounded item already caps the score at a half, below any sensible floor: an invented
    phone number is no less invented for standing among true ones. An answer earns the full score
    only as it shares content words with the passage that the question did not hand it, so
    silence, small talk and echoing the question are worth nothing.
    """
    if not passage_of(prompt).strip():
        return None
    question = question_of(prompt)
    passage = tokens(passage_of(prompt))
    asked = tokens(question)
    answer = tokens(completion.text)
    shared = (content(answer) & content(passage)) - content(asked)
    support = SUPPORT_RAMP[min(len(shared), len(SUPPORT_RAMP) - 1)]
    items = checkable_items(completion.text, passage + asked, f"{passage_of(prompt)} {question}")
    wrong = items.count(False)
    if not wrong:
        return support
    return min(UNGROUNDED_CAP, 1.0 - wrong / len(items)) * support


def problem_solution(prompt: PromptLike, completion: CompletionLike) -> float | None:
    """1 when a sentence tells the customer one of the expected actions, half when the action is
    only mentioned, 0 when it is missing or denied. Questions tell nobody what to do, and an answer
    that declares itself unable to help is worth half at most."""
    actions = prompt.metadata.get("action")
    if not actions:
        return None
    passage = tokens(passage_of(prompt))
    first_verbs = {stem(words(action)[0]) for action in actions if words(action)}
    best = 0.0
    for sentence in sentences(LIST_MARK.sub("", completion.text)):
        stream = tokens(sentence)
        told = [action for action in actions if _told(action, stream, passage)]
        if not told:
            continue
        asking = sentence.endswith("?")
        addressed = not asking and is_prose(stream) and _addressed(stream, first_verbs)
        best = max(best, 1.0 if addressed else (0.0 if asking else DISCOUNT))
    if _DOUBT.search(tidy(completion.text)):
        best = min(best, DISCOUNT)
    return best


def _told(action: str, stream: Tokens, passage: Tokens) -> bool:
    """Whether a sentence names an action without denying it (unless the passage denies it too)."""
    places = find_loose(action, stream)
    if any(is_negator(word) for word in words(action)):
        return bool(places)
    if any(negated(passage, at) for at in find_loose(action, passage)):
        return bool(places)
    return any(not negated(stream, at) for at in places)


def _addressed(stream: Tokens, first_verbs: set[str]) -> bool:
    """Whether a sentence speaks to the customer: you, we, or a clause that opens as an order."""
    if any(token.text in _ADDRESS for token in stream):
        return True
    opening = True
    for place, token in enumerate(stream):
        opening = opening or stream[place - 1].clause != token.clause
        if opening and (token.text in IMPERATIVES or stem(token.text) in first_verbs):
            return True
        # "so press", "and then press": the little word leaves the order in first place.
        opening = opening and token.text in LEAD_INS
    return False


def style(prompt: PromptLike, completion: CompletionLike) -> float | None:
    """The mean of the house rules; 0 for an answer without words."""
    excused = f"{passage_of(prompt)} {question_of(prompt)} {COMPANY}"
    return house_rules.mean_of_rules(completion.text, excused, completion.finish_reason)
