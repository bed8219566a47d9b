"""The judges of a run: built, certified, asked, and put to sleep while the learner works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from rlhf.answers import AT_ONCE
from rlhf.canaries import Watch
from rlhf.certificates import (
    IDENTITIES,
    JudgeIdentity,
    Standing,
    require_certificates,
    write_identities,
)
from rlhf.config import RunConfig
from rlhf.files import make_folder, read_json, write_json
from rlhf.protocols import Asked, Generator, Judge, ModelJudge
from rlhf.protocols import Serving as ServingProtocol
from rlhf.types import Completion, Prompt, Score, scores_table
from rlhf.verdict import STANDINGS
from rollout.judges.cache import FILE, VerdictCache
from rollout.judges.canaries import ask_anew, read_gold, watched
from rollout.judges.identity import identity
from rollout.judges.panel import (
    Engines,
    beside,
    build,
    check_abstentions,
    checked,
    score_all,
    suspicious,
    telling,
)

Items = Sequence[tuple[Prompt, Completion]]


class Judging:
    """Panel and audit judges together."""

    def __init__(self, config: RunConfig, engines: Engines) -> None:
        """Build them, and see that those that train may; `engines` hold their models.

        Raises InputError where a judge can't be had, or lacks a certificate that it needs.
        """
        self._cache = VerdictCache()
        self._cache_path = config.judges.cache
        self._panel = build(config.judges.panel, "judges.panel", engines, self._cache)
        self._audit = build(config.judges.audit, "judges.audit", engines, self._cache)
        self._limit = config.judges.max_abstention
        self._identities = identities(self._panel)
        self._standings = require_certificates(config, self._identities, datetime.now(UTC))
        self.watch = Watch(
            ask=lambda items: ask_anew([*self._panel, *self._audit], items, self._cache),
            audit=lambda items: scores_table(score_all(self._audit, items)),
            judges=watched(config, self._panel, self._audit, self._standings),
            gold=read_gold(config),
        )
        """How the run watches them."""
        self._say: Callable[[str], None] = print
        self._beside = ThreadPoolExecutor(
            AT_ONCE * max(1, len([*self._panel, *self._audit])), thread_name_prefix="judge"
        )

    @property
    def uncertified(self) -> list[Standing]:
        """What trains without a certificate; not empty only where the config allows it."""
        return [standing for standing in self._standings if not standing.granted]

    def open(self, folder: Path, say: Callable[[str], None]) -> None:
        """Start them for a run, whose `folder` keeps what it must remember of its judges.

        Raises InputError where an endpoint, a key or a rubric isn't what it must be.
        """
        self._say = say
        make_folder(folder)
        if self._models:
            self._cache.open(folder / FILE if self._cache_path is None else Path(self._cache_path))
        before = _trained_uncertified(folder)
        entries = [_entry(standing) for standing in self._standings]
        for entry in entries:
            entry["trained_uncertified"] = (entry["judge"], entry["dimension"]) in before
        write_json(folder / STANDINGS, {"standings": entries})
        write_identities(folder / IDENTITIES, self._identities)
        for standing in self.uncertified:
            say(
                f"UNCERTIFIED: {standing.judge} trains {standing.dimension} without a certificate "
                f"({standing.status}: {standing.reason}), since judges.uncertified is allow"
            )
        for judge in self._models:
            for line in judge.start(folder):
                say(line)

    @property
    def beside(self) -> bool:
        """Whether some of the panel work by themselves, while this process does other things."""
        return any(map(beside, self._panel))

    def ask(self, items: Items, audited: bool) -> Asked:
        """Ask the panel for scores; with `audited`, the audit judges too."""
        judges = [*self._panel, *(self._audit if audited else ())]
        asked = {j.name: self._beside.submit(j.score, items) for j in judges if beside(j)}
        return _Asked(judges, items, asked)

    def check(self, parts: Iterable[pl.DataFrame]) -> None:
        """Tell what a stage's scores cost and which completions were suspicious.

        Raises DataGateError where judges abstained too often.
        """
        scores = telling(parts)
        news = [line for judge in self._models if (line := judge.news())]
        for line in [*suspicious(scores), *news]:
            self._say(line)
        check_abstentions(scores, self._limit)

    def sleep(self) -> None:
        """The learner needs the device; the next score wakes them."""
        for judge in self._models:
            judge.sleep()

    def close(self) -> None:
        """Free everything; what is being asked is left off, and what was answered is kept."""
        self._beside.shutdown(wait=False, cancel_futures=True)
        for judge in self._models:
            judge.close()
        self._beside.shutdown()
        self._cache.close()

    @property
    def _models(self) -> list[ModelJudge]:
        return [j for j in (*self._panel, *self._audit) if isinstance(j, ModelJudge)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """See `rlhf.protocols.Asked`."""

    judges: Sequence[Judge]
    items: Items
    elsewhere: Mapping[str, Future[list[Score]]]
    """Judge that works by itself -> its scores."""

    @property
    def waiting(self) -> list[Future[list[Score]]]:
        return [found for found in self.elsewhere.values() if not found.done()]

    @property
    def ready(self) -> bool:
        return not self.waiting and len(self.elsewhere) == len(self.judges)

    def cancel(self) -> None:
        for found in self.elsewhere.values():
            found.cancel()

    def scores(self) -> pl.DataFrame:
        return scores_table(checked(self.judges, self.items, map(self._of, self.judges)))

    def _of(self, judge: Judge) -> list[Score]:
        found = self.elsewhere.get(judge.name)
        return judge.score(self.items) if found is None else found.result()


class Sharing:
    """A generator that shares its device with judges: the learner has it while both sleep."""

    def __init__(self, serving: ServingProtocol, judging: Judging) -> None:
        self._serving = serving
        self._judging = judging

    def at(self, version: int, policy: Path | None) -> Generator:
        """See `Serving.at`."""
        return self._serving.at(version, policy)

    def sleep(self) -> None:
        """See `Serving.sleep`."""
        self._serving.sleep()
        self._judging.sleep()

    def wake(self) -> None:
        """See `Serving.wake`; a judge wakes when it is asked."""
        self._serving.wake()


def identities(judges: Sequence[Judge]) -> dict[tuple[str, str], JudgeIdentity]:
    """(judge, dimension) -> what its certificate must name, for the judges that need one."""
    return {
        (judge.name, dimension): found
        for judge in judges
        for dimension in judge.dimensions
        if (found := identity(judge, dimension)) is not None
    }


def _trained_uncertified(folder: Path) -> set[tuple[str, str]]:
    """(judge, dimension) that had no certificate when it trained a policy of this run: what it
    gets later is not about that."""
    path = folder / STANDINGS
    if not path.exists():
        return set()
    entries = read_json(path, "it belongs to a run: put back what was changed")["standings"]
    trained = any(folder.parent.glob("rounds/*/policy"))
    return {
        (entry["judge"], entry["dimension"])
        for entry in entries
        if entry.get("trained_uncertified") or (trained and not entry["granted"])
    }


def _entry(standing: Standing) -> dict[str, str | bool | None]:
    named = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(standing).items()}
    return {**named, "granted": standing.granted}
