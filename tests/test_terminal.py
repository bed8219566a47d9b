"""What the terminal shows: plain lines with the time left, bars, tables that lose nothing."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import terminal
from launch.terminal import SECONDS_BETWEEN_LINES, Terminal


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime)
        monkeypatch.setattr(terminal, "time", fake)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, each line without its time of day."""
    found = [
        re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line) for line in capsys.readouterr().out.splitlines()
    ]
    return [match.group(1) for match in found if match]


def test_a_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, and a long line is not broken."""
    text = "pairs [bold]80[/bold] of [96] " + "word " * 60 + "end"
    Terminal(plain=True).say(text)
    assert lines(capsys) == [text]


def test_the_time_left_follows_from_the_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal(plain=True).progress("generate", 10) as advance:
        for done in range(1, 11):
            clock.now += 10
            advance(done)
    # Ten seconds an item, a line every 20 seconds and one at the end.
    assert lines(capsys) == [
        f"generate {done}/10, {done * 10} s, {100 - done * 10} s left" for done in (2, 4, 6, 8, 10)
    ]


def test_a_resumed_stage_counts_only_its_own_work(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """90 of 100 were done before: 15 s an item, not 15/91 s."""
    with Terminal(plain=True).progress("generate", 100) as advance:
        clock.now += 15
        advance(91)
        clock.now += 15
        advance(92)
    assert lines(capsys) == ["generate 92/100, 30 s, 120 s left"]


@pytest.mark.parametrize("dones", [[0], [0, 0], [1], [1, 1], [3, 2]])
def test_the_time_left_is_finite_whatever_is_reported(
    dones: list[int], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing done, nothing new, or a step back: no division by zero, no negative time."""
    with Terminal(plain=True).progress("train", 4) as advance:
        for done in dones:
            clock.now += SECONDS_BETWEEN_LINES
            advance(done)
    said = lines(capsys)
    assert len(said) == len(dones)
    for line in said:
        left = re.search(r"(-?[\d.]+|nan|inf) s left", line)
        assert left is not None, line
        assert 0 <= float(left.group(1)) < 1e4


def test_no_time_at_all_is_no_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(plain=True).progress("score", 0) as advance:
        advance(0)
    assert lines(capsys) == ["score 0/0, 0 s, 0 s left"]


def test_a_short_stage_says_only_that_it_is_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal(plain=True).progress("score", 500) as advance:
        for done in range(1, 501):
            clock.now += 0.01
            advance(done)
    assert lines(capsys) == ["score 500/500, 5 s, 0 s left"]


def test_a_terminal_gets_a_bar_and_plain_wins_over_it() -> None:
    shown = Terminal(plain=False)
    screen = io.StringIO()
    shown.console, shown.live = Console(file=screen, force_terminal=True, width=100), True
    with shown.progress("generate", 4) as advance:
        advance(3)
    assert "generate" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()
    assert "s left" not in screen.getvalue()
    assert not Terminal(plain=True).live


@pytest.mark.parametrize("columns", ["200", "50"])
def test_a_table_loses_nothing(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    rows = [
        {"dimension": "problem_solution", "start": "0.412", "best": "0.655", "95%": "0.02 to 0.09"},
        {"dimension": "groundedness", "start": "0.500", "best": "0.700", "95%": "-0.01 to 0.08"},
    ]
    Terminal(plain=True).table("round 1", rows)
    shown = capsys.readouterr().out
    assert "round 1" in shown
    for row in rows:
        for name, value in row.items():
            assert name in shown
            for word in value.split():
                assert word in shown, (word, shown)
