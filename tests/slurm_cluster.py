"""A real Slurm of two nodes on this machine (`nodes.py`).

It needs root and Debian's packages `slurm-wlm`, `munge` and `iproute2`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nodes import NODES, at, connect, inside, node, one_cluster, search_path, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare", "nsenter")

# CPUs are claimed, not looked for: what a node has is this machine's whole.
CONF = """
ClusterName=trial
SlurmctldHost=n1
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=n[1-2] CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """What a user on the first node can do."""

    def __init__(self, folder: Path, first: int) -> None:
        self._folder = folder
        self._first = first

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """What a command prints on the first node, with `more` variables in its environment."""
        done = subprocess.run(
            [*at(self._first, cwd or self._folder), *command],
            env={**os.environ, **more, **variables(self._folder)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, job: int) -> dict[str, str]:
        """A job as `scontrol` shows it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(job))))

    def wait(self, job: int, seconds: float) -> dict[str, str]:
        """A job once it is over."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: self.show(job)["JobState"] in over, seconds, f"job {job} is over")
        return self.show(job)

    def idle(self) -> bool:
        """Whether both nodes wait for work."""
        try:
            return self.run("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"]
        except AssertionError:
            # The controller does not listen yet.
            return False

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self._folder.glob("*.log"))
        return "\n".join(f"{file.name}\n{file.read_text()[-3000:]}" for file in files)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """The cluster, with its files in `folder`, until the block ends."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    assert not missing, f"no {missing}: apt-get install slurm-wlm munge iproute2"
    (folder / "slurm.conf").write_text(CONF.format(folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    with ExitStack() as stack:
        stack.enter_context(one_cluster())
        first, second = (stack.enter_context(node(name, folder)) for name in NODES)
        connect(first, second)
        munge = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        # --force: the folder's parents may be anyone's to write.
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge]
        stack.enter_context(daemon(munged, folder, "munged"))
        until((folder / "munge.socket").exists, 30, "munged listens")
        stack.enter_context(daemon([*inside(first), "slurmctld", "-D"], folder, "slurmctld"))
        for name, process in zip(NODES, (first, second), strict=True):
            slurmd = [*inside(process), "slurmd", "-D", "-N", name]
            stack.enter_context(daemon(slurmd, folder, f"slurmd-{name}"))
        made = Cluster(folder, first)
        try:
            until(made.idle, 120, "both nodes are idle")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{made.logs()}") from None
        yield made


@contextmanager
def daemon(command: list[str], folder: Path, name: str) -> Iterator[None]:
    """A process that runs as long as the block, and writes its log into the folder."""
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables(folder)},
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=20)


def variables(folder: Path) -> dict[str, str]:
    """Where clients and daemons find the cluster."""
    return {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
