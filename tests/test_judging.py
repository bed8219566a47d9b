"""Model judges in a run: certified or stamped, within their budget, asleep while training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import polars as pl
import pytest
import yaml
from fakes import run_values
from scripted_server import Reply, Request, ScriptedServer, chat

from launch.judging import Judging, Sharing, _Asked, _trained_uncertified
from launch.local import rehearse, train
from rlhf.calibration import Use, calibrate
from rlhf.certificates import write_certificate
from rlhf.config import RunConfig
from rlhf.errors import InputError, Interrupted
from rlhf.files import write_json
from rlhf.judgements import read_both
from rlhf.types import Completion, Prompt, Score, scores_table
from rlhf.verdict import STANDINGS, uncertified_judges
from rollout.judges.cache import FILE, Chosen, open_existing
from rollout.judges.identity import identity
from rollout.judges.llm import LlmJudge
from rollout.judges.panel import InProcess


def grade(text: str) -> int:
    """What the scripted judge thinks of an answer."""
    return 1 + crc32(text.encode()) % 5


def script(request: Request) -> Reply:
    found = re.findall(r" answer>>>\n(.*?)\n<<<", request.body["messages"][1]["content"], re.S)
    return chat(json.dumps({"reason": "so", "grade": grade(found[-1])}))


def values_of(folder: Path, model: Path, url: str, **settings: Any) -> dict[str, Any]:
    """A verifier for correctness, the scripted judge for style."""
    values = run_values(folder, model, rounds={"count": 1})
    (rules,) = values["judges"]["panel"]
    traffic = {"api_key_env": None, "max_retries": 0, **settings.pop("traffic", {})}
    reader = {
        "kind": "llm",
        "name": "reader",
        "dimensions": ["style"],
        "backend": "openai",
        "model": "judge",
        "base_url": url,
        "grade": "argmax",
        "traffic": traffic,
    }
    values["judges"]["panel"] = [{**rules, "dimensions": ["correctness"]}, reader]
    values["judges"]["uncertified"] = "allow"
    values["calibration"] = {"registry": str(folder / "certificates")}
    for name, section in settings.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_without_a_certificate_nothing_is_begun(tiny_model: Path, tmp_path: Path) -> None:
    with ScriptedServer(script) as server:
        values = values_of(tmp_path, tiny_model, server.base_url, judges={"uncertified": "refuse"})
        for begin in (train, rehearse):
            with pytest.raises(InputError, match="reader on style: missing") as caught:
                begin(config(values))
            assert "pairloop judge calibrate" in str(caught.value)
    assert server.requests == [] and not (tmp_path / "runs").exists()


def test_a_certificate_that_came_later_is_not_about_what_was_trained(tmp_path: Path) -> None:
    folder = tmp_path / "judges"
    folder.mkdir()
    assert _trained_uncertified(folder) == set()
    entry = {"judge": "reader", "dimension": "style", "granted": False}
    write_json(folder / STANDINGS, {"standings": [entry]})
    assert _trained_uncertified(folder) == set(), "it has trained nothing"
    (tmp_path / "rounds/0001/policy").mkdir(parents=True)
    assert _trained_uncertified(folder) == {("reader", "style")}
    later = {**entry, "granted": True, "trained_uncertified": True}
    write_json(folder / STANDINGS, {"standings": [later]})
    assert _trained_uncertified(folder) == {("reader", "style")}


def test_functions_are_asked_by_the_loop_and_not_beside_it() -> None:
    """A user's function may need the main thread."""
    done: Future[list[Score]] = Future()
    done.set_result([])
    plain: Any = SimpleNamespace(name="rules")
    model: Any = SimpleNamespace(name="reader")
    assert _Asked([model], [], {"reader": done}).ready
    assert not _Asked([plain, model], [], {"reader": done}).ready
    assert not _Asked([model], [], {"reader": Future()}).ready


@pytest.mark.slow
def test_an_uncertified_run_trains_on_its_verdicts_and_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(script) as server:
        values = values_of(tmp_path, tiny_model, server.base_url)
        assert train(config(values)) == 0
    run = tmp_path / "runs/trial"
    log = " ".join(capsys.readouterr().out.split())
    assert "UNCERTIFIED: reader trains style without a certificate (missing" in log
    assert "judge reader: at most " in log and "calls so far" in log
    assert "**Uncertified judges**: reader trained this policy" in (run / "summary.md").read_text()
    (known,) = json.loads((run / "judges/identities.json").read_text())["identities"]
    assert (known["judge"], known["dimension"]) == ("reader", "style") and known["rubric_hash"]
    usage = json.loads((run / "judges/reader-usage.json").read_text())
    assert usage["calls"] == len(server.requests)
    assert usage["served"] == {"judge-2026-01 fp_7": len(server.requests)}

    scores = pl.read_parquet(run / "rounds/0001/scores/*.parquet").filter(judge="reader")
    texts = pl.read_parquet(run / "rounds/0001/completions/*.parquet")
    both = scores.join(texts, on=["prompt_id", "sample"], validate="1:1")
    assert both.height == texts.height == 24
    assert both["score"].to_list() == [(grade(t) - 1) / 4 for t in both["text"]]


