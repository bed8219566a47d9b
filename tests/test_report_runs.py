"""Real runs of a tiny model leave a report behind, however they end."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import run_values

from launch.local import train
from rlhf.config import RunConfig
from rlhf.errors import DataGateError, Interrupted
from rlhf.interrupts import Interrupts

SHORT = {
    "rollout": {"max_new_tokens": 4},
    "rounds": {"count": 1},
    "evaluation": {"kl_prompts": 2},
}


def short(folder: Path, model: Path, verifier: str, **sections: Any) -> RunConfig:
    values = run_values(folder, model, verifier)
    for given in (SHORT, sections):
        for name, section in given.items():
            values[name] = {**values[name], **section}
    return RunConfig.model_validate(values)


def folder_of(config: RunConfig) -> Path:
    return Path(config.run.directory) / config.run.name


def first_sentence(folder: Path) -> str:
    """Of the page, which is also that of the summary."""
    page = (folder / "report.html").read_text()
    found = re.search(r'<h1 id="verdict">(.*?)</h1>', page, re.DOTALL)
    assert found
    sentence = html.unescape(found[1])
    assert f"**{sentence}**" in (folder / "summary.md").read_text()
    return sentence


@pytest.mark.slow
def test_a_run_that_went_through(tiny_model: Path, tmp_path: Path) -> None:
    config = short(tmp_path, tiny_model, "vowels")
    assert train(config) == 0
    folder = folder_of(config)
    assert re.search(
        r"on the final split round 1 .*, and its one round ran\.", first_sentence(folder)
    )
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in log if "seconds" in line]
    assert all(line["loop_seconds"] >= 0 for line in timed)
    loop = sum(line["loop_seconds"] for line in timed)
    whole = loop + sum(line["seconds"] for line in timed)
    assert f"added {loop / whole:.1%} of it" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_a_gate_stopped(tiny_model: Path, tmp_path: Path) -> None:
    config = short(tmp_path, tiny_model, "worse_by_version", gates={"max_drop": 0.02})
    assert train(config) == 3
    assert "A gate stopped the run at round 1 of 1 (correctness: failed)" in first_sentence(
        folder_of(config)
    )


def test_a_run_without_pairs(tiny_model: Path, tmp_path: Path) -> None:
    config = short(tmp_path, tiny_model, "indifferent")
    with pytest.raises(DataGateError):
        train(config)
    assert "for want of pairs: none is left of the 6 prompts" in first_sentence(folder_of(config))


@pytest.mark.slow
def test_a_run_that_was_interrupted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(tmp_path, tiny_model, "vowels")

    def asked(_: Interrupts) -> None:
        raise Interrupted("stopped at a safe point by SIGTERM; run the same command to resume")

    monkeypatch.setattr(Interrupts, "check", asked)
    with pytest.raises(Interrupted):
        train(config)
    sentence = first_sentence(folder_of(config))
    assert "The run was interrupted before its first round was judged: stopped" in sentence
    monkeypatch.undo()
    assert train(config) == 0
    assert "interrupted" not in first_sentence(folder_of(config))
