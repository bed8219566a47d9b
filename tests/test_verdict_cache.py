"""A verdict is asked for once, and never taken for the answer to anything else."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from rlhf.config_judges import LlmSpec, RewardModelSpec
from rlhf.errors import InputError, Interrupted
from rlhf.types import Completion, Prompt
from rollout.judges.backends import Answer, Call, Keep, Token
from rollout.judges.cache import CachedBackend, Chosen, Entry, VerdictCache, key_of, weights_of
from rollout.judges.llm import LlmJudge
from rollout.judges.reward_engines import Checkpoint, Rows
from rollout.judges.reward_model import RewardModelJudge

ROOT = Path(__file__).resolve().parents[1]
ANSWER = Answer('{"reason": "so", "grade": 4}', (Token("4", {"4": -0.5, "3": -1.25}),))


class Stub:
    """Counts what it is asked; fails, or stops, where it is told to."""

    beside = False

    def __init__(self, answer: Answer = ANSWER, model: str = "org/judge") -> None:
        self.identity: Mapping[str, str] = {"backend": "stub", "model": model}
        self.answer = answer
        self.asked = 0
        self.stop_after: int | None = None

    def start(self, record: Path | None, probe: Call) -> None: ...

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        for index, _ in enumerate(calls):
            if self.asked == self.stop_after:
                raise Interrupted("the budget is spent")
            self.asked += 1
            if keep is not None:
                keep(index, self.answer)
        return [self.answer] * len(calls)

    def news(self) -> None: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[VerdictCache]:
    found = VerdictCache()
    found.open(tmp_path / "verdicts.sqlite")
    yield found
    found.close()


def calls(count: int = 3) -> list[Call]:
    return [Call(({"role": "user", "content": f"{i}?"},), {}, 64) for i in range(count)]


def backend(stub: Stub, cache: VerdictCache, weights: str | None = "w") -> CachedBackend:
    return CachedBackend(stub, cache, "reader", lambda: weights)


def test_what_was_asked_is_asked_no_more_and_comes_back_whole(
    cache: VerdictCache, tmp_path: Path
) -> None:
    stub = Stub()
    first = backend(stub, cache).ask(calls(2))
    told: list[tuple[int, Answer]] = []
    again = backend(stub, cache)
    assert again.ask(calls(3), lambda i, a: told.append((i, a))) == [ANSWER] * 3 == [*first, ANSWER]
    assert stub.asked == 3 and told == [(2, ANSWER)], "one was new, and told by its own number"
    assert again.news() == "2 verdicts so far came from the cache"
    other = VerdictCache()
    other.open(tmp_path / "verdicts.sqlite")
    assert backend(stub, other).ask(calls(3)) == [ANSWER] * 3 and stub.asked == 3


def test_until_it_is_opened_nothing_is_kept() -> None:
    stub, closed = Stub(), VerdictCache()
    for _ in range(2):
        backend(stub, closed).ask(calls())
    assert stub.asked == 6


def _judge(cache: VerdictCache, stub: Stub, name: str = "reader", **settings: Any) -> LlmJudge:
    values = {"model": "org/judge", "dimensions": ["style"], "grade": "argmax", **settings}
    spec = LlmSpec(kind="llm", name=name, **values)
    return LlmJudge.of(spec, "judges.panel[0]", CachedBackend(stub, cache, name, lambda: "w"))


def _item(text: str = "At nine.", sample: int = 0, **prompt: Any) -> tuple[Prompt, Completion]:
    asked = Prompt("p", ({"role": "user", "content": prompt.pop("asked", "When?")},), **prompt)
    return asked, Completion("p", sample, text, (1,), (1,), (), "stop", 0)


def test_another_start_with_another_nonce_asks_nothing(cache: VerdictCache) -> None:
    stub = Stub()
    scores = [_judge(cache, stub).score([_item()]) for _ in range(2)]
    assert scores[0] == scores[1] and stub.asked == 1


@pytest.mark.parametrize(
    ("judge", "item"),
    [
        ({"name": "other"}, {}),
        ({"rubrics": {"style": "helpfulness"}}, {}),
        ({"dimensions": ["helpfulness"]}, {}),
        ({"grade": "expected"}, {}),
        ({"max_tokens": 300}, {}),
        ({"mode": "pairwise"}, {}),
        ({"scale_order": "descending"}, {}),
        ({}, {"text": "At ten."}),
        ({}, {"asked": "Where?"}),
    ],
)
def test_whatever_can_change_a_verdict_is_asked_about_anew(
    cache: VerdictCache, judge: dict[str, Any], item: dict[str, Any]
) -> None:
    stub = Stub()
    _judge(cache, stub).score([_item(), _item("Never.", 1)])
    assert stub.asked == 2
    _judge(cache, stub, **judge).score([_item(**item), _item("Never.", 1)])
    assert stub.asked > 2


def test_a_judge_that_sees_the_context_is_asked_about_each(cache: VerdictCache) -> None:
    stub = Stub()
    for hour in ("nine", "ten", "nine"):
        item = _item(context=f"Doors open at {hour}.")
        _judge(cache, stub, rubrics={"style": "groundedness"}).score([item])
    assert stub.asked == 2


def test_order_model_weights_and_repeat_are_part_of_the_question(cache: VerdictCache) -> None:
    stub = Stub(Answer('{"reason": "so", "winner": "A"}'))
    _judge(cache, stub, mode="pairwise").score([_item(), _item("Never.", 1)])
    assert stub.asked == 2, "each order is a question of its own"
    for changed in (
        backend(Stub(model="org/other"), cache),
        backend(Stub(), cache, weights="w2"),
    ):
        backend(stub, cache).ask(calls(1))
        inner: Any = changed._inner
        changed.ask(calls(1))
        assert inner.asked == 1
    asked = stub.asked
    for _ in range(2):
        backend(stub, cache).ask(calls(1), repeat=1)
    assert stub.asked == asked + 1


def test_weights_that_cannot_be_told_apart_are_not_cached(cache: VerdictCache) -> None:
    stub = Stub()
    for _ in range(2):
        backend(stub, cache, weights=None).ask(calls(1))
    assert stub.asked == 2


def test_weights_are_those_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_of(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert before != weights_of(str(tmp_path), None)
    before = weights_of(str(tmp_path), None)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert before != weights_of(str(tmp_path), None), "the same text reads otherwise"
    assert weights_of("nobody/has-this", None) is None
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="must hold weights as"):
        weights_of(str(tmp_path), None)


def test_an_answer_without_the_probabilities_that_were_asked_for_is_asked_for_again(
    cache: VerdictCache,
) -> None:
    stub = Stub(Answer('{"reason": "so", "grade": 4}'))
    (plain,) = calls(1)
    for call in (plain, replace(plain, alternatives=5)):
        before = stub.asked
        for _ in range(2):
            backend(stub, cache).ask([call])
        assert stub.asked - before == 1 + bool(call.alternatives)


@pytest.mark.parametrize("bad", [Answer.failed("timed out"), Answer('{"grade": 4')])
def test_failures_are_asked_again(cache: VerdictCache, bad: Answer) -> None:
    stub = Stub(bad)
    for _ in range(2):
        assert backend(stub, cache).ask(calls(1)) == [bad]
    assert stub.asked == 2


def test_what_measures_a_judge_reads_and_leaves_nothing(cache: VerdictCache) -> None:
    stub = Stub()
    backend(stub, cache).ask(calls(1))
    with cache.unread():
        backend(stub, cache).ask(calls(2))
    assert stub.asked == 3
    backend(stub, cache).ask(calls(2))
    assert stub.asked == 4, "the second was kept by nobody"


def test_an_interruption_loses_no_answer(cache: VerdictCache) -> None:
    stub = Stub()
    stub.stop_after = 2
    with pytest.raises(Interrupted):
        backend(stub, cache).ask(calls(5))
    stub.stop_after = None
    backend(stub, cache).ask(calls(5))
    assert stub.asked == 5


class _Engine:
    """Scores a text by its length, and counts the texts."""

    beside = False

    def __init__(self) -> None:
        self.scored = 0

    def load(self, checkpoint: Checkpoint) -> None: ...

    def raw(self, rows: Rows) -> list[tuple[float, ...]]:
        self.scored += len(rows)
        return [(len(row) / 3,) for row in rows]

    def sleep(self) -> None: ...

    def close(self) -> None: ...


def test_a_reward_model_scores_a_text_once(cache: VerdictCache, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    values = {"name": "rm", "dimensions": ["style"], "model": str(tmp_path)}
    spec = RewardModelSpec.model_validate({"kind": "reward_model", **values})
    engine, rows = _Engine(), [[1, 2], [1, 2, 3], [1, 2]]
    first = RewardModelJudge(spec, "judges.panel[0]", engine, cache)._raw(rows)
    assert engine.scored == 2 and first == [(2 / 3,), (1.0,), (2 / 3,)]
    again = RewardModelJudge(spec, "judges.panel[0]", engine, cache)._raw([*rows, [4]])
    assert engine.scored == 3 and again == [*first, (1 / 3,)]
    (tmp_path / "model.safetensors").write_bytes(b"others")
    RewardModelJudge(spec, "judges.panel[0]", engine, cache)._raw(rows)
    assert engine.scored == 5


WRITER = """
import sys
from pathlib import Path
from rollout.judges.cache import Entry, VerdictCache, key_of
cache = VerdictCache()
cache.open(Path(sys.argv[1]))
print("open", flush=True)
number = 0
while True:
    cache.keep([Entry(key_of(sys.argv[2], number, i), sys.argv[2], "m", number) for i in range(20)])
    number += 1
    print(number, flush=True)
