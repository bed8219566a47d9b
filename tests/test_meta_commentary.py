"""The detector of meta-commentary: its measured rates, and what a verdict makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import pytest

from rlhf.meta_commentary import Rates, Share, commentary, labelled, measured, refusal

DATA = os.environ.get("PAIRLOOP_DATA")


def found(answer: str, prompt: str = "") -> str | None:
    table = pl.DataFrame({"answer": [answer], "prompt": [prompt]})
    words: str | None = table.select(commentary(pl.col("answer"), pl.col("prompt"))).item()
    return words


def test_the_labels_are_many_distinct_and_of_both_kinds() -> None:
    measure, tune = labelled("measure"), labelled("tune")
    assert measure.height >= 200
    answers = pl.concat([measure, tune]).select("answer", "prompt")
    assert answers.n_unique() == answers.height, "a label in both parts would measure its tuning"
    honest = measure.filter(~pl.col("meta"))["answer"]
    assert honest.str.contains(r"^I would ").sum() >= 15
    assert honest.str.contains(r"^I'd ").sum() >= 10
    assert measure["meta"].sum() >= 100


def test_measured_rates() -> None:
    rates = measured()
    assert rates.positives + rates.negatives == labelled("measure").height
    # Known figures, as README states them: whoever changes a pattern sees what it did.
    assert (rates.true_positives, rates.positives) == (94, 125)
    assert (rates.false_positives, rates.negatives) == (4, 160)
    assert rates.precision == pytest.approx(94 / 98)
    assert rates.recall == pytest.approx(94 / 125)


def test_what_patterns_were_tuned_on_is_found() -> None:
    tuned = measured("tune")
    assert (tuned.true_positives, tuned.false_positives) == (tuned.positives, 0)


@pytest.mark.parametrize("answer", ["I would take the train.", "I'd use two eggs.", "Here is it."])
def test_an_answer_in_the_first_person_is_an_answer(answer: str) -> None:
    assert found(answer) is None


def test_who_asks_for_a_rewrite_gets_one() -> None:
    answer = "Here is a revised version of your email:\n\nDear all"
    assert found(answer, "Please rewrite my email.") is None
    assert found("Here is a revised answer: Dear all", "Where do I send it?") is not None
    assert found("As an AI language model, I can't.", "Please rewrite my email.") is not None
    assert found("I am a language model.", "Are you a bot?") is None


def test_curly_apostrophes_are_apostrophes() -> None:
    assert found("I’m just an AI, so I can’t.") == "I'm just an AI"


def test_correction_takes_out_the_detectors_errors() -> None:
    rates = Rates(80, 100, 0, 100, 10, 1000)
    # 5% meta among 1000: 0.05 * 0.8 flagged rightly, 0.95 * 0.01 wrongly.
    share = rates.corrected(0.05 * 0.8 + 0.95 * 0.01)
    assert share.value == pytest.approx(0.05)
    assert share.low < 0.05 < share.high
    assert rates.corrected(0.0) == Share(0.0, 0.0, 0.0)
    assert rates.corrected(1.0).value == 1.0


def test_a_verdict_waits_for_what_the_rates_allow() -> None:
    assert Share(0.01, 0.008, 0.015).verdict(0.02) == "pass"
    assert Share(0.018, 0.012, 0.025).verdict(0.02) == "inconclusive"
    assert Share(0.04, 0.03, 0.05).verdict(0.02) == "fail"


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide medical advice.", True),
        ("Sorry, I'm not interested in helping you with that.", True),
        ("I’m unable to assist with this request.", True),
        ("I'm sorry to hear that. Try a warm bath.", False),
        ("I can't wait to see Rome either! Start at the Forum.", False),
        ("You can't return it after 30 days.", False),
    ],
)
def test_refusals(answer: str, declines: bool) -> None:
    table = pl.DataFrame({"answer": [answer]})
    assert table.select(refusal(pl.col("answer"))).item() is declines


def ordinary(data: Path) -> list[tuple[str, str]]:
    """Prompt and answer of the public answers that the packaged counts speak of."""
    rows: list[tuple[str, str]] = []
    demo = data / "llamafactory_pref_demo"
    for record in json.loads((demo / "dpo_en_demo.json").read_text()):
        prompt = " ".join(t["value"] for t in record["conversations"] if t["from"] == "human")
        rows += [(prompt, record[side]["value"]) for side in ("chosen", "rejected")]
    for record in json.loads((demo / "kto_en_demo.json").read_text()):
        asked = [m["content"] for m in record["messages"] if m["role"] == "user"]
        rows.append((" ".join(asked), record["messages"][-1]["content"]))
    for record in json.loads((data / "pandalm_human_judgements/human.json").read_text()):
        prompt = f"{record['instruction']} {record['input']}"
        rows += [(prompt, record[f"response{i}"]) for i in (1, 2)]
    for name, prompt, answers in (
        ("hhh_alignment/hhh_alignment.jsonl", "prompt", ("chosen", "rejected")),
        ("llmbar/llmbar.jsonl", "input", ("output_1", "output_2")),
        ("prometheus_mtbench_scores/mtbench_absolute_scores.jsonl", "instruction", ("response",)),
        ("dstc9_support/support_responses_val.jsonl", "question", ("agent_response",)),
    ):
        with (data / name).open() as lines:
            for record in map(json.loads, lines):
                rows += [(record[prompt], record[answer]) for answer in answers]
    return [(prompt, answer) for prompt, answer in rows if answer]


@pytest.mark.skipif(DATA is None, reason="PAIRLOOP_DATA is not set")
def test_the_packaged_counts_of_ordinary_answers_are_those_of_the_data() -> None:
    assert DATA is not None
    table = pl.DataFrame(ordinary(Path(DATA)), schema=["prompt", "answer"], orient="row")
    flagged = table.select(commentary(pl.col("answer"), pl.col("prompt")).count()).item()
    assert (table.height, flagged) == (5527, 34)
    assert measured().ordinary == table.height - (flagged - measured().wrongly_flagged)
