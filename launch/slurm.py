"""A run or a sweep as Slurm jobs: one of `slurm/*.sbatch` with its own values filled in."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from rlhf.errors import InputError
from rlhf.files import FolderLock, atomic_write, make_folder

if TYPE_CHECKING:
    from rlhf.config import RunConfig
    from rlhf.config_offline import Trains
    from rlhf.sweep import Point

Template = Literal["accelerate", "online_dpo", "sweep"]

_TIME = re.compile(r"\d+(:\d\d?){0,2}|\d+-\d+(:\d\d?){0,2}")
_LONGEST_NOTICE = 65535
_LATEST_NOTICE = 180
"""The longest notice of a template."""
_LEAST_WORK = 120
"""Seconds before it that a job must have: Slurm sends it up to a minute early."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of Slurm. The rest (memory, QOS, constraints) sbatch takes from SBATCH_
    variables of the environment, or from a script that was edited."""

    nodes: int = 1
    """Nodes."""
    ranks_per_node: int = 1
    """Ranks on each node, with a GPU each unless placement.device is cpu; under placement.kind ray
    the places that Ray has there."""
    cpus_per_rank: int = 4
    """CPU cores of each rank."""
    time: str = "24:00:00"
    """How long it may run at a time, as Slurm writes it: 90 (minutes), 12:00:00, 2-12."""
    notice: int | None = None
    """Seconds before that when it is asked to stop and queue again: longer than a step or shard
    takes, judging included. Default: 120, and 180 under placement.kind ray."""
    partition: str | None = None
    """Partition; default the cluster's, or SBATCH_PARTITION."""
    account: str | None = None
    """Account; default your own, or SBATCH_ACCOUNT."""


def script(config: RunConfig, arguments: Sequence[str], job: Job) -> str:
    """The sbatch script of a run; `arguments` are those of `pairloop train`.

    Raises InputError where Slurm would not take the job, or its ranks not the config.
    """
    _check(job)
    _check_kind(config, job)
    run = Path(config.run.directory) / config.run.name
    directives = {**_directives(config, job, run), "nodes": str(job.nodes)}
    variables = {"arguments": f"({shlex.join(arguments)})", "run": shlex.quote(str(run))}
    if config.placement.kind == "ray":
        # One task a node, which Ray parts.
        directives["cpus-per-task"] = str(job.ranks_per_node * job.cpus_per_rank)
        variables["programs"] = shlex.quote(str(Path(sys.executable).parent))
        return fill_in(_text("online_dpo"), directives, variables)
    directives["ntasks-per-node"] = str(job.ranks_per_node)
    variables["python"] = shlex.quote(sys.executable)
    return fill_in(_text("accelerate"), directives, variables)


def sweep_script(folder: Path, points: Sequence[Point], arguments: Sequence[str], job: Job) -> str:
    """The script of a sweep's points and of its table; `arguments` are those of `pairloop sweep`.

    Raises InputError where Slurm would not take the job, or a point needs more than one process.
    """
    _check(job)
    if (job.nodes, job.ranks_per_node) != (1, 1):
        raise InputError(
            f"each point of a sweep is one process, but {job.nodes} x {job.ranks_per_node} ranks "
            "are asked for; leave out --nodes and --ranks-per-node"
        )
    variables = {
        "arguments": f"({shlex.join(arguments)})",
        "python": shlex.quote(sys.executable),
    }
    return fill_in(_text("sweep"), _directives(points[0].config, job, folder), variables)


def _directives(config: Trains, job: Job, run: Path) -> dict[str, str]:
    """What all scripts ask of Slurm."""
    directives = {
        "job-name": run.name,
        "cpus-per-task": str(job.cpus_per_rank),
        "time": job.time,
        "output": f"{run}-%j.out",
    }
    if job.notice is not None:
        directives["signal"] = f"B:USR1@{job.notice}"
    if config.placement.device != "cpu":
        directives["gpus-per-node"] = str(job.ranks_per_node)
    for name, value in (("partition", job.partition), ("account", job.account)):
        if value is not None:
            directives[name] = value
    return directives


def fill_in(text: str, directives: Mapping[str, str], variables: Mapping[str, str]) -> str:
    """A script with other values in its `#SBATCH --name=` lines and its `name=` lines.

    A directive that is commented out (`##SBATCH`) takes effect.
    """
    lines = text.splitlines(keepends=True)
    filled = {f"#SBATCH --{name}=": shlex.quote(value) for name, value in directives.items()}
    filled |= {f"{name}=": value for name, value in variables.items()}
    for start, value in filled.items():
        (number,) = (i for i, line in enumerate(lines) if line.startswith((start, f"#{start}")))
        lines[number] = f"{start}{value}\n"
    return "".join(lines)


