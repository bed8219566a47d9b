"""An endpoint that misbehaves costs time or an abstention: no verdict is lost, none is invented."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Fault, Reply, Request, Script, ScriptedServer, chat, refuse

from rlhf.config_judges import LlmSpec, Traffic
from rlhf.errors import InputError, Interrupted
from rlhf.types import Completion, Prompt, Score
from rollout.judges.backends import Answer
from rollout.judges.backends.ledger import Ledger
from rollout.judges.backends.openai import OpenAiBackend
from rollout.judges.llm import LlmJudge

KEY = "0123456789-abcdefgh-the-key"
GOOD = chat('{"reason": "fine", "grade": 4}')


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_ACCESS", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def spec(url: str, **settings: Any) -> LlmSpec:
    traffic = {"api_key_env": "JUDGE_ACCESS", "timeout_seconds": 5.0, **settings.pop("traffic", {})}
    values = {"dimensions": ["style"], "grade": "argmax", "traffic": traffic, **settings}
    return LlmSpec(
        kind="llm", name="reader", backend="openai", model="judge", base_url=url, **values
    )


def judge(url: str, **settings: Any) -> tuple[LlmJudge, OpenAiBackend]:
    made = spec(url, **settings)
    backend = OpenAiBackend(made, "judges.panel[0]", backoff=0.01)
    return LlmJudge.of(made, "judges.panel[0]", backend), backend


def items(count: int) -> list[tuple[Prompt, Completion]]:
    prompt = Prompt("p", ({"role": "user", "content": "When does it open?"},))
    return [
        (prompt, Completion("p", n, f"answer {n}.", (1,), (1,), (0.0,), "stop", 0))
        for n in range(count)
    ]


def by_answer(request: Request) -> Reply:
    """Grades 1 to 5 by the answer's number, so that a verdict on another answer would show."""
    found = re.search(r"\nanswer (\d+)\.", request.body["messages"][1]["content"])
    number = int(found[1]) if found else 0
    return chat(json.dumps({"reason": f"no {number}", "grade": 1 + number % 5}))


def once(first: Reply, after: Script = by_answer) -> Script:
    """The fault for the first request about each answer, then the script."""
    seen: set[str] = set()

    def script(request: Request) -> Reply:
        text = request.body["messages"][1]["content"]
        if text in seen:
            return after(request)
        seen.add(text)
        return first

    return script


def expected(count: int) -> list[float]:
    return [n % 5 / 4 for n in range(count)]


def values(scores: list[Score]) -> list[float | None]:
    return [score.score for score in scores]


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY}", "\u201ckey\u201d-0123456789"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_ACCESS", value)
    with pytest.raises(InputError, match="JUDGE_ACCESS must be one word of printable") as caught:
        judge("http://127.0.0.1:9/v1")
    assert value.strip() not in str(caught.value)


def test_of_a_budget_no_call_that_was_sent_is_forgotten(tmp_path: Path) -> None:
    """A kill may come while all of them wait for their answers."""
    ledger = Ledger(Traffic(max_calls=20), "reader")
    ledger.open(tmp_path / "usage.json")
    for _ in range(8):
        ledger.charge(retry=False)
    again = Ledger(Traffic(max_calls=20), "reader")
    again.open(tmp_path / "usage.json")
    assert again.calls == 8


def test_every_answer_gets_its_own_verdict_whatever_the_order_they_come_in() -> None:
    with ScriptedServer(by_answer) as server:
        built, backend = judge(server.base_url, traffic={"concurrency": 5})
        found = built.score(items(40))
    assert values(found) == expected(40)
    assert [s.reason for s in found] == [f"no {n}" for n in range(40)]
    assert len(server.requests) == backend.ledger.calls == 40
    assert 1 < server.most_at_once <= 5


