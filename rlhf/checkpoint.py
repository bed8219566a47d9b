"""Mid-round checkpoints: all that the next optimizer step depends on, whole or absent.

The order of examples and the learning rate are functions of (seed, round, step), so the step says
where the data stands; weights, optimizer, loss scaler and random generators are stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import InputError
from rlhf.files import atomic_folder, make_folder, read_json, remove, sha256_file, write_json
from rlhf.policy import Policy

KEPT = 2
_FILES = ("trained.safetensors", "state.pt")


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
    """The last checkpoints of one round's training, in `folder`, named by their step."""

    def __init__(
        self, folder: Path, policy: Policy, optimizer: Any, scaler: torch.amp.GradScaler
    ) -> None:
        self._folder = folder
        self._policy = policy
        self._optimizer = optimizer
        self._scaler = scaler

    def save(self, progress: Progress) -> None:
        """Store a checkpoint; only once it is whole, all but the last `KEPT` go."""
        make_folder(self._folder)
        with atomic_folder(self._folder / f"{progress.step:06d}") as folder:
            save_trained(self._policy, folder / _FILES[0])
            generators = {"cpu": torch.get_rng_state()}
            if self._policy.device != "cpu":
                generators["cuda"] = torch.cuda.get_rng_state()
            torch.save(
                {
                    "optimizer": self._optimizer.state_dict(),
                    "scaler": self._scaler.state_dict(),
                    "rng": generators,
                },
                folder / _FILES[1],
            )
            hashes = {name: sha256_file(folder / name) for name in _FILES}
            write_json(folder / "checkpoint.json", {**asdict(progress), "sha256": hashes})
        for old in self._stored()[:-KEPT]:
            remove(old)

    def resume(self, round_index: int) -> Progress:
        """Go on from the newest checkpoint; from the start where there is none.

        Raises InputError where a file is not as it was written.
        """
        stored = self._stored()
        if not stored:
            return Progress(round_index)
        folder = stored[-1]
        redo = f"remove {folder} to go on from " + (
            f"step {int(stored[-2].name)}" if len(stored) > 1 else "this round's start"
        )
        meta = read_json(folder / "checkpoint.json", redo)
        for name, expected in meta.pop("sha256").items():
            found = sha256_file(folder / name) if (folder / name).is_file() else None
            if found != expected:
                raise InputError(
                    f"{folder / name}: its SHA-256 is {found}, not {expected} as written; {redo}"
                )
        load_trained(self._policy, folder / _FILES[0])
        kept = torch.load(folder / _FILES[1], weights_only=True, map_location=self._policy.device)
        self._optimizer.load_state_dict(kept["optimizer"])
        self._scaler.load_state_dict(kept["scaler"])
        torch.set_rng_state(kept["rng"]["cpu"].cpu())
        if "cuda" in kept["rng"]:
            torch.cuda.set_rng_state(kept["rng"]["cuda"].cpu())
        return Progress(**meta)

    def _stored(self) -> list[Path]:
        """From oldest to newest; what a kill left half-written is not among them."""
        if not self._folder.is_dir():
            return []
        stored = [path for path in self._folder.iterdir() if path.name.isdecimal()]
        return sorted(stored, key=lambda path: int(path.name))


def save_trained(policy: Policy, file: Path) -> None:
    """The trained weights as they are, fp32 masters included."""
    save_file({n: p.detach().cpu().contiguous() for n, p in policy.trainable()}, file)


def load_trained(policy: Policy, file: Path) -> None:
    """Weights that `save_trained` wrote."""
    trained = load_file(file)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            parameter.copy_(trained[name])
