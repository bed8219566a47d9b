"""How large a model is, from its config alone: no weights are read, and nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.files import atomic_write, read_json
from rlhf.model_cache import made_of
from rollout.imports import resolve_path

GATED = ("gemma", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are those counted here: grouped attention and a gated MLP."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder: L layers of q, k, v, o and gate, up, down, between an embedding and a head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The head is the embedding."""
    biases: int = 0
    """Bias elements of a layer."""
    head_norms: bool = False
    """Queries and keys are normalised head by head (Qwen3)."""

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of each linear layer of a decoder layer."""
        h, q, k, i = self.hidden, self.query, self.key, self.intermediate
        return {
            "q_proj": (h, q),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def linear(self) -> int:
        """Weights of the decoder's linear layers: what NF4 quantises and LoRA adapts."""
        return self.layers * sum(i * o for i, o in self.shapes.values())

    @property
    def embedding(self) -> int:
        """Weights of the embedding; an untied head has as many again."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, a tied head counted once."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        embeddings = self.embedding * (1 if self.tied else 2)
        return self.linear + embeddings + self.layers * (norms + self.biases) + self.hidden

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(elements, how many) of the weight tensors of each kind; biases are left out."""
        norms = [(self.hidden, 2 * self.layers + 1)]
        norms += [(self.head_dim, 2 * self.layers)] if self.head_norms else []
        linear = [(i * o, self.layers) for i, o in self.shapes.values()]
        return [(self.embedding, 1 if self.tied else 2), *linear, *norms]

    def adapter_tensors(self, rank: int, targets: str | Sequence[str]) -> list[tuple[int, int]]:
        """(elements, how many) of a LoRA's tensors: rank x in and rank x out of adapted layers."""
        shapes = self.shapes | {"lm_head": (self.hidden, self.vocabulary)}
        names = list(self.shapes) if isinstance(targets, str) else list(targets)
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise InputError(
                f"model.lora.target_modules: {unknown} are no layers of this model; it has "
                f"{list(shapes)}"
            )
        times = {"lm_head": 1}
        return [(rank * side, times.get(n, self.layers)) for n in names for side in shapes[n]]

    def adapter(self, rank: int, targets: str | Sequence[str]) -> int:
        """Weights of a LoRA: rank x (in + out) for each adapted layer."""
        return sum(size * count for size, count in self.adapter_tensors(rank, targets))

    @classmethod
    def read(cls, config: Mapping[str, Any], path: str) -> Architecture:
        """From a Hugging Face config. Raises InputError for models that are built otherwise."""
        kind = config.get("model_type")
        if kind not in GATED:
            raise InputError(
                f"the memory of {path} is not known: its model type is {kind}, and the formulas "
                f"are those of {', '.join(GATED)}"
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        key_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        query, key, inner = heads * head_dim, key_heads * head_dim, config["intermediate_size"]
        biases = query + 2 * key if kind == "qwen2" or config.get("attention_bias") else 0
        biases += hidden if kind != "qwen2" and config.get("attention_bias") else 0
        biases += 2 * inner + hidden if config.get("mlp_bias") else 0
        return cls(
            config["num_hidden_layers"],
            hidden,
            heads,
            key_heads,
            head_dim,
            inner,
            config["vocab_size"],
            config.get("tie_word_embeddings", kind == "gemma"),
            biases,
            kind == "qwen3",
        )


KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "google/gemma-2b-it": {
        "model_type": "gemma",
        "num_hidden_layers": 18,
        "hidden_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 16384,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-70B-Instruct": {
        "model_type": "llama",
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""What the presets' models, and a large one, say in their config.json, so that a plan needs no
network."""


def find(path: str, revision: str | None = None) -> Architecture:
    """The architecture of `model.path`: a folder, a .gguf file, or a hub id.

    Of a hub id, the config is taken from the hub's cache on this machine, else from `KNOWN`.
    Raises InputError where neither has it, or where the model is built otherwise.
    """
    local = resolve_path(path)
    if local.suffix == ".gguf":
        if not local.is_file():
            raise InputError(f"model.path: there is no file {local}")
        return Architecture.read(_gguf(local), path)
    if local.is_dir():
        file = local / "config.json"
        if not file.is_file():
            raise InputError(f"model.path: the folder {path} has no config.json")
        return Architecture.read(read_json(file, "put the model's own there"), path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        raise InputError(f"model.path: there is no folder {path}, and it is no hub id") from None
    if isinstance(cached, str):
        return Architecture.read(json.loads(Path(cached).read_text(encoding="utf-8")), path)
    if path in KNOWN:
        return Architecture.read(KNOWN[path], path)
    raise InputError(
        f"the memory of {path} is not known: its config is not on this machine; "
        f"`hf download {path} config.json` fetches it"
    )


def _gguf(path: Path) -> dict[str, Any]:
    """`_header`, read once a user: it takes seconds, since it holds the whole vocabulary."""
    kept = made_of(path, ".config.json")
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    found = _header(path)
    # Without a cache that can be written it is read again, every time.
    with suppress(OSError, InputError):
        atomic_write(kept, json.dumps(found).encode())
    return found


def _header(path: Path) -> dict[str, Any]:
    """A GGUF file's header, under the names of a Hugging Face config."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = reader.fields
    kind = fields["general.architecture"].contents()

    def value(name: str) -> Any:
        return fields[f"{kind}.{name}"].contents() if f"{kind}.{name}" in fields else None

    return {
        "model_type": kind,
        "num_hidden_layers": value("block_count"),
        "hidden_size": value("embedding_length"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length"),
        "intermediate_size": value("feed_forward_length"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"].data),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
