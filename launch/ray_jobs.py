"""A run as a job of a Ray cluster: handed to its job server, and what holds inside the job."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import InputError
from rlhf.files import FolderLock

if TYPE_CHECKING:
    from rlhf.config import RunConfig

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""What Ray's own client reads, the first before the second, and both before its argument."""
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a job server sets for the jobs that it starts, and nobody else."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
RAYS_STOP_WAIT = 3


def entrypoint(config: RunConfig, paths: Sequence[Path], settings: Sequence[str]) -> list[str]:
    """The command of a job that trains, in a copy of the working directory.

    Raises InputError where the run or a config would not be there.
    """
    if config.placement.kind != "ray":
        raise InputError(
            f"placement.kind must be ray for a Ray job, found {config.placement.kind}: else the "
            "run would stay in the one process of the job; set placement.kind: ray"
        )
    _check_directory(config)
    for path in paths:
        if not path.is_absolute() and not path.resolve().is_relative_to(Path.cwd()):
            raise InputError(
                f"{path} must lie in the working directory, since that is what a Ray job has a "
                "copy of; submit from its folder, or give its absolute path where all nodes see it"
            )
        if not path.is_absolute() and any(
            path.resolve().is_relative_to(Path.cwd() / left.strip("/"))
            for left in environment(config).get("excludes", ())
        ):
            raise InputError(
                f"{path} lies in run.directory, which stays here when the working directory is "
                "uploaded; give its absolute path where all nodes see it, or another run.directory"
            )
    return ["pairloop", "train", *map(str, paths), *settings]


def environment(config: RunConfig) -> dict[str, Any]:
    """What the job's processes work in: the working directory, less the runs that grow in it."""
    found: dict[str, Any] = {"working_dir": "."}
    here, runs = Path.cwd(), Path(config.run.directory)
    if runs == here:
        runs /= config.run.name
    if runs.is_relative_to(here):
        found["excludes"] = [f"/{runs.relative_to(here)}/"]
    return found


def command(address: str | None, runtime: dict[str, Any], words: Sequence[str]) -> str:
    """The line that submits a job with Ray's own command."""
    more = {key: value for key, value in runtime.items() if key != "working_dir"}
    options = [] if address is None else ["--address", address]
    options += ["--working-dir", runtime["working_dir"]]
    if more:
        options += ["--runtime-env-json", json.dumps(more)]
    return f"ray job submit {shlex.join([*options, '--', *words])}\n"


def submit(
    config: RunConfig, address: str | None, runtime: dict[str, Any], words: Sequence[str]
) -> str:
    """Hand a job to the cluster's job server; what to tell the user.

    Raises InputError where there is no Ray here or no cluster there, where it wants another token
    or refuses the job, or where a process works on the run.
    """
    where = _address(address)
    run = Path(config.run.directory) / config.run.name
    if run.is_dir():
        FolderLock(run).release()
    try:
        from ray.exceptions import AuthenticationError, RayError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise InputError(
            f"pairloop submit ray needs Ray: {error}; pip install 'pairloop[ray]'"
        ) from None
    try:
        client = JobSubmissionClient(where)
        name = client.submit_job(entrypoint=shlex.join(words), runtime_env=runtime)
    except AuthenticationError as error:
        raise InputError(
            f"the Ray cluster at {where} takes no job without its token: set RAY_AUTH_MODE=token, "
            f"and RAY_AUTH_TOKEN_PATH to the token's file ({str(error).splitlines()[0]})"
        ) from None
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise InputError(f"no job was submitted to {where}: {error}") from error
    at = f"--address {client.get_address()} {name}"
    return (
        f"job {name}: {client.get_address()}\n"
        f"status: ray job status {at}\n"
        f"log: ray job logs --follow {at}\n"
        f"stop; submitted again, it goes on: ray job stop {at}\n"
    )


def _address(given: str | None) -> str:
    for name in ADDRESSES:
        if found := os.environ.get(name):
            if given not in (None, found):
                raise InputError(
                    f"--address is {given}, but {name} is {found}, and Ray's client would go "
                    "there; unset one of them"
                )
            return found
    if given is None:
        raise InputError(
            f"a Ray job needs a cluster: --address http://HEAD:8265, or {ADDRESSES[0]}, must say "
            "where it is"
        )
    return given


def check_inside(config: RunConfig) -> None:
    """In a job, refuse a run whose files would not outlive it, and say if a stop would kill it."""
    if JOB not in os.environ:
        return
    _check_directory(config)
    if (seconds := int(os.environ.get(STOP_WAIT, RAYS_STOP_WAIT))) <= RAYS_STOP_WAIT:
        print(
            f"`ray job stop` will kill this run after {seconds} s, what is under way is lost then: "
            f"start the head node with {STOP_WAIT}=600",
            file=sys.stderr,
        )


def _check_directory(config: RunConfig) -> None:
    if not Path(config.run.directory).is_absolute():
        raise InputError(
            f"run.directory must be an absolute path in a Ray job, found {config.run.directory}: "
            "the job works in a copy of the folder that it was submitted from; name a folder that "
            "all nodes see"
        )
