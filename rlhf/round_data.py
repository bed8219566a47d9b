"""A round's pairs or labels under a config: what trains, is held out, and the reference's word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from rlhf.config_offline import Trains
from rlhf.examples import LabelData, Order, PairData, Step, data_of, split_by_cluster
from rlhf.packing import TokenPair, distinct
from rlhf.protocols import Learner
from rlhf.rounds import Round

_STATE = "reference"


class RoundData:
    """A table of pairs or labels as a round with this config takes it.

    Methods raise InputError where it is of the other kind than the objective's.
    """

    def __init__(self, table: pl.DataFrame, config: Trains, round_index: int) -> None:
        learner, seed, self._objective = config.learner, config.run.seed, config.objective
        order = Order(seed, round_index, learner.epochs, learner.batch_pairs)
        self._parts = [(table, order)]
        if learner.validation_share:
            training, held = split_by_cluster(table, learner.validation_share, seed)
            self._parts = [
                (training, order),
                (held, Order(seed, round_index, 1, held.height)),
            ]

    @property
    def planned(self) -> int:
        """Optimizer steps, unless it stops early."""
        training, order = self._parts[0]
        least = (PairData if self._objective.needs.data == "pairs" else LabelData).least
        return len(order.steps(training.height, least))

    def steps(self, reference: pl.DataFrame | None) -> tuple[list[Step], Step | None]:
        """Optimizer steps, and all that is held out as one step, if anything is."""
        training, *held = [data.steps(order, reference) for data, order in self._read()]
        return training, held[0][0] if held else None

    def unscored(self) -> list[TokenPair]:
        """The sequences whose log-probs under the reference are needed, each once."""
        return distinct([put for data, order in self._read() for put in data.unscored(order)])[0]

    def scored(self, sums: Sequence[float]) -> pl.DataFrame:
        """Log-probs (nats) of `unscored`'s answers with their keys, schema `PAIR_REFERENCE` or
        `LABEL_REFERENCE` of `rlhf.examples`."""
        read = self._read()
        wanted = [data.unscored(order) for data, order in read]
        _, places = distinct([put for part in wanted for put in part])
        found = iter([sums[place] for place in places])
        return pl.concat(
            data.scored(order, [next(found) for _ in part])
            for (data, order), part in zip(read, wanted, strict=True)
        )

    def _read(self) -> list[tuple[PairData | LabelData, Order]]:
        # Anew each time: as Python's numbers the tokens of a round take much.
        return [(data_of(table, self._objective), order) for table, order in self._parts]


def reference_logps(
    round: Round, data: RoundData, learner: Learner, check: Callable[[], None]
) -> pl.DataFrame:
    """What the reference says of `data`, computed once a round, before training, so that no second
    model is resident during it. Where `check` raises Interrupted, what is done is kept."""
    if not round.done("reference_logps"):
        sums = learner.reference_logps(data.unscored(), round.scratch(_STATE), check)
        round.table("reference_logps", lambda: data.scored(sums))
    round.drop(_STATE)
    return round.stored_table("reference_logps")
