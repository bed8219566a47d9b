"""How each fact of `launch/doctor/facts.py` is asked.

Nothing here imports torch, vLLM, Ray or bitsandbytes, and nothing calls the driver or the network:
those may hang or crash, so `launch/doctor/child.py` asks them in a process with a deadline.
"""

from __future__ import annotations

import ctypes
import json
import math
import netrc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import shadow
from launch.doctor.facts import (
    Accounts,
    Cpu,
    Driver,
    Gpu,
    Hub,
    Memory,
    Packages,
    Place,
    Ports,
    RayAddress,
    Told,
    Tools,
    Wanted,
)

RAY_PORTS = (6379, 8265)
TRUE = {"1", "ON", "YES", "TRUE"}
"""What Hugging Face libraries take for true."""
_DRIVER_SECONDS = 10.0
_IMPORT_SECONDS = 60.0
_HUB_SECONDS = 4.0
_CONNECT_SECONDS = 3.0


def ask_packages(gpu: bool) -> Packages:
    """Requirements and tested versions for this kind of machine, and what is installed.

    Raises PackageNotFoundError where pairloop is neither installed nor run from its checkout.
    """
    home = Path(__file__).resolve().parents[1]
    project = home.parent / "pyproject.toml"
    checkout = home.parent if project.is_file() else None
    # An editable installation's metadata may be older than the checkout.
    requires = _stated(project) if checkout else metadata.requires(shadow.DISTRIBUTION) or []
    file = (checkout or home) / "constraints" / ("gpu.txt" if gpu else "cpu.txt")
    lines = file.read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return Packages(
        tuple(_wanted(line) for line in requires),
        {canonicalize_name(d.name): d.version for d in metadata.distributions()},
        {canonicalize_name(r.name): next(iter(r.specifier)).version for r in pinned},
        _short(file),
        gpu,
        _short(checkout) if checkout else None,
    )


def _stated(project: Path) -> list[str]:
    """The requirements of pyproject.toml, written as a wheel's metadata has them."""
    stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return [*stated["dependencies"]] + [
        f"{line}; extra == '{extra}'"
        for extra, lines in stated["optional-dependencies"].items()
        for line in lines
    ]


def _wanted(line: str) -> Wanted:
    requirement = Requirement(line)
    extra = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker or ""))
    name = canonicalize_name(requirement.name)
    return Wanted(name, str(requirement.specifier), extra.group(1) if extra else None)


def _short(path: Path) -> str:
    """Relative to the working directory where it lies inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def ask_child(topic: str, seconds: float = _IMPORT_SECONDS) -> Told:
    """One topic of `launch/doctor/child.py`, or how that process ended instead of answering."""
    # -P keeps the child's own folder off the import path.
    child = Path(__file__).with_name("child.py")
    command = [sys.executable, "-P", str(child), topic]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Told(error=f"no answer within {seconds:g} s")
    if done.returncode == 0:
        return Told(json.loads(done.stdout))
    if done.returncode < 0:
        return Told(error=f"crashed with {signal.Signals(-done.returncode).name}")
    last = [line for line in done.stderr.splitlines() if line.strip()]
    return Told(error=last[-1].strip() if last else f"ended with status {done.returncode}")


def ask_driver() -> Driver:
    """The driver's version and GPUs, as this process's children see them."""
    module = Path("/proc/driver/nvidia/version")
    text = module.read_text(encoding="utf-8") if module.is_file() else ""
    kernel = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    told = ask_child("gpus", _DRIVER_SECONDS)
    if told.error is not None:
        return Driver(module=bool(text), error=told.error, visible=visible)
    found = told.values
    return Driver(
        module=bool(text),
        version=found["driver"] or (kernel.group(1) if kernel else None),
        cuda=tuple(found["cuda"]) if found["cuda"] else None,
        gpus=tuple(
            Gpu(g["name"], tuple(g["capability"]), g["total"], g["free"]) for g in found["gpus"]
        ),
        error=found["why"],
        visible=visible,
    )


def ask_memory(root: Path = Path("/")) -> Memory:
    """Memory of the machine, and what its control group leaves to this process."""
    lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    limits = [
        int(text)
        for text in _control(root, "memory", "memory.max", "memory.limit_in_bytes")
        if text.isdecimal()
    ]
    total = kib["MemTotal"] * 1024
    # Version 1 says "no limit" with a number larger than any machine.
    limit = min((value for value in limits if value < total), default=None)
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return Memory(total, kib["MemAvailable"] * 1024, limit, shared)


def _control(root: Path, controller: str, file_v2: str, file_v1: str) -> list[str]:
    """A control group's setting, from this process's own group upwards; either version."""
    found = []
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and controller)
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top):
                file = folder / (file_v1 if controllers else file_v2)
                found += [file.read_text(encoding="utf-8").strip()] if file.is_file() else []
    return found


def ask_cpu() -> Cpu:
    """Processors, their instruction sets, and what limits threads."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    try:
        ctypes.CDLL("libnuma.so.1")
        libnuma = True
    except OSError:
        libnuma = False
    return Cpu(
        os.uname().machine,
        os.cpu_count() or 1,
        len(os.sched_getaffinity(0)),
        quota(),
        frozenset(flags.group(1).split() if flags else ()),
        libnuma,
        os.environ.get("OMP_NUM_THREADS"),
    )