"""


def test_two_processes_write_at_once_and_a_kill_loses_nothing_kept(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    kept = []
    for process in writers:
        assert process.stdout is not None
        next(line for line in process.stdout if line == "25\n")
    for process in writers:
        process.kill()
        assert process.stdout is not None
        later = process.stdout.read().splitlines()
        kept.append(max([25, *map(int, later)]))
        assert process.wait(timeout=60) == -signal.SIGKILL
    found = VerdictCache()
    found.open(path)
    for name, batches in zip(("one", "two"), kept, strict=True):
        keys = [key_of(name, number, i) for number in range(batches) for i in range(20)]
        assert len(found.find(keys)) == len(keys)
    held = {line.judge: line.verdicts for line in found.held(Chosen())}
    assert all(count % 20 == 0 for count in held.values()), "a batch is whole or absent"
    found.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_command_shows_and_prunes(
    cache: VerdictCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.keep([Entry(key_of(i), f"judge-{i % 2}", "org/m", [i]) for i in range(5)])
    path = str(tmp_path / "verdicts.sqlite")
    assert main(["judge", "cache", path]) == 0
    shown = capsys.readouterr().out
    assert "judge-0" in shown and "judge-1" in shown and "org/m" in shown and "removed" not in shown
    assert main(["judge", "cache", path, "--older-than", "1", "--prune"]) == 0
    assert "removed 0 verdicts" in capsys.readouterr().out
    assert main(["judge", "cache", path, "--judge", "judge-0", "--prune"]) == 0
    assert "removed 3 verdicts" in capsys.readouterr().out
    assert [line.judge for line in cache.held(Chosen())] == ["judge-1"]
    run = tmp_path / "run/judges"
    run.mkdir(parents=True)
    assert main(["judge", "cache", str(run.parent)]) == 2
    assert "there is no verdict cache at" in capsys.readouterr().err
    assert not list(run.iterdir())


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and no database at all\n" * 50)
    with pytest.raises(InputError, match=r"notes.txt can't be used: file is not a database"):
        VerdictCache().open(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    with pytest.raises(InputError, match="must be a verdict cache of format 1, found format 0"):
        VerdictCache().open(other)
    assert text.read_text().startswith("these are notes")
