"""Load a policy (full, LoRA, NF4 QLoRA) with its tokenizer; save it, restore it, merge it.

Whatever the tuning, the rest of the house sees the same few verbs. Trained weights are kept in
fp32 (masters) and computed in `model.precision` under autocast; a frozen base is held in that
precision, or in NF4. Where each round's adapter is merged into the base (`model.lora.rounds: new`),
the masters are the whole models in fp32 that rounds store: merged there, an update is not lost to a
base that rests in half precision.
"""

from __future__ import annotations

import gc
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from rlhf.adapters import ADAPTER, check_adapter
from rlhf.config_learner import Model
from rlhf.errors import InputError
from rlhf.model_files import load_tokenizer, stop_token_ids
from rlhf.partition import WHOLE, Partition, whole_shape
from rlhf.weights import (
    dequantised,
    in_precision,
    load_base,
    named_weights,
    stored_shapes,
    stored_weights,
    write_into,
    write_weights,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Policy:
    """The model being trained, on one device or in shares over several."""

    def __init__(
        self,
        config: Model,
        path: str,
        device: str,
        seed: int,
        partition: Partition = WHOLE,
    ) -> None:
        self.config = config
        self.partition = partition
        self.gathered = partition.gathered
        """See `Partition.gathered`."""
        self.path = path
        self.device = device
        self.dtype = DTYPES[config.precision]
        self.tokenizer = load_tokenizer(config, path)
        self.stop_ids = stop_token_ids(path, self.tokenizer, config.revision)
        if config.adapter is not None:
            check_adapter(Path(config.adapter))
        self._base: Path | None = None
        start = self._load_start()
        if config.tuning == "full":
            self.model: nn.Module = start
        elif config.adapter is not None and not config.merges:
            self.model = self._continue_adapter(start, config.adapter)
        else:
            torch.manual_seed(seed)
            self.model = get_peft_model(start, self._lora_config())
        if self.adapted:
            _refuse_tied(self.model, self._tied(), path)
        self._initial = (
            {n: p.detach().cpu().clone() for n, p in self.trainable()} if self.adapted else None
        )
        self.shares = False
        """Set where a weight's memory is not its own, or not for long: it is copied to be saved."""

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
        off, the adapter the run started from, or (where the base itself changes) the start loaded
        for this pass only.
        """
        if kind == "round_start":
            yield self.model
        elif self.config.whole:
            with self.partition.computing(self._load_start()) as initial:
                yield initial
            del initial
            # Split weights refer to themselves, and would stay.
            gc.collect()
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
        if not self.config.whole:
            assert isinstance(self.model, PeftModel)
            with self.gathered([p for _, p in self.trainable()], False):
                found = sorted(self._adapter_weights().items())
                weights = {n: t.detach().cpu().contiguous() for n, t in found}
            if not write:
                return
            save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
            described = self.model.peft_config["default"].to_dict()
            described["inference_mode"] = True
            described["base_model_name_or_path"] = self.path
            described["revision"] = self.config.revision
            (folder / "adapter_config.json").write_text(_stable_json(described))
        else:
            masters = self._masters(self._base) if self.config.merges else self._held()
            self._save_whole(folder, self._with_adapter(masters), torch.float32, write)
        if not write:
            return
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def save_merged(self, folder: Path, write: bool = True) -> None:
        """A whole model folder in compute precision: base (dequantised if NF4) plus adapter.

        `write` as for `save`.
        """
        self._save_whole(folder, self.merged_weights(), self.dtype, write)
        if write:
            self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path | None) -> None:
        """Load weights that `save` wrote; None goes back to the start of the run."""
        if self.config.whole:
            if folder is not None:
                self._check_shapes(folder)
            write_into(self.plain_model(), self._masters(folder), self.gathered)
            gc.collect()
            if self.config.merges:
                self._base = folder
                self._reset_adapter()
        elif folder is None:
            self._reset_adapter()
        else:
            weights = load_file(folder / ADAPTER)
            # PEFT loads what fits and says nothing of the rest.
            expected = self._adapter_weights().keys()
            if weights.keys() != expected:
                odd = sorted(weights.keys() ^ expected)[:3]
                raise InputError(f"{folder}: not this policy's adapter: {odd} on one side only")
            with self.gathered([p for _, p in self.trainable()], True):
                set_peft_model_state_dict(self.model, weights, adapter_name="default")

    def _adapter_weights(self) -> dict[str, Tensor]:
        # Unless told that no embedding is saved, PEFT asks the hub whether one was resized.
        weights: dict[str, Tensor] = get_peft_model_state_dict(
            self.model, adapter_name="default", save_embedding_layers=False
        )
        return weights

    def begin_round(self) -> None:
        """Where each round has an adapter of its own, draw it, with torch's generator: another
        random half, so that the rounds' updates span more than one adapter's rank."""
        if not self.config.merges:
            return
        with self.gathered([p for _, p in self.trainable()], True):
            for module in self.plain_model().modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", True)

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the plain model, adapter added in fp32, tied copies left out.

        One at a time, so that weights which are split over ranks are never whole together.
        """
        return self._with_adapter(self._held())

    def merged_shapes(self) -> list[tuple[str, torch.Size, torch.dtype]]:
        """(name, whole shape, type) of what `merged_weights` yields, in compute precision and in
        its order; nothing is gathered."""
        tied = self._tied()
        return [
            (name, *self._merged(held))
            for name, held in named_weights(self.plain_model()).items()
            if name not in tied
        ]

    def _merged(self, held: Tensor) -> tuple[torch.Size, torch.dtype]:
        if (nf4 := getattr(held, "quant_state", None)) is not None:
            return nf4.shape, self.dtype
        return whole_shape(held), self.dtype if held.is_floating_point() else held.dtype

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under the adapter, as they are held."""
        return self._whole(self.plain_model())

    def _whole(self, plain: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """A model's weights, each whole while it is looked at."""
        for name, weight in named_weights(plain).items():
            with self.gathered([weight] if isinstance(weight, nn.Parameter) else [], False):
                yield name, dequantised(weight)

    def _with_adapter(
        self, weights: Iterable[tuple[str, Tensor]], plain: Any = None
    ) -> Iterator[tuple[str, Tensor]]:
        """`weights` and, in fp32, what the adapter on `plain` (by default the policy) adds to them;
        tied copies left out."""
        plain = self.plain_model() if plain is None else plain
        adapted: dict[str, Any] = {
            f"{name}.weight": module
            for name, module in plain.named_modules()
            if isinstance(module, LoraLayer)
        }
        tied = _tied_weights(plain)
        for name, weight in weights:
            if name in tied:
                continue
            if name in adapted:
                added = [p for n, p in adapted[name].named_parameters() if "lora_" in n]
                with self.gathered(added, False):
                    delta = adapted[name].get_delta_weight("default")
                yield name, (weight.float() + delta.to(weight.device, torch.float32)).detach()
            else:
                yield name, weight.detach()

    def _masters(self, folder: Path | None) -> Iterator[tuple[str, Tensor]]:
        """A version's weights in fp32, as it is stored, one at a time; None: as the run starts."""
        if folder is not None:
            yield from stored_weights(folder)
            return
        with self.partition.loading(torch.float32, host=True):
            base: Any = load_base(self.config, self.path, "cpu", torch.float32)
        if self.config.adapter is None:
            yield from self._whole(base)
            return
        adapted = PeftModel.from_pretrained(base, self.config.adapter, use_safetensors=True)
        _refuse_tied(adapted, _tied_weights(base), self.path)
        yield from self._with_adapter(self._whole(base), base)

    def _load_start(self) -> nn.Module:
        """The model that the run starts from, less an adapter that is carried on."""
        # Full tuning trains fp32 masters; a frozen base can rest in compute precision.
        dtype = torch.float32 if self.config.tuning == "full" else self.dtype
        with self.partition.loading(dtype):
            start = load_base(self.config, self.path, self.device, dtype)
        if self.config.merges and self.config.adapter is not None:
            write_into(start, self._masters(None), self.gathered)
        return start

    def _check_shapes(self, folder: Path) -> None:
        """Raises InputError where a version's weights are not those under the adapter."""
        tied = self._tied()
        held = {
            n: whole_shape(w) for n, w in named_weights(self.plain_model()).items() if n not in tied
        }
        given = {n: shape for n, shape in stored_shapes(folder).items() if n not in tied}
        odd = sorted({name for name, _ in held.items() ^ given.items()})
        if odd:
            raise InputError(f"{folder}: not this policy's weights: {odd[:3]} differ")

    def _reset_adapter(self) -> None:
        assert self._initial is not None
        with torch.no_grad():
            for name, parameter in self.trainable():
                with self.gathered([parameter], True):
                    parameter.copy_(self._initial[name])

    def _save_whole(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        write: bool,
    ) -> None:
        if not write:
            # Where weights are split, all ranks gather each.
            deque(weights, maxlen=0)
            return
        shapes = {
            name: torch.empty(shape, dtype=dtype if own.is_floating_point else own, device="meta")
            for name, shape, own in self.merged_shapes()
        }
        left = iter(weights)
        stored = (
            (n, in_precision(w, dtype, device="cpu", copy=self.shares).contiguous())
            for n, w in left
        )
        try:
            write_weights(folder, stored, shapes)
        finally:
            # Whatever could not be written, the others gather to the end.
            deque(left, maxlen=0)
        config = AutoConfig.from_pretrained(
            self.path,
            revision=self.config.revision,
            trust_remote_code=self.config.trust_remote_code,
        )
        config.dtype = dtype
        config.save_pretrained(folder)
        plain = self.plain_model()
        if plain.generation_config is not None:
            # As the model came with it: saving would refuse what loading takes.
            text = plain.generation_config.to_json_string()
            (folder / "generation_config.json").write_text(text, encoding="utf-8")

    def _tied(self) -> dict[str, str]:
        return _tied_weights(self.plain_model())

    def plain_model(self) -> Any:
        """The model without its adapter's wrapper."""
        model: Any = self.model
        return model.get_base_model() if self.adapted else model

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
        model = PeftModel.from_pretrained(
            base, adapter, adapter_name="default", is_trainable=True, use_safetensors=True
        )
        model.load_adapter(adapter, adapter_name="reference", is_trainable=False)
        model.set_adapter("default")
        return model


def _tied_weights(plain: Any) -> dict[str, str]:
    """Weights that are another's under a second name -> that other's name."""
    if not getattr(plain.config, "tie_word_embeddings", False):
        return {}
    return dict(getattr(plain, "all_tied_weights_keys", None) or {})


def _refuse_tied(model: nn.Module, tied: Mapping[str, str], path: str) -> None:
    """An adapter on tied weights would be one model when merged and another when adapted."""
    assert isinstance(model, PeftModel)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and f"{name}.weight" in {*tied, *tied.values()}:
            raise InputError(
                f"model.lora.target_modules: {name} shares its weight with another layer of "
                f"{path} (tied embeddings), so an adapter on it can't be merged; leave it out"
            )


def _stable_json(values: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        # PEFT keeps module names in sets, whose order changes with every process.
        if isinstance(value, set | frozenset):
            return sorted(value)
        return getattr(value, "value", str(value))

    return json.dumps(values, indent=2, sort_keys=True, default=plain) + "\n"
