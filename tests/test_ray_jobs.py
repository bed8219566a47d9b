"""The golden run as a job of a Ray cluster that asks for a token, on a node of its own."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from golden_run import assert_same_run, environment, observed, replay, write_config
from nodes import NODES, at, inside, node, one_cluster, search_path, until
from ray_nodes import slowed

# Another file's cluster may have to end first.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

HEAD = NODES["n1"]
SERVER = f"http://{HEAD}:8265"
DEADLINE = 600.0
TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")

# What `ray job stop` asks for, at once: its own start takes longer than the training.
STOP = """
import os, sys, time, urllib.request
path, url = sys.argv[1:]
headers = {"Authorization": "Bearer " + open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()}
while not os.path.exists(path):
    time.sleep(0.01)
print(urllib.request.urlopen(urllib.request.Request(url, method="POST", headers=headers)).status)
"""
# What `ray job status` says, whose own start takes long.
STATUS = """
import json, os, sys, urllib.request
headers = {"Authorization": "Bearer " + open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()}
with urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers)) as answer:
    print(json.load(answer)["status"])
"""
VERSION = """
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1])
except urllib.error.HTTPError as error:
    print(error.code)
"""


@dataclass(frozen=True)
class Head:
    """A node, the token that its cluster asks for, and where the wheel is installed."""

    process: int
    token: Path
    installed: Path


class User:
    """Whoever is logged in on the head node, and knows its token or does not."""

    def __init__(self, head: Head, folder: Path, token: Path | None) -> None:
        self._at = at(head.process, folder)
        own = {name: value for name, value in environment().items() if name not in TOKENS}
        # The wheel alone, and what the config names.
        own["PYTHONPATH"] = os.pathsep.join([str(head.installed), str(Path(__file__).parent)])
        self._variables = {**own, "PATH": f"{Path(sys.executable).parent}:{search_path()}"}
        if token is not None:
            self._variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def tries(self, *command: str) -> tuple[int, str]:
        """Exit status and words of a command."""
        done = subprocess.run(
            [*self._at, *command],
            env=self._variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        return done.returncode, done.stdout

    def runs(self, *command: str) -> str:
        """The words of a command that succeeds."""
        status, output = self.tries(*command)
        assert status == 0, output
        return output

    def submits(self, config: str) -> str:
        """The job that `pairloop submit ray` makes."""
        told = self.runs("pairloop", "submit", "ray", config, "--address", SERVER)
        found = re.search(rf"^job (\w+): {SERVER}$", told, re.M)
        assert found, told
        return found[1]

    def job(self, command: str, job: str) -> str:
        """What `ray job COMMAND JOB` says."""
        return self.runs("ray", "job", command, "--address", SERVER, job)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Iterator[Head]:
    """A head node whose network is a loopback."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    with one_cluster(), node("n1", folder) as process:
        path = {**os.environ, "PATH": search_path()}
        give = ["ip", "addr", "add", f"{HEAD}/24", "dev", "lo"]
        subprocess.run([*inside(process), *give], check=True, env=path)
        size = ["--num-cpus=2", f"--object-store-memory={100 * 2**20}"]
        place = [f"--node-ip-address={HEAD}", "--port=6379", f"--dashboard-host={HEAD}"]
        start = ["ray", "start", "--head", "--disable-usage-stats", *place, *size]
        found = Head(process, token, installed)
        User(found, folder, token).runs("env", "RAY_JOB_STOP_WAIT_TIME_S=600", *start)
        yield found


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with the config alone; data, run and model lie where all nodes see them."""
    config = write_config(tmp_path, tiny_model, "tiny", placement={"kind": "ray"})
    replay(config, "tiny")
    (tmp_path / "desk").mkdir()
    shutil.move(config, tmp_path / "desk")
    return tmp_path / "desk"


def test_a_job_is_stopped_in_training_and_a_second_one_ends_with_the_golden_pairs(
    head: Head, one_process: dict[str, Any], folder: Path
) -> None:
    user = User(head, folder, head.token)
    run = folder.parent / "runs/tiny"
    job = user.submits("tiny.yaml")
    first = run / "rounds/0001/trainer/checkpoints/000001"
    url = f"{SERVER}/api/jobs/{job}/stop"
    with slowed("LearnerActor", run / "rounds/0001/reference_logps.parquet"):
        assert user.runs(sys.executable, "-c", STOP, str(first), url) == "200\n"
        told = [sys.executable, "-c", STATUS, f"{SERVER}/api/jobs/{job}"]
        until(lambda: user.runs(*told) == "STOPPED\n", DEADLINE, "the job is stopped")
    assert "was stopped" in user.job("status", job)
    log = user.job("logs", job)
    assert "stopped at a safe point by SIGTERM" in log
    assert "will kill this run" not in log
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert list(first.parent.iterdir())
    assert not (run / "rounds/0001/policy").exists()

    plain = ["ray", "job", "submit", "--address", SERVER, "--working-dir", "."]
    log = user.runs(*plain, "--", "pairloop", "train", "tiny.yaml")
    assert "succeeded" in log
    assert_same_run(observed(run), one_process, within=1e-5)
    where = [sys.executable, "-P", "-c", "import launch; print(launch.__file__)"]
    assert f"{head.installed}/launch/" in user.runs(*plain, "--", *where)
    # Nothing came of the copies that the jobs worked in.
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


def test_without_the_token_nothing_is_submitted(head: Head, folder: Path) -> None:
    stranger = User(head, folder, None)
    url = f"{SERVER}/api/jobs/"
    assert stranger.runs(sys.executable, "-c", VERSION, url) == "401\n"
    submit = ["pairloop", "submit", "ray", "tiny.yaml", "--address", SERVER]
    status, output = stranger.tries(*submit)
    assert status == 2
    assert f"the Ray cluster at {SERVER} takes no job without its token" in output
    other = folder / "other"
    other.write_text("0" * 64)
    status, output = User(head, folder, other).tries(*submit)
    assert status == 2
    assert "takes no job without its token" in output


def test_a_job_does_not_lose_its_run_in_the_copy_that_it_works_in(head: Head, folder: Path) -> None:
    user = User(head, folder, head.token)
    plain = ["ray", "job", "submit", "--address", SERVER, "--working-dir", "."]
    relative = ["pairloop", "train", "tiny.yaml", "--run.directory", "runs"]
    status, output = user.tries(*plain, "--", *relative)
    assert status == 1
    assert "run.directory must be an absolute path in a Ray job, found runs" in output
    assert "exit code 2" in output