def test_threads_share_the_room_of_one_endpoint() -> None:
    with ScriptedServer(by_answer) as server:
        built, backend = judge(server.base_url, traffic={"concurrency": 3})
        with ThreadPoolExecutor(4) as threads:
            shards = list(threads.map(lambda _: values(built.score(items(10))), range(4)))
    assert shards == [expected(10)] * 4
    assert len(server.requests) == backend.ledger.calls == 40
    assert 1 < server.most_at_once <= 3


def test_a_failure_that_stops_one_thread_leaves_anothers_answers_whole() -> None:
    def script(request: Request) -> Reply:
        return refuse(401) if "bad" in str(request.body["messages"]) else by_answer(request)

    good = items(20)
    prompt, completion = good[0]
    bad = [(prompt, replace(completion, text="bad 0"))]
    with ScriptedServer(script) as server, ThreadPoolExecutor(2) as threads:
        built, _ = judge(server.base_url, traffic={"concurrency": 2})
        whole, broken = threads.submit(built.score, good), threads.submit(built.score, bad)
        assert values(whole.result(30)) == expected(20)
        with pytest.raises(InputError, match="refused; check the key"):
            broken.result(30)


def test_what_is_sent_is_temperature_0_a_schema_and_no_secret_in_the_body() -> None:
    with ScriptedServer(lambda request: GOOD) as server:
        judge(server.base_url)[0].score(items(1))
    (request,) = server.requests
    assert request.body["temperature"] == 0
    assert request.body["model"] == "judge" and request.body["max_completion_tokens"] == 256
    form = request.body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"]["required"] == ["reason", "grade"]
    assert "logprobs" not in request.body
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(request.body)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with ScriptedServer(once(refuse(status))) as server:
        built, backend = judge(server.base_url)
        assert values(built.score(items(6))) == expected(6)
    assert len(server.requests) == backend.ledger.calls == 12
    assert backend.ledger.retries == 6


@pytest.mark.parametrize("fault", ["reset", "short"])
def test_a_connection_that_breaks_is_tried_again(fault: Fault) -> None:
    broken = Reply(200, GOOD.body, fault=fault)
    with ScriptedServer(once(broken)) as server:
        built, backend = judge(server.base_url)
        assert values(built.score(items(6))) == expected(6)
    assert backend.ledger.calls == len(server.requests) == 12


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_call_has_a_deadline_as_a_whole(fault: Fault) -> None:
    """A byte every 50 ms never lets a read wait, and would take 20 s."""
    slow = Reply(200, GOOD.body, fault=fault)
    with ScriptedServer(once(slow)) as server:
        built, backend = judge(server.base_url, traffic={"timeout_seconds": 0.4})
        started = time.monotonic()
        assert values(built.score(items(3))) == expected(3)
        assert time.monotonic() - started < 5
    assert backend.ledger.calls == 6


@pytest.mark.parametrize(
    "body", [GOOD.body[:40], b"", b"<html>gateway</html>", b"[]", b'{"choices": []}']
)
def test_a_body_that_is_no_completion_is_tried_again(body: bytes) -> None:
    with ScriptedServer(once(Reply(200, body))) as server:
        assert values(judge(server.base_url)[0].score(items(2))) == expected(2)
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (chat('{"reason": "fi', finish_reason="length"), "cut off"),
        (chat('{"reason": "fi'), "not JSON"),
        (chat('{"grade": 5}'), "not a verdict"),
        (chat('{"reason": "", "grade": 9}'), "grade 9 is not on the scale"),
        (chat("I can't judge that."), "not JSON"),
        (chat(None, message={"refusal": "I won't."}), "refused: I won't."),
        (chat("", finish_reason="content_filter"), "refused: the endpoint's content filter"),
        (chat(None), "an answer without text"),
        (Reply(body=b'{"choices": [null]}'), "an answer without a message"),
        (refuse(400, "maximum context length is 100 tokens"), "HTTP 400: Error code: 400"),
        (refuse(413, "too large"), "HTTP 413"),
    ],
)
def test_an_answer_that_is_no_verdict_abstains_and_is_not_asked_again(
    answer: Reply, reason: str
) -> None:
    def script(request: Request) -> Reply:
        return answer if "answer 1." in request.body["messages"][1]["content"] else GOOD

    with ScriptedServer(script) as server:
        found = judge(server.base_url, traffic={"concurrency": 1})[0].score(items(3))
    assert values(found) == [0.75, None, 0.75]
    assert str(found[1].reason).startswith(reason), found[1].reason
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "check the key in JUDGE_ACCESS"),
        (403, "check the key in JUDGE_ACCESS"),
        (404, "has no model 'judge', or is no such endpoint"),
        (400, "refused its first call"),
        (422, "refused its first call"),
    ],
)
def test_what_will_not_pass_stops_at_the_first_call(status: int, says: str) -> None:
    with ScriptedServer(lambda request: refuse(status, f"bad key {KEY}")) as server:
        built, _ = judge(server.base_url, traffic={"concurrency": 1})
        with pytest.raises(InputError) as caught:
            built.start(None)
    assert says in str(caught.value) and "judge reader: " in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


