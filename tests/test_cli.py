"""The command line: flags, settings as flags, exit codes, and what it imports when."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch import cli, shadow
from launch.arguments import split_overrides
from rlhf import errors
from rlhf.config_help import leaves

if TYPE_CHECKING:
    from rlhf.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """\
model: {path: org/model}
prompts:
  train: {path: train.jsonl}
  gate: {path: gate.jsonl}
  final: {path: final.jsonl}
judges:
  panel: [{name: house, function: "a:b", dimensions: [correctness]}]
"""

Install = Callable[[str, str, object], None]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


class _Room(types.ModuleType):
    """A stand-in for a module."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a stand-in for one function of a room that the command imports late."""

    def put(module: str, name: str, function: object) -> None:
        room = sys.modules.get(module)
        if not isinstance(room, _Room):
            room = _Room(module)
            monkeypatch.setitem(sys.modules, module, room)
        setattr(room, name, function)

    return put


@pytest.fixture
def trained(install: Install) -> list[RunConfig]:
    """The configs that training was started with."""
    seen: list[RunConfig] = []

    def train(config: RunConfig) -> int:
        seen.append(config)
        return 0

    install("launch.local", "train", train)
    return seen


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_imports_nothing_heavy() -> None:
    done = python("-X", "importtime", "-m", "launch", "--help")
    assert done.returncode == 0
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "cyclopts" in imported, "the list of imports was read"
    heavy = {
        "torch",
        "transformers",
        "vllm",
        "polars",
        "pydantic",
        "pydantic_core",
        "yaml",
        "numpy",
    }
    assert imported & heavy == set()


def test_help_documents_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for code in ("0", "1", "2", "3", "75", "130"):
        assert f"\n  {code:<4}" in text, code
    documented = {e.exit_status for e in vars(errors).values() if hasattr(e, "exit_status")}
    assert documented == {1, 2, 3, 75}, "an error has a code that --help does not explain"


def test_train_loads_files_and_flags_and_returns_the_status(
    config: str, tmp_path: Path, trained: list[RunConfig]
) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("rollout: {temperature: 0.9, top_p: 0.8}")
    arguments = ["train", config, str(second), "--rollout.temperature", "0.5"]
    assert cli.main([*arguments, "--gates.max_drop=0.1", "--plain"]) == 0
    (seen,) = trained
    assert (seen.rollout.temperature, seen.rollout.top_p, seen.gates.max_drop) == (0.5, 0.8, 0.1)
    assert seen.tracking.plain is True


def test_settings_may_stand_before_the_files(config: str, trained: list[RunConfig]) -> None:
    assert cli.main(["train", "--run.seed", "3", config]) == 0
    assert trained[0].run.seed == 3


