"""For scripts and notebooks: a config from files and plain values, and a run as tables.

    from rlhf import RunResults, load_config

`launch.train` runs a config and gives the same `RunResults`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from rlhf import config_io
from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.run_view import RoundView, RunView


def load_config(*files: str | Path, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """The config that these files make, later ones winning, with `settings` on top.

    A setting is a dotted key and a plain value, or a whole section as a mapping:
    `load_config("run.yaml", settings={"rounds.count": 1, "learner": {"epochs": 2}})`.

    Raises InputError with all that is wrong, one a line.
    """
    given = [(key, _text(key, value)) for key, value in (settings or {}).items()]
    return config_io.load([Path(file) for file in files], given)


def _text(key: str, value: Any) -> str:
    """A value as YAML text; JSON is such text."""
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise InputError(
            f"{key} must be text, a number, true or false, None, a list or a mapping of these, "
            f"got {kind} {value!r}"
        ) from None


class RunResults:
    """A run as tables (Polars) and paths, as it was when this was made. Jupyter shows its summary.

    Raises InputError where `folder` holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._view = RunView(self.folder)
        status = self._view.status
        self.state: str = status.get("state", "running")
        """`done`, `stopped_early`, `failed`, `interrupted` or `running`."""
        self.reason: str = status.get("reason") or "rounds are under way"
        self.best_round: int | None = status.get("best_round")
        """The promoted round with the highest reward on the gate split; None if there is none."""
        self.promoted: tuple[int, ...] = tuple(status.get("promoted", ()))

    @property
    def policy(self) -> Path | None:
        """Folder of the best round's weights, in Hugging Face's layout; None if there is none."""
        if self.best_round is None:
            return None
        return self.folder / "rounds" / f"{self.best_round:04d}" / "policy"

    @property
    def summary(self) -> str:
        """`summary.md`; before the first round is judged, one line."""
        file = self.folder / "summary.md"
        return file.read_text(encoding="utf-8") if file.is_file() else f"{self!r}\n"

    @property
    def change(self) -> pl.DataFrame:
        """The claim, on the final split: dimension, start, best, difference, low, high,
        smallest_detectable. Empty until the run has ended with a promoted round."""
        final = self._view.final.record("evaluation") or {"change": {}}
        return pl.DataFrame(
            [
                {
                    "dimension": name,
                    "start": final["start"][name]["value"],
                    "best": final["best"][name]["value"],
                    **{k: found[k] for k in ("difference", "low", "high", "smallest_detectable")},
                }
                for name, found in final["change"].items()
            ],
            schema={"dimension": pl.String} | dict.fromkeys(_CLAIM, pl.Float64),
        )

    @property
    def scores(self) -> pl.DataFrame:
        """The gate split, round by round (the start is round 0): round, dimension, score, low,
        high, n_prompts, n_clusters."""
        rows = []
        for view in self._view.evaluated:
            for name, found in (view.record("evaluation") or {})["scores"].items():
                kept = {k: found[k] for k in ("low", "high", "n_prompts", "n_clusters")}
                row = {"round": view.index, "dimension": name, "score": found["value"]}
                rows.append({**row, **kept})
        return pl.DataFrame(rows, schema=_SCORES)

    def pairs(self, round: int) -> pl.DataFrame:
        """A round's pairs, as `rlhf.types.pairs_schema` has them. Raises InputError before."""
        return self._table(round, "pairs")

    def completions(self, round: int) -> pl.DataFrame:
        """A round's sampled answers, schema `rlhf.types.COMPLETIONS`."""
        return self._table(round, "completions")

    def judged(self, round: int) -> pl.DataFrame:
        """Each judge's score of those answers, or why it abstained, schema `rlhf.types.SCORES`."""
        return self._table(round, "scores")

    def funnel(self, round: int) -> pl.DataFrame:
        """How many completions and prompts each selection step kept, and why the others fell."""
        record = self._round(round).record("funnel")
        if record is None:
            raise self._absent(round, "funnel")
        return pl.DataFrame(record["steps"])

    def __repr__(self) -> str:
        best = "no round promoted" if self.best_round is None else f"best round {self.best_round}"
        return f"{self.folder}: {self.state.replace('_', ' ')} ({self.reason}); {best}"

    def _repr_markdown_(self) -> str:
        return self.summary

    def _table(self, round: int, name: str) -> pl.DataFrame:
        table = self._round(round).table(name)
        if table is None:
            raise self._absent(round, name)
        return table.collect()

    def _round(self, round: int) -> RoundView:
        for view in self._view.rounds:
            if view.index == round:
                return view
        begun = ", ".join(str(view.index) for view in self._view.rounds) or "none"
        raise InputError(f"round must be one that was begun ({begun}), got {round}")

    def _absent(self, round: int, name: str) -> InputError:
        return InputError(f"round {round} of {self.folder} has no {name} (yet)")


_CLAIM = ("start", "best", "difference", "low", "high", "smallest_detectable")
_SCORES = {
    "round": pl.Int64,
    "dimension": pl.String,
    **dict.fromkeys(("score", "low", "high"), pl.Float64),
    **dict.fromkeys(("n_prompts", "n_clusters"), pl.Int64),
}
