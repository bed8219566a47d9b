"""A policy keeps its weights through save, restore and merge, whatever the tuning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from small_models import save_small_model
from torch import Tensor, nn

from rlhf.adapters import highest_rank
from rlhf.config_learner import Lora, Model
from rlhf.errors import InputError
from rlhf.logprobs import collate, token_logps
from rlhf.model_files import answer_end, load_tokenizer, materialise, prompt_encoder, stop_token_ids
from rlhf.policy import DTYPES, Policy

Tuning = Literal["full", "lora", "qlora"]
TUNINGS: tuple[Tuning, ...] = ("full", "lora", "qlora")
SEQUENCES = [
    ([11, 300, 42, 7], [19, 5, 301, 2]),
    ([8], [400, 12]),
    ([33, 34, 35, 36, 37, 38], [90, 91, 92, 93, 94, 95, 2]),
]
CARD = "# A policy of round 1\n"


def settings(path: Path | str, tuning: Tuning = "lora", **changes: Any) -> Model:
    lora = Lora(rank=4, alpha=8, target_modules=changes.pop("target_modules", "all-linear"))
    precision = changes.pop("precision", "fp32")
    return Model(path=str(path), tuning=tuning, precision=precision, lora=lora, **changes)


def load(path: Path | str, tuning: Tuning = "lora", seed: int = 0, **changes: Any) -> Policy:
    config = settings(path, tuning, **changes)
    return Policy(config, config.path, "cpu", seed)


def moved(policy: Policy, seed: int = 1) -> Policy:
    """The policy after something like training: every trained weight off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy


def logps(model: nn.Module) -> Tensor:
    """Log-probs of every completion token of `SEQUENCES`, shape [13]."""
    batch = collate(SEQUENCES, 0, "cpu")
    with torch.no_grad():
        return token_logps(model.eval(), batch)


