"""A run as a Slurm job: `slurm/spmd.sbatch` with the run's own values filled in."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

from rlhf.errors import InputError
from rlhf.files import FolderLock, atomic_write, make_folder

if TYPE_CHECKING:
    from rlhf.config import RunConfig

_TIME = re.compile(r"\d+(:\d\d?){0,2}|\d+-\d+(:\d\d?){0,2}")
_LONGEST_NOTICE = 65535


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of Slurm. The rest (memory, QOS, constraints) sbatch takes from SBATCH_
    variables of the environment, or from a script that was edited."""

    nodes: int = 1
    """Nodes."""
    ranks_per_node: int = 1
    """Ranks on each node, with a GPU each unless placement.device is cpu."""
    cpus_per_rank: int = 4
    """CPU cores of each rank."""
    time: str = "24:00:00"
    """How long it may run at a time, as Slurm writes it: 90 (minutes), 12:00:00, 2-12."""
    notice: int = 120
    """Seconds before that when it is asked to stop and queue again: longer than a step or shard."""
    partition: str | None = None
    """Partition; default the cluster's, or SBATCH_PARTITION."""
    account: str | None = None
    """Account; default your own, or SBATCH_ACCOUNT."""


def script(config: RunConfig, arguments: Sequence[str], job: Job) -> str:
    """The sbatch script of a run; `arguments` are those of `pairloop train`.

    Raises InputError where Slurm would not take the job, or its ranks not the config.
    """
    _check(config, job)
    run = Path(config.run.directory) / config.run.name
    directives = {
        "job-name": config.run.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.ranks_per_node),
        "cpus-per-task": str(job.cpus_per_rank),
        "time": job.time,
        "signal": f"B:USR1@{job.notice}",
        "output": f"{run}-%j.out",
    }
    if config.placement.device != "cpu":
        directives["gpus-per-node"] = str(job.ranks_per_node)
    for name, value in (("partition", job.partition), ("account", job.account)):
        if value is not None:
            directives[name] = value
    variables = {
        "arguments": f"({shlex.join(arguments)})",
        "run": shlex.quote(str(run)),
        "python": shlex.quote(sys.executable),
    }
    return fill_in(template().read_text(encoding="utf-8"), directives, variables)


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
    """Hand a script to sbatch; what to tell the user.

    It is written beside the run's folder first. Raises InputError where there is no sbatch or it
    refuses, or where a process works on the run.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch must be on PATH to submit a job: run this where the cluster's jobs are "
            "submitted, or take the script along: pairloop submit slurm CONFIG --dry-run > "
            "job.sbatch"
        )
    run = Path(config.run.directory) / config.run.name
    if run.is_dir():
        FolderLock(run).release()
    path = run.with_name(f"{run.name}.sbatch")
    try:
        make_folder(path.parent)
        atomic_write(path, text.encode())
    except OSError as error:
        raise InputError(
            f"run.directory must be a folder that can be written: {path}: {error.strerror}; set "
            "run.directory to another place, or change its permissions"
        ) from error
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise InputError(f"sbatch refused {path}: {said}")
    number = done.stdout.strip().split(";")[0]
    return (
        f"job {number}: {path}\n"
        f"log: {run}-{number}.out\n"
        f"stop, and queue again: scancel --signal=USR1 --batch {number}\n"
        f"stop for good: scancel {number}\n"
    )


def template() -> Path:
    """The script: in the wheel `launch/sbatch/`, in a checkout `slurm/`."""
    here = Path(__file__).resolve().parent
    packed, checkout = here / "sbatch/spmd.sbatch", here.parent / "slurm/spmd.sbatch"
    return packed if packed.is_file() else checkout


def _check(config: RunConfig, job: Job) -> None:
    for name in ("nodes", "ranks_per_node", "cpus_per_rank"):
        if getattr(job, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least 1, found {getattr(job, name)}")
    if not 1 <= job.notice <= _LONGEST_NOTICE:
        raise InputError(
            f"--notice must be 1 to {_LONGEST_NOTICE} seconds, as Slurm takes, found {job.notice}"
        )
    if _TIME.fullmatch(job.time) is None:
        raise InputError(
            f"--time must be minutes, hours:minutes:seconds or days-hours, found {job.time!r}; "
            "write 90, 12:00:00 or 2-12"
        )
    kind, ranks = config.placement.kind, job.nodes * job.ranks_per_node
    if kind == "ray":
        raise InputError(
            "placement.kind is ray, which this job does not start; use auto or spmd to run on the "
            "ranks of a Slurm job"
        )
    if kind == "local" and ranks > 1:
        raise InputError(
            f"placement.kind is local, one process, but {job.nodes} x {job.ranks_per_node} ranks "
            "are asked for; use auto or spmd, or one node with one rank"
        )
