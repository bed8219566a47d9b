"""What `pairloop submit` makes of runs on Ray, and of sweeps, with stand-ins for Ray and Slurm.

The real ones: tests/test_ray_jobs.py, tests/test_slurm_ray.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fakes import run_values
from test_offline import write_config, write_pairs
from test_submit import DEADLINE, ENDS, SRUN, Started, directives, program

from launch import ray_jobs
from launch.cli import main
from launch.slurm import fill_in
from rlhf import load_config
from rlhf.errors import InputError
from rlhf.files import FolderLock

SRUN_RAY = """#!/bin/sh
echo "$@" > srun
export SLURM_NODEID=0
exec "$@"
"""
# As symmetric-run on the head does: what stands after its own arguments.
RAY = """#!/bin/sh
touch waiting
echo "$@" > ray
until [ "$LATE" != yes ] || [ -e runs/trial-20034.word/stop ]; do :; done
while [ "$1" != -- ]; do shift; done
shift
"$@"
"""
SBATCH = """#!/bin/sh
echo "$@" >> submitted; echo $((11 + $(wc -l < submitted)))
"""
# Asks its shell for the stop that Slurm asks for, and ends as a training then does.
STOPS = """#!/bin/sh
trap 'exit 75' USR1
kill -USR1 $PPID
while :; do sleep 0.1; done
"""
SERVER = "http://192.0.2.1:8265"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: with run.yaml, whose model nobody loads."""
    values = run_values(tmp_path, "org/model", placement={"device": "cpu", "kind": "ray"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    for name in (*ray_jobs.ADDRESSES, ray_jobs.JOB):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_command_that_does_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "ray", "run.yaml", "--address", SERVER, "--learner.epochs", "3")
    job = '--working-dir . --runtime-env-json \'{"excludes": ["/runs/"]}\''
    train = "pairloop train run.yaml --learner.epochs=3"
    assert text == f"ray job submit --address {SERVER} {job} -- {train}\n"
    elsewhere = printed(capsys, "ray", "run.yaml", "--run.directory", "/shared/runs")
    train = "pairloop train run.yaml --run.directory=/shared/runs"
    assert elsewhere == f"ray job submit --working-dir . -- {train}\n"
    beside = printed(capsys, "ray", "run.yaml", "--run.directory", str(folder))
    assert '{"excludes": ["/trial/"]}' in beside
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run.yaml", "--run.directory", "runs"], "run.directory must be an absolute path"),
        (["sub/run.yaml", "--run.directory", "HERE/sub"], "sub/run.yaml lies in run.directory"),
        (["run.yaml", "--placement.kind", "auto"], "placement.kind must be ray for a Ray job"),
        (["run.yaml", "--prompts.train.path", "gone.jsonl"], "gone.jsonl"),
        (["run.yaml", "--learner.epoch", "3"], "learner.epoch"),
        (["../run.yaml"], "../run.yaml must lie in the working directory"),
        (["run.yaml"], "--address http://HEAD:8265, or RAY_API_SERVER_ADDRESS, must say where"),
        (["run.yaml", "--address", "http://127.0.0.1:9"], "no job was submitted to http://127"),
        (["run.yaml", "--address", "here"], "no job was submitted to here: Invalid address"),
    ],
)
def test_what_could_not_run_is_refused(
    words: list[str],
    says: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words[0].startswith(".."):
        (folder / "below").mkdir()
        monkeypatch.chdir(folder / "below")
    (folder / "sub").mkdir()
    shutil.copy(folder / "run.yaml", folder / "sub")
    words = [word.replace("HERE", str(folder)) for word in words]
    assert main(["submit", "ray", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_an_address_that_rays_client_would_not_take_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert main(["submit", "ray", "run.yaml", "--address", SERVER]) == 2
    assert f"--address is {SERVER}, but RAY_ADDRESS is auto" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    assert main(["submit", "ray", "run.yaml", "--address", SERVER]) == 2
    assert "pip install 'pairloop[ray]'" in capsys.readouterr().err


def test_a_run_that_goes_on_is_not_submitted_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs/trial").mkdir(parents=True)
    lock = FolderLock(folder / "runs/trial")
    assert main(["submit", "ray", "run.yaml", "--address", SERVER]) == 2
    lock.release()
    assert "is in use by" in capsys.readouterr().err


def test_in_a_job_a_run_needs_a_folder_that_outlives_the_copy_and_time_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = load_config(folder / "run.yaml", settings={"run.directory": "runs"})
    ray_jobs.check_inside(lost)
    monkeypatch.setenv(ray_jobs.JOB, "{}")
    with pytest.raises(InputError, match=r"run\.directory must be an absolute path in a Ray job"):
        ray_jobs.check_inside(lost)
    kept = load_config(folder / "run.yaml")
    ray_jobs.check_inside(kept)
    assert "will kill this run after 3 s" in capsys.readouterr().err
    monkeypatch.setenv(ray_jobs.STOP_WAIT, "600")
    ray_jobs.check_inside(kept)
    assert capsys.readouterr().err == ""


def test_under_ray_a_slurm_job_has_one_task_a_node_with_all_that_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--nodes", "2", "--ranks-per-node", "4", "--cpus-per-rank", "8"]
    text = printed(capsys, "slurm", "run.yaml", *size, "--placement.device", "auto")
    found = directives(text)
    given = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "32", "gpus-per-node": "4"}
    assert {name: found[name] for name in given} == given
    assert f"\nprograms={Path(sys.executable).parent}\n" in text
    assert f"\nrun={folder}/runs/trial\n" in text


def ray_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A script whose pairloop is a stand-in."""
    names = '("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")'
    stand_in = re.sub(r'\("MASTER_ADDR".*\)', names, SRUN)
    program(folder, "pairloop", stand_in.format(python=sys.executable, deadline=DEADLINE))
    program(folder, "ray", RAY)
    text = printed(capsys, "slurm", "run.yaml", "--nodes", "2")
    return fill_in(text, {}, {"programs": str(folder / "bin"), "run": "runs/trial"})


@pytest.mark.slow
@ENDS
def test_a_run_on_ray_queues_again_once_if_it_was_asked_to_stop_and_can_go_on(
    asked: int,
    status: int,
    state: str,
    again: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables = {"STATUS": str(status), "STATE": state, "WAITS": "yes" if asked else ""}
    started = Started(folder, ray_script(folder, capsys), {**variables, "LATE": ""}, SRUN_RAY)
    for _ in range(asked):
        started.ask()
    assert started.end()[0] == status
    requeued = folder / "requeued"
    found = requeued.read_text().splitlines() if requeued.exists() else []
    assert found == (["requeue 20034"] if again else [])
    assert list((folder / "runs").iterdir()) == [folder / "runs/trial"]


def test_a_stop_that_comes_before_there_is_a_run_is_heard(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"STATUS": "75", "STATE": "interrupted", "WAITS": "yes", "LATE": "yes"}
    started = Started(folder, ray_script(folder, capsys), variables, SRUN_RAY)
    started.ask("waiting")
    # 138: it died of the signal before it listened.
    assert started.end()[0] in (75, 138)
    assert (folder / "requeued").read_text() == "requeue 20034\n"


def test_a_job_whose_ray_does_not_start_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"STATUS": "0", "STATE": "", "WAITS": ""}
    text = ray_script(folder, capsys)
    started = Started(folder, text, variables, "#!/bin/sh\necho no Ray\n")
    assert started.end() == (1, "no Ray\n")


@pytest.mark.slow
def test_nodes_that_look_for_their_head_do_not_keep_the_job(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"STATUS": "3", "STATE": "", "WAITS": "", "LATE": ""}
    text = ray_script(folder, capsys).replace("timeout 30 ", "timeout 1 ")
    lags = SRUN_RAY.replace('exec "$@"', '"$@"; exec sleep 1000')
    assert lags != SRUN_RAY
    assert Started(folder, text, variables, lags).end()[0] == 3


@pytest.mark.slow
def test_each_job_has_a_token_of_its_own_that_stands_in_no_argument(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    text = ray_script(folder, capsys)
    variables = {"STATUS": "0", "STATE": "", "WAITS": "", "LATE": ""}
    tokens = set()
    for place in ("one", "two"):
        (folder / place).mkdir()
        (folder / place / "bin").symlink_to(folder / "bin")
        assert Started(folder / place, text, variables, SRUN_RAY).end() == (0, "")
        seen = json.loads((folder / place / "seen.json").read_text())
        assert seen["arguments"] == ["train", "run.yaml"]
        assert (seen["RAY_ADDRESS"], seen["RAY_AUTH_MODE"]) == ("n7:6379", "token")
        assert re.fullmatch("[0-9a-f]{64}", seen["RAY_AUTH_TOKEN"])
        given = (folder / place / "ray").read_text()
        size = "--address n7:6379 --min-nodes 2 --num-cpus 3"
        assert given.startswith(f"symmetric-run {size} --include-dashboard=false -- bash")
        assert seen["RAY_AUTH_TOKEN"] not in given + (folder / place / "srun").read_text()
        tokens.add(seen["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2


@pytest.fixture
def sweep(folder: Path) -> list[str]:
    """The words that describe a sweep of two points."""
    pairs = write_pairs(folder / "pairs.jsonl")
    learner = {"epochs": 1, "batch_pairs": 18}
    write_config(folder, folder / "model", pairs, learner=learner, run={"name": "grid"})
    return ["run.yaml", "--objective.beta", "0.05,0.5", "--placement.device", "cpu"]


def test_a_sweep_is_submitted_as_an_array_and_a_job_after_it(
    folder: Path,
    sweep: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "slurm", *sweep, "--sweep", "--time", "90")
    told = "run.yaml --objective.beta=0.05,0.5 --placement.device=cpu"
    assert f"\narguments=({told})\n" in text
    assert directives(text)["time"] == "90"
    program(folder, "sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
    assert main(["submit", "slurm", *sweep, "--sweep", "--time", "90"]) == 0
    assert capsys.readouterr().out.startswith("job 12, 2 points: ")
    place = folder / "runs/grid"
    assert (folder / "submitted").read_text().splitlines() == [
        f"--parsable --array=1-2 --output={place}-%A_%a.out {place}.sbatch",
        f"--parsable --dependency=afterany:12 {place}.sbatch",
    ]
    assert Path(f"{place}.sbatch").read_text() == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sweep", "--nodes", "2"], "each point of a sweep is one process, but 2 x 1"),
        (["--held-out", "online.yaml"], "--held-out online.yaml is about a sweep"),
        (["--sweep", "--data.path", "gone.jsonl"], "gone.jsonl"),
        (["--sweep", "--held-out", "gone.yaml"], "gone.yaml"),
    ],
)
def test_a_sweep_that_could_not_run_is_refused(
    words: list[str], says: str, folder: Path, sweep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "slurm", *sweep, *words]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("task", "queued"),
    [
        # The last task of an array has the array's own number.
        ({"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 77_2\n"),
        ({}, "requeue 77\n"),
    ],
)
def test_who_is_told_to_stop_queues_again_alone(
    task: dict[str, str],
    queued: str,
    folder: Path,
    sweep: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "job.sbatch").write_text(printed(capsys, "slurm", *sweep, "--sweep"))
    program(folder, "srun", STOPS)
    program(folder, "scontrol", '#!/bin/sh\necho "$@" >> requeued\n')
    variables = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1", **task}
    done = subprocess.run(
        ["bash", str(folder / "job.sbatch")],
        env={**variables, "SLURM_JOB_ID": "77"},
        cwd=folder,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75
    assert (folder / "requeued").read_text() == queued


def test_a_task_of_the_array_trains_its_point_and_the_job_after_it_all(
    folder: Path, sweep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "slurm", *sweep, "--sweep")
    (folder / "job.sbatch").write_text(text)
    program(folder, "srun", '#!/bin/sh\necho "$@"\n')
    given = []
    for task in ({"SLURM_ARRAY_TASK_ID": "2"}, {}):
        variables = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1", **task}
        command = ["bash", str(folder / "job.sbatch")]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        given.append(done.stdout.split())
    assert given[0] == [*given[1], "--point", "2"]
    assert given[1][:4] == [sys.executable, "-m", "launch", "sweep"]
