"""Machines in a word, and this one."""

from __future__ import annotations

import pytest

from launch.doctor.facts import Driver, Gpu, Memory
from launch.machines import CARDS, GIB, parse, this_machine
from rlhf.errors import InputError


@pytest.mark.parametrize(
    ("text", "gpus", "gib", "capability", "host"),
    [
        ("1xT4-16GB", 1, 14.56, (7, 5), 15),
        ("1xA100-40GB", 1, 39.4, (8, 0), 80),
        ("1xA100-80GB", 1, 79.1, (8, 0), 80),
        ("1xH100-80GB", 1, 79.1, (9, 0), 200),
        ("2xa100-80GB", 2, 79.1, (8, 0), 160),
    ],
)
def test_a_described_machine(
    text: str, gpus: int, gib: float, capability: tuple[int, int], host: int
) -> None:
    machine = parse(text)
    assert (machine.gpus, machine.capability, machine.host) == (gpus, capability, host * GIB)
    assert machine.gpu == round(gib * GIB)
    assert machine.described


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("T4", ("COUNTxCARD-SIZEGB", "such as 1xT4-16GB", "got 'T4'")),
        ("1xT4-16", ("COUNTxCARD-SIZEGB", "T4-16GB")),
        ("0xT4-16GB", ("COUNTxCARD-SIZEGB",)),
        ("1xA10-24GB", ("no card A10", "did you mean A10G?")),
        ("1xQQQQ-8GB", ("no card QQQQ", "Known: V100-16GB")),
        ("1xT4-32GB", ("a T4 has 16GB, got 32GB",)),
        ("1xA100-60GB", ("an A100 has 40GB or 80GB".replace("an", "a"), "got 60GB")),
    ],
)
def test_what_describes_no_machine_is_refused(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


def test_a_card_reports_less_than_its_name_says() -> None:
    """Decimal gigabytes, error correction and the driver take their part."""
    for name, card in CARDS.items():
        for size, usable in card.usable.items():
            assert 0.87 * size < usable < size, name


def _told(monkeypatch: pytest.MonkeyPatch, driver: Driver, memory: Memory) -> None:
    monkeypatch.setattr("launch.doctor.probes.ask_driver", lambda: driver)
    monkeypatch.setattr("launch.doctor.probes.ask_memory", lambda: memory)


def test_this_machine_is_what_the_control_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("Tesla T4", (7, 5), 15 * GIB, None)
    _told(monkeypatch, Driver(True, gpus=(gpu, gpu)), Memory(64 * GIB, 50 * GIB, 16 * GIB, 0))
    machine = this_machine()
    assert (machine.gpus, machine.gpu, machine.capability) == (2, 15 * GIB, (7, 5))
    assert (machine.host, machine.free, machine.described) == (16 * GIB, 16 * GIB, False)
    _told(monkeypatch, Driver(), Memory(64 * GIB, 50 * GIB, None, 0))
    machine = this_machine()
    assert (machine.gpus, machine.gpu, machine.capability) == (0, 0, None)
    assert (machine.host, machine.free) == (64 * GIB, 50 * GIB)


def test_unlike_gpus_count_as_the_least_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = Gpu("A6000", (8, 6), 48 * GIB, 0), Gpu("T4", (7, 5), 15 * GIB, 0)
    for order in ((large, small), (small, large)):
        _told(monkeypatch, Driver(True, gpus=order), Memory(64 * GIB, 50 * GIB, None, 0))
        machine = this_machine()
        assert (machine.gpus, machine.gpu, machine.capability) == (2, 15 * GIB, (7, 5))


def test_a_driver_that_does_not_answer_is_no_machine_without_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory(64 * GIB, 50 * GIB, None, 0)
    _told(monkeypatch, Driver(True, error="CUDA_ERROR_NO_DEVICE"), memory)
    with pytest.raises(InputError, match=r"CUDA_ERROR_NO_DEVICE.*pairloop doctor"):
        this_machine()
    _told(monkeypatch, Driver(True, error="CUDA_ERROR_NO_DEVICE", visible=""), memory)
    assert this_machine().gpus == 0
