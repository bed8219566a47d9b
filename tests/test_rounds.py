"""A round is a transaction on disk, whoever kills it and whenever."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import rlhf
from rlhf.config import RunConfig
from rlhf.errors import InputError, Interrupted
from rlhf.files import (
    STAGING,
    FolderLock,
    atomic_file,
    atomic_folder,
    sha256_file,
    sha256_tree,
    write_parquet,
)
from rlhf.metrics import Metrics
from rlhf.rounds import Round, RunStore
from rlhf.types import Completion, Score, completions_table, pairs_schema, scores_table

ROOT = Path(rlhf.__file__).parents[1]


def config(directory: Path, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"name": "trial", "directory": str(directory)},
        "model": {"path": "some/model"},
        "prompts": {split: {"path": f"{split}.jsonl"} for split in ("train", "gate", "final")},
        "judges": {"panel": [{"name": "rules", "function": "a:b", "dimensions": ["correctness"]}]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


def frame(i: int = 0, rows: int = 3) -> pl.DataFrame:
    return pl.DataFrame({"part": [i] * rows, "row": range(rows)})


def refuse(*_: object) -> Any:
    raise AssertionError("computed again")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.open(config(tmp_path)) as opened:
        yield opened


def reopened(store: RunStore) -> RunStore:
    store.close()
    return RunStore.open(config(store.folder.parent))


# A run in small: every primitive once, each computation written to a side file when it starts.
# Argument 3 is a point to die at: before the n-th change to the run folder, or a named place.
CHILD = """
import json, os, signal, sys
from pathlib import Path
import polars as pl
from rlhf.config import RunConfig
from rlhf.metrics import Metrics
from rlhf.rounds import RunStore, installed_versions

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}

def run(directory, log, die_at):
    os.chdir(directory)
    seen = 0

    def die_here():
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith("trial"):
            seen += 1
            if str(seen) == die_at:
                die_here()

    sys.addaudithook(watch)
    config = RunConfig.model_validate_json(os.environ["CONFIG"])

    def started(what):
        with open(log, "a") as file:
            file.write(what + "\\n")
        if what == die_at:
            die_here()

    def part(i):
        started(f"part {i}")
        return pl.DataFrame({"i": [i] * 5, "text": [str(i)] * 5})

    def pairs():
        started("pairs")
        return pl.DataFrame({"margin": [0.25, 0.5]})

    def funnel():
        started("funnel")
        return {"kept": 2, "share": float("nan")}

    def policy(path):
        started("policy")
        (path / "adapter").mkdir()
        (path / "adapter" / "weights").write_bytes(b"w" * 1000)
        metrics.rewind(0, "train")
        for step in (1, 2, 3):
            metrics.log(0, "train", step, {"loss": 1 / step})
        if die_at == "policy half written":
            die_here()
        (path / "config.json").write_text("{}")

    with RunStore.open(config) as store:
        metrics = Metrics(store.folder / "metrics.jsonl")
        store.status("running")
        round = store.round(0)
        round.shards("completions", 3, part)
        round.table("pairs", pairs)
        round.record("evaluation/funnel", funnel)
        round.folder("policy", policy)
        round.drop("trainer")
        store.status("done", best_round=0, promoted=[0])

