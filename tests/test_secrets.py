"""Secrets come from the environment and reach nothing else: proved with planted canaries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from fakes import run_values

from rlhf import config_io
from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.redaction import HIDDEN, mask, names_secret, secret_in

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "aZ3" * 12
BASE = """\
model: {path: org/model}
prompts:
  train: {path: train.jsonl}
  gate: {path: gate.jsonl}
  final: {path: final.jsonl}
judges:
  panel: [{name: house, function: "a:b", dimensions: [correctness]}]
"""


def canary(name: str) -> str:
    """A value that stands nowhere else; told apart by its variable."""
    return f"zq7391{name.lower().replace('_', '')}"


PLANTED = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "JUDGE_PASSWORD",
)
CANARIES = {name: canary(name) for name in PLANTED}
PROXY = {
    "HTTPS_PROXY": f"http://somebody:{canary('proxy')}@127.0.0.1:9",
    "WANDB_BASE_URL": f"http://somebody:{canary('base')}@127.0.0.1:9",
}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("wandb_api_key", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("password", True), ("openai_apikey", True), ("max_tokens", False), ("keyboard", False),
        ("TOKENIZERS_PARALLELISM", False), ("RAY_AUTH_TOKEN_PATH", False), ("monkey", False),
    ],
)  # fmt: skip
def test_names_that_hold_secrets(name: str, secret: bool) -> None:
    assert names_secret(name) is secret


@pytest.mark.parametrize(
    "text",
    [
        TOKEN, "sk-proj-1a2B3c4D5e6F7g8H9i0J1k2L", "AKIAIOSFODNN7EXAMPLE",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "https://me:letmein@hub.example/model",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_shape_and_masked(text: str) -> None:
    said = secret_in(f"before {text} after")
    assert said and text not in said
    assert text not in mask(f"before {text} after")
    assert HIDDEN in mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct", "rollout.support_desk.pool:read",
        "3f2a9c1d4e5b6a7f8091a2b3c4d5e6f708192a3b", "hf_models/instruct", "runs/sk-learn-baseline",
        "https://example.com/a:b@c", "{context}\n\n{prompt}", "git@github.com:org/repo.git",
    ],
)  # fmt: skip
def test_innocent_text_passes(text: str) -> None:
    assert secret_in(text) is None
    assert mask(text) == text


def test_what_the_environment_keeps_secret_is_known_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**CANARIES, **PROXY, "SHORT_KEY": "true", "KEY_FILE": "/etc/key"}.items():
        monkeypatch.setenv(name, value)
    for name, value in CANARIES.items():
        assert secret_in(f"/data/{value}/x") == f"the value of ${name}"
    assert mask(f"proxy {PROXY['HTTPS_PROXY']}").count("zq7391") == 0
    assert secret_in("true, in /etc/key") is None


@pytest.mark.parametrize("key", ["tracking.wandb_api_key", "tracking.wandb.api_key", "hf_token"])
def test_a_key_for_a_secret_is_refused_and_sent_to_the_environment(
    key: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    with pytest.raises(InputError, match="come from the environment, never from a config") as found:
        config_io.load([path], [(key, "abcdef0123456789")])
    assert "abcdef0123456789" not in str(found.value)


@pytest.mark.parametrize(
    "key",
    ["model.path", "judges.panel.0.function", "prompts.train.columns.prompt", "tracking.wandb",
     "rollout.temperature", "prompts.system"],
)  # fmt: skip
def test_a_secret_in_a_config_is_refused_by_place_and_never_shown(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    with pytest.raises(InputError) as found:
        config_io.load([path], [(key, TOKEN)])
    assert key in str(found.value)
    assert TOKEN not in str(found.value)


def test_a_secret_in_a_config_built_in_python_is_refused_and_never_shown() -> None:
    values = yaml.safe_load(BASE)
    values["model"]["path"] = f"https://me:{TOKEN}@hub/model"
    with pytest.raises(ValueError, match="model.path must hold no secret") as found:
        RunConfig.model_validate(values)
    assert TOKEN not in str(found.value)


class Watcher(threading.Thread):
    """Collects the command lines of a process and of all that it starts."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.family = {pid}
        self.seen: set[bytes] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    stat = (process / "stat").read_text()
                    parent = int(stat.rpartition(")")[2].split()[1])
                    if {int(process.name), parent} & self.family:
                        self.family.add(int(process.name))
                        self.seen.add((process / "cmdline").read_bytes())
                except (FileNotFoundError, ProcessLookupError):
                    continue


@pytest.mark.engine
def test_no_canary_reaches_a_file_an_argument_or_the_output(
    tiny_model: Path, tmp_path: Path
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    values = run_values(
        tmp_path,
        tiny_model,
        rounds={"count": 1},
        tracking={
            "plain": True,
            "trackers": ["wandb", "tensorboard"],
            "wandb": {"mode": "offline"},
        },
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    repository = tmp_path / "work"
    remote = f"https://oauth2:{canary('remote')}@git.example/me/project.git"
    for command in (["init", "-q", "."], ["remote", "add", "origin", remote]):
        repository.mkdir(exist_ok=True)
        subprocess.run(["git", *command], cwd=repository, check=True)
    places = {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(
        # Somebody's script around ours, with a secret of its own among its arguments.
        [sys.executable, "-c", "import sys; from launch.cli import main; "
         "sys.exit(main(sys.argv[1:3]))", "train", str(config), "--key", canary("argv")],
        cwd=repository,
        env={**os.environ, **places, **CANARIES, **PROXY, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    watcher = Watcher(process.pid)
    watcher.start()
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
        watcher.done.set()
        watcher.join()
    assert process.returncode == 0, output.decode()
    # The scan looks in the right places: an innocent word is found in each kind of them.
    files = [path for path in tmp_path.rglob("*") if path.is_file() and ".git" not in path.parts]
    read = {path: path.read_bytes() for path in files}
    kinds = ("config.json", "summary.md", ".wandb", "tfevents", "debug-internal.log", ".table.json")
    for kind in kinds:
        assert any(kind in path.name for path in files), kind
    assert any(b"trial" in text for path, text in read.items() if path.suffix == ".wandb")
    assert any(b"wandb-core" in line for line in watcher.seen)
    own = canary("argv").encode()
    theirs = [line for line in watcher.seen if not line.endswith(own + b"\0")]
    assert len(theirs) < len(watcher.seen)
    told = {str(path): text for path, text in read.items()}
    for name, text in {**told, "output": output, "arguments": b"\n".join(theirs)}.items():
        place = text.find(b"zq7391")
        assert place < 0, f"{name}: {text[max(0, place - 200) : place + 40]!r}"


def test_a_secret_with_white_space_at_its_ends_is_masked_without_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "0123456789abcdef\n")
    assert "0123456789abcdef" not in mask("Illegal header value b'Bearer 0123456789abcdef\\n'")