def plain(folder: Path, **options: Any) -> Any:
    """The folder as anyone without this project loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def gap(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def state(policy: Policy) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in policy.model.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("tied") / "model", tied=True)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_restoring_what_was_saved_gives_the_very_same_policy(
    tied: Path, tmp_path: Path, tuning: Tuning
) -> None:
    first = load(tied, tuning)
    start = logps(first.model)
    moved(first).save(tmp_path, CARD)
    trained = logps(first.model)
    assert gap(trained, start) > 1e-2
    other = load(tied, tuning)
    other.restore(tmp_path)
    assert torch.equal(logps(other.model), trained)
    assert_same_state(state(other), state(first))
    other.restore(None)
    assert torch.equal(logps(other.model), start)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_fully_tuned_folder_is_one_that_transformers_loads(
    head: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    policy = moved(load(request.getfixturevalue(head), "full"))
    policy.save(tmp_path, CARD)
    model = plain(tmp_path)
    assert model.dtype is torch.float32
    assert gap(logps(model), logps(policy.model)) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert (tmp_path / "README.md").read_text() == CARD


def test_full_tuning_keeps_fp32_masters_under_half_precision(tied: Path, tmp_path: Path) -> None:
    policy = moved(load(tied, "full", precision="bf16"))
    policy.save(tmp_path, CARD)
    other = load(tied, "full", precision="bf16")
    other.restore(tmp_path)
    assert_same_state(state(other), state(policy))
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_adapters_are_trained_in_fp32_over_a_base_at_rest(
    tied: Path, tuning: Tuning, precision: str
) -> None:
    policy = load(tied, tuning, precision=precision)
    trained = policy.trainable()
    assert trained and all(p.dtype is torch.float32 and ".lora_" in n for n, p in trained)
    frozen = {n: p for n, p in policy.model.named_parameters() if not p.requires_grad}
    projections = {p.dtype for n, p in frozen.items() if "q_proj" in n and n.endswith("weight")}
    assert projections == {torch.uint8 if tuning == "qlora" else DTYPES[precision]}


def test_an_adapter_folder_is_one_that_peft_loads(tied: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    policy = moved(load(tied))
    policy.save(tmp_path, CARD)
    assert (
        gap(logps(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logps(policy.model)) < 1e-5
    )
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tied)
    assert (tmp_path / "tokenizer.json").exists() and (tmp_path / "README.md").read_text() == CARD


def test_an_adapter_folder_names_its_bases_revision(tied: Path, tmp_path: Path) -> None:
    load(tied, revision="v1.2").save(tmp_path, CARD)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1.2"


SAVE = """
import sys
from pathlib import Path
from rlhf.config_learner import Model
from rlhf.policy import Policy
base, folder = sys.argv[1:]
Path(folder).mkdir()
Policy(Model(path=base, precision="fp32"), base, "cpu", 0).save(Path(folder), "card")
"""


@pytest.mark.engine
def test_two_processes_write_the_same_bytes(tied: Path, tmp_path: Path) -> None:
    from rlhf.files import sha256_tree

    saving = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(tied), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(timeout=600) for process in saving] == [0, 0]
    first, other = (sha256_tree(tmp_path / seed) for seed in ("1", "2"))
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= first.keys()
    assert other == first


def test_an_initial_adapter_depends_on_the_seed_alone(tied: Path) -> None:
    first = state(load(tied, seed=3))
    torch.manual_seed(99)
    assert_same_state(state(load(tied, seed=3)), first)
    other = state(load(tied, seed=4))
    assert any(not torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


def test_a_fresh_adapter_changes_nothing(tied: Path) -> None:
    assert gap(logps(load(tied).model), logps(plain(tied))) < 1e-6


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_restoring_another_models_weights_is_refused(
    tied: Path, tmp_path: Path, tuning: Tuning
) -> None:
    from safetensors.torch import load_file, save_file

    policy = load(tied, tuning)
    policy.save(tmp_path, CARD)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    dropped = sorted(weights)[0]
    save_file({n: w for n, w in weights.items() if n != dropped}, file)
    with pytest.raises(InputError, match="layers.0|embed_tokens"):
        policy.restore(tmp_path)
    save_file({**weights, "extra.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"extra\.weight"):
        policy.restore(tmp_path)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_the_merged_model_is_the_adapted_one(
    head: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(head)
    policy = moved(load(base))
    before = state(policy)
    policy.save_merged(tmp_path)
    merged = plain(tmp_path)
    assert gap(logps(merged), logps(policy.model)) < 1e-4
    assert gap(logps(merged), logps(plain(base))) > 1e-2
    assert_same_state(state(policy), before)
    # Every weight that plain Transformers wrote for the base is there, and no other.
    assert merged.state_dict().keys() == plain(base).state_dict().keys()
    assert merged.config.tie_word_embeddings is (head == "tied")


def test_merging_keeps_biases_exactly(untied: Path, tmp_path: Path) -> None:
    moved(load(untied)).save_merged(tmp_path)
    before, after = plain(untied).state_dict(), plain(tmp_path).state_dict()
    biases = [n for n in before if n.endswith("bias")]
    assert len(biases) == 6 and all(torch.equal(before[n], after[n]) for n in biases)


def dequantised_base(path: Path) -> dict[str, Tensor]:
    """Every weight of the base as NF4 holds it, by plain Transformers and bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = plain(path, quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"})
    return {
        name: dequantize_4bit(p.data, p.quant_state).float() if hasattr(p, "quant_state") else p
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_under_nf4_the_adapter_is_merged_into_the_dequantised_base(
    untied: Path, tmp_path: Path, targets: str | list[str]
) -> None:
    policy = moved(load(untied, "qlora", target_modules=targets))
    policy.save_merged(tmp_path)
    merged = plain(tmp_path)
    weights = dict(policy.trainable())
    expected = dequantised_base(untied)
    original = dict(plain(untied).named_parameters())
    for name, parameter in merged.named_parameters():
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.default.weight"
        delta: Tensor | float = 0.0
        if lora.format("A") in weights:
            delta = 2.0 * weights[lora.format("B")] @ weights[lora.format("A")]
        torch.testing.assert_close(parameter, expected[name] + delta, rtol=0, atol=1e-6)
        if ".q_proj.weight" in name:
            assert gap(parameter, original[name] + delta) > 1e-2, "NF4 moves the base itself"
    assert gap(logps(merged), logps(policy.model)) < 1e-3
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_large_model_is_stored_file_by_file(
    untied: Path, tmp_path: Path, tuning: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more weights are held than one file's, and one on its way."""
    policy = moved(load(untied, tuning))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    policy.save_merged(whole)
    limit = 150_000
    monkeypatch.setattr("rlhf.weights.SHARD", limit)
    given: list[weakref.ref[Tensor]] = []
    most = 0
    merged = policy.merged_weights

    def watched() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, weight in merged():
            # Copies, so that nothing else keeps them.
            copy = weight.detach().clone()
            given.append(weakref.ref(copy))
            most = max(most, sum(w.nbytes for ref in given if (w := ref()) is not None))
            del weight
            yield name, copy
            del copy

    monkeypatch.setattr(policy, "merged_weights", watched)
    policy.save_merged(parts)
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 3 and all(f.stat().st_size < limit + 5_000 for f in files)
    largest = max(w.nbytes for w in load_file(whole / "model.safetensors").values())
    assert limit / 2 < most <= limit + largest
    one, several = (plain(folder).state_dict() for folder in (whole, parts))
    assert_same_state(several, one)
    # All that Transformers would write, and its index says what is there.
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in one.values())


def test_scoring_under_nf4_leaves_the_base_and_its_gradients_alone(untied: Path) -> None:
    policy = moved(load(untied, "qlora"))
    batch = collate(SEQUENCES, 0, "cpu")

    def gradients() -> list[Tensor]:
        policy.model.zero_grad()
        token_logps(policy.model.train(), batch).sum().backward()
        return [p.grad.clone() for _, p in policy.trainable() if p.grad is not None]

    weights, trained = dict(policy.merged_weights()), gradients()
    assert len(trained) == len(policy.trainable())
    logps(policy.model)
    assert_same_state(dict(policy.merged_weights()), weights)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), trained, strict=True))


