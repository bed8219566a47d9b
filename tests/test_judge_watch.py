"""Runs whose judges are watched: asked anew each round, stopped where they drift, audited blind."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import polars as pl
import pytest
from fakes import run_values
from scripted_server import Reply, Request, ScriptedServer, chat
from test_llm_judge import answers_of, judge
from test_llm_judge import prefers as prefers_by

from launch.cli import main
from launch.local import rehearse, train
from rlhf.answers import Draw
from rlhf.canaries import SAID, GoldAnswer, Items, Watch, WatchedJudge
from rlhf.config import RunConfig
from rlhf.errors import DataGateError, InputError
from rlhf.rounds import Round, RunStore
from rlhf.selection_shards import Answered, Shard
from rlhf.types import Completion, Prompt, Score, completions_table, pairs_schema, scores_table
from rlhf.verdict import stamps
from rlhf.watch_stages import WatchStages
from rollout.judges.cache import Chosen, VerdictCache
from rollout.judges.canaries import ask_anew, read_gold
from rollout.prompts import prompt_table

ITEMS = 12
"""Two answers to each of the six training prompts."""


def grade(text: str) -> int:
    return 1 + crc32(text.encode()) % 5


class Reader:
    """A scripted judge that grades otherwise from its `drifts_after`th request on."""

    def __init__(self) -> None:
        self.asked = 0
        self.drifts_after = 10**9

    def __call__(self, request: Request) -> Reply:
        self.asked += 1
        found = re.findall(r" answer>>>\n(.*?)\n<<<", request.body["messages"][1]["content"], re.S)
        fair = grade(found[-1])
        given = fair if self.asked <= self.drifts_after else 6 - fair
        return chat(json.dumps({"reason": "so", "grade": given}))


def values_of(folder: Path, model: Path, url: str, name: str, **judges: Any) -> dict[str, Any]:
    """Two rounds with a verifier for correctness and the scripted judge for style."""
    short = {"max_new_tokens": 4, "top_p": 1.0}
    values = run_values(folder, model, rollout=short, evaluation={"greedy_prompts": 0})
    values["run"] = {"name": name, "directory": str(folder / "runs")}
    (rules,) = values["judges"]["panel"]
    traffic = {"api_key_env": None, "max_retries": 0, **judges.pop("traffic", {})}
    reader = {
        "kind": "llm", "name": "reader", "dimensions": ["style"], "backend": "openai",
        "model": "judge", "base_url": url, "grade": "argmax", "traffic": traffic,
    }  # fmt: skip
    values["judges"] |= {
        "panel": [{**rules, "dimensions": ["correctness"]}, reader],
        "uncertified": "allow",
        "cache": str(folder / "verdicts.sqlite"),
        **judges,
    }
    values["calibration"] = {"registry": str(folder / "certificates")}
    return values


def config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.slow
def test_a_judge_that_drifts_in_round_2_stops_the_run_before_it_trains(
    tiny_model: Path, tmp_path: Path
) -> None:
    reader = Reader()
    with ScriptedServer(reader) as server:
        values = values_of(tmp_path, tiny_model, server.base_url, "drifting")
        # It turns with the first canary of round 2: so many requests go before.
        probe, start, round_1 = 1, 6 * 2, 6 * 4 + 2 * ITEMS + 6 * 2
        reader.drifts_after = probe + start + round_1
        with pytest.raises(DataGateError, match=r"round 2: judges no longer score") as caught:
            train(config(values))
    assert "judge reader on style: scores of the same answers moved by" in str(caught.value)
    run = tmp_path / "runs/drifting"
    for index, baseline in ((1, None), (2, 1)):
        found = read(run / f"rounds/000{index}/canaries.json")
        assert (found["baseline"], found["answers"]) == (baseline, {"start": ITEMS, "gold": 0})
    assert (run / "rounds/0001/policy").exists()
    assert not (run / "rounds/0002/scores").exists()
    assert not (run / "rounds/0002/policy").exists()
    cache = VerdictCache()
    cache.open(tmp_path / "verdicts.sqlite")
    (held,) = cache.held(Chosen())
    # What is kept was asked once; the rest are the probe and every canary, twice in each round.
    assert reader.asked == 1 + held.verdicts + 2 * 2 * ITEMS
    text = (run / "summary.md").read_text()
    assert "Judges asked anew, 2 times, about the same answers (12 of start)" in text
    assert "reader on style" in text and "No canaries" not in text
    sources = read(run / "rounds/0001/selection.json")["noise"]["sources"]
    assert sources == {"correctness": "verifier", "style": "canaries"}


class Judges:
    """What stands behind a run's watch: a judge that scores by `score`, and counts its askings."""

    def __init__(self, score: Callable[[str], float]) -> None:
        self.score = score
        self.askings = 0
        self.fails_at: int | None = None
        self.watch = Watch(
            ask=self._ask,
            audit=self._audit,
            judges=[WatchedJudge("reader", "style", fixed=False, trains=True, certified=False)],
        )

    def _ask(self, items: Items) -> pl.DataFrame:
        self.askings += 1
        if self.askings == self.fails_at:
            raise KeyboardInterrupt
        rows = [
            (c.prompt_id, c.sample, None, None, "reader", "style", self.score(c.text), None)
            for _, c in items
        ]
        return pl.DataFrame(rows, schema=SAID, orient="row")

    def _audit(self, items: Items) -> pl.DataFrame:
        # It likes what the panel likes least.
        return scores_table(
            Score.of(c.prompt_id, c.sample, "onlooker", "words", 1 - self.score(c.text))
            for _, c in items
        )