def test_a_key_that_is_revoked_on_the_way_stops_the_run() -> None:
    def script(request: Request) -> Reply:
        return GOOD if request.number < 5 else refuse(401)

    with ScriptedServer(script) as server:
        built, _ = judge(server.base_url, traffic={"concurrency": 2})
        with pytest.raises(InputError, match="check the key in JUDGE_ACCESS"):
            built.score(items(30))
    assert len(server.requests) <= 7


def test_retry_after_is_waited_for_by_every_call() -> None:
    with ScriptedServer(once(refuse(429, Retry_After="1"), by_answer)) as server:
        built, _ = judge(server.base_url, traffic={"concurrency": 1})
        assert values(built.score(items(1))) == expected(1)
    first, second = server.requests
    assert second.at - first.at >= 1.0


@pytest.mark.slow
def test_retry_after_may_be_a_date_or_milliseconds() -> None:
    for header in ({"Retry_After": formatdate(time.time() + 2)}, {"Retry_After_Ms": "700"}):
        with ScriptedServer(once(refuse(503, **header))) as server:
            judge(server.base_url)[0].score(items(1))
        first, second = server.requests
        assert second.at - first.at >= 0.7


def test_a_server_with_no_room_today_is_left_alone_and_the_run_can_be_resumed() -> None:
    for status, headers, code in (
        (429, {"Retry_After": "86400"}, ""),
        (429, {}, "insufficient_quota"),
        (402, {}, ""),
    ):
        reply = refuse(status, code=code, **headers)
        with (
            ScriptedServer(partial(_same, reply)) as server,
            pytest.raises(Interrupted, match="has no room for more calls now") as caught,
        ):
            judge(server.base_url, traffic={"concurrency": 1})[0].score(items(5))
        assert caught.value.exit_status == 75
        assert len(server.requests) == 1


def _same(reply: Reply, request: Request) -> Reply:
    return reply


def test_one_poisoned_answer_abstains_but_an_endpoint_that_is_down_stops_the_run() -> None:
    def script(request: Request) -> Reply:
        return refuse(500) if "answer 3." in request.body["messages"][1]["content"] else GOOD

    limits = {"max_retries": 1, "concurrency": 4}
    with ScriptedServer(script) as server:
        found = judge(server.base_url, traffic=limits)[0].score(items(20))
    assert [s.sample for s in found if s.abstained] == [3]
    assert str(found[3].reason).startswith("HTTP 500") and "after 2 tries" in str(found[3].reason)
    assert len(server.requests) == 21

    with ScriptedServer(lambda request: refuse(500)) as storm:
        built, backend = judge(storm.base_url, traffic=limits)
        with pytest.raises(Interrupted, match="10 calls in a row failed"):
            built.score(items(200))
    assert 20 <= len(storm.requests) == backend.ledger.calls <= 20 + 2 * 4


