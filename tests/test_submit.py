"""`pairloop submit slurm` and the script it fills in, with stand-ins for Slurm's own commands.

The real ones: tests/test_slurm.py.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
import yaml
from fakes import run_values

from launch import spmd
from launch.cli import main
from launch.slurm import Template, fill_in, template
from rlhf import load_config
from rlhf.errors import InputError
from rlhf.files import FolderLock

DEADLINE = 30.0

SRUN = """#!{python}
import json, os, pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS")
seen = {{"arguments": sys.argv[1:], **{{name: os.environ[name] for name in names}}}}
pathlib.Path("seen.json").write_text(json.dumps(seen))
pathlib.Path("started").touch()
if os.environ["WAITS"] == "yes":
    heard = signal.sigtimedwait([signal.SIGUSR1], {deadline})
    assert heard, "no stop was passed on"
if os.environ["STATE"]:
    pathlib.Path("runs/trial/status.json").write_text(
        json.dumps({{"state": os.environ["STATE"]}}, indent=2)
    )
sys.exit(int(os.environ["STATUS"]))
"""
SCONTROL = """#!/bin/sh
case $1 in show) printf 'n7\\nn8\\n';; *) echo "$@" >> requeued;; esac
"""
SBATCH = """#!/bin/sh
cp "$2" submitted && echo "$1" > flag && echo '12;trial'
"""


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: with run.yaml, whose model nobody loads."""
    values = run_values(tmp_path, "org/model", placement={"device": "cpu"})
    values["run"]["directory"] = "runs"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["submit", "slurm", "run.yaml", "--dry-run", *flags]) == 0
    return capsys.readouterr().out


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+?)(?:=(.*))?$", text, re.M))


