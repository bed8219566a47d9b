"""An engine that runs out of memory does the same again on half as much; other errors end it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from transformers import AutoTokenizer

from rlhf.errors import InputError, ParityError
from rlhf.logprobs import token_logps
from rlhf.model_files import prompt_encoder
from rlhf.protocols import Published, Sampling
from rlhf.types import Completion, Prompt
from rollout import transformers_generator
from rollout.concurrency import Concurrency, MemoryShortError, ran_out
from rollout.transformers_generator import TransformersGenerator
from rollout.vllm_engine import EngineOptions, InProcessEngine
from rollout.vllm_generator import Served, VllmGenerator
from rollout.weight_sync import weights_sha256

SAMPLES = 4
SAMPLING = Sampling(SAMPLES, 1.0, 1.0, max_new_tokens=6, seed=3)
TEXTS = ("Hi", "Where is my parcel?", "How do I return a pair of shoes?", "Refund", "Help")


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as found:
        return found


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 2.00 GiB'"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        raised(RuntimeError("warming up failed"), torch.OutOfMemoryError("CUDA")),
    ],
)
def test_lack_of_memory_is_told_however_it_is_wrapped(error: Exception) -> None:
    assert ran_out(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("the prompt 'my phone is out of memory' has no tokens"),
        raised(InputError("rollout.memory_gib is too small"), torch.OutOfMemoryError("CUDA")),
    ],
)
def test_what_is_about_the_data_or_the_config_is_no_lack_of_memory(error: Exception) -> None:
    assert not ran_out(error)


class Small(TransformersGenerator):
    """On a card that has no room for more than `room` sequences; it finds out half way."""

    room = 10**9
    tried: list[int]

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        rows = len(prompts) * sampling.samples
        self.tried.append(rows)
        found = super()._generate(prompts, sampling)
        if rows > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found


Build = Callable[..., Small]


@pytest.fixture
def build(tiny_model: Path) -> Build:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    published = Published(0, tiny_model, "merged", weights_sha256(tiny_model))

    def make(most: int, room: int, say: Callable[[str], None] = lambda _: None) -> Small:
        made = Small(str(tiny_model), tokenizer, (2,), torch.float32, "cpu", most)
        made.concurrency.say = say
        made.room, made.tried = room, []
        made.load(published)
        return made

    return make


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> list[Prompt]:
    encode = prompt_encoder(AutoTokenizer.from_pretrained(tiny_model))
    return fakes.prompts_of(encode, TEXTS)


@pytest.mark.parametrize(("room", "left"), [(15, 8), (8, 8), (5, 4), (3, 2), (1, 1)])
def test_what_is_done_again_is_what_half_as_many_at_once_would_have_drawn(
    build: Build, prompts: list[Prompt], room: int, left: int
) -> None:
    said: list[str] = []
    short = build(16, room, said.append)
    found = short.generate(prompts, SAMPLING)
    assert found == build(left, 10**9).generate(prompts, SAMPLING)
    assert [(c.prompt_id, c.sample) for c in found] == [
        (p.prompt_id, sample) for p in prompts for sample in range(SAMPLES)
    ]
    halvings = [n for n in (16, 8, 4, 2) if n > left]
    assert len(said) == len(halvings)
    for halved, line in zip(halvings, said, strict=True):
        assert f"with {halved} sequences at once" in line
    # What it learned it keeps: the next shard tries no more than has room.
    del short.tried[:]
    short.generate(prompts, replace(SAMPLING, seed=4))
    assert max(short.tried) == left and len(said) == len(halvings)


def test_greedy_answers_and_scores_are_the_same_on_any_number_at_once(
    build: Build, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = replace(SAMPLING, samples=1, temperature=0.0)
    roomy, short = build(16, 10**9), build(16, 1)
    expected, found = roomy.generate(prompts, greedy), short.generate(prompts, greedy)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    scores = roomy.logps(expected)
    scored: list[int] = []

    def scarce_token_logps(model: Any, batch: Any) -> Any:
        scored.append(batch.count)
        if scored[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logps(model, batch)

    monkeypatch.setattr(transformers_generator, "token_logps", scarce_token_logps)
    again = build(16, 10**9).logps(expected)
    # 16, 8, 4 and 2 of five.
    assert scored == [5, 5, 4, 2, 2, 1]
    for one, other in zip(again, scores, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_where_one_is_too_many_the_end_says_so(build: Build, prompts: list[Prompt]) -> None:
    said: list[str] = []
    short = build(4, 0, said.append)
    with pytest.raises(MemoryShortError, match=r"one sequence at a time: CUDA .*prompts.max_tok"):
        short.generate(prompts, SAMPLING)
    assert short.tried == [4, 2, 1] and len(said) == 2


def test_every_other_error_is_raised_at_once() -> None:
    said: list[str] = []
    tried: list[int] = []
    concurrency = Concurrency(8, "it")
    concurrency.say = said.append

    def fails() -> None:
        tried.append(1)
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    with pytest.raises(RuntimeError, match="probability tensor"):
        concurrency.work(fails)
    assert (tried, said) == ([1], [])


def test_the_memory_of_the_failed_try_is_free_before_the_next() -> None:
    """What held the device's memory must not be kept alive by the error that told of it."""
    concurrency = Concurrency(2, "it")
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def attempt() -> None:
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        if concurrency.now > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    concurrency.work(attempt, lambda: alive.append(held[0]() is not None))
    assert alive == [False]


