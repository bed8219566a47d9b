"""A judge's own vLLM engine in this process; its answers can't but fit the schema.

The engine starts with the first question, so that a run that stops before has paid nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config_judges import LlmSpec
from rlhf.errors import InputError
from rlhf.types import Message
from rollout.concurrency import Concurrency
from rollout.imports import resolve_path
from rollout.judges.backends import Answer, Call, Keep, Token, keep_all
from rollout.vllm_engine import InProcessEngine, require_vllm

_REASON_CHARACTERS = 400
"""A small model would write until it is cut off, and a verdict that is cut off is none."""


class VllmBackend:
    """One engine; `device` is auto, cpu or cuda."""

    beside = False

    def __init__(self, spec: LlmSpec, field: str, device: str) -> None:
        require_vllm(field, "openai")
        self._spec = spec
        self._source = resolve_path(spec.model)
        if spec.model.startswith(("/", "./", "../")) and not self._source.exists():
            raise InputError(f"{field}.model: there is no model at {spec.model}")
        self._engine = InProcessEngine.of_judge(spec.engine, field, device)
        self._tokenizer: Any = None
        self.identity: Mapping[str, str] = {
            "backend": "vllm",
            "model": spec.model,
            "revision": spec.revision or "",
            "precision": spec.engine.precision,
        }

    @property
    def concurrency(self) -> Concurrency:
        """How many calls it works on at once."""
        return self._engine.concurrency

    def start(self, record: Path | None, probe: Call) -> None:
        """See `Backend.start`; nothing here is cheap enough to ask."""

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        """See `Backend.ask`."""
        if not calls:
            return []
        self.ready()
        answers: dict[int, Answer] = {}
        fitting: list[tuple[int, Call, list[int]]] = []
        limit = self._spec.engine.max_length
        for index, call in enumerate(calls):
            ids = self._encode(call.messages)
            if len(ids) + call.max_tokens > limit:
                answers[index] = Answer.failed(
                    f"too long for engine.max_length {limit}: {len(ids)} tokens to read and "
                    f"{call.max_tokens} to write"
                )
            else:
                fitting.append((index, call, ids))
        for (index, _, _), answer in zip(fitting, self._generate(fitting), strict=True):
            answers[index] = answer
        found = [answers[index] for index in range(len(calls))]
        keep_all(found, keep)
        return found

    def news(self) -> None:
        """See `Backend.news`: an engine of one's own costs nothing and answers for itself."""

    def sleep(self) -> None:
        """See `Backend.sleep`."""
        self._engine.sleep()

    def close(self) -> None:
        """See `Backend.close`."""
        self._engine.close()

    def _generate(self, asked: Sequence[tuple[int, Call, list[int]]]) -> list[Answer]:
        if not asked:
            return []
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=call.max_tokens,
                logprobs=call.alternatives or None,
                structured_outputs=StructuredOutputsParams(json=_bounded(call.schema)),
            )
            for _, call, _ in asked
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for _, _, ids in asked]
        outputs: list[Any] = self._engine.ask(
            lambda llm: llm.generate(prompts, parameters, use_tqdm=False)
        )
        return [_read(output.outputs[0]) for output in outputs]

    def ready(self) -> None:
        """Start the engine, or wake it."""
        if self._engine.started:
            self._engine.wake()
            return
        from rlhf.model_files import materialise

        self._engine.start(
            materialise(str(self._source)) if self._source.exists() else self._spec.model,
            revision=self._spec.revision,
            # White space between JSON tokens is where a small model gets lost.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        )
        self._tokenizer = self._engine.llm.get_tokenizer()
        if getattr(self._tokenizer, "chat_template", "its own") is None:
            raise InputError(
                f"judge {self._spec.name}: {self._spec.model} has no chat template, so it is no "
                "model that answers questions; take the instruct version of it"
            )

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Prompt token ids. Where a chat template knows no system role, the instructions open the
        user's message; a model that thinks aloud is asked not to, since its grammar is JSON."""
        from jinja2 import TemplateError

        try:
            return self._template(messages)
        except TemplateError:
            first, *rest = messages
            merged = Message(role="user", content="\n\n".join(m["content"] for m in (first, *rest)))
            return self._template([merged])

    def _template(self, messages: Sequence[Message]) -> list[int]:
        encoded: Any = self._tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            enable_thinking=False,
        )
        return list(encoded["input_ids"])


def _bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its reasons bounded, which not every endpoint's schemas may ask for."""
    if schema.get("type") == "string" and "enum" not in schema:
        return {**schema, "maxLength": _REASON_CHARACTERS}
    properties = schema.get("properties", {})
    inner = {name: _bounded(s) for name, s in properties.items()}
    return {**schema, "properties": inner} if inner else dict(schema)


def _read(output: Any) -> Answer:
    if output.finish_reason == "length":
        return Answer.failed("cut off: the verdict is longer than max_tokens")
    tokens = tuple(
        Token(
            step[token].decoded_token or "",
            {entry.decoded_token or "": entry.logprob for entry in step.values()},
        )
        for token, step in zip(output.token_ids, output.logprobs or (), strict=False)
    )
    return Answer(output.text, tokens)
