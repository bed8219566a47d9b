"""Older adapters become safetensors with the same outputs; a pickle never runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import save_small_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from launch.cli import main
from rlhf.adapters import PLAIN_SETTINGS, check_adapter, import_adapter
from rlhf.config_learner import Model
from rlhf.errors import InputError
from rlhf.policy import Policy
from rollout.vllm_generator import served_rank

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A = f"{LAYER}.lora_A.weight"
Weights = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def old(base: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT saved it before safetensors, off its start."""
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    ranks = {"down_proj": 2}
    lora = LoraConfig(r=4, target_modules=targets, rank_pattern=ranks, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(tmp_path / "old"))
    stored = tmp_path / "old/adapter_model.safetensors"
    torch.save(load_file(stored), tmp_path / "old/adapter_model.bin")
    stored.unlink()
    return tmp_path / "old"


def logits(base: Path, adapter: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(10, 30)[None]).logits
    return found


def rewrite(old: Path, change: Callable[[Weights], object]) -> None:
    weights = torch.load(old / "adapter_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, old / "adapter_model.bin")


def test_peft_and_the_policy_load_what_was_imported_with_the_same_outputs(
    base: Path, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert main(["import-adapter", str(old), str(new)]) == 0
    assert str(new) in capsys.readouterr().out
    assert {f.name for f in new.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    expected = logits(base, old)
    assert torch.equal(logits(base, new), expected)
    assert not torch.equal(expected, logits_of(AutoModelForCausalLM.from_pretrained(base)))
    settings = Model(path=str(base), adapter=str(new), precision="fp32")
    policy = Policy(settings, settings.path, "cpu", 0)
    assert torch.equal(logits_of(policy.model), expected)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(10, 30)[None]).logits
    return found


def test_a_policy_names_the_command_for_an_older_adapter(base: Path, old: Path) -> None:
    settings = Model(path=str(base), adapter=str(old), precision="fp32")
    said = rf"model\.adapter: .*a pickle.*`pairloop import-adapter {old} {old}-safetensors`"
    with pytest.raises(InputError, match=said):
        Policy(settings, settings.path, "cpu", 0)
    (old / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"model\.adapter: .* must have adapter_model\.safetens"):
        Policy(settings, settings.path, "cpu", 0)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], legacy: bool
) -> None:
    ran, new = tmp_path / "ran", tmp_path / "new"
    weights = torch.load(old / "adapter_model.bin", weights_only=True)
    weights["extra"] = Malicious(ran)
    torch.save(weights, old / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    assert main(["import-adapter", str(old), str(new)]) == 2
    said = capsys.readouterr().err
    assert "was not run" in said
    assert "mkdir" in said
    assert not ran.exists()
    assert not new.exists()
    # The same file does harm where it is trusted.
    torch.load(old / "adapter_model.bin", weights_only=False)
    assert ran.is_dir()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.update(step=3), r"tensors by name, got 'step': int"),
        (lambda w: w.update({"lm_head.weight": torch.ones(2, 2)}), r"lm_head\.weight is no weight"),
        (
            lambda w: w.update({LAYER.replace("q_proj", "v_proj") + ".lora_A.weight": w[A]}),
            r"v_proj.* is of a layer that target_modules",
        ),
        (lambda w: w.pop(A), r"q_proj has only half of its update: \['B'\]"),
        (lambda w: w.update({A: w[A][:3]}), r"must have rank 4 .*got \(3, 64\) and \(64, 4\)"),
        (lambda w: w[A].mul_(float("nan")), r"lora_A\.weight must hold finite numbers"),
        (lambda w: [w.pop(k) for k in [*w] if "down_proj" in k], r"no weights for \['down_proj'\]"),
        (lambda w: w.clear(), r"must hold tensors by name, got dict"),
    ],
)
def test_what_the_config_does_not_describe_is_refused(
    old: Path, tmp_path: Path, change: Callable[[Weights], object], expected: str
) -> None:
    rewrite(old, change)
    with pytest.raises(InputError, match=expected):
        import_adapter(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_that_can_not_be_imported_are_refused(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    with pytest.raises(InputError, match=r"exists already"):
        import_adapter(old, tmp_path)
    (old / "adapter_model.bin").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"adapter_model\.bin"):
        import_adapter(old, new)
    config = old / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "peft_type": "IA3"}))
    with pytest.raises(InputError, match=r"peft_type must be LORA, got IA3|is not a PEFT config"):
        import_adapter(old, new)
    config.write_text("{")
    with pytest.raises(InputError, match=r"is not a PEFT config"):
        import_adapter(old, new)
    (old / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"with adapter_model\.bin, and has none"):
        import_adapter(old, new)
    assert not new.exists()


