"""The `judges` section: who scores completions, one kind of judge a class.

An entry's `kind` says which class reads it; without one it is a verifier. A new kind is a class
with a `kind` of its own, one more member of `JudgeSpec`, and its builder in `rollout.judges.panel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rlhf.config_base import Section, Share

RESERVED = frozenset(
    {"prompt_id", "sample", "key", "cluster", "completions", "unrewarded", "reward", "_value"}
)
"""Names that no dimension may have."""


class _Judge(Section):
    """What every judge has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name in tables and reports."""
    dimensions: Annotated[list[str], Field(min_length=1)]
    """What it scores."""

    @field_validator("name")
    @classmethod
    def _no_file_s_name(cls, value: str) -> str:
        if value in ("standings", "identities") or value.endswith("-usage"):
            raise ValueError(
                f"must not be {value}, a name that a run's own files have beside a judge's; "
                "call it otherwise"
            )
        return value

    @field_validator("dimensions")
    @classmethod
    def _no_column_s_name(cls, value: list[str]) -> list[str]:
        if odd := next((name for name in value if name in RESERVED), None):
            raise ValueError(
                f"must not hold {odd}, which tables of answers use for something else; call it "
                "otherwise in the judge, too"
            )
        return value

    @property
    def relative(self) -> bool:
        """Whether its scores only rank the answers to one prompt, and have no level of their own:
        their mean is the same for every policy, so no floor and no gate can be held with them."""
        return False


class VerifierSpec(_Judge):
    """A Python function (prompt, completion) -> {dimension: score in [0,1] or None}. Keys of its
    result that are not among its dimensions are ignored."""

    kind: Literal["verifier"] = "verifier"
    """A verifier; may be left out."""
    function: str
    """`module:function` or `file.py:function`."""


class Engine(Section):
    """A judge's own model in this process: a vLLM engine, or a reward model in Transformers."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp16 for GPUs older than Ampere, such as a T4."""
    max_length: Annotated[int, Field(ge=256)] = 4096
    """Rubric, prompt, answer and verdict together, in tokens. What is longer is an abstention."""
    max_concurrency: Annotated[int, Field(ge=1)] = 64
    """Calls decoded together."""
    memory_gib: Annotated[float, Field(gt=0)] = 1.0
    """Key-value cache on a CPU, in GiB."""
    gpu_memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of a GPU beside the generator's; the learner has the card while both sleep."""


class Traffic(Section):
    """How an endpoint is called. Nothing here can change a verdict, so a run may be resumed with
    other values."""

    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = (
        "OPENAI_API_KEY"
    )
    """Name of the environment variable that holds the key, which stands nowhere else; null for a
    server that wants none."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """For one whole call: a server that drips a byte a second is late too."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Calls under way at once."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Calls are spaced to this rate. Default: as fast as the endpoint answers."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Further tries after 408, 409, 429, 5xx and lost connections, each after a longer random
    wait, or as long as Retry-After says: about a minute in all."""
    max_calls: Annotated[int, Field(ge=1)] | None = None
    """Budget of the whole run, over all its starts, further tries included. Once spent, the run
    stops resumably (exit 75)."""
    max_total_tokens: Annotated[int, Field(ge=1)] | None = None
    """Budget in tokens, read and written, as the endpoint counts them."""


class LlmSpec(_Judge):
    """A language model with a rubric."""

    kind: Literal["llm"]
    """A language model as a judge."""
    rubrics: dict[str, str] = Field(default_factory=dict)
    """Dimension -> packaged rubric or path of a YAML file. Default: the packaged rubric of the
    dimension's own name."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """`pointwise` grades each answer on the rubric's scale. `pairwise` compares every two answers
    to a prompt, in both orders (disagreement is a tie); the score is the win rate over the
    prompt's other answers: sharper, but K answers take K(K-1) calls."""
    grade: Literal["argmax", "expected"] = "expected"
    """Pointwise only. `expected` weighs the grades by their probabilities, since the likeliest of
    five grades alone ties most pairs; `argmax` for endpoints that give no log-probs."""
    scale_order: Literal["ascending", "descending"] = "ascending"
    """Order in which the rubric's grades are listed: models lean to what they read first. In an
    ensemble, members that differ in it are two votes. (Answers that are compared are always shown
    in both orders.)"""
    one_call: Literal["per_dimension", "all"] = "per_dimension"
    """`all` grades every dimension in one call: cheaper, but the grades colour one another."""
    backend: Literal["vllm", "openai"] = "vllm"
    """`vllm`: an engine in this process. `openai`: any endpoint that speaks OpenAI's protocol."""
    model: str
    """Hub id, local folder or .gguf file (as in model.path); for an endpoint, its model's name."""
    revision: str | None = None
    """Hub revision; pin it, so that a certificate stays true."""
    base_url: str = "https://api.openai.com/v1"
    """The endpoint."""
    max_tokens: Annotated[int, Field(ge=16)] = 256
    """Longest verdict for one dimension. One that is cut off is an abstention."""
    engine: Engine = Engine()
    traffic: Traffic = Traffic()

    @model_validator(mode="after")
    def _rules(self) -> LlmSpec:
        unknown = sorted(set(self.rubrics) - set(self.dimensions))
        if unknown:
            raise ValueError(
                f"rubrics names {unknown}, which this judge does not score; "
                f"its dimensions are {self.dimensions}"
            )
        if self.backend == "openai" and self.revision is not None:
            raise ValueError("revision can't be asked of an endpoint; name it in model, if it can")
        return self

    @property
    def relative(self) -> bool:
        """A win rate among a prompt's own answers is 0.5 on average, whatever they are worth."""
        return self.mode == "pairwise"


