"""One contract for every generator: what it samples, what it says about it, what it serves.

The model folder that they load carries a generation config of its own (repetition penalty, top-k,
low temperature): none of it may show.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config_learner import Lora, Model
from rlhf.model_files import prompt_encoder
from rlhf.policy import Policy
from rlhf.protocols import Generator, Loaded, Published, Sampling
from rlhf.types import Completion, Prompt
from rollout.transformers_generator import TransformersGenerator
from rollout.vllm_engine import EngineOptions
from rollout.vllm_generator import Served, VllmGenerator
from rollout.weight_sync import weights_sha256

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.engine)]
SAMPLES, LONGEST = 4, 10
PLAIN = Sampling(SAMPLES, 1.0, 1.0, LONGEST, seed=11)
SHAPED = Sampling(SAMPLES, 0.7, 0.9, LONGEST, seed=12)
GREEDY = Sampling(1, 0.0, 1.0, LONGEST, seed=13)
TEXTS = (
    "Hi",
    "Where is my parcel? It should have been here on Monday, and today is Thursday.",
    "How do I reset my password?",
    "Refund",
    "I would like to return a pair of shoes that I bought two weeks ago, is that still possible?",
)


@dataclass(frozen=True)
class World:
    """Two policy versions as folders, prompts of several lengths, and what ends an answer."""

    versions: tuple[Published, Published]
    prompts: list[Prompt]
    tokenizer: Any
    stop_ids: tuple[int, ...]

    def build(self, engine: str) -> Generator:
        """A generator with nothing loaded, too narrow for all prompts at once."""
        path = str(self.versions[0].path)
        if engine == "transformers":
            return TransformersGenerator(
                path, self.tokenizer, self.stop_ids, torch.float32, "cpu", 2 * SAMPLES
            )
        return VllmGenerator(Served(path, self.stop_ids), engine_options())


def engine_options(device: str = "cpu") -> EngineOptions:
    return EngineOptions(
        dtype=torch.float32,
        device=device,
        max_length=512,
        max_concurrency=2 * SAMPLES,
        memory_gib=0.25,
        gpu_memory_share=0.5,
        seed=0,
    )


def published(version: int, path: Path, kind: str = "merged") -> Published:
    return Published(version, path, kind, weights_sha256(path))


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("versions")
    shutil.copytree(tiny_model, folder / "0")
    own = {"repetition_penalty": 3.0, "top_k": 2, "temperature": 0.1, "do_sample": True}
    (folder / "0" / "generation_config.json").write_text(json.dumps(own))
    shutil.copytree(folder / "0", folder / "1")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.02)
    model.save_pretrained(folder / "weights")
    shutil.copy(folder / "weights" / "model.safetensors", folder / "1" / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return World(
        (published(0, folder / "0"), published(1, folder / "1")),
        fakes.prompts_of(prompt_encoder(tokenizer), TEXTS),
        tokenizer,
        # One token in eight ends an answer, so that a random model gives both kinds of ending.
        tuple(dict.fromkeys((tokenizer.eos_token_id, *range(3, len(tokenizer), 8)))),
    )


@pytest.fixture(scope="module", params=ENGINES)
def started(world: World, request: pytest.FixtureRequest) -> Iterator[Generator]:
    generator = world.build(request.param)
    generator.load(world.versions[0])
    yield generator
    generator.close()


@pytest.fixture
def generator(started: Generator, world: World) -> Iterator[Generator]:
    """Serves version 0, and after the test again."""
    yield started
    started.load(world.versions[0])


@pytest.fixture(scope="module")
def plain(started: Generator, world: World) -> list[Completion]:
    return started.generate(world.prompts, PLAIN)


@pytest.fixture(scope="module")
def shaped(started: Generator, world: World) -> list[Completion]:
    return started.generate(world.prompts, SHAPED)


def next_token_logps(folder: Path, completion: Completion) -> Tensor:
    """The model's own distributions, [tokens, vocabulary]: one row, no padding, no cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        logits: Tensor = model(ids).logits[0].double()
    return logits[len(completion.prompt_token_ids) - 1 : -1].log_softmax(-1)


