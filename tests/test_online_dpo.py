"""Whole runs of a tiny model: what they leave on disk, and how they end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import polars as pl
import pytest
import torch
from fakes import run_values
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.local import train
from rlhf.config import RunConfig
from rlhf.errors import DataGateError, InputError, ParityError
from rlhf.files import sha256_tree
from rollout import transformers_generator

ROUNDS = ("0000", "0001", "0002")
SHORT = {
    "rollout": {"max_new_tokens": 4},
    "rounds": {"count": 1},
    "evaluation": {"kl_prompts": 2},
}


def config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


def short(folder: Path, model: Path, verifier: str = "vowels", **sections: Any) -> dict[str, Any]:
    """A run of one round; `sections` are merged in."""
    values = run_values(folder, model, verifier)
    for given in (SHORT, sections):
        for name, section in given.items():
            values[name] = {**values[name], **section}
    return values


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def parts(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(part) for part in sorted(folder.iterdir())])


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_losses(run: Path) -> list[float]:
    """Of the first step of each round."""
    return [e["loss"] for e in log_of(run) if e["stage"] == "train" and e["step"] == 1]


def kept(run: Path) -> dict[str, str]:
    """Hashes of all but the lock, which names whoever held it last."""
    return {name: sha for name, sha in sha256_tree(run).items() if name != ".lock"}


@pytest.fixture(scope="module")
def values(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two rounds, all promoted."""
    folder = tmp_path_factory.mktemp("whole")
    return run_values(folder, tiny_model, learner={"learning_rate": 0.01})


@pytest.fixture(scope="module")
def run(values: dict[str, Any]) -> Path:
    """Its folder, finished."""
    assert train(config(values)) == 0
    return Path(values["run"]["directory"]) / "trial"


def test_completions_and_scores_have_their_columns(run: Path) -> None:
    completions = {
        "prompt_id", "sample", "text", "token_ids", "finish_reason", "policy_version", "logps",
        "prompt_token_ids",
    }  # fmt: skip
    scores = {
        "prompt_id", "sample", "judge", "dimension", "score", "votes", "spread", "abstained",
    }  # fmt: skip
    at = {f"rounds/{r}": 4 for r in ROUNDS[1:]}
    at |= {f"rounds/{r}/evaluation": 2 for r in ROUNDS} | {"final/start": 2, "final/best": 2}
    for place, samples in at.items():
        drawn, judged = parts(run / place / "completions"), parts(run / place / "scores")
        assert completions <= set(drawn.columns), place
        assert scores <= set(judged.columns), place
        assert drawn.height == 6 * samples
        answered = drawn.select("prompt_id", "sample").unique()
        assert answered.height == drawn.height
        # Held-out answers are scored by the audit judge too, training answers never.
        judges = {"rules"} if place in ("rounds/0001", "rounds/0002") else {"rules", "onlooker"}
        assert set(judged["judge"]) == judges
        assert judged.join(answered, on=["prompt_id", "sample"], how="anti").is_empty()


@pytest.mark.parametrize("version", [1, 2])
def test_pairs_are_two_answers_of_one_policy_to_one_prompt(run: Path, version: int) -> None:
    folder = run / f"rounds/{version:04d}"
    pairs = pl.read_parquet(folder / "pairs.parquet")
    assert {
        "prompt_id", "prompt", "chosen", "rejected", "chosen_sample", "rejected_sample",
        "reward_chosen", "reward_rejected", "margin", "scores_chosen", "scores_rejected", "source",
        "policy_version",
    } <= set(pairs.columns)  # fmt: skip
    assert 0 < pairs.height <= 6
    assert pairs["prompt_id"].is_unique().all()
    drawn = {(c["prompt_id"], c["sample"]): c for c in parts(folder / "completions").to_dicts()}
    judged = {
        (s["prompt_id"], s["sample"], s["dimension"]): s["score"]
        for s in parts(folder / "scores").to_dicts()
    }
    for pair in pairs.to_dicts():
        for side in ("chosen", "rejected"):
            answer = drawn[pair["prompt_id"], pair[f"{side}_sample"]]
            assert answer["text"] == pair[side]
            assert answer["token_ids"] == pair[f"{side}_token_ids"]
            assert answer["prompt_token_ids"] == pair["prompt_token_ids"]
            assert answer["policy_version"] == pair["policy_version"] == version - 1
            scores = {
                d: judged[pair["prompt_id"], pair[f"{side}_sample"], d]
                for d in ("correctness", "style")
            }
            assert pair[f"scores_{side}"] == scores
            # Standard weights 0.4 and 0.1, normalised to the two dimensions that are scored.
            reward = 0.8 * scores["correctness"] + 0.2 * scores["style"]
            assert pair[f"reward_{side}"] == pytest.approx(reward)
        margin = pair["reward_chosen"] - pair["reward_rejected"]
        assert margin == pytest.approx(pair["margin"])
        assert margin >= 0.01


