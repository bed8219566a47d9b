"""The DSTC9 example: splits share no place, and the verifiers tell good answers from bad."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rlhf.config import RunConfig
from rlhf.types import Completion, Prompt
from rollout.judges.panel import build, score_all
from rollout.prompts import load_pools

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "dstc9"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dstc9_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


prepare, verifiers = module("prepare"), module("verifiers")


def row(number: int, question: str, answer: str, entity: str | None = None) -> dict[str, Any]:
    return {
        "id": f"val-{number}",
        "domain": "hotel" if entity else "train",
        "entity": entity,
        "question": question,
        "answer": answer,
        "agent_response": f"Reply {number}.",
    }


def prompt(question: str, answer: str, entity: str | None = None) -> Prompt:
    splits, _ = prepare.prompts_by_split([row(1, question, answer, entity)])
    (record,) = [record for records in splits.values() for record in records]
    return Prompt(**{**record, "messages": tuple(record["messages"])})


def completion(text: str, finish_reason: Any = "stop") -> Completion:
    return Completion("val-1", 0, text, (), (), (), finish_reason, 0)


def scores(asked: Prompt, text: str) -> dict[str, float]:
    found: dict[str, float] = verifiers.verify(asked, completion(text))
    return found


GYM = prompt("Is there a gym at your hotel?", "Yes, the Grand has a gym.", "THE GRAND")
BYOB = prompt(
    "Is BYOB possible at Golden Wok?", "BYOB is not possible at Golden Wok.", "GOLDEN WOK"
)
DEPOSIT = prompt(
    "What deposit do you ask for?",
    "A security deposit of GBP 50 per night is required at Gonville Hotel.",
    "GONVILLE HOTEL",
)
CARDS = prompt("Which cards do you take?", "Visa, Mastercard and Maestro are accepted.", "HAKKA")
REFUND = prompt(
    "Can I change my ticket after purchase?",
    "No, you have to apply for a refund and purchase another ticket.",
)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (GYM, "Yes, there is a gym at the Grand. Can I help you with anything else?"),
        (GYM, "The Grand does have a gym for its guests."),
        (BYOB, "No, Golden Wok does not allow BYOB. Let me know if you need anything else."),
        (BYOB, "I'm sorry, but BYOB isn't possible there."),
        (DEPOSIT, "We ask for a security deposit of £50 per night."),
        (DEPOSIT, "The security deposit is 50 pounds for each night, per room."),
        (REFUND, "No, please apply for a refund and purchase another ticket."),
    ],
)
def test_a_right_answer_passes_every_floor(asked: Prompt, text: str) -> None:
    found = scores(asked, text)
    assert found["correctness"] >= 0.6, found
    assert found["groundedness"] == 1.0, found
    assert found["problem_solution"] == 1.0, found


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (GYM, "No, there is no gym at the Grand."),
        (GYM, "No, there is a gym at the Grand."),
        (GYM, "The Grand does not have a gym."),
        (GYM, "There is a gym. There is not a gym."),
        (GYM, "Would you like to use the gym?"),
        (GYM, "Yes."),
        (GYM, "Maybe there is a gym, I am not sure."),
        (GYM, "Thank you for your question. How may I help you?"),
        (GYM, ""),
        (GYM, "?!"),
        (BYOB, "Yes, BYOB is possible at Golden Wok."),
        (BYOB, "BYOB is possible at Golden Wok."),
        (BYOB, "Is BYOB possible at Golden Wok?"),
        (DEPOSIT, "A security deposit of £80 is required."),
        (DEPOSIT, "A security deposit is not required."),
        (DEPOSIT, "security deposit 50 night GBP required deposit security 50 £50 night night"),
        (REFUND, "Yes, you can change your ticket."),
        (CARDS, "Visa, Mastercard and Maestro are not accepted."),
    ],
)
def test_a_wrong_empty_or_cheating_answer_stays_below_the_floor(asked: Prompt, text: str) -> None:
    assert scores(asked, text)["correctness"] < 0.6


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (GYM, "No, there is a gym at the Grand."),
        (BYOB, "Yes, BYOB is not possible at Golden Wok."),
        (GYM, "The Grand does not have a gym."),
        (BYOB, "BYOB is possible at Golden Wok."),
        (REFUND, "You do not have to apply for a refund, and never purchase another ticket."),
    ],
)
def test_the_right_words_the_wrong_way_round_earn_nothing(asked: Prompt, text: str) -> None:
    assert scores(asked, text)["correctness"] == 0.0


def test_invented_numbers_and_names_cost_groundedness() -> None:
    right = "We ask for a security deposit of £50 per night"
    assert scores(DEPOSIT, f"{right}.")["groundedness"] == 1.0
    assert scores(DEPOSIT, f"{right}, due 14 days ahead.")["groundedness"] == 0.5
    assert scores(DEPOSIT, f"{right}; ask for Mr Harrington.")["groundedness"] <= 0.5
    assert scores(DEPOSIT, "We look forward to seeing you.")["groundedness"] == 0.0


def test_a_question_alone_tells_the_customer_nothing() -> None:
    told = "We ask for a security deposit of £50 per night"
    assert scores(DEPOSIT, f"{told}.")["problem_solution"] == 1.0
    assert scores(DEPOSIT, f"{told}?")["problem_solution"] == 0.0
    assert scores(DEPOSIT, f"I think {told.lower()}.")["problem_solution"] == 0.5


def test_style_is_the_mean_of_the_house_rules() -> None:
    good = "Yes, there is a gym at the Grand. Let me know if I can help you with anything else."
    assert scores(GYM, good)["style"] == 1.0
    assert scores(GYM, "YES!!! GYM THERE HERE!!!")["style"] < 0.7
    assert verifiers.style(GYM, completion(good, "length")) < 1.0


def test_without_a_faq_entry_the_verifiers_abstain() -> None:
    bare = Prompt("p", ({"role": "user", "content": "Question: Is there a gym?"},))
    assert set(verifiers.verify(bare, completion("Yes.")).values()) == {None}
    assert set(verifiers.audit(bare, completion("Yes.")).values()) == {None}


def test_the_audit_judge_prefers_what_an_agent_said() -> None:
    near = verifiers.audit(GYM, completion("Reply 1."))["agent_overlap"]
    far = verifiers.audit(GYM, completion("Yes, the Grand has a gym."))
    assert near == 1.0
    assert far["agent_overlap"] < 0.3
    assert far["reference_overlap"] == 1.0


def test_duplicates_go_and_their_agents_replies_stay() -> None:
    rows = [
        row(1, "A gym?", "Yes, a gym.", "THE GRAND"),
        row(2, "a  gym?", "Yes, a gym.", "THE GRAND"),
        row(3, "Any gym?", "Yes, a gym.", "THE OTHER"),
        row(4, "Pets?", "Two pets at most."),
    ]
    splits, dropped = prepare.prompts_by_split(rows)
    records = {r["prompt_id"]: r for records in splits.values() for r in records}
    assert set(records) == {"val-1", "val-4"}
    assert dropped == {"duplicates": 1, "shared answers": 1}
    assert records["val-1"]["metadata"]["agent_replies"] == ["Reply 1.", "Reply 2."]
    assert records["val-1"]["cluster"] == "hotel: THE GRAND"
    assert records["val-4"]["cluster"] == "train: Two pets at most."


def test_missing_data_is_bad_input_that_names_the_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAIRLOOP_DATA", str(tmp_path))
    assert prepare.main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "PAIRLOOP_DATA" in said
    assert str(tmp_path / "dstc9_support") in said
    assert not (tmp_path / "out").exists()


def test_the_config_is_valid_and_its_judges_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = yaml.safe_load((EXAMPLE / "dstc9.yaml").read_text(encoding="utf-8"))
    config = RunConfig.model_validate(loaded)
    judges = build([*config.judges.panel, *config.judges.audit], "judges.panel")
    found = score_all(judges, [(GYM, completion("Yes, there is a gym at the Grand."))])
    assert [s.dimension for s in found if s.score is not None] == [
        "correctness",
        "groundedness",
        "problem_solution",
        "style",
        "reference_overlap",
        "agent_overlap",
    ]


def test_the_real_questions_split_apart_and_the_verifiers_tell_them_apart(tmp_path: Path) -> None:
    if "PAIRLOOP_DATA" not in os.environ:
        pytest.skip("PAIRLOOP_DATA is unset: it names the folder that holds dstc9_support/")
    assert prepare.main([str(tmp_path)]) == 0
    loaded = yaml.safe_load((EXAMPLE / "dstc9.yaml").read_text(encoding="utf-8"))
    for split in ("train", "gate", "final"):
        loaded["prompts"][split] = {"path": str(tmp_path / f"{split}.jsonl")}
    pools = load_pools(RunConfig.model_validate(loaded).prompts, 0, None)
    assert {split: counts["kept"] for split, counts in pools.counts.items()} == {
        "train": 582,
        "gate": 223,
        "final": 147,
    }
    assert all(counts["duplicates"] == 0 for counts in pools.counts.values())
    contexts = [{p.context for p in pool} for pool in (pools.train, pools.gate, pools.final)]
    assert not (contexts[0] & contexts[1] or contexts[0] & contexts[2] or contexts[1] & contexts[2])

    asked = pools.gate
    others = [*asked[1:], asked[0]]
    faq = [scores(p, p.context or "")["correctness"] for p in asked]
    agent = [scores(p, p.metadata["agent_replies"][0])["correctness"] for p in asked]
    other = [scores(p, q.context or "")["correctness"] for p, q in zip(asked, others, strict=True)]
    echo = [scores(p, p.messages[-1]["content"].rpartition("Question:")[2]) for p in asked]
    assert min(faq) == 1.0
    assert sum(agent) / len(agent) > 0.6
    assert sum(other) / len(other) < 0.15
    assert max(e["correctness"] for e in echo) < 0.6
    assert json.loads((tmp_path / "gate.jsonl").read_text().splitlines()[0])["context"]