def test_what_is_asked_for_stands_in_the_script(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--nodes", "2", "--ranks-per-node", "4", "--cpus-per-rank", "8"]
    limits = ["--time", "2-12", "--notice", "600", "--partition", "gpu", "--account", "lab 1"]
    text = printed(capsys, *size, *limits, "--learner.epochs", "3", "--placement.device", "auto")
    assert directives(text) == {
        "job-name": "trial",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "8",
        "time": "2-12",
        "partition": "gpu",
        "account": "'lab 1'",
        "requeue": "",
        "signal": "B:USR1@600",
        "output": "runs/trial-%j.out",
        "open-mode": "append",
        "export": "ALL",
    }
    told = re.search(r"^arguments=\((.*)\)$", text, re.M)
    assert told
    assert told[1] == "run.yaml --learner.epochs=3 --placement.device=auto"
    assert f"\nrun=runs/trial\npython={sys.executable}\n" in text
    assert not (folder / "runs").exists()


def test_what_is_not_asked_for_is_left_to_the_cluster(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = directives(printed(capsys))
    assert not {"gpus-per-node", "partition", "account"} & set(found)


@pytest.mark.parametrize("name", get_args(Template))
def test_a_script_as_it_lies_there_is_one_that_bash_reads_and_a_person_can_submit(
    name: Template,
) -> None:
    text = template(name).read_text()
    subprocess.run(["bash", "-n", str(template(name))], check=True)
    found = directives(text)
    assert found["signal"].startswith("B:USR1@")
    # Filled in with what it says, it is as before.
    assert fill_in(text, {"time": found["time"]}, {"container": "()"}) == text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--time", "1h"], "--time must be minutes, hours:minutes:seconds or days-hours, found"),
        (["--time", "4"], "--time 4 is 240 seconds, of which the last 180 are --notice"),
        (["--time", "0:20:30", "--notice", "1200"], "--time 0:20:30 is 1230 seconds"),
        (["--time", "1-0:5", "--notice", "65535", "--nodes", "0"], "--nodes must be at least 1"),
        (["--nodes", "0"], "--nodes must be at least 1, found 0"),
        (["--ranks-per-node", "-1"], "--ranks-per-node must be at least 1"),
        (["--notice", "0"], "--notice must be 1 to 65535 seconds"),
        (["--nodes", "2", "--placement.kind", "local"], "placement.kind is local, one process"),
        (["--prompts.train.path", "gone.jsonl"], "gone.jsonl"),
        (["--learner.epoch", "3"], "learner.epoch"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_written(
    flags: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(folder, "sbatch", SBATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        assert main(["submit", "slurm", "run.yaml", *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "submitted").exists()
    assert not (folder / "runs").exists()


def test_a_job_is_submitted_with_the_script_that_a_dry_run_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(folder, "sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    text = printed(capsys, "--nodes", "2")
    assert main(["submit", "slurm", "run.yaml", "--nodes", "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("job 12: runs/trial.sbatch\nlog: runs/trial-12.out\n")
    assert (folder / "runs/trial.sbatch").read_text() == text
    assert (folder / "submitted").read_text() == text
    assert (folder / "flag").read_text() == "--parsable\n"


def test_without_sbatch_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert main(["submit", "slurm", "run.yaml"]) == 2
    assert "sbatch must be on PATH" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_what_sbatch_says_against_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(folder, "sbatch", "#!/bin/sh\necho 'invalid partition specified: x' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    assert main(["submit", "slurm", "run.yaml"]) == 2
    assert "refused runs/trial.sbatch: invalid partition specified: x" in capsys.readouterr().err


def test_a_run_that_goes_on_elsewhere_is_not_submitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(folder, "sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    (folder / "runs/trial").mkdir(parents=True)
    lock = FolderLock(folder / "runs/trial")
    assert main(["submit", "slurm", "run.yaml"]) == 2
    lock.release()
    assert "is in use by" in capsys.readouterr().err
    assert not (folder / "submitted").exists()
    assert main(["submit", "slurm", "run.yaml"]) == 0


class Started:
    """The script, run by bash as Slurm's first node runs it."""

    def __init__(
        self, folder: Path, text: str, variables: Mapping[str, str], srun: str = SRUN
    ) -> None:
        (folder / "job.sbatch").write_text(text)
        (folder / "runs/trial").mkdir(parents=True)
        program(folder, "srun", srun.format(python=sys.executable, deadline=DEADLINE))
        program(folder, "scontrol", SCONTROL)
        job = {"SLURM_JOB_ID": "20034", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NTASKS": "2"}
        job["SLURM_JOB_NUM_NODES"] = "2"
        path = f"{folder}/bin:{os.environ['PATH']}"
        self._folder = folder
        self._process = subprocess.Popen(
            ["bash", str(folder / "job.sbatch")],
            cwd=folder,
            env={**os.environ, **job, "SLURM_CPUS_PER_TASK": "3", "PATH": path, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ask(self, once: str = "started") -> None:
        """What Slurm sends, once a file is there: srun's, when it has started."""
        end = time.monotonic() + DEADLINE
        while not (self._folder / once).exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        self._process.send_signal(signal.SIGUSR1)

    def end(self) -> tuple[int, str]:
        output, _ = self._process.communicate(timeout=DEADLINE)
        return self._process.returncode, output


ENDS = pytest.mark.parametrize(
    ("asked", "status", "state", "again"),
    [
        (0, 0, "done", False),
        (0, 3, "failed", False),
        # A budget is spent, or an endpoint down: queueing again would mend neither.
        (0, 75, "interrupted", False),
        (0, 137, "running", False),
        (1, 75, "interrupted", True),
        (3, 75, "interrupted", True),
        # A rank died of the signal before it listened; rank 0 before there was a run.
        (1, 138, "interrupted", True),
        (1, 138, "", True),
        # It came too late.
        (1, 0, "done", False),
        (1, 3, "stopped_early", False),
        (1, 1, "failed", False),
        (1, 143, "failed", False),
    ],
)


@ENDS
def test_a_job_queues_again_once_if_it_was_asked_to_stop_and_can_go_on(
    asked: int,
    status: int,
    state: str,
    again: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables = {"STATUS": str(status), "STATE": state, "WAITS": "yes" if asked else ""}
    started = Started(folder, printed(capsys), variables)
    for _ in range(asked):
        started.ask()
    assert started.end()[0] == status
    requeued = folder / "requeued"
    found = requeued.read_text().splitlines() if requeued.exists() else []
    assert found == (["requeue 20034"] if again else [])


def test_ranks_run_in_a_container_where_the_script_is_edited_to_name_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = {"container": "(apptainer exec 'my image')", "srun_options": "(--container-image=x)"}
    text = fill_in(printed(capsys), {}, edits)
    started = Started(folder, text, {"STATUS": "0", "STATE": "", "WAITS": ""})
    assert started.end() == (0, "")
    given = yaml.safe_load((folder / "seen.json").read_text())["arguments"]
    assert given[1] == "--container-image=x"
    assert given[-8:-5] == ["apptainer", "exec", "my image"]


def test_ranks_are_told_where_to_meet_and_what_to_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    started = Started(folder, printed(capsys), {"STATUS": "0", "STATE": "", "WAITS": ""})
    status, output = started.end()
    assert (status, output) == (0, "")
    seen = yaml.safe_load((folder / "seen.json").read_text())
    given = seen.pop("arguments")
    assert seen == {
        "MASTER_ADDR": "n7",
        "MASTER_PORT": "10034",
        "WORLD_SIZE": "2",
        "SRUN_CPUS_PER_TASK": "3",
        "OMP_NUM_THREADS": "3",
    }
    assert given[-5:] == [sys.executable, "-m", "launch", "train", "run.yaml"]
    # What srun starts on each node.
    told = [*given[given.index("bash") : -5], "env"]
    variables = {**os.environ, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    shown = subprocess.run(told, env=variables, capture_output=True, text=True, check=True).stdout
    assert {"RANK=1", "LOCAL_RANK=0"} <= set(shown.splitlines())


def test_a_rank_that_still_waits_for_the_others_lives_through_a_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(_: str) -> None:
        signal.raise_signal(signal.SIGUSR1)
        raise InputError("the others did not come")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("launch.ranks.join", join)
    with pytest.raises(InputError, match="the others did not come"):
        spmd.train(load_config(folder / "run.yaml"))
