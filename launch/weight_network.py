"""Weights over the network: the learner's ranks send a version while every generator receives it.

| who waits | for whom | if that one dies |
|---|---|---|
| the first rank | all workers of all generators, in a broadcast | gloo raises; NCCL waits on |
| every worker | the first rank, in the same | as there |
| the other ranks | the first, where split weights are gathered | as there |
| the driver, in `transfer` | all of them | it is raised at once |

So only the driver is sure to hear of a death. Whoever it leaves behind may hold half a version, or
wait for good: it is for the caller to make all of them anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from launch.actors import LOST, ActorLostError, answered
from launch.ranks import RankLostError
from rollout.transfer import Coming, Meeting

if TYPE_CHECKING:
    from launch.generator_actors import Generators
    from launch.learner_actors import Learners
    from rlhf.protocols import Loaded

WHOLE_S = 1800.0
"""Seconds that a version may take."""
GRACE_S = 60.0
"""Seconds that the others have once one has failed: a death may be heard of later than what it did
to them."""


def transfer(
    generators: Generators, learners: Learners, version: int, stored: Path
) -> tuple[str, list[Loaded]]:
    """The digest of what was sent, and what each generator says it received.

    Raises one of LOST where an actor died, ActorLostError where nobody died and it didn't end, else
    what one of them raised.
    """
    weights = learners.described()
    *firsts, world = accumulate(generators.workers, initial=1)
    # Last: the port is free now, and the first rank is where it is.
    meeting = Meeting(*learners.address(), world, generators.device)
    coming = [Coming(meeting, first, weights) for first in firsts]
    receiving = generators.receiving(version, stored, coming)
    sending = learners.send(meeting)
    answers = _in_time([*sending, *receiving], version)
    return answers[0], answers[len(sending) :]


def _in_time(references: Sequence[Any], version: int) -> list[Any]:
    pending, errors = list(references), list[Exception]()
    end = time.monotonic() + WHOLE_S
    while pending and (left := end - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, num_returns=1, timeout=left)
        for reference in ready:
            try:
                answered(reference)
            except LOST:
                raise
            except Exception as error:
                errors.append(error)
                end = min(end, time.monotonic() + GRACE_S)
    # One whose connection closed says less than the one who closed it.
    own = [error for error in errors if not isinstance(error, RankLostError)]
    if errors:
        raise (*own, *errors)[0]
    if pending:
        raise ActorLostError(
            f"version {version} was not there {WHOLE_S:.0f} s after it was sent, though nobody "
            "died; rollout.transfer disk takes the run's folder instead, and the same command goes "
            "on with it"
        )
    return [answered(reference) for reference in references]
