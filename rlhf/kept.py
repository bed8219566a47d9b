"""What a long pass without gradients has found, kept in files while it goes on.

Before the first optimizer step a round's reference log-probs take a pass over all of its pairs, by
all ranks. It is stored every few micro-batches and when a stop is asked for; the same pass, begun
again, goes on behind the micro-batches that are known. Those are laid out as before, so an answer
has the same neighbours, and the same bits, as in a pass that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl

from rlhf.errors import InputError, Interrupted
from rlhf.files import make_folder, read_parquet, write_parquet
from rlhf.group import Group
from rlhf.packing import MicroBatch, TokenPair

EACH = 32
"""Micro-batches of a rank between two files."""
SCHEMA = pl.Schema({"sequence": pl.Binary, "logp": pl.Float64})
"""SHA-256 over an answer and its prompt, and the answer's log-prob (nats)."""


class Kept:
    """Log-probs of sequences, by their numbers; `folder` is rank 0's, who reads and writes it.

    All methods but `has` are collectives of `group`.
    """

    def __init__(
        self,
        folder: Path,
        sequences: Sequence[TokenPair],
        group: Group,
        check: Callable[[], None],
    ) -> None:
        """`check` may raise Interrupted on any rank."""
        self._folder = folder
        self._group = group
        self._check = check
        self._keys = [_key(sequence) for sequence in sequences]
        files = sorted(folder.glob("part-*.parquet")) if group.main else []
        known = dict(row for file in files for row in read_parquet(file).iter_rows())
        own = {n: known[key] for n, key in enumerate(self._keys) if key in known}
        self._files = len(files)
        self._found: dict[int, float] = group.first(own)
        self._new: dict[int, float] = {}
        self._added = 0

    def has(self, micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether all of them are known, and no rank need make its pass."""
        return all(number in self._found for micro in micro_batches for number in micro.examples)

    def add(self, rows: Sequence[int], sums: Sequence[float]) -> None:
        """What a micro-batch gave on this rank. Raises Interrupted, after it is stored, on all
        ranks where one was asked to stop."""
        self._new |= zip(rows, sums, strict=True)
        self._added += 1
        try:
            self._group.stop_together(self._check)
        except Interrupted:
            self._store()
            raise
        if self._added % EACH == 0:
            self._store()

    def all(self) -> list[float]:
        """In the order of the sequences, once the pass is over."""
        self._store()
        return [self._found[number] for number in range(len(self._keys))]

    def _store(self) -> None:
        new = {n: v for part in self._group.gather(self._new) for n, v in part.items()}
        self._found |= new
        self._new = {}
        problem = None
        if new and self._group.main:
            rows = [(self._keys[number], value) for number, value in sorted(new.items())]
            table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
            try:
                write_parquet(table, make_folder(self._folder) / f"part-{self._files:05d}.parquet")
            except InputError as error:
                problem = str(error)
            self._files += 1
        # The others would go on, and wait for who has raised.
        if (problem := self._group.first(problem)) is not None:
            raise InputError(problem)


def _key(sequence: TokenPair) -> bytes:
    prompt, answer = sequence
    ids = np.array([len(prompt), *prompt, *answer], dtype=np.int64)
    return sha256(ids.tobytes()).digest()
