"""Who a judge is to its certificate: everything whose change makes it another judge."""

from __future__ import annotations

from dataclasses import asdict

from rlhf.certificates import JudgeIdentity
from rlhf.protocols import Judge
from rollout.judges.cache import key_of
from rollout.judges.ensemble import Ensemble
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
    if isinstance(judge, Ensemble):
        return _of_ensemble(judge, dimension)
    raise AssertionError(f"a judge of an unknown kind: {judge!r}")


def _of_llm(judge: LlmJudge, dimension: str) -> JudgeIdentity:
    spec = judge.spec
    remote = spec.backend == "openai"
    return JudgeIdentity(
        spec.name,
        model=f"{spec.model} at {spec.base_url}" if remote else spec.model,
        model_revision=judge.weights,
        rubric_hash=judge.wording_sha256(dimension),
        remote=remote,
    )


def _of_ensemble(judge: Ensemble, dimension: str) -> JudgeIdentity:
    spec = judge.spec
    found = [identity(member, dimension) for member in judge.members]
    votes = [
        member.model_dump(mode="json") if who is None else asdict(who)
        for member, who in zip(spec.members, found, strict=True)
    ]
    return JudgeIdentity(
        spec.name,
        model=" + ".join(member.name for member in spec.members),
        rubric_hash=key_of(votes, spec.combine, judge.needed, spec.max_spread),
        remote=any(who is not None and who.remote for who in found),
    )