@pytest.mark.slow
def test_a_spent_budget_stops_resumably_and_a_larger_one_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    with ScriptedServer(script) as server:
        values = values_of(tmp_path, tiny_model, server.base_url, traffic={"max_calls": 20})
        for _ in range(2):
            with pytest.raises(Interrupted, match="budget of 20 calls is spent") as caught:
                train(config(values))
        assert caught.value.exit_status == 75
        assert len(server.requests) == 20, "the second start had nothing to spend"
        run = tmp_path / "runs/trial"
        assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
        values["judges"]["panel"][1]["traffic"]["max_calls"] = 1000
        assert train(config(values)) == 0
    usage = json.loads((run / "judges/reader-usage.json").read_text())
    assert usage["calls"] == len(server.requests)


@pytest.mark.slow
def test_a_pairwise_judge_trains_too(tiny_model: Path, tmp_path: Path) -> None:
    def compare(request: Request) -> Reply:
        texts = re.findall(
            r"<<<\w+ answer [AB]>>>\n(.*?)\n<<<", request.body["messages"][1]["content"], re.S
        )
        first, second = map(grade, texts)
        winner = "tie" if first == second else "A" if first > second else "B"
        return chat(json.dumps({"reason": "so", "winner": winner}))

    with ScriptedServer(compare) as server:
        values = values_of(tmp_path, tiny_model, server.base_url)
        values["judges"]["panel"][1]["mode"] = "pairwise"
        told = rehearse(config(values))
        assert train(config(values)) == 0
    scores = pl.read_parquet(tmp_path / "runs/trial/rounds/0001/scores/*.parquet")
    means = scores.filter(judge="reader").group_by("prompt_id").agg(pl.col("score").mean())
    assert means["score"].to_list() == pytest.approx([0.5] * 6)
    most = re.search(r"judge reader: at most (\d+) calls to judge \(pairwise\)", told)
    # One more: the probe at the start. Equal answers cost none.
    assert most is not None and len(server.requests) <= int(most[1]) + 1


