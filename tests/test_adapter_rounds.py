"""LoRA over several rounds, one adapter carried on or a new one each: what a round is held to, told
by frozen copies that plain Transformers and PEFT load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fakes import perturb, run_values, write_prompts
from peft import AutoPeftModelForCausalLM, PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from small_models import save_small_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from launch.local import train
from launch.placement import place
from launch.terminal import Terminal
from rlhf.config import RunConfig
from rlhf.config_learner import Lora, Model
from rlhf.errors import InputError, Interrupted
from rlhf.files import sha256_tree
from rlhf.interrupts import Interrupts
from rlhf.learner import Learner
from rlhf.policy import Policy
from rlhf.rounds import RunStore
from rlhf.stages import Stages
from rlhf.tracking import Trackers
from rlhf.types import Completion, pairs_schema

RANK = 4
CASES = list(product(("carry", "new"), ("base", "adapter"), ("initial", "round_start")))
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Path:
    return tiny_model


def settings(path: Path, rounds: str = "new", **changes: Any) -> Model:
    lora = {"rank": RANK, "alpha": 8, "rounds": rounds}
    return Model.model_validate({"path": str(path), "precision": "fp32", "lora": lora, **changes})


def load(config: Model, seed: int = 0) -> Policy:
    return Policy(config, config.path, "cpu", seed)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with an effect, of another rank and scale than those that runs here draw."""
    folder = tmp_path_factory.mktemp("adapter")
    earlier = Model(path=str(base), precision="fp32", lora=Lora(rank=2, alpha=6))
    policy = load(earlier)
    perturb(policy, seed=5, scale=0.2)
    policy.save(folder, "an earlier adapter\n")
    return folder


@dataclass(frozen=True)
class Finished:
    """Two rounds of training, and what they started from."""

    folder: Path
    rounds: str
    reference: str
    base: Path
    adapter: Path | None
    learner: Learner
    trained: list[list[float]]
    """Log-probs of `ANSWERS` under the policy in memory as each round's training left it."""

    def policy(self, version: int) -> Path | None:
        return self.folder / f"rounds/{version:04d}/policy" if version else None

    def frozen(self, version: int) -> Any:
        """A version as anyone else loads it."""
        folder = self.policy(version)
        if folder is None:
            plain = AutoModelForCausalLM.from_pretrained(self.base)
            given = self.adapter and PeftModel.from_pretrained(plain, str(self.adapter))
            return (given or plain).eval()
        loads = AutoModelForCausalLM if self.rounds == "new" else AutoPeftModelForCausalLM
        return loads.from_pretrained(folder).eval()


def values_of(
    folder: Path,
    base: Path,
    rounds: str,
    reference: str = "initial",
    adapter: Path | None = None,
    **sections: Any,
) -> dict[str, Any]:
    values = run_values(
        folder,
        base,
        rounds={"count": 2, "reference": reference},
        selection={"min_margin": 1e-4},
        evaluation={"kl_prompts": 2, "greedy_prompts": 0, "samples_per_prompt": 1},
        gates={"max_kl": 1e3},
        learner={"learning_rate": 0.02, "batch_pairs": 2},
        **sections,
    )
    values["model"]["lora"] |= {"rank": RANK, "rounds": rounds}
    values["model"]["adapter"] = adapter and str(adapter)
    return values


def pairs_of(seed: int) -> pl.DataFrame:
    """Six pairs of random tokens, as a round selects them."""
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return [int(i) for i in rng.integers(3, 1000, rng.integers(2, 8))]

    rows = [
        {
            "prompt_id": f"p{i}",
            "chosen_sample": 0,
            "rejected_sample": 1,
            "prompt_token_ids": ids(),
            "chosen_token_ids": ids(),
            "rejected_token_ids": ids(),
            "margin": 0.5,
        }
        for i in range(6)
    ]
    schema = pairs_schema(["correctness"])
    return pl.DataFrame(rows, schema={name: schema[name] for name in rows[0]})


