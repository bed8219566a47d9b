"""Estimates as text: parts under the phases that they are there in, sums, and verdicts."""

from __future__ import annotations

from collections.abc import Iterator

from launch.machines import GIB
from launch.memory import Estimate
from launch.memory_parts import Phase
from launch.remedies import SPARE


def table(found: Estimate) -> Iterator[str]:
    """Rows of both memories."""
    for host in (False, True) if found.on_gpu else (True,):
        yield from rows(found, host)


def rows(found: Estimate, host: bool) -> Iterator[str]:
    """What each part of a memory needs under the phases that it is there in, and sums."""
    width = max(22, *(len(p.what) for p in found.parts))
    shown: list[Phase] = [p for p in found.phases if p != "load" or _loads(found, host)]
    place = "host" if host else "GPU"
    yield f"{place:<10} {'':<{width}}" + "".join(f"{p:>11}" for p in shown) + "  formula"
    for part in found.parts:
        if part.host == host:
            size = f"{part.size / GIB:.2f}"
            cells = "".join(f"{size if p in part.phases else '':>11}" for p in shown)
            yield f"{part.role:<10} {part.what:<{width}}{cells}  {part.formula}"
    sums = "".join(f"{found.at(p, host) / GIB:>11.2f}" for p in shown)
    yield f"{'sum':<10} {'':<{width}}{sums}"


def _loads(found: Estimate, host: bool) -> bool:
    """Whether loading needs more than what stays."""
    return any(p.phases == ("load",) and p.host == host for p in found.parts)


def verdicts(found: Estimate) -> Iterator[str]:
    """Whether each memory is enough at its peak, and each engine's cache."""
    if found.on_gpu:
        yield verdict(found, host=False)
    yield verdict(found, host=True)
    _, peak = found.peak(host=True)
    free = found.machine.free
    if free is not None and free < peak <= found.machine.host:
        yield f"{'':<10} only {free / GIB:.1f} GiB are free now: other programs hold the rest"
    yield from starved(found)


def verdict(found: Estimate, host: bool) -> str:
    """Whether a memory is enough at its peak."""
    place, size = ("host", found.machine.host) if host else ("GPU", found.machine.gpu)
    phase, peak = found.peak(host)
    spare = size - peak
    said = f"{peak / GIB:.1f} of {size / GIB:.1f} GiB at most, in {phase}"
    if spare < 0:
        return f"{place:<10} DOES NOT FIT: {said}, {-spare / GIB:.1f} too many"
    barely = ", but barely" if spare < SPARE * size else ""
    return f"{place:<10} fits{barely}: {said}"


def starved(found: Estimate) -> Iterator[str]:
    """Engines that can't hold one sequence of the longest."""
    for engine, lack in found.short.items():
        if lack > 0:
            yield (
                f"{engine:<10} DOES NOT FIT: its cache lacks {lack / GIB:.2f} GiB to hold one "
                "sequence of the longest"
            )