def test_a_merged_folder_holds_compute_precision(tied: Path, tmp_path: Path) -> None:
    policy = moved(load(tied, precision="bf16"))
    policy.save_merged(tmp_path)
    merged = plain(tmp_path, dtype="auto")
    assert merged.dtype is torch.bfloat16
    # bf16 keeps 8 bits: each weight is that of the fp32 merge to one part in 256.
    for name, weight in policy.merged_weights():
        torch.testing.assert_close(
            merged.state_dict()[name].float(), weight.float(), rtol=2**-8, atol=0
        )


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_weights_is_refused(tied: Path, target: str) -> None:
    with pytest.raises(InputError, match=rf"target_modules: .*{target} shares its weight"):
        load(tied, target_modules=["q_proj", target])


def test_an_adapter_on_an_untied_head_merges(untied: Path, tmp_path: Path) -> None:
    policy = moved(load(untied, target_modules=["q_proj", "lm_head"]))
    policy.save_merged(tmp_path)
    assert gap(logps(plain(tmp_path)), logps(policy.model)) < 1e-4


def test_the_initial_reference_of_a_fresh_adapter_is_the_base(tied: Path) -> None:
    policy = moved(load(tied))
    before, trained = state(policy), logps(policy.model)
    with policy.reference("initial") as reference:
        assert gap(logps(reference), logps(plain(tied))) < 1e-6
    assert torch.equal(logps(policy.model), trained)
    assert_same_state(state(policy), before)


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_run_that_goes_on_from_an_adapter_is_held_to_that_adapter(
    tied: Path, tmp_path: Path, tuning: Tuning
) -> None:
    earlier = moved(load(tied, tuning))
    for name in ("earlier", "later"):
        (tmp_path / name).mkdir()
    earlier.save(tmp_path / "earlier", CARD)
    start = logps(earlier.model)
    policy = load(tied, tuning, adapter=str(tmp_path / "earlier"))
    trainable = [n for n, _ in policy.trainable()]
    assert trainable == [n for n, _ in earlier.trainable()]
    assert torch.equal(logps(policy.model), start)
    moved(policy, seed=2)
    before, trained = state(policy), logps(policy.model)
    assert gap(trained, start) > 1e-2
    with policy.reference("initial") as reference:
        assert torch.equal(logps(reference), start)
    assert torch.equal(logps(policy.model), trained)
    assert_same_state(state(policy), before)
    assert [n for n, _ in policy.trainable()] == trainable, "the reference stays frozen"
    policy.save(tmp_path / "later", CARD)
    again = load(tied, tuning, adapter=str(tmp_path / "later"))
    assert torch.equal(logps(again.model), trained), "the trained adapter is what is saved"
    policy.restore(None)
    assert torch.equal(logps(policy.model), start)


