"""What judges' own models take beside generator and learner, worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import presets
from launch.architectures import KNOWN, find
from launch.fit import report
from launch.judge_memory import TOKENS_AT_ONCE, own_models
from launch.machines import GIB, Machine, parse
from launch.memory import Estimate, estimate
from launch.memory_parts import ASSUMED, PHASES
from launch.placement import place_on, settle
from rlhf import config_io
from rlhf.config import RunConfig
from rollout.judges import reward_engines

DESKTOP = Machine("a desktop", 0, 0, None, 64 * GIB)
QWEN = KNOWN["Qwen/Qwen2.5-7B-Instruct"]
READER = {
    "kind": "llm",
    "name": "reader",
    "dimensions": ["helpfulness"],
    "model": "google/gemma-2b-it",
    "engine": {"max_length": 2048, "max_concurrency": 16, "gpu_memory_share": 0.3},
}
"""Gemma 2B: 18 layers, hidden 2048, queries 2048, one key head of 256, inner 16384, 256,000 words,
2,506,172,416 weights."""


def reward_model(folder: Path) -> dict[str, Any]:
    """A judge of Qwen2.5-7B's shape; only its config is there."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN))
    return {
        "kind": "reward_model",
        "name": "preference",
        "dimensions": ["helpfulness"],
        "model": str(folder),
        "engine": {"max_length": 2048, "max_concurrency": 64, "gpu_memory_share": 0.4},
    }


def beside(*audit: dict[str, Any], preset: str = "llama-3.1-8b-instruct-lora-a100") -> RunConfig:
    """A preset with these judges for its audit."""
    values = config_io.load([presets.path(preset)]).model_dump()
    values["judges"]["audit"] = list(audit)
    return RunConfig.model_validate(values)


def on(config: RunConfig, described: Machine) -> Estimate:
    judges, unknown = own_models(config)
    assert unknown == []
    config = settle(config, described)
    plan = place_on(config, described)
    return estimate(config, plan, described, find(config.model.path), judges)


def rows(found: Estimate) -> dict[tuple[str, bool], tuple[int, tuple[str, ...]]]:
    """(what, in host memory) -> bytes and phases of the judges' parts."""
    return {(p.what, p.host): (p.size, p.phases) for p in found.parts if p.role == "judge"}


def test_a_language_model_has_its_share_while_it_scores_and_sleeps_otherwise() -> None:
    """On an A100 of 40 GB a share of 0.3. Weights in bf16 2 x 2,506,172,416 = 5,012,344,832.
    Workspace: a step of 8,192 tokens, 2 x (3 x 16384 + 4 x 2048 + 2 x 2048) = 122,880 bytes each,
    and 16 rows of logits, 16 x 256,000 x (2 + 12) = 57,344,000: 1,063,976,960, and the graphs.
    A text of the longest: 2 x 18 x 256 x 2 = 18,432 bytes a token, x 2048 = 37,748,736.
    """
    found = on(beside(READER), parse("1xA100-40GB"))
    asleep = ("reference", "train", "publish")
    budget = round(0.3 * parse("1xA100-40GB").gpu)
    assert rows(found) == {
        ("reader: vLLM, awake", False): (budget, ("generate",)),
        ("reader: vLLM, asleep", False): (ASSUMED.graphs, asleep),
        ("reader: vLLM, asleep", True): (5_012_344_832, asleep),
    }
    cache = budget - 5_012_344_832 - 1_063_976_960 - ASSUMED.graphs
    assert found.short["judge reader"] == 37_748_736 - cache < 0


def test_a_language_model_on_a_cpu_stays_once_it_was_asked() -> None:
    """Weights and workspace as on the card, beside a cache of 1 GiB; nobody sleeps there."""
    found = on(beside(READER, preset="smollm2-cpu"), DESKTOP)
    later = ("generate", "reference", "train", "publish")
    assert rows(found) == {
        ("reader: weights", True): (5_012_344_832, later),
        ("reader: key-value cache", True): (GIB, later),
        ("reader: workspace", True): (8192 * 122_880 + 57_344_000, ("generate",)),
    }
    assert found.short["judge reader"] == 37_748_736 - GIB