def test_every_file_of_a_round_is_in_its_manifest(run: Path) -> None:
    for place in (*(f"rounds/{r}" for r in ROUNDS), "final"):
        manifest = read(run / place / "manifest.json")
        found = sha256_tree(run / place)
        del found["manifest.json"]
        assert manifest["sha256"] == found, place
        assert manifest["config_sha256"]
        assert {"torch", "transformers", "python"} <= set(manifest["versions"])
    assert {
        "cold_start.json", "completions/part-00002.parquet", "scores/part-00002.parquet",
        "funnel.json", "selection.json", "pairs.parquet", "reference_logps.parquet",
        "policy/README.md",
        "policy/adapter_model.safetensors", "policy/tokenizer.json", "drift.json",
        "evaluation.json", "evaluation/completions/part-00000.parquet", "gates.json",
        "evaluation/per_prompt.parquet",
    } <= set(read(run / "rounds/0001/manifest.json")["sha256"])  # fmt: skip
    assert not (run / "rounds/0001/trainer").exists(), "state in mid-round goes with the round"
    assert not (run / "published").exists()


def test_the_policies_load_with_peft_and_differ(run: Path, tiny_model: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    ids = torch.tensor([[1, 202, 303, 44]])
    logits = [AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits]
    for name in ROUNDS[1:]:
        folder = run / "rounds" / name / "policy"
        logits.append(AutoPeftModelForCausalLM.from_pretrained(folder)(ids).logits)
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert f"round {int(name)}" in (folder / "README.md").read_text()
    for one in range(3):
        for other in range(one):
            assert not torch.allclose(logits[one], logits[other], atol=1e-3)


def test_training_is_logged_once_a_step_and_starts_at_ln_2(run: Path) -> None:
    log = log_of(run)
    keys = [(line["round"], line["stage"], line["step"]) for line in log]
    assert len(set(keys)) == len(keys)
    for version in (1, 2):
        pairs = pl.read_parquet(run / f"rounds/{version:04d}/pairs.parquet").height
        steps = [e for e in log if e["round"] == version and e["stage"] == "train"]
        assert [e["step"] for e in steps] == list(range(1, math.ceil(pairs / 2) + 1))
        assert {
            "loss", "accuracy", "margin", "grad_norm", "tokens_per_second", "learning_rate",
        } <= set(steps[0])  # fmt: skip
        done = next(e for e in log if e["round"] == version and e["stage"] == "training")
        assert done["planned_steps"] == done["executed_steps"] == len(steps)
    assert all(e["grad_norm"] > 0 for e in log if e["stage"] == "train")
    at_start, moved = first_losses(run)
    assert at_start == pytest.approx(math.log(2), abs=1e-4)
    # Round 2 goes on from round 1, and is still held to the start.
    assert abs(moved - math.log(2)) > 1e-3


def test_drift_is_held_against_frozen_copies_of_the_start_and_of_the_round_before(
    run: Path, tiny_model: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    copies = [AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)] + [
        AutoPeftModelForCausalLM.from_pretrained(run / f"rounds/{r}/policy", dtype=torch.float32)
        for r in ROUNDS[1:]
    ]

    def logps(version: int, drawn: pl.DataFrame) -> np.ndarray:
        """Of each answer under one copy, one at a time."""
        sums = []
        for prompt, answer in drawn.select("prompt_token_ids", "token_ids").iter_rows():
            with torch.no_grad():
                logits = copies[version](torch.tensor([[*prompt, *answer]])).logits[0]
            rows = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            sums.append(float(rows.gather(-1, torch.tensor(answer)[:, None]).sum()))
        return np.array(sums)

    for version, place in enumerate(ROUNDS):
        drift = read(run / f"rounds/{place}/drift.json")
        fresh = parts(run / f"rounds/{place}/evaluation/fresh")
        assert set(fresh["policy_version"]) == {version}
        assert drift["samples"] == fresh.height == 4
        tokens = fresh["token_ids"].list.len().to_numpy()
        own = logps(version, fresh)
        assert drift["entropy"]["value"] == pytest.approx(-own.sum() / tokens.sum(), abs=1e-4)
        assert drift["length"]["value"] == tokens.mean()
        for name, other in (("kl_start", 0), ("kl_round", version - 1)):
            if version == 0:
                assert name not in drift
                continue
            moved = own - logps(other, fresh)
            found = drift[name]
            assert found["value"] == pytest.approx(moved.mean(), abs=1e-3)
            assert found["standard_error"] == pytest.approx(moved.std(ddof=1) / 2, abs=1e-3)
            assert found["per_token"] == pytest.approx(moved.sum() / tokens.sum(), abs=1e-4)
            assert abs(found["value"]) > 1e-2


def test_the_status_and_the_best_round_follow_the_gate_reward(run: Path) -> None:
    status = read(run / "status.json")
    assert (status["state"], status["promoted"]) == ("done", [1, 2])
    rewards = {
        i: read(run / f"rounds/{i:04d}/evaluation.json")["scores"]["reward"]["value"]
        for i in (1, 2)
    }
    assert status["best_round"] == max(rewards, key=lambda i: rewards[i])


def test_the_final_split_is_scored_for_the_start_and_the_best_alone(run: Path) -> None:
    assert sorted(p.name for p in (run / "final").iterdir() if p.is_dir()) == ["best", "start"]
    best = read(run / "status.json")["best_round"]
    for name, version in (("start", 0), ("best", best)):
        drawn = parts(run / "final" / name / "completions")
        assert set(drawn["policy_version"]) == {version}
        assert all(p.startswith("final-") for p in drawn["prompt_id"])
    elsewhere = pl.concat(
        [parts(folder).select("prompt_id") for folder in run.glob("rounds/**/completions")]
    )
    assert not any(p.startswith("final-") for p in elsewhere["prompt_id"])


def test_the_summary_says_what_changed_and_why(run: Path) -> None:
    text = (run / "summary.md").read_text()
    claim = read(run / "final/evaluation.json")["change"]["reward"]
    for number in ("difference", "low", "high"):
        assert f"{claim[number]:+.3f}" in text
    for index in (1, 2):
        gates = read(run / f"rounds/{index:04d}/gates.json")
        assert f"## Round {index}\n\n{gates['reason']}" in text
        drift = read(run / f"rounds/{index:04d}/drift.json")
        for name in ("kl_start", "kl_round", "entropy", "length"):
            assert f"{drift[name]['value']:.3f}" in text
    assert "words (audit)" in text


def test_the_same_command_again_does_nothing(
    run: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a generator was started")

    before = kept(run)
    monkeypatch.setattr("launch.roles.Roles.generator", started)
    assert train(config(values)) == 0
    assert kept(run) == before


@pytest.mark.slow
def test_more_rounds_after_the_final_score_are_refused(values: dict[str, Any], run: Path) -> None:
    before = {n: s for n, s in kept(run).items() if n.startswith(("rounds", "final"))}
    with pytest.raises(InputError, match=r"rounds.count must stay 2, got 3"):
        train(config({**values, "rounds": {"count": 3}}))
    after = {n: s for n, s in kept(run).items() if n.startswith(("rounds", "final"))}
    assert after == before
    assert train(config(values)) == 0


def folder_of(values: dict[str, Any]) -> Path:
    return Path(values["run"]["directory"]) / "trial"


@pytest.mark.slow
def test_a_first_round_that_fails_its_gate_fails_the_run(tiny_model: Path, tmp_path: Path) -> None:
    values = short(tmp_path, tiny_model, "worse_by_version", gates={"max_drop": 0.02})
    assert train(config(values)) == 3
    run = folder_of(values)
    status = read(run / "status.json")
    assert (status["state"], status["best_round"], status["promoted"]) == ("failed", None, [])
    gate = read(run / "rounds/0001/gates.json")
    assert (gate["promoted"], gate["gates"][0]["verdict"]) == (False, "fail")
    assert not list((run / "final").glob("*/completions")), "nothing to claim"
    assert gate["reason"] in (run / "summary.md").read_text()
    before = kept(run)
    assert train(config(values)) == 3
    assert kept(run) == before


@pytest.mark.slow
def test_a_later_round_that_fails_stops_early_and_keeps_the_best(
    tiny_model: Path, tmp_path: Path
) -> None:
    values = short(
        tmp_path,
        tiny_model,
        "worse_after_one",
        gates={"max_drop": 0.02},
        rounds={"count": 3},
    )
    assert train(config(values)) == 0
    run = folder_of(values)
    status = read(run / "status.json")
    assert (status["state"], status["best_round"], status["promoted"]) == ("stopped_early", 1, [1])
    assert not (run / "rounds/0003").exists()
    assert read(run / "final/evaluation.json")["best_round"] == 1
    assert set(parts(run / "final/best/completions")["policy_version"]) == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "status", "state"), [("stop", 3, "failed"), ("promote", 0, "done")]
)
def test_an_inconclusive_gate_does_what_was_asked(
    tiny_model: Path, tmp_path: Path, rule: str, status: int, state: str
) -> None:
    values = short(
        tmp_path,
        tiny_model,
        "noisy_versions",
        gates={"max_drop": 0.02, "on_inconclusive": rule},
    )
    assert train(config(values)) == status
    run = folder_of(values)
    gate = read(run / "rounds/0001/gates.json")
    assert gate["gates"][0]["verdict"] == "inconclusive"
    assert gate["promoted"] is (rule == "promote")
    assert read(run / "status.json")["state"] == state


