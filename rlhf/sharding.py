"""How a policy and its optimizer lie over the ranks that train it: whole on each, or ZeRO's shards.

The learner's step is the same: it runs backward passes over its own micro-batches, whose losses add
up to the step's over all ranks, then asks for the update. Under ZeRO (Rajbhandari et al. 2020)
optimizer states (stage 1), gradients (2) and weights (3) are split over the ranks by DeepSpeed.

Trained weights are fp32 and computed under autocast, as everywhere; DeepSpeed is told of neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.config_learner import Learner
from rlhf.group import ALONE, Group
from rlhf.optimizer import make_optimizer
from rlhf.partition import deepspeed
from rlhf.policy import Policy

PERSISTENT = 100_000
"""Tensors with fewer weights ZeRO-3 keeps whole beside their shards; DeepSpeed's default."""


class Sharding(Protocol):
    """Weights, gradients and optimizer of one policy over its ranks.

    All but `model`, `group`, `loss_scale` and `state` are collectives.
    """

    group: Group
    model: nn.Module
    """What forward passes call."""

    def __str__(self) -> str:
        """As it is named in checkpoints."""
        ...

    @property
    def loss_scale(self) -> float | None:
        """By what losses are multiplied; None where they never are."""
        ...

    def begin(self) -> None:
        """A new optimizer, as at the start of a round."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        ...

    def update(self, rate: float) -> float:
        """One optimizer step; the norm of the gradient before clipping, over all ranks.

        Where that is not finite, nothing was updated.
        """
        ...

    def skip(self) -> None:
        """Forget the gradients, and halve the loss scale if there is one."""
        ...

    def reload(self) -> None:
        """The policy's weights were replaced."""
        ...

    def state(self) -> dict[str, Any]:
        """What this rank has to keep beside the weights to go on."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, after `begin` and once the weights are back."""
        ...


class Replicated:
    """Every rank holds all of it; gradients are added up once a step."""

    def __init__(
        self, policy: Policy, settings: Learner, precision: str, group: Group = ALONE
    ) -> None:
        self.group = group
        self.model = policy.model
        self._policy = policy
        self._settings = settings
        self._precision = precision
        self.begin()

    def __str__(self) -> str:
        return "replicated"

    def begin(self) -> None:
        """See `Sharding.begin`."""
        self._optimizer = make_optimizer(self._policy.trainable(), self._settings, rate=0.0)
        self._scaler = torch.amp.GradScaler(self._policy.device, enabled=self._precision == "fp16")

    @property
    def loss_scale(self) -> float | None:
        """See `Sharding.loss_scale`."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def backward(self, loss: Tensor) -> None:
        """See `Sharding.backward`."""
        self._scaler.scale(loss).backward()

    def update(self, rate: float) -> float:
        """See `Sharding.update`."""
        trained = [p for _, p in self._policy.trainable()]
        self.group.sum_gradients(trained)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(trained, self._settings.max_grad_norm))
        if math.isfinite(norm):
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
        return norm

    def skip(self) -> None:
        """See `Sharding.skip`."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._scaler.is_enabled():
            self._scaler.update(self._scaler.get_scale() / 2)

    def reload(self) -> None:
        """The optimizer holds no weights of its own."""

    def state(self) -> dict[str, Any]:
        """See `Sharding.state`; the same on every rank, so only the first keeps it."""
        if not self.group.main:
            return {}
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """See `Sharding.load`."""
        kept = self.group.first(state)
        self._optimizer.load_state_dict(kept["optimizer"])
        self._scaler.load_state_dict(kept["scaler"])


class Zero:
    """DeepSpeed ZeRO, stage 1, 2 or 3."""

    def __init__(
        self, policy: Policy, settings: Learner, group: Group, stage: int, offload: bool
    ) -> None:
        """Split the policy over the ranks; `offload` keeps what is split in host memory.

        What goes with it: `rlhf.config.check_zero`. Raises InputError where DeepSpeed is missing.
        """
        assert policy.partition.split == (stage == 3), "ZeRO-3 trains what was loaded in shares"
        self.group = group
        self.stage = stage
        self._settings = settings
        device = torch.device(policy.device).type
        host = {"device": "cpu", "pin_memory": device == "cuda"}
        # DeepSpeed 0.19 can't overlap under stage 1 while the step decides when it is whole.
        overlap = device == "cuda" and stage > 1
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": overlap,
            "stage3_param_persistence_threshold": PERSISTENT,
        }
        if offload:
            zero["offload_optimizer"] = host
            if stage == 3:
                zero["offload_param"] = host
        self._engine, *_ = deepspeed().initialize(
            model=policy.model,
            optimizer=make_optimizer(policy.trainable(), settings, rate=0.0),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": settings.max_grad_norm,
                "zero_optimization": zero,
                # AdamW is torch's own, as without ZeRO.
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                # The step decides when it is whole: any number of backward passes, then one update.
                "managed_gradient_accumulation": False,
                "steps_per_print": None,
            },
        )
        if policy.dtype is not torch.float32:
            # On a GPU the engine would switch the learner's autocast off inside its forward. Told
            # only now, since the section of its config that says so also retypes what ranks send.
            self._engine.torch_autocast_enabled = lambda: True
            self._engine.torch_autocast_dtype = lambda: policy.dtype
        self.model: nn.Module = self._engine
        # DeepSpeed's weights are views of one buffer.
        policy.shares = True
        self.begin()

    def __str__(self) -> str:
        return f"ZeRO stage {self.stage}"

    @property
    def loss_scale(self) -> float | None:
        """Losses are not scaled: fp16 is refused."""
        return None

    def begin(self) -> None:
        """See `Sharding.begin`."""
        self._base.state.clear()

    def backward(self, loss: Tensor) -> None:
        """See `Sharding.backward`. DeepSpeed takes the mean over ranks, the step wants the sum."""
        self._engine.backward(loss * self.group.world)

    def update(self, rate: float) -> float:
        """See `Sharding.update`. DeepSpeed skips an update that is not finite in silence; all that
        tells of it is a norm of infinity."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def skip(self) -> None:
        """See `Sharding.skip`."""
        self._engine.optimizer.zero_grad()

    def reload(self) -> None:
        """See `Sharding.reload`: DeepSpeed updates copies of its own."""
        self._engine.optimizer.refresh_fp32_params()

    def state(self) -> dict[str, Any]:
        """See `Sharding.state`: the moments of this rank's shards."""
        return {"moments": [dict(self._base.state.get(flat, {})) for flat in self._flats]}

    def load(self, state: dict[str, Any]) -> None:
        """See `Sharding.load`."""
        for flat, moments in zip(self._flats, state["moments"], strict=True):
            self._base.state[flat] = {
                # Adam's count of steps stays on the host.
                name: value if value.ndim == 0 else value.to(flat.device)
                for name, value in moments.items()
            }

    @property
    def _base(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return optimizer

    @property
    def _flats(self) -> Sequence[Tensor]:
        """This rank's fp32 shards, one a group."""
        optimizer = self._engine.optimizer
        flats: Sequence[Tensor] = (
            optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        return flats