@pytest.mark.parametrize(
    ("arguments", "rest", "overrides"),
    [
        (["train", "a.yaml"], ["train", "a.yaml"], []),
        (["--a.b", "V", "x"], ["x"], [("a.b", "V")]),
        (["--a.b=V=W"], [], [("a.b", "V=W")]),
        (["--a.b="], [], [("a.b", "")]),
        (["--a.b", "-1"], [], [("a.b", "-1")]),
        (["--a.b", "[1, 2]"], [], [("a.b", "[1, 2]")]),
        (["--a.b", "1", "--a.b", "2"], [], [("a.b", "1"), ("a.b", "2")]),
        (["--out=./a.b", "./c.d"], ["--out=./a.b", "./c.d"], []),
        (["--", "--a.b", "V"], ["--", "--a.b", "V"], []),
    ],
)
def test_dotted_flags_are_settings(
    arguments: list[str], rest: list[str], overrides: list[tuple[str, str]]
) -> None:
    assert split_overrides(arguments) == (rest, overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollout.temprature", "1"], "unknown key rollout.temprature (command line: "),
        (["--rollout.temprature", "1"], "did you mean temperature?"),
        (["--rollout.temperature", "hot"], 'must be a number > 0 and <= 2, found "hot"'),
        (["--rollout.temperature"], "--rollout.temperature needs a value, found nothing"),
        (["--tracking.plain", "--dry-run"], "--tracking.plain needs a value, found --dry-run"),
        (["--dry-rum"], "Did you mean --dry-run?"),
        (["--temperature", "1"], "Did you mean --rollout.temperature?"),
        (["--samples-per-promt=4"], "--rollout.samples_per_prompt"),
        (["nowhere.yaml"], "config file nowhere.yaml does not exist"),
    ],
)
def test_bad_input_exits_2_and_says_what_was_meant(
    config: str,
    trained: list[RunConfig],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert cli.main(["train", config, *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and message in output.err
    assert "Traceback" not in output.err and output.out == "" and not trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], '"train"'),
        (["train"], "CONFIG"),
        (["config", "--run.seed", "1"], "--run.seed"),
        (["presets", "--run.seed", "1"], "--run.seed"),
        (["init", "demo", "--run.seed", "1"], "--run.seed"),
        (["init"], "PRESET"),
        (["init", "dmeo"], "no preset dmeo; there are demo, "),
    ],
)
def test_wrong_commands_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InputError("no such field"), 2),
        (errors.DataGateError("too many abstentions"), 3),
        (errors.ParityError("stale"), 1),
    ],
)
def test_errors_become_exit_codes_without_a_traceback(
    config: str,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
) -> None:
    def fail(config: RunConfig) -> int:
        raise error

    install("launch.local", "train", fail)
    assert cli.main(["train", config]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {error}" if str(error) else "error: ")
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (errors.Interrupted("stopped at a safe point"), 75, "stopped at a safe point:\n"),
        (KeyboardInterrupt(), 130, "stopped at once; what was finished is kept."),
    ],
)
def test_a_stopped_run_names_the_command_that_goes_on(
    config: str,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def stop(config: RunConfig) -> int:
        raise error

    install("launch.local", "train", stop)
    monkeypatch.setattr(sys, "argv", ["/opt/bin/pairloop"])
    assert cli.main(["train", config, "--run.directory", "a b"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.endswith(f":\n  /opt/bin/pairloop train {config} --run.directory 'a b'\n")


def test_an_unexpected_exception_keeps_its_traceback(config: str, install: Install) -> None:
    def fail(config: RunConfig) -> int:
        raise KeyError("a bug of ours")

    install("launch.local", "train", fail)
    with pytest.raises(KeyError, match="a bug of ours"):
        cli.main(["train", config])


def test_the_status_of_training_is_the_exit_code(config: str, install: Install) -> None:
    install("launch.local", "train", lambda config: 3)
    assert cli.main(["train", config]) == 3


def test_a_dry_run_says_what_it_plans_for_and_trains_nothing(
    config: str,
    install: Install,
    trained: list[RunConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(
        "launch.dry_run",
        "say",
        lambda config, machine, cluster: iter(
            [f"seed {config.run.seed}", f"plan for {machine}, {cluster}"]
        ),
    )
    arguments = ["train", config, "--dry-run", "--run.seed", "5"]
    for more, on in (
        ([], "None, None"),
        (["--machine", "1xT4-16GB"], "1xT4-16GB, None"),
        (["--cluster", "4x8xH100-80GB"], "None, 4x8xH100-80GB"),
    ):
        assert cli.main([*arguments, *more]) == 0
        assert capsys.readouterr().out == f"seed 5\nplan for {on}\n"
    assert not trained


@pytest.mark.parametrize(
    ("flag", "word"), [("--machine", "1xT4-16GB"), ("--cluster", "4x8xH100-80GB")]
)
def test_a_machine_is_described_for_a_dry_run_only(
    flag: str, word: str, config: str, trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", config, flag, word]) == 2
    assert f"{flag} {word} describes what to plan for: add --dry-run" in capsys.readouterr().err
    assert not trained


def test_the_demo_takes_its_preset_folder_and_settings(
    config: str, install: Install, trained: list[RunConfig]
) -> None:
    asked: list[str] = []

    def path(name: str) -> Path:
        asked.append(name)
        return Path(config)

    install("launch.presets", "path", path)
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--transformers", "--out", "out/first", "--run.seed=4"]) == 0
    assert asked == ["demo", "demo_transformers"]
    assert (trained[0].run.directory, trained[0].run.name) == ("runs", "run")
    assert (trained[1].run.directory, trained[1].run.name) == ("out", "first")
    assert trained[1].run.seed == 4


def test_config_prints_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in leaves())


def test_config_survives_a_reader_that_stops() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch", "config"]
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["rlhf", "rollout"])
@pytest.mark.parametrize("package", [True, False])
def test_a_package_that_shadows_ours_is_named(tmp_path: Path, name: str, package: bool) -> None:
    stranger = tmp_path / name / "__init__.py" if package else tmp_path / f"{name}.py"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("raise RuntimeError('was imported')")
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from launch.cli import main"
    done = python("-c", f"{start}; sys.exit(main(['--help']))")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: package {name} must be {ROOT / name}, found {tmp_path}")
    assert "uninstall" in done.stderr and "was imported" not in done.stderr


def test_our_own_packages_shadow_nothing() -> None:
    assert [shadow._location(name) for name in shadow.PACKAGES] == [
        ROOT / name for name in shadow.PACKAGES
    ]
    shadow.check()


def installed(home: Path, body: bytes, recorded: bytes) -> None:
    """A site folder in which our wheel recorded `recorded` for a file that now holds `body`."""
    (home / "rlhf").mkdir()
    (home / "rlhf" / "__init__.py").write_bytes(body)
    digest = base64.urlsafe_b64encode(hashlib.sha256(recorded).digest()).rstrip(b"=").decode()
    info = home / "pairloop-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pairloop\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"rlhf/__init__.py,sha256={digest},{len(recorded)}\n")


def test_a_file_that_another_distribution_wrote_over_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, body=b"theirs = 1\n", recorded=b"ours = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(shadow.ShadowError, match=r"package rlhf: .*__init__.py is not the file"):
        shadow._unchanged(tmp_path)


def test_files_as_installed_pass_until_one_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, body=b"ours = 1\n", recorded=b"ours = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    shadow._unchanged(tmp_path)
    (tmp_path / "rlhf" / "__init__.py").write_bytes(b"ours = 2\n")
    with pytest.raises(shadow.ShadowError, match="is not the file that pairloop installed"):
        shadow._unchanged(tmp_path)