@pytest.mark.slow
def test_a_round_that_drifts_too_far_from_the_start_is_not_promoted(
    tiny_model: Path, tmp_path: Path
) -> None:
    bounds = {"max_kl": 0.05, "min_entropy": 1e-6, "rule": "point"}
    far = {"learning_rate": 0.03, "epochs": 2}
    values = short(tmp_path, tiny_model, gates=bounds, learner=far)
    assert train(config(values)) == 3
    run = folder_of(values)
    drift = read(run / "rounds/0001/drift.json")
    assert drift["kl_start"]["value"] > 0.05
    gates = read(run / "rounds/0001/gates.json")["gates"]
    assert [gate["verdict"] for gate in gates] == ["pass", "fail", "pass"]
    assert [gate["value"] for gate in gates[1:]] == [
        drift[name]["value"] for name in ("kl_start", "entropy")
    ]


def failure(values: dict[str, Any]) -> str:
    """The message of the data gate that stops a run, with its traces on disk."""
    with pytest.raises(DataGateError) as caught:
        train(config(values))
    run = folder_of(values)
    status = read(run / "status.json")
    assert (status["state"], status["best_round"]) == ("failed", None)
    assert status["reason"] == str(caught.value)
    first_line = str(caught.value).splitlines()[0].rstrip(".")
    assert first_line in (run / "summary.md").read_text()
    assert not (run / "rounds/0001/policy").exists()
    return str(caught.value)