BEYOND = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "target_parameters": ["mlp.experts.down_proj"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {},
    "velora_config": {},
    "monteclora_config": {},
    "megatron_config": {"hidden_size": 64},
    "ensure_weight_tying": True,
}
SUBTRACTED = ("pissa", "pissa_niter_4", "olora", "corda", "loftq")
"""Initialisations that change the base when PEFT loads the adapter."""
PLAIN: tuple[dict[str, Any], ...] = (
    {},
    {"use_rslora": True},
    {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    {"lora_dropout": 0.1, "layers_to_transform": [1], "target_modules": ["q_proj"]},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False},
)


def described(folder: Path, **settings: Any) -> Path:
    """An adapter folder with this config, as PEFT writes it; its weights are not looked at."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    folder.mkdir()
    values = lora.to_dict() | settings
    (folder / "adapter_config.json").write_text(json.dumps(values, default=list))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.mark.parametrize("setting", BEYOND)
def test_an_adapter_that_is_more_than_plain_lora_is_refused(setting: str, tmp_path: Path) -> None:
    folder = described(tmp_path / "adapter", **{setting: BEYOND[setting]})
    with pytest.raises(
        InputError, match=rf"model\.adapter: .* plain LoRA adapter.*{setting} "
    ) as no:
        check_adapter(folder)
    assert "merge_and_unload" in str(no.value)


@pytest.mark.parametrize("init", SUBTRACTED)
def test_an_adapter_that_changes_its_base_is_refused(init: str, tmp_path: Path) -> None:
    more = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    folder = described(tmp_path / "adapter", init_lora_weights=init, **more)
    with pytest.raises(InputError, match=f"plain LoRA adapter.*init_lora_weights '{init}'"):
        check_adapter(folder)


@pytest.mark.parametrize("settings", PLAIN, ids=str)
def test_a_plain_adapter_is_taken_whatever_its_ranks(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = described(tmp_path / "adapter", **settings)
    check_adapter(folder)
    # It was the config that let it pass: one setting more, and it is refused.
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="plain LoRA adapter.*use_dora"):
        check_adapter(described(folder, **settings, use_dora=True))


def test_every_setting_of_pefts_is_known_to_be_plain_or_refused() -> None:
    """A new version of PEFT may add one; until somebody has looked at it, it is refused."""
    unknown = {field.name for field in fields(LoraConfig)} - PLAIN_SETTINGS - BEYOND.keys()
    assert unknown == {"arrow_config"}


@pytest.mark.engine
def test_what_is_taken_is_what_vllm_loads(tmp_path: Path) -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    def loads(**settings: Any) -> bool:
        values = LoraConfig(r=12, target_modules=["q_proj"]).to_dict() | settings
        served = LoRAConfig(max_lora_rank=served_rank(12))
        try:
            PEFTHelper.from_dict(values).validate_legal(served)
        except ValueError:
            return False
        return True

    assert all(loads(**settings) for settings in PLAIN)
    refused = {name for name, value in BEYOND.items() if not loads(**{name: value})}
    assert {"use_dora", "modules_to_save", "bias", "lora_bias"} <= refused
    assert not any(loads(init_lora_weights=init) for init in SUBTRACTED)
    assert [served_rank(rank) for rank in (1, 8, 9, 12, 64, 65, 512)] == [
        8,
        8,
        16,
        16,
        64,
        128,
        512,
    ]
    with pytest.raises(InputError, match=r"rollout\.sync adapter: .* rank 512, got 513"):
        served_rank(513)
