"""Small stand-ins: a run's files, generators that lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import torch

from rlhf.learner import Learner
from rlhf.policy import Policy
from rlhf.protocols import Loaded, Published
from rlhf.round_data import RoundData
from rlhf.types import Message, Prompt
from rollout.transformers_generator import TransformersGenerator
from rollout.weight_sync import weights_sha256

SPLITS = ("train", "gate", "final")
THINGS = ("parcel", "refund", "invoice", "password", "voucher", "return", "repair", "warranty")


def referenced(learner: Learner, table: pl.DataFrame, round_index: int) -> pl.DataFrame:
    """What the learner's reference says of a round's pairs or labels, in one go."""
    data = RoundData(table, learner.config, round_index)
    with TemporaryDirectory() as state:
        return data.scored(learner.reference_logps(data.unscored(), Path(state), lambda: None))


def write_prompts(folder: Path, count: int = 6) -> dict[str, dict[str, str]]:
    """`prompts` of a config: three JSONL pools of `count` questions, each its own cluster."""
    sources = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        lines = [
            {
                "prompt_id": f"{split}-{i}",
                "prompt": f"{split.title()} question {i}: where is my {THINGS[i % len(THINGS)]}?",
                "cluster": f"{split}-{i}",
                "category": ("orders", "accounts")[i % 2],
            }
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources[split] = {"path": str(path)}
    return sources


def run_values(
    folder: Path, model: str | Path, verifier: str = "vowels", **sections: Mapping[str, Any]
) -> dict[str, Any]:
    """A config of a run in fp32 that takes seconds; `sections` are merged in, key by key.

    `verifier` names a function of `known_verifiers.py` that scores correctness and style.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).with_name("known_verifiers.py").resolve())
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "trial", "directory": str(folder / "runs")},
        "model": {"path": str(model), "precision": "fp32", "lora": {"rank": 4, "alpha": 8.0}},
        "prompts": write_prompts(folder),
        "rollout": {
            "engine": "transformers",
            "samples_per_prompt": 4,
            # A random model's nucleus is most of its vocabulary, which takes long to sort.
            "top_p": 1.0,
            "max_new_tokens": 8,
            "shard_prompts": 2,
            "parity_completions": 4,
        },
        "judges": {
            "panel": [
                {
                    "name": "rules",
                    "function": f"{here}:{verifier}",
                    "dimensions": ["correctness", "style"],
                }
            ],
            "audit": [{"name": "onlooker", "function": f"{here}:words", "dimensions": ["words"]}],
        },
        "selection": {
            "floors": {},
            "min_margin": 0.01,
            "protected": {},
            # A model that stops at random in a large vocabulary is nearly always cut off.
            "allow_truncated_chosen": True,
            "cold_start": {"min_passing_share": 0.0, "min_spread": 0.0},
        },
        "learner": {"learning_rate": 0.003, "batch_pairs": 2},
        "rounds": {"count": 2},
        "evaluation": {
            "samples_per_prompt": 2,
            "bootstrap": 200,
            "kl_prompts": 4,
            "greedy_prompts": 2,
        },
        "gates": {"max_drop": 1.0, "on_inconclusive": "promote"},
        "tracking": {"plain": True},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


class StaleGenerator(TransformersGenerator):
    """Says that it loaded every version; after the first it keeps the weights it has."""

    def load(self, published: Published) -> Loaded:
        if self._loaded is None:
            return super().load(published)
        self._loaded = Loaded(published.version, weights_sha256(published.path))
        return self._loaded


class MisreportingGenerator(TransformersGenerator):
    """Loads what it is given, and says something else about it."""

    version_offset = 0
    sha256: str | None = None

    def load(self, published: Published) -> Loaded:
        loaded = super().load(published)
        return Loaded(loaded.version + self.version_offset, self.sha256 or loaded.sha256)


class SleepwalkingGenerator(TransformersGenerator):
    """Wakes up with something else than what it slept with."""

    woken: Loaded | None = None

    def wake(self) -> Loaded | None:
        return self.woken


def perturb(policy: Policy, seed: int, scale: float = 0.1) -> None:
    """Give the adapter an effect, as training would; its B matrices start at zero."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))


def prompts_of(encode: Any, texts: Sequence[str]) -> list[Prompt]:
    """Prompts with token ids, `encode` being `rlhf.model_files.prompt_encoder(tokenizer)`."""
    return [
        Prompt(f"p{i}", (message,), token_ids=tuple(encode([message])))
        for i, text in enumerate(texts)
        for message in [Message(role="user", content=text)]
    ]
