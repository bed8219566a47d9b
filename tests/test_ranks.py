"""Several ranks train as one process does: plain and under every ZeRO stage, full and LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ranks_worker import Case
from safetensors.torch import load_file
from small_models import save_small_model
from test_learner import config_for, make_pairs
from test_learner_objectives import data_for
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.errors import InputError
from rlhf.group import ALONE

pytestmark = pytest.mark.engine

RANKS = 2
SETTINGS = {
    "batch_pairs": 5,
    "micro_batch_tokens": 40,
    "gradient_checkpointing": True,
    "checkpoint_steps": 1,
    # Much, so that who decays and who does not shows.
    "weight_decay": 1.0,
}
STAGES = (0, 1, 2, 3)
DPO = [(stage, tuning, "dpo") for stage in STAGES for tuning in ("full", "lora")]
SPLIT = [(stage, tuning) for stage in (2, 3) for tuning in ("full", "lora")]
OTHERS = [(stage, "lora", objective) for stage in (0, 3) for objective in ("ipo", "kto", "orpo")]
# A new adapter each round, merged into the last version.
OTHERS += [(stage, "merged", "dpo") for stage in (0, 2, 3)]
# From an adapter on: trained further, and merged before the first round.
OTHERS += [(3, "given", "dpo"), (3, "given-merged", "dpo")]
# What is split lies in host memory; here that is where everything lies, but by other code.
OTHERS += [(stage, f"{tuning}-offload", "dpo") for stage, tuning in SPLIT]
OTHERS += [(stage, "qlora", "dpo") for stage in (0, 2)]
BROKEN: list[dict[str, Any]] = [
    *({"stage": stage, "tuning": tuning} for stage, tuning, _ in DPO),
    {"stage": 0, "tuning": "lora", "value": "inf"},
    {"stage": 3, "tuning": "full", "value": "inf"},
    *({"stage": stage, "tuning": "lora", "what": "loss"} for stage in (0, 1, 3)),
    {"stage": 2, "tuning": "full", "what": "loss", "value": "inf"},
    *({"stage": stage, "tuning": "full", "precision": "bf16"} for stage in (0, 3)),
    *({"stage": stage, "tuning": "lora", "precision": "bf16"} for stage in (2, 3)),
    # Skipped until there are too many in a row.
    {"stage": 0, "tuning": "lora", "precision": "fp16"},
]

TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
WHOLE_MODEL = {*TOKENIZER, "config.json", "generation_config.json", "model.safetensors"}
ADAPTER_FOLDER = {*TOKENIZER, "adapter_config.json", "adapter_model.safetensors"}


def name(stage: int | str, tuning: str, objective: str) -> str:
    return f"{objective}-zero{stage}-{tuning}"


def whole(tuning: str) -> str:
    """Where nothing is split, nothing is offloaded."""
    return tuning.removesuffix("-offload")


def described(
    model: Path, stage: int, tuning: str, objective: str, precision: str = "fp32", **more: Any
) -> dict[str, Any]:
    # Time for too many overflows in a row.
    epochs = 2 if precision == "fp16" else 1
    tuned, offload, _ = tuning.partition("-offload")
    merged, given = tuned.endswith("merged"), tuned.startswith("given")
    config = config_for(
        model,
        model={
            "tuning": "lora" if merged or given else tuned,
            "precision": precision,
            "adapter": str(model.with_name("adapter")) if given else None,
        },
        lora={"rounds": "new" if merged else "carry"},
        learner={**SETTINGS, "epochs": epochs},
        objective={"name": objective},
    )
    return {
        "name": name(stage, tuning, objective),
        "stage": stage,
        "offload": bool(offload),
        "config": config.model_dump(mode="json"),
        "table": "labels.parquet" if objective == "kto" else "pairs.parquet",
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_small_model(folder / "model", tied=True)
    save_adapter(folder / "model", folder / "adapter")
    make_pairs(13).write_parquet(folder / "pairs.parquet")
    data_for({"name": "kto"}, 13).write_parquet(folder / "labels.parquet")
    return folder


def save_adapter(model: Path, folder: Path) -> None:
    """A random one, that changes what the model says."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(str(folder))


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Any]:
    """What the ranks found: DPO stopped once, in the middle of round 2, other objectives through;
    and with NaN or infinity in one rank's loss or gradient at round 1's second step."""
    model = folder / "model"
    cases = [described(model, *case, stop_at=[2, 2]) for case in DPO]
    cases += [described(model, *case) for case in OTHERS]
    for stage, tuning in SPLIT:
        case = described(model, stage, tuning, "dpo")
        cases.append(case | {"name": f"through-zero{stage}-{tuning}"})
    for number, broken in enumerate(BROKEN):
        how = {"what": "gradient", "value": "nan", "precision": "fp32", **broken}
        case = described(model, objective="dpo", **how, broken_at=[1, 1])
        cases.append(case | {"name": f"broken-{number}"})
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("ranks_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={RANKS}", str(worker), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "compiled")},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert not (folder / "compiled").exists(), "no rank waits for a compiler"
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(folder: Path, one_thread: None) -> dict[str, Any]:
    """The same in this process, never stopped."""
    found = {}
    for tuning, objective in sorted({(whole(t), o) for _, t, o in (*DPO, *OTHERS)}):
        case = described(folder / "model", 0, tuning, objective)
        case["name"] = name("alone", tuning, objective)
        found[case["name"]] = Case(folder, case, ALONE).run()
    return found


