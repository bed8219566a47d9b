"""The learner: one policy over Accelerate, trained on a round's pairs or labels.

An optimizer step sums every example's loss and divides by what the whole step holds, so how the
step is cut into micro-batches changes nothing but rounding. Checkpoints hold all that the next step
depends on; the learning rate and the order of examples are functions of (seed, round, step).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config import RunConfig
from rlhf.errors import InputError, NonFiniteError
from rlhf.examples import Example, Order, Step, at_reference, data_of, logps_of, sequences
from rlhf.files import atomic_folder, read_json, sha256_file, write_json
from rlhf.logprobs import Batch, TokenPair, collate, sequence_logps, split_rows, token_logps
from rlhf.objectives import kl_baseline, metrics
from rlhf.policy import Policy
from rlhf.types import Completion

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a round's training did."""

    planned_steps: int
    executed_steps: int
    skipped_steps: int
    first_loss: float | None
    """Loss of the round's first step; None for a round without steps."""


@dataclass(slots=True)
class _Progress:
    round_index: int
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    first_loss: float | None = None


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


class Learner:
    """Trains one policy; also scores sequences under it, since it holds the weights."""

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.policy = policy
        self.config = config
        self.settings = config.learner
        # Precision and micro-batches are the config's; else `accelerate launch` sets them unasked.
        self.accelerator = Accelerator(
            cpu=policy.device == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        if self.settings.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            policy.model.enable_input_require_grads()  # type: ignore[operator]

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """Token log-probs of completions under the policy, or under the run's initial policy."""
        sequences = [(c.prompt_token_ids, c.token_ids) for c in completions]
        found: list[list[float]] = [[] for _ in sequences]
        kind = "initial" if initial else "round_start"
        for rows, batch, tokens_N in self._score(sequences, kind):
            for row, values in zip(rows, split_rows(tokens_N, batch), strict=True):
                found[row] = values
        return found

    def reference_logps(self, table: pl.DataFrame, round_index: int) -> pl.DataFrame:
        """Sequence log-probs under the reference that a round on `table` needs (schema
        `PAIR_REFERENCE` or `LABEL_REFERENCE` of `rlhf.examples`).

        Computed once a round before training, so that no second model is resident during it.
        """
        data, order = data_of(table, self.config.objective), self._order(round_index)
        wanted = data.unscored(order)
        sums = np.empty(len(wanted))
        for rows, batch, tokens_N in self._score(wanted, self.config.rounds.reference):
            sums[rows] = sequence_logps(tokens_N, batch).double().cpu().numpy()
        return data.scored(order, sums.tolist())

    def _score(
        self, sequences: Sequence[TokenPair], kind: str
    ) -> Iterator[tuple[list[int], Batch, Tensor]]:
        size = 2 * self.settings.micro_batch_pairs
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i][0]), i))
        with self.policy.reference(kind) as model, torch.no_grad(), self.policy.autocast():
            model.eval()
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                batch = collate(
                    [sequences[i] for i in rows], self.policy.pad_id, self.policy.device
                )
                yield rows, batch, token_logps(model, batch)

    def release(self) -> None:
        """Give back what only training needed: gradients, and device memory that torch caches."""
        for _, parameter in self.policy.trainable():
            parameter.grad = None
        gc.collect()
        if self.policy.device != "cpu":
            torch.cuda.empty_cache()

    def plan(self, table: pl.DataFrame) -> int:
        """Optimizer steps of a round on `table`."""
        least = data_of(table, self.config.objective).least
        return len(self._order(0).steps(table.height, least))

    def train(
        self,
        table: pl.DataFrame,
        reference: pl.DataFrame | None,
        round_index: int,
        state: Path,
        on_step: OnStep,
        check: Callable[[], None],
    ) -> Trained:
        """Train the policy in place on a round's pairs or labels, from its current weights.

        `reference` is what `reference_logps` gave, None for an objective without one. `state`
        keeps the mid-round checkpoint: a checkpoint there is gone on from, and one is written
        every `checkpoint_steps` and when `check` raises `Interrupted`.
        Raises NonFiniteError before any non-finite update (after a few in a row under fp16).
        """
        assert (reference is not None) == self.config.objective.needs.reference
        order = self._order(round_index)
        steps = data_of(table, self.config.objective).steps(order, reference)
        optimizer = self._optimizer()
        model, optimizer = self.accelerator.prepare(self.policy.model, optimizer)
        model.train()
        scaler = torch.amp.GradScaler(
            self.policy.device, enabled=self.config.model.precision == "fp16"
        )
        progress = self._resume(state, optimizer, scaler, round_index)
        # A round's start is fixed by its number, not by what this process drew before.
        if progress.step == 0:
            torch.manual_seed(_seed(self.config.run.seed, round_index))
        while progress.step < len(steps):
            started = time.perf_counter()
            rate = learning_rate(
                progress.step,
                len(steps),
                self.config.learning_rate,
                self.settings.schedule,
                self.settings.warmup_share,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            step = steps[progress.step]
            found = self._step(model, optimizer, scaler, step, progress)
            seconds = time.perf_counter() - started
            found |= {"learning_rate": rate, "tokens_per_second": step.tokens / seconds}
            progress.step += 1
            on_step(progress.step, found)
            self._save_or_stop(state, optimizer, scaler, progress, len(steps), check)
        self.accelerator.free_memory()
        return Trained(
            len(steps), len(steps) - progress.skipped, progress.skipped, progress.first_loss
        )

    def _order(self, round_index: int) -> Order:
        return Order(
            self.config.run.seed, round_index, self.settings.epochs, self.settings.batch_pairs
        )

    def _step(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scaler: torch.amp.GradScaler,
        step: Step,
        progress: _Progress,
    ) -> dict[str, float]:
        objective, loss = self.config.objective, step.loss(self.config.objective)
        baseline = self._baseline(model, step)
        tally = _Tally()
        lost = torch.zeros(2, dtype=torch.float64)
        optimizer.zero_grad(set_to_none=True)
        for micro in self._micro_batches(step):
            sums_S = self.sequence_logps(model, sequences(micro))
            logps = logps_of(micro, sums_S, baseline, objective.needs.reference)
            own, nll = loss.parts(logps)
            total = own + objective.sft * nll
            self.accelerator.backward(scaler.scale(total))
            lost += torch.stack([total, nll]).detach().double().cpu()
            tally.add(metrics(logps, objective))
        found = {"loss": float(lost[0]), **tally.means()}
        if objective.sft:
            found["nll"] = float(lost[1])
        if step.mismatched:
            found["kl_baseline"] = float(baseline)
        scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        norm = torch.nn.utils.clip_grad_norm_(
            [p for _, p in self.policy.trainable()], self.settings.max_grad_norm
        )
        found["grad_norm"] = float(norm)
        finite = math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])
        found["skipped"] = float(not finite)
        if progress.step == 0:
            progress.first_loss = found["loss"]
            self._check_first_loss(progress.round_index, step, found["loss"])
        if finite:
            progress.skipped_in_a_row = 0
            scaler.step(getattr(optimizer, "optimizer", optimizer))
            scaler.update()
        else:
            self._skip(scaler, optimizer, progress, found)
        return found

    def _micro_batches(self, step: Step) -> list[Sequence[Example]]:
        """The step's examples, as many sequences at a time as `micro_batch_pairs` pairs have."""
        size = self.settings.micro_batch_pairs
        if self.config.objective.needs.data == "labels":
            size *= 2
        return [step.examples[s : s + size] for s in range(0, len(step.examples), size)]

    def _baseline(self, model: torch.nn.Module, step: Step) -> Tensor:
        """KTO's z0 of the whole step: no gradient, no dropout; 0 where nothing is mismatched."""
        if not step.mismatched:
            return torch.zeros((), device=self.policy.device)
        size = 2 * self.settings.micro_batch_pairs
        model.eval()
        with torch.no_grad():
            parts = [
                self.sequence_logps(model, step.mismatched[start : start + size])
                for start in range(0, len(step.mismatched), size)
            ]
        model.train()
        policy_B = torch.cat(parts)
        return kl_baseline(policy_B, policy_B.new_tensor(step.reference_mismatched))

    def sequence_logps(self, model: torch.nn.Module, sequences: Sequence[TokenPair]) -> Tensor:
        """Sum of the completion's log-probs of each (prompt ids, completion ids), shape [S].

        In the order given, differentiable; one forward pass of `model`, which may be wrapped.
        """
        batch = collate(sequences, self.policy.pad_id, self.policy.device)
        with self.policy.autocast():
            return sequence_logps(token_logps(model, batch, self.policy.model), batch)

    def _skip(
        self,
        scaler: torch.amp.GradScaler,
        optimizer: Any,
        progress: _Progress,
        metrics: dict[str, float],
    ) -> None:
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        where = f"step {progress.step + 1}"
        optimizer.zero_grad(set_to_none=True)
        if not scaler.is_enabled():
            raise NonFiniteError(
                f"{where}: {what}; the weights were not touched. Lower learner.learning_rate or "
                "look at this step's pairs"
            )
        scaler.update(scaler.get_scale() / 2)
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.settings.max_skipped_steps:
            raise NonFiniteError(
                f"{where}: {progress.skipped_in_a_row} fp16 overflows in a row ({what}, loss scale "
                f"now {scaler.get_scale():g}); use model.precision bf16 or fp32"
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [p for _, p in self.policy.trainable()],
            lr=self.config.learning_rate,
            weight_decay=self.settings.weight_decay,
        )

    def _check_first_loss(self, round_index: int, step: Step, loss: float) -> None:
        objective = self.config.objective
        at_start = self.config.rounds.reference == "round_start" or round_index == 1
        if not at_start or not objective.needs.reference or not math.isfinite(loss):
            return
        if _drops_out(self.policy.model):
            return
        # Before any update policy = reference: DPO's loss is ln 2, up to padding's rounding.
        expected = float(step.loss(objective).total(at_reference(step, self.policy.device)))
        allowed = (1e-3 if self.config.model.precision == "fp32" else 0.1) * max(1, expected)
        if abs(loss - expected) > allowed:
            raise NonFiniteError(
                f"round {round_index}: the first step's {objective.name} loss is {loss:.4f}, not "
                f"the {expected:.4f} that it is at the reference: reference log-probs and policy "
                "disagree about the same weights, which were not touched"
            )

    def _save_or_stop(
        self,
        state: Path,
        optimizer: Any,
        scaler: torch.amp.GradScaler,
        progress: _Progress,
        planned: int,
        check: Callable[[], None],
    ) -> None:
        try:
            check()
        except BaseException:
            self._save(state, optimizer, scaler, progress)
            raise
        if progress.step % self.settings.checkpoint_steps == 0 and progress.step < planned:
            self._save(state, optimizer, scaler, progress)

    def _save(
        self, state: Path, optimizer: Any, scaler: torch.amp.GradScaler, progress: _Progress
    ) -> None:
        with atomic_folder(state / "checkpoint") as folder:
            trained = {n: p.detach().cpu().contiguous() for n, p in self.policy.trainable()}
            save_file(trained, folder / "trained.safetensors")
            generators = {"cpu": torch.get_rng_state()}
            if self.policy.device != "cpu":
                generators["cuda"] = torch.cuda.get_rng_state()
            torch.save(
                {
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": generators,
                },
                folder / "state.pt",
            )
            write_json(
                folder / "checkpoint.json",
                {
                    "step": progress.step,
                    "skipped": progress.skipped,
                    "skipped_in_a_row": progress.skipped_in_a_row,
                    "first_loss": progress.first_loss,
                    "sha256": {
                        name: sha256_file(folder / name)
                        for name in ("trained.safetensors", "state.pt")
                    },
                },
            )

    def _resume(
        self, state: Path, optimizer: Any, scaler: torch.amp.GradScaler, round_index: int
    ) -> _Progress:
        folder = state / "checkpoint"
        if not folder.is_dir():
            return _Progress(round_index)
        redo = f"remove {folder} to train this round from its start"
        meta = read_json(folder / "checkpoint.json", redo)
        for name, expected in meta["sha256"].items():
            found = sha256_file(folder / name) if (folder / name).is_file() else None
            if found != expected:
                raise InputError(
                    f"{folder / name}: its SHA-256 is {found}, not {expected} as written; {redo}"
                )
        trained = load_file(folder / "trained.safetensors")
        with torch.no_grad():
            for name, parameter in self.policy.trainable():
                parameter.copy_(trained[name])
        kept = torch.load(folder / "state.pt", weights_only=True, map_location=self.policy.device)
        optimizer.load_state_dict(kept["optimizer"])
        scaler.load_state_dict(kept["scaler"])
        torch.set_rng_state(kept["rng"]["cpu"].cpu())
        if "cuda" in kept["rng"]:
            torch.cuda.set_rng_state(kept["rng"]["cuda"].cpu())
        return _Progress(
            round_index,
            meta["step"],
            meta["skipped"],
            meta["skipped_in_a_row"],
            meta["first_loss"],
        )


class _Tally:
    """Sums and counts of a step, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float]] = {}

    def add(self, sums: Mapping[str, tuple[Tensor, float]]) -> None:
        for name, (value, count) in sums.items():
            before, of = self._found.get(name, (0.0, 0))
            self._found[name] = (before + float(value), of + count)

    def means(self) -> dict[str, float]:
        """Nothing of what there was nothing of: a step may have no bad answer."""
        return {n: value / of for n, (value, of) in self._found.items() if of}


def _drops_out(model: torch.nn.Module) -> bool:
    """Whether a pass in train mode differs from one in eval mode."""
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates.append(getattr(model.config, "attention_dropout", None) or 0.0)
    return any(rates)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