def shape(logps_NV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Temperature, then the nucleus by a full sort; what is left sums to 1."""
    scaled = (logps_NV / temperature).log_softmax(-1)
    ordered, order = scaled.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = (before >= top_p).gather(-1, order.argsort(-1))
    return scaled.masked_fill(outside, -torch.inf).log_softmax(-1)


def of_tokens(logps_NV: Tensor, completion: Completion) -> list[float]:
    return logps_NV.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1).tolist()


def close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    assert [len(row) for row in found] == [len(row) for row in expected]
    return np.allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-3)


def test_completions_come_by_prompt_then_sample(plain: list[Completion], world: World) -> None:
    assert [(c.prompt_id, c.sample) for c in plain] == [
        (p.prompt_id, sample) for p in world.prompts for sample in range(SAMPLES)
    ]
    assert {c.policy_version for c in plain} == {0}
    asked = {p.prompt_id: p.token_ids for p in world.prompts}
    assert all(c.prompt_token_ids == asked[c.prompt_id] for c in plain)
    # A prompt's samples are draws of their own.
    assert len({(c.prompt_id, c.token_ids) for c in plain}) == len(plain)


def test_an_end_token_is_there_only_where_it_was_sampled(
    plain: list[Completion], shaped: list[Completion], world: World
) -> None:
    stops = set(world.stop_ids)
    for completion in plain + shaped:
        ids = completion.token_ids
        assert all(0 <= i < len(world.tokenizer) for i in ids)
        assert not stops & set(ids[:-1]), "nothing comes after the end"
        assert completion.finish_reason == ("stop" if ids[-1] in stops else "length")
        assert len(ids) == LONGEST or completion.finish_reason == "stop"
    assert {c.finish_reason for c in plain} == {"stop", "length"}


def test_text_is_what_the_tokens_say_without_the_end(plain: list[Completion], world: World) -> None:
    for completion in plain:
        ids = completion.token_ids[: -1 if completion.finish_reason == "stop" else None]
        said = world.tokenizer.decode(ids, skip_special_tokens=True).strip()
        # vLLM holds back the first bytes of a character whose last ones were cut off.
        assert completion.text.rstrip("\ufffd") == said.rstrip("\ufffd")


def test_behaviour_logps_at_temperature_one_are_the_models(
    generator: Generator, plain: list[Completion], world: World
) -> None:
    folder = world.versions[0].path
    assert close([c.logps for c in plain], generator.logps(plain))
    own = [of_tokens(next_token_logps(folder, c), c) for c in plain[::3]]
    assert close([c.logps for c in plain[::3]], own)


def test_behaviour_logps_are_of_the_distribution_sampled_from(
    shaped: list[Completion], world: World
) -> None:
    surprise, entropy, variance = 0.0, 0.0, 0.0
    for completion in shaped:
        logps = next_token_logps(world.versions[0].path, completion)
        drawn_from = shape(logps, SHAPED.temperature, SHAPED.top_p)
        own = of_tokens(drawn_from, completion)
        assert close([completion.logps], [own])
        finite = drawn_from.masked_fill(drawn_from.isinf(), 0.0)
        entropies = -(drawn_from.exp() * finite).sum(-1)
        surprise -= sum(own)
        entropy += float(entropies.sum())
        variance += float(((drawn_from.exp() * finite**2).sum(-1) - entropies**2).sum())
    # Draws from this distribution are as surprising as its entropy says, within four deviations.
    assert abs(surprise - entropy) < 4 * variance**0.5


def test_temperature_zero_takes_the_likeliest_token(generator: Generator, world: World) -> None:
    found = generator.generate(world.prompts, GREEDY)
    assert [(c.prompt_id, c.sample) for c in found] == [(p.prompt_id, 0) for p in world.prompts]
    for completion in found:
        logps = next_token_logps(world.versions[0].path, completion)
        # In fp32 the engine's near ties may fall the other way.
        lost = logps.max(-1).values - torch.tensor(of_tokens(logps, completion))
        assert lost.max() < 1e-3
    assert close([c.logps for c in found], generator.logps(found))


def test_logps_do_not_depend_on_the_company(generator: Generator, plain: list[Completion]) -> None:
    mixed = plain[::2]
    assert close(generator.logps(mixed), [generator.logps([c])[0] for c in mixed])


def test_a_prompt_of_one_token_is_answered(generator: Generator) -> None:
    prompt = Prompt("short", ({"role": "user", "content": "x"},), token_ids=(42,))
    found = generator.generate([prompt], PLAIN)
    assert close([c.logps for c in found], generator.logps(found))


def test_a_new_version_is_served_from_the_load_on(
    generator: Generator, plain: list[Completion], world: World
) -> None:
    some = plain[::4]
    before = generator.logps(some)
    # Long enough that an engine keeps its cache, which the next version must not read.
    long = replace(world.prompts[0], token_ids=tuple(range(500, 800)))
    generator.generate([long], PLAIN)
    first, second = world.versions
    assert generator.load(second) == Loaded(1, second.sha256)
    now = generator.logps(some)
    assert close(now, [of_tokens(next_token_logps(second.path, c), c) for c in some])
    assert not close(now, before), "the versions differ"
    fresh = generator.generate([long, world.prompts[1]], PLAIN)
    assert {c.policy_version for c in fresh} == {1}
    assert close([c.logps for c in fresh], generator.logps(fresh))
    assert generator.load(first) == Loaded(0, first.sha256)
    assert close(generator.logps(some), before)


def test_the_hash_is_of_what_was_read(generator: Generator, world: World) -> None:
    first, second = world.versions
    claimed = Published(2, second.path, "merged", first.sha256)
    assert generator.load(claimed) == Loaded(2, second.sha256)


def test_sleep_changes_nothing(generator: Generator, plain: list[Completion], world: World) -> None:
    before = generator.logps(plain[:3])
    generator.sleep()
    assert generator.wake() == Loaded(0, world.versions[0].sha256)
    assert generator.logps(plain[:3]) == before


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_nothing_is_served_before_the_first_load(world: World, engine: str) -> None:
    generator = world.build(engine)
    generator.sleep()
    assert generator.wake() is None
    with pytest.raises(AssertionError):
        generator.generate(world.prompts, PLAIN)
    generator.close()


def test_the_same_call_gives_the_same_bytes(world: World) -> None:
    """Transformers in fp32 on a CPU; vLLM's samples depend on what else is in the batch."""
    first, second = world.build("transformers"), world.build("transformers")
    first.load(world.versions[0])
    second.load(world.versions[1])
    second.load(world.versions[0])
    some, sampling = world.prompts[:3], Sampling(SAMPLES, 0.7, 1.0, LONGEST, seed=13)
    drawn = first.generate(some, sampling)
    torch.manual_seed(99)
    assert first.generate(some, sampling) == drawn
    assert second.generate(some, sampling) == drawn
    assert first.generate(some, replace(sampling, seed=14)) != drawn


@dataclass(frozen=True)
class Adapters:
    """Two adapters over the base, each also as a merged folder."""

    published: tuple[Published, Published]
    merged: tuple[Path, Path]
    base: Path
    rank: int = 4


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    folder = tmp_path_factory.mktemp("adapters")
    config = Model(path=str(tiny_model), precision="fp32", lora=Lora(rank=4, alpha=8.0))
    policy = Policy(config, str(tiny_model), "cpu", seed=0)
    for version in (1, 2):
        fakes.perturb(policy, seed=version)
        for name, save in (
            (f"adapter-{version}", lambda path: policy.save(path, "card")),
            (f"merged-{version}", policy.save_merged),
        ):
            (folder / name).mkdir()
            save(folder / name)
    return Adapters(
        (
            published(1, folder / "adapter-1", "adapter"),
            published(2, folder / "adapter-2", "adapter"),
        ),
        (folder / "merged-1", folder / "merged-2"),
        tiny_model,
    )


def check_adapters(
    adapters: Adapters,
    load: Callable[[Published], Loaded],
    logps: Callable[[], list[list[float]]],
    completions: Sequence[Completion],
    folder: Path,
) -> None:
    """Each adapter, whatever was there before, scores as its merged folder does."""
    expected = [
        [of_tokens(next_token_logps(merged, c), c) for c in completions]
        for merged in adapters.merged
    ]
    assert not close(*expected), "the adapters differ"
    for i in (0, 1, 0):
        version = adapters.published[i]
        assert load(version) == Loaded(version.version, version.sha256)
        assert close(logps(), expected[i])
    # The same version number with other weights in it is other weights.
    shutil.copytree(adapters.published[1].path, folder / "again")
    assert load(published(1, folder / "again", "adapter")).version == 1
    assert close(logps(), expected[1])


def probes(world: World) -> list[Completion]:
    return [
        Completion(p.prompt_id, 0, "", (101, 202, 303, 44), p.token_ids, (), "length", 0)
        for p in world.prompts
    ]


def test_transformers_hot_loads_adapters(adapters: Adapters, world: World, tmp_path: Path) -> None:
    generator = TransformersGenerator(
        str(adapters.base), world.tokenizer, world.stop_ids, torch.float32, "cpu", 8
    )
    some = probes(world)
    check_adapters(adapters, generator.load, lambda: generator.logps(some), some, tmp_path)
    assert len(generator.model.peft_config) == 1, "old adapters are dropped"
    drawn = generator.generate(world.prompts[:2], PLAIN)
    assert close([c.logps for c in drawn], generator.logps(drawn))


# A second engine in one process has no memory of its own to plan with: this one gets a process.
HOT_LOADING = """
import json, sys
from pathlib import Path
from rlhf.protocols import Published
from rlhf.types import Completion
from rollout.vllm_generator import Served, VllmGenerator
from test_generators import engine_options

base, stop_ids, rank, probes = json.loads(sys.stdin.readline())
generator = VllmGenerator(Served(base, tuple(stop_ids), rank), engine_options())
some = [Completion("p", i, "", tuple(ids), tuple(prompt), (), "length", 0)
        for i, (prompt, ids) in enumerate(probes)]
for line in sys.stdin:
    version, path, kind, sha256 = json.loads(line)
    loaded = generator.load(Published(version, Path(path), kind, sha256))
    answer = [loaded.version, loaded.sha256, generator.logps(some)]
    print("ANSWER " + json.dumps(answer), flush=True)
generator.close()
"""


@pytest.mark.engine
def test_vllm_hot_loads_adapters(adapters: Adapters, world: World, tmp_path: Path) -> None:
    some = probes(world)
    asked = [[list(c.prompt_token_ids), list(c.token_ids)] for c in some]
    answers: list[Any] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOT_LOADING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    ) as child:
        assert child.stdin and child.stdout
        stdin, stdout = child.stdin, child.stdout
        print(json.dumps([str(adapters.base), [0], adapters.rank, asked]), file=stdin, flush=True)

        def load(version: Published) -> Loaded:
            sent = [version.version, str(version.path), version.kind, version.sha256]
            print(json.dumps(sent), file=stdin, flush=True)
            answer = next((a for a in stdout if a.startswith("ANSWER ")), None)
            assert answer, (tmp_path / "stderr").read_text()[-3000:]
            answers.append(json.loads(answer.removeprefix("ANSWER ")))
            return Loaded(*answers[-1][:2])

        try:
            check_adapters(adapters, load, lambda: answers[-1][2], some, tmp_path)
        finally:
            child.kill()
