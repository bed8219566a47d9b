"""A model's weights by name, past any adapter: loaded, read, written into place, dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf.config_learner import Model
from rlhf.errors import InputError
from rlhf.files import SHARD
from rlhf.partition import WHOLE


def load_base(config: Model, path: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The model at `path` without any adapter, in NF4 where `config.tuning` is qlora.

    Raises InputError where it can't be loaded.
    """
    quantised = config.tuning == "qlora"
    options: dict[str, Any] = {}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": device}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            attn_implementation=config.attention,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: {path} could not be loaded: {error}") from None
    except ImportError as error:
        raise InputError(
            f"model.tuning {config.tuning}: {error}; pip install 'pairloop[qlora]'"
        ) from None
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped is not None and config.attention == "sdpa":
        # SDPA leaves soft-capping out without a word (Gemma-2): another model's log-probs.
        model.set_attn_implementation("eager")
    if not quantised:
        placed: nn.Module = model.to(device)
        return placed
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks and rounds an NF4 weight in place
        # when it first runs in eval mode: its gradients and what it dequantises to are wrong
        # from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    loaded: nn.Module = model
    return loaded


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name in the plain model -> the tensor that holds it: parameters and stored buffers, also
    where an adapter has moved them; what belongs to adapters is left out. NF4 stays NF4."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        stored = dict(module.named_parameters(recurse=False)) | {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        plain = path.removesuffix(".base_layer")
        found |= {f"{plain}.{name}" if plain else name: tensor for name, tensor in stored.items()}
    return found


def write_weights(
    folder: Path, weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Tensor]
) -> None:
    """Store a model's weights as Transformers does: safetensors of at most `SHARD`, and an index
    where there are several. A file is written once all of its weights have come, and they are let
    go: where they come in the order of `shapes`, no more than a file's is held.

    `shapes` holds an empty tensor (on the meta device) for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=SHARD)
    held: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, weight in weights:
        file = split.tensor_to_filename[name]
        held[file][name] = weight
        del weight
        if len(held[file]) == len(split.filename_to_tensors[file]):
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
    assert not held, f"weights that never came for {sorted(held)}"
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All that a folder's safetensors hold, by name, on the CPU, read as it is looked at."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor(name)


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shape of each, without reading it."""
    shapes: dict[str, torch.Size] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                shapes[name] = torch.Size(opened.get_slice(name).get_shape())
    return shapes


def write_into(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    gathered: Callable[
        [Sequence[nn.Parameter], bool], AbstractContextManager[None]
    ] = WHOLE.gathered,
) -> None:
    """Copy weights, in the order in which they come, to their places in a model, adapted or not,
    rounded to what is held there; `gathered` as `Partition.gathered`."""
    places = named_weights(model)
    with torch.no_grad():
        for name, weight in weights:
            place = places.get(name)
            if place is not None:
                with gathered([place] if isinstance(place, nn.Parameter) else [], True):
                    place.copy_(weight)


def dequantised(weight: Tensor) -> Tensor:
    """An NF4 weight as numbers, any other as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


class Digest:
    """What whole weights are told apart by, wherever they lie: on a GPU, in a file, in an order of
    its own. Of each weight all rows and all columns are marked where they lie, by the exclusive or
    of their numbers, so that a GPU's weights need not come to the host to be hashed."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Weights count as what they are in `dtype`."""
        self._dtype = dtype
        self._lines: list[str] = []

    def add(self, name: str, weight: Tensor) -> None:
        """Take a weight into account, once."""
        # 0 and -0 are one number, and a merge makes one of the other.
        held = in_precision(weight, self._dtype) + 0
        rows = held.reshape(len(held), -1) if held.dim() > 1 else held.reshape(1, -1)
        marks = sha256()
        if rows.numel():
            for axis in (0, 1):
                marks.update(torch.hash_tensor(rows, dim=axis).cpu().numpy().tobytes())
        self._lines.append(f"{name} {held.dtype} {[*held.shape]} {marks.hexdigest()}\n")

    def hexdigest(self) -> str:
        """SHA-256 over names, types, shapes and marks, in name order."""
        return sha256("".join(sorted(self._lines)).encode()).hexdigest()


def in_precision(weight: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """A weight in compute precision; what isn't a fraction stays as it is."""
    return weight.to(dtype=dtype if weight.is_floating_point() else weight.dtype, **options)


def stored_digest(folder: Path, dtype: torch.dtype) -> str:
    """`Digest` of all that a folder's safetensors hold."""
    digest = Digest(dtype)
    for name, weight in stored_weights(folder):
        digest.add(name, weight)
    return digest.hexdigest()
