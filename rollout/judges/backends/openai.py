"""Any endpoint that speaks OpenAI's protocol, through the `openai` client.

Many calls are under way at once, at most at a given rate; each has a deadline as a whole. What may
pass is tried again (408, 409, 429, 5xx, lost connections, answers that are no JSON), what won't
pass stops the run: a wrong key, address or model. Where ten calls in a row fail for good, the
endpoint is down, and the run stops resumably instead of filling up with abstentions.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from rlhf.config_judges import LlmSpec
from rlhf.errors import InputError, Interrupted, PairloopError
from rlhf.redaction import HIDDEN, mask
from rollout.judges.backends import Answer, Call, Keep, Token
from rollout.judges.backends.ledger import Ledger

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from tenacity import RetryCallState

_PASSING = frozenset({408, 409, 429})
_LOST_IN_A_ROW = 10
_LONGEST_WAIT = 30.0
_LONGEST_REQUESTED_WAIT = 600.0
"""Seconds; a server that asks for more has no room today, and the run had better be resumed."""
_SHOWN = 300


class _Passing(Exception):
    """A failure that may pass; with the seconds that the server asked to be left alone."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """The server won't answer this call, however often it is asked."""


class OpenAiBackend:
    """One model at one endpoint. `backoff` is the upper end, in seconds, of the first random wait;
    it doubles from try to try."""

    beside = True

    def __init__(self, spec: LlmSpec, field: str, backoff: float = 1.0) -> None:
        self.identity: Mapping[str, str] = {
            "backend": "openai",
            "base_url": spec.base_url,
            "model": spec.model,
        }
        self.ledger = Ledger(spec.traffic, spec.name)
        self._spec = spec
        self._traffic = spec.traffic
        self._backoff = backoff
        self._free_at = 0.0
        self._lost = 0
        self._answered = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._room = asyncio.Semaphore(spec.traffic.concurrency)
        self._starting = Lock()
        variable = self._traffic.api_key_env
        if variable is not None and not os.environ.get(variable):
            raise InputError(
                f"{field}.traffic.api_key_env: the environment variable {variable} must hold the "
                "endpoint's key, but is not set; set it, name another, or give null for a server "
                "that wants none"
            )
        key = os.environ[variable] if variable is not None else "none"
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise InputError(
                f"{field}.traffic.api_key_env: the value of {variable} must be one word of "
                "printable ASCII, but has white space at an end or other characters in it"
            )

    def start(self, record: Path | None, probe: Call) -> Answer:
        """See `Backend.start`: one call shows whether key, address, model and options are right."""
        if record is not None:
            self.ledger.open(record)
        (answer,) = self.ask([probe])
        if not self._answered:
            raise InputError(
                f"judge {self._spec.name}: {self._spec.base_url} does not answer "
                f"({answer.failure}); start the server or correct base_url"
            )
        if self._traffic.max_total_tokens is not None and self.ledger.tokens == 0:
            raise InputError(
                f"judge {self._spec.name}: traffic.max_total_tokens needs an endpoint that says "
                "how many tokens it used; this one doesn't: use traffic.max_calls"
            )
        return answer

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        """See `Backend.ask`. Raises InputError for a wrong key, address or model, Interrupted
        where the budget is spent or the endpoint is down."""
        if not calls:
            return []
        asked = asyncio.run_coroutine_threadsafe(self._ask_all(calls, keep), self._running())
        try:
            return asked.result()
        except BaseException:
            asked.cancel()
            raise

    def news(self) -> str | None:
        """See `Backend.news`."""
        led = self.ledger
        by = ", ".join(f"{model} ({count})" for model, count in sorted(led.served.items()))
        return (
            f"{led.calls} calls so far ({led.retries} further tries), {led.prompt_tokens} tokens "
            f"read, {led.completion_tokens} written; answered by {by or 'nobody'}"
        )

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def close(self) -> None:
        """Leave off what is being asked, and end the loop that calls are made in."""
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_leave_off(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def _running(self) -> asyncio.AbstractEventLoop:
        """One loop for all who ask, from whatever thread: rate, room and ledger are shared."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._room = asyncio.Semaphore(self._traffic.concurrency)
                Thread(target=self._loop.run_forever, name=self._spec.name, daemon=True).start()
            return self._loop

    async def _ask_all(self, calls: Sequence[Call], keep: Keep | None) -> list[Answer]:
        try:
            return await self._answers(calls, keep)
        finally:
            self.ledger.write()

    async def _answers(self, calls: Sequence[Call], keep: Keep | None) -> list[Answer]:
        from openai import AsyncOpenAI

        answers: list[Answer | None] = [None] * len(calls)
        waiting = iter(enumerate(calls))
        fatal: list[PairloopError] = []
        variable = self._traffic.api_key_env
        key = "none" if variable is None else os.environ[variable]

        async def work(client: AsyncOpenAI) -> None:
            for index, call in waiting:
                if fatal:
                    return
                try:
                    async with self._room:
                        answer = await self._answer(client, call, fatal)
                except PairloopError as error:
                    # The other workers finish what is under way, and start nothing more.
                    fatal.append(error)
                    return
                answers[index] = answer
                if keep is not None:
                    keep(index, answer)

        async with AsyncOpenAI(
            api_key=key,
            base_url=self._spec.base_url,
            timeout=self._traffic.timeout_seconds,
            max_retries=0,
        ) as client:
            workers = min(self._traffic.concurrency, len(calls))
            await asyncio.gather(*(work(client) for _ in range(workers)))
        if fatal:
            raise fatal[0]
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    async def _answer(
        self, client: AsyncOpenAI, call: Call, fatal: Sequence[PairloopError]
    ) -> Answer:
        """The answer, or why there is none after every try; none is made once something is
        `fatal`."""
        from tenacity import AsyncRetrying, retry_if_exception_type

        tries = AsyncRetrying(
            retry=retry_if_exception_type(_Passing),
            stop=lambda state: bool(fatal) or state.attempt_number > self._traffic.max_retries,
            wait=self._wait,
            reraise=True,
        )
        try:
            async for attempt in tries:
                with attempt:
                    body = await self._send(client, call, attempt.retry_state.attempt_number > 1)
        except _Refused as error:
            return Answer.failed(str(error))
        except _Passing as error:
            self._lost += 1
            if self._lost >= _LOST_IN_A_ROW:
                raise Interrupted(
                    f"judge {self._spec.name}: {self._lost} calls in a row failed, each after "
                    f"{self._traffic.max_retries + 1} tries; the last: {error}. When "
                    f"{self._spec.base_url} answers again, the same command goes on"
                ) from error
            return Answer.failed(f"{error}, after {self._traffic.max_retries + 1} tries")
        self._lost = 0
        self._answered = True
        return _read(body)

    async def _send(self, client: AsyncOpenAI, call: Call, retry: bool) -> dict[str, Any]:
        """One try. Raises _Passing, _Refused, InputError or Interrupted."""
        from openai import APIConnectionError, APIStatusError

        await self._turn()
        self.ledger.charge(retry)
        create: Any = client.chat.completions.with_raw_response.create
        form = {"name": "verdict", "schema": call.schema, "strict": True}
        options: dict[str, Any] = {}
        if call.alternatives:
            options = {"logprobs": True, "top_logprobs": call.alternatives}
        try:
            async with asyncio.timeout(self._traffic.timeout_seconds):
                raw = await create(
                    model=self._spec.model,
                    messages=call.messages,
                    temperature=0,
                    max_completion_tokens=call.max_tokens,
                    response_format={"type": "json_schema", "json_schema": form},
                    **options,
                )
        except TimeoutError:
            raise _Passing(f"no answer in {self._traffic.timeout_seconds:g} s") from None
        except APIConnectionError as error:
            cause = error.__cause__
            why = f"{type(cause).__name__}: {cause}" if cause else str(error)
            raise _Passing(self._told(f"connection lost: {why}")) from error
        except APIStatusError as error:
            raise self._judged(error) from error
        try:
            body: Any = json.loads(raw.text)
        except ValueError:
            raise _Passing(self._told(f"an answer that is no JSON: {raw.text[:80]!r}")) from None
        if not isinstance(body, dict) or not body.get("choices"):
            raise _Passing(self._told(f"an answer without choices: {raw.text[:80]!r}"))
        usage = body.get("usage") or {}
        print_ = body.get("system_fingerprint")
        self.ledger.answered(
            f"{body.get('model')}" + (f" {print_}" if print_ else ""),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
        return body

    async def _turn(self) -> None:
        """Wait until the next call may be sent: the rate, and what the server asked for."""
        spacing = 60 / self._traffic.requests_per_minute if self._traffic.requests_per_minute else 0
        now = time.monotonic()
        mine = max(self._free_at, now)
        self._free_at = mine + spacing
        await asyncio.sleep(mine - now)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds to the next try."""
        from tenacity import wait_random_exponential

        assert state.outcome is not None
        error = state.outcome.exception()
        random: float = wait_random_exponential(multiplier=self._backoff, max=_LONGEST_WAIT)(state)
        if not isinstance(error, _Passing) or error.wait is None:
            return random
        # All calls leave the server alone, and don't come back at the same moment.
        self._free_at = max(self._free_at, time.monotonic() + error.wait)
        return error.wait + min(random, 1.0)

    def _judged(self, error: APIStatusError) -> Exception:
        """What an HTTP status means for this call, and for the run."""
        status, spec = error.status_code, self._spec
        said = self._told(f"HTTP {status}: {error.message}")
        if status in (401, 403):
            variable = self._traffic.api_key_env
            where = f"the key in {variable}" if variable else "traffic.api_key_env (null: no key)"
            return InputError(f"judge {spec.name}: {spec.base_url} refused; check {where} ({said})")
        if status == 404:
            return InputError(
                f"judge {spec.name}: {spec.base_url} has no model {spec.model!r}, or is no such "
                f"endpoint; check model and base_url, which mostly ends in /v1 ({said})"
            )
        if status in (402, *_PASSING) or status >= 500:
            wait = _requested_wait(error.response.headers)
            code = error.body.get("code") if isinstance(error.body, dict) else None
            # 402: what was paid for is spent.
            spent = status == 402 or code == "insufficient_quota"
            if spent or (wait or 0) > _LONGEST_REQUESTED_WAIT:
                return Interrupted(
                    f"judge {spec.name}: {spec.base_url} has no room for more calls now ({said}); "
                    "later, the same command goes on"
                )
            return _Passing(said, wait)
        if not self._answered:
            return InputError(
                f"judge {spec.name}: {spec.base_url} refused its first call ({said}); it must know "
                "response_format json_schema, temperature 0"
                + (", logprobs" if spec.grade == "expected" and spec.mode == "pointwise" else "")
            )
        # The same call with another text was answered, so it is the text: too long, or filtered.
        return _Refused(said)

    def _told(self, text: str) -> str:
        """A server's words, without secrets, in one line."""
        variable = self._traffic.api_key_env
        key = os.environ.get(variable) if variable else None
        line = " ".join(mask(text.replace(key, HIDDEN) if key else text).split())
        return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


async def _leave_off() -> None:
    """Cancel every other task of the loop, and wait until it has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _read(body: Mapping[str, Any]) -> Answer:
    """The only choice of a chat completion, read without trust in its form."""
    choice = body["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return Answer.failed("an answer without a message")
    if message.get("refusal"):
        return Answer.failed(f"refused: {message['refusal']}")
    finish, text = choice.get("finish_reason"), message.get("content")
    if finish == "length":
        return Answer.failed("cut off: the verdict is longer than max_tokens")
    if finish == "content_filter":
        return Answer.failed("refused: the endpoint's content filter")
    if not isinstance(text, str):
        return Answer.failed("an answer without text")
    try:
        tokens = [
            Token(t["token"], {a["token"]: float(a["logprob"]) for a in t["top_logprobs"]})
            for t in (choice.get("logprobs") or {}).get("content") or ()
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        # Without probabilities an expected grade abstains; the text is still a verdict.
        tokens = []
    return Answer(text, tuple(tokens))


def _requested_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After (a number or a date) asks for; None if it asks for none."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            return max(0.0, float(value) / scale)
        except ValueError:
            continue
    try:
        return max(
            0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
        )
    except ValueError:
        return None