def runs_out_once() -> Callable[[], None]:
    """Runs out of memory once."""
    errors: Iterator[Exception] = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def work() -> None:
        for error in errors:
            raise error

    return work


def options(most: int) -> EngineOptions:
    return EngineOptions(torch.float32, "cpu", 256, most, 0.25, 0.5, 0)


def test_an_engine_beside_other_ranks_is_not_started_anew_without_them() -> None:
    engine = InProcessEngine(options(8), "the vLLM generator")
    engine._beside_ranks = True
    engine._llm = object()
    with pytest.raises(MemoryShortError, match=r"beside other ranks .* rollout.gpu_memory_share"):
        engine.ask(lambda _: runs_out_once()())


@pytest.mark.engine
def test_a_vllm_engine_is_started_anew_with_the_version_that_it_served(
    tiny_model: Path, tmp_path: Path, prompts: list[Prompt], build: Build
) -> None:
    """It runs out of memory inside a step, after a reload; afterwards it serves the reloaded
    version, for half as many sequences, and the shard is whole."""
    import shutil

    from safetensors.torch import load_file, save_file

    new = tmp_path / "new"
    shutil.copytree(tiny_model, new)
    noise = torch.Generator().manual_seed(1)
    weights = load_file(new / "model.safetensors")
    moved = {n: w + 0.02 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    save_file(moved, new / "model.safetensors", metadata={"format": "pt"})
    old, version = (
        Published(number, path, "merged", weights_sha256(path))
        for number, path in enumerate((tiny_model, new))
    )
    said: list[str] = []
    generator = VllmGenerator(Served(str(tiny_model), (2,)), options(8))
    generator.concurrency.say = said.append
    generator.load(old)
    generator.load(version)
    runner = generator._engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    plain, steps = runner.execute_model, []

    def execute_model(*arguments: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(*arguments, **named)

    runner.execute_model = execute_model
    try:
        found = generator.generate(prompts, SAMPLING)
        assert len(said) == 1 and "with 8 sequences at once" in said[0]
        assert generator._engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 4
        assert [(c.prompt_id, c.sample) for c in found] == [
            (p.prompt_id, sample) for p in prompts for sample in range(SAMPLES)
        ]
        assert {c.policy_version for c in found} == {1}
        other = build(16, 10**9)
        for served, same in ((version, True), (old, False)):
            other.load(served)
            expected = [row for rows in other.logps(found) for row in rows]
            own = [row for c in found for row in c.logps]
            assert (own == pytest.approx(expected, abs=1e-3)) == same
        # A folder that changed behind the engine's back is found out.
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ParityError, match="has changed since it was loaded"):
            generator._check_restarted()
    finally:
        generator.close()
