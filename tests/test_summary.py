"""`summary.md` says what is stored, from the first minute of a run to its end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fakes import run_values

from rlhf.config import RunConfig
from rlhf.rounds import RunStore
from rlhf.summary import markdown_table, model_card, round_rows, write_summary
from rlhf.verdict import change, number

DIMENSIONS = ("audit.words", "correctness", "reward", "style")


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n_prompts": 6}


def moved(difference: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "smallest_detectable": 0.031,
        "n_prompts": 6,
        "n_clusters": 5,
    }


def every(value: Any) -> dict[str, Any]:
    return dict.fromkeys(DIMENSIONS, value)


def evaluation(version: int) -> dict[str, Any]:
    since = {"change": every(moved(0.012, -0.034, 0.056))}
    against = {"start": since, "previous": since} if version else {}
    return {"version": version, "scores": every(score(0.4 + version / 100)), "against": against}


GATES = {
    "promoted": False,
    "against": 0,
    "reason": "Not promoted: correctness changed by -0.111.",
    "gates": [
        {
            "name": "correctness",
            "value": -0.111,
            "low": None,
            "high": 0.021,
            "threshold": -0.02,
            "smallest_detectable": None,
            "verdict": "fail",
            "false_stop_rate": 0.23,
        }
    ],
}
FUNNEL = {
    "steps": [
        {"step": "generated", "completions": 24, "prompts": 6, "why": ""},
        {"step": "margin", "completions": 9, "prompts": 4, "why": "reward not larger"},
    ],
    "yield": {"largest_admissible": 4, "best_and_worst_then_filter": 3},
}


AT_START = {"entropy": {"value": 1.5}, "length": {"value": 40.0}}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(run_values(tmp_path, "some/model"))


@pytest.fixture
def store(config: RunConfig) -> Iterator[RunStore]:
    with RunStore.open(config) as opened:
        yield opened


def text(store: RunStore, config: RunConfig) -> str:
    write_summary(store, config)
    return (store.folder / "summary.md").read_text()


def keep(store: RunStore, index: int, **records: Any) -> None:
    for name, value in records.items():
        store.round(index).record(name, partial(dict, value))


def with_a_round(store: RunStore) -> None:
    keep(store, 0, evaluation=evaluation(0), drift=AT_START)
    drift = {**AT_START, "kl_start": {"value": 0.125}, "kl_round": {"value": 0.125}}
    keep(store, 1, evaluation=evaluation(1), drift=drift, gates=GATES, funnel=FUNNEL)


def test_a_run_that_has_only_started_says_so(store: RunStore, config: RunConfig) -> None:
    assert "**The run is not finished: the start is not evaluated yet.**" in text(store, config)
    keep(store, 0, evaluation=evaluation(0))
    keep(store, 1, funnel=FUNNEL)
    found = text(store, config)
    assert "## Round" not in found, "a round is shown once it was judged"
    assert "The claim" not in found
    assert "best policy: none was promoted" in found


def test_a_failed_round_shows_its_gates_and_where_completions_went(
    store: RunStore, config: RunConfig
) -> None:
    with_a_round(store)
    store.status("failed", reason="no round could be promoted.")
    found = text(store, config)
    sentence = (
        "A gate stopped the run at round 1 of 2 (correctness: failed), so no round was promoted."
    )
    assert f"**{sentence}**\n\nno round could be promoted.\n" in found
    assert f"## Round 1\n\n{GATES['reason']}" in found
    row = next(line for line in found.splitlines() if line.startswith("| correctness | -0.111"))
    assert "unbounded to +0.021" in row
    assert "fail (point rule, false-stop rate 23%)" in row
    assert "| margin | 9 | 4 | reward not larger |" in found
    assert "kept 4 pairs; best and worst, then filter, would have kept 3" in found
    assert "The claim" not in found


def test_the_claim_stands_first_with_its_interval(store: RunStore, config: RunConfig) -> None:
    with_a_round(store)
    claim = {
        "best_round": 1,
        "rounds": 1,
        "start": every(score(0.3)),
        "best": every(score(0.45)),
        "change": every(moved(0.15, 0.04, 0.26)),
    }
    store.final().record("evaluation", lambda: claim)
    store.status("done", reason="all 1 rounds ran", best_round=1, promoted=[1])
    found = text(store, config)
    assert (
        "**The policy improved: on the final split round 1 changed the weighted reward by +0.150 "
        "against the start (95% interval +0.040 to +0.260), and all 2 rounds ran.**"
    ) in found
    assert "6 prompts in 5 clusters" in found
    assert "| reward | 0.300 | 0.450 | +0.150 | +0.040 to +0.260 | 0.031 |" in found
    assert found.index("The claim") < found.index("## Rounds on the gate split")
    assert "best policy: `rounds/0001/policy`" in found


def test_the_reward_comes_first_and_audits_last(store: RunStore) -> None:
    with_a_round(store)
    rows = round_rows(store, 1)
    assert [row["dimension"] for row in rows] == [
        "reward", "correctness", "style", "words (audit)",
    ]  # fmt: skip
    assert rows[0]["score"] == "0.410"
    assert rows[0]["since start"] == "+0.012 (-0.034 to +0.056)"


def test_a_run_without_an_audit_judge_is_stamped(
    store: RunStore, config: RunConfig, tmp_path: Path
) -> None:
    assert "No audit judge" not in text(store, config)
    values = run_values(tmp_path / "silent", "some/model")
    values["judges"]["audit"] = []
    silent = RunConfig.model_validate(values)
    with RunStore.open(silent) as unwatched:
        assert "**No audit judge**" in text(unwatched, silent)


def test_writing_it_twice_gives_the_same_bytes(store: RunStore, config: RunConfig) -> None:
    with_a_round(store)
    assert text(store, config) == text(store, config)


def test_what_became_of_the_prompts_is_counted(store: RunStore, config: RunConfig) -> None:
    keep(store, 0, pools={"train": {"read": 9, "too_long": 2, "kept": 7}})
    found = text(store, config)
    assert "| split | read | too long | kept |" in found
    assert "| train | 9 | 2 | 7 |" in found


def test_numbers_have_three_decimals_or_none() -> None:
    assert (number(0.12345), number(None)) == ("0.123", "unbounded")
    assert (change(0.12345), change(-0.1), change(None)) == ("+0.123", "-0.100", "unbounded")
    assert markdown_table([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("tuning", "loader"),
    [("lora", "AutoPeftModelForCausalLM"), ("qlora", "NF4"), ("full", "AutoModelForCausalLM")],
)
def test_a_policy_carries_a_card_that_says_how_to_load_it(
    tuning: str, loader: str, tmp_path: Path
) -> None:
    values = run_values(tmp_path, "some/model")
    values["model"]["tuning"] = tuning
    pairs = pl.DataFrame({"margin": [0.25, 0.5]})
    card = model_card(RunConfig.model_validate(values), 3, pairs)
    assert loader in card
    assert "on 2 pairs" in card
    assert "round 3, mean margin 0.375" in card
    assert "`some/model`" in card
    assert "beta 0.2, learning rate\n0.003" in card
