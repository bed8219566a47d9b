"""The `pairloop` command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import App, CycloptsError, Parameter

from launch import shadow
from launch.arguments import Override, fail, split_overrides, stopped, usage

if TYPE_CHECKING:
    from rlhf.config import RunConfig
    from rlhf.config_offline import OfflineConfig

HELP = """On-policy preference optimisation whose data you can audit.

Any setting can be given as a flag: --rollout.temperature 0.7. `pairloop config` lists them all."""

EXIT_CODES = """Exit codes:
  0   done; also when gates stopped it early with a promoted round
      (status.json then says stopped_early)
  1   unexpected error, a failed internal check, or a failed check of doctor
  2   bad input
  3   no round could be promoted, or a data gate failed
  75  interrupted; the same command goes on where it stopped
  130 stopped from the keyboard"""

C = TypeVar("C", "RunConfig", "OfflineConfig")
Overrides = Annotated[tuple[Override, ...], Parameter(parse=False)]
Flag = Parameter(negative="")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(shadow.DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown (a source tree that is not installed)"


app = App(
    name="pairloop",
    help=HELP,
    help_epilogue=EXIT_CODES,
    help_format="plaintext",
    version=_version,
)


@app.command
def train(
    config: Path,
    /,
    *more: Path,
    dry_run: Annotated[bool, Flag] = False,
    machine: str | None = None,
    cluster: str | None = None,
    plain: Annotated[bool, Flag] = False,
    overrides: Overrides = (),
) -> int:
    """Run, or go on with, what a config describes.

    Parameters
    ----------
    config
        YAML file.
    more
        Further YAML files; later ones win, key by key.
    dry_run
        Print the resolved config, what would run where and the memory it needs, and stop.
    machine
        With --dry-run: the machine to plan for, as 1xT4-16GB or 1xA100-80GB; default this one.
    cluster
        With --dry-run: the cluster to plan for, nodes x GPUs x card, as 4x8xH100-80GB. Exits with
        2 where the run doesn't fit, with the smallest change that helps.
    plain
        Plain lines, no progress bars: --tracking.plain true.
    """
    settings = _with_plain(plain, overrides)
    paths = [config, *more]
    return _start(paths, settings, dry_run=dry_run, machine=machine, cluster=cluster)


@app.command
def dpo(
    config: Path,
    /,
    *more: Path,
    dry_run: Annotated[bool, Flag] = False,
    machine: str | None = None,
    plain: Annotated[bool, Flag] = False,
    overrides: Overrides = (),
) -> int:
    """Train on a preference file, or go on with it: any objective, pairs or labels.

    Parameters
    ----------
    config
        YAML file with run, model, data, objective, learner.
    more
        Further YAML files; later ones win, key by key.
    dry_run
        Print the resolved config, what would run where, its steps and the memory, and stop.
    machine
        With --dry-run: the machine to plan for, as 1xT4-16GB or 1xA100-80GB; default this one.
    plain
        Plain lines, no progress bars: --tracking.plain true.
    """
    from rlhf import config_io
    from rlhf.config_offline import OfflineConfig

    _check_described(dry_run, machine=machine)
    settings = config_io.load_as(OfflineConfig, [config, *more], _with_plain(plain, overrides))
    if dry_run:
        from launch.dry_run import say_offline

        for text in say_offline(settings, machine):
            print(text)
        return 0
    from launch.offline import train as run

    return run(settings)


@app.command
def sweep(
    config: Path,
    /,
    *more: Path,
    held_out: Path | None = None,
    point: int | None = None,
    plain: Annotated[bool, Flag] = False,
    overrides: Overrides = (),
) -> int:
    """Train on a preference file once for each value of a setting, and compare.

    Several values are parted by commas: --objective.beta 0.05,0.1,0.2,0.5; of several such settings
    every combination is trained. The same command goes on where it stopped.

    Parameters
    ----------
    config
        YAML file as for dpo.
    more
        Further YAML files; later ones win, key by key.
    held_out
        Config of a run on the same model: every point answers its gate prompts, its judges score.
    point
        Train that one alone, counted from 1 in the order of the grid, and make no table.
    plain
        Plain lines, no progress bars: --tracking.plain true.
    """
    from rlhf.sweep import grid

    folder, points = grid([config, *more], _with_plain(plain, overrides))
    from launch.sweep import sweep as run

    return run(folder, points, held_out, point)


@app.command
def import_adapter(old: Path, new: Path, /) -> int:
    """Write an older adapter's adapter_model.bin as safetensors; nothing in the pickle is run.

    Parameters
    ----------
    old
        PEFT folder with adapter_config.json and adapter_model.bin.
    new
        Folder to make, for model.adapter.
    """
    from rlhf.adapters import import_adapter as write

    count = write(old, new)
    return _print(f"{count} tensors: {new}\n")


@app.command
def demo(
    *,
    transformers: Annotated[bool, Flag] = False,
    out: Path | None = None,
    dry_run: Annotated[bool, Flag] = False,
    plain: Annotated[bool, Flag] = False,
    overrides: Overrides = (),
) -> int:
    """Teach a small model to answer a support desk's questions, in minutes on two CPU cores.

    Parameters
    ----------
    transformers
        The smaller demo, which needs no vLLM.
    out
        Folder of the run; default runs/ and the preset's name.
    dry_run
        Print the resolved config and what would run where, and stop.
    plain
        Plain lines, no progress bars.
    """
    from launch.presets import path

    if out is not None:
        folder = out if out.name not in ("", "..") else out.resolve()
        place = (("run.directory", str(folder.parent)), ("run.name", folder.name))
        overrides = (*place, *overrides)
    preset = path("demo_transformers" if transformers else "demo")
    return _start([preset], _with_plain(plain, overrides), dry_run=dry_run)


@app.command
def report(run_folder: Path, /, *, out: Path | None = None) -> int:
    """Write a run's report.html: one page, at any time, whether or not the run goes on.

    Parameters
    ----------
    run_folder
        Folder of the run, such as runs/demo.
    out
        File to write; default report.html in the run's folder.
    """
    from rlhf.report import write_report

    return _print(f"{write_report(run_folder, out)}\n")


@app.command
def doctor(
    config: Path | None = None,
    *,
    json: Annotated[bool, Flag] = False,
    overrides: Overrides = (),
) -> int:
    """Say what this machine can do, one line each, with the command that mends what it can't.

    Exits with 1 where a line says fail; warnings don't count.

    Parameters
    ----------
    config
        YAML file of a run: what it needs must then be here too.
    json
        The lines as a JSON list of name, status, found, remedy and command.
    """
    from launch.doctor import as_json, examine, needs_of, show
    from launch.doctor.facts import Needs

    needs = Needs()
    if config is not None:
        from rlhf import config_io

        needs = needs_of(config_io.load([config], overrides))
    elif overrides:
        return fail(f"--{overrides[0][0]} is a setting of a run: name its config too", 2)
    findings = examine(needs)
    if json:
        print(as_json(findings))
    else:
        show(findings)
    return int(any(finding.status == "fail" for finding in findings))


@app.command
def init(preset: str, /) -> int:
    """Print a preset: a complete, commented config to save as run.yaml and make your own.

    Parameters
    ----------
    preset
        Its name; `pairloop presets` lists them.
    """
    from launch.presets import path

    return _print(path(preset).read_text(encoding="utf-8"))


@app.command(name="presets")
def list_presets() -> int:
    """List the configs that `pairloop init` prints, with the hardware and the time they need."""
    from launch.presets import listing

    return _print(listing())


app.command("launch.pairs:app", name="pairs", help="Look at preference files, clean and convert.")
app.command("launch.judge:app", name="judge", help="Say what judges are worth.")
app.command("launch.submit:app", name="submit", help="Hand a run to a cluster.")


@app.command(name="config")
def config_reference() -> int:
    """Print every setting with its type, default and the reason for it."""
    from rlhf.config_help import describe

    return _print(describe())


def _print(text: str) -> int:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep Python's own flush at exit from failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default); the exit status, as `--help` lists them.

    Unexpected exceptions pass through, with their traceback and Python's status 1.
    """
    try:
        shadow.check()
    except shadow.ShadowError as error:
        return fail(str(error), error.exit_status)
    from rlhf.errors import Interrupted, PairloopError

    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(given)
    except Interrupted as error:
        return stopped(str(error), given, error.exit_status)
    except PairloopError as error:
        return fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return stopped(
            "stopped at once; what was finished is kept. Run the same command to resume", given, 130
        )