def test_judges_that_abstain_stop_the_run(tiny_model: Path, tmp_path: Path) -> None:
    message = failure(short(tmp_path, tiny_model, "silent"))
    assert "judges.max_abstention" in message
    assert "rules: returned None" in message


def test_a_cold_start_stops_before_training(tiny_model: Path, tmp_path: Path) -> None:
    cold = {"cold_start": {"min_passing_share": 0.1, "min_spread": 0.02}}
    values = short(tmp_path, tiny_model, "indifferent", selection=cold)
    assert "warm up with SFT first" in failure(values)
    found = read(folder_of(values) / "rounds/0001/cold_start.json")
    assert (found["spread"], found["prompts"]) == (0, 6)
    assert not (folder_of(values) / "rounds/0001/pairs.parquet").exists()


def test_a_round_without_pairs_stops_and_points_at_the_funnel(
    tiny_model: Path, tmp_path: Path
) -> None:
    message = failure(short(tmp_path, tiny_model, "indifferent"))
    assert "no pair is left of 6 prompts" in message
    assert "margin" in message
    assert "funnel.json" in message


@pytest.mark.slow
def test_values_that_are_no_scores_never_reach_a_pair(tiny_model: Path, tmp_path: Path) -> None:
    """NaN, 1.7, "0.9", None, infinity and -0.1, on what would be the best answers."""
    lenient = {"max_abstention": 1.0}
    values = short(tmp_path, tiny_model, "breaks_on_some", judges=lenient)
    assert train(config(values)) == 0
    folder = folder_of(values) / "rounds/0001"
    broken = parts(folder / "scores").filter(
        (pl.col("sample") == 1) & (pl.col("dimension") == "correctness")
    )
    assert broken.height == 6
    assert broken["abstained"].all()
    assert broken["score"].is_null().all()
    reasons = {r["prompt_id"]: r["reason"] for r in broken.to_dicts()}
    for i, said in enumerate(("NaN", "1.7", "'0.9'", "None", "inf", "-0.1")):
        assert said in reasons[f"train-{i}"]
    pairs = pl.read_parquet(folder / "pairs.parquet")
    assert pairs.height > 0
    assert 1 not in set(pairs["chosen_sample"]) | set(pairs["rejected_sample"])
    funnel = read(folder / "funnel.json")
    assert funnel["unusable_scores"]["correctness"]["abstained"] == 6


