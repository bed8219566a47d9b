"""From Python: names that load late, configs from plain values, a run as tables, a real kernel."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fakes import run_values

import launch
import rlhf
from rlhf import InputError, RunConfig, RunResults, load_config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

SETTINGS = {
    "model": {"path": "org/model"},
    "prompts": {split: {"path": f"{split}.jsonl"} for split in ("train", "gate", "final")},
    "judges.panel": [{"name": "j", "function": "a:b", "dimensions": ["correctness"]}],
}


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import rlhf, launch, sys; "
        "print({'torch', 'polars', 'pydantic', 'yaml', 'transformers'} & set(sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout == "set()\n"


@pytest.mark.parametrize("module", [rlhf, launch], ids=["rlhf", "launch"])
def test_every_public_name_is_there_and_documented(module: Any) -> None:
    for name in module.__all__:
        assert getattr(module, name).__doc__
        assert f"`{module.__name__}.{name}" in API or f"`{name}`" in API, name
        assert name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = module.trian


def test_a_config_from_plain_values(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rounds: {count: 5}\nrun: {name: '7'}\n")
    settings = {
        **SETTINGS,
        "rounds.count": 1,
        "learner.learning_rate": 5e-06,
        "tracking.plain": True,
        "model.revision": None,
        "run.directory": tmp_path,
    }
    config = load_config(file, settings=settings)
    assert (config.rounds.count, config.run.name) == (1, "7")
    assert config.learner.learning_rate == 5e-06
    assert config.tracking.plain is True
    assert config.run.directory == str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollout.temprature": 1.0}, "did you mean temperature?"),
        ({"rollout.temperature": "hot"}, "rollout.temperature must be a number"),
        ({"rollout.temperature": float("nan")}, "got float nan"),
        ({"rounds.count": object}, "rounds.count must be text, a number"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="(?s)" + words.replace("?", r"\?")):
        load_config(settings={**SETTINGS, **settings})


def test_a_preset_takes_settings() -> None:
    config = launch.preset("demo_transformers", {"rounds.count": 1})
    assert (config.run.name, config.rounds.count) == ("demo-transformers", 1)


SHORT: dict[str, dict[str, Any]] = {
    "rollout": {"max_new_tokens": 4},
    "rounds": {"count": 1},
    "evaluation": {"kl_prompts": 2, "greedy_prompts": 2, "bootstrap": 200},
}


def short(folder: Path, model: Path, verifier: str = "vowels", **sections: Any) -> RunConfig:
    values = run_values(folder, model, verifier)
    for name, section in (*SHORT.items(), *sections.items()):
        values[name] = {**values[name], **section}
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    """A run that was started where an event loop is running, as in a notebook."""
    config = short(tmp_path_factory.mktemp("run"), tiny_model)

    async def cell() -> RunResults:
        return launch.train(config)

    return asyncio.run(cell())


def test_a_run_is_a_result(finished: RunResults) -> None:
    assert (finished.state, finished.best_round, finished.promoted) == ("done", 1, (1,))
    assert finished.policy is not None
    assert (finished.policy / "adapter_model.safetensors").is_file()
    assert "best round 1" in repr(finished)
    assert finished._repr_markdown_() == (finished.folder / "summary.md").read_text()


def test_its_tables_are_what_is_stored(finished: RunResults) -> None:
    stored = json.loads((finished.folder / "final/evaluation.json").read_text())
    claim = {row["dimension"]: row for row in finished.change.iter_rows(named=True)}
    assert set(claim) == {"reward", "correctness", "style", "audit.words"}
    for name, row in claim.items():
        assert row["difference"] == stored["change"][name]["difference"]
        assert row["difference"] == pytest.approx(row["best"] - row["start"])
    assert finished.scores.select("round").unique().sort("round")["round"].to_list() == [0, 1]
    first = finished.folder / "rounds/0001"
    assert finished.pairs(1).equals(pl.read_parquet(first / "pairs.parquet"))
    assert finished.completions(1).height == 6 * 4
    assert finished.judged(1).height == 6 * 4 * 2
    assert finished.funnel(1)["step"][0] == "generated"


@pytest.mark.parametrize(("round", "words"), [(0, "has no pairs"), (2, r"begun \(0, 1\), got 2")])
def test_what_is_not_there_is_said(finished: RunResults, round: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        finished.pairs(round)


@pytest.mark.slow
def test_a_run_without_a_promoted_round_is_a_result_too(tiny_model: Path, tmp_path: Path) -> None:
    config = short(tmp_path, tiny_model, "worse_by_version", gates={"max_drop": 0.0})
    failed = launch.train(config)
    assert (failed.state, failed.best_round, failed.policy) == ("failed", None, None)
    assert failed.change.is_empty()
    assert "no round could be promoted" in failed.reason


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        RunResults(tmp_path)


SMALL = {
    "model.precision": "fp32",
    "rollout.top_p": 1.0,
    "prompts.gate.limit": 4,
    "prompts.final.limit": 4,
    "rounds.count": 1,
    "rounds.prompts_per_round": 8,
    "rollout.max_new_tokens": 20,
    "rollout.samples_per_prompt": 4,
    "rollout.parity_completions": 4,
    "evaluation.kl_prompts": 2,
    "evaluation.greedy_prompts": 2,
    "selection.floors": {},
    "selection.allow_truncated_chosen": True,
    # A random model's answers hardly differ.
    "selection.min_margin": 0,
    "selection.cold_start.min_passing_share": 0,
    "selection.cold_start.min_spread": 0,
    "gates.max_drop": 1.0,
}

VERIFIER = """
def verify(prompt, completion):
    return {"correctness": float(len(completion.text) % 10) / 10}

judge = {"name": "mine", "function": "__main__:verify", "dimensions": ["correctness"]}
settings |= {"run.name": "mine", "judges": {"panel": [judge], "audit": []}}
train(preset("demo_transformers", settings)).scores["dimension"].unique().sort().to_list()
"""


@pytest.mark.engine
def test_the_notebook_runs_in_a_real_kernel(tmp_path: Path, tiny_model: Path) -> None:
    """As it stands but for its size; then a judge that is a function of the notebook itself."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert '{"rounds.count": 1}' in cells[0].source
    cells[0].source = cells[0].source.replace(
        '{"rounds.count": 1}', repr(SMALL | {"model.path": str(tiny_model)})
    )
    notebook.cells.append(nbformat.v4.new_code_cell(VERIFIER))
    client = NotebookClient(notebook, timeout=1000, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    ]
    said = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    assert "parity holds" in said
    assert "IProgress" not in said
    assert any("final split" in data.get("text/markdown", "") for data in shown)
    assert any("difference" in data.get("text/html", "") for data in shown)
    assert shown[-1]["text/plain"] == "['correctness', 'reward']"
    assert (tmp_path / "runs/demo-transformers/rounds/0001/policy").is_dir()


def test_the_notebook_takes_ten_lines_and_holds_no_output() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line for text in code for line in text.splitlines() if line.strip()]
    assert len(lines) == 10
    assert all(not cell.get("outputs") for cell in cells)