class Watching(WatchStages):
    """A watch over a run whose every answer is drawn."""

    def generate(self, round: Round, draw: Draw) -> Any:
        return [DRAWN]


@contextmanager
def stages(
    folder: Path, judges: Judges, **selection: Any
) -> Iterator[tuple[WatchStages, list[str]]]:
    """The watch over a run of 12 prompts whose every other part is left out, and what it says."""
    values = run_values(folder, "org/model", judges={}, selection=selection)
    said: list[str] = []
    reporter = SimpleNamespace(say=said.append, stage=lambda _: None)
    quiet = SimpleNamespace(replay=lambda _: None, log=lambda *_: None, lost={})
    parts: Any = SimpleNamespace(
        watch=judges.watch, sample=lambda _: PROMPTS, prompt_table=prompt_table, reporter=reporter,
        trackers=quiet, interrupts=SimpleNamespace(check=lambda: None),
    )  # fmt: skip
    made = config(values)
    with RunStore.open(made) as store:
        yield Watching(made, store, parts), said


PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"Question {i}?"},)) for i in range(12)]
ANSWERS = [
    Completion(p.prompt_id, s, f"answer {s} to {p.prompt_id}", (s,), (1,), (0.0,), "stop", 0)
    for p in PROMPTS
    for s in range(3)
]
DRAWN = completions_table(ANSWERS)


def fair(text: str) -> float:
    return crc32(text.encode()) / 2**32


def test_a_round_that_was_asked_about_is_not_asked_about_again(tmp_path: Path) -> None:
    judges = Judges(fair)
    for askings in (2, 2):
        with stages(tmp_path, judges) as (do, _):
            do.watch_judges(do.store.round(1))
        assert judges.askings == askings
    with stages(tmp_path, judges) as (do, said):
        do.watch_judges(do.store.round(2))
        assert do.retest_sd(do.store.round(2)) == ({}, {"style": 0.0})
    assert judges.askings == 4 and said == []
    lines = [
        json.loads(x) for x in (tmp_path / "runs/trial/metrics.jsonl").read_text().split("\n") if x
    ]
    assert [(x["round"], x["stage"]) for x in lines] == [(1, "canaries"), (2, "canaries")]
    assert lines[1]["reader style moved"] == 0


def test_killed_between_two_askings_it_asks_the_second_alone(tmp_path: Path) -> None:
    judges = Judges(fair)
    judges.fails_at = 2
    with pytest.raises(KeyboardInterrupt), stages(tmp_path, judges) as (do, _):
        do.watch_judges(do.store.round(1))
    with stages(tmp_path, judges) as (do, _):
        do.watch_judges(do.store.round(1))
    assert judges.askings == 3


def test_once_the_judge_is_put_back_the_same_command_asks_again_and_goes_on(tmp_path: Path) -> None:
    judges = Judges(fair)
    with stages(tmp_path, judges) as (do, _):
        do.watch_judges(do.store.round(1))
        judges.score = lambda text: 1 - fair(text)
        for asked in (4, 6):
            with pytest.raises(DataGateError, match="round 2: judges no longer score as they did"):
                do.watch_judges(do.store.round(2))
            assert judges.askings == asked
        judges.score = fair
        do.watch_judges(do.store.round(2))
        assert do.store.round(2).stored("canaries")["stops"] == []