def submit(config: RunConfig, text: str) -> str:
    """Hand a run's script to sbatch; what to tell the user.

    It is written beside the run's folder first. Raises InputError where there is no sbatch or it
    refuses, or where a process works on the run.
    """
    _check_sbatch()
    run = Path(config.run.directory) / config.run.name
    if run.is_dir():
        FolderLock(run).release()
    path = _write(run, text)
    number = _sbatch(path)
    return (
        f"job {number}: {path}\n"
        f"log: {run}-{number}.out\n"
        f"stop, and queue again: scancel --signal=USR1 --batch {number}\n"
        f"stop for good: scancel {number}\n"
    )


def submit_sweep(folder: Path, points: Sequence[Point], text: str) -> str:
    """Hand a sweep's script to sbatch, once for its points and once for its table; what to tell.

    Raises InputError where there is no sbatch or it refuses.
    """
    _check_sbatch()
    path = _write(folder, text)
    number = _sbatch(path, f"--array=1-{len(points)}", f"--output={folder}-%A_%a.out")
    try:
        table = _sbatch(path, f"--dependency=afterany:{number}")
    except InputError as error:
        raise InputError(
            f"{error}\nThat was for the table; job {number} with the points is queued: let it end, "
            f"then `pairloop sweep` again writes the table, or scancel {number}"
        ) from None
    return (
        f"job {number}, {len(points)} points: {path}\n"
        f"logs: {folder}-{number}_POINT.out\n"
        f"job {table}, the table once they have ended: {folder / 'sweep.html'}\n"
        f"stop for good: scancel {number} {table}\n"
    )


def _check_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch must be on PATH to submit a job: run this where the cluster's jobs are "
            "submitted, or take the script along: pairloop submit slurm CONFIG --dry-run > "
            "job.sbatch"
        )


def _write(run: Path, text: str) -> Path:
    """The script beside a run's folder."""
    path = run.with_name(f"{run.name}.sbatch")
    try:
        make_folder(path.parent)
        atomic_write(path, text.encode())
    except OSError as error:
        raise InputError(
            f"run.directory must be a folder that can be written: {path}: {error.strerror}; set "
            "run.directory to another place, or change its permissions"
        ) from error
    return path


def _sbatch(path: Path, *flags: str) -> str:
    """The number of the job that a script becomes."""
    done = subprocess.run(
        ["sbatch", "--parsable", *flags, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise InputError(f"sbatch refused {path}: {said}")
    return done.stdout.strip().split(";")[0]


def template(name: Template) -> Path:
    """A script: in the wheel `launch/sbatch/`, in a checkout `slurm/`."""
    here = Path(__file__).resolve().parent
    packed, checkout = here / f"sbatch/{name}.sbatch", here.parent / f"slurm/{name}.sbatch"
    return packed if packed.is_file() else checkout


def _text(name: Template) -> str:
    return template(name).read_text(encoding="utf-8")


def _check(job: Job) -> None:
    for name in ("nodes", "ranks_per_node", "cpus_per_rank"):
        if getattr(job, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least 1, found {getattr(job, name)}")
    if job.notice is not None and not 1 <= job.notice <= _LONGEST_NOTICE:
        raise InputError(
            f"--notice must be 1 to {_LONGEST_NOTICE} seconds, as Slurm takes, found {job.notice}"
        )
    if _TIME.fullmatch(job.time) is None:
        raise InputError(
            f"--time must be minutes, hours:minutes:seconds or days-hours, found {job.time!r}; "
            "write 90, 12:00:00 or 2-12"
        )
    notice = _LATEST_NOTICE if job.notice is None else job.notice
    if (seconds := _seconds(job.time)) < notice + _LEAST_WORK:
        raise InputError(
            f"--time {job.time} is {seconds} seconds, of which the last {notice} are --notice: it "
            "would stop before it has begun, and queue again for ever; ask for more time, or set "
            "--notice lower"
        )


def _seconds(time: str) -> int:
    """As Slurm reads it: minutes, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_kind(config: RunConfig, job: Job) -> None:
    if config.placement.kind == "local" and job.nodes * job.ranks_per_node > 1:
        raise InputError(
            f"placement.kind is local, one process, but {job.nodes} x {job.ranks_per_node} ranks "
            "are asked for; use auto or spmd, or one node with one rank"
        )
