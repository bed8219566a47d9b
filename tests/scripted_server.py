"""A local HTTP server that answers each request as a script says, faults of the wire included."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Fault = Literal["none", "reset", "hang", "drip", "short"]


@dataclass(frozen=True)
class Reply:
    """What one request gets. `short` closes the connection half-way through the body; `drip` sends
    a byte every 50 ms; `hang` sends nothing."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    fault: Fault = "none"
    delay: float = 0.01
    """Seconds; long enough for calls that are under way together to be seen together."""


@dataclass(frozen=True)
class Request:
    """What was asked, and when (monotonic seconds)."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]
    at: float


Script = Callable[[Request], Reply]


def chat(content: str | None, **choice: Any) -> Reply:
    """A chat completion in OpenAI's form."""
    message = {"role": "assistant", "content": content, **choice.pop("message", {})}
    body = {
        "id": "1",
        "object": "chat.completion",
        "model": "judge-2026-01",
        "system_fingerprint": "fp_7",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return Reply(body=json.dumps(body).encode())


def refuse(status: int, message: str = "no", code: str = "", **headers: str) -> Reply:
    """An error in OpenAI's form."""
    body = {"error": {"message": message, "type": "error", "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(body).encode(), named)


class ScriptedServer:
    """Serves on a free port of this machine while entered, in a thread of its own."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._now = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def base_url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        self._port = started.result(10)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._server.close()
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {k.lower(): v for k, v in (x.split(": ", 1) for x in lines[1:] if x)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(
                    len(self.requests), json.loads(body or b"{}"), headers, time.monotonic()
                )
                self.requests.append(request)
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                try:
                    kept = await self._reply(self.script(request), writer)
                finally:
                    self._now -= 1
                if not kept:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _reply(self, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        if reply.fault == "reset":
            writer.transport.abort()
            return False
        if reply.fault == "hang":
            await asyncio.sleep(60)
            return False
        headers = {
            "content-type": "application/json",
            "content-length": str(len(reply.body)),
            **reply.headers,
        }
        lines = [f"HTTP/1.1 {reply.status} X", *(f"{k}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        if reply.fault == "short":
            writer.write(reply.body[: len(reply.body) // 2])
            await writer.drain()
            return False
        if reply.fault == "drip":
            for byte in reply.body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
            return True
        await asyncio.sleep(reply.delay)
        writer.write(reply.body)
        await writer.drain()
        return True
