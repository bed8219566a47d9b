"""What the terminal shows: plain lines with the time left, tables that lose nothing; and, on a real
terminal, a live display that nothing tears and that Ctrl-C ends with the command to resume."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fakes import run_values
from screen import Session, environment

from launch import display, terminal
from launch.terminal import SECONDS_BETWEEN_LINES, Terminal

ROOT = Path(__file__).parents[1]


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime)
        for module in (terminal, display):
            monkeypatch.setattr(module, "time", fake)


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


def test_a_cell_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"point": "[q_proj,v_proj]", "said": "no [/such/file]; pip install 'pairloop[qlora]'"}]
    Terminal(plain=True).table("points", rows)
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in rows[0].values())


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


def test_the_latest_numbers_end_the_next_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Terminal(plain=True)
    shown.stage("round 1 training")
    with shown.progress("train", 2) as advance:
        clock.now += 30
        shown.metrics("round 1 train", {"loss": 0.69314, "accuracy": 0.5})
        advance(1)
    shown.stage("round 1 evaluation")
    with shown.progress("evaluation", 1) as advance:
        advance(1)
    assert lines(capsys) == [
        "train 1/2, 30 s, 30 s left; loss 0.6931, accuracy 0.5",
        "evaluation 1/1, 0 s, 0 s left",
    ]


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


NOISY = """
import logging, os, subprocess, sys, time
from known_verifiers import vowels

calls = 0

def verify(prompt, completion):
    global calls
    calls += 1
    if calls % 8 == 1:
        print(f"NOISE print {calls}.")
        os.write(2, f"NOISE raw {calls}.\\n".encode())
        sys.stderr.write(f"NOISE half {calls}")
        logging.getLogger("noise").warning(f"NOISE logged {calls}.")
    if calls % 16 == 1:
        subprocess.run(["sh", "-c", f"echo NOISE child {calls}. >&2"], check=True)
    time.sleep(SECONDS)
    return vowels(prompt, completion)
"""


def config_with(folder: Path, model: Path, seconds: float, **sections: Any) -> Path:
    """A run whose verifier writes to the terminal in every way, and takes `seconds` an answer."""
    values = run_values(folder, model, tracking={"plain": False}, **sections)
    verifier = folder / "noisy.py"
    verifier.write_text(NOISY.replace("SECONDS", str(seconds)))
    values["judges"]["panel"][0]["function"] = f"{verifier}:verify"
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.engine
def test_a_live_display_shows_the_run_and_nothing_tears_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    steps = {"learning_rate": 0.003, "batch_pairs": 1, "epochs": 8}
    # Every stage outlasts several looks, or the display never shows it: completions by being long.
    drawn = {"max_new_tokens": 100}
    config = config_with(tmp_path, tiny_model, seconds=0.01, learner=steps, rollout=drawn)
    with Session(["-m", "launch", "train", str(config)], ROOT) as session:
        seen = list(session.frames())
    assert session.status == 0, session.screen.text
    # One rule parts the lines from the display. A torn frame would leave a second one behind.
    assert {frame.count("\u2500" * 100) for frame in seen} == {0, 1}
    for words in (
        (r"round 1 completions .* \d/3 .* left",),
        (r"round 1 train ", r"^round 1 train: loss \d\S*, accuracy \S+, margin -?\d"),
        (r"round 1 evaluation/scores",),
        (r"^ *round 1 *$", "round 2 completions"),
        (r"^round 1 held_out: reward",),
    ):
        assert any(all(re.search(w, frame, re.M) for w in words) for frame in seen), words
    left = session.screen.text
    assert "\u2500" * 100 not in left
    assert [left.count(f"\nround {i}  ") + left.count(f"\nround {i}\n") for i in (1, 2)] == [1, 1]
    overheard = (tmp_path / "runs/trial/output.log").read_text()
    for kind in ("print", "raw", "logged", "child"):
        said = re.findall(rf"NOISE {kind} \d+\.", overheard)
        assert said
        assert [left.count(line) for line in said] == [1] * len(said)
    # Whatever scrolled by is whole: a line of ours, or a line of noise, never both.
    for line in left.splitlines():
        assert not ("NOISE" in line and re.search(r"\d\d:\d\d:\d\d|━", line)), line
    assert re.search(r"best policy: .*policy", left.replace("\n", ""))


NAMES = ("one", "two", "three")
CROWD = """
import os, sys, threading
from pathlib import Path
from launch.display import Display