def test_a_judge_as_random_as_ever_goes_on_with_a_warning(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with stages(tmp_path, Judges(lambda _: float(rng.uniform()))) as (do, said):
        for index in (1, 2, 3):
            do.watch_judges(do.store.round(index))
    assert said and all("asked again, its scores vary by" in line for line in said)


def test_gold_canaries_stay_as_the_run_began(tmp_path: Path) -> None:
    judges = Judges(fair)
    gold = [
        GoldAnswer(PROMPTS[0], replace(ANSWERS[s], text=f"gold {s}"), {"style": float(s)})
        for s in (0, 1)
    ]
    judges.watch = replace(judges.watch, gold=gold)
    with stages(tmp_path, judges) as (do, _):
        do.watch_judges(do.store.round(1))
        found = do.store.round(1).stored("canaries")
        assert found["answers"] == {"start": 24, "gold": 2}
        assert found["judges"][0]["figures"]["within_prompt_accuracy"]["n"] == 1
    judges.watch = replace(judges.watch, gold=gold[::-1][:1])
    with (
        stages(tmp_path, judges) as (do, _),
        pytest.raises(InputError, match="must stay as it was"),
    ):
        do.watch_judges(do.store.round(2))


def drawn(folder: Path) -> Answered:
    """`DRAWN` as a round stores it."""
    part = folder / "drawn.parquet"
    DRAWN.write_parquet(part)
    return Answered([Shard((part,), (), part)])


def pairs_by(score: Callable[[str], float]) -> pl.DataFrame:
    """A pair a prompt, of samples 0 and 1."""
    rows = []
    for prompt in PROMPTS:
        two = sorted((a for a in ANSWERS if a.prompt_id == prompt.prompt_id and a.sample < 2),
                     key=lambda a: -score(a.text))  # fmt: skip
        row: dict[str, Any] = {"prompt_id": prompt.prompt_id, "cluster": prompt.cluster}
        for role, answer in zip(("chosen", "rejected"), two, strict=True):
            row |= {role: answer.text, f"{role}_sample": answer.sample}
        rows.append(row)
    return pl.DataFrame(rows, schema=pairs_schema(["style"]))


def test_an_audit_judge_that_prefers_the_rejected_ones_stops_or_warns(tmp_path: Path) -> None:
    pairs = pairs_by(fair)
    with stages(tmp_path / "warn", Judges(fair)) as (do, said):
        do.audit(do.store.round(1), PROMPTS, drawn(tmp_path), pairs)
        record = do.store.round(1).stored("audit")
    assert record["judges"][0]["against"] == record["pairs"] == 12
    assert "audit of 12 pairs: onlooker on words agrees with 0.00 of them" in said[0]
    assert "warning: rejected answers are preferred to chosen ones" in said[1]
    run = tmp_path / "warn/runs/trial"
    key = read(run / "sheets/0001/key.json")
    assert sorted(i["side_x"] for i in key["items"]) == ["a"] * 6 + ["b"] * 6
    page = (run / "sheets/0001/sheet.html").read_text()
    assert "answer 0 to p0" in page and "side_x" not in page

    strict = stages(tmp_path / "error", Judges(fair), on_inversion="error")
    with strict as (do, _), pytest.raises(DataGateError, match="onlooker on words"):
        do.audit(do.store.round(1), PROMPTS, drawn(tmp_path), pairs)


def test_what_a_person_hands_in_is_shown_beside_the_audit_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stages(tmp_path, Judges(fair)) as (do, _):
        do.audit(do.store.round(1), PROMPTS, drawn(tmp_path), pairs_by(fair))
    run = tmp_path / "runs/trial"
    sheet = run / "sheets/0001"
    with (sheet / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[:-1]:
        row["better"] = "a" if fair(row["answer_a"]) > fair(row["answer_b"]) else "b"
        row["annotator"] = "kim"
    with (tmp_path / "kim.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert main(["judge", "gold", str(sheet), str(tmp_path / "kim.csv")]) == 0
    capsys.readouterr()
    assert main(["judge", "audit", str(run), "--json"]) == 0
    onlooker, kim = json.loads(capsys.readouterr().out)
    assert (onlooker["judge"], onlooker["against"]) == ("onlooker", 12)
    assert (kim["judge"], kim["preferred"], kim["abstained"]) == ("kim", 11, 1)
    assert (kim["round"], kim["value"], kim["verdict"]) == (1, 1.0, "agrees")
    assert main(["judge", "audit", str(run)]) == 0
    assert "kim" in capsys.readouterr().out


def test_a_sheet_that_a_person_writes_in_disturbs_no_resumed_run(tmp_path: Path) -> None:
    pairs = pairs_by(fair)
    for _ in range(2):
        with stages(tmp_path, Judges(fair)) as (do, _):
            do.audit(do.store.round(1), PROMPTS, drawn(tmp_path), pairs)
        sheet = tmp_path / "runs/trial/sheets/0001/sheet.csv"
        sheet.write_text(sheet.read_text() + "a note\n")
    assert sheet.read_text().count("a note") == 2


def test_who_asks_no_canaries_is_stamped_where_a_model_judge_trains(
    tiny_model: Path, tmp_path: Path
) -> None:
    def names(values: dict[str, Any]) -> list[str]:
        run: Any = SimpleNamespace(config=config(values), status={}, judged=[], folder=tmp_path)
        return [stamp.name for stamp in stamps(run)]

    values = values_of(tmp_path, tiny_model, "http://127.0.0.1:1/v1", "unwatched")
    assert "No canaries" not in names(values)
    values["judges"]["canaries"] = {"answers": 0}
    assert "No canaries" in names(values)
    verified = run_values(tmp_path, tiny_model, judges={"canaries": {"answers": 0}})
    assert "No canaries" not in names(verified)


def test_a_dry_run_counts_the_calls(tiny_model: Path, tmp_path: Path) -> None:
    gold = write_gold(tmp_path)
    values = values_of(tmp_path, tiny_model, "http://127.0.0.1:1/v1", "dry")
    plain = rehearse(config(values))
    values["judges"]["canaries"] = {"answers": 10, "gold": str(gold)}
    asked = rehearse(config(values))
    found = [re.search(r"and (\d+) to watch the judges", told) for told in (plain, asked)]
    assert [int(m[1]) for m in found if m] == [2 * 12, 2 * (10 + 5)]


def write_gold(folder: Path, **changes: Any) -> Path:
    lines = [
        {"prompt": "When?", "prompt_id": "g1", "answers": [
            {"text": "At nine.", "gold": {"style": 1}}, {"text": "Dunno.", "gold": {"style": 0}},
        ]},
        {"prompt": "Where?", "prompt_id": "g2", "answers": [
            {"text": "Here.", "gold": {"style": 2}}, {"text": "There.", "gold": {"style": 2}},
            {"text": "No.", "gold": {"style": 0, "correctness": 0.5}},
        ]},
    ]  # fmt: skip
    lines[0] |= changes
    path = folder / "gold.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_gold_canaries_are_read_with_their_order(tiny_model: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, tiny_model, "http://127.0.0.1:1/v1", "gold")
    values["judges"]["canaries"] = {"gold": str(write_gold(tmp_path))}
    found = read_gold(config(values))
    assert [(g.completion.prompt_id, g.completion.sample) for g in found] == [
        ("g1", 0), ("g1", 1), ("g2", 0), ("g2", 1), ("g2", 2),
    ]  # fmt: skip
    assert found[4].gold == {"style": 0, "correctness": 0.5}
    assert "answers" not in found[0].prompt.metadata, "no judge sees the gold"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": [{"text": "One.", "gold": {"style": 1}}]}, "a list of two or more"),
        ({"answers": [{"text": " ", "gold": {"style": 1}}] * 2}, r"answers\[0\].text must be text"),
        ({"answers": [{"text": "A"}] * 2}, r"answers\[0\].gold must be \{dimension: number\}"),
        ({"answers": [{"text": "A", "gold": {"styel": 1}}] * 2}, r"names \['styel'\]"),
        ({"answers": [{"text": "A", "gold": {"style": True}}] * 2}, "must be a number, got True"),
        ({"prompt": None}, "judges.canaries.gold: 1 records can't be used"),
        ({"prompt_id": "g2"}, "stands for something else"),
    ],
)
def test_gold_that_cant_be_used_is_named(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = values_of(tmp_path, tiny_model, "http://127.0.0.1:1/v1", "gold")
    values["judges"]["canaries"] = {"gold": str(write_gold(tmp_path, **changes))}
    with pytest.raises(InputError, match=message):
        read_gold(config(values))


def test_a_pairwise_judge_is_heard_in_both_orders() -> None:
    prompt = Prompt("p", ({"role": "user", "content": "When does it open?"},))
    items = [
        (prompt, Completion("p", sample, text, (1,), (1,), (0.0,), "stop", 0))
        for sample, text in enumerate(("better", "worse", "better"))
    ]
    for prefers, ab, ba in (
        (lambda one, two: "A" if one > two else "B", -1.0, -1.0),
        (lambda one, two: "A", 1.0, -1.0),
        (lambda one, two: "tie", 0.0, 0.0),
    ):
        reader, stub = judge(prefers_by(prefers), mode="pairwise")
        said = ask_anew([reader], items, VerdictCache())
        compared = said.filter(pl.col("other").is_not_null())
        # Samples 0 and 2 are the same text, which nobody asks about.
        assert sorted(map(answers_of, stub.asked)) == [("better", "worse"), ("worse", "better")]
        found = {
            (r["sample"], r["other"], r["order"]): r["value"]
            for r in compared.iter_rows(named=True)
        }
        assert found[0, 1, "ab"] == ab and found[0, 1, "ba"] == ba
        assert found[1, 2, "ab"] == (-ab if ab == ba else ab)
        assert said.filter(pl.col("other").is_null()).height == 3
