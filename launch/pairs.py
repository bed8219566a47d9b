"""`pairloop pairs`: look at a preference file, take out what spoils it, convert it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from rlhf.pair_formats import Preferences
    from rlhf.quality import Check, Report

HELP = """Look at preference files, clean and convert them.

Files are JSONL, JSON or Parquet: a run's pairs.parquet, TRL's formats (explicit or implicit prompt,
standard or conversational), ShareGPT's, or unpaired labels. The format is detected, and said."""

app = App(name="pairs", help=HELP, help_format="plaintext")

Flag = Parameter(negative="")
_WIDTH = 1000
"""Columns where output is no terminal: nothing is folded."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a file."""

    format: str | None = None
    """What it is; detected by default."""
    column: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """A column under another name, as NAME=COLUMN: category=topic, score_chosen=rating_a."""


DETECTED = Reading()


@app.command
def analyze(
    file: Path,
    /,
    *more: Path,
    reading: Reading = DETECTED,
    target: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    critical: str | None = None,
    examples: int = 3,
    json: Annotated[bool, Flag] = False,
) -> int:
    """Say what is wrong with preference data. Exits with 3 where a critical check fails.

    Parameters
    ----------
    file
        Preference file.
    more
        Further files: each is then a split, and what they share is a leak.
    target
        A check's target, as NAME=VALUE: identical=0.02, duplicate=0.01.
    critical
        Checks that may not fail, with commas between them, or none.
    examples
        Rows shown of each check that found some.
    json
        Print the report as JSON.
    """
    from rlhf.errors import DataGateError, InputError
    from rlhf.quality import CRITICAL, TARGETS, analyze

    asked = CRITICAL if critical is None else tuple(_listed(critical))
    targets = {**TARGETS, **{n: _number("target", n, v) for n, v in _named("target", target)}}
    files = [_read(path, reading) for path in (file, *more)]
    report = analyze(files, targets, asked, examples)
    unmeasured = [c for c in report.checks if c.verdict == "not measured" and c.critical]
    if critical is not None and unmeasured:
        first = unmeasured[0]
        raise InputError(f"--critical {first.name} can't be measured: {first.note}")
    if json:
        _print_json(report.as_json())
    else:
        _show(report)
    if report.failed:
        named = "; ".join(f"{c.name} is {_value(c)}, must be {_target(c)}" for c in report.failed)
        raise DataGateError(f"critical checks failed: {named}")
    return 0


@app.command(name="filter")
def filter_(
    file: Path,
    out: Path,
    /,
    *,
    rules: str | None = None,
    reading: Reading = DETECTED,
    fallen: Path | None = None,
    json: Annotated[bool, Flag] = False,
) -> int:
    """Take rows out by rules; the rest is written as it was. The funnel says what each rule took.

    Rules: empty, identical, inverted, duplicate, contradiction, near_duplicate=0.8,
    meta_commentary, refusal, min_delta=VALUE, max_length_ratio=2. Default: the first five, as far
    as the data can answer them.

    Parameters
    ----------
    file
        Preference file.
    out
        File to write, of the same kind.
    rules
        Rules in their order, with commas between them.
    fallen
        Also write which records fell, by which rule and why (JSONL, JSON or Parquet).
    json
        Print the funnel as JSON.
    """
    from rlhf.errors import InputError
    from rlhf.pair_files import check_target, write_records
    from rlhf.pair_filter import apply_rules, default_rules, write_kept

    if fallen is not None:
        check_target(fallen)
        if fallen.absolute() == out.absolute():
            raise InputError(f"--fallen must not be {out}, where the others go; name another")
    preferences = _read(file, reading)
    asked = default_rules(preferences) if rules is None else _listed(rules)
    _refuse_overwriting(file, out, fallen)
    filtered = apply_rules(preferences, asked)
    write_kept(preferences, filtered.stay, out)
    if fallen is not None:
        write_records(fallen, filtered.fallen)
    if json:
        _print_json(filtered.funnel)
        return 0
    steps = filtered.funnel["steps"]
    rows = [
        {name: f"{s[name]:.1%}" if name == "kept" else str(s[name]) for name in s} for s in steps
    ]
    _say(f"{file}: {preferences.format}, {filtered.funnel['rows']} records")
    if rows:
        _table(rows)
    kept = filtered.stay.len()
    _say(f"{kept} of {filtered.funnel['rows']} ({filtered.funnel['kept']:.1%}) written to {out}")
    if fallen is not None:
        _say(f"{filtered.fallen.height} that fell are named in {fallen}")
    return 0