def write_gold(folder: Path) -> tuple[Path, Path]:
    """A judge that says what gold says, on two answers to each of 80 prompts."""
    items = [
        {"item_id": f"{p}-{n}", "dimension": "style", "score": (p % 4 + n) / 4, "prompt_id": f"{p}"}
        for p in range(80)
        for n in range(2)
    ]
    paths = folder / "verdicts.jsonl", folder / "gold.jsonl"
    lines = [{**item, "judge": "reader"} for item in items]
    paths[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    gold = [{k: v for k, v in item.items() if k != "prompt_id"} for item in items]
    paths[1].write_text("".join(json.dumps(line) + "\n" for line in gold))
    return paths


def test_a_certificate_for_just_this_judge_lets_it_train_unstamped(
    tiny_model: Path, tmp_path: Path
) -> None:
    with ScriptedServer(script) as server:
        values = values_of(tmp_path, tiny_model, server.base_url)
        (reader,) = (
            j for j in Judging(config(values), InProcess("cpu"))._panel if isinstance(j, LlmJudge)
        )
        made = config(values)
        verdicts, gold = read_both(*write_gold(tmp_path))
        findings = calibrate(verdicts, gold, made.calibration, lambda d: Use.of(made, d))
        registry = Path(made.calibration.registry)
        named = identity(reader, "style")
        assert named is not None
        assert named is not None
        write_certificate(registry, named, findings, "0" * 64, made.calibration, datetime.now(UTC))
        values["judges"]["uncertified"] = "refuse"
        judging, said = Judging(config(values), InProcess("cpu")), list[str]()
        assert judging.uncertified == []
        judging.open(tmp_path / "judges", said.append)
        assert said == []
        run: Any = SimpleNamespace(folder=tmp_path, config=config(values))
        assert uncertified_judges(run) == []
        values["judges"]["panel"][1]["rubrics"] = {"style": "helpfulness"}
        with pytest.raises(InputError, match="reader on style: mismatched: rubric_hash was"):
            Judging(config(values), InProcess("cpu"))


def test_suspicious_completions_are_counted_once_however_many_dimensions(
    tiny_model: Path, tmp_path: Path
) -> None:
    with ScriptedServer(script) as server:
        judging = Judging(
            config(values_of(tmp_path, tiny_model, server.base_url)), InProcess("cpu")
        )
        said: list[str] = []
        judging.open(tmp_path / "judges", said.append)
        said.clear()
        reason = "suspicious (it asks for a grade): so"
        rows = [
            Score("p", n, "reader", d, 0.5, (0.5,), 0.0, False, reason if n < 2 else "so")
            for n in range(20)
            for d in ("style", "wit")
        ]
        judging.check([scores_table(rows[:3]), scores_table(rows[3:])])
    assert said[0] == (
        "judge reader: 2 suspicious completions (it asks for a grade), scored as they stand"
    )
    assert said[1].startswith("judge reader: 1 calls so far")


def test_an_end_waits_for_no_slow_answer_and_keeps_those_that_came(
    tiny_model: Path, tmp_path: Path
) -> None:
    def slow(request: Request) -> Reply:
        reply = script(request)
        return replace(reply, delay=600.0) if "late" in str(request.body["messages"]) else reply

    prompt = Prompt("p", ({"role": "user", "content": "When?"},))
    answers = [
        Completion("p", n, f"{'late' if n else 'soon'} {n}", (1,), (1,), (0.0,), "stop", 0)
        for n in range(4)
    ]
    with ScriptedServer(slow) as server:
        values = values_of(tmp_path, tiny_model, server.base_url, traffic={"concurrency": 8})
        judging = Judging(config(values), InProcess("cpu"))
        judging.open(tmp_path / "judges", lambda _: None)
        asked = [judging.ask([(prompt, answer)], False) for answer in answers]
        end = time.monotonic() + 30
        while len(server.requests) < 5 or not asked[0].scores().height:
            assert time.monotonic() < end, "not all were asked"
            time.sleep(0.01)
        began = time.monotonic()
        judging.close()
        assert time.monotonic() - began < 20
    cache = open_existing(tmp_path / "judges" / FILE)
    assert [held.verdicts for held in cache.held(Chosen())] == [1]
    cache.close()


class Sleeper:
    """A serving, or judges, that notes who slept."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def at(self, version: int, policy: Path | None) -> Any: ...

    def sleep(self) -> None:
        self.log.append(f"{self.name} sleeps")

    def wake(self) -> None:
        self.log.append(f"{self.name} wakes")


def test_the_judges_sleep_with_the_generator_and_wake_when_asked() -> None:
    log: list[str] = []
    judges: Any = Sleeper("judges", log)
    sharing = Sharing(Sleeper("generator", log), judges)
    sharing.sleep()
    sharing.wake()
    assert log == ["generator sleeps", "judges sleeps", "generator wakes"]


@pytest.mark.engine
def test_a_round_with_policy_and_judge_in_vllm_from_the_command_line(
    smollm2: str, tiny_model: Path, tmp_path: Path
) -> None:
    reader = {
        "kind": "llm",
        "name": "reader",
        "dimensions": ["style"],
        "model": smollm2,
        "engine": {"max_length": 2048, "memory_gib": 0.5, "precision": "fp32"},
    }
    values = run_values(
        tmp_path,
        tiny_model,
        rollout={"engine": "vllm", "samples_per_prompt": 3, "max_new_tokens": 16, "top_p": 0.9},
        rounds={"count": 1},
        evaluation={"samples_per_prompt": 1, "kl_prompts": 1, "greedy_prompts": 1},
    )
    for source in values["prompts"].values():
        source["limit"] = 2
    (rules,) = values["judges"]["panel"]
    values["judges"] = {
        "panel": [{**rules, "dimensions": ["correctness"]}, reader],
        "uncertified": "allow",
        # A model this small abstains now and then.
        "max_abstention": 0.5,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "launch", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = " ".join(done.stdout.split())
    assert "UNCERTIFIED: reader trains style without a certificate" in told
    run = tmp_path / "runs/trial"
    assert "**Uncertified judges**: reader" in (run / "summary.md").read_text()
    scores = pl.read_parquet(run / "rounds/0001/scores/*.parquet").filter(judge="reader")
    graded = scores.filter(~pl.col("abstained"))
    assert scores.height == 6 and graded.height >= 3
    assert graded["score"].is_between(0, 1).all()
    assert all(graded["reason"].to_list())
    assert scores.filter("abstained")["score"].null_count() == 6 - graded.height
