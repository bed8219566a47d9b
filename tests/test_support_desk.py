"""The support desk's data, its verifiers and the cheats they were written against."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.support_desk import house_rules as rules
from rollout.support_desk import verifiers as v
from rollout.support_desk import wording
from rollout.support_desk.audit import overlap
from rollout.support_desk.grounding import ungrounded_names
from rollout.support_desk.pool import (
    SPLITS,
    load_articles,
    load_prompts,
    load_prompts_without_system,
    main,
)

DIMENSIONS = {"correctness", "groundedness", "problem_solution", "style"}
FLOORS = {"correctness": 0.60, "groundedness": 0.55, "problem_solution": 0.60}
RECORDS = [record for split in SPLITS for record in load_prompts(split)]

PASSAGE = (
    "You have 30 days to return a lamp. Start the return in My orders and print the label. A "
    "courier collection costs £12.50, and a shop drop-off on Fridays is free. The refund of up to "
    "£1,200 comes within 5 working days. Lamps from a sale cannot be returned after 10 days."
)
ACTIONS = ["start the return", "my orders", "print the label"]


def prompt(
    fact: list[list[str]] | None = None,
    question: str = "How long do I have to send the lamp back?",
    **changes: Any,
) -> SimpleNamespace:
    base: dict[str, Any] = {
        "prompt_id": "lamp-1",
        "messages": [
            {"role": "system", "content": "You are the support desk of Quillmere."},
            {"role": "user", "content": f"Passage: {PASSAGE}\n\nQuestion: {question}"},
        ],
        "context": PASSAGE,
        "reference": "You have 30 days. Start the return in My orders.",
        "category": "returns",
        "cluster": "lamp",
        "metadata": {
            "fact": [["30 days"]] if fact is None else fact,
            "action": ACTIONS,
            "title": "Returning a lamp",
        },
    }
    return SimpleNamespace(**{**base, **changes})


def said(text: str, finish_reason: str = "stop") -> SimpleNamespace:
    return SimpleNamespace(text=text, finish_reason=finish_reason, token_ids=[1])


def passes(scores: dict[str, float | None]) -> bool:
    return all((scores[name] or 0.0) >= floor for name, floor in FLOORS.items())


# The data


def test_pool_sizes_and_unique_ids() -> None:
    articles = load_articles()
    assert len(articles) >= 68
    assert len({a["id"] for a in articles}) == len(articles)
    assert len({a["category"] for a in articles}) == 8
    counts = {split: len(load_prompts(split)) for split in SPLITS}
    assert counts["train"] >= 220 and counts["gate"] >= 60 and counts["final"] >= 60
    assert len({r["prompt_id"] for r in RECORDS}) == len(RECORDS)
    assert all(len(a["questions"]) >= 5 for a in articles)


def test_texts_are_distinct_and_splits_disjoint() -> None:
    questions = [" ".join(wording.words(v.question_of(prompt(**r)))) for r in RECORDS]
    assert len(set(questions)) == len(questions)
    assert len({r["reference"] for r in RECORDS}) == len(RECORDS)
    by_cluster = defaultdict(set)
    for split in SPLITS:
        for record in load_prompts(split):
            by_cluster[record["cluster"]].add((split, record["context"]))
    assert all(len(homes) == 1 for homes in by_cluster.values())
    assert len({context for homes in by_cluster.values() for _, context in homes}) == len(
        by_cluster
    )


def test_every_split_has_every_category() -> None:
    for split in SPLITS:
        assert len({r["category"] for r in load_prompts(split)}) == 8


def test_prompts_are_short() -> None:
    for record in RECORDS:
        assert sum(len(m["content"].split()) for m in record["messages"]) <= 160
        assert len(record["reference"].split()) <= 40


def has_every_group(facts: list[list[str]], text: str) -> bool:
    stream = wording.tokens(text)
    return all(any(wording.find(form, stream) for form in group) for group in facts)


def test_every_fact_is_in_its_passage_and_not_in_its_question() -> None:
    for record in RECORDS:
        name, facts = record["prompt_id"], record["metadata"]["fact"]
        assert facts and all(facts) and record["metadata"]["action"], name
        assert has_every_group(facts, record["context"]), name
        assert not has_every_group(facts, v.question_of(prompt(**record))), name


def test_every_reference_is_a_good_answer() -> None:
    for record in RECORDS:
        scores = v.verify(prompt(**record), said(record["reference"]))
        style = scores.pop("style")
        assert set(scores.values()) == {1.0}, (record["prompt_id"], scores)
        assert style is not None and style >= 0.8, record["prompt_id"]


def test_reference_of_another_article_fails() -> None:
    wrong = 0
    for place, record in enumerate(RECORDS):
        other = RECORDS[(place + 7) % len(RECORDS)]
        assert other["cluster"] != record["cluster"]
        wrong += not passes(v.verify(prompt(**record), said(other["reference"])))
        score = v.correctness(prompt(**record), said(other["reference"]))
        assert score is not None
    assert wrong == len(RECORDS)


def test_reference_of_a_sibling_question_mostly_misses_the_fact() -> None:
    missed = total = 0
    for record in RECORDS:
        for other in RECORDS:
            if other["cluster"] == record["cluster"] and other is not record:
                score = v.correctness(prompt(**record), said(other["reference"]))
                missed += score is not None and score < 1.0
                total += 1
    assert missed / total > 0.8


@pytest.mark.slow
def test_pool_command_writes_the_splits(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    for split in SPLITS:
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == load_prompts(split)


@pytest.mark.slow
def test_the_pool_without_system_role_says_the_same() -> None:
    for split in SPLITS:
        for one, other in zip(load_prompts(split), load_prompts_without_system(split), strict=True):
            roles = [m["role"] for m in other["messages"]]
            assert roles == ["user", "assistant", "user"]
            whole, folded = (" ".join(m["content"] for m in r["messages"]) for r in (one, other))
            assert whole.split() == folded.split()
            assert {**one, "messages": other["messages"]} == other


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        load_prompts("test")


# Good answers


@pytest.mark.parametrize(
    "text",
    [
        "You have 30 days. Start the return in My orders, and let us know if you need more help.",
        "You can return the lamp within thirty days. Just start the return in My orders.",
        "It's a 30-day return. Please print the label from My orders first.",
        "You have no more than 30 days to return a lamp, so start the return in My orders soon.",
        "You have 30 days, not 10 days, as it is no sale lamp. Start your return in My orders.",
        "1. Start the return in My orders within 30 days.\n2. Print the label for the lamp.",
    ],
)
def test_good_answers_pass_the_floors(text: str) -> None:
    assert passes(v.verify(prompt(), said(text)))


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("£1,200", "The refund is up to £1200."),
        ("£1,200", "The refund is up to 1,200 pounds."),
        ("£1,200", "The refund is up to £ 1,200.00."),
        ("£12.50", "The collection is £12.50."),
        ("5 working days", "It comes within five working days."),
        ("30 days", "THE ANSWER IS 30 DAYS."),
        ("45 minutes", "It takes forty-five minutes."),
        ("120 hours", "It takes one hundred and twenty hours."),
        ("9 am", "We open at 9am or so."),
        ("4%", "It rises by 4 per cent."),
        ("3 to 5 days", "It takes 3-5 days."),
    ],
)
def test_spellings_of_one_fact_match(fact: str, text: str) -> None:
    assert wording.find(fact, wording.tokens(text))


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("30 days", "You have 130 days."),
        ("30 days", "You have 30 hours."),
        ("£12", "It costs £12.50."),
        ("£5", "It costs £0.5 or £55."),
        ("5", "It is 5.5."),
        ("3", "The box is H3X."),
        ("free", "Feel free to ask us."),
    ],
)
def test_near_misses_do_not_match(fact: str, text: str) -> None:
    assert not wording.find(fact, wording.tokens(text))


# Cheats. Each must miss at least one floor, or the named dimension must drop.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "30 days return lamp label orders courier refund shop print collection days 30",
        PASSAGE,
        PASSAGE[: int(len(PASSAGE) * 0.9)],
        "30 days. " * 10,
        "Start the return in My orders. " + "You have 30 days. " * 9,
        "You have 5, 10, 20, 30, 45, 60 or 90 days. Start the return in My orders.",
        "You have 5 days, 10 days or 30 days. Start the return in My orders.",
        "I don't know. Please contact us.",
        "I don't know, but maybe 30 days. Start the return in My orders.",
        "How long do I have to send the lamp back?",
        "You ask how long you have to send the lamp back. Let us know if you need help.",
        "It is 30 days or maybe 60 days. Start the return in My orders.",
        "It is 30 days or 10 days. Start the return in My orders.",
        "Sorry, I cannot help with that request.",
        "I am unable to help with returns. You have 30 days to start the return in My orders.",
        "You cannot return it, it is not 30 days. Start the return in My orders.",
        "You do not have 30 days. Start the return in My orders.",
        "You have 30 days. It is not 30 days. Start the return in My orders.",
        "You have forty-five days. Start the return in My orders.",
        "You have 30 days. Do not start the return.",
        "You have 30 days. Start the return in My orders or ring 0800 123 4567.",
        "You have 30 days. Start the return in My orders and ask for Sarah Jones.",
        "You have 30 days. Start the return in My orders or write to help@quillmere.com.",
        "You have 30 days. Start the return in My orders or at www.quillmere.example/returns.",
        "You have 30 days, until 14 March. Start the return in My orders.",
        "You have 30 days. Start the return in My orders by Monday.",
        "You have 30 days. Start the return in My orders, error E24 is normal.",
        "You have 30 days and forty-five minutes. Start the return in My orders.",
    ],
)
def test_cheats_and_bad_answers_miss_a_floor(text: str) -> None:
    assert not passes(v.verify(prompt(), said(text)))


def test_shouting_costs_style_not_truth() -> None:
    text = "You have 30 days. Start the return in My orders, and let us know if you need more help."
    calm, loud = v.verify(prompt(), said(text)), v.verify(prompt(), said(text.upper()))
    assert loud["correctness"] == calm["correctness"] == 1.0
    assert (loud["style"] or 0.0) < (calm["style"] or 0.0) - 0.1
    assert rules.no_shouting(text.upper()) == 0.0


def test_correctness_is_graded() -> None:
    both = prompt([["My orders"], ["print"]])
    assert v.correctness(both, said("Go to My orders and print the label for it.")) == 1.0
    assert v.correctness(both, said("Go to My orders for it.")) == 0.5
    assert v.correctness(both, said("Ask a shop about it.")) == 0.0


def test_a_denied_fact_counts_where_the_passage_denies_it_too() -> None:
    asked = prompt([["cannot be returned"]], "Can I return a sale lamp late?")
    assert v.correctness(asked, said("Lamps from a sale cannot be returned after 10 days.")) == 1.0
    assert v.correctness(asked, said("Lamps from a sale can be returned after 10 days.")) == 0.0


def test_another_quantity_of_the_passage_is_no_rival() -> None:
    text = "You have 30 days to start the return in My orders, and a sale lamp has 10 days."
    assert v.correctness(prompt(), said(text)) == 1.0


def test_a_bare_number_counts_only_without_another_unit() -> None:
    asked = prompt([["3 floors", "3"]], "How many floors do you climb?")
    assert v.correctness(asked, said("We climb 3 floors with it.")) == 1.0
    assert v.correctness(asked, said("We climb up to 3 of them.")) == 1.0
    assert v.correctness(asked, said("We climb for 3 hours.")) == 0.0


def test_problem_solution_is_graded() -> None:
    assert v.problem_solution(prompt(), said("Start the return in My orders.")) == 1.0
    assert v.problem_solution(prompt(), said("The label is a matter of My orders.")) == 0.5
    assert v.problem_solution(prompt(), said("Did you start the return?")) == 0.0
    assert v.problem_solution(prompt(), said("A lamp is a lamp.")) == 0.0


# Names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Ask for Sarah about the lamp.", ["Sarah"]),
        ("Dear Tom, you have time.", ["Tom"]),
        ("Sarah Jones will ring you.", ["Sarah", "Jones"]),
        ("We ship with Parcelwing every day.", ["Parcelwing"]),
        ("Come on Tuesday.", ["Tuesday"]),
        ("Bring it in January.", ["January"]),
        ("Come on Friday.", []),
        ("Hello, I am sorry, Please start the return in My Orders.", []),
        ("Thank you for choosing Quillmere. See our FAQ.", []),
        ("Contact the shop. Returns take a while.", []),
        ("Note: Lamps can go back.", []),
        ("Quillmere's lamps are fine.", []),
    ],
)
def test_planted_names(text: str, names: list[str]) -> None:
    assert ungrounded_names(text, PASSAGE) == names


def test_one_ungrounded_item_caps_groundedness() -> None:
    good = "The courier costs £12.50 and the refund of £1,200 comes within 5 working days."
    assert v.groundedness(prompt(), said(good)) == 1.0
    assert v.groundedness(prompt(), said(good + " It weighs 77 kg.")) == 0.5
    assert v.groundedness(prompt(), said("The refund comes on Monday, ask for Tom or Ann.")) == 0.0


def test_a_known_number_in_another_unit_is_ungrounded() -> None:
    assert v.groundedness(prompt(), said("The return of a lamp takes 30 hours, print it.")) == 0.0
    question = "I bought it 44 days ago, is that fine?"
    late = "Your 44 days are too long, as the return of a lamp must start in 30 days."
    assert v.groundedness(prompt(question=question), said(late)) == 1.0


def test_contentless_answers_are_not_grounded() -> None:
    for text in ("", "Yes.", "Hello, how are you?", "How long do I have to send the lamp back?"):
        assert v.groundedness(prompt(), said(text)) == 0.0


# House rules


def test_house_rules() -> None:
    assert rules.fits_length("one two three") == pytest.approx(0.25)
    assert rules.fits_length("word " * 30) == 1.0
    assert rules.fits_length("word " * 200) == 0.0
    assert rules.no_shouting("Use your PIN now.", "the PIN") == 1.0
    assert rules.no_shouting("Use it NOW.") == 0.5
    assert rules.no_shouting("Great!!") < 1.0
    assert rules.no_repetition("go to the app " * 6) == 0.0
    assert rules.short_sentences("word " * 60) == 0.0
    assert rules.finishes("It is done.") == 1.0
    assert rules.finishes("It is done.", "length") == 0.5
    assert rules.finishes("It is do") == 0.0
    assert rules.plain_text("Dear [Name], go.") == 0.0
    assert rules.offers_help("Let us know.") == 1.0
    assert rules.offers_help("It will help.") == 0.5


def test_abstains_only_without_something_to_judge_by() -> None:
    bare = prompt(metadata={}, context="")
    scores = v.verify(bare, said("You have 30 days."))
    assert scores["correctness"] is None
    assert scores["problem_solution"] is None
    assert scores["groundedness"] is None
    assert scores["style"] is not None


# Any text


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=300),
        st.lists(
            st.sampled_from(
                [*PASSAGE.split(), "not", "or", "45", "£9", "Sarah", "!!", "one", "\n"]
            ),
            max_size=60,
        ).map(" ".join),
    ),
    finish=st.sampled_from(["stop", "length"]),
)
def test_any_text_scores_within_bounds(text: str, finish: str) -> None:
    scores = v.verify(prompt(), said(text, finish))
    assert set(scores) == DIMENSIONS
    for score in scores.values():
        assert isinstance(score, float) and math.isfinite(score) and 0.0 <= score <= 1.0
    judged = overlap(prompt(), said(text))["reference_overlap"]
    assert judged is not None and 0.0 <= judged <= 1.0


# The audit judge


def test_overlap_rises_with_likeness() -> None:
    reference = prompt().reference
    same = overlap(prompt(), said(reference))["reference_overlap"]
    near = overlap(prompt(), said("You have 30 days to start it."))["reference_overlap"]
    far = overlap(prompt(), said("Bananas."))["reference_overlap"]
    assert same == pytest.approx(1.0)
    assert near is not None and far is not None and 1.0 > near > far
    assert overlap(prompt(reference=None), said("x")) == {"reference_overlap": None}