def test_nobody_at_the_address_is_told_before_anything_is_generated() -> None:
    with ScriptedServer(lambda request: GOOD) as server:
        url = server.base_url
    built, _ = judge(url, traffic={"max_retries": 1})
    with pytest.raises(InputError, match=r"does not answer \(connection lost.*start the server or"):
        built.start(None)


def test_a_budget_in_calls_is_never_exceeded_and_holds_over_starts(tmp_path: Path) -> None:
    """What is under way when it is spent still comes back: the last two answers are late."""
    kept: dict[int, Answer] = {}

    def script(request: Request) -> Reply:
        reply = by_answer(request)
        return (
            replace(reply, delay=0.4) if b"no 4" in reply.body or b"no 5" in reply.body else reply
        )

    with ScriptedServer(script) as server:
        for start, left in ((1, 6), (2, 0)):
            built, backend = judge(server.base_url, traffic={"max_calls": 7, "concurrency": 3})
            if start == 1:
                built.start(tmp_path)
            else:
                backend.ledger.open(tmp_path / "reader-usage.json")
            calls = [built._call(question) for question in _questions(built, 20)]
            with pytest.raises(Interrupted, match="budget of 7 calls is spent") as caught:
                backend.ask(calls, kept.__setitem__)
            assert len(kept) == 6, f"start {start}: {left} calls were left"
    assert caught.value.exit_status == 75
    assert len(server.requests) == 7
    assert sorted(kept) == list(range(6)), "what was answered and paid for is told"
    used = json.loads((tmp_path / "reader-usage.json").read_text())
    assert (used["calls"], used["prompt_tokens"], used["completion_tokens"]) == (7, 700, 70)
    assert used["served"] == {"judge-2026-01 fp_7": 7}


def _questions(built: LlmJudge, count: int) -> list[Any]:
    from rollout.judges.llm import Question

    return [Question(p, p.prompt_id, (c.text,), ("style",)) for p, c in items(count)]


def test_a_budget_in_tokens_stops_once_reached(tmp_path: Path) -> None:
    traffic = {"max_total_tokens": 500, "concurrency": 1}
    with ScriptedServer(by_answer) as server:
        built, _ = judge(server.base_url, traffic=traffic)
        with pytest.raises(Interrupted, match=r"500 tokens is spent \(550 used\)"):
            built.score(items(20))
    assert len(server.requests) == 5

    unmetered = Reply(body=json.dumps({**json.loads(GOOD.body), "usage": None}).encode())
    with ScriptedServer(lambda request: unmetered) as server:
        built, _ = judge(server.base_url, traffic=traffic)
        with pytest.raises(InputError, match=r"max_total_tokens needs an endpoint that says how"):
            built.start(None)


def test_calls_are_spaced_to_the_rate() -> None:
    with ScriptedServer(by_answer) as server:
        built, _ = judge(server.base_url, traffic={"requests_per_minute": 600.0})
        assert values(built.score(items(6))) == expected(6)
    times = [request.at for request in server.requests]
    assert times[-1] - times[0] >= 0.5 - 0.05


def logprobs(**shares: float) -> dict[str, Any]:
    other: list[dict[str, Any]] = [
        {"token": t, "logprob": 0.0, "top_logprobs": []} for t in ('{"reason":"a"', ',"grade":')
    ]
    top = [{"token": k.lstrip("g"), "logprob": math.log(p)} for k, p in shares.items()]
    return {"content": [*other, {"token": " 4", "logprob": 0.0, "top_logprobs": top}]}


def test_expected_grades_come_from_top_logprobs_else_the_start_says_so() -> None:
    with_probabilities = chat('{"reason":"a","grade": 4}', logprobs=logprobs(g4=0.6, g5=0.2))
    with ScriptedServer(lambda request: with_probabilities) as server:
        built, _ = judge(server.base_url, grade="expected")
        assert built.start(None) == []
        assert values(built.score(items(1))) == [pytest.approx((3.4 / 0.8 - 1) / 4)]
    assert server.requests[0].body["logprobs"] is True
    assert server.requests[0].body["top_logprobs"] == 5
    with ScriptedServer(lambda request: GOOD) as server:
        built, _ = judge(server.base_url, grade="expected")
        with pytest.raises(InputError, match="grade expected needs log-probs"):
            built.start(None)