# One line asks for one run in a forked process: importing once makes a sweep affordable, and so
# does looking up versions once.
installed_versions()
for line in sys.stdin:
    directory, log, die_at = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            run(directory, log, die_at)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def process(code: str, seconds: float, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed at the deadline, or at the end of the block."""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    deadline = threading.Timer(seconds, child.kill)
    deadline.start()
    try:
        yield child
    finally:
        deadline.cancel()
        child.kill()
        child.wait(timeout=10)
        for pipe in (child.stdin, child.stdout):
            assert pipe
            pipe.close()


Runner = Callable[[Path, str], tuple[int, list[str]]]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """Runs CHILD in a directory; returns its exit status and the computations it started."""
    given_config = config(Path(".")).model_dump_json()
    with process(CHILD, 300, CONFIG=given_config) as child:
        assert child.stdin and child.stdout
        stdin, stdout = child.stdin, child.stdout

        def run(directory: Path, die_at: str) -> tuple[int, list[str]]:
            log = directory / "log"
            log.write_text("")
            print(json.dumps([str(directory), str(log), die_at]), file=stdin, flush=True)
            return int(stdout.readline()), log.read_text().splitlines()

        yield run


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder where an fsync costs nothing, where there is one: a kill is not a power cut."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def contents(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in sha256_tree(folder).items() if name != ".lock"}


EVERYTHING = ["part 0", "part 1", "part 2", "pairs", "funnel", "policy"]


@pytest.mark.slow
def test_killed_before_any_change_on_disk_it_resumes_to_the_same_bytes(
    quick_disk: Path, runner: Runner
) -> None:
    whole = quick_disk / "whole"
    whole.mkdir()
    assert runner(whole, "never") == (0, EVERYTHING)
    expected = contents(whole / "trial")
    died = 0
    # Ends by itself: the run has fewer changes than `change` once it survives.
    for change in range(1, 1000):
        directory = quick_disk / str(change)
        directory.mkdir()
        status, before = runner(directory, str(change))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        died += 1
        status, after = runner(directory, "never")
        assert status == 0
        assert contents(directory / "trial") == expected, f"killed before change {change}"
        # Only what was under way may start again; nothing is skipped.
        assert after in (EVERYTHING[len(before) :], EVERYTHING[max(0, len(before) - 1) :])
    assert died > 40, died


@pytest.mark.parametrize("place", ["part 1", "pairs", "funnel", "policy", "policy half written"])
def test_killed_in_mid_computation_only_that_one_is_done_again(
    tmp_path: Path, runner: Runner, place: str
) -> None:
    status, before = runner(tmp_path, place)
    assert status == -signal.SIGKILL
    staged = list((tmp_path / "trial").rglob(f"*{STAGING}"))
    assert bool(staged) == place.startswith("policy")
    status, after = runner(tmp_path, "never")
    assert status == 0
    assert after == EVERYTHING[len(before) - 1 :]
    assert not list((tmp_path / "trial").rglob(f"*{STAGING}"))
    assert runner(tmp_path, "never") == (0, [])
    steps = [record["step"] for record in Metrics(tmp_path / "trial/metrics.jsonl").read()]
    assert steps == [1, 2, 3]


HOLDER = """
import os, signal, sys
from rlhf.config import RunConfig
from rlhf.rounds import RunStore
store = RunStore.open(RunConfig.model_validate_json(os.environ["CONFIG"]))
if os.fork() == 0:
    signal.alarm(30)
    # Written by the worker itself: it runs, so what a fork does first is done.
    print(os.getpid(), flush=True)
    signal.pause()
sys.stdin.read()
"""


def test_a_held_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    with process(HOLDER, 20, CONFIG=wanted.model_dump_json()) as holder:
        assert holder.stdout
        worker = int(holder.stdout.readline())
        with pytest.raises(
            InputError, match=f"in use by process {holder.pid} on .*kill -TERM {holder.pid}"
        ):
            RunStore.open(wanted)
        holder.kill()
        holder.wait(timeout=10)
        try:
            # The orphan was forked while the lock was held; it must not keep it.
            os.kill(worker, 0)
            RunStore.open(wanted).close()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_one_process_cannot_open_a_run_twice(store: RunStore) -> None:
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} "):
        RunStore.open(config(store.folder.parent))


def test_what_is_read_back_equals_what_was_computed(store: RunStore) -> None:
    completion = Completion("p", 0, "ünï\n", (1, 2), (3,), (-0.5, -math.inf), "stop", 7)
    tables = {
        "completions": completions_table([completion]),
        "scores": scores_table(
            [Score.of("p", 0, "j", "d", 1.0), Score.abstain("p", 1, "j", "d", "r")]
        ),
        "pairs": pl.DataFrame(schema=pairs_schema(["b", "a"])),
        "deep/kinds": pl.DataFrame(
            {"e": ["x", None], "f": [math.nan, None]}, schema={"e": pl.Enum(["x"]), "f": pl.Float32}
        ),
    }
    for name, table in tables.items():
        assert_frame_equal(store.round(1).table(name, table.clone), table)
    again = reopened(store).round(1)
    for name, table in tables.items():
        assert_frame_equal(again.table(name, refuse), table)


def test_a_record_is_the_same_before_and_after_resuming(store: RunStore) -> None:
    value = {"z": (1, 2), "a": {"worst": -math.inf, "mean": math.nan, "best": 0.1}, "t": "ü"}
    first = store.round(0).record("gates", lambda: value)
    assert first == {"z": [1, 2], "a": {"worst": None, "mean": None, "best": 0.1}, "t": "ü"}
    assert list(first) == ["z", "a", "t"]
    assert reopened(store).round(0).record("gates", refuse) == first


def test_shards_stop_only_between_parts_and_come_back_in_order(store: RunStore) -> None:
    computed: list[int] = []

    def part(i: int) -> pl.DataFrame:
        computed.append(i)
        return frame(i)

    def stop_after_two() -> None:
        if len(computed) == 2:
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        store.round(0).shards("scores", 4, part, stop_after_two)
    assert not store.round(0).done("scores")
    assert computed == [0, 1]
    table = reopened(store).round(0).shards("scores", 4, part)
    assert computed == [0, 1, 2, 3]
    assert_frame_equal(table, pl.concat([frame(i) for i in range(4)]))


def test_parts_that_do_not_belong_are_an_error(store: RunStore) -> None:
    store.round(0).shards("scores", 2, frame)
    write_parquet(frame(), store.round(0).path / "scores/part-00002.parquet")
    with pytest.raises(InputError, match="scores must hold 2 parts .* part-00002.parquet"):
        store.round(0).shards("scores", 2, refuse)


def test_a_failed_computation_leaves_nothing(store: RunStore) -> None:
    def fail(path: Path) -> None:
        (path / "weights").write_bytes(b"half")
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        store.round(0).folder("policy", fail)
    assert list(store.round(0).path.iterdir()) == []
    assert not store.round(0).done("policy")


def small_folder(path: Path) -> None:
    (path / "weights").write_bytes(b"weights")


def fill(round: Round) -> None:
    round.table("pairs", frame)
    round.record("evaluation", lambda: {"reward": 0.5})
    round.shards("evaluation/scores", 2, frame)
    round.folder("policy", small_folder)


def read(round: Round) -> None:
    round.table("pairs", refuse)
    round.record("evaluation", refuse)
    round.shards("evaluation/scores", 2, refuse)
    round.folder("policy", refuse)


@pytest.mark.parametrize(
    "file",
    ["pairs.parquet", "evaluation.json", "evaluation/scores/part-00001.parquet", "policy/weights"],
)
@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_a_finished_file_that_changed_is_named_with_the_remedy(
    store: RunStore, file: str, harm: str
) -> None:
    fill(store.round(3))
    read(store.round(3))
    again = reopened(store).round(3)
    path = again.path / file
    expected = sha256_file(path)
    if harm == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        found = sha256_file(path)
    else:
        path.unlink()
        found = "no such file"
    with pytest.raises(InputError) as caught:
        read(again)
    for word in (str(path), expected, found, f"delete the folder {again.path}"):
        assert word in str(caught.value)


def test_a_file_slipped_into_a_finished_folder_is_refused(store: RunStore) -> None:
    fill(store.round(0))
    (store.round(0).path / "policy/adapter.bin").write_bytes(b"")
    with pytest.raises(InputError, match="policy/adapter.bin .* of no such file"):
        read(store.round(0))


def test_the_manifest_says_what_was_made_and_with_what(store: RunStore) -> None:
    fill(store.round(2))
    path = store.round(2).path
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["round"], manifest["seed"]) == (2, 0)
    assert manifest["versions"]["polars"] == pl.__version__
    assert len(manifest["config_sha256"]) == 64
    files = {n: sha for n, sha in sha256_tree(path).items() if n != "manifest.json"}
    assert manifest["sha256"] == files


def test_other_versions_on_resume_are_added_to_the_manifest(store: RunStore) -> None:
    store.round(0).table("pairs", frame)
    path = store.round(0).path / "manifest.json"
    manifest = json.loads(path.read_text())
    now, manifest["versions"]["polars"] = dict(manifest["versions"]), "0.0.1"
    path.write_text(json.dumps(manifest))
    reopened(store).round(0).record("funnel", dict)
    manifest = json.loads(path.read_text())
    assert manifest["versions"]["polars"] == "0.0.1"
    assert manifest["resumed_with"] == [now]


def test_names_that_share_a_beginning_do_not_share_a_fate(store: RunStore) -> None:
    round = store.round(0)
    round.shards("evaluation/scores", 1, frame)
    assert not round.done("evaluation")
    round.record("evaluation", lambda: {"a": 1})
    round.drop("evaluation/scores")
    assert round.done("evaluation") and not round.done("evaluation/scores")
    assert round.record("evaluation", refuse) == {"a": 1}
    assert_frame_equal(round.shards("evaluation/scores", 1, lambda i: frame(9)), frame(9))


def test_a_round_asked_for_twice_keeps_one_manifest(store: RunStore) -> None:
    first, second = store.round(0), store.round(0)
    first.table("pairs", frame)
    second.record("funnel", dict)
    first.record("gates", dict)
    again = reopened(store).round(0)
    assert all(again.done(name) for name in ("pairs", "funnel", "gates"))


def test_scratch_stays_out_of_the_manifest_until_dropped(store: RunStore) -> None:
    (store.round(0).scratch("trainer") / "step").write_text("7")
    again = reopened(store).round(0)
    assert (again.scratch("trainer") / "step").read_text() == "7"
    again.drop("trainer")
    again.drop("trainer")
    assert not (again.path / "trainer").exists()


def test_what_is_dropped_goes_as_one(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, the next start finds all of its parts, or none: never some."""
    round = store.round(0)
    round.shards("scores", 3, frame)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rlhf.files.shutil.rmtree", raises(KeyboardInterrupt))
        round.drop("scores")
    again = reopened(store).round(0)
    assert not again.done("scores")
    assert [*again.sharded("scores", 3).missing] == [0, 1, 2]


def raises(error: type[BaseException]) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


def test_a_lock_that_can_not_be_made_is_a_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / FolderLock.NAME).mkdir()
    with pytest.raises(InputError, match="run.directory must be a folder that can be written"):
        FolderLock(tmp_path)


