"""A cluster that a run starts for itself: on this machine's loopback, and nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from golden_run import environment
from nodes import one_cluster

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

JOIN = """
import sys
import ray

@ray.remote(num_cpus=0)
def answer():
    return "came in"

ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(answer.remote(), timeout=60))
"""
START = """
import json
import os
import subprocess
import sys

import psutil

from launch.ray_run import joined

def listening():
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"}
        except psutil.NoSuchProcess:
            pass
    return found

def own():
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    return [os.environ.get(name) for name in names]

before = own()
with joined():
    import ray

    heard = listening()
    address = ray.get_runtime_context().gcs_address
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    wrong = {**bare, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    told = {}
    for name, known in {"bare": bare, "wrong": wrong, "right": dict(os.environ)}.items():
        done = subprocess.run(
            [sys.executable, "-c", sys.argv[1], address],
            env=known, capture_output=True, text=True, timeout=300,
        )
        told[name] = done.returncode, done.stdout + done.stderr
    heard |= listening()
    print(json.dumps({"heard": sorted(heard), "told": told}))
assert own() == before, "what starts later is another's"
"""


def alone(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a script did that starts a cluster where nobody told it of another."""
    known = {n: v for n, v in {**os.environ, **environment()}.items() if not n.startswith("RAY_")}
    with one_cluster():
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**known, **variables},
            capture_output=True,
            text=True,
            timeout=1000,
            check=False,
        )


def test_it_listens_on_the_loopback_alone_and_asks_for_its_token() -> None:
    done = alone(START, JOIN, RAY_gcs_rpc_server_reconnect_timeout_s="10")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heard"] and set(found["heard"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    status, output = found["told"]["right"]
    assert status == 0 and "came in" in output
    for name in ("bare", "wrong"):
        status, output = found["told"][name]
        assert status != 0 and "came in" not in output, output


def test_where_it_would_listen_to_others_it_is_refused() -> None:
    start = "import ray\nfrom launch.ray_run import joined\nwith joined(): pass"
    # Without tokens, which Ray reads when it is imported, too.
    done = alone(start, RAY_AUTH_MODE="disabled")
    assert done.returncode == 1
    assert "since it was imported before this run" in done.stderr, done.stderr