def test_odd_log_probs_cost_the_expected_grade_not_the_run() -> None:
    odds: list[Any] = [{"content": [{}]}, {"content": "x"}, 3, {"content": [{"token": 1}]}]
    replies = iter([chat('{"reason":"a","grade":4}', logprobs=odd) for odd in odds])
    with ScriptedServer(lambda request: next(replies)) as server:
        found = judge(server.base_url, grade="expected", traffic={"concurrency": 1})[0].score(
            items(len(odds))
        )
    for score in found:
        assert score.abstained and "token was not found" in str(score.reason)


def test_a_missing_key_is_told_and_a_server_may_want_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_ACCESS")
    with pytest.raises(InputError, match=r"judges\.panel\[0\]\.traffic\.api_key_env: the environ"):
        judge("http://127.0.0.1:1/v1")
    with ScriptedServer(by_answer) as server:
        built, _ = judge(server.base_url, traffic={"api_key_env": None})
        assert values(built.score(items(2))) == expected(2)


def test_the_key_stands_nowhere(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    with ScriptedServer(once(refuse(500, f"your key {KEY} is fine"))) as server:
        built, backend = judge(server.base_url, traffic={"max_retries": 1})
        built.start(tmp_path)
        once_only, _ = judge(server.base_url, traffic={"max_retries": 0})
        found = once_only.score(items(2))
    assert all("your key (hidden: a secret) is fine" in str(s.reason) for s in found)
    held = [repr(built), repr(backend), repr(vars(backend)), str(found), str(built.news())]
    held += [path.read_text() for path in tmp_path.iterdir()]
    assert not [text for text in (*held, caplog.text) if KEY in text]


def test_what_it_cost_and_who_answered_is_told() -> None:
    with ScriptedServer(once(refuse(500))) as server:
        built, _ = judge(server.base_url)
        built.score(items(2))
    assert built.news() == (
        "judge reader: 4 calls so far (2 further tries), 200 tokens read, 20 written; answered by "
        "judge-2026-01 fp_7 (2)"
    )


@pytest.fixture
def vllm_server(smollm2: str, tmp_path: Path) -> Iterator[str]:
    """vLLM's own OpenAI server with the small real model, ended by its process id."""
    port = 8400 + os.getpid() % 500
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2]
    command += ["--served-model-name", "judge", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "8"]
    # Any processor multiplies in it by itself.
    command += ["--dtype", "float32"]
    log = tmp_path / "server.log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        _wait_until_healthy(port, process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no server after 240 s: {log.read_text()[-3000:]}")


@pytest.mark.engine
def test_vllms_own_server_judges_through_the_same_client(vllm_server: str) -> None:
    settings = {"dimensions": ["style", "helpfulness"], "max_tokens": 300}
    built, backend = judge(
        vllm_server,
        grade="expected",
        **settings,
        traffic={"api_key_env": None, "timeout_seconds": 120.0},
    )
    told = built.start(None)
    found = built.score(items(3))
    assert len(found) == 6 and backend.ledger.calls == 7
    (served,) = backend.ledger.served
    assert served.startswith("judge vllm-") and backend.ledger.tokens > 0, told
    graded = [s for s in found if not s.abstained]
    assert graded, [s.reason for s in found]
    assert all(s.score is not None and 0 <= s.score <= 1 for s in graded)
    wrong, _ = judge(vllm_server, rubrics={}, traffic={"api_key_env": None})
    wrong.backend = OpenAiBackend(wrong.spec.model_copy(update={"model": "nobody"}), "f", 0.01)
    with pytest.raises(InputError, match="has no model 'nobody'"):
        wrong.start(None)
