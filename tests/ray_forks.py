"""Ray's workers as forks of a process that has imported the libraries, as `preloaded` has commands.

A raylet is told of an interpreter for its workers that hands all it is given to a server, which
forks, and that lives as long as the fork. Ray reads its settings at import: each fork imports it.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import pytest
from golden_run import environment
from preloaded import IMPORTED

# Ray has it run other scripts, too.
AS_INTERPRETER = """#!/bin/sh
case "$*" in
*/default_worker.py*) exec {python} -S -E -c {client} {socket} "$@" ;;
*) exec {python} "$@" ;;
esac
"""
CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    given = [sys.argv[2:], os.getcwd(), dict(os.environ)]
    socket.send_fds(server, [b" "], [0, 1, 2])
    server.sendall(json.dumps(given).encode() + b"\\n")
    os._exit(int(server.recv(16) or b"1"))
"""


@contextmanager
def forked_workers() -> Iterator[None]:
    """Nodes that are started within, in this process, have forks as workers."""
    from ray._private import services

    class Patched:
        def __getattr__(self, name: str) -> Any:
            return str(_interpreter()) if name == "executable" else getattr(sys, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "sys", Patched())
        yield


@cache
def _interpreter() -> Path:
    """What Ray's workers are started with; there until this process ends."""
    folder = Path(mkdtemp())
    atexit.register(rmtree, folder)
    address, found = folder / "socket", folder / "python"
    words = {"python": sys.executable, "client": CLIENT, "socket": address}
    found.write_text(AS_INTERPRETER.format(**{k: shlex.quote(str(w)) for k, w in words.items()}))
    found.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(64)
        number = listening.fileno()
        command = [sys.executable, __file__, str(number)]
        # It ends with this pipe.
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[number], env=environment()
        )
    atexit.register(server.communicate)
    return found


def serve(listening: socket.socket) -> None:
    """Fork for whoever asks, and say how each ended."""
    for name in IMPORTED:
        import_module(name)
    assert "ray" not in sys.modules, "it reads its settings at import"
    clients: dict[int, socket.socket] = {}
    heard, ended = socket.socketpair()
    ended.setblocking(False)
    signal.set_wakeup_fd(ended.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as waiting:
        waiting.register(listening, selectors.EVENT_READ)
        waiting.register(heard, selectors.EVENT_READ)
        waiting.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is heard:
                    heard.recv(64)
                    _tell(clients)
                    continue
                if key.fileobj is sys.stdin:
                    return
                client, _ = listening.accept()
                pid = os.fork()
                if not pid:
                    for other in (listening, heard, ended, *clients.values()):
                        other.close()
                    _become(client)
                clients[pid] = client


def _tell(clients: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with clients.pop(pid) as client, suppress(OSError):
                client.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())


def _become(client: socket.socket) -> None:
    """In the fork: what the client was asked to be; never returns."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    text = b""
    while not text.endswith(b"\n"):
        text += client.recv(2**16)
    arguments, folder, variables = json.loads(text)
    threading.Thread(target=_end_with, args=(client,), daemon=True).start()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    status = 1
    try:
        _work(arguments)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with(client: socket.socket) -> None:
    """Whoever kills the client means its fork."""
    with suppress(OSError):
        client.recv(1)
    os._exit(1)


def _work(arguments: list[str]) -> None:
    """As the interpreter would, by way of Ray's setup_worker.py or not."""
    left, context = [], "{}"
    for word in arguments:
        name, _, value = word.partition("=")
        if name == "--serialized-runtime-env-context":
            context = value
        elif name != "--language" and not word.endswith("/setup_worker.py"):
            left.append(word)
    os.environ |= json.loads(context).get("env_vars", {})
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(Path(left[0]).parent), *filter(None, path), *sys.path[1:]]
    sys.argv = left
    runpy.run_path(left[0], run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
