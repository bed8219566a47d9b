"""A model's files: found or converted, its tokenizer with a chat template, what ends an answer."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.config_learner import Model
from rlhf.errors import InputError
from rlhf.files import atomic_folder, read_json
from rlhf.model_cache import made_of
from rlhf.types import Message


def materialise(path: str) -> str:
    """A path that Transformers loads: a .gguf file is converted once into the user cache.

    Weights are dequantised and stored in bf16, the tokenizer and its chat template beside them.
    """
    source = Path(path)
    if source.suffix != ".gguf":
        return path
    if not source.is_file():
        raise InputError(f"model.path: there is no file {source}")
    target = made_of(source)
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        # Two runs may start at once: the second waits, and takes what the first converted.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _convert(source, target)
    return str(target)


def _convert(source: Path, target: Path) -> None:
    from transformers import GgufConfig

    folder, file_name = str(source.parent), source.name
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file_name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
    with atomic_folder(target) as staging:
        model.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def load_tokenizer(config: Model, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template; an InputError where either is missing."""
    _check_local(path)
    if Path(path).is_dir() and not any(
        (Path(path) / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    ):
        raise InputError(
            f"model.path: the folder {path} has no tokenizer (tokenizer.json or tokenizer.model); "
            "save the model's tokenizer into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: no tokenizer could be loaded from {path}: {error}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"model.path: the tokenizer of {path} has no chat template; pairloop trains instruct "
            "models: take the -Instruct variant, or put a chat_template.jinja beside the tokenizer"
        )
    return tokenizer


def prompt_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Message]], list[int]]:
    """The one place where the chat template is applied: messages -> prompt token ids."""

    def encode(messages: Sequence[Message]) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return list(encoded["input_ids"])

    return encode


def stop_token_ids(
    model_path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> tuple[int, ...]:
    """Every token that ends an answer: the generation config's, of a folder or a hub id at a
    `revision`, and the tokenizer's."""
    ids: list[int] = []
    file = Path(model_path) / "generation_config.json"
    if not Path(model_path).is_dir():
        try:
            file = Path(hf_hub_download(model_path, file.name, revision=revision))
        except EntryNotFoundError:
            # Many models have no such file.
            pass
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: {file.name} of {model_path}: {error}") from error
    stop = (
        read_json(file, "put the model's own there").get("eos_token_id") if file.exists() else None
    )
    ids += stop if isinstance(stop, list) else [] if stop is None else [stop]
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(ids))


def answer_end(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> int:
    """The token that ends an answer in the chat template: of several that stop a generation, a
    model says that one after its turn."""
    user, assistant = ({"role": role, "content": "Hello"} for role in ("user", "assistant"))
    asked = prompt_encoder(tokenizer)([Message(role="user", content=user["content"])])
    encoded: Any = tokenizer.apply_chat_template([user, assistant], tokenize=True, return_dict=True)
    ids = list(encoded["input_ids"])
    # A template may open an answer in another way than it shows one.
    turn = ids[len(asked) :] if ids[: len(asked)] == asked else ids[::-1]
    found = next((token for token in turn if token in stop_ids), tokenizer.eos_token_id)
    return int(stop_ids[0] if found is None else found)


def _check_local(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise InputError(f"model.path: there is no folder {path}; give a folder or a hub id")