def test_a_reward_model_in_transformers_moves_to_host_memory_to_sleep(tmp_path: Path) -> None:
    """Qwen2.5-7B without its head of 152,064 x 3584 = 544,997,376: 7,070,619,136 weights,
    14,141,238,272 bytes in bf16. A batch has 16,384 tokens, since 64 texts of 2,048 are more; in
    one layer each takes 2 x (4 x 18944 + 4 x 3584) = 180,224 bytes: 2,952,790,016.
    """
    found = on(beside(reward_model(tmp_path / "rm")), parse("1xA100-80GB"))
    asleep = ("load", "reference", "train", "publish")
    assert rows(found) == {
        ("preference: weights", False): (14_141_238_272, ("generate",)),
        ("preference: weights asleep", True): (14_141_238_272, asleep),
        ("preference: activations", False): (2_952_790_016, ("generate",)),
    }
    on_cpu = on(beside(reward_model(tmp_path / "rm"), preset="smollm2-cpu"), DESKTOP)
    assert rows(on_cpu) == {
        ("preference: weights", True): (14_141_238_272, PHASES),
        ("preference: activations", True): (2_952_790_016, ("generate",)),
    }


@pytest.mark.parametrize(
    ("longest", "texts", "tokens"),
    [(2048, 4, 8192), (2048, 8, 16_384), (2048, 64, 16_384), (32_768, 64, 32_768)],
)
def test_a_batch_of_a_reward_model(longest: int, texts: int, tokens: int, tmp_path: Path) -> None:
    """Few texts, or as many tokens as it takes at once, or one text that is longer than those."""
    judge = reward_model(tmp_path / "rm")
    judge["engine"] |= {"max_length": longest, "max_concurrency": texts}
    found = rows(on(beside(judge), parse("1xA100-80GB")))
    assert found["preference: activations", False][0] == 180_224 * tokens
    assert TOKENS_AT_ONCE == reward_engines._TOKENS_AT_ONCE


def test_a_reward_model_in_vllm_has_no_logits_over_the_vocabulary(tmp_path: Path) -> None:
    """A step of 8,192 tokens, 2 x (3 x 18944 + 4 x 3584 + 2 x 3584) = 156,672 bytes each. A text of
    the longest: 2 x 28 x 512 x 2 = 57,344 bytes a token, x 2048.
    """
    judge = reward_model(tmp_path / "rm") | {"backend": "vllm"}
    found = on(beside(judge), parse("1xA100-80GB"))
    budget = round(0.4 * parse("1xA100-80GB").gpu)
    asleep = ("load", "reference", "train", "publish")
    assert rows(found)["preference: vLLM, asleep", True] == (14_141_238_272, asleep)
    cache = budget - 14_141_238_272 - 8192 * 156_672 - ASSUMED.graphs
    assert found.short["judge preference"] == 57_344 * 2048 - cache


def test_only_models_in_this_process_are_counted_members_among_them() -> None:
    remote = READER | {"name": "remote", "backend": "openai"}
    mixed = {
        "kind": "ensemble",
        "name": "both",
        "dimensions": ["helpfulness"],
        "members": [READER, remote],
    }
    checks = {"name": "checks", "function": "a:b", "dimensions": ["words"]}
    judges, unknown = own_models(beside(mixed, checks))
    assert ([judge.spec.name for judge in judges], unknown) == (["reader"], [])
    assert own_models(beside(remote | {"dimensions": ["tone"]}, checks)) == ([], [])


def test_a_dry_run_shows_judges_and_what_to_do_where_they_do_not_fit(tmp_path: Path) -> None:
    """Share 0.5 for the generator, 0.3 for the judge and 16.1 GB for the learner are too many for
    80 GB. On 16 GB a judge of 14.1 GB in fp16 leaves nothing for the policy's 5.5 in NF4."""
    text = report(beside(READER), parse("1xA100-80GB"))[0]
    assert "judge      reader: vLLM, awake" in text
    assert "GPU        DOES NOT FIT" in text
    assert text.splitlines()[-1] == "fit        smallest change: --rollout.gpu_memory_share 0.44"
    large = reward_model(tmp_path / "rm")
    large["engine"] |= {"precision": "fp16"}
    config = beside(large, preset="qwen2.5-7b-instruct-qlora-t4")
    last = report(config, parse("1xT4-16GB"))[0].splitlines()[-1]
    assert last.startswith("fit        no setting of the policy makes it fit beside preference: ")


def test_a_judge_whose_share_holds_no_text_is_said_not_to_fit() -> None:
    starved = READER | {"engine": READER["engine"] | {"gpu_memory_share": 0.05}}  # type: ignore[operator]
    text = report(beside(starved), parse("1xA100-80GB"))[0]
    assert "judge reader DOES NOT FIT: its cache lacks" in text
    assert text.splitlines()[-1].startswith("fit        no setting of the policy makes it fit")


def test_a_judge_of_unknown_size_is_said_not_to_be_counted() -> None:
    text = report(beside(READER | {"model": "org/unheard-of"}), parse("1xA100-80GB"))[0]
    assert "judge      reader: not in these sums: the memory of org/unheard-of is not known" in text
