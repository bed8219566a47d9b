"""The doctor's probes on stand-ins of drivers, libraries and kernels; the command for real."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import probes
from launch.doctor.facts import GIB, Gpu, Ports, RayAddress, Told

ROOT = Path(__file__).resolve().parent.parent

FAKE_CUDA = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return STATUS; }
int cuGetErrorName(int status, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strcpy(name, "Tesla T4"); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) {
  *value = what == 75 ? 7 : what == 76 ? 5 : -1; return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 15636365312; return 0; }
int cuDeviceGetPCIBusId(char *text, int length, int device) {
  strcpy(text, device == 40 ? "0000:65:00.0" : "0000:17:00.0"); return 0;
}
"""

FAKE_NVML = """
from types import SimpleNamespace
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlSystemGetDriverVersion(): return "580.95.05"
def nvmlDeviceGetHandleByPciBusId(bus): return bus
def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=15636365312, free={b"0000:65:00.0": 5, b"0000:17:00.0": 6}[handle])
"""


def fake_driver(folder: Path, status: int = 0) -> None:
    """A libcuda.so.1 with two T4, that answers cuInit with `status`."""
    source = folder / "cuda.c"
    source.write_text(FAKE_CUDA)
    library = str(folder / "libcuda.so.1")
    compile_it = ["g++", "-x", "c", "-shared", "-fPIC", f"-DSTATUS={status}", "-o", library]
    subprocess.run([*compile_it, str(source)], check=True, timeout=60)


def test_a_driver_is_asked_through_its_own_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    told = probes.ask_driver()
    assert (told.cuda, told.error) == ((13, 1), None)
    assert told.gpus == (Gpu("Tesla T4", (7, 5), 15636365312, None),) * 2
    (tmp_path / "pynvml.py").write_text(FAKE_NVML)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = probes.ask_driver()
    assert told.version == "580.95.05"
    assert [gpu.free for gpu in told.gpus] == [5, 6], "matched by bus, not by number"


def test_a_driver_without_a_gpu_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(tmp_path, status=100)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    told = probes.ask_driver()
    assert (told.gpus, told.cuda, told.error) == ((), None, "CUDA_ERROR_NO_DEVICE")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise ImportError('libx.so: no such file')", "ImportError: libx.so: no such file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_a_library_that_breaks_breaks_alone(
    body: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probes.ask_child("ray", seconds=1) == Told(error=error)


def test_a_library_that_chatters_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatter = "import os; print('hello'); os.system('echo hello'); __version__ = '1.2'"
    (tmp_path / "ray.py").write_text(chatter)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probes.ask_child("ray") == Told({"version": "1.2"})


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with a kernel's files."""
    meminfo = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:  0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    """A group's limit is the least of its own and those above it."""
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
            "sys/fs/cgroup/jobs/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/jobs/mine/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/jobs/cpu.max": "max 100000\n",
        },
    )
    found = probes.ask_memory(root)
    assert (found.total, found.available, found.limit) == (16 * GIB, 8 * GIB, 4 * GIB)
    assert probes.quota(root) == 2  # 1.5 processors, rounded up


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    """Inside a container the group's path is the host's, and its files lie at the top."""
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:pids:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert probes.ask_memory(root).limit == 2 * GIB
    assert probes.quota(root) == 4


