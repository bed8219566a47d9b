"""Run configurations that travel with the packages; `pairloop init` prints one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Preset:
    """A configuration and what its first lines say of it."""

    name: str
    what: str
    hardware: str
    time: str


def path(name: str) -> Path:
    """The file of a preset: in the wheel `launch/configs/`, in a checkout `configs/`.

    Raises InputError naming the presets there are.
    """
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    from rlhf.errors import InputError

    raise InputError(f"there is no preset {name}; there are {', '.join(_names())}")


def presets() -> list[Preset]:
    """Every preset, by name."""
    return [describe(name, path(name).read_text(encoding="utf-8")) for name in _names()]


def listing() -> str:
    """What `pairloop presets` prints."""
    blocks = [
        f"{p.name}\n  {p.what}\n  hardware  {p.hardware}\n  time      {p.time}\n" for p in presets()
    ]
    closing = (
        "`pairloop init NAME > run.yaml` writes one down; its first lines say how to run it.\n"
    )
    return "\n".join([*blocks, closing])


def describe(name: str, text: str) -> Preset:
    """What the comment at the top says: `... Hardware: ... Time: ...`, each up to its full stop.

    Raises ValueError where the comment has another form.
    """
    lines = [line[1:].strip() for line in header(text)]
    found = re.match(r"(.+?) Hardware: (.+?)\.(?= |$).*? ?Time: (.+?)\.(?= |$)", " ".join(lines))
    if found is None:
        raise ValueError(f"{name}: its first lines must say `Hardware: ... Time: ...`")
    return Preset(name, *found.groups())


def header(text: str) -> list[str]:
    """The comment lines that a configuration opens with."""
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        found.append(line)
    return found


def _folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    return [folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()]


def _names() -> list[str]:
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.yaml")})