def quota(root: Path = Path("/")) -> int | None:
    """Processors that the control group's share of time is worth, rounded up; None for all."""
    pairs = [text.split() for text in _control(root, "cpu", "cpu.max", "")]
    spent = _control(root, "cpu", "", "cpu.cfs_quota_us")
    periods = _control(root, "cpu", "", "cpu.cfs_period_us")
    pairs += [list(pair) for pair in zip(spent, periods, strict=True)]
    worth = [math.ceil(int(time) / int(period)) for time, period in pairs if time.isdecimal()]
    return min(worth, default=None)


def ask_place(path: Path) -> Place:
    """Free bytes, and whether this process may write, in `path` or where it would be made."""
    asked = path.expanduser().absolute()
    nearest = next(folder for folder in (asked, *asked.parents) if folder.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Place(asked, shutil.disk_usage(nearest).free, writable)


def cache_home() -> Path:
    """The user's cache folder, where converted models go."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def ask_tools() -> Tools:
    """Compilers, looked for where `torch.utils.cpp_extension` looks."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        home = str(Path(nvcc).parent.parent) if nvcc else "/usr/local/cuda"
    beside = Path(sys.executable).parent / "ninja"
    return Tools(
        shutil.which("g++"),
        shutil.which("ninja"),
        str(beside) if beside.is_file() else None,
        home if Path(home).is_dir() else None,
        _nvcc_version(Path(home) / "bin/nvcc"),
    )


def _nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    if not nvcc.is_file():
        return None
    done = subprocess.run([nvcc, "-V"], capture_output=True, text=True, check=False, timeout=10)
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(release.group(1)), int(release.group(2))) if release else None


def ask_ports() -> Ports:
    """Bind a loopback port as torch.distributed does, and look at Ray's."""
    try:
        _bind(0)
        loopback = None
    except OSError as error:
        loopback = error.strerror or type(error).__name__
    taken = []
    for port in RAY_PORTS if loopback is None else ():
        try:
            _bind(port)
        except OSError:
            taken.append(port)
    return Ports(loopback, tuple(taken))


def _bind(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))


def ask_ray_address() -> RayAddress:
    """Whether something listens at RAY_ADDRESS: `host:port`, `ray://host:port`, or `auto`."""
    given = os.environ.get("RAY_ADDRESS")
    if not given or given == "local":
        return RayAddress()
    if given == "auto":
        current = Path("/tmp/ray/ray_current_cluster")
        if not current.is_file():
            return RayAddress("auto", "no cluster was started on this machine")
        given = current.read_text(encoding="utf-8").strip()
    place = urlsplit(given if "://" in given else f"//{given}")
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        return RayAddress("RAY_ADDRESS", "it names no host and port")
    shown = f"{host}:{port}"
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except OSError as error:
        return RayAddress(shown, error.strerror or "no answer in time")
    return RayAddress(shown)


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or cache_home() / "huggingface").expanduser()


def hub_cache() -> Path:
    """Where models from the hub are kept."""
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()


def ask_hub(model: str | None) -> Hub:
    """Settings of the hub as its library reads them, and whether it answers."""
    environment = os.environ
    token = Path(environment.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
    asked_off = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    offline = asked_off.upper() in TRUE
    why = None
    if not offline:
        told = ask_child("hub", _HUB_SECONDS)
        why = "no answer in time" if told.error else told.values["why"]
    if not model or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).exists():
        model = None
    snapshots = hub_cache() / f"models--{(model or '').replace('/', '--')}" / "snapshots"
    return Hub(
        # Not the address: it may hold a password.
        urlsplit(environment.get("HF_ENDPOINT") or "https://huggingface.co").hostname or "hub",
        offline,
        why,
        any(environment.get(n) for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or token.is_file(),
        model,
        snapshots.is_dir() and any(snapshots.iterdir()),
    )


def ask_accounts() -> Accounts:
    """Whether wandb has a key (environment or netrc), and whether Slurm is here."""
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser()
    key, broken = bool(os.environ.get("WANDB_API_KEY")), False
    if not key and file.is_file():
        try:
            key = netrc.netrc(str(file)).authenticators("api.wandb.ai") is not None
        # Its message quotes the file, and with it perhaps a password.
        except netrc.NetrcParseError:
            broken = True
    return Accounts(key, os.environ.get("WANDB_MODE"), broken, shutil.which("sbatch"))


def ask_shadow() -> str | None:
    """What another distribution put in the place of ours; None if nothing."""
    try:
        shadow.check()
    except shadow.ShadowError as error:
        return str(error)
    return None