class RewardModelSpec(_Judge):
    """A reward model: any `AutoModelForSequenceClassification` with a chat template and one output
    a dimension, in their order. Answers are ranked as its raw scores rank them."""

    kind: Literal["reward_model"]
    """A reward model."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """`vllm`: its pooling runner, with the same scores; faster on a GPU."""
    model: str
    """Hub id or local folder, weights in safetensors."""
    revision: str | None = None
    """Hub revision; pin it, so that a certificate stays true."""
    mapping: Literal["sigmoid", "quantiles"] = "sigmoid"
    """Raw score -> [0, 1]; both rise strictly, so neither changes a ranking. `sigmoid`: how likely
    the answer beats one of raw score 0 (Bradley-Terry). `quantiles`: the share of a calibration
    set's answers that score lower; floors and margins then mean the same for every model."""
    calibration_set: str | None = None
    """With `quantiles`: a preference file in any format of `pairloop pairs`, both answers of each
    pair, 100 or more in all, like those that will be judged."""
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _set_for_quantiles(self) -> RewardModelSpec:
        if (self.mapping == "quantiles") != (self.calibration_set is not None):
            raise ValueError(
                f"calibration_set must be given with mapping quantiles, and only there; mapping is "
                f"{self.mapping}, calibration_set {self.calibration_set}"
            )
        return self


class RecordedSpec(_Judge):
    """Verdicts that somebody else gave, read from a file: people, or any judge outside. The file
    that calibrates it (`pairloop judge calibrate`) is the file that it scores from."""

    kind: Literal["recorded"]
    """Verdicts from a file."""
    verdicts: str
    """JSONL file as for `pairloop judge calibrate`, or scores in Parquet (a file, or a folder such
    as a round's `scores`), with this judge's name in it. An `item_id` is the SHA-256 of prompt_id,
    a line feed and the answer's text; or the prompt_id, a hyphen and the sample's number."""
    completions: str | None = None
    """Parquet file or folder (as a round's `completions`) with the answers that sample numbers
    stand for. A verdict counts for that text alone, never for another answer with its number."""


def _kind(value: Any) -> str | None:
    """The tag of an entry, read or built; None where it has none that could be one."""
    found = (
        value.get("kind", "verifier")
        if isinstance(value, Mapping)
        else getattr(value, "kind", None)
    )
    return found if isinstance(found, str) else None


MemberSpec = Annotated[
    Annotated[VerifierSpec, Tag("verifier")]
    | Annotated[LlmSpec, Tag("llm")]
    | Annotated[RewardModelSpec, Tag("reward_model")]
    | Annotated[RecordedSpec, Tag("recorded")],
    Discriminator(_kind),
]


class EnsembleSpec(_Judge):
    """Several judges that vote, as one. At temperature 0 the same call again is no second vote, so
    members must differ: in model, in the rubric's wording (a rubric file of one's own), in the
    order of its grades (scale_order), in mode."""

    kind: Literal["ensemble"]
    """Several judges as one."""
    members: Annotated[list[MemberSpec], Field(min_length=2)]
    """Judges of any other kind, each on all of the ensemble's dimensions."""
    combine: Literal["mean", "median"] = "mean"
    """`median` shrugs off one vote that is far from the others; it takes three."""
    quorum: Annotated[int, Field(ge=1)] | None = None
    """Fewest votes that make a score; with fewer, it is an abstention. Default: more than half of
    the members."""
    max_spread: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Largest standard deviation of the votes; beyond it, it is an abstention. Two votes two grades
    of five apart have 0.35."""

    @model_validator(mode="after")
    def _members_fit(self) -> EnsembleSpec:
        for index, member in enumerate(self.members):
            if set(member.dimensions) != set(self.dimensions):
                raise ValueError(
                    f"members.{index}.dimensions must be those of the ensemble, {self.dimensions}, "
                    f"got {member.dimensions}"
                )
        if self.quorum is not None and self.quorum > len(self.members):
            raise ValueError(
                f"quorum must be at most the number of members, {len(self.members)}, got "
                f"{self.quorum}"
            )
        return self

    @property
    def relative(self) -> bool:
        """One member without a level leaves none to the mean."""
        return any(member.relative for member in self.members)


JudgeSpec = Annotated[
    Annotated[VerifierSpec, Tag("verifier")]
    | Annotated[LlmSpec, Tag("llm")]
    | Annotated[RewardModelSpec, Tag("reward_model")]
    | Annotated[RecordedSpec, Tag("recorded")]
    | Annotated[EnsembleSpec, Tag("ensemble")],
    Discriminator(_kind),
]


class Canaries(Section):
    """Answers that every round asks the judges about anew, twice, before it trusts their scores: a
    judge whose scores are no longer those of the first round stops the run."""

    answers: Annotated[int, Field(ge=0)] = 32
    """Of the start's own answers, two a prompt, drawn in round 1. 32 cost a pointwise judge 64
    calls a round; where its scores vary by 0.1 when asked again, they find a shift by 0.1 four
    times in five. 0 asks about none; where a model judge trains, the report then says so."""
    gold: str | None = None
    """JSONL file of further canaries whose order is known: a prompt's record (`prompt` or
    `messages`, `context`, `reference`) with `answers`, a list of {"text": ..., "gold": {dimension:
    number}}. Adds each round's agreement with gold."""
    max_drift: Share = 0.05
    """How far scores of the same answers may move from round 1's (root mean square, or on average),
    and its agreement with gold, its consistency between orders and its share of answers without a
    score may worsen. 0.05 is the least margin of a pair: beyond it other pairs are made. Drift has
    to be sure, the interval's near end beyond it, so that a stable judge hardly ever stops a
    run."""


class Judges(Section):
    """Who scores completions. `audit` judges train nothing: they show gains made by gaming."""

    panel: Annotated[list[JudgeSpec], Field(min_length=1)]
    """Judges whose scores train; one a dimension."""
    audit: list[JudgeSpec] = Field(default_factory=list)
    """Judges that only watch: they score held-out answers, and a sample of each round's pairs."""
    audit_pairs: Annotated[int, Field(ge=0)] = 20
    """Pairs of each round, drawn at random, that audit judges score after selection, and that a
    blind sheet in the round's folder shows to a person: do they prefer what was chosen?"""
    canaries: Canaries = Canaries()
    cache: str | None = None
    """SQLite file that keeps model judges' verdicts, so that none is asked for twice; runs may
    share one. Default: judges/verdicts.sqlite in the run's folder."""
    max_abstention: Share = 0.05
    """A larger share of missing scores in any dimension stops the round."""
    uncertified: Literal["refuse", "allow"] = "refuse"
    """A model judge trains nothing before it has proved itself against gold labels; with `allow` it
    does, and log, summary and report are stamped. Verifiers need no certificate."""

    @model_validator(mode="after")
    def _unique(self) -> Judges:
        judges = self.panel + self.audit
        members = [m for j in judges if isinstance(j, EnsembleSpec) for m in j.members]
        names = [j.name for j in [*judges, *members]]
        if len(set(names)) < len(names):
            raise ValueError(f"judge names must differ, got {names}")
        for judges, where in ((self.panel, "panel"), (self.audit, "audit")):
            dimensions = [d for j in judges for d in j.dimensions]
            twice = sorted({d for d in dimensions if dimensions.count(d) > 1})
            if twice:
                raise ValueError(f"one {where} judge a dimension; scored twice: {twice}")
        return self

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Every dimension the panel scores, in order."""
        return tuple(d for judge in self.panel for d in judge.dimensions)

    @property
    def absolute(self) -> tuple[str, ...]:
        """Dimensions whose panel scores have a level: they can hold a floor and a gate."""
        return tuple(d for j in self.panel if not j.relative for d in j.dimensions)
