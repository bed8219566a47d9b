"""What each fact about the machine means: pure functions to a line that says so.

`fail` is what stops a run, `warn` what may spoil one, `n.a.` what is not here and not needed.
"""

from __future__ import annotations

from launch.doctor.facts import (
    GIB,
    Accounts,
    Cpu,
    Driver,
    Finding,
    Gpu,
    Hub,
    Memory,
    Needs,
    Packages,
    Place,
    Ports,
    RayAddress,
    Status,
    Told,
    dotted,
)
from launch.machines import BF16_CAPABILITY

FIRST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
"""First driver release that runs any CUDA of a major version (NVIDIA's minor-version
compatibility)."""
FIRST_CAPABILITY = (7, 5)
"""Turing, a T4: CUDA 13, for which torch and vLLM are built, leaves out what is older."""
FP8_CAPABILITY = (8, 9)
"""Ada, an L4."""
LEAST_MEMORY = 8 * GIB
"""What the demo takes."""
LEAST_SHARED = GIB
"""A 7B model's workers pass whole batches through it; Docker's default is 64 MiB."""
LEAST_DISK, LITTLE_DISK = GIB, 10 * GIB
FREE_SHARE = 0.9
"""A GPU of which less is free is used by something else."""


def driver(found: Driver, torch: Told, needs: Needs) -> Finding:
    """The driver answers, shows a GPU, and is new enough for torch's CUDA."""
    name = "gpu driver"
    if not found.gpus:
        return _no_gpu(name, found, needs)
    assert found.cuda is not None, "a driver that shows GPUs has a version"
    text = f"{found.version or 'unknown version'}, runs CUDA up to {dotted(found.cuda)}"
    cuda = torch.values.get("cuda")
    major = int(cuda.split(".")[0]) if cuda else 0
    if major <= found.cuda[0]:
        return Finding(name, "ok", text)
    text += f", but torch is built for {cuda}"
    remedy = f"update the driver to {FIRST_DRIVER.get(major, 'the newest')} or later"
    return Finding(name, "fail", text, remedy, "apt-cache search --names-only nvidia-driver")


def _no_gpu(name: str, found: Driver, needs: Needs) -> Finding:
    wanted = needs.device == "cuda"
    if found.visible is not None and (found.module or found.cuda):
        text = f"no GPU is shown: CUDA_VISIBLE_DEVICES is {found.visible!r}"
        status: Status = "fail" if wanted else "warn"
        return Finding(name, status, text, "show this process one", "unset CUDA_VISIBLE_DEVICES")
    if found.module:
        text = f"loaded, but not usable here: {found.error or 'it shows no GPU'}"
        remedy = "give a container the GPUs (--gpus all); after an update of the driver, reboot"
        return Finding(name, "fail", text, remedy, "nvidia-smi")
    if wanted:
        remedy = "placement.device is cuda: use auto, or a machine with a GPU"
        return Finding(name, "fail", "none", remedy, "--placement.device auto")
    return Finding(name, "n.a.", "none: runs go on the CPU")


def gpus(found: Driver, needs: Needs) -> list[Finding]:
    """One line a GPU: what its compute capability allows, and what is free."""
    return [_gpu(f"gpu {index}", gpu, needs) for index, gpu in enumerate(found.gpus)]


def _gpu(name: str, gpu: Gpu, needs: Needs) -> Finding:
    # Without NVML, only a process that takes memory of the GPU could ask.
    free = "free unknown without nvidia-ml-py" if gpu.free is None else f"{_gib(gpu.free)} free"
    text = (
        f"{gpu.name}, {_gib(gpu.total)}, {free}, "
        f"compute capability {dotted(gpu.capability)}: {allows(gpu.capability)}"
    )
    if gpu.capability < FIRST_CAPABILITY:
        remedy = f"CUDA 13 needs {dotted(FIRST_CAPABILITY)} or newer: run on the CPU"
        return Finding(name, "fail", text, remedy, "--placement.device cpu")
    if needs.precision == "bf16" and gpu.capability < BF16_CAPABILITY:
        remedy = "the config's precision is bf16"
        return Finding(name, "fail", text, remedy, "--model.precision fp16")
    if gpu.free is not None and gpu.free < FREE_SHARE * gpu.total:
        held = _gib(gpu.total - gpu.free)
        return Finding(name, "warn", text, f"{held} are in use: see by whom", "nvidia-smi")
    return Finding(name, "ok", text)


def allows(capability: tuple[int, int]) -> str:
    """The precisions that a GPU computes in by itself.

    >>> allows((7, 5)), allows((8, 0)), allows((9, 0))
    ('fp16, not bf16', 'bf16 and fp16', 'bf16, fp16 and fp8')
    """
    if capability < BF16_CAPABILITY:
        return "fp16, not bf16"
    return "bf16 and fp16" if capability < FP8_CAPABILITY else "bf16, fp16 and fp8"