def test_the_initial_reference_is_left_even_when_a_pass_fails(tied: Path, tmp_path: Path) -> None:
    load(tied).save(tmp_path, CARD)
    for policy in (load(tied), load(tied, adapter=str(tmp_path))):
        trained = logps(moved(policy).model)
        with pytest.raises(ZeroDivisionError), policy.reference("initial"):
            raise ZeroDivisionError
        assert torch.equal(logps(policy.model), trained)


def test_the_initial_reference_of_full_tuning_is_the_base_loaded_anew(tied: Path) -> None:
    policy = moved(load(tied, "full"))
    before = state(policy)
    with policy.reference("initial") as reference:
        assert reference is not policy.model
        assert torch.equal(logps(reference), logps(plain(tied)))
    assert_same_state(state(policy), before)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_round_start_reference_is_the_policy_as_it_stands(tied: Path, tuning: Tuning) -> None:
    policy = moved(load(tied, tuning))
    with policy.reference("round_start") as reference:
        assert reference is policy.model


def without(folder: Path, target: Path, *patterns: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*patterns))
    return target


def test_a_folder_without_tokenizer_is_refused(tied: Path, tmp_path: Path) -> None:
    folder = without(tied, tmp_path / "m", "tokenizer*", "special*", "vocab*", "merges*")
    with pytest.raises(InputError, match=r"model\.path: the folder .* has no tokenizer"):
        load(folder)


def test_a_tokenizer_without_chat_template_is_refused(tied: Path, tmp_path: Path) -> None:
    folder = without(tied, tmp_path / "m", "chat_template*")
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("chat_template", None)
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"model\.path: .* has no chat template.*-Instruct"):
        load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: there is no folder .*absent"):
        load(tmp_path / "absent")


def test_a_folder_without_weights_is_refused(tied: Path, tmp_path: Path) -> None:
    folder = without(tied, tmp_path / "m", "*.safetensors")
    with pytest.raises(InputError, match=r"model\.path: .* could not be loaded"):
        load(folder)


def test_pickled_weights_are_never_read(tied: Path, tmp_path: Path) -> None:
    folder = without(tied, tmp_path / "m", "*.safetensors")
    torch.save(plain(tied).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.path: .* could not be loaded"):
        load(folder)


def test_a_folder_that_is_no_adapter_is_refused(tied: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tied):
        with pytest.raises(InputError, match=r"model\.adapter: .* is not a PEFT folder"):
            load(tied, adapter=str(folder))


@pytest.mark.parametrize("rounds", ["carry", "new"])
def test_an_adapter_that_is_more_than_lora_is_refused(
    tied: Path, tmp_path: Path, rounds: str
) -> None:
    from peft import LoraConfig, get_peft_model

    dora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True)
    get_peft_model(plain(tied), dora).save_pretrained(str(tmp_path))
    config = settings(tied, adapter=str(tmp_path))
    lora = config.lora.model_copy(update={"rounds": rounds})
    with pytest.raises(InputError, match=r"model\.adapter: .* plain LoRA adapter.*use_dora"):
        Policy(config.model_copy(update={"lora": lora}), str(tied), "cpu", 0)


