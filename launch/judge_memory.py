"""What judges' own models hold: a language model in vLLM, a reward model in vLLM or Transformers.

Answers are judged while the generator is awake, so they are counted there. On a GPU a judge sleeps
in every other phase (`launch.judging`): its weights lie in host memory, and of a vLLM engine the
graphs stay on the card. On a CPU it stays as it is, a language model from its first question on, a
reward model from the start. A judge at an endpoint takes nothing here.

Letters as in `launch.learner_memory`; a reward model has no head over the vocabulary.
- weights: cP
- vLLM: `engine.gpu_memory_share` of the card, in which weights, workspace and cache find their
  place; on a CPU `engine.memory_gib` of cache.
- Transformers: a batch of 16,384 tokens, or one text where `engine.max_length` is more, or fewer
  where `engine.max_concurrency` texts are; c(4I + 4H) for each in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch import architectures
from launch.architectures import Architecture
from launch.learner_memory import BYTES
from launch.machines import GIB, Machine
from launch.memory_parts import (
    ASSUMED,
    PHASES,
    Part,
    Phase,
    default_batched_tokens,
    key_value_bytes,
    millions,
    workspace,
)
from rlhf.config import RunConfig
from rlhf.config_judges import EnsembleSpec, JudgeSpec, LlmSpec, RewardModelSpec
from rlhf.errors import InputError
from rollout.judges.panel import engine_key

ROLE = "judge"
SCORING: tuple[Phase, ...] = ("generate",)
TOKENS_AT_ONCE = 16_384
"""Of a reward model's batch in Transformers (`rollout.judges.reward_engines`)."""


@dataclass(frozen=True, slots=True)
class JudgeModel:
    """A judge whose model runs in this process."""

    spec: LlmSpec | RewardModelSpec
    architecture: Architecture

    @property
    def compute(self) -> int:
        """c: bytes of the precision."""
        return BYTES[self.spec.engine.precision]

    @property
    def parameters(self) -> int:
        """P, without the head that a reward model lacks."""
        a = self.architecture
        headless = isinstance(self.spec, RewardModelSpec) and not a.tied
        return a.parameters - (a.embedding if headless else 0)

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return self.compute * self.parameters

    @property
    def loaded(self) -> tuple[Phase, ...]:
        """Phases in which it is somewhere in memory."""
        return PHASES[1:] if isinstance(self.spec, LlmSpec) else PHASES

    @property
    def asleep(self) -> tuple[Phase, ...]:
        """Phases in which it sleeps on a GPU."""
        return tuple(phase for phase in self.loaded if phase not in SCORING)

    def part(
        self, what: str, size: int, formula: str, phases: tuple[Phase, ...], host: bool
    ) -> Part:
        """A row of the table, with the judge's name."""
        return Part(ROLE, f"{self.spec.name}: {what}", size, formula, phases, host)


def own_models(config: RunConfig) -> tuple[list[JudgeModel], list[str]]:
    """Judges whose models run in this process; and why others are of unknown size, a line each."""
    known, unknown = [], []
    for spec in own_specs(config):
        try:
            known.append(JudgeModel(spec, architectures.find(spec.model, spec.revision)))
        except InputError as error:
            unknown.append(f"{spec.name}: not in these sums: {error}")
    return known, unknown


def own_specs(config: RunConfig) -> list[LlmSpec | RewardModelSpec]:
    """Judges whose models this run must load, members of ensembles too; one of those that share
    an engine."""
    found: list[LlmSpec | RewardModelSpec] = []
    for judges in (config.judges.panel, config.judges.audit):
        held: dict[str, LlmSpec | RewardModelSpec] = {}
        for spec in _own(judges):
            held.setdefault(engine_key(spec) if isinstance(spec, LlmSpec) else spec.name, spec)
        found += held.values()
    return found


def _own(specs: Sequence[JudgeSpec]) -> Iterator[LlmSpec | RewardModelSpec]:
    for spec in specs:
        if isinstance(spec, EnsembleSpec):
            yield from _own(spec.members)
        elif isinstance(spec, RewardModelSpec) or (
            isinstance(spec, LlmSpec) and spec.backend == "vllm"
        ):
            yield spec


def parts(judge: JudgeModel, machine: Machine, on_gpu: bool) -> tuple[list[Part], int]:
    """A judge's rows of the table, and what its cache lacks for one text of the longest."""
    if judge.spec.backend == "transformers":
        return list(_transformers(judge, on_gpu)), 0
    return _vllm_on_gpu(judge, machine) if on_gpu else _vllm_on_cpu(judge)


def _transformers(judge: JudgeModel, on_gpu: bool) -> Iterator[Part]:
    a, c, engine = judge.architecture, judge.compute, judge.spec.engine
    said = f"{c} B x {millions(judge.parameters)}"
    yield judge.part("weights", judge.weights, said, SCORING if on_gpu else PHASES, not on_gpu)
    if on_gpu:
        yield judge.part("weights asleep", judge.weights, said, judge.asleep, True)
    tokens = min(engine.max_concurrency * engine.max_length, max(TOKENS_AT_ONCE, engine.max_length))
    each = c * (4 * a.intermediate + 4 * a.hidden)
    said = f"{each:,} B x {tokens:,} tokens of a batch"
    yield judge.part("activations", each * tokens, said, SCORING, not on_gpu)


def _vllm_on_gpu(judge: JudgeModel, machine: Machine) -> tuple[list[Part], int]:
    a, c, engine = judge.architecture, judge.compute, judge.spec.engine
    budget = round(engine.gpu_memory_share * machine.gpu)
    batched = min(default_batched_tokens(machine), engine.max_concurrency * engine.max_length)
    work = workspace(a, c, batched, _rows_of_logits(judge)) + ASSUMED.graphs
    longest = key_value_bytes(a, c) * engine.max_length
    cache = budget - judge.weights - work
    said = (
        f"{engine.gpu_memory_share:g} of the card: weights {judge.weights / GIB:.2f}, "
        f"workspace {work / GIB:.2f}, cache {cache / GIB:.2f} GiB for "
        f"{max(0, cache) // longest:,} of the longest"
    )
    host = f"{c} B x {millions(judge.parameters)}"
    return [
        judge.part("vLLM, awake", budget, said, SCORING, False),
        judge.part("vLLM, asleep", ASSUMED.graphs, "graphs, assumed", judge.asleep, False),
        judge.part("vLLM, asleep", judge.weights, host, judge.asleep, True),
    ], longest - cache


def _vllm_on_cpu(judge: JudgeModel) -> tuple[list[Part], int]:
    a, c, engine = judge.architecture, judge.compute, judge.spec.engine
    cache = round(engine.memory_gib * GIB)
    longest = key_value_bytes(a, c) * engine.max_length
    batched, rows = max(8192, engine.max_length), _rows_of_logits(judge)
    kept = f"engine.memory_gib; {cache // longest:,} of the longest at once"
    step = f"a step over {batched:,} tokens, logits of {rows} sequences"
    said = f"{c} B x {millions(judge.parameters)}"
    return [
        judge.part("weights", judge.weights, said, judge.loaded, True),
        judge.part("key-value cache", cache, kept, judge.loaded, True),
        judge.part("workspace", workspace(a, c, batched, rows), step, SCORING, True),
    ], longest - cache


def _rows_of_logits(judge: JudgeModel) -> int:
    return judge.spec.engine.max_concurrency if isinstance(judge.spec, LlmSpec) else 0