def test_no_limit_is_none(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/\n4:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert probes.ask_memory(root).limit is None
    assert probes.quota(root) is None


def test_a_folder_that_is_yet_to_be_made_is_judged_where_it_would_be(tmp_path: Path) -> None:
    found = probes.ask_place(tmp_path / "a/b")
    assert (found.path, found.writable) == (tmp_path / "a/b", True)
    (tmp_path / "file").write_text("")
    assert probes.ask_place(tmp_path / "file/b").writable is False


def test_a_checkouts_packages_are_read_from_its_own_files() -> None:
    found = probes.ask_packages(gpu=False)
    assert {"torch", "polars", "packaging"} <= {w.name for w in found.wanted if w.extra is None}
    assert {"vllm", "qlora", "ray"} <= {w.extra for w in found.wanted}
    assert found.pins["torch"] == "2.13.0"
    assert found.checkout is not None and found.constraints.endswith("constraints/cpu.txt")
    assert probes.ask_packages(gpu=True).pins["vllm"] == "0.32.0"


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of a web server that refuses everything."""

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("online")
def test_any_answer_of_the_hub_is_an_answer(
    listening: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening}")
    assert (probes.ask_hub(None).why_not, probes.ask_hub(None).host) == (None, "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:password@127.0.0.1:{listening}")
    assert (probes.ask_hub(None).why_not, probes.ask_hub(None).host) == (None, "127.0.0.1")
    (tmp_path / "models--org--model/snapshots/abc").mkdir(parents=True)
    found = [probes.ask_hub(model) for model in ("org/model", "org/other", str(ROOT))]
    assert [(hub.model, hub.cached) for hub in found] == [
        ("org/model", True),
        ("org/other", False),
        (None, False),
    ]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert probes.ask_hub(None).why_not == "Connection refused"


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("127.0.0.1:{port}", "127.0.0.1:{port}"),
        ("ray://127.0.0.1:{port}", "127.0.0.1:{port}"),
        ("http://user:pass@127.0.0.1:{port}/x", "127.0.0.1:{port}"),
    ],
)
def test_a_cluster_that_answers(
    form: str, shown: str, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", form.format(port=listening))
    assert probes.ask_ray_address() == RayAddress(shown.format(port=listening))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("127.0.0.1:1", RayAddress("127.0.0.1:1", "Connection refused")),
        ("somewhere", RayAddress("RAY_ADDRESS", "it names no host and port")),
        ("host:port", RayAddress("RAY_ADDRESS", "it names no host and port")),
        ("", RayAddress()),
        ("local", RayAddress()),
    ],
)
def test_a_cluster_that_does_not(
    given: str, found: RayAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert probes.ask_ray_address() == found


def test_a_port_of_rays_that_is_taken_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        monkeypatch.setattr(probes, "RAY_PORTS", (held.getsockname()[1],))
        assert probes.ask_ports() == Ports(None, (held.getsockname()[1],))


def test_the_key_of_wandb_is_found_where_wandb_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert probes.ask_accounts().wandb_key is False
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert probes.ask_accounts().wandb_key is True
    (tmp_path / "netrc").write_text("nonsense hunter2\n")
    found = probes.ask_accounts()
    assert (found.wandb_key, found.netrc_broken) == (False, True)


CANARY = "canary-4f1b9c"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-m", "launch", "doctor", *arguments],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


@pytest.mark.slow
def test_this_machine_is_examined_and_no_secret_is_told(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"nonsense {CANARY}\n")
    done = run(
        "--json",
        HF_TOKEN=f"hf_{CANARY}",
        HF_ENDPOINT=f"http://user:{CANARY}@127.0.0.1:1",
        RAY_ADDRESS=f"ray://user:{CANARY}@127.0.0.1:1",
        OPENAI_API_KEY=CANARY,
        NETRC=str(tmp_path / "netrc"),
        http_proxy="",
    )
    told = {line["name"]: line for line in json.loads(done.stdout)}
    assert CANARY not in done.stdout + done.stderr
    assert done.returncode == int(any(line["status"] == "fail" for line in told.values()))
    for name in (
        "python",
        "names",
        "torch",
        "vllm",
        "bitsandbytes",
        "cpu",
        "memory",
        "ray",
        "ports",
    ):
        assert told[name]["status"] == "ok", told[name]
    assert not [line for line in told.values() if "this check broke" in line["found"]]
    assert told["hub token"]["found"] == "present"
    assert (told["hub"]["status"], told["ray cluster"]["status"]) == ("warn", "warn")
    assert told["wandb key"]["status"] == "warn"
    for line in told.values():
        mends = line["remedy"] and line["command"]
        assert mends or line["status"] in ("ok", "n.a."), line


def test_broken_libraries_are_lines_not_tracebacks(tmp_path: Path) -> None:
    for name in ("torch", "vllm", "ray", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text(f"raise OSError('{name} is broken, {CANARY}')")
    done = run(PYTHONPATH=str(tmp_path), SOME_API_KEY=CANARY, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr == ""
    assert CANARY not in done.stdout
    lines = {line[6:].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert lines["torch"].startswith("fail") and "torch is broken" in lines["torch"]
    assert lines["vllm"].startswith("fail")
    assert lines["ray"].startswith("warn") and "ray is broken" in lines["ray"]
    assert lines["hub"].startswith("ok") and "offline" in lines["hub"]
    assert "--force-reinstall" in lines["torch"]