@pytest.mark.parametrize("rounds", ["carry", "new"])
def test_a_given_adapter_on_tied_weights_is_refused(
    tied: Path, tmp_path: Path, rounds: str
) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    get_peft_model(plain(tied), lora).save_pretrained(str(tmp_path))
    config = settings(tied, adapter=str(tmp_path))
    changed = config.lora.model_copy(update={"rounds": rounds})
    with pytest.raises(InputError, match="lm_head shares its weight"):
        Policy(config.model_copy(update={"lora": changed}), str(tied), "cpu", 0)


def test_an_adapters_rank_is_its_highest(tied: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=3, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}
    )
    get_peft_model(plain(tied), lora).save_pretrained(str(tmp_path))
    assert highest_rank(tmp_path) == 5


def test_a_missing_gguf_is_refused_and_other_paths_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: there is no file .*absent\.gguf"):
        materialise(str(tmp_path / "absent.gguf"))
    assert materialise("some/model") == "some/model"


def test_the_encoder_applies_the_chat_template_once(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(settings(tiny_model), str(tiny_model))
    ids = prompt_encoder(tokenizer)([{"role": "user", "content": "When is my refund due?"}])
    assert all(type(i) is int for i in ids)
    text = str(tokenizer.decode(ids))
    assert text.count("When is my refund due?") == 1
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_stop_tokens_are_those_of_generation_config_and_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(settings(tiny_model), str(tiny_model))
    end = tokenizer.eos_token_id
    assert stop_token_ids(str(tmp_path), tokenizer) == (end,)
    file = tmp_path / "generation_config.json"
    for written, expected in (([7, end, 9], (7, end, 9)), (7, (7, end)), (None, (end,))):
        file.write_text(json.dumps({"eos_token_id": written}))
        assert stop_token_ids(str(tmp_path), tokenizer) == expected


def test_stop_tokens_of_a_hub_id_are_read_at_its_revision_or_it_is_said_why_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(settings(tiny_model), str(tiny_model))
    end = tokenizer.eos_token_id
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 9]}))
    asked: list[Any] = []
    outcome: list[Exception | None] = [None, EntryNotFoundError("none"), OSError("no network")]

    def download(*given: Any, **more: Any) -> str:
        asked.append((*given, more["revision"]))
        if (error := outcome.pop(0)) is not None:
            raise error
        return str(file)

    monkeypatch.setattr("rlhf.model_files.hf_hub_download", download)
    assert stop_token_ids("org/model", tokenizer, "abc") == (7, 9, end)
    assert asked == [("org/model", "generation_config.json", "abc")]
    assert stop_token_ids("org/model", tokenizer) == (end,)
    with pytest.raises(InputError, match="generation_config.json of org/model: no network"):
        stop_token_ids("org/model", tokenizer)


def test_an_answer_ends_with_the_token_that_the_template_ends_it_with(tiny_model: Path) -> None:
    """A model may stop at several; the first of its list is often one that no turn ends with."""
    tokenizer = load_tokenizer(settings(tiny_model), str(tiny_model))
    end = int(str(tokenizer.convert_tokens_to_ids("<|im_end|>")))
    other = end + 500
    for stop_ids in ((end,), (other, end), (end, other)):
        assert answer_end(tokenizer, stop_ids) == end
    # One whose generation prompt is not what it shows of an answer.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "add_generation_prompt %}", "add_generation_prompt %}<think>"
    )
    assert answer_end(tokenizer, (other, end)) == end


def test_settings_of_generation_that_saving_would_refuse_go_along(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    file = model / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False}))
    policy = Policy(settings(model, tuning="full"), str(model), "cpu", 0)
    target = tmp_path / "saved"
    target.mkdir()
    policy.save(target, "card")
    assert json.loads((target / file.name).read_text())["temperature"] == 0.6