ANSWERS = [
    (row["prompt_token_ids"], row["chosen_token_ids"]) for row in pairs_of(7).iter_rows(named=True)
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def finished(
    request: pytest.FixtureRequest,
    base: Path,
    adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """The loop's own training stage, for two rounds; nothing is sampled or judged."""
    rounds, start, reference = request.param
    given = adapter if start == "adapter" else None
    values = values_of(tmp_path_factory.mktemp("run"), base, rounds, reference, given)
    config = RunConfig.model_validate(values)
    learner = Learner(load(config.model), config)
    quiet = SimpleNamespace(sleep=lambda: None, wake=lambda: None)
    parts: Any = SimpleNamespace(
        learner=learner,
        serving=quiet,
        reporter=Terminal(True),
        trackers=Trackers({}, print),
        interrupts=Interrupts(),
    )
    with RunStore.open(config) as store:
        stages = Stages(config, store, parts)
        trained = []
        for index in (1, 2):
            stages.train(store.round(index), pairs_of(index))
            trained.append([logp(learner.policy.model.eval(), *answer) for answer in ANSWERS])
    return Finished(store.folder, rounds, reference, base, given, learner, trained)


def logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """log p(completion | prompt), by hand."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(steps[range(len(completion)), list(completion)].sum())


def test_each_round_is_held_to_the_frozen_copy_that_was_asked_for(finished: Finished) -> None:
    versions = [finished.frozen(version) for version in (0, 1, 2)]
    for index in (1, 2):
        copy = versions[0 if finished.reference == "initial" else index - 1]
        pairs = pairs_of(index)
        cached = pl.read_parquet(finished.folder / f"rounds/{index:04d}/reference_logps.parquet")
        table = pairs.join(cached, on=["prompt_id", "chosen_sample", "rejected_sample"])
        assert table.height == pairs.height == 6
        for row in table.iter_rows(named=True):
            for side in ("chosen", "rejected"):
                answer = row["prompt_token_ids"], row[f"{side}_token_ids"]
                assert row[f"reference_{side}"] == pytest.approx(logp(copy, *answer), abs=2e-4)
        # Any other version would have been told from the right one.
        start, first, second = (logp(version, *answer) for version in versions)
        assert min(abs(start - first), abs(first - second), abs(start - second)) > 1e-2


@pytest.mark.slow
def test_a_restored_version_and_the_start_score_as_their_frozen_copies(finished: Finished) -> None:
    """The KL to the start is the difference of the two."""
    drawn = [
        Completion(f"p{i}", 0, "", tuple(answer), tuple(prompt), (), "stop", 0)
        for i, (prompt, answer) in enumerate(ANSWERS)
    ]
    copies = [finished.frozen(version) for version in (0, 1, 2)]
    for version in (2, 0, 1):
        finished.learner.policy.restore(finished.policy(version))
        for initial, copy in ((False, version), (True, 0)):
            found = [sum(row) for row in finished.learner.logps(drawn, initial=initial)]
            by_hand = [logp(copies[copy], *answer) for answer in ANSWERS]
            assert found == pytest.approx(by_hand, abs=2e-4)


def test_what_is_stored_is_what_was_trained(finished: Finished) -> None:
    for version, trained in enumerate(finished.trained, start=1):
        copy = finished.frozen(version)
        assert [logp(copy, *answer) for answer in ANSWERS] == pytest.approx(trained, abs=2e-4)


def run(values: dict[str, Any]) -> Path:
    assert train(RunConfig.model_validate(values)) == 0
    return Path(values["run"]["directory"]) / "trial"


def test_a_stored_version_is_what_its_card_says(finished: Finished) -> None:
    folder = finished.folder / "rounds/0002/policy"
    card = (folder / "README.md").read_text()
    whole = finished.rounds == "new"
    assert (folder / "adapter_config.json").exists() is not whole
    assert ("library_name: transformers" in card, "library_name: peft" in card) == (
        whole,
        not whole,
    )
    assert ("merged each round" in card) is whole
    if whole:
        weights = stored(finished.folder, 2)
        assert {w.dtype for w in weights.values()} == {torch.float32}


def stored(run: Path, version: int) -> Weights:
    """The weights of a whole model."""
    (file,) = (run / f"rounds/{version:04d}/policy").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def renewed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with a new adapter each round and dropout, as values; not run."""
    small = {"samples_per_prompt": 2, "max_new_tokens": 4, "shard_prompts": 4}
    folder = tmp_path_factory.mktemp("renewed")
    values = values_of(folder, base, "new", rollout=small)
    values["prompts"] = write_prompts(folder, 4)
    values["model"]["lora"]["dropout"] = 0.1
    values["learner"] |= {"batch_pairs": 1, "checkpoint_steps": 1}
    return values


def bytes_of(run: Path) -> dict[str, str]:
    return {n: s for n, s in sha256_tree(run).items() if n.startswith(("rounds", "final"))}


@pytest.fixture(scope="module")
def whole(renewed: dict[str, Any]) -> Path:
    return run(renewed)


def test_rounds_of_new_adapters_learn_more_than_one_adapter_holds(whole: Path, base: Path) -> None:
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    first, second = stored(whole, 1), stored(whole, 2)
    changed = [name for name in second if not torch.equal(first[name], second[name])]
    assert changed == sorted(n for n in second if n.endswith("proj.weight"))

    def rank(name: str, new: Weights, old: Weights) -> int:
        return int(torch.linalg.matrix_rank((new[name] - old[name]).double(), rtol=1e-3))

    for name in changed:
        assert rank(name, first, start) <= RANK and rank(name, second, first) <= RANK
        assert rank(name, second, start) > RANK


@pytest.mark.slow
@pytest.mark.parametrize("at", ["rounds/0001", "rounds/0002"])
def test_a_run_stopped_while_it_trains_and_resumed_is_the_whole_one(
    whole: Path,
    renewed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    values = {**renewed, "run": {**renewed["run"], "directory": str(tmp_path)}}
    trainer = tmp_path / "trial" / at / "trainer"

    def check(_: Interrupts) -> None:
        # The second time that a step ends with a checkpoint there.
        if (trainer / "checkpoints").exists():
            raise Interrupted("stopped here")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Interrupts, "check", check)
        train(RunConfig.model_validate(values))
    assert (trainer / "checkpoints").exists()
    resumed = run(values)
    expected, found = bytes_of(whole), bytes_of(resumed)
    del_manifests(expected, found)
    assert found == expected


def del_manifests(*trees: dict[str, str]) -> None:
    """A manifest names the config's hash, which knows the run's directory."""
    for tree in trees:
        for name in [n for n in tree if n.endswith("manifest.json")]:
            del tree[name]


def test_an_update_below_the_steps_of_bf16_is_not_lost_when_it_is_merged(
    base: Path, tmp_path: Path
) -> None:
    """Each round adds 0.001 to weights of about 1, where bf16 has steps of 0.004 to 0.008."""
    policy = load(settings(base, precision="bf16", lora={"rank": 1, "alpha": 1, "rounds": "new"}))
    name = "model.layers.0.self_attn.o_proj.weight"
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    folder: Path | None = None
    for version in (1, 2, 3):
        policy.restore(folder)
        with torch.no_grad():
            for parameter_name, parameter in policy.trainable():
                parameter.fill_(1.0 if "lora_A" in parameter_name else 0.001)
        folder = tmp_path / str(version)
        folder.mkdir()
        policy.save(folder, "card")
        (file,) = folder.glob("*.safetensors")
        gained = load_file(file)[name] - start[name]
        torch.testing.assert_close(
            gained, torch.full_like(gained, 0.001 * version), rtol=0, atol=1e-6
        )
    policy.restore(folder)
    held = dict(policy.merged_weights())[name]
    assert torch.equal(held.bfloat16().float(), held), "what computes is in bf16"
    torch.testing.assert_close(held, load_file(file)[name].bfloat16().float(), rtol=0, atol=0)


def test_each_round_draws_another_adapter_and_the_same_one_again(base: Path) -> None:
    def drawn(seed: int) -> Weights:
        policy = load(settings(base))
        torch.manual_seed(seed)
        policy.begin_round()
        return {n: p.detach().clone() for n, p in policy.trainable()}

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    for name, weight in first.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert not torch.equal(weight, other[name])
    carried = load(settings(base, "carry"))
    before = {n: p.detach().clone() for n, p in carried.trainable()}
    carried.begin_round()
    assert all(torch.equal(before[n], p) for n, p in carried.trainable())


def test_training_begins_with_the_rounds_own_adapter(base: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, base, "new", objective={"name": "orpo", "beta": 0.1})
    values["learner"]["learning_rate"] = 1e-6
    config = RunConfig.model_validate(values)

    def trained(index: int) -> Weights:
        learner = Learner(load(config.model), config)
        state = tmp_path / str(index)
        learner.train(pairs_of(1), None, index, state, lambda *_: None, lambda: None)
        return {n: p.detach() for n, p in learner.policy.trainable() if "lora_A" in n}

    first, second = trained(1), trained(2)
    for name, weight in first.items():
        assert (weight - second[name]).abs().mean() > 0.02, "the rate moves nothing that far"


def test_a_version_of_another_model_is_not_restored(base: Path, tmp_path: Path) -> None:
    policy = load(settings(base))
    folder = tmp_path / "other"
    save_small_model(folder)
    with pytest.raises(InputError, match=r"other: not this policy's weights: .*embed_tokens"):
        policy.restore(folder)


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ("qlora", "model.lora.rounds new .* NF4 base .*use carry"),
        ("full", "needs model.tuning lora"),
    ],
)
def test_new_adapters_are_for_lora_alone(base: Path, tuning: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(base, tuning=tuning)


def test_a_new_adapter_is_never_published_by_itself(base: Path, tmp_path: Path) -> None:
    """It is on other weights than the generator's."""
    config = RunConfig.model_validate(values_of(tmp_path, base, "new"))
    assert place(config, cuda=True, vllm=True).sync == "merged"
    asked = values_of(tmp_path, base, "new", rollout={"sync": "adapter"})
    with pytest.raises(InputError, match=r"rollout\.sync adapter needs model\.lora\.rounds carry"):
        place(RunConfig.model_validate(asked), cuda=True, vllm=True)
