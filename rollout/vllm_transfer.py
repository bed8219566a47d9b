"""vLLM's weight transfer (0.32): the learner's first rank sends a version's whole weights to the
workers of every vLLM generator, over NCCL where they are on GPUs, over gloo on CPUs.

A group is made for each version and ended after it, so an engine that was started anew in between
has nothing to join. Both ends make a digest of what passes, the receiving one before vLLM fuses and
splits it. vLLM's workers load this module by name (`WORKER`), which registers what they receive
with.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from rlhf.weights import Digest, in_precision
from rollout import vllm_compat
from rollout.transfer import BUFFER, Coming, Meeting

if TYPE_CHECKING:
    from rlhf.policy import Policy

WORKER = f"{__name__}.Receives"
"""What a worker is given beside its own methods."""
BACKENDS = {"cpu": "pairloop_gloo", "cuda": "pairloop_nccl"}
TIMEOUT = timedelta(minutes=30)


def described(policy: Policy) -> dict[str, Any]:
    """Names, types and shapes of a version's weights, as vLLM is told them."""
    shapes = policy.merged_shapes()
    return {
        "names": [name for name, _, _ in shapes],
        "dtype_names": [str(dtype).removeprefix("torch.") for _, _, dtype in shapes],
        "shapes": [[*shape] for _, shape, _ in shapes],
    }


def send(policy: Policy, rank: int, meeting: Meeting) -> str:
    """Send the policy's weights; called by all ranks of the learner, since split weights are whole
    only where all gather them. The first one's `Digest`."""
    weights = _Weights(policy, rank == 0)
    if meeting.device == "cuda":
        where = meeting.host, meeting.port, meeting.world
        sender = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(*where, packed_buffer_size_bytes=BUFFER, rank=rank),
            client=_Elsewhere(),
            source=weights,
        )
        try:
            sender.send_weights()
            if rank == 0:
                _arrived(sender.model_update_group)
        finally:
            sender.shutdown()
        return weights.digest.hexdigest()
    group = _gloo(meeting.host, meeting.port, 0, meeting.world) if rank == 0 else None
    for _, weight in weights:
        if group is not None:
            group.broadcast(_bytes(weight), 0).wait()
    return weights.digest.hexdigest()


def receive(llm: Any, coming: Coming) -> str:
    """Let an engine take the weights that are sent, and its `Digest` of them."""
    meeting = coming.meeting
    init_info = {
        "master_address": meeting.host,
        "master_port": meeting.port,
        "rank_offset": coming.first,
        "world_size": meeting.world,
        "packed": True,
        "packed_buffer_size_bytes": BUFFER,
    }
    ask = llm.collective_rpc
    ask("init_weight_transfer_engine", kwargs={"init_info": init_info})
    ask("start_weight_update")
    ask("update_weights", kwargs={"update_info": coming.weights})
    ask("finish_weight_update")
    found: list[str] = ask("received_digest")
    ask("shutdown_weight_transfer_engine")
    # Workers that differ have no digest in common, so it can't be what was sent.
    return " ".join(sorted({*found}))


class _Weights(WeightSource):  # type: ignore[misc]
    """A policy's weights, one whole after the other."""

    def __init__(self, policy: Policy, sender: bool) -> None:
        self._policy = policy
        self._sender = sender
        self.digest = Digest(policy.dtype)

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, dtype, tuple(shape))
            for name, shape, dtype in self._policy.merged_shapes()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        policy = self._policy
        for name, weight in policy.merged_weights():
            if not self._sender:
                yield name, weight
                continue
            # What is sent may lie in a buffer for longer than a gathered weight is whole.
            sent = in_precision(weight, policy.dtype, device=policy.device, copy=policy.shares)
            sent = sent.contiguous()
            self.digest.add(name, sent)
            yield name, sent


class _Elsewhere:
    """What vLLM's sender would ask of the generators: `receive` does it in their processes."""

    def init_weight_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        pass

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


class _Nccl(NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's own, with a digest of what comes in."""

    digest = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        vllm_compat.end_with_parent()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        found, load = Digest(self.model_config.dtype), self.model.load_weights

        def load_and_mark(weights: Any) -> Any:
            given = list(weights)
            for name, weight in given:
                found.add(name, weight)
            return load(given)

        self.model.load_weights = load_and_mark
        try:
            self._receive(update_info)
        finally:
            del self.model.load_weights
        self.digest = found.hexdigest()

    def _receive(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        super().receive_weights(update_info)
        torch.cuda.synchronize()
        _arrived(self.model_update_group)


class _Gloo(_Nccl):
    """The same among CPUs, weight by weight."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        assert init_info.master_address is not None and init_info.master_port is not None
        rank = init_info.rank_offset + self.parallel_config.rank
        where = init_info.master_address, init_info.master_port
        self._group = _gloo(*where, rank, init_info.world_size)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The inherited one waits for an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def _receive(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        told = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in told:
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(_bytes(weight), 0).wait()
            self.model.load_weights([(name, weight)])

    def shutdown(self) -> None:
        self._group = None


class Receives:
    """Mixed into vLLM's workers."""

    def received_digest(self) -> str:
        """Of the weights that came last."""
        found: str = self.weight_transfer_engine.digest  # type: ignore[attr-defined]
        return found


def _arrived(group: Any) -> None:
    """Wait until all have what was sent: vLLM ends a group by aborting what is under way."""
    group.group.barrier(TIMEOUT.total_seconds())


def _gloo(host: str, port: int, rank: int, world: int) -> Any:
    return stateless_init_torch_distributed_process_group(
        host, port, rank, world, "gloo", timeout=TIMEOUT
    )


def _bytes(weight: Tensor) -> Tensor:
    """The same memory, of a type that any back end sends."""
    return weight.reshape(-1).view(torch.uint8)


WeightTransferEngineFactory.register_engine(BACKENDS["cuda"], _Nccl)
WeightTransferEngineFactory.register_engine(BACKENDS["cpu"], _Gloo)