@pytest.mark.parametrize(("stage", "tuning", "objective"), [*DPO, *OTHERS])
def test_ranks_train_as_one_process_does(
    folder: Path,
    together: dict[str, Any],
    alone: dict[str, Any],
    stage: int,
    tuning: str,
    objective: str,
) -> None:
    here, there = name(stage, tuning, objective), name("alone", whole(tuning), objective)
    found, expected = together[here], alone[there]
    assert "errors" not in found, found
    assert found["everywhere"] == [found["losses"]] * RANKS
    # Packed rows and the chunked head, found to be possible in shares as in whole models.
    assert found["ways"] == expected["ways"] and "Tail" in found["ways"]
    # What Transformers loads next, a generator's model say, it must not split.
    assert not found["splits_others"]
    for losses, others in zip(found["losses"], expected["losses"], strict=True):
        assert losses == pytest.approx(others, abs=1e-5)
    # AdamW's steps and clipping hide a gradient that is too large by a factor.
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    for logps, others in zip(found["reference"], expected["reference"], strict=True):
        assert logps == (others if others is None else pytest.approx(others, abs=1e-4))
    for kind in ("policy", "merged"):
        for index in (1, 2):
            own = weights(folder / here / f"{kind}-{index}")
            other = weights(folder / there / f"{kind}-{index}")
            assert own.keys() == other.keys()
            for key, weight in own.items():
                torch.testing.assert_close(weight, other[key], rtol=0, atol=2e-4)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_full_weights_of_all_ranks_are_one_folder_that_transformers_loads(
    folder: Path, together: dict[str, Any], stage: int
) -> None:
    """Exactly the gathered weights; which are those of one process, as tested above."""
    out = folder / name(stage, "full", "dpo")
    gathered = weights(out / "gathered-2")
    start = load_file(folder / "model" / "model.safetensors")
    for kind in ("policy", "merged"):
        exported = out / f"{kind}-2"
        assert written(exported) == {*WHOLE_MODEL, *({"README.md"} if kind == "policy" else ())}
        model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
        assert model.dtype == torch.float32
        held = dict(model.named_parameters())
        assert held.keys() == gathered.keys()
        assert all(torch.equal(held[key], gathered[key]) for key in held)
        assert any(not torch.equal(held[key], start[key]) for key in held)
        # Tied in the start, tied in what is loaded.
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_of_all_ranks_is_one_folder_that_peft_loads_and_merges_to_the_other(
    folder: Path, together: dict[str, Any], stage: int
) -> None:
    out = folder / name(stage, "lora", "dpo")
    gathered = weights(out / "gathered-2")
    assert written(out / "policy-2") == {*ADAPTER_FOLDER, "README.md"}
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapted: Any = PeftModel.from_pretrained(base, str(out / "policy-2"))
    held = {key: weight for key, weight in adapted.named_parameters() if "lora_" in key}
    assert held.keys() == gathered.keys()
    assert all(torch.equal(held[key], gathered[key]) for key in held)

    assert written(out / "merged-2") == WHOLE_MODEL
    merged = AutoModelForCausalLM.from_pretrained(out / "merged-2", dtype="auto")
    expected = dict(adapted.merge_and_unload().named_parameters())
    found = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-6)


def written(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_rank_0_can_not_write_is_gathered_to_the_end(
    together: dict[str, Any], tuning: str
) -> None:
    """The others would wait for it in the next gather."""
    assert together[f"through-zero3-{tuning}"]["full_disk"] == [["the disk is full"] * 2, []]


@pytest.mark.parametrize(("stage", "tuning"), SPLIT)
def test_stopped_and_resumed_is_to_the_bit_what_was_never_stopped(
    folder: Path, together: dict[str, Any], stage: int, tuning: str
) -> None:
    stopped, through = name(stage, tuning, "dpo"), f"through-zero{stage}-{tuning}"
    assert together[stopped]["losses"] == together[through]["losses"]
    own, other = weights(folder / stopped / "policy-2"), weights(folder / through / "policy-2")
    assert own.keys() == other.keys() and own
    assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize(
    "number", range(len(BROKEN)), ids=lambda i: "-".join(map(str, BROKEN[i].values()))
)
def test_what_is_not_finite_in_one_rank_stops_all_and_reaches_no_weight(
    folder: Path, together: dict[str, Any], number: int
) -> None:
    errors = together[f"broken-{number}"]["errors"]
    assert len(errors) == RANKS and len(set(errors)) == 1
    if BROKEN[number].get("precision") == "fp16":
        assert "fp16 overflows in a row" in errors[0]
    else:
        assert errors[0].startswith("step 2: loss ") and "not touched" in errors[0]
    if BROKEN[number].get("what") == "loss":
        assert errors[0].startswith(f"step 2: loss {BROKEN[number].get('value', 'nan')},")
    out = folder / f"broken-{number}"
    first = min((out / "trainer-1/checkpoints").iterdir())
    before = weights(first / "trained")
    after = weights(out / "after")
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(weight.isfinite().all() for weight in after.values())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_zero_3_gathers_the_head_once_a_pass(together: dict[str, Any], tuning: str) -> None:
    """However many chunks of hidden states go through it: the loop is within its forward."""
    counted = together[f"through-zero3-{tuning}"]["head"]
    assert counted["chunks"] > 3 * counted["passes"] > 0
    # Once more where a gradient passes back through it.
    assert counted["passes"] <= counted["gathers"] <= 2 * counted["passes"]


@pytest.mark.parametrize(("stage", "tuning"), [case[:2] for case in DPO])
def test_a_checkpoint_of_other_ranks_is_refused(
    folder: Path, together: dict[str, Any], one_thread: None, stage: int, tuning: str
) -> None:
    case = described(folder / "model", 0, tuning, "dpo") | {"name": name(stage, tuning, "dpo")}
    trial = Case(folder, case, ALONE)
    with pytest.raises(InputError, match=r"was written by 2 ranks \(.*\), and 1 \(repl"):
        trial.train(1)
