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

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from launch.actors import ActorLostError, all_of
from rollout.transfer import Coming, Meeting

if TYPE_CHECKING:
    from launch.generator_actors import Generators
    from launch.learner_actors import Learners
    from rlhf.protocols import Loaded

WHOLE_S = 1800.0
"""Seconds that a version may take."""


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
    try:
        answers = all_of([*sending, *receiving], WHOLE_S)
    except ActorLostError as error:
        raise ActorLostError(
            f"version {version} did not arrive: {error}; rollout.transfer disk takes the run's "
            "folder instead, and the same command goes on with it"
        ) from error
    return answers[0], answers[len(sending) :]
