"""The learner: one policy over Accelerate, trained on a round's pairs.

An optimizer step sums every pair's loss and divides by the step's pairs, so how the step is cut
into micro-batches changes nothing but rounding. Checkpoints hold all that the next step depends
on; the learning rate and the order of pairs are functions of (seed, round, step).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from rlhf.files import atomic_folder, read_json, sha256_file, write_json
from rlhf.logprobs import Batch, sequence_logps, split_rows
from rlhf.objectives import OBJECTIVES, PairLogps, pair_metrics
from rlhf.packing import TokenPair
from rlhf.policy import Policy
from rlhf.scoring import Scorer
from rlhf.types import Completion

OnStep = Callable[[int, dict[str, float]], None]

REFERENCE = pl.Schema(
    {
        "prompt_id": pl.String,
        "chosen_sample": pl.Int32,
        "rejected_sample": pl.Int32,
        "reference_chosen": pl.Float64,
        "reference_rejected": pl.Float64,
    }
)


@dataclass(frozen=True, slots=True)
class Example:
    """A pair as the learner needs it: sampled ids and the reference's log-probs."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reference_chosen: float
    reference_rejected: float

    @property
    def sequences(self) -> tuple[TokenPair, TokenPair]:
        """What is scored together."""
        return (self.prompt, self.chosen), (self.prompt, self.rejected)

    @property
    def tokens(self) -> int:
        """Tokens that a padded pass over both sequences reads."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


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

    def __init__(
        self,
        policy: Policy,
        config: RunConfig,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
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
        self.scorer = Scorer(
            policy, self.settings.micro_batch_tokens, self.settings.on_inexact, say
        )

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """Token log-probs of completions under the policy, or under the run's initial policy."""
        sequences = [(c.prompt_token_ids, c.token_ids) for c in completions]
        found: list[list[float]] = [[] for _ in sequences]
        kind = "initial" if initial else "round_start"
        for rows, batch, tokens_N in self._score(sequences, kind):
            for row, values in zip(rows, split_rows(tokens_N, batch), strict=True):
                found[row] = values
        return found

    def reference_logps(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Sequence log-probs of both sides under the reference, schema `REFERENCE`.

        Computed once a round before training, so that no second model is resident during it.
        """
        # An answer may be in several pairs.
        numbers: dict[TokenPair, int] = {}
        given = [s for example in _examples(pairs) for s in example.sequences]
        chosen = [numbers.setdefault(s, len(numbers)) for s in given]
        found = np.empty(len(numbers))
        for rows, batch, tokens_N in self._score(list(numbers), self.config.rounds.reference):
            found[rows] = sequence_logps(tokens_N, batch).double().cpu().numpy()
        sums = found[chosen]
        return pairs.select("prompt_id", "chosen_sample", "rejected_sample").with_columns(
            reference_chosen=pl.Series(sums[0::2]), reference_rejected=pl.Series(sums[1::2])
        )

    def _score(
        self, sequences: Sequence[TokenPair], kind: str
    ) -> Iterator[tuple[list[int], Batch, Tensor]]:
        examples = [[sequence] for sequence in sequences]
        self.scorer.prove(examples)
        with self.policy.reference(kind) as model, torch.no_grad():
            model.eval()
            for micro in self.scorer.plan(examples):
                rows = list(micro.examples)
                tokens_N, batch = self.scorer.tokens(model, [sequences[i] for i in rows])
                yield rows, batch, tokens_N

    def release(self) -> None:
        """Give back what only training needed: gradients, and device memory that torch caches."""
        for _, parameter in self.policy.trainable():
            parameter.grad = None
        gc.collect()
        if self.policy.device != "cpu":
            torch.cuda.empty_cache()

    def plan(self, pairs: int) -> int:
        """Optimizer steps of a round: epochs x ceil(pairs / batch_pairs)."""
        return self.settings.epochs * math.ceil(pairs / self.settings.batch_pairs)

    def train(
        self,
        pairs: pl.DataFrame,
        reference: pl.DataFrame,
        round_index: int,
        state: Path,
        on_step: OnStep,
        check: Callable[[], None],
    ) -> Trained:
        """Train the policy in place on a round's pairs, from its current weights.

        `state` keeps the mid-round checkpoint: a checkpoint there is gone on from, and one is
        written every `checkpoint_steps` and when `check` raises `Interrupted`.
        Raises NonFiniteError before any non-finite update (after a few in a row under fp16).
        """
        examples = _examples(pairs, reference)
        steps = self._steps(examples, round_index)
        self.scorer.prove([e.sequences for e in examples])
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
            batch = steps[progress.step]
            metrics = self._step(model, optimizer, scaler, batch, progress)
            seconds = time.perf_counter() - started
            tokens = sum(e.tokens for e in batch)
            metrics |= {"learning_rate": rate, "tokens_per_second": tokens / seconds}
            progress.step += 1
            on_step(progress.step, metrics)
            self._save_or_stop(state, optimizer, scaler, progress, len(steps), check)
        self.accelerator.free_memory()
        return Trained(
            len(steps), len(steps) - progress.skipped, progress.skipped, progress.first_loss
        )

    def _step(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scaler: torch.amp.GradScaler,
        batch: Sequence[Example],
        progress: _Progress,
    ) -> dict[str, float]:
        totals: dict[str, float] = {}
        denominator = {"pairs": len(batch)}[OBJECTIVES[self.config.objective.name].denominator]
        optimizer.zero_grad(set_to_none=True)
        for planned in self.scorer.plan([e.sequences for e in batch]):
            micro = [batch[i] for i in planned.examples]
            losses_B, metrics = self._forward(model, micro)
            # Divided by what the whole step holds, not the micro-batch.
            self.accelerator.backward(scaler.scale(losses_B.sum() / denominator))
            metrics["loss"] = losses_B.detach().double().sum()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        averaged = {name: value / len(batch) for name, value in totals.items()}
        scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        norm = torch.nn.utils.clip_grad_norm_(
            [p for _, p in self.policy.trainable()], self.settings.max_grad_norm
        )
        averaged["grad_norm"] = float(norm)
        finite = math.isfinite(averaged["loss"]) and math.isfinite(averaged["grad_norm"])
        averaged["skipped"] = float(not finite)
        if progress.step == 0:
            progress.first_loss = averaged["loss"]
            self._check_first_loss(progress.round_index, averaged["loss"])
        if finite:
            progress.skipped_in_a_row = 0
            scaler.step(getattr(optimizer, "optimizer", optimizer))
            scaler.update()
        else:
            self._skip(scaler, optimizer, progress, averaged)
        return averaged

    def sequence_logps(self, model: torch.nn.Module, sequences: Sequence[TokenPair]) -> Tensor:
        """Sum of the completion's log-probs of each (prompt ids, completion ids), shape [S].

        In the order given, differentiable; one forward pass of `model`, which may be wrapped.
        """
        return self.scorer.sums(model, sequences, self.policy.model)

    def _forward(
        self, model: torch.nn.Module, micro: Sequence[Example]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = [(e.prompt, e.chosen) for e in micro] + [(e.prompt, e.rejected) for e in micro]
        sums_2B = self.sequence_logps(model, sequences)
        chosen_B, rejected_B = sums_2B.chunk(2)
        logps = PairLogps(
            chosen_B,
            rejected_B,
            sums_2B.new_tensor([e.reference_chosen for e in micro]),
            sums_2B.new_tensor([e.reference_rejected for e in micro]),
        )
        objective = OBJECTIVES[self.config.objective.name]
        beta = self.config.objective.beta
        return objective.losses(logps, beta), pair_metrics(logps, beta)

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

    def _steps(self, examples: Sequence[Example], round_index: int) -> list[list[Example]]:
        steps = []
        for epoch in range(self.settings.epochs):
            rng = np.random.default_rng((self.config.run.seed, round_index, epoch))
            order = [examples[i] for i in rng.permutation(len(examples))]
            for start in range(0, len(order), self.settings.batch_pairs):
                steps.append(order[start : start + self.settings.batch_pairs])
        return steps

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [p for _, p in self.policy.trainable()],
            lr=self.config.learning_rate,
            weight_decay=self.settings.weight_decay,
        )

    def _check_first_loss(self, round_index: int, loss: float) -> None:
        at_reference = self.config.rounds.reference == "round_start" or round_index == 1
        if not at_reference or _drops_out(self.policy.model) or not math.isfinite(loss):
            return
        # Before any update policy = reference, so every DPO loss is ln 2 up to padding's rounding.
        allowed = 1e-3 if self.config.model.precision == "fp32" else 0.1
        if abs(loss - math.log(2)) > allowed:
            raise NonFiniteError(
                f"round {round_index}: the first step's DPO loss is {loss:.4f}, not ln 2 = 0.6931: "
                "reference log-probs and policy disagree about the same weights, which were not "
                "touched"
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


def _examples(pairs: pl.DataFrame, reference: pl.DataFrame | None = None) -> list[Example]:
    if reference is None:
        table = pairs.with_columns(reference_chosen=pl.lit(0.0), reference_rejected=pl.lit(0.0))
    else:
        keys = ["prompt_id", "chosen_sample", "rejected_sample"]
        table = pairs.join(reference, on=keys, how="left", validate="1:1", maintain_order="left")
        missing = table["reference_chosen"].null_count() + table["reference_rejected"].null_count()
        assert not missing, "every pair has its reference log-probs"
    return [
        Example(
            tuple(row["prompt_token_ids"]),
            tuple(row["chosen_token_ids"]),
            tuple(row["rejected_token_ids"]),
            row["reference_chosen"],
            row["reference_rejected"],
        )
        for row in table.iter_rows(named=True)
    ]


def _drops_out(model: torch.nn.Module) -> bool:
    """Whether a pass in train mode differs from one in eval mode."""
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates.append(getattr(model.config, "attention_dropout", None) or 0.0)
    return any(rates)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
