"""What README and the configs tell people to run, runs: each command as it is printed there.

Where that would take minutes, a GPU or a network, a flag makes it say what it would do (`SHORT`).
"""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import polars as pl
import pytest
import report_runs
import torch

import launch
from launch.cli import main
from launch.doctor import probes
from launch.doctor.facts import Told
from rlhf import RunConfig, config_io, load_config
from rlhf.config_offline import OfflineConfig
from rollout.judges.cache import FILE, Entry, VerdictCache

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/*.yaml")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = '{"prompt": "Is %s open?", "reference": "Yes.", "cluster": "%s"}\n'
COMMAND = re.compile(r"^(?:git|make|pairloop|pip|python) .+$", re.M)


def blocks(language: str) -> list[str]:
    """Fenced pieces of README in a language; "" for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
    return [piece for named, piece in fenced if named == language]


def commands(text: str) -> list[str]:
    """The commands in a piece of README, without their comments, each on one line."""
    joined = re.sub(r" *\\\n *", " ", text)
    return [line.split("  #")[0].strip() for line in COMMAND.findall(joined)]


def told() -> list[list[str]]:
    """README's commands: those of a block together, in order, and those in the text each alone."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
    alone = [c for span in spans for c in commands(span)]
    together = [commands(b) for lang in ("sh", "") for b in blocks(lang)]
    return [*filter(None, together), *([c] for c in dict.fromkeys(alone))]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_config_opens_with_hardware_time_and_a_command_that_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header)
    assert "Hardware:" in text
    assert "Time:" in text
    monkeypatch.chdir(tmp_path)
    if path.parent.name == "dstc9" and "PAIRLOOP_DATA" not in os.environ:
        pytest.skip("PAIRLOOP_DATA is unset: it names the folder that holds dstc9_support/")
    # Commands name files by a path from the checkout.
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for line in (line for line in header if line.startswith("python ")):
        prepare = [sys.executable, *shlex.split(line)[1:]]
        subprocess.run(
            prepare, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    for line in (line for line in header if line.startswith("pairloop init ")):
        printed, arrow, target = shlex.split(line)[2:]
        assert (printed, arrow) == (path.stem, ">")
        (tmp_path / target).write_text(path.read_text())
    commands = [shlex.split(line)[1:] for line in header if line.startswith("pairloop train ")]
    assert (tmp_path / commands[-1][1]).read_text() == path.read_text()
    # Where the run needs a GPU, a dry run for that machine stands before it.
    planned = next((c[2:] for c in commands if "--dry-run" in c), ["--dry-run"])
    for command in commands:
        assert main([*command, *(planned if "--dry-run" not in command else [])]) == 0


SHORT = {
    "pairloop train": "--dry-run",
    "pairloop demo": "--dry-run",
    "pairloop submit": "--dry-run",
    "python": "--help",
}
"""What is added to commands that begin so. Whole runs: tests/test_demo.py and test_kill.py;
benchmarks take minutes to hours."""

NOT_RUN = {
    "git clone <this repository> pairloop && cd pairloop": "it has no address yet",
    "pip install -c constraints/gpu.txt '.[vllm,qlora,vllm-nf4]'": "gigabytes of CUDA",
}

SHOWS = {
    "make demo": "bin/pairloop demo",
    "make setup": "pip install -c constraints/",
    "make screenshots": "docs/screenshots.py runs/demo docs/images",
    "pairloop train run.yaml --dry-run": "path: HuggingFaceTB/SmolLM2-135M-Instruct",
    "pairloop train run.yaml": "train 1 (1 clusters",
    "pairloop train run.yaml more.yaml --rollout.temperature 0.8": "temperature: 0.8",
    "pairloop presets": "qwen2.5-7b-instruct-qlora-t4",
    "pairloop init qwen2.5-7b-instruct-qlora-t4 > run.yaml": "tuning: qlora",
    "pairloop train run.yaml --dry-run --machine 1xT4-16GB": "GPU        fits",
    "pairloop init llama-3.1-8b-instruct-lora-a100 > run.yaml": "tuning: lora",
    "pairloop train run.yaml --dry-run --cluster 4x8xH100-80GB --placement.zero 3": "colocated: "
    "32 learner ranks, ZeRO-3",
    "pairloop config": "samples_per_prompt",
    "pairloop demo --transformers": "engine: transformers",
    "pairloop judge calibrate --verdicts verdicts.jsonl --gold gold.jsonl": "refused",
    "pairloop judge calibrate run.yaml": "certificate: certificates/",
    "pairloop judge cache RUN": "org/reader",
    "pairloop judge audit RUN": "onlooker",
    "pairloop judge sample runs/demo": "sheet.html",
    "pairloop judge gold runs/demo/sheet kim.csv gold-lee.jsonl": "by kim, lee",
    "pairloop judge calibrate runs/demo/config.yaml --verdicts runs/demo/sheet/verdicts.jsonl "
    "--gold runs/demo/sheet/gold.jsonl": "within_prompt_accuracy",
    "pairloop pairs analyze train.jsonl test.jsonl": "identical",
    "pairloop pairs filter train.jsonl kept.jsonl --fallen fallen.jsonl": "kept.jsonl",
    "pairloop pairs convert kept.jsonl kto.parquet --to labels-chat": "kto.parquet",
    "pairloop pairs dedupe pool distinct.parquet --similarity 0.8": "2 stay in distinct.parquet",
    "pairloop pairs select runs/demo/config.yaml runs/demo/rounds/0001 again": "written to again",
    "pairloop report runs/demo": "runs/demo/report.html",
    "pairloop submit slurm run.yaml --nodes 2 --ranks-per-node 8 --dry-run": "ntasks-per-node=8",
    "pairloop submit slurm run.yaml --nodes 2 --ranks-per-node 8": "#SBATCH --nodes=2",
    "pairloop submit slurm --sweep run.yaml --objective.beta 0.05,0.1,0.2,0.5": "--point",
    "pairloop submit ray run.yaml --address http://HEAD:8265": "-- pairloop train run.yaml",
    "pairloop doctor": "checks: ",
    "pairloop doctor run.yaml": "checks: ",
    "pairloop dpo run.yaml": "runs/offline/stats.json",
    "pairloop dpo run.yaml --dry-run": "steps      at most ",
    "pairloop sweep run.yaml --objective.beta 0.05,0.1,0.2,0.5": "runs/offline/sweep.html",
    "pairloop import-adapter OLD NEW": "2 tensors: NEW",
    "python benchmarks/dpo_step.py": "--sizes",
    "python benchmarks/head_memory.py": "--case",
    "python benchmarks/memory.py": "--case",
    "python benchmarks/zero_memory.py": "--cases",
    "python benchmarks/publish.py": "--versions",
    "python benchmarks/pipeline.py": "--prompts",
    "python benchmarks/selection.py": "--contestants",
    "python benchmarks/duplicates.py": "--threshold",
}
"""Each command of README, and words of what it prints."""


def jsonl(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def own_run(folder: Path) -> None:
    """The tour's files, as README shows them."""
    (folder / "run.yaml").write_text(blocks("yaml")[0])
    (folder / "more.yaml").write_text("rounds: {count: 1}\n")
    (folder / "my_checks.py").write_text(blocks("python")[0] + "\n\noverlap = verify\n")
    for split in ("train", "gate", "final"):
        (folder / f"{split}.jsonl").write_text(RECORD % (split, split))


def on_ray(folder: Path) -> None:
    """As `own_run`, for a job of a Ray cluster."""
    own_run(folder)
    with (folder / "run.yaml").open("a") as file:
        file.write("placement: {kind: ray}\nrun: {directory: /shared/runs}\n")


def judged(folder: Path) -> None:
    """Verdicts, gold labels, and a config that names both."""
    own_run(folder)
    named = "calibration: {verdicts: verdicts.jsonl, gold: gold.jsonl}\n"
    (folder / "run.yaml").write_text(blocks("yaml")[0] + named)
    items = [{"item_id": f"q{i // 2}-{i % 2}", "dimension": "style"} for i in range(80)]
    said = {"judge": "kim", "score": 0.5}
    jsonl(
        folder / "verdicts.jsonl",
        *({**item, **said, "prompt_id": item["item_id"].split("-")[0]} for item in items),
    )
    jsonl(folder / "gold.jsonl", *({**item, "score": i % 2} for i, item in enumerate(items)))


def paired(folder: Path) -> None:
    """Two preference files, in the first of which one pair of 30 teaches nothing; and a pool."""
    rows = [{"prompt": f"Q{i}?", "chosen": f"Answer {i}.", "rejected": "No."} for i in range(31)]
    jsonl(folder / "train.jsonl", *rows[:29], {**rows[29], "chosen": "No."})
    jsonl(folder / "test.jsonl", rows[30])
    (folder / "pool").mkdir()
    asked = ["When do you open?", "when do you  open?", "Where are you?"]
    pl.DataFrame({"prompt": asked}).write_parquet(folder / "pool/prompts.parquet")


def filed(folder: Path) -> None:
    """A preference file, and README's config for it on a model that is small (`tiny`)."""
    (config,) = (piece for piece in blocks("yaml") if "\ndata:" in piece)
    (folder / "run.yaml").write_text(re.sub(r"path: package:[^,]+", "path: tiny", config))
    rows = [{"prompt": f"Is {i} open?", "chosen": "Yes.", "rejected": "No."} for i in range(20)]
    jsonl(folder / "pairs.jsonl", *rows)


def swept(folder: Path) -> None:
    """As `filed`, with less to do for each point."""
    filed(folder)
    config = (folder / "run.yaml").read_text()
    quick = config.replace("precision: bf16", "precision: fp32").replace("epochs: 3", "epochs: 1")
    assert quick.count("fp32") == quick.count("epochs: 1") == 1
    (folder / "run.yaml").write_text(quick)


def adapted(folder: Path) -> None:
    """`OLD`, an adapter of one layer as PEFT used to save it."""
    (folder / "OLD").mkdir()
    described = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "OLD/adapter_config.json").write_text(json.dumps(described))
    halves = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    weights = {f"base_model.model.q_proj.lora_{h}.weight": t for h, t in halves.items()}
    torch.save(weights, folder / "OLD/adapter_model.bin")


def ran(folder: Path) -> None:
    """`runs/demo`, finished, under the name `RUN` too, with a kept verdict."""
    own_run(folder)
    config = report_runs.make_config(folder / "runs", run={"name": "demo"})
    done = report_runs.Runs(config, [0.5, 0.6, 0.7]).finish()
    kept = VerdictCache()
    kept.open(done / "judges" / FILE)
    kept.keep([Entry("key", "reader", "org/reader", {"score": 0.5})])
    kept.close()
    (folder / "RUN").symlink_to(done)


def audited(folder: Path) -> None:
    """`RUN`, whose audit judge was asked about a round's pairs."""
    runs = report_runs.Runs(report_runs.make_config(folder / "runs"), [0.5, 0.6])
    runs.start()
    runs.sample(1)
    runs.select(1)
    round = runs.store.round(1)
    round.table("audit/pairs", lambda: round.stored_table("pairs"))
    said = {"judge": "onlooker", "dimension": "words", "value": 0.8, "low": 0.6, "high": 0.9}
    counted = {"preferred": 4, "equal": 0, "against": 1, "abstained": 0, "verdict": "agrees"}
    record = {"pairs": 5, "judges": [{**said, **counted}], "inverted": ""}
    round.record("audit", lambda: record)
    (folder / "RUN").symlink_to(runs.close())


def handed_in(folder: Path) -> None:
    """Two people's labels of the first pairs of `runs/demo`'s sheet, as CSV and as the page saves
    them."""
    with (folder / "runs/demo/sheet/sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))[:20]
    with (folder / "kim.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "style": "a", "annotator": "kim"} for row in rows)
    said = {"dimension": "style", "winner": "b", "annotator": "lee"}
    jsonl(folder / "gold-lee.jsonl", *({"item_id": row["item_id"], **said} for row in rows))


BEFORE = {"pairloop judge gold": handed_in}
"""What happens between two commands of a block."""

PLACES: dict[str, Callable[[Path], None]] = {
    "pairloop judge calibrate": judged,
    "pairloop judge audit": audited,
    "pairloop judge cache": ran,
    "pairloop judge sample": ran,
    "pairloop pairs select": ran,
    "pairloop pairs": paired,
    "pairloop dpo": filed,
    "pairloop sweep": swept,
    "pairloop submit slurm --sweep": swept,
    "pairloop submit ray": on_ray,
    "pairloop import-adapter": adapted,
    "pairloop report": ran,
}
"""What makes the files that commands name, where it is not `own_run`."""


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints; in this process, so that its imports are paid once."""
    given, _, target = command.partition(" > ")
    program, *words = shlex.split(given)
    added = next((flag for start, flag in SHORT.items() if given.startswith(start)), None)
    words += [added] if added is not None and added not in words else []
    if program == "make":
        told = subprocess.run(
            ["make", "-B", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return told.stdout
    if program == "python":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="^0$"):
            patch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return capsys.readouterr().out
    assert program == "pairloop", f"no test knows how to run {command}"
    # The doctor says 1 where this machine lacks something.
    assert main(words) in ((0, 1) if words[0] == "doctor" else (0,))
    shown = capsys.readouterr().out
    if target:
        Path(target).write_text(shown)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("together", told(), ids=lambda together: together[0])
def test_the_commands_of_the_readme_run(
    together: list[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model)
    monkeypatch.setattr(probes, "ask_child", ask_child)
    make = next((PLACES[start] for start in PLACES if together[0].startswith(start)), own_run)
    make(tmp_path)
    for command in together:
        if command in NOT_RUN:
            continue
        assert command in SHOWS, f"README tells people to run a new command: {command}"
        for start, happens in BEFORE.items():
            if command.startswith(start):
                happens(tmp_path)
        assert SHOWS[command] in run(command, capsys)


def ask_child(topic: str, seconds: float = 0) -> Told:
    """What the doctor's children answer is asked in tests/test_doctor_probes.py: it takes long."""
    return Told(error="not asked here")


def test_nothing_is_expected_that_the_readme_no_longer_tells() -> None:
    assert {c for together in told() for c in together} == set(SHOWS) | set(NOT_RUN)


def test_what_the_commands_on_pairs_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paired(tmp_path)
    (together,) = (block for block in told() if "pairs analyze" in block[0])
    for command in together:
        run(command, capsys)
    assert [len(Path(f"{n}.jsonl").read_text().splitlines()) for n in ("kept", "fallen")] == [29, 1]
    assert pl.read_parquet("kto.parquet")["label"].to_list() == [True, False] * 29


def test_extras_that_the_readme_names_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"(?:pairloop|'\.)\[([\w,-]+)\]", README)
    assert named
    assert {e for some in named for e in some.split(",")} <= set(extras["optional-dependencies"])


@pytest.mark.parametrize("index", range(len(blocks("yaml"))))
def test_every_piece_of_yaml_is_a_config(index: int, tmp_path: Path) -> None:
    """Alone, or merged into the tour's; one that begins in the middle of a list goes on there."""
    piece = blocks("yaml")[index]
    if "\ndata:" in piece:
        (tmp_path / "offline.yaml").write_text(piece)
        assert config_io.load_as(OfflineConfig, [tmp_path / "offline.yaml"]).data.path
        return
    text = f"judges:\n  panel:\n{piece}" if piece.startswith("    - ") else piece
    (tmp_path / "tour.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "piece.yaml").write_text(text)
    loaded = config_io.load([tmp_path / "tour.yaml", tmp_path / "piece.yaml"])
    assert loaded.judges.panel


def test_the_verifier_of_the_tour_scores() -> None:
    from rlhf.types import Completion, Prompt

    scope: dict[str, object] = {}
    exec(blocks("python")[0], scope)
    prompt = Prompt("p", ({"role": "user", "content": "Open?"},), reference="Yes")
    said = Completion("p", 0, "yes, it is", (1,), (1,), (0.0,), "stop", 0)
    verify = scope["verify"]
    assert callable(verify)
    assert verify(prompt, said) == {"correctness": 1.0, "style": 1.0}


@pytest.mark.slow
def test_the_lines_of_python_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed, on a preset that is small: what its comment promises is there."""
    small = fakes.run_values(tmp_path, tiny_model)
    small["rollout"]["max_new_tokens"] = 4

    def preset(name: str, settings: dict[str, Any]) -> RunConfig:
        assert launch_preset(name, settings).rounds.count == 1
        return load_config(settings={**small, **settings})

    launch_preset = launch.preset
    monkeypatch.setattr(launch, "preset", preset)
    scope: dict[str, Any] = {}
    exec(blocks("python")[1], scope)
    run = scope["run"]
    assert set(run.change["dimension"]) >= {"reward", "correctness"}
    assert run.pairs(1).height > 0
    assert (run.policy / "adapter_model.safetensors").is_file()


def test_the_examples_tell_the_commands_of_their_configs() -> None:
    for config in ROOT.glob("examples/*/*.yaml"):
        header = "\n".join(line.lstrip("# ") for line in config.read_text().splitlines())
        readme = (config.parent / "README.md").read_text()
        assert commands(readme)
        assert set(commands(readme)) <= set(commands(header))


def test_files_that_the_readme_names_are_there() -> None:
    rooms = "benchmarks|configs|examples|constraints|rollout|rlhf|launch|slurm"
    named = set(re.findall(rf"`((?:{rooms})/[\w./-]+)`", README))
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []
