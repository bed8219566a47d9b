"""The learner: one policy over one or more ranks, trained on a round's pairs or labels.

An optimizer step sums every example's loss and divides by what the whole step holds, so how the
step is cut into micro-batches, and those over ranks, changes nothing but rounding. Checkpoints hold
all that the next step depends on; the learning rate and the order of examples are functions of
(seed, round, step).

Where ranks train together, every rank calls the same methods with the same arguments and gets the
same answers; rank 0 writes the files.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rlhf.checkpoint import Checkpoints, Progress, load_trained
from rlhf.config_offline import Trains
from rlhf.errors import NonFiniteError
from rlhf.examples import Example, Step, at_reference, logps_of, sequences
from rlhf.group import Group
from rlhf.kept import Kept
from rlhf.logprobs import Batch, sequence_logps, split_rows
from rlhf.objectives import Logps, kl_baseline, metrics
from rlhf.optimizer import check_optimizer, learning_rate
from rlhf.packing import MicroBatch, TokenPair, distinct
from rlhf.policy import Policy
from rlhf.protocols import OnStep
from rlhf.round_data import RoundData
from rlhf.scoring import Scorer
from rlhf.sharding import Replicated, Sharding
from rlhf.types import Completion, Trained

T = TypeVar("T")


class Learner:
    """Trains one policy; also scores sequences under it, since it holds the weights."""

    def __init__(
        self,
        policy: Policy,
        config: Trains,
        say: Callable[[str], None] = lambda _: None,
        shard: Callable[[Policy, Trains], Sharding] | None = None,
    ) -> None:
        """`shard` says how the policy lies over the ranks; by default this process is alone."""
        self.policy = policy
        self.config = config
        self.settings = config.learner
        check_optimizer(config.learner, policy.device)
        if self.settings.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            policy.model.enable_input_require_grads()  # type: ignore[operator]
        self.sharding = (
            shard(policy, config)
            if shard
            else Replicated(policy, config.learner, config.model.precision)
        )
        self.group = self.sharding.group
        self.check: Callable[[], None] = lambda: None
        """Called between micro-batches of a pass without gradients, where this process is alone;
        what it raises ends the pass."""
        # Last, since it makes a pass, which split weights can only once an engine gathers them.
        self.scorer = Scorer(
            policy, self.settings.micro_batch_tokens, self.settings.on_inexact, say
        )

    def restore(self, folder: Path | None) -> None:
        """Trained weights that `save` wrote; None goes back to the start of the run."""
        self.policy.restore(folder)
        self.sharding.reload()

    def save(self, folder: Path, card: str) -> None:
        """See `Policy.save`."""
        self.policy.save(folder, card, write=self.group.main)

    def save_merged(self, folder: Path) -> None:
        """See `Policy.save_merged`."""
        self.policy.save_merged(folder, write=self.group.main)

    def logps(self, completions: Sequence[Completion], initial: bool = False) -> list[list[float]]:
        """Token log-probs of completions under the policy, or under the run's initial policy."""
        sequences = [(c.prompt_token_ids, c.token_ids) for c in completions]
        kind = "initial" if initial else "round_start"
        return self._score(sequences, kind, split_rows)

    def reference_logps(
        self, sequences: Sequence[TokenPair], state: Path, check: Callable[[], None]
    ) -> list[float]:
        """Sum of each answer's log-probs (nats) under the reference.

        `state` keeps what is done where `check` raises Interrupted, on one rank or all, or the
        process dies: called again, it goes on from there.
        """
        once, places = distinct(sequences)
        kept = Kept(state, once, self.group, check)

        def take(micro: MicroBatch, tokens_N: Tensor, batch: Batch) -> None:
            sums_S = sequence_logps(tokens_N, batch).double().tolist()
            kept.add(*((micro.examples, sums_S) if micro.weight else ((), ())))

        self._pass(once, self.config.reference, take, kept.has)
        found = kept.all()
        return [found[place] for place in places]

    def answer_logps(self, sequences: Sequence[TokenPair]) -> list[float]:
        """Sum of each answer's log-probs (nats) under the policy as it stands, without gradient."""
        return self._sums(sequences, "round_start")

    def _sums(self, sequences: Sequence[TokenPair], kind: str) -> list[float]:
        once, places = distinct(sequences)
        found: list[float] = self._score(
            once, kind, lambda tokens_N, batch: sequence_logps(tokens_N, batch).double().tolist()
        )
        return [found[place] for place in places]

    def _score(
        self,
        sequences: Sequence[TokenPair],
        kind: str,
        read: Callable[[Tensor, Batch], list[T]],
    ) -> list[T]:
        """What `read` makes of the token log-probs of each sequence, over all ranks."""
        planned, found = [], []

        def take(micro: MicroBatch, tokens_N: Tensor, batch: Batch) -> None:
            planned.append(micro.examples)
            found.append(read(tokens_N, batch))
            if self.group.world == 1:
                self.check()

        self._pass(sequences, kind, take)
        return self.group.scattered(planned, found)

    def _pass(
        self,
        sequences: Sequence[TokenPair],
        kind: str,
        take: Callable[[MicroBatch, Tensor, Batch], None],
        known: Callable[[Sequence[MicroBatch]], bool] = lambda _: False,
    ) -> None:
        """Give `take` each of this rank's micro-batches of sequences with its token log-probs,
        without gradient; left out where what all ranks have at the same time is `known`."""
        examples = [[sequence] for sequence in sequences]
        self.scorer.prove(examples, self.group)
        plans = self.scorer.plans(examples, self.group)
        with self.policy.reference(kind) as model, torch.no_grad():
            model.eval()
            for together in zip(*plans, strict=True):
                if not known(together):
                    micro = together[self.group.rank]
                    given = [sequences[number] for number in micro.examples]
                    take(micro, *self.scorer.tokens(model, given))
            # A start that was loaded for this pass must not outlive it.
            del model

    def release(self) -> None:
        """Give back what only training needed: gradients, and device memory that torch caches."""
        for _, parameter in self.policy.trainable():
            parameter.grad = None
        gc.collect()
        if self.policy.device != "cpu":
            torch.cuda.empty_cache()

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

        `reference` is what `rlhf.round_data` made of `reference_logps`, None for an objective
        without one. `state`
        keeps the mid-round checkpoint: a checkpoint there is gone on from, and one is written
        every `checkpoint_steps` and when `check` raises `Interrupted`.
        Raises NonFiniteError before any non-finite update (after a few in a row under fp16).
        """
        assert (reference is not None) == self.config.objective.needs.reference
        steps, held = RoundData(table, self.config, round_index).steps(reference)
        self.scorer.prove([e.sequences for step in steps for e in step.examples], self.group)
        self.sharding.begin()
        self.sharding.model.train()
        checkpoints = Checkpoints(state / "checkpoints", self.policy, self.sharding)
        progress = checkpoints.resume(round_index)
        # A round's start is fixed by its number, not by what this process drew before.
        if progress.step == 0:
            torch.manual_seed(_seed(self.config.run.seed, round_index))
            self.policy.begin_round()
            self.sharding.reload()
            if not self.group.main:
                # What is drawn from here on is this rank's own: dropout.
                torch.manual_seed(_seed(self.config.run.seed, round_index, self.group.rank))
        patience = self.settings.patience or self.settings.epochs
        while progress.step < len(steps) and progress.stale_epochs < patience:
            started = time.perf_counter()
            rate = learning_rate(
                progress.step,
                len(steps),
                self.config.learning_rate,
                self.settings.schedule,
                self.settings.warmup_share,
            )
            step = steps[progress.step]
            found = self._step(step, rate, progress)
            seconds = time.perf_counter() - started
            found |= {"learning_rate": rate, "tokens_per_second": step.tokens / seconds}
            progress.step += 1
            if held is not None and progress.step % (len(steps) // self.settings.epochs) == 0:
                found |= self._validate(held, progress, checkpoints)
            on_step(progress.step, found)
            self._save_or_stop(checkpoints, progress, len(steps), check)
        if held is not None and progress.best_step is None:
            raise NonFiniteError(
                f"round {round_index}: after no epoch the loss of held-out examples was a number; "
                "lower learner.learning_rate, use model.precision bf16 or fp32, or look at the "
                "longest examples"
            )
        if progress.best_step not in (None, progress.step):
            load_trained(self.policy, checkpoints.best(progress.best_step))
            self.sharding.reload()
        self.sharding.begin()
        return Trained(
            len(steps),
            progress.step - progress.skipped,
            progress.skipped,
            progress.first_loss,
            progress.best_step,
            progress.best_loss,
        )

    def _validate(
        self, held: Step, progress: Progress, checkpoints: Checkpoints
    ) -> dict[str, float]:
        """Measure the held-out examples after an epoch; keep the weights if they are the best."""
        found = self.measure(held)
        # A loss that is no number is never the best.
        least = math.inf if progress.best_loss is None else progress.best_loss
        if found["loss"] < least:
            progress.best_loss, progress.best_step = found["loss"], progress.step
            progress.stale_epochs = 0
            checkpoints.save_best(progress.step)
        else:
            progress.stale_epochs += 1
        return {f"validation_{name}": value for name, value in found.items()}

    def measure(self, step: Step) -> dict[str, float]:
        """Loss and metrics of a step's examples, without gradient or dropout."""
        objective, loss = self.config.objective, step.loss(self.config.objective)
        baseline, tally, total = self._baseline(step), _Tally(), 0.0
        self.sharding.model.eval()
        with torch.no_grad():
            for micro, weight in self._micro_batches(step):
                logps = self._logps(micro, baseline)
                if weight:
                    total += float(loss.total(logps))
                    tally.add(metrics(logps, objective))
        self.sharding.model.train()
        return {"loss": self.group.sums({"loss": total})["loss"], **tally.means(self.group)}

    def _step(self, step: Step, rate: float, progress: Progress) -> dict[str, float]:
        objective, loss = self.config.objective, step.loss(self.config.objective)
        baseline = self._baseline(step)
        tally = _Tally()
        lost = torch.zeros(2, dtype=torch.float64)
        for micro, weight in self._micro_batches(step):
            logps = self._logps(micro, baseline)
            own, nll = loss.parts(logps)
            total = own + objective.sft * nll
            self.sharding.backward(total * weight)
            if weight:
                lost += torch.stack([total, nll]).detach().double().cpu()
                tally.add(metrics(logps, objective))
        sums = self.group.sums({"loss": float(lost[0]), "nll": float(lost[1])})
        found = {"loss": sums["loss"], **tally.means(self.group)}
        if objective.sft:
            found["nll"] = sums["nll"]
        if step.mismatched:
            found["kl_baseline"] = float(baseline)
        if progress.step == 0:
            progress.first_loss = found["loss"]
            self._check_first_loss(progress.round_index, step, found["loss"])
        # The loss is looked at first: from here on the ranks agree on what they do.
        finite = math.isfinite(found["loss"])
        found["grad_norm"] = self.sharding.update(rate) if finite else math.nan
        finite = math.isfinite(found["grad_norm"])
        found["skipped"] = float(not finite)
        if finite:
            progress.skipped_in_a_row = 0
        else:
            self._skip(progress, found)
        return found

    def _micro_batches(self, step: Step) -> Iterator[tuple[list[Example], float]]:
        """This rank's share of a step, and what each part weighs: 0 where the rank only keeps up
        with the others."""
        for planned in self._plan([e.sequences for e in step.examples]):
            yield [step.examples[i] for i in planned.examples], planned.weight

    def _plan(self, examples: Sequence[Sequence[TokenPair]]) -> list[MicroBatch]:
        return self.scorer.plans(examples, self.group)[self.group.rank]

    def _logps(self, examples: Sequence[Example], baseline: Tensor) -> Logps:
        """What an objective takes of `examples`; one forward pass."""
        sums_S = self.sequence_logps(sequences(examples))
        return logps_of(examples, sums_S, baseline, self.config.objective.needs.reference)

    def _baseline(self, step: Step) -> Tensor:
        """KTO's z0 of the whole step: no gradient, no dropout; 0 where nothing is mismatched."""
        given, device = step.mismatched, self.policy.device
        if not given:
            return torch.zeros((), device=device)
        planned, found = [], []
        self.sharding.model.eval()
        with torch.no_grad():
            for micro in self._plan([[sequence] for sequence in given]):
                planned.append(micro.examples)
                found.append(self.sequence_logps([given[i] for i in micro.examples]).tolist())
        self.sharding.model.train()
        dtype = torch.float64 if self.policy.model.dtype == torch.float64 else torch.float32
        policy_B = torch.tensor(self.group.scattered(planned, found), dtype=dtype, device=device)
        return kl_baseline(policy_B, policy_B.new_tensor(step.reference_mismatched))

    def sequence_logps(self, sequences: Sequence[TokenPair]) -> Tensor:
        """Sum of the completion's log-probs of each (prompt ids, completion ids), shape [S].

        In the order given, differentiable; one forward pass of the model, wrapped or not.
        """
        return self.scorer.sums(self.sharding.model, sequences, self.policy.model)

    def _skip(self, progress: Progress, metrics: dict[str, float]) -> None:
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        where = f"step {progress.step + 1}"
        self.sharding.skip()
        if self.sharding.loss_scale is None:
            raise NonFiniteError(
                f"{where}: {what}; the weights were not touched. Lower learner.learning_rate or "
                "look at this step's pairs"
            )
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.settings.max_skipped_steps:
            raise NonFiniteError(
                f"{where}: {progress.skipped_in_a_row} fp16 overflows in a row ({what}, loss scale "
                f"now {self.sharding.loss_scale:g}); use model.precision bf16 or fp32"
            )

    def _check_first_loss(self, round_index: int, step: Step, loss: float) -> None:
        objective = self.config.objective
        at_start = self.config.reference == "round_start" or round_index == 1
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
        checkpoints: Checkpoints,
        progress: Progress,
        planned: int,
        check: Callable[[], None],
    ) -> None:
        try:
            self.group.stop_together(check)
        except BaseException:
            checkpoints.save(progress)
            raise
        if progress.step % self.settings.checkpoint_steps == 0 and progress.step < planned:
            checkpoints.save(progress)


class _Tally:
    """Sums and counts of a step, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float]] = {}

    def add(self, sums: Mapping[str, tuple[Tensor, float]]) -> None:
        for name, (value, count) in sums.items():
            before, of = self._found.get(name, (0.0, 0))
            self._found[name] = (before + float(value), of + count)

    def means(self, group: Group) -> dict[str, float]:
        """Over all ranks; nothing of what there was nothing of: a step may have no bad answer."""
        values = group.sums({name: value for name, (value, _) in self._found.items()})
        counts = group.sums({name: of for name, (_, of) in self._found.items()})
        return {name: value / counts[name] for name, value in values.items() if counts[name]}


def _drops_out(model: torch.nn.Module) -> bool:
    """Whether a pass in train mode differs from one in eval mode."""
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates.append(getattr(model.config, "attention_dropout", None) or 0.0)
    return any(rates)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
