"""The scorer: proved before it counts, and what can't be packed is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fakes import run_values
from small_models import save_small_model, small_tokenizer

from rlhf.attention import FULL, Layout, Masking
from rlhf.config import RunConfig
from rlhf.config_learner import Model
from rlhf.errors import InexactError
from rlhf.head import Tail
from rlhf.learner import Learner
from rlhf.logprobs import PLAIN, Ways
from rlhf.packing import TokenPair, pack
from rlhf.policy import Policy
from rlhf.scoring import Scorer, probe
from rlhf.types import Completion


def policy_of(folder: Path, **model: Any) -> Policy:
    settings = {"path": str(folder), "precision": "fp32", **model}
    return Policy(Model.model_validate(settings), str(folder), "cpu", seed=0)


def scorer(policy: Policy, on_inexact: Any = "stop") -> tuple[Scorer, list[str]]:
    said: list[str] = []
    return Scorer(policy, 256, on_inexact, said.append), said


def examples() -> list[list[TokenPair]]:
    rng = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(10, 500, count))

    prompts = [ids(n) for n in (30, 12, 5)]
    return [[(p, ids(9)), (p, ids(14))] for p in prompts]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("scoring") / "model", key_heads=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_every_tuning_and_precision_is_proved_exact(
    small_model: Path, tuning: str, precision: str
) -> None:
    policy = policy_of(small_model, tuning=tuning, precision=precision)
    found, said = scorer(policy)
    policy.model.train()
    drawn = torch.get_rng_state()
    found.prove(examples())
    assert not said and found.ways != PLAIN
    # Byte-exact resume: what proves leaves no trace.
    assert torch.equal(torch.get_rng_state(), drawn) and policy.model.training


LEAKY = Ways(Masking({FULL: None}, False), Tail(scale=1.1))
"""Of the small model: a tail that it does not have."""


def test_a_gap_stops_with_the_numbers(small_model: Path) -> None:
    found, _ = scorer(policy_of(small_model))
    found.ways = LEAKY
    with pytest.raises(InexactError, match=r"nats apart.*1e-04 is allowed in fp32|0\.0001 is all"):
        found.prove(examples())


def test_a_gap_takes_the_plain_way_if_the_config_says_so(small_model: Path) -> None:
    found, said = scorer(policy_of(small_model), "plain")
    found.ways = LEAKY
    found.prove(examples())
    assert found.ways == PLAIN
    assert len(said) == 1 and "nats apart" in said[0] and "padded rows" in said[0]
    # And it is said once.
    found.prove(examples())
    assert len(said) == 1


def another_completion(layout: Layout) -> torch.Tensor:
    """Whether a position may see another by its segment alone."""
    of = layout.segments_BT
    return of[:, :, None] == of[:, None, :]


def another_segment(layout: Layout) -> torch.Tensor:
    """Whether a position may see another by its branch alone."""
    of = layout.branches_BT
    return (of[:, None, :] == 0) | (of[:, :, None] == of[:, None, :])


@pytest.mark.parametrize("leak", [another_completion, another_segment])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_sees_another_completion_or_segment_is_a_gap_before_a_learner_scores_anything(
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[Layout], torch.Tensor],
    precision: str,
) -> None:
    """As a run finds it: its first scores are of single answers, none of which shares a prompt."""

    def leaky(layout: Layout, window: int | None) -> torch.Tensor:
        length = layout.segments_BT.shape[1]
        return leak(layout) & torch.ones(length, length, dtype=torch.bool).tril()

    values = run_values(tmp_path, small_model)
    values["model"] |= {"precision": precision}
    learner = Learner(policy_of(small_model, precision=precision), RunConfig.model_validate(values))
    answers = [
        Completion(f"p{number}", 0, "", tuple(completion), tuple(prompt), (0.0,), "stop", 0)
        for number, ((prompt, completion), _) in enumerate(examples())
    ]
    monkeypatch.setattr(Layout, "visible_BTT", leaky)
    with pytest.raises(InexactError):
        learner.logps(answers)


@pytest.mark.parametrize("prompt", [1, 2, 3, 30])
@pytest.mark.parametrize("completion", [1, 2, 3, 14])
def test_the_probe_has_of_everything_that_packing_does(prompt: int, completion: int) -> None:
    ids = list(range(prompt + completion))
    sequences = probe(ids[:prompt], ids[prompt:])
    rows = pack(sequences)
    assert max(len(p) + len(c) for p, c in sequences) == prompt + completion
    if completion > 1:
        assert max(len(segment.completions) for row in rows for segment in row) == 2
    if prompt > 2 and completion > 1:
        assert [len(row) for row in rows] == [1, 2]


def test_sums_come_in_the_order_given_and_a_repeated_sequence_counts_each_time(
    small_model: Path,
) -> None:
    policy = policy_of(small_model)
    found, _ = scorer(policy)
    given = [s for e in examples() for s in e]
    given = [given[3], *given, given[0], given[3]]
    with torch.no_grad():
        ours = found.sums(policy.model, given)
        alone = torch.cat([found.sums(policy.model, [s]) for s in given])
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-4)
    assert ours[0] == ours[-1] == ours[4]


def saved(folder: Path, family: str, **settings: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=512, **settings)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def test_soft_capped_attention_is_computed_eagerly_and_said(tmp_path: Path) -> None:
    """SDPA would leave the cap out on both ways, which would then agree and be wrong."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    folder = saved(tmp_path / "model", "Gemma2", attn_logit_softcapping=1.0, **sizes, **heads)
    policy = policy_of(folder, tuning="full")
    found, said = scorer(policy)
    assert policy.plain_model().config._attn_implementation == "eager"
    assert len(said) == 1 and "eager attention" in said[0]
    found.prove(examples())
    assert found.ways.masking is not None


def test_a_model_with_a_state_is_scored_in_padded_rows_and_that_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "Mamba", hidden_size=16, state_size=4, num_hidden_layers=1)
    policy = policy_of(folder, tuning="full", attention="eager")
    found, said = scorer(policy)
    assert found.ways.masking is None and found.ways.tail is not None
    assert len(said) == 1 and "a state, which would leak" in said[0]
    found.prove(examples())
    given = [s for e in examples() for s in e]
    with torch.no_grad():
        alone = torch.cat([found.sums(policy.model, [s]) for s in given])
        torch.testing.assert_close(found.sums(policy.model, given), alone, rtol=0, atol=1e-4)