def _dispatch(arguments: list[str]) -> int:
    rest, overrides = split_overrides(arguments)
    try:
        command, bound, unparsed = app.parse_args(rest, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return fail(usage(error), 2)
    if "overrides" in unparsed:
        bound.arguments["overrides"] = tuple(overrides)
    elif overrides:
        return fail(f"unknown flag --{overrides[0][0]}: this command takes no settings", 2)
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def _with_plain(plain: bool, overrides: Sequence[Override]) -> list[Override]:
    return [("tracking.plain", "true"), *overrides] if plain else list(overrides)


def _start(
    paths: Sequence[Path],
    overrides: Sequence[Override],
    *,
    dry_run: bool,
    machine: str | None = None,
    cluster: str | None = None,
) -> int:
    from rlhf import config_io

    _check_described(dry_run, machine=machine, cluster=cluster)
    config: RunConfig = config_io.load(paths, overrides)
    if dry_run:
        from launch.dry_run import say

        for text in say(config, machine, cluster):
            print(text)
        return 0
    from launch.placement import launched

    if config.placement.kind == "ray":
        from launch.ray_run import train as run_actors

        return run_actors(config)
    if launched(config):
        from launch.spmd import train as run_ranks

        return run_ranks(config)
    from launch.local import train as run

    return run(config)


def _check_described(dry_run: bool, **described: str | None) -> None:
    for name, given in described.items():
        if given is not None and not dry_run:
            from rlhf.errors import InputError

            raise InputError(f"--{name} {given} describes what to plan for: add --dry-run")
