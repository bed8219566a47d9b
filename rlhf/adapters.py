"""Adapter folders from outside: only safetensors are loaded; older weights are imported once.

PEFT used to save `adapter_model.bin`, a pickle, which can run code while it is read. The import
reads tensors and nothing else of it, holds them against `adapter_config.json`, and writes
safetensors.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import InputError
from rlhf.files import atomic_folder

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OLDER = "adapter_model.bin"
PLAIN_SETTINGS = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "task_type", "inference_mode", "base_model_name_or_path", "revision",
    "peft_type", "peft_version", "auto_mapping", "megatron_core", "runtime_config", "eva_config",
    "lora_ga_config", "loftq_config", "corda_config", "qalora_group_size",
}  # fmt: skip
"""Settings of a LoRA adapter that is W + scale * B A, whatever they say."""
_INITS = ("gaussian", "orthogonal", "eva", "lora_ga")
"""Initialisations by name that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ subtract from
it when PEFT loads the adapter, which nobody else does."""
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")


def check_adapter(folder: Path) -> None:
    """Raises InputError where `model.adapter` is not a PEFT folder with a plain LoRA adapter in
    safetensors: W + scale * B A and nothing else, which can be merged and which vLLM can load."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"model.adapter: {folder} is not a PEFT folder ({CONFIG})")
    beyond = _beyond_plain(_config(folder / CONFIG))
    if beyond:
        raise InputError(
            f"model.adapter: {folder} must be a plain LoRA adapter, got one with "
            f"{', '.join(beyond)}: it can't be merged, or vLLM can't load it; merge it into its "
            "base with PEFT (`merge_and_unload`) and name the result in model.path"
        )
    if (folder / ADAPTER).is_file():
        return
    if (folder / OLDER).is_file():
        command = shlex.join(["pairloop", "import-adapter", str(folder), f"{folder}-safetensors"])
        raise InputError(
            f"model.adapter: {folder} has its weights in {OLDER}, a pickle, and only safetensors "
            f"are loaded; import it once with `{command}` and name the new folder"
        )
    raise InputError(f"model.adapter: {folder} must have {ADAPTER}, and has not")


def highest_rank(folder: Path) -> int:
    """That of the layers of `model.adapter`."""
    config = _config(folder / CONFIG)
    return max(int(rank) for rank in (config.r, *(config.rank_pattern or {}).values()))


def import_adapter(old: Path, new: Path) -> int:
    """Write the LoRA adapter in `old`, saved as `adapter_model.bin`, as safetensors into `new`.

    The number of its tensors. Raises InputError where the folder is no such adapter, where its
    pickle holds anything but tensors, or where those aren't what its config describes; then nothing
    of the pickle has run and nothing is written.
    """
    for name in (CONFIG, OLDER):
        if not (old / name).is_file():
            raise InputError(f"{old} must be an adapter folder with {name}, and has none")
    if new.exists():
        raise InputError(f"{new} exists already; give the name of a new folder")
    config = _config(old / CONFIG)
    weights = _tensors(old / OLDER)
    _check(weights, config, old)
    with atomic_folder(new) as folder:
        shutil.copyfile(old / CONFIG, folder / CONFIG)
        # Tensors that share memory in the pickle become tensors of their own.
        kept = {name: weights[name].clone().contiguous() for name in sorted(weights)}
        save_file(kept, folder / ADAPTER, metadata={"format": "pt"})
    return len(weights)


def _config(path: Path) -> LoraConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = PeftConfig.from_peft_type(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a PEFT config: {error}") from None
    if not isinstance(config, LoraConfig):
        raise InputError(f"{path}: peft_type must be LORA, got {values.get('peft_type')}")
    return config


def _beyond_plain(config: LoraConfig) -> list[str]:
    """What of an adapter's config is more than a plain LoRA, as `setting value`."""
    default = LoraConfig()
    beyond = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in fields(config)
        # Unset is written as None, an empty list or an empty mapping.
        if field.name not in PLAIN_SETTINGS
        and (getattr(config, field.name) or False) != (getattr(default, field.name) or False)
    ]
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _INITS:
        beyond.append(f"init_lora_weights {init!r}")
    return beyond


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch wraps what was found in advice to trust the file.
        reason = str(error.__context__ or error).split(". Please")[0]
        raise InputError(
            f"{path} holds more than tensors, or is no pickle of them, and was not run: {reason}; "
            "get the adapter again from its author, as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path} could not be read as weights: {reason}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} must hold tensors by name, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path} must hold tensors by name, got {name!r}: {type(value).__name__}"
            )
        if not value.is_floating_point() or not value.isfinite().all():
            raise InputError(f"{path}: {name} must hold finite numbers, and does not")
    return found


def _check(weights: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Each tensor is half of the update of a layer that the config targets, of the config's rank;
    no half is missing."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{folder / OLDER}: {key} is no weight of a plain LoRA adapter")
        module, half = match[1], match[2] or match[3]
        if config.target_modules != "all-linear" and not check_target_module_exists(config, module):
            raise InputError(
                f"{folder / OLDER}: {key} is of a layer that target_modules of {CONFIG} leaves out"
            )
        halves.setdefault(module, {})[half] = tensor
    ranks = config.rank_pattern or {}
    for module, pair in halves.items():
        rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{folder / OLDER}: {module} has only half of its update: {[*pair]}")
        shapes = [tuple(pair[half].shape) for half in "AB"]
        if [len(s) for s in shapes] != [2, 2] or not shapes[0][0] == shapes[1][1] == rank:
            raise InputError(
                f"{folder / OLDER}: {module} must have rank {rank} as {CONFIG} says, A {rank} x in "
                f"and B out x {rank}, got {shapes[0]} and {shapes[1]}"
            )
    named = config.target_modules
    absent = [
        target
        for target in sorted(named if isinstance(named, set | list) else ())
        if not any(f".{module}".endswith(f".{target}") for module in halves)
    ]
    if absent:
        raise InputError(
            f"{folder / OLDER} has no weights for {absent}, which target_modules of {CONFIG} names"
        )
