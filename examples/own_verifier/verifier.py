"""A verifier of one's own, and an audit judge: questions about the minutes of a meeting.

A judge is a function of a prompt and a completion that gives each dimension a score in [0, 1], or
None where it can't tell. Its tests (tests/test_own_verifier.py) are its certificate: write them
first, with the wrong and cheating answers that you can think of.
"""

from __future__ import annotations

import re

from rlhf import Completion, Prompt

NEGATIONS = {"not", "no", "never", "nobody", "none", "neither", "nor"}
SHORT, LONG = 20, 60
"""Words up to which style is 1, and from which it is 0."""


def verify(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """`correctness`: names the reference and nothing else that it could be. `style`: is short."""
    answer = words(completion.text)
    brevity = min(1.0, max(0.0, (LONG - len(answer)) / (LONG - SHORT)))
    style = 0.0 if completion.finish_reason == "length" else brevity
    if prompt.reference is None:
        # No reference, no verdict: a made-up score would train something.
        return {"correctness": None, "style": style}
    right = names(answer, prompt.reference)
    # Whoever names every person of the minutes has named the right one too.
    hedged = any(names(answer, rival) for rival in prompt.metadata["rivals"])
    # None of these questions is answered by a denial.
    denied = any(word in NEGATIONS or word.endswith("n't") for word in answer)
    return {"correctness": float(right and not hedged and not denied), "style": style}


def sentence(prompt: Prompt, completion: Completion) -> dict[str, float | None]:
    """An audit: is it a sentence? It trains nothing, so it shows if `style` is gamed by fragments.

    The mean of three rules: opens with a capital or a figure, ends with a full stop, has at least
    four words.
    """
    text = completion.text.strip()
    rules = (
        bool(re.match(r"[A-Z\d]", text)),
        text.endswith("."),
        len(text.split()) >= 4,
    )
    return {"sentence": sum(rules) / len(rules)}


def words(text: str) -> list[str]:
    """Words in lower case, without articles; `16th` is `16`.

    >>> words("On the 16th of September.")
    ['on', '16', 'of', 'september']
    """
    plain = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text.lower().replace("’", "'"))
    return [word for word in re.findall(r"[\w']+", plain) if word not in ("the", "a", "an")]


def names(answer: list[str], phrase: str) -> bool:
    """Whether the phrase's words stand together, a date also as `September 16`.

    >>> names(words("We meet on September 16th."), "16 September")
    True
    >>> names(words("We meet on 16 September."), "6 September")
    False
    """
    wanted = words(phrase)
    forms = [wanted, wanted[::-1], [wanted[0], "of", *wanted[1:]]]
    if not wanted[0].isdecimal():
        forms = [wanted]
    return any(
        answer[start : start + len(form)] == form
        for form in forms
        for start in range(len(answer) - len(form) + 1)
    )
