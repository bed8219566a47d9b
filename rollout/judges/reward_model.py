"""A reward model as a judge: a trained head's raw score, mapped to [0, 1].

Rewards, floors and margins are in [0, 1], so raw scores are mapped. Every mapping rises strictly,
so that answers rank as the raw scores rank them; each score's reason keeps the raw one. Where many
scores lie beyond a mapping's ends, what still ranks no longer differs by much: that is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from rlhf.config_judges import RewardModelSpec
from rlhf.errors import InputError, PairloopError
from rlhf.files import read_json, sha256_file, write_json
from rlhf.pair_formats import read_preferences
from rlhf.types import Completion, Message, Prompt, Score
from rollout.judges.cache import Entry, VerdictCache, key_of, weights_of
from rollout.judges.reward_engines import (
    Checkpoint,
    RewardEngine,
    check_probe,
    folder_of,
    read_checkpoint,
)

Items = Sequence[tuple[Prompt, Completion]]

_QUESTION: Message = {"role": "user", "content": "What is 2 + 2?"}
_ANSWERS = ("2 + 2 is 4.", "Who cares.", "2 + 2 is 4. Put two apples beside two apples and count.")
_TAIL = 0.01
"""Scores below 0.01 or above 0.99 lie beyond a mapping's ends."""
_PILED_UP = 0.1
_FEWEST = 100
_SAME = 1e-6


class Scale(Protocol):
    """A mapping from raw scores to (0, 1) that rises strictly."""

    def value(self, raw: float) -> float:
        """The score."""
        ...


