"""`pairloop sweep`: train every point of a grid, one after the other, and compare them."""

from __future__ import annotations

import csv
import io
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.held_out import answers, config_for
from launch.local import rehearse as rehearse_run
from launch.machines import this_machine
from launch.offline import rehearse as rehearse_point
from launch.offline import train
from launch.placement import device_of, settle
from launch.quiet import hush
from launch.terminal import Terminal
from rlhf.config import RunConfig
from rlhf.errors import DataGateError, InputError, Interrupted, PairloopError
from rlhf.files import atomic_write, read_json, write_json
from rlhf.interrupts import Interrupts
from rlhf.rounds import RunStore
from rlhf.sweep import Outcome, Point, answer_rows, outcome, rows


def sweep(
    folder: Path, points: Sequence[Point], held_out: Path | None = None, only: int | None = None
) -> int:
    """Train what isn't done, then write `sweep.json`, `sweep.csv` and `sweep.html` in `folder`.

    `held_out` is a run's config, whose gate prompts every point answers and whose judges score
    them. `only` that point, by its number from 1, is trained, and nothing written about them all.
    The exit status: 0, or that of the first point that failed. Raises InputError before
    anything is trained where a point would, Interrupted at a safe point after a signal; the same
    command goes on.
    """
    hush()
    terminal = Terminal(plain=True)
    machine = this_machine()
    points = [replace(point, config=settle(point.config, machine)) for point in points]
    for point in points:
        device_of(point.config, machine.gpus > 0, machine.capability)
    # Whatever can be refused is, before the first point is trained.
    judged = rehearse(folder, points, held_out)
    if only is not None:
        if not 1 <= only <= len(points):
            raise InputError(f"--point must be 1 to {len(points)}, as there are points, got {only}")
        _trained(points[only - 1], terminal)
        return 0
    outcomes, status = [], 0
    with Interrupts(terminal.announce) as interrupts:
        for number, point in enumerate(points, start=1):
            # Heard when the last one had no step left, or between two.
            interrupts.check()
            said = ", ".join(f"{key} {value}" for key, value in point.settings.items())
            terminal.say(f"point {number} of {len(points)}: {said}")
            try:
                outcomes.append(_trained(point, terminal))
            except Interrupted:
                raise
            except Exception as error:
                # Whatever a point dies of, memory among it, the others keep their results.
                if not isinstance(error, PairloopError):
                    traceback.print_exc()
                reason = str(error) or type(error).__name__
                terminal.say(f"point {number} failed: {reason}")
                outcomes.append(Outcome(point.name, point.settings, failure=reason))
                status = status or (error.exit_status if isinstance(error, PairloopError) else 1)
        if judged is not None:
            interrupts.check()
    gated: DataGateError | None = None
    if judged is not None:
        try:
            outcomes = _judged(judged, points, outcomes, terminal)
        except DataGateError as error:
            gated = error
        if gated or any(o.failure is None and o.answers is None for o in outcomes):
            status = status or DataGateError.exit_status
    _write(folder, outcomes, terminal)
    if gated:
        raise gated
    return status


def rehearse(folder: Path, points: Sequence[Point], held_out: Path | None) -> RunConfig | None:
    """Read files and judges as a sweep would, without a model; the run of its held-out answers.

    Raises InputError where a sweep would.
    """
    for point in points:
        rehearse_point(point.config)
    if held_out is None:
        return None
    judged = config_for(held_out, folder, points)
    rehearse_run(judged)
    return judged


def _judged(
    config: RunConfig, points: Sequence[Point], outcomes: Sequence[Outcome], terminal: Terminal
) -> list[Outcome]:
    done = [point for point, o in zip(points, outcomes, strict=True) if o.failure is None]
    if not done:
        return list(outcomes)
    policies = [(point, _folder(point) / "rounds/0001/policy") for point in done]
    found = iter(answers(config, policies, terminal))
    return [o if o.failure is not None else replace(o, answers=next(found)) for o in outcomes]


def _folder(point: Point) -> Path:
    return Path(point.config.run.directory) / point.name


def _trained(point: Point, terminal: Terminal) -> Outcome:
    path = _folder(point) / "stats.json"
    with RunStore.open(point.config) as store:
        done = (store.read_status() or {}).get("state") == "done" and path.is_file()
    if done:
        terminal.say(f"done before: {path}")
    else:
        train(point.config)
    return outcome(point, read_json(path, "delete the point's folder to train it again"))


def _write(folder: Path, outcomes: Sequence[Outcome], terminal: Terminal) -> None:
    from rlhf.report.sweep import write_sweep

    write_json(folder / "sweep.json", {"points": [found.record() for found in outcomes]})
    shown, heard = rows(outcomes), answer_rows(outcomes)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(shown[0]))
    writer.writeheader()
    writer.writerows(shown)
    atomic_write(folder / "sweep.csv", text.getvalue().encode())
    write_sweep(folder / "sweep.html", folder.name, outcomes)
    terminal.table("held-out preference and drift from the reference", shown)
    if heard:
        terminal.table("held-out answers: change from the start", heard)
    terminal.say(f"numbers: {folder / 'sweep.json'}, {folder / 'sweep.csv'}")
    terminal.say(f"plot: {folder / 'sweep.html'}")
