"""How sequences are laid out for forward passes: pure planning over token ids.

A segment is a prompt followed by its completions, which share that one copy of it. A row holds
segments; a micro-batch holds rows of similar length, at most `budget` tokens with padding. The last
token of a completion predicts nothing that is scored, so a segment leaves it out:
P + sum of (C - 1) tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

Tokens = Sequence[int]
TokenPair = tuple[Tokens, Tokens]
"""Prompt ids and completion ids."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A prompt and the completions that follow it."""

    prompt: Tokens
    completions: tuple[tuple[int, Tokens], ...]
    """(number of the sequence, completion ids)."""

    @property
    def length(self) -> int:
        """Tokens that it takes of its row."""
        return len(self.prompt) + sum(len(ids) - 1 for _, ids in self.completions)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples of one forward and backward pass, by number."""

    examples: tuple[int, ...]
    weight: float = 1.0
    """0 where a rank passes along only because the others still have work."""


@dataclass(frozen=True, slots=True)
class _Item:
    """What goes into a micro-batch whole."""

    prompt: tuple[int, ...]
    """No two items of a micro-batch have the same."""
    examples: tuple[int, ...]
    length: int
    rows: int


@dataclass(slots=True)
class _Open:
    """A micro-batch that is being filled."""

    free_rows: int
    prompts: set[tuple[int, ...]] = field(default_factory=set)
    examples: list[int] = field(default_factory=list)

    def add(self, item: _Item) -> None:
        self.prompts.add(item.prompt)
        self.examples += item.examples


def distinct(sequences: Sequence[TokenPair]) -> tuple[list[TokenPair], list[int]]:
    """Each sequence once, in order of first appearance, and the place there of each one given.

    >>> distinct([((1,), (2,)), ((1,), (3,)), ([1], [2])])
    ([((1,), (2,)), ((1,), (3,))], [0, 1, 0])
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    found = [places.setdefault((tuple(p), tuple(c)), len(places)) for p, c in sequences]
    return list(places), found


def pack(sequences: Sequence[TokenPair]) -> list[list[Segment]]:
    """Rows of segments, none longer than the longest segment: best fit, longest first.

    >>> rows = pack([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7], [8, 9]), ([1], [2])])
    >>> [[(s.prompt, s.length) for s in row] for row in rows]
    [[([1, 2, 3], 4)], [([7], 2), ([1], 1)]]
    """
    completions: dict[tuple[int, ...], list[tuple[int, Tokens]]] = {}
    for number, (prompt, completion) in enumerate(sequences):
        completions.setdefault(tuple(prompt), []).append((number, completion))
    segments = [Segment(list(p), tuple(found)) for p, found in completions.items()]
    segments.sort(key=lambda s: -s.length)
    rows: list[list[Segment]] = []
    gaps: list[tuple[int, int]] = []
    for segment in segments:
        at = bisect_left(gaps, (segment.length, 0))
        if at < len(gaps):
            gap, row = gaps.pop(at)
        else:
            gap, row = segments[0].length, len(rows)
            rows.append([])
        rows[row].append(segment)
        insort(gaps, (gap - segment.length, row))
    return rows


def plan(
    examples: Sequence[Sequence[TokenPair]], budget: int, shared: bool, ranks: int = 1
) -> list[list[MicroBatch]]:
    """Micro-batches of each rank, equally many: rows x longest row is at most `budget` tokens.

    An example is the sequences that have to be scored together, all of one prompt; one that is
    longer than the budget is a micro-batch of its own. With `shared`, sequences are packed as
    `pack` does; else each is a row. Every example is in exactly one micro-batch of weight 1.
    """
    items = _segments(examples, budget) if shared else _rows(examples)
    items.sort(key=lambda item: (-item.length, item.examples))
    done = [MicroBatch(tuple(found.examples)) for found in _fill(items, budget, shared)]
    while len(done) % ranks:
        largest = max(range(len(done)), key=lambda i: len(done[i].examples))
        members = done[largest].examples
        if len(members) > 1:
            half = len(members) // 2
            done[largest : largest + 1] = [MicroBatch(members[:half]), MicroBatch(members[half:])]
        else:
            done.append(replace(done[-1], weight=0.0))
    return [done[rank::ranks] for rank in range(ranks)]


def _fill(items: Sequence[_Item], budget: int, shared: bool) -> list[_Open]:
    """Items, longest first, each into the smallest gap of a row that holds it, else a new row."""
    done: list[_Open] = []
    gaps: list[tuple[int, int, int]] = []
    for row, item in enumerate(items):
        at = bisect_left(gaps, (item.length, 0, 0))
        # Two segments of one prompt would share it, and make a row longer than planned.
        while at < len(gaps) and item.prompt in done[gaps[at][2]].prompts:
            at += 1
        if at < len(gaps):
            gap, _, batch = gaps.pop(at)
        else:
            last = done[-1] if done else None
            if last is None or last.free_rows < item.rows or item.prompt in last.prompts:
                done.append(_Open(max(item.rows, budget // item.length)))
                longest = item.length
            done[-1].free_rows -= item.rows
            gap, batch = longest, len(done) - 1
        done[batch].add(item)
        if shared and gap > item.length:
            insort(gaps, (gap - item.length, row, batch))
    return done


def _segments(examples: Sequence[Sequence[TokenPair]], budget: int) -> list[_Item]:
    """Examples of one prompt together, as many as the budget holds."""
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, sequences in enumerate(examples):
        assert len({tuple(p) for p, _ in sequences}) == 1, "an example has one prompt"
        of_prompt.setdefault(tuple(sequences[0][0]), []).append(number)
    items = []
    for prompt, numbers in of_prompt.items():
        members: list[int] = []
        held: set[tuple[int, ...]] = set()
        length = len(prompt)
        for number in numbers:
            new = {tuple(ids) for _, ids in examples[number]} - held
            more = sum(len(ids) - 1 for ids in new)
            if members and length + more > budget:
                items.append(_Item(prompt, tuple(members), length, 1))
                members, held, length = [], set(), len(prompt)
                new = {tuple(ids) for _, ids in examples[number]}
                more = sum(len(ids) - 1 for ids in new)
            members.append(number)
            held |= new
            length += more
        items.append(_Item(prompt, tuple(members), length, 1))
    return items


def _rows(examples: Sequence[Sequence[TokenPair]]) -> list[_Item]:
    """Each example by itself, each of its sequences a row."""
    return [
        _Item((-1, number), (number,), max(len(p) + len(c) for p, c in sequences), len(sequences))
        for number, sequences in enumerate(examples)
    ]
