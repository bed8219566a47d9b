"""Versions travel through memory where all see the same, and only there; nothing is left behind."""

from __future__ import annotations

import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import fakes
import pytest
from golden_run import finish, golden, observed, replay, start, wait_for, write_config
from small_models import save_small_model

from launch.placement import Plan, place
from launch.roles import Alone, Roles
from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.files import remove
from rlhf.policy import Policy
from rollout.transfer import BESIDE, MEMORY, Room, make_way, memory_folder, shared_memory

HERE = "kernel 7"
PLENTY = Room(needed=1000, free=2000 + BESIDE)

pytestmark = pytest.mark.skipif(shared_memory() is None, reason=f"there is no {MEMORY} here")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run's folder; what it leaves in memory is removed."""
    folder = tmp_path / "runs/trial"
    folder.mkdir(parents=True)
    yield folder
    remove(memory_folder(folder))


def test_one_host_goes_through_a_private_folder_in_memory(run: Path) -> None:
    assert Alone().memories() == [shared_memory()]
    for asked in ("auto", "memory"):
        folder, said = make_way(asked, run, [HERE, HERE, HERE], PLENTY)
        assert folder.parent == MEMORY and "trial" in folder.name
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert said == f"whole weights travel through shared memory, {folder}"


def test_runs_of_one_name_in_two_places_do_not_meet(run: Path, tmp_path: Path) -> None:
    assert memory_folder(run) != memory_folder(tmp_path / "others/trial")


TERABYTES = 10**14


@pytest.mark.parametrize(
    ("seen", "room", "reason"),
    [
        ([HERE, "kernel 8", HERE], PLENTY, "see 2 shared memories"),
        (["other 7", HERE], PLENTY, "see 2 shared memories"),
        ([HERE, None], PLENTY, "not every process"),
        (
            [HERE],
            Room(TERABYTES, 3 * TERABYTES),
            "free and a version takes 100,000,067",
        ),
        ([HERE], Room(1000, 1999 + BESIDE), "of memory free, and a version with the file"),
    ],
)
def test_what_memory_cannot_take_goes_to_disk_with_a_word_or_is_refused(
    run: Path, seen: list[str | None], room: Room, reason: str
) -> None:
    with pytest.raises(InputError, match=f"rollout.transfer memory can't be had: .*{reason}"):
        make_way("memory", run, seen, room)
    folder, said = make_way("auto", run, seen, room)
    assert folder == run / "published"
    assert f"{folder}, since " in said
    assert not memory_folder(run).exists()


def test_disk_is_taken_without_a_reason_where_it_is_asked_for(run: Path) -> None:
    folder, said = make_way("disk", run, [HERE], PLENTY)
    assert (folder, said) == (run / "published", f"whole weights travel through {folder}")


@pytest.mark.parametrize("asked", ["auto", "disk"])
def test_what_a_killed_run_left_is_gone_at_the_next_start(run: Path, asked: str) -> None:
    left = [memory_folder(run) / "version-0001", run / "published/version-0002"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"old")
    make_way(asked, run, [HERE], PLENTY)  # type: ignore[arg-type]
    assert not any(folder.exists() for folder in left)


def test_a_name_that_somebody_else_took_is_neither_followed_nor_removed(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").write_text("kept")
    memory_folder(run).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is no folder of this user's"):
        make_way("memory", run, [HERE], PLENTY)
    assert make_way("auto", run, [HERE], PLENTY)[0] == run / "published"
    assert memory_folder(run).is_symlink()
    assert (tmp_path / "elsewhere/kept").read_text() == "kept"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_room_that_is_asked_for_is_what_a_version_takes(
    tmp_path: Path, tied: bool, precision: str
) -> None:
    model = save_small_model(tmp_path / "model", tied=tied)
    values = fakes.run_values(tmp_path, model)
    values["model"]["precision"] = precision
    config = RunConfig.model_validate(values)
    roles = Roles(config, Plan("cpu", "transformers", "merged"))
    Policy(config.model, str(model), "cpu", seed=0).save_merged(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert 0 < file.stat().st_size - roles.version_bytes < 20_000


def test_an_adapter_takes_the_runs_folder(tmp_path: Path) -> None:
    settings = {"sync": "adapter", "transfer": "memory"}
    config = RunConfig.model_validate(fakes.run_values(tmp_path, "m", rollout=settings))
    with pytest.raises(InputError, match=r"rollout\.transfer memory .* rollout\.sync merged"):
        place(config, cuda=False, vllm=True)


@pytest.mark.engine
def test_a_killed_run_goes_on_through_disk_and_leaves_nothing_in_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "tiny", rollout={"transfer": "memory"})
    run = replay(config, "tiny")
    memory = memory_folder(run)
    process = start(config)
    wait_for(memory / "version-0001", process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert [p.name for p in memory.iterdir() if not p.name.startswith(".")] == ["version-0001"]
    assert not (run / "published").exists()
    config.write_text(config.read_text().replace("transfer: memory", "transfer: disk"))
    status, output = finish(start(config))
    assert status == 0, output
    assert f"travel through {run / 'published'}" in output
    assert not memory.exists() and not (run / "published").exists()
    assert observed(run)["2"]["pairs"] == golden("tiny")["2"]["pairs"]
