"""`pairloop doctor`: what this machine can do, one line each, with the command that mends it.

Facts are asked for in `probes.py`, and by `child.py` in a process of its own where asking may hang
or crash; pure functions in `software.py` and `hardware.py` judge them. A check that breaks is a
line that says so, and the others go on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor import hardware, probes, software
from launch.doctor.facts import Finding, Needs
from rlhf.redaction import mask

if TYPE_CHECKING:
    from rlhf.config import RunConfig

Checks = list[tuple[str, Callable[[], Finding | list[Finding]]]]
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "n.a.": "dim"}


def needs_of(config: RunConfig) -> Needs:
    """What a config asks of the machine."""
    extras = {"vllm"} if config.rollout.engine == "vllm" else set()
    extras |= {"qlora"} if config.model.tuning == "qlora" else set()
    if {"vllm", "qlora"} <= extras and config.rollout.sync != "merged":
        extras.add("vllm-nf4")
    extras |= set(config.tracking.trackers)
    return Needs(
        Path(config.run.directory),
        config.placement.device,
        config.rollout.engine,
        config.model.precision,
        config.model.path,
        frozenset(extras),
    )


def examine(needs: Needs) -> list[Finding]:
    """Every check of this machine, in the order in which they are shown."""
    with _checks(needs) as checks:
        found = [line for name, check in checks for line in isolated(name, check)]
    # Messages of libraries may quote what they were given.
    return [replace(f, found=mask(f.found)) for f in found]


def isolated(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """A check's lines; where it breaks, a line that names it, so that the others can go on."""
    try:
        found = check()
    except Exception as error:
        told = " ".join(f"this check broke: {type(error).__name__}: {error}".split())
        return [Finding(name, "fail", told, "this is a fault of pairloop: report it")]
    return found if isinstance(found, list) else [found]


@contextmanager
def _checks(needs: Needs) -> Iterator[Checks]:
    """The checks with their facts; the slow ones are asked side by side from the start."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        torch, vllm, bitsandbytes, ray = (
            pool.submit(probes.ask_child, topic)
            for topic in ("torch", "vllm", "bitsandbytes", "ray")
        )
        driver = pool.submit(probes.ask_driver)
        hub = pool.submit(probes.ask_hub, needs.model)
        address = pool.submit(probes.ask_ray_address)
        packages = pool.submit(lambda: probes.ask_packages(bool(driver.result().gpus)))
        cpu = pool.submit(probes.ask_cpu)
        yield [
            ("python", lambda: software.python(sys.version_info[:3])),
            ("names", lambda: software.names(probes.ask_shadow())),
            ("packages", lambda: software.core(packages.result())),
            ("extras", lambda: software.extras(packages.result(), needs)),
            ("torch", lambda: software.torch(torch.result(), driver.result(), packages.result())),
            ("gpu driver", lambda: hardware.driver(driver.result(), torch.result(), needs)),
            ("gpus", lambda: hardware.gpus(driver.result(), needs)),
            (
                "vllm",
                lambda: software.vllm(
                    vllm.result(), packages.result(), driver.result(), cpu.result(), needs
                ),
            ),
            (
                "bitsandbytes",
                lambda: software.bitsandbytes(
                    bitsandbytes.result(), packages.result(), driver.result(), needs
                ),
            ),
            ("cpu", lambda: hardware.cpu(cpu.result())),
            ("memory", lambda: hardware.memory(probes.ask_memory())),
            *_places(needs),
            ("ray", lambda: software.ray(ray.result(), address.result(), packages.result())),
            (
                "compiler",
                lambda: software.compiler(
                    probes.ask_tools(), packages.result(), torch.result(), driver.result()
                ),
            ),
            (
                "ports",
                lambda: hardware.ports(probes.ask_ports(), address.result(), packages.result()),
            ),
            ("hub", lambda: hardware.hub(hub.result())),
            ("accounts", lambda: hardware.accounts(probes.ask_accounts())),
        ]


def _places(needs: Needs) -> Checks:
    """Folders that are written to, and the setting that moves each."""
    places = (
        ("runs", needs.directory, "--run.directory FOLDER"),
        ("model cache", probes.hub_cache(), "export HF_HOME=FOLDER"),
        ("converted models", probes.cache_home() / "pairloop", "export XDG_CACHE_HOME=FOLDER"),
        ("home", Path.home(), "export HOME=FOLDER"),
    )
    return [(name, partial(_place, name, path, setting)) for name, path, setting in places]


def _place(name: str, path: Path, setting: str) -> Finding:
    return hardware.place(name, probes.ask_place(path), setting, bulky=name != "home")


def as_json(findings: Sequence[Finding]) -> str:
    """A list of records: name, status, found, remedy, command."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def lines(findings: Sequence[Finding]) -> str:
    """Aligned, a line each: status, name, what was found, how to mend it."""
    width = max(len(f.name) for f in findings)
    return "\n".join(
        f"{f.status:<4}  {f.name:<{width}}  {f.found}{_mend(f) and f'  | {_mend(f)}'}"
        for f in findings
    )


def _mend(finding: Finding) -> str:
    return ": ".join(part for part in (finding.remedy, finding.command) if part)


def total(findings: Sequence[Finding]) -> str:
    """How many of each.

    >>> total([Finding("python", "ok", "3.12"), Finding("slurm", "n.a.", "no sbatch")])
    '2 checks: 1 ok, 0 warn, 0 fail, 1 n.a.'
    """
    counts = ", ".join(f"{sum(f.status == s for f in findings)} {s}" for s in STYLES)
    return f"{len(findings)} checks: {counts}"


def show(findings: Sequence[Finding]) -> None:
    """A table on a terminal, plain aligned lines elsewhere."""
    if not sys.stdout.isatty():
        print(f"{lines(findings)}\n{total(findings)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("", "check", "found", "to mend it"):
        table.add_column(title, overflow="fold", no_wrap=title in ("", "check"))
    for finding in findings:
        # As Text, a `[vllm]` stays what it is instead of becoming markup.
        cells = (finding.name, finding.found, _mend(finding))
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(status, *(Text(cell) for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    console.print(total(findings), markup=False)
