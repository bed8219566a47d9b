"""A run's folder as a reader sees it: nothing is locked, written or computed.

The run may be going on meanwhile. What is finished is named in a round's manifest and never
changes, so a reader sees whole things only, each as it was when the view was taken. Hashes are
compared by the run itself whenever it goes on (`rlhf.rounds`), not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.files import read_json
from rlhf.metrics import read_metrics

_REDO = "it belongs to a run: put back what was changed"


class RoundView:
    """What one round's folder holds. Names are those of `rlhf.rounds.Round`, such as `pairs`.

    Every method gives None for what is not finished, or was never kept.
    """

    def __init__(self, path: Path, index: int | None) -> None:
        self.path = path
        self.index = index
        manifest = path / "manifest.json"
        self.manifest = read_json(manifest, _REDO) if manifest.exists() else {}

    def kind(self, name: str) -> str | None:
        """`table`, `record`, `shards` or `folder`."""
        kind: str | None = self.manifest.get("artifacts", {}).get(name)
        return kind

    def record(self, name: str) -> dict[str, Any] | None:
        """A finished JSON object."""
        return read_json(self.path / f"{name}.json", _REDO) if self.kind(name) == "record" else None

    def table(self, name: str) -> pl.LazyFrame | None:
        """A finished table, in one part or several, to be collected by whoever asked."""
        kind = self.kind(name)
        if kind not in ("table", "shards"):
            return None
        path = self.path / name
        parts = [Path(f"{path}.parquet")] if kind == "table" else sorted(path.glob("*.parquet"))
        # A name holds whole files only, but scores are dropped while a judge is mended.
        if not parts or not all(part.exists() for part in parts):
            return None
        return pl.scan_parquet(parts, glob=False, hive_partitioning=False)


class RunView:
    """A run's config, status, log and rounds, finished or not.

    Raises `InputError` where `folder` holds no run that this version of pairloop can read.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "config.json"
        if not path.is_file():
            raise InputError(
                f"RUN_FOLDER must be the folder of a run, such as runs/demo: {folder} has no "
                "config.json; give the folder that `pairloop train` named in its first line"
            )
        self.folder = folder
        values = read_json(path, _REDO)
        if "data" in values:
            raise InputError(
                f"RUN_FOLDER must be the folder of a run with rounds, but {folder} is a training "
                f"on a preference file; its numbers stand in {folder / 'stats.json'}"
            )
        try:
            self.config = RunConfig.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{path} must be a config of this version of pairloop, but "
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}; read the run with the "
                "version that made it"
            ) from None
        status = folder / "status.json"
        self.status: dict[str, Any] = read_json(status, _REDO) if status.exists() else {}
        found = (folder / "rounds").glob("[0-9]" * 4)
        self.rounds = tuple(RoundView(p, int(p.name)) for p in sorted(found))
        """Those begun, in order; the first is the start, round 0."""
        self.final = RoundView(folder / "final", None)

    @property
    def evaluated(self) -> list[RoundView]:
        """Rounds whose held-out scores are known, the start included."""
        return [r for r in self.rounds if r.kind("evaluation") == "record"]

    @property
    def judged(self) -> list[RoundView]:
        """Rounds whose gates have spoken."""
        return [r for r in self.rounds if r.kind("gates") == "record"]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, less one that is being written."""
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []
