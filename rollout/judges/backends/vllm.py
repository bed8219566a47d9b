"""A judge's own vLLM engine in this process; its answers can't but fit the schema.

The engine starts with the first question, so that a run that stops before has paid nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config_judges import LlmSpec
from rlhf.errors import InputError
from rlhf.types import Message
from rollout.imports import resolve_path
from rollout.judges.backends import Answer, Call, Keep, Token

_REASON_CHARACTERS = 400
"""A small model would write until it is cut off, and a verdict that is cut off is none."""


class VllmBackend:
    """One engine; `device` is auto, cpu or cuda."""

    def __init__(self, spec: LlmSpec, field: str, device: str) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise InputError(
                f"{field}.backend is vllm, but vLLM is not installed: pip install 'pairloop[vllm]' "
                "(on a machine without GPU: make setup), or use backend openai"
            )
        self._spec = spec
        self._source = resolve_path(spec.model)
        if spec.model.startswith(("/", "./", "../")) and not self._source.exists():
            raise InputError(f"{field}.model: there is no model at {spec.model}")
        self._device = device
        self._llm: Any = None
        self._tokenizer: Any = None
        self._asleep = False
        self.identity: Mapping[str, str] = {
            "backend": "vllm",
            "model": spec.model,
            "revision": spec.revision or "",
            "precision": spec.engine.precision,
        }

    def start(self, record: Path | None, probe: Call) -> None:
        """See `Backend.start`; nothing here is cheap enough to ask."""

    def ask(self, calls: Sequence[Call], keep: Keep | None = None) -> list[Answer]:
        """See `Backend.ask`."""
        if not calls:
            return []
        self._wake()
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
        if keep is not None:
            for index, answer in sorted(answers.items()):
                keep(index, answer)
        return [answers[index] for index in range(len(calls))]

    def news(self) -> None:
        """See `Backend.news`: an engine of one's own costs nothing and answers for itself."""

    def sleep(self) -> None:
        """Give the card back; on a CPU there is none."""
        if self._llm is not None and self._device == "cuda" and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Shut the engine down."""
        if self._llm is not None:
            from rollout import vllm_compat

            vllm_compat.shut_down(self._llm)
            self._llm = None

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
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [_read(output.outputs[0]) for output in outputs]

    def _wake(self) -> None:
        if self._llm is None:
            self._start()
        elif self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _start(self) -> None:
        import torch

        from rlhf.policy import DTYPES, materialise
        from rollout import vllm_compat

        engine = self._spec.engine
        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        path = materialise(str(self._source)) if self._source.exists() else self._spec.model
        options = vllm_compat.EngineOptions(
            base=path,
            tokenizer=path,
            dtype=DTYPES[engine.precision],
            device=self._device,
            quantised=False,
            lora_rank=0,
            max_length=engine.max_length,
            max_concurrency=engine.max_concurrency,
            memory_gib=engine.memory_gib,
            gpu_memory_share=engine.gpu_memory_share,
            seed=0,
            stop_ids=(),
        )
        vllm_compat.prepare()
        from vllm import LLM

        self._llm = LLM(
            path,
            revision=self._spec.revision,
            dtype=str(options.dtype).removeprefix("torch."),
            max_model_len=options.max_length,
            max_num_seqs=options.max_concurrency,
            # White space between JSON tokens is where a small model gets lost.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            seed=options.seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **vllm_compat.engine_arguments(options),
        )
        self._tokenizer = self._llm.get_tokenizer()

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
