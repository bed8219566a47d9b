"""Several ranks train as one process does: plain and under every ZeRO stage, full and LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import Case
from safetensors.torch import load_file
from small_models import save_small_model
from test_learner import config_for, make_pairs

from rlhf.group import ALONE

RANKS = 2
SETTINGS = {"batch_pairs": 5, "epochs": 2, "micro_batch_tokens": 40, "gradient_checkpointing": True}
CASES = [(stage, tuning) for stage in (0, 1, 2, 3) for tuning in ("full", "lora")]


def name(stage: int, tuning: str) -> str:
    return f"zero{stage}-{tuning}"


def described(model: Path, stage: int, tuning: str, **more: Any) -> dict[str, Any]:
    config = config_for(model, model={"tuning": tuning}, learner=SETTINGS)
    return {
        "name": name(stage, tuning),
        "stage": stage,
        "config": config.model_dump(mode="json"),
        "table": "pairs.parquet",
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_small_model(folder / "model", tied=True)
    make_pairs(13).write_parquet(folder / "pairs.parquet")
    return folder


def launch(folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("ranks_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={RANKS}", str(worker), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Any]:
    """What the ranks found for every case; each is stopped once, in the middle of round 2."""
    model = folder / "model"
    return launch(folder, [described(model, *case, stop_at=[2, 2]) for case in CASES])


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The same in this process, never stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for tuning in ("full", "lora"):
        case = described(folder / "model", 0, tuning) | {"name": f"alone-{tuning}"}
        found[tuning] = Case(folder, case, ALONE).run()
    torch.set_num_threads(threads)
    return found


@pytest.mark.engine
@pytest.mark.parametrize(("stage", "tuning"), CASES)
def test_ranks_train_as_one_process_does(
    folder: Path, together: dict[str, Any], alone: dict[str, Any], stage: int, tuning: str
) -> None:
    found, expected = together[name(stage, tuning)], alone[tuning]
    assert "errors" not in found, found
    assert found["everywhere"] == [found["losses"]] * RANKS
    for losses, others in zip(found["losses"], expected["losses"], strict=True):
        assert losses == pytest.approx(others, abs=1e-5)
    for logps, others in zip(found["reference"], expected["reference"], strict=True):
        assert logps == pytest.approx(others, abs=1e-4)
    for kind in ("policy", "merged"):
        for index in (1, 2):
            own = weights(folder / name(stage, tuning) / f"{kind}-{index}")
            other = weights(folder / f"alone-{tuning}" / f"{kind}-{index}")
            assert own.keys() == other.keys()
            for key, weight in own.items():
                torch.testing.assert_close(weight, other[key], rtol=0, atol=2e-4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found
