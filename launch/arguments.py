"""What the command line takes and says back: settings as flags, usage, how to go on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import CycloptsError, UnknownOptionError

Override = tuple[str, str]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Dotted flags apart from the rest: `--a.b V` and `--a.b=V`, up to a bare `--`.

    >>> split_overrides(["train", "run.yaml", "--gates.max_drop=0.1", "--plain"])
    (['train', 'run.yaml', '--plain'], [('gates.max_drop', '0.1')])

    Raises InputError for a dotted flag without a value.
    """
    from rlhf.errors import InputError

    rest: list[str] = []
    overrides: list[Override] = []
    left = iter(arguments)
    for token in left:
        if token == "--":
            return [*rest, token, *left], overrides
        dotted = re.match(r"--([^=\s]*\.[^=\s]*)(?:=(.*))?\Z", token, re.DOTALL)
        if dotted is None:
            rest.append(token)
            continue
        key, value = dotted.groups()
        if value is None:
            value = next(left, None)
            if value is None or value.startswith("--"):
                found = "nothing" if value is None else value
                raise InputError(f"--{key} needs a value, found {found}; write --{key}=VALUE")
        overrides.append((key, value))
    return rest, overrides


def usage(error: CycloptsError) -> str:
    """The message, with the setting that a flag without its section was meant to be."""
    message = str(error).strip()
    if isinstance(error, UnknownOptionError) and "Did you mean" not in message and error.token:
        from rlhf.config_help import suggest

        flag = (error.token.keyword or error.token.value).split("=")[0].lstrip("-")
        near = suggest(flag)
        if near:
            message += f" Did you mean {' or '.join(f'--{name}' for name in near)}?"
    return f"{message} `pairloop --help` says more."


def stopped(message: str, arguments: Sequence[str], status: int) -> int:
    """Say how to go on, as a line to paste; the exit status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(f"{message} (with its launcher)", file=sys.stderr)
        return status
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = sys.executable if as_module else sys.argv[0]
    if shutil.which(Path(program).name) == program:
        program = Path(program).name
    command = [program, *(("-m", "launch") if as_module else ()), *arguments]
    print(f"{message}:\n  {shlex.join(command)}", file=sys.stderr)
    return status


def fail(message: str, status: int) -> int:
    """Say what is wrong; the exit status."""
    print("error: " + message.replace("\n", "\n       "), file=sys.stderr)
    return status