def test_the_final_claim_is_stored_like_a_round(store: RunStore) -> None:
    fill(store.final())
    read(reopened(store).final())
    assert store.final().path == store.folder / "final"
    assert store.final().index is None


def test_status_keeps_the_best_round_until_told_otherwise(store: RunStore) -> None:
    assert store.read_status() is None
    store.status("running", best_round=1, promoted=[0, 1])
    store.status("interrupted", reason="SIGTERM")
    kept = {"best_round": 1, "promoted": [0, 1]}
    assert reopened(store).read_status() == {"state": "interrupted", "reason": "SIGTERM", **kept}
    store.status("running")
    assert store.read_status() == {"state": "running", "reason": None, **kept}


def test_a_changed_config_is_refused_with_every_difference(tmp_path: Path) -> None:
    RunStore.open(config(tmp_path)).close()
    other = config(tmp_path, rollout={"temperature": 0.9}, run={"seed": 5})
    with pytest.raises(InputError) as caught:
        RunStore.open(other)
    for word in ("rollout.temperature: 0.7 -> 0.9", "run.seed: 0 -> 5", "another run.name"):
        assert word in str(caught.value)
    RunStore.open(config(tmp_path)).close()


def test_a_setting_that_changes_no_result_may_change(tmp_path: Path) -> None:
    RunStore.open(config(tmp_path)).close()
    RunStore.open(config(tmp_path, tracking={"plain": True})).close()
    kept = json.loads((tmp_path / "trial/config.json").read_text())
    assert kept["tracking"]["plain"] is True
    assert "plain: true" in (tmp_path / "trial/config.yaml").read_text()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial/thesis.txt").write_text("years")
    with pytest.raises(InputError, match="holds thesis.txt and no config.json; give another"):
        RunStore.open(config(tmp_path))
    assert [p.name for p in (tmp_path / "trial").iterdir()] == ["thesis.txt"]


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run.directory must be a folder that can be written"):
        RunStore.open(config(tmp_path / "file"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        # Permissions don't bind root.
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="Permission denied; set run.directory"):
            RunStore.open(config(locked))
    finally:
        os.seteuid(user)


def test_only_our_own_leftovers_are_removed(store: RunStore) -> None:
    ours = store.folder / "rounds/0000" / f".policy.0a{STAGING}"
    ours.mkdir(parents=True)
    (ours / "half").write_text("")
    theirs = store.folder / "rounds/0000/.notes.tmp"
    theirs.write_text("")
    outside = store.folder.parent / f".cache.0a{STAGING}"
    outside.write_text("")
    reopened(store).close()
    assert (ours.exists(), theirs.exists(), outside.exists()) == (False, True, True)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    for generation in ("old", "new"):
        with atomic_folder(target) as staging:
            (staging / generation).write_text("")
    assert [p.name for p in target.iterdir()] == ["new"]
    with pytest.raises(RuntimeError), atomic_folder(target) as staging:
        (staging / "newer").write_text("")
        raise RuntimeError
    with pytest.raises(FileNotFoundError), atomic_folder(target) as staging:
        staging.rmdir()
    assert [p.name for p in tmp_path.rglob("*")] == ["cache", "new"]


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A 1 MB file system at `folder`, where this user may mount one: yields whether."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True, timeout=10).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def big_table() -> pl.DataFrame:
    return pl.DataFrame({"x": [math.sin(i) for i in range(400_000)]})


def big_folder(path: Path) -> None:
    (path / "weights").write_bytes(b"\1" * 2_000_000)


BIG: dict[str, Callable[[Round], object]] = {
    "pairs.parquet": lambda r: r.table("pairs", big_table),
    "funnel.json": lambda r: r.record("funnel", lambda: {"x": "y" * 2_000_000}),
    "policy": lambda r: r.folder("policy", big_folder),
    "part-00001.parquet": lambda r: r.shards("s", 2, lambda i: big_table()[: 1 + i * 400_000]),
}


@pytest.mark.parametrize("file", BIG)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path, file: str) -> None:
    with (
        small_disk(tmp_path / "disk") as mounted,
        RunStore.open(config(tmp_path / "disk")) as store,
    ):
        round = store.round(0)
        round.table("kept", frame)
        before = contents(store.folder)
        # /dev/full refuses every write as a full disk does, without a mount.
        write = BIG[file] if mounted else lambda r: r.folder(file, fill_up)
        with pytest.raises(InputError, match=f"disk full while writing .*{file}; .* MB free"):
            write(round)
        if file.startswith("part") and mounted:
            assert (round.path / "s/part-00000.parquet").exists()
            round.drop("s")
        assert contents(store.folder) == before
        assert round.table("kept", refuse).height == 3
        round.record("small", dict)


