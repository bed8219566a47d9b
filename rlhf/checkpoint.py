"""Mid-round checkpoints: all that the next optimizer step depends on, whole or absent.

The order of examples and the learning rate are functions of (seed, round, step), so the step says
where the data stands; weights, optimizer, loss scaler and random generators are stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.errors import InputError
from rlhf.files import (
    atomic_folder,
    make_folder,
    read_json,
    remove,
    sha256_file,
    sha256_tree,
    write_json,
)
from rlhf.group import ALONE, Group
from rlhf.partition import whole_shape
from rlhf.policy import Policy
from rlhf.sharding import Sharding
from rlhf.weights import stored_shapes, stored_weights, write_weights

KEPT = 2
TRAINED = "trained"
_ABOUT = "checkpoint.json"


@dataclass(slots=True)
class Progress:
    """How far a round's training is."""

    round_index: int
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    first_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    stale_epochs: int = 0
    """Epochs since the validation loss was last lower than ever."""


class Checkpoints:
    """The last checkpoints of one round's training, in `folder`, named by their step.

    Every rank calls every method; the trained weights are stored once, what else a rank holds
    (its optimizer or its shard of it, its random generators) in a file of its own.
    """

    def __init__(self, folder: Path, policy: Policy, sharding: Sharding) -> None:
        self._folder = folder
        self._policy = policy
        self._sharding = sharding
        self._group = sharding.group

    def save(self, progress: Progress) -> None:
        """Store a checkpoint; only once it is whole, all but the last `KEPT` go."""
        with self._shared_folder(f"{progress.step:06d}") as folder:
            save_trained(self._policy, folder / TRAINED, self._group)
            generators = {"cpu": torch.get_rng_state()}
            if self._policy.device != "cpu":
                generators["cuda"] = torch.cuda.get_rng_state()
            torch.save({"sharding": self._sharding.state(), "rng": generators}, folder / self._own)
            self._group.wait()
            if self._group.main:
                about = {"ranks": self._group.world, "sharding": self._kind}
                about["sha256"] = sha256_tree(folder)
                write_json(folder / _ABOUT, {**asdict(progress), **about})
        if self._group.main:
            for old in self._stored()[:-KEPT]:
                remove(old)

    def save_best(self, step: int) -> None:
        """Store the weights that are the best so far; those stay that a checkpoint still names."""
        save_trained(self._policy, self.best(step), self._group)
        if self._group.main:
            named = {read_json(path / _ABOUT, "remove it")["best_step"] for path in self._stored()}
            kept = {self.best(number).name for number in named | {step} if number is not None}
            for old in self._folder.parent.glob("best-*"):
                if old.name not in kept:
                    remove(old)

    def best(self, step: int) -> Path:
        """Weights after the step with the lowest validation loss."""
        return self._folder.with_name(f"best-{step:06d}")

    def resume(self, round_index: int) -> Progress:
        """Go on from the newest checkpoint; from the start where there is none.

        Raises InputError where a file is not as it was written, or as many ranks with the same
        sharding didn't write it.
        """
        # Rank 0 looks, so that all go on from the same one.
        stored = self._group.first(self._stored())
        if not stored:
            return Progress(round_index)
        folder = stored[-1]
        redo = f"remove {folder} to go on from " + (
            f"step {int(stored[-2].name)}" if len(stored) > 1 else "this round's start"
        )
        meta = read_json(folder / _ABOUT, redo)
        wrote, now = (meta.pop("ranks"), meta.pop("sharding")), (self._group.world, self._kind)
        if wrote != now:
            raise InputError(
                f"{folder} was written by {wrote[0]} ranks ({wrote[1]}), and {now[0]} ({now[1]}) "
                f"would go on; start it as before, or remove {folder.parent} to redo this round's "
                "training"
            )
        for name, expected in meta.pop("sha256").items():
            found = sha256_file(folder / name) if (folder / name).is_file() else None
            if found != expected:
                raise InputError(
                    f"{folder / name}: its SHA-256 is {found}, not {expected} as written; {redo}"
                )
        if not (folder / TRAINED).is_dir():
            raise InputError(f"{folder} was written by another version of pairloop; {redo}")
        load_trained(self._policy, folder / TRAINED)
        self._sharding.reload()
        kept = torch.load(folder / self._own, weights_only=True, map_location="cpu")
        self._sharding.load(kept["sharding"])
        torch.set_rng_state(kept["rng"]["cpu"])
        if "cuda" in kept["rng"]:
            torch.cuda.set_rng_state(kept["rng"]["cuda"])
        return Progress(**meta)

    @property
    def _own(self) -> str:
        return f"rank-{self._group.rank:05d}.pt"

    @property
    def _kind(self) -> str:
        return str(self._sharding)

    @contextmanager
    def _shared_folder(self, name: str) -> Iterator[Path]:
        """A staging folder that all ranks fill and rank 0 makes, fsyncs and names."""
        if not self._group.main:
            yield self._group.first(self._folder)
            self._group.wait()
            return
        make_folder(self._folder)
        with atomic_folder(self._folder / name) as folder:
            yield self._group.first(folder)
        self._group.wait()

    def _stored(self) -> list[Path]:
        """From oldest to newest; what a kill left half-written is not among them."""
        if not self._folder.is_dir():
            return []
        stored = [path for path in self._folder.iterdir() if path.name.isdecimal()]
        return sorted(stored, key=lambda path: int(path.name))


def save_trained(policy: Policy, folder: Path, group: Group = ALONE) -> None:
    """The trained weights as they are, fp32 masters included; rank 0 writes them, and holds no more
    than a file's (`write_weights`). Raises InputError on rank 0 where the disk is full."""

    def whole() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in policy.trainable():
            # One at a time: split over ranks, they may be whole on none.
            with policy.gathered([parameter], False):
                copied = parameter.detach().to("cpu", copy=True) if group.main else parameter
            yield name, copied

    left = whole()
    try:
        if group.main:
            shapes = {
                name: torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
                for name, parameter in policy.trainable()
            }
            with atomic_folder(folder) as staging:
                write_weights(staging, ((n, w.contiguous()) for n, w in left), shapes)
    finally:
        # Whatever could not be written, the others gather to the end.
        deque(left, maxlen=0)


def load_trained(policy: Policy, folder: Path) -> None:
    """Weights that `save_trained` wrote. Raises InputError where they are others."""
    trained = dict(policy.trainable())
    if odd := sorted(trained.keys() ^ stored_shapes(folder).keys()):
        raise InputError(f"{folder}: not this policy's trained weights: {odd[:3]} on one side only")
    with torch.no_grad():
        for name, weight in stored_weights(folder):
            with policy.gathered([trained[name]], True):
                trained[name].copy_(weight)