@app.command
def convert(
    file: Path,
    out: Path,
    /,
    *,
    to: str,
    reading: Reading = DETECTED,
) -> int:
    """Write preferences in another format, and say what it can't hold.

    Formats to write: explicit, explicit-chat, implicit, implicit-chat, sharegpt, labels,
    labels-chat. The suffix of OUT says JSONL, JSON or Parquet.

    Parameters
    ----------
    file
        Preference file.
    out
        File to write.
    to
        Format of the new file.
    """
    from rlhf.pair_convert import convert
    from rlhf.pair_files import check_target, write_records

    check_target(out)
    _refuse_overwriting(file, out, None)
    preferences = _read(file, reading)
    converted = convert(preferences, to)
    write_records(out, converted.table)
    before, after = preferences.table.height, converted.table.height
    _say(f"{file}: {preferences.format}, {before} records; {out}: {to}, {after} records")
    for note in (*preferences.notes, *converted.notes):
        _say(f"note: {note}")
    for loss in converted.lost:
        _say(f"lost: {loss}")
    if not converted.lost:
        _say("nothing is lost")
    return 0


app.command(
    "launch.pair_folders:select", name="select", help="Make pairs of stored completions and scores."
)
app.command(
    "launch.pair_folders:dedupe", name="dedupe", help="Take out records that repeat an earlier one."
)


def _read(path: Path, reading: Reading) -> Preferences:
    from rlhf.pair_formats import read_preferences

    return read_preferences(path, reading.format, dict(_named("column", reading.column)))


def _listed(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    return [] if names == ["none"] else [name for name in names if name]


def _named(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    from rlhf.errors import InputError

    for text in texts:
        if "=" not in text.strip("="):
            raise InputError(f"--{flag} must be NAME=VALUE, got {text!r}")
    return [(name, value) for name, _, value in (text.partition("=") for text in texts)]


def _number(flag: str, name: str, value: str) -> float:
    from rlhf.errors import InputError

    try:
        return float(value)
    except ValueError:
        raise InputError(f"--{flag} {name} must be a number, got {value!r}") from None


def _refuse_overwriting(file: Path, *outs: Path | None) -> None:
    from rlhf.errors import InputError

    for out in outs:
        if out is not None and out.exists() and file.exists() and out.samefile(file):
            raise InputError(f"{out} must not be the file that is read; name another")


def _show(report: Report) -> None:
    kind = "answers" if report.format.startswith("labels") else "pairs"
    _say(
        f"{', '.join(report.files)}: {report.format}, {report.rows} {kind} of "
        f"{report.prompts} prompts"
    )
    judged = [check for check in report.checks if check.target is not None]
    if judged:
        _table([_judged_row(check) for check in judged], "Checks with a target")
    _table([_row(c) for c in report.checks if c.target is None], "Measured, without a target")
    for field, values in report.balance.items():
        shown = [{k: _cell(k, v) for k, v in row.items() if v is not None} for row in values[:12]]
        more = f" (12 of {len(values)})" if len(values) > 12 else ""
        _table([{field: row.pop("value"), **row} for row in shown], f"By {field}{more}")
    for name, rows in report.examples.items():
        _say(f"\n{name}:")
        for row in rows:
            _say(f"  {_within(report, row['where'])}: {_within(report, row['reason'])}")
            for part in (key for key in row if key not in ("where", "reason")):
                _say(f"    {part}: {row[part]}")
    notes = [f"{c.name}: {c.note}" for c in report.checks if c.note]
    _say("")
    for note in (*notes, *report.notes):
        _say(f"note: {note}")


def _within(report: Report, text: str) -> str:
    """Text without the file's name where there is one file only."""
    if len(report.files) > 1:
        return text
    name = re.escape(report.files[0])
    return re.sub(rf"{name} (?=record \d)", "", re.sub(rf"{name}:(?=\d)", "line ", text))


def _judged_row(check: Check) -> dict[str, str]:
    verdict = f"{check.verdict} (critical)" if check.critical else check.verdict
    found = _row(check)
    meaning = found.pop("what")
    return {**found, "target": _target(check), "verdict": verdict, "what": meaning}


def _row(check: Check) -> dict[str, str]:
    ends = (check.low, check.high)
    flagged = " flagged" if check.name == "meta_commentary" else ""
    between = " to ".join(_amount(check, end) for end in ends if end is not None)
    return {
        "check": check.name,
        "value": _value(check),
        "rows": "" if check.count is None else f"{check.count} of {check.of}{flagged}",
        "95% interval": between,
        "what": check.what,
    }


def _value(check: Check) -> str:
    return "not measured" if check.value is None else _amount(check, check.value)


def _amount(check: Check, value: float) -> str:
    return f"{value:.1%}" if check.share else f"{value:+.3f}"


def _target(check: Check) -> str:
    assert check.target is not None
    return f"{check.passes_if} {f'{check.target:.1%}' if check.share else f'{check.target:g}'}"


def _cell(name: str, value: Any) -> str:
    if name in ("share", "good"):
        return f"{value:.1%}"
    return f"{value:+.3f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, str]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(highlight=False, emoji=False, markup=False, width=width)
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(rows[0]):
        left = index == 0 or column in ("what", "verdict")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    with console.capture() as capture:
        console.print(table)
    _say(capture.get().rstrip("\n"))


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what is still said goes nowhere, and the exit
        # status stays what the data earned.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(value: Any) -> None:
    import json

    _say(json.dumps(value, indent=2, ensure_ascii=False))
