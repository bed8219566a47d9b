"""Run configurations that travel with the packages."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """The file of a preset: in the wheel `launch/configs/`, in a checkout `configs/`.

    Raises InputError naming the presets there are.
    """
    here = Path(__file__).resolve().parent
    folders = [folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    from rlhf.errors import InputError

    known = sorted(file.stem for folder in folders for file in folder.glob("*.yaml"))
    raise InputError(f"there is no preset {name}; there are {', '.join(known)}")
