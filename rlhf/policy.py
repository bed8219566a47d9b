"""Load a policy (full, LoRA, NF4 QLoRA) with its tokenizer; save it, restore it, merge it.

Whatever the tuning, the rest of the house sees the same few verbs. Trained weights are kept in
fp32 (masters) and computed in `model.precision` under autocast; a frozen base is held in that
precision, or in NF4.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from rlhf.adapters import ADAPTER, check_adapter
from rlhf.config_learner import Model
from rlhf.errors import InputError
from rlhf.files import atomic_folder
from rlhf.types import Message

Gathered = Callable[[Sequence[nn.Parameter], bool], AbstractContextManager[None]]
"""While entered, these parameters are whole on every rank; with True, what rank 0 makes of them
stays."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_cache() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/pairloop/models`."""
    import os

    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "pairloop" / "models"


def materialise(path: str) -> str:
    """A path that Transformers loads: a .gguf file is converted once into the user cache.

    Weights are dequantised and stored in bf16, the tokenizer and its chat template beside them.
    """
    source = Path(path)
    if source.suffix != ".gguf":
        return path
    if not source.is_file():
        raise InputError(f"model.path: there is no file {source}")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = model_cache() / f"{source.stem}-{digest}"
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


def stop_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends an answer: the generation config's and the tokenizer's."""
    ids: list[int] = []
    file = Path(model_path) / "generation_config.json"
    if file.exists():
        stop = json.loads(file.read_text()).get("eos_token_id")
        ids += stop if isinstance(stop, list) else [] if stop is None else [stop]
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(ids))


class Policy:
    """The model being trained, on one device."""

    def __init__(self, config: Model, path: str, device: str, seed: int) -> None:
        self.config = config
        self.path = path
        self.device = device
        self.dtype = DTYPES[config.precision]
        self.tokenizer = load_tokenizer(config, path)
        self.stop_ids = stop_token_ids(path, self.tokenizer)
        base = self._load_base()
        if config.tuning == "full":
            self.model: nn.Module = base
        elif config.adapter is not None:
            self.model = self._continue_adapter(base, config.adapter)
        else:
            torch.manual_seed(seed)
            self.model = get_peft_model(base, self._lora_config())
        if self.adapted:
            self._check_mergeable()
        self._initial = (
            {n: p.detach().cpu().clone() for n, p in self.trainable()} if self.adapted else None
        )
        self.gathered: Gathered = lambda parameters, write: nullcontext()
        """Set by whoever splits the weights over ranks; entered by all ranks together."""

    @property
    def adapted(self) -> bool:
        """Whether only an adapter is trained."""
        return self.config.tuning != "full"

    @property
    def pad_id(self) -> int:
        """Any valid id: padded positions are masked and never scored."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0])

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters in a stable order."""
        return sorted((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def autocast(self) -> torch.autocast:
        """The precision that forward passes run in."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(torch.device(self.device).type, dtype=self.dtype, enabled=enabled)

    @contextmanager
    def reference(self, kind: str) -> Iterator[nn.Module]:
        """The model that the objective holds the policy to, for one gradient-free pass.

        `round_start` is the policy as it stands; `initial` is the run's start: the adapter switched
        off, the adapter the run started from, or (full tuning) the base loaded for this pass only.
        """
        if kind == "round_start":
            yield self.model
        elif not self.adapted:
            initial = self._load_base()
            yield initial
            del initial
        elif self.config.adapter is None:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model
        else:
            self.model.set_adapter("reference")  # type: ignore[operator]
            try:
                yield self.model
            finally:
                self.model.set_adapter("default")  # type: ignore[operator]

    def save(self, folder: Path, card: str, write: bool = True) -> None:
        """A Hugging Face folder (PEFT adapter, or fp32 masters) with tokenizer and model card.

        Where weights are split over ranks, all ranks call this, and one of them writes.
        """
        if self.adapted:
            assert isinstance(self.model, PeftModel)
            with self.gathered([p for _, p in self.trainable()], False):
                found = get_peft_model_state_dict(self.model, adapter_name="default")
                weights = {n: t.detach().cpu().contiguous() for n, t in sorted(found.items())}
            if not write:
                return
            save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
            described = self.model.peft_config["default"].to_dict()
            described["inference_mode"] = True
            described["base_model_name_or_path"] = self.path
            described["revision"] = self.config.revision
            (folder / "adapter_config.json").write_text(_stable_json(described))
        else:
            self._save_whole(folder, torch.float32, write)
        if not write:
            return
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def save_merged(self, folder: Path, write: bool = True) -> None:
        """A whole model folder in compute precision: base (dequantised if NF4) plus adapter.

        `write` as for `save`.
        """
        self._save_whole(folder, self.dtype, write)
        if write:
            self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path | None) -> None:
        """Load trained weights that `save` wrote; None goes back to the start of the run."""
        if self.adapted:
            assert isinstance(self.model, PeftModel)
            if folder is None:
                assert self._initial is not None
                self._fill(dict(self.trainable()), self._initial)
            else:
                weights = load_file(folder / ADAPTER)
                # PEFT loads what fits and says nothing of the rest.
                expected = get_peft_model_state_dict(self.model, adapter_name="default").keys()
                if weights.keys() != expected:
                    odd = sorted(weights.keys() ^ expected)[:3]
                    raise InputError(f"{folder}: not this policy's adapter: {odd} on one side only")
                with self.gathered([p for _, p in self.trainable()], True):
                    set_peft_model_state_dict(self.model, weights, adapter_name="default")
            return
        weights = self._load_base().state_dict() if folder is None else _load_whole(folder)
        expected = self.model.state_dict().keys()
        missing = sorted(expected - weights.keys() - self._tied().keys())
        unexpected = sorted(weights.keys() - expected)
        if missing or unexpected:
            raise InputError(f"{folder}: missing {missing[:3]}, unexpected {unexpected[:3]}")
        self._fill(dict(self.model.named_parameters()), weights)
        self._fill(dict(self.model.named_buffers()), weights)

    def _fill(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Copy weights into tensors of the model; a buffer that isn't stored stays."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in weights:
                    with self.gathered([tensor] if isinstance(tensor, nn.Parameter) else [], True):
                        tensor.copy_(weights[name])

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the plain model, adapter added in fp32, tied copies left out.

        One layer at a time, so that weights which are split over ranks are never whole together.
        """
        plain, tied = self.plain_model(), self._tied()
        adapted: dict[str, Any] = {
            n: m for n, m in plain.named_modules() if isinstance(m, LoraLayer)
        }
        for name, adapter in adapted.items():
            layer: Any = adapter.get_base_layer()
            with self.gathered(list(adapter.parameters()), False):
                delta = adapter.get_delta_weight("default").float()
                yield f"{name}.weight", (_dequantised(layer.weight).float() + delta).detach()
                if getattr(layer, "bias", None) is not None:
                    yield f"{name}.bias", layer.bias.detach()
        inside = tuple(f"{name}." for name in adapted)
        for module_name, module in plain.named_modules():
            if f"{module_name}.".startswith(inside):
                continue
            for own, parameter in module.named_parameters(recurse=False):
                if (name := f"{module_name}.{own}") not in tied:
                    with self.gathered([parameter], False):
                        yield name, _dequantised(parameter).detach()
            for own, buffer in module.named_buffers(recurse=False):
                if own not in module._non_persistent_buffers_set:
                    yield f"{module_name}.{own}", buffer.detach()

    def _save_whole(self, folder: Path, dtype: torch.dtype, write: bool) -> None:
        from huggingface_hub import save_torch_state_dict

        weights = {
            n: w.to("cpu", dtype if w.is_floating_point() else w.dtype, copy=True).contiguous()
            for n, w in self.merged_weights()
            if write
        }
        if not write:
            return
        save_torch_state_dict(dict(sorted(weights.items())), folder, metadata={"format": "pt"})
        config = AutoConfig.from_pretrained(
            self.path,
            revision=self.config.revision,
            trust_remote_code=self.config.trust_remote_code,
        )
        config.dtype = dtype
        config.save_pretrained(folder)
        plain = self.plain_model()
        if plain.generation_config is not None:
            plain.generation_config.save_pretrained(folder)

    def _tied(self) -> dict[str, str]:
        """Weights that are another's under a second name -> that other's name."""
        plain = self.plain_model()
        if not getattr(plain.config, "tie_word_embeddings", False):
            return {}
        return dict(getattr(plain, "all_tied_weights_keys", None) or {})

    def plain_model(self) -> Any:
        """The model without its adapter's wrapper."""
        model: Any = self.model
        return model.get_base_model() if self.adapted else model

    def _load_base(self) -> nn.Module:
        quantised = self.config.tuning == "qlora"
        # Full tuning trains fp32 masters; a frozen base can rest in compute precision.
        dtype = torch.float32 if self.config.tuning == "full" else self.dtype
        options: dict[str, Any] = {}
        if quantised:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
            options["device_map"] = {"": self.device}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                revision=self.config.revision,
                trust_remote_code=self.config.trust_remote_code,
                dtype=dtype,
                attn_implementation=self.config.attention,
                use_safetensors=True,
                **options,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: {self.path} could not be loaded: {error}") from None
        except ImportError as error:
            raise InputError(
                f"model.tuning {self.config.tuning}: {error}; pip install 'pairloop[qlora]'"
            ) from None
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        if capped is not None and self.config.attention == "sdpa":
            # SDPA leaves soft-capping out without a word (Gemma-2): another model's log-probs.
            model.set_attn_implementation("eager")
        if not quantised:
            placed: nn.Module = model.to(self.device)
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

    def _check_mergeable(self) -> None:
        """Only a plain LoRA off the tied weights is the same model when merged and when adapted."""
        assert isinstance(self.model, PeftModel)
        plain = self.model.get_base_model()
        tied = self._tied()
        for name, module in plain.named_modules():
            if isinstance(module, LoraLayer) and f"{name}.weight" in {*tied, *tied.values()}:
                raise InputError(
                    f"model.lora.target_modules: {name} shares its weight with another layer of "
                    f"{self.path} (tied embeddings), so an adapter on it can't be merged; leave it "
                    "out"
                )
        lora = self.model.peft_config["default"]
        beyond = [
            setting
            for setting in (
                "use_dora",
                "lora_bias",
                "modules_to_save",
                "target_parameters",
                "trainable_token_indices",
            )
            if getattr(lora, setting, None)
        ]
        if not isinstance(lora, LoraConfig) or beyond or lora.bias != "none":
            raise InputError(
                f"model.adapter: {self.config.adapter} must be a plain LoRA adapter, got "
                f"{lora.peft_type} with {beyond or getattr(lora, 'bias', None)}; merge it into its "
                "base and start from that"
            )

    def _lora_config(self) -> LoraConfig:
        lora = self.config.lora
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # only ever divided
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )

    def _continue_adapter(self, base: nn.Module, adapter: str) -> PeftModel:
        check_adapter(Path(adapter))
        model = PeftModel.from_pretrained(
            base, adapter, adapter_name="default", is_trainable=True, use_safetensors=True
        )
        model.load_adapter(adapter, adapter_name="reference", is_trainable=False)
        model.set_adapter("default")
        return model


def _check_local(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise InputError(f"model.path: there is no folder {path}; give a folder or a hub id")


def _dequantised(weight: Tensor) -> Tensor:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def _load_whole(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def _stable_json(values: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        # PEFT keeps module names in sets, whose order changes with every process.
        if isinstance(value, set | frozenset):
            return sorted(value)
        return getattr(value, "value", str(value))

    return json.dumps(values, indent=2, sort_keys=True, default=plain) + "\n"