sys.setswitchinterval(1e-5)
with Display(Path(sys.argv[1])) as display:

    def talk(name):
        for number in range(150):
            # The display grows and shrinks while others draw it.
            display.metrics = "line\\n" * (number % 5)
            display.console.print(f"{name} {number}.")
            os.write(1, f"NOISE {name} {number}.\\n".encode())

    crowd = [threading.Thread(target=talk, args=(name,)) for name in ("one", "two", "three")]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
"""


def test_threads_that_write_at_once_leave_one_display(tmp_path: Path) -> None:
    script = tmp_path / "crowd.py"
    script.write_text(CROWD)
    with Session([str(script), str(tmp_path / "output.log")], ROOT) as session:
        seen = list(session.frames())
    assert session.status == 0, session.screen.text
    assert {frame.count("\u2500" * 100) for frame in seen} == {0, 1}
    left = session.screen.text.splitlines()
    said = [f"{noise}{name} {i}." for noise in ("", "NOISE ") for name in NAMES for i in range(150)]
    assert sorted(line for line in left if line) == sorted(said)


@pytest.mark.engine
def test_ctrl_c_is_answered_at_once_and_the_command_that_it_names_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = config_with(tmp_path, tiny_model, seconds=0.2, rounds={"count": 1})
    with Session(["-m", "launch", "train", str(config)], ROOT) as session:
        session.wait_for(r"round 0 evaluation/scores")
        session.press_ctrl_c()
        asked = time.monotonic()
        session.wait_for(r"Ctrl-C: stopping after this shard or step; Ctrl-C again stops now")
        assert time.monotonic() - asked < 1
        list(session.frames())
    assert session.status == 75, session.screen.text
    said = session.screen.text.replace("\n", "")
    assert "stopped at a safe point by SIGINT; run the same command to resume:" in said
    (command,) = re.findall(r"resume:\s+(.*run\.yaml)", said)
    assert not session.cursor_hidden
    # The path may have been broken by the terminal's edge, and by nothing else.
    again = subprocess.run(
        [*shlex.split(command), "--plain"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "\x1b" not in again.stdout + again.stderr
    assert re.search(r"^\d\d:\d\d:\d\d best policy: ", again.stdout, re.M)


@pytest.mark.engine
def test_ctrl_c_twice_stops_now(tiny_model: Path, tmp_path: Path) -> None:
    config = config_with(tmp_path, tiny_model, seconds=60)
    with Session(["-m", "launch", "train", str(config)], ROOT) as session:
        session.wait_for(r"round 0 evaluation/scores")
        session.press_ctrl_c()
        session.wait_for(r"Ctrl-C again stops now")
        session.press_ctrl_c()
        asked = time.monotonic()
        list(session.frames())
        assert time.monotonic() - asked < 45, "the answer under way takes 60 s"
    assert session.status == 130, session.screen.text
    assert "stopped at once; what was finished is kept" in session.screen.text
    assert not session.cursor_hidden


@pytest.mark.engine
def test_plain_lines_on_a_terminal_have_no_codes(tiny_model: Path, tmp_path: Path) -> None:
    config = config_with(tmp_path, tiny_model, seconds=0, rounds={"count": 1})
    with Session(["-m", "launch", "train", str(config), "--plain"], ROOT) as session:
        list(session.frames())
    assert session.status == 0, session.screen.text
    assert b"\x1b" not in session.raw
    assert not (tmp_path / "runs/trial/output.log").exists()