class Sigmoid:
    """Bradley-Terry: how likely an answer beats one of raw score 0.

    >>> Sigmoid().value(0.0), round(Sigmoid().value(2.0), 3)
    (0.5, 0.881)
    """

    def value(self, raw: float) -> float:
        """The score."""
        small = math.exp(-abs(raw))
        return 1 / (1 + small) if raw >= 0 else small / (1 + small)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The share of a calibration set's scores below: linear between `knots`, its 1%, 2% ... 99%
    quantiles, and falling off exponentially beyond them, so that no two raw scores tie.

    >>> scale = Quantiles(tuple(range(1, 100)))
    >>> scale.value(50), scale.value(99), scale.value(120) < scale.value(130) < 1
    (0.5, 0.99, True)
    """

    knots: tuple[float, ...]

    @classmethod
    def of(cls, raws: Sequence[float]) -> Quantiles:
        """The mapping that a calibration set gives."""
        levels = np.linspace(_TAIL, 1 - _TAIL, 99)
        return cls(tuple(np.quantile(np.asarray(raws), levels).tolist()))

    def value(self, raw: float) -> float:
        """The score."""
        low, high = self.knots[0], self.knots[-1]
        width = (high - low) / 2
        if raw < low:
            return _TAIL * math.exp((raw - low) / width)
        if raw > high:
            return 1 - _TAIL * math.exp((high - raw) / width)
        return float(np.interp(raw, self.knots, np.linspace(_TAIL, 1 - _TAIL, len(self.knots))))


class RewardModelJudge:
    """Scores completions with a reward model; one output of it a dimension."""

    def __init__(
        self, spec: RewardModelSpec, field: str, engine: RewardEngine, cache: VerdictCache
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.dimensions = tuple(spec.dimensions)
        self._field = field
        self._engine = engine
        self._cache = cache
        self._checkpoint: Checkpoint | None = None
        self._scales: tuple[Scale, ...] = ()
        self._count = 0
        self._beyond = 0
        self._turn = Lock()

    @property
    def beside(self) -> bool:
        """Whether its model works elsewhere; shards are scored one after the other."""
        return self._engine.beside

    @classmethod
    def of(
        cls, spec: RewardModelSpec, field: str, engine: RewardEngine, cache: VerdictCache
    ) -> RewardModelJudge:
        """The judge that a configuration names; nothing is loaded yet. Raises InputError where
        its folder or its calibration set is not there."""
        local = spec.model.startswith(("/", "./", "../", "~")) or spec.model.count("/") > 1
        if local and folder_of(spec.model) is None:
            raise InputError(f"{field}.model: there is no folder {spec.model}")
        if spec.calibration_set is not None and not Path(spec.calibration_set).is_file():
            raise InputError(f"{field}.calibration_set: there is no file {spec.calibration_set}")
        return cls(spec, field, engine, cache)

    @cached_property
    def weights(self) -> str | None:
        """What tells these weights from others: the SHA-256 of a local folder's, a hub id's
        revision; None for a hub id without one, which may change."""
        if folder_of(self.spec.model) is None:
            return self.spec.revision
        return weights_of(self.spec.model, None)

    def scale_sha256(self) -> str:
        """Of what turns outputs into scores: a certificate for a floor is one for a mapping."""
        spec = self.spec
        used = None if spec.calibration_set is None else sha256_file(Path(spec.calibration_set))
        engine = [spec.engine.precision, spec.engine.max_length]
        return key_of(spec.dimensions, spec.mapping, used, engine)

    def start(self, folder: Path | None) -> list[str]:
        """Load the model and score texts whose order everybody knows; what that gave.

        `folder` keeps the mapping, so that a resumed run has the same. Raises InputError where the
        model can't score: outputs, tokenizer, padding, NaN, a constant, another model than before.
        """
        checkpoint = read_checkpoint(self.spec, self._field)
        probes = [checkpoint.encode([_QUESTION, _said(text)]) for text in _ANSWERS]
        check_probe(probes[0], checkpoint, self._field)
        self._engine.load(checkpoint)
        told = self._preflight(probes)
        self._checkpoint = checkpoint
        self._scales = self._remembered(None if folder is None else folder / f"{self.name}.json")
        self._engine.sleep()
        return told

    def score(self, items: Items) -> list[Score]:
        """One `Score` for every item and dimension, in that order."""
        with self._turn:
            return self._score(items)

    def _score(self, items: Items) -> list[Score]:
        if self._checkpoint is None:
            self.start(None)
        rows = [self._row([*prompt.messages, _said(answer.text)]) for prompt, answer in items]
        raws = iter(self._raw([row for row in rows if not isinstance(row, str)]))
        scores = []
        for (_, completion), row in zip(items, rows, strict=True):
            at = (completion.prompt_id, completion.sample, self.name)
            if isinstance(row, str):
                scores += [Score.abstain(*at, dimension, row) for dimension in self.dimensions]
                continue
            outputs = zip(self.dimensions, self._scales, next(raws), strict=True)
            scores += [self._scored(*at, *output) for output in outputs]
        return scores

    def news(self) -> str | None:
        """Whether the scores since the last news pile up beyond the mapping's ends."""
        count, beyond, self._count, self._beyond = self._count, self._beyond, 0, 0
        if not count or beyond / count <= _PILED_UP:
            return None
        remedy = (
            "take a calibration_set like these answers"
            if self.spec.mapping == "quantiles"
            else "use mapping quantiles"
        )
        return (
            f"judge {self.name}: ALARM: {beyond} of {count} scores lie below {_TAIL} or above "
            f"{1 - _TAIL}, where margins all but vanish; {remedy}"
        )

    def sleep(self) -> None:
        """See `RewardEngine.sleep`."""
        self._engine.sleep()

    def close(self) -> None:
        """See `RewardEngine.close`."""
        self._engine.close()
        self._checkpoint = None

    def _row(self, messages: Sequence[Message]) -> list[int] | str:
        """Token ids, or why there are none."""
        from jinja2 import TemplateError

        assert self._checkpoint is not None
        try:
            ids = self._checkpoint.encode(messages)
        except TemplateError as error:
            return f"the chat template refuses these messages: {error}"
        longest = self.spec.engine.max_length
        if len(ids) > longest:
            return f"too long for engine.max_length {longest}: {len(ids)} tokens"
        return ids

    def _scored(
        self, prompt_id: str, sample: int, judge: str, dimension: str, scale: Scale, raw: float
    ) -> Score:
        if not math.isfinite(raw):
            return Score.abstain(prompt_id, sample, judge, dimension, f"the raw score is {raw}")
        value = scale.value(raw)
        self._count += 1
        self._beyond += not _TAIL <= value <= 1 - _TAIL
        reason = f"raw {raw!r}"
        return Score(prompt_id, sample, judge, dimension, value, (value,), 0.0, False, reason)

    def _raw(self, rows: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Raw scores of every row, from the cache where it has them; equal rows are scored once.

        A call's scores are kept together or not at all: the rest would be batched otherwise after
        a kill, and rounded otherwise.
        """
        keys = [key_of(*self._asked, list(row)) for row in rows]
        known = {} if self._asked[-1] is None else self._cache.find(list(dict.fromkeys(keys)))
        unique = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        found = self._engine.raw(list(unique.values())) if unique else []
        width = len(self.dimensions)
        if len(found) != len(unique) or any(len(raw) != width for raw in found):
            raise PairloopError(f"judge {self.name}: the engine lost scores on the way")
        fresh = dict(zip(unique, found, strict=True))
        if self._asked[-1] is not None:
            entries = [Entry(key, self.name, self.spec.model, raw) for key, raw in fresh.items()]
            self._cache.keep([e for e in entries if all(map(math.isfinite, e.value))])
        return [tuple(known[key]) if key in known else fresh[key] for key in keys]

    @cached_property
    def _asked(self) -> tuple[str | None, ...]:
        """What a raw score depends on beside the text; the weights come last."""
        spec = self.spec
        local = folder_of(spec.model) is not None
        weights = self.weights if local else weights_of(spec.model, spec.revision)
        return (self.name, spec.backend, spec.model, spec.engine.precision, weights)

    def _preflight(self, probes: Sequence[Sequence[int]]) -> list[str]:
        model = self.spec.model
        (alone,) = self._engine.raw(probes[:1])
        first, second, _ = together = self._engine.raw(probes)
        if not all(math.isfinite(raw) for row in together for raw in row):
            raise InputError(f"{self._field}.model: {model} gives {together}, which is no score")
        for index, dimension in enumerate(self.dimensions):
            column = [row[index] for row in together]
            if max(column) - min(column) <= _SAME * max(1.0, *map(abs, column)):
                raise InputError(
                    f"{self._field}.model: {model} gives every answer {column[0]} on {dimension}, "
                    "a good one and a bad one alike: its head was not trained"
                )
        allowed = 1e-3 if self.spec.engine.precision == "fp32" else 0.1
        for one, other in zip(alone, first, strict=True):
            if abs(one - other) > allowed * (1 + abs(one)):
                raise InputError(
                    f"{self._field}.model: {model} scores a text {one} alone and {other} beside a "
                    "longer one: it reads padding; its pad token or attention mask is wrong"
                )
        order = "" if first[0] > second[0] else "; THE WRONG WAY ROUND"
        return [
            f"judge {self.name}: asked what 2 + 2 is, {_ANSWERS[0]!r} has a raw score of "
            f"{first[0]:.4g} and {_ANSWERS[1]!r} of {second[0]:.4g}{order}"
        ]

    def _remembered(self, path: Path | None) -> tuple[Scale, ...]:
        """The mapping of each output, as it was at the run's first start."""
        now: dict[str, Any] = {
            "model": self.spec.model,
            "weights": self.weights,
            "scale": self.scale_sha256(),
        }
        if path is not None and path.exists():
            before = read_json(path, "remove it to take the judge as it is now")
            if changed := sorted(key for key in now if before.get(key) != now[key]):
                raise InputError(
                    f"judge {self.name}: {' and '.join(changed)} changed since this run began, so "
                    "its scores would not compare; put it back, or start a run of another name"
                )
            return _scales(before["knots"], len(self.dimensions))
        knots = [list(scale.knots) for scale in self._calibrated()]
        if path is not None:
            write_json(path, {**now, "knots": knots})
        return _scales(knots, len(self.dimensions))

    def _calibrated(self) -> Iterator[Quantiles]:
        """A mapping for each output, from the calibration set; none where there is no set."""
        if self.spec.calibration_set is None:
            return
        where = f"{self._field}.calibration_set"
        preferences = read_preferences(Path(self.spec.calibration_set))
        chats = [
            [*prompt, *answer]
            for name in preferences.answers
            for prompt, answer in preferences.table.select("prompt", name).iter_rows()
        ]
        rows = [row for chat in chats if not isinstance(row := self._row(chat), str)]
        if len(rows) < _FEWEST:
            raise InputError(
                f"{where} must hold at least {_FEWEST} answers that can be scored, "
                f"{self.spec.calibration_set} has {len(rows)}"
            )
        for column in zip(*self._raw(rows), strict=True):
            scale = Quantiles.of(column)
            if not scale.knots[-1] > scale.knots[0]:
                raise InputError(f"{where}: its answers all score {column[0]}; nothing to map by")
            yield scale


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _scales(knots: Sequence[Sequence[float]], outputs: int) -> tuple[Scale, ...]:
    if not knots:
        return (Sigmoid(),) * outputs
    return tuple(Quantiles(tuple(row)) for row in knots)