def fill_up(path: Path) -> None:
    (path / "weights").symlink_to("/dev/full")
    (path / "weights").write_bytes(b"x")


def test_a_full_device_is_recognised_without_a_mount(store: RunStore) -> None:
    with pytest.raises(InputError, match="disk full while writing .*policy; .* run the same"):
        store.round(0).folder("policy", fill_up)
    assert list(store.round(0).path.iterdir()) == []
    with pytest.raises(FileNotFoundError), atomic_file(store.folder / "x") as staging:
        (staging / "not there").write_text("")


def test_metrics_on_a_full_disk_end_with_a_whole_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as mounted:
        assert mounted or os.geteuid() != 0
        metrics = Metrics(tmp_path / "disk" / "metrics.jsonl")
        metrics.log(0, "train", 1, {"note": "fits"})
        note = "x" * 2_000_000
        if mounted:
            with pytest.raises(InputError, match="disk full while writing .*metrics.jsonl"):
                metrics.log(0, "train", 2, {"note": note})
            note = "less"
        metrics.log(0, "train", 2, {"note": note})
        assert [record["note"] for record in metrics.read()] == ["fits", note]


@pytest.mark.slow
@given(st.sets(st.integers(0, 50), max_size=6))
def test_equal_tables_give_equal_bytes_however_they_are_chunked(cuts: set[int]) -> None:
    rows = [
        {"s": str(i), "l": list(range(i % 4)), "n": None if i % 3 else i / 7} for i in range(50)
    ]
    table = pl.DataFrame(rows)
    edges = [0, *sorted(cuts), 50]
    pieces = [table[a:b] for a, b in itertools.pairwise(edges)]
    with tempfile.TemporaryDirectory() as folder:
        write_parquet(table, Path(folder, "one"))
        write_parquet(pl.concat(pieces, rechunk=False), Path(folder, "many"))
        assert sha256_file(Path(folder, "one")) == sha256_file(Path(folder, "many"))


