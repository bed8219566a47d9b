"""What `pairloop doctor` asks in a process of its own, because the answer may hang or crash.

Run by path, `python -P launch/doctor/child.py TOPIC`: prints one JSON object. Importing a library
with a broken native part can end a process, a broken driver can hang one, and neither may take the
other checks along. It imports nothing of ours, so that a broken installation can be asked too.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB_SECONDS = 3.0
HUB = "https://huggingface.co"
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


def torch_build() -> dict[str, Any]:
    """Version of torch, and the CUDA version that it was built for (None: a build for CPUs)."""
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def vllm_kernels() -> dict[str, Any]:
    """Load vLLM's compiled kernels, as its engine does; vLLM itself only warns if that fails."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations, "there is no package vllm"
    import torch

    folder = Path(next(iter(spec.submodule_search_locations)))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    # The CPU build has a library for each instruction set; the CUDA build has `_C` alone.
    wanted = "_C" if "avx512_bf16" in flags else "_C_AVX512" if "avx512f" in flags else "_C_AVX2"
    libraries = [*folder.glob(f"{wanted}.abi3.so"), *folder.glob("_C.abi3.so")]
    libraries += sorted(folder.glob("_C*.so"))
    assert libraries, f"no compiled kernels in {folder}"
    torch.ops.load_library(str(libraries[0]))
    return {"kernels": libraries[0].name}


def bitsandbytes_backend() -> dict[str, Any]:
    """Which of its native libraries bitsandbytes loaded; on failure it goes on with a stand-in."""
    import bitsandbytes.cextension as native

    return {"library": type(native.lib).__name__, "backend": str(native.BNB_BACKEND)}


def ray_version() -> dict[str, Any]:
    """Version of Ray, once it imports."""
    import ray

    return {"version": ray.__version__}


def hub() -> dict[str, Any]:
    """Why the hub doesn't answer; None where it does, with whatever HTTP status.

    Its address may hold a password, and libraries put addresses into messages: only the operating
    system's words for an error are passed on.
    """
    import http.client
    import urllib.error
    import urllib.request
    from urllib.parse import urlsplit, urlunsplit

    address = urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    bare = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))
    try:
        request = urllib.request.Request(bare, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return {"why": None}
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        return {"why": getattr(cause, "strerror", None) or type(error).__name__}
    return {"why": None}


def gpus() -> dict[str, Any]:
    """The GPUs that a process sees, from libcuda; free memory and driver version from NVML."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"library": False, "why": str(error), "cuda": None, "driver": None, "gpus": []}
    found: dict[str, Any] = {"library": True, "why": None, "cuda": None, "driver": None, "gpus": []}
    if status := cuda.cuInit(0):
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        found["why"] = (name.value or b"").decode() or f"cuInit returned {status}"
        return found
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    found["cuda"] = [number.value // 1000, number.value % 1000 // 10]
    cuda.cuDeviceGetCount(ctypes.byref(number))
    nvml = _nvml()
    if nvml is not None:
        found["driver"] = nvml.nvmlSystemGetDriverVersion()
    found["gpus"] = [_gpu(cuda, nvml, index) for index in range(number.value)]
    return found


def _gpu(cuda: ctypes.CDLL, nvml: Any, index: int) -> dict[str, Any]:
    device, number, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    text = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(text, len(text), device)
    name = text.value.decode()
    capability = []
    for attribute in _CAPABILITY:
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    cuda.cuDeviceGetPCIBusId(text, len(text), device)
    free = None
    if nvml is not None:
        # NVML numbers all GPUs, libcuda only those it may see: the bus tells which is which.
        handle = nvml.nvmlDeviceGetHandleByPciBusId(text.value)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        # Of a part of a GPU (MIG), NVML would report the whole.
        free = memory.free if memory.total <= 1.1 * total.value else None
    return {"name": name, "capability": capability, "total": total.value, "free": free}


def _nvml() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


TOPICS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_build,
    "vllm": vllm_kernels,
    "bitsandbytes": bitsandbytes_backend,
    "ray": ray_version,
    "hub": hub,
    "gpus": gpus,
}


def main(topic: str) -> None:
    """Answer one topic on standard output, which libraries that chatter don't get to see."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(TOPICS[topic]()), file=answer, flush=True)
    # Libraries' exit handlers can crash or wait; there is nothing left to do.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