def test_a_stale_generator_ends_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_generator, "TransformersGenerator", fakes.StaleGenerator)
    values = short(tmp_path, tiny_model)
    with pytest.raises(ParityError, match="does not serve version 1"):
        train(config(values))
    run = folder_of(values)
    assert read(run / "status.json")["state"] == "failed"
    assert not (run / "rounds/0001/evaluation/completions").exists(), "nothing it said was kept"


@pytest.fixture(scope="module")
def declining(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, each a little worse than the one before, each promoted by lenient gates."""
    values = short(
        tmp_path_factory.mktemp("declining"),
        tiny_model,
        "worse_by_version",
        rounds={"count": 2, "reference": "round_start"},
        gates={"max_kl": 100.0},
    )
    assert train(config(values)) == 0
    return folder_of(values)


def test_a_reference_that_moves_starts_each_round_at_ln_2(declining: Path) -> None:
    assert first_losses(declining) == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_the_best_round_is_claimed_not_the_last(declining: Path) -> None:
    status = read(declining / "status.json")
    assert (status["promoted"], status["best_round"]) == ([1, 2], 1)
    assert set(parts(declining / "final/best/completions")["policy_version"]) == {1}
    # Each round is judged against the best so far, and the start is the best of all.
    assert [read(declining / f"rounds/000{i}/gates.json")["against"] for i in (1, 2)] == [0, 0]


@pytest.mark.slow
def test_full_fine_tuning_leaves_a_model_that_transformers_loads(
    tiny_model: Path, tmp_path: Path
) -> None:
    values = short(tmp_path, tiny_model, learner={"learning_rate": 1e-4})
    values["model"]["tuning"] = "full"
    assert train(config(values)) == 0
    folder = folder_of(values) / "rounds/0001/policy"
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_mended_judge_scores_the_same_answers_again(tiny_model: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "from pathlib import Path\n"
        "def verify(prompt, completion):\n"
        "    if not Path(__file__).with_name('mended').exists():\n"
        "        return None\n"
        "    share = len(set(completion.text)) / 100\n"
        "    return {'correctness': min(1.0, share), 'style': 0.5}\n"
    )
    values = short(tmp_path, tiny_model)
    values["judges"]["panel"][0]["function"] = f"{judge}:verify"
    with pytest.raises(DataGateError, match="max_abstention"):
        train(config(values))
    (tmp_path / "mended").touch()
    assert train(config(values)) == 0
