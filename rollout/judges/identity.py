"""Who a judge is to its certificate: everything whose change makes it another judge."""

from __future__ import annotations

from rlhf.certificates import JudgeIdentity
from rlhf.protocols import Judge
from rollout.judges.llm import LlmJudge
from rollout.judges.recorded import RecordedJudge
from rollout.judges.reward_model import RewardModelJudge
from rollout.judges.verifier import Verifier


def identity(judge: Judge, dimension: str) -> JudgeIdentity | None:
    """What a certificate must name; None for a verifier, whose tests are its certificate."""
    if isinstance(judge, Verifier):
        return None
    if isinstance(judge, LlmJudge):
        return _of_llm(judge, dimension)
    if isinstance(judge, RecordedJudge):
        return JudgeIdentity(judge.name, votes=judge.votes)
    if isinstance(judge, RewardModelJudge):
        spec = judge.spec
        return JudgeIdentity(spec.name, spec.model, judge.weights, judge.scale_sha256())
    raise AssertionError(f"a judge of an unknown kind: {judge!r}")


def _of_llm(judge: LlmJudge, dimension: str) -> JudgeIdentity:
    spec = judge.spec
    remote = spec.backend == "openai"
    return JudgeIdentity(
        spec.name,
        model=f"{spec.model} at {spec.base_url}" if remote else spec.model,
        model_revision=spec.revision,
        rubric_hash=judge.wording_sha256(dimension),
        remote=remote,
    )