def memory(found: Memory) -> list[Finding]:
    """Main memory as the control group leaves it, and shared memory."""
    usable = min(found.total, found.limit or found.total)
    limit = "" if found.limit is None else f", limited to {_gib(found.limit)} here"
    text = f"{_gib(found.available)} of {_gib(found.total)} free{limit}"
    first = Finding("memory", "ok", text)
    if min(usable, found.available) < LEAST_MEMORY:
        remedy = f"the demo takes {_gib(LEAST_MEMORY)}: end other processes or raise the limit"
        first = Finding("memory", "warn", text, remedy, "ps aux --sort=-rss | head")
    second = Finding("shared memory", "ok", f"/dev/shm holds {_gib(found.shared)}")
    if found.shared < LEAST_SHARED:
        second = Finding(
            "shared memory",
            "warn",
            f"/dev/shm holds {_gib(found.shared)}",
            "NCCL, Ray and vLLM's workers want more: in Docker",
            "docker run --shm-size 8g",
        )
    return [first, second]


def place(name: str, found: Place, setting: str, bulky: bool) -> Finding:
    """A folder can be written; one that gets models (`bulky`) has room. `setting` moves it."""
    text = f"{found.path}, {_gib(found.free)} free"
    if not found.writable:
        return Finding(name, "fail", f"{found.path} can't be written", "choose another", setting)
    if bulky and found.free < LITTLE_DISK:
        status: Status = "fail" if found.free < LEAST_DISK else "warn"
        return Finding(name, status, text, "models are large: free some, or move it", setting)
    return Finding(name, "ok", text)


def cpu(found: Cpu) -> list[Finding]:
    """Processors, and how many threads will be started on them."""
    wide = (("avx512f", "AVX-512"), ("avx512_bf16", "AVX-512 bf16"), ("avx2", "AVX2"))
    sets = ", ".join(shown for flag, shown in wide if flag in found.flags) or "no AVX2"
    text = f"{found.usable} of {found.count} usable, {found.machine}" + (
        f" with {sets}" if found.machine == "x86_64" else ""
    )
    return [Finding("cpu", "ok", text), _threads(found)]


def _threads(found: Cpu) -> Finding:
    mend = f"export OMP_NUM_THREADS={found.usable}"
    if found.omp is None:
        if found.usable < found.affinity:
            text = f"OMP_NUM_THREADS is unset: torch starts {found.affinity} threads"
            remedy = f"the control group pays for {found.usable} processors"
            return Finding("threads", "warn", text, remedy, mend)
        return Finding("threads", "ok", f"OMP_NUM_THREADS is unset: {found.usable} threads")
    text = f"OMP_NUM_THREADS is {found.omp}"
    if not found.omp.isdecimal() or not 1 <= int(found.omp) <= found.usable:
        remedy = f"it must be a number from 1 to {found.usable}"
        return Finding("threads", "warn", text, remedy, mend)
    return Finding("threads", "ok", text)


def ports(found: Ports, address: RayAddress, packages: Packages) -> Finding:
    """A loopback port for processes that train together, and Ray's own ports."""
    if found.loopback is not None:
        text = f"no port of 127.0.0.1 can be bound: {found.loopback}"
        remedy = "processes that train together meet there"
        return Finding("ports", "fail", text, remedy, "ip addr show lo")
    if found.taken and address.address is None and packages.version("ray") is not None:
        taken = " and ".join(map(str, found.taken))
        remedy = "if a Ray cluster runs there, say so; else start yours on other ports"
        return Finding("ports", "warn", f"{taken} in use", remedy, "export RAY_ADDRESS=auto")
    return Finding("ports", "ok", "a loopback port can be bound")


def hub(found: Hub) -> list[Finding]:
    """The hub answers or is meant to be left alone; a token; the config's model is at hand."""
    if found.offline:
        first = Finding("hub", "ok", "offline, as HF_HUB_OFFLINE says: only what is cached loads")
    elif found.why_not is None:
        first = Finding("hub", "ok", f"{found.host} answers")
    else:
        remedy = "cached and local models still work; then say so, and nothing waits for it"
        text = f"{found.host}: {found.why_not}"
        first = Finding("hub", "warn", text, remedy, "export HF_HUB_OFFLINE=1")
    token = Finding("hub token", "ok", "present")
    if not found.token:
        remedy = "for gated and private models"
        token = Finding("hub token", "n.a.", "none", remedy, "hf auth login")
    findings = [first, token]
    if found.model is not None and not found.cached and (found.offline or found.why_not):
        remedy = "fetch it where the hub answers"
        text = f"{found.model} is not in the cache, and the hub can't be asked"
        findings.append(Finding("model", "fail", text, remedy, f"hf download {found.model}"))
    return findings


def accounts(found: Accounts) -> list[Finding]:
    """Whether wandb and Slurm are at hand."""
    mode = f", WANDB_MODE={found.wandb_mode}" if found.wandb_mode else ""
    key = Finding("wandb key", "ok", f"present{mode}")
    if found.netrc_broken:
        text = "the netrc file can't be parsed"
        key = Finding("wandb key", "warn", text, "write it anew", "wandb login")
    elif not found.wandb_key:
        key = Finding("wandb key", "n.a.", f"none{mode}", "to track there", "wandb login")
    if found.sbatch is None:
        return [key, Finding("slurm", "n.a.", "no sbatch on PATH")]
    return [key, Finding("slurm", "ok", found.sbatch)]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
