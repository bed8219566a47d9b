"""Machines of their own on this one: each has a network, processes and a host name to itself, and a
`/tmp/ray`, by which Ray would find the clusters of others.

It needs root and Debian's package `iproute2`; it leaves nothing running, since a node lives no
longer than the pipe to its first process.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = {"n1": "10.99.0.1", "n2": "10.99.0.2"}
"""By name, their addresses on the cable between them."""
POLL = 0.1


@contextmanager
def one_cluster() -> Iterator[None]:
    """No other test of this machine has a cluster within the block. Ray gives a node 30 seconds to
    start, and two clusters that start on two cores have taken longer."""
    lock = Path(tempfile.gettempdir()) / "pairloop-tests-cluster.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def node(name: str, folder: Path) -> Iterator[int]:
    """The first process of a node, whose network is a loopback; all in it ends with the block."""
    assert os.geteuid() == 0, "nodes of their own take root"
    hosts = "".join(f"{address} {host}\n" for host, address in NODES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    Path("/tmp/ray").mkdir(exist_ok=True)
    script = (
        f"mount --bind {folder}/hosts /etc/hosts && mount -t tmpfs ray /tmp/ray && hostname {name} "
        "&& ip link set lo up && echo $$ && cat && true"
    )
    new = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
    with subprocess.Popen(
        [*new, "--mount-proc", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": search_path()},
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            assert process.stdout.readline() == "1\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            yield int(children.read_text())
        finally:
            process.stdin.close()
            process.wait(timeout=30)


def connect(first: int, second: int) -> None:
    """A cable between two nodes."""
    make = ["ip", "link", "add", "wire1", "type", "veth", "peer", "name", "wire2"]
    commands = [(first, [*make, "netns", str(second)])]
    ends = zip((first, second), ("wire1", "wire2"), NODES.values(), strict=True)
    for process, wire, address in ends:
        commands.append((process, ["ip", "addr", "add", f"{address}/24", "dev", wire]))
        commands.append((process, ["ip", "link", "set", wire, "up"]))
    for process, command in commands:
        # In the network alone: the other node's first process has no number inside this one.
        entered = ["nsenter", f"--target={process}", "--net", *command]
        subprocess.run(entered, check=True, env={**os.environ, "PATH": search_path()})


def inside(process: int) -> list[str]:
    """The words before a command that runs it on the node of that first process."""
    return ["nsenter", f"--target={process}", "--net", "--uts", "--mount", "--pid"]


def at(process: int, folder: Path) -> list[str]:
    """As `inside`, in a folder: entering leads to the node's root."""
    return [*inside(process), "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; AssertionError where it does not hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(POLL)


def search_path() -> str:
    """The path, with what is root's alone."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
