"""The example of a verifier and prompts of one's own: good, wrong and cheating answers; a run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.cli import main
from rlhf import Completion, Prompt, load_config
from rollout.prompts import load_pools

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "own_verifier"
RECORDS = [json.loads(line) for line in (EXAMPLE / "minutes.jsonl").read_text().splitlines()]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


split, verifier = module("split"), module("verifier")


def prompt(reference: str | None, rivals: list[str], question: str = "?") -> Prompt:
    asked = {"role": "user", "content": question}
    return Prompt("p", (asked,), reference=reference, metadata={"rivals": rivals})  # type: ignore[arg-type]


def said(text: str, finish_reason: Any = "stop") -> Completion:
    return Completion("p", 0, text, (), (), (), finish_reason, 0)


WHO = prompt("Dan Murphy", ["Ines Duarte", "Omar Farouk"], "Who will order new seed trays?")
WHEN = prompt("16 September", ["2 September"], "On which day is the next meeting?")
WHERE = prompt("the market hall", ["the music school"], "Where is the next meeting held?")
MINUTES = RECORDS[0]["context"]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (WHO, "Dan Murphy will order new seed trays."),
        (WHO, "dan murphy"),
        (WHEN, "The next meeting is on 16 September at 18:30."),
        (WHEN, "On September 16th."),
        (WHEN, "It is on the 16th of September."),
        (WHERE, "It is held in the market hall."),
        (WHERE, "Market hall."),
    ],
)
def test_a_right_answer_scores_one(asked: Prompt, text: str) -> None:
    assert verifier.verify(asked, said(text)) == {"correctness": 1.0, "style": 1.0}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (WHO, "Ines Duarte will order new seed trays."),
        (WHO, "Dan will do it."),
        (WHO, ""),
        (WHO, "Who will order new seed trays?"),
        (WHO, "Dan Murphy, Ines Duarte or Omar Farouk."),
        (WHO, "It is not Dan Murphy."),
        (WHO, "Dan Murphy won't order new seed trays."),
        (WHO, MINUTES),
        (WHEN, MINUTES),
        (WHERE, MINUTES),
        (WHEN, "The next meeting is on 6 September."),
        (WHEN, "The next meeting is on 16 October."),
        (WHEN, "September."),
        (WHERE, "The market."),
    ],
)
def test_a_wrong_empty_or_cheating_answer_scores_zero(asked: Prompt, text: str) -> None:
    assert verifier.verify(asked, said(text))["correctness"] == 0.0


def test_style_falls_with_length_and_a_cut_off_answer_has_none() -> None:
    """1 up to 20 words, 0 from 60: at 40, (60 - 40) / (60 - 20) = 0.5."""
    assert [verifier.verify(WHO, said("word " * n))["style"] for n in (20, 40, 60, 80)] == [
        1.0,
        0.5,
        0.0,
        0.0,
    ]
    assert verifier.verify(WHO, said("Dan Murphy", "length"))["style"] == 0.0


def test_without_a_reference_it_abstains() -> None:
    assert verifier.verify(prompt(None, []), said("Dan"))["correctness"] is None


@pytest.mark.parametrize(
    ("text", "score"),
    [("Dan Murphy will do it.", 1.0), ("Dan Murphy.", 2 / 3), ("dan murphy", 0.0)],
)
def test_the_audit_tells_sentences_from_fragments(text: str, score: float) -> None:
    assert verifier.sentence(WHO, said(text))["sentence"] == pytest.approx(score)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['cluster']}, {r['category']}")
def test_every_reference_answers_its_own_question_and_no_rival_does(record: Any) -> None:
    asked = prompt(record["reference"], record["rivals"])
    assert record["reference"] in record["context"]
    assert verifier.verify(asked, said(record["reference"]))["correctness"] == 1.0
    for text in (*record["rivals"], record["context"], record["prompt"]):
        assert verifier.verify(asked, said(text))["correctness"] == 0.0, text


def test_clusters_stay_together_and_where_they_are(tmp_path: Path) -> None:
    counts = split.split(EXAMPLE / "minutes.jsonl", tmp_path / "all")
    assert counts == {"train": 42, "gate": 24, "final": 30}
    clusters = {
        name: {json.loads(line)["cluster"] for line in (tmp_path / f"all/{name}.jsonl").open()}
        for name in counts
    }
    assert not clusters["train"] & clusters["gate"]
    assert not (clusters["train"] | clusters["gate"]) & clusters["final"]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:30]))
    split.split(fewer, tmp_path / "fewer")
    for name in counts:
        for line in (tmp_path / f"fewer/{name}.jsonl").open():
            assert json.loads(line)["cluster"] in clusters[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout after the first command of run.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    split.split(Path("examples/own_verifier/minutes.jsonl"), Path("runs/minutes-prompts"))
    return tmp_path


@pytest.mark.usefixtures("here")
def test_the_pools_hold_what_the_columns_say() -> None:
    pools = load_pools(load_config("examples/own_verifier/run.yaml").prompts, 0, None)
    first = next(p for p in pools.train if p.category == "who")
    record = next(r for r in RECORDS if (r["cluster"], r["category"]) == (first.cluster, "who"))
    assert first.messages[-1]["content"] == f"{record['context']}\n\n{record['prompt']}"
    assert (first.reference, first.metadata["rivals"]) == (record["reference"], record["rivals"])


@pytest.mark.engine
def test_the_example_goes_round(here: Path) -> None:
    small = {
        "prompts.train.limit": 8,
        "prompts.gate.limit": 2,
        "prompts.final.limit": 2,
        "rollout.samples_per_prompt": 4,
        "rollout.max_new_tokens": 20,
        "rollout.parity_completions": 4,
        "evaluation.samples_per_prompt": 1,
        "evaluation.kl_prompts": 2,
        "evaluation.greedy_prompts": 2,
        "selection.floors": "{}",
        "selection.allow_truncated_chosen": "true",
        "selection.cold_start.min_passing_share": 0,
        "selection.cold_start.min_spread": 0,
        "gates.max_drop": 1.0,
    }
    flags = [f"--{key}={value}" for key, value in small.items()]
    assert main(["train", "examples/own_verifier/run.yaml", "--plain", *flags]) == 0
    assert (here / "runs/minutes/rounds/0001/pairs.parquet").is_file()
