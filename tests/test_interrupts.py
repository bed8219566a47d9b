"""Signals ask; `check` answers at the next safe point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import rlhf
from rlhf.errors import Interrupted
from rlhf.interrupts import Interrupts

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
SHOWN = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
ROOT = str(Path(rlhf.__file__).parents[1])

LOOP = """
import sys
from rlhf.errors import Interrupted
from rlhf.interrupts import Interrupts
with Interrupts() as interrupts:
    print("ready", flush=True)
    try:
        for line in sys.stdin:
            interrupts.check()
            print("safe", flush=True)
    except Interrupted as stop:
        sys.exit(stop.exit_status)
"""


def test_nothing_is_asked_without_a_signal() -> None:
    with Interrupts() as interrupts:
        interrupts.check()
        assert interrupts.requested is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_check_and_not_before(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        assert interrupts.requested == number.name
        with pytest.raises(Interrupted, match=f"{number.name}; run the same command to resume"):
            interrupts.check()
        with pytest.raises(Interrupted):
            interrupts.check()
    assert f"{SHOWN[number]}: stopping after this shard or step" in capfd.readouterr().err


def test_only_the_keyboard_is_told_how_to_stop_at_once_and_whoever_asked_hears_it() -> None:
    said: list[str] = []
    with Interrupts(said.append):
        for number in SIGNALS:
            signal.raise_signal(number)
    assert [line for line in said if "Ctrl-C again stops now" in line] == [said[-1]]
    assert len(said) == len(SIGNALS)


def test_the_second_sigint_stops_at_once() -> None:
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested == "SIGINT"
        signal.raise_signal(signal.SIGINT)


def test_a_scheduler_may_repeat_itself_and_the_first_signal_is_the_one_named() -> None:
    with Interrupts() as interrupts:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert interrupts.requested == "SIGUSR1"


def test_former_handlers_come_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), Interrupts():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_could_not_be_obeyed_any_more_is_known_to_who_listens_around() -> None:
    """The last point of a sweep has no step left; the next must not begin."""
    with Interrupts() as outer:
        with Interrupts() as inner:
            signal.raise_signal(signal.SIGUSR1)
        assert (inner.requested, outer.requested) == ("SIGUSR1", "SIGUSR1")
    with Interrupts() as outer:
        with pytest.raises(Interrupted), Interrupts() as inner:
            signal.raise_signal(signal.SIGUSR1)
            inner.check()
        assert outer.requested is None, "that stop is over"


def test_in_another_thread_it_changes_nothing() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def enter() -> None:
        with Interrupts() as interrupts:
            interrupts.check()
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(timeout=10)
    assert seen == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_signalled_from_outside_exits_with_75(number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    deadline = threading.Timer(20, child.kill)
    deadline.start()
    try:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, err = child.communicate("go on\n" * 3, timeout=20)
    finally:
        deadline.cancel()
        child.kill()
        child.wait(timeout=10)
    assert child.returncode == 75
    assert f"{SHOWN[number]}: stopping" in err
