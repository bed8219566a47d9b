"""`pairloop submit`: hand a run to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from launch.slurm import Job

app = App(name="submit", help="Hand a run to a cluster.", help_format="plaintext")

ONE_RANK = Job()


@app.command
def slurm(
    config: Path,
    /,
    *more: Path,
    job: Job = ONE_RANK,
    sweep: Annotated[bool, Parameter(negative="")] = False,
    held_out: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    overrides: Annotated[tuple[tuple[str, str], ...], Parameter(parse=False)] = (),
) -> int:
    """Check a config, and submit its run as a Slurm job: one task a rank, over one or more nodes.

    With placement.kind ray the job is a Ray cluster over its nodes. Before its time is up the job
    stops the run at a safe point, queues again and goes on. The script is written beside the run's
    folder, anew at each submission; for one of your own, send --dry-run to a file, edit it, and
    give that to sbatch.

    Parameters
    ----------
    config
        YAML file.
    more
        Further YAML files; later ones win, key by key.
    sweep
        What `pairloop sweep` would train, given the same: an array of jobs, one a point, and one
        more for the table.
    held_out
        With --sweep: see `pairloop sweep`.
    dry_run
        Print the script, and stop.
    """
    from launch import slurm as jobs
    from rlhf.errors import InputError

    paths = (config, *more)
    arguments = [*map(str, paths), *(f"--{key}={value}" for key, value in overrides)]
    if not sweep:
        from launch.local import rehearse
        from rlhf import config_io

        if held_out is not None:
            raise InputError(f"--held-out {held_out} is about a sweep: add --sweep")
        loaded = config_io.load(paths, overrides)
        text = jobs.script(loaded, arguments, job)
        rehearse(loaded)
        print(text if dry_run else jobs.submit(loaded, text), end="")
        return 0
    from launch.sweep import rehearse as rehearse_points
    from rlhf.sweep import grid

    folder, points = grid(paths, overrides)
    if held_out is not None:
        arguments += ["--held-out", str(held_out)]
    text = jobs.sweep_script(folder, points, arguments, job)
    rehearse_points(folder, points, held_out)
    print(text if dry_run else jobs.submit_sweep(folder, points, text), end="")
    return 0


@app.command
def ray(
    config: Path,
    /,
    *more: Path,
    address: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    overrides: Annotated[tuple[tuple[str, str], ...], Parameter(parse=False)] = (),
) -> int:
    """Check a config, and submit its run as a job of a Ray cluster.

    The job has a copy of the working directory, without the run's own; pairloop is what the cluster
    has installed. run.directory must be an absolute path that all nodes see. A job that was stopped
    goes on when it is submitted again.

    Parameters
    ----------
    config
        YAML file.
    more
        Further YAML files; later ones win, key by key.
    address
        The cluster's job server, as http://HEAD:8265; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS.
    dry_run
        Print the command of Ray's own that does the same, and stop.
    """
    from launch import ray_jobs
    from launch.local import rehearse
    from rlhf import config_io

    paths = (config, *more)
    loaded = config_io.load(paths, overrides)
    settings = [f"--{key}={value}" for key, value in overrides]
    words = ray_jobs.entrypoint(loaded, paths, settings)
    rehearse(loaded)
    runtime = ray_jobs.environment(loaded)
    if dry_run:
        print(ray_jobs.command(address, runtime, words), end="")
    else:
        print(ray_jobs.submit(loaded, address, runtime, words), end="")
    return 0
