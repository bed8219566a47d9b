"""Machines: this one, or one described in a word, such as `1xT4-16GB`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from rlhf.errors import InputError

GIB = 2**30
BF16_CAPABILITY = (8, 0)
"""Compute capability of Ampere, the first that multiplies in bf16."""
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Processors without these convert every bf16 number on its way: measured on AVX2 alone, vLLM made
12 tokens a second with a 135M model in bf16, 41 in fp32."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan needs to know of a machine. Sizes are bytes; its GPUs count as alike, each with
    what the least of them has."""

    name: str
    gpus: int
    gpu: int
    """What CUDA reports as a GPU's total memory, which is less than its name says; 0 without."""
    capability: tuple[int, int] | None
    """Compute capability; None without a GPU."""
    host: int
    """Host memory, or what the control group leaves of it."""
    free: int | None = None
    """Host memory that is free now; None for a described machine."""
    cpu_bf16: bool = False
    """Whether its processors multiply in bf16 by themselves."""

    @property
    def described(self) -> bool:
        """Whether it was given in words: its host memory is then an assumption."""
        return self.free is None


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU model; GiB."""

    capability: tuple[int, int]
    usable: Mapping[int, float]
    """Size in its name, in GB -> what CUDA reports as total, the least of what drivers say."""
    host: int
    """Host memory of the smallest machine that the large clouds rent with one of them."""


CARDS = {
    "V100": Card((7, 0), {16: 15.7, 32: 31.7}, 60),
    "T4": Card((7, 5), {16: 14.56}, 15),
    "A100": Card((8, 0), {40: 39.4, 80: 79.1}, 80),
    "A10G": Card((8, 6), {24: 22.0}, 16),
    "A6000": Card((8, 6), {48: 47.3}, 64),
    "RTX3090": Card((8, 6), {24: 23.5}, 32),
    "RTX4090": Card((8, 9), {24: 23.5}, 32),
    "L4": Card((8, 9), {24: 22.0}, 16),
    "L40S": Card((8, 9), {48: 44.3}, 32),
    "H100": Card((9, 0), {80: 79.1}, 200),
    "H200": Card((9, 0), {141: 139.7}, 200),
}


def parse(text: str, flag: str = "--machine") -> Machine:
    """The machine that `NxNAME-SIZEGB` describes; `flag` is where it was given.

    >>> parse("1xT4-16GB").capability
    (7, 5)

    Raises InputError, with the cards there are, where the form, the card or its size is unknown.
    """
    form = re.fullmatch(r"(\d+)x([A-Za-z0-9]+)-(\d+)GB", text)
    if form is None or int(form.group(1)) == 0:
        raise InputError(
            f"{flag} must be COUNTxCARD-SIZEGB, such as 1xT4-16GB or 1xA100-80GB, got {text!r}; "
            f"known cards: {_known()}"
        )
    count, name, size = int(form.group(1)), form.group(2).upper(), int(form.group(3))
    card = CARDS.get(name)
    if card is None:
        near = get_close_matches(name, CARDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{flag} {text}: there is no card {name}{hint} Known: {_known()}")
    if size not in card.usable:
        sizes = " or ".join(f"{s}GB" for s in card.usable)
        raise InputError(f"{flag} {text}: a {name} has {sizes}, got {size}GB")
    usable = round(card.usable[size] * GIB)
    return Machine(text, count, usable, card.capability, count * card.host * GIB)


def _known() -> str:
    return ", ".join(f"{name}-{size}GB" for name, card in CARDS.items() for size in card.usable)


def this_machine() -> Machine:
    """The machine that this process runs on, asked of the driver and the kernel, not of torch.

    Raises InputError where there is a GPU whose driver does not answer: to go on without it would
    be a choice that nobody made.
    """
    from launch.doctor.probes import ask_cpu, ask_driver, ask_memory

    driver, memory = ask_driver(), ask_memory()
    if driver.module and driver.error is not None and driver.visible != "":
        raise InputError(
            f"this machine has an NVIDIA driver that can't be asked ({driver.error}); "
            "`pairloop doctor` says more. To run without the GPU, set CUDA_VISIBLE_DEVICES to ''"
        )
    host = min(memory.total, memory.limit or memory.total)
    # Of unlike ones what each of them has.
    return Machine(
        "this machine",
        len(driver.gpus),
        min((gpu.total for gpu in driver.gpus), default=0),
        min((gpu.capability for gpu in driver.gpus), default=None),
        host,
        min(memory.available, host),
        cpu_bf16=bool(ask_cpu().flags & BF16_FLAGS),
    )
