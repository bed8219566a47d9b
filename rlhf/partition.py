"""Whether a rank holds a model's weights whole, or its share of them from loading on (ZeRO-3).

Split weights are whole on no rank outside of `gathered`, so neither a large policy nor its
reference ever needs to fit one rank. While a split model computes, each module's weights are
gathered in turn: by DeepSpeed's engine in the policy (`rlhf.sharding.Zero`), by `computing` in any
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.errors import InputError


class Partition(Protocol):
    """All but `split` are entered by all ranks together."""

    split: bool
    """Whether each rank holds its share of every weight alone."""

    def loading(self, dtype: torch.dtype, host: bool = False) -> AbstractContextManager[None]:
        """While entered, models that Transformers loads lie as this says, their weights in `dtype`;
        with `host`, a rank's share in host memory."""
        ...

    def gathered(
        self, parameters: Sequence[nn.Parameter], write: bool
    ) -> AbstractContextManager[None]:
        """While entered, these parameters are whole on every rank; with `write`, what rank 0 makes
        of them stays."""
        ...

    def computing(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """While entered, a loaded model can make passes without gradients."""
        ...


class Whole:
    """Every rank has whole weights of its own."""

    split = False

    def loading(self, dtype: torch.dtype, host: bool = False) -> AbstractContextManager[None]:
        """See `Partition.loading`: as Transformers loads them."""
        return nullcontext()

    def gathered(
        self, parameters: Sequence[nn.Parameter], write: bool
    ) -> AbstractContextManager[None]:
        """See `Partition.gathered`: they are whole."""
        return nullcontext()

    def computing(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """See `Partition.computing`: it always can."""
        return nullcontext(model)


WHOLE = Whole()


class Split:
    """ZeRO-3's shares; the ranks have met before."""

    split = True

    def __init__(self, offload: bool = False) -> None:
        """`offload` keeps a rank's share in host memory. Raises InputError without DeepSpeed."""
        # DeepSpeed's own layer over torch.distributed, whose groups are there.
        deepspeed().init_distributed(dist_init_required=False)
        self._offload = offload

    @contextmanager
    def loading(self, dtype: torch.dtype, host: bool = False) -> Iterator[None]:
        """See `Partition.loading`. A module's weights are split as soon as it is made, and filled
        by rank 0, module by module."""
        from transformers.integrations.deepspeed import (
            HfDeepSpeedConfig,
            unset_hf_deepspeed_config,
        )

        zero: dict[str, Any] = {"stage": 3}
        if self._offload or host:
            zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            # What is made while loading is of this type; nothing computes by this config.
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        # Transformers looks for a living one. Left alive, it would split generators and judges too.
        living: Any = HfDeepSpeedConfig(config)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del living

    def gathered(
        self, parameters: Sequence[nn.Parameter], write: bool
    ) -> AbstractContextManager[None]:
        """See `Partition.gathered`."""
        if not parameters:
            return nullcontext()
        context: AbstractContextManager[None] = deepspeed().zero.GatheredParameters(
            list(parameters), modifier_rank=0 if write else None
        )
        return context

    @contextmanager
    def computing(self, model: nn.Module) -> Iterator[nn.Module]:
        """See `Partition.computing`. An engine of DeepSpeed's would do, but never lets go of a
        model that it had."""
        with ExitStack() as hooks:
            for module in model.modules():
                own = list(module.parameters(recurse=False))
                if own:
                    self._gather_around(module, own, hooks)
            yield model

    def _gather_around(
        self, module: nn.Module, own: Sequence[nn.Parameter], hooks: ExitStack
    ) -> None:
        entered = ExitStack()

        def before(*_: Any) -> None:
            entered.enter_context(self.gathered(own, False))

        def after(*_: Any) -> None:
            entered.close()

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after, always_call=True).remove)


def whole_shape(weight: Tensor) -> torch.Size:
    """A weight's shape, also where it is split: then what is left in its place is empty."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def deepspeed() -> Any:
    """The library. Raises InputError where it is missing."""
    try:
        import deepspeed as library
    except ImportError as error:
        raise InputError(
            f"placement.zero needs DeepSpeed: {error}; pip install 'pairloop[deepspeed]'"
        ) from None
    if library.accelerator.get_accelerator().device_name() == "cpu":
        # Sums through shared memory serve inference alone, and the first start would wait two
        # minutes for a compiler.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return library