def test_bytes_do_not_depend_on_the_thread_count(tmp_path: Path) -> None:
    code = (
        "import polars as pl; from pathlib import Path; from rlhf.files import write_parquet\n"
        "n = 300_000; write_parquet(pl.DataFrame({'a': range(n), 's': ['x' * (i % 7) for i in "
        "range(n)]}), Path('PATH'))"
    )
    for threads in ("1", "4"):
        script = code.replace("PATH", str(tmp_path / threads))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": threads}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=30)
    assert sha256_file(tmp_path / "1") == sha256_file(tmp_path / "4")


KEY = st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from(["train", "score"]))


@given(
    st.lists(st.tuples(KEY, st.integers(1, 5), st.floats(width=32)), max_size=20),
    KEY,
    st.integers(0, 5),
)
def test_rewind_drops_the_later_steps_of_one_stage_and_nothing_else(
    lines: list[tuple[tuple[int | None, str], int, float]],
    key: tuple[int | None, str],
    after: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(Path(folder, "metrics.jsonl"))
        for (round, stage), step, value in lines:
            metrics.log(round, stage, step, {"value": value})
        metrics.rewind(*key, after_step=after)
        kept = [line for line in lines if line[0] != key or line[1] <= after]
        assert metrics.read() == [
            {"round": r, "stage": s, "step": n, "value": v if math.isfinite(v) else None}
            for (r, s), n, v in kept
        ]


@given(st.integers(1, 8), st.data())
@settings(max_examples=50)
def test_a_stage_killed_anywhere_logs_each_step_once(steps: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        metrics = Metrics(path)
        metrics.log(0, "score", 1, {"text": "\n ü \u2028"})
        head = path.stat().st_size
        for step in range(1, steps + 1):
            metrics.log(0, "train", step, {"loss": 1 / step})
        whole = path.read_bytes()
        cut = data.draw(st.integers(head, len(whole)))
        path.write_bytes(whole[:cut])
        survived = Metrics(path).read()
        checkpoint = data.draw(st.integers(0, len(survived) - 1))
        Metrics(path).rewind(0, "train", after_step=checkpoint)
        for step in range(checkpoint + 1, steps + 1):
            Metrics(path).log(0, "train", step, {"loss": 1 / step})
        assert path.read_bytes() == whole


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).log(0, "train", 1, {})
    with path.open("a") as file:
        file.write("oops\n")
    with pytest.raises(InputError, match=r"metrics.jsonl:2: must be a JSON object .* 'oops'"):
        Metrics(path).read()
