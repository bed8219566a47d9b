"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.config_learner import Learner
from rlhf.errors import InputError
from rlhf.partition import whole_shape


def learning_rate(step: int, planned: int, peak: float, schedule: str, warmup: float) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to zero.

    >>> [round(learning_rate(s, 4, 1.0, "linear", 0.25), 3) for s in range(4)]
    [1.0, 1.0, 0.667, 0.333]
    """
    rising = math.ceil(warmup * planned)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, planned - rising)
    if schedule == "constant":
        return peak
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def check_optimizer(settings: Learner, device: str) -> None:
    """Raises InputError where `learner.optimizer` would not be what it says.

    A paged optimizer without CUDA runs unpaged, with no more than a warning.
    """
    if settings.optimizer.startswith("paged") and device != "cuda":
        raise InputError(
            f"learner.optimizer: {settings.optimizer} pages its state between a CUDA device and "
            f"the host, and the learner runs on {device}; use adamw_8bit or adamw"
        )
    if settings.optimizer != "adamw":
        _bitsandbytes(settings.optimizer)


def make_optimizer(
    trainable: Sequence[tuple[str, nn.Parameter]], settings: Learner, rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over named parameters; vectors, that is norms and biases,
    don't decay. In 8 bits the moments are quantised in blocks (Dettmers et al. 2022)."""
    matrices = [p for _, p in trainable if len(whole_shape(p)) > 1]
    vectors = [p for _, p in trainable if len(whole_shape(p)) <= 1]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    library = _bitsandbytes(settings.optimizer)
    kind = library.PagedAdamW8bit if settings.optimizer.startswith("paged") else library.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=rate)
    return optimizer


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"learner.optimizer: {name} needs bitsandbytes: {error}; pip install 'pairloop[qlora]'"
        ) from None
    return bitsandbytes.optim
